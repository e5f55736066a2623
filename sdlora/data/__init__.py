"""Pictures and captions: found, brought to pixels, encoded once, served in a fixed order."""
