"""DPM++ 2S a: a singlestep solver of second order, with new noise behind every step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import KDPM2AncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from sdlora.families.samplers.sigmas import sigmas_of, timesteps_at


class DPMPlusPlus2SAncestralScheduler(KDPM2AncestralDiscreteScheduler):
    """DPM-Solver++(2S) (Lu et al. 2022 b, algorithm 1) down to a level below the next one, and noise back up to it.

    Both evaluations of a step are where DPM2 a has its own: the second half way down in the logarithm. What leads
    there and down is the solver's for the denoised picture. The last step has one evaluation and ends in its picture.
    """

    timesteps: Any
    sample: Any

    def set_timesteps(self, num_inference_steps: int, *arguments: Any, **options: Any) -> None:
        """The sampler is set to so many steps, with timesteps between whole ones where the levels are."""
        super().set_timesteps(num_inference_steps, *arguments, **options)
        training = sigmas_of(self.alphas_cumprod.cpu().numpy())
        levels = self.sigmas[: 2 * num_inference_steps - 1 : 2].cpu().double().numpy()
        self.timesteps = self.timesteps.float()
        self.timesteps[::2] = torch.from_numpy(timesteps_at(levels, training)).to(self.timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return (latents, denoised) behind this evaluation; a step's noise is drawn behind its second."""
        if self.step_index is None:
            self._init_step_index(timestep)
        is_first = self.state_in_first_order
        place = self.step_index if is_first else self.step_index - 1
        sigma, half_way = self.sigmas[place], self.sigmas_interpol[place]
        denoised = self._denoised(model_output.float(), sample.float(), sigma if is_first else half_way)
        begun = sample if is_first else self.sample
        reached = (half_way if is_first else self.sigmas_down[place]) / sigma
        latents = reached * begun.float() + (1 - reached) * denoised
        if not is_first:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            latents = latents + noise.float() * self.sigmas_up[place]
        self.sample = sample if is_first else None
        self._step_index += 1
        return latents.to(sample.dtype), denoised

    def _denoised(self, predicted: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.config.prediction_type == "v_prediction":
            return noisy / (sigma**2 + 1) - predicted * sigma / (sigma**2 + 1) ** 0.5
        return noisy - sigma * predicted
