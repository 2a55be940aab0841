"""Export a network for other programs: each format is loaded back and compared before it counts.

To add a format, write its two functions in :mod:`.export_formats` and list it in
:data:`EXPORT_FORMATS`.
"""

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import load_encoder, load_views, read_run
from ..config import PretrainConfig, ViewConfig, check_argument_types
from ..data.images.image_list import ImageList
from ..data.loading.cropping import evaluation_batches
from ..data.loading.scan import typical_side
from ..data.sources.open import Source, open_images
from ..errors import UserError, first_line, suggest
from ..io.files import check_writable, sync_to_disk
from ..models import Encoder
from ..recipes.derived_settings import resolve_defaults
from . import export_formats as formats
from .export_formats import Network
from .hub_folder import check_hub_name, push_to_hub

_COMPARED = 16  # images


class Format(NamedTuple):
    """How to write a format, and to compute with the file that was written."""

    write: Callable[[Network, Path], None]
    run: Callable[[Network, Path, Tensor], Tensor]
    """Load the file and compute embeddings or features of views uint8 [B, 3, S, S]."""
    tolerance: float
    """Largest difference from the run's own network."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of the file; none: a folder."""
    features: bool = False
    """Compare the pooled features, as the format has no embedding head."""


EXPORT_FORMATS: dict[str, Format] = {
    "safetensors": Format(
        formats.write_safetensors, formats.run_safetensors, 1e-6, (".safetensors",)
    ),
    "torchvision": Format(
        *(
            formats.write_torchvision,
            formats.run_torchvision,
            1e-5,
            (".pth", ".pt", ".safetensors"),
            True,
        )
    ),
    "timm": Format(formats.write_timm, formats.run_timm, 1e-5, features=True),
    "onnx": Format(formats.write_onnx, formats.run_onnx, 1e-4, (".onnx",)),
    "torch": Format(formats.write_torch, formats.run_torch, 1e-5, (".pt2",)),
    "hub": Format(formats.write_hub, formats.run_hub, 1e-6),
}


@check_argument_types
def export(
    run: str | Path,
    to: str,
    out: str | Path,
    *,
    data: str | None = None,
    normalize: bool = True,
    push: str | None = None,
) -> dict[str, Any]:
    """Write a network in a format, load it back, and compare both on real images.

    Args:
        run: run folder or weights file.
        to: a name of :data:`EXPORT_FORMATS`.
        out: file or folder to write; it appears when the comparison has passed.
        data: data URI of the compared images. Default: the run's, if they are still there, else two
            photographs of scikit-learn.
        normalize: onnx and torch: the graph takes uint8 pixels and normalizes them itself; else it
            takes normalized float32 pixels.
        push: hub: also upload the folder to this name, "USER/NAME".

    Returns:
        {"format", "out", "model", "dim", "images": compared, "of": their URI, "compared":
        "embedding" or "features", "worst_difference", "preprocessing", "opset" (onnx), "address"
        (push), "seconds"}.

    Raises:
        UserError: unknown format, a network that the format lacks, a missing extra, an existing or
            unwritable ``out``, or a difference above the format's tolerance.
    """
    start, path, out = time.perf_counter(), Path(run), Path(out)
    _check(to, out, normalize, push)
    encoder, source = load_encoder(path), _compared_images(path, data)
    config = PretrainConfig(views=load_views(path) or ViewConfig())
    views = resolve_defaults(config, len(source), typical_side(source, config.views)).views
    network = Network(path, encoder, views, normalize)
    kind = EXPORT_FORMATS[to]
    with _beside(out) as beside, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of themselves
        with _convert_exporter_errors(network.encoder, to):
            kind.write(network, beside)
        images = next(evaluation_batches(source, views, batch=_COMPARED)).images
        worst = _compare(to, network, beside, images)
        if to == "hub" and (beside / "config.json").exists():
            worst = max(worst, _compare("timm", network, beside, images))
    address = {} if push is None else {"address": push_to_hub(out, push)}
    return {
        **{"format": to, "out": str(out), "model": encoder.spec["model"]},
        **{"dim": encoder.spec["dim"], "images": len(images), "of": source.uri},
        **{"compared": "features" if kind.features else "embedding", "worst_difference": worst},
        "preprocessing": formats.preprocessing(network),
        **({"opset": formats.OPSET} if to == "onnx" else {}),
        **address,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _compare(to: str, network: Network, path: Path, views: Tensor) -> float:
    """Return the largest difference, or raise UserError if it exceeds the format's tolerance."""
    kind, encoder = EXPORT_FORMATS[to], network.encoder
    expected = encoder.pooled(views) if kind.features else encoder(views)
    worst = float((kind.run(network, path, views) - expected).abs().max())
    if not worst <= kind.tolerance:
        raise UserError(
            "mismatch",
            f"The exported {to} differs by {worst:.2g}, more than {kind.tolerance:g}, and was not"
            " written; please report the network, and use another --to.",
        )
    return worst


@contextlib.contextmanager
def _convert_exporter_errors(encoder: Encoder, to: str) -> Iterator[None]:
    """Convert errors of torch's exporters, which are of any kind, to UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            "unsupported",
            f"The network {encoder.spec['model']} cannot be exported by --to {to}"
            f" ({first_line(error)}); use another --to.",
        ) from None


def _check(to: str, out: Path, normalize: bool, push: str | None) -> None:
    if to not in EXPORT_FORMATS:
        raise UserError(
            "option-unknown",
            f"There is no format '{to}'; --to is one of {', '.join(EXPORT_FORMATS)}."
            f"{suggest(to, EXPORT_FORMATS)}",
        )
    suffixes = EXPORT_FORMATS[to].suffixes
    if suffixes and out.suffix not in suffixes:
        raise UserError(
            "option-invalid", f"--out {out} must end in {' or '.join(suffixes)} for --to {to}."
        )
    if out.is_dir() if suffixes else out.exists():
        raise UserError("exists", f"--out {out} already exists; choose another name.")
    if not out.absolute().parent.is_dir():
        raise UserError("not-found", f"--out {out} is not in an existing folder; create it.")
    check_writable(out)
    if not normalize and to not in ("onnx", "torch"):
        raise UserError(
            "option-conflict", f"--preprocessing outside has no effect with --to {to}; omit it."
        )
    if push is not None:
        if to != "hub":
            raise UserError("option-conflict", f"--push needs --to hub, not --to {to}.")
        check_hub_name(push)


def _compared_images(path: Path, data: str | None) -> Source:
    if data is not None:
        return open_images(data)
    if path.is_dir():
        with contextlib.suppress(UserError, OSError):
            return open_images(read_run(path)[1]["data"])
    from sklearn.datasets import load_sample_images

    photographs = ImageList(list(load_sample_images().images))
    photographs.uri = "two photographs of scikit-learn"
    return photographs


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Yield a temporary file or folder, which becomes ``out`` if the block ends well.

    Its name keeps the suffix, which selects the form of some formats.
    """
    beside = out.with_name(f".tmp-{out.name}")
    _remove(beside)
    try:
        yield beside
        for path in [*beside.rglob("*"), beside]:
            sync_to_disk(path)
        os.replace(beside, out)
        sync_to_disk(out.absolute().parent)
    except OSError as error:
        raise UserError(
            "environment",
            f"'{out}' cannot be written ({error.strerror or error}); free disk space or fix its"
            " folder's permissions.",
        ) from None
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
