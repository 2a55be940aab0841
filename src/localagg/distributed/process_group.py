"""Join the processes of a job into one group, and end all of them when one fails.

torchrun, srun or ``--processes`` starts the processes; Lightning Fabric reads their ranks from the
environment. They communicate over ``torch.distributed``. :mod:`.rank_failure` finds failed ranks.
"""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore

from ..errors import ReportedElsewhere, UserError
from ..io.console import console
from .collectives import CollectiveError, World
from .rank_failure import (
    END_SECONDS,
    RankMonitor,
    exit_status,
    join_ranks,
    post_exit_status,
    posted_exit_status,
)

if TYPE_CHECKING:  # takes a second to import
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

RANK_TIMEOUT = 600.0  # seconds
JOB_PREFIX = "localagg-"  # name of a job by --processes, before the launcher's process id
_CONNECT_SECONDS = 10.0  # for a second connection to the store
_LEFT_KEY = "left"


@contextlib.contextmanager
def join_process_group(
    timeout: float = RANK_TIMEOUT, remedy: str = "start again"
) -> Iterator[World]:
    """Join the job that this process belongs to; yield one rank if the process runs alone.

    A process group that the caller has initialized is used as it is.

    Args:
        timeout: seconds to wait for the other ranks, at the start and in each collective.
        remedy: advice in the message about a failed rank.

    Raises:
        UserError: a timeout below 0; a rank does not start, has died or hangs.
        ReportedElsewhere: another rank has failed and reports the reason.
    """
    if timeout <= 0:
        raise UserError("option-invalid", f"--rank-timeout is {timeout:g}; it must be above 0.")
    if dist.is_initialized():
        world = World.current()
        console.quiet = world.rank > 0
        yield world
        return
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        yield World()
        return
    console.quiet = environment.global_rank() > 0
    process = _RankProcess(environment, timeout, remedy)
    try:
        process.join()
        yield process.world
        process.world.barrier()
    except BaseException as error:
        raise process.final_error(error) from None
    finally:
        process.leave()


def _environment() -> "ClusterEnvironment | None":
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment()
        except RuntimeError as error:  # for example no number of tasks per node
            raise UserError("environment", str(error)) from None
    return None


class _RankProcess:
    """This process as one rank of a job."""

    def __init__(self, environment: "ClusterEnvironment", timeout: float, remedy: str) -> None:
        rank, size = environment.global_rank(), environment.world_size()
        self.world = World(rank, size, environment.local_rank())
        self.address = (environment.main_address, environment.main_port)
        self.timeout, self.remedy = timeout, remedy
        self.agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.hosts_store = rank == 0 and not self.agent_hosts_store
        self.store: Store | None = None
        self.monitor: RankMonitor | None = None

    def join(self) -> None:
        """Connect to the store, wait for all ranks and initialize the process group."""
        job = os.environ.get("TORCHELASTIC_RUN_ID", "")
        parent = int(job.removeprefix(JOB_PREFIX)) if job.startswith(JOB_PREFIX) else os.getppid()
        if parent != os.getppid():
            raise UserError("rank-failed", f"The launcher (process {parent}) has ended.")
        try:
            self.store = self._connect(self.timeout, host=self.hosts_store)
            self.monitor = RankMonitor(
                self.world, self.store, lambda: self._connect(_CONNECT_SECONDS),
                timeout=self.timeout, remedy=self.remedy, place=self._place_of_store(),
                hosts_store=self.hosts_store, parent=parent,
            )  # fmt: skip
            self._wait_for_ranks(self.store, self.monitor)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", self.store),
                rank=self.world.rank,
                world_size=self.world.size,
                # The monitor ends a rank after ``timeout``; this bound holds if it cannot.
                timeout=datetime.timedelta(seconds=2 * self.timeout + 60),
            )
            self.world.barrier()
        except (dist.DistError, CollectiveError) as error:
            raise CollectiveError(str(error)) from None

    def _place_of_store(self) -> str:
        name, port = self.address
        return f"{'the launcher' if self.agent_hosts_store else 'rank 0'} at {name}:{port}"

    def _wait_for_ranks(self, store: Store, monitor: RankMonitor) -> None:
        deadline = time.monotonic() + self.timeout
        while missing := monitor.missing_ranks():
            if posted_exit_status(store) is not None:
                raise CollectiveError("another rank has ended")
            if time.monotonic() > deadline:
                raise UserError(
                    "rank-failed",
                    f"{join_ranks(missing)} of {self.world.size} did not start within"
                    f" {self.timeout:g} s; check their output, or raise --rank-timeout.",
                )
            time.sleep(0.05)

    def _connect(self, seconds: float, *, host: bool = False) -> Store:
        name, port = self.address
        timeout = datetime.timedelta(seconds=seconds)
        try:
            store = TCPStore(name, port, is_master=host, wait_for_workers=False, timeout=timeout)
        except dist.DistError:
            raise UserError(
                "rank-failed",
                f"Rank {self.world.rank} of {self.world.size} could not connect to {name}:{port}"
                f" within {seconds:g} s; check that rank 0 runs there.",
            ) from None
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

    def final_error(self, error: BaseException) -> BaseException:
        """Return the error to raise: ReportedElsewhere unless this rank is the first to fail."""
        lost = isinstance(error, (CollectiveError, dist.DistError))
        if self.store is None or self.monitor is None:
            return error
        try:
            if lost:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once
                if (status := posted_exit_status(self.store, wait_seconds=1)) is not None:
                    return ReportedElsewhere(status)
                reason = self.monitor.diagnose(str(error))
                error = UserError("rank-failed", f"{reason}; {self.remedy}")
            status = exit_status(error)
            if post_exit_status(self.store, status):
                return error
            return ReportedElsewhere(posted_exit_status(self.store) or status)
        except dist.DistError:  # the process that served the store has ended
            if not lost:
                return error
            name, port = self.address
            message = f"Rank 0 of {self.world.size}, at {name}:{port}, has ended; {self.remedy}"
            return UserError("rank-failed", message)
        finally:
            self.monitor.stop()
            self._wait_to_leave(self.store)

    def _wait_to_leave(self, store: Store) -> None:
        """Keep the store, if this rank hosts it, until the others have read the exit status."""
        deadline = time.monotonic() + END_SECONDS / 2
        with contextlib.suppress(dist.DistError):
            left = store.add(_LEFT_KEY, 1)
            while self.hosts_store and left < self.world.size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = store.add(_LEFT_KEY, 0)

    def leave(self) -> None:
        """Stop the heartbeat and destroy the process group."""
        if self.monitor is not None:
            self.monitor.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
