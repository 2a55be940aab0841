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
from .paper import CROP_AND_FLIP, DEFAULTS, FULL, IR_BATCH, PLACES, PLACES_CLASSES
from .reference_keys import (
    FURTHER_KEYS,
    IMAGENET,
    NETWORKS,
    PRETRAIN_KEYS,
    READOUT_KEYS,
    ReferenceKey,
)

_EPOCHS = 200  # of a configuration without an end
_READOUT_EPOCHS = 2000  # of ImageNet, at which the reference's read-outs end
_RATES = {"init_lr": "learning_rate", "weight_decay": "weight_decay"}
_RENAMED = {**_RATES, "instance_t": "temperature", "instance_m": "bank_momentum"}
_STILL = replace(FULL, gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0))
_CROPS = {
    "default": FULL,
    "resnet_crop_flip": _STILL,
    "alexnet_crop_flip": CROP_AND_FLIP,
    "validate_crop": replace(_STILL, crop="center", flip=0.0),
}
_LAST_LAYERS = {"resnet18": "9", "resnet50": "17"}  # read without get_all_layers

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
        base: configuration that the file's keys override. Default: a key that the file lacks has
            the reference's default, whatever the configuration's name.

    Raises:
        UserError: the file cannot be read, or has an invalid value.
    """
    _, values = read_json(spec)
    if any(key in values for key in READOUT_KEYS.keys() - PRETRAIN_KEYS.keys()):
        raise UserError(
            "option-invalid",
            f"--config {spec} configures read-outs; use localagg transfer RUN --config {spec}.",
        )
    with _convert_invalid_values(spec):
        notes = _check_keys(values, PRETRAIN_KEYS)
        if base is None:
            values = _with_defaults(values, PRETRAIN_KEYS)
        return _pretrain(base or replace(DEFAULTS, epochs=_EPOCHS), values, notes)


def convert_readout_json(
    spec: str, base: TransferConfig | None = None
) -> ConvertedConfig[TransferConfig]:
    """Convert a read-out configuration; see :func:`convert_pretrain_json`."""
    _, values = read_json(spec)
    with _convert_invalid_values(spec):
        notes = _check_keys(values, READOUT_KEYS)
        if base is None:
            values = _with_defaults(values, READOUT_KEYS)
        return _readout(base or TransferConfig(), values, notes)


@contextmanager
def _convert_invalid_values(spec: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError("option-invalid", f"--config {spec}: invalid value: {error}.") from None


def _with_defaults(values: dict[str, Any], keys: dict[str, ReferenceKey]) -> dict[str, Any]:
    return {key: of.default for key, of in keys.items()} | values


def _check_keys(values: dict[str, Any], keys: dict[str, ReferenceKey]) -> list[str]:
    """Return notes on keys without effect; raise ValueError for a value out of few choices."""
    known = {**FURTHER_KEYS, **keys}
    notes = []
    for key, value in values.items():
        if key not in known:
            notes.append(f"{key} is ignored: not an option of the reference.{suggest(key, known)}")
        elif known[key].ours.startswith("ignored"):
            notes.append(f"{key} is {known[key].ours}.")
        elif (choices := known[key].choices) and json.dumps(value).strip('"') not in choices:
            raise ValueError(f"{key} {value!r}; it is one of {', '.join(choices)}")
    return notes


def _readout(
    config: TransferConfig, values: dict[str, Any], notes: list[str]
) -> ConvertedConfig[TransferConfig]:
    changes = _floats(values, _RATES)
    network = values.get("model_type")
    if network is not None:
        changes["compat"] = "reference" if network == "vggnet_fx" else None
    layers = values.get("get_all_layers")
    if "get_all_layers" in values and not layers:  # the embedding, or a layer that has no read-out
        layers = _LAST_LAYERS.get(network or "")
        if layers is None:
            raise ValueError(f"get_all_layers is missing; name the layers of {network}")
    if layers:
        changes["layers"] = tuple(str(layers).split(","))
    if "ten_crop" in values:
        changes["ten_crop"] = values["ten_crop"] in (True, "true")
    if "train_crop" in values:
        config = replace(config, views=_CROPS[values["train_crop"]])
    changes["batch_size"] = batch = int(values.get("batch_size", config.batch_size))
    # The reference's read-outs continue the step count of the weights that they load.
    images = PLACES if int(values.get("num_classes", 1000)) == PLACES_CLASSES else IMAGENET
    steps, begin = images // batch, int(values.get("load_step") or 0)
    changes |= _drops(values, steps, begin)
    end = values.get("train_num_steps")
    if end is None and "train_num_steps" in values:
        end = int(_READOUT_EPOCHS * IMAGENET / batch)
        notes.append(
            f"train_num_steps is missing: the reference's read-outs end at step {end:,}; set"
            " --epochs to end earlier."
        )
    if end is not None:
        if int(end) <= begin:
            raise ValueError(f"train_num_steps {end} is not above load_step {begin}")
        changes["epochs"] = max(1, round((int(end) - begin) / steps))
    return ConvertedConfig(override(config, **changes), notes)


def _pretrain(
    config: PretrainConfig, values: dict[str, Any], notes: list[str]
) -> ConvertedConfig[PretrainConfig]:
    images = int(values.get("data_len", IMAGENET))
    changes = {"sized_for": images, **_floats(values, _RENAMED)}
    if "model_type" in values:
        changes["model"] = NETWORKS[values["model_type"]]
        changes["compat"] = "reference" if values["model_type"] == "alexnet_bn_no_drop" else None
    if "kmeans_k" in values:
        changes["clusters"] = tuple(int(k) for k in str(values["kmeans_k"]).split(","))
    if "instance_k" in values:
        changes["neighbors"] = changes["noise"] = int(values["instance_k"])

    changes["batch_size"] = batch = int(values.get("batch_size", config.batch_size))
    steps = images // batch
    if steps < 1:
        raise ValueError(f"data_len {images} is less than batch_size {batch}")
    changes |= _drops(values, steps)
    end = values.get("train_num_steps")
    epochs = require_resolved(config.epochs) if end is None else math.ceil(int(end) / steps)
    changes["epochs"] = epochs
    if end is None and "train_num_steps" in values:
        notes.append(
            "train_num_steps is missing: the reference trains until it is stopped, this run ends"
            f" after {epochs} epochs; set --epochs."
        )
    elif end is not None and int(end) % steps:
        notes.append(
            f"train_num_steps {int(end):,} is not a multiple of the {steps:,} steps of an epoch;"
            f" the run has {epochs} epochs."
        )
    if values.get("task") == "IR":
        changes |= {"ir_epochs": epochs, "ir_batch_size": None}
    elif values.get("load_step"):
        changes |= _ir_before(int(values["load_step"]), images, batch)
        if end is not None and int(values["load_step"]) >= int(end):
            raise ValueError(f"load_step {values['load_step']} is not below train_num_steps {end}")
        notes.append(f"load_step: the run begins with {changes['ir_epochs']} epochs of IR.")
    elif "load_step" in values:
        changes |= {"ir_epochs": 0, "ir_batch_size": None}
        notes.append("load_step is missing: LA begins without IR; --start names a run of IR.")
    elif require_resolved(config.ir_epochs) > epochs:
        changes["ir_epochs"] = epochs
    return ConvertedConfig(override(config, **changes), notes)


def _ir_before(load_step: int, images: int, batch: int) -> dict[str, Any]:
    """Return the epochs of IR that LA loads, and its batch: the default one if it fits the step."""
    fitting = (size for size in (IR_BATCH, batch) if images >= size)
    size = next((size for size in fitting if load_step % (images // size) == 0), batch)
    return {"ir_epochs": round(load_step / (images // size)), "ir_batch_size": size}


def _floats(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: float(values[key]) for key, ours in names.items() if key in values}


def _drops(values: dict[str, Any], steps: int, begin: int = 0) -> dict[str, Any]:
    """Return the rate's boundaries in epochs of ``steps``, counted from step ``begin``."""
    if "lr_boundaries" not in values:
        return {}
    boundaries = str(values["lr_boundaries"] or "").split(",")
    return {"drops": tuple((int(step) - begin) / steps for step in boundaries if step)}
