r"""Samplers by class frequency: instance-balanced, square-root, class-balanced, and the schedule between them.

.. math:: p_k = \frac{n_k^{q}}{\sum_j n_j^{q}}, \qquad q = 1 \text{ (instance)},\; 1/2 \text{ (square root)},\;
          0 \text{ (class-balanced)}

A class is drawn first, then an example of it: examples are dealt from shuffled decks, so that within an epoch the
examples of a class are repeated evenly (an independent draw repeats some often and misses others). Every sampler
tells the prior that training then sees: hand it to a prior-based loss.

Source: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, 2020, eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import Spec, check_number
from counterpoise.memory import ClassCounts
from counterpoise.samplers.epoch_sampler import EpochSampler


def class_sampling_probabilities(class_counts: ClassCounts, exponent: float) -> Tensor:
    """(C,) float64 p_k proportional to n_k^exponent; a class without examples gets 0.

    Args:
        class_counts: (C,) examples a class.
        exponent: in [0, 1]: 1 instance-balanced, 0.5 square root, 0 class-balanced.
    """
    check_number("exponent", exponent, 0, 1)
    n = torch.as_tensor(class_counts).double()
    if not bool((n >= 0).all()) or float(n.sum()) == 0:
        raise ValueError(f"class_counts is {n.tolist()}, expected numbers >= 0 and at least one example")
    p = torch.where(n > 0, n**exponent, 0)
    return p / p.sum()


def progressive_probabilities(
    class_counts: ClassCounts, epoch: int, num_epochs: int, *, inclusive: bool = True
) -> Tensor:
    """(C,) float64 (1 - t) p_instance + t p_class_balanced.

    Args:
        class_counts: (C,) examples a class.
        epoch: 0, ..., num_epochs - 1.
        num_epochs: T >= 1.
        inclusive: t = epoch / (T - 1), which reaches both ends; False: t = epoch / T as printed in the paper.
    """
    check_number("num_epochs", num_epochs, 1)
    check_number("epoch", epoch, 0)
    last = num_epochs - 1 if inclusive else num_epochs
    t = min(epoch / last, 1.0) if last > 0 else 1.0
    instance = class_sampling_probabilities(class_counts, 1.0)
    balanced = class_sampling_probabilities(class_counts, 0.0)
    return (1 - t) * instance + t * balanced


class ClassFrequencySampler(EpochSampler):
    """Draws classes with p_k proportional to n_k^exponent, then examples of the class.

    Args:
        targets: (N,) class indices of the training set.
        exponent: in [0, 1].
        num_samples: draws an epoch over all ranks; None = N.
        seed: >= 0.

    Raises:
        ValueError: targets of another shape, negative, or empty.
    """

    spec = Spec(
        task="sampler",
        source="Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, 2020, eq. 1",
        needs=("targets",),
    )

    def __init__(
        self, targets: Tensor, exponent: float = 1.0, *, num_samples: int | None = None, seed: int = 0
    ) -> None:
        targets = torch.as_tensor(targets)
        if targets.ndim != 1 or targets.numel() == 0 or targets.is_floating_point() or int(targets.min()) < 0:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}, expected (N,) class indices >= 0"
            )
        super().__init__(len(targets) if num_samples is None else num_samples, seed=seed)
        check_number("exponent", exponent, 0, 1)
        self.exponent = exponent
        self.class_counts = torch.bincount(targets.long())
        self._members = targets.argsort(stable=True).split(self.class_counts.tolist())

    @property
    def class_probabilities(self) -> Tensor:
        """(C,) float64: the prior that training sees in the present epoch."""
        return class_sampling_probabilities(self.class_counts, self.exponent)

    def draw(self, generator: torch.Generator) -> Tensor:
        """(num_samples,) indices: classes by probability, examples of a class dealt from shuffled decks."""
        classes = torch.multinomial(self.class_probabilities, self.num_samples, replacement=True, generator=generator)
        order = torch.empty(self.num_samples, dtype=torch.int64)
        for k, members in enumerate(self._members):
            places = (classes == k).nonzero().flatten()
            if len(places) == 0:
                continue
            decks = -(-len(places) // len(members))
            dealt = torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(decks)])
            order[places] = dealt[: len(places)]
        return order


class ClassBalancedSampler(ClassFrequencySampler):
    """Every class equally often (q = 0).

    Args:
        targets: (N,) class indices of the training set.
        num_samples: draws an epoch over all ranks; None = N.
        seed: >= 0.
    """

    def __init__(self, targets: Tensor, *, num_samples: int | None = None, seed: int = 0) -> None:
        super().__init__(targets, 0.0, num_samples=num_samples, seed=seed)


class SquareRootSampler(ClassFrequencySampler):
    """Classes by the square root of their frequency (q = 1/2).

    Args:
        targets: (N,) class indices of the training set.
        num_samples: draws an epoch over all ranks; None = N.
        seed: >= 0.
    """

    def __init__(self, targets: Tensor, *, num_samples: int | None = None, seed: int = 0) -> None:
        super().__init__(targets, 0.5, num_samples=num_samples, seed=seed)


class ProgressivelyBalancedSampler(ClassFrequencySampler):
    """From instance-balanced in the first epoch to class-balanced in the last.

    Args:
        targets: (N,) class indices of the training set.
        num_epochs: T >= 1, length of the schedule.
        inclusive: whether the last epoch is fully balanced, see :func:`progressive_probabilities`.
        num_samples: draws an epoch over all ranks; None = N.
        seed: >= 0.
    """

    spec = Spec(
        task="sampler",
        source="Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, 2020, eq. 2",
        needs=("targets", "num_epochs"),
    )

    def __init__(
        self,
        targets: Tensor,
        num_epochs: int,
        *,
        inclusive: bool = True,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(targets, 1.0, num_samples=num_samples, seed=seed)
        check_number("num_epochs", num_epochs, 1)
        self.num_epochs = num_epochs
        self.inclusive = inclusive

    @property
    def class_probabilities(self) -> Tensor:
        """(C,) float64: the prior that training sees in the present epoch."""
        return progressive_probabilities(self.class_counts, self.epoch, self.num_epochs, inclusive=self.inclusive)


class DeferredBalancedSampler(ClassFrequencySampler):
    """Deferred re-sampling (DRS): instance-balanced first, another frequency rule late in training.

    Args:
        targets: (N,) class indices of the training set.
        num_epochs: T >= 1, length of training.
        switch_at: fraction of the epochs in [0, 1] behind which the rule changes.
        exponent: of the late rule, in [0, 1]; 0 is class-balanced.
        num_samples: draws an epoch over all ranks; None = N.
        seed: >= 0.
    """

    spec = Spec(
        task="sampler",
        source="Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, code (DRS)",
        needs=("targets", "num_epochs"),
    )

    def __init__(
        self,
        targets: Tensor,
        num_epochs: int,
        *,
        switch_at: float = 0.8,
        exponent: float = 0.0,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(targets, exponent, num_samples=num_samples, seed=seed)
        check_number("num_epochs", num_epochs, 1)
        check_number("switch_at", switch_at, 0, 1)
        self.switch_epoch = round(switch_at * num_epochs)

    @property
    def class_probabilities(self) -> Tensor:
        """(C,) float64: the prior that training sees in the present epoch."""
        exponent = self.exponent if self.epoch >= self.switch_epoch else 1.0
        return class_sampling_probabilities(self.class_counts, exponent)
