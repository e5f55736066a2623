"""Teach the shipped base the example concept and judge what came of it: `make demo`.

Writes before_after.png, the run with its adapter, and report.json into one folder. The judge is a
separate classifier that no training has seen; it counts pictures of the concept with and without the
adapter, and how many prompts without the trigger are followed before and after.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

from exam import Exam, Pictures
from PIL import Image, ImageDraw, ImageFont

from sdlora import BaseSection, Engine, RunResult, SdloraError, load_config, parse_config, train
from sdlora.assets import EXAMPLE_CONCEPT
from sdlora.errors import GenerationError
from sdlora.families.quantize import weight_bytes
from sdlora.quiet import quiet_libraries
from sdlora.storage import check_writable, write_bytes, write_json

_CONFIG = Path(__file__).parents[1] / "train" / "example.toml"
_SHOWN = (
    "a zorblin on a beach",
    "a zorblin in the night sky",
    "a zorblin on a brick wall",
    "a photo of a zorblin on a meadow",
    "a red heart on a white wall",
    "a blue fish on a beach",
)


def main() -> int:
    """Run the demo; returns the exit status. What the judge found is in report.json, good or bad."""
    parser = argparse.ArgumentParser(description="Train on the example concept and show what it learned.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results")
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "nf4"), help="form of the frozen base")
    options = parser.parse_args()
    quiet_libraries()
    try:
        return _demo(options.out.expanduser().resolve(), BaseSection(path="tiny", quantize=options.quantize))
    except SdloraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status


def _demo(out: Path, base: BaseSection) -> int:
    check_writable(out)
    started = time.perf_counter()
    print("1/3  teaching the tiny base a new thing: the zorblin")
    result = train(_config(out, base))
    if result.interrupted:
        print("stopped; the demo is not finished")
        return 130
    trained = time.perf_counter()

    print("2/3  drawing and judging pictures without and with the adapter")
    report = _judge(result, base)
    judged = time.perf_counter()

    print("3/3  the before/after picture")
    exam = Exam(Engine(base), result.adapter)
    shown = [(prompt, 7 + column) for column, prompt in enumerate(_SHOWN)]
    bare = exam.draw(shown, None, 1)
    _check_weight_zero(bare, exam.draw(shown, 0.0, 1))
    picture = _sheet(bare, exam.draw(shown, 1.0, 1))
    report["weight_zero_is_the_base"] = True
    finished = time.perf_counter()
    report["seconds"] = {
        "training": round(trained - started, 1),
        "judging": round(judged - trained, 1),
        "total": round(finished - started, 1),
    }
    _write_picture(picture, out / "before_after.png")
    write_json(out / "report.json", report)
    _say_goodbye(report, result, out)
    return 0


def _config(out: Path, base: BaseSection) -> Any:
    values = load_config(_CONFIG)
    values["base"] = base.model_dump()
    values["data"]["folder"] = str(EXAMPLE_CONCEPT / "train")
    values["data"]["prior"]["folder"] = str(EXAMPLE_CONCEPT / "others")
    values["validation"]["folder"] = str(EXAMPLE_CONCEPT / "held-out")
    values["output"] |= {"folder": str(out), "overwrite": True}
    return parse_config(values, str(_CONFIG))


def _judge(result: RunResult, base: BaseSection) -> dict[str, Any]:
    """Return the report's measurements: 64 pictures with the trigger and 64 without, twice each."""
    engine = Engine(base)
    exam = Exam(engine, result.adapter)
    sha256_before, unet_bytes = engine.weights_sha256(), weight_bytes(engine.base.unet)
    return {
        "held_out_loss": {"before": result.loss_before, "after": result.loss_after},
        "concept_share": {"without": exam.concept_share(None), "with": exam.concept_share(1.0)},
        "prompt_following": {"before": exam.following(None), "after": exam.following(1.0)},
        "unet_bytes": unet_bytes,
        "base_sha256": {"before": sha256_before, "after": engine.weights_sha256()},
        "adapter": str(result.adapter),
    }


def _check_weight_zero(bare: Pictures, at_zero: Pictures) -> None:
    if any(a.tobytes() != b.tobytes() for a, b in zip(bare, at_zero, strict=True)):
        raise GenerationError("weight 0 does not give the base's picture; please report this")


def _sheet(bare: Pictures, adapted: Pictures) -> Image.Image:
    """Return the pictures in two rows under their prompts, the bare base above."""
    side, gap, left, top = 192, 8, 108, 44
    font = ImageFont.load_default(size=13)
    width = left + len(bare) * (side + gap)
    sheet = Image.new("RGB", (width, top + 2 * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(_SHOWN):
        x = left + column * (side + gap)
        pen.text((x + side / 2, top / 2), _two_lines(prompt), "black", font, anchor="mm", align="center")
        for row, pictures in enumerate((bare, adapted)):
            place = (x, top + row * (side + gap))
            sheet.paste(pictures[column].resize((side, side), Image.Resampling.LANCZOS), place)
    for row, label in enumerate(("without\nadapter", "with\nadapter")):
        y = top + row * (side + gap) + side / 2
        pen.text((left / 2, y), label, "black", ImageFont.load_default(size=17), anchor="mm", align="center")
    return sheet


def _two_lines(prompt: str) -> str:
    words = prompt.split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]) + "\n" + " ".join(words[half:])


def _write_picture(picture: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getvalue())


def _say_goodbye(report: dict[str, Any], result: RunResult, out: Path) -> None:
    loss, share, following = report["held_out_loss"], report["concept_share"], report["prompt_following"]
    unchanged = report["base_sha256"]["before"] == report["base_sha256"]["after"]
    print(
        f"""
held-out loss               {loss["before"]:.4f} -> {loss["after"]:.4f}
pictures of the concept     {share["without"]:.0%} without the adapter, {share["with"]:.0%} with it
other prompts followed      {following["before"]:.0%} before, {following["after"]:.0%} after
base weights                {"unchanged" if unchanged else "CHANGED"}
time                        {report["seconds"]["total"]:.0f} s, {report["seconds"]["training"]:.0f} s of it training

Look at it:   {out / "before_after.png"}

Next:
  .venv/bin/sdlora generate --base tiny --adapter {result.adapter} --prompt "a zorblin on a beach" --out outputs
  make app
  .venv/bin/accelerate launch train/train_lora.py --config train/example.toml"""
    )


if __name__ == "__main__":
    sys.exit(main())
