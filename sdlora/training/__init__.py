"""Training: assembly, the loop, its state on disk and its measurements."""
