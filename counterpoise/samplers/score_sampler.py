r"""Samplers that a score or a coreset drives.

.. math:: P(i) \propto s_i^{\alpha}

with scores such as EL2N or forgetting events; and the examples of a weighted coreset, shuffled. Both read their numbers
from tensors, or from ``.npy`` files, so that a run can be launched on what was selected before.

Source: score-proportional sampling: Katharopoulos and Fleuret, Not All Samples Are Created Equal, 2018, section 3.1
(any score in place of its gradient bound); coresets: see the selectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from counterpoise._core import Spec, check_number
from counterpoise.samplers.epoch_sampler import EpochSampler

Vector = Tensor | Sequence[float] | str


def read_vector(name: str, values: Vector) -> Tensor:
    """A (N,) tensor from a tensor, a sequence or the path of a ``.npy`` file, or of an ``.npz`` file with such a name.

    Raises:
        ValueError: another shape, or a file without the name.
    """
    if isinstance(values, str):
        values = torch.from_numpy(_read(name, values))
    vector = torch.as_tensor(values).detach().cpu()
    if vector.ndim != 1 or vector.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected (N,) with N >= 1")
    return vector


def _read(name: str, path: str) -> np.ndarray:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        if name not in found:
            raise ValueError(f"{name}: {path} holds {', '.join(found.files)}, expected an array of that name")
        return found[name]


class ScoreSampler(EpochSampler):
    """Draws examples in proportion to a power of their score.

    What is drawn often counts more: weight a loss by 1 / (N P(i)) where its mean over the data is meant.

    Args:
        scores: (N,) finite, >= 0, at least one > 0; or the path of a ``.npy`` file.
        power: alpha >= 0; 0 draws uniformly among the positive scores.
        replacement: draw independently; False draws every example at most once an epoch.
        num_samples: draws an epoch over all ranks; None = N, or the number of positive scores without replacement.
        seed: >= 0.

    Raises:
        ValueError: scores or settings out of range, or more draws without replacement than positive scores.
    """

    spec = Spec(
        task="sampler",
        source="Katharopoulos and Fleuret, Not All Samples Are Created Equal, 2018, section 3.1",
        needs=("scores",),
    )

    def __init__(
        self,
        scores: Vector,
        power: float = 1.0,
        *,
        replacement: bool = True,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        values = read_vector("scores", scores).double()
        check_number("power", power, 0)
        if not bool((values.isfinite() & (values >= 0)).all()) or not bool((values > 0).any()):
            raise ValueError(
                f"scores lie in [{float(values.min())}, {float(values.max())}], expected finite numbers >= 0, some > 0"
            )
        positive = int((values > 0).sum())
        most = len(values) if replacement else positive
        super().__init__(most if num_samples is None else num_samples, seed=seed)
        if not replacement and self.num_samples > positive:
            raise ValueError(f"num_samples is {num_samples}, expected at most the {positive} positive scores")
        self.replacement = replacement
        scaled = torch.where(values > 0, (values / values.max()) ** power, 0)
        self.probabilities = scaled / scaled.sum()

    def draw(self, generator: torch.Generator) -> Tensor:
        """(num_samples,) indices."""
        return torch.multinomial(self.probabilities, self.num_samples, self.replacement, generator=generator)


class CoresetSampler(EpochSampler):
    """The examples of a coreset once an epoch, in a seeded order, with their weights at hand.

    Weights are brought to a mean of one, so that the learning rate keeps its meaning: multiply the losses of a batch by
    ``sampler.weight_of(index)``.

    Args:
        indices: (b,) distinct indices of training examples, such as ``selection.indices``; or the path of a
            ``.npy`` file, or of the ``selection.npz`` that ``counterpoise-select`` writes.
        weights: (b,) >= 0, such as ``selection.weights``, or a path; None weighs all alike.
        seed: >= 0.

    Raises:
        ValueError: indices that repeat or are negative, or weights that do not fit.
    """

    spec = Spec(task="sampler", source="Random reshuffling of a weighted subset", needs=("indices",))

    def __init__(self, indices: Vector, weights: Vector | None = None, *, seed: int = 0) -> None:
        self.indices = read_vector("indices", indices)
        super().__init__(len(self.indices), seed=seed)
        if self.indices.is_floating_point() or len(self.indices.unique()) < len(self.indices) or self.indices.min() < 0:
            raise ValueError(f"indices has dtype {self.indices.dtype}, expected distinct whole numbers >= 0")
        self.indices = self.indices.long()
        self.weights = torch.ones(len(self.indices), dtype=torch.float64)
        if weights is not None:
            given = read_vector("weights", weights).double()
            if given.shape != self.indices.shape or not bool((given >= 0).all()) or float(given.sum()) <= 0:
                raise ValueError(
                    f"weights has shape {tuple(given.shape)}, expected ({len(self.indices)},) numbers >= 0, some > 0"
                )
            self.weights = given / given.mean()
        self.weighted = bool((self.weights != 1).any())
        self._by_index, self._order = self.indices.sort()

    def draw(self, generator: torch.Generator) -> Tensor:
        """(b,) the coreset, shuffled."""
        return self.indices[torch.randperm(len(self.indices), generator=generator)]

    def weight_of(self, index: Tensor) -> Tensor:
        """(B,) float32 weights of mean one over the coreset, for indices (B,) of its examples.

        Raises:
            ValueError: an index that the coreset does not hold.
        """
        place = torch.searchsorted(self._by_index, index.cpu().long()).clamp_max(len(self.indices) - 1)
        missing = self._by_index[place] != index.cpu()
        if bool(missing.any()):
            raise ValueError(f"index holds {int(index.cpu()[missing][0])}, expected indices of the coreset")
        return self.weights[self._order[place]].float().to(index.device)
