"""What the commands note in a run's results.json: each number with its protocol and its images."""

from pathlib import Path
from typing import Any

from ..checkpoint import load_views
from ..config import PretrainConfig, ViewConfig
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_evaluation, open_images
from ..recipes.defaults import resolve_defaults
from .published import dataset_name, knn_protocol
from .results_file import append_result, read_results


def record_knn(run: Path, result: dict[str, Any]) -> None:
    """What ``evaluate.measure_run`` found: the vote, and retrieval and clusters where asked for."""
    source, facts = _facts(result, held_out=result["held_out"])
    views = resolve_defaults(
        PretrainConfig(views=load_views(run) or ViewConfig()), len(source), typical_side(source)
    ).views
    against, left_out = result["against"], result["left_out"]
    how = knn_protocol(against, views, held_out=result["held_out"])
    crop = how.rsplit("; ", 1)[1]
    facts |= {name: result[name] for name in ("asked", "known", "left_out", "capped")}
    append_result(run, {**facts, "measure": "knn", "protocol": how, "values": result["accuracy"]})
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
        # Training images are clustered, whoever asks.
        _, facts = _facts(result, held_out=False)
        facts |= {"asked": found["images"], "left_out": {"known": left_out["known"]}}
        append_result(run, {**facts, "measure": "clusters", "protocol": how, "values": values})


def record_readouts(run: Path, result: dict[str, Any]) -> None:
    """What ``transfer`` or ``quick_readout`` found."""
    _, facts = _facts(result)
    facts |= {"known": result["images"], **_measured(result)}
    append_result(run, {**facts, **_readouts(result)})


def is_recorded(run: Path, result: dict[str, Any]) -> bool:
    """Whether these read-outs stand in the run's results.json already."""
    own = {**_readouts(result), **{name: result[name] for name in ("data", "weights_digest")}}
    return any(own == {name: entry.get(name) for name in own} for entry in read_results(run))


def record_low_shot(run: Path, result: dict[str, Any]) -> None:
    """What ``low_shot_accuracy`` found: the means over its seeds, and half their 95 % intervals."""
    _, facts = _facts(result)
    facts |= _measured(result)
    for way, how in result["protocol"].items():
        spreads = {
            f"{subset_name(subset)} {layer} {name}": spread
            for subset in result["subsets"]
            for layer, found in subset.get(way, {}).items()
            for name, spread in found.items()
        }
        if spreads:
            seeds = f"; mean of {len(result['seeds'])} draws of the labelled images"
            halves = {name: spread["interval"] for name, spread in spreads.items()}
            entry = {
                "measure": "few labels",
                "protocol": how + seeds,
                "values": {name: spread["mean"] for name, spread in spreads.items()},
                "intervals": {name: half for name, half in halves.items() if half is not None},
            }
            append_result(run, {**facts, **entry})


def subset_name(subset: dict[str, Any]) -> str:
    """``0.01`` or ``5 a class``."""
    return f"{subset['few']:.3g}" if "few" in subset else f"{subset['per_class']} a class"


def _readouts(result: dict[str, Any]) -> dict[str, Any]:
    """What of read-outs is their own."""
    values = {
        f"{layer} {k}": v for layer, found in result["layers"].items() for k, v in found.items()
    }
    return {"measure": "linear", "protocol": result["protocol"], "values": values}


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """Of read-outs: how many held-out images were measured, and how many images of both splits
    could not be read."""
    return {"asked": result["measured"], "left_out": {"unreadable": result["unreadable"]}}


def _facts(result: dict[str, Any], *, held_out: bool = True) -> tuple[Source, dict[str, Any]]:
    """The training images, and what is the same of every entry.

    Args:
        result: of a measurement, with "data" and "weights_digest".
        held_out: whether held-out images were measured; else training images were.
    """
    data = result["data"]
    source, others = open_images(data), open_evaluation(data)
    asked: Source = source if others is None or not held_out else others
    facts: dict[str, Any] = {
        "data": data,
        "fingerprint": asked.fingerprint(),
        "images": len(asked),
        "training_fingerprint": source.fingerprint(),
        "training_images": len(source),
        "weights_digest": result["weights_digest"],
    }
    known = dataset_name(len(source), len(others or ()), len(source.classes or ()))
    if known is not None:
        facts["dataset"] = known
    return source, facts
