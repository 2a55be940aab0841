"""Processes of one job from the outside: how they start, and how all end when one does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localagg import checkpoint, cli
from localagg.io.metrics_log import read_metrics
from localagg.io.sharded_tensors import find_shards

# 70 steps, each saved.
JOB = (
    "digits --data digits --epochs 5 --ir-epochs 2 --width 4 --blocks 1 --neighbors 64"
    " --clusters 10 20 --kmeans-iterations 3 --batch-size 100 --log-every 1 --eval-every 5"
    " --device cpu --precision 32-true --checkpoint-seconds 0"
)
PATIENCE = 120  # seconds


def begin(command: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=pipe, stderr=pipe, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def pretrain(run: Path, *options: str, ranks: int = 2) -> subprocess.Popen:
    """By processes of our own launcher."""
    words = ["--resume", str(run)]
    if not (run / "config.json").exists():
        words = [*JOB.split(), "--out", str(run)]
    return begin(["localagg", "pretrain", *words, "--processes", str(ranks), *options])


def torchrun(run: Path, *options: str) -> subprocess.Popen:
    words = ["localagg", "pretrain", *JOB.split(), "--out", str(run)]
    return begin(["torch.distributed.run", *options, "-m", *words])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Status, and what localagg has said at the end."""
    _, told = process.communicate(timeout=PATIENCE)
    return process.returncode, [line for line in told.splitlines() if line.startswith("localagg:")]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if saved(run) >= step:
            return
        time.sleep(0.002)
    raise AssertionError("it hangs")


def saved(run: Path) -> int:
    """The last step that was saved."""
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that it has started, in their order."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


def assert_gloo_is_calm(pid: int) -> None:
    """Its waiting thread takes no core from others, which run as usual."""
    policies = {True: set(), False: set()}
    for name in Path(f"/proc/{pid}/task").glob("*/comm"):
        of_gloo = name.read_text() == "gloo_tcp_loop\n"
        policies[of_gloo].add(os.sched_getscheduler(int(name.parent.name)))
    assert policies == {True: {os.SCHED_BATCH}, False: {os.SCHED_OTHER}}


def assert_same(one: Path, other: Path) -> None:
    """To the bit."""
    first, second = checkpoint.latest(one), checkpoint.latest(other)
    files = sorted(file.name for file in first.glob("*.safetensors"))
    assert files == sorted(file.name for file in second.glob("*.safetensors"))
    for name in files:
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert read_metrics(one) == read_metrics(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to, by torchrun on two nodes over loopback."""
    run, port = tmp_path_factory.mktemp("whole") / "run", free_port()
    where = f"--master-addr 127.0.0.1 --master-port {port} --rdzv-backend static"
    nodes = [
        torchrun(run, *f"--nnodes 2 --nproc-per-node 1 --node-rank {node} {where}".split())
        for node in (0, 1)
    ]
    assert [end(node) for node in nodes] == [(0, []), (0, [])]
    assert len(find_shards(checkpoint.latest(run), "bank")) == 2
    return run


def test_a_rank_is_killed_then_the_launcher_then_one_preempted_and_the_run_ends_as_if_none_were(
    tmp_path, whole
):
    """By ``--processes``, and to the bit as the other two nodes."""
    run = tmp_path / "run"
    process = pretrain(run)
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    status, told = end(process)
    assert status == 2
    assert told == [
        f"localagg: Rank 1 of 2 (process {victim}) was killed by SIGKILL; go on with localagg"
        f" pretrain --resume {run}"
    ]

    process = pretrain(run)
    wait_for_step(process, run, saved(run) + 2)
    ranks = ranks_of(process)
    os.kill(process.pid, signal.SIGKILL)
    end(process)  # when the last has ended that could write to its pipe, a second later at most
    assert not any(Path(f"/proc/{rank}/fd/2").exists() for rank in ranks)

    process = pretrain(run)
    wait_for_step(process, run, saved(run) + 2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)  # one hears it, all stop
    status, told = end(process)
    assert status == 75
    assert len(told) == 1
    assert f"go on with localagg pretrain --resume {run}" in told[0]

    assert end(pretrain(run)) == (0, [])
    assert_same(whole, run)


def test_a_killed_rank_of_torchrun_is_named_by_another(tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, "--standalone", "--nproc-per-node", "2")
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[-1]
    os.kill(victim, signal.SIGKILL)
    status, told = end(process)
    assert status == 1  # torchrun's, whatever ranks end with
    assert len(told) == 1
    assert f"(process {victim} on {socket.gethostname()}) has died; go on with" in told[0]


def test_a_rank_that_hangs_is_named_and_ends_the_job(tmp_path):
    run = tmp_path / "run"
    process = pretrain(run, "--rank-timeout", "3")
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[0]
    assert_gloo_is_calm(victim)
    os.kill(victim, signal.SIGSTOP)
    status, told = end(process)
    assert status == 2
    assert told == [
        f"localagg: Rank 0 of 2 (process {victim} on {socket.gethostname()}) has been silent for"
        f" 3 s; go on with localagg pretrain --resume {run}"
    ]
    assert checkpoint.read_progress(checkpoint.latest(run))["step"] >= 3


def srun(run: Path, *options: str) -> list[subprocess.Popen]:
    """Two tasks, as srun would start them; the first keeps the store."""
    job = {"JOB_ID": 1, "JOB_NAME": "test", "NODELIST": "127.0.0.1"}
    job |= {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0}
    tasks = []
    port = free_port()
    for task in (0, 1):
        values = {**job, "PROCID": task, "LOCALID": task}
        names = {f"SLURM_{name}": str(value) for name, value in values.items()}
        words = ["localagg", "pretrain", *JOB.split(), "--out", str(run), *options]
        tasks.append(begin(words, MASTER_PORT=str(port), **names))
    return tasks


def test_under_slurm_a_mistake_is_told_once(tmp_path):
    run = tmp_path / "run"
    ended = [end(task) for task in srun(run, "--kmeans", "faiss")]
    assert [status for status, _ in ended] == [2, 2]
    assert [line for _, told in ended for line in told] == [
        "localagg: --kmeans faiss cannot cluster over 2 processes; use --kmeans lloyd or auto."
    ]
    assert not run.exists()


def test_under_slurm_the_death_of_the_first_task_is_told_by_the_other(tmp_path):
    run = tmp_path / "run"
    first, other = srun(run)
    wait_for_step(first, run, 3)
    first.kill()
    status, told = end(other)
    assert status == 2
    assert len(told) == 1
    assert "Rank 0 of 2, at 127.0.0.1:" in told[0]
    assert told[0].endswith(f"has gone; go on with localagg pretrain --resume {run}")


def test_wrong_numbers_are_refused_before_anything_starts(capsys):
    assert cli.main(["pretrain", "digits", "--data", "digits", "--processes", "0"]) == 2
    assert "--processes is 0; it must be at least 1" in capsys.readouterr().err
