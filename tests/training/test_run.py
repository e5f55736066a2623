"""Training end to end on a random tiny base."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import one_family, two_families

from sdlora import load_config, parse_config, read_adapter, train
from sdlora.assets import EXAMPLE_CONCEPT
from sdlora.data.cache_folder import clear_cache, data_cache
from sdlora.errors import ConfigError, DataError, OutputError, TrainingError
from sdlora.families.base import LoadedBase
from sdlora.families.words import norm_range
from sdlora.headers import read_header
from sdlora.storage import read_tensors, sha256_of_tensor_data
from sdlora.training import loop as loop_module
from sdlora.training import run as run_module
from sdlora.training.events import read_events
from sdlora.training.loop import TrainingLoop
from sdlora.training.state import run_identity


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path)[0]


class Killed(BaseException):
    """Stands for a process that is gone: nothing of ours may catch it."""


@one_family
def test_a_run_leaves_adapter_config_and_events(configure: Any) -> None:
    config = configure(validation__every_steps=3)
    result = train(config)
    assert result.adapter == Path(config.output.folder) / "adapter.safetensors"
    assert not result.interrupted and result.steps == 6
    assert parse_config(load_config(result.folder / "config.toml")) == config
    events = read_events(result.folder / "events.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "done"
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["event"] == "validation"] == [0, 3, 6]
    steps = [e for e in events if e["event"] == "step"]
    assert set(steps[0]) == {
        "event", "time", "step", "loss", "gradient_norm", "learning_rate", "examples_seen", "images_per_second",
        "eta_seconds",
    }  # fmt: skip
    # Three pictures in each of two buckets make four batches an epoch, of 2, 1, 2 and 1 examples.
    assert steps[3]["examples_seen"] == 6


def test_the_adapter_learns_its_pictures(configure: Any) -> None:
    result = train(configure(training__steps=36, optimizer__learning_rate=1e-2, validation__folder=""))
    events = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "step"]
    first, last = ([e["loss"] for e in part] for part in (events[:12], events[-12:]))
    assert sum(last) < sum(first)
    assert result.effect.noticeable and result.effect.delta_share > 0


def test_same_seed_same_adapter_other_seed_another(configure: Any, tmp_path: Path) -> None:
    values = {"training__steps": 2, "optimizer__warmup_steps": 0, "validation__folder": ""}
    hashes = [
        sha256_of_tensor_data(
            train(configure(**values, output__folder=str(tmp_path / name), training__seed=seed)).adapter
        )
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("shape", "optimizer"), [("sd1", "adamw8bit"), ("sd1", "adamw"), ("sd2", "adamw8bit"), ("sdxl", "adamw8bit")]
)
def test_a_killed_run_resumed_gives_the_uninterrupted_adapter_bit_for_bit(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    # Rank 160 makes matrices of over 4,096 weights, which 8-bit AdamW really keeps in 8 bits.
    values = {
        "optimizer__kind": optimizer,
        "adapter__rank": 160,
        "adapter__targets": ("attn*.to_q", "attn*.to_v"),
        "adapter__dropout": 0.1,
        "data__captions__dropout": 0.3,
        "training__accumulate_batches": 2,
        "training__checkpoint_every_steps": 2,
        "validation__every_steps": 3 if optimizer == "adamw" else 0,
    }
    whole = train(configure(**values, output__folder=str(tmp_path / "whole")))

    periodic = TrainingLoop._periodic

    def die_after_step_4(self: TrainingLoop, *arguments: Any) -> None:
        periodic(self, *arguments)
        if self.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_periodic", die_after_step_4)
        with pytest.raises(Killed):
            train(configure(**values))
    resumed = train(configure(**values, training__resume=True))
    events = read_events(resumed.folder / "events.jsonl")
    assert [e["resumed_at_step"] for e in events if e["event"] == "start"] == [0, 4]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 5, 6]
    assert resumed.steps == whole.steps
    assert sha256_of_tensor_data(resumed.adapter) == sha256_of_tensor_data(whole.adapter)
    assert resumed.loss_before == whole.loss_before and resumed.loss_after == whole.loss_after


@one_family
def test_resuming_with_other_settings_is_refused(configure: Any) -> None:
    train(configure(training__checkpoint_every_steps=2))
    with pytest.raises(ConfigError, match="other settings"):
        train(configure(training__checkpoint_every_steps=2, training__resume=True, training__batch_size=1))


@one_family
def test_resuming_without_a_checkpoint_is_refused(configure: Any) -> None:
    with pytest.raises(ConfigError, match="no readable checkpoint"):
        train(configure(training__resume=True))


@one_family
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(configure: Any) -> None:
    first = train(configure(training__checkpoint_every_steps=2))
    newest = sorted((first.folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    again = train(configure(training__checkpoint_every_steps=2, training__resume=True))
    assert sha256_of_tensor_data(again.adapter) == sha256_of_tensor_data(first.adapter)


@one_family
def test_ctrl_c_saves_the_adapter_and_a_checkpoint(configure: Any) -> None:
    config = configure(training__steps=100_000, optimizer__schedule="constant", validation__every_steps=0)
    log = Path(config.output.folder) / "events.jsonl"

    def press() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and '"step": 3' in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    result = train(config)
    assert result.interrupted and 3 <= result.steps < 100_000
    assert read_adapter(result.adapter).metadata["ss_steps"] == str(result.steps)
    assert (result.folder / "checkpoints" / f"state-{result.steps:06d}.pt").exists()
    assert read_events(log)[-1]["interrupted"] is True
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@one_family
def test_a_diverged_run_fails_and_keeps_the_good_file(configure: Any) -> None:
    good = train(configure())
    before = good.adapter.read_bytes()
    with pytest.raises(TrainingError, match=r"3 steps in a row.*lower optimizer.learning_rate"):
        train(configure(optimizer__learning_rate=1e15, training__steps=50, output__overwrite=True))
    assert good.adapter.read_bytes() == before
    assert read_events(good.folder / "events.jsonl")[-1]["event"] == "failed"


@one_family
def test_an_adapter_with_nan_is_never_written(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = train(configure())
    before = good.adapter.read_bytes()

    optimize = TrainingLoop._optimize

    def poison(self: TrainingLoop) -> tuple[float, float]:
        outcome = optimize(self)
        with torch.no_grad():
            self.optimization.parameters[0].fill_(math.nan)
        return outcome if self.step < 5 else (0.1, 0.1)

    monkeypatch.setattr(TrainingLoop, "_optimize", poison)
    monkeypatch.setattr(loop_module, "_BAD_STEPS_IN_A_ROW", 1000)
    with pytest.raises(TrainingError, match="was not saved"):
        train(configure(output__overwrite=True))
    assert good.adapter.read_bytes() == before


@one_family
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapter_weights_stay_float32_and_all_of_them_move(
    configure: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 adapter would keep most of its down weights at their start: the steps are below its precision."""
    kinds: set[torch.dtype] = set()
    moved: list[float] = []
    optimize = TrainingLoop._optimize

    def watch(self: TrainingLoop) -> tuple[float, float]:
        before = [p.detach().clone() for p in self.optimization.parameters]
        outcome = optimize(self)
        kinds.update(p.dtype for p in self.optimization.parameters)
        pairs = zip(self.optimization.parameters, before, strict=True)
        if self.step == 5:
            moved.extend(float((p.detach() != old).float().mean()) for p, old in pairs)
        return outcome

    monkeypatch.setattr(TrainingLoop, "_optimize", watch)
    train(configure(base__precision=precision, optimizer__learning_rate=1e-4, optimizer__schedule="constant"))
    assert kinds == {torch.float32}
    assert min(moved) > 0.9


@one_family
def test_clipping_really_clips(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    result = train(configure(optimizer__kind="adamw", optimizer__clip_norm=1e-5))
    norms = [e["gradient_norm"] for e in read_events(result.folder / "events.jsonl") if e["event"] == "step"]
    assert min(norms) > 5e-5, "the gradients must be larger than the bound for this to mean anything"
    assert seen[-6:] == pytest.approx([1e-5] * 6, rel=2e-2)  # before them come trial steps of parameters of their own


UNET_LAYERS = {"sd1": 16, "sd2": 16, "sdxl": 48}
TEXT_KEYS = {"sd1": ["lora_te"], "sd2": ["lora_te"], "sdxl": ["lora_te1", "lora_te2"]}
VERSIONS = {
    "sd1": ("sd_v1", "False", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
    "sdxl": ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
}


def test_text_encoders_are_trained_when_asked(configure: Any, shape: str) -> None:
    result = train(configure(adapter__text_encoder=True, adapter__targets=("cross-attention",)))
    adapter = read_adapter(result.adapter)
    encoders = {"text_encoder": 8} | ({"text_encoder_2": 8} if shape == "sdxl" else {})
    assert adapter.components() == {"unet": UNET_LAYERS[shape]} | encoders
    keys = read_header(result.adapter).tensors
    for prefix in TEXT_KEYS[shape]:
        assert f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in keys
    # SDXL takes the first encoder's states before its last layer, which therefore learns nothing.
    unused = "text_encoder.text_model.encoder.layers.1." if shape == "sdxl" else "none"
    changed = {path: float(layer.up.abs().max()) > 0 for path, layer in adapter.layers.items()}
    assert changed == {path: not path.startswith(unused) for path in changed}


def test_text_encoder_targets_choose_the_layers(configure: Any, shape: str) -> None:
    values = {"training__steps": 2, "adapter__targets": ("attn2.to_q",), "validation__folder": ""}
    result = train(configure(adapter__text_encoder=True, adapter__text_encoder_targets=("transformer",), **values))
    assert read_adapter(result.adapter).components()["text_encoder"] == 12


def test_metadata_tells_the_run_but_no_captions_or_paths(configure: Any, shape: str) -> None:
    result = train(configure())
    adapter = read_adapter(result.adapter)
    metadata = adapter.metadata
    assert adapter.family == shape
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_module"] == "networks.lora"
    told = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    assert tuple(metadata[key] for key in told) == VERSIONS[shape]
    assert metadata["modelspec.prediction_type"] == ("v" if shape == "sd2" else "epsilon")
    assert metadata["modelspec.trigger_phrase"] == "zorb"
    assert json.loads(metadata["ss_tag_frequency"]) == {"adapter": {"zorb": 6}}
    assert metadata["sshs_model_hash"] == sha256_of_tensor_data(result.adapter)
    everything = json.dumps(dict(metadata))
    assert "on a wall" not in everything and str(result.folder.parent) not in everything


@one_family
def test_an_adapter_that_does_nothing_is_called_out(configure: Any) -> None:
    result = train(configure(optimizer__learning_rate=1e-9))
    assert not result.effect.noticeable
    assert "DOES NOTHING" in result.effect.sentence() and "learning_rate" in result.effect.sentence()


@one_family
def test_samples_are_made_with_the_live_adapter_and_a_failing_one_does_not_end_the_run(configure: Any) -> None:
    calls: list[tuple[str, tuple[str, ...], str]] = []

    def preview(base: Any, adapter: str, samples: Any, folder: Path) -> list[Path]:
        calls.append((adapter, samples.prompts, folder.name))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return [folder / "00.png"]

    config = configure(samples__prompts=("a [trigger]",), samples__every_steps=4)
    result = train(config, preview=preview)
    assert calls == [("trained", ("a zorb",), "step-000004"), ("trained", ("a zorb",), "step-000006")]
    kinds = [e["event"] for e in read_events(result.folder / "events.jsonl")]
    assert kinds.count("sample_failed") == 1 and kinds.count("sample") == 1


@one_family
def test_a_second_run_does_not_overwrite_the_first_unasked(configure: Any) -> None:
    train(configure())
    with pytest.raises(ConfigError, match=r"already holds a run.*overwrite"):
        train(configure())
    train(configure(output__overwrite=True))


@one_family
def test_what_was_meant_once_is_not_saved_with_the_settings(configure: Any) -> None:
    train(configure(training__checkpoint_every_steps=2))
    replaced = train(configure(output__overwrite=True, training__checkpoint_every_steps=2))
    resumed = train(configure(training__resume=True, training__checkpoint_every_steps=2))
    saved = parse_config(load_config(resumed.folder / "config.toml"))
    assert not saved.output.overwrite and not saved.training.resume
    assert replaced.folder == resumed.folder


@one_family
def test_a_refused_run_leaves_the_folder_as_it_was(configure: Any) -> None:
    wrong = {"optimizer__kind": "torch.optim.RMSprp"}
    with pytest.raises(ConfigError, match="RMSprp"):
        train(configure(**wrong))
    done = train(configure(training__checkpoint_every_steps=2))  # a refused attempt holds no folder
    before = {path: path.read_bytes() for path in sorted(done.folder.rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError, match="RMSprp"):
        train(configure(**wrong, output__overwrite=True))
    assert {path: path.read_bytes() for path in sorted(done.folder.rglob("*")) if path.is_file()} == before
    with pytest.raises(ConfigError, match="other settings"):
        train(configure(training__resume=True, training__checkpoint_every_steps=2, training__batch_size=1))
    config = done.folder / "config.toml"
    assert config.read_bytes() == before[config]


@one_family
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"data__folder": "/no/such/place"}, DataError, "there is no such folder"),
        ({"output__folder": "/dev/null/run"}, OutputError, "cannot be used as output folder"),
        ({"base__path": ""}, ConfigError, r"base\.path is not set"),
        ({"adapter__targets": ("attn9.to_k",)}, ConfigError, "matches no layer"),
        ({"data__resolution": 100}, ConfigError, "multiple of 8"),
    ],
)
def test_wrong_use_is_one_sentence(configure: Any, change: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        train(configure(**change))
    assert "\n" not in str(caught.value)


@one_family
def test_held_out_pictures_must_not_be_training_pictures(configure: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="also a training picture"):
        train(configure(validation__folder=settings["data"]["folder"]))


@pytest.mark.parametrize("shape", ["sd1"])  # the only really trained base
def test_a_base_that_is_declared_wrongly_is_warned_about(configure: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The base that ships with sdlora predicts epsilon; said to predict v it would learn nonsense, without an error."""
    folder = str(EXAMPLE_CONCEPT / "train")
    data = {"data__folder": folder, "data__trigger": "zorblin", "validation__folder": ""}
    options = {"base__path": "tiny", **data, "training__steps": 1, "optimizer__warmup_steps": 0}
    result = train(configure(**options, base__prediction="v"))
    (warning,) = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "warning"]
    assert "its output fits epsilon better" in warning["reason"]
    assert "WARNING: this base is taken to predict v" in capsys.readouterr().out
    result = train(configure(**options, output__overwrite=True))
    assert not [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "warning"]


@one_family
def test_a_wrong_target_is_found_before_anything_is_encoded(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "prepare_material", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ConfigError, match=r"'attn9' matches no layer of this base"):
        train(configure(adapter__targets=("attn9",)))


@one_family
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_trains_and_is_named_in_the_run(configure: Any, kind: str) -> None:
    result = train(configure(base__quantize=kind))
    assert result.effect.noticeable
    assert load_config(result.folder / "config.toml")["base"]["quantize"] == kind


@one_family
def test_the_unet_comes_when_the_encoders_are_gone(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    fetch = LoadedBase.fetch_unet

    def watch(base: LoadedBase) -> None:
        meta = all(parameter.is_meta for parameter in base.unet.parameters())
        seen.append((base.vae is None and not base.text_encoders, meta))
        fetch(base)

    monkeypatch.setattr(LoadedBase, "fetch_unet", watch)
    train(configure())
    assert seen == [(True, True)]


@one_family
def test_a_check_that_finds_no_memory_ends_no_run(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, "check_prediction", no_room)
    result = train(configure())
    (warning,) = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "warning"]
    assert "too little memory to check" in warning["reason"]


@one_family
def test_a_wrong_target_names_its_setting(configure: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.text_encoder_targets: 'bogus' matches no layer"):
        train(configure(adapter__text_encoder=True, adapter__text_encoder_targets=("bogus",)))


@one_family
def test_a_run_whose_cache_goes_keeps_what_it_has_learnt(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = TrainingLoop._optimize

    def clear_at_3(self: TrainingLoop) -> tuple[float, float]:
        if self.step == 3:
            clear_cache(data_cache(self.config.data), force=True)
        return optimize(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_optimize", clear_at_3)
        with pytest.raises(DataError, match="was removed or cut short while it was in use; start again"):
            train(configure())
    resumed = train(configure(training__resume=True))
    events = read_events(resumed.folder / "events.jsonl")
    assert [event["resumed_at_step"] for event in events if event["event"] == "start"] == [0, 3]


@one_family
def test_the_pictures_may_move_but_not_the_number_of_processes(configure: Any, settings: Any) -> None:
    train(configure(training__checkpoint_every_steps=2))
    moved = Path(settings["data"]["folder"]).rename(Path(settings["data"]["folder"]).with_name("under another name"))
    resumed = train(configure(training__resume=True, data__folder=str(moved)))
    assert resumed.steps == 6
    config = configure()
    assert run_identity(config, "a", "b", 1) != run_identity(config, "a", "b", 2)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_run_that_was_out_of_memory_goes_on_with_less(configure: Any, tmp_path: Path) -> None:
    whole = train(configure(output__folder=str(tmp_path / "whole")))
    train(configure(training__checkpoint_every_steps=3))
    less = {"training__micro_batch": 1, "training__gradient_checkpointing": True, "training__checkpoint_every_steps": 3}
    resumed = train(configure(training__resume=True, **less))
    events = read_events(resumed.folder / "events.jsonl")
    assert [event["resumed_at_step"] for event in events if event["event"] == "start"] == [0, 3]
    for key, expected in tensors_of(whole.adapter).items():
        torch.testing.assert_close(tensors_of(resumed.adapter)[key], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_loss_scale_outlives_steps_in_which_nothing_has_a_gradient(
    configure: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device in fp16, while words train and a step's captions hold none; a power of two rounds nothing."""
    others = Path(shutil.copytree(settings["data"]["folder"], tmp_path / "others"))
    for number, caption in enumerate(sorted(others.glob("*.txt"))):
        caption.write_text("a wall\n", encoding="utf-8")
        (others / f"{number}.png").write_bytes((others / f"{number}.png").read_bytes() + b"\0")  # other pictures
    make, norms, scales = torch.amp.GradScaler, {}, []

    def scaler(device: str, enabled: bool) -> Any:
        scales.append(make(device, init_scale=1024.0, growth_interval=2))
        return scales[-1]

    for name in ("plain", "scaled"):
        if name == "scaled":
            monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        config = configure(
            tokens={"train": "first", "handover": 0.67},
            data__prior__folder=str(others),
            training__batch_size=1,
            optimizer__kind="adamw",
            output__folder=str(tmp_path / name),
        )
        events = read_events(train(config).folder / "events.jsonl")
        norms[name] = [event["gradient_norm"] for event in events if event["event"] == "step"]
    assert norms["scaled"] == norms["plain"] and 0.0 in norms["plain"] and max(norms["plain"][:4]) > 0
    assert scales[0].get_scale() > 1024.0
    assert sha256_of_tensor_data(tmp_path / "scaled" / "adapter.safetensors") == sha256_of_tensor_data(
        tmp_path / "plain" / "adapter.safetensors"
    )


@two_families
def test_the_words_that_are_saved_are_no_longer_than_the_bases_own(
    configure: Any, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Those of a schedule-free optimizer, which are none of those that it trains."""
    ranges: list[dict[str, tuple[float, float]]] = []
    run = TrainingLoop.run

    def watch(self: TrainingLoop, *arguments: Any) -> Any:
        ranges.append(norm_range(self.base))
        return run(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "run", watch)
    options = {"optimizer__kind": "schedule-free", "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    result = train(configure(tokens={"train": "together", "handover": 1.0, "learning_rate": 0.5}, **options))
    for encoder, vectors in read_adapter(result.adapter).tokens["zorb"].items():
        smallest, largest = ranges[0][encoder]
        lengths = vectors.norm(dim=1)
        assert lengths.min() >= smallest * (1 - 1e-5) and lengths.max() <= largest * (1 + 1e-5)
        assert lengths.max() > largest * 0.99, "they must come to the bound for this to mean anything"


@pytest.mark.parametrize("shape", ["sd1"])
def test_the_average_that_is_saved_is_within_max_norm(configure: Any) -> None:
    options = {"training__ema_decay": 0.9, "optimizer__learning_rate": 0.3, "optimizer__schedule": "constant"}
    result = train(configure(adapter__max_norm=0.05, **options))
    norms = [layer.delta_norm() for layer in read_adapter(result.adapter).layers.values()]
    assert max(norms) <= 0.05 * (1 + 1e-4) and max(norms) > 0.049
