import torch
from torch.utils._python_dispatch import TorchDispatchMode

from localagg.training.deferred_metrics import Watch, not_finite


def put(watch, number, loss, gradient=0.0, **values):
    named = {name: torch.tensor(value) for name, value in values.items()}
    index = torch.arange(number, number + 3)
    watch.put(
        number, {"epoch": 1}, index, {"loss": torch.tensor(loss), **named}, torch.tensor([gradient])
    )


def test_steps_come_late_whole_and_in_order():
    watch = Watch()
    put(watch, 1, 0.5)
    put(watch, 2, 1.5, close=0.25)
    assert watch.begin() == []
    put(watch, 3, 2.5)
    first = watch.begin()
    assert [step.number for step in first] == [1, 2]
    assert [step.values for step in first] == [{"loss": 0.5}, {"loss": 1.5, "close": 0.25}]
    put(watch, 4, 3.5)
    rest = watch.finish()
    assert [(step.number, step.values["loss"]) for step in rest] == [(3, 2.5), (4, 3.5)]
    assert rest[0].facts == {"epoch": 1}
    assert rest[0].index.tolist() == [3, 4, 5]
    assert all(step.finite for step in first + rest)
    assert watch.finish() == []


def test_a_loss_or_gradient_that_is_not_finite_is_told_of_its_own_step():
    watch = Watch()
    put(watch, 1, 1.0)
    put(watch, 2, float("nan"))
    put(watch, 3, float("inf"))
    put(watch, 4, 1.0, gradient=float("inf"))
    put(watch, 5, 1.0, gradient=float("nan"))
    assert [step.finite for step in watch.finish()] == [True, False, False, False, False]


class Asked(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors; each waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_asks_nothing_of_the_device():
    watch = Watch()
    with Asked() as asked:
        for number in range(5):
            put(watch, number, 1.0, close=0.5)
    assert asked.count == 0
    with Asked() as asked:
        torch.tensor(1.0).item()
    assert asked.count == 1  # the counter counts


def test_the_first_tensor_that_is_not_finite_is_named():
    tensors = [("whole", torch.tensor([1])), ("empty", torch.zeros(0)), ("fine", torch.ones(3))]
    assert not_finite(tensors) is None
    for wrong in (float("nan"), float("inf"), -float("inf")):
        harmed = torch.ones(5, dtype=torch.bfloat16)
        harmed[2] = wrong
        assert not_finite([*tensors, ("harmed", harmed), ("later", harmed)]) == "harmed"
