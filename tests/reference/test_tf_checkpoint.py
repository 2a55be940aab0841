"""The reader of TensorFlow checkpoints on one that TensorFlow wrote."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from localagg.errors import UserError
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


@pytest.mark.parametrize("name", ["", "checkpoint", "model.ckpt-10.index"])
def test_other_ways_to_name_it(folder, checkpoint, name):
    with open_tf_checkpoint(folder / "checkpoint" / name) as found:
        assert found.names == checkpoint.names


def test_in_a_tar(folder, checkpoint, tmp_path):
    path = tmp_path / "weights.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "checkpoint", "resnet18/checkpoint")
    with open_tf_checkpoint(path) as found:
        assert found.names == checkpoint.names
        name = "resnet_model/dense/kernel"
        np.testing.assert_array_equal(found.read(name), checkpoint.read(name))


def test_truncated_and_altered(folder, tmp_path):
    for file in (folder / "checkpoint").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    data = tmp_path / "model.ckpt-10.data-00000-of-00001"
    with open(data, "r+b") as file:
        file.seek(-1, io.SEEK_END)
        last = file.read(1)
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with open_tf_checkpoint(tmp_path) as found:
        last = "resnet_model/dense/kernel"
        with pytest.raises(UserError, match=f"'{last}' does not have its checksum"):
            found.read(last)
    with open(data, "r+b") as file:
        file.truncate(45_092_103)
    with pytest.raises(
        UserError, match="truncated: it has 45,092,103 bytes of at least 45,092,104"
    ):
        open_tf_checkpoint(tmp_path)
