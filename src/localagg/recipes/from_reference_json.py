"""The reference's own JSON configurations as ours: ``exp_configs/la_final.json:res18_LA``."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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

# Keys of the reference's command line that mean nothing here, and why.
_IDLE = {
    **dict.fromkeys(("port", "host", "db_name", "col_name"), "there is no database"),
    **dict.fromkeys(("exp_id", "save_exp", "cache_dir"), "--out names the run"),
    **dict.fromkeys(("load_exp", "load_port", "resume"), "--start or --resume names a run"),
    **dict.fromkeys(("gpu", "gpu_offset"), "--device chooses"),
    "image_dir": "--data names the images",
    "q_cap": "an epoch is a permutation",
    "test_batch_size": "all images are measured",
    **dict.fromkeys(
        ("fre_valid", "fre_filter", "fre_cache_filter", "fre_metric"),
        "--eval-every, --log-every and --checkpoint-seconds choose",
    ),
}
_RENAMED = {
    "init_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "instance_t": "temperature",
    "instance_m": "bank_momentum",
}
_READOUT_KEYS = ("get_all_layers", "train_crop", "ten_crop", "num_classes")


class ConvertedConfig(NamedTuple):
    """A configuration of the reference, translated."""

    config: Any
    """A PretrainConfig, or a TransferConfig."""
    notes: list[str]
    """Sentences about keys that were left out or changed on the way."""


def read_json(spec: str) -> tuple[str, dict[str, Any]]:
    """The keys of ``FILE.json:NAME``, or of a file that holds one configuration.

    Lines that begin with ``//`` are comments, as in the reference.

    Returns:
        (name or "", {key: value}).

    Raises:
        UserError: no such file or name, or not JSON.
    """
    path, _, name = spec.partition(":")
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError("TODO", f"--config {spec}: '{path}' cannot be read: {reason}.") from None
    try:
        found = json.loads("\n".join(li for li in lines if not li.strip().startswith("//")))
    except (ValueError, RecursionError) as error:
        raise UserError("TODO", f"--config {spec}: '{path}' is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError("TODO", f"--config {spec}: '{path}' does not hold named values.")
    sections = [key for key, value in found.items() if isinstance(value, dict)]
    if name:
        if name not in sections:
            raise UserError(
                "TODO",
                f"--config {spec}: '{path}' has no configuration '{name}'; it has"
                f" {', '.join(sections) or 'none'}.{suggest(name, sections)}",
            )
        return name, found[name]
    if sections:
        raise UserError(
            "TODO",
            f"--config {spec}: name one of its configurations, {path}:{sections[0]} for example.",
        )
    return "", found


def convert_pretrain_json(spec: str, base: PretrainConfig | None = None) -> ConvertedConfig:
    """A configuration of the reference laid over one of ours.

    Args:
        spec: ``FILE.json:NAME``.
        base: what its keys are laid over. None: our recipe of that name, else the reference's
            defaults.

    Raises:
        UserError: not such a file, or values that it could not have.
    """
    name, values = read_json(spec)
    if any(key in values for key in _READOUT_KEYS):
        raise UserError(
            "TODO",
            f"--config {spec} describes read-outs; use localagg transfer RUN --config {spec}.",
        )
    config = base or PRETRAINING.get(name, replace(DEFAULTS, epochs=200))
    try:
        return _overlay(config, values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            "TODO", f"--config {spec}: a value cannot be what it is: {error}."
        ) from None


_CROPS = {
    "default": FULL,
    "resnet_crop_flip": replace(FULL, gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0)),
    "alexnet_crop_flip": CROP_AND_FLIP,
}


def convert_readout_json(spec: str, base: TransferConfig | None = None) -> ConvertedConfig:
    """Likewise for read-outs: ``exp_configs/la_trans_final.json:trans_res18_LA``.

    Args:
        spec: ``FILE.json:NAME``.
        base: what its keys are laid over. None: our recipe of that name, else the defaults.

    Raises:
        UserError: not such a file, or values that it could not have.
    """
    name, values = read_json(spec)
    config = base or READOUTS.get(name, TransferConfig(views=FULL, batch_size=128))
    try:
        return _readout_overlay(config, values)
    except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise UserError(
            "TODO", f"--config {spec}: a value cannot be what it is: {error}."
        ) from None


def _readout_overlay(config: TransferConfig, values: dict[str, Any]) -> ConvertedConfig:
    unused = ("num_classes", "model_type", "load_step")
    notes = [_note(key) for key in values if key not in {*_KNOWN, *_READOUT_KEYS}]
    notes += [f"{key} follows from RUN and --data." for key in unused if key in values]
    changes: dict[str, Any] = {}
    for key, ours in (("init_lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if key in values:
            changes[ours] = float(values[key])
    if values.get("get_all_layers"):
        changes["layers"] = tuple(str(values["get_all_layers"]).split(","))
    if "ten_crop" in values:
        changes["ten_crop"] = bool(values["ten_crop"])
    if "train_crop" in values:
        config = replace(config, views=_CROPS[values["train_crop"]])
    batch = int(values.get("batch_size", config.batch_size))
    changes["batch_size"] = batch
    # The reference's read-outs count on from the step of the weights that they load.
    images = PLACES if int(values.get("num_classes", 1000)) == PLACES_CLASSES else IMAGENET
    steps, begin = images // batch, int(values.get("load_step", 0))
    if values.get("lr_boundaries") is not None:
        boundaries = str(values["lr_boundaries"]).split(",")
        changes["drops"] = tuple((int(step) - begin) / steps for step in boundaries)
    if "train_num_steps" in values:
        changes["epochs"] = max(1, round((int(values["train_num_steps"]) - begin) / steps))
    return ConvertedConfig(override(config, **changes), notes)


def _overlay(config: PretrainConfig, values: dict[str, Any]) -> ConvertedConfig:
    notes = [_note(key) for key in values if key not in _KNOWN]
    images = int(values.get("data_len", IMAGENET))
    changes: dict[str, Any] = {"sized_for": images}
    changes |= {ours: float(values[key]) for key, ours in _RENAMED.items() if key in values}
    if "model_type" in values:
        if values["model_type"] not in NETWORKS:
            raise ValueError(f"model_type {values['model_type']!r}")
        changes["model"] = NETWORKS[values["model_type"]]
    if "kmeans_k" in values:
        changes["clusters"] = tuple(int(k) for k in str(values["kmeans_k"]).split(","))
    if "instance_k" in values:
        changes["neighbors"] = changes["noise"] = int(values["instance_k"])

    batch = int(values.get("batch_size", config.batch_size))
    steps = images // batch
    if steps < 1:
        raise ValueError(f"data_len {images} is less than batch_size {batch}")
    changes["batch_size"] = batch
    if values.get("lr_boundaries") is not None:
        boundaries = str(values["lr_boundaries"]).split(",")
        changes["drops"] = tuple(int(step) / steps for step in boundaries)
    if "train_num_steps" in values:
        wanted = int(values["train_num_steps"])
        changes["epochs"] = math.ceil(wanted / steps)
        if wanted % steps:
            notes.append(
                f"train_num_steps {wanted:,} is no whole number of epochs of {steps:,} steps;"
                f" the run has {changes['epochs']}."
            )
    ir_steps = images // (config.ir_batch_size or batch)
    if values.get("task") == "IR":
        changes["ir_epochs"] = changes.get("epochs", config.epochs)
        changes["ir_batch_size"] = None
    elif "load_step" in values:
        changes["ir_epochs"] = round(int(values["load_step"]) / ir_steps)
        notes.append(f"load_step: IR runs first, for {changes['ir_epochs']} epochs.")
    elif require_resolved(config.ir_epochs) > changes.get("epochs", config.epochs):
        changes["ir_epochs"] = changes.get("epochs", config.epochs)
    return ConvertedConfig(override(config, **changes), notes)


_KNOWN = {
    *_RENAMED, "model_type", "kmeans_k", "instance_k", "batch_size", "data_len", "lr_boundaries",
    "train_num_steps", "task", "load_step",
}  # fmt: skip


def _note(key: str) -> str:
    if key in _IDLE:
        return f"{key} means nothing here: {_IDLE[key]}."
    return f"{key} is not an option of the reference; it was left out.{suggest(key, _KNOWN)}"
