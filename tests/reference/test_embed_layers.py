"""The command line's features of the fixtures' checkpoint are the reference program's."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from localagg.cli.main import main

pytestmark = [pytest.mark.reference, pytest.mark.slow]
LAYERS = ("1", "3", "5", "7", "9")


def test_import_then_embed_layers(fixtures, tmp_path):
    network = fixtures / "networks" / "resnet18"
    recorded = dict(np.load(network / "outputs.npz"))
    for i, image in enumerate(recorded["images"]):  # the view is the central 224 of 256 pixels
        padded = np.pad(image, ((16, 16), (16, 16), (0, 0)))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(padded).save(tmp_path / "images" / f"{i}.png", compress_level=1)
    weights, table = str(tmp_path / "la.safetensors"), tmp_path / "features.parquet"
    prefix = str(network / "checkpoint" / "model.ckpt-10")
    assert main(["import-tf", prefix, "--model", "preact_resnet18", "--out", weights]) == 0
    words = ["embed", weights, "--data", str(tmp_path / "images"), "--out", str(table)]
    assert main([*words, "--workers", "0", "--layer", *LAYERS]) == 0
    columns = pq.read_table(table)
    assert columns["path"].to_pylist() == [f"{i}.png" for i in range(4)]
    for layer in LAYERS:
        found = np.array(columns[f"layer_{layer}"].to_pylist(), np.float64)
        size = int(recorded[f"layer_{layer}_dim"])
        assert found.shape == (4, size)
        signs = np.random.RandomState(7).randint(0, 2, size=(size, 8), dtype=np.int8) * 2 - 1
        strided = np.linspace(0, size - 1, 64).astype(np.int64)
        for name, values in (
            ("first64", found[:, :64]),
            ("strided64", found[:, strided]),
            ("mean", found.mean(1)),
            ("std", found.std(1)),
            ("l2", np.linalg.norm(found, axis=1)),
            ("sign_proj8", found @ signs),
        ):
            due = recorded[f"layer_{layer}_{name}"]
            assert np.abs(values - due).max() / np.abs(due).max() < 5e-5, (layer, name)
