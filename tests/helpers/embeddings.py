"""What the tests of embed share: a small network, its views, and a Ctrl-C."""

from pathlib import Path

import numpy as np

from localagg.checkpoint import save_weights
from localagg.config import ViewConfig
from localagg.embeddings.table import TableWriter
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


def small(path: Path, seed: int = 0):
    """Weights of a small network, and the network."""
    encoder = create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=seed)
    save_weights(path, encoder, VIEWS)
    return path, encoder.eval()


def rows_of(table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


def clean(folder: Path) -> bool:
    """Whether nothing hidden was left."""
    return not [path for path in folder.iterdir() if path.name.startswith(".")]


def stop_after(monkeypatch, batches: int) -> None:
    """Ctrl-C once so many batches have been written."""
    put, count = TableWriter._put, [0]

    def counted(self, rows):
        put(self, rows)
        count[0] += 1
        if count[0] == batches:
            raise KeyboardInterrupt

    monkeypatch.setattr(TableWriter, "_put", counted)
