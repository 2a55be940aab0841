"""localagg: learn image embeddings without labels, by Local Aggregation.

Public names are imported on first use, so ``import localagg`` and ``localagg --help`` are fast.
"""

import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

__version__ = importlib.metadata.version("localagg")

if "OMP_WAIT_POLICY" not in os.environ:
    # Threads of torch (GNU OpenMP) spin for 7 ms by default while they wait, and take a core from
    # our own loops. A tenth spans the gaps between a small network's layers. It has an effect only
    # if localagg is imported before torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING:
    from .config import PretrainConfig, TransferConfig
    from .data.sources.open import open_images
    from .embeddings.embed import embed
    from .embeddings.model import Model, load
    from .errors import UserError
    from .evaluation.knn import knn_accuracy
    from .evaluation.readouts.linear import transfer
    from .models import create_encoder
    from .recipes.builtin import RECIPES, recipe
    from .report.run_report import write_report
    from .training.runs import pretrain, resume

_MODULES = {
    "Model": "embeddings.model",
    "PretrainConfig": "config",
    "RECIPES": "recipes",
    "TransferConfig": "config",
    "UserError": "errors",
    "create_encoder": "models",
    "embed": "embeddings.embed",
    "knn_accuracy": "evaluation.knn",
    "load": "embeddings.model",
    "open_images": "data",
    "pretrain": "training.runs",
    "recipe": "recipes",
    "resume": "training.runs",
    "transfer": "evaluation.readouts.linear",
    "write_report": "report.run_report",
}

__all__ = [
    "RECIPES",
    "Model",
    "PretrainConfig",
    "TransferConfig",
    "UserError",
    "create_encoder",
    "embed",
    "knn_accuracy",
    "load",
    "open_images",
    "pretrain",
    "recipe",
    "resume",
    "transfer",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'localagg' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _DeprecatedModule(types.ModuleType):
    """``localagg.pretrain``, a module until version 0.1, now the function of that name."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("pretrain", "resume"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        message = f"localagg.pretrain.{name} is deprecated; use localagg.{name}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[__name__], name)


sys.modules[f"{__name__}.pretrain"] = _DeprecatedModule(f"{__name__}.pretrain")
