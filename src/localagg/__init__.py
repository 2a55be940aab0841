"""localagg: learn to see without labels, by Local Aggregation.

Public names are imported when first used, so that ``import localagg`` and ``localagg --help``
answer at once.
"""

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("localagg")

if "OMP_WAIT_POLICY" not in os.environ:
    # How long torch's threads (GNU OpenMP) spin while they wait: 7 ms as it comes, in which they
    # take a core from our own loops. A tenth spans the gaps between a small network's layers. It
    # counts where localagg is imported before torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING:
    from .config import PretrainConfig, TransferConfig
    from .data.sources.open import open_images
    from .embeddings.embed import embed
    from .errors import UserError
    from .evaluation.knn import knn_accuracy
    from .evaluation.linear import transfer
    from .models import create_encoder
    from .recipes.builtin import RECIPES, recipe
    from .training.loop import pretrain

_HOME = {
    "PretrainConfig": "config",
    "TransferConfig": "config",
    "open_images": "data.sources.open",
    "embed": "embeddings.embed",
    "UserError": "errors",
    "knn_accuracy": "evaluation.knn",
    "transfer": "evaluation.linear",
    "create_encoder": "models",
    "RECIPES": "recipes.builtin",
    "recipe": "recipes.builtin",
    "pretrain": "training.loop",
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
