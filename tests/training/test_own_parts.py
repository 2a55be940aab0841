"""Images, a backbone and views that are given in Python, also to a resumed run."""

import functools

import numpy as np
import pytest
import torch
from compare_runs import assert_same_run, assert_same_state
from expect import user_error
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from localagg import PretrainConfig, checkpoint, load, pretrain, resume
from localagg.config import override
from localagg.data.images.image_dataset import ImageDataset, as_source
from localagg.data.loading.own_views import own_view_crops
from localagg.training.recorder import Recorder

CONFIG = override(
    PretrainConfig(),
    epochs=2, ir_epochs=1, batch_size=8, dim=8, image_size=16, model="resnet18_small", width=4,
    blocks=(1,), device="cpu", precision="32-true", workers=0, checkpoint_seconds=0.0,
)  # fmt: skip
OWN = override(CONFIG, model=None)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
VIEWS = v2.Compose([v2.RandomResizedCrop(16, antialias=True), v2.RandomHorizontalFlip()])


class Items(Dataset):
    def __init__(self, make):
        self.make, self.targets, self.classes = make, [0, 1] * 20, ["cat", "dog"]

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return self.make(PIXELS[index])


def network(seed=0, maps=True):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, *([] if maps else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]))


def interrupt(monkeypatch, step):
    """Make the next run end, without a word, behind a step whose checkpoint it has written."""
    original = Recorder.after_step

    def stop(self, *args, **options):
        original(self, *args, **options)
        if self.learner.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "after_step", stop)


def test_images_in_every_form_give_the_same_run(tmp_path):
    files = []
    for number, image in enumerate(PIXELS):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    forms = {
        "array": PIXELS,
        "files": files,
        "bytes": [file.read_bytes() for file in files],
        "pillow": [Image.fromarray(image) for image in PIXELS],
        "tensors": torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        "dataset": Items(lambda image: (Image.fromarray(image), 1)),
        "floats": TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).double() / 255),
    }
    quick = override(CONFIG, epochs=1, eval_every=0)
    for name, images in forms.items():
        pretrain(quick, images, tmp_path / name)
        assert_same_state(tmp_path / "array", tmp_path / name)


def test_items_and_labels_of_datasets():
    plain = as_source(PIXELS)
    for make in (
        lambda image: Image.fromarray(image),
        lambda image: (image, "anything"),
        lambda image: {"image": torch.from_numpy(image).permute(2, 0, 1), "label": 3},
    ):
        source = as_source(Items(make))
        assert isinstance(source, ImageDataset)
        assert torch.equal(source[7].image, plain[7].image)
        assert (source[7].label, source.classes) == (1, ["cat", "dog"])
    part = as_source(Subset(Items(lambda image: image), [5, 8, 9]))
    assert part.labels.tolist() == [1, 0, 1]
    pairs = as_source(TensorDataset(torch.zeros(3, 3, 4, 4), torch.tensor([2, 0, 2])))
    assert (pairs.labels.tolist(), pairs.classes) == ([2, 0, 2], ["0", "1", "2"])
    assert as_source(TensorDataset(torch.zeros(3, 3, 4, 4))).labels is None


def test_images_that_are_none_are_named():
    with user_error("mismatch", "Items"):
        as_source(
            Items(lambda image: image ^ np.random.default_rng().integers(255, dtype=np.uint8))
        )
    with user_error("option-invalid", "type int"):
        as_source(Items(lambda image: 3))
    normalized = Items(lambda image: torch.from_numpy(image).permute(2, 0, 1) / 64.0 - 2)
    with user_error("option-invalid", "-2"):
        as_source(normalized)
    with user_error("no-images"):
        as_source(Subset(normalized, []))
    with user_error("option-invalid", "int"):
        as_source(3)


@pytest.mark.parametrize("maps", [True, False])
def test_a_run_of_own_parts_resumes_and_loads(tmp_path, monkeypatch, maps):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    net = network(maps=maps)
    result = pretrain(OWN, Items(lambda x: x), whole, backbone=net, views=VIEWS)
    assert "loo_knn1" in result["final"]
    monkeypatch.undo()
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        pretrain(OWN, PIXELS, stopped, backbone=network(maps=maps), views=VIEWS)
    monkeypatch.undo()
    resume(stopped, data=PIXELS, backbone=network(seed=9, maps=maps), views=VIEWS)
    assert_same_state(whole, stopped)
    encoder = checkpoint.load_encoder(whole, network(seed=5, maps=maps))
    for name, value in net.state_dict().items():  # trained in place
        assert torch.equal(encoder.backbone.module.state_dict()[name], value)
    rows = load(whole, backbone=network(maps=maps)).embed(list(PIXELS[:3]))
    images = torch.from_numpy(PIXELS[:3]).permute(0, 3, 1, 2)
    resized = v2.functional.resize(images, [16, 16], antialias=True)
    with torch.no_grad():
        np.testing.assert_allclose(rows, encoder(resized), atol=0.05)
    assert encoder.layers == (["0"] if maps else [])
    with user_error("option-missing", "Sequential", "backbone="):
        load(whole)
    with user_error("mismatch", "backbone.module.weight"):
        checkpoint.load_encoder(whole, nn.Conv2d(3, 4, 3))


def test_a_resumed_run_takes_the_same_objects(tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(OWN, PIXELS, run, backbone=network(), views=VIEWS)
    monkeypatch.undo()
    parts = {"data": PIXELS, "backbone": network(), "views": VIEWS}
    for name in parts:
        with user_error("option-missing", name):
            resume(run, **{**parts, name: None})
    with user_error("mismatch", "40"):
        resume(run, **{**parts, "data": PIXELS[:39]})
    with user_error("mismatch", "backbone"):
        resume(run, **{**parts, "backbone": nn.Conv2d(3, 6, 3)})
    with user_error("mismatch", "views"):
        resume(run, **{**parts, "views": v2.RandomCrop(16)})
    plain = tmp_path / "plain"
    pretrain(override(CONFIG, epochs=1), PIXELS, plain)
    with user_error("option-conflict", "backbone"):
        resume(plain, **parts)


def test_a_run_killed_before_its_first_checkpoint_needs_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "__enter__", lambda self: (_ for _ in ()).throw(OSError("dead")))
    with pytest.raises(OSError, match="dead"):
        pretrain(OWN, PIXELS, tmp_path / "run", backbone=network())
    monkeypatch.undo()
    with user_error("mismatch", "backbone"):
        resume(tmp_path / "run", data=PIXELS, backbone=network(seed=1))
    resume(tmp_path / "run", data=PIXELS, backbone=network())
    pretrain(OWN, PIXELS, tmp_path / "whole", backbone=network())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_own_views_depend_on_seed_epoch_and_index_alone():
    source, views = as_source(PIXELS), CONFIG.views
    make = functools.partial(own_view_crops, source, views, VIEWS)
    batch, _ = make(3, 1, torch.tensor([4, 9, 9]))
    alone, _ = make(3, 1, torch.tensor([9]))
    assert torch.equal(batch.images[1], batch.images[2])
    assert torch.equal(batch.images[1], alone.images[0])
    assert not torch.equal(make(3, 2, torch.tensor([9]))[0].images, alone.images)
    assert not torch.equal(make(4, 1, torch.tensor([9]))[0].images, alone.images)
    state = torch.random.get_rng_state()
    make(3, 1, torch.tensor([4]))
    assert torch.equal(state, torch.random.get_rng_state())
    exact, _ = own_view_crops(source, override(CONFIG, image_size=20).views, lambda x: x, 0, 0,
                              torch.tensor([5]))  # fmt: skip
    assert torch.equal((exact.images[0] * 255).round().byte(), source[5].image)


def test_workers_do_not_change_own_views(tmp_path):
    for workers in (0, 2):
        config = override(OWN, epochs=1, eval_every=0, workers=workers)
        pretrain(config, PIXELS, tmp_path / str(workers), backbone=network(), views=VIEWS)
    assert_same_state(tmp_path / "0", tmp_path / "2")


def test_parts_of_the_wrong_form_are_named(tmp_path):
    run = tmp_path / "run"
    for module in (nn.Flatten(0), nn.LSTM(16, 4), nn.Conv2d(4, 3, 3)):
        with user_error("mismatch", type(module).__name__):
            pretrain(OWN, PIXELS, run, backbone=module)
    with user_error("option-conflict", "backbone=", "resnet18_small"):
        pretrain(CONFIG, PIXELS, run, backbone=network())
    with user_error("option-conflict", "--minutes", "backbone="):
        pretrain(override(OWN, minutes=1, epochs=None), PIXELS, run, backbone=network())
    normalize = v2.Compose([VIEWS, v2.ToDtype(torch.float32, scale=True), v2.Normalize([2], [0.2])])
    with user_error("option-invalid", "views"):
        pretrain(OWN, PIXELS, run, backbone=network(), views=normalize)
    for function in (v2.RandomCrop(12), v2.Resize((16, 12))):
        with user_error("mismatch", 16):
            pretrain(OWN, PIXELS, run, backbone=network(), views=function)
    with user_error("option-invalid", "Image"):
        pretrain(OWN, PIXELS, run, views=v2.ToPILImage())
    assert not run.exists()
