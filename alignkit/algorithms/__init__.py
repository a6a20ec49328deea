"""An algorithm is one file here: a dataclass with a `name`, `needs_critic`, `experience(...)` and `loss(...)`.

The tensor maths they share is in `functional`.
"""
