"""Floors of whole runs: in summary and results, from the same images at both ends."""

import json

import pytest
from small_runs import QUICK, floors

from localagg import checkpoint, pretrain, resume
from localagg.config import override
from localagg.evaluation.floors import RAW_PIXELS, STARTING, TRAINED
from localagg.evaluation.results.results_file import read_results
from localagg.evaluation.run_floors import RunFloors

NAMES = [RAW_PIXELS, STARTING, TRAINED]


def small(**options):
    options = {"epochs": 1, "ir_epochs": 1, "batch_size": 8, "image_size": 16} | options
    return override(QUICK, **options)


def test_a_run_measures_its_floors_and_records_them(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("localagg.evaluation.run_floors._MOST", 40)
    run, data = tmp_path / "run", str(pictures)
    found = pretrain(small(neighbors=20, clusters=(4,), memory="never", workers=0), data, run)
    summary = found["floors"]
    assert list(summary["values"]) == NAMES
    assert (summary["images"], summary["clusters"], summary["neighbors"]) == (40, 2, 20)
    entries = read_results(run)
    assert [entry["row"] for entry in entries] == NAMES
    assert {entry["row"]: entry["values"] for entry in entries} == summary["values"]
    assert len({entry["fingerprint"] for entry in entries}) == 1
    digests = [entry.get("weights_digest") for entry in entries]
    assert digests[0] is None
    assert len(set(digests)) == 3
    assert digests[2] == checkpoint.weights_digest(checkpoint.load_encoder(run))
    assert summary["values"][RAW_PIXELS]["knn1"] > 0.8  # two photographs
    assert summary["verdict"]

    other = pretrain(small(neighbors=20, clusters=(4,), memory="never", workers=2), data, run / "x")
    assert other["floors"] == summary


def test_without_labels_views_decide_and_eval_every_0_measures_nothing(tmp_path, pictures):
    data = str(pictures / "train" / "temple")
    found = pretrain(small(neighbors=5, clusters=(2,)), data, tmp_path / "run")["floors"]
    assert "knn1" not in found["values"][TRAINED]
    assert 0 <= found["values"][TRAINED]["view_retrieval"] <= 1
    config = small(neighbors=5, clusters=(2,), eval_every=0)
    assert pretrain(config, data, tmp_path / "none")["floors"] is None
    assert read_results(tmp_path / "none") == []


def test_a_resumed_run_keeps_its_first_floors_and_an_earlier_version_has_none(
    tmp_path, pictures, monkeypatch
):
    config = small(neighbors=20, clusters=(4,))
    whole = pretrain(config, str(pictures), tmp_path / "whole")["floors"]

    def stop(*_):
        raise KeyboardInterrupt

    for name in ("killed", "old"):
        with monkeypatch.context() as patch:
            patch.setattr(RunFloors, "measure_end", stop)
            with pytest.raises(KeyboardInterrupt):
                pretrain(config, str(pictures), tmp_path / name)
    progress = checkpoint.latest(tmp_path / "old") / "progress.json"
    earlier = {k: v for k, v in json.loads(progress.read_text()).items() if k != "floors"}
    progress.write_text(json.dumps(earlier))
    monkeypatch.setattr(RunFloors, "measure_start", stop)
    assert resume(tmp_path / "killed")["floors"] == whole == floors(tmp_path / "killed")
    values = resume(tmp_path / "old")["floors"]["values"]
    assert values == {name: whole["values"][name] for name in (RAW_PIXELS, TRAINED)}
