"""The memory bank: one unit row for each image, moved toward its latest embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check_arguments
from .config.tensor_checks import check_integers, check_rows
from .distributed.collectives import World
from .engine.bank_shard import BankShard
from .engine.counter_rng import BANK, uniform
from .engine.searchable_bank import SearchableBank
from .errors import UserError, first_line
from .objectives import momentum_update

_INIT_CHUNK = 65536  # rows drawn at a time: the float64 draws of a large bank would not fit


class MemoryBank(nn.Module):
    """N unit rows [N, D] in the buffer ``rows``, or the ``part`` of them that this rank holds.

    Row i starts uniform in the cube and is normalized; it depends on (seed, i) alone. Deviation:
    the reference leaves its first rows unnormalized (LA section 3.2 has unit rows).

    Args:
        size: N, images.
        dim: D, size of the embedding.
        seed: of the first rows.
        device: of the rows.
        dtype: of the rows. Updates are computed in float32 and rounded to it.
        part: the rows of the N that this rank holds. Default: all.

    Raises:
        UserError: a size below 1, another dtype, or a device that this machine lacks.
    """

    rows: Tensor
    """[n, D], those of ``part``."""

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        part: range | None = None,
    ) -> None:
        super().__init__()
        check_arguments(size=(size, 1), dim=(dim, 1), seed=(seed, 0))
        size, dim, seed = int(size), int(dim), int(seed)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError("option-invalid", f"dtype is {dtype!r}; pass a floating torch.dtype.")
        self.size = size
        self.part = range(size) if part is None else part
        try:
            rows = torch.empty(len(self.part), dim, dtype=dtype, device=device)
        except (RuntimeError, AssertionError) as error:  # no such device, or no memory
            raise UserError(
                "environment",
                f"A bank of {len(self.part):,} x {dim} values does not fit on the device '{device}'"
                f" ({first_line(error)[:80]}); choose another device or a smaller bank.",
            ) from None
        for start in range(self.part.start, self.part.stop, _INIT_CHUNK):
            index = torch.arange(start, min(start + _INIT_CHUNK, self.part.stop))
            cube = uniform(seed, BANK, index, count=dim) * 2 - 1
            rows[index - self.part.start] = F.normalize(cube, dim=1).to(rows)
        self.register_buffer("rows", rows)
        self._searchable: SearchableBank | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def searchable(self) -> SearchableBank:
        """The rows ready to be searched many times; they follow :meth:`update`."""
        if self._searchable is None or self._searchable.rows is not self.rows:
            self._searchable = SearchableBank(self.rows)
        return self._searchable

    def shard(self, world: World) -> BankShard:
        """Return these rows as a shard of the bank that the ranks hold together."""
        return BankShard(self.searchable, self.part, self.size, world)

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor, *, momentum: float = 0.5) -> None:
        """M_i <- normalize(m M_i + (1 - m) v_i) for the rows of a batch; LA section 3.2.

        The last of repeated indices wins on every device. Indices outside of ``part``
        are skipped; other ranks update them.

        Args:
            index: int64 [B], of the N rows.
            embedding: unit rows [B, D].
            momentum: m in [0, 1].

        Raises:
            UserError: of another kind, shape, device or range.
        """
        check_rows(rows=self.rows, embedding=embedding)
        check_integers("index", index, (len(embedding),), self.size, device=self.rows.device)
        if len(self.part) < self.size:
            here = (index >= self.part.start) & (index < self.part.stop)
            index, embedding = index[here] - self.part.start, embedding[here]
        new_BD = momentum_update(self.rows[index], embedding.detach(), momentum=momentum)
        # Scatters with repeated indices are unordered on GPUs, so all repeats write the last value.
        position = torch.arange(len(index), device=index.device)
        same_BB = index.unsqueeze(1) == index.unsqueeze(0)
        last_B = (same_BB * position).amax(dim=1) if len(index) else position
        self.searchable.write(index, new_BD[last_B])
