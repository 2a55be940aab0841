"""Checkpoints of unsup_vvs (Zhuang et al. 2021), whose variables are called ``encodeN``."""

import json

import numpy as np
import pytest
import torch
from expect import user_error
from make_tf_checkpoint import checkpoint
from safetensors.torch import load_file
from tf_networks import Arrays, Program, resnet_v2, vvs_resnet

from localagg import cli
from localagg.bank import MemoryBank
from localagg.checkpoint import load_encoder, load_views
from localagg.interop.import_weights import VVS_VIEWS
from localagg.interop.tf_variables import load_variables
from localagg.models import create_encoder

SIZES = {"resnet18_vvs": ((2, 2, 2, 2), False), "resnet50_vvs": ((3, 4, 6, 3), True)}
# Strided convolutions see sides of 15, 8, 4 and 14, 7, 4: both ways of padding, in both axes.
SHAPE = (65, 60)


def run(model, images, suffix):
    """The naive program, its variables, and its output on images, normalized by ImageNet's mean."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    program = Program()
    x = ((images - mean) / std).permute(0, 2, 3, 1).double()
    return program, vvs_resnet(program, x, *SIZES[model], suffix)


def random_images():
    return torch.rand(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0))


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_layers(encoder, images, program, output):
    with torch.no_grad():
        maps = encoder.maps(images)
        assert list(maps) == list(program.points)
        for layer, point in program.points.items():
            assert relative(maps[layer].permute(0, 2, 3, 1), point) < 1e-5, layer
        assert relative(encoder.unnormalized(images), output) < 1e-5
        expected = output / output.norm(dim=1, keepdim=True)
        assert (encoder(images) - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def variables():
    """Those of a ResNet-18 of the default options, whose batch-norm scopes have no suffix."""
    return run("resnet18_vvs", torch.zeros(1, 3, 16, 16), "")[0].variables


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("suffix", ["", "_imagenet"])
def test_every_layer_has_the_originals_values(model, suffix):
    images = random_images()
    program, output = run(model, images, suffix)
    encoder = create_encoder(model, seed=0).eval()
    report = load_variables(Arrays(program.variables), encoder)
    assert sorted(report.matched) == sorted(program.variables)
    assert report.left == report.missing == ()
    check_layers(encoder, images, program, output)


def test_variables_have_the_originals_names(variables):
    first = ["encode1/weights", "encode1/bias", "encode1/batch_normalization/gamma"]
    assert list(variables)[:3] == first
    convs = {n.removesuffix("/weights") for n in variables if n.endswith("/weights")}
    blocks = {f"encode{n}/conv_{i}" for n in range(2, 10) for i in range(2)}
    transfers = {f"encode{n}/transfer" for n in (4, 6, 8)}
    assert convs == {"encode1", *blocks, *transfers, "category2"}
    assert variables["encode4/transfer/weights"].shape == (1, 1, 64, 128)


def trainer(scope, rows=6, clusterings=2):
    draws = np.random.RandomState(len(scope))
    found = {
        f"{scope}/memory_bank": draws.randn(rows, 128).astype(np.float32),
        f"{scope}/all_labels": draws.randint(0, 9, rows),
    }
    if scope.endswith("_LA"):
        found[f"{scope}/cluster_labels"] = draws.randint(0, 3, (clusterings, rows))
    return found


@pytest.mark.parametrize(
    ("scopes", "used"),
    [
        (["imagenet"], "imagenet"),
        (["imagenet_LA"], "imagenet_LA"),
        (["imagenet", "imagenet_LA"], "imagenet_LA"),
        (["saycam"], "saycam"),
    ],
)
def test_the_bank_of_la_is_preferred_to_that_of_ir(variables, scopes, used):
    arrays = variables | {"global_step": np.int64(7)}
    for scope in scopes:
        arrays |= trainer(scope)
    encoder, bank = create_encoder("resnet18_vvs", seed=0), MemoryBank(6, 128)
    report = load_variables(Arrays(arrays), encoder, bank)
    np.testing.assert_array_equal(bank.rows, arrays[f"{used}/memory_bank"])
    np.testing.assert_array_equal(report.labels, arrays[f"{used}/all_labels"])
    clusters = arrays.get(f"{used}/cluster_labels")
    if clusters is None:
        assert report.cluster_labels is None
    else:
        np.testing.assert_array_equal(report.cluster_labels, clusters)
    unused = {f"{s}/{n}" for s in scopes if s != used for n in ("memory_bank", "all_labels")}
    assert set(report.left) == unused
    assert report.global_step == 7


def test_batch_norms_of_several_data_sets_are_refused(variables):
    more = {
        name.replace("encode1/", "encode1_rp/"): array
        for name, array in variables.items()
        if name.startswith("encode1/batch")
    }
    with user_error("unsupported", "encode1, encode1_rp"):
        load_variables(Arrays(variables | more), create_encoder("resnet18_vvs", seed=0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(prefix of a checkpoint of LA, its arrays)."""
    folder = tmp_path_factory.mktemp("vvs")
    program, _ = run("resnet18_vvs", torch.zeros(1, 3, 16, 16), "_imagenet")
    arrays = program.variables | trainer("imagenet_LA") | {"global_step": np.array(11)}
    for name in ("encode6/conv_1/weights", "category2/bias"):
        slot = np.random.RandomState(0).randn(*arrays[name].shape)
        arrays[f"{name}/Momentum"] = slot.astype(np.float32)
    for name, data in checkpoint(arrays).items():
        (folder / name).write_bytes(data)
    return str(folder / "model.ckpt-10"), arrays


def test_a_checkpoint_is_imported_by_the_command(stored, tmp_path):
    prefix, arrays = stored
    out, bank, result = (tmp_path / name for name in ("w.safetensors", "b.safetensors", "r.json"))
    words = ["import-tf", prefix, "--model", "resnet18_vvs", "--out", str(out)]
    assert cli.main([*words, "--bank", str(bank), "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    assert (report["global_step"], report["rows"], report["missing"]) == (11, 6, [])
    images = random_images()
    check_layers(load_encoder(out).eval(), images, *run("resnet18_vvs", images, "_imagenet"))
    assert load_views(out) == VVS_VIEWS
    written = load_file(bank)
    names = {"rows": "memory_bank", "labels": "all_labels", "clusters": "cluster_labels"}
    for ours, theirs in names.items():
        np.testing.assert_array_equal(written[ours], arrays[f"imagenet_LA/{theirs}"])
    momenta = {key: value for key, value in written.items() if key.startswith("momentum.")}
    assert set(momenta) == {"momentum.backbone.blocks.4.convs.1.weight", "momentum.head.bias"}
    slot = arrays["encode6/conv_1/weights/Momentum"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(momenta["momentum.backbone.blocks.4.convs.1.weight"], slot)


@pytest.mark.parametrize("model", ["preact_resnet18", "resnet50_vvs"])
@pytest.mark.parametrize("bank", [(), ("--bank", "b.safetensors")])
def test_the_error_for_another_model_names_the_right_one(stored, tmp_path, capsys, model, bank):
    out = tmp_path / "w.safetensors"
    bank = [word.replace("b.", f"{tmp_path}/b.") for word in bank]
    words = ["import-tf", stored[0], "--model", model, "--out", str(out), *bank]
    assert cli.main(words) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert model in message
    assert "--model resnet18_vvs" in message
    assert not out.exists()


def test_the_error_for_the_references_checkpoint_names_its_model():
    program = Program()
    resnet_v2(program, torch.zeros(1, 32, 32, 3, dtype=torch.float64), (2, 2, 2, 2), False)
    with user_error("mismatch", "resnet18_vvs", "--model preact_resnet18"):
        load_variables(Arrays(program.variables), create_encoder("resnet18_vvs", seed=0))
