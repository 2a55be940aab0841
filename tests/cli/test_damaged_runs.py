"""Every command on every damaged file of a run that it reads: one sentence that names the file."""

import json
import shutil

import pytest
from small_commands import run_small

from localagg import cli

FILES = [
    "config.json",
    "model",
    "optimizer.pt",
    "bank",
    "clusters",
    "progress.json",
    "no checkpoint",
]
DAMAGES = ["missing", "empty", "cut", "garbage", "newer"]
NEEDS = {  # files that a command reads
    "knn": {"config.json", "model", "bank"},
    "knn --against embeddings": {"config.json", "model"},
    "embed": {"config.json", "model"},
    "transfer --quick": {"config.json", "model"},
    "resume": {"config.json", "model", "optimizer.pt", "bank", "clusters", "progress.json"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_small(tmp_path_factory.mktemp("whole") / "run")


def words(command, run):
    name, *options = command.split()
    data = ["--data", "digits"]
    return {
        "knn": ["knn", str(run), *data, *options],
        "embed": ["embed", str(run), *data, "--out", str(run.parent / "e.parquet")],
        "transfer": ["transfer", str(run), *data, *options, "--out", str(run.parent / "t")],
        "resume": ["pretrain", "--resume", str(run)],
    }[name]


def damage(run, file, how):
    """Damage one file of the newest checkpoint, or the configuration; False: not possible."""
    (newest,) = (run / "checkpoints").iterdir()
    if file == "no checkpoint":
        shutil.rmtree(newest)
        return how == "missing"
    path = run / file if file == "config.json" else next(newest.glob(f"{file}*"))
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "newer":
        if not file.endswith(".json"):
            return False
        stored = json.loads(data)
        if file == "config.json":
            stored["config"]["fancy"] = 1
        path.write_text(json.dumps(stored))
        return file == "config.json"
    else:
        path.write_bytes(
            {"empty": b"", "cut": data[: len(data) // 2], "garbage": b"\x93" * 300}[how]
        )
    return True


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_one_sentence_that_names_the_file(whole, tmp_path, capsys, file, how):
    wrong = {}
    for command, files in NEEDS.items():
        if not (file in files or (file == "no checkpoint" and command != "resume")):
            continue
        run = tmp_path / command.replace(" ", "") / "run"
        shutil.copytree(whole, run)
        if not damage(run, file, how):
            pytest.skip("no such damage")
        if command == "resume" and file != "progress.json":
            progress = next((run / "checkpoints").glob("*/progress.json"), None)
            if progress:  # a finished run is not read
                progress.write_text(
                    json.dumps(json.loads(progress.read_text()) | {"summary": None})
                )
        capsys.readouterr()
        status = cli.main(words(command, run))
        error = capsys.readouterr().err.strip().splitlines()
        if status != 2 or str(run) not in error[-1] or "Traceback" in str(error):
            wrong[command] = (status, error[-3:])
    assert wrong == {}
