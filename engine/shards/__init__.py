"""The work of a shard, in the trainer's process or in an actor: streams over the experts' files."""
