"""ResNet-18 through its real checkpoint and AlexNet through the rule weights, as recorded."""

import json
import zlib

import numpy as np
import pytest
import torch
from tf_networks import Arrays, rule_kernel

from localagg.bank import MemoryBank
from localagg.config import PretrainConfig
from localagg.interop import load_tf_checkpoint
from localagg.interop.tf_variables import load_variables
from localagg.interop.variable_names import map_variables
from localagg.models import create_encoder
from localagg.models.vgg import VGG16
from localagg.training.learner import parameter_groups

pytestmark = pytest.mark.reference
FOLDERS = {"preact_resnet18": "resnet18", "alexnet_bn": "alexnet_bn_no_drop"}


def alexnet_variables(folder):
    """Kernels by the rule of the fixtures' README, the others as recorded."""
    arrays = dict(np.load(folder / "small_variables.npz"))
    for name, variable in json.loads((folder / "variables.json").read_text()).items():
        if variable["kind"] == "network" and len(variable["shape"]) > 1:
            arrays[name] = rule_kernel(name, tuple(variable["shape"]))
    checksum = 0
    for name in sorted(name for name, array in arrays.items() if array.ndim > 1):
        checksum = zlib.crc32(arrays[name], checksum)
    assert checksum == 2868738687
    return arrays


@pytest.fixture(scope="module", params=list(FOLDERS))
def recorded(request, fixtures):
    """(encoder with the recorded weights, its folder, its outputs, its images)."""
    folder = fixtures / "networks" / FOLDERS[request.param]
    encoder = create_encoder(request.param)
    if request.param == "preact_resnet18":
        report = load_tf_checkpoint(folder / "checkpoint" / "model.ckpt-10", encoder)
    else:
        report = load_variables(Arrays(alexnet_variables(folder)), encoder)
    assert report.missing == ()
    arrays = dict(np.load(folder / "outputs.npz"))
    return encoder, folder, arrays, torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)


def close(found, expected, tolerance=5e-5):
    """Within a tolerance relative to the largest value of the array."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return found.shape == expected.shape and (
        np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    )


def close_feature(feature, outputs, key):
    """A flattened feature against all that is recorded of it."""
    values = feature.double().numpy()
    dim = values.shape[1]
    assert dim == outputs[f"{key}_dim"]
    assert close(values.mean(1), outputs[f"{key}_mean"])
    assert close(values.std(1), outputs[f"{key}_std"])
    assert close(np.linalg.norm(values, axis=1), outputs[f"{key}_l2"])
    assert close(values[:, :64], outputs[f"{key}_first64"])
    places = np.linspace(0, dim - 1, 64).astype(np.int64)
    assert close(values[:, places], outputs[f"{key}_strided64"])
    signs = np.random.RandomState(7).randint(0, 2, size=(dim, 8), dtype=np.int8) * 2 - 1
    assert close(values @ signs, outputs[f"{key}_sign_proj8"])


@torch.no_grad()
def test_embedding_and_logits(recorded):
    encoder, _, outputs, images = recorded
    encoder.eval()
    assert close(encoder(images), outputs["embedding"])
    assert close(encoder.unnormalized(images), outputs["logits"])
    assert close(encoder(images.float() / 255), outputs["embedding"])


@torch.no_grad()
def test_readout_features(recorded):
    encoder, folder, outputs, images = recorded
    recorded_layers = json.loads((folder / "layers.json").read_text())
    layers = recorded_layers["layers"]
    for compat in (None, "reference"):  # the slip is VGG's alone
        features = encoder.eval().features(images, list(layers), compat=compat)
        for layer, feature in features.items():
            assert feature.shape == (4, layers[layer]["flat_dim"])
            close_feature(feature, outputs, f"layer_{layer}")
    # Every ending point, by name and shape; AlexNet's last one is the head's output.
    maps = encoder.backbone.maps((images / 255 - encoder.mean) / encoder.std)
    points = [(name.split("/")[-1], shape) for name, shape in recorded_layers["ending_points"]]
    assert list(maps) == encoder.layers == [name for name, _ in points if name != "fc8"]
    for name, shape in points:
        if name != "fc8":
            nchw = shape if name.isdigit() else [shape[0], shape[3], *shape[1:3]]
            assert list(maps[name].shape) == nchw


@pytest.mark.parametrize("recorded", ["preact_resnet18"], indirect=True)
@torch.no_grad()
def test_the_slip_of_vgg_is_what_resnet_does_in_the_other_layout(recorded):
    """VGG is not recorded here, but the reference's ResNet on a CPU goes through the same code."""
    encoder, _, outputs, images = recorded
    maps = encoder.eval().backbone.maps((images / 255 - encoder.mean) / encoder.std)
    with torch.device("meta"):
        vgg = VGG16()
    for layer in "13579":
        close_feature(vgg.flatten_map(maps[layer], "reference"), outputs, f"cpu_layer_{layer}")
    final = outputs | {"layer_9_dim": outputs["skip_final_dense_dim"]}
    close_feature(maps["9"].flatten(1), final, "skip_final_dense")


@torch.no_grad()
def test_training_mode_and_the_statistics_it_leaves(recorded):
    encoder, folder, outputs, images = recorded
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    assert close(encoder.unnormalized(images), outputs["logits_train_mode"])
    state, keys = encoder.state_dict(), map_variables(encoder)
    with np.load(folder / "bn_after_update.npz") as updated:
        norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(updated.files) == 2 * len(norms)
        for name in updated:
            assert close(state[keys[name]], updated[name], 1e-5), name
    encoder.load_state_dict(before)
    assert close(encoder(images), outputs["embedding_train_mode"])
    encoder.load_state_dict(before)


def test_weights_that_decay_are_the_references(recorded):
    encoder, folder, _, _ = recorded
    variables = json.loads((folder / "variables.json").read_text())
    decayed = {id(p) for p in parameter_groups(encoder, PretrainConfig())[0]["params"]}
    parameters, keys = dict(encoder.named_parameters()), map_variables(encoder)
    trained = {name for name in keys if keys[name] in parameters}
    assert trained == {name for name, variable in variables.items() if variable["trainable"]}
    ours = {name for name in trained if id(parameters[keys[name]]) in decayed}
    theirs = {name for name in trained if variables[name]["weight_decay"]}
    # The slip that we do not copy: the reference spares what is called batch_normalization, and
    # AlexNet's is not.
    slip = {name for name in theirs if name.split("/")[-1] in ("gamma", "beta")}
    assert theirs - slip == ours
    assert len(slip) == (14 if folder.name == "alexnet_bn_no_drop" else 0)


def test_everything_in_the_checkpoint_is_accounted_for(fixtures):
    folder = fixtures / "networks" / "resnet18"
    encoder, bank = create_encoder("preact_resnet18"), MemoryBank(64, 128)
    report = load_tf_checkpoint(folder / "checkpoint" / "model.ckpt-10", encoder, bank)
    variables = json.loads((folder / "variables.json").read_text())
    kinds = {name: variable["kind"] for name, variable in variables.items()}
    assert set(report.matched) == {n for n, kind in kinds.items() if kind != "momentum_slot"}
    # Slots of more than 4,096 elements were left out when the file was recorded.
    slots = [name for name, kind in kinds.items() if kind == "momentum_slot"]
    slots = {name for name in slots if np.prod(variables[name]["shape"]) <= 4096}
    assert set(report.left) == slots
    assert len(report.momentum) == len(slots)
    with np.load(folder / "trainer_state.npz") as state:
        np.testing.assert_array_equal(bank.rows, state["memory_bank"])
        np.testing.assert_array_equal(report.labels, state["all_labels"])
        np.testing.assert_array_equal(report.cluster_labels, state["cluster_labels"])
        assert report.global_step == state["global_step"]
