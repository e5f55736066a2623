"""`sdlora dataset caption DIR --model FOLDER_OR_ID`: captions by an image-to-text model, where there are none."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.data.caption_files import Captioned, CaptionPlan

_SECONDS_BETWEEN_LINES = 10.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`commands` knows the command caption, whose options carry `run`."""
    parser = commands.add_parser(
        "caption",
        help="write captions with an image-to-text model",
        description="Write a caption file beside every picture that has none, in a folder and its subfolders, with an "
        "image-to-text model such as BLIP, GIT, Florence-2, LLaVA or Qwen-VL. What somebody wrote is left as it is, "
        "unless --overwrite is given. Stopped and started again, it goes on where it was.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="DIR", help="folder of pictures; subfolders are searched too")
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER_OR_ID",
        help="folder of a transformers model, or its Hugging Face id, such as Salesforce/blip-image-captioning-large",
    )
    parser.add_argument("--revision", default="", help="branch, tag or commit of a Hugging Face id; default: main")
    parser.add_argument(
        "--prompt",
        default=None,
        help="what a chat model is asked (default: to describe the image in one sentence); for other models the words "
        "that each caption begins with, which are left out of the file, or a task such as <MORE_DETAILED_CAPTION>",
    )
    parser.add_argument("--prefix", default="", help='text put before each caption as it is, such as "[trigger], "')
    parser.add_argument("--suffix", default="", help='text put after each caption as it is, such as ", watercolour"')
    parser.add_argument("--extension", choices=(".txt", ".caption"), default=".txt", help="what caption files end in")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write new captions for pictures that have one, too; the old text is kept as NAME.txt.bak",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="pictures described at once (default: 1)")
    parser.add_argument(
        "--max-tokens", type=int, default=75, help="longest caption, in tokens of the model (default: 75)"
    )
    parser.add_argument(
        "--beams", type=int, default=0, help="candidates that are followed at once; 0: as the model's settings say"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the model; auto: bf16 on a GPU that has it, fp16 on others, fp32 on the CPU",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the GPU where there is one")
    parser.add_argument("--dry-run", action="store_true", help="print the captions and write nothing")


def run(options: argparse.Namespace) -> int:
    """Caption the pictures; returns 1 where some could not be. Raises SdloraError."""
    for flag, value, least in (
        ("--batch-size", options.batch_size, 1),
        ("--max-tokens", options.max_tokens, 1),
        ("--beams", options.beams, 0),
    ):
        if value < least:
            raise ConfigError(f"{flag} is {value}; expected {least} or more")
    from sdlora.data.caption_files import plan_captions
    from sdlora.storage import check_writable

    plan = plan_captions(Path(options.folder).expanduser(), overwrite=options.overwrite)
    for picture in plan.shared:
        print(f"{picture}: shares its caption file with another picture of that name; left out", file=sys.stderr)
    if not plan.pictures:
        print(f"every picture in {options.folder} has a caption; --overwrite writes new ones")
        return 0
    if not options.dry_run:
        for folder in sorted({picture.parent for picture in plan.pictures}):
            check_writable(folder)
    return _caption(options, plan)


def _caption(options: argparse.Namespace, plan: CaptionPlan) -> int:
    from sdlora.data.caption_files import caption_pictures, write_caption
    from sdlora.families.captioner import load_captioner

    print(f"loading {options.model}", flush=True)
    captioner = load_captioner(
        options.model,
        prompt=options.prompt,
        revision=options.revision,
        precision=options.precision,
        device=options.device,
    )
    save = partial(write_caption, ending=options.extension, overwrite=options.overwrite)
    outcomes = caption_pictures(
        plan.pictures,
        partial(captioner.describe, max_tokens=options.max_tokens, beams=options.beams),
        batch_size=options.batch_size,
        prefix=options.prefix,
        suffix=options.suffix,
        save=None if options.dry_run else save,
    )
    done: list[Captioned] = []
    try:
        with _progress(len(plan.pictures)) as show:
            for outcome in outcomes:
                done.append(outcome)
                show(len(done), f"{outcome.picture}: {outcome.caption}" if options.dry_run and outcome.caption else "")
    except KeyboardInterrupt:
        print(f"stopped: {_summary(done, plan, options.dry_run)}; the same command goes on from here")
        raise
    for outcome in done:
        if outcome.problem:
            print(f"no caption: {outcome.problem}", file=sys.stderr)
    print(_summary(done, plan, options.dry_run))
    return 1 if any(outcome.problem for outcome in done) else 0


def _summary(done: Sequence[Captioned], plan: CaptionPlan, dry_run: bool) -> str:
    """Return how many captions were written, kept and failed, and one of them."""
    new = [outcome for outcome in done if (outcome.caption if dry_run else outcome.saved)]
    failed = sum(bool(outcome.problem) for outcome in done)
    kept = len(plan.kept) + len(done) - len(new) - failed
    text = f"{len(new)} caption{'s' * (len(new) != 1)} {'tried out' if dry_run else 'written'}, "
    text += f"{kept} kept, {failed} failed"
    return text + (f"; for example {new[0].picture}: {new[0].caption}" if new else "")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Inside, how many are done may be told, with a line to print, or "".

    That is a bar on a terminal, and a line every few seconds elsewhere.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(highlight=False, markup=False, emoji=False)
    columns = (TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = sys.stdout.isatty()
    last_line = time.monotonic()
    with Progress(*columns, console=console, disable=not terminal) as bar:
        task = bar.add_task("captions", total=total)

        def show(done: int, line: str) -> None:
            nonlocal last_line
            bar.update(task, completed=done)
            late = not terminal and time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES
            if line or late:
                last_line = time.monotonic()
                console.print(line or f"{done} of {total}", soft_wrap=True)

        yield show
