"""Data sets on the Hugging Face Hub, read over the network a few pictures at a time.

The `datasets` library finds out which files are which split; parquet files and WebDataset archives are then
read as those on this machine are. Pictures and captions are not stored. The library keeps the data set's
README.md in the Hub's cache folder; what else it would write goes to a temporary folder.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from sdlora.config import ConceptSection
from sdlora.data.layouts.columns import NEEDS_EXTRA, Kind, caption_column, caption_lines, picture_column
from sdlora.data.layouts.listing import PICTURE_SUFFIXES, Group, Listed, Listing
from sdlora.data.layouts.origin import Origin
from sdlora.data.layouts.shards import list_shards
from sdlora.data.layouts.splits import choose_split
from sdlora.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets.builder import DatasetBuilder

NAME = "hub"

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_FILE_SUFFIXES = {".toml", ".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow", ".tar", ".zip"} | PICTURE_SUFFIXES
_AHEAD = 1 << 20


def recognises(path: Path) -> bool:
    """Return whether this can only be a data set's id, "owner/name": nothing local is called so or lies beside it."""
    if not _ID.fullmatch(path.as_posix()) or path.suffix.lower() in _FILE_SUFFIXES:
        return False
    return not path.exists() and not path.parent.exists()


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return the rows of the chosen split; their pictures are fetched when they are asked for."""
    name = settings.folder
    if not _ID.fullmatch(name):
        raise DataError(f'{name}: is no id of a data set; data.layout = "{NAME}" needs "owner/name"')
    with _opened(name) as builder:
        files = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
        if not files:
            raise DataError(f"{name}: holds no files that can be read; {_download(name)}")
        split = choose_split(settings.split, files, name)
        others = [f'"{other}"' for other in files if other != split]
        notes = [f'only the split "{split}" is used; data.split can name {", ".join(others)}'] if others else []
        if builder.name == "imagefolder":
            listing = _list_pictures(builder, split, settings, problems)
        elif builder.name in {"parquet", "webdataset"}:
            origins = [_origin(name, url) for url in files[split]]
            listing = list_shards(origins, settings, problems, ())
        else:
            raise DataError(
                f"{name}: is stored as {builder.name}, of which no pictures can be read from the Hub "
                f"(parquet, WebDataset and imagefolder can); {_download(name)}"
            )
    return Listing(f"Hugging Face dataset ({builder.name})", listing.groups, notes)


@contextmanager
def _opened(name: str) -> Iterator[DatasetBuilder]:
    """Yield what the library knows of a data set; it is silent, and its failures are DataErrors."""
    try:
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from datasets.load import load_dataset_builder
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
    except ImportError as error:  # also where a folder called "datasets" is all that there is
        raise DataError(f"{name}: {NEEDS_EXTRA}; or correct data.folder where it should be a folder") from error
    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    unreachable: tuple[type[Exception], ...] = (ConnectionError, *_network_errors())
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            yield load_dataset_builder(name, cache_dir=cache)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{name}: there is no such folder, and no such data set on the Hugging Face Hub that may be read "
            f"({first_line(error)}); correct data.folder, or set HF_TOKEN to a token with access"
        ) from error
    except unreachable as error:
        raise DataError(
            f"{name}: there is no such folder, and the Hugging Face Hub cannot be reached ({first_line(error)}); "
            f"correct data.folder, go online and unset HF_HUB_OFFLINE, or {_download(name)}"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name}: cannot be read from the Hugging Face Hub ({reason}); {_download(name)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what requests of huggingface_hub end in where there is no answer."""
    from httpx2 import HTTPError

    return (HTTPError,)


def _download(name: str) -> str:
    return f"download it (hf download {name} --repo-type dataset --local-dir FOLDER) and name the folder"


def _origin(name: str, url: str) -> Origin:
    """Return the origin of a file of the data set."""
    errors: tuple[type[Exception], ...] = (OSError, *_network_errors())
    return Origin(_label(name, url), lambda ahead: _open(url, ahead), version=_version(url), errors=errors)


def _version(url: str) -> str:
    """Return the address of a file if it names the commit that the file is of, else ""."""
    return url if re.search(r"@[0-9a-f]{40}/", url) else ""


def _label(name: str, url: str) -> str:
    """Return what a file is called in messages: "owner/name/data/train.parquet"."""
    return f"{name}/{url.partition('@')[2].partition('/')[2] or url.rpartition('/')[2]}"


def _open(url: str, ahead: int) -> BinaryIO:
    import fsspec

    return cast(BinaryIO, fsspec.open(url, "rb", block_size=ahead).open())


def _list_pictures(builder: DatasetBuilder, split: str, settings: ConceptSection, problems: list[str]) -> Listing:
    """Return the pictures that lie in the data set as files, with the captions of its table."""
    from datasets.features import Image

    name = settings.folder
    dataset: Any = builder.as_streaming_dataset(split)
    kinds = _kinds(dataset.features)
    picture = picture_column(kinds, settings, name)
    caption = caption_column(kinds, settings, name)
    reader = _Pictures()
    listed = []
    for row in dataset.cast_column(picture, Image(decode=False)):
        url = (row[picture] or {}).get("path")
        lines = caption_lines(row[caption]) if caption else None
        if url:
            listed.append(Listed(Path(_label(name, url)), lines, rows=reader, row=reader.add(url)))
        else:
            problems.append(f"{name}, row {len(listed)}: names no picture; remove the row")
    if not listed:
        raise DataError(f"{name}: holds no pictures")
    return Listing(NAME, [Group(settings, listed)])


def _kinds(features: Any) -> dict[str, Kind]:
    """Return what each column holds."""
    from datasets.features import Image, List, Value

    def kind(feature: Any) -> Kind:
        if isinstance(feature, Image):
            return "picture"
        inner = feature.feature if isinstance(feature, List) else feature
        return "text" if isinstance(inner, Value) and inner.dtype in {"string", "large_string"} else "other"

    return {name: kind(feature) for name, feature in features.items()}


class _Pictures:
    """The `RowReader` of pictures that are files of their own; any thread may read."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._errors: tuple[type[Exception], ...] = (OSError, *_network_errors())

    def add(self, url: str) -> int:
        """Take up one picture more, and return its number."""
        self._urls.append(url)
        return len(self._urls) - 1

    def stamp(self, row: int) -> str:
        """Return the picture's address, if that is for ever."""
        return _version(self._urls[row])

    def read(self, row: int) -> bytes:
        """Return the picture file in row `row`. Raises DataError."""
        try:
            with _open(self._urls[row], _AHEAD) as file:
                return file.read()
        except self._errors as error:
            raise DataError(f"{self._urls[row]}: cannot be fetched ({first_line(error)})") from error
