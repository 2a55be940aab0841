"""The networks of Zhuang et al. 2021: shapes, initial weights and sizes of images.

``tests/interop/test_vvs_checkpoint.py`` compares their values with a naive program.
"""

import pytest
import torch
from expect import user_error

from localagg.models import create_encoder

# At 224 pixels, hand-derived: (224 - 7) // 2 + 1 = 109, then halves, rounded up.
RESNET18 = [(64, 109)] + [(64, 55)] * 3 + [(128, 28)] * 2 + [(256, 14)] * 2 + [(512, 7)] * 2
RESNET50 = (
    [(64, 109), (64, 55)]
    + [(256, 55)] * 3 + [(512, 28)] * 4 + [(1024, 14)] * 6 + [(2048, 7)] * 3
)  # fmt: skip


def maps(model, side):
    with torch.device("meta"):
        encoder = create_encoder(model).eval()
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")
    assert encoder(images).shape == (2, 128)
    return {layer: tuple(m.shape[1:3]) for layer, m in encoder.maps(images).items()}


@pytest.mark.parametrize(
    ("model", "expected"), [("resnet18_vvs", RESNET18), ("resnet50_vvs", RESNET50)]
)
def test_layers_have_the_originals_names_and_shapes(model, expected):
    found = maps(model, 224)
    assert list(found) == [str(n) for n in range(len(expected))]
    assert list(found.values()) == expected


@pytest.mark.parametrize(("side", "last"), [(198, 6), (199, 7), (230, 7), (231, 8)])
def test_the_mean_is_the_originals_pool_by_7_at_199_to_230_pixels(side, last):
    assert maps("resnet18_vvs", side)["9"] == (512, last)


def test_images_smaller_than_the_first_kernel_are_refused():
    assert maps("resnet18_vvs", 7)["9"] == (512, 1)
    with user_error("mismatch", "at least 7", "7x6"):
        create_encoder("resnet18_vvs", seed=0)(torch.zeros(1, 3, 7, 6))


def test_initial_weights_are_the_originals():
    encoder = create_encoder("resnet18_vvs", seed=0)
    for layer, fan_in in (
        (encoder.backbone.blocks[5].convs[1], 256 * 9),
        (encoder.backbone.blocks[6].project, 256),
        (encoder.head, 512),
    ):
        scale = (2.6 / fan_in) ** 0.5
        assert 1.9 * scale < layer.weight.abs().max().item() <= 2 * scale
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
        assert not layer.bias.any()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, round(m.momentum, 6)) for m in norms} == {(1e-5, 0.003)}
