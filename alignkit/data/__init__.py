"""Data sets: found, read, brought to one layout, validated; templates, ends and tokens of what they hold."""
