"""Named configurations: each can be run as it stands."""

import pytest
import torch
from expect import user_error

from localagg.config import override
from localagg.recipes.builtin import RECIPES, readout_recipe, recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.recipes.schedule import Schedule
from localagg.training.learner import make_encoder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_images_it_was_made_for(name):
    config = recipe(name).config
    size, side = (config.sized_for or 50_000), (config.views.image_size or 32)
    if name == "digits":
        size = 1400
    config = resolve_defaults(config, size, side)
    schedule = Schedule(config, size)
    assert 0 < schedule.la_start <= schedule.total_steps
    assert recipe(name).about
    assert recipe(name).cost


def test_photos_are_turned_upright_but_by_the_reference():
    turning = {name for name in RECIPES if recipe(name).config.views.exif_orientation}
    assert turning == {"folder", "adapt"}


def test_la_modern_has_the_options_of_the_published_tables():
    options = {"width": 16, "epochs": 38, "ir_epochs": 8, "drops": (35.0, 37.0)}
    options |= {"warm_clusters": True, "neighbors": 128, "instance_share": 0.5}
    assert recipe("la_modern").config == override(recipe("cifar10").config, **options)


def test_the_gpu_recipe_trains_the_network_of_the_published_figures():
    """ResNet-18 for 32 pixels: 11.2 million weights and the head, a map of 4 x 4 at the end."""
    encoder = make_encoder(recipe("cifar10_gpu").config.encoder, seed=0)
    weights = sum(p.numel() for p in encoder.parameters())
    assert weights == pytest.approx(11.17e6 + 512 * 128 + 128, rel=1e-3)
    assert encoder.features(torch.zeros(1, 3, 32, 32), [4])["4"].shape == (1, 512 * 4 * 4)


def test_an_unknown_name_raises_with_the_closest_one():
    for find, name, closest in (
        (recipe, "cifar01", "'cifar10'"),
        (readout_recipe, "trans_res81_LA", "'trans_res18_LA'"),
    ):
        with user_error("option-unknown", name, closest):
            find(name)
    with user_error("option-invalid", "localagg transfer RUN"):
        recipe("trans_res18_LA")
