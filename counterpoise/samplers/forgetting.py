r"""Forgetting events: how often an example that was classified correctly is got wrong again.

.. math:: \mathrm{forgotten}_i = \sum_t [c_i^{t-1} = 1,\; c_i^t = 0], \qquad
          \mathrm{AUM}_i = \sum_t \bigl(p_{y_i}^t - \max_{k \neq y_i} p_k^t\bigr)

over the presentations t of example i, with c_i^0 = 0. Many events = hard: keep the largest. An example never learned is
harder still: it scores infinity, or its number of presentations; DeepCore leaves it at 0 and would prune it as easy. A
low accumulated margin points to a wrong label. Correctness is that of the training forward pass.

Source: Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, 2019, section 3;
margin: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, 2020, with probabilities as
in Zheng et al., Coverage-centric Coreset Selection, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import PreciseBuffers, check_choice, check_number, check_per_row, check_within, in_second_pass
from counterpoise.distributed import gather_rows
from counterpoise.samplers.scores import el2n_scores


class ForgettingEvents(PreciseBuffers):
    """Counts of every training example, kept by its index; call :meth:`update` with each batch's logits.

    State moves in ``train()`` mode only, not inside ``second_pass()``, and not by rows whose logits are not finite.
    Rows of all ranks are gathered first, so that every rank holds the same counts; where an index comes twice in a step
    (a sampler fills up its last batch), its first row counts.

    Args:
        num_examples: N >= 1, examples of the training set.

    Buffers (persistent): events, presentations, correct (how often it was) (N,) int64, last_correct (N,) bool,
    first_learned (N,) int64 (the presentation at which it was first correct, from 0; -1 = never), margin (N,) float64.
    """

    events: Tensor
    presentations: Tensor
    correct: Tensor
    last_correct: Tensor
    first_learned: Tensor
    margin: Tensor

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        check_number("num_examples", num_examples, 1)
        for name in ("events", "presentations", "correct"):
            self.register_buffer(name, torch.zeros(num_examples, dtype=torch.int64))
        self.register_buffer("last_correct", torch.zeros(num_examples, dtype=torch.bool))
        self.register_buffer("first_learned", torch.full((num_examples,), -1))
        self.register_buffer("margin", torch.zeros(num_examples, dtype=torch.float64))

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, index: Tensor) -> None:
        """Takes in one step.

        Args:
            logits: (B, C), of the training forward pass.
            targets: (B,) class indices.
            index: (B,) indices of the examples in the training set.

        Raises:
            ValueError, TypeError: a shape, type, label or index that does not fit.
        """
        margin = -el2n_scores(logits, targets, variant="max_margin")
        finite = margin.isfinite()
        correct = logits.detach().argmax(1) == targets
        self.record(correct[finite], index[finite], margin[finite])

    @torch.no_grad()
    def record(self, correct: Tensor, index: Tensor, margin: Tensor | None = None) -> None:
        """Takes in one step: what was correct (B,) bool, which examples (B,), and margins (B,) if there are any."""
        check_per_row("index", index, correct)
        check_per_row("margin", margin, correct)
        check_within("index", index, 0, len(self.events) - 1, what="indices of training examples")
        if not self.training or in_second_pass():
            return
        device = self.events.device
        index = gather_rows(index.to(device).long())
        correct = gather_rows(correct.to(device).long()).bool()
        margin = gather_rows(self.margin.new_zeros(len(index)) if margin is None else margin.to(self.margin))
        first = _first_occurrences(index)
        i, right = index[first], correct[first]
        self.events[i] += (self.last_correct[i] & ~right).long()
        learned_now = right & (self.first_learned[i] < 0)
        self.first_learned[i] = torch.where(learned_now, self.presentations[i], self.first_learned[i])
        self.last_correct[i] = right
        self.correct[i] += right.long()
        self.margin[i] += margin[first]
        self.presentations[i] += 1

    def scores(self, never_learned: str = "inf") -> Tensor:
        """(N,) float64 forgetting events, larger = harder.

        Args:
            never_learned: what an example never classified correctly scores: "inf", or "presentations".
        """
        check_choice("never_learned", never_learned, ("inf", "presentations"))
        worst = self.presentations.double() if never_learned == "presentations" else torch.inf
        return torch.where(self.first_learned < 0, worst, self.events.double())

    def margins(self) -> Tensor:
        """(N,) float64 mean margin p_y - max of the others over the presentations (0 without any); low = suspicious."""
        return self.margin / self.presentations.clamp_min(1)

    def extra_repr(self) -> str:
        """Number of examples."""
        return f"num_examples={len(self.events)}"


def _first_occurrences(index: Tensor) -> Tensor:
    """Positions of the first occurrence of every distinct index."""
    order = index.argsort(stable=True)
    ordered = index[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new]
