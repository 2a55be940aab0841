"""Runs and outputs that are moved, deleted, renamed or not writable, and odd terminals."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from expect import user_error
from small_commands import SMALL, WITHOUT_LA, run_and_table

import localagg
from localagg import cli
from localagg.embeddings.open_table import open_table
from localagg.io.files import atomic_write, hidden_beside
from localagg.io.metrics_log import read_metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run_and_table(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def start(run, *words):
    """Start a run of many epochs, and wait until it has a checkpoint."""
    command = [sys.executable, "-m", "localagg", "pretrain", "digits", "--data", "digits"]
    options = [*WITHOUT_LA, "--ir-epochs", "400", "--epochs", "400", "--eval-every", "0"]
    process = subprocess.Popen(
        [*command, "--out", str(run), *options, *words], stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not any((run / "checkpoints").glob("step-*")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("away", ["deleted", "moved"])
def test_a_run_folder_that_vanishes_ends_the_run_and_is_not_made_again(away, tmp_path):
    run = tmp_path / "run"
    process = start(run)
    run.rename(tmp_path / "moved")
    if away == "deleted":
        shutil.rmtree(tmp_path / "moved")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"'{run}' was moved or deleted" in said
    assert not run.exists()
    if away == "moved":
        (tmp_path / "moved").rename(run)
        localagg.load(run)


@pytest.mark.slow
def test_a_lost_terminal_saves_the_run(tmp_path):
    process = start(tmp_path / "run")
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "resume" in said


@pytest.mark.parametrize("harm", ["lost", "cut"])
def test_lost_metrics_are_said_and_never_filled_up(run, harm, capfd):
    file = run / "metrics.jsonl"
    kept = b"" if harm == "lost" else file.read_bytes()[:-30]
    file.unlink() if harm == "lost" else file.write_bytes(kept)
    words = ["--resume", str(run), "--epochs", "3"]
    assert cli.main(["pretrain", *words]) == 0
    assert "metrics.jsonl" in capfd.readouterr().err
    lines = read_metrics(run)
    assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert lines[-1]["epoch"] == 3
    file.write_text("no JSON\n")
    with user_error("damaged", file):
        read_metrics(run)


def test_a_name_that_weights_cannot_have_is_refused_before_the_work(run, tmp_path, capsys):
    odd = os.fsencode(tmp_path) + b"/r\xff"
    words = ["pretrain", "digits", "--data", "digits", "--out", os.fsdecode(odd)]
    assert cli.main([*words, *SMALL]) == 2
    assert not os.path.exists(odd)
    os.rename(run, odd)
    capsys.readouterr()
    assert cli.main(["clusters", os.fsdecode(odd)]) == 2
    assert r"r\xff' is not valid UTF-8; rename" in capsys.readouterr().err


def test_the_longest_names_are_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".html")
    with atomic_write(path) as beside:
        beside.write_text("whole")
    assert path.read_text() == "whole"
    assert len(os.fsencode(hidden_beside(path, ".parts").name)) <= 255


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.pt", "progress.json"])
def test_a_lost_file_of_a_checkpoint_is_called_missing(run, lost, capsys):
    (file,) = (run / "checkpoints").glob(f"*/{lost}")
    file.unlink()
    assert cli.main(["pretrain", "--resume", str(run), "--epochs", "3"]) == 2
    assert f"{lost}' is missing; restore it" in capsys.readouterr().err
    if lost == "model.safetensors":
        with user_error("damaged", "is missing"):
            open_table(run)


def test_a_run_that_lost_its_checkpoints_says_that_it_begins_anew(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["pretrain", "--resume", str(run)]) == 0
    assert "begins anew" in capsys.readouterr().err


ROOT_ALONE = "root may write everywhere; setpriv takes that right away"
LIMITED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@pytest.mark.parametrize(
    ("words", "way"),
    [
        ("knn run", "results.json': Permission denied; change"),
        ("clusters run", "embed run --data"),
        ("clusters table.parquet --html run/x.html", "run/x.html': Permission denied; change"),
        ("pack photos run/packed", "change its permissions"),
        ("embed run --data digits --out run/x.parquet", "run/x.parquet': Permission denied"),
    ],
)
def test_a_folder_that_may_not_be_written_is_named_with_the_way_out(
    words, way, made, run, flat, tmp_path
):
    limit = LIMITED if os.geteuid() == 0 else []
    if limit and shutil.which("setpriv") is None:
        pytest.skip(ROOT_ALONE)
    (run / "embeddings.parquet").unlink(missing_ok=True)
    shutil.copy(made[1], tmp_path / "table.parquet")
    shutil.copytree(flat, tmp_path / "photos")
    run.chmod(0o555)
    command = [*limit, sys.executable, "-m", "localagg", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    run.chmod(0o755)
    assert done.returncode == 2
    assert way in done.stderr.splitlines()[-1]


WITHOUT_IMAGES = """
import sys
from localagg import cli
from localagg.data.sources.digits import Digits

Digits.__getitem__ = None
for line in sys.stdin.read().splitlines():
    print(cli.main(line.split(chr(9))), file=sys.stderr)
"""
CLOSED = """\
knn CLOSED --data digits
knn RUN --data digits --json CLOSED/x.json
transfer CLOSED --data digits
transfer CLOSED --data digits --quick --out ELSE
transfer CLOSED --data digits --few 0.5
transfer RUN --data digits --out CLOSED/t
transfer RUN --data digits --quick --out CLOSED/t
transfer RUN --data digits --few 0.5 --out CLOSED/t
report RUN --out CLOSED/r.html
clusters TABLE --html CLOSED/c.html
duplicates TABLE --out CLOSED/d.csv
export RUN --to hub --out CLOSED/hub
inspect digits --json CLOSED/x.json"""


def test_an_unwritable_place_is_found_before_the_work(made, tmp_path):
    limit = LIMITED if os.geteuid() == 0 else []
    if limit and shutil.which("setpriv") is None:
        pytest.skip(ROOT_ALONE)
    closed = shutil.copytree(made[0], tmp_path / "closed")
    (closed / ".results.json.lock").unlink(missing_ok=True)
    places = {"CLOSED": closed, "RUN": made[0], "TABLE": made[1], "ELSE": tmp_path / "else"}
    words = CLOSED.replace(" ", "\t")
    for name, place in places.items():
        words = words.replace(name, str(place))
    closed.chmod(0o555)
    command = [*limit, sys.executable, "-c", WITHOUT_IMAGES]
    done = subprocess.run(command, input=words, cwd=tmp_path, capture_output=True, text=True)
    closed.chmod(0o755)
    said = [line for line in done.stderr.splitlines() if not line.endswith(": starting")]
    assert said[1::2] == ["2"] * len(CLOSED.splitlines()), done.stderr
    for line in said[::2]:
        assert line.startswith(f"localagg: '{closed}")
        assert "Permission denied; change its permissions, or" in line


def test_a_terminal_that_cannot_show_a_name_shows_its_code(made, flat, tmp_path):
    photos = shutil.copytree(flat, tmp_path / "photos")
    first = min(photos.iterdir())
    first.rename(first.with_name("\U0001f600.jpg"))
    table = tmp_path / "photos.parquet"
    assert cli.main(["embed", str(made[0]), "--data", str(photos), "--out", str(table)]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "localagg", "outliers", str(table), "--top", "50"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert r"\U0001f600.jpg" in done.stdout


def test_a_file_that_looks_like_an_option_is_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.jpg").write_bytes(b"a photo")
    assert cli.main(["search", "table.parquet", "-dash.jpg"]) == 2
    assert "./-dash.jpg" in capsys.readouterr().err


def test_missing_address_space_is_one_sentence(monkeypatch, capsys):
    def fail(_):
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setitem(
        cli.main.__globals__["COMMANDS"],
        "recipes",
        (
            cli.main.__globals__["COMMANDS"]["recipes"][0],
            fail,
        ),
    )
    assert cli.main(["recipes"]) == 2
    assert "ulimit -v" in capsys.readouterr().err


PROGRAM = """
import localagg, multiprocessing, sys
from localagg.config import override

def learn():
    options = {"epochs": 1, "ir_epochs": 1, "workers": 2, "memory": "never"}
    config = override(localagg.recipe("digits").config, **options)
    try:
        localagg.pretrain(config, "digits", sys.argv[1])
    except localagg.UserError as error:
        print(error.code, error)

if __name__ == "__main__":
"""


@pytest.mark.parametrize(
    ("call", "stdin", "way"),
    [
        (
            "p = multiprocessing.Process(target=learn, daemon=True); p.start(); p.join()",
            False,
            "daemonic",
        ),
        ("multiprocessing.set_start_method('spawn'); learn()", True, "save it as a file"),
    ],
)
def test_a_process_that_cannot_start_workers_is_told(call, stdin, way, tmp_path):
    program, script = f"{PROGRAM}    {call}\n", tmp_path / "program.py"
    script.write_text(program)
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-" if stdin else str(script), str(run)],
        input=program if stdin else None,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("environment"), done.stderr
    assert way in done.stdout
