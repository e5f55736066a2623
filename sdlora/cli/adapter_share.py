"""`sdlora adapter card | sidecar | publish | fetch`: adapters on their way to other people, and from them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.cli.adapter_output import add_json
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import is_there, user_path

if TYPE_CHECKING:
    from sdlora.adapters.inspect import AdapterReport
    from sdlora.sharing.publish import Publication

Describe = Callable[["AdapterReport"], Iterator[str]]
_MOST_GIGABYTES = 1000.0


def add_parsers(commands: Any, describe: Describe) -> None:
    """`card`, `sidecar`, `publish` and `fetch` are among the subcommands; `describe` gives the lines of `inspect`."""
    _add_card(commands)
    _add_sidecar(commands)
    _add_publish(commands)
    _add_fetch(commands, describe)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="a model card for the Hugging Face Hub",
        description="Write a README.md with front matter, trigger words, how to use the file in each program, settings, "
        "and hashes. Pictures are copied to samples/ beside it without anything but their pixels.",
    )
    card.add_argument("path", type=Path, metavar="FILE", help="adapter file")
    card.add_argument("--out", type=Path, metavar="README.md", help="card to write; left out: beside the adapter")
    _add_card_flags(card)
    card.add_argument(
        "--repo", default="", metavar="OWNER/NAME", help="where it will lie; the code in the card says so"
    )
    card.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_json(card)
    card.set_defaults(run=_card)


def _add_card_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample",
        action="append",
        default=[],
        metavar="PICTURE:PROMPT",
        help="repeat it. A picture that sdlora made knows its prompt: PICTURE is enough",
    )
    parser.add_argument("--license", default="", metavar="ID", help="such as apache-2.0 or creativeml-openrail-m")
    parser.add_argument(
        "--base-model", default="", metavar="OWNER/NAME", help="Hub id of the base; left out: as the header tells"
    )
    parser.add_argument("--author", default="", metavar="NAME", help="who made it")


def _add_sidecar(commands: Any) -> None:
    sidecar = commands.add_parser(
        "sidecar",
        help="files beside it for AUTOMATIC1111 and Forge",
        description="Write NAME.json, which fills in the adapter's card in AUTOMATIC1111 and Forge, and NAME.preview.png. "
        "What a JSON file there says already stays.",
    )
    sidecar.add_argument("path", type=Path, metavar="FILE", help="adapter file")
    sidecar.add_argument("--preview", type=Path, metavar="PICTURE", help="picture to show")
    sidecar.add_argument("--thumbnail", action="store_true", help="the picture goes into the file's header instead")
    sidecar.add_argument("--weight", type=float, help="preferred weight")
    sidecar.add_argument("--notes", metavar="TEXT", help="notes")
    sidecar.add_argument("--negative", metavar="TEXT", help="what negative prompts should say")
    sidecar.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    add_json(sidecar)
    sidecar.set_defaults(run=_sidecar)


def _add_publish(commands: Any) -> None:
    publish = commands.add_parser(
        "publish",
        help="upload it to the Hugging Face Hub",
        description="Upload adapter, new words, model card and sample pictures in one commit, to a repository that is "
        "made where there is none. Refused where the header tells paths of your machine.",
    )
    publish.add_argument("path", type=Path, metavar="FILE", help="adapter file")
    publish.add_argument("repository", metavar="REPO", help="owner/name")
    publish.add_argument(
        "--dry-run", action="store_true", help="show what would go there; nothing is asked of the network"
    )
    publish.add_argument("--private", action="store_true", help="nobody else sees it")
    publish.add_argument("--card", type=Path, metavar="README.md", help="a card of yours; left out: one is made")
    _add_card_flags(publish)
    publish.add_argument("--message", default="", metavar="TEXT", help="of the commit")
    publish.add_argument("--overwrite", action="store_true", help="replace files of these names that are there")
    add_json(publish)
    publish.set_defaults(run=_publish)


def _add_fetch(commands: Any, describe: Describe) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="bring one in from the Hub or the web",
        description="Download an adapter with its new words, check it, and tell what it is. Nothing is left behind where "
        "it is something else.",
    )
    fetch.add_argument(
        "source", metavar="ID_OR_URL", help="owner/name, owner/name/FILE, or an https address (Hub, Civitai, any other)"
    )
    fetch.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="left out: the folder you are in")
    fetch.add_argument("--name", default="", help="of the file to write; left out: the one that it has there")
    fetch.add_argument("--file", default="", metavar="NAME", help="which of a repository; left out: its only adapter")
    fetch.add_argument("--revision", default="", help="branch, tag or commit of a repository")
    fetch.add_argument("--sha256", default="", metavar="HEX", help="of the file, which is refused if it has another")
    fetch.add_argument("--token", default="", help="of Civitai, sent there alone; better in CIVITAI_TOKEN")
    fetch.add_argument("--max-gigabytes", type=float, default=4.0, metavar="N", help="refuse larger files")
    fetch.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_json(fetch)
    fetch.set_defaults(run=lambda options: _fetch(options, describe))


def _card(options: argparse.Namespace) -> int:
    from sdlora.sharing.card import CARD, CardWishes, model_card, write_card
    from sdlora.sharing.facts import adapter_facts
    from sdlora.sharing.samples import samples

    facts = adapter_facts(options.path)
    wishes = CardWishes(options.base_model, options.license, options.author, options.repo)
    made = model_card(facts, wishes, samples(_samples(options)))
    target = user_path(options.out) if options.out else facts.path.parent / CARD
    if is_there(target) and target.samefile(facts.path):
        raise ConfigError(f"--out {target}: is the adapter itself; name another file, such as README.md")
    written = write_card(made, target, options.overwrite)
    if options.json:
        _print_json(
            {
                "card": str(target),
                "samples": list(map(str, written[1:])),
                "base_model": made.base_model,
                "notes": made.notes,
            }
        )
        return 0
    for path in written:
        print(path)
    _print_notes(made.notes)
    return 0


def _sidecar(options: argparse.Namespace) -> int:
    from sdlora.sharing.sidecar import Wishes, write_sidecar

    written = write_sidecar(
        options.path,
        Wishes(options.weight, options.notes, options.negative),
        preview=options.preview,
        thumbnail=options.thumbnail,
        overwrite=options.overwrite,
    )
    if options.json:
        files = {"files": list(map(str, written.files)), "entries": written.entries}
        _print_json({**files, "sha256": written.sha256, "notes": written.notes})
        return 0
    for path in written.files:
        print(path)
    if written.sha256:
        print(f"  sha256    {written.sha256} (a new one, by the new header; autov3 stays)")
    _print_notes(written.notes)
    return 0


def _publish(options: argparse.Namespace) -> int:
    from sdlora.sharing.card import CardWishes
    from sdlora.sharing.publish import PublishWishes, publication, publish

    made = [name for name in ("sample", "license", "base_model", "author") if getattr(options, name)]
    if options.card and made:
        raise ConfigError(
            f"--card and --{made[0].replace('_', '-')}: the card is used as it is; write that into it, or leave one out"
        )
    wishes = PublishWishes(
        options.card,
        CardWishes(options.base_model, options.license, options.author),
        _samples(options),
        options.message,
        options.private,
        options.overwrite,
    )
    wanted = publication(options.path, options.repository, wishes)
    if not options.json:
        _print_publication(wanted, options.dry_run)
    address = "" if options.dry_run else publish(wanted)
    if options.json:
        _print_json({**wanted.to_json(), "dry_run": options.dry_run, "commit": address})
    elif address:
        print(f"published in one commit: {address}")
    return 0


def _print_publication(wanted: Publication, dry_run: bool) -> None:
    from rich.filesize import decimal

    from sdlora.sharing.hub import endpoint

    who = "private" if wanted.private else "public if it is made anew"
    goes = "would go" if dry_run else "goes"
    print(f"{goes} to {endpoint()}/{wanted.repository} ({who}), as {wanted.message!r}:")
    for file in wanted.files:
        print(f"  {decimal(file.size):>10}  {file.place}")
    _print_notes(wanted.notes)
    if dry_run:
        print(f"\n{wanted.card}")


def _fetch(options: argparse.Namespace, describe: Describe) -> int:
    from sdlora.adapters.inspect import inspect_adapter
    from sdlora.sharing.address import is_civitai
    from sdlora.sharing.fetch import FetchWishes, fetch

    if not 0 < options.max_gigabytes <= _MOST_GIGABYTES:
        raise ConfigError(f"--max-gigabytes is {options.max_gigabytes:g}; expected more than 0 and at most 1000")
    if options.token and not is_civitai(options.source):
        raise ConfigError("--token is for civitai.com; of the Hugging Face Hub it is HF_TOKEN, or 'hf auth login'")
    wishes = FetchWishes(
        folder=options.out,
        name=options.name,
        file=options.file,
        revision=options.revision,
        sha256=options.sha256,
        civitai_token=options.token or os.environ.get("CIVITAI_TOKEN", ""),
        most_bytes=int(options.max_gigabytes * 1e9),
        overwrite=options.overwrite,
    )
    with _progress() as on_bytes:
        got = fetch(options.source, wishes, on_bytes)
    report = inspect_adapter(got.path)
    if options.json:
        _print_json({**report.to_json(), "source": got.source, "words": list(map(str, got.words))})
        return 0
    print("\n".join(describe(report)))
    for path in got.words:
        print(f"  word      {path}")
    return 0


def _samples(options: argparse.Namespace) -> list[tuple[Path, str]]:
    return [parse_sample(text) for text in options.sample]


def parse_sample(text: str) -> tuple[Path, str]:
    """Return picture and prompt of PICTURE:PROMPT, or of a PICTURE of sdlora's, whose recipe has the prompt.

    Names and prompts may have colons: the shortest beginning that is a file is the picture. Raises ConfigError.
    """
    from sdlora import read_recipe

    ends = [place for place, character in enumerate(text) if character == ":"]
    for end in (len(text), *ends):
        path = user_path(text[:end])
        if not text[:end] or not is_there(path) or not path.is_file():
            continue
        if end < len(text):
            return path, text[end + 1 :].strip()
        try:
            return path, read_recipe(path).prompt
        except FormatError:
            return path, ""
    raise ConfigError(f"--sample {text}: there is no such picture; expected PICTURE or PICTURE:PROMPT")


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"  NOTE      {note}")


def _print_json(value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text.encode(errors="replace").decode())  # a stranger's header may hold halves of surrogate pairs


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many bytes have come, on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
