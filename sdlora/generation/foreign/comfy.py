"""From ComfyUI's graph, the `prompt` of its pictures, to a foreign recipe: the way back from the picture to its sampler."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from sdlora.errors import FormatError
from sdlora.generation.foreign.recipe import (
    LONGEST_PROMPT,
    ForeignAdapter,
    ForeignRecipe,
    as_integer,
    as_number,
    as_text,
    parse_object,
    weighted_prompt,
)

_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_PARTS_OF_SAMPLERS = ("sigmas", "sampler", "noise", "guider")
_LATENT_WAYS = ("samples", "latent_image", "latent", "pixels", "image", "images")
_TEXT_WAYS = ("conditioning", "conditioning_1", "conditioning_to")
_LITERALS = ("value", "text", "string", "Text", "seed", "int", "float", "number", "wildcard_text")
_LORAS = ("LoraLoader", "LoraLoaderModelOnly")
_SAMPLER_NAMES = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS", "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "ddim": "DDIM", "uni_pc": "UniPC", "lcm": "LCM",
}  # fmt: skip
_SCHEDULE_NAMES = {
    "normal": "Normal", "karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform",
    "simple": "Simple", "ddim_uniform": "DDIM", "beta": "Beta", "kl_optimal": "KL Optimal",
}  # fmt: skip
_MOST_NODES, _LONGEST_WAY, _DEEPEST = 20_000, 200, 32
_EMBEDDING = re.compile(r"embedding:([\w.\-/\\]+)")


def foreign_comfy(text: str) -> ForeignRecipe:
    """Return what a graph says. Raises FormatError, without a file's name, for what is none or has no sampler."""
    return _Walk(parse_object(text, "its ComfyUI prompt")).recipe()


class _Walk:
    """A graph, {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}, and what was met on the way back."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self._nodes = {
            key: node
            for key, node in list(graph.items())[:_MOST_NODES]
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        }
        self._left_out: dict[str, None] = {}

    def recipe(self) -> ForeignRecipe:
        """Return what the sampler that began the picture was told."""
        last = self._last_sampler()
        sampler, latent = self._first_sampler(last)
        said = self._said_to(sampler)
        positive, negative = self._text(said.get("positive"), 0), self._text(said.get("negative"), 1)
        models = list(self._chain(said.get("model"), "model"))
        clips = list(self._chain(positive[1], "clip"))
        settings = self._settings(said, latent) | self._clip_skip(clips)
        adapters = [*self._loras(models, clips), *_embeddings(positive[0], negative[0])]
        names = [as_text(self._inputs(node).get("ckpt_name")) for node in models if "ckpt_name" in self._inputs(node)]
        return ForeignRecipe(
            program="ComfyUI",
            prompt=_comfy_prompt(positive[0]),
            negative_prompt=_comfy_prompt(negative[0]),
            settings=settings,
            base=_stem(names[0]) if names else "",
            adapters=tuple(adapters),
            left_out=tuple(self._left_out),
        )

    # --- samplers ------------------------------------------------------------------------------------

    def _last_sampler(self) -> str:
        """Return the sampler nearest to a saved picture. Raises FormatError where there is none."""
        ends = [key for key in self._nodes if re.search("Save|Preview", self._class(key))]
        for start in (ends, list(self._nodes)):
            found = next((key for key in self._upstream(start) if self._class(key) in _SAMPLERS), None)
            if found is not None:
                return found
        raise FormatError(f"its ComfyUI graph has no sampler that is known ({', '.join(_SAMPLERS)})")

    def _first_sampler(self, sampler: str) -> tuple[str, str | None]:
        """Return the sampler that began the picture, and the node that gave it its empty latents, None for a picture."""
        place, seen = self._linked(sampler, "latent_image"), {sampler}
        while place is not None and place not in seen:
            seen.add(place)
            kind = self._class(place)
            if re.fullmatch(r"Empty\w*Latent\w*", kind):
                return sampler, place
            if kind in _SAMPLERS:
                self._leave_out("a second pass over the finished picture")
                sampler, following = place, self._linked(place, "latent_image")
            else:
                self._leave_out(f"node {kind}")
                following = next((found for way in _LATENT_WAYS if (found := self._linked(place, way))), None)
            place = following
        self._leave_out("the picture that it began from")
        return sampler, None

    def _said_to(self, sampler: str) -> dict[str, Any]:
        """Return a sampler's inputs, with those of the nodes that some samplers are put together from."""
        said: dict[str, Any] = {}
        for part in _PARTS_OF_SAMPLERS:
            place = self._linked(sampler, part)
            said |= self._inputs(place) if place is not None else {}
        return said | self._inputs(sampler)

    def _settings(self, said: Mapping[str, Any], latent: str | None) -> dict[str, Any]:
        seed = said.get("noise_seed", said.get("seed"))
        settings: dict[str, Any] = {
            "seed": as_integer(self._literal(seed)),
            "steps": as_integer(self._literal(said.get("steps"))),
            "guidance_scale": as_number(self._literal(said.get("cfg"))),
            "emphasis": "comfy",
        }
        for name, key, known in (
            ("sampler", "sampler_name", _SAMPLER_NAMES),
            ("schedule", "scheduler", _SCHEDULE_NAMES),
        ):
            value = as_text(self._literal(said.get(key)))
            settings[name] = known.get(value)
            if value and value not in known:
                self._leave_out(f"{name} {value[:40]!r}")
        if latent is not None:
            inputs = self._inputs(latent)
            settings |= {side: as_integer(self._literal(inputs.get(side))) for side in ("width", "height")}
            if (as_integer(self._literal(inputs.get("batch_size"))) or 1) > 1:
                self._leave_out("its place in a batch, whose noise is drawn at once")
        denoise, start = as_number(self._literal(said.get("denoise"))), as_integer(said.get("start_at_step"))
        if (denoise is not None and denoise < 1) or (start or 0) > 0:
            self._leave_out("that only the last steps were made")
        return {name: value for name, value in settings.items() if value is not None}

    # --- prompts and models --------------------------------------------------------------------------

    def _text(self, link: object, output: int) -> tuple[str, object]:
        """Return the text of a conditioning, and the link to what encoded it."""
        place, seen = self._target(link), set[str]()
        while place is not None and place not in seen:
            seen.add(place)
            inputs = self._inputs(place)
            for name in ("text", "text_g", "text_l"):
                if name in inputs:
                    return as_text(self._literal(inputs[name])), inputs.get("clip")
            if self._class(place) != "ConditioningZeroOut":
                self._leave_out(f"node {self._class(place)}")
            else:
                return "", None
            ways = (*_TEXT_WAYS, ("positive", "negative")[output])
            place = next((found for way in ways if (found := self._linked(place, way)) is not None), None)
        if link is not None:
            self._leave_out(f"the {('', 'negative ')[output]}prompt, which no known node gives")
        return "", None

    def _chain(self, link: object, way: str) -> Iterator[str]:
        """Yield the nodes that a model or text encoder went through, the last first."""
        place, seen = self._target(link), set[str]()
        while place is not None and place not in seen and len(seen) < _LONGEST_WAY:
            seen.add(place)
            yield place
            known = self._class(place) in (*_LORAS, "CLIPSetLastLayer") or "ckpt_name" in self._inputs(place)
            if not known:
                self._leave_out(f"node {self._class(place)}")
            place = self._linked(place, way)

    def _loras(self, models: list[str], clips: list[str]) -> Iterator[ForeignAdapter]:
        for place in dict.fromkeys([*reversed(models), *reversed(clips)]):
            if self._class(place) not in _LORAS:
                continue
            inputs = self._inputs(place)
            unet = as_number(self._literal(inputs.get("strength_model"))) if place in models else 0.0
            text = as_number(self._literal(inputs.get("strength_clip"))) if place in clips else 0.0
            weight, text = 1.0 if unet is None else unet, 1.0 if text is None else text
            name = _stem(as_text(self._literal(inputs.get("lora_name"))))
            yield ForeignAdapter(name, weight, None if text == weight else text)

    def _clip_skip(self, clips: list[str]) -> dict[str, int]:
        for place in clips:
            layer = as_integer(self._literal(self._inputs(place).get("stop_at_clip_layer")))
            if layer is not None and layer < 0:
                return {"clip_skip": -layer}
        return {}

    # --- nodes ---------------------------------------------------------------------------------------

    def _class(self, place: str) -> str:
        return as_text(self._nodes[place].get("class_type"))[:60]

    def _inputs(self, place: str) -> dict[str, Any]:
        found: dict[str, Any] = self._nodes[place]["inputs"]
        return found

    def _target(self, link: object) -> str | None:
        """Return the node that a link leads to, None where it is none or leads nowhere."""
        if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int):
            return str(link[0]) if str(link[0]) in self._nodes else None
        return None

    def _linked(self, place: str, name: str) -> str | None:
        return self._target(self._inputs(place).get(name))

    def _literal(self, value: object) -> object:
        """Return a value, or what the nodes that hold single values say where it is linked to one."""
        for _ in range(_DEEPEST):
            place = self._target(value)
            if place is None:
                return None if isinstance(value, list | dict) else value
            inputs = self._inputs(place)
            value = next((inputs[name] for name in _LITERALS if name in inputs), None)
        return None

    def _upstream(self, starts: Iterable[str]) -> Iterator[str]:
        """Yield the nodes and all that they are made from, the nearest first, each once."""
        waiting = deque(starts)
        seen = set(waiting)
        while waiting:
            place = waiting.popleft()
            yield place
            for value in self._inputs(place).values():
                found = self._target(value)
                if found is not None and found not in seen:
                    seen.add(found)
                    waiting.append(found)

    def _leave_out(self, what: str) -> None:
        self._left_out[what] = None


def _stem(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name.removesuffix(".safetensors")[:200]


def _embeddings(*prompts: str) -> Iterator[ForeignAdapter]:
    names = dict.fromkeys(_stem(match[1]).rstrip(".") for prompt in prompts for match in _EMBEDDING.finditer(prompt))
    for name in names:
        yield ForeignAdapter(name, embedding=True)


# --- ComfyUI's weights -------------------------------------------------------------------------------


def _comfy_prompt(text: str) -> str:
    """Return the prompt in the language of requests: ComfyUI knows brackets alone, and (a:1.2) in another is 1.2 all the same."""
    named = _EMBEDDING.sub(lambda match: _stem(match[1]), text[:LONGEST_PROMPT])
    return weighted_prompt(_weighted(named, 1.0, 0))


def _weighted(text: str, weight: float, depth: int) -> list[tuple[str, float]]:
    """Return a text in segments with their weights."""
    segments: list[tuple[str, float]] = []
    for part, inside in _groups(text):
        if not inside or depth >= _DEEPEST:
            segments.append((part, weight))
            continue
        body, colon, end = part.rpartition(":")
        stated = as_number(end) if colon and body else None
        inner, own = (part, weight * 1.1) if stated is None else (body, stated)
        segments += _weighted(inner, own, depth + 1)
    if depth == 0:
        return [(re.sub(r"\\([()])", r"\1", part), own) for part, own in segments]
    return segments


def _groups(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text outside all brackets, and those inside the outermost, without these."""
    start, level, opened = 0, 0, 0
    for match in re.finditer(r"\\[()]|[()]", text):
        if match[0] == "(":
            if level == 0:
                yield text[start : match.start()], False
                start, opened = match.end(), match.start()
            level += 1
        elif match[0] == ")" and level:
            level -= 1
            if level == 0:
                yield text[start : match.start()], True
                start = match.end()
    yield text[opened if level else start :], False
