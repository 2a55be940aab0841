"""Weights of the PyTorch port against torchvision, and against the port's network written anew."""

import os
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from expect import user_error
from torch import nn

from localagg.bank import MemoryBank
from localagg.interop.torch_port import load_torch_port, read_torch_port
from localagg.models import create_encoder

N = 30


def with_statistics(network):
    """Batch-norm parameters and statistics that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(len(tensor), generator=generator) + 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return with_statistics(torchvision.models.resnet18(num_classes=16))


def checkpoint(state_dict):
    """A checkpoint of the port, saved again as tensors."""
    bank = F.normalize(torch.arange(N * 16.0).view(N, 16) - 99, dim=1)
    return {
        "model_state_dict": OrderedDict((f"module.{k}", v) for k, v in state_dict.items()),
        "optim_state_dict": torch.optim.SGD([torch.zeros(2)], 0.1, momentum=0.9).state_dict(),
        "memory_bank": bank,
        "cluster_labels": (torch.arange(2 * N).view(2, N) % 5,),
        "iteration": 77,
        "val_metric": 0.4,
    }


def with_the_ports_objects(saved, monkeypatch):
    """The same checkpoint with the objects that the port's agents save."""
    for name in ("src", "src.objectives", "src.objectives.localagg", "dotmap"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    bank_class = type("MemoryBank", (), {"__module__": "src.objectives.localagg"})
    settings_class = type("DotMap", (OrderedDict,), {"__module__": "dotmap"})
    sys.modules["src.objectives.localagg"].MemoryBank = bank_class
    sys.modules["dotmap"].DotMap = settings_class
    bank = bank_class()
    bank.size, bank.dim, bank.device = N, 16, [torch.device("cuda:0")]
    bank.bank_broadcast = (saved["memory_bank"],)
    losses = {"val_metric": np.float64(0.4), "val_acc": np.array([0.1]), "loss": np.array([])}
    settings = settings_class(seed=1, loss_params=settings_class(k=4096))
    return saved | losses | {"memory_bank": bank, "config": settings}


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_ports_own_file_is_read_without_its_classes(tmp_path, network, as_zip, monkeypatch):
    path, saved = tmp_path / "checkpoint.pth.tar", checkpoint(network.state_dict())
    with monkeypatch.context() as patch:
        objects = with_the_ports_objects(saved, patch)
        torch.save(objects, path, _use_new_zipfile_serialization=as_zip)
    found = read_torch_port(path)
    assert torch.equal(found["memory_bank"], saved["memory_bank"])
    assert torch.equal(found["cluster_labels"], saved["cluster_labels"][0])
    assert found["iteration"].item() == 77
    assert torch.equal(found["fc.weight"], network.state_dict()["fc.weight"])
    assert len(found) == len(network.state_dict()) + 3


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_fills_encoder_and_bank(tmp_path, network, as_zip):
    path, saved = tmp_path / "checkpoint.pth.tar", checkpoint(network.state_dict())
    torch.save(saved, path, _use_new_zipfile_serialization=as_zip)
    encoder, bank = create_encoder("resnet18", 16).eval(), MemoryBank(N, 16)
    report = load_torch_port(path, encoder, bank)
    images = torch.rand(2, 3, 64, 64)
    pixels = torchvision.transforms.functional.normalize(
        images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected = F.normalize(network(pixels), dim=1)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(bank.rows, saved["memory_bank"])
    trainer = ["memory_bank", "cluster_labels", "iteration"]
    assert report.matched == (*network.state_dict(), *trainer)
    assert (report.left, report.missing, report.global_step) == ((), (), 77)
    assert report.cluster_labels.dtype == torch.int32
    assert torch.equal(report.cluster_labels, saved["cluster_labels"][0].int())


def test_tensors_are_read_by_name(tmp_path, network):
    torch.save(checkpoint(network.state_dict()), tmp_path / "a.pth.tar")
    found = read_torch_port(tmp_path / "a.pth.tar")
    assert list(found) == [*network.state_dict(), "memory_bank", "cluster_labels", "iteration"]
    assert found["memory_bank"].shape == (N, 16)
    assert found["iteration"].item() == 77
    torch.save(network.state_dict(), tmp_path / "b.pth")
    plain = read_torch_port(str(tmp_path / "b.pth"))
    assert list(plain) == list(network.state_dict())
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def port_preact(weights, x, edge):
    """The port's PreActResNet18 by the names of its weights; ``edge`` pads its max-pool."""

    def conv(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(name, x):
        parts = [weights[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *parts, training=False))

    x = F.max_pool2d(F.pad(conv("conv1", x, 2), (0, 1, 0, 1), value=edge), 3, 2)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            entry = norm(f"{name}.bn1", x)
            shortcut = conv(f"{name}.shortcut.0", entry, stride) if block == 0 else x
            y = conv(f"{name}.conv1", entry, stride)
            x = conv(f"{name}.conv2", norm(f"{name}.bn2", y)) + shortcut
    x = norm("bn", x).mean(dim=(2, 3))
    return F.normalize(x @ weights["linear.weight"].T + weights["linear.bias"], dim=1)


def preact_weights():
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(name, *shape):
        weights[name] = torch.randn(shape, generator=generator) / np.sqrt(np.prod(shape[1:]))

    def norm(name, size):
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{name}.{part}"] = torch.rand(size, generator=generator) + 0.5
        weights[f"{name}.num_batches_tracked"] = torch.tensor(5)

    add("conv1.weight", 64, 3, 7, 7)
    width = 64
    for stage in range(1, 5):
        for block in range(2):
            name, out = f"layer{stage}.{block}", 64 * 2 ** (stage - 1)
            norm(f"{name}.bn1", width)
            if block == 0:
                add(f"{name}.shortcut.0.weight", out, width, 1, 1)
            add(f"{name}.conv1.weight", out, width, 3, 3)
            norm(f"{name}.bn2", out)
            add(f"{name}.conv2.weight", out, out, 3, 3)
            width = out
    norm("bn", 512)
    add("linear.weight", 16, 512)
    weights["linear.bias"] = torch.randn(16, generator=generator)
    return weights


def test_the_ports_own_network_computes_the_same(tmp_path):
    weights = preact_weights()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "a.pth")
    encoder = create_encoder("preact_resnet18", 16).eval()
    report = load_torch_port(tmp_path / "a.pth", encoder)
    assert report.matched == tuple(weights)
    assert (report.left, report.missing, report.global_step) == ((), (), None)
    images = torch.rand(2, 3, 64, 64)
    pixels = (images - encoder.mean) / encoder.std
    with torch.no_grad():
        found = encoder(images)
    expected = port_preact(weights, pixels, edge=-torch.inf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    theirs = port_preact(weights, pixels, edge=0.0)  # the documented deviation
    assert 1e-5 < (found - theirs).abs().max() < 0.05


def test_missing_and_unused_weights_are_reported(tmp_path, network):
    weights = dict(network.state_dict())
    del weights["fc.weight"], weights["fc.bias"], weights["bn1.num_batches_tracked"]
    weights["extra"] = torch.zeros(2)
    torch.save(weights, tmp_path / "a.pth")
    encoder = create_encoder("resnet18", 16)
    with pytest.warns(UserWarning, match=r"lacks 2 .*resnet18, fc\.weight"):
        report = load_torch_port(tmp_path / "a.pth", encoder)
    assert report.missing == ("fc.weight", "fc.bias")
    assert report.left == ("extra",)


def test_other_networks_and_banks_raise(tmp_path, network):
    path = tmp_path / "a.pth"

    def check_error(code, *values, encoder, bank=None):
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        with user_error(code, *values):
            load_torch_port(path, encoder, bank)
        if encoder.head.weight.device.type != "meta":
            assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())

    torch.save(checkpoint(network.state_dict()), path)
    with torch.device("meta"):  # shapes are enough
        others = [create_encoder(name, 16) for name in ("resnet34", "resnet50", "preact_resnet18")]
        alexnet, wide = create_encoder("alexnet_bn", 16), create_encoder("resnet18", 128)
    check_error("mismatch", "layer1.2.conv1.weight", encoder=others[0])
    shapes = ("[64, 64, 3, 3]", "[64, 64, 1, 1]")
    check_error("mismatch", "layer1.0.conv1.weight", *shapes, encoder=others[1])
    check_error("mismatch", "preact_resnet18", encoder=others[2])
    check_error("unsupported", "alexnet_bn", encoder=alexnet)
    check_error("mismatch", "fc.weight", "[16, 512]", "dim", encoder=wide)
    encoder, bank = create_encoder("resnet18", 16), MemoryBank(N + 1, 16)
    check_error("mismatch", "[30, 16]", "[31, 16]", encoder=encoder, bank=bank)
    torch.save(torchvision.models.resnet34(num_classes=16).state_dict(), path)
    check_error("mismatch", "layer1.2.conv1.weight", encoder=encoder)
    torch.save(network.state_dict(), path)
    check_error("not-found", path, "bank", encoder=encoder, bank=MemoryBank(N, 16))
    torch.save(preact_weights(), path)
    check_error("mismatch", path, "resnet18", encoder=encoder)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Foreign:
    pass


@pytest.mark.parametrize("as_zip", [True, False])
def test_objects_other_than_tensors_are_never_unpickled(tmp_path, as_zip):
    path, made = tmp_path / "a.pth.tar", tmp_path / "made"
    for thing, name in ((Evil(made), "mkdir"), (Foreign(), "Foreign")):
        saved = {"model_state_dict": {"a": torch.zeros(2)}, "memory_bank": thing}
        torch.save(saved, path, _use_new_zipfile_serialization=as_zip)
        with user_error("unsupported", path, name, "model_state_dict"):
            read_torch_port(path)
    assert not made.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "saved",
    [
        [1, 2],
        {"model_state_dict": 3},
        {},
        {"epoch": 3},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(1).expand(1 << 40)},
    ],
)
def test_files_without_plain_weights_raise(tmp_path, saved):
    torch.save(saved, tmp_path / "a.pth")
    with user_error("unsupported", tmp_path / "a.pth"):
        read_torch_port(tmp_path / "a.pth")


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_files_raise(tmp_path, as_zip):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    for damaged in (content[:-200], content[: len(content) // 3], b"", b"text" * 50, bytes(500)):
        path.write_bytes(damaged)
        with user_error("unsupported", path):
            read_torch_port(path)
    with user_error("not-found", tmp_path / "b.pth"):
        read_torch_port(tmp_path / "b.pth")


def test_momenta_are_those_of_the_ports_optimizer(tmp_path, network):
    encoder, trained = create_encoder("resnet18", 16), torchvision.models.resnet18(num_classes=16)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
    trained(torch.rand(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    saved = checkpoint(trained.state_dict()) | {"optim_state_dict": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    report = load_torch_port(tmp_path / "checkpoint.pth.tar", encoder, MemoryBank(N, 16))
    assert set(report.momentum) == {name for name, _ in encoder.named_parameters()}
    expected = {name: value.grad for name, value in trained.named_parameters()}  # the first step
    assert torch.equal(report.momentum["head.weight"], expected["fc.weight"])
    key = "backbone.stages.3.1.bn2.bias"
    assert torch.equal(report.momentum[key], expected["layer4.1.bn2.bias"])
    assert report.left == ()
