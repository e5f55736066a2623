"""An adapter from the Hugging Face Hub or the web into a folder, checked before it lies there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdlora.adapters.convert import refuse_existing
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.formats import kohya, peft
from sdlora.adapters.formats.detect import EMBEDDING, contents_of
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, file_name, file_names, named_words
from sdlora.adapters.header_text import plain
from sdlora.adapters.stored import stored
from sdlora.adapters.write import refuse_other_words
from sdlora.errors import ConfigError, FormatError, NetworkError, OutputError
from sdlora.sharing.address import SUFFIX, HubPlace, fetched_name, parse_address, safe_file_name, shown
from sdlora.sharing.download import Download, OnBytes, download
from sdlora.sharing.hub import endpoint, hub_answers, hub_api
from sdlora.sharing.words import word_places
from sdlora.storage import check_writable, is_there, user_path

_MOST_LOOKED_AT, _MOST_SHOWN = 20, 10
_LARGEST_WORD = 50_000_000
_PEFT = (
    "an adapter in PEFT's form, and PEFT's folders are not fetched; download the weights and adapter_config.json, and run "
    "'sdlora adapter convert FOLDER OUT.safetensors'"
)
_MOST_WORDS = 100
_PICKLES = (".pt", ".bin", ".ckpt", ".pth")


@dataclass(frozen=True)
class FetchWishes:
    """Where to, and what is expected."""

    folder: Path = Path()
    name: str = ""
    """Of the file to write; "" takes the one that it has there."""
    file: str = ""
    """Of a repository; "" takes the only adapter."""
    revision: str = ""
    sha256: str = ""
    civitai_token: str = ""
    most_bytes: int = 4_000_000_000
    overwrite: bool = False


@dataclass(frozen=True)
class Fetched:
    """What lies in the folder now."""

    path: Path
    words: tuple[Path, ...]
    """Embedding files that came along."""
    source: str
    """The address that it came from."""


def fetch(text: str, wishes: FetchWishes, on_bytes: OnBytes | None = None) -> Fetched:
    """The adapter that an id or address names lies in the folder, with its words; else the folder is as it was.

    Raises ConfigError for what names nothing, NetworkError, FormatError for what is no adapter that can be read or
    has another hash, OutputError where something of that name is there.
    """
    place = parse_address(text)
    if wishes.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", wishes.sha256):
        raise ConfigError(f"--sha256 {plain(wishes.sha256)}: expected 64 hexadecimal digits")
    if isinstance(place, HubPlace):
        place = _settled(place, wishes)
    elif wishes.file or wishes.revision:
        raise ConfigError(
            f"{shown(place.url)}: --file and --revision are for the Hugging Face Hub; give the file's address"
        )
    folder = user_path(wishes.folder)
    check_writable(folder)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as name:
        temporary = Path(name)

        def choose(told: str) -> Path:
            if isinstance(place, HubPlace) and not wishes.name:
                told = fetched_name(place.repository, place.file)
            safe = safe_file_name(wishes.name or told)
            if safe == peft.WEIGHTS:
                raise FormatError(f"{shown(url)}: is of {_PEFT}")
            refuse_existing(folder / safe, wishes.overwrite)
            return temporary / safe

        url = _hub_url(place) if isinstance(place, HubPlace) else place.url
        hub_id = place.repository if isinstance(place, HubPlace) else ""
        got = download(
            url, choose, limit=wishes.most_bytes, civitai_token=wishes.civitai_token, hub_id=hub_id, on_bytes=on_bytes
        )
        _check_hash(got, wishes.sha256, url)
        with _named(temporary, shown(url)):
            room = wishes.most_bytes - got.path.stat().st_size
            words = _bring_words(got.path, folder, place if isinstance(place, HubPlace) else None, room)
            adapter = read_adapter(got.path)
        moved = _move(got.path, words, folder, adapter, wishes.overwrite)
        return Fetched(folder / got.path.name, moved, shown(url))


def _settled(place: HubPlace, wishes: FetchWishes) -> HubPlace:
    """Return the place with its file and revision. Raises ConfigError where the user said two things."""
    for flag, said, known in (("--file", wishes.file, place.file), ("--revision", wishes.revision, place.revision)):
        if said and known and said != known:
            raise ConfigError(f"{place.repository}: the address names {known!r} and {flag} {said!r}; leave one out")
    revision = place.revision or wishes.revision
    file = place.file or wishes.file or _only_adapter(place.repository, revision)
    if PurePosixPath(file).name == peft.WEIGHTS:
        raise FormatError(f"{place.repository}/{plain(file)}: is of {_PEFT}")
    if not file.endswith(SUFFIX):
        why = "could run code when opened; look for a .safetensors file there" if file.endswith(_PICKLES) else "is none"
        raise FormatError(f"{place.repository}/{plain(file)}: only .safetensors files are fetched, and this {why}")
    return HubPlace(place.repository, file, revision)


def _hub_url(place: HubPlace) -> str:
    from huggingface_hub import hf_hub_url

    try:
        return hf_hub_url(place.repository, place.file, revision=place.revision or None, endpoint=endpoint())
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{place.repository}: has no file called {plain(place.file)!r}, as no address can hold that name"
        ) from error


def _only_adapter(repository: str, revision: str) -> str:
    """Return the one file of a repository that is an adapter. Raises FormatError where it is not one."""
    with hub_answers(repository, revision):
        listed = [
            entry.rfilename for entry in hub_api().model_info(repository, revision=revision or None).siblings or ()
        ]
    listed = [file for file in listed if isinstance(file, str)]  # a server may say anything
    files = [file for file in listed if file.endswith(SUFFIX)]
    if not files:
        pickles = [file for file in listed if file.endswith(_PICKLES)]
        others = f" but pickles such as {plain(pickles[0])}, which could run code when opened" if pickles else ""
        raise FormatError(f"{repository}: holds no .safetensors file{others}")
    files = [file for file in files if PurePosixPath(file).name != peft.WEIGHTS]
    if not files:
        raise FormatError(f"{repository}: holds {_PEFT}")
    own = [file for file in files if EMBEDDINGS not in PurePosixPath(file).parts[:-1]] or files
    if len(own) > 1 and len(own) <= _MOST_LOOKED_AT:
        own = [file for file in own if _is_adapter(repository, file, revision)] or own
    if len(own) > 1:
        some = ", ".join(plain(file) for file in own[:_MOST_SHOWN])
        more = f" and {len(own) - _MOST_SHOWN} more" if len(own) > _MOST_SHOWN else ""
        raise FormatError(f"{repository}: holds several files: {some}{more}; choose one with --file")
    return own[0]


def _is_adapter(repository: str, file: str, revision: str) -> bool:
    """Return whether a file is an adapter with layers, by its header alone."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, SafetensorsParsingError

    odd = (FormatError, SafetensorsParsingError, ValueError, TypeError, AttributeError, KeyError)
    with hub_answers(repository, revision):
        try:
            header = hub_api().parse_safetensors_file_metadata(repository, file, revision=revision or None)
            shapes = {key: tuple(tensor.shape) for key, tensor in header.tensors.items()}
            if not all(type(size) is int for shape in shapes.values() for size in shape):
                return False
            return contents_of(shapes, header.metadata or {}).format != EMBEDDING
        except (HFValidationError, OfflineModeIsEnabled):
            raise
        except odd:  # what its header holds is a stranger's
            return False


def _check_hash(got: Download, wanted: str, url: str) -> None:
    for expected, who in ((wanted.lower(), "--sha256 says"), (got.promised_sha256, "the Hub says")):
        if expected and got.sha256 != expected:
            raise FormatError(
                f"{shown(url)}: came with SHA-256 {got.sha256}, {who} {expected}; nothing was kept, try again"
            )


@contextmanager
def _named(temporary: Path, name: str) -> Iterator[None]:
    """Errors about a file in the temporary folder speak of `name` instead."""
    try:
        yield
    except FormatError as error:
        text = re.sub(rf"^{re.escape(str(temporary))}[^:]*", lambda _: name, str(error))
        raise FormatError(text.replace(f"{temporary}{os.sep}", "")) from error


def _bring_words(adapter: Path, folder: Path, place: HubPlace | None, room: int) -> list[Path]:
    """The embeddings that the adapter names lie beside it; returns those that the folder does not have yet.

    `room` is how many bytes they may have together.
    """
    found = stored(adapter)
    words, brought = named_words(found.metadata), []
    if len(words) > _MOST_WORDS:
        raise FormatError(f"{adapter}: names {len(words)} new words; expected at most {_MOST_WORDS}")
    beside = adapter.parent / EMBEDDINGS
    beside.mkdir(exist_ok=True)
    for word, file in word_places(folder, words).items():
        shutil.copyfile(file, beside / file_name(word))
    for word in words:
        target = beside / file_name(word)
        if target.exists():
            continue
        if place is None:
            raise FormatError(
                f"{adapter}: was trained together with the new word {word!r}, which is not in the file; "
                f"put its own {file_name(word)} into {folder / EMBEDDINGS} first, and fetch again"
            )
        _download_word(word, target, place, min(room, _LARGEST_WORD))
        room -= target.stat().st_size
        brought.append(target)
    return brought


def _download_word(word: str, target: Path, place: HubPlace, limit: int) -> None:
    above = PurePosixPath(place.file).parent
    places = [folder / name for name in file_names(word) for folder in (above / EMBEDDINGS, above)]
    for file in places:
        url = _hub_url(HubPlace(place.repository, str(file), place.revision))
        try:
            download(url, lambda _: target, limit=limit, hub_id=place.repository)
            return
        except NetworkError as error:
            last = error
    raise FormatError(
        f"{place.repository}: the adapter was trained together with the new word {word!r}, and neither "
        f"{' nor '.join(map(str, places))} can be had ({last})"
    )


def _move(
    adapter: Path, words: Sequence[Path], folder: Path, content: AdapterFile, overwrite: bool
) -> tuple[Path, ...]:
    """The files lie in the folder, the words first, as the adapter names them; returns the words' places.

    Raises OutputError, and then has moved nothing, where something is there now that may not be replaced.
    """
    refuse_existing(folder / adapter.name, overwrite)
    if content.layers:
        refuse_other_words(content, folder / adapter.name, kohya.NAME)
    moved, beside = list[Path](), folder / EMBEDDINGS
    made = bool(words) and not is_there(beside)
    try:
        for file in words:
            beside.mkdir(exist_ok=True)
            refuse_existing(beside / file.name, False)
            moved.append(file.replace(beside / file.name))
        adapter.replace(folder / adapter.name)
    except (OSError, OutputError) as error:
        for undo in (*(file.unlink for file in moved), *[beside.rmdir] * made):
            with suppress(OSError):
                undo()
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    return tuple(moved)
