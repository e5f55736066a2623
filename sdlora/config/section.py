"""What a table of settings is made of."""

from __future__ import annotations

import re
from functools import reduce
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def setting_at(section: Section, key: str) -> Any:
    """Return the value of a setting by its dotted name, such as "data.captions.shuffle"."""
    return reduce(getattr, key.split("."), section)


def is_file_stem(name: str) -> bool:
    """Return whether a file can be called so on every system."""
    return bool(re.fullmatch(r"[\w. -]+", name)) and not name.startswith(".")
