"""What only a run's base and data show to be wrong with its settings, found before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping

from sdlora.adapters.tokens import unheard_words
from sdlora.adapters.trainable import choose_targets
from sdlora.config import BaseSection, ObjectiveSection, TrainConfig
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase, Words
from sdlora.families.detect import detect_base
from sdlora.families.sources import find_base
from sdlora.families.traits import canonical
from sdlora.training.material import FoundSamples, possible_texts
from sdlora.training.optimizers import check_optimizer
from sdlora.training.rates import TOKENS, path_rates
from sdlora.training.timesteps import timestep_tables
from sdlora.training.trainee import first_words


def refuse_inpainting(base: BaseSection) -> None:
    """Raise ConfigError for an inpainting base, told from its headers; ModelError or FormatError for what is none at all."""
    if detect_base(find_base(base), base.variant).inpaints:
        raise ConfigError(
            f"base.path: {base.path} is an inpainting model, which is not trained on; train on the plain base that it was made "
            "from: the adapter acts on both"
        )


def check_against_base(config: TrainConfig, base: LoadedBase, training: FoundSamples) -> None:
    """The settings fit the base, whose UNet needs no weights yet, and the pictures. Raises ConfigError."""
    targets = choose_targets(base, config.adapter) if config.tokens.train != "alone" else {}
    words = first_words(base, config)
    paths = [canonical(component, path) for component, live in targets.items() for path in live]
    _check_second_encoder(config, base, targets)
    rates = path_rates(config.optimizer, config.tokens, [*paths, *([TOKENS] if words else [])])
    check_optimizer(config.optimizer, base.device, rates)
    _check_timesteps(config.objective, base)
    _check_heard(config, base, words, training)


def _check_second_encoder(config: TrainConfig, base: LoadedBase, targets: Mapping[str, object]) -> None:
    if config.optimizer.text_encoder_2_learning_rate and "text_encoder_2" not in targets:
        raise ConfigError(
            f"optimizer.text_encoder_2_learning_rate is {config.optimizer.text_encoder_2_learning_rate}, and this base "
            f"({base.family.title}) has no second text encoder; remove it, or set optimizer.text_encoder_learning_rate"
        )


def _check_timesteps(objective: ObjectiveSection, base: LoadedBase) -> None:
    # How they are weighted depends on what the base predicts, which may have to be measured with the UNet in place.
    unweighted = objective.model_copy(update={"weighting": "none"})
    timestep_tables(base.alphas_cumprod, base.prediction, unweighted)


def _check_heard(config: TrainConfig, base: LoadedBase, words: Words, training: FoundSamples) -> None:
    """Each new word is in some caption: it would else be trained to nothing."""
    if unheard := unheard_words(base, words, possible_texts(training, config.training.seed)):
        raise ConfigError(
            f'data.trigger: no caption holds {unheard[0]!r}, which tokens.train = "{config.tokens.train}" is to teach; '
            "set data.captions.insert_trigger = true, or write [trigger] into the captions"
        )
