"""What ``compat="reference"`` brings back in training."""

import pytest

from localagg.config import override
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe
from localagg.training.learner import parameter_groups


def decayed(encoder, config):
    """Names of the parameters with weight decay."""
    groups = parameter_groups(encoder, config)
    found = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.parameters()))
    return {name for name, parameter in encoder.named_parameters() if id(parameter) in found}


def test_alexnets_batch_norm_decays_under_compat_alone():
    encoder = create_encoder("alexnet_bn")
    names = {name for name, _ in encoder.named_parameters()}
    norms = {name for name in names if ".norms." in name}
    assert len(norms) == 14  # gamma and beta of five convolutions and two dense layers
    for name in ("alexnet_IR", "alexnet_LA"):
        config = recipe(name).config
        assert decayed(encoder, config) == names
        assert decayed(encoder, override(config, compat=None)) == names - norms


@pytest.mark.parametrize("name", ["res18_LA", "res50_LA"])
def test_other_networks_have_no_such_slip(name):
    config = recipe(name).config
    encoder = create_encoder(config.encoder.model)
    due = decayed(encoder, config)
    assert decayed(encoder, override(config, compat="reference")) == due
    assert not any("norm" in parameter for parameter in due)
