"""Who samples the responses: one file an engine, a dataclass with a `name` and the contract of `base.py`."""
