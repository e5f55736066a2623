from every_family import shape
from run_settings import configure, settings

__all__ = ["configure", "settings", "shape"]
