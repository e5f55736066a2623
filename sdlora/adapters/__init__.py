"""Adapters: one form in memory, the file formats of other programs, and their place in a live model."""
