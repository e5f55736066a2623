"""Dataset config of kohya's trainer, TOML or JSON: [general], [[datasets]], [[datasets.subsets]]; the inner goes first.

Every key means what it means there, or is refused by name (kohya_keys). What the file says goes before
[data]. For what it leaves out, [data] takes the place of the trainer's command line: a setting that is
not as it comes counts, else the trainer's own default where it differs (buckets are off, the first line
of a caption is taken). Captions beside pictures and the length of a batch are always as [data] has them.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlora.config import ConceptSection
from sdlora.data.layouts.kohya_folders import list_folder
from sdlora.data.layouts.kohya_keys import (
    DATASET,
    GENERAL,
    KEYS,
    SUBSET,
    Keys,
    check_table,
    meaning_of,
    shown,
    sides_of,
    value_of,
)
from sdlora.data.layouts.kohya_metadata import list_entries
from sdlora.data.layouts.listing import Group, Listed, Listing, pictures_below, pictures_in
from sdlora.data.pictures import read_header
from sdlora.errors import DataError, first_line

NAME = "kohya-config"
_LOOKED_AT_BYTES = 1 << 16
_TOML_TABLE = re.compile(r"^\s*(\[{1,2}\s*(datasets|general)\s*[\].]|(datasets|general)\s*=)", re.MULTILINE)
# A picture may be called "general": then its caption follows.
_JSON_TABLE = re.compile(r'\s*\{\s*("datasets"\s*:\s*\[|"general"\s*:\s*\{(?!\s*"(caption|tags|train_resolution)"))')


def recognises(path: Path) -> bool:
    """Return whether it is a .toml or .json file that begins with the tables of a dataset config."""
    suffix = path.suffix.lower()
    if suffix not in {".toml", ".json"} or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES).decode("utf-8-sig", errors="replace")
    return bool(_TOML_TABLE.search(start) if suffix == ".toml" else _JSON_TABLE.match(start))


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return one concept a subset. Raises DataError when the file is none, or names no pictures."""
    file = Path(settings.folder).expanduser()
    config = _load(file)
    faults = len(problems)
    reading = _Reading(file, settings, problems)
    reading.read_config(config)
    if not reading.groups and len(problems) == faults:
        raise DataError(f"{file}: no subset of it gives pictures; name a folder of pictures as image_dir")
    return Listing("kohya dataset config", reading.groups, reading.notes)


def _load(file: Path) -> dict[str, Any]:
    form, parse = ("JSON", json.loads) if file.suffix.lower() == ".json" else ("TOML", tomllib.loads)
    try:
        config = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror or error}); name the dataset config itself"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        paths = "; paths with backslashes stand in single quotes" if re.search(r"\\|hex|escape", reason) else ""
        raise DataError(f"{file}: is not valid {form} ({reason}); correct it{paths}") from error
    if not isinstance(config, dict) or not isinstance(config.get("datasets"), list) or not config["datasets"]:
        raise DataError(f"{file}: has no [[datasets]]; expected a dataset config of kohya's trainer")
    return config


class _Reading:
    """The groups and notes found so far in one file."""

    def __init__(self, file: Path, settings: ConceptSection, problems: list[str]) -> None:
        self.file = file
        self.settings = settings
        self.problems = problems
        self.groups: list[Group] = []
        self.notes: list[str] = []

    def read_config(self, config: Mapping[str, Any]) -> None:
        """Every subset is a group; everything that is wrong is said."""
        for key in sorted(config.keys() - {"general", "datasets"}):
            known = "it belongs in [general] or [[datasets]]" if key in KEYS else "it is none of kohya's trainer"
            self._fault(f"{key} stands outside all tables; {known}")
        general = self._check(config.get("general", {}), GENERAL, "[general]", "")
        for number, dataset in enumerate(config["datasets"], 1):
            name = f"[[datasets]] {number}"
            outer = {**general, **self._check(dataset, DATASET, name, "subsets")}
            subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
            if not isinstance(subsets, list) or not subsets:
                self._fault(f"{name}: has no [[datasets.subsets]]; add one with image_dir")
                continue
            seen: set[tuple[Path | None, ...]] = set()
            for index, subset in enumerate(subsets, 1):
                self._read_subset(subset, outer, f"{name}, subset {index}", seen)

    def _read_subset(self, subset: Any, outer: Keys, name: str, seen: set[tuple[Path | None, ...]]) -> None:
        keys = {**outer, **self._check(subset, SUBSET, name, "")}
        meaning = meaning_of(keys, self.settings)
        for sentence in meaning.faults:
            self._fault(sentence)
        if not isinstance(subset, dict) or not self._is_consistent(subset, keys, name):
            return
        if value_of(keys, "num_repeats", 1) == 0:
            self._note(f"{name}: is left out, as num_repeats is 0")
            return
        images = self._find(keys, "image_dir", is_folder=True)
        metadata = self._find(keys, "metadata_file", is_folder=False)
        masks = self._find(keys, "conditioning_data_dir", is_folder=True)
        found = {"image_dir": images, "metadata_file": metadata, "conditioning_data_dir": masks}
        if any(key in subset and path is None for key, path in found.items()):
            return
        if (place := (metadata or images, masks)) in seen:
            self._note(f"{name}: is left out, as an earlier subset of the same [[datasets]] names the same place")
            return
        seen.add(place)
        for sentence in meaning.notes:
            self._note(sentence)
        settings = meaning.settings.model_copy(update={"folder": str(images or (metadata or self.file).parent)})
        pictures = self._large_enough(keys, self._list(settings, metadata, name))
        if masks:
            settings = self._masked(settings, masks, pictures)
        if meaning.size:
            pictures = [replace(picture, train_size=picture.train_size or meaning.size) for picture in pictures]
        if pictures:
            self.groups.append(Group(settings, pictures, meaning.prior))

    def _is_consistent(self, subset: Mapping[str, Any], keys: Keys, name: str) -> bool:
        """Return whether the subset can be read; say what is missing or at odds in it."""
        if not {"image_dir", "metadata_file"} & subset.keys():
            self._fault(f"{name}: image_dir is not set; name the folder of its pictures")
            return False
        if "conditioning_data_dir" in keys and value_of(keys, "alpha_mask", False):
            self._fault(f"{name}: has both alpha_mask and conditioning_data_dir; keep one, as a picture has one mask")
        beside = keys.get("caption_extension")
        if "metadata_file" in keys and beside and beside.table != GENERAL:
            self._fault(f"{beside.table}: caption_extension has no effect beside metadata_file; remove it")
        return True

    def _list(self, settings: ConceptSection, metadata: Path | None, name: str) -> list[Listed]:
        """Return the pictures that the metadata file names, or those in the folder."""
        folder = Path(settings.folder)
        if metadata is None:
            pictures = list_folder(folder, settings, self.problems)
            if not pictures:
                below = "; only its subfolders do, which are not read: name each" if pictures_below(folder) else ""
                self._fault(f"{name}: image_dir {folder} holds no pictures{below}")
            return pictures
        try:
            pictures, notes = list_entries(metadata, folder, settings.captions.separator, self.problems)
        except DataError as error:
            self.problems.append(str(error))
            return []
        self.notes += notes
        return pictures

    def _masked(self, settings: ConceptSection, masks: Path, pictures: list[Listed]) -> ConceptSection:
        """Return the settings with the folder of masks; every picture must have one there, as in kohya's trainer."""
        named = {path.stem for path in pictures_in(masks)}
        bare = [picture.path for picture in pictures if picture.path.stem not in named]
        self.problems += [f"{path}: has no mask of its name in {masks}; add one, or remove it" for path in bare]
        self._note("conditioning_data_dir is read as a folder of masks: white is learnt, black is not")
        rules = settings.masks.model_copy(update={"source": "folder", "folder": str(masks), "unmasked_weight": 0.0})
        return settings.model_copy(update={"masks": rules})

    def _large_enough(self, keys: Keys, pictures: list[Listed]) -> list[Listed]:
        """Return the pictures whose area is larger than that of skip_image_resolution."""
        if "skip_image_resolution" not in keys:
            return pictures
        value, table = keys["skip_image_resolution"]
        kept = [picture for picture in pictures if _area(picture.path) > math.prod(sides_of(value))]
        if len(kept) < len(pictures):
            self._note(
                f"{table}: skip_image_resolution leaves out {len(pictures) - len(kept)} of {len(pictures)} pictures"
            )
        return kept

    def _find(self, keys: Keys, key: str, *, is_folder: bool) -> Path | None:
        """Return the folder or file that a key names: beside the config, else in the folder one works in."""
        if key not in keys:
            return None
        value, table = keys[key]
        try:
            written = Path(value).expanduser()
            places = list(dict.fromkeys(parent.absolute() / written for parent in (self.file.parent, Path())))
            for place in places:
                if place.is_dir() if is_folder else place.is_file():
                    return place
        except (OSError, RuntimeError, ValueError):  # no path that a file could have
            places = [Path(value)]
        kind = "folder" if is_folder else "file"
        looked = f"there is no {kind} {' or '.join(map(str, places))}"
        self._fault(f'{table}: {key} is "{value}", but {looked}; correct the path')
        return None

    def _check(self, table: Any, kind: str, name: str, inner: str) -> Keys:
        if not isinstance(table, dict):
            self._fault(f"{name}: is {shown(table)}; expected a table {kind}")
            return {}
        faults: list[str] = []
        usable = check_table(table, kind, name, inner, faults)
        for sentence in faults:
            self._fault(sentence)
        return usable

    def _fault(self, sentence: str) -> None:
        """The sentence is a problem; one about a table that several subsets share is said once."""
        if (problem := f"{self.file}: {sentence}") not in self.problems:
            self.problems.append(problem)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def _area(path: Path) -> float:
    """Return the picture's number of pixels; one that cannot be read counts as large, and is reported when it is."""
    try:
        return math.prod(read_header(path).size)
    except DataError:
        return math.inf
