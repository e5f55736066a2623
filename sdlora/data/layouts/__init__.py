"""The ways in which people keep pictures and captions: one module a layout."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from sdlora.config import ConceptSection
from sdlora.data.layouts import folders, hub, imagefolder, kohya_config, kohya_folders, kohya_metadata, shards
from sdlora.data.layouts.listing import Layout, Listing
from sdlora.errors import DataError

# In the order in which a place is tried; a plain folder is what is left.
_MODULES = (hub, kohya_config, kohya_metadata, imagefolder, shards, kohya_folders, folders)
_LAYOUTS = {module.NAME: cast(Layout, module) for module in _MODULES}


def list_pictures(settings: ConceptSection, setting: str, problems: list[str]) -> Listing:
    """Return what is at `settings.folder`, read as `settings.layout` says or as it looks.

    `setting` names where the folder was set, for messages. Faults of single files become sentences in
    `problems`. Raises DataError when nothing can be read there at all.
    """
    try:
        return _list(settings, setting, problems)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a name too long, no such user
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        where = getattr(error, "filename", None) or settings.folder
        raise DataError(f"{where}: cannot be read ({reason}); {setting} must name the folder of pictures") from error


def _list(settings: ConceptSection, setting: str, problems: list[str]) -> Listing:
    path = Path(settings.folder).expanduser()
    if settings.layout == "hub" or (settings.layout == "auto" and hub.recognises(path)):
        return hub.read(settings, problems)
    if not path.exists():
        raise DataError(f"{path}: there is no such folder; {setting} must name the folder of pictures")
    if settings.layout != "auto":
        return _LAYOUTS[settings.layout].read(settings, problems)
    for layout in _LAYOUTS.values():
        if layout.recognises(path):
            return layout.read(settings, problems)
    raise DataError(
        f"{path}: is a file; {setting} must name the folder it lies in, a dataset file of kohya's trainer "
        "(.toml, .json), or a table of pictures (.parquet, .arrow, .tar)"
    )
