"""--instance-precision in a run: it acts and stays near the exact loss, or the run says so."""

import pytest
import torch
from small_runs import QUICK, state

from localagg.config import override
from localagg.engine import SETTINGS
from localagg.io.metrics_log import read_metrics
from localagg.training.runs import pretrain


def test_rounded_products_of_ir_act_or_the_run_says_that_they_do_not(tmp_path, capsys):
    config = override(QUICK, epochs=1, ir_epochs=1, log_every=1)
    pretrain(config, "digits", tmp_path / "exact")
    rounded = override(config, instance_precision="bfloat16")
    with SETTINGS.changed(bfloat16_products=True, min_compiled_rows=64):
        pretrain(rounded, "digits", tmp_path / "rounded")
    assert "--instance-precision" not in capsys.readouterr().err
    exact, found = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("exact", "rounded")
    )
    assert found != exact
    assert found == pytest.approx(exact, abs=0.02)
    pretrain(rounded, "digits", tmp_path / "unused")  # 1,400 images are too few
    assert "--instance-precision bfloat16 changes nothing" in capsys.readouterr().err
    first, second = state(tmp_path / "exact"), state(tmp_path / "unused")
    assert torch.equal(first["bank-0-of-1/rows"], second["bank-0-of-1/rows"])
