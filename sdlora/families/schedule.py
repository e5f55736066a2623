"""The noise schedule of a base, changed for training and for its pictures alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
from diffusers import DDPMScheduler

from sdlora.diffusion import Prediction
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.families.latent import sampler

_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_BEGINS_THERE = "EulerDiscreteScheduler"


def rescale_to_zero_snr(base: LoadedBase) -> None:
    """The schedule ends in pure noise (Lin et al. 2023, algorithm 1), in training and in the base's own sampler.

    A sampler that cannot begin at pure noise is replaced by one that can, which a note says. A base that already has
    such a schedule is left as it is. What the base predicts must be known: call it after `fetch_unet`, which may
    have to measure that. Raises ConfigError for a base that predicts epsilon.
    """
    if base.prediction == "epsilon":
        raise ConfigError(
            f"objective.zero_terminal_snr: {base.source.name} predicts epsilon, which says nothing of the picture where "
            "the input is pure noise; use a base that predicts v, or leave objective.zero_terminal_snr out"
        )
    if ends_in_pure_noise(base):
        return
    base.scheduler = DDPMScheduler.from_config(base.scheduler.config, **_ZERO_SNR)
    rescaled = _rescaled(base.sampler_config)
    if rescaled["_class_name"] != _class_name(base.sampler_config):
        base.notes += (
            f"its sampler {_class_name(base.sampler_config)} cannot begin at pure noise; "
            f"{rescaled['_class_name']} makes the sample pictures",
        )
    base.sampler_config = rescaled


def zero_snr_sampler(base: LoadedBase) -> Any:
    """Return the sampler that the base would have after `rescale_to_zero_snr`; the base stays as it is.

    For pictures with an adapter that was trained on that schedule.
    """
    return sampler(replace(base, sampler_config=_rescaled(base.sampler_config)))


def refuse_pure_noise(prediction: Prediction | None, name: str) -> None:
    """Raise ConfigError where pictures of the base of that name cannot begin at pure noise; None: not known what it predicts."""
    if prediction == "epsilon":
        raise ConfigError(
            f"{name} predicts epsilon, which says nothing of the picture where the input is pure noise; leave zero_snr at auto"
        )


def ends_in_pure_noise(base: LoadedBase) -> bool:
    """Return whether the last timestep of the base's schedule has no signal left."""
    return float(base.alphas_cumprod[-1]) == 0


def _rescaled(sampler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a sampler that begins at pure noise: the same one where it can."""
    name = _class_name(sampler_config)
    return {**sampler_config, **_ZERO_SNR, "_class_name": name if _can_begin_there(name) else _BEGINS_THERE}


def _class_name(sampler_config: Mapping[str, Any]) -> str:
    return sampler_config.get("_class_name") or "PNDMScheduler"


def _can_begin_there(name: str) -> bool:
    kind = getattr(diffusers, name, None)
    return isinstance(kind, type) and "rescale_betas_zero_snr" in inspect.signature(kind).parameters
