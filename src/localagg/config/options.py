"""What can be set: frozen dataclasses, one line an option.

Imports little but the standard library, so that help and wrong options answer at once.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from .checks import check_at_least, check_positive, check_probability, join_words


@dataclass(frozen=True)
class EncoderConfig:
    """The network that turns images into unit rows."""

    model: str | None = None
    """resnet18, resnet50 (torchvision), resnet18_small (8-64 pixels), preact_resnet18,
    preact_resnet50, alexnet_bn, vgg16_bn_last (the reference's), timm:NAME. None: by image size."""
    dim: int = 128
    """Size of the embedding."""
    width: int = 64
    """resnet18_small: channels of the first stage; each further stage doubles them."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """resnet18_small: residual blocks of each stage."""
    stem_stride: int = 1
    """resnet18_small: stride of the first convolution; 2 quarters the cost."""
    head_layers: Literal[1, 2] = 1
    """1: a linear head, the paper's; 2: with a hidden layer of the backbone's width, SimCLR's."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "dim", "width", "stem_stride")
        if not self.blocks or min(self.blocks) < 1:
            raise UserError(
                "TODO", f"--blocks is {join_words(self.blocks)}; name at least 1 block a stage."
            )


@dataclass(frozen=True)
class ViewConfig:
    """How an image becomes the random views that are learned from, and the one that is measured."""

    image_size: int | None = None
    """Side of a view in pixels. None: the images' own up to 64, else 224."""
    augmentation: Literal["torchvision", "reference"] = "torchvision"
    """Whose crops, resizing and color formulas: torchvision's, or the reference program's."""
    crop: Literal["resized", "fixed", "center"] = "resized"
    """resized: random size and aspect; fixed: a random square of 7/8 of the shorter side (224 of
    256); center: the square that is measured."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """resized: share of the image's area that a crop takes, from and to."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """resized: width over height of a crop, from and to."""
    gray: float = 0.2
    """Probability that a view loses its color."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    """Strength of the brightness, contrast, saturation and hue jitter; 0 switches one off."""
    flip: float = 0.5
    """Probability that a view is mirrored."""
    eval_crop: float | None = None
    """Side of the central square that is measured, as a share of the image's shorter side.
    None: 1 for images up to 64 pixels, else 0.875."""
    exif_orientation: bool = False
    """Turn images upright as their EXIF says; the reference does not."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "image_size")
        check_probability(self, "gray", "flip")
        if self.augmentation not in ("torchvision", "reference"):
            raise UserError(
                "TODO",
                f"--augmentation is '{self.augmentation}'; it must be torchvision or reference.",
            )
        if self.crop not in ("resized", "fixed", "center"):
            raise UserError(
                "TODO", f"--crop is '{self.crop}'; it must be resized, fixed or center."
            )
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError("TODO", f"--crop-area is {low} {high}; it must be 0 < from <= to <= 1.")
        low, high = self.crop_aspect
        if not 0 < low <= high < math.inf:
            raise UserError("TODO", f"--crop-aspect is {low} {high}; it must be 0 < from <= to.")
        if not (all(0 <= strength <= 1 for strength in self.jitter) and self.jitter[3] <= 0.5):
            raise UserError(
                "TODO",
                f"--jitter is {join_words(self.jitter)}; strengths lie in 0-1, the hue's in 0-0.5.",
            )
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise UserError("TODO", f"--eval-crop is {self.eval_crop}; it must be in 0-1, above 0.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Instance Recognition, Local Aggregation, and the memory bank under both."""

    temperature: float = 0.07
    """t: divides every similarity."""
    bank_momentum: float = 0.5
    """m: share of its old value that a bank row keeps at an update."""
    bank_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Numbers of the bank's rows; bfloat16 halves its memory, and updates round to it."""
    bank_start: Literal["embedding", "random"] = "embedding"
    """First rows of the bank: the untrained network's embeddings, or random as in the reference."""
    instance_loss: Literal["softmax", "nce"] = "softmax"
    """IR's loss: the exact softmax over the bank, or the reference's sampled NCE, which needs
    bank_start random."""
    noise: int = 4096
    """nce: noise draws a sample."""
    neighbors: int | None = None
    """K: background neighbors a sample. None: derived from the number of images."""
    instance_share: float = 0.0
    """LA: share of the loss that stays IR's, of the sample itself. 0: the paper's LA."""
    clusters: tuple[int, ...] | None = None
    """Clusters of each of the H k-means clusterings. None: derived from the number of images."""
    kmeans: Literal["auto", "faiss", "lloyd"] = "auto"
    """Of clusterings that start cold. auto: faiss in one process on a CPU, else our own lloyd."""
    kmeans_iterations: int = 20
    """k-means iterations of a clustering that starts cold."""
    warm_clusters: bool = False
    """Start each clustering from the last epoch's labels."""
    warm_iterations: int = 20
    """k-means iterations of a clustering that starts warm, at most."""
    warm_tolerance: float = 0.004
    """It ends when an iteration lowers its inertia by no more than this share."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_probability(self, "bank_momentum", "instance_share")
        check_at_least(self, 1, "noise", "neighbors", "kmeans_iterations", "warm_iterations")
        check_at_least(self, 0, "warm_tolerance")
        if self.kmeans not in ("auto", "faiss", "lloyd"):
            raise UserError(
                "TODO", f"--kmeans is '{self.kmeans}'; it must be auto, faiss or lloyd."
            )
        if self.clusters is not None and (not self.clusters or min(self.clusters) < 1):
            raise UserError(
                "TODO", f"--clusters is {join_words(self.clusters)}; name at least 1 a clustering."
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a run's result, and how it is run."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs: int | None = None
    """Passes over the images, IR and LA together. None: derived from the number of images."""
    ir_epochs: int | None = None
    """How many of them are IR, first. None: derived from the epochs."""
    batch_size: int | None = None
    """Images a step. None: derived from the number of images."""
    ir_batch_size: int | None = None
    """Images a step of IR. None: as LA's."""
    learning_rate: float = 0.03
    """Of SGD, before the drops."""
    drops: tuple[float, ...] | None = None
    """Epochs after which the rate drops to a tenth. None: at 80 and 93 percent of the epochs."""
    drop_steps: tuple[int, ...] | None = None
    """The same in steps, instead of drops."""
    rate_schedule: Literal["drops", "cosine"] = "drops"
    """cosine: the rate falls to zero as half a cosine over the run, and drops are not read."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all weights but batch-norm's."""
    sync_batch_norm: bool = False
    """With several processes: normalize by the statistics of the whole batch, not of a share."""
    seed: int = 0
    """Of the weights, the bank, the order, the views and the noise."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """Arithmetic of the network. auto: bf16 where the device has units for it, else float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: the GPU if there is one."""
    compile: bool = False
    """Compile the network (torch.compile): a minute first, then faster steps on most GPUs."""
    workers: int = 2
    """Processes that read and decode; unused where the images fit in memory."""
    memory: Literal["auto", "always", "never"] = "auto"
    """Hold all images decoded in memory. auto: where they share one size and fit memory_gb."""
    memory_gb: float = 2.0
    """What auto may use for decoded images, in GiB."""
    sized_for: int | None = None
    """Images that neighbors and clusters were chosen for; other numbers of images scale them."""
    unreadable: Literal["error", "skip"] = "error"
    """An image that cannot be read: refuse to start, or leave it out and count it."""
    eval_every: int = 1
    """Epochs between measurements by nearest neighbors; 0 never measures."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints inside an epoch; 0 writes one every step."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "batch_size", "ir_batch_size", "log_every", "sized_for")
        check_at_least(self, 0, "ir_epochs", "workers", "eval_every", "checkpoint_seconds", "seed")
        check_at_least(self, 0, "weight_decay", "memory_gb")
        check_positive(self, "learning_rate")
        if not 0 <= self.momentum < 1:
            raise UserError("TODO", f"--momentum is {self.momentum}; it must be in 0-1, below 1.")
        if self.drops and min(self.drops) < 0:
            raise UserError("TODO", f"--drops is {join_words(self.drops)}; epochs count from 0.")
        if self.drop_steps and min(self.drop_steps) < 0:
            raise UserError(
                "TODO", f"--drop-steps is {join_words(self.drop_steps)}; steps count from 0."
            )


@dataclass(frozen=True)
class TransferConfig:
    """Linear read-outs: one head a layer, trained with labels on an encoder that is frozen."""

    layers: tuple[str, ...] | None = None
    """Layers to read out, by the encoder's names. None: all it has."""
    compat: Literal["reference"] | None = None
    """reference: pool VGG's maps over width and channels, as the reference does by a slip."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Random views that the heads learn from, and the crop that is measured."""
    epochs: int = 70
    """Passes over the training images."""
    drops: tuple[float, ...] | None = None
    """Epochs after which the rate drops to a tenth. None: at 3/7 and 6/7 of the epochs."""
    batch_size: int | None = None
    """Images a step. None: derived from the number of images, at most the reference's 128."""
    learning_rate: float = 0.01
    """Of SGD, before the drops."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On the heads' weights and biases; of a fine-tuned network on all but batch-norm's."""
    finetune: bool = False
    """Train the whole network with the heads, batch-norm by batch statistics; else it is frozen."""
    ten_crop: bool = True
    """Measure the mean softmax of ten crops too, at the end."""
    seed: int = 0
    """Of the heads' first weights, the order and the views."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic of network and heads. auto: bf16 where the device has units for it, or float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: the GPU if there is one."""
    workers: int = 2
    """Processes that read and decode; unused where the images fit in memory."""
    memory: Literal["auto", "always", "never"] = "auto"
    """Hold all images decoded in memory. auto: where they share one size and fit memory_gb."""
    memory_gb: float = 2.0
    """What auto may use for the decoded images of each split, in GiB."""
    cache: str | None = None
    """Folder of features that were computed once. None: localagg/features in the user's cache."""
    cache_gb: float = 4.0
    """What that folder may hold, in GiB; features used longest ago make way. 0 keeps none."""
    unreadable: Literal["error", "skip"] = "error"
    """An image that cannot be read: refuse to start, or leave it out and count it."""
    eval_every: int = 1
    """Epochs between measurements on the center crop; 0 measures at the end alone."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints inside an epoch; 0 writes one every step."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "batch_size", "log_every")
        check_at_least(self, 0, "workers", "eval_every", "checkpoint_seconds", "seed")
        check_at_least(self, 0, "weight_decay", "memory_gb", "cache_gb")
        check_positive(self, "learning_rate")
        if not 0 <= self.momentum < 1:
            raise UserError("TODO", f"--momentum is {self.momentum}; it must be in 0-1, below 1.")
        if self.drops and min(self.drops) < 0:
            raise UserError("TODO", f"--drops is {join_words(self.drops)}; epochs count from 0.")
        if self.layers is not None and len(set(self.layers)) != max(1, len(self.layers)):
            raise UserError(
                "TODO", f"--layers is '{join_words(self.layers)}'; name each layer once."
            )
