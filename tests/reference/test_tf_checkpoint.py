"""The reader of TensorFlow checkpoints on one that TensorFlow wrote."""

import json

import numpy as np
import pytest

from localagg.interop.tf_checkpoint import open_tf_checkpoint

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "networks" / "resnet18"


@pytest.fixture(scope="module")
def checkpoint(folder):
    with open_tf_checkpoint(folder / "checkpoint" / "model.ckpt-10") as checkpoint:
        yield checkpoint


def test_every_saved_variable_is_there(folder, checkpoint):
    variables = json.loads((folder / "variables.json").read_text())
    # Momentum slots of more than 4,096 values were left out of the file to save space.
    saved = {
        name: facts
        for name, facts in variables.items()
        if facts["kind"] != "momentum_slot" or np.prod(facts["shape"]) <= 4096
    }
    assert checkpoint.names == sorted(saved)
    for name, facts in saved.items():
        found = checkpoint.read(name)
        assert list(found.shape) == list(checkpoint.shape(name)) == facts["shape"]
        assert found.dtype == checkpoint.dtype(name) == facts["dtype"]


def test_values_of_the_trainer(folder, checkpoint):
    with np.load(folder / "trainer_state.npz") as state:
        assert len(state.files) == 4
        for name in state.files:
            variable = name if name == "global_step" else f"instance/{name}"
            np.testing.assert_array_equal(checkpoint.read(variable), state[name], strict=True)


def test_values_of_the_network_before_the_first_step(folder, checkpoint):
    with np.load(folder / "train_steps.npz") as steps:
        names = [str(name) for name in steps["param_names"]]
        lengths = steps["LA_step0_param_l2"]
        moved = steps["LA_step0_param_delta_l2"]
    for name, length, step in zip(names, lengths, moved, strict=True):
        ours = np.linalg.norm(checkpoint.read(name).astype("float64"))
        assert abs(ours - length) <= step + 1e-5 * length
