"""Check, before any work, that what a command writes replaces nothing that it or a run needs."""

import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.files import check_writable, is_inside

_OUTPUTS = ("out", "html")
_RUN_FILES = ("config.json", "results.json", "metrics.jsonl")


def check_outputs(options: Any, json: str | None) -> None:
    """Raise a UserError if an output is a device, an input, among the images, or named twice."""
    values = vars(options)
    outputs = {f"--{name}": values[name] for name in _OUTPUTS if values.get(name)}
    outputs |= {"--json": json} if json else {}
    inputs = [
        str(each)
        for name, value in values.items()
        if name not in (*_OUTPUTS, "words", "typed")
        for each in (value if isinstance(value, tuple | list) else [value])
        if isinstance(each, str | Path)
    ]
    is_folder = json and (json.endswith(("/", os.sep)) or os.path.isdir(json))
    if json and (is_folder or not Path(json).absolute().parent.is_dir()):
        raise UserError("not-found", f"--json {json} is not a file in an existing folder.")
    written: dict[str, str] = {}
    out = Path(str(values.get("out") or ""))
    if out.suffix.lower() == ".npy":  # embed writes a second file
        from ..embeddings.tables.table_formats import images_file

        outputs["the paths of --out"] = images_file(out)
    for option, value in outputs.items():
        if str(value) == "-":
            raise UserError(
                "option-invalid",
                f"{option} - names no file; results go to stdout anyway. For a file of this name,"
                " write ./-.",
            )
        path = Path(str(value)).expanduser()
        place = os.path.realpath(path)
        if place in written:
            raise UserError(
                "option-conflict", f"{written[place]} and {option} both name {value}; name two."
            )
        written[place] = option
        check_writable(path)
        data = values.get("data")
        if isinstance(data, str) and is_inside(path, data):
            raise UserError(
                "option-conflict", f"{option} {value} lies in the images' folder; name another."
            )
        for each in inputs:
            if (Path(each) / "config.json").is_file() or each.endswith(".parquet"):
                _check_outside_images(each, path, option)
        if not path.exists() or path.is_dir():
            continue
        if not path.is_file():
            raise UserError("option-invalid", f"{option} {value} is no plain file; name another.")
        if any(os.path.isfile(each) and os.path.samefile(each, path) for each in inputs):
            raise UserError("option-conflict", f"{option} {value} is also read; name another file.")
        if path.name in _RUN_FILES and (path.parent / "config.json").is_file():
            raise UserError(
                "option-conflict", f"{option} {value} is a file of the run itself; name another."
            )


def _check_outside_images(place: str, output: Path, option: str) -> None:
    from ..embeddings.open_table import check_outside_images

    try:
        check_outside_images(place, output, option)
    except UserError as error:  # the command itself says that it cannot read its input
        if error.code == "option-conflict":
            raise
