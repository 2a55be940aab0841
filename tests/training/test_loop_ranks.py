"""Whole runs on several ranks: numbers as on one rank, shards in checkpoints, invalid options."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import rank_cases
import torch
from damage import middle_lost
from expect import user_error
from ranks import Pool
from safetensors.torch import load_file, save_file
from small_runs import floors

from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.cli.main import main
from localagg.config import PretrainConfig, override, to_dict
from localagg.io.metrics_log import read_metrics
from localagg.io.sharded_tensors import find_shards, read_shards
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe

EXACT = override(
    recipe("digits").config,
    epochs=2, ir_epochs=1, width=4, blocks=(1,), neighbors=64, clusters=(10, 20),
    kmeans_iterations=3, kmeans="lloyd", batch_size=130, log_every=1, device="cpu",
    precision="64-true", bank_dtype="float64", sync_batch_norm=True,
)  # fmt: skip
PICTURES = override(
    EXACT, epochs=3, ir_epochs=2, batch_size=7, neighbors=9, clusters=(4, 5), image_size=16,
    gray=0.2, jitter=(0.4, 0.4, 0.4, 0.1), flip=0.5, memory="never", workers=0, warm_clusters=True,
    instance_loss="nce", noise=20, bank_start="random", ir_batch_size=10, instance_share=0.3,
)  # fmt: skip


SLOW_CASES = [(3, "pictures"), (2, "digits"), (4, "digits")]


@pytest.fixture(scope="module")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


def numbers(run: Path) -> dict[str, torch.Tensor]:
    """Return weights, momenta, bank and clusters of the newest checkpoint."""
    folder = checkpoint.latest(run)
    whole = folder / "clusters.safetensors"
    files = [whole] if whole.exists() else find_shards(folder, "clusters")
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {
        **load_file(folder / "model.safetensors"),
        **{f"momentum {number}": found["momentum_buffer"] for number, found in state.items()},
        "bank": checkpoint.load_bank(run),
        "clusters": read_shards(files, "labels", dim=1),
    }


def assert_close(one: Path, other: Path, within: float = 1e-10) -> None:
    first, second = numbers(one), numbers(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (tensor.double() - second[name].double()).abs().max()
        assert difference <= within, f"{name}: {difference}"
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            # Roots of eigenvalues near 0: there are fewer directions than dimensions.
            most = 1e-3 * (within > 0) if name == "effective_rank" else within
            close = pytest.approx(value, abs=most, rel=0) if isinstance(value, float) else value
            assert b[name] == close, f"{name} of step {a['step']}"
    measured, others = (floors(run)["values"] for run in (one, other))
    for name, values in measured.items():
        assert others[name] == pytest.approx(values, abs=1e-3 * (within > 0), rel=0)


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory, pictures):
    """Return a function that returns the run of a case on one rank."""

    @functools.cache
    def run(name: str) -> Path:
        config, data = cases(pictures)[name]
        folder = tmp_path_factory.mktemp(name) / "run"
        pool(1, rank_cases.learn, to_dict(config), data, str(folder))
        return folder

    return run


def cases(pictures: Path) -> dict[str, tuple[PretrainConfig, str]]:
    """Digits are evaluated on held-out images; of the photographs none is held out."""
    return {"digits": (EXACT, "digits"), "pictures": (PICTURES, str(pictures / "train"))}


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (2, "pictures"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_any_number_of_ranks_learns_the_same(pool, alone, tmp_path, pictures, ranks, name):
    config, data = cases(pictures)[name]
    held = pool(ranks, rank_cases.learn, to_dict(config), data, str(tmp_path / "run"))
    assert_close(alone(name), tmp_path / "run")
    measured = {"digits": "knn200", "pictures": "loo_knn200"}[name]
    assert any(measured in line for line in read_metrics(tmp_path / "run"))
    size = len(checkpoint.load_bank(alone(name)))
    assert sum(held) == size
    assert max(held) == -(-size // ranks)
    files = find_shards(checkpoint.latest(tmp_path / "run"), "bank")
    assert [len(load_file(file)["rows"]) for file in files] == held


@pytest.mark.slow
def test_a_run_resumes_with_other_numbers_of_ranks(pool, alone, tmp_path):
    often = to_dict(override(EXACT, checkpoint_seconds=0.0))
    for ranks, stop in ((2, 4), (3, 13), (1, 17), (4, 0)):
        pool(ranks, rank_cases.learn, often, "digits", str(tmp_path / "run"), stop)
        if stop:
            assert checkpoint.latest(tmp_path / "run").name == f"step-{stop:09d}"
    assert_close(alone("digits"), tmp_path / "run")


@pytest.mark.slow
def test_batch_norm_per_rank_is_repeatable_and_differs_from_one_rank(pool, alone, tmp_path):
    config = to_dict(override(EXACT, sync_batch_norm=False))
    for name in ("a", "b"):
        pool(3, rank_cases.learn, config, "digits", str(tmp_path / name))
    assert_close(tmp_path / "a", tmp_path / "b", within=0.0)
    with pytest.raises(AssertionError):
        assert_close(alone("digits"), tmp_path / "a")


@pytest.mark.slow
def test_an_image_that_fails_in_training_is_skipped_by_all_ranks(pool, tmp_path, pictures):
    data, bad = tmp_path / "data", "temple/06.jpg"
    shutil.copytree(pictures / "train", data)
    (data / bad).write_bytes(middle_lost((data / bad).read_bytes()))
    config = to_dict(override(PICTURES, unreadable="skip", checkpoint_seconds=0.0))
    pool(2, rank_cases.learn, config, str(data), str(tmp_path / "whole"))
    for stop in (2, 5, 9, 0):
        pool(2, rank_cases.learn, config, str(data), str(tmp_path / "run"), stop)
    assert_close(tmp_path / "whole", tmp_path / "run", within=0.0)
    counted = [
        line["unreadable"] for line in read_metrics(tmp_path / "run") if "unreadable" in line
    ]
    assert counted == [1, 1, 1]


@pytest.mark.parametrize(("dims", "sizes"), [(4, [3, 5]), (2, [4, 1, 6]), (4, [2, 0, 3])])
def test_synchronized_batch_norm_equals_that_of_the_whole_batch(pool, dims, sizes):
    (whole,) = pool(1, rank_cases.normalize, 6, sizes, dims)
    found = pool(len(sizes), rank_cases.normalize, 6, sizes, dims)
    for name in ("y", "x", "inference"):
        together = torch.cat([part[name] for part in found])
        torch.testing.assert_close(together, whole[name], rtol=0, atol=1e-12)
    for part in found:
        for name in ("weight", "bias", "mean", "variance"):
            torch.testing.assert_close(part[name], whole[name], rtol=0, atol=1e-12)
        assert part["tracked"] == whole["tracked"] == 1


@pytest.mark.parametrize(
    ("options", "values"),
    [({"kmeans": "faiss"}, ["--kmeans faiss", "2"]), ({"batch_size": 1}, ["1", "2"])],
)
def test_all_ranks_reject_options_of_one_rank(pool, tmp_path, options, values):
    config = to_dict(override(EXACT, **options))
    run = tmp_path / "run"
    errors = pool(2, rank_cases.error_of, rank_cases.learn, config, "digits", str(run))
    assert errors[0] == errors[1]
    assert all(value in errors[0] for value in values)
    assert not run.exists()


@pytest.mark.parametrize("full", [0, 2])
def test_a_full_disk_on_one_rank_ends_all_and_the_last_checkpoint_loads(pool, tmp_path, full):
    errors = pool(3, rank_cases.error_of, rank_cases.save_with_little_room, str(tmp_path), full)
    assert len(set(errors)) == 1
    for value in ("File too large", "step-000000001"):
        assert value in errors[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    expected = MemoryBank(1000, 8, seed=0).rows
    assert torch.equal(checkpoint.load_bank(tmp_path), expected)


@pytest.mark.slow
def test_knn_and_embed_read_a_sharded_run(pool, tmp_path, capsys):
    config = override(EXACT, epochs=1, ir_epochs=1, precision="32-true", bank_dtype="float32")
    run = tmp_path / "run"
    pool(3, rank_cases.learn, to_dict(config), "digits", str(run))
    shutil.copytree(run, tmp_path / "one")
    folder = checkpoint.latest(tmp_path / "one")
    save_file({"rows": checkpoint.load_bank(run)}, folder / "bank-0-of-1.safetensors")
    for rank in range(3):
        (folder / f"bank-{rank}-of-3.safetensors").unlink()
    accuracy = []
    for each in (run, tmp_path / "one"):
        result = tmp_path / "knn.json"
        assert main(["knn", str(each), "--k", "1", "200", "--json", str(result)]) == 0
        accuracy.append(json.loads(result.read_text())["accuracy"])
    assert accuracy[0] == accuracy[1]
    table = tmp_path / "table.parquet"
    assert main(["embed", str(run), "--data", "digits", "--out", str(table)]) == 0
    assert table.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "short"])
def test_a_damaged_shard_is_named(pool, tmp_path, damage):
    pool(3, rank_cases.error_of, rank_cases.save_with_little_room, str(tmp_path), 0)
    folder = checkpoint.latest(tmp_path)
    file = folder / "bank-1-of-3.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    encoder = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    bank = MemoryBank(2000 if damage == "short" else 1000, 8)
    with user_error("damaged", folder) as caught:
        checkpoint.restore(folder, encoder=encoder, optimizer=optimizer, bank=bank)
    assert "\n" not in str(caught.value)
