"""What only base and data show to be wrong ends a run before anything is encoded or the UNet is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sdlora import train
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.training import run as run_module

WORDS = {"tokens__train": "together"}
ONE_WORD = [{"trigger": "zorb"}, {"trigger": "Zorb"}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "targets": ({"adapter__targets": ("attn9",)}, r"'attn9' matches no layer of this base"),
    "ranks": ({"adapter__ranks": {"attn9": 3}}, r"adapter\.ranks: 'attn9' matches no layer"),
    "rank of convolutions": (
        {"adapter__conv_rank": 2, "adapter__targets": ("attn2.to_k",)},
        r"adapter\.conv_rank is 2, and adapter\.targets chooses no convolution larger than 1 x 1",
    ),
    "rates by pattern": ({"optimizer__learning_rates": {"resnets.*": 1e-3}}, r"'resnets\.\*' matches no layer that is"),
    "rates of words": (
        {**WORDS, "optimizer__learning_rates": {"zorb": 1e-3}},
        r"'zorb' matches no layer that is trained",
    ),
    "class of optimizer": ({"optimizer__kind": "torch.optim.Adom"}, r"has no optimizer 'Adom'"),
    "argument of optimizer": (
        {"optimizer__kind": "adamw", "optimizer__arguments": {"amsgrod": True}},
        r"optimizer\.arguments: 'adamw' has no argument 'amsgrod'",
    ),
    "setting of optimizer": (
        {"optimizer__kind": "torch.optim.SGD", "optimizer__betas": (0.8, 0.9)},
        r"optimizer\.betas is \(0\.8, 0\.9\), and optimizer\.kind 'torch\.optim\.SGD' has no such",
    ),
    "rate of a factor": (
        {**WORDS, "optimizer__kind": "prodigyopt.Prodigy", "optimizer__learning_rate": 1.0},
        r"at 0\.001 nothing would be learnt",
    ),
    "timesteps": ({"objective__max_timestep": 2000}, r"objective\.max_timestep is 2000, but this base has 1000"),
    "one word twice": ({**WORDS, "concepts": ONE_WORD}, r"data\.trigger: 'zorb' and 'Zorb' are one word to a prompt"),
    "word too long": ({**WORDS, "data__trigger": "zorb" * 30}, r"would stand for \d+ vectors and a prompt holds 75"),
    "word that no caption holds": (
        {**WORDS, "data__trigger": "blick", "captions": "a wall"},
        r"data\.trigger: no caption holds 'blick', which .* is to teach; set data\.captions\.insert_trigger = true",
    ),
}


def rewrite(folder: str, text: str) -> None:
    for file in Path(folder).glob("*.txt"):
        file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_is_encoded(
    configure: Any, settings: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given, sentence = REFUSED[case]
    values = dict(given)
    monkeypatch.setattr(run_module, "prepare_material", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(LoadedBase, "fetch_unet", lambda _: pytest.fail("the UNet is loaded"))
    rewrite(settings["data"]["folder"], values.pop("captions", "a [trigger] on a wall"))
    if concepts := values.pop("concepts", ()):
        folder = settings["data"].pop("folder")
        other = shutil.copytree(folder, tmp_path / "other")
        for picture in other.glob("*.png"):
            picture.write_bytes(picture.read_bytes() + b"\0")  # other pictures
        values["data__concepts"] = [
            {**one, "folder": str(where)} for one, where in zip(concepts, (folder, other), strict=True)
        ]
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(configure(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_rate_of_a_second_text_encoder_needs_one(configure: Any) -> None:
    values = {"adapter__text_encoder": True, "optimizer__text_encoder_2_learning_rate": 1e-5}
    with pytest.raises(ConfigError, match=r"this base \(Stable Diffusion 1\.x\) has no second text encoder; remove it"):
        train(configure(**values))


@pytest.mark.parametrize("shape", ["sdxl"])
def test_sdxl_has_one(configure: Any) -> None:
    values = {"adapter__text_encoder": True, "optimizer__text_encoder_2_learning_rate": 1e-5, "training__steps": 2}
    assert train(configure(**values)).steps == 2


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_trigger_put_before_captions_without_it_is_learnt(configure: Any, settings: dict[str, Any]) -> None:
    rewrite(settings["data"]["folder"], "a wall")
    values = {**WORDS, "training__steps": 2, "optimizer__warmup_steps": 0}
    with pytest.raises(ConfigError, match="no caption holds 'zorb'"):
        train(configure(**values))
    assert train(configure(**values, data__captions__insert_trigger=True, output__overwrite=True)).steps == 2
