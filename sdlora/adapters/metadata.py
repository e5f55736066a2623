"""The text in an adapter's header, by which other programs show, search and match it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sdlora.adapters.layers import AdapterLayer, LohaLayer, LokrLayer, LoraLayer
from sdlora.adapters.live import bare, locate
from sdlora.adapters.sizes import has_large_kernel
from sdlora.config import AdapterSection, ObjectiveSection, TrainConfig
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
    """Return the ss_* and modelspec.* entries that say how it was trained. No captions, no paths, no user names.

    `ss_tag_frequency`, which other programs show as trigger words, holds the triggers alone.
    """
    name = config.output.name
    triggers = list(dict.fromkeys(concept.trigger for concept in facts.concepts if concept.trigger))
    several = len(facts.concepts) > 1
    folders = {f"{name}-{n}" if several else name: concept for n, concept in enumerate(facts.concepts, 1)}
    metadata = {
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
        "ss_optimizer": config.optimizer.kind,
        "ss_lr_scheduler": config.optimizer.schedule,
        "ss_seed": str(config.training.seed),
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
    metadata |= _objective(config.objective)
    if triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(triggers)
    return metadata | dict(base.family.metadata[base.prediction])


def trained_metadata(config: TrainConfig, base: LoadedBase, layers: Mapping[str, AdapterLayer]) -> dict[str, str]:
    """Return the entries that say what was trained: the kind and size of `layers` if there are any, and the rates."""
    metadata = _network(config.adapter, base, layers) if layers else {}
    optimizer, components = config.optimizer, {path.partition(".")[0] for path in layers}
    first = optimizer.text_encoder_learning_rate
    encoders = {"text_encoder": first, "text_encoder_2": optimizer.text_encoder_2_learning_rate or first}
    if rates := list(dict.fromkeys(f"{rate:g}" for name, rate in encoders.items() if name in components)):
        metadata["ss_text_encoder_lr"] = rates[0] if len(rates) == 1 else f"[{', '.join(rates)}]"
    if "unet" in components:
        metadata["ss_unet_lr"] = metadata["ss_learning_rate"] = f"{optimizer.learning_rate:g}"
    if config.tokens.train != "none":
        metadata["sdlora_tokens_lr"] = f"{config.tokens.learning_rate:g}"
        metadata.setdefault("ss_learning_rate", metadata["sdlora_tokens_lr"])
    return metadata


def _network(section: AdapterSection, base: LoadedBase, layers: Mapping[str, AdapterLayer]) -> dict[str, str]:
    """Return what kind of adapter it is, in the words of kohya's trainer and, for its other kinds, of LyCORIS.

    Rank and alpha are those that most of the layers are written with; kinds without a rank have none.
    """
    arguments: dict[str, str] = {}
    if section.kind != "lora" or section.dora:
        arguments["algo"] = section.kind
    if section.dora:
        arguments["dora_wd"] = "True"
    if section.rank_stabilized:
        arguments["rs_lora"] = "True"
    modules = dict(base.components())
    sizes: dict[bool, Counter[tuple[int, float]]] = {False: Counter(), True: Counter()}
    for path, layer in layers.items():
        if size := _size(layer):
            sizes[has_large_kernel(bare(locate(modules, path)))][size] += 1
    small, large = (found.most_common(1)[0][0] if found else None for found in (sizes[False], sizes[True]))
    if large:
        arguments |= {"conv_dim": str(large[0]), "conv_alpha": f"{large[1]:g}"}
    metadata = {
        "ss_network_module": "lycoris.kohya" if "algo" in arguments else "networks.lora",
        "ss_network_args": json.dumps(arguments),
        "ss_network_dropout": f"{section.dropout:g}" if section.dropout else "None",
        "ss_scale_weight_norms": f"{section.max_norm:g}" if section.max_norm else "None",
    }
    if usual := small or large:
        metadata |= {"ss_network_dim": str(usual[0]), "ss_network_alpha": f"{usual[1]:g}"}
    return metadata


def _size(layer: AdapterLayer) -> tuple[int, float] | None:
    """Return rank and alpha of a layer, None where they say nothing of its update."""
    inner = layer.inner
    if isinstance(inner, LokrLayer) and not (isinstance(inner.w1, tuple) or isinstance(inner.w2, tuple)):
        return None
    return (inner.rank, inner.alpha) if isinstance(inner, LoraLayer | LohaLayer | LokrLayer) else None


def _objective(section: ObjectiveSection) -> dict[str, str]:
    """Return what was learnt from each example, under the names that kohya's trainer gives these settings."""

    def number(value: float, used: bool = True) -> str:
        return f"{value:g}" if value and used else "None"

    huber = section.loss == "huber"
    return {
        "ss_loss_type": {"mse": "l2"}.get(section.loss, section.loss),
        "ss_huber_c": number(section.huber_c, huber),
        "ss_huber_schedule": section.huber_schedule if huber else "None",
        "ss_min_snr_gamma": number(section.min_snr_gamma, section.weighting == "min-snr"),
        "ss_debiased_estimation": str(section.weighting == "debiased"),
        "ss_noise_offset": number(section.noise_offset),
        "ss_multires_noise_discount": number(section.pyramid_discount),
        "ss_ip_noise_gamma": number(section.input_perturbation),
        "ss_zero_terminal_snr": str(section.zero_terminal_snr),
    }
