"""An adapter to the Hugging Face Hub: what goes there is settled first, and arrives in one commit."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sdlora.adapters.file import read_adapter
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, file_name
from sdlora.errors import ConfigError, FormatError, NetworkError, OutputError
from sdlora.families.sources import is_hub_id
from sdlora.headers import read_header
from sdlora.sharing.card import CARD, CardWishes, model_card
from sdlora.sharing.facts import AdapterFacts, adapter_facts
from sdlora.sharing.hub import hub_answers, hub_api, quiet_progress
from sdlora.sharing.privacy import Finding, paths_in_card, private_findings
from sdlora.sharing.samples import PICTURES, public_picture, samples
from sdlora.sharing.words import word_places
from sdlora.storage import is_there, sha256_of_file, user_path

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_LARGEST_CARD = 1_000_000
_MOST_SHOWN = 5
_MOST_NOTES = 20
_KEPT_BYTES = 10_000_000
_FRONT_MATTER = re.compile(r"\A\s*---\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class PublishedFile:
    """A file and where in the repository it goes."""

    place: str
    source: Path | bytes
    size: int
    sha256: str
    """Of its bytes, before they were checked."""


def _file(place: str, source: Path | bytes) -> PublishedFile:
    """Return the file as it is now. A small one is kept: the Hub's library reads those a second time, unhashed."""
    if isinstance(source, Path):
        if source.stat().st_size > _KEPT_BYTES:
            return PublishedFile(place, source, source.stat().st_size, sha256_of_file(source))
        source = source.read_bytes()
    return PublishedFile(place, source, len(source), hashlib.sha256(source).hexdigest())


@dataclass(frozen=True)
class Publication:
    """Everything that will lie in a repository, checked."""

    repository: str
    files: tuple[PublishedFile, ...]
    card: str
    notes: tuple[str, ...]
    message: str
    private: bool = False
    """Whether nobody else may see it."""
    overwrite: bool = False
    """Whether files of these names that are there already are replaced."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "repository": self.repository,
            "private": self.private,
            "message": self.message,
            "files": [{"path": file.place, "bytes": file.size, "sha256": file.sha256} for file in self.files],
            "notes": list(self.notes),
            "card": self.card,
        }


@dataclass(frozen=True)
class PublishWishes:
    """What the user wants published beside the adapter, and how."""

    card: Path | None = None
    """A card that is there; None makes one of `about` and `pictures`."""
    about: CardWishes = field(default_factory=CardWishes)
    pictures: Sequence[tuple[Path, str]] = ()
    """Picture files and their prompts."""
    message: str = ""
    private: bool = False
    overwrite: bool = False


def publication(path: Path | str, repository: str, wishes: PublishWishes) -> Publication:
    """Return what would be published; nothing is asked of the network.

    Raises ConfigError for what is no Hub id, FormatError for an adapter that cannot be read, and where its header or
    the card that is given tells paths of somebody's machine.
    """
    if not is_hub_id(repository):
        raise ConfigError(f"{repository}: is no Hugging Face id; expected owner/name")
    facts = adapter_facts(path)
    if facts.path.suffix != ".safetensors":
        raise FormatError(
            f"{facts.path}: other programs know an adapter by its suffix; rename it to end in .safetensors"
        )
    words = word_places(facts.path.parent, facts.words)
    files = [_file(facts.path.name, facts.path)]
    files += [_file(f"{EMBEDDINGS}/{file_name(word)}", place) for word, place in words.items()]
    # After the hashes, by which `publish` sees that it sends what was checked.
    read_adapter(facts.path)  # finds its words, and every number of both is finite
    notes = _private_notes([facts.path, *words.values()])
    if wishes.card is None:
        card, more = _made_card(facts, repository, wishes, notes)
    else:
        card, more = _given_card(user_path(wishes.card))
        if facts.report.sha256 not in card and re.search(r"\b[0-9a-f]{64}\b", card):
            notes.append(
                "the card tells another SHA-256 than the adapter has; make it anew if it is of an earlier file"
            )
    notes += [f"the adapter has a problem: {problem}" for problem in facts.report.problems]
    return Publication(
        repository,
        (*files, _file(CARD, card.encode()), *more),
        card,
        tuple(notes),
        wishes.message.strip() or f"Publish {facts.name}",
        wishes.private,
        wishes.overwrite,
    )


def publish(wanted: Publication) -> str:
    """All files lie in the repository, which is made where there is none, in one commit; returns its address.

    Raises NetworkError for what the Hub or the network refuses, OutputError where files are there already or the
    repository is seen by everybody and should not be, FormatError where a file is not what was checked any more. Then
    nothing of the files has arrived.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = wanted.repository
    if not get_token():
        raise NetworkError(
            f"{name}: nobody is logged in; run 'hf auth login', or set HF_TOKEN to a token that may write there"
        )
    api, operations = hub_api(), [_operation(file) for file in wanted.files]
    with hub_answers(name), quiet_progress():
        try:
            there = api.model_info(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            api.create_repo(name, private=wanted.private or None, exist_ok=True)
            there = api.model_info(name)
        _check_room(wanted, {entry.rfilename for entry in there.siblings or ()}, bool(there.private))
        commit = api.create_commit(
            name,
            operations,
            commit_message=wanted.message,
            parent_commit=there.sha,  # so that nobody's change between the look and the commit is lost
        )
    return str(commit.commit_url)


def _operation(file: PublishedFile) -> CommitOperationAdd:
    """Return what sends the file. Raises FormatError where it is not what was checked any more."""
    from huggingface_hub import CommitOperationAdd

    try:
        operation = CommitOperationAdd(file.place, file.source)
        if operation.upload_info.sha256.hex() == file.sha256:
            return operation
    except (OSError, ValueError):  # gone
        pass
    raise FormatError(f"{file.place}: has changed since it was checked, nothing was sent; publish it again")


def _check_room(wanted: Publication, there: set[str], private: bool) -> None:
    if wanted.private and not private:
        raise OutputError(
            f"{wanted.repository}: is there and everybody can see it; make it private in its settings, "
            "name another, or leave --private out"
        )
    taken = [file.place for file in wanted.files if file.place in there]
    if taken and not wanted.overwrite:
        raise OutputError(
            f"{wanted.repository}: has {', '.join(taken[:_MOST_SHOWN])} already; say --overwrite to replace it "
            "(the repository's history keeps what was there), or name another repository"
        )


def _private_notes(files: Sequence[Path]) -> list[str]:
    """Return what the headers tell about a person. Raises FormatError where one tells a path."""
    notes = []
    for file in files:
        found = private_findings(read_header(file).metadata)
        if paths := [finding for finding in found if finding.kind == "path"]:
            raise FormatError(_refusal(file, paths))
        notes += [f"{file.name}: {finding.sentence()}" for finding in found[:_MOST_NOTES]]
        if len(found) > _MOST_NOTES:
            notes.append(f"{file.name}: {len(found) - _MOST_NOTES} more entries of its header tell something")
        if any(finding.kind == "private" for finding in found):
            notes.append(f"{file.name}: 'sdlora adapter strip {shlex.quote(str(file))} OUT' leaves that out")
    return notes


def _refusal(file: Path, paths: Sequence[Finding]) -> str:
    shown = "; ".join(finding.sentence() for finding in paths[:_MOST_SHOWN])
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    return f"{file}: not published, its header is private: {shown}{more}; leave that out with 'sdlora adapter strip {shlex.quote(str(file))} OUT'"


def _made_card(
    facts: AdapterFacts, repository: str, wishes: PublishWishes, notes: list[str]
) -> tuple[str, list[PublishedFile]]:
    about = wishes.about
    card = model_card(
        facts, CardWishes(about.base_model, about.license, about.author, repository), samples(wishes.pictures)
    )
    notes += card.notes
    return card.text, [_file(sample.place, sample.data) for sample in card.samples]


def _given_card(path: Path) -> tuple[str, list[PublishedFile]]:
    """Return the text of a card that is there, and the pictures beside it that its front matter shows."""
    try:
        if path.stat().st_size > _LARGEST_CARD:
            raise FormatError(f"{path}: is too large for a model card ({path.stat().st_size} bytes)")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a model card; 'sdlora adapter card' makes one") from error
    pictures = dict.fromkeys(_shown(path, _front_matter(path, text).get("widget")))
    if paths := paths_in_card(text):
        shown = ", ".join(paths[:_MOST_SHOWN])
        raise FormatError(f"{path}: not published, it tells paths of a machine: {shown}; take them out of the card")
    return text, [_file(place, public_picture(path.parent / place)) for place in pictures]


def _front_matter(card: Path, text: str) -> Mapping[Any, Any]:
    """Return what stands between the --- lines, nothing where there are none. Raises FormatError for what is no YAML."""
    import yaml  # with which huggingface_hub reads it

    block = _FRONT_MATTER.match(text)
    try:
        found = yaml.safe_load(block[1]) if block else {}
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise FormatError(f"{card}: its front matter is no YAML; correct what stands between the --- lines") from error
    return found if isinstance(found, dict) else {}


def _shown(card: Path, widget: Any) -> Iterator[str]:
    """Yield the pictures that a card's widget shows from beside it. Raises FormatError where one is not there."""
    for entry in widget if isinstance(widget, list) else ():
        output = entry.get("output") if isinstance(entry, dict) else None
        url = output.get("url") if isinstance(output, dict) else None
        if not isinstance(url, str) or "://" in url:
            continue
        place = PurePosixPath(url)
        if place.is_absolute() or ".." in place.parts or set(url) & {":", "\\"} or not is_there(card.parent / place):
            raise FormatError(f"{card}: shows {url!r}, which does not lie beside it; correct the widget")
        if place.suffix.lower() not in PICTURES:  # others would be PNG under a name that says something else
            raise FormatError(f"{card}: shows {url!r}; expected a picture that is called {', '.join(PICTURES)}")
        yield str(place)
