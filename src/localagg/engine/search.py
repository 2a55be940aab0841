"""Search a bank for the nearest rows, and sum over them, in one pass and without a B x N array.

Three back-ends stand behind these functions: compiled loops for CPUs (``cpu_backend``), kernels
for NVIDIA GPUs (``cuda_backend``), and plain torch (``torch_backend``). All are exact: they find
the same rows, up to similarities that differ by less than the rounding of float32.

Legend of shape suffixes: B queries, N rows of the bank, D embedding size, K neighbors,
H clusterings.
"""

import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from ..io.console import notify
from . import SETTINGS, torch_backend
from .searchable_bank import SearchableBank, not_finite_error

_SLOW_SECONDS = 5.0  # loading compiled loops takes less, compiling them more

# --- Nearest rows ---------------------------------------------------------------------------------


def nearest(
    queries: Tensor, bank: Tensor | SearchableBank, k: int, *, at_least: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the K rows with the largest dot product with each query, exactly.

    Equal similarities (float32, summed in one order for all rows) go to the lowest rows. The search
    needs about 30 MiB and [B, K] arrays whatever N is. With several ranks each searches its own
    rows, and ``at_least`` saves it the search for rows that cannot be among the K of all ranks.

    Args:
        queries: [B, D].
        bank: [N, D] of any floating dtype; a SearchableBank is faster if searched repeatedly.
        k: K >= 1; more than N gives all N rows.
        at_least: float [B]; rows of lower similarity are skipped, up to rounding.

    Returns:
        (rows, similarity): int64 and float32 (or the common dtype, if wider) [B, min(K, N)],
        without gradient, in no promised order. With ``at_least`` lines are as long as the longest
        needs; unused places come last and hold row -1 and similarity -inf.

    Raises:
        UserError: on a CPU, values that are not finite.
    """
    prepared = bank if isinstance(bank, SearchableBank) else SearchableBank(bank, copy=False)
    rows_ND, queries = prepared.refresh().rows, queries.detach()
    if queries.device.type == "cpu" and not queries.isfinite().all():
        raise not_finite_error()
    if k < len(rows_ND) and (compiled := cpu_backend_for(rows_ND, queries)):
        return compiled.nearest(_single(queries), prepared, k, at_least)
    if gpu := cuda_backend_for(rows_ND):
        options = {"bank_low": prepared.rounded, "threshold": at_least}
        rows_BK, sim_BK = gpu.top_rows(queries, rows_ND, k, **options)
    else:
        rows_BK, sim_BK = torch_backend.nearest(queries, rows_ND, k)
    if queries.device.type == "cpu" and not sim_BK.isfinite().all():
        raise not_finite_error()  # NaN counts as the largest
    if at_least is None:
        return rows_BK, sim_BK
    return compact_lists(rows_BK, sim_BK, (sim_BK >= at_least.unsqueeze(1)) & (rows_BK >= 0))


def sample_threshold(queries: Tensor, bank: SearchableBank, rank: int, sample: int) -> Tensor:
    """Return a similarity [B] that about ``rank`` of ``sample`` evenly spaced rows reach.

    Its precision is that of bfloat16. A sample may mislead by any amount.

    Args:
        queries: [B, D].
        bank: the rows.
        rank: 1..sample.
        sample: 1..N.
    """
    rows_ND = bank.refresh().rows
    if compiled := cpu_backend_for(rows_ND, queries):
        return compiled.sample_threshold(_single(queries), bank, rank, sample)
    return torch_backend.sample_threshold(queries.detach(), bank, rank, sample)


def compact_lists(rows: Tensor, similarity: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept rows of each line, in order, in lines as long as the longest needs.

    Unused places come last and hold row -1 and similarity -inf.

    Args:
        rows: int64 [B, K].
        similarity: float [B, K].
        kept: bool [B, K].
    """
    engine = cpu_backend_for(similarity.flatten()) or torch_backend
    return engine.compact_lists(rows, similarity, kept)


def sort_by_similarity(rows: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the result of :func:`nearest`: most similar rows first, equal ones by row."""
    rows, row_order = rows.sort(dim=1)
    similarity, by_similarity = torch.sort(
        similarity.gather(1, row_order), dim=1, descending=True, stable=True
    )
    return rows.gather(1, by_similarity), similarity


def store_by_row(labels: Tensor) -> Tensor:
    """Return the same [H, N] labels, those of one row adjacent in memory: one read for all H."""
    return labels.T.contiguous().T


# --- Sums over listed rows, for the objectives ----------------------------------------------------


def close_rows(labels: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return which rows share a cluster with the sample in any clustering.

    Args:
        labels: int [H, N]; fastest from :func:`store_by_row`.
        own: the samples' labels, of the same type [H, B].
        rows: int64 [B, K]; -1 is never close.

    Returns:
        bool [B, K].
    """
    if engine := cuda_backend_for(labels) or cpu_backend_for(labels.T):
        return engine.close_rows(labels, own, rows)
    close_BK = torch.zeros_like(rows, dtype=torch.bool)
    for labels_N, own_B in zip(labels, own, strict=True):
        close_BK |= labels_N[rows] == own_B.unsqueeze(1)
    return close_BK & (rows >= 0)


def similarities(
    embedding: Tensor, bank: Tensor, rows: Tensor, known: Tensor | None = None
) -> Tensor:
    """Return v_i . M_j for listed rows j, differentiable in the embedding, without [B, K, D].

    Args:
        embedding: [B, D], at least float32.
        bank: [N, D].
        rows: int64 [B, K].
        known: the similarities [B, K], if they are; they are trusted.

    Returns:
        [B, K].
    """
    return _RowSimilarity.apply(embedding, bank, rows, known)


def weigh_rows(bank: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k weight_ik M_[rows_ik], without gradient.

    Args:
        bank: [N, D].
        rows: int64 [B, K], 0..N-1.
        weight: [B, K], at least float32.

    Returns:
        [B, D] in the weights' type.
    """
    if not rows.shape[1]:
        return weight.new_zeros(len(rows), bank.shape[1])
    if compiled := cpu_backend_for(bank, weight):
        return compiled.weigh_rows(bank, rows, _single(weight))
    return torch_backend.weigh_rows(bank, rows, weight)


def exponential_sums(
    similarity: Tensor, inside: Tensor, largest: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return exp((similarity - largest) / t), and its sums inside and outside of a set.

    Args:
        similarity: float [B, C].
        inside: bool [B, C].
        largest: [B], at least each similarity of a line. Default: the largest of the line.
        temperature: t > 0.

    Returns:
        (exponentials [B, C] in the type of ``similarity``, sums [2, B] in float64).
    """
    if compiled := cpu_backend_for(similarity.flatten()):
        return compiled.exponential_sums(similarity, inside, largest, temperature)
    return torch_backend.exponential_sums(similarity, inside, largest, temperature)


def weigh_split_rows(
    bank: Tensor, rows: Tensor, weight: Tensor, inside: Tensor, scale: Tensor, other_scale: Tensor
) -> Tensor:
    """Return sum_k s_ik weight_ik M_[rows_ik], s_i ``scale`` inside of a set, else ``other_scale``.

    Args:
        bank: [N, D].
        rows: int64 [B, C], 0..N-1.
        weight: [B, C], at least float32. Its values are overwritten.
        inside: bool [B, C].
        scale: float64 [B].
        other_scale: float64 [B].

    Returns:
        [B, D] in the weights' type.
    """
    if rows.shape[1] and (compiled := cpu_backend_for(bank, weight)):
        return compiled.weigh_split_rows(bank, rows, weight, inside, scale, other_scale)
    scales = (each.to(weight.dtype).unsqueeze(1) for each in (scale, other_scale))
    return weigh_rows(bank, rows, weight.mul_(torch.where(inside, *scales)))


def with_gradient(embedding: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return ``value`` [B] with ``gradient`` [B, D] as its gradient in ``embedding``."""
    return _WithGradient.apply(embedding, value, gradient)


def log_partition(
    embedding: Tensor, bank: SearchableBank, temperature: float, *, rounded: bool = False
) -> Tensor:
    """Return log sum_j exp(v . M_j / t) [B]; its gradient is the softmax-weighted mean row over t.

    One pass: log-sum-exp and weighted mean are carried from tile to tile with a running maximum.

    Args:
        embedding: [B, D], at least float32.
        bank: [N, D]. Without rows the value is -inf and the gradient 0.
        temperature: t > 0.
        rounded: multiply in bfloat16 where that is faster (:func:`rounded_softmax_backend`); see
            ``cpu_list_kernels`` for the bound of the error.

    Returns:
        [B], differentiable in the embedding.
    """
    rows = bank.rows
    with torch.no_grad():
        if not len(rows):
            log_Z_B = torch.full_like(embedding[:, 0], -torch.inf)
            mean_BD = torch.zeros_like(embedding)
        elif gpu := cuda_backend_for(rows, most=256):
            log_Z_B, mean_BD = gpu.log_partition(embedding, rows, temperature)
        elif (
            rounded
            and embedding.dtype == torch.float32
            and (compiled := rounded_softmax_backend(bank))
        ):
            log_Z_B, mean_BD = compiled.log_partition(embedding / temperature, bank)
        else:
            log_Z_B, mean_BD = torch_backend.log_partition(
                embedding, rows, temperature, SETTINGS.softmax_tile_bytes
            )
    return _WithGradient.apply(embedding, log_Z_B, mean_BD / temperature)


def rounded_softmax_backend(bank: SearchableBank) -> ModuleType | None:
    """Return the CPU backend if a softmax over these rows is faster in bfloat16, or None."""
    rows = bank.rows
    low = bank.product_dtype == torch.bfloat16 and rows.dtype == torch.float32
    return cpu_backend_for(rows) if low and rows.is_contiguous() else None


# --- Choice of the backend ------------------------------------------------------------------------


def missing_backend_note(rows: Tensor) -> str | None:
    """Return a sentence for the user if the fast backend of this device cannot run, or None."""
    if rows.device.type == "cpu" and len(rows) >= SETTINGS.min_compiled_rows:
        return load_cpu_backend()[1]
    return load_cuda_backend()[1] if rows.device.type == "cuda" else None


def estimate_search_bytes(bank: SearchableBank, size: int, batch: int, neighbors: int) -> int:
    """Estimate the bytes of an LA step beyond a bank of ``size`` such rows: copy, tiles, lists."""
    copied = 0 if bank.product_dtype == bank.rows.dtype else bank.product_dtype.itemsize
    listed = batch * min(neighbors, size)
    threads = torch.get_num_threads() if bank.rows.device.type == "cpu" else 1
    # A thread lists 10 bytes for each of 2 (K + a tile) places; an answer takes 24 a neighbor.
    return size * bank.rows.shape[1] * copied + threads * ((12 << 20) + 20 * listed) + 24 * listed


def cpu_backend_for(rows: Tensor, queries: Tensor | None = None) -> ModuleType | None:
    """Return the compiled CPU backend if it runs here and is faster for these tensors."""
    types = (torch.float32, torch.bfloat16, torch.int32, torch.int64)
    fits = (
        rows.device.type == "cpu"
        and rows.dtype in types
        and len(rows) >= SETTINGS.min_compiled_rows
    )
    if queries is not None:
        fits = fits and rows.is_contiguous() and queries.dtype in (torch.float32, torch.bfloat16)
    return load_cpu_backend()[0] if fits else None


def cuda_backend_for(rows: Tensor, most: int = 512) -> ModuleType | None:
    """Return the CUDA backend if it runs here and rows have at most ``most`` numbers."""
    if rows.device.type != "cuda" or rows.dtype == torch.float64:
        return None
    return load_cuda_backend()[0] if rows.shape[1] <= most or not rows.is_floating_point() else None


@cache
def load_cpu_backend() -> tuple[ModuleType | None, str | None]:
    """Return the compiled CPU backend, or None and the reason."""
    text = "Compiling the search for this CPU, once; this takes up to a minute."
    slow = threading.Timer(_SLOW_SECONDS, notify, [text])
    slow.daemon = True
    slow.start()
    try:
        from . import cpu_backend

        cpu_backend.compile_all()
        return cpu_backend, None
    except Exception as error:  # numba, LLVM or the cache folder failed
        return None, _cannot("numba", error)
    finally:
        slow.cancel()


@cache
def load_cuda_backend() -> tuple[ModuleType | None, str | None]:
    """Return the Triton backend, or None and the reason."""
    try:
        from . import cuda_backend

        return cuda_backend, None
    except Exception as error:
        return None, _cannot("triton", error)


def _cannot(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{name} does not run here ({reason[0]}); torch alone searches neighbors, which takes"
        " several times as long."
    )


# --- Plumbing -------------------------------------------------------------------------------------


def _single(embedding: Tensor) -> Tensor:
    return embedding.detach().to(torch.float32).contiguous()


class _WithGradient(Function):
    """A value [B] whose gradient [B, D] is already known."""

    @staticmethod
    def forward(ctx, embedding: Tensor, value_B: Tensor, gradient_BD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_BD)
        return value_B.clone()

    @staticmethod
    def backward(ctx, grad_B: Tensor):
        (gradient_BD,) = ctx.saved_tensors
        return grad_B.unsqueeze(1) * gradient_BD, None, None


class _RowSimilarity(Function):
    @staticmethod
    def forward(ctx, embedding: Tensor, bank: Tensor, rows: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(bank, rows)
        if known is not None:
            return known.to(embedding.dtype, copy=True)
        if compiled := cpu_backend_for(bank, embedding):
            return compiled.similarities(_single(embedding), bank, rows)
        return torch_backend.similarities(embedding, bank, rows)

    @staticmethod
    def backward(ctx, grad_BK: Tensor):
        bank, rows = ctx.saved_tensors
        return weigh_rows(bank, rows, grad_BK), None, None, None
