"""Detect and name a rank that dies or hangs, and end all ranks of the job with one exit status.

Each rank publishes a heartbeat in the job's key-value store every second: a counter, and the number
of collectives it has begun. The first rank that fails posts its exit status there and reports the
reason; all other ranks end silently with that status. A store that does not answer ends each rank.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore

from ..errors import Interrupted, ReportedElsewhere, UserError
from .collectives import World

_BEAT_SECONDS = 1.0
_DEAD_SECONDS = 4.0  # without a heartbeat, once a collective has failed
END_SECONDS = 10.0  # for a rank to end by itself after another one has failed
_EXIT_KEY = "exit"


def post_exit_status(store: Store, status: int) -> bool:
    """Post the job's exit status. Return False if another process has posted one before."""
    posted = f"{status} {socket.gethostname()} {os.getpid()}"
    return store.compare_set(_EXIT_KEY, "", posted) == posted.encode()


def posted_exit_status(store: Store, wait_seconds: float = 0.0) -> int | None:
    """Return the job's exit status, or None if nobody posts it within ``wait_seconds``."""
    deadline = time.monotonic() + wait_seconds
    while not store.check([_EXIT_KEY]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)
    return int(store.get(_EXIT_KEY).split()[0])


def exit_status(error: BaseException) -> int:
    """Return the exit status that the command line gives to an error."""
    if isinstance(error, (Interrupted, ReportedElsewhere)):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (UserError, OSError)) else 1


def join_ranks(ranks: list[int]) -> str:
    """Return "Rank 3" or "Ranks 1, 2"."""
    return f"Rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class RankMonitor:
    """Publish the heartbeat of this rank and check those of the others, in a thread.

    Args:
        world: the ranks.
        store: the job's key-value store.
        connect: opens another connection for the thread; one that waits serves no other.
        timeout: seconds of silence after which a rank counts as hanging.
        remedy: advice that ends each message.
        place: names the process that serves the store, and its address.
        hosts_store: whether this process serves the store.
        parent: id of the process that started this one; the rank ends when its parent has ended.
    """

    def __init__(
        self, world: World, store: Store, connect: Callable[[], Store],
        *, timeout: float, remedy: str, place: str, hosts_store: bool, parent: int,
    ) -> None:  # fmt: skip
        self.world, self.timeout, self.remedy, self.place = world, timeout, remedy, place
        self._store, self._hosts_store, self._parent = store, hosts_store, parent
        self._stopped = threading.Event()
        self._beats, self._beating = 0, False
        store.set(f"process/{world.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        threading.Thread(target=self._run, args=[connect], daemon=True, name="heartbeat").start()
        threading.Thread(target=self._watch_store, daemon=True, name="watch").start()

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._stopped.set()

    def missing_ranks(self) -> list[int]:
        """Return the ranks that have not started."""
        ranks = range(self.world.size)
        if self._store.check([f"process/{rank}" for rank in ranks]):
            return []
        return [rank for rank in ranks if not self._store.check([f"process/{rank}"])]

    def diagnose(self, error: str) -> str:
        """Name the ranks that have died, after a collective has failed with ``error``."""
        ranks = range(self.world.size)
        before = [self._heartbeat(self._store, rank) for rank in ranks]
        time.sleep(_DEAD_SECONDS)
        dead = [
            rank
            for rank in ranks
            if rank != self.world.rank and self._heartbeat(self._store, rank) == before[rank]
        ]
        if dead:
            return f"{self._describe(self._store, dead)} has died"
        return f"The connection between the processes was lost ({error.splitlines()[0]})"

    def _describe(self, store: Store, ranks: list[int]) -> str:
        """Return ranks with process ids and hosts."""
        keys = [f"process/{rank}" for rank in ranks]
        processes = [store.get(key).decode() for key in keys if store.check([key])]
        return f"{join_ranks(ranks)} of {self.world.size} ({'; '.join(processes)})"

    def _heartbeat(self, store: Store, rank: int) -> tuple[int, int]:
        """Return (heartbeats, collectives begun)."""
        if not store.check([f"heartbeat/{rank}"]):
            return 0, 0
        beats, calls = store.get(f"heartbeat/{rank}").split()
        return int(beats), int(calls)

    def _run(self, connect: Callable[[], Store]) -> None:
        """Publish heartbeats and check the next rank's, so that each rank is checked by another.

        End this process where its main thread cannot: a collective that waits is not interruptible.
        """
        rank, size = self.world.rank, self.world.size
        try:
            store, other = connect(), (rank + 1) % size
            self._beating = True
            last_seen, silent = (0, 0), 0
            while not self._stopped.wait(_BEAT_SECONDS):
                self._beats += 1
                store.set(f"heartbeat/{rank}", f"{self._beats} {self.world.calls}")
                if os.getppid() != self._parent:
                    self._exit(2, f"The process that started rank {rank} of {size} has ended")
                if (status := posted_exit_status(store)) is not None:
                    self._beating = False
                    if not self._stopped.wait(END_SECONDS):
                        self._exit(status)
                    return
                seen, own_calls = self._heartbeat(store, other), self.world.calls
                # A rank that is behind in collectives makes this one wait; one that is not may be
                # computing.
                if seen[0] != last_seen[0] and (seen[1] != last_seen[1] or seen[1] >= own_calls):
                    last_seen, silent = seen, 0
                    continue
                silent += 1  # counts beats, as a clock runs on while a job is suspended
                if silent * _BEAT_SECONDS > self.timeout and post_exit_status(store, 2):
                    other_rank = self._describe(store, [other])
                    self._exit(2, f"{other_rank} has been silent for {self.timeout:g} s")
        except (dist.DistError, UserError):  # the store, or the process that served it, is gone
            self._beating = False
            if not self._stopped.wait(END_SECONDS):
                self._exit(2, f"Rank {rank} of {size} has lost rank 0")

    def _watch_store(self) -> None:
        """End this process if the store takes a request and never answers: both threads wait."""
        last_beats, silent = 0, 0
        while not self._stopped.wait(_BEAT_SECONDS):
            silent = 0 if self._beats != last_beats or not self._beating else silent + 1
            last_beats = self._beats
            if silent * _BEAT_SECONDS > self.timeout:
                silence = f"no answer from {self.place} for {self.timeout:g} s"
                self._exit(2, f"Rank {self.world.rank} of {self.world.size} has had {silence}")

    def _exit(self, status: int, reason: str | None = None) -> None:
        if reason is not None:
            print(f"localagg: {reason}; {self.remedy}", file=sys.stderr, flush=True)
            if self._hosts_store:
                time.sleep(3 * _BEAT_SECONDS)  # until the other ranks have read the status
        os._exit(status)
