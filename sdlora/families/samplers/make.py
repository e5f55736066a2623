"""Samplers by the names people know: diffusers' schedulers, run as AUTOMATIC1111 runs them."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch

from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.families.latent import sampler
from sdlora.families.samplers.names import AUTOMATIC, SAMPLERS
from sdlora.families.samplers.sigmas import sigma_table, sigmas_of, timesteps_at
from sdlora.families.schedule import ends_in_pure_noise, refuse_pure_noise, zero_snr_sampler

_OF_THE_BASE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""What a sampler is told of the base; all else is the sampler's own, so that a name means the same on every base."""
_KARRAS = {"use_karras_sigmas": True}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_TRAILING = {"timestep_spacing": "trailing"}
_ONLY_TRAILING = {"Trailing": _TRAILING}
_MULTISTEP: Mapping[str, Mapping[str, Any]] = {
    "Karras": _KARRAS,
    "Exponential": _EXPONENTIAL,
    "Polyexponential": _EXPONENTIAL,
    "Trailing": _TRAILING,
}
_LEADING: Mapping[str, Mapping[str, Any]] = {
    "DDIM": {"timestep_spacing": "leading", "steps_offset": 1},
    "Trailing": _TRAILING,
}
_ITS_OWN: Mapping[str, Mapping[str, Any]] = {AUTOMATIC: {}}
_DDIM = {"clip_sample": False, "set_alpha_to_one": False}
_OF_SOME_NOISE = ("DDIM", "Align Your Steps", "Beta")
"""Schedules that do not begin at pure noise, or take most of their steps next to it."""

Table = Callable[[int, np.ndarray], np.ndarray]
"""From a number of steps, and the noise levels that the base was trained at, to the noise levels of the steps."""


@dataclass(frozen=True)
class _Kind:
    """How a sampler is made."""

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _ONLY_TRAILING)
    """The schedules that are the scheduler's own, with their settings; for others it is given a table.

    Those of Euler and its relatives put a single step at timestep 0, where there is no noise, so they are not used.
    """
    skips_second_last: bool = False
    """Whether one step more is planned, and the last but one left out, as AUTOMATIC1111 does with some."""


_OURS = {
    "SeededSdeScheduler": "brownian",
    "SeededMultistepScheduler": "brownian",
    "DPMPlusPlus2SAncestralScheduler": "ancestral",
    "RestartScheduler": "restart",
    "DPMFastScheduler": "singlestep",
    "DPMAdaptiveScheduler": "adaptive",
}
"""Scheduler of ours -> its module, which is imported when it is needed: what some need is slow to import."""
_MULTI, _MULTI_SDE = "DPMSolverMultistepScheduler", "SeededMultistepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_THIRD_SDE = _SDE | {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}
_KINDS = {
    "DPM++ 2M": _Kind(_MULTI, {"algorithm_type": "dpmsolver++"}, _MULTISTEP),
    "DPM++ 2M SDE": _Kind(_MULTI_SDE, _SDE, _MULTISTEP),
    "DPM++ 2M SDE Heun": _Kind(_MULTI_SDE, _SDE | {"solver_type": "heun"}, _MULTISTEP),
    "DPM++ 3M SDE": _Kind(_MULTI_SDE, _THIRD_SDE, skips_second_last=True),
    "Euler a": _Kind("EulerAncestralDiscreteScheduler"),
    "Euler": _Kind("EulerDiscreteScheduler"),
    "Heun": _Kind("HeunDiscreteScheduler"),
    "DPM2": _Kind("KDPM2DiscreteScheduler", skips_second_last=True),
    "DPM2 a": _Kind("KDPM2AncestralDiscreteScheduler", skips_second_last=True),
    "DPM++ SDE": _Kind("SeededSdeScheduler"),
    "DPM++ 2S a": _Kind("DPMPlusPlus2SAncestralScheduler"),
    "DPM fast": _Kind("DPMFastScheduler", own=_ITS_OWN),
    "DPM adaptive": _Kind("DPMAdaptiveScheduler", own=_ITS_OWN),
    "Restart": _Kind("RestartScheduler", own={}),
    "LMS": _Kind("LMSDiscreteScheduler"),
    "UniPC": _Kind("UniPCMultistepScheduler", {"solver_order": 3}, _MULTISTEP),
    "DDIM": _Kind("DDIMScheduler", _DDIM, _LEADING),
    "PLMS": _Kind("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, _LEADING),
    "DDPM": _Kind("DDPMScheduler", {"clip_sample": False}, _LEADING),
    "LCM": _Kind("LCMScheduler", own=_ITS_OWN),
}


def make_sampler(base: LoadedBase, name: str, schedule: str, zero_snr: bool = False) -> Any:
    """Return the sampler of that name on that schedule, both as `sampler_and_schedule` writes them.

    "" is the base's own sampler, and the schedule that the sampler is used with as a rule. With `zero_snr` its noise
    ends in pure noise (Lin et al. 2023), as it does where the base was trained so, and the rule is Trailing. Raises
    ConfigError for what cannot begin at pure noise.
    """
    already = ends_in_pure_noise(base)
    if zero_snr:
        refuse_pure_noise(base.prediction, base.source.name)
    if not name:
        return zero_snr_sampler(base) if zero_snr and not already else sampler(base)
    traits, zero_snr = SAMPLERS[name], zero_snr or already
    if not schedule:
        schedule = "Trailing" if zero_snr and "Trailing" in traits.schedules else traits.automatic
    if zero_snr:
        _refuse_later_beginning(base, name, schedule)
    made = _make(base, name, schedule, zero_snr)
    made.schedule_name = schedule
    return made


def schedule_of(made: Any) -> str:
    """Return the schedule of what `make_sampler` returned; "" for a base's own sampler."""
    return getattr(made, "schedule_name", "")


def _make(base: LoadedBase, name: str, schedule: str, zero_snr: bool) -> Any:
    kind = _KINDS[name]
    settings = {**_of_base(base), **kind.settings, **({"rescale_betas_zero_snr": True} if zero_snr else {})}
    scheduler = _scheduler(kind.scheduler)
    if schedule in kind.own:
        return _without_first_table(scheduler, {}, {**settings, **kind.own[schedule]})
    return _on_table(scheduler, settings, _table(schedule, base, kind.skips_second_last))


def _scheduler(name: str) -> type[Any]:
    home = importlib.import_module(f"sdlora.families.samplers.{_OURS[name]}") if name in _OURS else diffusers
    found: type[Any] = getattr(home, name)
    return found


def settings_of(made: Any) -> dict[str, Any]:
    """Return the settings of what `make_sampler` returned, for a recipe.

    Karras' schedule is Karras' alone there, and noise that is not drawn from the generators by turns is named.
    """
    settings = dict(made.config)
    if getattr(made, "draws_from_trees", False):
        settings["noise"] = "Brownian tree"
    if settings.get("use_karras_sigmas") and schedule_of(made):
        settings["use_karras_sigmas"] = schedule_of(made) == "Karras"
    return settings


def _refuse_later_beginning(base: LoadedBase, name: str, schedule: str) -> None:
    what = f"{base.source.name}: its noise schedule, or that of an adapter, ends in pure noise"
    if not SAMPLERS[name].begins_at_pure_noise:
        raise ConfigError(f"{what}, where the sampler {name} cannot begin; use Euler")
    if schedule in _OF_SOME_NOISE:
        raise ConfigError(f"{what}, which the schedule {schedule} is not made for; use Trailing")


def _of_base(base: LoadedBase) -> dict[str, Any]:
    return {key: base.scheduler.config[key] for key in _OF_THE_BASE}


def _table(schedule: str, base: LoadedBase, skips_second_last: bool) -> Table:
    is_sdxl = base.family.name == "sdxl"

    def table(steps: int, training: np.ndarray) -> np.ndarray:
        if not skips_second_last:
            return sigma_table(schedule, steps, training, is_sdxl)
        return sigma_table(schedule, steps + 1, training, is_sdxl)[:-1]

    return table


def _on_table(scheduler: type[Any], settings: Mapping[str, Any], table: Table) -> Any:
    """Return the scheduler with `table` for its noise levels.

    Where it has Karras' schedule the table takes that one's place, so that the scheduler arranges the levels of its
    steps, and of the evaluations between them, itself.
    """
    if "use_karras_sigmas" in inspect.signature(scheduler).parameters:

        def levels(self: Any, in_sigmas: Any, num_inference_steps: int = 0) -> np.ndarray:  # some do not tell them
            return table(num_inference_steps or self.num_inference_steps, sigmas_of(self.alphas_cumprod.numpy()))

        return _without_first_table(scheduler, {"_convert_to_karras": levels}, {**settings, **_KARRAS})

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        scheduler.set_timesteps(self, num_inference_steps, device=device)
        training = sigmas_of(self.alphas_cumprod.numpy())
        levels = table(num_inference_steps, training)
        self.sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps_at(levels, training)).to(device)

    return type(scheduler.__name__, (scheduler,), {"set_timesteps": set_timesteps})(**settings)


def _without_first_table(scheduler: type[Any], methods: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Return the scheduler with `methods`, made without a table of as many steps as there are timesteps.

    Some constructors lay one out, level by level, in up to half a second; nothing uses it.
    """
    made = None

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(self: Any, num_inference_steps: int, *arguments: Any, **options: Any) -> None:
        scheduler.set_timesteps(self, 1 if made is None else num_inference_steps, *arguments, **options)

    made = type(scheduler.__name__, (scheduler,), {**methods, "set_timesteps": set_timesteps})(**settings)
    return made
