"""Every layout, from the disk to the batches of a run: the same four pictures kept in all the ways there are."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora.data.buckets import fit_picture
from sdlora.data.store import Together
from sdlora.training.material import open_data, prepare_material

TEXTS = ["a zorb on a wall", "a zorb, at night", "two zorbs", "a red zorb"]


@pytest.fixture
def shape() -> str:
    return "sd1"


def png(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (64, 64 + 32 * (number % 2), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def flat(place: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        put(place / f"{number}.png", png(number))
        put(place / f"{number}{'.txt' if number % 2 else '.caption'}", text)
    return {"folder": str(place)}


def nested(place: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        put(place / f"part {number % 2}" / "deeper" / f"{number}.png", png(number))
        put(place / f"part {number % 2}" / "deeper" / f"{number}.txt", text.replace("zorb", "[trigger]"))
    return {"folder": str(place), "trigger": "zorb"}


def file_names(place: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        put(place / f"{text}.png", png(number))
    return {"folder": str(place), "caption_from": "filename"}


def one_prompt(place: Path) -> dict[str, Any]:
    for number in range(4):
        put(place / f"{number}.png", png(number))
    return {"folder": str(place), "caption_from": "instance", "caption": "a [trigger]", "trigger": "zorb"}


def kohya_parent(place: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        put(place / "img" / f"{1 + 2 * (number % 2)}_zorb thing" / f"{number}.png", png(number))
        put(place / "img" / f"{1 + 2 * (number % 2)}_zorb thing" / f"{number}.txt", text)
    put(place / "reg" / "1_thing" / "9.png", png(9))
    return {"folder": str(place)}


def kohya_leaf(place: Path) -> dict[str, Any]:
    for number in range(4):
        put(place / "2_zorb thing" / f"{number}.png", png(number))
    return {"folder": str(place / "2_zorb thing")}


def kohya_config(place: Path) -> dict[str, Any]:
    flat(place / "pictures")
    for number in range(2):
        put(place / "class" / f"{number}.png", png(20 + number))
    text = """
        [general]
        enable_bucket = true
        caption_extension = ".txt"
        [[datasets]]
        resolution = 64
        batch_size = 3
        [[datasets.subsets]]
        image_dir = "pictures"
        num_repeats = 2
        class_tokens = "a zorb"
        [[datasets.subsets]]
        image_dir = "class"
        is_reg = true
        class_tokens = "a thing"
    """
    return {"folder": str(put(place / "dataset.toml", text))}


def kohya_metadata(place: Path) -> dict[str, Any]:
    for number in range(4):
        put(place / f"{number}.png", png(number))
    entries = {
        str(place / "0.png"): {"caption": TEXTS[0]},
        "1.png": {"caption": "a zorb", "tags": " at night"},
        "2": {"tags": TEXTS[2]},
        "3.png": {"caption": TEXTS[3], "train_resolution": [64, 40]},
    }
    return {"folder": str(put(place / "meta.json", json.dumps(entries)))}


def image_folder(place: Path, ending: str) -> dict[str, Any]:
    rows = [{"file_name": f"sub/{number}.png", "text": text} for number, text in enumerate(TEXTS)]
    for number in range(4):
        put(place / "train" / "sub" / f"{number}.png", png(number))
    file = place / "train" / f"metadata.{ending}"
    if ending == "jsonl":
        put(file, "\n".join(map(json.dumps, rows)))
    elif ending == "csv":
        with file.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    return {"folder": str(place)}


def parquet(place: Path) -> dict[str, Any]:
    arrow = pytest.importorskip("pyarrow")
    place.mkdir()
    for part in range(2):
        rows = [
            {"image": {"bytes": png(number), "path": None}, "caption": TEXTS[number]}
            for number in range(2 * part, 2 * part + 2)
        ]
        file = place / f"train-{part:05d}-of-00002.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    return {"folder": str(place)}


def arrow_on_disk(place: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "text": TEXTS}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(place))
    return {"folder": str(place)}


def web_dataset(place: Path) -> dict[str, Any]:
    pytest.importorskip("datasets")
    place.mkdir()
    with tarfile.open(place / "00000.tar", "w") as tar:
        for number, text in enumerate(TEXTS):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return {"folder": str(place)}


def jsonl(place: Path) -> dict[str, Any]:
    return image_folder(place, "jsonl")


def csv_table(place: Path) -> dict[str, Any]:
    return image_folder(place, "csv")


def parquet_table(place: Path) -> dict[str, Any]:
    return image_folder(place, "parquet")


ONCE = dict.fromkeys(TEXTS, 1)
EXPECTED: list[tuple[Callable[[Path], dict[str, Any]], str, dict[str, int], int]] = [
    (flat, "folder: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (nested, "folder with subfolders: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (file_names, "folder: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (one_prompt, "folder: 1 concept, 4 pictures, all captioned", {"a zorb": 4}, 0),
    (
        kohya_parent,
        "kohya folders: 2 concepts, 4 pictures, all captioned, 1 of other things",
        {TEXTS[0]: 1, TEXTS[1]: 3, TEXTS[2]: 1, TEXTS[3]: 3},
        1,
    ),
    (kohya_leaf, "kohya folders: 1 concept, 4 pictures, 4 without a caption of their own", {"zorb thing": 8}, 0),
    (
        kohya_config,
        "kohya dataset config: 1 concept, 4 pictures, 2 without a caption of their own, 2 of other things",
        {"a zorb": 4, TEXTS[1]: 2, TEXTS[3]: 2},
        2,
    ),
    (
        kohya_metadata,
        "kohya metadata: 1 concept, 4 pictures, all captioned",
        {TEXTS[0]: 1, "a zorb,at night": 1, TEXTS[2]: 1, TEXTS[3]: 1},
        0,
    ),
    (jsonl, "Hugging Face imagefolder: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (csv_table, "Hugging Face imagefolder: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (parquet_table, "Hugging Face imagefolder: 1 concept, 4 pictures, all captioned", ONCE, 0),
    (parquet, "shards (parquet): 1 concept, 4 pictures, all captioned", ONCE, 0),
    (arrow_on_disk, "shards (arrow): 1 concept, 4 pictures, all captioned", ONCE, 0),
    (web_dataset, "shards (tar): 1 concept, 4 pictures, all captioned", ONCE, 0),
]


@pytest.mark.parametrize(("keep", "summary", "texts", "others"), EXPECTED, ids=[row[0].__name__ for row in EXPECTED])
def test_from_the_disk_to_batches(
    keep: Any, summary: str, texts: dict[str, int], others: int, configure: Any, tiny_base: Any, tmp_path: Path
) -> None:
    config = configure(data={"resolution": 64, **keep(tmp_path / "kept")}, validation__folder="")
    base = tiny_base()
    data = open_data(config)
    assert data.summary[0] == summary
    material = prepare_material(config, base, data, Together(), lambda text: None, None)
    batches = [material.batch(number) for number in range(material.order.first_batch(1))]
    turns = [turn for batch, _ in batches for turn in batch]
    own = [turn for turn in turns if not turn.example.sample.prior]
    assert Counter(turn.text for turn in own) == texts
    assert len(turns) - len(own) == others
    assert all(len({turn.example.bucket for turn in batch}) == 1 for batch, _ in batches)
    for turn in turns:
        width, height = turn.example.bucket
        assert turn.example.posterior().mean.shape == (4, height // 8, width // 8)
        assert turn.text in material.texts

    # The pixels that were encoded are those of the picture whose caption goes with them.
    if texts == ONCE:
        by_text = {turn.text: turn.example for turn in own}
        for number, text in enumerate(TEXTS[:3]):
            example = by_text[text]
            pixels = fit_picture(Image.open(io.BytesIO(png(number))), example.size)
            mean, _ = base.family.encode_images(base, pixels[None])
            assert float((example.posterior().mean - mean[0]).abs().max()) < 1e-4
