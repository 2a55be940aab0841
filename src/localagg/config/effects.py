"""Options that act only beside certain values of others, so that none is accepted and ignored."""

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import UserError
from .fields import flag, option_names, option_value

Values = Callable[[str], Any]

# Options, the reason why they have no effect, and whether they have none. A value of None is
# derived later, so that the options beside it may act.
_UNUSED: tuple[tuple[tuple[str, ...], str, Callable[[Values], bool]], ...] = (
    (
        ("width", "blocks", "stem_stride"),
        "on another --model than resnet18_small",
        lambda value: value("model") not in (None, "resnet18_small"),
    ),
    (
        ("crop_area", "crop_aspect"),
        "without --crop resized",
        lambda value: value("crop") != "resized",
    ),
    (
        ("compat",),
        "on another --model than alexnet_bn",
        lambda value: value("model") not in (None, "alexnet_bn"),
    ),
    (("memory_gb",), "without --memory auto", lambda value: value("memory") != "auto"),
    (("noise",), "without --instance-loss nce", lambda value: value("instance_loss") != "nce"),
    (
        ("instance_precision",),
        "with --instance-loss nce",
        lambda value: value("instance_loss") == "nce",
    ),
    (
        ("warm_iterations", "warm_tolerance"),
        "without --warm-clusters",
        lambda value: not value("warm_clusters"),
    ),
    (
        ("drops", "drop_steps"),
        "with --rate-schedule cosine",
        lambda value: value("rate_schedule") == "cosine",
    ),
    (("drops",), "with --drop-steps", lambda value: value("drop_steps") is not None),
    (
        ("ir_batch_size", "instance_precision"),
        "without epochs of IR",
        lambda value: value("ir_epochs") == 0,
    ),
    (
        (
            *("neighbors", "clusters", "instance_share", "kmeans", "kmeans_iterations"),
            *("warm_clusters", "warm_iterations", "warm_tolerance"),
        ),
        "without epochs of LA",
        lambda value: value("ir_epochs") is not None and value("ir_epochs") == value("epochs"),
    ),
    (
        ("cache", "cache_gb"),
        "without --feature-views",
        lambda value: value("feature_views") == 0,
    ),
    (("network_rate",), "with --train head", lambda value: value("train") == "head"),
    (("cache", "cache_gb"), "with --finetune", lambda value: value("finetune")),
    (("cache",), "with --cache-gb 0", lambda value: value("cache_gb") == 0),
)


def check_effects(config: Any, typed: Iterable[str]) -> None:
    """Raise a UserError for the first of the options that has no effect beside the others.

    Args:
        config: a configuration with the options.
        typed: names of those that the user set.
    """
    known, typed = set(option_names(config)), set(typed)

    def value(name: str) -> Any:
        return option_value(config, name) if name in known else None

    for names, reason, unused in _UNUSED:
        for name in names:
            if name in typed and unused(value):
                raise UserError("option-conflict", f"{flag(name)} has no effect {reason}; omit it.")
