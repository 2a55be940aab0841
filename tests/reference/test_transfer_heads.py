"""The reference's transfer heads on its checkpoint: logits, losses, gradients, ten crops."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from localagg.evaluation.readouts.linear_heads import (
    LinearHeads,
    accuracies,
    cross_entropies,
    make_optimizer,
    mean_softmax,
)
from localagg.interop import load_tf_checkpoint
from localagg.models import create_encoder

pytestmark = pytest.mark.reference
LAYERS = ("1", "3", "5", "7", "9")
DECAY = 1e-4


@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "networks" / "resnet18"


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "transfer_heads.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


@pytest.fixture(scope="module")
def images(folder):
    """uint8 [4, 3, 224, 224]."""
    with np.load(folder / "outputs.npz") as arrays:
        return torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def network(folder):
    """The checkpoint's network with heads by the rules that the fixtures' README states."""
    encoder = create_encoder("preact_resnet18")
    load_tf_checkpoint(folder / "checkpoint" / "model.ckpt-10", encoder)
    shapes = json.loads((folder / "transfer_heads.json").read_text())["heads"]
    probe = LinearHeads(encoder, LAYERS, 10, 224)
    with torch.no_grad():
        for layer, head in zip(LAYERS, probe.heads, strict=True):
            name = f"instance/transfer_dense_{layer}"
            inputs, outputs = shape = shapes[f"{name}/kernel"]
            assert (head.in_features, head.out_features) == (inputs, outputs)
            random = np.random.RandomState(zlib.crc32(f"{name}/kernel".encode()))
            kernel = random.randint(-2, 3, size=shape, dtype=np.int8).astype(np.float32)
            kernel *= np.float32(1 / math.sqrt(inputs))
            random = np.random.RandomState(zlib.crc32(f"{name}/bias".encode()))
            bias = random.randint(-4, 5, size=10).astype(np.float32) * np.float32(0.05)
            head.weight.copy_(torch.from_numpy(kernel.T))
            head.bias.copy_(torch.from_numpy(bias))
    return probe


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_logits_and_losses(network, images, expected):
    with torch.no_grad():
        logits = network.train()(images)
    for layer in LAYERS:
        assert relative(logits[layer], expected[f"logits_transfer_dense_{layer}"]) < 5e-5
    losses = cross_entropies(logits, expected["labels"])
    total = torch.stack(list(losses.values())).sum()
    assert relative(total, expected["loss_sum"]) < 5e-5
    # The optimizer's decay is the gradient of this term.
    squares = sum(p.detach().double().square().sum() for p in network.heads.parameters())
    with_decay = total + DECAY * squares / 2
    assert relative(with_decay, expected["loss_with_weight_decay_1e-4"]) < 5e-5


def test_gradients_are_what_a_step_of_the_optimizer_subtracts(network, images, expected):
    before = {name: tensor.clone() for name, tensor in network.named_heads().items()}
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(LAYERS)  # the encoder is frozen
    optimizer = make_optimizer(network, learning_rate=1.0, momentum=0.9, weight_decay=DECAY)
    losses = cross_entropies(network.train()(images), expected["labels"])
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    after = {name: tensor.clone() for name, tensor in network.named_heads().items()}
    optimizer.zero_grad()
    for layer, head in zip(LAYERS, network.heads, strict=True):
        head.load_state_dict({part: before[f"{layer}.{part}"] for part in ("weight", "bias")})
    for layer in LAYERS:
        for ours, theirs in (("weight", "kernel"), ("bias", "bias")):
            step = (before[f"{layer}.{ours}"] - after[f"{layer}.{ours}"]).double().norm()
            wanted = expected[f"grad_l2_instance.transfer_dense_{layer}.{theirs}"]
            assert step.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_accuracies(network, images, expected):
    single, counted = accuracies(network, [(torch.arange(4), images)], expected["labels"])
    assert counted == 4
    for layer in LAYERS:
        assert single[layer]["top1"] == expected[f"accuracy_{layer}"].item()


def test_ten_crops(network, images, expected):
    rolled = [torch.roll(images[:2], 7 * i, dims=2) for i in range(10)]
    views = torch.stack([v.flip(3) if i >= 5 else v for i, v in enumerate(rolled)], dim=1)
    with torch.no_grad():
        logits = network.eval()(views.flatten(0, 1))
    for layer in LAYERS:
        found = mean_softmax(logits[layer], 10)
        assert relative(found, expected[f"tencrop_mean_prob_{layer}"]) < 5e-5
    batches = [(torch.tensor([i]), views[i : i + 1]) for i in range(2)]
    found, _ = accuracies(network, batches, expected["tencrop_labels"])
    for layer in LAYERS:
        assert found[layer]["top1"] == expected[f"tencrop_accuracy_{layer}"].item()
