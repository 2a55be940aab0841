"""What the steps of a run say, fetched late: no step waits for the device to answer.

A step leaves a few scalars on the device. Now and then those since the last time begin their way
to the host together, and are looked at when the next ones begin theirs.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What a step said."""

    number: int
    """Steps done with it."""
    facts: dict[str, Any]
    """What the host knew at the time: epoch, phase, learning rate."""
    index: Tensor
    """Its images, int64 [B], where they were."""
    values: dict[str, float]
    """What the device had to say."""
    finite: bool
    """Whether loss and gradient are."""


class Watch:
    """Scalars of steps on their way to the host, in the order of the steps."""

    last: Step | None = None
    """The newest step, before its values have come."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Step, list[str], Tensor]] = []
        self._sent: list[tuple[Step, list[str], Tensor]] = []
        self._arrived: Callable[[], list[float]] = list

    def put(
        self,
        number: int,
        facts: dict[str, Any],
        index: Tensor,
        values: dict[str, Tensor],
        gradient: Tensor,
    ) -> None:
        """A step is done. Nothing is waited for.

        Args:
            number: steps done with it.
            facts: what the host knows of it.
            index: int64 [B], its images.
            values: scalars on the device; "loss" is one of them.
            gradient: [B, D], of the loss.
        """
        finite = torch.isfinite(gradient).all()
        wide = torch.promote_types(values["loss"].dtype, torch.float32)
        scalars = torch.stack([value.detach().to(wide) for value in (finite, *values.values())])
        self.last = Step(number, facts, index, {}, True)
        self._waiting.append((self.last, list(values), scalars))

    def begin(self) -> list[Step]:
        """Send what waits, and give what was sent the last time."""
        found = self._receive()
        self._sent, self._waiting = self._waiting, []
        if self._sent:
            self._arrived = _send(torch.cat([scalars for *_, scalars in self._sent]))
        return found

    def finish(self) -> list[Step]:
        """Give all steps, waiting for the device."""
        return self.begin() + self.begin()

    def _receive(self) -> list[Step]:
        numbers = iter(self._arrived())
        found = []
        for step, names, _ in self._sent:
            gradient = bool(next(numbers))
            values = {name: next(numbers) for name in names}
            finite = gradient and math.isfinite(values["loss"])
            found.append(step._replace(values=values, finite=finite))
        self._sent, self._arrived = [], list
        return found


def _send(values: Tensor) -> Callable[[], list[float]]:
    """Begin a copy to the host; the result waits for its end."""
    copy = values.to("cpu", non_blocking=True)  # into pinned memory
    if not values.is_cuda:
        return copy.tolist
    end = torch.cuda.Event()
    end.record()

    def arrived() -> list[float]:
        end.synchronize()
        return copy.tolist()

    return arrived


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are finite.

    Args:
        tensors: (name, tensor); those that are not floating point are passed over.
    """
    named = [(name, t.detach()) for name, t in tensors if t.is_floating_point() and t.numel()]
    if not named:
        return None
    # Extremes pass on NaN, and take no memory, which isfinite does: a byte for each number.
    fine = [torch.stack(torch.aminmax(t)).float().isfinite().all() for _, t in named]
    answers = torch.stack([one.to(fine[0].device) for one in fine]).tolist()
    return next((name for (name, _), one in zip(named, answers, strict=True) if not one), None)
