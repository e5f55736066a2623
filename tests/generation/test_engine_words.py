"""New words in the Engine: embeddings, and adapters that bring words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine_help import ask, make, pixels, same, using
from every_family import one_family, two_families
from PIL import Image
from safetensors.torch import load_file

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, FormatError, GenerationCancelled, ModelError
from sdlora.generation import resident
from sdlora.generation.engine import Engine, refuse_foreign_adapters
from sdlora.generation.pictures.files import read_recipe, save_picture
from sdlora.storage import sha256_of_file, sha256_of_tensor_data


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


def vectors(base, seed=0, count=2):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, 32, generator=generator) * 0.1 for name in base.text_encoders}


@pytest.fixture
def words(tiny_base, make_adapter, tmp_path) -> dict[str, str]:
    """Files that teach the word "zorb": alone, with an adapter's layers, in one file with them, and otherwise."""
    base = tiny_base()
    layers = make_adapter(base, alpha=4.0)
    taught = {"zorb": vectors(base)}
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("alone", "pair", "bundle", "other", "layers")}
    metadata = dict(base.family.metadata[base.prediction])
    write_adapter(AdapterFile({}, base.family.name, metadata, taught), files["alone"])
    write_adapter(replace(layers, tokens=taught), files["pair"])
    write_adapter(replace(layers, tokens=taught), files["bundle"], bundle=True)
    write_adapter(AdapterFile({}, base.family.name, metadata, {"ZORB": vectors(base, 5)}), files["other"])
    write_adapter(layers, files["layers"])
    return files


def zorb(**values):
    return ask(**{"prompt": "a zorb", "negative_prompt": "zorb, blue", **values})


@two_families
def test_a_new_word_acts_in_its_request_alone(engine, words, tiny_base):
    digest, bare = engine.weights_sha256(), make(engine, zorb())
    without_word = make(engine, ask())
    with_word = make(engine, zorb(adapters=using((words["alone"], 1.0))))
    assert not same(bare, with_word)
    assert engine.base.words == {}
    assert same(bare, make(engine, zorb()))
    assert same(bare, make(engine, zorb(adapters=using((words["alone"], 0.0)))))
    assert same(without_word, make(engine, ask(adapters=using((words["alone"], 1.0)))))
    assert same(with_word, make(engine, zorb(adapters=using((words["alone"], 0.3)))))  # a word has no strength
    base = tiny_base()
    base.words = {"zorb": vectors(base)}
    assert same(with_word, make(Engine(base), zorb()))
    assert engine.weights_sha256() == digest


@two_families
@pytest.mark.parametrize("kind", ["pair", "bundle"])
def test_words_act_with_their_adapters_layers(engine, words, kind):
    bare = make(engine, zorb())
    expected = make(engine, zorb(adapters=using((words["alone"], 1.0), (words["layers"], 0.7))))
    assert same(expected, make(engine, zorb(adapters=using((words[kind], 0.7)))))
    assert same(bare, make(engine, zorb(adapters=using((words[kind], 0.0)))))
    assert not same(expected, make(engine, zorb(adapters=using((words["layers"], 0.7)))))


@one_family
def test_the_recipe_names_the_words_that_acted(engine, words, tmp_path):
    chosen = using((words["pair"], 0.5), (words["alone"], 1.0))
    ((picture, recipe),) = engine.generate(zorb(adapters=chosen))
    pair, alone = recipe.adapters
    digest = sha256_of_tensor_data(tmp_path / "embeddings" / "zorb.safetensors")
    assert pair.words == alone.words == {"zorb": digest}
    assert (pair.name, pair.weight, pair.embedding) == ("pair", 0.5, False)
    assert (alone.name, alone.weight, alone.embedding) == ("alone", 1.0, True)
    assert alone.sha256 == sha256_of_file(tmp_path / "alone.safetensors") and alone.tensor_sha256 == digest
    save_picture(picture, recipe, tmp_path / "a.png")
    assert read_recipe(tmp_path / "a.png") == recipe
    with Image.open(tmp_path / "a.png") as saved:
        assert "<lora:pair:0.5>" in saved.info["parameters"] and "<lora:alone" not in saved.info["parameters"]


@one_family
def test_one_word_taught_in_two_ways_is_refused(engine, words):
    bare = make(engine, zorb())
    with pytest.raises(ConfigError, match=r"other\.safetensors: teaches the word 'ZORB', which another adapter in use"):
        make(engine, zorb(adapters=using((words["pair"], 1.0), (words["other"], 1.0))))
    assert same(bare, make(engine, zorb()))
    make(engine, zorb(adapters=using((words["pair"], 1.0), (words["other"], 0.0))))


@two_families
def test_words_that_a_base_knows_stay_known_and_are_not_overruled(tiny_base, words):
    base = tiny_base()
    live = {"zorb": {name: torch.nn.Parameter(value) for name, value in vectors(base).items()}}
    base.words = live
    engine = Engine(base)
    known = make(engine, zorb())
    assert same(known, make(engine, zorb(adapters=using((words["alone"], 1.0)))))
    with pytest.raises(ConfigError, match="teaches the word 'ZORB'"):
        make(engine, zorb(adapters=using((words["other"], 1.0))))
    assert base.words is live
    with torch.no_grad():
        for value in live["zorb"].values():
            value.mul_(-1)  # as a step of training does
    assert not same(known, make(engine, zorb()))


@one_family
def test_an_error_or_a_cancel_leaves_no_word_behind(engine, words, tmp_path, monkeypatch):
    def cancel(progress):
        raise GenerationCancelled("stopped")

    def fail(base, *texts):
        assert base.words  # here it is known
        raise GenerationCancelled("stopped")

    with pytest.raises(GenerationCancelled):
        make(engine, zorb(adapters=using((words["alone"], 1.0))), on_step=cancel)
    assert engine.base.words == {}
    with monkeypatch.context() as patched, pytest.raises(GenerationCancelled):
        patched.setattr(engine.base.family, "encode_segments", fail)
        make(engine, zorb(adapters=using((words["alone"], 1.0))))
    assert engine.base.words == {}
    with pytest.raises(FormatError):
        make(engine, zorb(adapters=using((words["alone"], 1.0), (str(tmp_path / "missing.safetensors"), 1.0))))
    assert engine.base.words == {}


def test_an_embedding_for_another_base_is_refused(engine, words, tmp_path, shape):
    bare = make(engine, zorb())
    wide = AdapterFile({}, "", {}, {"zorb": {name: torch.ones(1, 8) for name in vectors(engine.base)}})
    write_adapter(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match="the new word 'zorb' has vectors of width 8"):
        make(engine, zorb(adapters=using((str(tmp_path / "wide.safetensors"), 1.0))))
    other = {"text_encoder": torch.ones(1, 1024 if shape == "sd1" else 768)}
    write_adapter(AdapterFile({}, "", {}, {"zorb": other}), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"the adapter is for Stable Diffusion [12]\.x"):
        make(engine, zorb(adapters=using((str(tmp_path / "other.safetensors"), 1.0))))
    with pytest.raises(ModelError, match=r"the adapter is for Stable Diffusion [12]\.x"):
        refuse_foreign_adapters(BaseSection(path=str(engine.base.source.path)), [str(tmp_path / "other.safetensors")])
    assert same(bare, make(engine, zorb()))


@two_families
def test_an_embedding_works_in_the_negative_prompt_and_several_stay_resident(engine, words, monkeypatch):
    reads = []
    real = resident.read_adapter
    monkeypatch.setattr(resident, "read_adapter", lambda path: reads.append(path.stem) or real(path))
    engine = Engine(engine.base, resident_adapters=1)
    bare = make(engine, ask(negative_prompt="zorb"))
    assert not same(bare, make(engine, ask(negative_prompt="zorb", adapters=using((words["alone"], 1.0)))))
    make(engine, zorb(adapters=using((words["alone"], 1.0))))
    make(engine, zorb(adapters=using((words["other"], 1.0))))
    make(engine, zorb(adapters=using((words["alone"], 1.0))))
    assert reads == ["alone", "other", "alone"]


def load_into_diffusers(pipeline, path, word) -> None:
    """As the documentation shows: SDXL's loader takes one encoder's vectors at a time."""
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "text_encoder_2"):
        pipeline.load_textual_inversion(path, token=word)
        return
    tensors = load_file(path)
    first, second = (pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)
    for key, (encoder, tokenizer) in (("clip_l", first), ("clip_g", second)):
        pipeline.load_textual_inversion({word: tensors[key]}, token=word, text_encoder=encoder, tokenizer=tokenizer)


def drawn_by_diffusers(pipeline):
    """What the pipeline makes of the request below."""
    picture = pipeline(
        "a red zorb here",
        negative_prompt="blue",
        num_inference_steps=4,
        guidance_scale=7.5,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    return pixels(picture)


def test_plain_diffusers_takes_an_embedding_file_and_gives_our_pixels(tiny_base, tiny_folder, words, shape):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(shape))
    load_into_diffusers(pipeline, words["alone"], "zorb")
    request = ask(seed=11, steps=4, prompt="a red zorb here", adapters=using((words["alone"], 1.0)))
    ours = make(Engine(tiny_base()), request)
    assert np.abs(ours[0] - drawn_by_diffusers(pipeline)).max() <= 1


def test_plain_diffusers_takes_an_adapter_with_its_word_and_gives_our_pixels(
    tiny_base, tiny_folder, words, shape, tmp_path
):
    """The two calls that README.md and docs/formats.md show."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(shape))
    pipeline.load_lora_weights(words["pair"])
    load_into_diffusers(pipeline, str(tmp_path / "embeddings" / "zorb.safetensors"), "zorb")
    request = ask(seed=11, steps=4, prompt="a red zorb here", adapters=using((words["pair"], 1.0)))
    ours = make(Engine(tiny_base()), request)
    assert np.abs(ours[0] - drawn_by_diffusers(pipeline)).max() <= 1


@pytest.mark.parametrize("shape", ["sdxl"])
def test_diffusers_pools_at_the_word_where_a_models_settings_say_2(tiny_base, tiny_folder, words, shape):
    """As those of SDXL's second text encoder do. The states are ours; our pooled embedding stays the end token's."""
    base = tiny_base()
    base.words = {"zorb": vectors(base)}
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(shape))
    load_into_diffusers(pipeline, words["alone"], "zorb")

    def both():
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(
                "a red zorb here", device=torch.device("cpu"), do_classifier_free_guidance=False
            )
            return base.family.encode_prompts(base, ["a red zorb here"]), states, pooled

    ours, states, pooled = both()
    torch.testing.assert_close(ours.states, states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=1e-5)
    for encoder in (base.text_encoders["text_encoder_2"], pipeline.text_encoder_2):
        getattr(encoder, "text_model", encoder).eos_token_id = 2
    again, states, other = both()
    torch.testing.assert_close(again.states, states, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.pooled, ours.pooled)
    assert not torch.allclose(other, pooled, atol=1e-2)
