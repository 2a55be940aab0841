"""Derive the options that a configuration leaves None from the number and size of the images.

The reference's K = 4096, 30,000 clusters and batch of 128 belong to 1,281,167 images of 224 pixels.
Trials on 1,400 digits and on 50,000 CIFAR-10 images gave the other ends of the rule; docs/method.md
gives the reason of each line. It is a starting point: every value can be set by hand.
"""

import math
from dataclasses import replace

from ..config import PretrainConfig, flag, option_names, option_value
from ..errors import UserError

_IMAGENET_SCALE = 1_000_000  # images, from which on the reference's own settings apply
_MIN_CLUSTERS = 2  # with one cluster all images are close neighbors, and LA's loss is zero
_HEAD_EPOCHS = 20
DROPS = (0.8, 0.935)
"""Parts of the epochs after which the rate drops: the reference's ResNet-18, 160 and 187 of 200."""
_SMALL_SIDE = 64  # pixels; up to here the network without a down-sampling stem


def resolve_defaults(config: PretrainConfig, size: int, side: int) -> PretrainConfig:
    """Return the configuration with every None derived from the images.

    Args:
        config: as the user set it.
        size: N, the number of images.
        side: typical shorter side of an image, in pixels.

    Raises:
        UserError: see :func:`check_against_images`.
    """
    large = size >= _IMAGENET_SCALE
    adapted = config.adapt.feature_views > 0  # a head on the features of a pretrained network
    network_epochs = config.adapt.network_epochs
    if network_epochs is None and adapted:
        network_epochs = 0 if config.adapt.train == "head" else 4
    small_images = side <= _SMALL_SIDE
    model = config.encoder.model or ("resnet18_small" if small_images else "resnet18")
    views = replace(
        config.views,
        image_size=config.views.image_size or (side if small_images else 224),
        eval_crop=config.views.eval_crop or (1.0 if small_images else 0.875),
    )

    batch = config.batch_size or _default_batch(size, adapted=adapted)
    steps = max(1, size // batch)
    # Digits need about 2,200 steps; the reference takes 200 epochs of ImageNet.
    epochs = config.epochs or (200 if large else max(50, math.ceil(2200 / steps)))
    if config.epochs is None and adapted:
        epochs = _HEAD_EPOCHS + (network_epochs or 0)
    ir_epochs = config.ir_epochs
    if ir_epochs is None and adapted:  # neighbors among pretrained features are pure early
        ir_epochs = round((epochs - (network_epochs or 0)) / 4)
    elif ir_epochs is None:  # LA too early spreads wrong neighbors
        ir_epochs = min(10, epochs) if large else round(0.4 * epochs)
    drops = config.drops
    if drops is None and config.rate_schedule == "drops":
        drops = tuple(round(part * epochs, 2) for part in DROPS)

    objective = scale_to_images(config, size).objective
    objective = replace(
        objective,
        neighbors=objective.neighbors or max(1, min(1024 if adapted else 4096, size // 2)),
        clusters=objective.clusters
        or (_default_clusters(size),) * (5 if adapted else 10 if large else 3),
    )
    resolved = replace(
        config,
        encoder=replace(config.encoder, model=model),
        views=views,
        objective=objective,
        adapt=replace(config.adapt, network_epochs=network_epochs),
        epochs=epochs,
        ir_epochs=ir_epochs,
        batch_size=batch,
        drops=drops,
        sized_for=size,
    )
    check_against_images(resolved, size)
    return resolved


def _default_batch(size: int, *, adapted: bool) -> int:
    """Return a batch size of at most 128, which is the reference's."""
    if adapted:  # a head learns as well in fewer, larger steps
        return min(size, 128, max(16, size // 16))
    # An epoch needs some forty steps.
    return min(size, 128, max(16, 2 ** int(math.log2(max(1, size / 40)))))


def _default_clusters(size: int) -> int:
    """Return a number of clusters of some 64 images each, and several for few images."""
    return max(min(_MIN_CLUSTERS, size), min(8, size // 4), size // 64)


def scale_to_images(config: PretrainConfig, size: int) -> PretrainConfig:
    """Return the configuration with K and clusters scaled to ``size`` images if made for others.

    Clusters are scaled with the number of images, so that a cluster holds as many images as before;
    K is limited to half of the images.
    """
    objective, made_for = config.objective, config.sized_for
    if made_for is None or made_for == size:
        return config
    if objective.clusters is not None:
        least = min(_MIN_CLUSTERS, max(objective.clusters), size)
        clusters = tuple(max(least, round(k * size / made_for)) for k in objective.clusters)
        objective = replace(objective, clusters=clusters)
    if objective.neighbors is not None:
        neighbors = min(objective.neighbors, max(1, size // 2))
        objective = replace(objective, neighbors=neighbors)
    return replace(config, objective=objective, sized_for=size)


def check_against_images(config: PretrainConfig, size: int) -> None:
    """Check a resolved configuration against the number of images.

    Raises:
        UserError: more neighbors, clusters or batch than images; more IR epochs than epochs; LA
            with a single cluster.
    """
    clusters = config.objective.clusters or (_MIN_CLUSTERS,)
    if config.ir_epochs != config.epochs and size > 1 and min(clusters) < _MIN_CLUSTERS:
        raise UserError(
            "option-invalid",
            f"--clusters {min(clusters)} makes all images close neighbors, so LA learns nothing;"
            f" use at least {_MIN_CLUSTERS}.",
        )
    network_epochs = config.adapt.network_epochs or 0
    if network_epochs and (config.adapt.train == "head" or not config.adapt.feature_views):
        raise UserError(
            "option-conflict",
            f"--network-epochs {network_epochs} needs --train all or last:N and --feature-views of"
            " at least 1; remove it, or use them.",
        )
    if network_epochs > (config.epochs or 0):
        raise UserError(
            "option-conflict",
            f"--network-epochs {network_epochs} exceeds --epochs {config.epochs}, which counts"
            " them; reduce --network-epochs.",
        )
    limits = {
        "batch_size": config.batch_size,
        "ir_batch_size": config.ir_batch_size,
        "neighbors": config.objective.neighbors,
        "clusters": max(clusters) if config.objective.clusters else 0,
    }
    for name, value in limits.items():
        if (value or 0) > size:
            raise UserError(
                "option-invalid",
                f"{flag(name)} {value:,} exceeds the {size:,} images; use at most {size:,}.",
            )
    if (config.ir_epochs or 0) > (config.epochs or 0):
        raise UserError(
            "option-conflict",
            f"--ir-epochs {config.ir_epochs} exceeds --epochs {config.epochs}, which counts IR and"
            " LA together; reduce --ir-epochs.",
        )


def explain_defaults(config: PretrainConfig, resolved: PretrainConfig, size: int) -> list[str]:
    """Return sentences about the options that :func:`resolve_defaults` derived or changed."""
    lines = []
    if derived := derived_options(config, resolved):
        listed = ", ".join(f"{name} {value}" for name, value in derived.items())
        lines.append(f"Derived from {size:,} images: {listed}.")
    if config.sized_for not in (None, size):
        changes = [
            f"; {name} {_format(before)} -> {_format(now)}"
            for name in ("neighbors", "clusters")
            for before, now in [(option_value(config, name), option_value(resolved, name))]
            if before not in (None, now)
        ]
        lines.append(
            f"The recipe was made for {config.sized_for:,} images, this run has {size:,}: epochs"
            f" are kept, steps change{''.join(changes)}."
        )
    return lines


def _format(value: object) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{len(value)} x {value[0]:,}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def derived_options(config: PretrainConfig, resolved: PretrainConfig) -> dict[str, object]:
    """Return the options that are None in ``config`` and set in ``resolved``."""
    values = {name: option_value(resolved, name) for name in option_names(config)}
    return {
        name: value
        for name, value in values.items()
        if name != "sized_for" and value is not None and option_value(config, name) is None
    }
