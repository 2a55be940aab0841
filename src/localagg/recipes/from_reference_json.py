"""Convert the reference's JSON configurations: ``exp_configs/la_final.json:res18_LA``."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ..config import PretrainConfig, TransferConfig, override, require_resolved
from ..errors import UserError, suggest
from .paper import (
    CROP_AND_FLIP,
    DEFAULTS,
    FULL,
    IMAGENET,
    NETWORKS,
    PLACES,
    PLACES_CLASSES,
    PRETRAINING,
    READOUTS,
)

# Keys of the reference's command line that are ignored here, and the reason.
_IGNORED = {
    **dict.fromkeys(("port", "host", "db_name", "col_name"), "there is no database"),
    **dict.fromkeys(("exp_id", "save_exp", "cache_dir"), "--out names the run"),
    **dict.fromkeys(("load_exp", "load_port", "resume"), "--start or --resume names a run"),
    **dict.fromkeys(("gpu", "gpu_offset"), "--device selects the device"),
    "image_dir": "--data names the images",
    "q_cap": "an epoch is a permutation",
    "test_batch_size": "all images are evaluated",
    **dict.fromkeys(
        ("fre_valid", "fre_filter", "fre_cache_filter", "fre_metric"),
        "--eval-every, --log-every and --checkpoint-seconds set the intervals",
    ),
}
_RATES = {"init_lr": "learning_rate", "weight_decay": "weight_decay"}
_RENAMED = {**_RATES, "instance_t": "temperature", "instance_m": "bank_momentum"}
_KEYS = {
    *_RENAMED, "model_type", "kmeans_k", "instance_k", "batch_size", "data_len", "lr_boundaries",
    "train_num_steps", "task", "load_step",
}  # fmt: skip
_READOUT_KEYS = ("get_all_layers", "train_crop", "ten_crop", "num_classes")
_CROPS = {
    "default": FULL,
    "resnet_crop_flip": replace(FULL, gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0)),
    "alexnet_crop_flip": CROP_AND_FLIP,
}

Config = TypeVar("Config", PretrainConfig, TransferConfig)


class ConvertedConfig(NamedTuple, Generic[Config]):
    """A converted configuration, and sentences about keys that were ignored or changed."""

    config: Config
    notes: list[str]


def read_json(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``FILE.json:NAME``, or a file with a single configuration.

    Lines that begin with ``//`` are comments, as in the reference.

    Returns:
        (name or "", {key: value}).

    Raises:
        UserError: no file or configuration of this name, or invalid JSON.
    """
    path, _, name = spec.partition(":")
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError("not-found", f"--config {spec}: cannot read '{path}': {reason}.") from None
    try:
        content = json.loads("\n".join(li for li in lines if not li.strip().startswith("//")))
    except (ValueError, RecursionError) as error:
        raise UserError("damaged", f"--config {spec}: '{path}' is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError("unsupported", f"--config {spec}: '{path}' is not a JSON object.")
    names = [key for key, value in content.items() if isinstance(value, dict)]
    if name in names:
        return name, content[name]
    if name:
        raise UserError(
            "not-found",
            f"--config {spec}: '{path}' has no configuration '{name}'; it has"
            f" {', '.join(names) or 'none'}.{suggest(name, names)}",
        )
    if names:
        raise UserError(
            "option-missing",
            f"--config {spec}: '{path}' has several configurations; name one, for example"
            f" {path}:{names[0]}.",
        )
    return "", content


def convert_pretrain_json(
    spec: str, base: PretrainConfig | None = None
) -> ConvertedConfig[PretrainConfig]:
    """Convert a pretraining configuration of the reference.

    Args:
        spec: ``FILE.json:NAME``.
        base: configuration for all other options. Default: our recipe of that name, or the
            reference's defaults.

    Raises:
        UserError: the file cannot be read, or has an invalid value.
    """
    name, values = read_json(spec)
    if any(key in values for key in _READOUT_KEYS):
        raise UserError(
            "option-invalid",
            f"--config {spec} configures read-outs; use localagg transfer RUN --config {spec}.",
        )
    with _convert_invalid_values(spec):
        return _pretrain(base or PRETRAINING.get(name, replace(DEFAULTS, epochs=200)), values)


def convert_readout_json(
    spec: str, base: TransferConfig | None = None
) -> ConvertedConfig[TransferConfig]:
    """Convert a read-out configuration; see :func:`convert_pretrain_json`."""
    name, values = read_json(spec)
    with _convert_invalid_values(spec):
        defaults = TransferConfig(views=FULL, batch_size=128)
        return _readout(base or READOUTS.get(name, defaults), values)


@contextmanager
def _convert_invalid_values(spec: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise UserError("option-invalid", f"--config {spec}: invalid value: {error}.") from None


def _readout(config: TransferConfig, values: dict[str, Any]) -> ConvertedConfig[TransferConfig]:
    unused = ("num_classes", "model_type", "load_step")
    notes = [_note(key) for key in values if key not in {*_KEYS, *_READOUT_KEYS}]
    notes += [f"{key} follows from RUN and --data." for key in unused if key in values]
    changes = _floats(values, _RATES)
    if values.get("get_all_layers"):
        changes["layers"] = tuple(str(values["get_all_layers"]).split(","))
    if "ten_crop" in values:
        changes["ten_crop"] = bool(values["ten_crop"])
    if "train_crop" in values:
        config = replace(config, views=_CROPS[values["train_crop"]])
    changes["batch_size"] = batch = int(values.get("batch_size", config.batch_size))
    # The reference's read-outs continue the step count of the weights that they load.
    images = PLACES if int(values.get("num_classes", 1000)) == PLACES_CLASSES else IMAGENET
    steps, begin = images // batch, int(values.get("load_step", 0))
    changes |= _drops(values, steps, begin)
    if "train_num_steps" in values:
        changes["epochs"] = max(1, round((int(values["train_num_steps"]) - begin) / steps))
    return ConvertedConfig(override(config, **changes), notes)


def _pretrain(config: PretrainConfig, values: dict[str, Any]) -> ConvertedConfig[PretrainConfig]:
    notes = [_note(key) for key in values if key not in _KEYS]
    images = int(values.get("data_len", IMAGENET))
    changes = {"sized_for": images, **_floats(values, _RENAMED)}
    if "model_type" in values:
        if values["model_type"] not in NETWORKS:
            raise ValueError(f"model_type {values['model_type']!r}")
        changes["model"] = NETWORKS[values["model_type"]]
    if "kmeans_k" in values:
        changes["clusters"] = tuple(int(k) for k in str(values["kmeans_k"]).split(","))
    if "instance_k" in values:
        changes["neighbors"] = changes["noise"] = int(values["instance_k"])

    changes["batch_size"] = batch = int(values.get("batch_size", config.batch_size))
    steps = images // batch
    if steps < 1:
        raise ValueError(f"data_len {images} is less than batch_size {batch}")
    changes |= _drops(values, steps)
    if "train_num_steps" in values:
        end = int(values["train_num_steps"])
        changes["epochs"] = math.ceil(end / steps)
        if end % steps:
            notes.append(
                f"train_num_steps {end:,} is not a multiple of the {steps:,} steps of an epoch;"
                f" the run has {changes['epochs']} epochs."
            )
    epochs = changes.get("epochs", config.epochs)
    if values.get("task") == "IR":
        changes |= {"ir_epochs": epochs, "ir_batch_size": None}
    elif "load_step" in values:
        ir_steps = images // (config.ir_batch_size or batch)
        changes["ir_epochs"] = round(int(values["load_step"]) / ir_steps)
        notes.append(f"load_step: the run begins with {changes['ir_epochs']} epochs of IR.")
    elif require_resolved(config.ir_epochs) > epochs:
        changes["ir_epochs"] = epochs
    return ConvertedConfig(override(config, **changes), notes)


def _floats(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: float(values[key]) for key, ours in names.items() if key in values}


def _drops(values: dict[str, Any], steps: int, begin: int = 0) -> dict[str, Any]:
    """Return the rate's boundaries in epochs of ``steps``, counted from step ``begin``."""
    if values.get("lr_boundaries") is None:
        return {}
    boundaries = str(values["lr_boundaries"]).split(",")
    return {"drops": tuple((int(step) - begin) / steps for step in boundaries)}


def _note(key: str) -> str:
    if key in _IGNORED:
        return f"{key} is ignored: {_IGNORED[key]}."
    return f"{key} is ignored: not an option of the reference.{suggest(key, _KEYS)}"
