"""Three steps of the reference's optimizer on LA and on IR, from its checkpoint.

Tolerances are the noise that the fixtures' README states between two back-ends of TensorFlow.
"""

import numpy as np
import pytest
import torch

from localagg.bank import MemoryBank
from localagg.config import PretrainConfig
from localagg.interop import load_tf_checkpoint
from localagg.interop.variable_names import map_variables
from localagg.models import create_encoder
from localagg.objectives import instance_nce, local_aggregation
from localagg.training.learner import parameter_groups

pytestmark = pytest.mark.reference
MEAN = "resnet_model/batch_normalization/moving_mean"
VARIANCE = "resnet_model/batch_normalization_16/moving_variance"


class Trainee:
    """Encoder, optimizer and bank as the reference's checkpoint has them."""

    def __init__(self, folder, names):
        config = PretrainConfig(momentum=0.9, weight_decay=1e-4)
        self.encoder, self.bank = create_encoder("preact_resnet18").train(), MemoryBank(64, 128)
        checkpoint = folder / "checkpoint" / "model.ckpt-10"
        self.labels = load_tf_checkpoint(checkpoint, self.encoder, self.bank).cluster_labels
        self.keys = map_variables(self.encoder)
        parameters = dict(self.encoder.named_parameters())
        self.params = [parameters[self.keys[name]] for name in names]
        assert len(self.params) == len(parameters)
        groups = parameter_groups(self.encoder, config)
        self.optimizer = torch.optim.SGD(groups, momentum=config.momentum)

    def step(self, images, recorded):
        """One step on the recorded batch; what the reference recorded of its own."""
        index = torch.from_numpy(recorded["index"]).long()
        for group in self.optimizer.param_groups:
            group["lr"] = float(recorded["learning_rate"])
        decay = sum(
            group["weight_decay"] * p.detach().square().sum().item() / 2
            for group in self.optimizer.param_groups
            for p in group["params"]
        )
        before = [p.detach().clone() for p in self.params]
        embedding = self.encoder(images)
        if "noise_index" in recorded:
            noise = torch.from_numpy(recorded["noise_index"]).long()
            loss, data, contrast = instance_nce(embedding, self.bank.rows, index, noise)
            found = {"loss_model": data.item(), "loss_noise": contrast.item()}
        else:
            loss = local_aggregation(embedding, self.bank.rows, self.labels, index, neighbors=16)
            found = {"loss_pure": loss.item()}
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.bank.update(index, embedding)
        after = [p.detach().clone() for p in self.params]
        state = self.encoder.state_dict()
        return found | {
            "loss": loss.item() + decay,
            "embedding": embedding.detach(),
            "param_l2": [a.double().norm() for a in after],
            "param_delta_l2": [(a - b).double().norm() for a, b in zip(after, before, strict=True)],
            "param_first8": np.stack([first8(a) for a in after]),
            "bank_rows": self.bank.rows[index],
            "first_moving_mean": state[self.keys[MEAN]].clone(),
            "last_moving_variance": state[self.keys[VARIANCE]].clone(),
        }


def first8(parameter):
    """First values in TensorFlow's layout."""
    if parameter.ndim == 4:
        parameter = parameter.permute(2, 3, 1, 0)
    return parameter.T.flatten()[:8] if parameter.ndim == 2 else parameter.flatten()[:8]


@pytest.fixture(scope="module", params=["LA", "IR"])
def steps(request, fixtures):
    """(objective, [(what we compute, what was recorded) of each step])."""
    folder = fixtures / "networks" / "resnet18"
    images = torch.from_numpy(np.load(folder / "outputs.npz")["images"]).permute(0, 3, 1, 2)
    recorded = dict(np.load(folder / "train_steps.npz"))
    trainee = Trainee(folder, [str(name) for name in recorded["param_names"]])
    pairs = []
    for step in range(3):
        start = f"{request.param}_step{step}_"
        theirs = {k.removeprefix(start): v for k, v in recorded.items() if k.startswith(start)}
        ours = trainee.step(images.flip(3) if step == 1 else images, theirs)
        inputs = {"learning_rate", "index", "noise_index", "global_step"}
        assert set(theirs) - set(ours) <= inputs
        pairs.append((ours, theirs))
    return request.param, pairs


def off(pair, key, largest=True):
    """Difference relative to the largest value, or of each value to itself."""
    ours, theirs = (np.asarray(side[key], np.float64) for side in pair)
    assert ours.shape == theirs.shape
    scale = np.abs(theirs)
    return np.abs(ours - theirs).max() / scale.max() if largest else np.abs(ours / theirs - 1)


def losses(pair):
    return [key for key in pair[1] if key.startswith("loss")]


def test_the_first_step(steps):
    task, (first, *_) = steps
    assert len(losses(first)) == {"LA": 2, "IR": 3}[task]
    for key in losses(first):
        assert off(first, key) < 1e-5, key
    assert off(first, "embedding") < 5e-5
    assert off(first, "bank_rows") < 2e-6
    moved = off(first, "param_delta_l2", largest=False)
    assert moved.max() < 2e-2
    assert np.median(moved) < {"LA": 3e-3, "IR": 1.5e-4}[task]


def test_the_steps_after_it(steps):
    for pair in steps[1][1:]:
        for key in losses(pair):
            assert off(pair, key) < 4e-3, key
        assert off(pair, "bank_rows") < 2e-3
        # Momentum carries the first step's noise on; without momentum they are off by 0.13.
        assert off(pair, "param_delta_l2") < 5e-2


def test_weights_and_statistics_after_each_step(steps):
    for pair in steps[1]:
        assert off(pair, "param_l2") < 1e-6
        assert off(pair, "param_first8") < 1e-5
        assert off(pair, "first_moving_mean") < 1e-5
        assert off(pair, "last_moving_variance") < 1e-5
