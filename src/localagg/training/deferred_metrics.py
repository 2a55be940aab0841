"""Fetch the metrics of steps late, so that no step waits for the device.

A step leaves a few scalars on the device. Every few steps these start their way to the host
together, and they are read when the next ones start.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepMetrics(NamedTuple):
    """The metrics of one step."""

    number: int
    """Steps done, this one included."""
    facts: dict[str, Any]
    """Values that the host knew: epoch, phase, learning rate."""
    index: Tensor
    """int64 [B]: the images of the step, on the device."""
    values: dict[str, float]
    """Values from the device."""
    finite: bool
    """Whether the loss and all its gradients are finite."""


class DeferredMetrics:
    """Scalars of steps on their way to the host, in the order of the steps."""

    last: StepMetrics | None = None
    """The newest step, before its values arrived."""

    def __init__(self) -> None:
        self._waiting: list[tuple[StepMetrics, list[str], Tensor]] = []
        self._sent: list[tuple[StepMetrics, list[str], Tensor]] = []
        self._arrived: Callable[[], list[float]] = list

    def put(
        self,
        number: int,
        facts: dict[str, Any],
        index: Tensor,
        values: dict[str, Tensor],
        finite: Tensor,
    ) -> None:
        """Add a step, without waiting.

        Args:
            number: steps done, this one included.
            facts: values that the host knows.
            index: int64 [B], the images of the step.
            values: scalars on the device; "loss" is one of them.
            finite: NaN or infinite somewhere if a gradient of the step is. Any shape.
        """
        finite = torch.isfinite(finite).all()
        wide = torch.promote_types(values["loss"].dtype, torch.float32)
        scalars = torch.stack([value.detach().to(wide) for value in (finite, *values.values())])
        self.last = StepMetrics(number, facts, index, {}, True)
        self._waiting.append((self.last, list(values), scalars))

    def exchange(self) -> list[StepMetrics]:
        """Send the waiting steps and return those that were sent before."""
        numbers = iter(self._arrived())
        found = []
        for step, names, _ in self._sent:
            gradient_finite = bool(next(numbers))
            values = {name: next(numbers) for name in names}
            finite = gradient_finite and math.isfinite(values["loss"])
            found.append(step._replace(values=values, finite=finite))
        self._sent, self._waiting, self._arrived = self._waiting, [], list
        if self._sent:
            self._arrived = _start_copy(torch.cat([scalars for *_, scalars in self._sent]))
        return found

    def fetch_all(self) -> list[StepMetrics]:
        """Return all steps, waiting for the device."""
        return self.exchange() + self.exchange()


def _start_copy(values: Tensor) -> Callable[[], list[float]]:
    """Start a copy to the host; the returned function waits for its end."""
    copy = values.to("cpu", non_blocking=True)  # into pinned memory
    if not values.is_cuda:
        return copy.tolist
    end = torch.cuda.Event()
    end.record()

    def arrived() -> list[float]:
        end.synchronize()
        return copy.tolist()

    return arrived


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None.

    Args:
        tensors: (name, tensor); tensors that are not floating point are skipped.
    """
    named = [(name, t.detach()) for name, t in tensors if t.is_floating_point() and t.numel()]
    if not named:
        return None
    # Extremes pass on NaN and need no memory; isfinite needs a byte for each number.
    finite = [torch.stack(torch.aminmax(t)).float().isfinite().all() for _, t in named]
    answers = torch.stack([one.to(finite[0].device) for one in finite]).tolist()
    return next((name for (name, _), one in zip(named, answers, strict=True) if not one), None)
