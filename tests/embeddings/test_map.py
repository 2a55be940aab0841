import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from embeddings import blobs
from localagg.embeddings import map as map_module
from localagg.embeddings.map import kept_map, map_rows


def test_neighbors_stay_neighbors_and_the_map_is_reproducible():
    rows = torch.from_numpy(blobs([20] * 5))
    xy = map_rows(rows, seed=3)
    assert xy.shape == (100, 2)
    assert xy.dtype == torch.float32
    plane = PCA(2).fit_transform(rows.numpy())
    kept = trustworthiness(rows.numpy(), xy.numpy())
    assert kept > 0.95
    assert kept > trustworthiness(rows.numpy(), plane) + 0.02
    assert torch.equal(xy, map_rows(rows, seed=3))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 7])
def test_any_number_of_rows_has_a_map(count):
    xy = map_rows(torch.from_numpy(blobs([1] * 7))[:count])
    assert xy.shape == (count, 2)
    assert xy.isfinite().all()


def test_equal_rows_are_placed():
    xy = map_rows(torch.ones(30, 4) / 2)
    assert xy.isfinite().all()


def test_the_start_is_that_of_scikit_learn():
    rows = torch.from_numpy(blobs([30, 30, 30], spread=0.4))
    ours = map_module._principal_plane(rows, 0).numpy()
    theirs = PCA(2).fit_transform(rows.numpy())
    for axis in range(2):
        assert abs(np.corrcoef(ours[:, axis], theirs[:, axis])[0, 1]) > 0.999


def test_further_rows_are_placed_among_their_neighbors(monkeypatch, capfd):
    monkeypatch.setattr(map_module, "MOST", 100)
    rows = torch.from_numpy(blobs([60, 60, 60]))
    xy = map_rows(rows)
    assert "100 of 180" in capfd.readouterr().err
    centers = torch.stack([part.mean(dim=0) for part in xy.split(60)])
    assert torch.cdist(xy, centers).argmin(dim=1).tolist() == [0] * 60 + [1] * 60 + [2] * 60


def test_a_kept_map_is_read_only_for_the_same_rows(tmp_path, monkeypatch):
    rows, file = torch.from_numpy(blobs([8, 8])), tmp_path / "map.safetensors"
    xy = kept_map(file, rows)
    calls = []
    monkeypatch.setattr(map_module, "map_rows", lambda *a, **k: calls.append(a) or xy + 1)
    assert torch.equal(kept_map(file, rows), xy)
    assert not calls
    assert torch.equal(kept_map(file, rows.flip(0)), xy + 1)
    file.write_bytes(b"damaged")
    assert torch.equal(kept_map(file, rows), xy + 1)
    assert len(calls) == 2
