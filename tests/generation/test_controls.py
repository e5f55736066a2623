"""ControlNets: the same latents as diffusers' pipelines, one or several, from folders and files; batches, recipes, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from control_files import draw_map, random_control, write_original
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from engine_help import ask, make, pixels, same, using
from every_family import one_family, two_families
from inpainting_bases import inpainting_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, DataError, ModelError
from sdlora.families.controls import find_control
from sdlora.generation.controls import refuse_foreign_controls
from sdlora.generation.engine import Engine
from sdlora.generation.memory import Placement
from sdlora.generation.pictures.files import save_picture
from sdlora.generation.pictures.infotext import infotext, parse_infotext
from sdlora.generation.replay.find_base import base_finder
from sdlora.generation.replay.replaying import replay


@pytest.fixture(scope="session")
def control_folder(tmp_path_factory):
    """`control_folder(base, seed)`: the folder of a random ControlNet for that base; do not write to it."""
    folders: dict[tuple[str, int], Path] = {}

    def folder(base, seed: int = 0) -> str:
        key = (base.family.name, seed)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("controls") / f"{key[0]}-{seed}"
            random_control(base.unet, seed).save_pretrained(folders[key])
        return str(folders[key])

    return folder


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


@pytest.fixture
def led(engine, control_folder, tmp_path):
    """`led(seed=0, ...)`: one entry of a request's `control`."""

    def entry(seed: int = 0, map_seed: int = 0, **values):
        image = draw_map(tmp_path / f"map-{map_seed}.png", map_seed)
        return {"model": control_folder(engine.base, seed), "image": image, **values}

    return entry


def watch_latents(vae) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# --- beside diffusers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "controls",
    [
        [{}],
        [{"strength": 0.6, "start": 0.2, "end": 0.7}],
        [{"strength": 1.4}, {"seed": 1, "map_seed": 1, "strength": 0.5, "end": 0.5}],
    ],
    ids=["one", "a part of the steps", "two"],
)
def test_the_latents_are_those_of_diffusers_own_pipeline(engine, tiny_folder, shape, led, controls):
    entries = [led(**values) for values in controls]
    kind = StableDiffusionXLControlNetPipeline if shape == "sdxl" else StableDiffusionControlNetPipeline
    nets = [ControlNetModel.from_pretrained(entry["model"]) for entry in entries]
    pipeline = kind.from_pretrained(tiny_folder(shape), controlnet=nets)
    pipeline.set_progress_bar_config(disable=True)
    before = engine.weights_sha256()
    ours, theirs = watch_latents(engine.base.vae), watch_latents(pipeline.vae)
    make(engine, ask(seed=11, steps=5, control=entries))
    pipeline(
        "a red ball",
        image=[Image.open(entry["image"]) for entry in entries],
        negative_prompt="blue",
        num_inference_steps=5,
        guidance_scale=7.5,
        controlnet_conditioning_scale=[float(entry.get("strength", 1)) for entry in entries],
        control_guidance_start=[entry.get("start", 0.0) for entry in entries],
        control_guidance_end=[entry.get("end", 1.0) for entry in entries],
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(11),
    )
    assert relative(ours[-1], theirs[-1]) < 1e-5
    make(engine, ask(seed=11, steps=5))
    assert relative(ours[-1], theirs[-1]) > 0.05  # it makes a difference
    assert engine.weights_sha256() == before


@pytest.mark.parametrize(
    ("shape", "prefix"), [("sd1", "control_model."), ("sd1", ""), ("sd2", ""), ("sdxl", "control_model.")]
)
def test_a_file_in_the_original_layout_is_the_same_model(engine, shape, led, tmp_path, prefix):
    folder = led()
    net = ControlNetModel.from_pretrained(folder["model"])
    stray = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 4, 1, 1)} if prefix else {}
    file = {**folder, "model": write_original(net, tmp_path / "original.safetensors", prefix, **stray)}
    facts = find_control(file["model"])
    assert facts.family.name == shape
    assert same(make(engine, ask(control=[folder])), make(engine, ask(control=[file])))


def test_a_file_in_diffusers_names_is_the_same_model(engine, shape, led):
    folder = led()
    file = {**folder, "model": f"{folder['model']}/diffusion_pytorch_model.safetensors"}
    assert find_control(file["model"]).family.name == shape
    assert same(make(engine, ask(control=[folder])), make(engine, ask(control=[file])))


# --- rows --------------------------------------------------------------------------------------------


@two_families
def test_rows_of_a_batch_have_their_own_maps_strengths_and_spans(engine, led):
    controls = [{"map_seed": 0}, {"map_seed": 1, "strength": 0.4}, {"map_seed": 2, "end": 0.5}]
    requests = [ask(seed=n, steps=4, control=[led(**values)]) for n, values in enumerate(controls)]
    alone = [make(engine, request)[0] for request in requests]
    calls = []
    engine.base.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    together = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=3)}
    assert set(calls) == {6}  # with the negative prompts
    assert all(np.abs(together[number] - one).max() <= 1 for number, one in enumerate(alone))


@one_family
def test_pictures_of_other_controlnets_do_not_share_a_batch(engine, led):
    requests = [ask(control=[led(0)]), ask(control=[led(1)]), ask(), ask(control=[led(1), led(0)])]
    made = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=4)}
    assert all(same([made[number]], make(engine, request)) for number, request in enumerate(requests))


@one_family
def test_strength_zero_and_steps_that_never_come_are_as_without(engine, led):
    plain = make(engine, ask())
    assert same(plain, make(engine, ask(control=[led(strength=0)])))
    assert same(plain, make(engine, ask(control=[led(start=0.6, end=0.9)])))  # of two steps none lies within
    assert not same(plain, make(engine, ask(control=[led()])))


@one_family
def test_adapters_act_on_the_base_alone(engine, led, make_adapter, tmp_path, monkeypatch):
    path = str(tmp_path / "adapter.safetensors")
    write_adapter(make_adapter(engine.base, text_encoder=False), path, "kohya")
    added = []
    control = type(engine.base.family).control
    monkeypatch.setattr(
        type(engine.base.family), "control", lambda *given: added.append(control(*given)) or added[-1], raising=True
    )
    requests = ask(control=[led()], steps=1), ask(control=[led()], steps=1, adapters=using((path, 1.0)))
    plain, adapted = (make(engine, request) for request in requests)
    assert not same(plain, adapted)
    torch.testing.assert_close(added[0].mid, added[1].mid, rtol=0, atol=0)  # at the first step, from the same noise


@one_family
def test_a_series_loads_a_controlnet_once_and_offloads_it(tiny_base, led, monkeypatch):
    from sdlora.generation import controls

    loads = []
    load = controls.load_control
    monkeypatch.setattr(controls, "load_control", lambda *given: loads.append(given[2]) or load(*given))
    moved = []
    using_part = Placement.using

    def using(self, part, beside=()):
        moved.append((part, len(list(beside))))
        return using_part(self, part, beside)

    monkeypatch.setattr(Placement, "using", using)
    engine = Engine(tiny_base(), offload="model")
    list(engine.generate(ask(count=2, control=[led()])))
    assert loads == [torch.device("cpu")] and ("unet", 1) in moved


# --- sizes, pictures, passes -------------------------------------------------------------------------


@one_family
def test_a_map_is_fitted_as_the_request_says(engine, control_folder, tmp_path):
    wide = draw_map(tmp_path / "wide.png", 3, (128, 64))
    entry = {"model": control_folder(engine.base), "image": wide}
    Image.open(wide).crop((32, 0, 96, 64)).save(tmp_path / "cut.png")
    cut = make(engine, ask(control=[entry], resize="crop and resize"))
    assert same(cut, make(engine, ask(control=[{**entry, "image": str(tmp_path / "cut.png")}])))
    assert not same(cut, make(engine, ask(control=[entry])))


@one_family
def test_it_leads_both_passes_each_in_its_size(engine, led, monkeypatch):
    sizes = []
    control = type(engine.base.family).control
    monkeypatch.setattr(
        type(engine.base.family), "control", lambda *given: sizes.append(tuple(given[-1].shape[-2:])) or control(*given)
    )
    make(engine, ask(control=[led()], hires_scale=1.5))
    assert set(sizes) == {(64, 64), (96, 96)}


@one_family
def test_only_masked_is_led_by_that_part_of_the_map(engine, led, tmp_path, monkeypatch):
    entry = led()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 16, 40, 48))
    mask.save(tmp_path / "mask.png")
    maps = []
    control = type(engine.base.family).control
    monkeypatch.setattr(type(engine.base.family), "control", lambda *given: maps.append(given[-1]) or control(*given))
    painted = {"image": draw_map(tmp_path / "photo.png", 5), "mask": str(tmp_path / "mask.png"), "mask_blur": 0}
    make(engine, ask(control=[entry], inpaint_area="only masked", masked_padding=0, width=32, height=32, **painted))
    part = np.asarray(Image.open(entry["image"]).convert("RGB"))[16:48, 8:40]
    assert np.allclose(maps[0][0].permute(1, 2, 0).numpy() * 255, part, atol=1e-3)


def test_it_leads_inpainting_bases_too(tmp_path, led, shape):
    inpainting_pipeline(shape).save_pretrained(tmp_path / "base")
    engine = Engine(BaseSection(path=str(tmp_path / "base"), precision="fp32"), device="cpu")
    mask = Image.new("L", (64, 64), 255)
    mask.save(tmp_path / "mask.png")
    painted = {"image": draw_map(tmp_path / "photo.png", 5), "mask": str(tmp_path / "mask.png")}
    assert not same(make(engine, ask(**painted)), make(engine, ask(control=[led()], **painted)))


# --- recipes -----------------------------------------------------------------------------------------


@one_family
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_picture_is_made_again_from_its_recipe(engine, led, tiny_folder, tmp_path, layout):
    entry = led(strength=0.8, end=0.6)
    if layout == "file":
        net = ControlNetModel.from_pretrained(entry["model"])
        entry["model"] = write_original(net, tmp_path / "edges v2.safetensors")
    ((picture, recipe),) = engine.generate(ask(control=[entry], resize="crop and resize"))
    (used,) = recipe.controls
    assert (used.model, used.picture.name) == (Path(entry["model"]).name, "map-0.png")
    assert (used.strength, used.start, used.end, used.resize) == (0.8, 0.0, 0.6, "crop and resize")
    folder = tmp_path / "later"
    folder.mkdir()
    Path(entry["image"]).rename(folder / "renamed.png")
    if layout == "file":
        Path(entry["model"]).rename(folder / "other.safetensors")
    else:
        (folder / "other").symlink_to(entry["model"])
    path = save_picture(picture, recipe, folder / "made.png")
    again = replay(path, base_finder(BaseSection(path=str(tiny_folder("sd1")))), lambda item: pytest.fail(item.name))
    assert again.comparison.identical
    assert {text.split(":")[0] for text in again.differences} <= {"controls"}  # their names of now
    fields = parse_infotext(infotext(recipe)).fields
    model = "edges v2" if layout == "file" else "sd1-0"
    assert fields["ControlNet 0"] == (
        f"Module: none, Model: {model}, Weight: 0.8, Resize Mode: Crop and Resize, Guidance Start: 0, Guidance End: 0.6, "
        "Pixel Perfect: False, Control Mode: Balanced"
    )


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strength": 2.5}, "control.0.strength is 2.5"),
        ({"start": 0.5, "end": 0.5}, "control.0.end is 0.5; it must be more than start, which is 0.5"),
        ({"start": 1}, "control.0.start is 1"),
        ({"modell": "a"}, "modell"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, sentence):
    with pytest.raises(ConfigError) as caught:
        ask(control=[{"model": "a", "image": "b.png", **values}])
    assert sentence in str(caught.value)


def test_resize_means_something_with_a_map_alone():
    ask(control=[{"model": "a", "image": "b.png"}], resize="crop and resize")
    with pytest.raises(ConfigError, match="resize does nothing without image"):
        ask(resize="crop and resize")


def test_a_controlnet_of_another_family_is_refused_before_the_base_loads(
    tiny_base, control_folder, tiny_folder, tmp_path
):
    entry = {"model": control_folder(tiny_base("sdxl")), "image": draw_map(tmp_path / "map.png")}
    sentence = r"is a ControlNet for Stable Diffusion XL, the base .* is Stable Diffusion 2\.x; choose one that fits it"
    with pytest.raises(ModelError, match=sentence):
        refuse_foreign_controls(BaseSection(path=str(tiny_folder("sd2"))), ask(control=[entry]))
    with pytest.raises(ModelError, match=sentence):
        make(Engine(tiny_base("sd2")), ask(control=[entry]))


def test_what_is_no_controlnet_is_named(engine, tiny_folder, checkpoints, control_folder, tmp_path):
    image = draw_map(tmp_path / "map.png")
    folder = Path(control_folder(engine.base))

    def refusal(model, **config) -> str:
        if config:
            copied = tmp_path / "copied"
            copied.mkdir(exist_ok=True)
            (copied / "config.json").write_text(
                json.dumps({**json.loads((folder / "config.json").read_text()), **config})
            )
            for file in folder.glob("*.safetensors"):
                (copied / file.name).write_bytes(file.read_bytes())
            model = copied
        with pytest.raises((ModelError, DataError)) as caught:
            make(engine, ask(control=[{"model": str(model), "image": image}]))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    (tmp_path / "net.pth").write_bytes(b"pickle")
    save_file({"lora_controlnet": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["controlnet_mid_block.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    assert "is a pickle, which could run code" in refusal(tmp_path / "net.pth")
    assert "is a Control-LoRA" in refusal(tmp_path / "lora.safetensors")
    assert "holds no ControlNet (1 tensors, such as 'something')" in refusal(tmp_path / "other.safetensors")
    assert "lacks 1 weights, such as controlnet_mid_block.weight" in refusal(tmp_path / "part.safetensors")
    assert "is a base, not a ControlNet; give it as --base" in refusal(checkpoints("sd1"))
    assert "there is no such ControlNet" in refusal(tmp_path / "missing.safetensors")
    assert "it has no config.json" in refusal(tiny_folder("sd1"))
    assert "is a ControlNetUnionModel, not a ControlNetModel" in refusal(folder, _class_name="ControlNetUnionModel")
    assert "guess mode" in refusal(folder, global_pool_conditions=True)
    assert "is for another UNet than that of" in refusal(folder, block_out_channels=[32, 32])
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        make(engine, ask(control=[{"model": str(folder), "image": str(tmp_path / "gone.png")}]))
