"""What the commands note in a run's results.json: each number with its protocol and its images."""

from pathlib import Path
from typing import Any

from .checkpoint import load_encoder, load_views, weights_digest
from .config import PretrainConfig, ViewConfig
from .data.loader import typical_side
from .data.sources import Source, open_evaluation, open_images
from .results import append_result, dataset_name, knn_protocol
from .sizing import resolve


def note_neighbors(run: Path, result: dict[str, Any]) -> None:
    """What ``evaluate.measure_run`` found: the vote, and retrieval and clusters where asked for."""
    facts, views, held_out = _facts(run, result["data"])
    against = result["against"]
    how = knn_protocol(against, views, held_out=held_out)
    append_result(run, {**facts, "measure": "knn", "protocol": how, "values": result["accuracy"]})
    crop = how.rsplit("; ", 1)[1]
    if "retrieval" in result:
        scores = {k: v for k, v in result["retrieval"].items() if isinstance(v, float)}
        how = f"{how.split(';')[0]}; mAP over the full ranking; {crop}"
        append_result(run, {**facts, "measure": "retrieval", "protocol": how, "values": scores})
    if "clusters" in result:
        found = result["clusters"]
        values = {name: found[name]["mean"] for name in ("nmi", "ari", "accuracy")}
        how = (
            f"k-means of {against} into {found['clusters']:,} clusters, the best of ten starts,"
            f" mean of {found['seeds']} seeds; {crop}"
        )
        append_result(run, {**facts, "measure": "clusters", "protocol": how, "values": values})


def note_readouts(run: Path, result: dict[str, Any]) -> None:
    """What ``transfer`` or ``quick_readout`` found."""
    values = {
        f"{layer} {k}": v for layer, found in result["layers"].items() for k, v in found.items()
    }
    facts, _, _ = _facts(run, result["data"])
    entry = {"measure": "linear", "protocol": result["protocol"], "values": values}
    append_result(run, {**facts, **entry})


def note_few_labels(run: Path, result: dict[str, Any]) -> None:
    """What ``few_labels`` found: the means over its seeds."""
    facts, _, _ = _facts(run, result["data"])
    for way, how in result["protocol"].items():
        values = {
            f"{subset_name(subset)} {layer} {name}": spread["mean"]
            for subset in result["subsets"]
            for layer, found in subset.get(way, {}).items()
            for name, spread in found.items()
        }
        if values:
            seeds = f"; mean of {len(result['seeds'])} draws of the labelled images"
            entry = {"measure": "few labels", "protocol": how + seeds, "values": values}
            append_result(run, {**facts, **entry})


def subset_name(subset: dict[str, Any]) -> str:
    """``1%`` or ``5 a class``."""
    return f"{subset['few']:.3g}" if "few" in subset else f"{subset['per_class']} a class"


def _facts(run: Path, data: str) -> tuple[dict[str, Any], ViewConfig, bool]:
    """What is the same of every entry, how images are shown, and whether held-out images ask."""
    source, held_out = open_images(data), open_evaluation(data)
    asking: Source = source if held_out is None else held_out
    config = PretrainConfig(views=load_views(run) or ViewConfig())
    facts: dict[str, Any] = {
        "data": data,
        "fingerprint": asking.fingerprint(),
        "images": len(asking),
        "weights_digest": weights_digest(load_encoder(run)),
    }
    known = dataset_name(len(source), len(asking), len(source.classes or ()))
    if known is not None and held_out is not None:
        facts["dataset"] = known
    views = resolve(config, len(source), typical_side(source)).views
    return facts, views, held_out is not None
