"""The order, file names and conversions of the reference's packing scripts.

``build_tfrs.py`` shuffles ImageNet's training images by numpy's legacy generator, converts one PNG
and 23 CMYK files by name, and cuts train into 1,024 files and val into 128.
``build_tfrs_places.py`` shuffles and cuts the lists of Places205, floor(N / files) images a file,
the rest in further files.
The index of an image is its place in this order: its row in the memory bank of a checkpoint.
"""

import hashlib
import io

import numpy as np
from PIL import Image

from ...errors import UserError
from ..images.decode import decode
from ..sources.csv_listing import CsvListing
from ..sources.image_folder import ImageFolder
from ..sources.source import Sample, Source, encoded_bytes
from ..sources.tfrecords.tfrecord import PREFIXES
from .formats import FORMATS, PackFormat

FILES = {"train": 1024, "val": 128}
_PNG = "n02105855_2933.JPEG"
_CMYK = frozenset(
    [f"{name}.JPEG" for name in (
        "n01739381_1309", "n02077923_14822", "n02447366_23489", "n02492035_15739",
        "n02747177_10752", "n03018349_4028", "n03062245_4620", "n03347037_9675",
        "n03467068_12171", "n03529860_11437", "n03544143_17228", "n03633091_5218",
        "n03710637_5125", "n03961711_5286", "n04033995_2932", "n04258138_17003",
        "n04264628_27969", "n04336792_7448", "n04371774_5854", "n04596742_4225",
        "n07583066_647", "n13037406_4650", "ILSVRC2012_val_00019877",
    )]
)  # fmt: skip


class ReferenceOrder(Source):
    """A folder of classes, or a listing, as the reference packs it.

    Args:
        source: the split's images.
        split: train is shuffled, val is not.
        seed: of the shuffle; 0 in the reference.

    Raises:
        UserError: another kind of source, for which the reference has no order.
    """

    def __init__(self, source: Source, split: str, seed: int = 0) -> None:
        if not isinstance(source, (ImageFolder, CsvListing)) or source.labels is None:
            raise UserError(
                "unsupported",
                f"'{source.uri}' is neither class folders nor a listing with labels, which the"
                " reference packs; omit --like.",
            )
        self.source, self.uri, self.classes = source, source.uri, source.classes
        self.is_listing = isinstance(source, CsvListing)
        self.malformed = getattr(source, "malformed", [])
        order = np.arange(len(source))
        if not self.is_listing:  # by class, then by name: "a-b/x" after "a/x"
            order = np.array(sorted(range(len(source)), key=lambda i: source.name(i).split("/")))
        if split == "train":
            order = order[np.random.RandomState(seed).permutation(len(order))]
        self.order = order
        self.labels = source.labels[order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        """Return an image, converted where the reference converts it."""
        image = self.source[int(self.order[index])].image
        if not self.is_listing and self.name(index).rpartition("/")[2] in {_PNG, *_CMYK}:
            image = _to_jpeg(encoded_bytes(image))
        return Sample(index, image, self.label(index))

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return self.source.name(int(self.order[index]))

    def fingerprint(self) -> str:
        """Hash the source and the order."""
        facts = self.source.fingerprint().encode() + self.order.astype("<i8").tobytes()
        return hashlib.sha256(b"reference" + facts).hexdigest()

    def stored_bytes(self) -> int:
        """Return the size of all images in bytes."""
        return self.source.stored_bytes()


def _to_jpeg(image: bytes) -> bytes:
    """Encode as TensorFlow does: quality 100, 4:2:0, 300 dpi."""
    file = io.BytesIO()
    pixels = Image.fromarray(decode(image).permute(1, 2, 0).numpy())
    pixels.save(file, "JPEG", quality=100, subsampling=2, dpi=(300, 300))
    return file.getvalue()


def reference_files(source: ReferenceOrder, split: str, files: int) -> tuple[PackFormat, list[str]]:
    """Return how a split is cut into files, and their names."""
    format = FORMATS["tfrecord"]
    if source.is_listing:
        files = min(files, len(source))  # the reference stops if there are fewer images
        each = len(source) // files
        format = format._replace(
            name=lambda split, number, _: f"{PREFIXES[split]}-{number:05d}-{files:05d}",
            rows=lambda count, number, _: range(number * each, min((number + 1) * each, count)),
        )
        written = -(-len(source) // each)
    else:
        written = files
    return format, [format.name(split, number, written) for number in range(written)]
