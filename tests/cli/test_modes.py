"""Every option of every command beside each mode: it arrives where the work is done, or is refused.

The work itself is replaced by a function that records its arguments.
"""

import argparse
import contextlib
import importlib

import pytest

from localagg import cli
from localagg.cli.commands import COMMANDS
from localagg.cli.parse import _parser

LOOP, FORECAST = "training.runs.", "training.forecast.forecast"
READ_OUT, QUICK = "evaluation.readouts.linear.", "evaluation.readouts.quick_readout.quick_readout"
UNUSED = "--noise --warm-iterations --warm-tolerance --cache --cache-gb"
OF_A_RUN = "--start --config --dry-run --split --pages --image-column"
QUICK_USES = (
    "--layers --compat --image-size --augmentation --eval-crop --ten-crop --seed --precision"
    " --device --workers --cache --cache-gb --unreadable"
)
ALL_BUT = "all but"
ALONE = "--quick --few --per-class --dry-run"

# Command and mode, the function that works, the options that are refused beside the mode, and those
# that act before the work (tests of their own).
MODES = [
    ("pretrain folder --data x", LOOP + "pretrain", f"{UNUSED}", "--config --dry-run"),
    (
        "pretrain folder --data x --dry-run",
        FORECAST,
        f"{UNUSED} --processes --rank-timeout --logger",
        "--config --dry-run --out",
    ),
    ("pretrain --resume x", LOOP + "resume", f"{OF_A_RUN} --out", ""),
    (
        "pretrain folder --data x --ir-epochs 3 --epochs 3",
        LOOP + "pretrain",
        f"{UNUSED} --neighbors --clusters --instance-share --kmeans --kmeans-iterations"
        " --warm-clusters",
        "--config --dry-run --ir-epochs --epochs",
    ),
    (
        "pretrain folder --data x --model resnet18 --crop center --memory never"
        " --rate-schedule cosine --instance-loss nce --warm-clusters --ir-epochs 0",
        LOOP + "pretrain",
        "--width --blocks --stem-stride --crop-area --crop-aspect --memory-gb --drops --drop-steps"
        " --ir-batch-size --instance-precision --cache --cache-gb --compat",
        "--config --dry-run --model --crop --memory --rate-schedule --instance-loss --ir-epochs"
        " --warm-clusters",
    ),
    ("transfer x --data x", READ_OUT + "transfer", "--seeds", f"{ALONE} --config"),
    (
        "transfer x --data x --dry-run",
        "evaluation.readouts.readout_inputs.forecast_transfer",
        "--seeds --processes --quick --few --per-class --heads",
        "--config --recipe --dry-run --out",
    ),
    (
        "transfer x --data x --finetune --memory always --crop fixed",
        READ_OUT + "transfer",
        "--seeds --cache --cache-gb --memory-gb --crop-area --crop-aspect",
        f"{ALONE} --config --memory --crop --finetune --heads",
    ),
    (
        "transfer x --data x --quick",
        QUICK,
        f"--seeds --heads --dry-run --processes {ALL_BUT} {QUICK_USES}",
        "--config --recipe --few --per-class --quick",
    ),
    (
        "transfer x --data x --heads x",
        READ_OUT + "transfer",
        f"--seeds {ALONE} --processes {ALL_BUT} {QUICK_USES}",
        "--config --recipe --heads",
    ),
    (
        "transfer x --data x --few 0.1",
        "evaluation.readouts.low_shot.low_shot_accuracy",
        f"--quick --heads --dry-run --processes {ALL_BUT} --finetune"
        f" {QUICK_USES.replace('--ten-crop ', '')}",
        "--config --recipe --few",
    ),
    (
        "transfer --resume x",
        READ_OUT + "resume_transfer",
        f"{ALONE} --heads --seeds --recipe --config --out {ALL_BUT} --workers --device",
        "",
    ),
    ("knn x --data x", "evaluation.measure_run.measure_run", "", ""),
    (
        "embed x --data x --out x.parquet",
        "embeddings.tables.write_table.write_embeddings",
        "",
        "--map --images",
    ),
    ("pack x x", "data.pack.pack_dataset.pack", "", "--keep"),
    ("import-tf x --model x --out x", "interop.import_weights.import_weights", "", ""),
    ("results x", "evaluation.results.results_table.compare", "", ""),
    ("demo", "report.digits_demo.demo", "", ""),
]

SAMPLES = {
    "--train": ["last:2", "--feature-views", "3"],
    "--recipe": ["trans_res18_LA"],
    "--config": ["none.json:x"],
    "--processes": ["2"],
    "--range": ["0.37", "37.0"],
    "--width": ["8"],
}


class Reached(Exception):
    pass


def typed(action: argparse.Action) -> list[str]:
    """The option with a value that is not its default."""
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [name]
    if name in SAMPLES:
        return [name, *SAMPLES[name]]
    if action.choices is not None:
        return [name, str([choice for choice in action.choices if choice is not None][-1])]
    convert = getattr(action.type, "__name__", "str")
    value = {"int": "7", "float": "0.37"}.get(convert, "sample")
    return [name] + [value] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize(("line", "work", "refused", "before"), MODES, ids=[m[0] for m in MODES])
def test_an_option_acts_or_is_refused(line, work, refused, before, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *words = line.split()
    kind, _ = COMMANDS[command]
    reached = []

    def record(*args, **kwargs):
        reached.append(repr((args, kwargs)))
        raise Reached

    module, name = work.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(f"localagg.{module}"), name, record)
    monkeypatch.setattr("localagg.distributed.launcher.launch", record)
    named, _, used = refused.partition(ALL_BUT)
    config = {a.option_strings[0] for group in nested_groups(kind) for a in group._group_actions}
    expected = set(named.split()) | (config - set(used.split()) if used else set())
    for action in _parser(kind, command)._actions:
        if not action.option_strings or action.option_strings[0] in ("-h", "--json", "--resume"):
            continue
        option, *value = typed(action)
        if option in before.split() and option not in expected:
            continue
        reached.clear()
        capsys.readouterr()
        given = [command, *words, option, *value]
        if option in expected:
            assert cli.main(given) == 2, option
            assert option in capsys.readouterr().err
        else:
            with contextlib.suppress(Reached):
                cli.main(given)
            assert reached, f"{option}: {capsys.readouterr().err}"
            field = option[2:].replace("-", "_")
            shown = [word for word in value if not word.startswith("--")] or [field]
            assert [word for word in shown if word not in reached[0]] == [], option


def nested_groups(kind):
    groups = _parser(kind, "x")._action_groups
    return [group for group in groups if group.title not in ("options", "positional arguments")]


def test_dry_run_checks_the_folder_that_it_would_write(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = ["pretrain", "digits", "--data", "digits", "--dry-run"]
    assert cli.main([*words, "--out", str(tmp_path / "full")]) == 2
    assert cli.main([*words, "--start", str(tmp_path / "full")]) == 2
    assert str(tmp_path / "full") in capsys.readouterr().err
