"""Pictures of different adapters, words and prompts in one batch, against each of them made alone."""

import random

import pytest
import torch
from adapter_kinds import random_layer
from engine_help import ask, make, same, using
from every_family import one_family, two_families

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.live import base_weight
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, GenerationCancelled, GenerationError, SdloraError
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.infotext import infotext

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.up_blocks.0.resnets.0.conv1"


@pytest.fixture
def adapters(tiny_base, make_adapter, shape, tmp_path) -> dict[str, str]:
    """Files of several kinds that fit the tiny base: with text encoders, without, with a word, LoHa, LoKr, DoRA."""
    base = tiny_base(shape)
    tables = {name: encoder.get_input_embeddings().weight.shape[1] for name, encoder in base.text_encoders.items()}
    word = {"zorb": {name: torch.full((2, width), 0.3) for name, width in tables.items()}}
    files = {
        "text": make_adapter(base, seed=1),
        "unet": make_adapter(base, seed=2, text_encoder=False, rank=3),
        "word": AdapterFile(make_adapter(base, seed=3).layers, base.family.name, {}, word),
    }
    for kind in ("loha", "lokr", "dora"):
        layers = {path: random_layer(kind, tuple(base_weight(base, path).shape), 7) for path in (TO_K, CONV)}
        files[kind] = AdapterFile(layers, base.family.name)
    for name, file in files.items():
        write_adapter(file, tmp_path / f"{name}.safetensors")
    return {name: str(tmp_path / f"{name}.safetensors") for name in files}


@pytest.fixture
def latents(monkeypatch, tiny_base, shape):
    """Latents of every picture, as they are decoded."""
    family, seen = tiny_base(shape).family, []
    decode = family.decode_latents

    def spy(base, rows):
        seen.extend(rows)
        return decode(base, rows)

    monkeypatch.setattr(family, "decode_latents", spy)
    return seen


def requests_of(adapters):
    steps = {"path": adapters["unet"], "blocks": "OUT=0", "steps": "2-"}
    return [
        ask(seed=1, prompt="a (red:1.3) ball", adapters=using((adapters["text"], 0.8))),
        ask(seed=2, guidance_scale=3.0),
        ask(seed=3, prompt="a zorb", adapters=using((adapters["word"], 1.0), (adapters["unet"], -0.5))),
        ask(seed=4, prompt="a cat AND a dog :0.5", adapters=using((adapters["loha"], 0.6))),
        ask(seed=5, prompt="a [cat:dog:1]", adapters=using((adapters["lokr"], 0.6), (adapters["dora"], 0.9))),
        ask(seed=6, adapters=(steps,)),
        ask(seed=7, adapters=using((adapters["text"], 0.3))),
        ask(seed=8, prompt="a zorb", adapters=using((adapters["unet"], 1.0))),
    ]


def test_a_mixed_batch_equals_the_pictures_made_alone(tiny_base, shape, adapters, latents, monkeypatch):
    engine, requests = Engine(tiny_base(shape)), requests_of(adapters)
    alone = {}
    for number, request in enumerate(requests):
        latents.clear()
        make(engine, request)
        alone[number] = latents[0]
    calls = []
    predict = engine.base.family.predict
    monkeypatch.setattr(
        engine.base.family, "predict", lambda *given: calls.append(len(given[1])) or predict(*given), raising=True
    )
    latents.clear()
    order = [number for number, _, _ in engine.generate_all(requests, batch_size=8)]
    assert sorted(order) == list(range(8))
    assert set(calls) == {17}  # all in one batch: two rows each, three with AND
    for number, found in zip(order, latents, strict=True):
        scale = max(1.0, float(alone[number].abs().max()))
        assert (found - alone[number]).abs().max() < 1e-5 * scale, requests[number]
    distances = [float((alone[a] - alone[b]).abs().max()) for a in range(8) for b in range(a)]
    assert min(distances) > 1e-3


@one_family
def test_what_is_alike_is_regrouped_into_full_batches(tiny_base, shape, adapters, monkeypatch):
    engine, rows = Engine(tiny_base(shape)), []
    predict = engine.base.family.predict
    monkeypatch.setattr(
        engine.base.family, "predict", lambda *given: rows.append(len(given[1])) or predict(*given), raising=True
    )
    choices = [using((adapters[name], 1.0)) for name in ("text", "unet", "loha", "text")]
    small = [ask(seed=n, steps=1, width=32, height=32, guidance_scale=1.0, adapters=choices[n]) for n in range(4)]
    large = [ask(seed=n, steps=1, guidance_scale=1.0, adapters=choices[n]) for n in range(4)]
    mixed = [request for pair in zip(small, large, strict=True) for request in pair]
    made = list(engine.generate_all(mixed, batch_size=4))
    assert set(rows) == {4}
    assert [number for number, _, _ in made] == [0, 6, 2, 4, 1, 7, 3, 5]  # the same adapters next to each other
    assert all(picture.size == ((32, 32) if number % 2 == 0 else (64, 64)) for number, picture, _ in made)
    assert all(recipe.seed == mixed[number].seed for number, _, recipe in made)


@one_family
def test_memory_that_is_too_small_for_all_is_enough_for_a_few(tiny_base, shape, adapters, monkeypatch):
    engine = Engine(tiny_base(shape))
    alone = make(engine, ask(count=5))
    predict, rows = engine.base.family.predict, []

    def small_memory(base, latents, *more):
        rows.append(len(latents))
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(base, latents, *more)

    monkeypatch.setattr(engine.base.family, "predict", small_memory)
    together = make(engine, ask(count=5), batch_size=5)
    assert len(together) == len(alone)
    assert max(abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1
    assert rows[:2] == [10, 4]

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.base.family, "predict", no_memory)
    with pytest.raises(GenerationError, match="choose a smaller width or height"):
        make(engine, ask())


@one_family
def test_an_adapter_acts_at_its_steps_alone(tiny_base, shape, adapters):
    engine, path = Engine(tiny_base(shape)), adapters["unet"]
    bare, whole = make(engine, ask(steps=4)), make(engine, ask(steps=4, adapters=using((path, 1.0))))

    def at(steps: str):
        return make(engine, ask(steps=4, adapters=({"path": path, "steps": steps},)))

    assert same(at("1-"), whole)
    assert same(at("0.0-1.0"), whole)
    assert same(at("9-"), bare)
    assert not same(at("3-"), whole)
    assert not same(at("3-"), bare)
    assert same(at("0.5@0"), make(engine, ask(steps=4, adapters=using((path, 0.5)))))


@two_families
def test_weights_by_block_reach_text_encoders_too(tiny_base, shape, adapters):
    engine, path = Engine(tiny_base(shape)), adapters["text"]
    bare = make(engine, ask())
    assert same(make(engine, ask(adapters=({"path": path, "blocks": "BASE=0, IN=0, MID=0, OUT=0"},))), bare)
    text_alone = make(engine, ask(adapters=({"path": path, "blocks": "IN=0, MID=0, OUT=0"},)))
    assert same(text_alone, make(engine, ask(adapters=({"path": path, "weight": 0.0, "text_encoder_weight": 1.0},))))


@one_family
def test_tags_name_blocks_and_steps_and_the_recipe_keeps_them(tiny_base, shape, adapters):
    def find(name: str) -> str:
        return adapters[name]

    engine = Engine(tiny_base(shape), find_adapter=find)
    ((_, recipe),) = engine.generate(ask(prompt="a red ball <lora:unet:0.7:lbw=OUT=0, MID=0.5:start=2:stop=0.8>"))
    (used,) = recipe.adapters
    assert (used.weight, used.blocks, used.steps) == (0.7, "OUT=0, MID=0.5", "2-0.8")
    assert "<lora:unet:0.7:lbw=OUT=0, MID=0.5:step=2-0.8>" in infotext(recipe)
    choice = {"path": adapters["unet"], "weight": 0.7, "blocks": "OUT=0, MID=0.5", "steps": "2-0.8"}
    tagged = make(engine, ask(prompt="a red ball <lora:unet:0.7:lbw=OUT=0, MID=0.5:step=2-0.8>"))
    assert same(tagged, make(engine, ask(adapters=(choice,))))
    with pytest.raises(ConfigError, match=r"<lora:unet>: blocks is 'NOWHERE'; expected a preset"):
        make(engine, ask(prompt="a ball <lora:unet:1:lbw=NOWHERE>"))
    with pytest.raises(ConfigError, match=r"adapters.0.steps is 'soon'; expected a range"):
        ask(adapters=({"path": adapters["unet"], "steps": "soon"},))


@pytest.mark.parametrize("shape", ["sd1"], indirect=True)
def test_the_base_is_unchanged_after_hundreds_of_loads_mixes_errors_and_removals(tiny_base, shape, adapters, tmp_path):
    engine = Engine(tiny_base(shape), resident_adapters=2)
    digest, bare = engine.weights_sha256(), make(engine, ask(steps=1))
    (tmp_path / "broken.safetensors").write_text("no adapter")
    files = [*adapters.values(), str(tmp_path / "broken.safetensors"), str(tmp_path / "missing.safetensors")]
    draw, errors = random.Random(5), 0

    def cancel(progress):
        if draw.random() < 0.2:
            raise GenerationCancelled("stopped")

    for _ in range(70):
        requests = [
            ask(
                seed=draw.randrange(100),
                steps=1,
                width=16,
                height=16,
                guidance_scale=1.0,
                adapters=using(*((file, draw.uniform(-1, 1)) for file in draw.sample(files[:6], draw.randrange(3)))),
            )
            for _ in range(3)
        ]
        if draw.random() < 0.2:
            requests.append(ask(steps=1, adapters=using((draw.choice(files[6:]), 1.0))))
        try:
            list(engine.generate_all(requests, batch_size=draw.choice([1, 2, 4]), on_step=cancel))
        except SdloraError:
            errors += 1
    assert 15 < errors < 65
    assert same(make(engine, ask(steps=1)), bare)
    assert engine.weights_sha256() == digest
