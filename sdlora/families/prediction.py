"""What a UNet predicts, told from how well its output fits either target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sdlora.diffusion import Prediction, add_noise, training_target
from sdlora.errors import ModelError
from sdlora.families.base import Conditioning, LoadedBase, PictureSize, autocast

_CLEAR = 2.0
_FITS = 0.5
# Of the error against epsilon where the input is almost pure noise.
_IS_THE_NOISE = 0.25
_IS_NOT_THE_NOISE = 0.75
_LATENT_SIDE = 16
_SIDE = 8 * _LATENT_SIDE


def prediction_losses(
    base: LoadedBase,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    sizes: Sequence[PictureSize],
    shown: torch.Tensor | None = None,
) -> dict[Prediction, float]:
    """Return the mean squared error of the UNet's output against the epsilon and the v target, over that target's own.

    So 0 is a perfect fit and 1 what an output of zeros would have. `shown` [B,5,h,w] is what an inpainting UNet is.
    """
    table = base.alphas_cumprod
    noisy = add_noise(latents, noise, timesteps, table).to(base.device, base.dtype)
    if shown is not None:
        noisy = torch.cat([noisy, shown.to(noisy)], dim=1)
    with torch.no_grad(), autocast(base):
        texts = conditioning.to(base.device, base.dtype)
        output = base.family.predict(base, noisy, timesteps.to(base.device), texts, sizes).float().cpu()
    kinds: tuple[Prediction, ...] = ("epsilon", "v")
    targets = {kind: training_target(latents, noise, timesteps, table, kind) for kind in kinds}
    return {kind: float((output - target).square().mean() / target.square().mean()) for kind, target in targets.items()}


def clearly_predicts(losses: Mapping[Prediction, float]) -> Prediction | None:
    """Return the target that fits, and at least twice as well as the other; None where neither does."""
    better, worse = sorted(losses, key=lambda kind: losses[kind])
    return better if losses[better] < _FITS and losses[worse] > _CLEAR * losses[better] else None


def check_prediction(
    base: LoadedBase, latents: torch.Tensor, conditioning: Conditioning, sizes: Sequence[PictureSize]
) -> str:
    """Return a warning where the UNet's output on a batch of real latents [B,4,h,w] fits the other target, else "".

    Asked between the middle of the schedule and its noisy end, where the two targets differ most, one picture
    at a time, so that it needs less memory than training does.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    length, count = len(base.alphas_cumprod), len(latents)
    losses: dict[Prediction, float] = {"epsilon": 0.0, "v": 0.0}
    for row in range(count):
        timestep = torch.tensor([int(length * (0.5 + 0.3 * row / count))])
        one = slice(row, row + 1)
        found_here = prediction_losses(base, latents[one], noise[one], timestep, conditioning.rows([row]), [sizes[row]])
        losses = {kind: losses[kind] + loss / count for kind, loss in found_here.items()}
    found = clearly_predicts(losses)
    if found is None or found == base.prediction:
        return ""
    return (
        f"this base is taken to predict {base.prediction}, but its output fits {found} better (relative "
        f"error {losses[found]:.2f} against {losses[base.prediction]:.2f} on one batch); "
        f'if its pictures come out wrong, set base.prediction to "{found}"'
    )


def all_masked(base: LoadedBase) -> torch.Tensor:
    """Return what an inpainting UNet is shown [1,5,h,w], for measuring it, of a picture that is masked as a whole."""
    grey, _ = base.family.encode_images(base, torch.zeros(1, 3, _SIDE, _SIDE))
    return torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1)


def measure_prediction(
    base: LoadedBase, no_prompt: Conditioning, shown: torch.Tensor | None = None
) -> Prediction | None:
    """Return what the UNet predicts, told without any picture; None where that is not clear.

    `shown` is what `all_masked` gives, for an inpainting UNet.

    Near the last timestep the input is almost pure noise. An epsilon model returns it; a v model returns
    minus its guess of the picture, which has nothing to do with it. `no_prompt` is one row. Raises ModelError
    where the UNet gives NaN.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, _LATENT_SIDE, _LATENT_SIDE), generator=generator)
    timesteps = torch.tensor([int(0.99 * len(base.alphas_cumprod))])
    size = PictureSize((_SIDE, _SIDE), (0, 0), (_SIDE, _SIDE))
    loss = prediction_losses(base, torch.zeros_like(noise), noise, timesteps, no_prompt, [size], shown)["epsilon"]
    if not math.isfinite(loss):
        raise ModelError(
            f"{base.source.name}: its UNet gives NaN in {base.dtype}; use another base.precision, or get the file again"
        )
    if loss < _IS_THE_NOISE:
        return "epsilon"
    return "v" if loss > _IS_NOT_THE_NOISE else None
