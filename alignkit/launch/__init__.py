"""How a stage's processes are started: one file a launcher, a dataclass with `name`, `num_ranks`, `command` and `run`."""
