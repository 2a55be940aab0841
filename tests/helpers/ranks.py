"""Ranks for tests: threads that meet at a barrier, and processes over gloo."""

import datetime
import functools
import queue
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from localagg.distributed.collectives import World

_PATIENCE = 120  # seconds


class Thread(World):
    """A rank in a thread, for thousands of small cases. Sums run in the order of the ranks."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list) -> None:
        super().__init__(rank, size)
        self.meeting, self.table = meeting, table

    def _everyone(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.table[self.rank] = tensor.clone()
        self.meeting.wait()
        everyone = list(self.table)
        self.meeting.wait()  # all have read before any writes again
        assert len({(t.shape, t.dtype) for t in everyone}) == 1, "ranks passed different shapes"
        return everyone

    def _all_reduce(self, tensor, operation):
        two = torch.add if operation == dist.ReduceOp.SUM else torch.maximum
        tensor.copy_(functools.reduce(two, self._everyone(tensor)))

    def _all_gather(self, out, tensor):
        out.copy_(torch.stack(self._everyone(tensor)).view_as(out))

    def _reduce_scatter(self, out, tensor):
        total = functools.reduce(torch.add, self._everyone(tensor))
        out.copy_(total.chunk(self.size)[self.rank])


def in_threads(ranks: int, call: Callable[[World], Any]) -> list[Any]:
    """Return the result of ``call(world)`` on each rank."""
    meeting, table = threading.Barrier(ranks, timeout=_PATIENCE), [None] * ranks

    def one(rank: int) -> Any:
        try:
            return call(Thread(rank, ranks, meeting, table))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
    errors = [future.exception() for future in futures if future.exception()]
    causes = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return [future.result() for future in futures]


class Pool:
    """Processes that stay alive; each call is a new gloo group of the first few of them."""

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "sympy", "localagg.training.runs"]
        )  # torch needs sympy
        self.folder, self.calls = tempfile.TemporaryDirectory(), 0
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(most)]
        self.processes = [
            context.Process(target=_serve, args=(rank, tasks, self.answers), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, ranks: int, call: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the result of ``call(world, *arguments)``, a module's function, on each rank."""
        self.calls += 1
        for tasks in self.tasks[:ranks]:
            tasks.put((ranks, f"{self.folder.name}/{self.calls}", call, arguments))
        answers, errors = {}, []
        for _ in range(ranks):
            try:
                rank, result, error = self.answers.get(timeout=_PATIENCE)
            except queue.Empty:
                raise TimeoutError(f"only ranks {sorted(answers)} answered: {errors}") from None
            answers[rank] = result
            errors += [f"rank {rank}:\n{error}"] if error else []
        assert not errors, "\n".join(errors)
        return [answers[rank] for rank in range(ranks)]

    def close(self) -> None:
        """End the processes."""
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
        self.folder.cleanup()


def _serve(rank: int, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        ranks, store, call, arguments = task
        result = error = None
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=_PATIENCE / 2),
            )
            result = call(World.current(), *arguments)
        except BaseException:
            error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        answers.put((rank, result, error))
