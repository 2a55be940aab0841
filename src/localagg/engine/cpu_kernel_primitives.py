"""Functions that the compiled CPU loops share: ordered keys, unsigned indices, prefetching.

A *key* is a number's place in the order of all bfloat16 numbers: its upper 16 bits as an integer,
with the bits of negative numbers inverted. Keys of rounded and of truncated float32 numbers keep
the order. A product that is rounded or truncated to key k is at least the value of key k - 1.

Numba caches compiled code by each file's own date: remove ``__pycache__`` after changing this file.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

SUMS = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and infinity are preserved
_PREFETCH_DISTANCE = 24  # listed rows between the one in use and the one that is prefetched
_INVERTED = np.int32(0x7FFFFFFF)


# --- Tensors as arrays ---


def bits(rows: Tensor) -> np.ndarray:
    """View float32 rows as numpy floats, and bfloat16 ones, which numpy lacks, as uint16 bits."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def signed_bits(products: Tensor) -> np.ndarray:
    """View the bits of products as integers: bfloat16 as int16, float32 as int32."""
    return products.view(torch.int16 if products.dtype == torch.bfloat16 else torch.int32).numpy()


# --- Numbers and keys ---


@njit(cache=True, inline="always")
def ordered_bits(x):
    """Return a float32 as an int32 of the same order."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _INVERTED))


@njit(cache=True)
def key_of(x):
    """Return the largest key whose value is at most the float32 x."""
    return np.int16(ordered_bits(x) >> np.int32(16))


@njit(cache=True)
def value_of(key):
    """Return the bfloat16 number of a key, as float32."""
    ordered = np.int32(np.int32(key) << np.int32(16))
    return np.int32(ordered ^ ((ordered >> np.int32(31)) & _INVERTED)).view(np.float32)


def to_float32(x):
    """Return a float32, or a bfloat16 given by its bits, as float32."""
    return x


@overload(to_float32, inline="always")
def to_float32_compiled(x):
    """Choose the compiled :func:`to_float32` by the argument's type."""
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@njit(cache=True, inline="always")
def unsigned(index):
    """Return an unsigned index, which skips the check for negative ones."""
    return np.uint64(index)


# --- Rows of a table ---


@njit(cache=True, inline="always")
def row_at(table, row):
    """Return a row of a table; ``row`` is not negative."""
    return table[unsigned(row)]


@intrinsic
def prefetch(typing, array, row, column):
    """Load the cache line of an array's element without waiting for it."""

    def generate(context, builder, signature, arguments):
        values = context.make_array(array)(context, builder, arguments[0])
        address = cgutils.get_item_pointer(
            context, builder, array, values, arguments[1:], wraparound=False
        )
        byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, to_all_caches, data = int32(0), int32(3), int32(1)
        builder.call(function, [builder.bitcast(address, byte), to_read, to_all_caches, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@njit(cache=True, inline="always")
def prefetch_later_row(table, rows, c):
    """Prefetch a row that is listed some places after ``c``. Waiting for it would take as long as a
    hundred products."""
    row = np.int64(rows[min(c + _PREFETCH_DISTANCE, len(rows) - 1)])
    for d in range(0, table.shape[1], 64 // table.itemsize):
        prefetch(table, max(row, 0), d)  # pyright: ignore[reportCallIssue]
