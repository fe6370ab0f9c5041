"""Gradient surgery: gradients of tasks go into TorchJD's aggregators under manual optimisation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterpoise.losses import EqualWeighting, StaticWeighting, UncertaintyWeighting
from counterpoise.recipes import SmallCNN
from counterpoise.recipes.data import LabelledData, rotated_digits
from counterpoise.recipes.gradient_surgery import GradientSurgery
from counterpoise.recipes.multi_task import MultiTask
from counterpoise.recipes.run import fit
from counterpoise.recipes.schedules import cosine

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
WEIGHTS = {"class": 1.0, "angle": 1e-3, "ink": 1e3}


def data() -> LabelledData:
    return rotated_digits(batch_size=64, missing=0.1)


def recipe(kind: type[MultiTask], loss: nn.Module, **options: Any) -> MultiTask:
    torch.manual_seed(0)
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05), **options}
    return kind(SmallCNN(1, 2, width=8), loss, tasks=data().splits.facts["tasks"], **settings)


def weights(made: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def test_the_sum_of_gradients_is_the_gradient_of_the_sum(tmp_path: Path) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    plain = recipe(MultiTask, StaticWeighting(WEIGHTS))
    summed = recipe(GradientSurgery, StaticWeighting(WEIGHTS), aggregator=aggregation.Sum(), relative_losses=False)
    for name, made in (("plain", plain), ("summed", summed)):
        fit(made, data(), folder=tmp_path / name, max_epochs=1, **QUIET)
    assert torch.allclose(weights(summed), weights(plain), rtol=1e-3, atol=1e-4)


def test_it_learns_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("torchjd.aggregation")
    ends = []
    for name, plan in (("at once", [4]), ("in two", [1, 4])):
        for epochs in plan:
            made = recipe(
                GradientSurgery,
                EqualWeighting(),
                aggregator="UPGrad",
                optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3),
            )
            result = fit(made, data(), folder=tmp_path / name, max_epochs=epochs, resume=True, **QUIET)
        ends.append(weights(made))
    assert torch.equal(*ends)
    assert result["score"] > 0.5
    assert result.metrics["cost"]["steps"] == 4 * len(data().train_dataloader())


def test_the_schedule_is_stepped(tmp_path: Path) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    made = recipe(GradientSurgery, EqualWeighting(), aggregator=aggregation.UPGrad(), scheduler=cosine)
    fit(made, data(), folder=tmp_path, max_epochs=1, **QUIET)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["lr_schedulers"][0]["last_epoch"] == len(data().train_dataloader())


def test_a_learned_weighting_and_an_unknown_aggregator_are_refused() -> None:
    pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match="UncertaintyWeighting has parameters, which gradient surgery does not train"):
        recipe(GradientSurgery, UncertaintyWeighting(["classification"] * 3))
    with pytest.raises(ValueError, match=r"aggregator is 'UpGrad', expected one of .*did you mean 'UPGrad'"):
        recipe(GradientSurgery, EqualWeighting(), aggregator="UpGrad")


def test_without_torchjd_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'counterpoise\[multitask\]'"):
        recipe(GradientSurgery, EqualWeighting())
