"""Every format that is written, on every family: what is read back does the same, and equal adapters give equal bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_kinds import KINDS, LINEAR, random_layer

from sdlora.adapters.convert import convert_adapter, kept_by_formats
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inject import add_adapter, set_adapter_weights
from sdlora.adapters.verify import difference, verify_written
from sdlora.adapters.write import FORMATS, write_adapter
from sdlora.errors import ConfigError, FormatError, OutputError

CONV = "unet.down_blocks.0.resnets.0.conv1"
LINEAR_PATH = "unet.mid_block.attentions.0.proj_in"
HELD = {
    "kohya": set(KINDS),
    "diffusers": {"lora", "dora"},
    "peft": {"lora", "dora", "loha"},
}


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("format", FORMATS)
def test_write_read_write_gives_the_same_bytes_and_updates(tiny_base, make_adapter, tmp_path, format):
    base = tiny_base()
    metadata = dict(base.family.metadata[base.prediction]) | {"ss_output_name": "zorb", "note": "ä"}
    adapter = replace(make_adapter(base, alpha=0.7, rank=3), metadata=metadata)
    other = make_adapter(base, alpha=5.0, rank=2).layers
    adapter = replace(adapter, layers={**adapter.layers, **{path: other[path] for path in list(other)[::4]}})
    first, second = tmp_path / "first", tmp_path / "second"
    write_adapter(adapter, first, format)
    read = read_adapter(first)
    write_adapter(read, second, format)
    assert content(first) == content(second)
    assert read.family == base.family.name
    assert {"ss_output_name", "note"} <= read.metadata.keys()
    found = difference(adapter, read)
    assert found.same and found.layers == len(adapter.layers) and found.largest < 1e-6
    if format != "diffusers":  # which has alpha multiplied in
        assert all(read.layers[path].alpha == pytest.approx(layer.alpha) for path, layer in adapter.layers.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_each_kind_comes_back_or_is_refused(tmp_path, format, kind):
    layers = {CONV: random_layer(kind, (8, 6, 3, 3))}
    if kind in LINEAR:
        layers[LINEAR_PATH] = random_layer(kind, (8, 6), seed=1)
    adapter = AdapterFile(layers, "sd1", {"ss_base_model_version": "sd_v1"})
    (kept,) = [entry for entry in kept_by_formats(adapter, tmp_path) if entry.format == format]
    if kind in HELD[format]:
        assert kept.difference.same and kept.difference.layers == len(layers)
    else:
        assert kept.difference is None and "write the file in kohya's format" in kept.reason


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_the_words_travel_beside_it(tiny_base, make_adapter, tmp_path, format):
    base = tiny_base()
    words = {"zorb": {name: torch.randn(2, 32) for name in base.text_encoders}}
    adapter = replace(make_adapter(base), tokens=words)
    path = tmp_path / "a" / "x.safetensors" if format == "diffusers" else tmp_path / "a"
    write_adapter(adapter, path, format)
    read = read_adapter(path)
    assert read.token_digests() == adapter.token_digests()
    assert (tmp_path / "a" / "embeddings" / "zorb.safetensors").is_file()
    with pytest.raises(ConfigError, match="new words are bundled in kohya's format alone"):
        write_adapter(adapter, path, format, bundle=True)


@pytest.mark.parametrize("format", FORMATS)
def test_half_precision_stays_within_rounding(tmp_path, format):
    layers = {LINEAR_PATH: random_layer("lora", (64, 48))}
    source = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(layers, "sd1"), source)
    for precision, limit in (("fp16", 2e-3), ("bf16", 1.6e-2)):
        found = convert_adapter(source, tmp_path / precision / "x", format, precision=precision)
        assert 0 < found.largest < limit
        assert {tensor.dtype for tensor in read_adapter(tmp_path / precision / "x").layers[LINEAR_PATH].tensors()} == {
            {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        }


def test_numbers_too_large_for_a_precision_are_refused(tmp_path):
    layer = random_layer("lora", (8, 6))
    layer = replace(layer, up=layer.up * 1e6)
    write_adapter(AdapterFile({LINEAR_PATH: layer}, "sd1"), tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="too large for fp16; take bf16"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", precision="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_what_is_there_is_replaced_only_when_asked(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(AdapterFile({LINEAR_PATH: random_layer("lora", (8, 6))}, "sd1"), source)
    target.write_text("mine")
    with pytest.raises(OutputError, match="is there already; name another, or say --overwrite"):
        convert_adapter(source, target, "kohya")
    assert target.read_text() == "mine"
    convert_adapter(source, target, "kohya", overwrite=True)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("level", "kept"), [("full", {"ss_v2", "ss_seed", "note"}), ("minimal", {"ss_v2"}), ("none", set())]
)
def test_metadata_levels(tmp_path, level, kept):
    metadata = {"ss_v2": "True", "ss_seed": "3", "note": "x"}
    write_adapter(AdapterFile({LINEAR_PATH: random_layer("lora", (8, 6))}, "sd2", metadata), tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", metadata=level)
    own = {"sshs_model_hash", "sshs_legacy_hash"}
    assert read_adapter(tmp_path / "b.safetensors").metadata.keys() == kept | own


def test_a_file_that_does_something_else_is_found_out(tmp_path):
    adapter = AdapterFile({LINEAR_PATH: random_layer("lora", (8, 6)), CONV: random_layer("lora", (8, 6, 3, 3))}, "sd1")
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path)
    verify_written(adapter, path)
    for changed in (
        {**adapter.layers, CONV: replace(adapter.layers[CONV], alpha=2.1)},
        {LINEAR_PATH: adapter.layers[LINEAR_PATH]},
        {**adapter.layers, CONV: random_layer("dora", (8, 6, 3, 3))},
        {**adapter.layers, LINEAR_PATH: random_layer("lora", (8, 5))},
    ):
        with pytest.raises(FormatError, match="does not read back as what was trained"):
            verify_written(replace(adapter, layers=changed), path)
    with pytest.raises(FormatError, match="the word 'x' has other vectors"):
        verify_written(replace(adapter, tokens={"x": {"text_encoder": torch.ones(1, 4)}}), path)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_acts_alike_on_a_base(tiny_base, make_adapter, tmp_path, format):
    base = tiny_base()
    adapter = make_adapter(base, alpha=0.7)
    write_adapter(adapter, tmp_path / "x", format)
    add_adapter(base, "ours", adapter)
    add_adapter(base, "read", read_adapter(tmp_path / "x"))
    hidden = torch.randn(1, 77, base.unet.config.cross_attention_dim)
    layer = base.unet.mid_block.attentions[0]
    outputs = []
    for name in ("ours", "read"):
        set_adapter_weights(base, {name: 1.0})
        inside = torch.randn(1, layer.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
        outputs.append(layer(inside, encoder_hidden_states=hidden).sample)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_text_with_half_a_character_is_refused_with_the_files_name(tmp_path):
    text = {"ss_output_name": "\ud800"}
    whole = AdapterFile({LINEAR_PATH: random_layer("lora", (8, 6))}, "sd1", text)
    word = AdapterFile({}, "sd1", text, {"zorb": {"text_encoder": torch.ones(1, 768)}})
    for adapter, format in ((whole, "kohya"), (whole, "diffusers"), (whole, "peft"), (word, "kohya")):
        with pytest.raises(FormatError, match=r"a: not written: its header holds half a character, which cannot"):
            write_adapter(adapter, tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []
