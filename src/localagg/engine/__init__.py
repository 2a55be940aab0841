"""Exact nearest rows of a memory bank, sums over rows, and k-means; ``search`` is the front."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Settings:
    """Sizes and choices of the engine. Tests shrink tiles, so that tiny banks have many.

    No setting changes a result, up to the order of float32 sums.
    """

    # CPU
    min_compiled_rows: int = 4096  # bank rows from which compiled loops are used; torch alone below
    bfloat16_products: bool | None = None  # default: if the CPU has units for it
    tile_products: int = 1 << 19  # of a thread: 1 MiB in bfloat16, the size of a core's own cache
    chunk_rows: int = 4096  # bank rows that are read for all queries of a thread before the next
    batch_queries: int = 512  # queries searched at a time
    max_sample_rows: int = 16384  # most bank rows that a first threshold is estimated from
    min_sample_rows: int = 2048  # fewest; in between, a sixteenth of the bank
    sample_deviations: float = 4.0  # of the sample's count, by which the threshold is lowered

    # torch alone
    torch_tile_bytes: int = 32 << 20  # of similarities; top-k costs per tile, so tiles are large
    softmax_tile_bytes: int = 1 << 20  # of a thread in the exact softmax, in a core's cache

    # GPU
    gpu_sample_rows: int = 32768  # for the thresholds: some 100 of them are among the K best
    gpu_min_candidates: int = 8192  # fewest places in a query's candidate list
    gpu_query_block: int = 128  # queries of one product; more read the bank again
    gpu_tile_rows: int = 64  # bank rows of one product
    gpu_scan_rows: int = 256  # bank rows at a time where one program searches the whole bank
    gpu_list_block: int = 8192  # candidates that a program holds in registers
    gpu_label_block: int = 512  # listed rows of a program that compares cluster labels

    @contextlib.contextmanager
    def changed(self, **values: object) -> Iterator[None]:
        """Use other values within a ``with`` block, in all threads."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


SETTINGS = Settings()
