"""One object to embed images in Python: network, view, device and memory bank of a run."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import (
    EXPORTED_NAME,
    latest,
    load_bank,
    load_encoder,
    load_views,
    read_progress,
    read_run,
)
from ..config import ViewConfig, check_argument_types, check_arguments
from ..data.images.image_dataset import as_source
from ..data.loading.cropping import evaluation_crops
from ..data.loading.scan import require_readable
from ..data.sources.open import Source, open_unchanged
from ..engine.device import make_fabric
from ..engine.search import nearest, sort_by_similarity
from ..errors import UserError, first_line
from ..io.console import show_progress
from ..models import Encoder
from ..models.inference import run_in_parts
from .embed import resolve_views

_BATCH = 64
_HUB_NAME = re.compile(r"(hf:)?(\w[\w.-]*/\w[\w.-]*)")


class Neighbors(NamedTuple):
    """Images of a memory bank that are most similar to queries, the most similar first."""

    index: np.ndarray
    """int64 [n, k]: bank rows, which are the images' indices in the run's data."""
    similarity: np.ndarray
    """float32 [n, k]: cosine, -1 to 1."""
    paths: list[list[str]]
    """Names of the images, n lists of k."""


class Model:
    """A trained network that embeds images; made by :func:`load`.

    It can be pickled, and used by several threads.

    Args:
        encoder: the network.
        views: its measured view; unset sizes follow from the images, as in ``localagg embed``.
        run: the run folder, whose memory bank :meth:`nearest` searches.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: this machine lacks the device.
    """

    def __init__(
        self, encoder: Encoder, views: ViewConfig, run: Path | None = None, device: str = "auto"
    ) -> None:
        self.device = make_fabric(device, "32-true").device
        self.encoder = encoder.to(self.device).eval()
        self.views, self.run = views, run
        self._bank: tuple[Tensor, Tensor, Source] | None = None

    def __repr__(self) -> str:
        return f"Model({self.encoder.spec['model']}, dim={self.dim}, device={self.device.type})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bank": None}  # read again where it is unpickled

    @property
    def dim(self) -> int:
        """Size of the embedding."""
        return self.encoder.spec["dim"]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`features` takes, from first to last."""
        return self.encoder.layers

    def embed(self, images: Any) -> np.ndarray:
        """Return the embeddings of images: float32 unit rows [n, dim], in their order.

        The rows are those of ``localagg embed`` in its default precision, up to rounding.

        Args:
            images: one image or a list, which may mix paths, encoded bytes, PIL images, arrays
                [H, W, 3] and tensors [3, H, W]; pixels are uint8 in 0-255 or floating in 0-1. Or a
                source from :func:`localagg.open_images`.

        Raises:
            UserError: an empty list, a missing or unreadable file, or an object of another kind,
                shape, dtype or range.
        """
        return self._map(images, lambda views: {"": run_in_parts(self.encoder, views)})[""]

    def features(
        self, images: Any, layers: Iterable[str | int], *, flatten: bool = True
    ) -> dict[str, np.ndarray]:
        """Return what layers compute of images: {name: float32 [n, values]}.

        Args:
            images: as in :meth:`embed`.
            layers: names out of :attr:`layers`; 3 means "3". The network runs once for all.
            flatten: pool and flatten the maps as the reference's read-outs do; else return the maps
                themselves [n, C, H, W].

        Raises:
            UserError: no or unknown layers, or the errors of :meth:`embed`.
        """
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            layers = [] if layers is None else [layers]
        names = [str(name) for name in layers]
        if not names:
            raise UserError("option-missing", f"Name at least one layer of {self.layers}.")
        read = self.encoder.features if flatten else self.encoder.maps
        return self._map(images, lambda views: read(views, names))

    def preprocess(self, images: Any) -> Tensor:
        """Return the measured views of images, which the network reads: uint8 [n, 3, S, S].

        The network itself scales and normalizes pixels. Raises the errors of :meth:`embed`.
        """
        source = as_source(images, upright=self.views.exif_orientation)
        return self._crop(source, self._resolve_views(source), torch.arange(len(source)))

    def nearest(self, rows: np.ndarray | Tensor, k: int = 10) -> Neighbors:
        """Return the images of the run's memory bank with the most similar rows, exactly.

        Args:
            rows: float [n, dim], from :meth:`embed`; they are scaled to unit length.
            k: number of neighbors, capped at the images that were learned.

        Raises:
            UserError: the model has no bank, its images have moved or changed, or rows of another
                shape or with values that are not finite.
        """
        check_arguments(k=(k, 1))
        queries_QD = _as_queries(rows, self.dim)
        bank_ND, learned, source = self._open_bank()
        found, similarity = sort_by_similarity(*nearest(queries_QD, bank_ND, int(k)))
        found = learned[found]
        paths = [[source.name(i) for i in line] for line in found.tolist()]
        return Neighbors(found.numpy(), similarity.clamp(-1, 1).numpy(), paths)

    @torch.no_grad()
    def _map(
        self, images: Any, function: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        """Apply a function of views [B, 3, S, S] batch by batch; return its values together."""
        source = as_source(images, upright=self.views.exif_orientation)
        views, found = self._resolve_views(source), []
        with show_progress("embedding") as show:
            for index in torch.arange(len(source)).split(_BATCH):
                values = function(self._crop(source, views, index).to(self.device))
                found.append({name: value.float().cpu() for name, value in values.items()})
                show(int(index[-1]) + 1, len(source))
        return {name: torch.cat([part[name] for part in found]).numpy() for name in found[0]}

    def _resolve_views(self, source: Source) -> ViewConfig:
        known = self.views.image_size is not None and self.views.eval_crop is not None
        return self.views if known else resolve_views(self.views, source)

    def _crop(self, source: Source, views: ViewConfig, index: Tensor) -> Tensor:
        loaded, unreadable = evaluation_crops(source, views, False, index)
        require_readable(source, unreadable)
        return loaded.images

    def _open_bank(self) -> tuple[Tensor, Tensor, Source]:
        """Return the learned rows of the bank, float32 [n, dim] on the CPU, the indices of their
        images, int64 [n], and the run's images."""
        if self.run is None:
            raise UserError(
                "unsupported", "Weights alone have no memory bank; load the run folder instead."
            )
        if self._bank is None:
            _, facts = read_run(self.run)
            fingerprint = facts["fingerprint"]
            source = open_unchanged(facts["data"], fingerprint, self.run, "restore them")
            learned = torch.ones(len(source), dtype=torch.bool)
            learned[read_progress(latest(self.run))["unreadable"]] = False
            rows = F.normalize(load_bank(self.run).float(), dim=1)
            self._bank = rows[learned], learned.nonzero().squeeze(1), source
        return self._bank


@check_argument_types
def load(
    source: str | Path,
    *,
    views: ViewConfig | None = None,
    device: str = "auto",
    backbone: nn.Module | None = None,
) -> Model:
    """Load a trained network for use in Python.

    Args:
        source: a run folder, a weights file (.safetensors), a folder of ``localagg export --to
            hub``, or the name of such a one on the Hugging Face Hub, "USER/NAME" (downloaded once).
        views: the view of images. Default: the measured view that the run or file stores.
        device: auto (a GPU if there is one), cpu, cuda or mps.
        backbone: the network of a run that was given one; see :func:`.load_encoder`.

    Raises:
        UserError: no such run, file or name, or not weights of localagg; no such device.
    """
    if views is not None and not isinstance(views, ViewConfig):
        raise UserError("option-invalid", f"views is {views!r}; pass a ViewConfig.")
    if backbone is not None and not isinstance(backbone, nn.Module):
        raise UserError("option-invalid", f"backbone is {backbone!r}; pass a torch.nn.Module.")
    path = _find(str(source))
    encoder = load_encoder(path, backbone)
    run = path if (path / "config.json").is_file() and (path / "checkpoints").is_dir() else None
    return Model(encoder, views or load_views(path) or ViewConfig(), run, device)


def _as_queries(rows: Any, dim: int) -> Tensor:
    """Return rows as float32 unit rows [n, dim] on the CPU."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().double().numpy()
    try:
        values = np.asarray(rows)
    except ValueError:  # lists of unequal lengths
        values = np.empty((0, 0))
    if values.ndim != 2 or values.shape[1] != dim or values.dtype.kind not in "fiu":
        raise UserError(
            "option-invalid",
            f"The rows are of shape {list(values.shape)} and dtype {values.dtype}; pass floats"
            f" [n, {dim}] from embed.",
        )
    queries_QD = torch.from_numpy(values.astype(np.float64))
    if len(zero := (queries_QD == 0).all(dim=1).nonzero()):
        raise UserError(
            "option-invalid",
            f"Row {int(zero[0])} is all zeros, which have no direction; remove it.",
        )
    return F.normalize(queries_QD, dim=1, eps=0).float()


def _find(source: str) -> Path:
    """Return a run folder or weights file, downloaded from the Hub if need be."""
    name = _HUB_NAME.fullmatch(source)
    try:
        path = Path(source).expanduser()
        is_local = path.exists() or name is None or path.parent.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such user
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "not-found", f"There is no run folder or weights file '{source}' ({reason})."
        ) from None
    if is_local or name is None:
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name[2], EXPORTED_NAME))
    except (OSError, ValueError) as error:  # offline, unknown, private, or without this file
        raise UserError(
            "not-found",
            f"'{source}' is neither a folder nor a file, and as a name on the Hugging Face Hub it"
            f" cannot be downloaded ({first_line(error)}); correct the path or name.",
        ) from None
