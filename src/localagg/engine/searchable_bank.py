"""A memory bank prepared for many searches: a low-precision copy that follows its updates."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from . import SETTINGS

_CHUNK_ROWS = 1 << 14  # rows that are rounded at a time


def not_finite_error() -> UserError:
    """Return the error for embeddings that are not finite."""
    return UserError(
        "not-finite",
        "The embeddings contain NaN or infinite values, so they have no neighbors or clusters;"
        " lower the learning rate, or embed the images again.",
    )


class RowBounds(NamedTuple):
    """Upper bounds over all rows, from which a search bounds the error of its products."""

    rounding_error: float
    """Norm of the difference between a row and the rounded row."""
    norm: float
    """Norm of a row."""


class SearchableBank:
    """A bank [N, D] with the data that its searches share: a rounded copy for their first pass.

    The copy takes half of a float32 bank's memory: bfloat16 on a CPU that multiplies bfloat16,
    float16 on a GPU. No copy is made on other devices, or of rows that have such a type. The copy
    follows in-place changes: :meth:`write` rounds the changed rows alone, any other change all rows
    at the next search. Changes through numpy or ``Tensor.data`` are not detected.

    Args:
        rows: the bank.
        copy: False rounds rows as they are read, for a single search.
        few_queries: searches have one or two queries: half of the memory is then read in less time,
            so the copy is bfloat16 on every CPU.

    Attributes:
        rows: the bank.
        product_dtype: dtype of the products in the first pass.
        rounded: the rows in that dtype; None without a copy.
        row_bounds: bounds of the copy; None without a copy, unused on a GPU.
        workspaces: buffers that a backend reuses in later searches.
    """

    def __init__(self, rows: Tensor, *, copy: bool = True, few_queries: bool = False) -> None:
        self.rows, self.product_dtype = rows, product_dtype(rows)
        if few_queries and self.product_dtype == torch.float32 and rows.device.type == "cpu":
            self.product_dtype = torch.bfloat16
        self.rounded: Tensor | None = None
        self.row_bounds: RowBounds | None = None
        self.workspaces: dict[Any, Any] = {}
        self._copies = copy and not rows.is_inference()  # inference tensors have no version
        self._version = -1

    def __len__(self) -> int:
        return len(self.rows)

    def refresh(self) -> "SearchableBank":
        """Update the copy if the bank has changed.

        Raises:
            UserError: rows on a CPU that are not finite.
        """
        if self._copies and self.rows._version != self._version:
            if self.rounded is None:
                same = self.rows.dtype == self.product_dtype
                empty = torch.empty_like(self.rows, dtype=self.product_dtype)
                self.rounded = self.rows if same else empty
            self.row_bounds = RowBounds(0.0, 0.0)
            for start in range(0, len(self.rows), _CHUNK_ROWS):
                self._round(slice(start, start + _CHUNK_ROWS))
            self._version = self.rows._version
        return self

    def sample_rows(self, count: int) -> Tensor:
        """Return ``count`` evenly spaced rows in ``product_dtype``; call :meth:`refresh` first."""
        step = len(self.rows) // count
        evenly = slice(0, step * count, step)
        rows = self.rows if self.rounded is None else self.rounded
        return rows[evenly].to(self.product_dtype)

    def write(self, index: Tensor, values: Tensor) -> None:
        """Set ``rows[index] = values``, in the copy too. Indices must be distinct."""
        current = self._copies and self.rows._version == self._version
        self.rows[index] = values
        if current:
            self._round(index)
            self._version = self.rows._version

    def _round(self, index: Tensor | slice) -> None:
        assert self.rounded is not None
        assert self.row_bounds is not None
        rows = self.rows[index]
        if self.rounded is not self.rows:
            self.rounded[index] = rows.to(self.rounded.dtype)
        if rows.device.type != "cpu":  # GPU kernels compute bounds; reading them here would wait
            return
        errors = (rows.float() - self.rounded[index].float()).norm(dim=1)
        norms = rows.float().norm(dim=1)
        new = (errors.max().item(), norms.max().item()) if len(rows) else (0.0, 0.0)
        if not math.isfinite(sum(new)):
            self.row_bounds, self._version = RowBounds(0.0, 0.0), -1
            raise not_finite_error()
        self.row_bounds = RowBounds(*map(max, self.row_bounds, new))


def product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype, no finer than the rows', in which the device multiplies them fastest."""
    if rows.device.type == "cuda" and rows.dtype == torch.float32:
        return torch.float16
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16):
        fast = SETTINGS.bfloat16_products
        if fast is None:
            fast = has_bfloat16_units() and "AVX512" in torch.backends.cpu.get_cpu_capability()
        return torch.bfloat16 if fast else torch.float32
    return rows.dtype


@cache
def has_bfloat16_units() -> bool:
    """Return whether this CPU has instructions for bfloat16 products."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public query exists
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
