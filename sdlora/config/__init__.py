"""One description of a training run, for TOML files, command-line flags, the page and the metadata.

Field descriptions are the documentation: `sdlora train --help` and docs/training.md show them.
"""

from sdlora.config.complete import require_complete, require_sound_data
from sdlora.config.data import (
    BucketsSection,
    CacheSection,
    CaptionsSection,
    ConceptSection,
    DataSection,
    MasksSection,
    PriorSection,
)
from sdlora.config.presets import with_preset, with_steps
from sdlora.config.reading import (
    field_descriptions,
    is_table,
    load_config,
    parse_config,
    put_setting,
    validated,
    write_config,
)
from sdlora.config.section import Section, setting_at
from sdlora.config.sections import (
    OPTIMIZERS,
    TARGET_PRESETS,
    AdapterSection,
    BaseSection,
    ObjectiveSection,
    OptimizerSection,
    Precision,
    Quantization,
    SamplesSection,
    TokensSection,
    TrainConfig,
)

__all__ = [
    "OPTIMIZERS",
    "TARGET_PRESETS",
    "AdapterSection",
    "BaseSection",
    "BucketsSection",
    "CacheSection",
    "CaptionsSection",
    "ConceptSection",
    "DataSection",
    "MasksSection",
    "ObjectiveSection",
    "OptimizerSection",
    "Precision",
    "PriorSection",
    "Quantization",
    "SamplesSection",
    "Section",
    "TokensSection",
    "TrainConfig",
    "field_descriptions",
    "is_table",
    "load_config",
    "parse_config",
    "put_setting",
    "require_complete",
    "require_sound_data",
    "setting_at",
    "validated",
    "with_preset",
    "with_steps",
    "write_config",
]
