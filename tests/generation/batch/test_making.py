"""Batches: what is made, what is not made again, and that nothing is half there whenever a run is cut off."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_files import draw_map, random_control, write_original
from PIL import Image

from sdlora import storage
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, OutputError
from sdlora.families.registry import describe_base
from sdlora.families.sd import SD2
from sdlora.generation.asked import asked_pictures
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.grid import parse_axis
from sdlora.generation.batch.jobs import read_jobs
from sdlora.generation.batch.making import full_batches, make_pictures, standing
from sdlora.generation.batch.manifest import NAME, ManifestWriter, read_manifest, settle
from sdlora.generation.batch.plan import BatchPlan, Picture, plan_batch
from sdlora.generation.batch.ranks import deal
from sdlora.generation.batch.rate import measured_rate
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import FileFormat, read_recipe
from sdlora.generation.request import make_request


@pytest.fixture
def base(tiny_folder: Any, shape: str) -> BaseSection:
    return BaseSection(path=str(tiny_folder(shape)), precision="fp32")


@pytest.fixture
def engine(tiny_base: Any, tmp_path: Path) -> Engine:
    return Engine(tiny_base(), find_adapter=lambda name: tmp_path / f"{name}.safetensors")


@pytest.fixture
def adapters(tiny_base: Any, make_adapter: Any, tmp_path: Path) -> list[str]:
    """Three adapter files that fit the tiny base."""
    bare = tiny_base()
    for seed in range(3):
        write_adapter(make_adapter(bare, seed=seed, alpha=4.0), tmp_path / f"a{seed}.safetensors")
    return [str(tmp_path / f"a{seed}.safetensors") for seed in range(3)]


def plan_of(base: BaseSection, *lines: dict[str, Any], grid: tuple[str, ...] = (), folder: Path) -> BatchPlan:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a ball", "steps": 1, **line}) + "\n" for line in lines))
    find = lambda name: folder / f"{name}.safetensors"  # noqa: E731
    return plan_batch(read_jobs(path, {}, [parse_axis(text) for text in grid], find), base, find)


def run(engine: Engine, plan: BatchPlan, folder: Path, **options: Any) -> list[str]:
    """Make what is not there, as the command does; returns the names of what was made."""
    pending = standing(plan, folder).pending
    made = make_pictures(engine, pending, folder, ManifestWriter(folder / NAME), **{"batch_size": 4, **options})
    assert made.done + made.failed == len(pending)
    return [picture.file for picture in pending]


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text(encoding="utf-8").splitlines()]


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.convert("RGB").tobytes()


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_pictures_of_any_adapters_are_made_as_the_engine_makes_each_alone(
    base: BaseSection, engine: Engine, adapters: list[str], tmp_path: Path
) -> None:
    lines = ({"adapter": "a0"}, {"adapter": "a1:0.5", "seed": 7, "count": 2}, {"prompt": "a box", "guidance_scale": 3})
    plan = plan_of(base, *lines, folder=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert len(run(engine, plan, out)) == 4
    told = manifest(out)
    assert [line["seed"] for line in told] == [0, 7, 8, 0]
    assert told[1]["job"] == f"{tmp_path / 'jobs.jsonl'}:2" and told[1]["adapters"][0]["weight"] == 0.5
    for line, picture in zip(told, plan.pictures, strict=True):
        ((alone, recipe),) = engine.generate(picture.request)
        made = np.asarray(Image.open(out / line["file"])).astype(int)
        assert np.abs(made - np.asarray(alone).astype(int)).max() <= 1
        assert read_recipe(out / line["file"]) == recipe


def test_what_is_there_is_not_made_again(base: BaseSection, engine: Engine, tmp_path: Path) -> None:
    plan = plan_of(base, {"count": 5}, folder=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    files = run(engine, plan, out)
    before = pictures_in(out)
    assert run(engine, plan, out) == []
    (out / files[3]).unlink()
    assert run(engine, plan, out) == [files[3]]
    again = pictures_in(out)
    assert again.keys() == before.keys()
    assert all(again[name] == before[name] for name in files if name != files[3])
    before = again
    more = plan_of(base, {"prompt": "first"}, {"count": 6}, folder=tmp_path)  # the same pictures under other numbers
    assert len(run(engine, more, out)) == 2
    assert {name: data for name, data in pictures_in(out).items() if name in before} == before


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_files(
    base: BaseSection, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before and after every file is renamed and every line is written."""
    plan = plan_of(base, {"count": 3, "prompt": "a {red|blue} ball"}, folder=tmp_path)
    names = sorted(picture.file for picture in plan.pictures)
    out = tmp_path / "out"
    for cut in range(1, 13):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with monkeypatch.context() as context:
            _cut_off_at(cut, context)
            with pytest.raises(_Killed):
                run(engine, plan, out, batch_size=2)
        kept = {name: data for name, data in pictures_in(out).items() if not name.startswith(".")}
        assert len(kept) == (cut + 2) // 4, f"cut {cut}"
        made = run(engine, plan, out, batch_size=2)
        assert sorted([*made, *kept]) == names, f"cut {cut}"
        assert sorted(line["file"] for line in manifest(out)) == names
        assert sorted(pictures_in(out)) == names
        for name, data in kept.items():
            assert (out / name).read_bytes() == data


class _Killed(BaseException):
    pass


def _cut_off_at(cut: int, context: pytest.MonkeyPatch) -> None:
    """The process ends at the `cut`th moment: before or behind a rename or, of a line, with half of it written."""
    moments = iter(range(1, 1000))
    real_replace, real_write = Path.replace, os.write

    def passes() -> None:
        if next(moments) == cut:
            raise _Killed

    def moved(self: Path, target: Path) -> Path:
        passes()
        result = real_replace(self, target)
        passes()
        return result

    def written(handle: int, data: bytes) -> int:
        if not data.startswith(b'{"file"'):
            return real_write(handle, data)
        if next(moments) == cut:
            real_write(handle, data[: len(data) // 2])
            raise _Killed
        count = real_write(handle, data)
        passes()
        return count

    context.setattr(Path, "replace", moved)
    context.setattr(os, "write", written)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_picture_whose_line_was_lost_is_known_by_its_recipe(
    base: BaseSection, engine: Engine, adapters: list[str], tmp_path: Path
) -> None:
    plan = plan_of(base, {"adapter": "a0"}, {"name": "mine/one", "seed": 3}, folder=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    files = run(engine, plan, out)
    assert files[1] == "mine/one.png"
    (out / NAME).unlink()
    there = standing(plan, out, settled=False)
    assert there.pending == () and not (out / NAME).exists()
    assert standing(plan, out).pending == ()
    assert sorted(line["file"] for line in manifest(out)) == sorted(files)
    assert manifest(out)[0]["adapters"][0]["name"] == "a0"


@pytest.mark.parametrize("shape", ["sd1"])
def test_halves_of_files_that_a_kill_left_are_cleared_away(base: BaseSection, tmp_path: Path) -> None:
    plan = plan_of(base, {}, folder=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name, age in ((".writing-old.png", 3600), (".writing-new.png", 0), ("mine.png", 3600)):
        (out / name).touch()
        os.utime(out / name, (time.time() - age,) * 2)
    standing(plan, out, settled=False)
    assert len(list(out.iterdir())) == 3
    standing(plan, out)
    assert sorted(path.name for path in out.iterdir()) == [".writing-new.png", "mine.png"]


@pytest.mark.parametrize("shape", ["sd1"])
def test_pictures_of_a_batch_may_be_webp(base: BaseSection, engine: Engine, tmp_path: Path) -> None:
    jobs = read_jobs(None, {"prompt": "a ball", "steps": 1, "count": 2, "name": "cats/one.webp"})
    plan, png = (
        plan_batch(jobs, base, form=FileFormat(".webp", lossless=True)),
        plan_batch([replace(job, name="") for job in jobs], base),
    )
    assert [picture.file for picture in plan.pictures] == ["cats/one-0.webp", "cats/one-1.webp"]
    assert run(engine, plan, tmp_path, form=FileFormat(".webp", lossless=True)) == [
        "cats/one-0.webp",
        "cats/one-1.webp",
    ]
    assert read_recipe(tmp_path / "cats" / "one-1.webp").seed == 1
    run(engine, png, tmp_path / "png")
    assert pixels(tmp_path / "cats" / "one-1.webp") == pixels(tmp_path / "png" / png.pictures[1].file)
    assert standing(plan, tmp_path).pending == ()
    (tmp_path / NAME).unlink()
    assert standing(plan, tmp_path).pending == ()  # known by its recipe
    assert len(standing(png, tmp_path).pending) == 2  # another format is another file
    with pytest.raises(
        ConfigError, match=r"one\.webp', but the pictures of this batch are \.jpg files; give --format webp"
    ):
        plan_batch(jobs, base, form=FileFormat(".jpg"))
    with pytest.raises(ConfigError, match="give --format jpg"):
        plan_batch(read_jobs(None, {"prompt": "a", "name": "one.jpeg"}), base)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_picture_that_its_format_cannot_hold_fails_alone(base: BaseSection, engine: Engine, tmp_path: Path) -> None:
    prompts = ("a ball", "\u732b" * 11_500, "a box")
    jobs = [job for prompt in prompts for job in read_jobs(None, {"prompt": prompt, "steps": 1})]
    form = FileFormat(".jpg", 80)
    plan = plan_batch(jobs, base, form=form)
    made = make_pictures(engine, plan.pictures, tmp_path, ManifestWriter(tmp_path / NAME), batch_size=1, form=form)
    assert (made.done, made.failed) == (2, 1)
    assert "the prompt is too long for a JPEG" in manifest(tmp_path)[1]["failed"]
    other = plan_batch(jobs, base, form=FileFormat(".jpg", 90))
    assert len(standing(other, tmp_path).pending) == 3  # another quality is another file


@pytest.mark.parametrize("shape", ["sd1"])
def test_idle_settings_of_a_second_pass_say_nothing_of_a_picture(base: BaseSection, tmp_path: Path) -> None:
    values = {"hires_scale": 1, "hires_upscaler": "gone.safetensors", "hires_steps": 3}
    (idle,), (plain,) = (plan_of(base, line, folder=tmp_path).pictures for line in (values, {"hires_scale": 1}))
    assert idle.identity == plain.identity


@pytest.mark.parametrize("shape", ["sd1"])
def test_files_of_others_are_not_replaced_unless_wanted(base: BaseSection, engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "one.png")
    plan = plan_of(base, {"name": "one"}, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"jobs\.jsonl:1: .*one\.png is there and is another picture"):
        standing(plan, out)
    pending = standing(plan, out, replace=True).pending
    make_pictures(engine, pending, out, ManifestWriter(out / NAME), batch_size=1)
    assert read_recipe(out / "one.png").prompt == "a ball"
    changed = plan_of(base, {"name": "one", "seed": 5}, folder=tmp_path)
    with pytest.raises(ConfigError, match="is another picture"):
        standing(changed, out)
    make_pictures(engine, standing(changed, out, replace=True).pending, out, ManifestWriter(out / NAME), batch_size=1)
    assert standing(changed, out).pending == ()
    assert len(standing(plan, out, replace=True).pending) == 1  # its file is another picture now


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_picture_that_fails_is_told_and_the_others_are_made(
    base: BaseSection, engine: Engine, adapters: list[str], make_adapter: Any, tmp_path: Path
) -> None:
    broken = make_adapter(engine.base)
    layers = {path: LoraLayer(layer.down, layer.up * 1e30, layer.alpha) for path, layer in broken.layers.items()}
    write_adapter(AdapterFile(layers, broken.family, {}), tmp_path / "broken.safetensors")
    plan = plan_of(base, {"adapter": "a0"}, {"adapter": "broken"}, {"adapter": "a1"}, {}, folder=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    run(engine, plan, out)
    assert len(pictures_in(out)) == 3
    (failed,) = [line for line in manifest(out) if "failed" in line]
    assert failed["identity"] == plan.pictures[1].identity and "NaN" in failed["failed"]
    assert [picture.where.rpartition(":")[2] for picture in standing(plan, out).pending] == ["2"]


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_disk_that_takes_nothing_ends_the_run(
    base: BaseSection, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(base, {"count": 2}, folder=tmp_path)
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(OutputError):
        make_pictures(engine, plan.different(), tmp_path / "out", ManifestWriter(tmp_path / NAME), batch_size=1)


@pytest.mark.parametrize("shape", ["sd1"])
def test_identities_are_of_what_makes_a_picture(base: BaseSection, adapters: list[str], tmp_path: Path) -> None:
    def identities(*lines: dict[str, Any], section: BaseSection = base) -> list[str]:
        return [picture.identity for picture in plan_of(section, *lines, folder=tmp_path).pictures]

    shutil.copy(adapters[0], tmp_path / "copy.safetensors")
    same = identities(
        {"adapter": "a0"},
        {"adapter": "copy"},
        {"prompt": "a ball<lora:a0>"},
        {"adapter": "a0:1.0", "steps": 1, "clip_skip": 1, "count": 1},
    )
    assert len(set(same)) == 1
    others = identities(
        {},
        {"adapter": "a0"},
        {"adapter": "a1"},
        {"adapter": "a0:0.5"},
        {"adapter": [{"path": "a0", "text_encoder_weight": 0.5}]},
        {"seed": 1},
        {"steps": 2},
        {"width": 48},
        {"negative_prompt": "x"},
        {"clip_skip": 2},
        {"emphasis": "comfy"},
        {"name": "x"},
        {"guidance_scale": 2},
    )
    assert len(set(others)) == len(others) == 13
    assert identities({}) != identities({}, section=base.model_copy(update={"quantize": "nf4"}))
    shutil.copy(adapters[1], tmp_path / "copy.safetensors")
    assert identities({"adapter": "copy"}) == identities({"adapter": "a1"})


@pytest.mark.parametrize("shape", ["sd1"])
def test_pictures_to_start_from_are_read_once_and_known_when_they_change(
    base: BaseSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = storage.sha256_of_file
    monkeypatch.setattr(storage, "sha256_of_file", lambda path: hashed.append(path.name) or real(path))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    line = {"image": str(tmp_path / "start.png"), "mask": str(tmp_path / "mask.png"), "count": 3}
    first = plan_of(base, line, {**line, "prompt": "a box"}, folder=tmp_path)
    assert sorted(name for name in hashed if name.endswith("png")) == ["mask.png", "start.png"]
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "start.png")
    os.utime(tmp_path / "start.png", (1, 1))
    second = plan_of(base, line, folder=tmp_path)
    assert not {picture.identity for picture in first.pictures} & {picture.identity for picture in second.pictures}
    (asked,) = asked_pictures(first.pictures[0].request, 0, None)  # as when it is made
    assert asked.source and asked.source.used.picture.sha256 == real(tmp_path / "start.png")
    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    os.utime(tmp_path / "mask.png", (1, 1))
    with pytest.raises(ConfigError, match="has no white pixel"):
        plan_of(base, line, folder=tmp_path)


@pytest.mark.parametrize("shape", ["sd1"])
def test_controlnets_are_part_of_what_a_picture_is(
    base: BaseSection, engine: Engine, tiny_base: Any, tmp_path: Path
) -> None:
    """By their contents, whatever they are called; one for another family is told before anything is loaded."""
    net, out = write_original(random_control(engine.base.unet), tmp_path / "net.safetensors"), tmp_path / "out"
    maps = [draw_map(tmp_path / f"{n}.png", n) for n in range(2)]
    lines = [{"prompt": "a", "control": {"model": net, "image": image}} for image in maps]
    plan = plan_of(base, *lines, {"prompt": "a"}, folder=tmp_path)
    assert len({picture.identity for picture in plan.pictures}) == 3
    groups = [len(group) for group in full_batches(engine, plan.pictures, 4, None)]
    assert groups == [2, 1]
    run(engine, plan, out)
    (out / NAME).unlink()  # known by their recipes
    assert run(engine, plan, out) == []
    shutil.copy(net, tmp_path / "copy.safetensors")
    lines[0]["control"]["model"] = str(tmp_path / "copy.safetensors")
    assert plan_of(base, lines[0], folder=tmp_path).pictures[0].identity == plan.pictures[0].identity
    other = write_original(random_control(tiny_base("sdxl").unet), tmp_path / "xl.safetensors")
    with pytest.raises(ConfigError, match=r"jobs\.jsonl:1: .*xl\.safetensors: is a ControlNet for Stable Diffusion XL"):
        plan_of(base, {"control": {"model": other, "image": maps[0]}}, folder=tmp_path)


def test_wildcards_count_by_what_was_chosen(base: BaseSection, tmp_path: Path) -> None:
    folder = tmp_path / "wild"
    folder.mkdir()
    (folder / "colour.txt").write_text("red\nblue\n")
    line = {"prompt": "a __colour__ ball", "wildcards": str(folder), "count": 6}
    first = plan_of(base, line, folder=tmp_path)
    assert len({picture.identity for picture in first.pictures}) == 6
    assert any("a-red-ball" in picture.file for picture in first.pictures)
    (folder / "colour.txt").write_text("green\n")
    second = plan_of(base, line, folder=tmp_path)
    assert all("a-green-ball" in picture.file for picture in second.pictures)
    assert not {picture.identity for picture in first.pictures} & {picture.identity for picture in second.pictures}


@pytest.mark.parametrize("shape", ["sd1"])
def test_what_several_jobs_ask_for_is_one_picture(base: BaseSection, tmp_path: Path) -> None:
    plan = plan_of(base, {"seed": 1, "count": 2}, {"seed": 2}, folder=tmp_path)
    assert len(plan.pictures) == 3 and len(plan.different()) == 2
    assert plan.pictures[1].file == plan.pictures[2].file


@pytest.mark.parametrize("shape", ["sd1"])
def test_everything_is_checked_before_the_base_is_loaded(
    base: BaseSection, tiny_base: Any, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = replace(make_adapter(tiny_base("sd2")), metadata=dict(SD2.metadata["v"]))
    write_adapter(adapter, tmp_path / "sd2.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    monkeypatch.setattr("sdlora.families.registry.skeleton", None)  # nothing can be loaded
    lines = (
        {"adapter": str(tmp_path / "sd2.safetensors")},
        {"adapter": str(tmp_path / "page.safetensors")},
        {"prompt": "<lora:none:0.5> a ball"},
        {"wildcards": str(tmp_path / "nowhere")},
        {"name": "one"},
        {"name": "ONE", "seed": 2},
        {"steps": 0},
        {"zero_snr": "on"},
    )
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", **line}) + "\n" for line in lines))
    faults = Faults()
    jobs = read_jobs(path, {}, faults=faults)
    with pytest.raises(ConfigError) as caught:
        plan_batch(jobs, base, faults=faults)
    told = str(caught.value).splitlines()
    assert told[0] == "7 things are wrong with the jobs:"
    expected = (
        "the adapter is for Stable Diffusion 2",
        "page.safetensors",
        "the prompt asks for <lora:none>",
        "there is no such folder; wildcards",
        "",
        "the name ONE.png is that of another picture, of",
        "steps is 0",
        "predicts epsilon, which says nothing",
    )
    numbers = [1, 2, 3, 4, 6, 7, 8]
    for line, number in zip(told[1:], numbers, strict=True):
        assert line.startswith(f"  {path}:{number}: ") and expected[number - 1] in line


@pytest.mark.parametrize("shape", ["sd1"])
def test_batches_are_full_whatever_the_adapters_and_looked_at_as_they_are_needed(
    base: BaseSection, engine: Engine, adapters: list[str], tmp_path: Path
) -> None:
    long = "ball " * 80  # two chunks of tokens
    lines = [{"adapter": name, "prompt": text, "width": width} for name in ("a0", "a1", "a2", "none")
             for text in ("a ball", long) for width in (64, 48)]  # fmt: skip
    plan = plan_of(base, *lines, folder=tmp_path)
    batches = list(full_batches(engine, plan.pictures, 3, engine._find_adapter))
    assert sorted(len(batch) for batch in batches) == [1, 1, 1, 1, 3, 3, 3, 3]
    for batch in batches:
        assert len({(picture.request.width, len(picture.request.prompt)) for picture in batch}) == 1
    assert sorted(picture.identity for batch in batches for picture in batch) == sorted(
        picture.identity for picture in plan.pictures
    )


@pytest.mark.parametrize("shape", ["sd1"])
def test_progress_tells_the_time_left(base: BaseSection, engine: Engine, tmp_path: Path) -> None:
    plan = plan_of(base, {"count": 2}, {"count": 1, "steps": 2}, folder=tmp_path)
    (tmp_path / "out").mkdir()
    seen: list[Any] = []
    run(engine, plan, tmp_path / "out", batch_size=2, on_batch=seen.append)
    assert [(progress.done, progress.work_done) for progress in seen] == [(2, 0.5), (3, 1.0)]
    assert seen[0].seconds_left == pytest.approx(seen[0].seconds) and seen[1].seconds_left == 0
    assert standing(plan, tmp_path / "out").seconds_per_cost > 0
    assert measured_rate(engine, plan.pictures, 2) > 0


def test_the_side_and_the_hash_of_a_base_are_known_without_loading_it(base: BaseSection, tiny_base: Any) -> None:
    loaded = tiny_base()
    described = describe_base(base)
    assert described.side == loaded.resolution and described.sha256 == loaded.source.sha256


# --- without a base ----------------------------------------------------------------------------------


def picture(number: int, cost: float = 1.0, **values: Any) -> Picture:
    request = make_request(prompt="a", seed=number, **values)
    return Picture(f"id{number}", f"{number}.png", request, "jobs.txt:1", cost=cost)


def numbers(shares: list[list[Picture]]) -> list[list[int]]:
    return [[one.request.seed for one in share] for share in shares]


def test_work_is_dealt_in_whole_batches_of_about_equal_work() -> None:
    alike = [picture(number) for number in range(8)]
    assert numbers(deal(alike, 2, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert numbers(deal(alike, 3, 2)) == [[0, 1], [2, 3, 4, 5], [6, 7]]
    assert numbers(deal(alike[:3], 2, 4)) == [[0, 1], [2]]
    assert numbers(deal(alike[:1], 3, 4)) == [[], [0], []]
    assert deal([], 2, 4) == [[], []]
    # Two kinds; the second's pictures are four times the work of the first's: 4 + 8 of 24 on each side of 12.
    mixed = [picture(n, cost=1.0 if n % 2 else 4.0, steps=5 if n % 2 else 20) for n in range(8)]
    shares = deal(mixed, 2, 2)
    assert numbers(shares) == [[0, 2], [4, 6, 1, 3, 5, 7]]


def test_parts_of_processes_become_one_manifest(tmp_path: Path, recipe: Any) -> None:
    told = [{"file": f"{n}.png", "identity": f"id{n}", "job": "jobs.txt:1"} for n in range(4)]
    ManifestWriter(tmp_path / NAME).made(told[0], recipe)
    ManifestWriter(tmp_path / "manifest.rank0.jsonl").made({**told[1], "seconds": 2.0, "cost": 8.0}, recipe)
    ManifestWriter(tmp_path / "manifest.rank1.jsonl").failed(told[2], "NaN")
    with (tmp_path / "manifest.rank1.jsonl").open("a") as file:
        file.write(json.dumps(told[3])[:30])
    settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    lines = read_manifest(tmp_path)
    assert list(lines) == ["id0", "id1", "id2"]
    assert (lines["id1"].seconds, lines["id1"].cost, lines["id2"].failed) == (2.0, 8.0, "NaN")
    ManifestWriter(tmp_path / NAME).made(told[2], recipe)
    assert read_manifest(tmp_path)["id2"].failed == ""


def test_half_a_line_is_cut_and_strange_lines_say_nothing(tmp_path: Path, recipe: Any) -> None:
    writer = ManifestWriter(tmp_path / NAME)
    writer.made({"file": "0.png", "identity": "id0"}, recipe)
    whole = (tmp_path / NAME).read_bytes()
    for half in (b'{"identity"', b"x" * 10_000):
        (tmp_path / NAME).write_bytes(whole + half)
        settle(tmp_path)
        assert (tmp_path / NAME).read_bytes() == whole
    (tmp_path / NAME).write_bytes(b"5\n[1]\n{}\n\xff\xfe\n" + whole)
    assert list(read_manifest(tmp_path)) == ["id0"]
    (tmp_path / NAME).write_bytes(b"no end")
    settle(tmp_path)
    assert (tmp_path / NAME).read_bytes() == b""


def test_a_file_that_another_picture_took_is_no_longer_the_first_ones(tmp_path: Path, recipe: Any) -> None:
    writer = ManifestWriter(tmp_path / NAME)
    writer.made({"file": "a.png", "identity": "id0"}, recipe)
    writer.made({"file": "a.png", "identity": "id1"}, replace(recipe, seed=2))
    assert list(read_manifest(tmp_path)) == ["id1"]


def test_work_and_pixels_are_those_of_both_passes_and_of_the_start(base, tmp_path):
    Image.new("RGB", (32, 16), "red").save(tmp_path / "start.png")
    start = {"prompt": "a", "steps": 4, "image": str(tmp_path / "start.png"), "strength": 0.5, "guidance_scale": 1}
    size = {"width": 16, "height": 8, "steps": 4, "guidance_scale": 1}
    hires = {**size, "hires_scale": 2, "hires_steps": 3}
    plan = plan_of(base, size, hires, start, {**size, "guidance_scale": 2}, folder=tmp_path)
    assert [picture.cost for picture in plan.pictures] == [512, 512 + 3 * 512, 2 * 512, 1024]
    assert [picture.pixels for picture in plan.pictures] == [128, 512, 512, 128]


def test_a_start_that_is_gone_fails_alone(base, engine, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    size = {"width": 16, "height": 16}
    plan = plan_of(base, {"image": str(tmp_path / "start.png")}, size, folder=tmp_path)
    (tmp_path / "start.png").unlink()
    writer = ManifestWriter(tmp_path / NAME)
    progress = make_pictures(engine, plan.pictures, tmp_path, writer, batch_size=2)
    assert (progress.done, progress.failed) == (1, 1)
    assert "start.png: cannot be read" in read_manifest(tmp_path)[plan.pictures[0].identity].failed


def test_a_named_picture_of_another_precision_is_not_adopted(base, engine, tmp_path):
    job = {"name": "one", "width": 16, "height": 16}
    plan = plan_of(base, job, folder=tmp_path)
    make_pictures(engine, plan.pictures, tmp_path, ManifestWriter(tmp_path / NAME), batch_size=1)
    (tmp_path / NAME).unlink()
    assert not standing(plan, tmp_path, settled=False).pending
    other = plan_of(base.model_copy(update={"precision": "bf16"}), job, folder=tmp_path)
    assert standing(other, tmp_path, settled=False, replace=True).pending
