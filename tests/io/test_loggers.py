"""Loggers receive the numbers of metrics.jsonl, and a missing one is named before any work."""

import csv
import importlib.util
import subprocess
import sys

import pytest
from expect import user_error

from localagg.io.loggers import check_logger, open_logger
from localagg.io.metrics_log import MetricsLog


def _write(run, name):
    log = MetricsLog(run, logger=open_logger(name, run, {"epochs": 2}))
    log.write(5, {"loss": 0.25, "phase": "IR"})
    log.write(10, {"loss": 0.125, "phase": "LA"})
    log.flushed()
    log.close()


def test_csv_has_the_numbers_of_each_session(tmp_path):
    for session in (0, 1):
        _write(tmp_path, "csv")
        with open(tmp_path / "csv" / f"version_{session}" / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert [(int(r["step"]), float(r["loss"])) for r in rows] == [(5, 0.25), (10, 0.125)]
    assert (tmp_path / "tensorboard").is_dir()


@pytest.mark.slow
def test_wandb_records_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _write(tmp_path, "wandb")
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in record.read_bytes()


@pytest.mark.slow
def test_mlflow_records_in_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _write(tmp_path, "mlflow")
    assert [*tmp_path.rglob("loss")]


def test_unknown_and_missing_loggers_are_refused(monkeypatch):
    with user_error("option-invalid", "neptun", "wandb"):
        check_logger("neptun")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with user_error("missing-extra", "localagg[mlflow]"):
        check_logger("mlflow")
    check_logger("csv")
    check_logger(None)


def test_nothing_heavy_is_imported_without_a_logger():
    code = (
        "import sys, localagg.training.runs;"
        "sys.exit(any(m in sys.modules for m in ('wandb', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
