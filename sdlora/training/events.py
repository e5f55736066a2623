"""`events.jsonl`: what happens in a run, one JSON object a line, for the page and for scripts.

Every line has `event` and `time` (seconds since 1970). The kinds and their fields:

- start: steps, pictures, trainable_parameters, device, precision, quantize, prediction, resumed_at_step
- warning: reason (the run goes on, but something about it looks wrong)
- step: step, loss, gradient_norm, learning_rate, examples_seen, images_per_second, eta_seconds
- skipped: step, reason (an optimizer step left out because of a non-finite loss or gradient)
- validation: step, loss
- sample: step, paths
- sample_failed: step, reason
- checkpoint: step, path (a state to resume from), or adapter path in `adapter`
- done: step, adapter, seconds, interrupted, effect
- failed: step, reason
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "start", "warning", "step", "skipped", "validation", "sample", "sample_failed", "checkpoint", "done", "failed"
]


class EventLog:
    """Appends events to a file; each line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: events go nowhere, as those of a process that is not the main one."""
        self._file = path.open("a", encoding="utf-8") if path else None

    def begin(self, path: Path) -> None:
        """Events go to `path` from now on, which holds none yet."""
        self.close()
        self._file = path.open("w", encoding="utf-8")

    def write(self, event: Kind, **fields: Any) -> None:
        """One line more is in the file."""
        if self._file:
            self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """The file is closed."""
        if self._file:
            self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run; a last line that is still being written is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
