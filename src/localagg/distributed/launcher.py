"""Start the processes of ``localagg COMMAND --processes N`` on one machine and wait for them.

Each process gets torchrun's environment. torchrun's agent is not used: its store listens on all
networks, and after a signal it discards the exit statuses of its processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore

from ..errors import ReportedElsewhere, UserError
from ..io.machine import check_process_count, cores
from .process_group import JOB_PREFIX
from .rank_failure import post_exit_status, posted_exit_status
from .signals import EXIT_STATUS

_POLL_SECONDS = 0.05
_END_SECONDS = 15.0  # for the other processes to end in, after the first one has failed


def launch(words: list[str], processes: int, run: str, command: str = "pretrain") -> None:
    """Run ``localagg COMMAND`` in several processes and wait for them.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are forwarded to all of them.

    Args:
        words: command-line words after the command.
        processes: at least 2.
        run: the run folder, for messages.
        command: pretrain or transfer.

    Raises:
        UserError: a process was killed, or the system is Windows.
        ReportedElsewhere: a process failed or was interrupted, and has reported the reason.
    """
    if os.name == "nt":
        raise UserError(
            "unsupported", "--processes needs Linux or macOS; on Windows remove the option."
        )
    check_process_count("--processes", processes, 8)
    server = loopback_store()
    children: list[subprocess.Popen] = []
    with _forward_signals(children) as forwarded:
        try:
            for rank in range(processes):
                children += [
                    _start([command, *words], rank, processes, server.port)
                ]  # killed below if one fails
            status, killed_rank = _wait(children, PrefixStore("0", server))
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
    if killed_rank is not None:
        child = children[killed_rank]
        killer = signal.Signals(-child.returncode)
        if killer in forwarded:  # before the first step, or a second signal
            raise ReportedElsewhere(128 + killer)
        raise UserError(
            "rank-failed",
            f"Rank {killed_rank} of {processes} (process {child.pid}) was killed by"
            f" {killer.name}; continue with localagg {command} --resume {run}",
        )
    if status:
        raise ReportedElsewhere(status)


def loopback_store() -> TCPStore:
    """Serve a key-value store on loopback; torch's default listens on all networks."""
    listener = socket.create_server(("127.0.0.1", 0))
    return TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _start(words: list[str], rank: int, processes: int, port: int) -> subprocess.Popen:
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    defaults = {
        "OMP_NUM_THREADS": max(1, cores() // processes),
        "TORCH_CPP_LOG_LEVEL": "FATAL",  # lost connections are reported by localagg
        **({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}),
    }
    ranks = {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), rank),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), processes),
        **dict.fromkeys(("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"), 0),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": f"{JOB_PREFIX}{os.getpid()}",
    }
    variables = {**defaults, **os.environ, **ranks}
    return subprocess.Popen(
        [sys.executable, "-m", "localagg", *words],
        env={name: str(value) for name, value in variables.items()},
        stdin=subprocess.DEVNULL,
        process_group=0,  # the terminal sends Ctrl-C to this process only, which forwards it once
    )


def _wait(children: list[subprocess.Popen], store: Store) -> tuple[int, int | None]:
    """Return (exit status, rank that was killed before any other rank failed)."""
    deadline, killed_rank = float("inf"), None
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        for rank, child in enumerate(children):
            if child.poll() and deadline == float("inf"):
                deadline = time.monotonic() + _END_SECONDS
                if child.returncode < 0 and post_exit_status(store, 2):
                    killed_rank = rank
    failed = [child.returncode for child in children if child.poll()]
    return posted_exit_status(store) or max(failed, default=0), killed_rank


@contextlib.contextmanager
def _forward_signals(children: list[subprocess.Popen]) -> Iterator[set[int]]:
    """Forward stop signals to all children; yield the set of signals that arrived."""
    arrived: set[int] = set()

    def forward(number: int, _: FrameType | None) -> None:
        arrived.add(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    heard = [number for number in EXIT_STATUS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        yield arrived
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
