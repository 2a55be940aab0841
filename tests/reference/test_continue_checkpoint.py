"""An imported checkpoint trains on by the command line as the reference program did."""

import json

import numpy as np
import pytest
import torch
from expect import user_error
from PIL import Image
from safetensors.torch import load_file, save_file

from localagg import checkpoint, pretrain
from localagg.cli.main import main
from localagg.config import override
from localagg.data.loading.loader import Feed
from localagg.io.metrics_log import read_metrics
from localagg.recipes.builtin import recipe
from localagg.training import step

pytestmark = [pytest.mark.reference, pytest.mark.slow]
FIRST = 11  # the checkpoint's step
STILL = {"crop": "center", "eval_crop": 1.0, "flip": 0.0, "gray": 0.0, "jitter": (0.0,) * 4}


@pytest.fixture(scope="module")
def recorded(fixtures):
    return dict(np.load(fixtures / "networks" / "resnet18" / "train_steps.npz"))


@pytest.fixture(scope="module")
def images(fixtures, recorded, tmp_path_factory):
    """A listing of 64 images with the bank's labels: the recorded four, and four flipped."""
    folder = tmp_path_factory.mktemp("images")
    network = fixtures / "networks" / "resnet18"
    four = np.load(network / "outputs.npz")["images"]
    labels = np.load(network / "trainer_state.npz")["all_labels"]
    rows = np.stack([four[0]] * 64)
    rows[recorded["LA_step0_index"]] = four
    rows[recorded["LA_step1_index"]] = four[:, :, ::-1]
    for i, row in enumerate(rows):
        Image.fromarray(row).save(folder / f"{i:02d}.png", compress_level=1)
    lines = [f"{i:02d}.png {label}" for i, label in enumerate(labels)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def imported(fixtures, tmp_path_factory):
    """The fixtures' checkpoint, without its momenta: the recorded steps begin with none."""
    folder = tmp_path_factory.mktemp("imported")
    prefix = fixtures / "networks" / "resnet18" / "checkpoint"
    words = ["--out", str(folder / "la.safetensors"), "--bank", str(folder / "bank.safetensors")]
    assert main(["import-tf", str(prefix), "--model", "preact_resnet18", *words]) == 0
    state = load_file(folder / "bank.safetensors")
    assert sum(name.startswith("momentum.") for name in state) == 36
    kept = {name: value for name, value in state.items() if not name.startswith("momentum.")}
    save_file(kept, folder / "bank.safetensors", {"step": str(FIRST)})
    return folder / "la.safetensors"


@pytest.mark.parametrize("task", ["LA", "IR"])
def test_three_steps_by_the_command_line(task, recorded, images, imported, tmp_path, monkeypatch):
    def due(number, key):
        return recorded[f"{task}_step{number}_{key}"]

    first = torch.cat([torch.from_numpy(due(n, "index")).long() for n in range(3)])
    order = torch.cat([torch.arange(4 * FIRST), first, torch.arange(8)])
    monkeypatch.setattr(Feed, "order", lambda self, epoch: order)
    if task == "IR":

        def noise(size, seed, stream, now, rows, *, count):
            return torch.from_numpy(due(min(now - FIRST, 2), "noise_index")).long()

        monkeypatch.setattr(step, "integers", noise)
    rates = []
    take = torch.optim.SGD.step

    def record(optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return take(optimizer, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    settings = {
        "task": task, "data_len": 64, "batch_size": 4, "instance_k": 16, "kmeans_k": "8,8,8",
        "init_lr": 0.001, "lr_boundaries": "11,12", "train_num_steps": 16,
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps({"own": settings}))
    run = tmp_path / "run"
    words = ["pretrain", "--config", f"{tmp_path / 'own.json'}:own", "--start", str(imported)]
    words += ["--data", str(images / "train.csv"), "--out", str(run), "--eval-every", "0"]
    words += ["--log-every", "1", "--crop", "center", "--eval-crop", "1", "--flip", "0"]
    words += ["--gray", "0", "--jitter", "0", "0", "0", "0", "--device", "cpu"]
    assert main(words) == 0
    lines = [line for line in read_metrics(run) if "loss" in line][:3]
    for number, line in enumerate(lines):
        assert line["step"] == due(number, "global_step") == FIRST + number + 1
        assert rates[number] == pytest.approx(due(number, "learning_rate"), rel=1e-6)
        loss = due(number, "loss_pure") if task == "LA" else due(number, "loss_model")
        if task == "IR":
            loss = loss + due(number, "loss_noise")
        assert line["loss"] == pytest.approx(loss, rel=1e-5 if number == 0 else 4e-3)


def test_other_images_are_never_matched(images, imported, tmp_path):
    config = override(recipe("res18_LA").config, batch_size=4, ir_batch_size=4, epochs=1, **STILL)
    lines = (images / "train.csv").read_text().split("\n")[:-1]
    (images / "other.csv").write_text("\n".join(lines[32:] + lines[:32]))
    (images / "fewer.csv").write_text("\n".join(lines[1:]))
    for name, values in (("other.csv", ("another order",)), ("fewer.csv", ("64", "63"))):
        with user_error("mismatch", str(imported), *values):
            pretrain(config, f"{images / name}", tmp_path / "run", start=imported)
    with user_error("option-invalid", "step 11", "--epochs"):
        ended = override(config, batch_size=8, ir_batch_size=8, ir_epochs=0)
        pretrain(ended, f"{images / 'train.csv'}", tmp_path / "run", start=imported)
    with user_error("mismatch", "preact_resnet18", "preact_resnet50"):
        other = override(config, model="preact_resnet50")
        pretrain(other, f"{images / 'train.csv'}", tmp_path / "run", start=imported)
    (tmp_path / "la.safetensors").write_bytes(imported.read_bytes())
    with user_error("not-found", "bank.safetensors"):
        pretrain(
            config, f"{images / 'train.csv'}", tmp_path / "run", start=tmp_path / "la.safetensors"
        )
    plain = tmp_path / "plain.safetensors"
    checkpoint.save_weights(plain, checkpoint.load_encoder(imported))
    with user_error("unsupported", "--bank", "--weights"):
        pretrain(config, f"{images / 'train.csv'}", tmp_path / "run", start=plain)
