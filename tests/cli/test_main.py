"""The command line as a user meets it: each in a process of its own, with its exit status."""

import json
import shutil
import subprocess
import sys

import pytest

from localagg import cli
from localagg.checkpoint import load_encoder, weights_digest
from localagg.cli.actions import COMMANDS
from localagg.evaluation.results_file import read_results

SMALL = [
    *("--epochs", "2", "--ir-epochs", "1", "--width", "8", "--blocks", "1", "--neighbors", "64"),
    *("--clusters", "10", "--batch-size", "100", "--device", "cpu"),
]


def localagg(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "localagg", *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = localagg("pretrain", "digits", "--data", "digits", "--out", str(folder), *SMALL,
                    "--json", str(folder.parent / "out.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss engine" in done.stdout
    assert json.loads((folder.parent / "out.json").read_text())["steps"] == 28
    return folder


def test_help_lists_every_command():
    done = localagg("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert localagg().stdout == done.stdout
    assert localagg("--version").stdout.startswith("localagg ")


@pytest.mark.parametrize("command", [*COMMANDS, "pretrain digits", "pretrain res18_LA"])
def test_each_command_explains_itself(command):
    done = localagg(*command.split(), "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


WRONG = [
    ("pretrain folder --data /no/such/folder", "There is no file or folder '/no/such/folder'"),
    ("pretrain folder --data {empty}", "holds no images"),
    ("pretrain digits --data digits --epochs -1", "--epochs is -1; it must be at least 1"),
    ("pretrain digits --data digits --epochs many", "--epochs"),
    ("pretrain digitz --data digits", "Did you mean 'digits'"),
    ("pretrain digits --data digits --epochz 3", "Did you mean '--epochs'"),
    ("pretrain digits --data digits --neighbors 1401 --out {new}", "more than the 1,400 images"),
    ("pretrain digits --data digits --clusters 9 1500 --out {new}", "more than the 1,400 images"),
    ("pretrain digits --data digits --out {run}", "already contains a run"),
    ("pretrain digits", "--data"),
    ("pretrain", "Name a recipe"),
    ("pretrain trans_res18_LA --data digits", "localagg transfer RUN --recipe trans_res18_LA"),
    ("pretrain res18_LAA --data digits", "Did you mean 'res18_LA'"),
    ("pretrain --config /no/such.json:x --data digits", "'/no/such.json' cannot be read"),
    ("pretrain digits --data digits --config", "--config"),
    ("pretrain digits --data digits --start {run} --out {new}", "has run LA already"),
    ("pretrain digits --data digits --start {empty} --out {new}", "is not a run folder"),
    ("transfer", "Name a run folder or a weights file"),
    ("transfer {run} --recipe trans_res19_LA", "Did you mean 'trans_res18_LA'"),
    ("transfer {run} --layers 9 --out {new}", "has no layer '9'"),
    ("transfer {run} --data {pictures}/val --out {new}", "has no split to measure on"),
    ("transfer {empty} --out {new}", "is not a run folder"),
    ("transfer --resume {run}", "localagg"),
    ("embed {run} --data digits --out /no/such/e.parquet", "--out"),
    ("embed {run} --data /no/such/folder --out {new}", "There is no file or folder"),
    ("embed {run} --data digits", "--out"),
    ("transfer {run} --quick --layers 9 --out {new}", "has no layer '9'"),
    ("transfer {run} --quick --epochs 3", "--epochs means nothing with --quick"),
    ("transfer {run} --quick --cache-gb 0", "do not fit --cache-gb 0"),
    ("transfer {run} --few 2", "2"),
    ("transfer {run} --few 0.1 --cache-gb 0", "do not fit --cache-gb 0"),
    ("transfer {run} --few 0.1 --quick", "--few fits quick heads as it is; leave out --quick."),
    ("transfer {run} --per-class 3 --ten-crop", "--ten-crop means nothing with --per-class; leave"),
    ("transfer {run} --few 0.1 --finetune --no-ten-crop", "--ten-crop means nothing with --few;"),
    (
        "transfer {run} --few 0.1 --learning-rate 0.1",
        "--learning-rate means nothing with --few without --finetune; leave it out.",
    ),
    ("transfer {run} --per-class 3 --epochs 2", "--per-class without --finetune; leave it out."),
    ("search", "FILE.parquet"),
    ("search {run}/none.parquet x.png", "none.parquet"),
    ("search {run}/config.json x.png", "config.json"),
    ("results", "Name runs to compare"),
    ("results {empty}", "Nothing was measured"),
    ("results /no/such/run", "/no/such/run"),
    ("pack {empty} {new}", "holds no images"),
    ("pack digits {run}", "not empty"),
    ("import-tf {empty} --model preact_resnet18 --out {new}", "checkpoint"),
    ("pretrain --resume {run} --data {pictures}", "is not what"),
    ("pretrain --resume {run} --epochs 9", "--epochs 2, not 9"),
    ("pretrain --resume {run} --out {new}", "leave out --out"),
    ("knn {bare}", "holds no checkpoint"),
    ("pretrain --resume {empty}", "is not a run folder"),
    ("pretrain digits --data digits --precision low", "--precision"),
    ("pretrain digits --data digits --json /no/such/folder/x.json", "--json"),
    ("knn {empty} --data digits", "is not a run folder"),
    ("knn {run} --data {pictures}", "--against embeddings"),
    ("knn {run} --k 0", "--k"),
    ("knn", "RUN"),
    ("inspect", "URI"),
    ("inspect /no/such/folder", "There is no file or folder"),
    ("demo --out {run}", "something else than a demo"),
    ("train", "There is no command 'train'"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_is_one_sentence_and_status_2(line, message, tmp_path, run, pictures, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare" / "config.json").write_text((run / "config.json").read_text())
    places = {name: tmp_path / name for name in ("empty", "bare", "new")}
    words = line.format(run=run, pictures=pictures, **places).split()
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.err.strip().splitlines()[-1].startswith("localagg: ")
    assert said.out == ""
    assert not (tmp_path / "new").exists()


def test_a_mistake_in_a_process_of_its_own_ends_with_status_2():
    done = localagg("pretrain", "digits", "--data", "/no/such/folder")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0


def test_knn_measures_bank_and_embeddings(run, tmp_path, capsys):
    assert cli.main(["knn", str(run), "--k", "1", "20", "--json", str(tmp_path / "k.json")]) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    assert set(result["accuracy"]) == {"knn1", "knn20"}
    assert (result["asked"], result["known"]) == (397, 1400)
    assert result["accuracy"]["knn1"] > 0.2  # chance is 0.1
    assert cli.main(["knn", str(run), "--against", "embeddings"]) == 0
    assert "397 images asked 1,400 of the training images" in capsys.readouterr().out


def test_knn_without_a_held_out_split_asks_the_training_images(run, pictures, tmp_path, capsys):
    words = ["knn", str(run), "--data", str(pictures / "train"), "--against", "embeddings"]
    assert cli.main([*words, "--k", "3", "--json", str(tmp_path / "k.json")]) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    assert set(result["accuracy"]) == {"loo_knn3"}
    assert result["asked"] == 48


def test_a_finished_run_is_not_resumed_but_told(run, capsys):
    assert cli.main(["pretrain", "--resume", str(run)]) == 0
    assert "has finished its 2 epochs" in capsys.readouterr().err


def test_inspect_and_recipes_write_json(pictures, tmp_path, capsys):
    assert cli.main(["inspect", str(pictures), "--json", str(tmp_path / "i.json")]) == 0
    assert json.loads((tmp_path / "i.json").read_text())["splits"]["train"]["images"] == 48
    assert cli.main(["recipes", "--json", str(tmp_path / "r.json")]) == 0
    recipes = json.loads((tmp_path / "r.json").read_text())
    assert {"folder", "digits", "cifar10"} <= set(recipes)
    assert recipes["digits"]["config"]["epochs"] == 50
    assert "cifar10" in capsys.readouterr().out


def test_a_dry_run_prints_the_whole_configuration_and_leaves_nothing(pictures, tmp_path, capsys):
    out, file = tmp_path / "run", tmp_path / "r.json"
    words = ["pretrain", "res18_LA", "--data", str(pictures), "--out", str(out), "--dry-run"]
    assert (
        cli.main([*words, "--batch-size", "16", "--ir-batch-size", "8", "--json", str(file)]) == 0
    )
    said = capsys.readouterr()
    assert "Made for 1,281,167 images" in said.err
    assert "preact_resnet18" in said.out
    told = json.loads(file.read_text())
    assert told["steps"]["total"] == 200 * 3  # 48 images
    assert told["steps"]["ir"] == 10 * 6
    assert told["memory"]["memory bank"] == 48 * 128 * 4
    assert not out.exists()
    shown = {line.split()[0] for line in said.out.splitlines() if line.strip().startswith("--")}
    assert {"--clusters", "--drops", "--augmentation", "--weight-decay"} <= shown


def test_clusters_set_by_hand_are_taken_as_they_are(pictures, capsys):
    words = ["pretrain", "res18_LA", "--data", str(pictures), "--dry-run", "--batch-size", "8"]
    words += ["--ir-batch-size", "8", "--neighbors", "20"]
    assert cli.main([*words, "--clusters", "7", "9"]) == 0
    assert "7 9" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*words, "--clusters", "49"]) == 2


def test_the_references_json_is_laid_over(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('// of 2019\n{"mine": {"task": "IR", "init_lr": 0.5, "port": 1}}')
    words = ["pretrain", "--config", f"{path}:mine", "--data", "digits", "--dry-run"]
    assert cli.main([*words, "--momentum", "0.5", "--json", str(tmp_path / "r.json")]) == 0
    config = json.loads((tmp_path / "r.json").read_text())["config"]
    assert (config["learning_rate"], config["momentum"]) == (0.5, 0.5)
    assert config["encoder"]["model"] == "preact_resnet18"
    assert "port means nothing here" in capsys.readouterr().err


def test_la_starts_from_a_run_of_ir(tmp_path, capsys):
    words = ["pretrain", "digits", "--data", "digits", *SMALL]
    ir, la = tmp_path / "ir", tmp_path / "la"
    assert cli.main([*words, "--epochs", "1", "--out", str(ir)]) == 0
    again = [*words, "--start", str(ir), "--out", str(la), "--json", str(tmp_path / "j.json")]
    assert cli.main(again) == 0
    assert json.loads((tmp_path / "j.json").read_text())["steps"] == 28
    first = json.loads((la / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["phase"]) == (20, "LA")


def test_readouts_of_a_run_and_how_they_go_on(run, tmp_path, capsys):
    out, file = tmp_path / "heads", tmp_path / "t.json"
    words = ["transfer", str(run), "--epochs", "2", "--batch-size", "100", "--device", "cpu"]
    assert cli.main([*words, "--layers", "0", "1", "--out", str(out), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["layers"]) == {"0", "1"}
    assert result["layers"]["1"]["top1"] > 0.2  # chance is 0.1
    assert "ten_crop_top1" in capsys.readouterr().out
    assert cli.main(["transfer", "--resume", str(out)]) == 0
    assert "has finished its 2 epochs" in capsys.readouterr().err
    assert cli.main(["transfer", "--resume", str(out), "--epochs", "5"]) == 2


def test_pack_makes_what_the_commands_read(pictures, tmp_path, capsys):
    for kind in ("arrow", "tfrecord"):
        out = tmp_path / kind
        assert cli.main(["pack", str(pictures), str(out), "--format", kind, "--verify"]) == 0
        words = ["inspect", str(out), "--recipe", "none", "--json", str(tmp_path / "i.json")]
        assert cli.main(words) == 0
        splits = json.loads((tmp_path / "i.json").read_text())["splits"]
        assert (splits["train"]["images"], splits["val"]["images"]) == (48, 12)


def test_what_was_measured_stands_in_one_table(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    words = ["knn", str(copy), "--k", "1", "20", "--retrieval", "--clusters"]
    assert cli.main([*words, "--json", str(tmp_path / "k.json")]) == 0
    told = json.loads((tmp_path / "k.json").read_text())
    assert {"precision1", "precision20", "map"} <= set(told["retrieval"])
    assert told["clusters"]["clusters"] == 10
    quick = ["transfer", str(copy), "--quick", "--layers", "0", "1", "--device", "cpu"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert cli.main([*quick, *cache, "--json", str(tmp_path / "q.json")]) == 0
    heads = json.loads((tmp_path / "q.json").read_text())
    assert heads["protocol"].startswith("quick")
    few = [
        "transfer",
        str(copy),
        "--few",
        "0.1",
        "--per-class",
        "3",
        "--seeds",
        "2",
        "--layers",
        "1",
    ]
    assert cli.main([*few, *cache, "--device", "cpu", "--json", str(tmp_path / "f.json")]) == 0
    labels = json.loads((tmp_path / "f.json").read_text())
    assert [subset["images"] for subset in labels["subsets"]] == [140, 30]
    said = capsys.readouterr().out
    assert "±" in said
    assert cli.main(["results", str(copy), str(run), "--json", str(tmp_path / "r.json")]) == 0
    table = json.loads((tmp_path / "r.json").read_text())
    kinds = {column["measure"] for column in table["columns"]}
    assert kinds == {"knn", "retrieval", "clusters", "linear", "few labels"}
    row = next(row for row in table["rows"] if row["run"] == str(copy))
    columns = {(c["protocol"], c["name"]): n for n, c in enumerate(table["columns"])}
    asked = "held-out images ask the memory bank; votes"
    vote = next(c["protocol"] for c in table["columns"] if c["protocol"].startswith(asked))
    assert row["values"][columns[vote, "knn1"]] == pytest.approx(told["accuracy"]["knn1"])
    loaded = weights_digest(load_encoder(copy))
    assert {entry["weights_digest"] for entry in read_results(copy)} == {loaded}
    top1 = heads["layers"]["1"]["top1"]
    assert row["values"][columns[heads["protocol"], "1 top1"]] == pytest.approx(top1)


def test_search_finds_what_embed_wrote(run, pictures, tmp_path, capsys):
    table = tmp_path / "e.parquet"
    words = ["embed", str(run), "--data", str(pictures), "--out", str(table), "--dtype", "float16"]
    assert cli.main(words) == 0
    image = pictures / "train" / "flower" / "01.jpg"
    found = ["search", str(table), str(image), "flower/02.jpg", "--k", "3"]
    assert cli.main([*found, "--json", str(tmp_path / "s.json")]) == 0
    file, row = json.loads((tmp_path / "s.json").read_text())["queries"]
    assert file["neighbors"][0]["path"] == "flower/01.jpg"
    assert file["neighbors"][0]["similarity"] > 0.99
    assert len(row["neighbors"]) == 3
    assert "flower/02.jpg" not in [near["path"] for near in row["neighbors"]]
    assert "similarity" in capsys.readouterr().out


def test_readouts_that_were_stopped_are_noted_when_they_end(run, tmp_path, monkeypatch, capsys):
    from localagg.evaluation.linear_probe import LinearProbe

    copy, out = tmp_path / "copy", tmp_path / "heads"
    shutil.copytree(run, copy)
    (copy / "results.json").unlink(missing_ok=True)
    measure = LinearProbe.measure

    def stop(self, **options):
        raise KeyboardInterrupt

    words = ["transfer", str(copy), "--epochs", "2", "--batch-size", "100", "--device", "cpu"]
    monkeypatch.setattr(LinearProbe, "measure", stop)
    assert cli.main([*words, "--layers", "1", "--out", str(out)]) == 130
    assert read_results(copy) == []
    monkeypatch.setattr(LinearProbe, "measure", measure)
    for _ in range(2):  # and not once more when it has ended already
        assert cli.main(["transfer", "--resume", str(out)]) == 0
    (entry,) = read_results(copy)
    assert set(entry["values"]) >= {"1 top1", "1 ten_crop_top1"}
    (copy / "results.json").unlink()  # as if killed between its own results and this line
    for _ in range(2):
        assert cli.main(["transfer", "--resume", str(out)]) == 0
    (again,) = read_results(copy)
    assert {**again, "when": 0} == {**entry, "when": 0}
