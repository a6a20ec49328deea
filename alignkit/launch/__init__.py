"""How a stage's processes are started: one file a launcher, a dataclass with `name`, `num_ranks`, `command` and `run`."""

# What the ranks' GLIBC_TUNABLES begin with; what the user's own say comes after and wins. torch asks for aligned memory and
# glibc cuts a piece off at both ends of such a block; kept in a cache of small pieces they are not joined to the block when
# it is freed, so its place is too small for the next of its size: on a CPU the heap grows to four times the graph. Without
# the two caches a PPO step of SmolLM2 (LoRA, float32) peaks at 5.4 instead of 7.6 GiB and is no slower.
ALLOCATOR = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
