"""Weight-space methods, one file each, behind `engine.methods.registry`. A merge by one of them learns nothing."""
