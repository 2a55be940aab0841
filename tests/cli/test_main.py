"""Exit statuses and messages of the command line; commands are in test_commands.py."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
from small_commands import run_small

from embeddings import save_small_encoder
from localagg import cli
from localagg.cli.commands import COMMANDS
from localagg.errors import Interrupted, ReportedElsewhere


def localagg(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "localagg", *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_small(tmp_path_factory.mktemp("runs") / "small")


def test_help_lists_every_command():
    done = localagg("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_version_and_help_without_a_command(capsys):
    assert (cli.main([]), cli.main(["--version"])) == (0, 0)
    assert "localagg 0." in capsys.readouterr().out


# A command line and the values that its message names.
INVALID = [
    ("train", "'train'"),
    ("pretrain folder --data /no/such/folder", "'/no/such/folder'"),
    ("pretrain folder --data {empty}", "{empty}"),
    ("pretrain digitz --data digits", "'digitz' 'digits'"),
    ("pretrain digits --data digits --neighbors 1401 --out {new}", "--neighbors 1,401 1,400"),
    ("pretrain digits --data digits --clusters 9 1500 --out {new}", "--clusters 1,500 1,400"),
    ("pretrain digits --data digits --out {run}", "{run}"),
    ("pretrain digits", "--data"),
    ("pretrain", "pretrain digits --data"),
    ("pretrain trans_res18_LA --data digits", "localagg transfer --recipe trans_res18_LA"),
    ("pretrain res18_LAA --data digits", "'res18_LAA' 'res18_LA'"),
    ("pretrain --config /no/such.json:x --data digits", "/no/such.json"),
    ("pretrain digits --data digits --start {empty} --out {new}", "{empty}"),
    ("pretrain digits --data digits --processes 0", "--processes 0"),
    ("pretrain digits --data digits --json /no/such/folder/x.json", "--json /no/such/folder"),
    ("pretrain --resume {run} --data {pictures}", "{pictures}"),
    ("pretrain --resume {run} --width 16", "--width 8 16"),
    ("pretrain --resume {run} --out {new}", "--out {run}"),
    ("pretrain --resume {empty}", "{empty}"),
    ("transfer", "RUN"),
    ("transfer {run}/weights --data digits --out {new}", "{run}/weights"),
    ("transfer {run} --recipe trans_res19_LA", "'trans_res18_LA'"),
    ("transfer {run} --layers 9 --out {new}", "'9'"),
    ("transfer {run} --data {pictures}/val --out {new}", "{pictures}/val"),
    ("transfer {empty} --out {new}", "{empty}"),
    ("transfer --resume {run}", "{run}"),
    ("transfer --resume {new} --epochs 5", "--epochs {new}"),
    ("transfer --resume {new} --out {run}", "--out {new}"),
    ("transfer {run} --quick --layers 9 --out {new}", "'9'"),
    ("transfer {run} --quick --epochs 3", "--epochs --quick"),
    ("transfer {run} --quick --cache-gb 0", "--cache-gb 0"),
    ("transfer {run} --few 2", "2"),
    ("transfer {run} --few 0.1 --cache-gb 0", "--cache-gb 0"),
    ("transfer {run} --few 0.1 --quick", "--few --quick"),
    ("transfer {run} --per-class 3 --ten-crop", "--ten-crop --per-class"),
    ("transfer {run} --few 0.1 --finetune --no-ten-crop", "--ten-crop --few"),
    ("transfer {run} --few 0.1 --learning-rate 0.1", "--learning-rate --few --finetune"),
    ("transfer {run} --per-class 3 --epochs 2", "--epochs --per-class --finetune"),
    ("embed {run} --data digits --out /no/such/e.parquet", "--out /no/such"),
    ("embed {run} --data /no/such/folder --out {new}.parquet", "/no/such/folder"),
    ("embed {run} --data digits", "--out"),
    ("search {run}/none.parquet x.png", "none.parquet"),
    ("search {run}/config.json x.png", "config.json"),
    ("results {empty}", "{empty}"),
    ("results /no/such/run", "/no/such/run"),
    ("pack {empty} {new}", "{empty}"),
    ("pack digits {run}", "{run}"),
    ("pack digits {new} --keep --size 8", "--keep --size"),
    ("import-tf {empty} --model preact_resnet18 --out {new}", "{empty}"),
    ("knn {bare}", "{bare}"),
    ("knn {empty} --data digits", "{empty}"),
    ("knn {run} --data {pictures}", "--against embeddings"),
    ("knn {run} --k 0", "--k 0"),
    ("inspect /no/such/folder", "/no/such/folder"),
    ("inspect digits --recipe foldr", "'folder'"),
    ("demo --out {run}", "--out {run}"),
]


@pytest.mark.parametrize(("line", "named"), INVALID, ids=[line for line, _ in INVALID])
def test_invalid_use_is_one_sentence_and_status_2(line, named, tmp_path, run, pictures, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare" / "config.json").write_text((run / "config.json").read_text())
    places = {name: tmp_path / name for name in ("empty", "bare", "new")}
    places |= {"run": run, "pictures": pictures}
    assert cli.main(line.format(**places).split()) == 2
    shown = capsys.readouterr()
    message = shown.err.strip().splitlines()[-1]
    assert message.startswith("localagg: ")
    assert [word for word in named.format(**places).split() if word not in message] == []
    assert shown.out == ""
    assert not (tmp_path / "new").exists()


def test_a_mistake_in_a_process_of_its_own_ends_with_status_2():
    done = localagg("pretrain", "digits", "--data", "/no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    first, last = done.stderr.strip().splitlines()
    assert first.startswith("localagg pretrain: ")
    assert "/no/such/folder" in last


@pytest.mark.parametrize(
    ("error", "status", "named"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (
            PermissionError(13, "Permission denied", "a\nb"),
            2,
            r"a\nb': Permission denied; change its permissions",
        ),
        (Interrupted("saved", status=75), 75, "saved"),
        (ReportedElsewhere(3), 3, ""),
        (OSError("internal"), None, ""),
        (RuntimeError("internal"), None, ""),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "worker"),
    ],
)
def test_an_exception_becomes_an_exit_status(error, status, named, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setitem(COMMANDS, "recipes", (COMMANDS["recipes"][0], fail))
    if status is None:  # an internal error keeps its traceback
        with pytest.raises(type(error)):
            cli.main(["recipes"])
    else:
        assert cli.main(["recipes"]) == status
    assert named in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
@pytest.mark.parametrize(("to", "status"), [(">&-", 0), (">/dev/full", 2)])
def test_a_closed_or_full_output_is_no_internal_error(to, status):
    words = ["sh", "-c", f"{shlex.quote(sys.executable)} -m localagg recipes {to}"]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert done.stderr.startswith("localagg: ") == (status == 2)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["pretrain", "folder", "--help"]])
def test_a_closed_pipe_ends_a_command_quietly(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "localagg", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_messages_into_a_closed_pipe_end_a_command_too(pictures):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "localagg", "inspect", str(pictures), "--recipe", "none"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stdout


def test_images_beyond_all_memory_are_one_sentence(tmp_path):
    weights, _ = save_small_encoder(tmp_path / "w.safetensors")
    size = ["--image-size", str(10**9)]
    out = ["--data", "digits", "--out", str(tmp_path / "o.parquet")]
    for command in (["embed", str(weights)], ["pretrain", "digits"]):
        done = localagg(*command, *out, *size)
        assert done.returncode == 2
        assert not (tmp_path / "o.parquet").exists()


IMPATIENT = """
import atexit, os, signal, sys
from localagg.cli import main
module = sys.modules["localagg.cli.main"]
def press(*_):
    signal.raise_signal(signal.SIGINT)
module._run_command = press
atexit.register(press)
sys.exit(main())
"""


def test_one_more_ctrl_c_while_the_program_ends_prints_no_traceback():
    done = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True)
    assert done.stderr == "localagg: stopped.\n"
    assert done.returncode == -signal.SIGINT
