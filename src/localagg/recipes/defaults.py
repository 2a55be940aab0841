"""The rule that fits a configuration to the images: what was left None is derived here.

The reference's K = 4096, 30,000 clusters and batch of 128 belong to 1,281,167 images of 224 pixels.
Trials on 1,400 digits and on 50,000 CIFAR-10 images gave the other ends of the rule; docs/method.md
gives the reason of each line. It is a starting point: every value can be set by hand.
"""

import math
from dataclasses import replace

from ..config import PretrainConfig, flag, to_dict
from ..errors import UserError

_IMAGENET_SCALE = 1_000_000  # from here on the reference's own settings
_FEWEST = 2  # clusters: where all images share one, all are close and the loss is zero
_SMALL_SIDE = 64  # pixels; up to here the network without a down-sampling stem


def resolve_defaults(config: PretrainConfig, size: int, side: int) -> PretrainConfig:
    """The configuration with every None derived from the images.

    Args:
        config: as the user set it.
        size: N, the number of images.
        side: typical shorter side of an image, in pixels.

    Returns:
        A configuration without None, checked against N.

    Raises:
        UserError: more neighbors, clusters or batch than images.
    """
    large = size >= _IMAGENET_SCALE
    small_images = side <= _SMALL_SIDE

    encoder, views = config.encoder, config.views
    encoder = replace(
        encoder, model=encoder.model or ("resnet18_small" if small_images else "resnet18")
    )
    views = replace(
        views,
        image_size=views.image_size or (side if small_images else 224),
        eval_crop=views.eval_crop or (1.0 if small_images else 0.875),
    )

    # A step must see few enough images that an epoch has some forty steps; 128 is the reference's.
    batch = config.batch_size or _between(16, 2 ** int(math.log2(max(1, size / 40))), 128)
    batch = batch if config.batch_size else min(batch, size)
    steps = max(1, size // batch)
    # Digits need about 2,200 steps; the reference takes 200 epochs of ImageNet.
    epochs = config.epochs or (200 if large else max(50, math.ceil(2200 / steps)))
    # LA too early spreads wrong neighbors: two fifths of the epochs on small data.
    ir_epochs = config.ir_epochs
    if ir_epochs is None:
        ir_epochs = min(10, epochs) if large else round(0.4 * epochs)
    drops = config.drops
    if (
        drops is None and config.rate_schedule == "drops"
    ):  # where the reference's ResNet-18 has them: 160 and 187 of 200
        drops = (round(0.8 * epochs, 2), round(0.935 * epochs, 2))

    objective = scale_to_images(config, size).objective
    objective = replace(
        objective,
        neighbors=objective.neighbors or max(1, min(4096, size // 2)),
        clusters=objective.clusters or (_clusters(size),) * (10 if large else 3),
    )
    resolved = replace(
        config,
        encoder=encoder,
        views=views,
        objective=objective,
        epochs=epochs,
        ir_epochs=ir_epochs,
        batch_size=batch,
        drops=drops,
        sized_for=size,
    )
    check(resolved, size)
    return resolved


def _clusters(size: int) -> int:
    """Some 64 images a cluster; few images still need several, as one alone says nothing."""
    return max(min(_FEWEST, size), min(8, size // 4), size // 64)


def scale_to_images(config: PretrainConfig, size: int) -> PretrainConfig:
    """The configuration with K and clusters fitted to ``size`` images, if it was made for others.

    Clusters go with the number of images, so that a cluster holds as many of them; K stays where
    it is at most half of the images.
    """
    objective, made_for = config.objective, config.sized_for
    if made_for is None or made_for == size:
        return config
    if objective.clusters is not None:
        least = min(_FEWEST, max(objective.clusters), size)
        clusters = tuple(max(least, round(k * size / made_for)) for k in objective.clusters)
        objective = replace(objective, clusters=clusters)
    if objective.neighbors is not None:
        neighbors = min(objective.neighbors, max(1, size // 2))
        objective = replace(objective, neighbors=neighbors)
    return replace(config, objective=objective, sized_for=size)


def check(config: PretrainConfig, size: int) -> None:
    """Refuse settings that ``size`` images cannot have.

    Raises:
        UserError: more neighbors, clusters or batch than images; more IR epochs than epochs; one
            cluster of all.
    """
    objective = config.objective
    aggregates = config.ir_epochs != config.epochs
    if aggregates and size > 1 and min(objective.clusters or (_FEWEST,)) < _FEWEST:
        raise UserError(
            "TODO",
            "--clusters 1 makes all images close neighbors, of which LA learns nothing; name at"
            f" least {_FEWEST}.",
        )
    limits = {
        "batch_size": config.batch_size,
        "ir_batch_size": config.ir_batch_size,
        "neighbors": objective.neighbors,
        "clusters": max(objective.clusters or (1,)),
    }
    for name, value in limits.items():
        if (value or 0) > size:
            raise UserError(
                "TODO",
                f"{flag(name)} {value:,} is more than the {size:,} images; set it to at most"
                f" {size:,}.",
            )
    if (config.ir_epochs or 0) > (config.epochs or 0):
        raise UserError(
            "TODO",
            f"--ir-epochs {config.ir_epochs} is more than --epochs {config.epochs}, which counts IR"
            " and LA together.",
        )


def explain_defaults(config: PretrainConfig, resolved: PretrainConfig, size: int) -> list[str]:
    """Sentences that tell what :func:`resolve_defaults` chose or changed."""
    lines = []
    if chosen := derived_options(config, resolved):
        listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
        lines.append(f"Derived from {size:,} images: {listed}.")
    if config.sized_for not in (None, size):
        now, before = resolved.objective, config.objective
        changed = [
            f"{name} {_shown(getattr(before, name))} -> {_shown(getattr(now, name))}"
            for name in ("neighbors", "clusters")
            if getattr(before, name) not in (None, getattr(now, name))
        ]
        lines.append(
            f"Made for {config.sized_for:,} images; for {size:,} of them the epochs stay as they"
            f" are, so the steps change{''.join(f', and {change}' for change in changed)}."
        )
    return lines


def _shown(value: object) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{len(value)} x {value[0]:,}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def derived_options(config: PretrainConfig, resolved: PretrainConfig) -> dict[str, object]:
    """The options that :func:`resolve_defaults` chose, by name."""

    def differences(before: dict, after: dict) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in after.items():
            if isinstance(value, dict):
                found |= differences(before[name], value)
            elif before[name] is None and value is not None and name != "sized_for":
                found[name] = value
        return found

    return differences(to_dict(config), to_dict(resolved))


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))
