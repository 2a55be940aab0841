"""A bank made ready to be searched many times: a coarse copy in step, and what it is off by."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

_CHUNK = 1 << 14  # rows that are rounded at a time


def not_finite_error() -> UserError:
    """What is raised where a value among queries or bank is not finite."""
    return UserError(
        "TODO", "The embeddings hold values that are not finite and have no neighbors."
    )


class SearchableBank:
    """A bank [N, D] with what searches of it share: a copy for their first pass.

    The copy takes half of a float32 bank's memory: bfloat16 on a processor that multiplies it,
    float16 on a GPU. Elsewhere, and of a bank in such a type, the rows serve themselves. It follows
    what torch changes in place in the bank: by :meth:`write` the changed rows alone, else all of
    them at the next search. (Changes through numpy or ``Tensor.data`` go unnoticed.)

    Args:
        rows: the bank.
        copy: False makes no copy: rows are rounded as they are read, for a single search.

    Attributes:
        rows: the bank.
        product_dtype: of the products in the first pass.
        rounded: the rows in that type; None without a copy.
        row_bounds: (lost, longest) of the copy on a processor: no row lost more than this length by
            rounding, and none is longer.
        workspace: what an engine keeps from search to search, for itself.
    """

    def __init__(self, rows: Tensor, *, copy: bool = True) -> None:
        self.rows, self.product_dtype = rows, product_dtype(rows)
        self.rounded: Tensor | None = None
        self.row_bounds: tuple[float, float] | None = None
        self.workspace: dict[Any, Any] = {}
        self._copies = copy and not rows.is_inference()  # those do not tell when they change
        self._version = -1

    def __len__(self) -> int:
        return len(self.rows)

    def refresh(self) -> "SearchableBank":
        """Bring the copy into step with the bank.

        Raises:
            UserError: rows on a processor that are not finite.
        """
        if self._copies and self.rows._version != self._version:
            if self.rounded is None:
                alike = self.rows.dtype == self.product_dtype
                self.rounded = (
                    self.rows if alike else torch.empty_like(self.rows, dtype=self.product_dtype)
                )
            self.row_bounds = (0.0, 0.0)
            for start in range(0, len(self.rows), _CHUNK):
                self._copy(slice(start, start + _CHUNK))
            self._version = self.rows._version
        return self

    def sample_rows(self, count: int) -> Tensor:
        """So many rows at even distances, in the type of products; the copy has to be in step."""
        step = len(self.rows) // count
        every = slice(0, step * count, step)
        return (
            self.rows[every].to(self.product_dtype) if self.rounded is None else self.rounded[every]
        )

    def write(self, index: Tensor, values: Tensor) -> None:
        """``rows[index] = values``, in the copy too; of indices no two are equal."""
        in_step = self._copies and self.rows._version == self._version
        self.rows[index] = values
        if in_step:
            self._copy(index)
            self._version = self.rows._version

    def _copy(self, index: Tensor | slice) -> None:
        assert self.rounded is not None
        assert self.row_bounds is not None
        rows = self.rows[index]
        if self.rounded is not self.rows:
            self.rounded[index] = rows.to(self.rounded.dtype)
        if rows.device.type != "cpu":  # there kernels bound as they go, and nobody should wait
            return
        lost = (rows.float() - self.rounded[index].float()).norm(dim=1)
        longest = rows.float().norm(dim=1)
        new = [lost.max().item(), longest.max().item()] if len(rows) else [0.0, 0.0]
        if not math.isfinite(sum(new)):
            self.row_bounds = (0.0, 0.0)
            self._version = -1
            raise not_finite_error()
        self.row_bounds = (max(self.row_bounds[0], new[0]), max(self.row_bounds[1], new[1]))


def product_dtype(rows: Tensor) -> torch.dtype:
    """The type in which a device multiplies rows fastest, of those that are no finer."""
    if rows.device.type == "cuda" and rows.dtype == torch.float32:
        return torch.float16
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16):
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    return rows.dtype


@cache
def _multiplies_bf16() -> bool:
    """Whether this processor has units for bfloat16, and torch may use them."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public query exists
    fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return fast and "AVX512" in torch.backends.cpu.get_cpu_capability()
