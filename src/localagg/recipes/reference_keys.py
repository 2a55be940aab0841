"""All keys of the reference's parameter files, their defaults there, and their meaning here.

From ``param_setter.py`` (training) and ``trans_param_setter.py`` (read-outs), commit 87ac593.
"""

from typing import Any, NamedTuple


class ReferenceKey(NamedTuple):
    """A key of the reference's parameter files."""

    default: Any
    """Its default there: None also stands for a key that has none, or that is required."""
    ours: str
    """The option that it sets here, or "ignored: ", the reason and a substitute."""
    choices: tuple[str, ...] = ()
    """Valid values, if they are few."""


# The reference's name of a network -> ours.
NETWORKS = {
    "resnet18": "preact_resnet18",
    "resnet50": "preact_resnet50",
    "alexnet_bn_no_drop": "alexnet_bn",
    "vggnet_fx": "vgg16_bn_last",
}
IMAGENET = 1_281_167

_DATABASE = ReferenceKey(None, "ignored: there is no database")
_NAMED = ReferenceKey(None, "ignored: --out names the run")
_LOADED = ReferenceKey(None, "ignored: --start or --resume names a run")
_SHARED = {
    "port": _DATABASE,
    "cache_dir": _NAMED,
    "load_exp": _LOADED,
    "load_port": _LOADED,
    "gpu": ReferenceKey(None, "ignored: --device selects the device"),
    "image_dir": ReferenceKey(None, "ignored: --data names the images"),
    "q_cap": ReferenceKey(102_400, "ignored: an epoch is a permutation"),
    "test_batch_size": ReferenceKey(64, "ignored: all images are evaluated"),
    "fre_valid": ReferenceKey(10_009, "ignored: --eval-every sets the interval"),
    "fre_filter": ReferenceKey(10_009, "ignored: --checkpoint-seconds sets the interval"),
    "fre_cache_filter": ReferenceKey(None, "ignored: --checkpoint-seconds sets the interval"),
    "batch_size": ReferenceKey(128, "--batch-size"),
    "weight_decay": ReferenceKey(1e-4, "--weight-decay"),
    "lr_boundaries": ReferenceKey(None, "--drops, in epochs"),
    "model_type": ReferenceKey("resnet18", "--model", tuple(NETWORKS)),
}

PRETRAIN_KEYS = {
    **_SHARED,
    "exp_id": _NAMED,
    "db_name": _DATABASE,
    "col_name": _DATABASE,
    "gpu_offset": ReferenceKey(0, "ignored: --device selects the device"),
    "init_lr": ReferenceKey(0.03, "--learning-rate"),
    "data_len": ReferenceKey(IMAGENET, "--sized-for"),
    "instance_t": ReferenceKey(0.07, "--temperature"),
    "instance_k": ReferenceKey(4096, "--neighbors and --noise"),
    "kmeans_k": ReferenceKey("10000", "--clusters"),
    "train_num_steps": ReferenceKey(None, "--epochs, rounded up"),
    "task": ReferenceKey("LA", "IR: --ir-epochs of all epochs", ("IR", "LA")),
    "load_step": ReferenceKey(None, "--ir-epochs of LA"),
}
"""Keys of ``train.py``."""

READOUT_KEYS = {
    **_SHARED,
    "save_exp": _NAMED,
    "resume": _LOADED,
    "host": ReferenceKey("localhost", "ignored: there is no database"),
    "fre_metric": ReferenceKey(1000, "ignored: --log-every sets the interval"),
    "model_type": ReferenceKey("resnet18", "--compat of VGG's; RUN has the network", (*NETWORKS,)),
    "init_lr": ReferenceKey(0.01, "--learning-rate"),
    "ten_crop": ReferenceKey(False, "--ten-crop", ("true", "false")),
    "load_step": ReferenceKey(None, "the step from which lr_boundaries count"),
    "get_all_layers": ReferenceKey(None, "--layers"),
    "train_crop": ReferenceKey(
        "default",
        "--crop, --gray and --jitter",
        ("default", "resnet_crop_flip", "alexnet_crop_flip", "validate_crop"),
    ),
    "num_classes": ReferenceKey(1000, "the images of an epoch: 205 is Places205's"),
    "train_num_steps": ReferenceKey(None, "--epochs, rounded; the reference does not read it"),
}
"""Keys of ``train_transfer.py``."""

# Keys that the reference does not read, but that have a meaning here.
FURTHER_KEYS = {"instance_m": ReferenceKey(None, "--bank-momentum")}
