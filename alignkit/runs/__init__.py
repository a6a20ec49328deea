"""A run on disk: its folder and manifest, the hashes of what lies in it, and who works there. No torch."""
