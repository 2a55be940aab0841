"""The reference's four networks against naive arithmetic and torchvision; no fixtures needed."""

import numpy as np
import pytest
import torch
import torchvision
from expect import user_error

from localagg.models import create_encoder

# At 224 pixels: maps (channels, side) and the values of a feature, hand-derived from the source.
RESNET18 = [(64, 56)] * 4 + [(128, 28)] * 2 + [(256, 14)] * 2 + [(512, 7)] * 2
RESNET50 = (
    [(64, 56)] * 2 + [(256, 56)] * 3 + [(512, 28)] * 4 + [(1024, 14)] * 6 + [(2048, 7)] * 3
)  # fmt: skip


def empty(model, **options):
    """Create an encoder without values, whose shapes cost nothing."""
    with torch.device("meta"):
        return create_encoder(model, **options).eval()


def shapes(model, side=224, **options):
    encoder = empty(model)
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")
    maps = encoder.backbone.maps(images.float())
    features = encoder.features(images, encoder.layers, **options)
    assert encoder(images).shape == (2, 128)
    return {k: tuple(m.shape[1:3]) for k, m in maps.items()}, {
        k: f.shape[1] for k, f in features.items()
    }


def test_resnet18_has_the_references_layers():
    maps, sizes = shapes("preact_resnet18")
    assert list(maps.values()) == RESNET18
    assert [sizes[k] for k in "13579"] == [50176, 50176, 100352, 50176, 25088]


def test_resnet50_has_the_references_layers():
    maps, sizes = shapes("preact_resnet50")
    # Points are entries of blocks: the first of a stage still has the former stage's shape.
    assert list(maps.values()) == RESNET50
    assert list(maps) == [str(n) for n in range(18)]
    wanted = {"1": 28 * 28 * 64, "4": 14 * 14 * 256, "8": 14 * 14 * 512, "14": 7 * 7 * 1024}
    assert {k: sizes[k] for k in wanted} == wanted
    assert sizes["17"] == 2048 * 7 * 7


def test_vgg_has_the_references_layers():
    maps, sizes = shapes("vgg16_bn_last")
    assert list(maps.items())[:5] == [
        ("0", (64, 224)), ("1", (128, 112)), ("2", (256, 56)), ("3", (512, 28)), ("4", (512, 14))
    ]  # fmt: skip
    by_space = [56 * 56 * 64, 28 * 28 * 128, 14 * 14 * 256, 14 * 14 * 512, 14 * 14 * 512]
    assert [sizes[k] for k in "01234"] == by_space
    slipped = [56 * 16 * 224, 28 * 32 * 112, 14 * 64 * 56, 14 * 256 * 28, 14 * 14 * 512]
    assert [shapes("vgg16_bn_last", compat="reference")[1][k] for k in "01234"] == slipped


def test_alexnet_has_the_references_layers():
    maps, sizes = shapes("alexnet_bn")
    assert maps == {
        "conv1": (64, 54), "pool1": (64, 26), "conv2": (192, 26), "pool2": (192, 12),
        "conv3": (384, 12), "conv4": (384, 12), "conv5": (256, 12), "pool5": (256, 5),
        "fc6": (4096, 1), "fc7": (4096, 1),
    }  # fmt: skip
    assert [sizes[f"conv{n}"] for n in range(1, 6)] == [186624, 129792, 55296, 55296, 36864]


def test_vgg_has_torchvisions_parameters_but_for_head_and_norms():
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(num_classes=128)
    normed = 64 + 128 + 256 + 512 + 512 + 4096 + 4096  # gamma and beta in place of a bias
    expected = sum(p.numel() for p in theirs.parameters()) + normed
    assert sum(p.numel() for p in empty("vgg16_bn_last").parameters()) == expected


def test_vggs_features_are_pooled_over_space_or_as_the_slip():
    encoder = empty("vgg16_bn_last")
    map_ = torch.randn(2, 64, 62, 64, dtype=torch.float64)  # 253,952 values: a window of 2
    nhwc = map_.permute(0, 2, 3, 1).numpy()
    space = nhwc.reshape(2, 31, 2, 32, 2, 64).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(
        encoder.backbone.flatten_map(map_, None), space, rtol=1e-12, atol=1e-15
    )
    nwch = nhwc.transpose(0, 2, 3, 1)
    slip = nwch.reshape(2, 32, 2, 32, 2, 62).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(
        encoder.backbone.flatten_map(map_, "reference"), slip, rtol=1e-12, atol=1e-15
    )
    small = map_[:, :4]
    for compat in (None, "reference"):
        found = encoder.backbone.flatten_map(small, compat)
        np.testing.assert_array_equal(found, nhwc[..., :4].reshape(2, -1))


@pytest.fixture(scope="module")
def vgg():
    """VGG with batch-norm parameters and statistics as of a trained network."""
    encoder = create_encoder("vgg16_bn_last", seed=0).eval()
    torch.manual_seed(0)
    for norm in encoder.backbone.norms.values():
        torch.nn.init.uniform_(norm.weight, 0.6, 1.4)
        torch.nn.init.uniform_(norm.bias, 0, 0.5)
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        torch.nn.init.uniform_(norm.running_var, 0.1, 1)
    return encoder


@torch.no_grad()
def test_features_are_pooled_as_the_slip_with_compat(vgg):
    images = torch.rand(1, 3, 64, 64)
    plain = vgg.features(images, [0])["0"]
    slip = vgg.features(images, [0], compat="reference")["0"]
    assert plain.shape == slip.shape
    assert not torch.equal(plain, slip)


def test_vgg_is_torchvisions_with_batch_norm_folded_in(vgg):
    backbone, weights = vgg.backbone, []
    for name, conv in backbone.convs.items():
        weight, bias = conv.weight.detach(), conv.bias
        if name in backbone.norms:
            norm = backbone.norms[name]
            scale = norm.weight / (norm.running_var + 1e-5).sqrt()
            weight = weight * scale.detach()[:, None, None, None]
            bias = norm.bias - norm.running_mean * scale
        weights.append((weight, torch.nn.Parameter(bias.detach())))
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(num_classes=128).eval()
    layers = [m for m in theirs.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer, (weight, bias) in zip(layers[:-1], weights, strict=True):
        layer.weight = torch.nn.Parameter(weight.reshape(layer.weight.shape))
        layer.bias = bias
    theirs.classifier[-1] = vgg.head
    images = torch.rand(1, 3, 224, 230)
    with torch.no_grad():
        expected = theirs((images - vgg.mean) / vgg.std)
        found = vgg.unnormalized(images)
    assert expected.std() > 0
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "works", "fails", "sides", "layer", "smallest"),
    [
        ("alexnet_bn", (195, 226), (194, 227), "195 to 226", "conv5", 35),
        ("vgg16_bn_last", (224, 255), (223, 256), "224 to 255", "4", 16),
    ],
)
def test_errors_name_the_sizes_that_fit(model, works, fails, sides, layer, smallest):
    encoder = empty(model)

    def images(height, width):
        return torch.zeros(2, 3, height, width, device="meta")

    assert encoder(images(*works)).shape == (2, 128)
    for size in fails:
        for shape in ((size, works[0]), (works[0], size)):
            with user_error("mismatch", model, sides, "{}x{}".format(*shape)):
                encoder(images(*shape))
        encoder.features(images(size, size), [layer])
    assert encoder.features(images(smallest, smallest), [layer])[layer].shape[1] in (256, 512)
    with user_error("mismatch", model, f"{smallest} pixels"):
        encoder.features(images(smallest, smallest - 1), [layer])


@pytest.mark.parametrize("side", [32, 97])
def test_resnets_take_other_sizes(side):
    images = torch.zeros(2, 3, side, side, device="meta")
    assert empty("preact_resnet18")(images).shape == (2, 128)


def test_batch_norm_tracks_as_in_the_reference():
    encoder = create_encoder("preact_resnet18", seed=0)
    norm = encoder.backbone.blocks[0].norms[0]
    maps = torch.randn(5, 64, 3, 3) * 3 + 1
    norm(maps)
    values = maps.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), 0.003 * values.mean(1))
    expected = 0.997 + 0.003 * values.var(1, correction=1)
    torch.testing.assert_close(norm.running_var.double(), expected)
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}


def test_initial_weights_are_the_references():
    resnet = create_encoder("preact_resnet18", seed=0)
    kernel = resnet.backbone.blocks[5].convs[1].weight
    scale = (256 * 9) ** -0.5
    assert kernel.std().item() == pytest.approx(scale, rel=0.01)
    assert 2.2 * scale < kernel.abs().max().item() <= 2 * scale / 0.8796256
    assert resnet.head.weight.abs().max().item() == pytest.approx(
        (6 / (512 + 128)) ** 0.5, rel=0.01
    )
    assert not resnet.head.bias.any()
    alexnet = create_encoder("alexnet_bn", seed=0)
    fc6, conv1 = (alexnet.backbone.convs[name] for name in ("fc6", "conv1"))
    assert 0.00999 < fc6.weight.abs().max().item() <= 0.01
    assert alexnet.head.weight.abs().max().item() <= 0.01
    assert fc6.bias.unique().tolist() == [pytest.approx(0.1)]
    assert not conv1.bias.any()
    assert conv1.weight.abs().max().item() == pytest.approx((6 / (67 * 121)) ** 0.5, rel=0.01)


def test_resnet_in_training_uses_the_batch():
    """One block by hand: the recorded network covers inference only."""
    encoder = create_encoder("preact_resnet18", seed=0).train()
    block = encoder.backbone.blocks[2]  # 64 -> 128 channels, stride 2
    x = torch.randn(3, 64, 9, 9, dtype=torch.float64)
    block.double()

    def norm_relu(x):
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt()).relu()

    def conv(x, weight, stride):
        pad = (weight.shape[-1] - 1) // 2
        x = torch.nn.functional.pad(x, (pad, pad, pad, pad))
        return torch.nn.functional.conv2d(x, weight, stride=stride)

    entry = norm_relu(x)
    y = norm_relu(conv(entry, block.convs[0].weight, 2))
    expected = conv(y, block.convs[1].weight, 1) + conv(entry, block.project.weight, 2)
    torch.testing.assert_close(block(x, block.norms[0](x).relu()), expected)
