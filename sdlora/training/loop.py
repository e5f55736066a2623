"""The training loop, from the first optimizer step to the saved adapter."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.metadata import TrainingFacts, training_metadata
from sdlora.config import TrainConfig
from sdlora.errors import DataError, TrainingError
from sdlora.families.base import LoadedBase
from sdlora.training.effect import Effect, measure_effect
from sdlora.training.events import EventLog
from sdlora.training.material import Material
from sdlora.training.micro import MicroBatches
from sdlora.training.objective import DrawnBatch, batch_loss, prepare_batch, training_generator, validation_loss
from sdlora.training.optim import Optimization
from sdlora.training.processor import training_on_cpu
from sdlora.training.progress import ProgressView
from sdlora.training.saving import places, save_finished, save_on_the_way
from sdlora.training.state import TrainingState, save_state
from sdlora.training.trainee import ADAPTER, Trainee

_BAD_STEPS_IN_A_ROW = 3


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    saved: Mapping[str, Path]
    """{format: where the adapter is}, the one that most programs read first."""
    interrupted: bool
    loss_after: float | None
    effect: Effect


@dataclass
class TrainingLoop:
    """The moving parts of a run. `step` counts finished optimizer steps, `examples_seen` all processes' examples."""

    config: TrainConfig
    base: LoadedBase
    material: Material
    trainee: Trainee
    optimization: Optimization
    accelerator: Accelerator
    events: EventLog
    preview: Callable[[str, Path], Sequence[Path]] | None
    view: ProgressView
    identity: str
    step: int = 0
    examples_seen: int = 0
    loss_before: float | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._scaler = torch.amp.GradScaler(
            self.base.device.type, enabled=self.base.dtype == torch.float16 and self.base.device.type == "cuda"
        )
        # Its scale is made by the first loss, which one process may see before another.
        self._scaler.scale(torch.zeros((), device=self.base.device))
        self.optimization.limit = self.trainee.after_step
        self._micro = MicroBatches(self.config.training.micro_batch, self.optimization.parameters, self.view.say)

    def restore(self, state: TrainingState) -> None:
        """The loop stands where `state` was saved, ready for its next step."""
        self.trainee.restore_weights(state.weights)
        self.optimization.load_state_dict(state.optimizer)
        self.step, self.examples_seen, self.loss_before = state.step, state.examples_seen, state.loss_before

    def run(self, stop: threading.Event, folder: Path) -> Outcome:
        """Train to the last step or until `stop` is set, and save the adapter. Raises TrainingError."""
        with training_on_cpu(self._work()) if self.base.device.type == "cpu" else nullcontext():
            return self._run(stop, folder)

    def _work(self) -> int:
        """Return the latent positions of a batch times the UNet's parameters."""
        parameters = sum(parameter.numel() for parameter in self.base.unet.parameters())
        width, height = self.material.examples[0].bucket
        return self.config.training.batch_size * (width // 8) * (height // 8) * parameters

    def _run(self, stop: threading.Event, folder: Path) -> Outcome:
        steps = self.config.training.steps
        first, seen_first = self.step, self.examples_seen
        began = time.perf_counter()
        self._announce(first)
        if self.loss_before is None:
            self.loss_before = self._validate()
        self._train_mode(True)
        bad_steps = 0
        with self.view.counting(steps, first):
            while self.step < steps and not self._asked_to_stop(stop):
                loss, norm = self._optimize_or_save(folder)
                finite = math.isfinite(loss) and math.isfinite(norm)
                bad_steps = 0 if finite else bad_steps + 1
                self.step += 1
                if not finite:
                    self._skip(loss, norm, bad_steps)
                    continue
                elapsed = time.perf_counter() - began
                eta = elapsed / (self.step - first) * (steps - self.step)
                rate = (self.examples_seen - seen_first) / elapsed
                self.view.step(self.step, loss, rate, eta)
                self.events.write(
                    "step",
                    step=self.step,
                    loss=round(loss, 6),
                    gradient_norm=round(norm, 6),
                    learning_rate=self.optimization.learning_rate(self.step - 1),
                    examples_seen=self.examples_seen,
                    images_per_second=round(rate, 3),
                    eta_seconds=round(eta, 1),
                )
                self.accelerator.log({"loss": loss, "gradient_norm": norm}, step=self.step)
                if self.step < steps:
                    self._periodic(folder)
            return self._finish(folder, time.perf_counter() - began)

    def _optimize_or_save(self, folder: Path) -> tuple[float, float]:
        """As `_optimize`; where an example can no longer be read, the state of the last whole step is saved first."""
        try:
            return self._optimize()
        except DataError:
            self._save_state(folder)
            raise

    def _optimize(self) -> tuple[float, float]:
        """One optimizer step over all micro-batches; returns loss and gradient norm before clipping.

        A step whose loss or gradient is not finite changes nothing.
        """
        training = self.config.training
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.optimization.begin(self.step)
        total = 0.0
        for index in range(training.accumulate_batches):
            number = (self.step * training.accumulate_batches + index) * world
            turns, full = self.material.batch(number + rank)
            generator = training_generator(self.config, rank, self.examples_seen)
            drawn = prepare_batch(self.base, turns, full, self.config, generator)
            total += self._micro.run(drawn, self._backward) / training.accumulate_batches
            self.examples_seen += sum(len(self.material.order.batch(number + other).draws) for other in range(world))
        self.optimization.average_gradients(self.accelerator)
        norm = self.optimization.clip(self._scaler)
        if math.isfinite(total) and math.isfinite(norm):
            self.optimization.apply(self._scaler)
        self.optimization.end(self._scaler)
        return total, norm

    def _backward(self, part: DrawnBatch) -> float:
        """The gradients of a part of a batch are added to the others; returns its loss."""
        loss = batch_loss(self.base, part, self.material.texts, self.config)
        if loss.requires_grad:  # while words alone are trained, nothing of a batch without them does
            self._scaler.scale(loss / self.config.training.accumulate_batches).backward()
        return float(loss.detach())

    def _skip(self, loss: float, norm: float, in_a_row: int) -> None:
        reason = f"loss {loss}, gradient norm {norm}"
        self.events.write("skipped", step=self.step, reason=reason)
        if in_a_row >= _BAD_STEPS_IN_A_ROW and not self._scaler_searching():
            raise TrainingError(
                f"step {self.step}: {reason} for {in_a_row} steps in a row; the run has diverged and its adapter "
                "was not saved; lower optimizer.learning_rate "
                f"(it is {self.config.optimizer.learning_rate:g}) or use base.precision bf16 or fp32"
            )
        self.view.say(f"step {self.step} left out: {reason}")

    def _scaler_searching(self) -> bool:
        """Return whether fp16's loss scale is still being lowered, which skips a few steps by design."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > 1.0

    def _periodic(self, folder: Path) -> None:
        """Validation, samples, adapters and checkpoints that fall due after this step."""
        config = self.config

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        if due(config.validation.every_steps):
            self._validate()
        if due(config.samples.every_steps):
            self._sample(folder)
        if due(config.output.save_every_steps):
            path = folder / f"{config.output.name}-{self.step:06d}.safetensors"
            adapter = self._adapter()
            if self.accelerator.is_main_process:
                save_on_the_way(adapter, path, config)
            self.events.write("checkpoint", step=self.step, adapter=str(path))
        if due(config.training.checkpoint_every_steps):
            self._save_state(folder)

    def _finish(self, folder: Path, seconds: float) -> Outcome:
        interrupted = self.step < self.config.training.steps
        self._train_mode(False)
        saved = places(self.config, folder)
        adapter = self._adapter()
        if self.accelerator.is_main_process:
            save_finished(adapter, self.config, folder)  # before anything else can fail
        with self.optimization.averaged():
            effect = measure_effect(self.trainee, self.material.examples, self.material.texts)
        if interrupted:
            self._save_state(folder)
        loss_after = None if interrupted else self._validate()
        if not interrupted:
            self._sample(folder)
        self.events.write(
            "done",
            step=self.step,
            adapter=str(next(iter(saved.values()))),
            formats={format: str(path) for format, path in saved.items()},
            seconds=round(seconds, 3),
            interrupted=interrupted,
            effect=asdict(effect),
        )
        return Outcome(saved, interrupted, loss_after, effect)

    def _adapter(self) -> AdapterFile:
        """Return the adapter as it is now, averaged where averages are kept."""
        batches = self.step * self.config.training.accumulate_batches * self.accelerator.num_processes
        facts = TrainingFacts(
            steps=self.step,
            epochs=self.material.order.epoch_of(max(0, batches - 1)) + 1,
            concepts=self.material.concept_facts(),
            resolution=self.material.resolution(self.base),
            buckets=self.material.uses_buckets(),
            started=self.started,
            finished=time.time(),
        )
        with self.optimization.averaged():
            return self.trainee.file(training_metadata(self.config, self.base, facts))

    def _save_state(self, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        state = TrainingState(
            step=self.step,
            examples_seen=self.examples_seen,
            weights=self.trainee.copy_weights(),
            optimizer=self.optimization.state_dict(),
            loss_before=self.loss_before,
            identity=self.identity,
        )
        path = save_state(folder / "checkpoints", state)
        self.events.write("checkpoint", step=self.step, path=str(path))

    def _validate(self) -> float | None:
        if not self.material.validation:
            return None
        training = self._train_mode(False)
        levels = self.config.validation.timesteps
        with self.optimization.averaged():
            loss = validation_loss(self.base, self.material.validation, self.material.texts, levels)
        self._train_mode(training)
        self.events.write("validation", step=self.step, loss=round(loss, 6))
        self.accelerator.log({"validation_loss": loss}, step=self.step)
        return loss

    def _train_mode(self, training: bool) -> bool:
        """Dropout acts, or it does not; returns whether it did before."""
        before: bool = self.base.unet.training
        for module in (self.base.unet, *self.base.text_encoders.values()):
            module.train(training)
        return before

    def _sample(self, folder: Path) -> None:
        """Sample pictures of this step are written; whatever goes wrong with them never ends the run."""
        if self.preview is None or not self.accelerator.is_main_process:
            return
        training = self._train_mode(False)
        try:
            target = folder / "samples" / f"step-{self.step:06d}"
            with self.optimization.averaged():
                paths = self.preview(ADAPTER, target)
            self.events.write("sample", step=self.step, paths=[str(path) for path in paths])
        except Exception as error:  # a picture is worth less than the run
            self.events.write("sample_failed", step=self.step, reason=str(error))
            self.view.say(f"samples of step {self.step} failed and are left out: {error}")
        finally:
            self._train_mode(training)

    def _announce(self, resumed_at: int) -> None:
        device = self.base.device
        self.events.write(
            "start",
            steps=self.config.training.steps,
            pictures=len(self.material.examples),
            trainable_parameters=sum(weight.parameter.numel() for weight in self.trainee.weights),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            precision=str(self.base.dtype).removeprefix("torch."),
            quantize=self.base.quantize,
            prediction=self.base.prediction,
            resumed_at_step=resumed_at,
        )

    def _asked_to_stop(self, stop: threading.Event) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.is_set()
        flag: Any = torch.tensor(float(stop.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)
