import pytest
from expect import user_error

from localagg.config import PretrainConfig, override
from localagg.data.inspect.inspect_dataset import inspect
from localagg.training import epoch_time as module
from localagg.training.epoch_time import epoch_time, epoch_time_rows

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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.05)
    monkeypatch.setattr(module, "_STEP_SECONDS", 0.01)


def test_reading_counts_only_where_images_are_read(pictures):
    facts = inspect(str(pictures))["splits"]["train"]
    found = epoch_time(CONFIG, str(pictures), facts)
    assert not found["held"]  # sizes differ
    assert min(found["read"], found["ir"], found["la"]) > 0
    assert found["ir_epoch"] == found["read"] + found["ir"]
    assert found["la_epoch"] == found["read"] + found["la"]
    assert (found["images"], found["batch"], found["network"]) == (48, 8, "resnet18_small")
    told = dict(epoch_time_rows(found))
    assert told["learning"] == "resnet18_small, batch 8, views of 16 pixels, on cpu"
    assert "workers" in told["reading"]


def test_images_held_in_memory_are_not_read():
    facts = inspect("digits")["splits"]["train"]
    found = epoch_time(CONFIG, "digits", facts)
    assert (found["held"], found["read"]) == (True, 0)
    assert dict(epoch_time_rows(found))["reading"] == "held in memory"
    never = epoch_time(override(CONFIG, memory="never"), "digits", facts)
    assert never["read"] > 0
    tight = epoch_time(override(CONFIG, memory_gb=1e-6), "digits", facts)
    assert tight["read"] > 0


def test_an_epoch_is_as_long_as_its_images_are_many(monkeypatch):
    """By a clock that adds 1 s whenever it is read: each timed step takes one."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    facts = inspect("digits")["splits"]["train"]
    found = epoch_time(CONFIG, "digits", facts)
    assert found["ir"] == found["la"] == 1400 / 8
    facts["unreadable"] = [{}] * 400
    assert epoch_time(CONFIG, "digits", facts)["ir"] == 1000 / 8


def test_what_cannot_be_run_cannot_be_timed():
    facts = inspect("digits")["splits"]["train"]
    with user_error("option-invalid", "--batch-size 2,000", "1,400 images"):
        epoch_time(override(CONFIG, batch_size=2000), "digits", facts)
