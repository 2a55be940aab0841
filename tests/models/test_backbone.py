"""The reference's pooling, flattening and initial weights against naive arithmetic and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm
from tf_networks import pool_same, same_pads

from localagg.models import create_encoder
from localagg.models.backbone import MaxPoolSame, average_pool_same, truncated_normal_


@pytest.mark.parametrize("height", range(2, 10))
@pytest.mark.parametrize("width", [5, 8])
def test_pooling_pads_as_tensorflows_same(height, width):
    map_ = torch.randn(2, 3, height, width, dtype=torch.float64) - 2  # a padding of 0 would win
    nhwc = map_.permute(0, 2, 3, 1).numpy()
    found = MaxPoolSame()(map_).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, pool_same(nhwc, 3, 2, np.max))
    for window in (2, 4):
        found = average_pool_same(map_, window).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(
            found, pool_same(nhwc, window, window, np.mean), rtol=1e-12, atol=1e-15
        )
    assert same_pads(112, 3, 2) == (0, 1)
    assert same_pads(14, 4, 4) == (1, 1)


def test_large_maps_are_pooled_and_flattened_as_in_the_reference():
    flatten_map = create_encoder("resnet18_small", width=8).backbone.flatten_map
    large = torch.randn(1, 64, 64, 64)  # 262,144 values
    expected = torch.nn.functional.avg_pool2d(large, 2).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(flatten_map(large, None), expected)
    assert flatten_map(torch.randn(1, 256, 64, 64), None).shape == (1, 256 * 16 * 16)
    assert flatten_map(torch.randn(1, 2, 400, 1000), None).shape == (1, 2 * 200 * 500)  # 800,000
    small = torch.randn(1, 5, 200, 200)  # 200,000
    assert torch.equal(flatten_map(small, None), small.flatten(1))


def test_truncated_normal_is_scipys():
    weight = torch.empty(40, 50, 10)
    torch.manual_seed(0)
    truncated_normal_(weight, 0.5)
    assert kstest(weight.flatten().numpy() / 0.5, truncnorm(-2, 2).cdf).pvalue > 0.01
