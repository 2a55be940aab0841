import time
from types import SimpleNamespace

import pytest

from localagg.config import PretrainConfig, ViewConfig, override
from localagg.data.loading import loading_hint
from localagg.data.loading.loading_hint import data_loading_hint
from localagg.data.sources.image_folder import ImageFolder
from localagg.training.runs import pretrain


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Four cores and 16 GiB."""
    monkeypatch.setattr(loading_hint, "cores", lambda: 4)
    monkeypatch.setattr(loading_hint, "memory_bytes", lambda: 16 * 2**30)


def feed(sizes, images=1000, pixels=None, workers=2):
    return SimpleNamespace(
        views=ViewConfig(image_size=224),
        workers=workers,
        memory_gb=2.0,
        sizes=sizes,
        source=range(images),
        pixels=pixels,
        transform=None,
    )


MANY = {(375, 500), (500, 375), (333, 400)}


def test_there_is_no_hint_below_a_tenth_or_for_images_in_memory():
    assert data_loading_hint(0.099, feed(MANY)) is None
    assert data_loading_hint(0.9, feed({(32, 32)}, pixels=object())) is None
    assert data_loading_hint(0.1, feed(MANY)).startswith("10% ")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (feed({(64, 64)}), "--memory auto."),
        (feed({(64, 64)}, 250_000), "--memory auto --memory-gb 3.0."),
        (feed({(64, 64)}, 500_000), "--workers 4."),  # it would take more than a quarter of 16 GiB
        (feed(MANY), "--workers 4."),
        (feed(MANY, workers=4), "localagg pack SRC DST --size 256"),
        (feed({(256, 300), (300, 256)}, workers=4), "a faster disk or more cores"),
        (feed({(375, 500)}, 10**6, workers=8), "localagg pack SRC DST --size 256"),
    ],
)
def test_the_hint_names_the_option_that_helps(given, option):
    assert option in data_loading_hint(0.5, given)


@pytest.mark.slow
def test_a_run_that_waits_reports_it_after_its_first_epoch_and_at_its_end(
    pictures, tmp_path, monkeypatch, capsys
):
    read = ImageFolder.__getitem__

    def slow(self, index):
        time.sleep(0.03)
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "__getitem__", slow)
    config = override(
        PretrainConfig(), epochs=2, ir_epochs=2, batch_size=8, model="resnet18_small", width=8,
        blocks=(1,), image_size=16, workers=0, device="cpu", eval_every=0, memory="never",
        bank_start="random",
    )  # fmt: skip
    out = pretrain(config, str(pictures), tmp_path / "slow")
    assert out["shares"]["waiting for data"] > 0.3
    assert "--workers 4" in out["hint"]
    printed = capsys.readouterr().err
    assert printed.count("--workers 4") == 1
    assert "epoch 1: " in printed
