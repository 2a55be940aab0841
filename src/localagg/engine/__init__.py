"""Exact nearest rows of a memory bank, sums over rows, and k-means; ``search`` is the front."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Settings:
    """Sizes and choices of the engine. Tests shrink tiles, so that tiny banks have many.

    No setting changes a result, up to the order of float32 sums.
    """

    # --- CPU ---
    min_compiled_rows: int = 4096
    """Bank rows from which compiled loops are used. Below, torch alone is as fast."""
    bfloat16_products: bool | None = None
    """Multiply in bfloat16 first. Default: if the processor has units for bfloat16."""
    tile_products: int = 1 << 19
    """Products of a thread's tile: 1 MiB in bfloat16, the size of a core's own cache."""
    chunk_rows: int = 4096
    """Bank rows that are read for all queries of a thread before the next ones."""
    batch_queries: int = 512
    """Queries searched at a time."""
    max_sample_rows: int = 16384
    """Most bank rows that a query's first threshold is estimated from."""
    min_sample_rows: int = 2048
    """Fewest such rows; in between, a sixteenth of the bank."""
    sample_deviations: float = 4.0
    """Standard deviations of the sample's count that the threshold is lowered by."""

    # --- torch alone ---
    torch_tile_bytes: int = 32 << 20
    """Bytes of a tile of similarities. The cost of top-k is per tile, so that tiles are large."""
    softmax_tile_bytes: int = 1 << 20
    """Bytes of a thread's tile in the exact softmax, in a core's cache."""

    # --- GPU ---
    gpu_sample_rows: int = 32768
    """Sampled rows that set the thresholds: some 100 of them are among the K best."""
    gpu_min_candidates: int = 8192
    """Fewest places in a query's candidate list."""
    gpu_query_block: int = 128
    """Queries of one product; more of them read the bank again."""
    gpu_tile_rows: int = 64
    """Bank rows of one product."""
    gpu_scan_rows: int = 256
    """Bank rows at a time where one program searches the whole bank."""
    gpu_list_block: int = 8192
    """Candidates that a program holds in registers."""
    gpu_label_block: int = 512
    """Listed rows of a program that compares cluster labels."""

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
