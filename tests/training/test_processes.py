"""Two launched processes, which share every step."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoded import encode, encode_texts, picture_files
from forked import needs_fork
from launched import launched

from sdlora.adapters.trainable import new_adapter
from sdlora.cli.main import run_command
from sdlora.config import write_config
from sdlora.data.cache_folder import data_cache
from sdlora.diffusion import seed_from
from sdlora.training.events import read_events
from sdlora.training.material import Material
from sdlora.training.objective import batch_loss, prepare_batch, training_generator

ROOT = Path(__file__).parents[2]


def forked_two(file: Path, folder: Path) -> str:
    return "".join(launched(lambda: run_command("train", ["--config", str(file)]), folder))


def launched_two(file: Path, folder: Path) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, ROOT / "train" / "train_lora.py", "--config", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("shape", ["sd1"])  # launching is the same for every family
@pytest.mark.parametrize(
    "two_processes",
    [pytest.param(forked_two, marks=needs_fork), pytest.param(launched_two, marks=pytest.mark.slow)],
)
def test_two_processes_average_their_gradients_and_write_once(
    configure: Any, tiny_base: Any, tmp_path: Path, two_processes: Callable[[Path, Path], str]
) -> None:
    config = configure(training__steps=2, validation__folder="")
    write_config(config, tmp_path / "run.toml")
    assert two_processes(tmp_path / "run.toml", tmp_path).count("adapter: ") == 1
    folder = Path(config.output.folder)
    assert (folder / f"{config.output.name}.safetensors").is_file()
    steps = [event for event in read_events(folder / "events.jsonl") if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]

    base = tiny_base()
    examples = encode(base, config.data)
    texts = encode_texts(base, [example.sample.caption for example in examples])
    adapter = new_adapter(base, "trained", config.adapter, seed_from(config.training.seed, "adapter"))
    material = Material(config, examples, (), "", texts=texts)
    for rank in range(2):
        turns, full = material.batch(rank)
        drawn = prepare_batch(base, turns, full, config, training_generator(config, rank, 0))
        batch_loss(base, drawn, texts, config).backward()
    gradients = [weight.parameter.grad for weight in adapter.weights]
    sums = [float(gradient.square().sum()) for gradient in gradients if gradient is not None]
    assert steps[0]["gradient_norm"] == pytest.approx(math.sqrt(sum(sums)) / 2, rel=1e-3)
    assert steps[0]["examples_seen"] == sum(len(material.batch(rank)[0]) for rank in range(2))
    shards = picture_files(data_cache(config.data))
    assert shards  # each process wrote its half, and both trained on all
