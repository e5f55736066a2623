"""Adapters among people: cards, sidecars, publishing, fetching, and a searchable library."""
