r"""Supervised contrast: the examples of one class are positives of one another.

.. math:: \ell_i^{\mathrm{out}} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}, \qquad
          \ell_i^{\mathrm{in}} = -\log \frac{1}{|P(i)|} \sum_{p \in P(i)}
              \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}

over all V*N rows, P(i) the rows of i's class other than i. The mean outside the logarithm is what is used; by Jensen
the other is never larger, and soon ignores the positives that are far away. Without labels P(i) are the other views of
the example: NT-Xent.

The released code multiplies by tau / tau_base with tau_base = 0.07, which changes nothing at its default tau = 0.07 but
makes the paper's tau = 0.1 a loss 1.43 times as large; here ``base_temperature=None`` means no factor. It also keeps
rows without a positive in the mean, as zeros (``reduction_over="all"``). pytorch-metric-learning gives 0 to a batch of
one class, where there is still something to spread evenly. solo-learn's form is "in" without the mean: log |P(i)| less.

Source: Khosla et al., Supervised Contrastive Learning, 2020, eq. 2 and 3, and the released code.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, check_choice, check_number, reduce_losses, world_size
from counterpoise.contrastive._views import Rows, all_ranks, as_rows, other_views, stack_views
from counterpoise.contrastive.info_nce import Rule, info_nce, not_self, same_label
from counterpoise.memory import MemoryBank


def supcon_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    positives: Tensor | None = None,
    bank: MemoryBank | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    form: str = "out",
    contrast_mode: str = "all",
    normalize: bool = True,
    reduction_over: str = "valid",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """Supervised contrast; the formula is at the top of this file.

    Args:
        z: (N, d), or (V, N, d) several views; other: (N, d) the second view.
        labels: (N,) class indices, a negative one is nobody's positive; None = every example is its own class.
        positives: instead of labels, (N, M) with M the examples of all ranks: which are positives of which, bool, or
            weights >= 0 for form "out". Need not be symmetric; a row is never its own positive.
        bank: its keys are further candidates and, by label, positives; read, never written.
        temperature: divisor > 0; a tensor may be learned.
        base_temperature: None, or > 0: the loss is multiplied by temperature / base_temperature.
        form: "out", the mean of logarithms, or "in", the logarithm of the mean.
        contrast_mode: anchors are the rows of "all" views, or of the first "one".
        normalize: to unit length first.
        reduction_over: the mean runs over the "valid" rows (with a positive) or "all".
        weight: (N,), of all views of an example; mask: (N,) bool, a masked example is neither anchor nor key.
        reduction: "none" gives (V*N,), view-major, or (N,) with contrast_mode "one"; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: keys and denominators of all ranks, once a process group exists.

    Returns:
        (V*N,), (N,) or 0-d, at least float32. Without any positive in the batch, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; labels and positives at once.
    """
    _check_settings(temperature, base_temperature, form, contrast_mode, reduction_over)
    views = stack_views(z, other)
    v, n, _ = views.shape
    sync = sync and world_size() > 1
    rows = as_rows(views, labels, weight, mask, normalize=normalize, sync=sync)
    keys, key_ids, log_weight = all_ranks(rows, sync=sync)
    positive: Rule = same_label
    if positives is not None:
        _check_positives(positives, (n, len(keys) // v), labelled=labels is not None, form=form)
        positive = _among(positives)
        local = torch.arange(n, device=views.device).repeat(v)
        rows = rows._replace(ids=torch.stack([rows.ids[:, 0], local], dim=1))
    if bank is not None:
        _check_bank(bank, views, normalize)
        keys, key_ids, log_weight = _and_bank(keys, key_ids, log_weight, bank, labelled=labels is not None)
    anchors = rows if contrast_mode == "all" else Rows(*(None if x is None else x[:n] for x in rows))  # type: ignore[arg-type]
    contrast = partial(
        info_nce, keys=keys, query_ids=anchors.ids, key_ids=key_ids, key_log_weight=log_weight, temperature=temperature
    )
    by_index = labels is None and positives is None
    result = contrast(
        anchors.z,
        positive=other_views(rows.itself, v)[: len(anchors.z)] if by_index else positive,
        candidate=None,
        itself=anchors.itself,
    )
    losses = result.loss
    if form == "in":
        summed, number = (contrast(q, candidate=positive).log_sum_exp for q in (anchors.z, torch.zeros_like(anchors.z)))
        losses = torch.where(result.valid, result.log_sum_exp - (summed - number), 0)
    counted = result.valid if reduction_over == "valid" else torch.ones_like(result.valid)
    if anchors.counted is not None:
        counted = counted & anchors.counted
    return reduce_losses(
        losses if base_temperature is None else losses * (temperature / base_temperature),
        counted=counted,
        weight=anchors.weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _check_settings(
    temperature: float | Tensor, base_temperature: float | None, form: str, contrast_mode: str, reduction_over: str
) -> None:
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    if base_temperature is not None:
        check_number("base_temperature", base_temperature, 0, open_low=True)
    check_choice("form", form, ("out", "in"))
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("reduction_over", reduction_over, ("valid", "all"))


def _check_positives(positives: Tensor, shape: tuple[int, int], *, labelled: bool, form: str) -> None:
    if labelled:
        raise ValueError("positives came together with labels, expected one of the two")
    if positives.shape != shape:
        raise ValueError(f"positives has shape {tuple(positives.shape)}, expected {shape}: (N, examples of all ranks)")
    if form == "in" and positives.dtype != torch.bool:
        raise TypeError(f'positives has dtype {positives.dtype}, expected torch.bool with form "in"')


def _among(positives: Tensor) -> Rule:
    """The positive rule of a matrix: query ids are (row, local example), key ids (row, example over all ranks)."""

    def rule(query_ids: Tensor, key_ids: Tensor) -> Tensor:
        t = positives[query_ids[:, 1]][:, key_ids[:, 1].clamp_min(0)]
        there = (key_ids[None, :, 1] >= 0) & not_self(query_ids, key_ids)  # a bank's keys are in no matrix
        return t & there if t.dtype == torch.bool else torch.where(there, t, 0)

    return rule


def _check_bank(bank: MemoryBank, views: Tensor, normalize: bool) -> None:
    if not normalize:
        raise ValueError("normalize is False, expected True with a bank: its keys are unit vectors")
    if bank.keys.shape[1] != views.shape[2]:
        raise ValueError(f"bank of width {bank.keys.shape[1]} got views {tuple(views.shape)}, expected its width")


def _and_bank(
    keys: Tensor, key_ids: Tensor, log_weight: Tensor | None, bank: MemoryBank, *, labelled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, ids and log weights with those of the bank behind them."""
    unknown = torch.full_like(bank.labels, -1)  # without labels each example is its own: the bank's say nothing of it
    of_bank = torch.stack([unknown, bank.labels if labelled else unknown], dim=1)
    own = torch.zeros_like(keys[:, 0]) if log_weight is None else log_weight.to(keys.dtype)
    usable = torch.where(bank.valid, 0.0, -torch.inf).to(keys.dtype)
    return torch.cat([keys, bank.keys.to(keys)]), torch.cat([key_ids, of_bank]), torch.cat([own, usable])


class SupConLoss(Loss):
    """Module form of :func:`supcon_loss`: ``loss(embeddings, labels=labels)`` or ``loss(view1, view2, labels=labels)``.

    Args:
        temperature: divisor > 0. The paper used 0.1.
        base_temperature: None, or > 0: the loss is multiplied by temperature / base_temperature.
        form: "out" or "in".
        contrast_mode: anchors are the rows of "all" views, or of the first "one".
        normalize: to unit length first.
        reduction_over: "valid" or "all".
    """

    spec = Spec(
        task="two_view",
        source="Khosla et al., Supervised Contrastive Learning, 2020, eq. 2 and 3",
        distributed="gathers",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        base_temperature: float | None = None,
        form: str = "out",
        contrast_mode: str = "all",
        normalize: bool = True,
        reduction_over: str = "valid",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature,
            base_temperature=base_temperature,
            form=form,
            contrast_mode=contrast_mode,
            normalize=normalize,
            reduction_over=reduction_over,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        _check_settings(temperature, base_temperature, form, contrast_mode, reduction_over)

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        positives: Tensor | None = None,
        bank: MemoryBank | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Views (N, d) with labels (N,), or what stands for them, to the reduced loss."""
        return supcon_loss(
            z, other, labels=labels, positives=positives, bank=bank, weight=weight, mask=mask, **self.options
        )
