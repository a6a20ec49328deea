"""The typed config of every command: its stages, what contradicts what, and how it is typed. No torch."""
