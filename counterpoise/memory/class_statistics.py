"""Class counts and the prior that training sees, validated once for the whole long-tail family."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import PreciseBuffers, check_choice, check_number

ClassCounts = Sequence[int] | Tensor

ZERO_COUNT_POLICIES = ("error", "ignore", "smooth")


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    r"""Class weights by the effective number of samples, normalised to sum to the number of classes.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    beta = 0 gives all ones, beta = 1 its limit :math:`w_c \propto 1 / n_c`. Computed as ``expm1(n log beta)``: with
    beta near one the printed form loses digits.

    Args:
        class_counts: (C,) training examples a class; a class with none gets weight 0 and is left out of the sum.
        beta: in [0, 1].

    Returns:
        (C,) float64.

    Raises:
        ValueError: negative counts, no example at all, or beta outside [0, 1].

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019.
    """
    check_number("beta", beta, 0, 1)
    return _by_effective_number(as_counts(class_counts), beta)


def _by_effective_number(counts: Tensor, beta: float) -> Tensor:
    n = counts.double()
    if beta == 0:
        raw = torch.ones_like(n)
    elif beta == 1:
        raw = 1 / n
    else:
        raw = 1 / -torch.expm1(n * math.log(beta))
    raw = torch.where(n > 0, raw, 0)
    return raw * (n > 0).sum() / raw.sum()


def as_counts(class_counts: ClassCounts) -> Tensor:
    """(C,) int64; raises ValueError for what are no numbers of examples."""
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts has shape {tuple(counts.shape)}, expected (C,) with C >= 1")
    if counts.is_floating_point() and not (counts == counts.round()).all():
        raise ValueError("class_counts holds fractions, expected whole numbers of examples")
    counts = counts.to(torch.int64)
    if (counts < 0).any():
        raise ValueError(f"class_counts holds {int(counts.min())}, expected numbers >= 0")
    if int(counts.sum()) == 0:
        raise ValueError("class_counts sums to 0, expected at least one example")
    return counts


def statistics_of(class_counts: ClassCounts | ClassStatistics) -> ClassStatistics:
    """The statistics of class counts (C,), or themselves; those of short lists are made once. Not to be changed.

    Raises:
        ValueError: what :class:`ClassStatistics` refuses.
    """
    if isinstance(class_counts, ClassStatistics):
        return class_counts
    if torch.compiler.is_compiling() or len(class_counts) > 4096:
        return ClassStatistics(class_counts)
    if isinstance(class_counts, Tensor):
        if not class_counts.is_cpu or class_counts.ndim != 1 or type(class_counts) is not Tensor:
            return ClassStatistics(class_counts)
        class_counts = class_counts.tolist()
    return _statistics_of(tuple(class_counts))


@lru_cache(maxsize=32)
def _statistics_of(class_counts: tuple[int, ...]) -> ClassStatistics:
    with torch.inference_mode(False):
        return ClassStatistics(class_counts)


def _unchanged(buffer: Tensor, before: Tensor, version: int) -> bool:
    """Whether a buffer still holds what it held; ``before`` is a copy on the host, elsewhere itself."""
    return torch.equal(buffer, before) if buffer.is_cpu else buffer is before and buffer._version == version


class ClassStatistics(PreciseBuffers):
    """Validated class counts and the prior that training sees: one object for the whole long-tail family.

    The prior starts as counts / sum(counts). A re-balancing sampler changes what training sees; tell it here with
    :meth:`set_prior`, and every prior-based loss follows.

    Args:
        class_counts: (C,) training examples a class.
        zero_count: what to do with a class without examples. "error" refuses it; "ignore" gives it the smallest seen
            prior in adjustments and weight 0 in class weights; "smooth" adds one to every count.

    Buffers:
        counts: (C,) int64, as given.
        prior: (C,) float64, sums to one over the classes seen. Both travel in ``state_dict()``.

    Raises:
        ValueError: negative or fractional counts, an empty class under "error".
    """

    counts: Tensor
    prior: Tensor

    def __init__(self, class_counts: ClassCounts, zero_count: str = "error") -> None:
        super().__init__()
        check_choice("zero_count", zero_count, ZERO_COUNT_POLICIES)
        counts = as_counts(class_counts)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty and zero_count == "error":
            raise ValueError(
                f"class_counts has no example of class {', '.join(map(str, empty))}: drop the class, or pass "
                'zero_count="ignore" or "smooth"'
            )
        self.zero_count = zero_count
        self.register_buffer("counts", counts.cpu().clone())
        smoothed = self.smoothed_counts.double()
        self.register_buffer("prior", smoothed / smoothed.sum())
        self._derived: dict[Hashable, tuple[Tensor, int, Tensor]] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.counts)

    @property
    def smoothed_counts(self) -> Tensor:
        """(C,) int64 counts after the zero-count policy: one more each under "smooth"."""
        return self.counts + 1 if self.zero_count == "smooth" else self.counts

    @torch.no_grad()
    def set_prior(self, prior: Tensor) -> None:
        """Makes ``prior`` (C,), class probabilities >= 0 that sum to one, what training is said to see."""
        prior = torch.as_tensor(prior, dtype=self.prior.dtype, device=self.prior.device)
        if prior.shape != self.prior.shape:
            raise ValueError(f"prior has shape {tuple(prior.shape)}, expected {tuple(self.prior.shape)}")
        if not bool((prior >= 0).all()) or abs(float(prior.sum()) - 1) > 1e-6:
            raise ValueError(f"prior sums to {float(prior.sum()):g}, expected probabilities that sum to one")
        self.prior.copy_(prior)

    def seen_prior(self) -> Tensor:
        """(C,) float64 prior, where a class never seen borrows the smallest prior that was."""
        smallest = torch.where(self.prior > 0, self.prior, torch.inf).min()
        return torch.where(self.prior > 0, self.prior, smallest)

    def log_prior(self) -> Tensor:
        """(C,) float64 logarithm of :meth:`seen_prior`."""
        return self.seen_prior().log()

    def effective_number_weights(self, beta: float = 0.9999) -> Tensor:
        """(C,) float64, see :func:`effective_number_weights`."""
        check_number("beta", beta, 0, 1)
        return _by_effective_number(self.smoothed_counts, beta)

    def derived(
        self, make: Callable[..., Tensor], like: Tensor, *settings: float, source: Tensor | None = None
    ) -> Tensor:
        """A class vector made from a buffer, on the device of ``like`` in at least float32; made once a state of it.

        Args:
            make: ``make(statistics, *settings)`` is the vector, of any type.
            source: the buffer, None = the prior.
        """
        source = self._buffers["prior"] if source is None else source
        if torch.compiler.is_compiling() or type(source) is not Tensor:
            return self._made(make, like, settings)
        key = (make, settings, like.dtype)
        made = self._derived.get(key)
        if made is not None:
            before, version, vector = made
            if source.is_cpu and like.is_cpu and vector.is_cpu:
                if torch.equal(source, before):
                    return vector
            elif vector.device == like.device and _unchanged(source, before, version):
                return vector
        vector = self._made(make, like, settings)
        if not torch.is_inference_mode_enabled():
            # On the host a copy tells whatever wrote to the buffer; elsewhere reading it would stall the device.
            self._derived[key] = (source.clone() if source.is_cpu else source, source._version, vector)
        return vector

    @torch.no_grad()
    def _made(self, make: Callable[..., Tensor], like: Tensor, settings: tuple[float, ...]) -> Tensor:
        return make(self, *settings).to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again."""
        return {**self.__dict__, "_derived": {}}

    def extra_repr(self) -> str:
        """Class count and the range of the counts."""
        return f"num_classes={self.num_classes}, counts={int(self.counts.min())}..{int(self.counts.max())}"
