"""The fixtures of a small run."""

from run_settings import configure, settings

__all__ = ["configure", "settings"]
