"""localagg: learn to see without labels, by Local Aggregation.

Public names are imported when first used, so that ``import localagg`` and ``localagg --help``
answer at once.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # How long torch's threads (GNU OpenMP) spin while they wait: 7 ms as it comes, in which they
    # take a core from our own loops. A tenth spans the gaps between a small network's layers. It
    # counts where localagg is imported before torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING:
    from .config import PretrainConfig, TransferConfig, UserError
    from .data.sources import open_images
    from .embed import embed
    from .knn import knn_accuracy
    from .models import create_encoder
    from .pretrain import pretrain
    from .recipes import RECIPES, recipe
    from .transfer import transfer

_HOME = {
    "PretrainConfig": "config",
    "TransferConfig": "config",
    "UserError": "config",
    "open_images": "data.sources",
    "embed": "embed",
    "knn_accuracy": "knn",
    "create_encoder": "models",
    "pretrain": "pretrain",
    "RECIPES": "recipes",
    "recipe": "recipes",
    "transfer": "transfer",
}

__all__ = [
    "RECIPES",
    "PretrainConfig",
    "TransferConfig",
    "UserError",
    "create_encoder",
    "embed",
    "knn_accuracy",
    "open_images",
    "pretrain",
    "recipe",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'localagg' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Package(ModuleType):
    """Keeps ``localagg.pretrain`` and ``localagg.embed`` the functions.

    Importing a submodule binds it to its package under its own name; here the public name stays.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
