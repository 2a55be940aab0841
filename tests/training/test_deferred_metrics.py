import torch
from torch.utils._python_dispatch import TorchDispatchMode

from localagg.training.deferred_metrics import DeferredMetrics, first_not_finite


def put(deferred, number, loss, gradient=0.0, **values):
    named = {name: torch.tensor(value) for name, value in values.items()}
    index = torch.arange(number, number + 3)
    deferred.put(
        number, {"epoch": 1}, index, {"loss": torch.tensor(loss), **named}, torch.tensor([gradient])
    )


def test_steps_come_late_whole_and_in_order():
    deferred = DeferredMetrics()
    put(deferred, 1, 0.5)
    put(deferred, 2, 1.5, close=0.25)
    assert deferred.exchange() == []
    put(deferred, 3, 2.5)
    first = deferred.exchange()
    assert [step.number for step in first] == [1, 2]
    assert [step.values for step in first] == [{"loss": 0.5}, {"loss": 1.5, "close": 0.25}]
    put(deferred, 4, 3.5)
    rest = deferred.fetch_all()
    assert [(step.number, step.values["loss"]) for step in rest] == [(3, 2.5), (4, 3.5)]
    assert rest[0].facts == {"epoch": 1}
    assert rest[0].index.tolist() == [3, 4, 5]
    assert all(step.finite for step in first + rest)
    assert deferred.fetch_all() == []


def test_a_loss_or_gradient_that_is_not_finite_marks_its_own_step():
    deferred = DeferredMetrics()
    put(deferred, 1, 1.0)
    put(deferred, 2, float("nan"))
    put(deferred, 3, float("inf"))
    put(deferred, 4, 1.0, gradient=float("inf"))
    put(deferred, 5, 1.0, gradient=float("nan"))
    assert [step.finite for step in deferred.fetch_all()] == [True, False, False, False, False]


class CountReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors; each waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    deferred = DeferredMetrics()
    with CountReads() as reads:
        for number in range(5):
            put(deferred, number, 1.0, close=0.5)
    assert reads.count == 0
    with CountReads() as reads:
        torch.tensor(1.0).item()
    assert reads.count == 1  # the counter counts


def test_the_first_tensor_that_is_not_finite_is_named():
    tensors = [("whole", torch.tensor([1])), ("empty", torch.zeros(0)), ("fine", torch.ones(3))]
    assert first_not_finite(tensors) is None
    for wrong in (float("nan"), float("inf"), -float("inf")):
        harmed = torch.ones(5, dtype=torch.bfloat16)
        harmed[2] = wrong
        assert first_not_finite([*tensors, ("harmed", harmed), ("later", harmed)]) == "harmed"
