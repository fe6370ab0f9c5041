"""Rows of a table in which some columns hold what other rows have there.

Source: Bahri et al., SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption, 2022, section 3; as a
view beside images: Hager et al., Best of Both Worlds: Multimodal Contrastive Learning with Tabular and Imaging Data,
2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from counterpoise._core import check_number, uniform_by_index


class TableCorruption(nn.Module):
    """Replaces a share of the columns of each row by draws from the same columns of training rows.

    Which columns, and which rows they come from, is a function of (seed, epoch, index) alone, so that a resumed run
    sees the same, whatever batch, worker or rank an example is in.

    Args:
        table: (N, d) training rows.
        column_of: (d,) the column that each entry belongs to, 0 .. K - 1: entries of one column, such as those of one
            word among several, are replaced together. None = every entry by itself.
        fraction: of the columns, in [0, 1]; rounded to whole columns.
        seed: >= 0.

    Raises:
        ValueError: a fraction out of range, an empty table, or columns of another length than entries.
    """

    table: Tensor
    column_of: Tensor

    def __init__(
        self, table: Tensor, column_of: Sequence[int] | None = None, fraction: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__()
        check_number("fraction", fraction, 0, 1)
        check_number("seed", seed, 0)
        if table.ndim != 2 or table.numel() == 0:
            raise ValueError(f"table has shape {tuple(table.shape)}, expected (N, d) with N, d >= 1")
        columns = torch.arange(table.shape[1]) if column_of is None else torch.as_tensor(column_of)
        if columns.shape != table.shape[1:]:
            raise ValueError(f"column_of has shape {tuple(columns.shape)}, expected ({table.shape[1]},)")
        self.fraction, self.seed = fraction, seed
        self.num_columns = int(columns.max()) + 1
        self.register_buffer("table", table, persistent=False)  # the data have it
        self.register_buffer("column_of", columns.long(), persistent=False)

    def forward(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Rows (N, d) of the examples ``index`` (N,), corrupted."""
        k, count = self.num_columns, round(self.fraction * self.num_columns)
        if count == 0:
            return x
        u = uniform_by_index(index, 2 * k, self.seed, epoch).to(x.device)
        replaced = u[:, :k].argsort(dim=1, stable=True).argsort(dim=1) < count
        donors = (u[:, k:] * len(self.table)).long()
        others = self.table[donors[:, self.column_of], torch.arange(x.shape[1], device=x.device)]
        return torch.where(replaced[:, self.column_of], others.to(x.dtype), x)


__all__ = ["TableCorruption"]
