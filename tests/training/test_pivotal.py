"""New words and adapters trained together, first one and then the other, or words alone: from settings to files."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import one_family, two_families

from sdlora import Engine, load_base, make_request, read_adapter, train
from sdlora.families.base import LoadedBase
from sdlora.storage import sha256_of_tensor_data
from sdlora.training.events import read_events
from sdlora.training.loop import TrainingLoop


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Every trained weight before the first step and after each."""
    seen: list[dict[str, torch.Tensor]] = []
    optimize = TrainingLoop._optimize

    def watch(self: TrainingLoop) -> tuple[float, float]:
        if not seen:
            seen.append(self.trainee.copy_weights())
        outcome = optimize(self)
        seen.append(self.trainee.copy_weights())
        return outcome

    monkeypatch.setattr(TrainingLoop, "_optimize", watch)
    return seen


def moved(seen: list[dict[str, torch.Tensor]], part: str) -> list[bool]:
    """Of each step, whether it changed any weight of a part, "tokens" or "unet"."""
    names = [name for name in seen[0] if name.startswith(part)]
    assert names
    return [
        any(not torch.equal(before[name], after[name]) for name in names) for before, after in itertools.pairwise(seen)
    ]


@pytest.mark.parametrize(
    ("shape", "tokens", "words", "adapter"),
    [
        ("sd1", {"train": "together"}, [True] * 3 + [False] * 3, [True] * 6),
        ("sd1", {"train": "together", "handover": 1.0}, [True] * 6, [True] * 6),
        ("sd1", {"train": "first", "handover": 0.34}, [True] * 2 + [False] * 4, [False] * 2 + [True] * 4),
        ("sd2", {"train": "together"}, [True] * 3 + [False] * 3, [True] * 6),
        ("sdxl", {"train": "first", "handover": 0.34}, [True] * 2 + [False] * 4, [False] * 2 + [True] * 4),
    ],
)
def test_words_and_adapter_train_in_their_steps_and_are_saved_as_a_pair(
    configure: Any, tokens: dict[str, Any], words: list[bool], adapter: list[bool], monkeypatch: Any, shape: str
) -> None:
    seen = watched(monkeypatch)
    result = train(configure(tokens=tokens, adapter__targets=("attn2.to_k", "attn2.to_v"), optimizer__warmup_steps=0))
    assert (moved(seen, "tokens"), moved(seen, "unet")) == (words, adapter)
    assert result.embeddings == (result.folder / "embeddings" / "zorb.safetensors",)
    assert result.embeddings[0].is_file()
    read = read_adapter(result.adapter)
    assert len(read.layers) > 0 and set(read.tokens) == {"zorb"}
    assert set(read.tokens["zorb"]) == {"text_encoder"} | ({"text_encoder_2"} if shape == "sdxl" else set())
    for encoder, vectors in read.tokens["zorb"].items():
        assert torch.equal(vectors, seen[-1][f"tokens.{encoder}.zorb:vectors"])


@one_family
def test_a_batch_without_the_word_changes_nothing_while_words_alone_train(
    configure: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    others = Path(shutil.copytree(settings["data"]["folder"], tmp_path / "others"))
    for number, caption in enumerate(sorted(others.glob("*.txt"))):
        caption.write_text("a wall\n", encoding="utf-8")
        (others / f"{number}.png").write_bytes((others / f"{number}.png").read_bytes() + b"\0")  # other pictures
    seen = watched(monkeypatch)
    tokens = {"train": "first", "handover": 0.67}
    train(configure(tokens=tokens, data__prior__folder=str(others), training__batch_size=1))
    changed = moved(seen, "tokens")[:4]
    assert any(changed) and not all(changed)


@two_families
def test_words_alone_give_an_embedding_that_the_engine_knows(configure: Any, settings: dict[str, Any]) -> None:
    del settings["adapter"], settings["optimizer"]["learning_rate"]
    result = train(configure(tokens={"train": "alone", "learning_rate": 0.05}))
    read = read_adapter(result.adapter)
    assert not read.layers and set(read.tokens) == {"zorb"}
    assert result.effect.noticeable and result.effect.delta_share == 0
    engine = Engine(settings["base"]["path"])

    def picture(prompt: str, weight: float) -> bytes:
        chosen = [{"path": str(result.adapter), "weight": weight}]
        ((image, _),) = engine.generate(make_request(prompt=prompt, steps=2, adapters=chosen))
        return image.tobytes()

    assert picture("a zorb", 1) != picture("a zorb", 0)
    assert picture("a ball", 1) == picture("a ball", 0)


@one_family
def test_several_words_alone_are_an_embedding_file_each(
    configure: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    del settings["adapter"], settings["optimizer"]["learning_rate"]
    cats = settings["data"].pop("folder")
    dogs = Path(shutil.copytree(cats, tmp_path / "dogs"))
    for picture in dogs.glob("*.png"):
        picture.write_bytes(picture.read_bytes() + b"\0")  # other pictures
    concepts = [{"folder": cats, "trigger": "zorb"}, {"folder": str(dogs), "trigger": "wuff"}]
    result = train(
        configure(tokens={"train": "alone"}, data__concepts=concepts, training__steps=3, output__save_every_steps=2)
    )
    assert result.adapter == result.folder / "zorb.safetensors"
    assert result.embeddings == (result.folder / "wuff.safetensors",)
    for word, file in (("zorb", result.adapter), ("wuff", result.embeddings[0])):
        read = read_adapter(file)
        assert set(read.tokens) == {word} and not read.layers
    assert {path.name for path in result.folder.rglob("*.safetensors")} == {
        "zorb.safetensors",
        "wuff.safetensors",
        "zorb-000002.safetensors",
    }
    assert set(read_adapter(result.folder / "zorb-000002.safetensors").tokens) == {"zorb", "wuff"}


@pytest.mark.parametrize("shape", ["sd1"])
def test_headers_tell_the_rates_of_what_was_trained(configure: Any, settings: dict[str, Any]) -> None:
    pair = read_adapter(train(configure(tokens={"train": "together"}, training__steps=4)).adapter).metadata
    told = ("ss_unet_lr", "ss_learning_rate", "sdlora_tokens_lr", "ss_text_encoder_lr")
    assert [pair.get(key) for key in told] == ["0.001", "0.001", "0.001", None]
    del settings["adapter"], settings["optimizer"]["learning_rate"]
    config = configure(tokens={"train": "alone", "learning_rate": 0.05}, training__steps=4, output__overwrite=True)
    alone = read_adapter(train(config).adapter).metadata
    assert [alone.get(key) for key in told] == [None, "0.05", "0.05", None]
    assert not [key for key in alone if key.startswith("ss_network_")]


@two_families
def test_no_row_of_the_bases_own_words_changes(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything else of the base: the tables are as long as they were, and every bit is in its place."""
    bases: list[tuple[LoadedBase, str]] = []
    run = TrainingLoop.run

    def watch(self: TrainingLoop, *arguments: Any) -> Any:
        bases.append((self.base, self.base.weights_sha256()))
        outcome = run(self, *arguments)
        bases.append((self.base, self.base.weights_sha256()))
        return outcome

    monkeypatch.setattr(TrainingLoop, "run", watch)
    config = configure(tokens={"train": "together", "vectors": 2, "start": "random"}, adapter__text_encoder=True)
    train(config)
    (base, before), (_, after) = bases
    assert before == after
    fresh = load_base(config.base, "cpu")
    for name, encoder in base.text_encoders.items():
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table, fresh.text_encoders[name].get_input_embeddings().weight)


@two_families
def test_a_resumed_pivotal_run_gives_the_uninterrupted_ones_files(configure: Any, tmp_path: Path) -> None:
    values = {
        "tokens": {"train": "together"},
        "training__ema_decay": 0.9,
        "training__checkpoint_every_steps": 2,
        "adapter__rank_dropout": 0.2,
        "adapter__targets": ("attn2.to_k", "attn2.to_v"),
        "validation__folder": "",
    }
    whole = train(configure(**values, output__folder=str(tmp_path / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        optimize = TrainingLoop._optimize

        def killed(self: TrainingLoop) -> tuple[float, float]:
            if self.step == 5:
                raise KeyboardInterrupt
            return optimize(self)

        patch.setattr(TrainingLoop, "_optimize", killed)
        with pytest.raises(KeyboardInterrupt):
            train(configure(**values))
    for at in (4, 2):  # after and before the handover
        states = sorted((tmp_path / "run" / "checkpoints").iterdir())
        assert states[-1].name == f"state-{at:06d}.pt"
        resumed = train(configure(**values, training__resume=True, output__overwrite=True))
        for name in ("adapter.safetensors", "embeddings/zorb.safetensors"):
            assert sha256_of_tensor_data(resumed.folder / name) == sha256_of_tensor_data(whole.folder / name)
        states[-1].unlink()


@one_family
def test_a_save_on_the_way_holds_the_words_it_was_made_with(configure: Any) -> None:
    result = train(configure(tokens={"train": "together", "handover": 1.0}, output__save_every_steps=3))
    early, last = read_adapter(result.folder / "adapter-000003.safetensors"), read_adapter(result.adapter)
    assert not torch.equal(early.tokens["zorb"]["text_encoder"], last.tokens["zorb"]["text_encoder"])


@one_family
def test_bundled_words_lie_in_the_adapters_file(configure: Any) -> None:
    result = train(configure(tokens={"train": "together", "save": "bundled"}))
    assert set(read_adapter(result.adapter).tokens) == {"zorb"} and result.embeddings == ()
    assert not (result.folder / "embeddings").exists()


LOSSES = {
    "lora": (0.568983, 1.007522, 0.501772, 0.654522, 0.982254, 0.717631),
    "text encoder": (0.568983, 1.00252, 0.499198, 0.649281, 0.948839, 0.719779),
    "dora": (0.568983, 1.006489, 0.501257, 0.654379, 0.976779, 0.714062),
    "loha": (0.568983, 1.007932, 0.503515, 0.646869, 1.007119, 0.729847),
    "lokr": (0.568983, 1.008427, 0.505955, 0.653915, 1.027655, 0.754988),
    "full": (0.568983, 0.969102, 0.544898, 0.624685, 0.933023, 0.70773),
    "pivotal": (0.568983, 1.00684, 0.501388, 0.654777, 0.976666, 0.718884),
    "words first": (0.568983, 1.010531, 0.50593, 0.658287, 1.046663, 0.767856),
    "huber": (0.226318, 0.291813, 0.084203, 0.387547, 0.277411, 0.360833),
}


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lora", {}),
        ("text encoder", {"adapter__text_encoder": True, "optimizer__text_encoder_learning_rate": 3e-2}),
        ("dora", {"adapter__dora": True}),
        ("loha", {"adapter__kind": "loha"}),
        ("lokr", {"adapter__kind": "lokr"}),
        ("full", {"adapter__kind": "full", "adapter__rank": 16, "adapter__alpha": 16.0}),
        ("pivotal", {"tokens": {"train": "together", "learning_rate": 0.1}}),
        ("words first", {"tokens": {"train": "first", "learning_rate": 0.1}}),
        ("huber", {"objective": {"loss": "huber", "timesteps": "logit-normal", "noise_offset": 0.1}}),
    ],
)
def test_the_losses_of_a_fixed_seed(configure: Any, name: str, values: dict[str, Any]) -> None:
    """Recorded once: another number means that training does something else than it did."""
    result = train(configure(**values, optimizer__kind="adamw", optimizer__learning_rate=3e-2))
    losses = [event["loss"] for event in read_events(result.folder / "events.jsonl") if event["event"] == "step"]
    assert losses == pytest.approx(LOSSES[name], rel=2e-4)
