"""From a configuration to turns: what is encoded, in which order it comes, under which text."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora.cli.train import make_class_pictures
from sdlora.data.cache_folder import data_cache
from sdlora.data.store import Together
from sdlora.errors import ConfigError, DataError
from sdlora.generation.pictures.files import read_recipe
from sdlora.training.material import Material, open_data, possible_texts, prepare_material


@pytest.fixture
def shape() -> str:
    return "sd1"


@pytest.fixture
def prepare(configure: Any, tiny_base: Any) -> Any:
    """`prepare(...)`: the material of a run with such settings, and what was said."""

    def make(class_pictures: Any = None, **values: Any) -> tuple[Material, list[str]]:
        config = configure(**values)
        said: list[str] = []
        data = open_data(config)
        return prepare_material(config, tiny_base(), data, Together(), said.append, class_pictures), said

    return make


def turns_of(material: Material, epochs: int) -> list[Any]:
    return [turn for n in range(material.order.first_batch(epochs)) for turn in material.batch(n)[0]]


def test_every_turn_has_a_text_that_is_encoded(prepare: Any, settings: Any) -> None:
    folder = Path(settings["data"]["folder"])
    (folder / "0.txt").write_text("a, {b|c}, [trigger], d, e\nanother line", encoding="utf-8")
    captions = {"shuffle": True, "keep_tags": 1, "dropout": 0.3, "tag_dropout": 0.2, "wildcards": True, "variants": 5}
    material, _ = prepare(data__captions=captions, training__steps=60)
    turns = turns_of(material, 20)
    texts = Counter(turn.text for turn in turns if turn.example.sample.path.name == "0.png")
    assert None in texts and 3 <= len(texts) <= 6
    assert all(turn.text in material.texts for turn in turns)
    others = {turn.text for turn in turns if turn.example.sample.path.name == "1.png"}
    assert others == {None, "a zorb on a wall"}


def test_a_short_run_encodes_no_more_texts_than_it_can_use(prepare: Any, settings: Any) -> None:
    for file in Path(settings["data"]["folder"]).glob("*.txt"):
        file.write_text("a, b, c, d, e, f, g, h", encoding="utf-8")
    short, _ = prepare(data__captions={"shuffle": True, "variants": 16}, training__steps=3)  # one epoch of six
    long, _ = prepare(data__captions={"shuffle": True, "variants": 16}, training__steps=300)
    assert len(short.texts) <= 6 + 3 and len(long.texts) > 60  # the plain text and no prompt too
    assert [t.text for t in short.batch(0)[0]] == [
        t.text for t in prepare(data__captions={"shuffle": True, "variants": 16}, training__steps=3)[0].batch(0)[0]
    ]


def test_a_trained_text_encoder_gets_fresh_texts(prepare: Any, settings: Any) -> None:
    for file in Path(settings["data"]["folder"]).glob("*.txt"):
        file.write_text(", ".join("abcdefgh"), encoding="utf-8")
    material, _ = prepare(adapter__text_encoder=True, data__captions={"shuffle": True, "variants": 2})
    assert not material.texts
    assert len({turn.text for turn in turns_of(material, 20)}) > 100


def test_concepts_come_as_often_as_each_asks(prepare: Any, settings: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    for number in range(2):
        path = tmp_path / "dogs" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    cats = settings["data"].pop("folder")
    concepts = [
        {"folder": cats, "repeats": 2, "weight": 0.5},
        {"folder": str(tmp_path / "dogs"), "trigger": "wuff", "caption": "[trigger]", "repeats": 5, "batch_size": 1},
    ]
    material, _ = prepare(data__concepts=concepts)
    counts = Counter(turn.example.sample.path for turn in turns_of(material, 1))
    assert {path.parent.name: count for path, count in counts.items()} == {"pictures": 2, "dogs": 5}
    assert len(counts) == 8
    sizes = {full for n in range(material.order.first_batch(1)) for _, full in [material.batch(n)]}
    assert sizes == {1, 2}
    assert [(f.trigger, f.repeats, f.pictures) for f in material.concept_facts()] == [("zorb", 2, 6), ("wuff", 5, 2)]


def test_held_out_pictures_are_validated_on_and_never_trained(prepare: Any) -> None:
    material, _ = prepare(data__held_out=0.34, validation__folder="")
    assert len(material.validation) == 2 and len(material.examples) == 4
    trained = {turn.example.identity for turn in turns_of(material, 3)}
    assert trained.isdisjoint(example.identity for example in material.validation)


def test_a_copy_of_a_training_picture_is_no_validation(configure: Any, settings: Any) -> None:
    copy = Path(settings["validation"]["folder"]) / "copy.png"
    copy.write_bytes((Path(settings["data"]["folder"]) / "0.png").read_bytes())
    copy.with_suffix(".txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"copy\.png: is held out for validation and also a training picture"):
        open_data(configure())


def test_everything_that_headers_tell_comes_before_the_base_is_loaded(configure: Any, settings: Any) -> None:
    for name in ("1.png", "4.png"):
        (Path(settings["data"]["folder"]) / name).write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"2 things are wrong(.|\n)*1\.png(.|\n)*4\.png"):
        open_data(configure())


def test_what_the_text_encoder_does_not_see_is_said(prepare: Any, settings: Any) -> None:
    (Path(settings["data"]["folder"]) / "0.txt").write_text("wall " * 90, encoding="utf-8")
    _, said = prepare()
    assert any("captions are longer than the text encoder sees; the longest loses its last" in line for line in said)


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ({"adapter__text_encoder": True}, 4),
        ({"tokens": {"train": "together"}}, 4),
        ({"tokens": {"train": "together", "vectors": 10}}, 12),
    ],
)
def test_so_it_is_where_texts_are_encoded_in_every_step(
    prepare: Any, settings: Any, values: dict[str, Any], lost: int, tiny_base: Any
) -> None:
    base = tiny_base()
    (own,) = {len(base.tokenizers["text_encoder"]("zorb", add_special_tokens=False).input_ids)}
    wall = len(base.tokenizers["text_encoder"]("wall", add_special_tokens=False).input_ids)
    walls = 75 // wall + 1
    (Path(settings["data"]["folder"]) / "0.txt").write_text("zorb " + "wall " * walls, encoding="utf-8")
    _, said = prepare(**values)
    over = values.get("tokens", {}).get("vectors", own) + walls * wall - 75
    assert any("1 of 2 captions are longer" in line and f"loses its last {over} tokens" in line for line in said), said


def test_texts_that_may_come_are_all_of_them_but_those_of_prior_pictures(configure: Any, settings: Any) -> None:
    folder = Path(settings["data"]["folder"])
    (folder / "0.txt").write_text("a {red|blue} ball\nanother [trigger]", encoding="utf-8")
    others = settings["validation"]["folder"]
    (Path(others) / "0.txt").write_text("something else", encoding="utf-8")
    config = configure(
        data__prior__folder=others, data__captions={"wildcards": True, "variants": 1}, validation__folder=""
    )
    texts = [*possible_texts(open_data(config).training, 0)]
    assert texts[:6] == ["a red ball", *["a zorb on a wall"] * 5]
    assert set(texts) == {"a red ball", "a blue ball", "another zorb", "a zorb on a wall"}


def test_the_next_run_finds_everything_in_the_cache(prepare: Any) -> None:
    first, said = prepare()
    assert first.report.encoded == 8 and any(line.startswith("8 pictures encoded in") for line in said)
    again, said = prepare()
    assert (again.report.encoded, again.report.reused) == (0, 8)
    assert "8 pictures encoded before, in the cache" in said


def test_the_cache_is_kept_within_its_limit(prepare: Any, configure: Any) -> None:
    prepare()
    shards = list(data_cache(configure().data).rglob("*.safetensors"))
    for shard in shards:  # as if used last week
        os.utime(shard, (1e9, 1e9))
    prepare(data__resolution=128)
    assert all(shard.exists() for shard in shards)
    for shard in shards:
        os.utime(shard, (1e9, 1e9))
    _, said = prepare(data__resolution=128, data__cache={"limit_gb": 0.0})
    pictures = [shard for shard in shards if "pictures" in shard.parts]
    assert pictures and not any(shard.exists() for shard in pictures)  # nor what this run needs is removed
    assert any("used least recently were removed from the cache" in line for line in said)


# --- prior preservation ------------------------------------------------------------------------------


def test_prior_pictures_come_in_turns_when_a_ratio_is_asked(prepare: Any, settings: Any) -> None:
    prior = {"folder": settings["validation"]["folder"], "ratio": 0.5}
    material, _ = prepare(data__prior=prior, validation__folder="")
    priors = [turn.example.sample.path.name for turn in turns_of(material, 4) if turn.example.sample.prior]
    assert Counter(priors) == {"0.png": 6, "1.png": 6}  # half of six, four times


def test_class_pictures_are_made_once_by_the_base_itself(prepare: Any, tiny_base: Any) -> None:
    prior = {"source": "generated", "count": 2, "steps": 2, "seed": 5}
    values = {"data__prior": prior, "data__class_prompt": "a picture of a wall", "data__resolution": 64}
    material, _ = prepare(make_class_pictures, **values)
    made = [example.sample for example in material.examples if example.sample.prior]
    assert [sample.caption for sample in made] == ["a picture of a wall"] * 2
    recipes = [read_recipe(sample.path) for sample in made]
    assert [(r.prompt, r.seed, r.width, r.steps) for r in recipes] == [
        ("a picture of a wall", s, 64, 2) for s in (5, 6)
    ]
    times = [sample.path.stat().st_mtime_ns for sample in made]
    made[1].path.unlink()
    again, _ = prepare(make_class_pictures, **values)
    kept = [example.sample.path for example in again.examples if example.sample.prior]
    assert kept[0].stat().st_mtime_ns == times[0] and kept[1].exists()
    more, _ = prepare(make_class_pictures, **{**values, "data__prior": {**prior, "count": 3}})
    assert sum(example.sample.prior for example in more.examples) == 3
    other, _ = prepare(make_class_pictures, **{**values, "data__prior": {**prior, "steps": 3}})
    assert {e.sample.path.parent for e in other.examples if e.sample.prior} != {kept[0].parent}


def test_generated_pictures_need_something_that_generates(prepare: Any) -> None:
    with pytest.raises(ConfigError, match=r'prior\.source is "generated", and train\(\) was given nothing'):
        prepare(data__prior={"source": "generated"}, data__class_prompt="x")


def test_the_class_prompt_is_encoded_where_it_is_held_to_the_base(prepare: Any) -> None:
    material, _ = prepare(data__prior={"source": "training"}, data__class_prompt="a thing")
    assert "a thing" in material.texts


# --- found in review ---------------------------------------------------------------------------------


def test_copies_of_a_held_out_picture_are_not_trained_on(prepare: Any, configure: Any, settings: Any) -> None:
    folder = Path(settings["data"]["folder"])
    for number in range(6):
        (folder / f"copy{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    values = {"data__held_out": 0.2, "data__caption": "x", "validation__folder": ""}
    assert any("copies of held-out pictures are left out" in line for line in open_data(configure(**values)).summary)
    material, _ = prepare(**values)
    held = {example.identity for example in material.validation}
    assert held and held.isdisjoint(example.identity for example in material.examples)


def test_captions_headers_and_masks_are_faulted_together(configure: Any, settings: Any) -> None:
    folder = Path(settings["data"]["folder"])
    (folder / "0.txt").unlink()
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2-masklabel.png").write_bytes(b"no mask")
    (Path(settings["validation"]["folder"]) / "0.png").write_bytes(b"<html>")
    with pytest.raises(DataError) as caught:
        open_data(configure())
    assert str(caught.value).startswith("4 things are wrong")
    assert all(
        name in str(caught.value) for name in ("0.png: has no caption", "1.png", "2-masklabel.png", "held-out/0.png")
    )


def test_what_a_killed_run_left_is_no_class_picture(prepare: Any) -> None:
    prior = {"source": "generated", "count": 2, "steps": 2}
    values = {"data__prior": prior, "data__class_prompt": "a wall", "data__resolution": 64}
    material, _ = prepare(make_class_pictures, **values)
    folder = next(e.sample.path.parent for e in material.examples if e.sample.prior)
    (folder / ".writing-abc.png").write_bytes(b"half")
    (folder / "00001.png").unlink()
    again, _ = prepare(make_class_pictures, **values)
    assert [e.sample.path.name for e in again.examples if e.sample.prior] == ["00000.png", "00001.png"]


def test_validation_pictures_are_cut_around_their_centre_only(prepare: Any) -> None:
    material, _ = prepare(data__flip=True, data__crops=3)
    assert {len(example.variants) for example in material.examples} == {6}
    assert {len(example.variants) for example in material.validation} == {1}


def test_the_header_tells_the_resolution_and_buckets_of_the_concepts(
    prepare: Any, tiny_base: Any, settings: Any
) -> None:
    folder = settings["data"].pop("folder")
    material, _ = prepare(data__concepts=[{"folder": folder, "resolution": 128, "buckets": {"enabled": False}}])
    assert material.resolution(tiny_base()) == 128
    assert not material.uses_buckets()
