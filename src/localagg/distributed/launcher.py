"""The processes of ``localagg pretrain --processes N`` on one machine, and what becomes of them.

They are started as torchrun does it: the same command N times, each with its rank in the
environment. What torchrun cannot do is end with their status, and tell of a death in one sentence.
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
from ..io.machine import cores
from .process_group import LAUNCHED, ended, post
from .signals import STATUS

_LOOK = 0.05  # seconds
_GRACE = 15.0  # seconds for the others to end in, after the first has failed


def launch(words: list[str], processes: int, run: str) -> None:
    """Run ``localagg pretrain`` by several processes, and wait for them.

    SIGINT, SIGTERM and SIGUSR1 are handed on to all of them.

    Args:
        words: of the command line after ``pretrain``.
        processes: 2 or more.
        run: the run folder, for messages.

    Raises:
        UserError: one was killed.
        ReportedElsewhere: they have failed, or were interrupted, and said why.
    """
    tcp = loopback_store()
    children: list[subprocess.Popen] = []
    with _handed_on(children) as handed:
        try:
            for rank in range(processes):
                children += [_start(words, rank, processes, tcp.port)]  # those started are known
            status, dead = _wait(children, PrefixStore("0", tcp))
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
    if dead is not None:
        killer = signal.Signals(-children[dead].returncode)
        if killer in handed:  # before there was anything to save, or a second time
            raise ReportedElsewhere(128 + killer)
        raise UserError(
            "TODO",
            f"Rank {dead} of {processes} (process {children[dead].pid}) was killed by"
            f" {killer.name}; go on with localagg pretrain --resume {run}",
        )
    if status:
        raise ReportedElsewhere(status)


def loopback_store() -> TCPStore:
    """A key-value store that this machine alone can reach; torch's own listens to every network."""
    listening = socket.create_server(("127.0.0.1", 0))
    return TCPStore(
        "127.0.0.1",
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def _start(words: list[str], rank: int, processes: int, port: int) -> subprocess.Popen:
    number = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    count = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    job = {"TORCHELASTIC_RUN_ID": f"{LAUNCHED}{os.getpid()}", "TORCHELASTIC_RESTART_COUNT": 0}
    threads = {"OMP_NUM_THREADS": max(1, cores() // processes)}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    network = {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    quiet = {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # what it tells of lost connections we say shorter
    values = {**threads, **network, **quiet, **os.environ, **number, **count, **store, **job}
    return subprocess.Popen(
        [sys.executable, "-m", "localagg", "pretrain", *words],
        env={name: str(value) for name, value in values.items()},
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C comes by way of this process, and once
    )


def _wait(children: list[subprocess.Popen], store: Store) -> tuple[int, int | None]:
    """(exit status, the rank that was killed, where nobody has said why the job ends)"""
    until, dead = float("inf"), None
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(_LOOK)
        for rank, child in enumerate(children):
            if child.poll() and until == float("inf"):
                until = time.monotonic() + _GRACE
                if child.returncode < 0 and post(store, 2):  # before the others wonder
                    dead = rank
    failed = [child.returncode for child in children if child.poll()]
    return ended(store) or max(failed, default=0), dead


@contextlib.contextmanager
def _handed_on(children: list[subprocess.Popen]) -> Iterator[set[int]]:
    """Signals that ask a run to stop go to all children; which ones have come."""
    came: set[int] = set()

    def hand_on(number: int, _: FrameType | None) -> None:
        came.add(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in STATUS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
