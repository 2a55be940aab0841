"""Forecast a run: its full configuration, its steps and the memory that it needs."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PretrainConfig, require_resolved, to_dict
from ..data.images.samples import with_measured_range
from ..data.loading.scan import typical_side
from ..data.sources.open import open_images
from ..engine.search import estimate_search_bytes
from ..engine.searchable_bank import SearchableBank
from ..models import load_weights
from ..recipes.derived_settings import explain_defaults, resolve_defaults
from ..recipes.schedule import Schedule, check_aggregates
from .budget import fit_budget
from .continue_run import settings_of_start
from .learner import make_encoder
from .run_setup import check_start_weights


def forecast(
    config: PretrainConfig,
    data: str | Path,
    typed: Iterable[str] = (),
    *,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Resolve a configuration for a data set and forecast the run, without training.

    Args:
        config: as for ``pretrain``.
        data: data URI, of which a few image headers are read.
        typed: as for ``pretrain``.
        start: a finished run, or an imported checkpoint, to continue, as for ``pretrain``.

    Returns:
        {"images", "notes": sentences on derived options and weights, "config", "steps": {"epoch",
        "ir", "la", "total", "drops", "images_seen"}, "memory": {part: bytes}, "checkpoint_bytes"}.
        Bank,
        labels, weights and checkpoint are exact; images, views, activations and the loss engine
        are estimates.

    Raises:
        UserError: the options do not fit the data.
    """
    check_start_weights(config, start)
    source = open_images(data)
    if start is not None:
        config = settings_of_start(config, Path(start), source, frozenset(typed))
    config = replace(config, views=with_measured_range(config.views, source))
    size, side = len(source), typical_side(source, config.views)
    config = fit_budget(config, source, typed)
    resolved = resolve_defaults(config, size, side)
    check_aggregates(resolved, size)
    schedule = Schedule(resolved, size)
    memory = _memory(resolved, size, side)
    notes = explain_defaults(config, resolved, size)
    if (weights := resolved.encoder.weights) is not None:
        encoder = make_encoder(resolved.encoder, resolved.seed)
        notes.append(load_weights(encoder, weights).describe(weights))
    return {
        "images": size,
        "notes": notes,
        "config": to_dict(resolved),
        "steps": {
            "epoch": schedule.la_steps,
            "ir": schedule.la_start,
            "la": schedule.total_steps - schedule.la_start,
            "total": schedule.total_steps,
            "drops": schedule.boundaries,
            "images_seen": schedule.images_seen,
        },
        "memory": memory,
        "checkpoint_bytes": memory["memory bank"]
        + memory["cluster labels"]
        + memory["weights, gradients and momentum"] * 2 // 3,
    }


def _memory(config: PretrainConfig, size: int, side: int) -> dict[str, int]:
    objective, batch = config.objective, require_resolved(config.batch_size)
    batch = max(batch, config.ir_batch_size or 0)
    parameters, activations = _network(config)
    number_bytes = 4 if config.precision == "32-true" else 2
    pixels = size * 3 * side * side
    held = config.memory == "always" or (
        config.memory == "auto" and pixels <= config.memory_gb * 2**30
    )
    view = require_resolved(config.views.image_size)
    neighbors = require_resolved(objective.neighbors)
    row = torch.empty(1, config.encoder.dim, dtype=getattr(torch, objective.bank_dtype))
    return {
        "memory bank": size * row.nbytes,
        "cluster labels": len(require_resolved(objective.clusters)) * size * 4,
        "weights, gradients and momentum": 3 * 4 * parameters,
        "activations (estimate)": batch * activations * number_bytes,
        "views (estimate)": 3 * batch * 3 * view * view * 4,
        "loss engine (estimate)": estimate_search_bytes(
            SearchableBank(row), size, batch, neighbors
        ),
        "images held decoded (estimate, if they share one size)": pixels if held else 0,
    }


def _network(config: PretrainConfig) -> tuple[int, int]:
    """(parameters, values of all layers' outputs for one image), without allocating them."""
    with torch.device("meta"):
        encoder = make_encoder(config.encoder, config.seed)
    outputs = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    view = require_resolved(config.views.image_size)
    encoder.eval()(torch.empty(1, 3, view, view, device="meta"))
    return sum(p.numel() for p in encoder.parameters()), outputs
