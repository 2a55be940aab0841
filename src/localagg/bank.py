"""The memory bank: one unit row for each image, moved toward its latest embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draws import BANK, uniform
from .objectives import momentum_update

_INIT_CHUNK = (
    65536  # rows drawn at a time: the float64 draws of a large bank would not fit beside it
)


class MemoryBank(nn.Module):
    """N unit rows [N, D] in the buffer ``rows``.

    Row i starts uniform in the cube and is normalized; it depends on (seed, i) alone. Deviation:
    the reference leaves its first rows unnormalized (LA section 3.2 has unit rows).

    Args:
        size: N, images.
        dim: D, size of the embedding.
        seed: of the first rows.
        device: where the rows live.
        dtype: of the rows.
    """

    rows: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        rows = torch.empty(size, dim, dtype=dtype, device=device)
        for start in range(0, size, _INIT_CHUNK):
            index = torch.arange(start, min(start + _INIT_CHUNK, size))
            cube = uniform(seed, BANK, index, count=dim) * 2 - 1
            rows[start : start + len(index)] = F.normalize(cube, dim=1).to(dtype)
        self.register_buffer("rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor, *, momentum: float = 0.5) -> None:
        """M_i <- normalize(m M_i + (1 - m) v_i) for the rows of a batch; LA section 3.2.

        Where an index stands more than once, the last position wins on every device.

        Args:
            index: int64 [B].
            embedding: unit rows [B, D].
            momentum: m in [0, 1].
        """
        new_BD = momentum_update(self.rows[index], embedding.detach(), momentum=momentum)
        # Scatters with repeated indices are unordered on GPUs, so all repeats write the last value.
        position = torch.arange(len(index), device=index.device)
        same_BB = index.unsqueeze(1) == index.unsqueeze(0)
        last_B = (same_BB * position).amax(dim=1)
        self.rows[index] = new_BD[last_B]
