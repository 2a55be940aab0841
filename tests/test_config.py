import pytest

from localagg.config import (
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    ViewConfig,
    flag,
    from_dict,
    option_names,
    option_value,
    override,
    to_dict,
)
from localagg.errors import UserError, suggest

WRONG = [
    (PretrainConfig, {"epochs": -1}, "--epochs is -1; it must be at least 1"),
    (PretrainConfig, {"ir_epochs": -1}, "--ir-epochs"),
    (PretrainConfig, {"batch_size": 0}, "--batch-size"),
    (PretrainConfig, {"learning_rate": 0.0}, "--learning-rate"),
    (PretrainConfig, {"learning_rate": float("nan")}, "--learning-rate"),
    (PretrainConfig, {"momentum": 1.0}, "--momentum"),
    (PretrainConfig, {"drops": (-1.0,)}, "--drops"),
    (PretrainConfig, {"seed": -1}, "--seed"),
    (EncoderConfig, {"dim": 0}, "--dim"),
    (EncoderConfig, {"blocks": ()}, "--blocks"),
    (EncoderConfig, {"blocks": (2, 0)}, "--blocks"),
    (ViewConfig, {"crop_area": (0.5, 0.2)}, "--crop-area is 0.5 0.2"),
    (ViewConfig, {"crop_aspect": (0.0, 1.0)}, "--crop-aspect"),
    (ViewConfig, {"gray": 1.5}, "--gray"),
    (ViewConfig, {"jitter": (0.4, 0.4, 0.4, 0.6)}, "--jitter"),
    (ViewConfig, {"eval_crop": 0.0}, "--eval-crop"),
    (ObjectiveConfig, {"temperature": 0.0}, "--temperature"),
    (ObjectiveConfig, {"clusters": ()}, "--clusters"),
    (ObjectiveConfig, {"clusters": (5, 0)}, "--clusters"),
    (ObjectiveConfig, {"neighbors": 0}, "--neighbors"),
    (ObjectiveConfig, {"bank_momentum": -0.1}, "--bank-momentum"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG)
def test_each_option_is_checked_and_named(kind, values, message):
    with pytest.raises(UserError) as caught:
        kind(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json():
    import json

    config = override(PretrainConfig(), clusters=(3, 4), flip=0.25, drops=(1.5,), width=16)
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_override_reaches_every_level_and_leaves_the_rest():
    config = override(PretrainConfig(epochs=7), temperature=0.2, model="resnet50")
    assert (config.epochs, config.objective.temperature, config.encoder.model) == (
        7, 0.2, "resnet50",
    )  # fmt: skip
    assert option_value(config, "temperature") == 0.2
    assert {"epochs", "temperature", "flip", "width"} <= set(option_names(config))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        override(PretrainConfig(), temprature=0.1)
    with pytest.raises(UserError, match="not an option of this version"):
        from_dict(PretrainConfig, {"epoch": 3})
    assert suggest("zzzz", ["digits"]) == ""
    assert flag("batch_size") == "--batch-size"


def test_option_names_are_unique():
    names = option_names(PretrainConfig())
    assert len(names) == len(set(names))
