"""``Spec``: what a public part declares about itself, read by the contract tests, the recipes and the docs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Distributed = Literal["local", "gathers", "statistics", "order_statistics", "single_process"]
Origin = Literal["verified", "derived", "from_memory"]


@dataclass(frozen=True)
class No:
    """A ``False`` that carries its reason: ``compiles=No("solves on the host")``."""

    reason: str

    def __bool__(self) -> bool:
        return False


Answer = bool | No


@dataclass(frozen=True)
class Spec:
    """What a loss, objective, reweighter or sampler promises.

    Args:
        task: which kind of input it takes: multiclass, multilabel, two_view, reweighter, sampler, ...
        source: title and year of the paper, and the equation where known.
        needs: facts known only at run time, by name (class_counts, group_counts, cosine_logits, ...).
        distributed: how several ranks are made to equal one. ``single_process`` needs a reason in ``exempt``.
        per_row: one value per row exists, so that a reweighter can be composed with it.
        weight_linear: multiplying ``weight`` by a constant multiplies every row's value by it.
        stateful: holds state that training changes.
        compiles: ``torch.compile(fullgraph=True)`` traces it.
        double_backward: the gradient is itself differentiable.
        uses_prior: it corrects for the training prior, so a re-balancing sampler has to be told to it.
        origin: verified (against vectors or identities), derived, or from_memory.
        exempt: contract ("C6", ...) to the reason for which this part inherently cannot satisfy it.
    """

    task: str
    source: str
    needs: tuple[str, ...] = ()
    distributed: Distributed = "local"
    per_row: Answer = True
    weight_linear: Answer = True
    stateful: bool = False
    compiles: Answer = True
    double_backward: Answer = True
    uses_prior: bool = False
    origin: Origin = "verified"
    exempt: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("per_row", "weight_linear", "compiles", "double_backward"):
            if getattr(self, name) is False:
                raise ValueError(f"Spec.{name} is False without a reason, expected No('why')")
        if self.distributed not in get_args(Distributed):
            raise ValueError(f"Spec.distributed is {self.distributed!r}, expected one of {get_args(Distributed)}")
        if self.distributed == "single_process" and "C6" not in self.exempt:
            raise ValueError("Spec.distributed is 'single_process' without a reason in Spec.exempt['C6']")

    @property
    def exemptions(self) -> dict[str, str]:
        """Every exemption with its reason, those written as ``No(...)`` included."""
        refusals = {name: getattr(self, name) for name in ("per_row", "weight_linear", "compiles", "double_backward")}
        return {**{name: no.reason for name, no in refusals.items() if isinstance(no, No)}, **self.exempt}
