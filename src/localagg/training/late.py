"""Cluster labels that are computed beside the training and take effect at a step fixed before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_STEP = "late-step"
_LABELS = "late-labels"


class LateLabels:
    """Labels that take effect before the step ``due``, whenever their computation ends: training
    waits for them there. So a run does not depend on how fast they came.

    Args:
        labels: a future of them, int32 [H, N].
        due: the step.
    """

    def __init__(self, labels: Future[Tensor], due: int) -> None:
        self.due = due
        self._labels = labels

    @classmethod
    def begin(cls, compute: Callable[[], Tensor], due: int) -> "LateLabels":
        """Start to compute labels in a thread; on CUDA in a stream of its own.

        Args:
            compute: reads nothing that the training changes (a snapshot of the bank).
            due: the step.
        """
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the snapshot is taken now, not later
        threads = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        future = threads.submit(_in_own_stream, compute)
        threads.shutdown(wait=False)
        return cls(future, due)

    def wait(self) -> Tensor:
        """The labels, as soon as they are there.

        Raises:
            UserError: what their computation raised.
        """
        return self._labels.result()

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, which waits for the labels: so it needs no snapshot of the bank."""
        return {_LABELS: self.wait(), _STEP: torch.tensor([self.due])}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | str
    ) -> "LateLabels | None":
        """What :meth:`tensors` gave to a checkpoint; None where no labels were late."""
        if _STEP not in tensors:
            return None
        there: Future[Tensor] = Future()
        there.set_result(tensors[_LABELS].to(device))
        return cls(there, int(tensors[_STEP]))


def _in_own_stream(compute: Callable[[], Tensor]) -> Tensor:
    if not torch.cuda.is_initialized():
        return compute()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        labels = compute()
    stream.synchronize()
    return labels
