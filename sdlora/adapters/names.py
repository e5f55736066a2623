"""What formats, precisions and amounts of text are called where one is chosen. Needs no torch."""

FORMATS = ("kohya", "diffusers", "peft")
"""Formats that are written."""
PRECISIONS = ("fp32", "fp16", "bf16")
METADATA_LEVELS = ("full", "minimal", "none")
"""Text in a header: all, what programs need to use the file rightly, none."""
KEPT_TEXTS = ("public", "minimal", "none")
"""Text that is left in a header by stripping: what tells nothing of people and machines, what programs need, none."""
