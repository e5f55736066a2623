"""The text in an adapter's header, by which other programs show, search and match it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sdlora.config import TrainConfig
from sdlora.families.base import LoadedBase


@dataclass(frozen=True)
class ConceptFacts:
    """What a run knows of one concept."""

    trigger: str
    repeats: int
    pictures: int


@dataclass(frozen=True)
class TrainingFacts:
    """What a finished or saved run knows about itself."""

    steps: int
    epochs: int
    concepts: Sequence[ConceptFacts]
    resolution: int
    buckets: bool
    """Whether pictures of any concept keep their aspect ratio."""
    started: float
    finished: float


def training_metadata(config: TrainConfig, base: LoadedBase, facts: TrainingFacts) -> dict[str, str]:
    """Return the ss_* and modelspec.* entries of an adapter. No captions, no paths, no user names.

    `ss_tag_frequency`, which other programs show as trigger words, holds the triggers alone.
    """
    name = config.output.name
    triggers = list(dict.fromkeys(concept.trigger for concept in facts.concepts if concept.trigger))
    several = len(facts.concepts) > 1
    folders = {f"{name}-{n}" if several else name: concept for n, concept in enumerate(facts.concepts, 1)}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.adapter.rank),
        "ss_network_alpha": f"{config.adapter.alpha:g}",
        "ss_network_args": "{}",
        "ss_output_name": name,
        "ss_sd_model_name": base.source.path.name,
        "ss_sd_model_hash": base.source.sha256[:10],
        "ss_new_sd_model_hash": base.source.sha256,
        "ss_resolution": f"({facts.resolution}, {facts.resolution})",
        "ss_enable_bucket": str(facts.buckets),
        "ss_num_train_images": str(sum(concept.pictures for concept in facts.concepts)),
        "ss_num_epochs": str(facts.epochs),
        "ss_steps": str(facts.steps),
        "ss_max_train_steps": str(config.training.steps),
        "ss_total_batch_size": str(config.training.batch_size),
        "ss_gradient_accumulation_steps": str(config.training.accumulate_batches),
        "ss_unet_lr": f"{config.optimizer.learning_rate:g}",
        "ss_learning_rate": f"{config.optimizer.learning_rate:g}",
        "ss_optimizer": config.optimizer.kind,
        "ss_lr_scheduler": config.optimizer.schedule,
        "ss_seed": str(config.training.seed),
        "ss_min_snr_gamma": f"{config.training.min_snr_gamma:g}" if config.training.min_snr_gamma else "None",
        "ss_mixed_precision": str(base.dtype).removeprefix("torch."),
        "ss_training_started_at": f"{facts.started:.3f}",
        "ss_training_finished_at": f"{facts.finished:.3f}",
        "ss_dataset_dirs": json.dumps(
            {key: {"n_repeats": concept.repeats, "img_count": concept.pictures} for key, concept in folders.items()}
        ),
        "ss_tag_frequency": json.dumps(
            {key: {concept.trigger: concept.pictures} for key, concept in folders.items() if concept.trigger}
        ),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.date": datetime.fromtimestamp(facts.finished, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.prediction_type": base.prediction,
    }
    if config.adapter.text_encoder:
        metadata["ss_text_encoder_lr"] = f"{config.optimizer.text_encoder_learning_rate:g}"
    if triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(triggers)
    return metadata | dict(base.family.metadata[base.prediction])
