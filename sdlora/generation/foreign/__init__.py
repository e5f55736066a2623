"""Pictures of other programs: what they say of themselves, as requests."""
