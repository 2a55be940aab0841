"""Variables of the reference in encoders: names, order and layouts against a naive program."""

import numpy as np
import pytest
import torch
from expect import user_error
from tf_networks import Arrays, Program, alexnet_bn, resnet_v2, vgg16_bn_last

from localagg.bank import MemoryBank
from localagg.interop.tf_variables import load_variables
from localagg.interop.variable_names import map_variables
from localagg.models import create_encoder

PROGRAMS = {
    "preact_resnet18": lambda p, x: resnet_v2(p, x, (2, 2, 2, 2), False),
    "preact_resnet50": lambda p, x: resnet_v2(p, x, (3, 4, 6, 3), True),
    "alexnet_bn": alexnet_bn,
    "vgg16_bn_last": vgg16_bn_last,
}


def run(model, encoder, images):
    """The naive program, its variables, and its output on the encoder's normalized images."""
    program = Program()
    x = ((images - encoder.mean) / encoder.std).permute(0, 2, 3, 1).double()
    return program, PROGRAMS[model](program, x)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def resnet18():
    encoder = create_encoder("preact_resnet18", seed=0).eval()
    return run("preact_resnet18", encoder, torch.zeros(1, 3, 32, 32))[0].variables


@pytest.mark.parametrize(
    ("model", "shape"), [("preact_resnet18", (65, 60)), ("preact_resnet50", (70, 65))]
)
def test_resnets_compute_the_references_output(model, shape):
    encoder = create_encoder(model, seed=0).eval()
    images = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    program, output = run(model, encoder, images)
    report = load_variables(Arrays(program.variables), encoder)
    assert report.matched == tuple(program.variables)
    assert report.left == report.missing == ()
    with torch.no_grad():
        assert relative(encoder.unnormalized(images), output) < 5e-6
        maps = encoder.backbone.maps((images - encoder.mean) / encoder.std)
    assert list(maps) == list(program.points)
    for name, point in program.points.items():
        assert relative(maps[name].permute(0, 2, 3, 1), point) < 5e-6


@pytest.mark.parametrize(
    ("model", "side", "layers"),
    [("vgg16_bn_last", 48, "01234"), ("alexnet_bn", 99, [f"conv{n}" for n in range(1, 6)])],
)
def test_convolutions_of_alexnet_and_vgg_compute_the_references_output(model, side, layers):
    encoder = create_encoder(model, seed=0).eval()
    images = torch.rand(1, 3, side, side + 5, generator=torch.Generator().manual_seed(0))
    program, _ = run(model, encoder, images)
    with pytest.warns(UserWarning, match="fc6.* keep their values"):
        report = load_variables(Arrays(program.variables), encoder)
    assert report.matched == tuple(program.variables)
    assert {name.split("/")[1] for name in report.missing} == {"fc6", "fc7", "fc8"}
    with torch.no_grad():
        maps = encoder.backbone.maps((images - encoder.mean) / encoder.std, layers)
    for name in layers:
        assert relative(maps[name].permute(0, 2, 3, 1), program.points[name]) < 5e-6


def test_names_and_shapes_of_vgg_and_resnet50():
    def variables(model):
        with torch.device("meta"):
            encoder = create_encoder(model)
        state, found = encoder.state_dict(), map_variables(encoder)
        ours = {"mean", "std", *(key for key in state if key.endswith("num_batches_tracked"))}
        assert sorted([*found.values(), *ours]) == sorted(state)
        return {name: tuple(state[key].shape) for name, key in found.items()}

    vgg = variables("vgg16_bn_last")
    assert [name for name in vgg if name.endswith("weights")] == [
        "vgg_16/conv1/conv1_1/weights", "vgg_16/conv1_final/conv1_final_1/weights",
        "vgg_16/conv2/conv2_1/weights", "vgg_16/conv2_final/conv2_final_1/weights",
        "vgg_16/conv3/conv3_1/weights", "vgg_16/conv3/conv3_2/weights",
        "vgg_16/conv3_final/conv3_final_1/weights",
        "vgg_16/conv4/conv4_1/weights", "vgg_16/conv4/conv4_2/weights",
        "vgg_16/conv4_final/conv4_final_1/weights",
        "vgg_16/conv5/conv5_1/weights", "vgg_16/conv5/conv5_2/weights",
        "vgg_16/conv5_final/conv5_final_1/weights",
        "vgg_16/fc6/weights", "vgg_16/fc7/weights", "vgg_16/fc8/weights",
    ]  # fmt: skip
    # Batch-norm takes the bias's place.
    assert sum(name.endswith("biases") for name in vgg) == 6 + 2 + 1
    assert vgg["vgg_16/fc6/batch_normalization/gamma"] == (4096,)
    assert "vgg_16/fc6/biases" not in vgg
    assert vgg["vgg_16/fc6/weights"] == (4096, 512, 7, 7)
    resnet = variables("preact_resnet50")
    assert resnet["resnet_model/conv2d_52/kernel"] == (2048, 512, 1, 1)
    assert resnet["resnet_model/conv2d_11/kernel"] == (512, 256, 1, 1)  # second stage's projection
    assert resnet["resnet_model/conv2d_13/kernel"] == (128, 128, 3, 3)
    assert resnet["resnet_model/batch_normalization_48/moving_variance"] == (2048,)
    assert "resnet_model/conv2d_53/kernel" not in resnet


def trainer(rows=6, clusterings=2):
    draws = np.random.RandomState(0)
    return {
        "global_step": np.int64(70063),
        "instance/memory_bank": draws.randn(rows, 128).astype(np.float32),
        "instance/all_labels": draws.randint(0, 9, rows),
        "instance/cluster_labels": draws.randint(0, 3, (clusterings, rows)),
    }


def test_bank_labels_step_and_momentum_are_loaded(resnet18):
    kernel = "resnet_model/conv2d_7/kernel"
    slots = {f"{kernel}/Momentum": np.random.randn(*resnet18[kernel].shape).astype(np.float32)}
    arrays = resnet18 | trainer() | slots | {"beta1_power": np.float32(0)}
    encoder, bank = create_encoder("preact_resnet18", seed=1), MemoryBank(6, 128)
    report = load_variables(Arrays(arrays), encoder, bank)
    np.testing.assert_array_equal(bank.rows.numpy(), arrays["instance/memory_bank"])
    assert report.global_step == 70063
    assert report.labels.dtype == torch.int64
    np.testing.assert_array_equal(report.labels, arrays["instance/all_labels"])
    assert report.cluster_labels.dtype == torch.int32
    np.testing.assert_array_equal(report.cluster_labels, arrays["instance/cluster_labels"])
    assert report.left == (f"{kernel}/Momentum", "beta1_power")
    (key, momentum) = report.momentum.popitem()
    assert momentum.shape == dict(encoder.named_parameters())[key].shape
    expected = arrays[f"{kernel}/Momentum"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(momentum.numpy(), expected)
    np.testing.assert_array_equal(encoder.state_dict()[key], resnet18[kernel].transpose(3, 2, 0, 1))
    without = load_variables(Arrays(arrays), encoder)
    assert "instance/memory_bank" in without.left
    bare = load_variables(Arrays(resnet18), encoder)
    assert (bare.global_step, bare.labels, bare.cluster_labels) == (None, None, None)
    assert bare.momentum == {}


@pytest.mark.parametrize("scope", ["tower_0/", "model/validation/", "__GPU0__/"])
def test_scopes_before_the_names_do_not_matter(resnet18, scope):
    arrays = {f"{scope}{name}": array for name, array in resnet18.items()} | trainer()
    # Half of another tower, which must not be mixed in.
    arrays |= {f"a/{name}": array + 1 for name, array in list(resnet18.items())[::2]}
    arrays[f"{scope}resnet_model/dense/bias/Momentum"] = np.ones(128, np.float32)
    encoder, plain = (create_encoder("preact_resnet18", seed=s) for s in (1, 2))
    report = load_variables(Arrays(arrays), encoder, MemoryBank(6, 128))
    load_variables(Arrays(resnet18), plain)
    assert all(torch.equal(encoder.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert report.missing == ()
    assert report.global_step == 70063
    assert list(report.momentum) == ["head.bias"]
    assert sum(name.startswith("a/") for name in report.left) == 46


def test_missing_variables_are_named_and_keep_their_values(resnet18):
    arrays = {k: v for k, v in resnet18.items() if "dense" not in k}
    encoder = create_encoder("preact_resnet18", seed=1)
    before = encoder.head.weight.clone()
    with pytest.warns(UserWarning, match=r"a\.ckpt lacks 2 .* resnet_model/dense/kernel"):
        report = load_variables(Arrays(arrays), encoder, where="a.ckpt")
    assert report.missing == ("resnet_model/dense/kernel", "resnet_model/dense/bias")
    assert torch.equal(encoder.head.weight, before)


def test_a_wrong_file_raises_and_changes_nothing(resnet18):
    def check_error(arrays, encoder, code, *values, bank=None):
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        with user_error(code, *values):
            load_variables(Arrays(arrays), encoder, bank, where="a.ckpt")
        if encoder.head.weight.device.type != "meta":
            assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())

    ours = create_encoder("preact_resnet18", seed=1)
    with torch.device("meta"):  # shapes are enough
        narrow = create_encoder("preact_resnet18", 64)
        resnet50, torchvisions = create_encoder("preact_resnet50"), create_encoder("resnet18")
        alexnet = create_encoder("alexnet_bn")
    full = resnet18 | trainer()
    shapes = ("[1, 1, 64, 64]", "[256, 64, 1, 1]")
    check_error(full, resnet50, "mismatch", "a.ckpt", "preact_resnet50", *shapes)
    check_error(full, narrow, "mismatch", "dense/kernel", "[512, 128]", "dim")
    check_error(full, alexnet, "mismatch", "alexnet_bn", "resnet_model/conv2d/kernel")
    check_error({}, ours, "mismatch", "none")
    check_error(full, torchvisions, "unsupported", "resnet18", "preact_resnet18")
    check_error(full, ours, "mismatch", "[6, 128]", "[7, 128]", bank=MemoryBank(7, 128))
    gamma = "resnet_model/batch_normalization_3/gamma"
    text = np.full(64, b"x", object)
    check_error(full | {gamma: text}, ours, "mismatch", "a.ckpt", gamma, "object")
    check_error(full | {"global_step": np.zeros(2, int)}, ours, "mismatch", "global_step", "1 axes")
    check_error(full | {"global_step": np.float32(3)}, ours, "mismatch", "float32")
    check_error(resnet18, ours, "not-found", "a.ckpt", bank=MemoryBank(6, 128))
