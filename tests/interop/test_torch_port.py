import os
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from localagg.bank import MemoryBank
from localagg.errors import UserError
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


@pytest.fixture
def port(monkeypatch):
    """The classes that the port's files name, so that this test can write such files."""
    for name in ("src", "src.objectives", "src.objectives.localagg", "dotmap"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    bank = type("MemoryBank", (), {"__module__": "src.objectives.localagg"})
    settings = type("DotMap", (OrderedDict,), {"__module__": "dotmap"})
    sys.modules["src.objectives.localagg"].MemoryBank = bank
    sys.modules["dotmap"].DotMap = settings
    return bank, settings


def saved_by_port(port, state_dict):
    """What the port's agents save."""
    bank = port[0]()
    bank.size, bank.dim, bank.device = N, 16, [torch.device("cuda:0")]
    bank.bank_broadcast = (F.normalize(torch.arange(N * 16.0).view(N, 16) - 99, dim=1),)
    settings = port[1](seed=1, loss_params=port[1](k=4096))
    return {
        "model_state_dict": OrderedDict((f"module.{k}", v) for k, v in state_dict.items()),
        "optim_state_dict": torch.optim.SGD([torch.zeros(2)], 0.1, momentum=0.9).state_dict(),
        "memory_bank": bank,
        "cluster_labels": (torch.arange(2 * N).view(2, N) % 5,),
        "epoch": 3,
        "iteration": 77,
        "loss": 0.5,
        "val_iteration": 4,
        "val_metric": np.float64(0.4),
        "config": settings,
        "val_acc": np.array([0.1, 0.4]),
        "train_loss": np.array([]),
    }


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_of_the_port(tmp_path, network, port, as_zip):
    path = tmp_path / "checkpoint.pth.tar"
    saved = saved_by_port(port, network.state_dict())
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
    assert torch.equal(bank.rows, saved["memory_bank"].bank_broadcast[0])
    assert set(report.matched) == {
        *network.state_dict(), "memory_bank", "cluster_labels", "iteration"
    }  # fmt: skip
    assert (report.left, report.missing, report.global_step) == ((), (), 77)
    assert report.cluster_labels.dtype == torch.int32
    assert torch.equal(report.cluster_labels, saved["cluster_labels"][0].int())


def test_the_tensors_alone(tmp_path, network, port):
    saved = saved_by_port(port, network.state_dict())
    torch.save(saved, tmp_path / "a.pth.tar")
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


def test_the_ports_own_network(tmp_path):
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


def test_what_is_missing_and_left(tmp_path, network):
    weights = dict(network.state_dict())
    del weights["fc.weight"], weights["fc.bias"], weights["bn1.num_batches_tracked"]
    weights["extra"] = torch.zeros(2)
    torch.save(weights, tmp_path / "a.pth")
    encoder = create_encoder("resnet18", 16)
    with pytest.warns(UserWarning, match=r"lacks 2 of the weights of resnet18, fc\.weight the"):
        report = load_torch_port(tmp_path / "a.pth", encoder)
    assert report.missing == ("fc.weight", "fc.bias")
    assert report.left == ("extra",)


def test_other_networks_and_banks_are_refused(tmp_path, network, port):
    path = tmp_path / "a.pth"
    torch.save(saved_by_port(port, network.state_dict()), path)
    for model, message in (
        ("resnet34", r"layer1\.2\.conv1\.weight is missing; take the network of the file"),
        ("resnet50", r"layer1\.0\.conv1\.weight has shape \[64, 64, 3, 3\], \[64, 64, 1, 1\] is"),
        ("preact_resnet18", "a torchvision network, not of preact_resnet18: make that one"),
        ("alexnet_bn", "The PyTorch port has no network alexnet_bn"),
    ):
        with torch.device("meta"):  # shapes are enough to refuse
            other = create_encoder(model, 16)
        with pytest.raises(UserError, match=message):
            load_torch_port(path, other)
    with pytest.raises(UserError, match=r"fc\.weight has shape \[16, 512\].*make it with dim=16"):
        load_torch_port(path, create_encoder("resnet18", 128))
    encoder = create_encoder("resnet18", 16)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError, match=r"of shape \[30, 16\], where one of \[31, 16\]"):
        load_torch_port(path, encoder, MemoryBank(N + 1, 16))
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    deeper = torchvision.models.resnet34(num_classes=16).state_dict()
    torch.save(deeper, path)
    with pytest.raises(UserError, match=r"layer1\.2\.conv1\.weight is too much"):
        load_torch_port(path, encoder)
    torch.save(network.state_dict(), path)
    with pytest.raises(UserError, match="holds no memory bank; leave out bank"):
        load_torch_port(path, encoder, MemoryBank(N, 16))
    torch.save(preact_weights(), path)
    with pytest.raises(UserError, match="of preact_resnet18, not of resnet18: make that one"):
        load_torch_port(path, encoder)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Foreign:
    pass


@pytest.mark.parametrize("as_zip", [True, False])
def test_nothing_else_is_unpickled(tmp_path, as_zip):
    path, made = tmp_path / "a.pth.tar", tmp_path / "made"
    for thing, message in (
        (Evil(made), r"an object of the type \w+\.mkdir, which is refused"),
        (Foreign(), r"an object of the type .*Foreign, which is refused"),
    ):
        torch.save({"model_state_dict": {"a": torch.zeros(2)}, "more": thing}, path,
                   _use_new_zipfile_serialization=as_zip)  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_torch_port(path)
    assert not made.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "holds no state dict"),
        ({"model_state_dict": 3}, "holds no state dict"),
        ({}, "holds no weights"),
        ({"epoch": 3}, "something else than plain tensors"),
        ({"a": torch.zeros(2, device="meta")}, "something else than plain tensors"),
        ({"a": torch.zeros(2).to_sparse()}, "something else than plain tensors"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "something else than plain tensors"),
    ],
)
def test_files_without_plain_weights(tmp_path, saved, message):
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        read_torch_port(tmp_path / "a.pth")


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_files(tmp_path, as_zip):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    for damaged in (content[:-200], content[: len(content) // 3], b"", b"text" * 50, bytes(500)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged or was not written by torch\.save"):
            read_torch_port(path)
    with pytest.raises(UserError, match=r"no file .*; name a checkpoint\.pth\.tar"):
        read_torch_port(tmp_path / "b.pth")
