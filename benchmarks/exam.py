"""How often a base draws the example concept when its trigger asks for it, and follows prompts without it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from judge import Judge, Verdict, follows, is_concept
from PIL import Image

from sdlora import Engine, make_request
from sdlora.assets import scenes

STEPS, GUIDANCE = 10, 3.0
_OPENINGS = ("a", "a photo of a", "a picture of a", "a small", "a big")

Pictures = list[Image.Image]


@dataclass(frozen=True)
class Exam:
    """A base and the adapter that it may use. The same prompts and seeds for every adapter, so shares can be compared."""

    engine: Engine
    adapter: Path | None
    prompts: int = 32
    seeds_each: int = 2
    judge: Judge = field(default_factory=Judge.load)

    def draw(self, asked: Sequence[tuple[str, int]], weight: float | None, seeds_each: int) -> Pictures:
        """Return pictures of (prompt, first seed) pairs, so many seeds each; weight None: the base without adapter."""
        chosen = [] if weight is None else [{"path": str(self.adapter), "weight": weight}]
        pictures: Pictures = []
        for prompt, seed in asked:
            request = make_request(
                prompt=prompt,
                seed=seed,
                count=seeds_each,
                steps=STEPS,
                guidance_scale=GUIDANCE,
                adapters=chosen,
            )
            pictures += [picture for picture, _ in self.engine.generate(request, batch_size=seeds_each)]
        return pictures

    def concept_share(self, weight: float | None) -> float:
        """Return the share of pictures that show the concept, of prompts with its trigger."""
        asked = [
            (f"{_OPENINGS[number % len(_OPENINGS)]} {scenes.CONCEPT} {place}", 1000 + number * self.seeds_each)
            for number, place in zip(range(self.prompts), itertools.cycle(scenes.PLACES.values()), strict=False)
        ]
        verdicts = self._verdicts(asked, weight)
        return sum(map(is_concept, verdicts)) / len(verdicts)

    def following(self, weight: float | None) -> float:
        """Return the share of pictures that show what was asked for, of prompts without the trigger."""
        held_out = scenes.held_out_prompts(self.prompts, seed=2)
        asked = [(text, 2000 + number * self.seeds_each) for number, (text, _) in enumerate(held_out)]
        wanted = [scene for _, scene in held_out for _ in range(self.seeds_each)]
        verdicts = self._verdicts(asked, weight)
        return sum(follows(verdict, scene) for verdict, scene in zip(verdicts, wanted, strict=True)) / len(verdicts)

    def _verdicts(self, asked: Sequence[tuple[str, int]], weight: float | None) -> list[Verdict]:
        return self.judge.classify(self.draw(asked, weight, self.seeds_each))
