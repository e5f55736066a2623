"""Pictures and captions: found, brought to pixels, encoded once, served in a fixed order."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how many pictures or captions are done, of how many."""
