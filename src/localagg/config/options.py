"""Options of a run: frozen dataclasses whose field texts are the help of the command line.

Imports little but the standard library, so that help and invalid options are reported at once.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from .checks import check, check_at_least, check_positive, check_share
from .type_checks import normalize_fields

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
"""Arithmetic of measurements; training also has "64-true"."""


@dataclass(frozen=True)
class EncoderConfig:
    """Network that maps images to unit vectors."""

    model: str | None = None
    """Architecture: resnet18, resnet50 (torchvision), resnet18_small (8-64 pixels),
    preact_resnet18, preact_resnet50, alexnet_bn, vgg16_bn_last (the reference's), resnet18_vvs,
    resnet50_vvs (of Zhuang et al. 2021), timm:NAME.
    Default: resnet18_small for images up to 64 pixels, else resnet18."""
    dim: int = 128
    """Dimension of the embedding."""
    weights: str | None = None
    """Weights to start from: a .safetensors or .pth file, a run folder, or pretrained (timm's or
    torchvision's, from their cache or by download). Default: random weights."""
    width: int = 64
    """resnet18_small: channels of the first stage; each further stage doubles them."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """resnet18_small: residual blocks of each stage."""
    stem_stride: int = 1
    """resnet18_small: stride of the first convolution; 2 quarters the cost."""
    head_layers: Literal[1, 2] = 1
    """Layers of the embedding head. 1: linear, as in the paper; 2: a hidden layer of the backbone's
    width, as in SimCLR."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_at_least(self, 1, "dim", "width", "stem_stride", "blocks")
        check(len(self.blocks) > 0, self, "blocks", "name at least 1 stage")
        # oneDNN (torch 2.14, channels_last) writes out of bounds in the backward pass of a strided
        # 1x1 convolution of 4 channels.
        wide = self.width >= 8 or len(self.blocks) == 1
        check(wide, self, "width", "at least 8 with several blocks")


@dataclass(frozen=True)
class ViewConfig:
    """Random views of an image for training, and the one view for measurements."""

    image_size: int | None = None
    """Side of a view in pixels. Default: the size of the images up to 64, else 224."""
    augmentation: Literal["torchvision", "reference"] = "torchvision"
    """Crop, resize and color formulas of torchvision or of the reference program."""
    crop: Literal["resized", "fixed", "center"] = "resized"
    """Training crop. resized: random size and aspect; fixed: random square of 7/8 of the shorter
    side (224 of 256); center: the square used for measurements."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest crop as a share of the image's area, for resized crops."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop, for resized crops."""
    gray: float = 0.2
    """Probability that a view becomes gray."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    """Strength of the brightness, contrast, saturation and hue jitter; 0 disables one."""
    flip: float = 0.5
    """Probability that a view is mirrored."""
    eval_crop: float | None = None
    """Side of the center crop for measurements, as a share of the image's shorter side. Default: 1
    for images up to 64 pixels, else 0.875."""
    exif_orientation: bool = False
    """Rotate images by their EXIF orientation. The reference ignores it."""
    range: tuple[float | Literal["auto"], ...] | None = None
    """Samples that become black and white, of images with more than 8 bits a sample: two numbers,
    or auto, the 0.5 and 99.5 % percentiles of the data. Default: the upper 8 bits."""
    bands: tuple[int, ...] | None = None
    """Bands of TIFF images, from 1, that become red, green and blue, or one that becomes gray.
    Default: the first three of a color image; images of more bands are unreadable."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_at_least(self, 1, "image_size")
        check_share(self, "gray", "flip")
        low, high = self.crop_area
        check(0 < low <= high <= 1, self, "crop_area", "it must be 0 < smallest <= largest <= 1")
        low, high = self.crop_aspect
        check(0 < low <= high < math.inf, self, "crop_aspect", "it must be 0 < smallest <= largest")
        valid = all(0 <= strength <= 1 for strength in self.jitter) and self.jitter[3] <= 0.5
        check(valid, self, "jitter", "strengths are from 0 to 1, and of the hue from 0 to 0.5")
        check_at_least(self, 1, "bands")
        check(self.bands is None or len(self.bands) in (1, 3), self, "bands", "name one or three")
        valid = self.range in (None, ("auto",)) or (
            len(self.range) == 2
            and "auto" not in self.range
            and float(self.range[0]) < float(self.range[1])
        )
        check(valid, self, "range", "name LOW and HIGH, LOW below HIGH, or auto")
        valid = self.eval_crop is None or 0 < self.eval_crop <= 1
        check(valid, self, "eval_crop", "it must be above 0 and at most 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Instance Recognition, Local Aggregation, and their memory bank."""

    temperature: float = 0.07
    """Temperature t, the divisor of all similarities."""
    bank_momentum: float = 0.5
    """Share of the old value m that a bank row keeps at an update."""
    bank_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Number format of the bank; bfloat16 halves its memory and rounds updates."""
    bank_start: Literal["embedding", "random"] = "embedding"
    """Initial bank rows: embeddings of the untrained network, or random rows as in the
    reference."""
    instance_loss: Literal["softmax", "nce"] = "softmax"
    """Loss of IR: the exact softmax over the bank, or the reference's sampled NCE, which needs
    --bank-start random."""
    instance_precision: Literal["float32", "bfloat16"] = "float32"
    """Products of IR's softmax. bfloat16 rounds those of improbable rows: about twice as fast
    where a CPU multiplies bfloat16, and no change elsewhere."""
    noise: int = 4096
    """Noise draws of NCE for each sample."""
    neighbors: int | None = None
    """Background neighbors K of each sample. Default: derived from the number of images."""
    instance_share: float = 0.0
    """Share of the IR loss in the LA loss; 0 is the paper's LA."""
    clusters: tuple[int, ...] | None = None
    """Clusters of each of the H k-means clusterings. Default: derived from the number of
    images."""
    kmeans: Literal["auto", "faiss", "lloyd"] = "auto"
    """k-means for clusterings without initial labels. auto: faiss in one process on a CPU, else
    lloyd, the built-in one."""
    kmeans_iterations: int = 20
    """Iterations of a clustering without initial labels."""
    warm_clusters: bool = False
    """Start each clustering from the labels of the previous epoch."""
    warm_iterations: int = 20
    """Most iterations of a clustering that starts from labels."""
    warm_tolerance: float = 0.004
    """Stop such a clustering when an iteration lowers its inertia by at most this share."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_positive(self, "temperature")
        check_share(self, "bank_momentum", "instance_share")
        check_at_least(self, 1, "noise", "neighbors", "kmeans_iterations", "warm_iterations")
        check_at_least(self, 1, "clusters")
        check_at_least(self, 0, "warm_tolerance")
        check(self.clusters != (), self, "clusters", "name at least 1 clustering")


@dataclass(frozen=True)
class AdaptConfig:
    """Which part of a pretrained network learns, and the cache of its frozen features."""

    train: str = "all"
    """Part that learns. head: only the embedding head; last:N: also the last N stages of the
    backbone; all: the whole network."""
    feature_views: int = 0
    """Random views of each image whose frozen features are cached; the head learns on them first.
    0: no cache, the network learns from the first step."""
    network_epochs: int | None = None
    """Last epochs, of --epochs, in which the backbone learns too, after the head. Default: 4, or 0
    with --train head."""
    network_rate: float = 0.1
    """Learning rate of the backbone in these epochs, as a share of the head's."""
    cache: str | None = None
    """Folder of cached features. Default: localagg/features in the user's cache folder."""
    cache_gb: float = 4.0
    """Size limit of the feature cache in GiB; least recently used features are removed."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_at_least(self, 0, "feature_views", "network_epochs", "cache_gb")
        check_positive(self, "network_rate")
        valid = self.train in ("head", "all") or self.last_stages > 0
        check(valid, self, "train", "it must be head, all, or last:N with N of at least 1")
        valid = self.train == "all" or self.feature_views > 0
        check(valid, self, "train", "it needs --feature-views of at least 1, as recipe adapt sets")

    @property
    def last_stages(self) -> int:
        """N of ``--train last:N``; 0 for head and all."""
        word, _, number = self.train.partition(":")
        return int(number) if word == "last" and number.isdecimal() else 0


@dataclass(frozen=True)
class PretrainConfig:
    """Schedule, optimizer and machine of a training run."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    epochs: int | None = None
    """Number of epochs of IR and LA together. Default: derived from the number of images."""
    minutes: float | None = None
    """Longest expected time of the run in minutes: network, image size and epochs that are not set
    follow from the measured speed. Default: 30 on a CPU if --epochs is not set, else no limit."""
    ir_epochs: int | None = None
    """Number of epochs of IR, which come first. Default: derived from the epochs."""
    batch_size: int | None = None
    """Batch size in images. Default: derived from the number of images."""
    ir_batch_size: int | None = None
    """Batch size of IR in images. Default: the batch size of LA."""
    learning_rate: float = 0.03
    """Initial learning rate of SGD."""
    drops: tuple[float, ...] | None = None
    """Epochs after which the learning rate drops to a tenth. Default: at 80 and 93 percent of the
    epochs."""
    drop_steps: tuple[int, ...] | None = None
    """Steps after which the learning rate drops to a tenth. Default: by --drops."""
    rate_schedule: Literal["drops", "cosine"] = "drops"
    """Learning rate over the run: drops to tenths, or half a cosine to zero."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of all weights but those of batch-norm."""
    compat: Literal["reference"] | None = None
    """reference: also decay AlexNet's batch-norm parameters, a slip of the reference program."""
    sync_batch_norm: bool = False
    """Normalize by the statistics of the whole batch instead of each process's share."""
    seed: int = 0
    """Random seed of weights, bank, data order, views and noise."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """Arithmetic of the network. auto: bfloat16 if the device has units for it, else float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the computation. auto: the GPU if there is one."""
    compile: bool = False
    """Compile the network by torch.compile: a minute at the start, then faster steps on most
    GPUs."""
    workers: int = 2
    """Number of reading and decoding processes; unused if the images fit in memory."""
    memory: Literal["auto", "always", "never"] = "auto"
    """Hold all images decoded in memory. auto: if they have one size and fit --memory-gb."""
    memory_gb: float = 2.0
    """Limit of --memory auto for decoded images, in GiB."""
    sized_for: int | None = None
    """Number of images for which neighbors and clusters were chosen; other data sets scale them.
    Default: no scaling."""
    unreadable: Literal["error", "skip"] = "error"
    """Unreadable images. error: stop before the first step; skip: exclude and count them."""
    eval_every: int = 1
    """Epochs between measurements by nearest neighbors; 0 disables them and the floors."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints within an epoch; 0 writes one every step."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_at_least(self, 1, "epochs", "batch_size", "ir_batch_size", "log_every", "sized_for")
        check_at_least(self, 0, "ir_epochs", "workers", "eval_every", "checkpoint_seconds", "seed")
        check_at_least(self, 0, "weight_decay", "memory_gb", "drops", "drop_steps")
        check_positive(self, "learning_rate", *(["minutes"] if self.minutes is not None else []))
        check(0 <= self.momentum < 1, self, "momentum", "it must be at least 0 and below 1")


@dataclass(frozen=True)
class TransferConfig:
    """Linear heads, one a layer, trained with labels on a frozen encoder."""

    layers: tuple[str, ...] | None = None
    """Names of the encoder's layers to read out. Default: all."""
    compat: Literal["reference"] | None = None
    """reference: pool VGG's maps over width and channels, a slip of the reference program."""
    views: ViewConfig = field(default_factory=ViewConfig)
    epochs: int = 70
    """Number of epochs."""
    drops: tuple[float, ...] | None = None
    """Epochs after which the learning rate drops to a tenth. Default: at 3/7 and 6/7 of the
    epochs."""
    batch_size: int | None = None
    """Batch size in images. Default: derived from the number of images, at most 128."""
    learning_rate: float = 0.01
    """Initial learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of the heads' weights and biases, or of all fine-tuned weights but those of
    batch-norm."""
    finetune: bool = False
    """Train the whole network with the heads, batch-norm by batch statistics."""
    ten_crop: bool = True
    """Also measure the mean softmax of ten crops, at the end."""
    seed: int = 0
    """Random seed of initial heads, data order and views."""
    precision: Precision = "32-true"
    """Arithmetic of network and heads. auto: bfloat16 if the device has units for it, else
    float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the computation. auto: the GPU if there is one."""
    workers: int = 2
    """Number of reading and decoding processes; unused if the images fit in memory."""
    memory: Literal["auto", "always", "never"] = "auto"
    """Hold all images decoded in memory. auto: if they have one size and fit --memory-gb."""
    memory_gb: float = 2.0
    """Limit of --memory auto for the decoded images of each split, in GiB."""
    cache: str | None = None
    """Folder for computed features. Default: localagg/features in the user's cache folder."""
    cache_gb: float = 4.0
    """Size limit of the feature cache in GiB; least recently used features are removed. 0
    disables it."""
    unreadable: Literal["error", "skip"] = "error"
    """Unreadable images. error: stop before the first step; skip: exclude and count them."""
    eval_every: int = 1
    """Epochs between measurements on the center crop; 0 measures only at the end."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints within an epoch; 0 writes one every step."""

    def __post_init__(self) -> None:
        normalize_fields(self)
        check_at_least(self, 1, "epochs", "batch_size", "log_every")
        check_at_least(self, 0, "workers", "eval_every", "checkpoint_seconds", "seed", "drops")
        check_at_least(self, 0, "weight_decay", "memory_gb", "cache_gb")
        check_positive(self, "learning_rate")
        check(0 <= self.momentum < 1, self, "momentum", "it must be at least 0 and below 1")
        names = self.layers
        valid = names is None or len(set(names)) == len(names) > 0
        check(valid, self, "layers", "name at least 1 layer, and each layer once")
