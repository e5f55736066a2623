"""The prompt language of AUTOMATIC1111, and choices from wildcards. What does not parse is text.

A picture's prompt goes through its choices (`wildcards.py`), tags, AND, schedule and weights in this order; `plan.py` has
what comes out at each step.
"""

from sdlora.families.traits import BREAK_SEGMENT
from sdlora.generation.prompts.attention import Composed, parse_attention, parse_composition
from sdlora.generation.prompts.schedule import parse_schedule
from sdlora.generation.prompts.tags import Tag, Tagged, parse_tags

__all__ = [
    "BREAK_SEGMENT",
    "Composed",
    "Tag",
    "Tagged",
    "parse_attention",
    "parse_composition",
    "parse_schedule",
    "parse_tags",
]
