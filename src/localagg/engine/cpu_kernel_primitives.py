"""What the compiled loops share: numbers and their keys, places in arrays, memory asked ahead.

A *key* is a number's place in the order of all bfloat16 numbers: its upper 16 bits as an integer,
those of negative numbers turned around. Keys of rounded and of cut-off float32 numbers keep the
order, and a product that rounds or cuts to key k is at least the number of key k - 1.

Numba keeps compiled code for each file by that file's date: who changes this one removes
``__pycache__``.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

SUMS = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and infinity stay what they are
_FAR = 24  # listed rows between the one in use and the one that memory is asked for
_TURN = np.int32(0x7FFFFFFF)


# --- Numbers and keys ---


@njit(cache=True, inline="always")
def ordered_bits(x):
    """A float32 as int32 in the same order."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _TURN))


@njit(cache=True)
def key_of(x):
    """The largest key whose number is at most the float32 x."""
    return np.int16(ordered_bits(x) >> np.int32(16))


@njit(cache=True)
def number_of(key):
    """The bfloat16 number of a key, as float32."""
    ordered = np.int32(np.int32(key) << np.int32(16))
    return np.int32(ordered ^ ((ordered >> np.int32(31)) & _TURN)).view(np.float32)


def wide(x):
    """A float32, or a bfloat16 given by its bits, as float32."""
    return x


@overload(wide, inline="always")
def wide_of_type(x):
    """:func:`wide`, chosen by type when a loop is compiled."""
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@njit(cache=True, inline="always")
def unsigned(place):
    """A place in an array, unsigned: that none counts from the end need not be looked at."""
    return np.uint64(place)


# --- Rows of a table ---


@njit(cache=True, inline="always")
def row_of(bank_ND, row):
    """A row by its number, which is not negative."""
    return bank_ND[unsigned(row)]


@intrinsic
def prefetch(typing, array, row, column):
    """Ask memory for the line that holds a number of an array, and do not wait for it."""

    def generate(context, builder, signature, arguments):
        values = context.make_array(array)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(
            context, builder, array, values, arguments[1:], wraparound=False
        )
        byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, to_all_caches, data = int32(0), int32(3), int32(1)
        builder.call(function, [builder.bitcast(place, byte), to_read, to_all_caches, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@njit(cache=True, inline="always")
def ahead(table, rows, c):
    """Ask for a listed row of a table that will be needed soon. Without, each would be waited for
    as long as a hundred products take."""
    row = np.int64(rows[min(c + _FAR, len(rows) - 1)])
    for d in range(0, table.shape[1], 64 // table.itemsize):
        prefetch(table, max(row, 0), d)  # pyright: ignore[reportCallIssue]
