import sys

import pytest
import torch
from expect import user_error

from localagg.models import create_encoder

IMAGES = torch.rand(2, 3, 64, 64)


def test_any_network_of_timm_is_an_encoder():
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    encoder = create_encoder("timm:resnet18", dim=16).eval()
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    x = (IMAGES - encoder.mean) / encoder.std
    with torch.no_grad():
        torch.testing.assert_close(encoder.unnormalized(IMAGES), encoder.head(theirs(x)))
        features = encoder.features(IMAGES, ["3", 1])
        torch.testing.assert_close(features["1"], theirs.forward_intermediates(x)[1][1].flatten(1))
    assert encoder.layers == ["0", "1", "2", "3", "4"]
    assert list(features) == ["3", "1"]
    create_encoder(**encoder.spec).load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "layers", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 3, (192, 4, 4)),
        ("mobilenetv3_small_050", {}, 5, (288, 2, 2)),  # its head widens to 1024
    ],
)
def test_transformers_and_others_name_their_layers(name, options, layers, shape):
    pytest.importorskip("timm")
    encoder = create_encoder(f"timm:{name}", dim=8, seed=0, **options).eval()
    with torch.no_grad():
        maps = encoder.backbone.maps(IMAGES)
        assert encoder(IMAGES).shape == (2, 8)
    assert list(maps) == encoder.layers == [str(n) for n in range(layers)]
    assert maps[encoder.layers[-1]].shape == (2, *shape)


def test_wrong_names_options_and_sizes_are_named():
    pytest.importorskip("timm")
    with user_error("option-unknown", "'resnet81'", "timm:resnet"):
        create_encoder("timm:resnet81")
    with user_error("unsafe", "timm:resnet18", "'pretrained'"):
        create_encoder("timm:resnet18", pretrained=True)
    with user_error("option-unknown", "timm:resnet18", "widht"):
        create_encoder("timm:resnet18", widht=3)
    encoder = create_encoder("timm:vit_tiny_patch16_224", depth=1)
    with user_error("mismatch", "64x64", 224):
        encoder(IMAGES)


def test_a_network_without_named_layers_is_unsupported(monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", lambda name, **options: torch.nn.Linear(2, 2))
    with user_error("unsupported", "timm:resnet18"):
        create_encoder("timm:resnet18")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with user_error("missing-extra", "localagg[timm]"):
        create_encoder("timm:resnet18")
