"""Pictures of other programs, each in the shape that its program writes."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import FormatError
from sdlora.generation.foreign.a1111 import foreign_infotext
from sdlora.generation.foreign.comfy import foreign_comfy
from sdlora.generation.foreign.reading import (
    ForeignAdapter,
    ForeignRecipe,
    foreign_recipe,
    foreign_request,
    read_foreign,
)
from sdlora.generation.foreign.recipe import literal, without_choices
from sdlora.generation.pictures.texts import PictureTexts
from sdlora.generation.prompts import parse_attention, parse_tags
from sdlora.generation.prompts.plan import plan_prompt
from sdlora.generation.prompts.wildcards import expand_wildcards
from sdlora.generation.request import GenerationRequest

A1111 = (
    "a (red:1.2) ball {left|right} <lora:zorb:0.8> <lora:gone:0.5:1> <hypernet:old:1>\n"
    "Negative prompt: blurry\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 123, Size: 512x768, "
    "Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, RNG: CPU, Hires upscale: 2, Hires upscaler: Latent, "
    'Lora hashes: "zorb: aabbccddeeff, gone: 001122334455", Emphasis: No norm, Version: v1.10.1'
)
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1.0, "model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15/v1-5-pruned.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["12", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["12", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "zorb.safetensors", "strength_model": 0.8, "strength_clip": 0.6, "model": ["4", 0], "clip": ["4", 1]},
    },
    "11": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "sub\\style.safetensors", "strength_model": 0.5, "model": ["10", 0]},
    },
    "12": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "20": {"class_type": "PrimitiveString", "inputs": {"value": "a ((red:1.3) ball:1.1), [not] embedding:oldfilm"}},
}  # fmt: skip
INVOKE = {
    "app_version": "5.4.0", "generation_mode": "txt2img", "positive_prompt": "a red ball", "negative_prompt": "blurry",
    "width": 768, "height": 512, "seed": 42, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30,
    "scheduler": "euler_a", "clip_skip": 1,
    "model": {"key": "0c1f", "hash": "blake3:7d9e", "name": "dreamshaper", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"name": "zorb", "hash": "blake3:11"}, "weight": 0.75}],
    "controlnets": [{"image": "x"}],
}  # fmt: skip
NOVEL = {
    "prompt": "{{red}} ball, [blue]", "steps": 28, "height": 1216, "width": 832, "scale": 5.0, "uncond_scale": 1.0, "seed": 77,
    "n_samples": 1, "sampler": "k_euler_ancestral", "noise_schedule": "karras", "uc": "lowres",
}  # fmt: skip


def png(folder: Path, size=(64, 64), **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    path = folder / "a.png"
    Image.new("RGB", size, "red").save(path, pnginfo=info)
    return path


def nothing(_: ForeignAdapter) -> None:
    return None


def by_name(adapter: ForeignAdapter) -> Path | None:
    return None if adapter.name == "gone" else Path(f"lib/{adapter.name}.safetensors")


# --- AUTOMATIC1111 and Forge ---------------------------------------------------------------------------


def test_automatic1111(tmp_path):
    recipe = read_foreign(png(tmp_path, parameters=A1111))
    assert recipe.program == "AUTOMATIC1111"
    assert (recipe.base, recipe.base_hash) == ("v1-5-pruned", "6ce0161689")
    assert recipe.settings == {
        "seed": 123, "steps": 28, "guidance_scale": 6.5, "width": 512, "height": 768, "clip_skip": 2,
        "sampler": "DPM++ 2M", "schedule": "Karras", "emphasis": "no norm", "noise": "cpu",
        "hires_scale": 2.0, "hires_upscaler": "latent",
    }  # fmt: skip
    assert recipe.adapters == (
        ForeignAdapter("zorb", 0.8, None, ("aabbccddeeff",)),
        ForeignAdapter("gone", 1.0, 0.5, ("001122334455",)),
    )
    assert recipe.left_out == ("tag <hypernet:old:1>",)


def test_a_request_has_what_there_is_and_names_the_rest(tmp_path):
    request, left_out = vars(foreign_request(read_foreign(png(tmp_path, parameters=A1111)), by_name)).values()
    assert (request.seed, request.steps, request.guidance_scale, request.clip_skip) == (123, 28, 6.5, 2)
    assert (request.width, request.height, request.emphasis) == (512, 768, "no norm")
    assert [(choice.path, choice.weight) for choice in request.adapters] == [("lib/zorb.safetensors", 0.8)]
    assert "adapter gone, which is not in the library" in left_out
    assert (request.sampler, request.schedule, request.noise) == ("DPM++ 2M", "Karras", "cpu")
    assert (request.hires_scale, request.hires_upscaler) == (2.0, "latent")


def test_an_upscaler_that_is_not_here_is_left_out_with_its_pass(tmp_path):
    text = A1111.replace("Hires upscaler: Latent", "Hires upscaler: R-ESRGAN 4x+")
    recipe = read_foreign(png(tmp_path, parameters=text))
    assert "hires_scale" not in recipe.settings
    assert recipe.left_out[:2] == ("Hires upscale 2", "Hires upscaler R-ESRGAN 4x+")


def test_blocks_and_steps_of_a_tag_are_carried_over():
    tags = "<lora:a:0.5:1:lbw=MIDD:step=2-3> <lora:b:1:lbw=0,1:start=5>"
    recipe = foreign_infotext(f"a cat {tags}\nSteps: 20, Sampler: Euler a, Seed: 1")
    assert [(adapter.blocks, adapter.steps) for adapter in recipe.adapters] == [("MIDD", "2-3"), ("0,1", "5-")]
    request, left_out = vars(foreign_request(recipe, by_name)).values()
    assert [(choice.blocks, choice.steps) for choice in request.adapters] == [("MIDD", "2-3"), ("", "5-")]
    assert "blocks '0,1' of adapter b" in left_out


def test_choices_in_a_finished_prompt_are_not_made_again(tmp_path):
    request = foreign_request(read_foreign(png(tmp_path, parameters=A1111)), by_name).request
    for seed in range(5):
        assert expand_wildcards(request.prompt, seed) == request.prompt
    assert parse_attention(request.prompt) == [("a ", 1.0), ("red", 1.2), (" ball {left|right}", 1.0)]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_comment_in_exif(tmp_path, suffix):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}", exif=exif)
    assert read_foreign(tmp_path / f"a{suffix}").settings["seed"] == 123


def test_old_names_of_samplers_are_taken_apart():
    text = "a\nSteps: 20, Sampler: DPM++ SDE Karras, Seed: 1, Version: f2.0.1v1.10.1-previous-665"
    recipe = foreign_recipe(PictureTexts({"parameters": text}, 64, 48, "PNG"))
    assert recipe.program == "Forge"
    assert recipe.settings == {
        "seed": 1,
        "steps": 20,
        "sampler": "DPM++ SDE",
        "schedule": "Karras",
        "width": 64,
        "height": 48,
        "noise": "cuda",
    }


@pytest.mark.parametrize("name", ["DPM fast", "DPM adaptive"])
@pytest.mark.parametrize("schedule", ["Automatic", "Karras"])
def test_a_schedule_that_had_no_part_is_no_reason_to_take_another_sampler(name, schedule):
    text = f"a\nSteps: 20, Sampler: {name}, Schedule type: {schedule}, Seed: 1, Eta: 0.5, Version: v1.10.1"
    asked = foreign_request(foreign_recipe(PictureTexts({"parameters": text}, 64, 48, "PNG")), nothing)
    assert (asked.request.sampler, asked.request.schedule) == (name, "")
    assert asked.left_out == ("Eta 0.5",)  # at which it was not run as it is here


def test_what_is_no_value_of_a_request_is_left_out():
    text = "a\nSteps: many, Sampler: Euler, Seed: 99999999999999, CFG scale: 500, Size: 513x512, Clip skip: 2"
    recipe = foreign_recipe(PictureTexts({"parameters": text}, 8, 8, "PNG"))
    asked = foreign_request(recipe, nothing)
    assert asked.request.steps == 25 and asked.request.seed == 0 and asked.request.width == 0
    assert asked.request.clip_skip == 2
    said = "\n".join(asked.left_out)
    for what in ("Steps 'many'", "seed 99999999999999 (", "guidance_scale 500.0 (", "width 513 height 512 ("):
        assert what in said


def test_with_emphasis_none_the_text_stays_as_it_is():
    text = "a \\(b\\) {c|d}\nSteps: 20, Seed: 1, Emphasis: None"
    recipe = foreign_recipe(PictureTexts({"parameters": text}, 8, 8, "PNG"))
    assert recipe.prompt == "a \\(b\\) {c|d}" and recipe.settings["emphasis"] == "none"


def hide(text: bytes, signature: bytes, mode: str) -> Image.Image:
    """A picture with the text in its lowest bits, written bit by bit as Forge does it."""
    bits = [int(bit) for byte in signature for bit in f"{byte:08b}"]
    bits += [int(bit) for bit in f"{8 * len(text):032b}"] + [int(bit) for byte in text for bit in f"{byte:08b}"]
    picture = Image.new(mode, (96, 80), (200, 100, 50, 255)[: len(mode)])
    places = [(x, y, c) for x in range(96) for y in range(80) for c in ((3,) if mode == "RGBA" else (0, 1, 2))]
    pixels = np.array(picture)
    for (x, y, channel), bit in zip(places, bits, strict=False):
        pixels[y, x, channel] = pixels[y, x, channel] & 254 | bit
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("signature", "mode"),
    [
        (b"stealth_pnginfo", "RGBA"),
        (b"stealth_pngcomp", "RGBA"),
        (b"stealth_rgbinfo", "RGB"),
        (b"stealth_rgbcomp", "RGB"),
    ],
)
def test_text_hidden_in_pixels(tmp_path, signature, mode):
    text = A1111.encode()
    hide(gzip.compress(text) if signature.endswith(b"comp") else text, signature, mode).save(tmp_path / "a.png")
    assert read_foreign(tmp_path / "a.png").settings["seed"] == 123


@pytest.mark.parametrize(
    "text", [b"", b"no gzip", gzip.compress(A1111.encode(), mtime=0)[:40]], ids=["empty", "none", "cut off"]
)
def test_damaged_hidden_text_is_none(tmp_path, text):
    hide(text, b"stealth_pngcomp", "RGBA").save(tmp_path / "a.png")
    with pytest.raises(FormatError, match=r"a\.png: "):
        read_foreign(tmp_path / "a.png")


# --- ComfyUI -------------------------------------------------------------------------------------------


def test_comfy(tmp_path):
    recipe = read_foreign(png(tmp_path, prompt=json.dumps(COMFY), workflow="{}"))
    assert recipe.program == "ComfyUI" and recipe.base == "v1-5-pruned"
    assert recipe.settings == {
        "seed": 156680208700286, "steps": 20, "guidance_scale": 8.0, "emphasis": "comfy", "sampler": "DPM++ 2M",
        "schedule": "Karras", "width": 512, "height": 640, "clip_skip": 2,
    }  # fmt: skip
    assert recipe.adapters == (
        ForeignAdapter("zorb", 0.8, 0.6),
        ForeignAdapter("style", 0.5, 0.0),
        ForeignAdapter("oldfilm", embedding=True),
    )
    assert recipe.left_out == ()
    # A weight inside another is what it says, square brackets are text, and an embedding acts by its word.
    assert parse_attention(recipe.prompt) == [("a ", 1.0), ("red", 1.3), (" ball", 1.1), (", [not] oldfilm", 1.0)]
    assert recipe.negative_prompt == "text, watermark"


def changed(**nodes) -> str:
    return json.dumps({**COMFY, **{key.removeprefix("n"): node for key, node in nodes.items()}})


def test_a_second_pass_is_left_out():
    again = {
        "class_type": "KSampler",
        "inputs": {**COMFY["3"]["inputs"], "seed": 9, "denoise": 0.5, "latent_image": ["31", 0]},
    }
    scaled = {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 1024}}
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0]}}
    recipe = foreign_comfy(changed(n30=again, n31=scaled, n8=decode))
    assert recipe.settings["seed"] == 156680208700286 and recipe.settings["width"] == 512
    assert recipe.left_out == ("node LatentUpscale", "a second pass over the finished picture")


def test_a_sampler_put_together_from_parts():
    recipe = foreign_comfy(
        changed(
            n3={
                "class_type": "SamplerCustomAdvanced",
                "inputs": {
                    "noise": ["41", 0],
                    "guider": ["42", 0],
                    "sampler": ["43", 0],
                    "sigmas": ["44", 0],
                    "latent_image": ["5", 0],
                },
            },
            n41={"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
            n42={
                "class_type": "CFGGuider",
                "inputs": {"cfg": 3.0, "model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0]},
            },
            n43={"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}},
            n44={
                "class_type": "BasicScheduler",
                "inputs": {"scheduler": "sgm_uniform", "steps": 12, "denoise": 1.0, "model": ["11", 0]},
            },
        )
    )
    said = recipe.settings
    assert (said["seed"], said["steps"], said["guidance_scale"]) == (5, 12, 3.0)
    assert (said["sampler"], said["schedule"]) == ("Euler a", "SGM Uniform")
    assert [adapter.name for adapter in recipe.adapters] == ["zorb", "style", "oldfilm"]


def test_what_comfy_does_beyond_a_request_is_named():
    control = {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "image": ["50", 0]}}
    sampler = {
        "class_type": "KSampler",
        "inputs": {**COMFY["3"]["inputs"], "positive": ["51", 0], "sampler_name": "res_multistep"},
    }
    latent = {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 4}}
    recipe = foreign_comfy(changed(n51=control, n3=sampler, n5=latent))
    assert parse_attention(recipe.prompt)[0] == ("a ", 1.0)
    assert set(recipe.left_out) == {
        "node ControlNetApply", "sampler 'res_multistep'", "its place in a batch, whose noise is drawn at once",
    }  # fmt: skip


def test_a_picture_made_of_a_picture():
    encoded = {"class_type": "VAEEncode", "inputs": {"pixels": ["61", 0]}}
    loaded = {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}
    recipe = foreign_comfy(changed(n5=encoded, n61=loaded))
    assert "the picture that it began from" in recipe.left_out and "width" not in recipe.settings


def test_graphs_that_go_in_circles_end():
    circle = {
        "1": {"class_type": "KSampler", "inputs": {"latent_image": ["1", 0], "model": ["2", 0], "positive": ["3", 0], "seed": ["4", 0]}},
        "2": {"class_type": "LoraLoader", "inputs": {"model": ["2", 0], "lora_name": ["2", 0], "strength_model": ["4", 0]}},
        "3": {"class_type": "Odd", "inputs": {"conditioning": ["3", 0]}},
        "4": {"class_type": "Primitive", "inputs": {"value": ["4", 0]}},
    }  # fmt: skip
    recipe = foreign_comfy(json.dumps(circle))
    assert recipe.prompt == "" and "seed" not in recipe.settings and len(recipe.adapters) == 1


def test_damaged_graphs_are_read_or_refused():
    draw, refused = random.Random(0), 0
    for _ in range(400):
        graph = json.loads(json.dumps(COMFY))
        for _ in range(draw.choice((1, 3))):
            node = graph[draw.choice(list(graph))]
            odd = draw.choice(
                [None, [], {}, -1, 1e308, "x", [["3", 0]], ["3"], ["99", 0], [None, 0], True, ["3", 0], 10**400]
            )
            if draw.random() < 0.2:
                node[draw.choice(["class_type", "inputs"])] = odd
            elif isinstance(node.get("inputs"), dict):
                node["inputs"][draw.choice([*node["inputs"], "text", "model"])] = odd
        try:
            asked = foreign_request(foreign_comfy(json.dumps(graph)), nothing)
            assert isinstance(asked.request, GenerationRequest)
        except FormatError:
            refused += 1
    assert refused < 400


# --- InvokeAI and NovelAI ------------------------------------------------------------------------------


def test_invoke(tmp_path):
    recipe = read_foreign(png(tmp_path, invokeai_metadata=json.dumps(INVOKE), invokeai_graph="{}"))
    assert recipe == ForeignRecipe(
        program="InvokeAI",
        prompt="a red ball",
        negative_prompt="blurry",
        settings={
            "seed": 42, "steps": 30, "width": 768, "height": 512, "guidance_scale": 7.5, "sampler": "Euler a", "clip_skip": 2,
        },
        base="dreamshaper",
        adapters=(ForeignAdapter("zorb", 0.75),),
        left_out=("controlnets",),
    )  # fmt: skip


def test_weights_of_invoke_are_said_to_be_left_out():
    for prompt in ("a red+ ball", "a (red ball)1.2", '("a", "b").blend(1, 1)', "a ball--"):
        recipe = foreign_recipe(
            PictureTexts({"invokeai_metadata": json.dumps({**INVOKE, "positive_prompt": prompt})}, 8, 8, "PNG")
        )
        assert "weights of its prompts" in recipe.left_out
        assert parse_attention(recipe.prompt) == [(prompt, 1.0)]


def test_novel(tmp_path):
    recipe = read_foreign(png(tmp_path, Software="NovelAI", Comment=json.dumps(NOVEL)))
    assert recipe.program == "NovelAI"
    assert parse_attention(recipe.prompt) == [("red", 1.1025), (" ball, ", 1.0), ("blue", 0.9524)]
    assert recipe.negative_prompt == "lowres"
    assert recipe.settings == {
        "seed": 77, "steps": 28, "width": 832, "height": 1216, "guidance_scale": 5.0, "sampler": "Euler a", "schedule": "Karras",
    }  # fmt: skip


def test_novel_hides_all_of_its_texts(tmp_path):
    text = json.dumps({"Software": "NovelAI", "Comment": json.dumps(NOVEL)}).encode()
    hide(gzip.compress(text), b"stealth_pngcomp", "RGBA").save(tmp_path / "a.png")
    assert read_foreign(tmp_path / "a.png").settings["seed"] == 77


# --- nothing, and worse --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({}, "tells nothing of how it was made; known are sdlora"),
        ({"workflow": "{}"}, "holds a workflow of ComfyUI but not the prompt"),
        ({"prompt": "{}"}, "has no sampler that is known"),
        ({"prompt": "[1]"}, "holds no JSON object"),
        ({"prompt": "{"}, "cannot be read as JSON"),
        ({"prompt": "[" * 200_000}, "cannot be read as JSON"),
        ({"parameters": "just a text"}, "no line of settings"),
        ({"invokeai_metadata": '{"a": 1}'}, "neither prompt nor seed"),
        ({"Comment": '{"prompt": "a"}'}, "not NovelAI's"),
    ],
)
def test_what_tells_nothing_is_refused_in_one_sentence(tmp_path, texts, sentence):
    with pytest.raises(FormatError, match=sentence) as caught:
        read_foreign(png(tmp_path, **texts))
    assert str(caught.value).startswith(str(tmp_path / "a.png: ")) and "\n" not in str(caught.value)


def test_one_text_that_is_none_does_not_hide_another(tmp_path):
    assert read_foreign(png(tmp_path, parameters="made with love", prompt=json.dumps(COMFY))).program == "ComfyUI"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*INVOKE, *NOVEL, "inputs", "class_type"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["invokeai_metadata", "prompt", "Comment", "parameters"]), JSON)
def test_any_json_is_read_or_refused(key, value):
    try:
        recipe = foreign_recipe(PictureTexts({key: json.dumps(value)}, 8, 8, "PNG"))
    except FormatError:
        return
    assert isinstance(foreign_request(recipe, nothing).request, GenerationRequest)


# --- prompts as text -----------------------------------------------------------------------------------

ODD = st.text(alphabet=st.sampled_from("ab {}|\\()[]:<>,.12 "), max_size=40)


@settings(deadline=None, max_examples=500)
@given(ODD, st.integers(0, 3))
def test_a_prompt_without_choices_says_the_same_and_chooses_nothing(prompt, seed):
    made = expand_wildcards(prompt, seed)
    final = without_choices(made)
    assert expand_wildcards(final, seed + 1) == final
    assert parse_tags(final).tags == ()
    if not parse_tags(made).tags and not parse_tags(made).others:
        assert plan_prompt(final, "", 10) == plan_prompt(made, "", 10)


@settings(deadline=None, max_examples=300)
@given(ODD | st.sampled_from(["a BREAK b", "a AND b :2", "END BAND BREAKS", "<lora:a:1>"]))
def test_a_literal_prompt_is_its_text(text):
    assert parse_attention(literal(text)) == [(text, 1.0)]
    assert expand_wildcards(literal(text), 0) == literal(text)
    (part,) = plan_prompt(literal(text), "", 10).positive
    assert part.weight == 1.0 and [spelling for _, spelling in part.spellings] == [((text, 1.0),)]
