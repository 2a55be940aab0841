import json

import pytest
from expect import user_error

from localagg.config import (
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    TransferConfig,
    ViewConfig,
    flag,
    from_dict,
    option_names,
    option_value,
    override,
    require_resolved,
    to_dict,
)
from localagg.config.fields import REMOVED, removed_options

INVALID = [
    (PretrainConfig, {"epochs": "three"}),
    (PretrainConfig, {"learning_rate": "high"}),
    (ViewConfig, {"flip": "often"}),
    (ObjectiveConfig, {"clusters": ("many",)}),
    (PretrainConfig, {"epochs": -1}),
    (PretrainConfig, {"ir_epochs": -1}),
    (PretrainConfig, {"batch_size": 0}),
    (PretrainConfig, {"learning_rate": 0.0}),
    (PretrainConfig, {"learning_rate": float("nan")}),
    (PretrainConfig, {"momentum": 1.0}),
    (PretrainConfig, {"drops": (2.0, -1.0)}),
    (PretrainConfig, {"drop_steps": (-1,)}),
    (PretrainConfig, {"seed": -1}),
    (PretrainConfig, {"device": "gpu"}),
    (TransferConfig, {"layers": ()}),
    (TransferConfig, {"layers": ("1", "1")}),
    (TransferConfig, {"momentum": -0.1}),
    (TransferConfig, {"precision": "64-true"}),
    (EncoderConfig, {"dim": 0}),
    (EncoderConfig, {"width": 4}),
    (EncoderConfig, {"blocks": ()}),
    (EncoderConfig, {"blocks": (2, 0)}),
    (ViewConfig, {"augmentation": "ours"}),
    (ViewConfig, {"crop_area": (0.5, 0.2)}),
    (ViewConfig, {"crop_aspect": (0.0, 1.0)}),
    (ViewConfig, {"crop_aspect": (1.0, float("inf"))}),
    (ViewConfig, {"gray": 1.5}),
    (ViewConfig, {"jitter": (0.4, 0.4, 0.4, 0.6)}),
    (ViewConfig, {"jitter": (1.1, 0.4, 0.4, 0.1)}),
    (ViewConfig, {"eval_crop": 0.0}),
    (ObjectiveConfig, {"temperature": 0.0}),
    (ObjectiveConfig, {"clusters": ()}),
    (ObjectiveConfig, {"clusters": (5, 0)}),
    (ObjectiveConfig, {"neighbors": 0}),
    (ObjectiveConfig, {"bank_momentum": -0.1}),
    (ObjectiveConfig, {"kmeans": "elkan"}),
]


@pytest.mark.parametrize(("kind", "values"), INVALID)
def test_an_invalid_value_is_named_with_its_option(kind, values):
    ((name, value),) = values.items()
    parts = value if isinstance(value, tuple) else (value,)
    with user_error("option-invalid", flag(name), *parts) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json():
    config = override(PretrainConfig(), clusters=(3, 4), flip=0.25, drops=(1.5,), width=16)
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_removed_options_of_stored_runs_are_skipped_and_reported_if_changed():
    stored = {"views": {"nvjpeg": True}, "objective": {"recluster_delay": 0}}
    assert from_dict(PretrainConfig, stored) == PretrainConfig()
    assert removed_options(stored) == {"nvjpeg": True}
    assert removed_options(REMOVED) == {}


def test_override_replaces_options_of_every_level_and_keeps_the_rest():
    config = override(PretrainConfig(epochs=7), temperature=0.2, model="resnet50")
    assert (config.epochs, option_value(config, "temperature")) == (7, 0.2)
    assert to_dict(config) == {
        **to_dict(PretrainConfig(epochs=7)),
        "objective": to_dict(ObjectiveConfig(temperature=0.2)),
        "encoder": to_dict(EncoderConfig(model="resnet50")),
    }


def test_unknown_names_suggest_the_nearest():
    with user_error("option-unknown", "'temprature'", "Did you mean 'temperature'"):
        override(PretrainConfig(), temprature=0.1)
    with user_error("option-unknown", "'epoch'", "Did you mean 'epochs'"):
        from_dict(PretrainConfig, {"epoch": 3})


@pytest.mark.parametrize("config", [PretrainConfig(), TransferConfig()])
def test_option_names_are_unique(config):
    names = option_names(config)
    assert len(names) == len(set(names))
    assert {"epochs", "flip", "seed"} <= set(names)


def test_an_unresolved_option_is_a_fault_of_the_program():
    assert require_resolved(3) == 3
    with pytest.raises(ValueError, match="resolve"):
        require_resolved(None)
