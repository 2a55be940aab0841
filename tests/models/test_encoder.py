import pytest
import torch
import torchvision
from expect import user_error

from localagg.models import available_models, create_encoder


@pytest.mark.parametrize(
    ("model", "side"), [("resnet18_small", 16), ("resnet18", 64), ("resnet50", 64)]
)
def test_encoders_return_unit_rows_and_features_of_every_layer(model, side):
    encoder = create_encoder(model, dim=24, seed=0).eval()
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        rows = encoder(images)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
        assert rows.shape == (3, 24)
        torch.testing.assert_close(encoder(images.float() / 255), rows)
        features = encoder.features(images, encoder.layers)
    assert list(features) == encoder.layers
    assert all(f.ndim == 2 and len(f) == 3 for f in features.values())


def test_the_small_network_is_resnet18_with_another_stem():
    small = create_encoder("resnet18_small", seed=0).backbone
    theirs = torchvision.models.resnet18()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    stem = count(small.stem) + count(small.stem_norm)
    expected = count(theirs) - count(theirs.fc) - count(theirs.conv1) - count(theirs.bn1)
    assert count(small) - stem == expected
    assert small.maps(torch.zeros(1, 3, 32, 32))["4"].shape == (1, 512, 4, 4)


def test_torchvisions_network_computes_what_it_did():
    torch.manual_seed(5)
    encoder = create_encoder("resnet18", dim=8)
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval().backbone.pooled(x), theirs(x))


def test_width_depth_and_stem_are_options_and_part_of_the_spec():
    encoder = create_encoder("resnet18_small", width=8, blocks=(1, 2), stem_stride=2, seed=0)
    maps = encoder.backbone.maps(torch.zeros(1, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(8, 16, 16), (8, 16, 16), (16, 8, 8)]
    create_encoder(**encoder.spec).load_state_dict(encoder.state_dict())


def test_a_head_of_two_layers():
    encoder = create_encoder("resnet18_small", 6, head_layers=2, width=4, seed=0).eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        pooled = encoder.features(images, ["4"])["4"].view(3, 32, 2, 2).mean(dim=(2, 3))
        weights = encoder.state_dict()
        inner = pooled @ weights["hidden.0.weight"].T + weights["hidden.0.bias"]
        outer = inner.clamp(min=0) @ weights["head.weight"].T + weights["head.bias"]
        assert weights["hidden.0.weight"].shape == (32, 32)
        torch.testing.assert_close(encoder(images), torch.nn.functional.normalize(outer, dim=1))
        again = create_encoder(**encoder.spec).eval()
        again.load_state_dict(weights)
        assert torch.equal(again(images), encoder(images))
    assert "head_layers" not in create_encoder("resnet18_small", head_layers=1, width=4).spec
    with user_error("option-invalid", "head_layers", 3):
        create_encoder("resnet18_small", head_layers=3)


def test_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    one, two = (create_encoder("resnet18_small", width=8, seed=s).state_dict() for s in (1, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = create_encoder("resnet18_small", width=8, seed=2).state_dict()
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_layers_may_be_numbers_and_only_what_they_need_is_computed():
    encoder = create_encoder("resnet18_small", width=8, seed=0).eval()
    encoder.backbone.stages[2] = None  # would fail if it were called
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = encoder.features(images, [2, "1"])
    assert list(features) == ["2", "1"]
    assert torch.equal(features["2"], encoder.features(images, ["2"])["2"])


@pytest.mark.parametrize(
    ("model", "channels"), [("resnet34", 512), ("wide_resnet50_2", 2048), ("resnext50_32x4d", 2048)]
)
def test_every_resnet_of_torchvision_is_available(model, channels):
    with torch.device("meta"):
        encoder = create_encoder(model)
    images = torch.zeros(1, 3, 64, 64, device="meta")
    assert encoder.backbone.maps(images)["4"].shape == (1, channels, 2, 2)
    assert encoder(images).shape == (1, 128)
    assert model in available_models()


def test_wrong_names_and_options_are_named():
    with user_error("option-unknown", "'resnet81'", "'resnet18'"):
        create_encoder("resnet81")
    for options in ({"width": 3}, {"weights": "DEFAULT"}):
        with user_error("option-unknown", "resnet18", *options):
            create_encoder("resnet18", **options)
    encoder = create_encoder("resnet18_small", width=8)
    with user_error("option-unknown", "'9'", "0, 1, 2, 3, 4"):
        encoder.features(torch.zeros(1, 3, 16, 16), ["9"])
    with user_error("option-invalid", "'torch'", "'reference'"):
        encoder.features(torch.zeros(1, 3, 16, 16), ["1"], compat="torch")


PIXELS = torch.rand(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (PIXELS[:, :1], "[2, 1, 16, 16]"),
        (PIXELS[0], "[3, 16, 16]"),
        (PIXELS.movedim(1, 3), "[2, 16, 16, 3]"),
        (PIXELS * 255, "254"),
        ((PIXELS - 0.45) / 0.22, "-2.0"),
        ((PIXELS * 255).long(), "int64"),
        (PIXELS / 0, "inf"),
        (PIXELS * torch.nan, "nan"),
    ],
)
def test_images_of_another_shape_dtype_or_range_are_named(images, named):
    encoder = create_encoder("resnet18_small", width=8).eval()
    for call in (encoder, lambda x: encoder.features(x, ["1"])):
        with user_error("option-invalid", named):
            call(images)
