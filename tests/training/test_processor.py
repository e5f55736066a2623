"""What training changes about the process, and that it is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sdlora.training.processor import training_on_cpu


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("work", "threads"),
    [
        (1 * 16 * 16 * 6_000_000, 1),  # the tiny base, batch 1
        (8 * 16 * 16 * 6_000_000, 2),
        (1 * 32 * 32 * 860_000_000, 2),  # SD 1.5 at 256 pixels
    ],
)
def test_only_steps_too_small_to_share_run_on_one_thread(two_threads: None, work: int, threads: int) -> None:
    with training_on_cpu(work):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_threads_are_put_back_after_a_failure(two_threads: None) -> None:
    with pytest.raises(RuntimeError), training_on_cpu(1):
        raise RuntimeError
    assert torch.get_num_threads() == 2
