"""A bank with one slot for each example of a data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import (
    PreciseBuffers,
    check_choice,
    check_embeddings,
    check_number,
    check_per_row,
    check_within,
    in_second_pass,
)


class IndexBank(PreciseBuffers):
    r"""One unit embedding for each example of a data set, written and read by the example's index.

    A slot starts with the first embedding written to it and then follows,

    .. math:: v_i \leftarrow \frac{m\, v_i + (1 - m)\, z_i}{\lVert m\, v_i + (1 - m)\, z_i \rVert}

    Under several ranks write rows gathered in rank order, so that all ranks hold the same bank. Nothing is written in
    eval mode, inside ``second_pass()``, or when a row is not finite.

    Args:
        num_examples: number of slots >= 1.
        dim: width d of an embedding.
        momentum: m in [0, 1]; 0 = the last embedding. The instance-discrimination release uses 0.5.
        init: "empty" starts with no embedding; "random" fills every slot with a random unit vector.
        generator: draws the random start.

    Buffers (persistent, so that a resumed run goes on exactly):
        keys (num_examples, d), zero where nothing is, and filled (num_examples,) bool.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, and the released
    code.
    """

    keys: Tensor
    filled: Tensor

    def __init__(
        self,
        num_examples: int,
        dim: int,
        *,
        momentum: float = 0.0,
        init: str = "empty",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_number("num_examples", num_examples, 1)
        check_number("dim", dim, 1)
        check_number("momentum", momentum, 0, 1)
        check_choice("init", init, ("empty", "random"))
        self.momentum = momentum
        keys = torch.zeros(num_examples, dim, dtype=dtype)
        if init == "random":
            keys = normalize(torch.randn(num_examples, dim, dtype=dtype, generator=generator), dim=1)
        self.register_buffer("keys", keys)
        self.register_buffer("filled", torch.full((num_examples,), init == "random"))

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Moves the slots ``index`` (N,) towards ``rows`` (N, d), normalised first; a repeated index's last row counts.

        Raises:
            ValueError: another width than the bank's, another number of rows than of indices, an index out of range.
            TypeError: an index that is no integer.
        """
        check_embeddings("rows", rows)
        if rows.shape[1] != self.keys.shape[1]:
            raise ValueError(f"rows has shape {tuple(rows.shape)}, expected (N, {self.keys.shape[1]})")
        self._check(index)
        check_per_row("index", index, rows)
        if not self.training or in_second_pass() or not bool(rows.isfinite().all()):
            return
        index, order = index.long().sort(stable=True)
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = index[1:] != index[:-1]
        index, new = index[last], normalize(rows[order[last]].to(self.keys), dim=1)
        followed = normalize(self.momentum * self.keys[index] + (1 - self.momentum) * new, dim=1)
        self.keys[index] = torch.where(self.filled[index, None], followed, new)
        self.filled[index] = True

    def read(self, index: Tensor) -> Tensor:
        """(N, d) copies of the slots ``index`` (N,), zeros where ``filled[index]`` is False.

        Raises:
            ValueError, TypeError: an index out of range, or that is no integer.
        """
        self._check(index)
        return self.keys[index.long()]

    def _check(self, index: Tensor) -> None:
        if not isinstance(index, Tensor):
            raise TypeError(f"index is a {type(index).__name__}, expected a tensor of shape (N,)")
        if index.ndim != 1:
            raise ValueError(f"index has shape {tuple(index.shape)}, expected (N,)")
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"index has dtype {index.dtype}, expected an integer type")
        check_within("index", index, 0, len(self.keys) - 1, what="indices of examples")

    def extra_repr(self) -> str:
        """Number of slots, width and momentum."""
        return f"num_examples={len(self.keys)}, dim={self.keys.shape[1]}, momentum={self.momentum}"
