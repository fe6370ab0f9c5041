"""C7: one full graph, the same values and gradients; and derivatives that agree with finite differences."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.parts import OBJECTIVES, batch_of, build, ids, value

objectives = pytest.mark.parametrize("part", OBJECTIVES, ids=ids(OBJECTIVES))
COMPILED = [p for p in OBJECTIVES if p.spec.compiles]


def compare_compiled(part: type, backend: str) -> None:
    torch._dynamo.reset()
    module = build(part)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    weight = torch.rand(6)
    for options in ({}, {"weight": weight, "mask": torch.tensor([True, False, True, True, True, True])}):
        batch = batch_of(part.spec.task, dtype=torch.float32)
        again = batch.fresh()
        loss, expected = value(compiled, batch, **options), value(module, again, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        for leaf, other in zip(batch.leaves, again.leaves, strict=True):
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", COMPILED, ids=ids(COMPILED))
@pytest.mark.filterwarnings("ignore")
def test_compiles_to_one_graph(part: type) -> None:
    compare_compiled(part, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("part", COMPILED, ids=ids(COMPILED))
@pytest.mark.filterwarnings("ignore")
def test_compiles_with_inductor(part: type) -> None:
    compare_compiled(part, "inductor")


DIFFERENTIABLE = [p for p in OBJECTIVES if "finite_differences" not in p.spec.exempt]  # exempt: stopped gradients


@pytest.mark.parametrize("part", DIFFERENTIABLE, ids=ids(DIFFERENTIABLE))
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_gradients_agree_with_finite_differences(part: type) -> None:
    module, batch = build(part), batch_of(part.spec.task, n=4)
    rest = batch.inputs[batch.differentiable :]
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return module(*leaves, *rest, **batch.options, weight=weight)

    assert torch.autograd.gradcheck(function, batch.leaves)
    if part.spec.double_backward:
        assert torch.autograd.gradgradcheck(function, batch.leaves)
