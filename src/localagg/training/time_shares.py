"""Measure how a run's time divides into its parts."""

import contextlib
import time
from collections.abc import Iterator

import torch


class TimeShares:
    """Seconds by part of a run, for the table at its end.

    CUDA runs asynchronously, so there each part waits for the device at both ends. To spare the
    other steps these waits, only every 20th step is timed and its seconds are scaled up.
    """

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self._every = 20 if self._wait else 1
        self._step = 0
        self.seconds: dict[str, float] = {}

    def next_step(self) -> None:
        """Count a step."""
        self._step += 1

    @contextlib.contextmanager
    def __call__(self, part: str, *, once: bool = False) -> Iterator[None]:
        """Time the block as a part of the step, or of the run if ``once``."""
        if not once and self._step % self._every:
            yield
            return
        if self._wait:
            self._wait()
        start = time.perf_counter()
        yield
        if self._wait:
            self._wait()
        spent = (time.perf_counter() - start) * (1 if once else self._every)
        self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def shares(self) -> dict[str, float]:
        """Return each part's share of the sum, in [0, 1]."""
        total = sum(self.seconds.values()) or 1.0
        return {part: spent / total for part, spent in self.seconds.items()}
