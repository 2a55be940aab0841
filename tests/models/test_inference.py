"""A network's results are the same whether it runs on all images at once or part by part."""

import pytest
import torch

from localagg import create_encoder
from localagg.models.inference import CPU_BATCH, run_in_parts


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 47, 64, 70])
def test_parts_hold_every_image_once_and_none_is_small(count):
    seen = []

    def network(part):
        seen.append(len(part))
        return part * 2

    images = torch.arange(3.0 * count).view(count, 3)
    assert torch.equal(run_in_parts(network, images), images * 2)
    assert sum(seen) == count
    assert all(CPU_BATCH <= size < 2 * CPU_BATCH for size in seen) or len(seen) == 1


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_parts():
    encoder = create_encoder("resnet18_small", seed=0, width=8).eval()
    images = torch.rand(55, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run_in_parts(encoder, images), encoder(images), rtol=0, atol=1e-6)
