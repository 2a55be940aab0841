"""Shared by the tests of embeddings: a small network, its views, and a Ctrl-C."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from localagg.checkpoint import save_weights
from localagg.config import ViewConfig
from localagg.embeddings.table import table_schema
from localagg.embeddings.tables.table_writer import TableWriter
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


def save_small_encoder(path: Path, seed: int = 0):
    """Write the weights of a small network; return (path, network)."""
    encoder = create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=seed)
    save_weights(path, encoder, VIEWS)
    return path, encoder.eval()


def save_table(path: Path, rows: np.ndarray, labels: list[str] | None = None) -> Path:
    """Write a table of given embeddings [N, F], of the images 0.jpg, 1.jpg, ..."""
    facts = dict.fromkeys(("weights_digest", "views", "precision", "layer"))
    facts |= {"weights": "none", "dtype": "float32", "dim": rows.shape[1], "labels": labels and ""}
    facts["columns"] = {"embedding": rows.shape[1]}
    columns = {"path": [f"{row}.jpg" for row in range(len(rows))], "index": [*range(len(rows))]}
    columns["split"] = ["train"] * len(rows)
    columns |= {"label": labels} if labels else {}
    embedding = rows.astype(np.float32).tolist()
    pq.write_table(pa.table(columns | {"embedding": embedding}, table_schema(facts)), path)
    return path


def blobs(sizes: list[int], *, dim: int = 16, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    """Unit rows float32 [sum of sizes, dim] around as many random directions, in order."""
    draws = np.random.default_rng(seed)
    centers = np.repeat(draws.normal(size=(len(sizes), dim)), sizes, axis=0)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    rows = centers + spread * draws.normal(size=centers.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


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
