"""Record the measurements of the commands in a run's results.json, with protocol and images."""

from pathlib import Path
from typing import Any

from ...checkpoint import load_views
from ...config import PretrainConfig, ViewConfig
from ...data.loading.scan import typical_side
from ...data.sources.open import Source, open_evaluation, open_images
from ...recipes.derived_settings import resolve_defaults
from .protocols import knn_protocol, view_fields
from .published import dataset_name
from .results_file import append_result, read_results


def record_knn(run: Path, result: dict[str, Any]) -> None:
    """Record a result of ``measure_run``: the vote, and retrieval and clusters where measured."""
    source, facts = _describe_images(result, held_out=result["held_out"])
    config = PretrainConfig(views=load_views(run) or ViewConfig())
    views = resolve_defaults(config, len(source), typical_side(source, config.views)).views
    reference_set = result["against"]
    facts |= {name: result[name] for name in ("asked", "known", "left_out", "capped")}
    protocol = knn_protocol(reference_set, views, held_out=result["held_out"])
    values = result["accuracy"]
    append_result(run, {**facts, "measure": "knn", "protocol": protocol, "values": values})
    if "retrieval" in result:
        values = {k: v for k, v in result["retrieval"].items() if isinstance(v, float)}
        protocol = {k: v for k, v in protocol.items() if k != "temperature"}
        protocol["method"] = "retrieval"
        entry = {**facts, "measure": "retrieval", "protocol": protocol, "values": values}
        append_result(run, entry)
    if "clusters" in result:
        found = result["clusters"]
        protocol = {
            "method": "k-means",
            "rows": reference_set,
            "clusters": found["clusters"],
            "starts": found["starts"],
            "seeds": found["seeds"],
            **view_fields(views),
        }
        values = {name: found[name]["mean"] for name in ("nmi", "ari", "accuracy")}
        # Training images are clustered, whichever images are the queries.
        _, facts = _describe_images(result, held_out=False)
        left_out = {"known": result["left_out"]["known"]}
        facts |= {"asked": found["images"], "left_out": left_out}
        append_result(run, {**facts, "measure": "clusters", "protocol": protocol, "values": values})


def record_readouts(run: Path, result: dict[str, Any]) -> None:
    """Record a result of ``transfer`` or ``quick_readout``."""
    _, facts = _describe_images(result)
    append_result(
        run, {**facts, "known": result["images"], **_measured(result), **_readout_entry(result)}
    )


def is_recorded(run: Path, result: dict[str, Any]) -> bool:
    """Return whether the run's results.json already holds these read-outs."""
    own = {**_readout_entry(result), **{name: result[name] for name in ("data", "weights_digest")}}
    return any(own == {name: entry.get(name) for name in own} for entry in read_results(run))


def record_low_shot(run: Path, result: dict[str, Any]) -> None:
    """Record a result of ``low_shot_accuracy``: means over seeds, and half 95 % intervals."""
    _, facts = _describe_images(result)
    facts |= _measured(result)
    for heads, protocol in result["protocol"].items():
        spreads = {
            f"{subset_name(subset)} {layer} {name}": spread
            for subset in result["subsets"]
            for layer, found in subset.get(heads, {}).items()
            for name, spread in found.items()
        }
        if spreads:
            halves = {name: spread["interval"] for name, spread in spreads.items()}
            entry = {
                "measure": "few labels",
                "protocol": {**protocol, "draws": len(result["seeds"])},
                "values": {name: spread["mean"] for name, spread in spreads.items()},
                "intervals": {name: half for name, half in halves.items() if half is not None},
            }
            append_result(run, {**facts, **entry})


def subset_name(subset: dict[str, Any]) -> str:
    """Return ``0.01`` or ``5 a class``."""
    return f"{subset['few']:.3g}" if "few" in subset else f"{subset['per_class']} a class"


def _readout_entry(result: dict[str, Any]) -> dict[str, Any]:
    values = {
        f"{layer} {k}": v for layer, found in result["layers"].items() for k, v in found.items()
    }
    return {"measure": "linear", "protocol": result["protocol"], "values": values}


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of held-out images measured and of unreadable images of both splits."""
    return {"asked": result["measured"], "left_out": {"unreadable": result["unreadable"]}}


def _describe_images(
    result: dict[str, Any], *, held_out: bool = True
) -> tuple[Source, dict[str, Any]]:
    """Return the training images, and the fields of data and weights that all entries share."""
    data = result["data"]
    source, others = open_images(data), open_evaluation(data)
    measured: Source = source if others is None or not held_out else others
    facts: dict[str, Any] = {
        "data": data,
        "fingerprint": measured.fingerprint(),
        "images": len(measured),
        "training_fingerprint": source.fingerprint(),
        "training_images": len(source),
        **{name: result[name] for name in ("weights_digest", "device", "precision")},
    }
    name = dataset_name(len(source), len(others or ()), len(source.classes or ()))
    return source, facts | ({"dataset": name} if name else {})
