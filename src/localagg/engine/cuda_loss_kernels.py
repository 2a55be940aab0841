"""Triton kernels of the losses on a GPU: the exact softmax over the bank, and LA over its lists.

Legend as in ``objectives``: B batch, N bank rows, D embedding size, K background neighbors,
H clusterings, t temperature; P programs that share a sum. A second kernel adds their parts in a
fixed order, so that results do not change from run to run.

Exponentials are powers of two of similarity / t / ln 2, relative to the largest one so far.
"""

# Triton's compiler has its own types, and launches take options that signatures lack.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import SETTINGS

# Softmax weights are multiplied by 2**15 before they are rounded to float16: the largest is then
# 32,768, and small ones lose less than 2**-40 of it.
_LIFT = tl.constexpr(15.0)
_LN_2 = tl.constexpr(math.log(2))
_PARTITION_TILE = 64


# --- log sum_j exp(v . M_j / t), and the softmax-weighted mean row --------------------------------


@torch.no_grad()
def log_partition(embedding: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return each query's log Z over the bank and its mean row; mean / t is the gradient of log Z.

    log Z_i = log sum_j exp(v_i . M_j / t); mean_i = sum_j softmax_j(v_i . M_j / t) M_j, in one pass
    over the bank. float16 tensor cores multiply factors that are split into two float16 numbers,
    for some 22 bits; sums are float32. Entries of 65,504 and more (unit rows have none) and NaN
    give NaN. Extra memory: P x B x (D + 2) float32 with P the number of processors: 8.7 MB at
    B = D = 128 on 132 processors, for any N.

    Args:
        embedding: [B, D], any floating dtype.
        bank: float32, bfloat16 or float16 [N, D] with contiguous rows; N >= 1; D at most 256.
        temperature: t > 0.

    Returns:
        (log_Z, mean): float32 [B] and [B, D].
    """
    (B, D), N, device = embedding.shape, len(bank), bank.device
    embedding = embedding.float().contiguous()
    log_Z_B = torch.empty(B, device=device)
    mean_BD = torch.empty(B, D, device=device)
    if not B:
        return log_Z_B, mean_BD
    tile = _PARTITION_TILE if D <= 128 else 32
    P = min(triton.cdiv(N, tile), processors(device))
    top_PB, total_PB = torch.empty(2, P, B, device=device)
    sum_PBD = torch.empty(P, B, D, device=device)
    block_B = max(16, min(128 if D <= 128 else 64, triton.next_power_of_2(B)))
    block_D = max(16, triton.next_power_of_2(D))
    with torch.cuda.device_of(bank):
        _partition_pass[(P, triton.cdiv(B, block_B))](
            embedding, bank, top_PB, total_PB, sum_PBD, B, N, bank.stride(0),
            1 / (temperature * math.log(2)), D=D, TILE=tile, BLOCK_B=block_B, BLOCK_D=block_D,
            SPLIT=bank.dtype == torch.float32, num_warps=8,
        )  # fmt: skip
        _partition_sum[(B,)](
            top_PB, total_PB, sum_PBD, log_Z_B, mean_BD, B, P, D=D, BLOCK_D=block_D,
            BLOCK_P=triton.next_power_of_2(P), num_warps=4,
        )  # fmt: skip
    return log_Z_B, mean_BD


@triton.jit
def _partition_pass(
    embedding_ptr, bank_ptr, top_ptr, total_ptr, sum_ptr, B, N, stride, scale,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Compute one program's largest exponent, sum of weights and weighted sum of rows."""
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    there = (b < B)[:, None] & (d < D)[None, :]
    v = tl.load(embedding_ptr + b[:, None] * D + d[None, :], mask=there, other=0.0)
    v_high = v.to(tl.float16)
    v_rest = (v - v_high.to(tl.float32)).to(tl.float16)
    top = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_B], dtype=tl.float32)
    mean = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in tl.range(tl.program_id(0) * TILE, N, tl.num_programs(0) * TILE, num_stages=2):
        row = start + tl.arange(0, TILE)
        where = bank_ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
        rows = tl.load(where, mask=(row < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        high = rows.to(tl.float16)
        sim = tl.dot(v_high, tl.trans(high))
        sim = tl.dot(v_rest, tl.trans(high), sim)
        rest = (rows - high.to(tl.float32)).to(tl.float16)
        if SPLIT:  # 16-bit rows have no rest
            sim = tl.dot(v_high, tl.trans(rest), sim)
        sim = tl.where((row < N)[None, :], sim * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(sim, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(sim - new_top[:, None] + _LIFT)
        total = total * shrink + tl.sum(weight, 1)
        weight_high = weight.to(tl.float16)
        weight_rest = (weight - weight_high.to(tl.float32)).to(tl.float16)
        mean = tl.dot(weight_high, high, mean * shrink[:, None])
        mean = tl.dot(weight_rest, high, mean)
        if SPLIT:
            mean = tl.dot(weight_high, rest, mean)
        top = new_top
    at = tl.program_id(0) * B + b
    tl.store(top_ptr + at, top, mask=b < B)
    tl.store(total_ptr + at, total, mask=b < B)
    tl.store(sum_ptr + at.to(tl.int64)[:, None] * D + d[None, :], mean, mask=there)


@triton.jit
def _partition_sum(
    top_ptr, total_ptr, sum_ptr, log_Z_ptr, mean_ptr, B, P,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query."""
    b = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    top = tl.load(top_ptr + p * B + b, mask=p < P, other=float("-inf"))
    highest = tl.max(top, 0)
    total = tl.sum(tl.load(total_ptr + p * B + b, mask=p < P, other=0.0) * tl.exp2(top - highest))
    tl.store(log_Z_ptr + b, (highest - _LIFT + tl.log2(total)) * _LN_2)
    mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    for part in range(P):
        at = part * B + b
        part_sum = tl.load(sum_ptr + at.to(tl.int64) * D + d, mask=d < D, other=0.0)
        mean += part_sum * tl.exp2(tl.load(top_ptr + at) - highest)
    tl.store(mean_ptr + b * D + d, mean / total, mask=d < D)


# --- LA over the listed rows: loss and gradient in one gather -------------------------------------


@torch.no_grad()
def close_rows(labels: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return which rows share a cluster with the sample, in one launch for all clusterings.

    Args:
        labels: int [H, N]. A transposed view of a contiguous [N, H] is several times as fast,
            because a row's labels are read together.
        own: the samples' labels [H, B], of the same dtype.
        rows: int64 [B, K]; row -1 is close to none.

    Returns:
        bool [B, K].
    """
    B, K = rows.shape
    close_BK = torch.empty(B, K, dtype=torch.uint8, device=rows.device)
    tile = SETTINGS.gpu_label_block
    if B and K:
        with torch.cuda.device_of(rows):
            _close[(B, triton.cdiv(K, tile))](
                labels, own.contiguous(), rows.contiguous(), close_BK, len(labels), B, K,
                *labels.stride(), TILE=tile, num_warps=4,
            )  # fmt: skip
    return close_BK.view(torch.bool)


@triton.jit
def _close(
    labels_ptr, own_ptr, rows_ptr, close_ptr, H, B, K, stride_H, stride_N, TILE: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = tl.load(rows_ptr + b * K + k, mask=k < K, other=-1)
    close = tl.zeros([TILE], dtype=tl.int1)
    for h in range(H):
        label_ptr = labels_ptr + tl.cast(h, tl.int64) * stride_H
        mine = tl.load(own_ptr + h * B + b)
        close = close | (tl.load(label_ptr + row * stride_N, mask=row >= 0, other=-1) == mine)
    tl.store(close_ptr + b * K + k, (close & (row >= 0)).to(tl.uint8), mask=k < K)


def processors(device: torch.device) -> int:
    """Return a GPU's multiprocessors; 2 under the interpreter, so that programs share sums."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
