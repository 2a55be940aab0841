"""Jobs of several processes: how they start, and how all end when one fails."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_runs import assert_same_run

from localagg import checkpoint
from localagg.cli.main import main
from localagg.io.sharded_tensors import find_shards

# 112 steps, each saved.
JOB = (
    "digits --data digits --epochs 8 --ir-epochs 2 --width 4 --blocks 1 --neighbors 64"
    " --clusters 10 20 --kmeans-iterations 3 --batch-size 100 --log-every 1 --eval-every 4"
    " --device cpu --precision 32-true --checkpoint-seconds 0"
)
LOCALAGG = ("-m", "localagg")
PATIENCE = 300  # seconds


def begin(command: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command], stdout=pipe, stderr=pipe, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def pretrain(run: Path, *options: str, ranks: int = 2) -> subprocess.Popen:
    words = ["--resume", str(run)]
    if not (run / "config.json").exists():
        words = [*JOB.split(), "--out", str(run)]
    return begin(["localagg", "pretrain", *words, "--processes", str(ranks), *options])


def torchrun(run: Path, *options: str, program: tuple[str, ...] = LOCALAGG) -> subprocess.Popen:
    words = [*program, "pretrain", *JOB.split(), "--out", str(run)]
    return begin(["torch.distributed.run", *options, *words])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Return the exit status and the error lines."""
    _, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, [
        line for line in stderr.splitlines() if line.startswith("localagg:")
    ]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if saved(run) >= step:
            return
        time.sleep(0.002)
    raise AssertionError("timeout")


def saved(run: Path) -> int:
    """Return the last saved step."""
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the ids of its child processes, in order."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


def assert_only_gloo_is_batch(pid: int) -> None:
    """Gloo's polling thread is a batch task, and no other thread is."""
    policies = {True: set(), False: set()}
    for name in Path(f"/proc/{pid}/task").glob("*/comm"):
        of_gloo = name.read_text() == "gloo_tcp_loop\n"
        policies[of_gloo].add(os.sched_getscheduler(int(name.parent.name)))
    assert policies == {True: {os.SCHED_BATCH}, False: {os.SCHED_OTHER}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run by torchrun on two nodes over loopback."""
    run, port = tmp_path_factory.mktemp("whole") / "run", free_port()
    where = f"--master-addr 127.0.0.1 --master-port {port} --rdzv-backend static"
    nodes = [
        torchrun(run, *f"--nnodes 2 --nproc-per-node 1 --node-rank {node} {where}".split())
        for node in (0, 1)
    ]
    assert [end(node) for node in nodes] == [(0, []), (0, [])]
    assert len(find_shards(checkpoint.latest(run), "bank")) == 2
    return run


@pytest.mark.slow
def test_a_run_whose_rank_then_launcher_is_killed_then_preempted_ends_bit_exact(tmp_path, whole):
    run = tmp_path / "run"
    process = pretrain(run)
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    status, errors = end(process)
    assert status == 2
    assert len(errors) == 1
    for value in (f"Rank 1 of 2 (process {victim})", "SIGKILL", f"--resume {run}"):
        assert value in errors[0]

    process = pretrain(run)
    wait_for_step(process, run, saved(run) + 2)
    ranks = ranks_of(process)
    os.kill(process.pid, signal.SIGKILL)
    end(process)  # once no rank is left that could write to its pipe
    assert not any(Path(f"/proc/{rank}/fd/2").exists() for rank in ranks)

    process = pretrain(run)
    wait_for_step(process, run, saved(run) + 2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)  # one rank gets it, all stop
    status, errors = end(process)
    assert status == 75
    assert len(errors) == 1
    assert f"--resume {run}" in errors[0]

    assert end(pretrain(run)) == (0, [])
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_the_launcher_forwards_a_signal_and_exits_with_its_status(tmp_path, number, expected):
    run = tmp_path / "run"
    process = pretrain(run)
    wait_for_step(process, run, 3)
    os.kill(process.pid, number)
    status, errors = end(process)
    assert status == expected
    assert len(errors) == 1
    assert f"--resume {run}" in errors[0]


# As torchrun does if it sees the dead rank while the other unwinds.
TERMINATED = """
import os, signal, sys
from localagg.cli.main import main
from localagg.distributed.process_group import _RankProcess
final_error = _RankProcess.final_error
def terminated(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return final_error(*arguments)
_RankProcess.final_error = terminated
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_rank_of_torchrun_is_named_by_another(tmp_path):
    run, script = tmp_path / "run", tmp_path / "terminated.py"
    script.write_text(TERMINATED)
    process = torchrun(run, "--standalone", "--nproc-per-node", "2", program=(str(script),))
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[-1]
    os.kill(victim, signal.SIGKILL)
    status, errors = end(process)
    assert status == 1  # torchrun's own status
    assert len(errors) == 1
    for value in (f"(process {victim} on {socket.gethostname()})", f"--resume {run}"):
        assert value in errors[0]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_the_job(tmp_path):
    run = tmp_path / "run"
    process = pretrain(run, "--rank-timeout", "3")
    wait_for_step(process, run, 3)
    victim = ranks_of(process)[0]
    assert_only_gloo_is_batch(victim)
    os.kill(victim, signal.SIGSTOP)
    status, errors = end(process)
    assert status == 2
    assert len(errors) == 1
    host = socket.gethostname()
    for value in (f"Rank 0 of 2 (process {victim} on {host})", "3 s", f"--resume {run}"):
        assert value in errors[0]
    assert checkpoint.read_progress(checkpoint.latest(run))["step"] >= 3


def srun(run: Path, *options: str) -> list[subprocess.Popen]:
    """Two tasks, as srun starts them; the first hosts the store."""
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


@pytest.mark.slow
def test_under_slurm_a_user_error_is_reported_once(tmp_path):
    run = tmp_path / "run"
    ended = [end(task) for task in srun(run, "--kmeans", "faiss")]
    assert [status for status, _ in ended] == [2, 2]
    (error,) = [line for _, errors in ended for line in errors]
    assert "--kmeans faiss" in error
    assert not run.exists()


@pytest.mark.slow
def test_under_slurm_the_death_of_the_first_task_is_reported_by_the_other(tmp_path):
    run = tmp_path / "run"
    first, other = srun(run)
    wait_for_step(first, run, 3)
    first.kill()
    status, errors = end(other)
    assert status == 2
    assert len(errors) == 1
    for value in ("Rank 0 of 2", "127.0.0.1:", f"--resume {run}"):
        assert value in errors[0]


@pytest.mark.slow
def test_under_slurm_a_first_task_that_hangs_with_the_store_ends_the_other(tmp_path):
    run = tmp_path / "run"
    first, other = srun(run, "--rank-timeout", "3")
    wait_for_step(first, run, 3)
    first.send_signal(signal.SIGSTOP)
    status, errors = end(other)
    first.kill()
    end(first)
    assert status == 2
    assert len(errors) == 1
    for value in ("rank 0", "127.0.0.1:", "3 s", f"--resume {run}"):
        assert value in errors[0]


def test_zero_processes_are_rejected_before_anything_starts(capsys):
    assert main(["pretrain", "digits", "--data", "digits", "--processes", "0"]) == 2
    assert "--processes" in capsys.readouterr().err
