"""Batches of two pictures and their losses, for the tests of the objective."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import encode, encode_texts
from PIL import Image

from sdlora.adapters.trainable import new_adapter
from sdlora.config import TrainConfig
from sdlora.data.sample import Concept
from sdlora.diffusion import add_noise, draw_timesteps, step_generator
from sdlora.training.objective import Turn, batch_loss, prepare_batch

CLASS = "a picture of a thing"


@pytest.fixture
def prepare(configure: Any, tiny_base: Any) -> Any:
    """`prepare(...)`: configuration, base, two turns and texts, of a run with such settings."""

    def make(**values: Any) -> Any:
        config = configure(data__buckets={"enabled": False}, **values)
        base = tiny_base()
        turns = [Turn(example, example.sample.caption) for example in encode(base, config.data)[:2]]
        return config, base, turns, encode_texts(base, [CLASS, *(turn.text for turn in turns)])

    return make


def batch_of(config: TrainConfig, base: Any, turns: Any, seed: int = 3) -> Any:
    return prepare_batch(base, turns, config.training.batch_size, config, step_generator(seed, 0, 0))


def loss_of(config: TrainConfig, base: Any, turns: Any, texts: Any, seed: int = 3) -> float:
    with torch.no_grad():
        return float(batch_loss(base, batch_of(config, base, turns, seed), texts, config))


def drawn(base: Any, turns: Any, seed: int = 3) -> Any:
    """Latents, noise, timesteps and noisy latents of two 64-pixel turns, as the loss draws them."""
    generator = step_generator(seed, 0, 0)
    posterior_noise, noise = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    timesteps = draw_timesteps(2, torch.ones(1000), generator)
    posteriors = [turn.example.posterior() for turn in turns]
    latents = torch.stack([p.mean + p.std * n for p, n in zip(posteriors, posterior_noise, strict=True)])
    return noise, timesteps, add_noise(latents, noise, timesteps, base.alphas_cumprod)


def predict(base: Any, noisy: Any, timesteps: Any, texts: Any, words: Any) -> torch.Tensor:
    states = torch.cat([texts[word].states for word in words])
    with torch.no_grad():
        return base.unet(noisy, timesteps, encoder_hidden_states=states).sample


def marked(turns: Any, **settings: Any) -> Any:
    """The turns with other settings of their concept; `prior` marks them as pictures of other things."""
    prior = settings.pop("prior", False)
    own = turns[0].example.sample.concept.settings
    concept = Concept("x", own.model_copy(update=settings), prior)
    return [
        replace(turn, example=replace(turn.example, sample=replace(turn.example.sample, concept=concept)))
        for turn in turns
    ]


def live_adapter(config: TrainConfig, base: Any) -> Any:
    parameters = idle_adapter(config, base)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    return parameters


def idle_adapter(config: TrainConfig, base: Any) -> Any:
    return [weight.parameter for weight in new_adapter(base, "live", config.adapter, seed=1).weights]


def changed_objective(config: TrainConfig, **values: Any) -> TrainConfig:
    return config.model_copy(update={"objective": config.objective.model_copy(update=values)})


def noise_share(base: Any, batch: Any) -> torch.Tensor:
    """How much of a batch's noise is in each noisy latent."""
    return (1 - base.alphas_cumprod[batch.rows.timesteps]).sqrt().view(-1, 1, 1, 1)


def with_data(config: TrainConfig, **prior: Any) -> TrainConfig:
    data = config.data.model_copy(update={"prior": config.data.prior.model_copy(update=prior)})
    return config.model_copy(update={"data": data})


@pytest.fixture
def masked(prepare: Any, settings: Any) -> Any:
    """As `prepare`, the first picture's left half white in its mask, the second without a mask."""
    folder = Path(settings["data"]["folder"])
    grey = np.zeros((64, 64), np.uint8)
    grey[:, :32] = 255
    Image.fromarray(grey).save(folder / "0-masklabel.png")
    return prepare
