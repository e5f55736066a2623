"""The fixtures of a small run, and a Hub on this machine."""

from hub_server import hub
from run_settings import configure, settings

__all__ = ["configure", "hub", "settings"]
