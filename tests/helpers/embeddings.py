"""Shared by the tests of embeddings: a small network, its views, and a Ctrl-C."""

from pathlib import Path

import numpy as np

from localagg.checkpoint import save_weights
from localagg.config import ViewConfig
from localagg.embeddings.table_writer import TableWriter
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


def save_small_encoder(path: Path, seed: int = 0):
    """Write the weights of a small network; return (path, network)."""
    encoder = create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=seed)
    save_weights(path, encoder, VIEWS)
    return path, encoder.eval()


def stacked_rows(table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def interrupt_after(monkeypatch, batches: int) -> None:
    """Raise KeyboardInterrupt once so many batches have been written."""
    write, written = TableWriter.write, []

    def counted(self, batch, *arguments):
        write(self, batch, *arguments)
        written.append(batch)
        if len(written) == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(TableWriter, "write", counted)
