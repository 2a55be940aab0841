"""The processes of a job: how they find one another, and how all of them end when one does.

Who they are is told by what has started them (torchrun, srun, or ``--processes``), as Lightning
Fabric reads it; they talk over ``torch.distributed``. Beside it each keeps a pulse in the job's
key-value store: a number that rises every second, and how many collectives it has begun. By these
the others know who is dead and who hangs. The first process that fails says why there, and tells
the user; all others end silently, with its status.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore

from ..errors import Interrupted, ReportedElsewhere, UserError
from ..io.console import console
from .collectives import CollectiveError, World

if TYPE_CHECKING:  # it takes a second to load, which what starts the ranks need not wait for
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

RANK_TIMEOUT = 600.0  # seconds
LAUNCHED = "localagg-"  # and the process id of what has started the ranks, as the name of the job
_PULSE = 1.0  # seconds
_STILL = 4 * _PULSE  # without a beat: dead, where a connection was lost
_GRACE = 10.0  # seconds to end in after another rank has failed
_CONNECT = 10.0  # seconds, to a store that was there
_END, _LEFT = "end", "left"


@contextlib.contextmanager
def join_process_group(
    timeout: float = RANK_TIMEOUT, way_out: str = "begin again"
) -> Iterator[World]:
    """The ranks of the job that this process belongs to; one rank where it was started alone.

    A process group that the caller has made is taken as it is.

    Args:
        timeout: seconds to wait for the others: at the beginning, and in each collective.
        way_out: for the message about a rank that has died, what to do then.

    Raises:
        UserError: a rank does not come, has died or hangs.
        ReportedElsewhere: this rank ends because of another, which tells why.
    """
    if dist.is_initialized():
        world = World.current()
        console.quiet = world.rank > 0
        yield world
        return
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        yield World()
        return
    if timeout <= 0:
        raise UserError("TODO", f"--rank-timeout is {timeout:g}; it must be above 0.")
    console.quiet = environment.global_rank() > 0  # the first tells
    job = Job(environment, timeout, way_out)
    try:
        job.begin()
        yield job.world
        job.world.barrier()
    except BaseException as error:
        raise job.ending(error) from None
    finally:
        job.close()


def _environment() -> "ClusterEnvironment | None":
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment()
        except RuntimeError as error:  # tasks without a number a node
            raise UserError("TODO", str(error)) from None
    return None


class Job:
    """This process as a rank of a job.

    Args:
        environment: who it is, and where the store is.
        timeout: see :func:`join_process_group`.
        way_out: see :func:`join_process_group`.
    """

    def __init__(self, environment: "ClusterEnvironment", timeout: float, way_out: str) -> None:
        self.rank, self.size = environment.global_rank(), environment.world_size()
        self.address = (environment.main_address, environment.main_port)
        self.timeout, self.way_out = timeout, way_out
        self.world = World(self.rank, self.size, environment.local_rank())
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts = self.rank == 0 and not by_agent
        self._parent = _parent()
        self._over = threading.Event()
        self._store: Store | None = None

    def begin(self) -> None:
        """Meet the others."""
        if self._parent != os.getppid():
            raise UserError("TODO", "What has started the processes has ended.")
        try:
            self._store = self._connect(self.timeout, host=self._hosts)
            self._store.set(f"who/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
            threading.Thread(target=self._watch, daemon=True, name="ranks").start()
            self._meet()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                # The watch ends a rank that waits for so long. This is for when it cannot.
                timeout=datetime.timedelta(seconds=2 * self.timeout + 60),
            )
            self.world.barrier()
        except (dist.DistError, CollectiveError) as error:
            raise CollectiveError(str(error)) from None

    def _meet(self) -> None:
        assert self._store is not None
        until = time.monotonic() + self.timeout
        names = [f"who/{rank}" for rank in range(self.size)]
        while not self._store.check(names):
            if self._store.check([_END]):
                raise CollectiveError("another rank has ended")
            if time.monotonic() > until:
                missing = [r for r, name in enumerate(names) if not self._store.check([name])]
                raise UserError(
                    "TODO",
                    f"{_ranks(missing)} of {self.size} did not come within {self.timeout:g} s; see"
                    " why, or wait longer with --rank-timeout.",
                )
            time.sleep(0.05)

    def _connect(self, seconds: float, *, host: bool = False) -> Store:
        """A connection for one thread: while it waits, it serves no other."""
        name, port = self.address
        try:
            store = TCPStore(
                name,
                port,
                is_master=host,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=seconds),
            )
        except dist.DistError:
            raise UserError(
                "TODO",
                f"Rank {self.rank} of {self.size} found nobody at {name}:{port} within"
                f" {seconds:g} s; see whether rank 0 runs there.",
            ) from None
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

    # --- The end ---

    def ending(self, error: BaseException) -> BaseException:
        """What this rank raises in the end: the error, if it is the first of all ranks."""
        lost = isinstance(error, (CollectiveError, dist.DistError))
        store = self._store
        if store is None:
            return error
        try:
            if lost:
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once
                if (status := self._ended(1)) is not None:  # who fails says so before it ends
                    return ReportedElsewhere(status)
                error = UserError("TODO", f"{self._diagnosed(str(error))}; {self.way_out}")
            status = status_of(error)
            return error if post(store, status) else ReportedElsewhere(self._ended(1) or status)
        except dist.DistError:  # the store is gone
            where = f"{self.address[0]}:{self.address[1]}"
            gone = f"Rank 0 of {self.size}, at {where}, has gone; {self.way_out}"
            return UserError("TODO", gone) if lost else error
        finally:
            self._over.set()
            self._leave()

    def _ended(self, seconds: float) -> int | None:
        """The status that another rank has ended with, if one says so within some seconds."""
        assert self._store is not None
        until = time.monotonic() + seconds
        while not self._store.check([_END]):
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)
        return ended(self._store)

    def _diagnosed(self, error: str) -> str:
        """Who is dead, or else who hangs, after a collective has failed."""
        store = self._store
        assert store is not None
        before = [self._pulse(store, rank) for rank in range(self.size)]
        time.sleep(_STILL)
        now = [self._pulse(store, rank) for rank in range(self.size)]
        still = [r for r in range(self.size) if now[r] == before[r] and r != self.rank]
        if still:
            return f"{self._named(store, still)} has died"
        return f"The processes have lost one another ({error.splitlines()[0]})"

    def _named(self, store: Store, ranks: list[int]) -> str:
        who = [store.get(f"who/{r}").decode() for r in ranks if store.check([f"who/{r}"])]
        return f"{_ranks(ranks)} of {self.size} ({'; '.join(who)})"

    def _pulse(self, store: Store, rank: int) -> tuple[int, int]:
        """(beats, collectives begun)"""
        if not store.check([f"pulse/{rank}"]):
            return (0, 0)
        beat, calls = store.get(f"pulse/{rank}").split()
        return int(beat), int(calls)

    def _leave(self) -> None:
        """What hosts the store ends last, so that the others hear why."""
        assert self._store is not None
        until = time.monotonic() + _GRACE / 2
        with contextlib.suppress(dist.DistError):
            left = self._store.add(_LEFT, 1)
            while self._hosts and left < self.size and time.monotonic() < until:
                time.sleep(0.05)
                left = self._store.add(_LEFT, 0)

    def close(self) -> None:
        """Leave the group."""
        self._over.set()
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- The watch: a thread ---

    def _watch(self) -> None:
        """Keep the pulse and look at the next rank's, so that each is looked at by one other.

        It ends the process where the main thread cannot: a collective does not listen.
        """
        try:
            store, beat = self._connect(_CONNECT), 0
            other, seen, silent = (self.rank + 1) % self.size, (0, 0), 0  # times that it was so
            while not self._over.wait(_PULSE):
                beat += 1
                store.set(f"pulse/{self.rank}", f"{beat} {self.world.calls}")
                if os.getppid() != self._parent:
                    self._quit(2, f"What has started rank {self.rank} of {self.size} has ended")
                if store.check([_END]):
                    if not self._over.wait(_GRACE):
                        self._quit(ended(store) or 1)
                    return
                now, mine = self._pulse(store, other), self.world.calls
                # One that lags behind in collectives lets this one wait; who does not, may work.
                alive = now[0] != seen[0] and (now[1] != seen[1] or now[1] >= mine)
                if alive:
                    seen, silent = now, 0
                    continue
                silent += 1  # no clock, which goes on while a whole job is suspended
                if silent * _PULSE > self.timeout and post(store, 2):
                    name = self._named(store, [other])
                    self._quit(2, f"{name} has been silent for {self.timeout:g} s")
        except (dist.DistError, UserError):  # the store has gone, and with it who hosts it
            if not self._over.wait(_GRACE):
                self._quit(2, f"Rank {self.rank} of {self.size} has lost rank 0")

    def _quit(self, status: int, why: str | None = None) -> None:
        if why is not None:
            print(f"localagg: {why}; {self.way_out}", file=sys.stderr, flush=True)
            if self._hosts:
                time.sleep(3 * _PULSE)  # for the others to hear of it
        os._exit(status)


def post(store: Store, status: int) -> bool:
    """Say that the job ends with a status; whether this process is the first to say so."""
    mine = f"{status} {socket.gethostname()} {os.getpid()}".encode()
    return store.compare_set(_END, "", mine.decode()) == mine


def ended(store: Store) -> int | None:
    """The status that was posted; None where none was."""
    return int(store.get(_END).split()[0]) if store.check([_END]) else None


def status_of(error: BaseException) -> int:
    """The exit status that the command line gives to an error."""
    if isinstance(error, (Interrupted, ReportedElsewhere)):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (UserError, OSError)) else 1


def _ranks(ranks: list[int]) -> str:
    return f"Rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _parent() -> int:
    """The process that has started this one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return int(name.removeprefix(LAUNCHED)) if name.startswith(LAUNCHED) else os.getppid()
