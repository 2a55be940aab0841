import pytest
from expect import user_error
from hypothesis import given
from hypothesis import strategies as st

from localagg.config import PretrainConfig, override
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import derived_options, explain_defaults, resolve_defaults


@given(st.integers(1, 3_000_000), st.integers(8, 500))
def test_the_rule_fits_every_size(size, side):
    config = resolve_defaults(PretrainConfig(), size, side)
    objective = config.objective
    assert 1 <= config.batch_size <= min(size, 128)
    assert 1 <= objective.neighbors <= min(size, 4096)
    assert all(min(2, size) <= k <= size for k in objective.clusters)
    assert 0 <= config.ir_epochs <= config.epochs
    assert config.epochs * (size // config.batch_size) >= 2200
    assert all(0 < drop < config.epochs for drop in config.drops)
    assert resolve_defaults(config, size, side) == config


def test_imagenet_gets_the_references_settings():
    config = resolve_defaults(PretrainConfig(), 1_281_167, 400)
    assert (config.batch_size, config.epochs, config.ir_epochs) == (128, 200, 10)
    assert config.objective.neighbors == 4096
    assert len(config.objective.clusters) == 10
    assert (config.encoder.model, config.views.image_size) == ("resnet18", 224)
    assert config.views.eval_crop == 0.875


def test_small_images_keep_their_size():
    config = resolve_defaults(PretrainConfig(), 50_000, 32)
    assert (config.encoder.model, config.views.image_size) == ("resnet18_small", 32)
    assert config.views.eval_crop == 1.0


def test_options_set_by_hand_stay_and_only_the_rest_is_derived():
    config = override(PretrainConfig(), epochs=9, neighbors=5, image_size=20)
    resolved = resolve_defaults(config, 1000, 32)
    assert (resolved.epochs, resolved.objective.neighbors, resolved.views.image_size) == (9, 5, 20)
    derived = derived_options(config, resolved)
    assert not {"epochs", "neighbors", "image_size", "temperature"} & set(derived)
    assert {"batch_size", "clusters", "ir_epochs", "model"} <= set(derived)


@pytest.mark.parametrize(
    ("size", "clusters"), [(2, 2), (8, 2), (20, 5), (110, 8), (512, 8), (640, 10), (50_000, 781)]
)
def test_few_images_have_several_clusters(size, clusters):
    assert resolve_defaults(PretrainConfig(), size, 32).objective.clusters == (clusters,) * 3
    made = override(PretrainConfig(), clusters=(30_000,) * 3, sized_for=1_281_167)
    assert (
        resolve_defaults(made, size, 32).objective.clusters == (max(2, round(size * 0.023416)),) * 3
    )


def test_one_cluster_is_valid_without_la():
    alone = override(PretrainConfig(), clusters=(1,), epochs=5, ir_epochs=5)
    assert resolve_defaults(alone, 100, 32).objective.clusters == (1,)


def test_a_cosine_has_no_drops():
    config = override(PretrainConfig(), rate_schedule="cosine")
    assert "drops" not in derived_options(config, resolve_defaults(config, 1000, 32))


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"neighbors": 101}, "option-invalid", ["--neighbors 101", "100 images"]),
        ({"clusters": (5, 101)}, "option-invalid", ["--clusters 101", "100 images"]),
        ({"batch_size": 101}, "option-invalid", ["--batch-size 101", "100 images"]),
        ({"epochs": 3, "ir_epochs": 4}, "option-conflict", ["--ir-epochs 4", "--epochs 3"]),
        ({"clusters": (9, 1)}, "option-invalid", ["--clusters 1"]),
    ],
)
def test_values_that_do_not_fit_the_images_raise(options, code, values):
    with user_error(code, *values):
        resolve_defaults(override(PretrainConfig(), **options), 100, 32)


def test_a_recipe_made_for_other_images_is_scaled_with_a_note():
    config = recipe("res18_LA").config
    same = resolve_defaults(config, 1_281_167, 400)
    assert same.objective.clusters == (30_000,) * 10
    (note,) = explain_defaults(config, same, 1_281_167)
    assert "eval_crop 0.875" in note
    small = resolve_defaults(config, 5_000, 400)
    assert small.objective.clusters == (117,) * 10  # 43 images a cluster, as with 1,281,167
    assert small.objective.neighbors == 2_500
    assert (small.epochs, small.ir_epochs, small.drops) == (same.epochs, 10, same.drops)
    note = explain_defaults(config, small, 5_000)[-1]
    for value in ("1,281,167", "5,000", "4,096 -> 2,500", "10 x 30,000 -> 10 x 117"):
        assert value in note
    assert resolve_defaults(small, 5_000, 400) == small


def test_options_set_by_hand_are_not_scaled():
    config = override(recipe("res18_LA").config, sized_for=None, clusters=(9,), neighbors=7)
    assert resolve_defaults(config, 5_000, 400).objective.clusters == (9,)


@pytest.mark.parametrize(
    ("size", "batch"), [(10, 10), (200, 16), (1000, 62), (3068, 128), (100_000, 128)]
)
def test_a_head_on_frozen_features_learns_in_large_batches(size, batch):
    assert resolve_defaults(recipe("adapt").config, size, 112).batch_size == batch
