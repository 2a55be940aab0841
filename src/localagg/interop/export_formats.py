"""Write a network in each export format, and compute with the written file.

Each ``write_FORMAT`` takes the network and the file or folder to write; ``run_FORMAT`` loads it and
returns its output for views uint8 [B, 3, S, S].
"""

import contextlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint import EXPORTED_NAME, load_encoder, save_weights, write_json
from ..config import ViewConfig, require_resolved, to_dict
from ..errors import UserError
from ..io.console import notify
from ..io.tensor_files import save_pickled, save_tensors
from ..models import Encoder
from ..models.torchvision_resnet import torchvision_resnets
from .hub_folder import write_model_card

OPSET = 18
"""ONNX operator set of exported graphs."""


@dataclass(frozen=True)
class Network:
    """A network to export, and what its files say about it."""

    path: Path
    """Run folder or weights file."""
    encoder: Encoder
    """In inference mode, on the CPU."""
    views: ViewConfig
    """Its measured view, resolved."""
    normalize: bool = True
    """Whether an exported graph scales and normalizes pixels itself."""

    @property
    def size(self) -> int:
        """Side of a view in pixels."""
        return require_resolved(self.views.image_size)

    def graph(self) -> tuple[nn.Module, Tensor]:
        """Return the exported module and an example batch of its input."""
        views = torch.zeros(2, 3, self.size, self.size, dtype=torch.uint8)
        return (_Graph(self.encoder) if not self.normalize else self.encoder), self.inputs(views)

    def inputs(self, views: Tensor) -> Tensor:
        """Return the graph's input for views uint8 [B, 3, S, S]."""
        return views if self.normalize else (views / 255 - self.encoder.mean) / self.encoder.std


class _Graph(nn.Module):
    """An encoder of normalized pixels float32 [B, 3, S, S]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder.backbone.pooled(images)
        return F.normalize(self.encoder.head(self.encoder.hidden(features)), dim=1)


def preprocessing(network: Network) -> dict[str, Any]:
    """Return what has to be done to an image before the exported network reads it."""
    usual = network.encoder.normalization
    return {
        "crop": "center square",
        "crop_share": network.views.eval_crop,
        "image_size": network.size,
        "mean": list(usual.mean),
        "std": list(usual.std),
        "normalized_by": "graph" if network.normalize else "caller",
        "views": to_dict(network.views),
    }


# --- Weights --------------------------------------------------------------------------------------


def write_safetensors(network: Network, out: Path) -> None:
    """Write the file that :func:`localagg.load` reads."""
    save_weights(out, network.encoder, network.views)


def run_safetensors(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the embedding of views by the written file."""
    return load_encoder(path)(views)


def write_torchvision(network: Network, out: Path) -> None:
    """Write a state dict that torchvision's network of this name loads strictly."""
    state = _library_state(network, "torchvision", torchvision_resnets())
    if out.name.endswith(".safetensors"):
        save_tensors(out, state)
    else:
        save_pickled(out, state)


def run_torchvision(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the pooled features of views by torchvision's network."""
    import torchvision

    name, options = _architecture(network.encoder)
    model: Any = torchvision.models.get_model(name, weights=None, **options)
    model.fc = nn.Identity()
    if path.name.endswith(".safetensors"):
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    model.load_state_dict(state)
    return model.eval()((views / 255 - network.encoder.mean) / network.encoder.std)


def write_timm(network: Network, out: Path) -> None:
    """Write a folder that ``timm.create_model("local-dir:FOLDER")`` loads."""
    timm = _timm()
    state = _library_state(network, "timm", timm.list_models())
    name, options = _architecture(network.encoder)
    usual = network.encoder.normalization
    shape = [3, network.size, network.size]
    out.mkdir()
    save_tensors(out / "model.safetensors", state, {"format": "pt"})
    preprocessing = {
        "input_size": shape,
        "mean": usual.mean,
        "std": usual.std,
        "interpolation": "bilinear",
        "crop_pct": require_resolved(network.views.eval_crop),
        "crop_mode": "center",
    }
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": network.encoder.backbone.channels,
        "pretrained_cfg": {"num_classes": 0, **preprocessing},
        "model_args": {**options, "num_classes": 0},
    }
    write_json(out / "config.json", config)


def run_timm(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the pooled features of views by timm's network."""
    timm, source = _timm(), f"local-dir:{path}"
    try:
        model = timm.create_model(source, pretrained=True)
    # timm loads by torch.load, which took no safetensors once; and stumbled over two such files.
    except (pickle.UnpicklingError, NameError):
        notify(
            f"timm {timm.__version__} with torch {torch.__version__} cannot load this folder; newer"
            " ones can. It was compared without their loader."
        )
        model = timm.create_model(source, pretrained=False)
        model.load_state_dict(load_file(path / "model.safetensors"))
    model.eval()
    return model((views / 255 - network.encoder.mean) / network.encoder.std)


def write_hub(network: Network, out: Path) -> None:
    """Write timm's folder if timm has the network; always our weights and the model card."""
    try:
        write_timm(network, out)
    except UserError as error:
        if error.code not in ("unsupported", "missing-extra"):
            raise
        out.mkdir()
    save_weights(out / EXPORTED_NAME, network.encoder, network.views)
    write_model_card(network.path, network.encoder, out)


def run_hub(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the embedding of views by the folder's weights."""
    return load_encoder(path / EXPORTED_NAME)(views)


def _architecture(encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """Return the network's name in its library, without a tag for weights, and its options."""
    options = {k: v for k, v in encoder.spec.items() if k not in ("model", "dim", "head_layers")}
    return encoder.spec["model"].removeprefix("timm:").split(".")[0], options


def _library_state(network: Network, library: str, known: list[str]) -> dict[str, Tensor]:
    """Return the backbone's weights by their names in a library, or raise UserError."""
    backbone, (name, _) = network.encoder.backbone, _architecture(network.encoder)
    state = backbone.state_dict()
    names = backbone.published_names(state)
    if name not in known or not names:
        raise UserError(
            "unsupported",
            f"{library} has no network '{name}'; use --to onnx, torch, safetensors or hub.",
        )
    return {names[0][key]: value.contiguous() for key, value in state.items()}


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError("missing-extra", "timm is missing: pip install 'localagg[timm]'.") from None
    return timm


# --- Graphs ---------------------------------------------------------------------------------------


def write_torch(network: Network, out: Path) -> None:
    """Write a ``torch.export`` program with a dynamic batch."""
    module, example = network.graph()
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dynamic), out)


def run_torch(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the program's result for views."""
    return torch.export.load(path).module()(network.inputs(views))


def write_onnx(network: Network, out: Path) -> None:
    """Write a graph with a dynamic batch, and facts on its images as properties."""
    onnx, _ = _onnx()
    module, example = network.graph()
    with contextlib.redirect_stdout(None):  # the exporter prints its steps
        torch.onnx.export(
            module,
            (example,),
            out,
            input_names=["images"],
            output_names=["embedding"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
        )
    model = onnx.load(out)
    facts = {"localagg": json.dumps(network.encoder.spec), **preprocessing(network)}
    onnx.helper.set_model_props(model, {name: str(value) for name, value in facts.items()})
    onnx.save(model, out)


def run_onnx(network: Network, path: Path, views: Tensor) -> Tensor:
    """Return the result of onnxruntime for views."""
    session = _onnx()[1].InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": network.inputs(views).numpy()})[0])


def _onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "missing-extra", f"{error.name} is missing: pip install 'localagg[onnx]'."
        ) from None
    return onnx, onnxruntime
