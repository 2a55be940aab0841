"""The command line as a user meets it: each in a process of its own, with its exit status."""

import json
import subprocess
import sys

import pytest

from localagg import cli

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
    assert all(name in done.stdout for name in ("demo", "pretrain", "knn", "inspect", "recipes"))
    assert localagg().stdout == done.stdout
    assert localagg("--version").stdout.startswith("localagg ")


@pytest.mark.parametrize(
    "command", ["demo", "pretrain digits", "pretrain", "knn", "inspect", "recipes"]
)
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
    ("pretrain digits --data digits --out {run}", "holds another run"),
    ("pretrain digits", "--data"),
    ("pretrain", "Name a recipe"),
    ("pretrain --resume {run} --data {pictures}", "is not what"),
    ("pretrain --resume {run} --epochs 9", "--epochs 2, not 9"),
    ("pretrain --resume {run} --out {new}", "leave out --out"),
    ("pretrain --resume {bare}", "holds no checkpoint"),
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
