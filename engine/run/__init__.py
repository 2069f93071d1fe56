"""The state from which a merge resumes, its identity, and the preparation before any actor starts. Knows no Ray."""
