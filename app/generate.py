"""The Generate tab: prompt and settings in, a picture with its recipe out, beside the base's if wanted."""

from __future__ import annotations

import html
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

import sdlora
from sdlora.errors import GenerationCancelled, SdloraError

from .jobs import EngineJobs, Picture
from .library import Library, LibraryEntry
from .messages import duration, library_note, progress, status

_SEED_LIMIT = 2**32
_REMEMBERED_BASE_PICTURES = 32
_EMPTY = '<div class="empty"><span>Your picture appears here.</span></div>'

Updates = dict[Any, Any]
"""What an event changes: {component: new value or gr.update}."""


class GenerateTab:
    """Layout and events of the tab. `build` is called once, inside a gr.Blocks."""

    def __init__(self, jobs: EngineJobs, library: Library, output: Path) -> None:
        self._jobs = jobs
        self._library = library
        self._output = output
        self._base_pictures: OrderedDict[sdlora.GenerationRequest, Path] = OrderedDict()

    # --- layout ----------------------------------------------------------------------------------------

    def build(self, page: gr.Blocks) -> None:
        """The tab's components and events are in `page`."""
        with gr.Row(elem_id="ask"):
            with gr.Column(scale=5, min_width=280):
                self.prompt = gr.Textbox(
                    label="Prompt",
                    value="",
                    lines=2,
                    max_lines=8,
                    elem_id="prompt",
                    placeholder="What should the picture show?  (Ctrl or Cmd + Enter generates)",
                )
                with gr.Accordion("Negative prompt", open=False):
                    self.negative = gr.Textbox(
                        value="",
                        show_label=False,
                        container=False,
                        lines=2,
                        elem_id="negative",
                        placeholder="What it should not show",
                    )
            with gr.Column(scale=1, min_width=160):
                self.generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                self.cancel_button = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        with gr.Row(elem_id="work"):
            with gr.Column(scale=2, min_width=280):
                self._build_adapter()
                self._build_sampling()
            with gr.Column(scale=3, min_width=280):
                self._build_result()
        self._connect(page)

    def _build_adapter(self) -> None:
        self.refresh_button = gr.Button("Refresh", size="sm", render=False)
        with gr.Group():
            self.adapter = gr.Dropdown(
                [("None", "")], value="", label="Adapter", buttons=[self.refresh_button], elem_id="adapter"
            )
            self.weight = gr.Slider(-1, 2, 1, step=0.05, label="Weight", elem_id="weight")
            self.compare = gr.Checkbox(
                label="Compare with the base, same seed", value=False, interactive=False, elem_id="compare"
            )
        self.trigger_button = gr.Button("", size="sm", visible=False, elem_id="trigger")
        self.library_note = gr.HTML(elem_id="library-note")

    def _build_sampling(self) -> None:
        self.random_button = gr.Button("Random", size="sm", render=False)
        self.last_button = gr.Button("Last used", size="sm", render=False)
        with gr.Group():
            self.seed = gr.Number(
                label="Seed (-1: random)",
                value=-1,
                precision=0,
                buttons=[self.random_button, self.last_button],
                elem_id="seed",
            )
            self.steps = gr.Slider(1, 100, 25, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(0, 20, 7.5, step=0.5, label="Guidance", elem_id="guidance")
            with gr.Row():
                sides: dict[str, Any] = {"value": 0, "precision": 0, "step": 8, "min_width": 80}
                self.width = gr.Number(label="Width", elem_id="width", **sides)
                self.height = gr.Number(label="Height", elem_id="height", **sides)
        gr.HTML('<p class="hint">Width and height are multiples of 8; 0 is the base\'s own size.</p>')

    def _build_result(self) -> None:
        self.status = gr.HTML(status(f"Loading base {self._jobs.name} ..."), elem_id="status")
        self.empty = gr.HTML(_EMPTY)
        shared: dict[str, Any] = {"type": "filepath", "format": "png", "visible": False, "interactive": False}
        self.picture = gr.Image(
            show_label=False, buttons=["fullscreen"], elem_id="picture", elem_classes="picture", **shared
        )
        self.slider = gr.ImageSlider(
            show_label=False,
            buttons=["fullscreen"],
            elem_id="slider",
            elem_classes="picture",
            max_height=640,
            **shared,
        )
        self.caption = gr.HTML(elem_id="caption", visible=False)
        self.download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
        with gr.Accordion("Recipe", open=False, visible=False, elem_id="details") as self.details:
            self.infotext = gr.Textbox(
                label="As other programs read it",
                lines=4,
                interactive=False,
                buttons=["copy"],
                elem_id="infotext",
            )
            self.recipe = gr.JSON(label="Complete recipe", max_height=260)
        self.last_seed = gr.State(-1)

    def _connect(self, page: gr.Blocks) -> None:
        page.load(
            self.open_page,
            outputs=[self.adapter, self.library_note, self.status, self.width, self.height],
            api_name="open_page",
            api_visibility="undocumented",
            concurrency_limit=None,
            show_progress="hidden",
        )
        page.unload(self.leave_page)
        self._connect_settings()
        self._connect_generation()

    def _connect_settings(self) -> None:
        # Quick answers: not queued behind a picture, no spinner.
        quick: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        self.refresh_button.click(
            self.refresh, self.adapter, [self.adapter, self.library_note], api_name="refresh", **quick
        )
        self.adapter.change(
            self.choose_adapter,
            self.adapter,
            [self.compare, self.trigger_button],
            api_name="choose_adapter",
            **quick,
        )
        self.trigger_button.click(
            self.insert_trigger, [self.prompt, self.adapter], self.prompt, api_name="insert_trigger", **quick
        )
        self.random_button.click(lambda: -1, None, self.seed, api_name="random_seed", **quick)
        self.last_button.click(lambda seed: seed, self.last_seed, self.seed, api_name="last_seed", **quick)

    def _connect_generation(self) -> None:
        buttons = [self.status, self.generate_button, self.cancel_button]
        result = [self.empty, self.picture, self.slider, self.caption, self.download, self.details]
        result += [self.infotext, self.recipe, self.last_seed]
        asked = [self.prompt, self.negative, self.adapter, self.weight, self.compare, self.seed]
        asked += [self.steps, self.guidance, self.width, self.height]
        begun = self.generate_button.click(
            self.queue_up,
            outputs=buttons,
            api_name="queue_up",
            api_visibility="undocumented",
            queue=False,
            show_progress="hidden",
        )
        begun.then(
            self.generate,
            asked,
            [*buttons, *result],
            api_name="generate",
            concurrency_limit=None,  # the jobs take turns by themselves, and can be cancelled while they wait
            show_progress="hidden",
        )
        self.cancel_button.click(
            self.cancel,
            outputs=buttons,
            api_name="cancel",
            queue=False,
            show_progress="hidden",
        )

    # --- events ----------------------------------------------------------------------------------------

    def open_page(self) -> Iterator[Updates]:
        """The choices are up to date; once the base is loaded, its size is filled in."""
        yield {**self.refresh(""), self.status: status(f"Loading base {self._jobs.name} ...")}
        while not self._jobs.wait_for_base(seconds=1):
            yield {self.status: gr.skip()}  # a closed page ends the wait here
        if self._jobs.problem:
            yield {self.status: status(self._jobs.problem, "error")}
            return
        side = self._jobs.resolution
        ready = status("; ".join([f"Base {self._jobs.name} is ready, {side} px", *self._jobs.notes]) + ".")
        yield {self.status: ready, self.width: side, self.height: side}

    def leave_page(self, request: gr.Request) -> None:
        """The jobs of a page that was closed are cancelled."""
        self._jobs.cancel(request.session_hash or "")

    def refresh(self, chosen: str | None) -> Updates:
        """The dropdown lists the library as the disk has it now, and keeps its choice where possible."""
        entries = self._library.adapters()
        choices = [("None", ""), *((entry.name, entry.id) for entry in entries)]
        left = chosen if chosen in {entry.id for entry in entries} else ""
        note = library_note(self._library, len(entries))
        return {self.adapter: gr.update(choices=choices, value=left), self.library_note: note}

    def choose_adapter(self, chosen: str | None) -> Updates:
        """Comparing is on with an adapter and off without; the adapter's trigger word is offered."""
        entry = self._find(chosen)
        trigger = entry.trigger if entry else ""
        return {
            self.compare: gr.update(value=entry is not None, interactive=entry is not None),
            self.trigger_button: gr.update(value=f"Add trigger “{trigger}” to the prompt", visible=bool(trigger)),
        }

    def insert_trigger(self, prompt: str | None, chosen: str | None) -> str:
        """Return the prompt with the adapter's trigger word in it, in front unless it is there already."""
        entry, prompt = self._find(chosen), prompt or ""
        if not entry or not entry.trigger or entry.trigger.lower() in prompt.lower():
            return prompt
        return f"{entry.trigger}, {prompt}" if prompt.strip() else entry.trigger

    def queue_up(self, request: gr.Request) -> Updates:
        """The buttons show that a picture is on its way."""
        self._jobs.announce(request.session_hash or "")
        return self._busy("Waiting for another page's picture ..." if self._jobs.busy else "Starting ...")

    def cancel(self, request: gr.Request) -> Updates:
        """This page's job ends, and `generate` says so at once; a page that has none is free again.

        Gradio's own `cancels` is not used: it ends whatever this page runs by then, a later job too.
        """
        if self._jobs.cancel(request.session_hash or ""):
            return {self.status: gr.skip()}
        return self._idle(status("Cancelled."))

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        adapter: str | None,
        weight: float,
        compare: bool,
        seed: int | None,
        steps: int,
        guidance_scale: float,
        width: int | None,
        height: int | None,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Make a picture with an adapter, and beside it the base's picture of the same seed if `compare`."""
        try:
            entry = self._find(adapter)
            side = self._jobs.resolution
            values: dict[str, Any] = {
                "prompt": prompt or "",
                "negative_prompt": negative_prompt or "",
                "seed": secrets.randbelow(_SEED_LIMIT) if seed in (None, -1) else seed,
                "steps": steps,
                "guidance_scale": guidance_scale,
                "width": width or side,
                "height": height or side,
            }
            chosen = [{"path": str(entry.path), "weight": weight}] if entry else []
            wanted = sdlora.make_request(**values, adapters=chosen)
            base = sdlora.make_request(**values) if compare and entry else None
            yield from self._make(wanted, base, entry, request.session_hash or "")
        except GenerationCancelled:
            yield self._idle(status("Cancelled."))
        except SdloraError as error:
            yield self._idle(status(str(error), "error"))
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    # --- pictures --------------------------------------------------------------------------------------

    def _make(
        self,
        wanted: sdlora.GenerationRequest,
        base: sdlora.GenerationRequest | None,
        entry: LibraryEntry | None,
        owner: str,
    ) -> Iterator[Updates]:
        started = time.monotonic()
        files: dict[sdlora.GenerationRequest, Path] = {}
        if base and (known := self._known_base_picture(base)):
            files[base] = known
        requests = [request for request in (base, wanted) if request and request not in files]
        for report in self._jobs.run(requests, owner):
            if isinstance(report, Picture):
                request = requests[report.index]
                files[request] = self._save(report, "-base" if request is base else "")
            else:
                yield self._busy(*progress(report, self._jobs.name))
        if base:
            self._remember_base_picture(base, files[base])
        yield self._show(wanted, files[wanted], files[base] if base else None, entry, time.monotonic() - started)

    def _show(
        self,
        wanted: sdlora.GenerationRequest,
        file: Path,
        base_file: Path | None,
        entry: LibraryEntry | None,
        seconds: float,
    ) -> Updates:
        recipe = sdlora.read_recipe(file)
        with Image.open(file) as image:
            infotext = image.info["parameters"]
        facts = f"Seed {recipe.seed}, {recipe.steps} steps, {recipe.width}x{recipe.height}, {duration(seconds)}."
        caption = ""
        if base_file and entry:
            weight = wanted.adapters[0].weight
            caption = (
                f'<div class="sides"><span>◂ base</span>'
                f"<span>{html.escape(entry.name)}, weight {weight:g} ▸</span></div>"
            )
        return self._idle(status(facts)) | {
            self.empty: gr.update(visible=False),
            self.picture: gr.update(value=None if base_file else str(file), visible=not base_file),
            self.slider: gr.update(
                value=(str(base_file), str(file)) if base_file else None, visible=base_file is not None
            ),
            self.caption: gr.update(value=caption, visible=bool(caption)),
            self.download: gr.update(value=str(file), visible=True),
            self.details: gr.update(visible=True),
            self.infotext: infotext,
            self.recipe: asdict(recipe),
            self.last_seed: recipe.seed,
        }

    def _save(self, picture: Picture, ending: str) -> Path:
        """Return the new PNG of the picture, by day and time; no earlier file is replaced."""
        now = datetime.now()
        folder = self._output / f"{now:%Y-%m-%d}"
        stem = f"{now:%H%M%S}-{picture.recipe.seed}{ending}"
        path, number = folder / f"{stem}.png", 2
        while path.exists():
            path, number = folder / f"{stem}-{number}.png", number + 1
        return sdlora.save_picture(picture.image, picture.recipe, path)

    def _known_base_picture(self, request: sdlora.GenerationRequest) -> Path | None:
        """Return the base's picture of an earlier comparison: only the adapter has changed since."""
        path = self._base_pictures.get(request)
        return path if path and path.is_file() else None

    def _remember_base_picture(self, request: sdlora.GenerationRequest, path: Path) -> None:
        self._base_pictures[request] = path
        self._base_pictures.move_to_end(request)
        while len(self._base_pictures) > _REMEMBERED_BASE_PICTURES:
            self._base_pictures.popitem(last=False)

    def _find(self, chosen: str | None) -> LibraryEntry | None:
        return self._library.find(chosen) if chosen else None

    def _busy(self, text: str, share: float = 0.0) -> Updates:
        return {
            self.status: status(text, "busy", share),
            self.generate_button: gr.update(interactive=False),
            self.cancel_button: gr.update(interactive=True),
        }

    def _idle(self, status: str) -> Updates:
        return {
            self.status: status,
            self.generate_button: gr.update(interactive=True),
            self.cancel_button: gr.update(interactive=False),
        }
