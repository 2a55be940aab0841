"""Nearest rows, and sums over them, on processors: for the price of one pass in bfloat16.

1. From a sample of the bank a similarity is guessed for each query that its k-th neighbor reaches.
2. The bank streams by in tiles that stay in a core's cache. Products in bfloat16 (float32 where the
   processor has no units for it) leave a list of the rows that may reach the guess: the error of
   rounding is bounded by the lengths of what it took from queries and rows.
3. The k best of a list say what the k-th neighbor reaches for sure; the rows that may reach that
   are computed in float32, and the k best of them are the neighbors, if k of them reach what the
   list was made for. If not (the sample misled, or too many rows are alike) all rows are computed
   in float32.

Threads share out the rows of the bank in 2 and the queries in 3; the result does not depend on
their number. Each computes its products alone: torch's own threads wait for their next product by
spinning, and would take the cores from the loops between products.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_list_kernels as list_kernels
from . import cpu_search_kernels as kernels
from .searchable_bank import SearchableBank, not_finite_error
from .thread_pool import in_threads


class Sizes(NamedTuple):
    """What is held at a time. Tests shrink it, so that tiny banks have many tiles."""

    products: int = 1 << 19
    """Products held by a thread: one MiB of bfloat16, in a core's own cache or near it."""
    chunk: int = 4096
    """Rows of the bank that are read at a time for all queries of a thread."""
    batch: int = 512
    """Queries at a time."""
    sample: int = 16384
    """Most rows that a guess is made from."""
    least_sample: int = 2048
    """Fewest rows, if there are so many; between them a sixteenth of the bank."""
    spare: float = 4.0
    """Deviations of the sample's luck that a guess allows for."""


SIZES = Sizes()


# --- Nearest rows ---------------------------------------------------------------------------------


def nearest(
    queries: Tensor,
    bank: SearchableBank,
    k: int,
    at_least: Tensor | None = None,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``search.nearest``, for k < N, float32 queries, and a float32 or bfloat16 bank."""
    B, sizes = len(queries), sizes or SIZES
    if not B:
        return torch.empty(0, k, dtype=torch.int64), torch.empty(0, k)
    floor_B = queries.new_full((B,), -math.inf) if at_least is None else at_least.float()
    key = min(B, sizes.batch), k, torch.get_num_threads(), sizes
    hold = bank.workspace.pop(key, None) or _Hold(min(B, sizes.batch), k, bank, sizes)
    parts = []
    for start in range(0, B, sizes.batch):
        part = slice(start, start + sizes.batch)
        parts.append(_Batch(queries[part], floor_B[part].numpy(), bank, k, hold).search())
    bank.workspace = {key: hold}
    if len(parts) == 1:
        return parts[0]
    widest = max(rows.shape[1] for rows, _ in parts)
    rows_Bk = [F.pad(rows, (0, widest - rows.shape[1]), value=-1) for rows, _ in parts]
    sim_Bk = [F.pad(sim, (0, widest - sim.shape[1]), value=-math.inf) for _, sim in parts]
    return torch.cat(rows_Bk), torch.cat(sim_Bk)


class _Hold:
    """Memory that is used from batch to batch, and from search to search of a bank: fresh pages
    cost as much as the products."""

    def __init__(self, batch: int, k: int, bank: SearchableBank, sizes: Sizes) -> None:
        (N, D), self.sizes = bank.rows.shape, sizes
        self.stretch = -(-N // torch.get_num_threads())  # rows of the bank to a list and thread
        self.lists = -(-N // self.stretch)
        self.tile = max(1, min(self.stretch, sizes.products // batch))
        self.places = min(self.stretch, 2 * k + self.tile) + self.tile
        # Lists must not lie a power of two apart: they would share a cache's few places.
        self.rows = np.empty((batch, self.lists * self.places + 16), np.int32)
        self.keys = np.empty(self.rows.shape, np.int16)
        self.sim = np.empty(self.rows.shape, np.float32)
        numbers, rows = batch * self.tile, (self.tile, D)
        with torch.inference_mode(False):  # other threads write there, and later searches
            self.products = [
                torch.empty(numbers, dtype=bank.product_dtype) for _ in range(self.lists)
            ]
            self.rounded = [torch.empty(rows, dtype=bank.product_dtype) for _ in range(self.lists)]


class _Batch:
    """The search for one batch of queries; S lists each, shapes as in ``cpu_search_kernels``."""

    def __init__(
        self, queries: Tensor, floor_B: np.ndarray, bank: SearchableBank, k: int, hold: _Hold
    ) -> None:
        self.queries, self.floor_B, self.bank, self.k, self.hold = queries, floor_B, bank, k, hold
        self.coarse = queries.to(bank.product_dtype)
        self.length_B = queries.norm(dim=1).numpy()
        self.lost_B = (queries - self.coarse.float()).norm(dim=1).numpy()
        self.shift = 0 if bank.product_dtype == torch.bfloat16 else 16

    def search(self) -> tuple[Tensor, Tensor]:
        """Rows and similarities, in as many places as the fullest line needs, k at most."""
        hold, k, B, N = self.hold, self.k, len(self.queries), len(self.bank.rows)
        least_B = self.floor_B.copy()  # what ranks have agreed on beats a guess
        if not np.isfinite(least_B).all():
            least_B = np.maximum(self._guess(), least_B)
        least_SB = np.tile(least_B, (hold.lists, 1))
        count_SB = np.zeros((hold.lists, B), np.int64)

        def stream(part: range) -> np.ndarray:
            s = part.start // hold.stretch
            return self._stream(part, s, least_SB[s], count_SB[s])

        margin_B, count_B = np.max(in_threads(stream, N), axis=0), np.empty(B, np.int64)
        chunk = hold.sizes.chunk
        of_bank = chunk, self.queries.numpy(), bits(self.bank.rows)
        misled_B, limited = np.empty(B, np.bool_), bool((self.floor_B > -math.inf).any())
        found = _places(B, k)

        def choose(part: range) -> None:
            rows, sim = (each.numpy() for each in found)
            kernels.choose(part.start, part.stop, k, hold.rows, count_B, hold.sim, rows, sim)

        def finish(part: range) -> None:
            of, lists = (part.start, part.stop), (hold.rows, count_B, hold.sim)
            kernels.join(
                *(*of, k, margin_B, hold.places, least_SB),
                *(hold.rows, hold.keys, count_SB, least_B, count_B),
            )
            kernels.rescore(*of, *of_bank, *lists)
            kernels.judge(*of, k, self.floor_B, least_B, count_B, hold.sim, misled_B)
            kernels.search_whole(*of, k, chunk, misled_B, *of_bank[1:], *lists)
            if limited:
                kernels.drop_lower(*of, self.floor_B, *lists)
            else:
                choose(part)

        in_threads(finish, B)
        if limited:
            found = _places(B, min(k, int(count_B.max())))
            in_threads(choose, B)
        return found

    def _guess(self) -> np.ndarray:
        """A similarity [B] that somewhat more than k rows should reach."""
        N, sizes = len(self.bank.rows), self.hold.sizes
        size = min(N, max(sizes.least_sample, min(N // 16, sizes.sample)))
        share = self.k * size / N
        rank = max(1, math.ceil(share + sizes.spare * (1 + math.sqrt(share))))
        if rank > size:
            return np.full(len(self.queries), -np.inf, np.float32)
        return sample_threshold(self.coarse, self.bank, rank, size).numpy()

    def _stream(self, part: range, s: int, least_B: np.ndarray, count_B: np.ndarray) -> np.ndarray:
        """Make the lists of one stretch of the bank; returns the largest margin [B] there."""
        hold, B = self.hold, len(self.queries)
        at, worst_B = s * hold.places, np.zeros(B, np.float32)
        for start in range(part.start, part.stop, hold.tile):
            end = min(part.stop, start + hold.tile)
            rows, bounds = _tile(self.bank, start, end, hold.rounded[s])
            margin_B = self._margin(*bounds)
            worst_B = np.maximum(worst_B, margin_B)
            sim_BT = hold.products[s][: B * len(rows)].view(B, len(rows))
            torch.mm(self.coarse, rows.T, out=sim_BT)
            kernels.collect(
                *(signed_bits(sim_BT), self.shift, start, self.k, margin_B, worst_B, least_B),
                *(hold.rows, hold.keys, at, at + hold.places, count_B),
            )
        return worst_B

    def _margin(self, lost: float, longest: float) -> np.ndarray:
        """How far [B] a product can lie from the true similarity, before it is rounded itself.

        |q.b - q'.b'| <= |q - q'| |b| + |q'| |b - b'|, and the sums of D products in float32.
        """
        sums = 2 * self.queries.shape[1] * 2.0**-23 * longest
        margin_B = self.lost_B * longest + (self.length_B + self.lost_B) * (lost + sums)
        return (margin_B * (1 + 2**-10)).astype(np.float32)


def _tile(
    bank: SearchableBank, start: int, end: int, out: Tensor
) -> tuple[Tensor, tuple[float, float]]:
    """Rows of the bank in the type of products, and the bounds of :class:`SearchableBank` for them."""
    if bank.row_bounds is not None and bank.rounded is not None:
        return bank.rounded[start:end], bank.row_bounds
    rows = bank.rows[start:end]
    coarse = rows if rows.dtype == bank.product_dtype else out[: end - start]
    if coarse.dtype == torch.bfloat16 and coarse is not rows:
        lost, longest = kernels.round_rows(rows.numpy(), bits(coarse))
    else:
        lost, longest = 0.0, kernels.longest_row(bits(rows))
        if coarse is not rows:
            coarse.copy_(rows)
    if not math.isfinite(lost + longest):
        raise not_finite_error()
    return coarse, (math.sqrt(lost), math.sqrt(longest))


def _places(B: int, k: int) -> tuple[Tensor, Tensor]:
    """For rows and similarities."""
    return torch.empty(B, k, dtype=torch.int64), torch.empty(B, k)


def sample_threshold(queries: Tensor, bank: SearchableBank, rank: int, sample: int) -> Tensor:
    """As ``search.sample_threshold``."""
    rows = bank.sample_rows(sample)
    coarse, guess_B = queries.to(bank.product_dtype), torch.empty(len(queries))

    def of_queries(part: range) -> None:
        sim_BT = torch.mm(coarse[part.start : part.stop], rows.T)
        shift = 16 * (sim_BT.element_size() == 4)
        kernels.sample_thresholds(signed_bits(sim_BT), shift, rank, part.start, guess_B.numpy())

    in_threads(of_queries, len(queries))
    return guess_B


def compact_lists(rows: Tensor, similarity: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """As ``search.compact_lists``."""
    to_rows, to_sim = _places(len(rows), int(kept.sum(dim=1).max()))
    lists = [each.numpy() for each in (rows, similarity, kept, to_rows, to_sim)]
    in_threads(lambda part: list_kernels.compact(part.start, part.stop, *lists), len(rows))
    return to_rows, to_sim


def offsets(value: Tensor, low: Tensor) -> Tensor:
    """As ``topk.offsets``, of float32."""
    offset_BC = torch.empty(value.shape, dtype=torch.int32)
    arguments = value.numpy(), low.numpy(), offset_BC.numpy()
    in_threads(lambda part: list_kernels.offsets(part.start, part.stop, *arguments), len(value))
    return offset_BC


def count_digits(offset: Tensor, known: int, prefix: Tensor, shift: int, digits: int) -> Tensor:
    """As ``topk.count_digits``, of what :func:`offsets` returns."""
    counts_BG = torch.zeros(len(offset), digits, dtype=torch.int32)
    arguments = offset.numpy(), np.int32(known), prefix.numpy(), np.int32(shift), counts_BG.numpy()
    in_threads(
        lambda part: list_kernels.count_digits(part.start, part.stop, *arguments), len(offset)
    )
    return counts_BG


# --- What the objectives need of the rows found ---------------------------------------------------


def close_rows(labels: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """As ``search.close_rows``."""
    close_BK = torch.empty(rows.shape, dtype=torch.bool)
    own_BH = own.T.contiguous()
    arguments = labels.T.numpy(), own_BH.numpy(), rows.numpy(), close_BK.numpy()
    in_threads(lambda part: list_kernels.mark_close(part.start, part.stop, *arguments), len(rows))
    return close_BK


def similarities(queries: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """v_i . M_j for listed rows j: float32 [B, K]."""
    sim_BK, count_B = torch.empty(rows.shape), np.full(len(rows), rows.shape[1])
    arguments = SIZES.chunk, queries.numpy(), bits(bank), rows.numpy(), count_B, sim_BK.numpy()
    in_threads(lambda part: kernels.rescore(part.start, part.stop, *arguments), len(rows))
    return sim_BK


def weigh_rows(bank: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """sum_k weight_ik M_[rows_ik]: float32 [B, D]."""
    sum_BD = torch.empty(len(rows), bank.shape[1])
    in_threads(lambda part: _weigh(part, bank, rows, weight, sum_BD), len(rows))
    return sum_BD


def _weigh(part: range, bank: Tensor, rows: Tensor, weight: Tensor, sum_BD: Tensor) -> None:
    some = slice(part.start, part.stop)
    if bank.dtype == torch.float32:
        options = {"per_sample_weights": weight[some], "mode": "sum"}
        # By numpy: torch refuses where the caller is in inference mode, as this thread is not.
        sum_BD.numpy()[some] = F.embedding_bag(rows[some], bank, **options).numpy()
    else:
        arguments = SIZES.chunk, bits(bank), rows.numpy(), weight.numpy(), sum_BD.numpy()
        list_kernels.weigh_rows(part.start, part.stop, *arguments)


def exponential_sums(
    similarity: Tensor, inside: Tensor, largest: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``search.exponential_sums``."""
    weight_BC = torch.empty(similarity.shape)
    sums_2B = torch.empty(2, len(similarity), dtype=torch.float64)

    def of_queries(part: range) -> None:
        some = slice(part.start, part.stop)
        sim_bC, weight_bC = similarity.numpy()[some], weight_BC.numpy()[some]
        top_b1 = (
            sim_bC.max(axis=1, keepdims=True) if largest is None else largest.numpy()[some, None]
        )
        np.subtract(sim_bC, top_b1, out=weight_bC)
        weight_bC /= np.float32(temperature)
        np.exp(weight_bC, out=weight_bC)  # numpy's runs in vectors
        arguments = weight_BC.numpy(), inside.numpy(), sums_2B.numpy()
        list_kernels.sum_inside_and_outside(part.start, part.stop, *arguments)

    in_threads(of_queries, len(similarity))
    return weight_BC, sums_2B


def weigh_split_rows(
    bank: Tensor, rows: Tensor, weight: Tensor, inside: Tensor, scale: Tensor, other_scale: Tensor
) -> Tensor:
    """See ``search.weigh_split_rows``."""
    sum_BD = torch.empty(len(rows), bank.shape[1])
    arguments = inside.numpy(), scale.numpy(), other_scale.numpy(), weight.numpy()

    def of_queries(part: range) -> None:
        list_kernels.scale_inside_and_outside(part.start, part.stop, *arguments)
        _weigh(part, bank, rows, weight, sum_BD)

    in_threads(of_queries, len(rows))
    return sum_BD


# --- Plumbing -------------------------------------------------------------------------------------


def bits(rows: Tensor) -> np.ndarray:
    """float32 rows as they are, bfloat16 ones, which numpy has not, by their bits."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def signed_bits(products: Tensor) -> np.ndarray:
    """The bits of products as integers: int16 of bfloat16, int32 of float32."""
    return products.view(torch.int16 if products.dtype == torch.bfloat16 else torch.int32).numpy()


def compile_all() -> None:
    """Compile what a float32 bank needs, or load it from the cache beside the source.

    Raises:
        Exception: whatever keeps numba from it.
    """
    rows = torch.eye(4)
    found, sim = nearest(rows, SearchableBank(rows), 2)
    labels = torch.zeros(1, 4, dtype=torch.int32)
    close = close_rows(labels, labels, found)
    weight, (inside, outside) = exponential_sums(sim, close, None, 1.0)
    weigh_split_rows(rows, found, weight, close, inside, outside)
