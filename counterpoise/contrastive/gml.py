r"""GML: a classifier made of the keys of each class, with the class prior; a learned temperature.

.. math:: S_{ic}(\tau, M) = \log \frac{\sum_{j: y_j = c} M_{ij}\, e^{q_i \cdot k_j / \tau}}{\sum_{j: y_j = c} M_{ij}}

The density of a feature under a class is a mixture over the keys of that class, a *mean*, so that many keys of a head
class count no more than few of a tail class; Bayes' rule with the prior pi makes it a classifier:

.. math:: \ell_i = w_s\, \mathrm{CE}(u_i / \tau_s + \log \pi,\, y_i)
          + w_c \big[ \mathrm{CE}(S_i(\bar\tau, 1) + \log \pi,\, y_i) + \mathrm{CE}(\bar S_i(\tau, M) + \log \pi,\, y_i)
          \big] + w_d\, T^2\, \mathrm{KL}\Big(\mathrm{softmax}\frac{v_i}{\tau_s T} \,\Big\|\,
          \mathrm{softmax}\frac{u_i}{\tau_s T}\Big)

with queries q, keys k, cosine logits u, those v of a teacher, and a bar over what gets no gradient: features learn from
the second term, at a fixed temperature and with a query's own key; the temperature learns from the third, without it
(M_ij = 0 where the dataset indices agree). Without keys the rows of the batch (of all ranks) are each other's, never
their own.

A class without a usable key is left out of the softmax (the released code divides 0 by 0), and a row whose own class is
left out of a term costs nothing there. Predict with u. Several ranks: given keys must be the same on all of them.

Source: Suh and Seo, Long-Tailed Recognition by Mutual Information Maximization between Latent Features and Ground-Truth
Labels, 2023, and the released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from counterpoise._core import (
    Loss,
    Spec,
    at_least_float32,
    check_embeddings,
    check_number,
    check_per_row,
    check_within,
    reduce_losses,
    without_autocast,
    world_size,
)
from counterpoise.contrastive._unit import unit
from counterpoise.contrastive._views import all_ranks, as_rows
from counterpoise.losses import adjusted_cross_entropy
from counterpoise.memory import ClassCounts, ClassStatistics


class GMLTerms(NamedTuple):
    """The terms of each row, (N,), 0 where a row has none; unweighted."""

    supervised: Tensor
    contrast: Tensor
    temperature: Tensor
    distillation: Tensor
    counted: Tensor
    """bool, which rows have a term at all"""


def gml_loss(
    z: Tensor,
    labels: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    logits: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    index: Tensor | None = None,
    key_index: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    supervised_temperature: float = 1 / 30,
    supervised_weight: float = 1.0,
    contrast_weight: float = 1.0,
    distillation_weight: float = 1.0,
    distillation_temperature: float = 4.0,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """GML's objective; the formula is at the top of this file. Arguments and errors of the terms: :func:`gml_terms`.

    Args:
        supervised_weight, contrast_weight, distillation_weight: w_s, w_c, w_d >= 0.
        weight: (N,), multiplies row losses; mask: (N,) bool, a masked row is neither query nor key.
        reduction: "none" gives (N,); "mean", "sum".
        normalizer: what "mean" divides by: "count" (rows with a term), "weight" or a number.
        sync: denominators, and without keys the rows, of all ranks, once a process group exists.

    Returns:
        (N,) or 0-d, at least float32. Without any usable row, a zero connected to the graph.
    """
    check_number("supervised_weight", supervised_weight, 0)
    check_number("contrast_weight", contrast_weight, 0)
    check_number("distillation_weight", distillation_weight, 0)
    check_per_row("weight", weight, z)
    terms = gml_terms(
        z,
        labels,
        class_counts=class_counts,
        logits=logits,
        keys=keys,
        key_labels=key_labels,
        index=index,
        key_index=key_index,
        teacher_logits=teacher_logits,
        temperature=temperature,
        supervised_temperature=supervised_temperature,
        distillation_temperature=distillation_temperature,
        normalize=normalize,
        mask=mask,
        sync=sync,
    )
    losses = (
        supervised_weight * terms.supervised
        + contrast_weight * (terms.contrast + terms.temperature)
        + distillation_weight * terms.distillation
    )
    return reduce_losses(
        losses,
        counted=terms.counted,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync and world_size() > 1,
    )


def gml_terms(
    z: Tensor,
    labels: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    logits: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    index: Tensor | None = None,
    key_index: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    supervised_temperature: float = 1 / 30,
    distillation_temperature: float = 4.0,
    normalize: bool = True,
    mask: Tensor | None = None,
    sync: bool = True,
) -> GMLTerms:
    """The terms a row, for logging and for objectives of one's own.

    Args:
        z: (N, d) query embeddings; labels: (N,) class indices.
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        logits: (N, C) cosine logits u of the classifier; None = no supervised term.
        keys: (M, d) key embeddings, with gradient where they have one; key_labels: (M,) their classes, -1 = unusable.
            None = the rows of the batch.
        index: (N,), key_index: (M,) dataset indices, None = no key is a query's own.
        teacher_logits: (N, C) cosine logits v, None = no distillation; detached here.
        temperature: tau > 0, a number or a 0-d tensor that may be learned.
        supervised_temperature, distillation_temperature: tau_s and T, > 0.
        normalize: queries and keys to unit length first.
        mask: (N,) bool, True = counts.
        sync: without keys, the rows of all ranks.

    Raises:
        ValueError, TypeError: shapes, labels or settings that do not fit, or one of two arguments that go together.
    """
    check_embeddings("z", z)
    check_number("supervised_temperature", supervised_temperature, 0, open_low=True)
    check_number("distillation_temperature", distillation_temperature, 0, open_low=True)
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    statistics = class_counts if isinstance(class_counts, ClassStatistics) else ClassStatistics(class_counts)
    check_per_row("labels", labels, z)
    rows = as_rows(z[None], labels, None, mask, normalize=normalize, sync=sync and world_size() > 1)
    y = labels.long() if rows.counted is None else torch.where(rows.counted, labels.long(), 0)
    check_within("labels", y, 0, statistics.num_classes - 1, what="class indices")
    similarity, label_of_key, usable, foreign = _similarities(
        rows, keys, key_labels, index, key_index, normalize=normalize, sync=sync
    )
    if keys is not None:
        check_within("key_labels", label_of_key, -1, statistics.num_classes - 1, what="class indices")
    log_prior = statistics.seen_prior().log().to(similarity)
    tau = temperature.to(similarity) if isinstance(temperature, Tensor) else similarity.new_tensor(temperature)

    def classify(scaled: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(class_log_means(scaled, label_of_key, len(log_prior), use) + log_prior, y)

    contrast, has_contrast = classify(similarity / tau.detach(), usable)
    of_temperature, _ = classify(similarity.detach() / tau, foreign)
    supervised, distillation = torch.zeros_like(contrast), torch.zeros_like(contrast)
    if logits is not None:
        scaled = at_least_float32(logits) / supervised_temperature
        supervised = adjusted_cross_entropy(scaled, y, additive=log_prior, mask=mask, reduction="none")
        if teacher_logits is not None:
            distillation = _distillation(scaled, teacher_logits, supervised_temperature, distillation_temperature, mask)
    elif teacher_logits is not None:
        raise ValueError("teacher_logits was given without logits, expected both")
    counted = has_contrast if logits is None else torch.ones_like(has_contrast)
    counted = counted if rows.counted is None else counted & rows.counted
    return GMLTerms(supervised, contrast, of_temperature, distillation, counted)


def _similarities(
    rows: Any,
    keys: Tensor | None,
    key_labels: Tensor | None,
    index: Tensor | None,
    key_index: Tensor | None,
    *,
    normalize: bool,
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q.k (N, M), the keys' labels (M,), and which keys a row may use (N, M), with and without its own."""
    if (keys is None) != (key_labels is None):
        raise ValueError(f"key_labels is {key_labels if keys is None else None}, expected it together with keys")
    if key_index is not None and (index is None or keys is None):
        raise ValueError("key_index was given without index and keys, expected all three")
    q = rows.z
    if keys is None or key_labels is None:
        k, ids, unusable = all_ranks(rows, sync=sync and world_size() > 1)
        label_of_key = ids[:, 1]
        usable = rows.ids[:, None, 0] != ids[None, :, 0]
        usable = usable if unusable is None else usable & (unusable == 0)
        foreign = usable
    else:
        check_embeddings("keys", keys)
        if keys.shape[1] != q.shape[1]:
            raise ValueError(f"keys has shape {tuple(keys.shape)}, expected (M, {q.shape[1]})")
        check_per_row("key_labels", key_labels, keys)
        k, label_of_key = at_least_float32(keys), key_labels.long()
        k = unit(k, dim=1) if normalize else k
        usable = (label_of_key >= 0).expand(len(q), len(k))
        foreign = usable
    if index is not None and key_index is not None:
        check_per_row("index", index, q)
        check_per_row("key_index", key_index, k)
        foreign = usable & (index[:, None] != key_index[None, :])
    with without_autocast(q):
        return q @ k.to(q.dtype).T, label_of_key, usable, foreign


def class_log_means(scaled: Tensor, key_labels: Tensor, num_classes: int, usable: Tensor) -> Tensor:
    """S: log of the mean over a class's usable keys of exp(scaled), (N, C); -inf where a class has none.

    Args:
        scaled: (N, M) similarities over the temperature.
        key_labels: (M,) classes; of a key that no row may use, anything.
        num_classes: C.
        usable: (N, M) bool.
    """
    column = key_labels.clamp(0, num_classes - 1)
    shape = (len(scaled), num_classes)
    count = scaled.new_zeros(shape).index_add(1, column, usable.to(scaled.dtype))
    lowest = torch.where(usable, scaled.detach(), -torch.inf)
    top = scaled.new_full(shape, -torch.inf).scatter_reduce(1, column.expand(scaled.shape), lowest, "amax")
    top = torch.where(count > 0, top, 0)
    below = torch.where(usable, scaled - top[:, column], 0)
    total = scaled.new_zeros(shape).index_add(1, column, torch.where(usable, below.exp(), 0))
    mean = torch.where(count > 0, total, 1) / count.clamp_min(1)
    return torch.where(count > 0, mean.log() + top, -torch.inf)


def _cross_entropy(adjusted: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax at y per row, 0 where the row's own class is left out, and where it is not."""
    own = adjusted.gather(1, y[:, None]).squeeze(1)
    there = own != -torch.inf  # NaN is a value too
    safe = torch.where(there[:, None], adjusted, 0)
    return torch.where(there, safe.logsumexp(1) - own, 0), there


def _distillation(
    scaled: Tensor, teacher_logits: Tensor, supervised_temperature: float, temperature: float, mask: Tensor | None
) -> Tensor:
    """T^2 KL(teacher || student) per row."""
    if teacher_logits.shape != scaled.shape:
        raise ValueError(f"teacher_logits has shape {tuple(teacher_logits.shape)}, expected {tuple(scaled.shape)}")
    student, teacher = scaled, at_least_float32(teacher_logits.detach()).to(scaled.dtype) / supervised_temperature
    if mask is not None:
        student, teacher = torch.where(mask[:, None], student, 0), torch.where(mask[:, None], teacher, 0)
    student, teacher = log_softmax(student / temperature, dim=1), log_softmax(teacher / temperature, dim=1)
    return kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


class GMLLoss(Loss):
    """Module form of :func:`gml_loss`, with the temperature as a parameter and the prior in ``statistics``.

    A step of a recipe: embed two views with the query encoder and the key encoder, ``queue.enqueue`` the gathered key
    features, project the whole queue, then ``loss(queries, labels, logits=cosines, index=index,
    keys=projection(queue.features), key_labels=queue.labels, key_index=queue.index)``.

    Args:
        class_counts: (C,) training examples a class.
        temperature: tau > 0 at the start; learned as its logarithm.
        supervised_temperature: tau_s > 0, fixed.
        supervised_weight, contrast_weight, distillation_weight: of the terms, >= 0.
        distillation_temperature: T > 0.
        normalize: queries and keys to unit length first.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.

    Parameters: log_temperature (), kept in float32 in half-precision modules; named in ``no_weight_decay``.
    """

    spec = Spec(
        task="labelled_embeddings",
        source="Suh and Seo, Long-Tailed Recognition by Mutual Information Maximization between Latent Features and "
        "Ground-Truth Labels, 2023",
        needs=("class_counts", "cosine_logits"),
        distributed="gathers",
        uses_prior=True,
        exempt={
            "finite_differences": "the temperature's own term holds the features fixed, but its value depends on them"
        },
    )
    no_weight_decay = ("log_temperature",)

    def __init__(
        self,
        class_counts: ClassCounts,
        temperature: float = 0.1,
        supervised_temperature: float = 1 / 30,
        supervised_weight: float = 1.0,
        contrast_weight: float = 1.0,
        distillation_weight: float = 1.0,
        distillation_temperature: float = 4.0,
        normalize: bool = True,
        zero_count: str = "error",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            supervised_temperature=supervised_temperature,
            supervised_weight=supervised_weight,
            contrast_weight=contrast_weight,
            distillation_weight=distillation_weight,
            distillation_temperature=distillation_temperature,
            normalize=normalize,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("temperature", temperature, 0, open_low=True)
        check_number("supervised_temperature", supervised_temperature, 0, open_low=True)
        check_number("distillation_temperature", distillation_temperature, 0, open_low=True)
        check_number("supervised_weight", supervised_weight, 0)
        check_number("contrast_weight", contrast_weight, 0)
        check_number("distillation_weight", distillation_weight, 0)
        self.statistics = ClassStatistics(class_counts, zero_count)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float:
        """tau as it stands now. For logging."""
        return math.exp(float(self.log_temperature.detach()))

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        logits: Tensor | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        index: Tensor | None = None,
        key_index: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Query embeddings (N, d), labels (N,), logits (N, C) and keys (M, d) to the reduced loss."""
        return gml_loss(
            z,
            labels,
            class_counts=self.statistics,
            logits=logits,
            keys=keys,
            key_labels=key_labels,
            index=index,
            key_index=key_index,
            teacher_logits=teacher_logits,
            temperature=self.log_temperature.exp(),
            weight=weight,
            mask=mask,
            **self.options,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.log_temperature.detach()
        super()._apply(fn, recurse)
        t = self.log_temperature
        if t.dtype in (torch.float16, torch.bfloat16):
            t.data = before.to(device=t.device, dtype=torch.float32)
        return self
