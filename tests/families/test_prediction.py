"""What a UNet predicts, measured on the base that ships with sdlora, which really predicts epsilon.

From its epsilon prediction the exact v prediction follows: v = (epsilon - sqrt(1 - a) x_t) / sqrt(a).
"""

import pytest
import torch
from encoded import encode, encode_texts
from families_help import load

from sdlora.assets import EXAMPLE_CONCEPT
from sdlora.config import DataSection
from sdlora.errors import ModelError
from sdlora.families.base import Conditioning, PictureSize
from sdlora.families.prediction import (
    check_prediction,
    clearly_predicts,
    measure_prediction,
    prediction_losses,
)


@pytest.fixture
def trained():
    return load("tiny")


def predict_v_instead(base) -> None:
    epsilon = base.unet.forward

    def forward(noisy, timesteps, **options):
        alpha = base.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (((epsilon(noisy, timesteps, **options)[0] - (1 - alpha).sqrt() * noisy) / alpha.sqrt()),)

    base.unet.forward = forward


def batch(base):
    section = DataSection(folder=str(EXAMPLE_CONCEPT / "train"), trigger="zorblin")
    examples = encode(base, section, 128)[:4]
    texts = encode_texts(base, [example.sample.caption for example in examples])
    conditioning = Conditioning.concatenate([texts[example.sample.caption] for example in examples])
    return torch.stack([e.posterior().mean for e in examples]), conditioning, [e.size for e in examples]


def test_measured_without_any_picture(trained):
    with torch.no_grad():
        nothing = trained.family.encode_prompts(trained, [None])
    assert measure_prediction(trained, nothing) == "epsilon"
    predict_v_instead(trained)
    assert measure_prediction(trained, nothing) == "v"
    trained.unet.forward = lambda noisy, *_, **__: (noisy * torch.nan,)
    with pytest.raises(ModelError, match=r"its UNet gives NaN in torch\.float32"):
        measure_prediction(trained, nothing)


def test_the_right_declaration_is_not_warned_about(trained):
    assert check_prediction(trained, *batch(trained)) == ""
    predict_v_instead(trained)
    trained.scheduler.register_to_config(prediction_type="v_prediction")
    assert check_prediction(trained, *batch(trained)) == ""


def test_the_wrong_declaration_is_warned_about(trained):
    pictures = batch(trained)
    trained.scheduler.register_to_config(prediction_type="v_prediction")
    warning = check_prediction(trained, *pictures)
    assert "taken to predict v, but its output fits epsilon better" in warning
    assert 'set base.prediction to "epsilon"' in warning
    trained.scheduler.register_to_config(prediction_type="epsilon")
    predict_v_instead(trained)
    assert "taken to predict epsilon, but its output fits v better" in check_prediction(trained, *pictures)
    alone, conditioning, sizes = pictures
    one = check_prediction(trained, alone[:1], conditioning.rows([0]), sizes[:1])
    assert "fits v better" in one


def test_an_untrained_model_is_not_accused(tiny_base, shape):
    base = tiny_base()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = base.family.encode_prompts(base, ["a ball", None])
    sizes = [PictureSize((64, 64), (0, 0), (64, 64))] * 2
    assert check_prediction(base, latents, conditioning, sizes) == ""


def test_both_kinds_of_model_stand_apart_as_the_arithmetic_page_says(trained):
    pictures = batch(trained)
    noise = torch.randn(pictures[0].shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500, 575, 650, 725])
    losses = prediction_losses(trained, pictures[0], noise, timesteps, *pictures[1:])
    assert losses["epsilon"] < 0.06 and losses["v"] > 1.2
    predict_v_instead(trained)
    losses = prediction_losses(trained, pictures[0], noise, timesteps, *pictures[1:])
    assert losses["epsilon"] > 1.0 and losses["v"] < 0.35


def test_losses_are_relative_to_an_output_of_zeros(trained):
    latents, conditioning, sizes = batch(trained)
    trained.unet.forward = lambda noisy, *_, **__: (torch.zeros_like(noisy),)
    losses = prediction_losses(
        trained, latents, torch.randn_like(latents), torch.tensor([600] * 4), conditioning, sizes
    )
    assert losses == pytest.approx({"epsilon": 1.0, "v": 1.0})


@pytest.mark.parametrize(
    ("epsilon", "v", "found"),
    [(0.1, 1.3, "epsilon"), (1.2, 0.3, "v"), (0.3, 0.5, None), (0.9, 2.0, None), (0.2, 0.1, None)],
)
def test_only_a_clear_fit_counts(epsilon, v, found):
    assert clearly_predicts({"epsilon": epsilon, "v": v}) == found
