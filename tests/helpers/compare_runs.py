"""Compare run folders bit-exactly."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from localagg import checkpoint
from localagg.io.metrics_log import read_metrics


def state(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint."""
    files = checkpoint.latest(run).glob("*.safetensors")
    return {f"{file.stem}/{n}": tensor for file in files for n, tensor in load_file(file).items()}


def assert_same_state(one: Path, other: Path) -> None:
    """Compare the tensors of the newest checkpoints."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_run(one: Path, other: Path) -> None:
    """Compare the newest checkpoints and the metrics."""
    assert_same_state(one, other)
    assert read_metrics(one) == read_metrics(other)
