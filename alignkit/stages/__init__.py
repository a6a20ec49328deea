"""The stages: one file each, read from top to bottom.

`main(cfg, world, log)` does the work on every rank and returns (metrics, facts) for the manifest.
"""
