"""Send metrics to other programs too, by the loggers of Lightning."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import UserError, suggest

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
"""tensorboard is always written, and needs no logger."""


def check_logger(name: str | None) -> None:
    """Check before the work that a logger is known and installed.

    Raises:
        UserError: it is not.
    """
    if name is None or name in LOGGERS[:2]:
        return
    if name not in LOGGERS:
        raise UserError(
            "option-invalid",
            f"--logger is {name}; it must be one of {', '.join(LOGGERS)}.{suggest(name, LOGGERS)}",
        )
    if importlib.util.find_spec(name) is None:
        raise UserError("missing-extra", f"{name} is missing: pip install 'localagg[{name}]'.")


def open_logger(name: str | None, run: Path, config: dict[str, Any]) -> Any:
    """Return a logger with ``log_metrics(metrics, step)``, ``save()`` and ``finalize(status)``.

    Args:
        name: of :data:`LOGGERS`. None and tensorboard need no logger: None is returned.
        run: run folder. ``csv`` writes below ``RUN/csv``, one folder a session; ``wandb`` and
            ``mlflow`` write there unless their environment variables name a server.
        config: values to show beside the curves.
    """
    if name in (None, "tensorboard"):
        return None
    if name == "csv":
        from lightning.fabric.loggers.csv_logs import CSVLogger

        return CSVLogger(run, name="csv")
    from lightning.pytorch import loggers

    if name == "wandb":
        logger: Any = loggers.WandbLogger(name=run.name, project="localagg", save_dir=run)
    else:
        logger = loggers.MLFlowLogger("localagg", run_name=run.name, save_dir=str(run / "mlruns"))
    logger.log_hyperparams(config)
    return logger


def close_logger(logger: Any) -> None:
    """Write what a logger holds back, and end its record."""
    logger.finalize("success")
    if hasattr(logger.experiment, "finish"):  # wandb: a later run of the process has its own
        logger.experiment.finish()
