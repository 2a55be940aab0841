"""Protocols: how a number was measured, as fields that are rendered into one line for people.

A protocol is a flat dict of JSON values; its "method" names the kind of measurement. Numbers are
comparable only if all fields are equal. A sentence stored by an earlier version is shown as it is.
"""

from dataclasses import replace
from typing import Any

from ...config import TransferConfig, ViewConfig, option_names, option_value

BANK, TRAINING_IMAGES = "the memory bank", "the training images"
HELD_OUT, LEAVE_ONE_OUT = "held-out images", "training images, leave one out"

# Options that every protocol of read-outs names, and those without effect on the numbers.
_ALWAYS = frozenset({"epochs", "ten_crop", "image_size", "augmentation", "crop", "eval_crop"})
_NO_EFFECT = frozenset(
    {
        *("layers", "seed", "precision", "device", "workers", "memory", "memory_gb", "cache"),
        *("cache_gb", "unreadable", "eval_every", "log_every", "checkpoint_seconds"),
    }
)


def knn_protocol(
    reference_set: str, views: ViewConfig, *, held_out: bool = True, temperature: float = 0.07
) -> dict[str, Any]:
    """Return the protocol of a weighted vote of nearest neighbors.

    Args:
        reference_set: the images searched: :data:`BANK`, :data:`TRAINING_IMAGES`, ...
        views: resolved; image_size, eval_crop and augmentation of the view.
        held_out: whether held-out images are the queries; else training images, leave one out.
        temperature: divides the similarities in the votes' weights (k = 1 does not depend on it).
    """
    return {
        "method": "knn",
        "queries": HELD_OUT if held_out else LEAVE_ONE_OUT,
        "reference_set": reference_set,
        "temperature": temperature,
        **view_fields(views),
    }


def view_fields(views: ViewConfig) -> dict[str, Any]:
    """Return the fields of the view that is measured."""
    return {name: getattr(views, name) for name in ("image_size", "eval_crop", "augmentation")}


def logistic_protocol(config: TransferConfig, *, ten_crop: bool) -> dict[str, Any]:
    """Return the protocol of a quick read-out. Chosen L2 strengths are results, not protocol."""
    fields = {"method": "quick logistic regression", "ten_crop": ten_crop}
    fields |= view_fields(config.views)
    return fields | ({"compat": config.compat} if config.compat else {})


def heads_protocol(config: TransferConfig) -> dict[str, Any]:
    """Return the protocol of heads that were trained elsewhere."""
    fields = {"method": "given linear heads", "ten_crop": config.ten_crop}
    fields |= view_fields(config.views)
    return fields | ({"compat": config.compat} if config.compat else {})


def linear_protocol(config: TransferConfig) -> dict[str, Any]:
    """Return the protocol of read-outs by SGD.

    Beside the options that are always named, it names those that deviate from the reference's
    read-outs of ResNets (``trans_res50_LA``).
    """
    usual = replace(TransferConfig(), batch_size=128, drops=default_drops(config.epochs))
    names = set(option_names(config)) - _NO_EFFECT
    if config.finetune:  # the network learns from all heads together
        names |= {"layers"}
    if config.drops is None:
        names -= {"drops"}
    if config.views.crop != "resized":
        names -= {"crop_area", "crop_aspect"}
    fields: dict[str, Any] = {"method": "linear heads, SGD"}
    for name in option_names(config):
        value = option_value(config, name)
        if name in _ALWAYS or (name in names and value != option_value(usual, name)):
            fields[name] = list(value) if isinstance(value, tuple) else value
    return fields


def is_fixed(views: ViewConfig) -> bool:
    """Return whether training views are the center crop, with nothing random about them."""
    return views.crop == "center" and not (views.flip or views.gray or any(views.jitter))


def default_drops(epochs: int) -> tuple[float, ...]:
    """Return the reference's drops of the learning rate: after 30 and 60 of 70 epochs."""
    return tuple(round(epochs * share / 7, 2) for share in (3, 6))


def describe_protocol(protocol: dict[str, Any] | str) -> str:
    """Return one line that names the fields; a sentence of an earlier version as it is.

    Options of read-outs that deviate from the reference name its value: "learning rate 1e-09 (not
    0.01)".
    """
    if isinstance(protocol, str):
        return protocol
    usual = replace(TransferConfig(), batch_size=128)
    words = []
    for name, value in protocol.items():
        if name == "method":
            continue
        other = default_drops(protocol["epochs"]) if name == "drops" else None
        if name in option_names(usual) and name not in _ALWAYS:
            other = other or option_value(usual, name)
        deviation = "" if other is None else f" (not {_format_value(other)})"
        words.append(f"{name.replace('_', ' ')} {_format_value(value)}{deviation}")
    return f"{protocol.get('method')}: {', '.join(words)}"


def _format_value(value: Any) -> str:
    if value is None:  # the batch size of fine-tuning on few labels
        return "by the number of images"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_format_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
