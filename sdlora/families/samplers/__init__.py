"""Samplers by the names people know: as data, as formulas, and as diffusers' schedulers or our own."""
