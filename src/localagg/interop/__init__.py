"""Import weights of the reference program and of its PyTorch port."""

from .tf_checkpoint import open_tf_checkpoint
from .tf_variables import LoadReport, load_tf_checkpoint
from .torch_port import load_torch_port, read_torch_port

__all__ = [
    "LoadReport",
    "load_tf_checkpoint",
    "load_torch_port",
    "open_tf_checkpoint",
    "read_torch_port",
]
