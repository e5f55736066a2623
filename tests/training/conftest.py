"""The fixtures of a small run, on a tiny base of each family."""

from every_family import shape
from run_settings import configure, settings

__all__ = ["configure", "settings", "shape"]
