"""Whole runs, small: what they learn, how a killed run ends, and what is refused."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from localagg import checkpoint
from localagg.config import override
from localagg.io.metrics_log import read_metrics
from localagg.recipes.builtin import recipe

QUICK = override(
    recipe("digits").config,
    epochs=3,
    ir_epochs=1,
    width=8,
    blocks=(1, 1),
    neighbors=64,
    clusters=(10, 20),
    kmeans_iterations=5,
    batch_size=100,
    eval_every=1,
    device="cpu",
    precision="32-true",
)


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, bank and clusters of the last checkpoint."""
    files = checkpoint.latest(run).glob("*.safetensors")
    return {
        f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()
    }


def assert_same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    lines = [read_metrics(run) for run in (one, other)]
    assert lines[0] == lines[1]
    assert floors(one) == floors(other)


def floors(run: Path) -> dict | None:
    """Floors in the summary of a finished run."""
    summary = checkpoint.read_progress(checkpoint.latest(run))["summary"]
    return summary and summary["floors"]
