"""Commands as a user runs them, on small data: results, files and exit statuses."""

import json
import shutil

import pytest
from small_commands import SMALL, WITHOUT_LA, run_small

from localagg import cli
from localagg.checkpoint import load_encoder, weights_digest
from localagg.evaluation.results.results_file import read_results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_small(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def result(tmp_path):
    """Run a command and return what it writes by ``--json``."""

    def written(*words: object) -> dict:
        file = tmp_path / "result.json"
        file.unlink(missing_ok=True)
        assert cli.main([*map(str, words), "--json", str(file)]) == 0
        return json.loads(file.read_text())

    return written


def test_pretrain_writes_its_result_and_a_finished_run_is_not_resumed(run, result, capsys):
    first = json.loads((run.parent / "pretrain.json").read_text())
    assert (first["steps"], first["run"]) == (28, str(run))
    (run / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.*")}
    assert result("pretrain", "--resume", run)["steps"] == 28
    shown = capsys.readouterr()
    assert all(part in shown.out for part in first["shares"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_knn_measures_against_the_bank_and_embeddings(run, result, capsys):
    found = result("knn", run, "--k", 1, 20)
    assert set(found["accuracy"]) == {"knn1", "knn20"}
    assert (found["asked"], found["known"]) == (397, 1400)
    assert found["accuracy"]["knn1"] > 0.2  # chance is 0.1
    shown = capsys.readouterr().out
    assert "397" in shown
    assert "1,400" in shown
    embedded = result("knn", run, "--against", "embeddings", "--k", 1)
    assert embedded["against"] != found["against"]


def test_knn_without_a_held_out_split_uses_each_training_image_as_a_query(run, pictures, result):
    words = ["knn", run, "--data", pictures / "train", "--against", "embeddings", "--k", 3]
    found = result(*words)
    assert set(found["accuracy"]) == {"loo_knn3"}
    assert found["asked"] == 48


def test_inspect_reports_splits(pictures, result):
    found = result("inspect", pictures, "--recipe", "none", "--workers", 0)
    assert found["splits"]["train"]["images"] == 48
    assert found["epoch"] is None


def test_inspect_times_an_epoch_only_of_a_training_split(pictures, result, monkeypatch, capsys):
    from localagg.training import epoch_time

    timed = {"network": "n", "batch": 8, "image_size": 8, "device": "cpu", "held": True}
    timed |= {"workers": 0, "read": 0, "ir_epoch": 33.0, "la_epoch": 44.0}
    configs = []
    monkeypatch.setattr(
        epoch_time, "epoch_time", lambda config, *_: configs.append(config) or timed
    )
    assert result("inspect", pictures, "--workers", 0, "--batch-size", 8)["epoch"] == timed
    assert (configs[0].batch_size, configs[0].workers) == (8, 0)
    assert configs[0].epochs is not None  # the budget of half an hour was fitted
    assert "44 s" in capsys.readouterr().out
    validation = pictures.parent / "only-val"
    shutil.copytree(pictures / "val", validation / "val", dirs_exist_ok=True)
    assert result("inspect", validation, "--workers", 0)["epoch"] is None
    assert "'train'" in capsys.readouterr().err
    monkeypatch.undo()
    assert result("inspect", "digits", "--workers", 0, "--batch-size", 9999)["epoch"] is None
    assert "9,999" in capsys.readouterr().err


def test_recipes_lists_configurations(result, capsys):
    recipes = result("recipes")
    assert {"folder", "digits", "cifar10"} <= set(recipes)
    assert recipes["digits"]["config"]["epochs"] == 50
    assert all(name in capsys.readouterr().out.split() for name in ("cifar10",))


def test_dry_run_prints_the_configuration_and_writes_no_run(pictures, tmp_path, result, capsys):
    words = ["pretrain", "res18_LA", "--data", pictures, "--out", tmp_path / "run", "--dry-run"]
    found = result(*words, "--batch-size", 16, "--ir-batch-size", 8)
    shown = capsys.readouterr()
    assert "1,281,167" in shown.err
    assert "preact_resnet18" in shown.out
    assert found["steps"]["total"] == 200 * 3  # 48 images
    assert found["steps"]["ir"] == 10 * 6
    assert found["memory"]["memory bank"] == 48 * 128 * 4
    assert not (tmp_path / "run").exists()
    options = {line.split()[0] for line in shown.out.splitlines() if line.strip().startswith("--")}
    assert {"--clusters", "--drops", "--augmentation", "--weight-decay"} <= options


@pytest.mark.parametrize("timm", [True, False])
@pytest.mark.parametrize(
    ("words", "applies"),
    [(["folder"], True), (["digits"], False), (["folder", "--start", "missing"], False)],
)
def test_folder_suggests_a_pretrained_network_where_there_may_be_one(
    timm, words, applies, monkeypatch, capsys
):
    monkeypatch.setattr("localagg.cli.pretrain.find_spec", lambda name: timm or None)
    cli.main(["pretrain", *words, "--data", "digits", "--epochs", "2", "--dry-run"])
    assert ("localagg pretrain adapt" in capsys.readouterr().err) == (timm and applies)


@pytest.mark.parametrize(
    ("model", "named"), [("resnet18", "resnet18"), ("resnet18_small", "timm:NAME")]
)
def test_folder_suggests_only_networks_with_pretrained_weights(model, named, monkeypatch, capsys):
    monkeypatch.setattr("localagg.cli.pretrain.find_spec", lambda name: True)
    words = ["folder", "--data", "digits", "--model", model, "--epochs", "2", "--dry-run"]
    cli.main(["pretrain", *words])
    assert f"--model {named} --weights pretrained" in capsys.readouterr().err


def test_typed_clusters_are_not_scaled_to_the_number_of_images(pictures, result):
    words = ["pretrain", "res18_LA", "--data", pictures, "--dry-run", "--batch-size", 8]
    words += ["--ir-batch-size", 8, "--neighbors", 20]
    objective = result(*words, "--clusters", 7, 9)["config"]["objective"]
    assert (objective["clusters"], objective["neighbors"]) == ([7, 9], 20)
    assert cli.main([*map(str, words), "--clusters", "49"]) == 2


def test_options_override_the_json_of_the_reference(tmp_path, result, capsys):
    path = tmp_path / "mine.json"
    path.write_text('// of 2019\n{"mine": {"task": "IR", "init_lr": 0.5, "port": 1}}')
    words = ["pretrain", "--config", f"{path}:mine", "--data", "digits", "--dry-run"]
    config = result(*words, "--momentum", 0.5)["config"]
    assert (config["learning_rate"], config["momentum"]) == (0.5, 0.5)
    assert config["encoder"]["model"] == "preact_resnet18"
    assert "port" in capsys.readouterr().err


def test_la_starts_from_a_run_of_ir(tmp_path, result):
    words = ["pretrain", "digits", "--data", "digits"]
    ir, la = tmp_path / "ir", tmp_path / "la"
    result(*words, *WITHOUT_LA, "--epochs", 1, "--out", ir)
    assert result(*words, *SMALL, "--start", ir, "--out", la)["steps"] == 28
    first = json.loads((la / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["phase"]) == (20, "LA")


def test_transfer_trains_heads_and_a_finished_one_is_not_resumed(run, tmp_path, result, capsys):
    out = tmp_path / "heads"
    words = ["transfer", run, "--epochs", 2, "--batch-size", 100, "--device", "cpu"]
    found = result(*words, "--layers", 0, 1, "--out", out)
    assert set(found["layers"]) == {"0", "1"}
    assert found["layers"]["1"]["top1"] > 0.2  # chance is 0.1
    assert "ten_crop_top1" in capsys.readouterr().out
    assert result("transfer", "--resume", out)["layers"] == found["layers"]
    assert cli.main(["transfer", "--resume", str(out), "--epochs", "5"]) == 2


@pytest.mark.parametrize("kind", ["arrow", "tfrecord"])
def test_pack_writes_a_folder_that_the_commands_read(kind, pictures, tmp_path, result):
    result("pack", pictures, tmp_path / "out", "--format", kind, "--verify")
    splits = result("inspect", tmp_path / "out", "--recipe", "none")["splits"]
    assert (splits["train"]["images"], splits["val"]["images"]) == (48, 12)


@pytest.mark.slow
def test_results_shows_all_measurements_of_runs_in_one_table(run, tmp_path, result, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "results.json").unlink(missing_ok=True)
    votes = result("knn", copy, "--k", 1, 20, "--retrieval", "--clusters")
    assert {"precision1", "precision20", "map"} <= set(votes["retrieval"])
    assert votes["clusters"]["clusters"] == 10
    cache = ["--cache", tmp_path / "cache", "--device", "cpu"]
    heads = result("transfer", copy, "--quick", "--layers", 0, 1, *cache)
    few = ["transfer", copy, "--few", 0.1, "--per-class", 3, "--seeds", 2, "--layers", 1]
    labels = result(*few, *cache)
    assert [subset["images"] for subset in labels["subsets"]] == [140, 30]
    assert "±" in capsys.readouterr().out
    table = result("results", copy)
    assert len({column["measure"] for column in table["columns"]}) == 5
    (row,) = table["rows"]
    values = {
        (column["measure"], column["name"]): value
        for column, value in zip(table["columns"], row["values"], strict=True)
    }
    assert values["knn", "knn1"] == pytest.approx(votes["accuracy"]["knn1"])
    assert values["linear", "1 top1"] == pytest.approx(heads["layers"]["1"]["top1"])
    loaded = weights_digest(load_encoder(copy))
    assert {entry["weights_digest"] for entry in read_results(copy)} == {loaded}


def test_search_finds_images_in_a_table_of_embed(run, pictures, tmp_path, result, capsys):
    table = tmp_path / "e.parquet"
    result("embed", run, "--data", pictures, "--out", table, "--dtype", "float16")
    image = pictures / "train" / "flower" / "01.jpg"
    queries = result("search", table, image, "train/flower/02.jpg", "--k", 3)["queries"]
    for query, name in zip(queries, ("train/flower/01.jpg", "train/flower/02.jpg"), strict=True):
        assert len(query["neighbors"]) == 3
        assert name not in [near["path"] for near in query["neighbors"]]
    assert "similarity" in capsys.readouterr().out


def test_resumed_readouts_are_recorded_once_when_they_end(run, tmp_path, monkeypatch):
    from localagg.evaluation.readouts.linear_probe import LinearProbe

    def stop(self, **options):
        raise KeyboardInterrupt

    copy, out = tmp_path / "copy", tmp_path / "heads"
    shutil.copytree(run, copy)
    (copy / "results.json").unlink(missing_ok=True)

    def recorded_after_resume() -> dict:
        for _ in range(2):  # the second time it has ended already
            assert cli.main(["transfer", "--resume", str(out)]) == 0
        (entry,) = read_results(copy)
        return {**entry, "when": 0}

    words = ["transfer", str(copy), "--epochs", "2", "--batch-size", "100", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "measure", stop)
        assert cli.main([*words, "--layers", "1", "--out", str(out)]) == 130
    assert read_results(copy) == []
    entry = recorded_after_resume()
    assert set(entry["values"]) >= {"1 top1", "1 ten_crop_top1"}
    (copy / "results.json").unlink()  # as if killed before the results were added
    assert recorded_after_resume() == entry
