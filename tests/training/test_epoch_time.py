import functools
import itertools

import pytest
from expect import user_error

from localagg.config import PretrainConfig, override
from localagg.data.inspect.inspect_dataset import inspect
from localagg.training import epoch_time as module

CONFIG = override(
    PretrainConfig(),
    model="resnet18_small",
    width=8,
    blocks=(1,),
    image_size=16,
    batch_size=8,
    neighbors=8,
    clusters=(4, 4),
    device="cpu",
    precision="32-true",
    workers=0,
)
epoch_time = functools.partial(module.epoch_time, seconds=0.05, step_seconds=0.01)


@pytest.fixture(scope="module")
def digits():
    return inspect("digits")["splits"]["train"]


def test_images_on_disk_take_time_to_read(pictures):
    facts = inspect(str(pictures))["splits"]["train"]
    found = epoch_time(CONFIG, str(pictures), facts)
    assert not found["held"]  # sizes differ
    assert min(found["read"], found["ir"], found["la"]) > 0
    assert found["ir_epoch"] == found["read"] + found["ir"]
    assert found["la_epoch"] == found["read"] + found["la"]
    assert (found["images"], found["batch"], found["network"]) == (48, 8, "resnet18_small")
    rows = dict(module.epoch_time_rows(found))
    assert {"resnet18_small,", "8,", "16", "cpu"} <= set(rows["learning"].split())
    assert "0 workers" in rows["reading"]


@pytest.mark.parametrize(
    ("options", "held"), [({}, True), ({"memory": "never"}, False), ({"memory_gb": 1e-6}, False)]
)
def test_images_held_in_memory_are_not_read(digits, options, held):
    found = epoch_time(override(CONFIG, **options), "digits", digits)
    assert found["held"] == held
    assert (found["read"] == 0) == held
    assert (dict(module.epoch_time_rows(found))["reading"] == "held in memory") == held


def test_the_time_of_an_epoch_is_that_of_its_steps(digits, monkeypatch):
    """By a clock that advances by 1 s in each training step."""
    phases, step = [], module.take_step

    def take_step(*words, aggregating, **options):
        phases.append(aggregating)
        return step(*words, aggregating=aggregating, **options)

    monkeypatch.setattr(module, "take_step", take_step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(len(phases)))
    found = epoch_time(CONFIG, "digits", digits)
    assert found["ir"] == found["la"] == 1400 / 8
    assert set(phases) == {False, True}
    fewer = epoch_time(CONFIG, "digits", digits | {"unreadable": [{}] * 400})
    assert fewer["ir"] == 1000 / 8


def test_slow_steps_at_the_beginning_do_not_count(digits, monkeypatch):
    """By a clock that advances by 9 s in each of the first six steps, then by 1 s."""
    clock, step = [0.0], module.take_step
    durations = itertools.chain([9.0] * 6, itertools.repeat(1.0))

    def take_step(*words, **options):
        clock[0] += next(durations)
        return step(*words, **options)

    monkeypatch.setattr(module, "take_step", take_step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert epoch_time(CONFIG, "digits", digits)["ir"] == 1400 / 8


def test_options_that_do_not_fit_the_data_are_named(digits):
    with user_error("option-invalid", "--batch-size 2,000", "1,400 images"):
        epoch_time(override(CONFIG, batch_size=2000), "digits", digits)
