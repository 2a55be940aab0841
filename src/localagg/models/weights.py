"""Start an encoder from weights: of a file, of a run, or those that the network's library offers.

Tensors are matched by name. Files come with prefixes (``module.``, ``backbone.``, ``encoder_q.``),
classifiers and second encoders; the prefix under which most names match is used.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..io.tensor_files import load_pickled
from .encoder import Encoder

PRETRAINED = "pretrained"
# Keys under which programs keep a network beside optimizers and settings; the first wins.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "teacher", "student")
_COUNTER = "num_batches_tracked"  # batch-norm's; absent from old files
_CLASSIFIERS = {"head", "fc", "classifier", "last_linear"}
_LEAST = 0.9  # share of the network's tensors that a file must have
_SHOWN = 3  # names in a sentence


class WeightsReport(NamedTuple):
    """Names of the tensors that were and were not loaded."""

    matched: tuple[str, ...]
    """Tensors of the file that were loaded."""
    unused: tuple[str, ...]
    """Other tensors of the file, such as a classifier's."""
    missing: tuple[str, ...]
    """Tensors of the network that the file lacks; they keep their random values."""

    def describe(self, source: str | Path) -> str:
        """Return one sentence for the user."""
        return (
            f"Weights '{source}': matched {len(self.matched):,} tensors;"
            f" left {_some(self.unused)}; missing (random) {_some(self.missing)}."
        )


def load_weights(encoder: Encoder, source: str | Path) -> WeightsReport:
    """Fill an encoder with weights. An error changes nothing.

    The embedding head is loaded from runs and weights files of localagg if its layers have the same
    shapes. So is their normalization of pixels. Other weights leave the head random.

    Args:
        encoder: to be filled, on any device.
        source: a ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.bin`` file, of which only tensors
            and plain containers are unpickled; a run folder; or "pretrained", the weights that timm
            or torchvision offers, from its cache or by download.

    Raises:
        UserError: no such file, no tensors, less than nine tenths of the network's tensors match,
            weights of a larger network, another shape, a value that is not finite, or "pretrained"
            where there are none or no network.
    """
    offered = source == PRETRAINED
    found = encoder.backbone.pretrained_weights() if offered else _read(Path(source))
    names = _match_backbone(encoder, found, source)
    own = {f"backbone.{key}": name for key, name in names.items()} | _match_rest(
        encoder, found, names
    )
    targets = encoder.state_dict()
    for key, name in own.items():
        _check_tensor(source, name, found[name], targets[key])
    for key, name in own.items():
        targets[key].copy_(found[name])
    used = set(own.values())
    lacking = (k for k in targets if k not in own and k not in ("mean", "std"))
    return WeightsReport(
        matched=tuple(name for name in found if name in used),
        unused=tuple(name for name in found if name not in used),
        missing=tuple(key for key in lacking if not key.endswith(_COUNTER)),
    )


def _match_backbone(
    encoder: Encoder, found: Mapping[str, Tensor], source: str | Path
) -> dict[str, str]:
    """Return {key of the backbone: name in the file}."""
    backbone = encoder.backbone
    own = {key: key for key in backbone.state_dict()}
    best: dict[str, str] = {}
    best_prefix = ""
    for names in (own, *backbone.published_names(own)):
        for prefix in dict.fromkeys(_prefixes(found, set(names.values()))):
            matched = {k: prefix + name for k, name in names.items() if prefix + name in found}
            if len(matched) > len(best):
                best, best_prefix = matched, prefix
    counted, of = (sum(not key.endswith(_COUNTER) for key in keys) for keys in (best, own))
    if counted < _LEAST * of:
        names = (*backbone.published_names(own), own)[0]
        expected = next(name for key, name in names.items() if key not in best)
        used = set(best.values())
        first = next((k for k in found if k not in used and not k.endswith(_COUNTER)), "nothing")
        raise UserError(
            "mismatch",
            f"'{source}' does not fit {encoder.spec['model']}: {counted} of {of} tensors"
            f" match by name. It has '{first}', not '{expected}'. Use weights of this"
            " network, or --model for these weights.",
        )
    if more := _more_layers(found, best, best_prefix):
        raise UserError(
            "mismatch",
            f"'{source}' is of a larger network than {encoder.spec['model']}: it also has"
            f" {_some(more)}. Name its network by --model.",
        )
    return best


def _more_layers(
    found: Mapping[str, Tensor], matched: Mapping[str, str], prefix: str
) -> tuple[str, ...]:
    """Return further tensors of a file within the network's stages, as ResNet-34 has for ResNet-18.

    Classifiers stand beside the stages, or in a part that is called like one.
    """
    used = set(matched.values())
    stages = {name.removeprefix(prefix).split(".")[0] for name in used} - _CLASSIFIERS
    more = (name for name in found if name.startswith(prefix) and name not in used)
    return tuple(
        name
        for name in more
        if name.removeprefix(prefix).split(".")[0] in stages and not name.endswith(_COUNTER)
    )


def _prefixes(found: Iterable[str], names: set[str]) -> Iterator[str]:
    """Yield what stands before one of the names in a key of the file."""
    for key in found:
        parts = key.split(".")
        for n in range(len(parts)):
            if ".".join(parts[n:]) in names:
                yield "".join(f"{part}." for part in parts[:n])


def _match_rest(
    encoder: Encoder, found: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, str]:
    """Return {key: name} of head and normalization in weights of localagg, else nothing."""
    outer, written_by_localagg, _ = next(iter(names.values())).partition("backbone.")
    if not written_by_localagg or not {f"{outer}mean", f"{outer}std"} <= found.keys():
        return {}
    kinds = ("head.", "hidden.")
    head = {f"{outer}{k}": v.shape for k, v in encoder.state_dict().items() if k.startswith(kinds)}
    theirs = {k: v.shape for k, v in found.items() if k.removeprefix(outer).startswith(kinds)}
    rest = ["mean", "std"]
    if head == theirs:  # a head behind other hidden layers, or of another size, is useless
        rest += [key.removeprefix(outer) for key in head]
    return {key: outer + key for key in rest}


def _check_tensor(source: str | Path, name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise UserError(
            "mismatch",
            f"'{source}' has {name} of shape {tuple(value.shape)}, the network of shape"
            f" {tuple(target.shape)}; use weights of this network, with the same options.",
        )
    if value.is_floating_point() != target.is_floating_point():
        raise UserError("unsupported", f"'{source}' has {name} as {value.dtype}; save it as float.")
    if not value.isfinite().all():
        raise UserError("not-finite", f"'{source}' has values of {name} that are not finite.")


# --- Files ----------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, or of the newest checkpoint of a run folder."""
    if path.is_dir():
        files = sorted(path.glob("checkpoints/step-*/model.safetensors"))
        if not files:
            raise UserError(
                "not-found", f"--weights '{path}' is a folder without checkpoints of a run."
            )
        path = files[-1]
    if not path.is_file():
        raise UserError(
            "not-found",
            f"There is no weights file or run folder '{path}'; name a .safetensors or .pth file, a"
            f" run, or '{PRETRAINED}'.",
        )
    found = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not found:
        raise UserError("unsupported", f"'{path}' holds no state dict of tensors.")
    return found


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            "damaged", f"'{path}' is not a complete safetensors file: {error}"
        ) from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    fix = "save its state dict alone with torch.save, or as .safetensors"
    loaded = load_pickled(path, [argparse.Namespace], fix)  # settings in DINO's and timm's files
    for _ in range(len(_NESTED)):
        inner = loaded if isinstance(loaded, Mapping) else {}
        inner = next((inner[k] for k in _NESTED if isinstance(inner.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    return {str(name): value.detach() for name, value in items if _is_plain(value)}


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _some(names: tuple[str, ...]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,} ({', '.join(names[:_SHOWN])}{more})" if names else "0"
