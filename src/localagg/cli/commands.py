"""The commands: what can be typed after each. What they do is in ``actions``."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ..config import PretrainConfig, TransferConfig


@dataclass(frozen=True)
class Demo:
    """Learn the built-in digits by IR and then LA, and compare with honest floors.

    Prints a table and writes results.json and report.html.
    """

    out: str = "runs/demo"
    """The folder to write; an earlier demo in it is replaced."""
    seed: int = 0
    """Of both runs."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Pretrain:
    """Learn an embedding of images without labels: IR first, then LA."""

    options: PretrainConfig
    data: str | None = None
    """Data URI: a folder of images, Parquet, TFRecords, a listing, a saved dataset, or digits."""
    out: str | None = None
    """The run folder to make. None: runs/ and the recipe's name."""
    start: str | None = None
    """A finished run of IR on the same images to begin LA from, instead of running IR first."""
    resume: str | None = None
    """A run folder to go on with instead; it keeps its recipe and its options."""
    config: str | None = None
    """A configuration of the reference, FILE.json:NAME, laid over the recipe."""
    dry_run: bool = False
    """Print the whole configuration, the steps and a forecast of memory; learn nothing."""
    processes: int = 1
    """Processes of this machine that learn together, each on its own GPU or all on the CPU. (Under
    torchrun or srun leave it out.)"""
    rank_timeout: float = 600.0
    """Of several processes: seconds after which one that is silent ends all."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Transfer:
    """Accuracy by linear read-outs: one head a layer, trained with labels on a frozen encoder."""

    options: TransferConfig
    data: str | None = None
    """Data URI with labels and a held-out split. None: the run's."""
    out: str | None = None
    """The folder to make. None: transfer/ inside the run, or beside the weights file."""
    resume: str | None = None
    """A folder of read-outs to go on with instead."""
    quick: bool = False
    """Logistic regression on the center crop instead: minutes, not epochs of views."""
    few: tuple[float, ...] = ()
    """Learn from these shares of the labels, such as 0.01 0.1; mean and interval over seeds."""
    per_class: tuple[int, ...] = ()
    """Likewise from these numbers of images a class."""
    seeds: int = 5
    """few, per_class: draws of the labelled images."""
    recipe: str | None = None
    """Read-outs of the reference by name, such as trans_res18_LA or plc_trans_res18_LA."""
    config: str | None = None
    """A configuration of the reference, FILE.json:NAME, laid over the recipe."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Embed:
    """Write the embeddings of any images as a Parquet file: path, index, label, embedding."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, or weights file (.safetensors)."""
    data: str
    """Data URI."""
    out: str
    """The .parquet file to write."""
    split: Literal["train", "val", "test"] = "train"
    """Which split of the data."""
    layer: str | None = None
    """A layer whose read-out features are written instead of the embedding."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers written."""
    workers: int = 2
    """Processes that decode."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Search:
    """The most similar images of a table that embed wrote."""

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.parquet")]
    """The table."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image files, or paths as they stand in the table."""
    run: str | None = None
    """Run folder or weights file that made the table. None: where they lay then."""
    k: int = 10
    """Neighbors of each image."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Results:
    """Runs side by side, with the published numbers of the same protocol."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders or weights files."""
    json: str | None = None
    """Also write the table here."""


@dataclass(frozen=True)
class Knn:
    """Accuracy of the weighted vote of nearest neighbors; retrieval; clusters.

    Images of the held-out split ask those of the training split; where nothing is held out,
    training images ask each other.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, or weights file (.safetensors)."""
    data: str | None = None
    """Data URI. None: the run's."""
    against: Literal["bank", "embeddings"] = "bank"
    """Ask the run's memory bank, or fresh embeddings of the training split."""
    k: tuple[int, ...] = (1, 10, 20, 100, 200)
    """Numbers of neighbors."""
    retrieval: bool = False
    """Also precision@k, and mAP over the full ranking."""
    clusters: bool = False
    """Also NMI, ARI and accuracy of k-means with as many clusters as classes, over 5 seeds."""
    workers: int = 2
    """Processes that decode, where the images do not fit in memory."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Inspect:
    """What is in a data set and what is wrong with it, before any training.

    Counts, classes, sizes, formats; images that repeat one another, are nearly empty, odd or
    unreadable; and how long an epoch of a recipe would take here.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI")]
    """Data URI."""
    decode: bool = False
    """Decode all images. Else the header and end of each, and the pixels of 512 and the dubious."""
    recipe: str = "folder"
    """The recipe whose epoch is timed; "none" times nothing."""
    batch_size: int | None = None
    """Images a step of it. None: the recipe's."""
    augmented: int | None = None
    """Also draw the training views of this many images, as the recipe makes them."""
    sheet: str = "views.png"
    """augmented: the contact sheet to write."""
    workers: int | None = None
    """Processes that read. None: one a core, up to 16."""
    json: str | None = None
    """Also write the result here, with every image in trouble."""


@dataclass(frozen=True)
class Pack:
    """Pack any images into a folder that reads fast; a stopped pack goes on.

    All bytes are kept, unless --size asks for smaller images. pack-report.json in the folder names
    duplicates and unreadable images.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Data URI."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make."""
    format: Literal["arrow", "tfrecord", "webdataset"] = "arrow"
    """What datasets reads, what the reference reads, or tars."""
    size: int | None = None
    """Make images whose shorter side is longer than this smaller, as JPEG."""
    quality: int | None = None
    """size: of these JPEGs, 1 to 100. None: 95."""
    keep: bool = False
    """Say that all bytes are to be kept, as they are anyway without size."""
    workers: int = 2
    """Processes that read, check and shrink."""
    verify: bool = False
    """Read everything back and compare hashes."""
    json: str | None = None
    """Also write the report here."""


@dataclass(frozen=True)
class ImportTf:
    """Take weights from a checkpoint of the reference (or of its PyTorch port)."""

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """model.ckpt-N, its .index, a folder or .tar with one; or the port's checkpoint.pth.tar."""
    model: str
    """The network: preact_resnet18, preact_resnet50, alexnet_bn or vgg16_bn_last."""
    out: str
    """The .safetensors file to write."""
    bank: str | None = None
    """Also write the memory bank, its labels and its cluster labels to this .safetensors file."""
    json: str | None = None
    """Also write the report here."""


@dataclass(frozen=True)
class Recipes:
    """List the named configurations and what they cost."""

    json: str | None = None
    """Also write them here, with all their options."""
