"""Diagnostics: each value against plain float64, and in whole runs that go wrong."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from localagg.config import override
from localagg.io.metrics_log import read_metrics
from localagg.recipes.builtin import recipe
from localagg.training import diagnostics
from localagg.training.diagnostics import (
    Diagnostics,
    cluster_facts,
    moments,
    spread,
    warnings,
)
from localagg.training.learner import Learner
from localagg.training.runs import pretrain
from localagg.training.step import batch_loss

QUICK = override(
    recipe("digits").config,
    epochs=2, ir_epochs=1, width=8, blocks=(1,), neighbors=64, clusters=(10, 20),
    kmeans_iterations=3, batch_size=100, eval_every=0, device="cpu", precision="32-true",
)  # fmt: skip


def rows(size, dim, seed=0):
    draw = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(draw + torch.arange(dim), dim=1)


def test_spread_is_the_mean_cosine_of_pairs_and_the_rank_the_entropy_of_singular_values():
    x = rows(300, 8)
    found = spread(*moments(x), len(x))
    exact = x.double().numpy()
    assert found["spread"] == pytest.approx(1 - (exact @ exact.T).mean(), abs=1e-6)
    sigma = np.linalg.svd(exact, compute_uv=False)
    p = sigma / sigma.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_moments_of_shards_add_up():
    x = rows(70_001, 4)
    whole, parts = moments(x), [moments(part) for part in x.split(30_000)]
    for number in range(2):
        total = sum(part[number] for part in parts)
        torch.testing.assert_close(total, whole[number], rtol=1e-4, atol=0)  # float32 inside


def test_spread_and_rank_at_their_ends():
    point = F.normalize(torch.ones(50, 6), dim=1)
    found = spread(*moments(point), 50)
    assert found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=0.01)
    cross = torch.cat([torch.eye(6), -torch.eye(6)])
    found = spread(*moments(cross), 12)
    assert found == pytest.approx({"spread": 1, "effective_rank": 6})


def test_cluster_facts_by_counting():
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 3, 3], [0, 1, 2, 3, 4, 5, 5, 5]], dtype=torch.int32)
    found = cluster_facts(labels, None)
    # Sizes 4 2 0 2 and 1 1 1 1 1 3.
    assert found["largest_cluster"] == pytest.approx((4 / 2 + 3 / (8 / 6)) / 2)
    assert found["lone"] == pytest.approx((1 / 4 + 5 / 6) / 2)
    assert "churn" not in found
    same = torch.tensor([[5, 5, 5, 5, 2, 2, 0, 0], [5, 4, 3, 2, 1, 0, 0, 0]], dtype=torch.int32)
    assert cluster_facts(labels, same)["churn"] == pytest.approx(0)
    draws = torch.randint(0, 20, (2, 3000), generator=torch.Generator().manual_seed(0))
    assert cluster_facts(draws[:1], draws[1:])["churn"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("name", "fine", "wrong"),
    [
        ("spread", diagnostics.LEAST_SPREAD, -0.001),
        ("effective_rank", diagnostics.LEAST_RANK * 100, -0.01),
        ("staleness", diagnostics.MOST_STALE, 0.01),
        ("without_close", diagnostics.MOST_WITHOUT, 0.01),
        ("largest_cluster", diagnostics.LARGEST_CLUSTER, 0.1),
        ("lone", diagnostics.MOST_LONE, 0.01),
        ("churn", diagnostics.MOST_CHURN, 0.01),
    ],
)
def test_each_bound_warns_beyond_it_and_not_at_it(name, fine, wrong):
    assert warnings({name: fine}, 100) == {}
    found = warnings({name: fine + wrong}, 100)
    assert list(found) == [name]
    assert "--" in found[name]  # the way out


def test_a_warning_is_told_once_until_the_sign_has_gone():
    sick, well = F.normalize(torch.ones(50, 6) + 0.01 * torch.rand(50, 6), dim=1), torch.eye(6)
    watched, told = Diagnostics(), []
    for bank in (sick, sick, well, sick):
        line, news = watched.end_epoch(bank)
        told.append((line.get("warnings"), len(news)))
    assert told == [(["spread"], 1), (["spread"], 0), (None, 0), (["spread"], 1)]


def test_an_epoch_goes_on_from_its_state_to_the_bit():
    whole, parts = Diagnostics(), Diagnostics()
    for step in range(10):
        values = {"staleness": 0.1 / (step + 1), "without_close": 0.3 * step, "loss": 1.0}
        whole.add(values)
        parts.add(values)
        parts = Diagnostics(json.loads(json.dumps(parts.state())))
    bank = rows(40, 6)
    assert parts.end_epoch(bank) == whole.end_epoch(bank)
    assert "staleness" not in whole.end_epoch(bank)[0]  # a new epoch


def test_staleness_is_one_minus_the_mean_cosine_of_the_batch_and_its_rows():
    learner = Learner(override(QUICK, noise=4), 30)
    learner.bank.rows.copy_(rows(30, learner.config.encoder.dim))
    v, index = rows(20, learner.config.encoder.dim, seed=1), torch.arange(5, 25)
    _, notes = batch_loss(learner, v, index, aggregating=False)
    cosines = (v.double() * learner.bank.rows[index].double()).sum(dim=1)
    assert notes["staleness"].item() == pytest.approx(1 - cosines.mean().item(), abs=1e-6)


def test_every_epoch_has_its_line(tmp_path):
    pretrain(override(QUICK, epochs=3), "digits", tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    epochs = [line for line in lines if "spread" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all({"effective_rank", "staleness"} <= line.keys() for line in epochs)
    assert "largest_cluster" not in epochs[0]
    assert {"largest_cluster", "lone", "without_close"} <= epochs[1].keys()
    assert "churn" not in epochs[1]
    assert 0 < epochs[2]["churn"] < 1
    close = [line["without_close"] for line in lines if line.get("phase") == "LA"]
    assert all(0 <= value <= 1 for value in close)


def test_a_run_that_collapses_says_so(tmp_path, capsys):
    config = override(QUICK, ir_epochs=2, learning_rate=1e-9)  # the untrained network's cone
    pretrain(config, "digits", tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("warning: the embedding is nearly one point") == 1
    assert all("spread" in line["warnings"] for line in read_metrics(tmp_path / "run")[-1:])
