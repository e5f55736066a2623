"""Samplers and schedules as data, under the names people know. Needs no model library, so that a name is checked at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

AUTOMATIC = "Automatic"
SCHEDULES: Mapping[str, str] = {
    AUTOMATIC: "the one that the sampler is used with as a rule",
    "Uniform": "timesteps in equal steps down to the first one",
    "Karras": "more steps where there is little noise (Karras et al. 2022, eq. 5)",
    "Exponential": "each noise level is the same share of the one before",
    "Polyexponential": "the same as Exponential, at the exponent 1 that is usual",
    "SGM Uniform": "timesteps in equal steps that end one step before the first one, as Stability AI's own code has it",
    "KL Optimal": "equal steps of the arc tangent of the noise level (Sabour et al. 2024)",
    "Align Your Steps": "eleven measured levels, in between by their logarithms (Sabour et al. 2024)",
    "Simple": "every so many of the levels that the base was trained at, from the noisiest",
    "Normal": "the same as Uniform",
    "DDIM": "timesteps 1, 1 + n, 1 + 2 n, ... (Song et al. 2020)",
    "Beta": "more steps at both ends, by the quantiles of Beta(0.6, 0.6) (Lee et al. 2024)",
    "Trailing": "timesteps in equal steps from the last one (Lin et al. 2023, table 2)",
}
"""Schedule -> what it is."""
_ANY = tuple(name for name in SCHEDULES if name != AUTOMATIC)
_ANY_BUT_BETA = tuple(name for name in _ANY if name != "Beta")
"""For samplers whose second last level is left out: Beta's last two are far apart, and the last step would be too long."""
_OF_TIMESTEPS = ("DDIM", "Trailing")
DDIM_MOST_STEPS = 999
"""The schedule DDIM counts timesteps from 1, and so has none for 1000."""


@dataclass(frozen=True)
class SamplerTraits:
    """What is known of a sampler without any model."""

    automatic: str
    """The schedule that AUTOMATIC1111 runs it on unless told otherwise."""
    about: str
    schedules: tuple[str, ...] = _ANY
    begins_at_pure_noise: bool = True
    """Whether it can do a schedule that ends in pure noise."""
    most_steps: int = 1000
    one_by_one: bool = False
    """Whether its steps are fitted to the picture, so that each is made by itself."""


SAMPLERS: Mapping[str, SamplerTraits] = {
    "DPM++ 2M": SamplerTraits("Karras", "quick and precise, the usual choice (Lu et al. 2022)"),
    "DPM++ 2M SDE": SamplerTraits("Exponential", "the same with new noise in every step"),
    "DPM++ 2M SDE Heun": SamplerTraits("Exponential", "the same by another formula of second order"),
    "DPM++ 3M SDE": SamplerTraits("Exponential", "of third order; for many steps, 30 and more", _ANY_BUT_BETA),
    "DPM++ SDE": SamplerTraits(
        "Karras", "two evaluations a step, new noise in each; for few steps", begins_at_pure_noise=False
    ),
    "DPM++ 2S a": SamplerTraits(
        "Karras", "two evaluations a step, new noise behind it (Lu et al. 2022)", begins_at_pure_noise=False
    ),
    "Euler a": SamplerTraits("Uniform", "new noise in every step; soft, changes with the number of steps"),
    "Euler": SamplerTraits("Uniform", "the simplest (Karras et al. 2022, algorithm 1 without its second order)"),
    "Heun": SamplerTraits(
        "Uniform", "two evaluations a step (Karras et al. 2022, algorithm 1)", begins_at_pure_noise=False
    ),
    "DPM2": SamplerTraits(
        "Karras", "two evaluations a step, the second half way", _ANY_BUT_BETA, begins_at_pure_noise=False
    ),
    "DPM2 a": SamplerTraits(
        "Karras", "the same with new noise in every step", _ANY_BUT_BETA, begins_at_pure_noise=False
    ),
    "DPM fast": SamplerTraits(
        AUTOMATIC,
        "new noise in every step; an evaluation for each step, of third order (Lu et al. 2022)",
        (),
        begins_at_pure_noise=False,
    ),
    "DPM adaptive": SamplerTraits(
        AUTOMATIC,
        "new noise in every step; makes as many steps as the picture needs, whatever is asked for (Lu et al. 2022)",
        (),
        begins_at_pure_noise=False,
        one_by_one=True,
    ),
    "Restart": SamplerTraits(
        "Karras",
        "Heun's steps; with 20 and more, up again and down once more (Xu et al. 2023)",
        ("Karras",),
        begins_at_pure_noise=False,
    ),
    "LMS": SamplerTraits(
        "Uniform", "a polynomial through the last four slopes, as k-diffusion has it", begins_at_pure_noise=False
    ),
    "UniPC": SamplerTraits("SGM Uniform", "corrects each step by the next one; for few steps (Zhao et al. 2023)"),
    "DDIM": SamplerTraits("DDIM", "the first quick sampler (Song et al. 2020)", _OF_TIMESTEPS),
    "PLMS": SamplerTraits(
        "DDIM",
        "what Stable Diffusion 1 came with; one evaluation more than steps",
        ("DDIM",),
        begins_at_pure_noise=False,
    ),
    "DDPM": SamplerTraits("DDIM", "new noise in every step, for hundreds of steps (Ho et al. 2020)", _OF_TIMESTEPS),
    "LCM": SamplerTraits(
        AUTOMATIC,
        "for LCM adapters and bases: 4 to 8 steps, guidance 1 to 2 (Luo et al. 2023)",
        (),
        most_steps=50,
    ),
}
"""Sampler -> what is known of it, in the order in which they are shown."""

OF_SCHEDULERS: Mapping[str, str] = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
"""diffusers' scheduler, as bases name theirs -> the sampler that people call it."""

_NEAREST = {
    "DDIM CFG++": "DDIM",
    "DEIS": "DPM++ 2M",
    "IPNDM": "PLMS",
    "TCD": "LCM",
}
"""Samplers of other programs that there are none of here -> the nearest."""
_OTHER_SPELLINGS = {
    "euler_ancestral": "Euler a",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "uni_pc": "UniPC",
    "uni_pc_bh2": "UniPC",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
}
"""ComfyUI's names of samplers -> AUTOMATIC1111's."""
_OTHER_SCHEDULES = {"ddim_uniform": "DDIM", "sgmuniform": "SGM Uniform"}


def sampler_and_schedule(sampler: str, schedule: str = "") -> tuple[str, str]:
    """Return both names as they are written here, "" for the automatic schedule.

    The old joined names ("DPM++ 2M Karras") and ComfyUI's are understood, capitals do not matter. "", "" is the
    base's own sampler. Raises ValueError with a sentence for names that there are not and pairs that do not go.
    """
    if not sampler:
        if schedule and _known(schedule, SCHEDULES, _OTHER_SCHEDULES) != AUTOMATIC:
            raise ValueError(f"the schedule {schedule!r} needs a sampler; name one, such as DPM++ 2M")
        return "", ""
    name, joined = _split(sampler)
    traits = SAMPLERS[name]
    wanted = _schedule(schedule) if schedule else AUTOMATIC
    if joined and wanted not in (AUTOMATIC, joined):
        raise ValueError(f"sampler {sampler!r} and schedule {wanted!r} contradict each other; say sampler {name!r}")
    wanted = joined if wanted == AUTOMATIC and joined else wanted
    if wanted == AUTOMATIC:
        return name, ""
    if wanted not in traits.schedules:
        raise ValueError(f"sampler {name!r} cannot take the schedule {wanted!r}; {_instead(name, wanted)}")
    return name, wanted


def _split(text: str) -> tuple[str, str]:
    """Return the sampler and the schedule that its joined name says, or ""."""
    if found := _known(text, (*SAMPLERS, *_NEAREST), _OTHER_SPELLINGS):
        return _offered(found), ""
    for schedule in _ANY:
        if text.lower().endswith(f" {schedule.lower()}"):
            rest = text[: -len(schedule)].strip()
            if found := _known(rest, (*SAMPLERS, *_NEAREST), _OTHER_SPELLINGS):
                return _offered(found), schedule
    close = difflib.get_close_matches(text.lower(), {name.lower(): name for name in SAMPLERS}, n=1, cutoff=0.5)
    nearest = next((name for name in SAMPLERS if close and name.lower() == close[0]), "")
    hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(SAMPLERS)}"
    raise ValueError(f"there is no sampler {text!r}; {hint}")


def _offered(name: str) -> str:
    if name in _NEAREST:
        raise ValueError(f"the sampler {name} is not offered; the nearest is {_NEAREST[name]}")
    return name


def _schedule(text: str) -> str:
    if found := _known(text, SCHEDULES, _OTHER_SCHEDULES):
        return found
    close = difflib.get_close_matches(text.lower(), [name.lower() for name in SCHEDULES], n=1, cutoff=0.5)
    nearest = next((name for name in SCHEDULES if close and name.lower() == close[0]), "")
    hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(SCHEDULES)}"
    raise ValueError(f"there is no schedule {text!r}; {hint}")


def _instead(sampler: str, schedule: str) -> str:
    known = SAMPLERS[sampler].schedules
    if not known:
        return "it has one of its own; leave the schedule out"
    if schedule == "Beta":
        return "its last step would be too long; take another schedule, such as Karras"
    return f"it takes {' and '.join(known)}; of the samplers that take {schedule} DPM++ 2M is a good one"


def _known(text: str, names: Iterable[str], spellings: Mapping[str, str]) -> str:
    """Return the name that `text` is, whatever its capitals and underscores, or ""."""
    plain = text.strip().lower()
    if plain in spellings:
        return spellings[plain]
    plain = plain.replace("_", " ")
    return next((name for name in names if name.lower() == plain), "")
