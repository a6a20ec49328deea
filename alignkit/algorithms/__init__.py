"""An algorithm is one file here: a subclass of `base.Surrogate` with a `name`, `needs_critic` and `advantages(...)`.

The tensor maths they share is in `functional`.
"""
