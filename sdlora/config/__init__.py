"""One description of a training run, for TOML files, command-line flags, the page and the metadata.

Field descriptions are the documentation: `sdlora train --help` and docs/training.md show them.
"""

from sdlora.config.data import (
    BucketsSection,
    CacheSection,
    CaptionsSection,
    ConceptSection,
    DataSection,
    MasksSection,
    PriorSection,
)
from sdlora.config.reading import (
    field_descriptions,
    load_config,
    parse_config,
    put_setting,
    require_complete,
    require_sound_data,
    setting_at,
    validated,
    write_config,
)
from sdlora.config.section import Section
from sdlora.config.sections import (
    TARGET_PRESETS,
    AdapterSection,
    BaseSection,
    OptimizerSection,
    Precision,
    Quantization,
    SamplesSection,
    TrainConfig,
)

__all__ = [
    "TARGET_PRESETS",
    "AdapterSection",
    "BaseSection",
    "BucketsSection",
    "CacheSection",
    "CaptionsSection",
    "ConceptSection",
    "DataSection",
    "MasksSection",
    "OptimizerSection",
    "Precision",
    "PriorSection",
    "Quantization",
    "SamplesSection",
    "Section",
    "TrainConfig",
    "field_descriptions",
    "load_config",
    "parse_config",
    "put_setting",
    "require_complete",
    "require_sound_data",
    "setting_at",
    "validated",
    "write_config",
]
