"""Adapters merged into a copy of the base: its weights against sums by hand, its pictures against the adapter's."""

import numpy as np
import pytest
import torch
from adapter_kinds import KINDS, LINEAR, random_layer
from every_family import one_family

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.merge import MergePart, MergeSettings
from sdlora.adapters.merge_base import merge_into_base
from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, FormatError, ModelError
from sdlora.families.registry import load_base
from sdlora.families.stored_base import open_base
from sdlora.generation.engine import Engine
from sdlora.generation.request import make_request
from sdlora.storage import sha256_of_file

SHAPES = ("sd1", "sd2", "sdxl")
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
PROJECTION = "unet.mid_block.attentions.0.proj_in"


@pytest.fixture
def layouts(tiny_folder, checkpoints, tmp_path):
    """`layouts(family)`: (base, where to write, how the result is opened) as a folder and as one file."""

    def make(family):
        folder, file = tiny_folder(family), checkpoints(family)
        return [
            (BaseSection(path=str(folder)), tmp_path / "merged"),
            (BaseSection(path=str(file), config=str(folder)), tmp_path / "merged.safetensors"),
        ]

    return make


def merged_weights(section, target, parts, settings=None, **options):
    base = open_base(section)
    found = merge_into_base(parts, base, target, settings or MergeSettings(), **options)
    return base, open_base(section.model_copy(update={"path": str(target)})), found


def test_each_weight_is_the_bases_plus_the_weighted_updates(layouts, tiny_base, make_adapter, shape):
    first, second = (make_adapter(tiny_base(), seed=seed) for seed in (1, 2))
    parts = [MergePart("a", first, 0.7, {"text_encoder": 0.0}), MergePart("b", second, -0.4)]
    for section, target in layouts(shape):
        before = sha256_of_file(open_base(section).places["unet.conv_in.weight"].file)
        base, merged, found = merged_weights(section, target, parts)
        assert found.layers == len(first.layers)
        for path in base.layers:
            expected = base.read(f"{path}.weight")
            if path in first.layers:
                strength = 0.0 if path.startswith("text_encoder.") else 0.7
                updates = [layer.layers[path].update_of(expected) for layer in (first, second)]
                expected = expected + strength * updates[0] - 0.4 * updates[1]
            torch.testing.assert_close(merged.read(f"{path}.weight"), expected, atol=1e-6, rtol=1e-6)
        assert sha256_of_file(base.places["unet.conv_in.weight"].file) == before


def test_every_kind_goes_in_dora_too(layouts):
    """Each into a layer of every sort: 3 x 3 and 1 x 1 convolutions, linear layers of the UNet and of the text encoder."""
    for section, target in layouts("sd1"):
        base = open_base(section)
        sorts = {
            kernel: [
                path for path in base.layers if path.startswith("unet.") and base.shapes[f"{path}.weight"][2:] == kernel
            ]
            for kernel in ((3, 3), (1, 1), ())
        }
        text = [path for path in base.layers if path.startswith("text_encoder.")]
        kinds_of = [(KINDS, sorts[3, 3]), *((LINEAR, paths) for paths in (sorts[1, 1], sorts[()], text))]
        places = [pair for kinds, paths in kinds_of for pair in zip(kinds, paths, strict=False)]
        assert len(places) == len(KINDS) + 3 * len(LINEAR)
        layers = {path: random_layer(kind, base.shapes[f"{path}.weight"]) for kind, path in places}
        _, merged, found = merged_weights(section, target, [MergePart("a", AdapterFile(layers, "sd1"), 0.5)])
        for path, layer in layers.items():
            weight = base.read(f"{path}.weight")
            expected = weight + 0.5 * layer.update_of(weight)
            torch.testing.assert_close(merged.read(f"{path}.weight"), expected, atol=1e-6, rtol=1e-5)
        assert found.worst_error < 1e-6


@one_family
def test_pictures_of_the_merged_base_are_those_of_the_adapter(layouts, tiny_base, make_adapter, tmp_path):
    adapter = make_adapter(tiny_base("sd1"))
    write_adapter(adapter, tmp_path / "a.safetensors")
    section, target = layouts("sd1")[0]
    merged_weights(section, target, [MergePart("a", adapter, 0.8)])
    use = {"path": str(tmp_path / "a.safetensors"), "weight": 0.8}
    bases = [section, section.model_copy(update={"path": str(target)})]
    pictures = []
    for place, adapters in zip(bases, ([use], []), strict=True):
        engine = Engine(load_base(place.model_copy(update={"precision": "fp32"}), "cpu"))
        ((picture, _),) = engine.generate(make_request(prompt="a ball", seed=3, steps=4, adapters=adapters))
        pictures.append(np.asarray(picture, dtype=int))
    ((bare, _),) = engine.generate(make_request(prompt="a ball", seed=4, steps=4))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert abs(pictures[0] - np.asarray(bare, dtype=int)).max() > 8


@one_family
def test_what_rounding_costs_is_told(layouts, tiny_base, make_adapter):
    adapter = make_adapter(tiny_base("sd1"))
    section, target = layouts("sd1")[1]
    base, merged, found = merged_weights(section, target, [MergePart("a", adapter, 0.01)], precision="fp16")
    error = total = 0.0
    for path, layer in adapter.layers.items():
        weight = base.read(f"{path}.weight").double()
        update = 0.01 * layer.delta_weight().double().reshape(weight.shape)
        error += float((merged.read(f"{path}.weight").double() - weight - update).square().sum())
        total += float(update.square().sum())
    assert found.error == pytest.approx((error / total) ** 0.5, rel=1e-3)
    assert found.error > 1e-3 and found.worst in adapter.layers and found.worst_error >= found.error


@one_family
def test_ties_and_dare_combine_the_updates(layouts, tiny_base, make_adapter):
    adapters = [make_adapter(tiny_base("sd1"), seed=seed) for seed in (1, 2)]
    parts = [MergePart(name, adapter) for name, adapter in zip("ab", adapters, strict=True)]
    (section, target), _ = layouts("sd1")
    base, merged, _ = merged_weights(section, target, parts, MergeSettings("ties", density=0.1))
    changed = merged.read(f"{TEXT}.weight") - base.read(f"{TEXT}.weight")
    assert 0.08 < float((changed != 0).float().mean()) < 0.2  # a tenth of each, seldom the same one


@one_family
def test_what_does_not_fit_is_refused_and_nothing_written(layouts, tiny_base, make_adapter, tmp_path):
    adapter = make_adapter(tiny_base("sdxl"))
    wrong = AdapterFile({PROJECTION: random_layer("lora", (8, 8))}, "sd1")
    absent = AdapterFile({"unet.mid_block.attentions.7.proj_in": random_layer("lora", (8, 8))}, "sd1")
    for section, target in layouts("sd1"):
        base = open_base(section)
        for found, expected in (
            (adapter, "is Stable Diffusion 1.x"),
            (wrong, "is \\("),
            (absent, "does not exist there"),
        ):
            with pytest.raises(ModelError, match=expected):
                merge_into_base([MergePart("a", found)], base, target, MergeSettings())
        fitting = make_adapter(tiny_base("sd1"))
        with pytest.raises(FormatError, match="nothing is left to merge"):
            merge_into_base([MergePart("a", fitting, 0.0)], base, target, MergeSettings())
        with pytest.raises(ConfigError, match="has no layer that begins with"):
            merge_into_base([MergePart("a", fitting, 1.0, {"unet.nowhere": 1.0})], base, target, MergeSettings())
        assert not target.exists()
