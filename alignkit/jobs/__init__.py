"""Runs in a queue: what is submitted, where it stands, how it goes on."""
