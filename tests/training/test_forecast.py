import pytest
import torch

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.training.forecast import forecast
from localagg.training.learner import make_encoder
from localagg.training.runs import pretrain


def test_the_run_has_the_steps_and_sizes_of_the_forecast(tmp_path):
    config = override(
        recipe("digits").config, epochs=3, ir_epochs=1, width=8, blocks=(1,), batch_size=100,
        ir_batch_size=50, clusters=(10, 20), neighbors=64, device="cpu", warm_clusters=False,
    )  # fmt: skip
    found = forecast(config, "digits")
    assert not list(tmp_path.iterdir())
    out = pretrain(config, "digits", tmp_path / "run")
    assert found["steps"]["total"] == out["steps"] == found["steps"]["ir"] + found["steps"]["la"]
    assert (found["images"], found["steps"]["ir"]) == (1400, 28)
    assert found["steps"]["images_seen"] == 28 * 50 + (out["steps"] - 28) * 100
    assert found["memory"]["memory bank"] == checkpoint.load_bank(tmp_path / "run").nbytes
    assert found["memory"]["cluster labels"] == 2 * 1400 * 4
    folder = checkpoint.latest(tmp_path / "run")
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert found["checkpoint_bytes"] == pytest.approx(written, rel=0.15)


def test_activations_are_estimated_from_shapes():
    found = forecast(override(PretrainConfig(), model="resnet18", batch_size=2, epochs=1), "digits")
    encoder = make_encoder(resolve_defaults(PretrainConfig(), 1400, 8).encoder, 0)
    parameters = sum(p.numel() for p in encoder.parameters())
    assert found["memory"]["weights, gradients and momentum"] == pytest.approx(
        12 * parameters, rel=0.01
    )  # both are ResNet-18, but for the stem
    sizes = [
        forecast(
            override(PretrainConfig(), model="resnet18", image_size=s, batch_size=2, epochs=1),
            "digits",
        )
        for s in (64, 128)
    ]
    small, large = (s["memory"]["activations (estimate)"] for s in sizes)
    assert 3.5 < large / small < 4.1
    assert torch.get_default_device() == torch.device("cpu")
