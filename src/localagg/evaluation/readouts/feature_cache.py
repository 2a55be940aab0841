"""Features of frozen layers under a fixed view, computed once and cached on disk within a budget.

Random views change the features in every epoch, so only fixed views are cached: the center crops of
held-out images, and those of training images where nothing about their views is random. An entry of
the cache is a folder, written beside and renamed::

    CACHE/KEY/features.npy    [N, F], memory-mapped; bfloat16 as the int16 of its bits
    CACHE/KEY/index.npy       int64 [n]: the readable images; other rows are zeros
    CACHE/KEY/facts.json      the key is the hash of these facts

The key hashes everything that the values depend on: every weight, every byte of every image, the
layer, the view, the precision, the device, and this package's version. So no entry can be stale.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from ...checkpoint import weights_digest, write_json
from ...config import ViewConfig, require_resolved
from ...data.images.decode import READ_ERRORS, open_image
from ...data.images.levels import levels_for_sizes
from ...data.sources.open import Source, check_outside
from ...errors import UserError
from ...io.console import show_progress
from ...io.tensor_files import save_array
from ...models import Compat, Encoder
from .readout_inputs import evaluation_views

_ABANDONED_SECONDS = 24 * 3600  # age at which an unfinished entry is removed
_KEY_DIGITS = 40  # hexadecimal


def hash_images(source: Source, views: ViewConfig) -> tuple[str, dict[int, str]]:
    """Return the SHA-256 of every byte of every image, and {index: reason} of unreadable headers.

    A source's fingerprint covers 64 images only, which is too little to trust cached features.
    """
    digest, failed, levels = hashlib.sha256(), {}, levels_for_sizes(views)
    with show_progress("reading images") as show:
        for i in range(len(source)):
            data = b"\0unreadable"
            try:
                image = source[i].image
                data = image if isinstance(image, bytes) else image.numpy().tobytes()
                if isinstance(image, bytes):
                    open_image(image, levels)
            except READ_ERRORS as error:
                failed[i] = str(error) or type(error).__name__
            digest.update(len(data).to_bytes(8, "little") + data)
            show(i + 1, len(source))
    return digest.hexdigest(), failed


@dataclass(frozen=True)
class CachedFeatures:
    """Features of the readable images of a source."""

    index: Tensor
    """int64 [n], increasing: the readable images."""
    layers: dict[str, np.ndarray]
    """[N, F] by layer, memory-mapped."""

    def rows(self, layer: str, index: Tensor) -> Tensor:
        """Return a copy [B, F] of the features of images ``index`` [B], in their original dtype."""
        found = torch.from_numpy(self.layers[layer][index.numpy()])
        return found.view(torch.bfloat16) if found.dtype == torch.int16 else found

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (index [B], {layer: [B, F]}) of all readable images in order."""
        for index in self.index.split(size):
            yield index, {layer: self.rows(layer, index) for layer in self.layers}


class FeatureExtractor:
    """Computes features with a frozen encoder.

    Args:
        encoder: on its device; it is put into inference mode.
        layers: names out of ``encoder.layers``.
        views: resolved; augmentation, image_size and eval_crop fix the view.
        fabric: precision and device.
        compat: see ``encoder.features``.
        workers: processes that decode images that are not in memory.

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
        """Return {layer: [B, F]} of views [B, 3, S, S], on the encoder's device."""
        self.encoder.eval()
        images = images.to(self.fabric.device).contiguous(memory_format=torch.channels_last)
        with self.fabric.autocast():
            return self.encoder.features(images, self.layers, compat=self.compat)

    def feature_bytes(self, layer: str, images: int) -> int:
        """Return the size of the features of a number of images, in bytes."""
        return images * self.sizes[layer] * self.dtypes[layer].itemsize

    def facts(self, images: str, pixels: Tensor | None) -> dict[str, dict[str, Any]]:
        """Return {layer: everything that its features depend on}; ``images`` is their digest."""
        size, crop = self.views.image_size, self.views.eval_crop
        # Batches in memory are resized without rounding, single files by Pillow to whole levels.
        unresized = pixels is not None and crop == 1 and tuple(pixels.shape[2:]) == (size, size)
        device = self.fabric.device.type
        with self.fabric.autocast():
            mixed = torch.is_autocast_enabled(device)
            precision = torch.get_autocast_dtype(device) if mixed else torch.float32
        shared = {
            "version": version("localagg"),
            "weights": weights_digest(self.encoder),
            "images": images,
            "compat": self.compat,
            "precision": str(precision),
            "device": device,
            "augmentation": self.views.augmentation,
            "image_size": size,
            "eval_crop": crop,
            "resized": "alone" if pixels is None or unresized else "in batches",
        }
        return {layer: {**shared, "layer": layer} for layer in self.layers}


class FeatureCache:
    """A folder of cached features within a budget.

    Args:
        folder: Default: ``localagg/features`` in the user's cache folder (XDG_CACHE_HOME or
            ~/.cache), which all measurements of the same weights share.
        gb: GiB that the folder may hold. A new entry beyond it replaces the least recently used
            ones, except for those that this object has returned.
        images: data URI of the images, among which ``folder`` may not lie.

    Raises:
        UserError: the folder lies among the images.
    """

    def __init__(self, folder: str | Path | None, gb: float, images: str | None = None) -> None:
        if folder is not None and images is not None:
            check_outside(images, folder, "--cache")
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "localagg" / "features"
        self.folder = Path(home if folder is None else folder).expanduser()
        self.budget = int(min(gb * 2**30, sys.maxsize))
        self.returned: dict[str, int] = {}  # bytes by key

    def fitting_layers(self, extractor: FeatureExtractor, images: int) -> list[str]:
        """Return the layers whose features fit the budget together, preferring the last layers."""
        left, found = self.budget - sum(self.returned.values()), []
        for layer in reversed(extractor.layers):
            needed = extractor.feature_bytes(layer, images)
            if needed <= left:
                found.append(layer)
                left -= needed
        return found[::-1]

    def get(
        self,
        extractor: FeatureExtractor,
        source: Source,
        *,
        pixels: Tensor | None = None,
        index: Tensor | None = None,
        digest: str | None = None,
    ) -> CachedFeatures | None:
        """Return the features of every readable image of a source, cached or computed now.

        Args:
            extractor: computes them, of all its layers.
            source: the images.
            pixels: the decoded images uint8 [N, 3, H, W], if they are in memory.
            index: int64 [n], which of ``pixels`` are readable. Default: all.
            digest: of :func:`hash_images`, if known.

        Returns:
            None if the features exceed the budget, or half of the free disk space.

        Raises:
            UserError: the folder cannot be written, or no image can be read.
        """
        size = {layer: extractor.feature_bytes(layer, len(source)) for layer in extractor.layers}
        if sum(size.values()) > self.budget:
            return None
        facts = extractor.facts(digest or hash_images(source, extractor.views)[0], pixels)
        keys = {layer: entry_key(facts[layer]) for layer in extractor.layers}
        wanted = {keys[layer]: size[layer] for layer in keys}
        if sum((self.returned | wanted).values()) > self.budget:
            return None
        found = self._find(keys, extractor, len(source))
        if missing := [layer for layer in keys if layer not in found]:
            try:
                if not self.make_room(sum(size[layer] for layer in missing), wanted):
                    return None
                with self._unfinished(missing) as made:
                    _compute(made, extractor, source, pixels, index)
                    for layer in missing:
                        write_json(made[layer] / "facts.json", facts[layer])
                        rename_entry(made[layer], self.folder / keys[layer])
            except OSError as error:
                raise UserError(
                    "environment",
                    f"Features cannot be cached in '{self.folder}' ({error.strerror or error});"
                    " name another --cache, or free disk space there.",
                ) from None
            found = self._find(keys, extractor, len(source))
            if len(found) < len(keys):
                raise UserError(
                    "busy",
                    f"Another process removes features from '{self.folder}' as they are written;"
                    " name another --cache, or raise --cache-gb.",
                )
        self.returned |= wanted
        return CachedFeatures(
            next(iter(found.values()))[1], {layer: found[layer][0] for layer in keys}
        )

    def _find(
        self, keys: dict[str, str], extractor: FeatureExtractor, images: int
    ) -> dict[str, tuple[np.ndarray, Tensor]]:
        """Return (features, index) of the layers that are cached, whole, and of the same images."""
        found: dict[str, tuple[np.ndarray, Tensor]] = {}
        for layer, key in keys.items():
            try:
                features = np.load(self.folder / key / "features.npy", mmap_mode="r")
                index = torch.from_numpy(np.load(self.folder / key / "index.npy"))
                os.utime(self.folder / key)  # used now
            except (OSError, ValueError, EOFError):  # missing, or cut short
                continue
            expected = (images, extractor.sizes[layer]), _stored_dtype(extractor.dtypes[layer])
            if (features.shape, features.dtype) == expected:
                found[layer] = features, index
        indices = [index for _, index in found.values()]
        return found if all(torch.equal(index, indices[0]) for index in indices) else {}

    def make_room(self, needed: int, wanted: dict[str, int]) -> bool:
        """Remove least recently used entries; return whether ``needed`` more bytes fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = sorted((path.stat().st_mtime, path) for path in self.folder.iterdir())
        held = {path: _folder_bytes(path) for _, path in entries}
        for changed, path in entries:
            over = sum(held.values()) + needed > self.budget
            is_entry = len(path.name) == _KEY_DIGITS and (path / "facts.json").exists()
            removable = is_entry and path.name not in self.returned | wanted
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if (over and removable) or (unfinished and time.time() - changed > _ABANDONED_SECONDS):
                shutil.rmtree(path, ignore_errors=True)
                del held[path]
        fits = sum(held.values()) + needed <= self.budget
        return fits and needed <= shutil.disk_usage(self.folder).free / 2

    @contextlib.contextmanager
    def _unfinished(self, layers: list[str]) -> Iterator[dict[str, Path]]:
        """Make a temporary folder for each layer; remove those that are left in the end."""
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
    """Compute all layers of ``made`` in one pass over the images, into their folders."""
    maps = {
        layer: np.lib.format.open_memmap(
            folder / "features.npy",
            mode="w+",
            dtype=_stored_dtype(extractor.dtypes[layer]),
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
            "unreadable-images",
            f"None of the {len(source):,} images of '{source.uri}' can be decoded.",
        )
    for layer, folder in made.items():
        maps[layer].flush()  # to the disk
        save_array(folder / "index.npy", torch.cat(read).numpy())


def rename_entry(unfinished: Path, entry: Path) -> None:
    """Rename a finished entry to its name, in place of a damaged one."""
    shutil.rmtree(entry, ignore_errors=True)
    try:
        os.rename(unfinished, entry)
    except OSError:
        if not entry.is_dir():  # else another process has just made the same entry
            raise


def entry_key(facts: dict[str, Any]) -> str:
    """Return the name of an entry: a hash of its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _stored_dtype(dtype: torch.dtype) -> np.dtype:
    """Return the dtype on disk: numpy has no bfloat16, so its bits are stored as int16."""
    return torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype


def _folder_bytes(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
