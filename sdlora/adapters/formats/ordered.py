"""The format of cloneofsimo's trainer, the first LoRA for Stable Diffusion: layers are numbered, not named.

`unet:<i>:up`, `unet:<i>:down` and `text_encoder:<i>:up`, `:down`, in the order in which that trainer met the layers of
SD 1.x and 2.x; the header says which module classes it looked into. New words lie beside them under their own names,
marked `<embed>` in the header. There is no alpha: scale is 1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from sdlora.adapters.formats.parts import LORA, input_width
from sdlora.adapters.formats.places import Places, Shapes, Sorting

NAME = "cloneofsimo"
EMBED = "<embed>"

_KEY = re.compile(r"(unet|text_encoder):(\d{1,4}):(up|down)")
_PART = {"down": LORA[0], "up": LORA[1]}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")  # as they stand in transformers' CLIPAttention
_WIDTHS = {"down_blocks": (320, 640, 1280), "mid_block": (1280,), "up_blocks": (1280, 640, 320)}
_CROSS = {768: "sd1", 1024: "sd2"}
_TEXT_LAYERS = {768: 12, 1024: 23}
_SIDES = (("down_blocks", "up_blocks", "mid_block"), ("down_blocks", "mid_block", "up_blocks"))
"""Orders in which versions of diffusers registered the UNet's blocks."""


def places(shapes: Shapes, metadata: Mapping[str, str]) -> Places | None:
    """Return where the tensors belong; None where the keys are none of the format's."""
    numbered: dict[tuple[str, int], dict[str, str]] = {}
    unknown = []
    for key in sorted(shapes):
        if match := _KEY.fullmatch(key):
            numbered.setdefault((match[1], int(match[2])), {})[_PART[match[3]]] = key
        elif metadata.get(key) != EMBED:
            unknown.append(key)
    if not numbered:
        return None
    sorting, problems = Sorting(), []
    for component in ("unet", "text_encoder"):
        found = {number: keys for (name, number), keys in sorted(numbered.items()) if name == component}
        widths = [input_width({part: shapes[key] for part, key in keys.items()}) for keys in found.values()]
        paths = _order(component, list(found), widths)
        if found and not paths:
            problems.append(
                f"its {len(found)} layers {component}:0 to {component}:{max(found)} stand in no order that is known"
            )
        for path, keys in zip(paths, found.values(), strict=False):
            for part, key in keys.items():
                sorting.add(key, f"{component}.{path}", part, key.rpartition(":")[0])
    for key in unknown:
        sorting.reject(key)
    placed = sorting.places({LORA[0]: "down", LORA[1]: "up"})
    return Places(placed.layers, placed.unknown, (*placed.problems, *problems))


def words(keys: Iterable[str], metadata: Mapping[str, str]) -> list[str]:
    """Return the keys of the new words' vectors."""
    if EMBED not in metadata.values():
        return []
    return [key for key in keys if metadata.get(key) == EMBED]


def family_of(found: Places, shapes: Shapes) -> str:
    """Return "sd1" or "sd2" as the width of cross-attention, or of the text encoder, tells it."""
    for ending in ("attn2.to_k", "self_attn.q_proj"):
        widths = {input_width(found.shapes_of(path, shapes)) for path in found.layers if path.endswith(ending)}
        if len(widths) == 1:
            return _CROSS.get(widths.pop(), "")
    return ""


def _order(component: str, numbers: list[int], widths: list[int]) -> list[str]:
    """Return the paths of the layers in the order whose input widths are these; none where no known order fits."""
    if numbers != list(range(len(numbers))):
        return []
    if component == "text_encoder":
        count = _TEXT_LAYERS.get(widths[0] if widths else 0, 0)
        paths = [f"text_model.encoder.layers.{i}.self_attn.{name}" for i in range(count) for name in _TEXT]
        return paths if len(paths) == len(widths) and len(set(widths)) == 1 else []
    for cross, side, feed_forward in itertools.product(_CROSS, _SIDES, (True, False)):
        expected = list(_unet_layers(cross, side, feed_forward))
        if [width for _, width in expected] == widths:
            return [path for path, _ in expected]
    return []


def _unet_layers(cross: int, sides: tuple[str, ...], feed_forward: bool) -> Iterator[tuple[str, int]]:
    """Yield (path, input width) of what the trainer met: in each block attn1, the feed-forward's gate, attn2."""
    for side in sides:
        for block, width in enumerate(_WIDTHS[side]):
            place = {"down_blocks": f"down_blocks.{block}", "up_blocks": f"up_blocks.{block + 1}"}.get(side, side)
            for attention in range({"down_blocks": 2, "mid_block": 1, "up_blocks": 3}[side]):
                path = f"{place}.attentions.{attention}.transformer_blocks.0"
                yield from ((f"{path}.attn1.{name}", width) for name in _ATTENTION)
                if feed_forward:
                    yield f"{path}.ff.net.0.proj", width
                for name in _ATTENTION:
                    yield f"{path}.attn2.{name}", cross if name in ("to_k", "to_v") else width
