"""The second pass: a picture made small is enlarged, and denoised again in part at its final size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import ConfigError
from sdlora.families.samplers.names import DDIM_MOST_STEPS, SAMPLERS
from sdlora.generation.img2img.source import MAX_SIDE
from sdlora.generation.recipe import UsedHires
from sdlora.generation.request import LATENT_UPSCALERS, PIXEL_UPSCALERS, GenerationRequest
from sdlora.generation.upscaling.files import check_upscaler
from sdlora.storage import sha256_while_unchanged, user_path

_MOST_STRENGTH = 0.999
"""At more, as in AUTOMATIC1111, no step would be left out."""
_STEP = 8


@dataclass(frozen=True)
class Hires:
    """The second pass of a picture."""

    used: UsedHires
    upscaler: str
    """A name, or a file's path."""

    def size(self, first: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of the second pass, multiples of 8. Raises ConfigError for more than is possible."""
        width, height = (int(side * self.used.scale + 1e-6) // _STEP * _STEP for side in first)
        if max(width, height) > MAX_SIDE:
            raise ConfigError(
                f"hires_scale {self.used.scale:g} makes {width}x{height} pixels, at most {MAX_SIDE} a side are possible; "
                "choose a smaller scale"
            )
        return width, height

    @property
    def scheduled_steps(self) -> int:
        """How many steps a sampler is set to so that the last `used.steps` of them begin at the strength."""
        share = min(self.used.strength, _MOST_STRENGTH)
        return min(max(int(self.used.steps / share), self.used.steps), DDIM_MOST_STEPS) if share else self.used.steps

    @property
    def run_steps(self) -> int:
        """How many steps run."""
        return self.used.steps if self.used.strength else 0


def read_hires(request: GenerationRequest) -> Hires | None:
    """Return the request's second pass, None where it has none.

    Raises ConfigError for an upscaler of no known name, a picture too large or more steps than the sampler takes, FormatError for a file that is no upscaler.
    """
    if request.hires_scale == 1:
        return None
    named, digest = request.hires_upscaler, ""
    if named not in (*LATENT_UPSCALERS, *PIXEL_UPSCALERS):
        path = user_path(named)
        if path.suffix == "" and not path.exists():
            known = ", ".join((*LATENT_UPSCALERS, *PIXEL_UPSCALERS))
            raise ConfigError(f"hires_upscaler is {named!r}; expected {known}, or an ESRGAN file")
        check_upscaler(path)
        digest = sha256_while_unchanged(path)  # it has 67 MB, and a batch 10,000 requests that name it
    name = Path(named).stem if digest else named
    steps = request.hires_steps or request.steps
    hires = Hires(UsedHires(request.hires_scale, steps, request.hires_strength, name, digest), named)
    if request.sampler and hires.scheduled_steps > (most := SAMPLERS[request.sampler].most_steps):
        raise ConfigError(
            f"{steps} steps of a second pass at hires_strength {request.hires_strength:g} are the last of "
            f"{hires.scheduled_steps}, and the sampler {request.sampler} takes at most {most}; choose fewer hires_steps or "
            "a higher hires_strength"
        )
    hires.size((request.width, request.height))  # what is known of it before the base is
    return hires
