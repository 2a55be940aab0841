"""Runs of adapt that SIGKILL ends at random moments: a resume leads to the same bits."""

import os
import random
import signal
from dataclasses import replace

import pytest
from compare_runs import assert_same_run
from killed_child import run_in_child

from localagg import checkpoint
from localagg.config import override
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe
from localagg.training.runs import pretrain, resume

# Two epochs of the head alone, then one of the whole network; every step is saved.
NETWORK = {"model": "resnet18_small", "width": 8, "blocks": (1, 1)}
CONFIG = override(
    recipe("adapt").config, **NETWORK, dim=6, image_size=24, feature_views=2, workers=0,
    batch_size=8, epochs=3, ir_epochs=1, network_epochs=1, train="all", neighbors=20,
    clusters=(4, 6), kmeans_iterations=3, kmeans="lloyd", device="cpu", precision="32-true",
    log_every=1, eval_every=1, checkpoint_seconds=0.0,
)  # fmt: skip
MOMENTS = [random.Random(seed).uniform(0, 1) for seed in range(10)]
"""Shares of the calls of a whole run."""


def learn(config, data, run):
    """Begin the run, or resume it, as a user would after a kill."""
    if (run / "config.json").exists():
        resume(run)
    else:
        pretrain(config, data, run)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_resume_after_a_kill_at_random_moments_is_bit_exact(tmp_path, pictures):
    weights = tmp_path / "weights.safetensors"
    encoder = create_encoder("resnet18_small", 5, seed=3, width=8, blocks=(1, 1))
    checkpoint.save_weights(weights, encoder)

    def arguments(name):
        adapt = replace(CONFIG.adapt, cache=str(tmp_path / f"{name}-cache"))
        config = replace(override(CONFIG, weights=str(weights)), adapt=adapt)
        return config, str(pictures), tmp_path / name

    learn(*arguments("imports"))
    status, calls = run_in_child(learn, *arguments("whole"))
    assert status == 0
    killed = 0
    for first, second in zip(MOMENTS[::2], MOMENTS[1::2], strict=True):
        name = f"killed-at-{first:.0%}"
        for moment in (first, second / 2):  # the second while it resumes
            status, _ = run_in_child(learn, *arguments(name), killed_in=int(moment * calls))
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
        assert run_in_child(learn, *arguments(name))[0] == 0
        assert_same_run(tmp_path / "whole", tmp_path / name)
    assert killed > len(MOMENTS) / 2  # more than the first kills alone
