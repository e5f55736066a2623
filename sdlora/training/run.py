"""`train`: from a configuration to an adapter file."""

from __future__ import annotations

import importlib.util
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from sdlora.config import SamplesSection, TrainConfig, require_complete, with_preset, write_config
from sdlora.data.examples import CachedExample
from sdlora.data.source import fill_trigger
from sdlora.data.store import Together
from sdlora.errors import ConfigError, SdloraError
from sdlora.families.base import Conditioning, LoadedBase
from sdlora.families.detect import family_of
from sdlora.families.prediction import check_prediction
from sdlora.families.registry import default_device, load_base
from sdlora.families.schedule import rescale_to_zero_snr
from sdlora.families.sources import find_base
from sdlora.storage import check_writable
from sdlora.training.checks import check_against_base, refuse_inpainting
from sdlora.training.effect import Effect
from sdlora.training.events import EventLog
from sdlora.training.loop import TrainingLoop
from sdlora.training.material import ClassPictures, Material, OpenedData, open_data, prepare_material, trains_texts
from sdlora.training.objective import EncodedTexts
from sdlora.training.optim import Optimization
from sdlora.training.progress import ProgressView
from sdlora.training.saving import check_places, word_places
from sdlora.training.state import load_newest_state, run_identity
from sdlora.training.timesteps import timestep_tables
from sdlora.training.trainee import new_trainee

Preview = Callable[[LoadedBase, str, SamplesSection, Path], Sequence[Path]]
"""Makes the sample pictures: (base, name of its live adapter, what to make, folder) -> written files."""

_CHECKED_PICTURES = 2


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    adapter: Path
    folder: Path
    steps: int
    planned_steps: int
    interrupted: bool
    loss_before: float | None
    loss_after: float | None
    effect: Effect
    seconds: dict[str, float]
    main_process: bool
    """Whether this process wrote the files and should speak of the run; of several launched ones, the first."""
    embeddings: tuple[Path, ...] = ()
    """Files of new words beside `adapter`: those that it needs, or of several words without an adapter the others."""
    formats: Mapping[str, Path] = field(default_factory=dict)
    """{format: where the adapter is}, `adapter` among them."""


def train(
    config: TrainConfig, preview: Preview | None = None, class_pictures: ClassPictures | None = None
) -> RunResult:
    """Train an adapter as `config` says and return where it is and what it does.

    `preview` makes sample pictures, `class_pictures` those that data.prior.source = "generated" asks for. The run folder gets the adapter, config.toml, events.jsonl, samples and checkpoints. Ctrl-C ends the
    run after the current step with the adapter and a checkpoint saved. Raises SdloraError for anything
    a user can mend; a failed run overwrites no adapter.
    """
    require_complete(config)
    config = with_preset(config, family_of(find_base(config.base)).name if config.preset != "none" else "")
    folder = Path(config.output.folder).expanduser()
    _check_prompts(config)
    taken = _refuse_taken(folder, config)
    data = open_data(config)
    processes = _processes()
    main = processes.is_main_process
    if main:
        check_writable(folder)
        check_places(config, folder)
    processes.wait_for_everyone()
    accelerator = _accelerator(config, folder)
    # A run that was here keeps its events until another one really begins.
    events = EventLog(folder / "events.jsonl" if main and (config.training.resume or not taken) else None)
    try:
        return _train(config, preview, class_pictures, folder, data, accelerator, events)
    except BaseException as error:
        reason = str(error) if isinstance(error, SdloraError) else f"{type(error).__name__}: {error}"
        events.write("failed", reason=reason)
        raise
    finally:
        accelerator.end_training()
        events.close()


def _processes() -> PartialState:
    """Return the group of launched processes, which meet on the CPU where there is no GPU or --cpu was asked for."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu")


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Return the group as the loop uses it; precision is the base's own affair, whatever the launcher says."""
    if config.output.tracker == "none":
        return Accelerator(mixed_precision="no")
    if importlib.util.find_spec(config.output.tracker) is None:
        raise ConfigError(
            f"output.tracker is {config.output.tracker!r}, which is not installed; pip install {config.output.tracker}"
        )
    accelerator = Accelerator(mixed_precision="no", log_with=config.output.tracker, project_dir=folder)
    accelerator.init_trackers("tracker")
    return accelerator


def _train(
    config: TrainConfig,
    preview: Preview | None,
    class_pictures: ClassPictures | None,
    folder: Path,
    data: OpenedData,
    accelerator: Accelerator,
    events: EventLog,
) -> RunResult:
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        refuse_inpainting(config.base)
        base = load_base(config.base, accelerator.device, unet=False)
    check_against_base(config, base, data.training)
    view = ProgressView(visible=accelerator.is_main_process)
    view.say(f"base {base.source.name}: {base.family.title}, {base.dtype} on {base.device}".replace("torch.", ""))
    for line in data.summary:
        view.say(line)
    together = Together(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    with _timed(seconds, "encode"):
        material = prepare_material(config, base, data, together, view.say, class_pictures)
    config = material.config
    if preview is None or not config.samples.prompts:
        preview = None
        base.drop_encoders(keep_text=trains_texts(config))
    with _timed(seconds, "load"):
        _fetch_unet(config, base)
    for note in base.notes:
        view.say(note)
    warning = _check_prediction(base, material.examples, material.texts)
    loop = _make_loop(base, material, accelerator, events, preview, view)
    if config.training.resume:
        loop.restore(load_newest_state(folder / "checkpoints", loop.identity))
        view.say(f"resuming after step {loop.step}")
    if accelerator.is_main_process:
        _claim_folder(folder, config, events)
    if warning:
        events.write("warning", reason=warning)
        view.say(f"WARNING: {warning}")
    with _timed(seconds, "train"), stop_requests() as stop:
        outcome = loop.run(stop, folder)
        accelerator.wait_for_everyone()  # the first process may still be writing
    return RunResult(
        adapter=next(iter(outcome.saved.values())),
        folder=folder,
        steps=loop.step,
        planned_steps=config.training.steps,
        interrupted=outcome.interrupted,
        loss_before=loop.loss_before,
        loss_after=outcome.loss_after,
        effect=outcome.effect,
        seconds={key: round(value, 3) for key, value in seconds.items()},
        main_process=accelerator.is_main_process,
        embeddings=word_places(config, outcome.saved),
        formats=outcome.saved,
    )


def _fetch_unet(config: TrainConfig, base: LoadedBase) -> None:
    """The UNet's weights and the schedule are as training has them. Raises ConfigError for what they do not allow."""
    base.fetch_unet()
    if config.objective.zero_terminal_snr:
        rescale_to_zero_snr(base)
    timestep_tables(base.alphas_cumprod, base.prediction, config.objective)  # wrong weights are found before step 1


def _make_loop(
    base: LoadedBase,
    material: Material,
    accelerator: Accelerator,
    events: EventLog,
    preview: Preview | None,
    view: ProgressView,
) -> TrainingLoop:
    """Return the loop before its first step, what it trains in place in the base."""
    config = material.config
    trainee = new_trainee(base, config)
    if config.training.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    optimization = Optimization(
        config.optimizer, config.tokens, config.training.ema_decay, trainee.weights, config.training.steps
    )
    for note in optimization.notes:
        view.say(note)
    return TrainingLoop(
        config=config,
        base=base,
        material=material,
        trainee=trainee,
        optimization=optimization,
        accelerator=accelerator,
        events=events,
        preview=_sampler(config, base, preview),
        view=view,
        identity=run_identity(config, base.source.sha256, material.identity, accelerator.num_processes),
    )


def _check_prompts(config: TrainConfig) -> None:
    for prompt in config.samples.prompts:
        if "[trigger]" in prompt and not config.data.trigger:
            raise ConfigError(f"samples.prompts: {prompt!r} holds [trigger] but data.trigger is not set")


def _refuse_taken(folder: Path, config: TrainConfig) -> bool:
    """Return whether the folder holds a run. Raises ConfigError where that one would be overwritten by accident."""
    taken = (folder / "config.toml").exists()
    if taken and not (config.training.resume or config.output.overwrite):
        raise ConfigError(
            f"{folder}: already holds a run; choose another output.folder, go on with it "
            "(--training.resume True), or replace it (--output.overwrite True)"
        )
    return taken


def _claim_folder(folder: Path, config: TrainConfig, events: EventLog) -> None:
    """The folder is this run's: its settings and events are there, and nothing of an earlier run misleads."""
    if not config.training.resume:
        events.begin(folder / "events.jsonl")
        for checkpoint in (folder / "checkpoints").glob("state-*.pt"):
            checkpoint.unlink()
    # What was meant for this once is not to happen again when the file is used for another run.
    once = {
        "training": config.training.model_copy(update={"resume": False}),
        "output": config.output.model_copy(update={"overwrite": False}),
    }
    write_config(config.model_copy(update=once), folder / "config.toml")


def _check_prediction(base: LoadedBase, examples: Sequence[CachedExample], known: EncodedTexts) -> str:
    """Return a warning where the base seems to predict something else than it is taken to, else ""."""
    batch = [example for example in examples if example.bucket == examples[0].bucket][:_CHECKED_PICTURES]
    texts = [example.sample.caption for example in batch]
    if known:
        conditioning = Conditioning.concatenate([known[text] for text in texts])
    else:
        with torch.no_grad():
            conditioning = base.family.encode_prompts(base, texts)
    latents = torch.stack([example.posterior().mean for example in batch])
    try:
        return check_prediction(base, latents, conditioning, [example.size for example in batch])
    except torch.OutOfMemoryError:
        return "too little memory to check what the base predicts; training will need still more"


def _sampler(
    config: TrainConfig, base: LoadedBase, preview: Preview | None
) -> Callable[[str, Path], Sequence[Path]] | None:
    """Return what makes the sample pictures of a live adapter in a folder, triggers filled in."""
    if preview is None:
        return None
    prompts = tuple(fill_trigger(prompt, config.data.trigger) for prompt in config.samples.prompts)
    samples = config.samples.model_copy(update={"prompts": prompts})
    return lambda adapter, folder: preview(base, adapter, samples, folder)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C or termination signal sets the yielded event; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
