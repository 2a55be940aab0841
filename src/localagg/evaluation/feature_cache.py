"""Features of frozen layers under a fixed view: computed once, and kept while they fit a budget.

Under random views every epoch shows a layer other values, so only fixed views are kept: the central
one of held-out images, and that of training images where nothing about their views is random. An
entry of the cache is a folder, written beside and renamed::

    CACHE/KEY/features.npy    [N, F], read through a memory map; bfloat16 as the int16 of its bits
    CACHE/KEY/index.npy       int64 [n]: which images could be read; the other rows are zeros
    CACHE/KEY/facts.json      what the key is the hash of

The key hashes all that the values depend on: every weight, every byte of every image, the layer,
the view, the precision, the device, and this package's version. What changed has another key, so
nothing that is found is stale.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from .. import __version__
from ..checkpoint import weights_digest, write_json
from ..config import ViewConfig, require_resolved
from ..data.images.decode import READ_ERRORS, image_size
from ..data.sources.open import Source
from ..errors import UserError
from ..io.console import ProgressCallback, show_progress
from ..models import Compat, Encoder
from .linear_heads import evaluation_views

_ABANDONED = 24 * 3600  # seconds after which an unfinished entry belongs to nobody
_KEY = 40  # hexadecimal digits


def is_fixed(views: ViewConfig) -> bool:
    """Whether training views are the central one, whatever is drawn."""
    return views.crop == "center" and not (views.flip or views.gray or any(views.jitter))


def read_all(source: Source) -> tuple[str, dict[int, str]]:
    """SHA-256 of every byte of every image in order, and which have no readable header.

    A source's fingerprint looks into 64 images only, which is not enough to trust old features.

    Returns:
        (digest, {index: reason}).
    """
    digest, failed = hashlib.sha256(), {}
    with show_progress("reading images") as show:
        progress: ProgressCallback = show
        for i in range(len(source)):
            data = b"\0unreadable"
            try:
                image = source[i].image
                data = image if isinstance(image, bytes) else image.numpy().tobytes()
                if isinstance(image, bytes):
                    image_size(image)
            except READ_ERRORS as error:
                failed[i] = str(error) or type(error).__name__
            digest.update(len(data).to_bytes(8, "little") + data)
            progress(i + 1, len(source))
    return digest.hexdigest(), failed


@dataclass(frozen=True)
class CachedFeatures:
    """Features that are kept: those of the readable images of a source."""

    index: Tensor
    """int64 [n], increasing: the readable images."""
    layers: dict[str, np.ndarray]
    """[N, F] by layer, memory-mapped."""

    def rows(self, layer: str, index: Tensor) -> Tensor:
        """Features of images ``index`` [B]: a copy [B, F] in the dtype they were computed in."""
        found = torch.from_numpy(self.layers[layer][index.numpy()])
        return found.view(torch.bfloat16) if found.dtype == torch.int16 else found

    def batches(self, size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All readable images in order: (index [B], {layer: [B, F]}); the last batch is smaller."""
        for index in self.index.split(size):
            yield index, {layer: self.rows(layer, index) for layer in self.layers}


class FeatureExtractor:
    """How features are made: a frozen encoder, its layers, the view, the arithmetic.

    Args:
        encoder: on its device; it is put into inference mode.
        layers: names out of ``encoder.layers``.
        views: resolved; augmentation, image_size and eval_crop fix the view.
        fabric: whose precision the encoder computes in.
        compat: of ``encoder.features``.
        workers: processes that decode, where images are not in memory.

    Raises:
        UserError: a layer that the encoder does not have.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[str],
        views: ViewConfig,
        fabric: Fabric,
        *,
        compat: Compat | None = None,
        workers: int = 0,
    ) -> None:
        self.encoder, self.layers, self.views, self.fabric = encoder, list(layers), views, fabric
        self.compat: Compat | None = compat
        self.workers = workers
        size = require_resolved(views.image_size)
        found = self(torch.zeros(1, 3, size, size))
        self.sizes = {layer: values.shape[1] for layer, values in found.items()}
        self.dtypes = {layer: values.dtype for layer, values in found.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """{layer: [B, F]} of views [B, 3, S, S], on the encoder's device."""
        self.encoder.eval()
        images = images.to(self.fabric.device).contiguous(memory_format=torch.channels_last)
        with self.fabric.autocast():
            return self.encoder.features(images, self.layers, compat=self.compat)

    def bytes_of(self, layer: str, images: int) -> int:
        """What the features of so many images take."""
        return images * self.sizes[layer] * self.dtypes[layer].itemsize

    def facts(self, images: str, pixels: Tensor | None) -> dict[str, dict[str, Any]]:
        """What each layer's features depend on; ``images`` is the digest of :func:`read_all`."""
        size, crop = self.views.image_size, self.views.eval_crop
        # Batches in memory are resized without rounding, single files by Pillow to whole levels.
        whole = pixels is not None and crop == 1 and tuple(pixels.shape[2:]) == (size, size)
        kind = self.fabric.device.type
        with self.fabric.autocast():
            mixed = torch.is_autocast_enabled(kind)
            precision = torch.get_autocast_dtype(kind) if mixed else torch.float32
        shared = {
            "version": __version__,
            "weights": weights_digest(self.encoder),
            "images": images,
            "compat": self.compat or self.encoder.compat,
            "precision": str(precision),
            "device": kind,
            "augmentation": self.views.augmentation,
            "image_size": size,
            "eval_crop": crop,
            "resized": "alone" if pixels is None or whole else "in batches",
        }
        return {layer: {**shared, "layer": layer} for layer in self.layers}


class FeatureCache:
    """Entries in a folder, of at most so many GiB together.

    Args:
        folder: where. None: ``localagg/features`` in the user's cache folder (XDG_CACHE_HOME, or
            ~/.cache), where all measurements of the same weights share them.
        gb: what the folder may hold. Where a new entry would exceed it, those that were used
            longest ago make way; those that this object gave out stay.
    """

    def __init__(self, folder: str | Path | None, gb: float) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "localagg" / "features"
        self.folder = Path(home if folder is None else folder).expanduser()
        self.budget = int(gb * 2**30)
        self.given: dict[str, int] = {}  # bytes by key

    def fitting(self, extractor: FeatureExtractor, images: int) -> list[str]:
        """The layers whose features of so many images fit together, the last ones preferred."""
        left, found = self.budget - sum(self.given.values()), []
        for layer in reversed(extractor.layers):
            needed = extractor.bytes_of(layer, images)
            if needed <= left:
                found.append(layer)
                left -= needed
        return found[::-1]

    def keep(
        self,
        extractor: FeatureExtractor,
        source: Source,
        *,
        pixels: Tensor | None = None,
        index: Tensor | None = None,
        digest: str | None = None,
    ) -> CachedFeatures | None:
        """Features of every readable image of a source under the fixed view, of all layers.

        Args:
            extractor: how they are made.
            source: the images.
            pixels: the decoded images uint8 [N, 3, H, W], if they are in memory.
            index: int64 [n], which of ``pixels`` are images; None: all.
            digest: of :func:`read_all`, if it is known.

        Returns:
            What is kept; None where the layers together exceed the budget, or half of what is free
            on the disk.

        Raises:
            UserError: the folder cannot be written, or no image can be read.
        """
        size = {layer: extractor.bytes_of(layer, len(source)) for layer in extractor.layers}
        if sum(size.values()) > self.budget:
            return None
        digest = digest or read_all(source)[0]
        facts = extractor.facts(digest, pixels)
        keys = {layer: key_of(facts[layer]) for layer in extractor.layers}
        wanted = {keys[layer]: size[layer] for layer in keys}
        if sum((self.given | wanted).values()) > self.budget:
            return None
        found = self._find(keys, extractor, len(source))
        missing = [layer for layer in keys if layer not in found]
        if missing:
            try:
                if not self._make_room(sum(size[layer] for layer in missing), wanted):
                    return None
                with self._beside(missing) as made:
                    _compute(made, extractor, source, pixels, index)
                    for layer in missing:
                        write_json(made[layer] / "facts.json", facts[layer])
                        _put(made[layer], self.folder / keys[layer])
            except OSError as error:
                raise UserError(
                    "TODO",
                    f"Features cannot be kept in '{self.folder}' ({error.strerror or error}); name"
                    " another --cache, or keep none with --cache-gb 0.",
                ) from None
            found = self._find(keys, extractor, len(source))
            if len(found) < len(keys):
                raise UserError(
                    "TODO",
                    f"Another process removes the features in '{self.folder}' as they are made;"
                    " name another --cache, or raise --cache-gb.",
                )
        self.given |= wanted
        return CachedFeatures(
            next(iter(found.values()))[1], {layer: found[layer][0] for layer in keys}
        )

    def _find(
        self, keys: dict[str, str], extractor: FeatureExtractor, images: int
    ) -> dict[str, tuple[np.ndarray, Tensor]]:
        """(features, index) of the layers that are there, whole, and of the same images."""
        found: dict[str, tuple[np.ndarray, Tensor]] = {}
        for layer, key in keys.items():
            try:
                features = np.load(self.folder / key / "features.npy", mmap_mode="r")
                index = torch.from_numpy(np.load(self.folder / key / "index.npy"))
                os.utime(self.folder / key)  # used now
            except (OSError, ValueError, EOFError):  # not there, or cut short
                continue
            expected = (images, extractor.sizes[layer]), _stored(extractor.dtypes[layer])
            if (features.shape, features.dtype) == expected:
                found[layer] = features, index
        indices = [index for _, index in found.values()]
        return found if all(torch.equal(index, indices[0]) for index in indices) else {}

    def _make_room(self, needed: int, wanted: dict[str, int]) -> bool:
        """Remove entries, used longest ago first, until ``needed`` bytes more fit the budget."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = sorted((path.stat().st_mtime, path) for path in self.folder.iterdir())
        held = {path: _bytes_in(path) for _, path in entries}
        for changed, path in entries:
            over = sum(held.values()) + needed > self.budget
            ours = _is_entry(path) and path.name not in self.given | wanted
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if (over and ours) or (unfinished and time.time() - changed > _ABANDONED):
                shutil.rmtree(path, ignore_errors=True)
                del held[path]
        fits = sum(held.values()) + needed <= self.budget
        return fits and needed <= shutil.disk_usage(self.folder).free / 2

    @contextlib.contextmanager
    def _beside(self, layers: list[str]) -> Iterator[dict[str, Path]]:
        """A new unfinished entry for each layer; what is unfinished at the end is removed."""
        made = {layer: Path(tempfile.mkdtemp(".tmp", ".", self.folder)) for layer in layers}
        try:
            yield made
        finally:
            for folder in made.values():
                shutil.rmtree(folder, ignore_errors=True)


def _compute(
    made: dict[str, Path],
    extractor: FeatureExtractor,
    source: Source,
    pixels: Tensor | None,
    index: Tensor | None,
) -> None:
    """One pass over the images; the features of each layer go into its folder of ``made``."""
    maps = {
        layer: np.lib.format.open_memmap(
            folder / "features.npy",
            mode="w+",
            dtype=_stored(extractor.dtypes[layer]),
            shape=(len(source), extractor.sizes[layer]),
        )
        for layer, folder in made.items()
    }
    views = evaluation_views(
        source,
        extractor.views,
        pixels,
        index=index,
        ten_crop=False,
        workers=extractor.workers,
        device=extractor.fabric.device,
    )
    read, done = [], 0
    with show_progress("computing features") as show:
        for part, images in views:
            found = extractor(images)
            for layer, features in maps.items():
                values = found[layer].cpu()
                bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
                features[part.numpy()] = bits.numpy()
            read.append(part)
            done += len(part)
            show(done, len(source))
    if not read:
        raise UserError(
            "TODO", f"None of the {len(source):,} images of '{source.uri}' can be decoded."
        )
    for layer, folder in made.items():
        maps[layer].flush()  # to the disk
        np.save(folder / "index.npy", torch.cat(read).numpy())


def _put(beside: Path, entry: Path) -> None:
    """Rename a finished entry to its name; one that stands there (damaged) makes way."""
    shutil.rmtree(entry, ignore_errors=True)
    try:
        os.rename(beside, entry)
    except OSError:
        if not entry.is_dir():  # else another process has just made the same
            raise


def key_of(facts: dict[str, Any]) -> str:
    """The name of an entry: a hash of what its values depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY]


def _stored(dtype: torch.dtype) -> np.dtype:
    """How a dtype is stored: numpy has no bfloat16, so its bits go as int16."""
    return torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype


def _is_entry(path: Path) -> bool:
    return len(path.name) == _KEY and (path / "facts.json").exists()


def _bytes_in(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
