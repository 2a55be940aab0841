"""Runs that start from a pretrained network: what learns, in which epochs, and how runs resume."""

import json
from pathlib import Path

import pytest
import rank_cases
import torch
from compare_runs import assert_same_run
from expect import user_error
from ranks import Pool
from safetensors.torch import load_file

from localagg import checkpoint
from localagg.config import PretrainConfig, override, to_dict
from localagg.data.loading import loading_hint
from localagg.distributed.collectives import World
from localagg.embeddings.embed import embed
from localagg.embeddings.open_table import RUN_TABLE, open_table
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.recipes.schedule import Schedule
from localagg.training.frozen.trained_part import whitening
from localagg.training.runs import pretrain

NETWORK = {"model": "resnet18_small", "width": 8, "blocks": (1, 1)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    checkpoint.save_weights(
        path, create_encoder("resnet18_small", 5, seed=3, width=8, blocks=(1, 1))
    )
    return path


@pytest.fixture
def config(weights):
    return make_config(weights)


def make_config(weights, **options) -> PretrainConfig:
    return override(
        recipe("adapt").config, **NETWORK, weights=str(weights), dim=6, image_size=24,
        feature_views=2, workers=0, batch_size=8, epochs=3, ir_epochs=1, neighbors=20,
        clusters=(4, 6), kmeans_iterations=3, kmeans="lloyd", device="cpu", precision="32-true",
        log_every=1, eval_every=0, **options,
    )  # fmt: skip


def backbone(path: Path) -> dict[str, torch.Tensor]:
    file = checkpoint.latest(path) / "model.safetensors" if path.is_dir() else path
    return {k: v for k, v in load_file(file).items() if k.startswith("backbone.")}


def changed(run: Path, weights: Path) -> set[str]:
    before, after = backbone(weights), backbone(run)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("train", "advised"), [("head", False), ("last:1", True)])
def test_reading_images_faster_is_advised_only_where_the_network_learns(
    tmp_path, pictures, config, monkeypatch, train, advised
):
    monkeypatch.setattr(loading_hint, "HINT_FROM", 0.0)
    epochs = {"epochs": 2, "network_epochs": 1 if advised else 0}
    config = override(config, train=train, **epochs)
    assert (pretrain(config, str(pictures), tmp_path / "run")["hint"] is not None) == advised


def test_the_head_learns_and_the_backbone_stays(tmp_path, pictures, config, weights):
    config = override(config, epochs=12, eval_every=100)
    result = pretrain(config, str(pictures), tmp_path / "run")
    assert not changed(tmp_path / "run", weights)
    assert result["steps"] == 12 * 6
    floors = result["floors"]["values"]
    assert floors["trained network"]["knn1"] >= floors["raw pixels"]["knn1"]
    encoder = checkpoint.load_encoder(tmp_path / "run")  # the run measures like any other
    source, views = rank_cases_source(pictures), checkpoint.load_views(tmp_path / "run")
    rows, bank = embed(encoder, source, views).rows, checkpoint.load_bank(tmp_path / "run")
    assert (rows * bank).sum(dim=1).mean() > 0.7
    table = tmp_path / "run" / RUN_TABLE  # from the features: no image is embedded again
    written = table.stat().st_mtime_ns
    found = open_table(tmp_path / "run")
    assert table.stat().st_mtime_ns == written
    assert found.images["index"].to_pylist() == list(range(len(source)))
    torch.testing.assert_close(found.unit_embeddings(), rows, rtol=0, atol=5e-3)


def rank_cases_source(pictures):
    from localagg.data.sources.open import open_images

    return open_images(str(pictures))


@pytest.mark.parametrize(("train", "first"), [("all", "stem"), ("last:1", "stages.1.")])
def test_the_network_follows_the_head_at_its_own_rate(
    tmp_path, pictures, config, weights, train, first
):
    run = tmp_path / "run"
    pretrain(override(config, train=train, network_epochs=1), str(pictures), run)
    found = changed(run, weights)
    learned = {n for n in backbone(weights) if train == "all" or n.startswith(f"backbone.{first}")}
    statistics = {n for n in learned if "running_" in n or n.endswith("num_batches_tracked")}
    assert found == learned - statistics
    groups = torch.load(checkpoint.latest(run) / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["rate_share"] for group in groups] == [1.0, 1.0, 0.1, 0.1]
    assert groups[2]["lr"] == pytest.approx(0.1 * groups[0]["lr"])


@pytest.mark.parametrize("stop", [1, 9, 13, 15])
def test_a_stopped_run_resumes_bit_exactly(tmp_path, pictures, config, stop):
    config = override(config, train="last:2", network_epochs=1, checkpoint_seconds=0.0)
    pretrain(config, str(pictures), tmp_path / "whole")
    for limit in (stop, 0):
        rank_cases.learn(World(), to_dict(config), str(pictures), str(tmp_path / "run"), limit)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_several_processes_agree_with_one(tmp_path, pictures, weights):
    config = make_config(weights, train="all", network_epochs=1)
    config = to_dict(override(config, precision="64-true", bank_dtype="float64"))
    pool = Pool(2)
    for ranks in (1, 2):
        config["adapt"]["cache"] = str(tmp_path / f"cache{ranks}")
        pool(ranks, rank_cases.learn, config, str(pictures), str(tmp_path / f"run{ranks}"))
    pool.close()
    one, two = (checkpoint.load_bank(tmp_path / f"run{ranks}") for ranks in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    entries = [sorted((tmp_path / f"cache{ranks}").iterdir()) for ranks in (1, 2)]
    assert [path.name for path in entries[0]] == [path.name for path in entries[1]]
    files = [(path[0] / "features.npy").read_bytes() for path in entries]
    assert files[0] == files[1]


class _Features:
    def __init__(self, rows):
        self.rows = rows

    def measured(self, index):
        return self.rows[index]


@pytest.mark.parametrize(("images", "rank"), [(300, 9), (5, 4)])
def test_whitened_components_are_uncorrelated_and_have_variance_1(images, rank):
    rows = torch.randn(images, 20, generator=torch.Generator().manual_seed(0)).double()
    rows = rows @ torch.diag(torch.linspace(1, 5, 20).double()) + 3
    weight, bias = whitening(_Features(rows), torch.arange(images), 9)
    outputs = rows @ weight.T + bias
    covariance = outputs.T @ outputs / images
    torch.testing.assert_close(covariance.diagonal(), (torch.arange(9) < rank).double())
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-8
    _, _, axes = torch.linalg.svd(rows - rows.mean(dim=0))
    assert ((weight[0] / weight[0].norm()) @ axes[0]).abs() == pytest.approx(1)


def test_the_rate_falls_for_the_head_and_rises_and_falls_for_the_network(config):
    config = override(config, train="all", epochs=14, network_epochs=4)
    schedule = Schedule(resolve_defaults(config, 80, 48), 80)
    rates = [schedule.learning_rate(step) for step in range(140)]
    assert schedule.network_start == 100
    assert rates[:100] == sorted(rates[:100], reverse=True)
    assert rates[0] == 0.03
    assert rates[99] < 1e-4
    assert rates[100] == pytest.approx(0.03 / 4)
    assert rates[100:104] == sorted(rates[100:104])
    assert rates[104:] == sorted(rates[104:], reverse=True)
    assert rates[139] < 1e-3


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"weights": None}, "option-missing", ["--weights"]),
        ({"train": "last:9", "network_epochs": 1}, "option-invalid", ["last:9", "last:3"]),
        ({"train": "last:0"}, "option-invalid", ["--train", "last:0"]),
        ({"feature_views": 0}, "option-invalid", ["--feature-views", "head"]),
        ({"network_epochs": 1}, "option-conflict", ["--network-epochs 1"]),
        ({"train": "all", "network_epochs": 9}, "option-conflict", ["9", "--epochs 3"]),
        ({"cache_gb": 1e-6}, "too-large", ["--cache-gb"]),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run(
    tmp_path, pictures, config, options, code, values
):
    with user_error(code, *values):
        pretrain(override(config, **options), str(pictures), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_neither_weights_nor_cache(tmp_path, pictures, config, weights):
    import shutil

    copy = tmp_path / "copy.safetensors"
    shutil.copy(weights, copy)
    config = override(config, weights=str(copy), cache=str(tmp_path / "cache"))
    run = tmp_path / "run"
    rank_cases.learn(
        World(), to_dict(override(config, checkpoint_seconds=0.0)), str(pictures), str(run), 4
    )
    copy.unlink()
    shutil.rmtree(tmp_path / "cache")
    rank_cases.learn(World(), {}, str(pictures), str(run))
    facts = json.loads((run / "config.json").read_text())
    assert facts["config"]["adapt"]["train"] == "head"
    assert checkpoint.read_progress(checkpoint.latest(run))["summary"]["steps"] == 18
