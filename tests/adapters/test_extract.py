"""Extraction: what was merged into a base comes out of it again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from every_family import one_family
from safetensors.torch import load_file, save_file

from sdlora.adapters.algebra import Truncation
from sdlora.adapters.extract import ExtractSettings, extract, forget
from sdlora.adapters.merge import MergePart, MergeSettings
from sdlora.adapters.merge_base import merge_into_base
from sdlora.adapters.verify import difference
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, FormatError, ModelError
from sdlora.families.base_copy import write_changed
from sdlora.families.stored_base import open_base

SETTINGS = ExtractSettings(Truncation(rank=2), Truncation(rank=2), precision=torch.float32)


@pytest.fixture(scope="module")
def tuned_folders(tmp_path_factory):
    """{family: (adapter, the base folder with it merged into it)}, of those that were asked for."""
    return {}


@pytest.fixture
def pair(tiny_folder, checkpoints, tiny_base, make_adapter, tuned_folders, tmp_path_factory, tmp_path):
    """`pair(family)`: (adapter, original base as one file, base folder with the adapter merged into it)."""

    def make(family="sd1"):
        folder = tiny_folder(family)
        if family not in tuned_folders:
            adapter, target = make_adapter(tiny_base(family), rank=2), tmp_path_factory.mktemp("tuned") / family
            merge_into_base(
                [MergePart("a", adapter)], open_base(BaseSection(path=str(folder))), target, MergeSettings()
            )
            tuned_folders[family] = adapter, target
        adapter, target = tuned_folders[family]
        shutil.copytree(target, tmp_path / "tuned")
        original = open_base(BaseSection(path=str(checkpoints(family)), config=str(folder)))
        return adapter, original, open_base(BaseSection(path=str(tmp_path / "tuned")))

    return make


def test_the_adapter_comes_out_again_whatever_the_layouts(pair, tmp_path, shape):
    adapter, original, tuned = pair(shape)
    found = extract(original, tuned, SETTINGS, tmp_path / "work")
    assert found.adapter.layers.keys() == adapter.layers.keys()
    assert found.adapter.family == shape
    assert difference(adapter, found.adapter).largest < 1e-4
    assert {layer.rank for layer in found.adapter.layers.values()} == {2}
    assert found.energy[""] == pytest.approx(1, abs=1e-6)
    assert found.unchanged == len(original.layers) - len(adapter.layers)
    assert found.left_out == () and found.resumed == 0
    declared = {"sd1": "epsilon", "sd2": "v", "sdxl": "epsilon"}[shape]
    expected = original.family.metadata[declared]
    assert found.adapter.metadata.items() >= {**expected, "ss_network_dim": "2"}.items()


@one_family
def test_a_rank_or_a_share_of_energy_cuts_it_off(pair, tmp_path):
    adapter, original, tuned = pair()
    rank = extract(original, tuned, replace(SETTINGS, linear=Truncation(rank=1)), tmp_path / "a")
    assert 0.5 < rank.energy[""] < 0.999
    for path, layer in rank.adapter.layers.items():
        wide = len(original.shapes[f"{path}.weight"]) == 4 and original.shapes[f"{path}.weight"][2] == 3
        assert layer.rank == (2 if wide else 1)
        values = torch.linalg.svdvals(adapter.layers[path].delta_weight().flatten(1).double())
        kept = float(values[: layer.rank].square().sum() / values.square().sum())
        error = float((layer.delta_weight() - adapter.layers[path].delta_weight()).square().sum())
        assert error / float(values.square().sum()) == pytest.approx(1 - kept, abs=1e-5)
    share = Truncation(energy=0.6)
    energy = extract(original, tuned, replace(SETTINGS, linear=share, convolutions=share), tmp_path / "b")
    assert energy.energy[""] >= 0.6
    assert {layer.rank for layer in energy.adapter.layers.values()} == {1, 2}


@one_family
def test_an_interrupted_extraction_goes_on_where_it_stopped(pair, tmp_path):
    _, original, tuned = pair()
    whole = extract(original, tuned, SETTINGS, tmp_path / "whole")

    def stop(done, count):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(original, tuned, SETTINGS, tmp_path / "work", stop)
    found = extract(original, tuned, SETTINGS, tmp_path / "work")
    assert found.resumed == 20
    assert found.energy == whole.energy and found.unchanged == whole.unchanged
    for path, layer in whole.adapter.layers.items():
        assert all(
            torch.equal(*both) for both in zip(layer.tensors(), found.adapter.layers[path].tensors(), strict=True)
        )
    other = extract(original, tuned, replace(SETTINGS, linear=Truncation(rank=1)), tmp_path / "work")
    assert other.resumed == 0 and other.work != found.work
    for work in (whole.work, found.work, other.work):
        forget(work)
    assert not list(tmp_path.glob(".*"))


@one_family
def test_two_extractions_to_one_place_do_not_mix(pair, tmp_path):
    _, original, tuned = pair()
    other = replace(SETTINGS, linear=Truncation(rank=1), convolutions=Truncation(rank=1))
    ranks = []

    def begin_another(done, count):
        if done == 20:
            second = extract(original, tuned, other, tmp_path / "out")
            ranks.append({layer.rank for layer in second.adapter.layers.values()})

    first = extract(original, tuned, SETTINGS, tmp_path / "out", begin_another)
    assert ranks == [{1}] and {layer.rank for layer in first.adapter.layers.values()} == {2}


@one_family
def test_a_damaged_finished_layer_is_done_again(pair, tmp_path):
    _, original, tuned = pair()
    found = extract(original, tuned, SETTINGS, tmp_path / "out")
    for file in list(found.work.iterdir())[:5]:
        file.write_bytes(b"x")
    again = extract(original, tuned, SETTINGS, tmp_path / "out")
    assert difference(found.adapter, again.adapter).same
    assert again.resumed == len(list(found.work.iterdir())) - 5


@one_family
def test_a_tuned_base_that_changed_since_is_extracted_anew(pair, tmp_path):
    _, original, tuned = pair()
    extract(original, tuned, SETTINGS, tmp_path / "work")
    file = tuned.places["unet.conv_in.weight"].file
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] + 1}, file)
    found = extract(original, open_base(BaseSection(path=str(tuned.facts.path))), SETTINGS, tmp_path / "work")
    assert found.resumed == 0 and "unet.conv_in" in found.adapter.layers


@one_family
def test_rounding_to_another_type_is_no_change(pair, tmp_path):
    adapter, original, tuned = pair()
    write_changed(tuned, tmp_path / "half", [], lambda *given: given[1], precision="fp16")
    half = open_base(BaseSection(path=str(tmp_path / "half")))
    found = extract(original, half, SETTINGS, tmp_path / "work")
    assert found.adapter.layers.keys() == adapter.layers.keys()
    assert found.left_out == ()
    with pytest.raises(FormatError, match="there is nothing to extract"):
        extract(tuned, half, SETTINGS, tmp_path / "again")
    assert not list(tmp_path.glob(".again*"))


@one_family
def test_roundings_to_fp16_and_bf16_of_one_weight_are_no_difference(pair, tmp_path):
    adapter, original, tuned = pair()
    write_changed(original, tmp_path / "half.safetensors", [], lambda *given: given[1], precision="fp16")
    write_changed(tuned, tmp_path / "brain", [], lambda *given: given[1], precision="bf16")
    half = open_base(BaseSection(path=str(tmp_path / "half.safetensors"), config=str(tuned.facts.path)))
    brain = open_base(BaseSection(path=str(tmp_path / "brain")))
    found = extract(half, brain, SETTINGS, tmp_path / "work")
    assert found.adapter.layers.keys() == adapter.layers.keys() and found.left_out == ()


@one_family
def test_the_adapter_is_labelled_as_what_it_was_tuned_to(pair, tmp_path):
    _, original, tuned = pair("sd1")
    scheduler = tuned.facts.path / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    found = extract(original, open_base(BaseSection(path=str(tuned.facts.path))), SETTINGS, tmp_path / "work")
    assert found.adapter.metadata.items() >= {
        "ss_base_model_version": "sd_v1_v", "modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True",
        "ss_sd_model_name": "sd1.safetensors", "modelspec.merged_from": "tuned minus sd1.safetensors",
    }.items()  # fmt: skip


@one_family
def test_only_some_parts_and_no_convolutions(pair, tmp_path):
    adapter, original, tuned = pair()
    found = extract(original, tuned, replace(SETTINGS, only=("unet.mid_block",)), tmp_path / "a")
    assert found.adapter.layers.keys() == {path for path in adapter.layers if path.startswith("unet.mid_block.")}
    found = extract(original, tuned, replace(SETTINGS, convolutions=None), tmp_path / "b")
    assert not any("conv1" in path for path in found.adapter.layers)
    assert found.left_out and all(name.endswith("conv1.weight") for name in found.left_out)
    with pytest.raises(ConfigError, match=r"--only unet\.nowhere: no layer's path begins so"):
        extract(original, tuned, replace(SETTINGS, only=("unet", "unet.nowhere")), tmp_path / "c")


@one_family
def test_norms_and_biases_that_differ_are_named(pair, tmp_path):
    _, original, tuned = pair()
    file = tuned.places["unet.conv_in.weight"].file
    tensors = load_file(file)
    tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"] + 0.5
    save_file(tensors, file)
    found = extract(original, tuned, SETTINGS, tmp_path / "work")
    assert found.left_out == ("unet.conv_norm_out.weight",)


@one_family
def test_bases_of_two_families_or_sizes_are_refused(pair, tiny_folder, tmp_path):
    _, original, _ = pair()
    with pytest.raises(ModelError, match=r"is Stable Diffusion 1\.x, .* is Stable Diffusion XL"):
        extract(original, open_base(BaseSection(path=str(tiny_folder("sdxl")))), SETTINGS, tmp_path / "work")
    with pytest.raises(ModelError, match="take two of one size"):
        extract(original, open_base(BaseSection(path="tiny")), SETTINGS, tmp_path / "work")


@one_family
def test_weights_that_are_not_numbers_are_refused(pair, tmp_path):
    _, original, tuned = pair()
    folder = tmp_path / "broken"
    shutil.copytree(tuned.facts.path, folder)
    broken = open_base(BaseSection(path=str(folder)))
    file = broken.places["unet.conv_in.weight"].file
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] * float("nan")}, file)
    with pytest.raises(ModelError, match=r"layer unet\.conv_in holds NaN"):
        extract(original, open_base(BaseSection(path=str(folder))), SETTINGS, tmp_path / "work")
