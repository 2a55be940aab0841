"""timm's networks behind the same interface."""

import sys

import pytest
import torch

from localagg.errors import UserError
from localagg.models import create_encoder, encoder_from_json, spec_to_json

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
        assert torch.allclose(encoder(IMAGES).norm(dim=1), torch.ones(2))
        features = encoder.features(IMAGES, ["3", 1])
        torch.testing.assert_close(features["1"], theirs.forward_intermediates(x)[1][1].flatten(1))
    assert encoder.layers == ["0", "1", "2", "3", "4"]
    assert list(features) == ["3", "1"]
    again = encoder_from_json(spec_to_json(encoder))
    again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "layers", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 3, (192, 4, 4)),
        ("mobilenetv3_small_050", {}, 5, (288, 2, 2)),  # its head widens to 1024
        ("convnext_atto", {}, 4, (320, 2, 2)),
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


def test_wrong_use_is_one_sentence(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"no model 'resnet81'\. Did you mean 'timm:resnet"):
        create_encoder("timm:resnet81")
    with pytest.raises(UserError, match="starts from random weights"):
        create_encoder("timm:resnet18", pretrained=True)
    with pytest.raises(UserError, match="does not take these options"):
        create_encoder("timm:resnet18", widht=3)
    encoder = create_encoder("timm:vit_tiny_patch16_224", depth=1)
    with pytest.raises(UserError, match="images of 64x64"):
        encoder(IMAGES)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'localagg\[timm\]'"):
        create_encoder("timm:resnet18")
