"""Models: their files against their config, loading, adapters, score heads, what an architecture needs."""
