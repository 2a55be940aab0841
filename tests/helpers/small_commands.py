"""A small run that commands work on."""

from pathlib import Path

from localagg import cli

WITHOUT_LA = [
    *("--ir-epochs", "1", "--width", "8", "--blocks", "1", "--batch-size", "100"),
    *("--device", "cpu"),
]
SMALL = [*WITHOUT_LA, "--epochs", "2", "--neighbors", "64", "--clusters", "10"]


def run_small(folder: Path) -> Path:
    """Learn the digits for two epochs; also writes weights.safetensors and pretrain.json."""
    words = ["pretrain", "digits", "--data", "digits", "--out", str(folder), *SMALL]
    assert cli.main([*words, "--json", str(folder.parent / "pretrain.json")]) == 0
    return folder


def run_and_table(folder: Path) -> tuple[Path, Path]:
    """Learn the digits for two epochs, and embed them."""
    run, table = run_small(folder / "run"), folder / "table.parquet"
    assert cli.main(["embed", str(run), "--data", "digits", "--out", str(table)]) == 0
    return run, table
