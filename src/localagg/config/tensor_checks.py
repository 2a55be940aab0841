"""Checks of the tensors that public functions are given: kind, shape, device and range.

Values are checked on CPUs alone: on a GPU that would wait for the device in each step.
"""

import torch
from torch import Tensor

from ..errors import UserError

Shape = tuple[int | str, ...]
"""Sizes; a letter stands for any number."""


def check_rows(**given: object) -> None:
    """Raise a UserError unless all are floating-point tensors [n, D] of one D, on one device."""
    first, other = "", None
    for name, rows in given.items():
        rows = _check_tensor(name, rows, ("n", "D"), "a floating-point tensor")
        if not rows.is_floating_point():
            raise _wrong(name, rows, ("n", "D"), "a floating-point tensor")
        if other is not None and (rows.shape[1], rows.device) != (other.shape[1], other.device):
            raise UserError(
                "option-invalid",
                f"{first} is {_describe(other)} and {name} is {_describe(rows)}; pass rows of one"
                " length, on one device.",
            )
        first, other = name, rows


def check_sizes(**given: int) -> None:
    """Raise a UserError if a number of rows is 0."""
    for name, size in given.items():
        if not size:
            raise UserError("option-invalid", f"{name} has no rows; pass at least one.")


def check_pairs(**given: Tensor) -> None:
    """Raise a UserError unless these have equally many rows."""
    if len({len(rows) for rows in given.values()}) > 1:
        counted = " and ".join(f"{name} has {len(rows):,}" for name, rows in given.items())
        raise UserError("option-invalid", f"{counted} rows; pass equally many.")


def check_integers(
    name: str,
    given: object,
    shape: Shape,
    below: int | None = None,
    *,
    device: torch.device | None = None,
) -> None:
    """Raise a UserError unless this is a tensor of integers of this shape, from 0 to ``below``.

    Args:
        name: of the argument.
        given: the argument. Booleans and, because torch takes them for masks, uint8 are refused
            with ``below``.
        shape: its sizes.
        below: one more than the largest valid value. Default: any value is valid.
        device: where it must lie. Default: anywhere.
    """
    kind = "a tensor of integers" if below is None else "an int64 tensor"
    values = _check_tensor(name, given, shape, kind)
    bad = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    if bad or (below is not None and values.dtype == torch.uint8):
        raise _wrong(name, values, shape, kind)
    if device is not None and values.device != device:
        raise UserError(
            "option-invalid", f"{name} is {_describe(values)}; move it to {device}, like the rows."
        )
    if below is None or values.device.type != "cpu" or not values.numel():
        return
    low, high = (int(value) for value in values.aminmax())
    if low < 0 or high >= below:
        raise UserError(
            "option-invalid",
            f"{name} holds {low if low < 0 else high}; its values must be in 0-{below - 1:,}.",
        )


def _check_tensor(name: str, given: object, shape: Shape, kind: str) -> Tensor:
    if isinstance(given, Tensor) and given.layout == torch.strided and not given.is_meta:
        sizes = zip(shape, given.shape, strict=False)
        right = all(size == found for size, found in sizes if isinstance(size, int))
        if right and given.ndim == len(shape):
            return given
    raise _wrong(name, given, shape, kind)


def _wrong(name: str, given: object, shape: Shape, kind: str) -> UserError:
    sizes = ", ".join(map(str, shape))
    return UserError("option-invalid", f"{name} is {_describe(given)}; pass {kind} [{sizes}].")


def _describe(given: object) -> str:
    if not isinstance(given, Tensor):
        return f"of type {type(given).__name__}"
    dtype = str(given.dtype).removeprefix("torch.")
    sparse = "" if given.layout == torch.strided else "sparse "
    return f"a {sparse}{dtype} tensor {list(given.shape)} on {given.device}"
