"""What a run saves at its end: one adapter in every format that was asked for, with as much text as was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kinds import random_layer
from every_family import one_family, two_families

from sdlora import AdapterFile, read_adapter, train
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.private_text import private_entries
from sdlora.adapters.verify import difference
from sdlora.errors import FormatError, OutputError, TrainingError
from sdlora.headers import read_header
from sdlora.training import saving
from sdlora.training.events import read_events

EVERY = ("peft", "diffusers", "kohya")
QUICK = {"training__steps": 2, "optimizer__warmup_steps": 0, "adapter__targets": ("attn2.*",), "validation__folder": ""}
UNET = "unet.mid_block.attentions.0.proj_in"
KINDS = [
    {"adapter__dora": True, "adapter__text_encoder": True},
    {"adapter__start": "pissa", "adapter__rank_stabilized": True, "adapter__targets": ["attention", "resnet"]},
    {"adapter__ranks": {"attn2.*": 2}, "adapter__alpha": 3},
]


@pytest.mark.parametrize(
    ("shape", "kind"), [*(("sd1", kind) for kind in KINDS), ("sd2", KINDS[1]), ("sdxl", KINDS[0])], ids=str
)
def test_the_formats_of_one_run_do_the_same(configure: Any, kind: dict[str, Any]) -> None:
    result = train(configure(output__formats=EVERY, output__save_every_steps=4, **kind))
    names = {"kohya": "adapter.safetensors", "peft": "adapter-peft", "diffusers": "adapter-diffusers.safetensors"}
    assert list(result.formats) == ["kohya", "peft", "diffusers"]
    assert result.formats == {format: result.folder / name for format, name in names.items()}
    assert result.adapter == result.formats["kohya"]
    assert read_events(result.folder / "events.jsonl")[-1]["formats"] == {
        format: str(path) for format, path in result.formats.items()
    }
    trained = read_adapter(result.adapter)
    for format, path in result.formats.items():
        assert inspect_adapter(path).format == format and inspect_adapter(path).problems == []
        found = difference(trained, read_adapter(path))
        assert found.same and found.layers == len(trained.layers) > 0
        assert read_adapter(path).metadata["ss_steps"] == "6"
    saved = {path.name for path in result.folder.iterdir()} - {"config.toml", "events.jsonl"}
    assert saved == {*names.values(), "adapter-000004.safetensors"}  # on the way kohya's alone


@one_family
def test_loha_goes_to_peft_too(configure: Any) -> None:
    result = train(configure(output__formats=("kohya", "peft"), adapter__kind="loha"))
    assert difference(read_adapter(result.adapter), read_adapter(result.formats["peft"])).same


@two_families
@pytest.mark.parametrize(
    ("formats", "adapter", "word"),
    [
        (("kohya", "peft"), "adapter.safetensors", "embeddings/zorb.safetensors"),
        (("diffusers",), "adapter-diffusers.safetensors", "embeddings/zorb.safetensors"),
        (("peft",), "adapter-peft", "adapter-peft/embeddings/zorb.safetensors"),
    ],
)
def test_new_words_go_with_each_format(configure: Any, formats: tuple[str, ...], adapter: str, word: str) -> None:
    result = train(configure(tokens__train="together", output__formats=formats, **QUICK))
    assert result.adapter == result.folder / adapter and result.embeddings == (result.folder / word,)
    assert result.embeddings[0].is_file()
    for path in result.formats.values():
        assert set(read_adapter(path).tokens) == {"zorb"}
    for file in result.folder.rglob("*.safetensors"):
        assert private_entries(read_header(file).metadata) == {}  # what we write tells nothing that it should not


@one_family
@pytest.mark.parametrize("level", ["minimal", "none"])
def test_no_more_text_is_saved_than_was_asked_for(configure: Any, level: str) -> None:
    config = configure(output__metadata=level, output__formats=EVERY, output__save_every_steps=4)
    result = train(config)
    files = list(result.folder.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        text = read_header(file).metadata
        assert ("ss_base_model_version" in text) == ("ss_network_dim" in text) == (level == "minimal")
        assert (
            not {"ss_steps", "ss_output_name", "ss_tag_frequency", "modelspec.title", "ss_sd_model_name"} & text.keys()
        )
        assert len(text["sshs_model_hash"]) == 64
    assert difference(read_adapter(result.adapter), read_adapter(result.formats["peft"])).same


@one_family
def test_what_may_not_be_replaced_is_known_before_the_run(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(output__formats=("kohya", "peft"))
    mine = Path(config.output.folder) / "adapter-peft" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(OutputError, match=r"adapter-peft: is there already and holds notes\.txt besides"):
        train(config)
    assert mine.read_text() == "mine" and not (Path(config.output.folder) / "config.toml").exists()
    mine.unlink()
    with pytest.raises(OutputError, match="is no folder of PEFT's; name another folder"):
        train(config)
    mine.parent.rmdir()
    first = train(config)
    again = train(configure(output__formats=("kohya", "peft"), output__overwrite=True, adapter__rank=2))
    assert again.formats == first.formats and inspect_adapter(again.formats["peft"]).rank == 2
    settings = json.loads((again.formats["peft"] / "unet" / "adapter_config.json").read_text())
    assert settings["r"] == 2


@one_family
def test_a_format_that_does_not_read_back_fails_the_run(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_kohya(adapter: Any, path: Path) -> None:
        if path.name != "adapter.safetensors":
            raise FormatError(f"{path}: was written but does not read back as what was trained")

    monkeypatch.setattr(saving, "verify_written", only_kohya)
    config = configure(output__formats=("diffusers", "kohya"))
    with pytest.raises(TrainingError, match=r"adapter-diffusers\.safetensors: was written but does not read back"):
        train(config)
    assert read_adapter(Path(config.output.folder) / "adapter.safetensors").layers  # written first


def test_only_an_adapter_that_diverged_is_said_to_have(configure: Any, tmp_path: Path) -> None:
    config = configure(output__formats=("diffusers", "kohya"))
    folder = tmp_path / "saved"
    loha = AdapterFile({UNET: random_layer("loha", (8, 6))}, "sd1")
    with pytest.raises(TrainingError, match=r"adapter-diffusers\.safetensors: not written: ") as caught:
        saving.save_finished(loha, config, folder)
    assert "diverged" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["adapter.safetensors"]  # which holds it
    before = (folder / "adapter.safetensors").read_bytes()
    bad = AdapterFile({UNET: LoraLayer(torch.full((2, 6), torch.nan), torch.ones(8, 2), 1.0)}, "sd1")
    sentence = rf"adapter\.safetensors: the adapter diverged and was not saved; layer {UNET} holds NaN or infinity$"
    for save in (
        lambda: saving.save_finished(bad, config, folder),
        lambda: saving.save_on_the_way(bad, folder / "x-adapter.safetensors", config),
    ):
        with pytest.raises(TrainingError, match=sentence):
            save()
    assert [path.read_bytes() for path in folder.iterdir()] == [before]
