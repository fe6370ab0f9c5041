"""Representation learning: a step as it is written, teacher and bank, what is logged and kept, exact resumption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.contrastive import (
    ASCLLoss,
    BarlowTwinsLoss,
    BYOLLoss,
    CACRLoss,
    CWRGPLoss,
    NTXentLoss,
    SwAVLoss,
    ntxent_loss,
)
from counterpoise.losses import CrossEntropyLoss
from counterpoise.memory import MomentumEncoder
from counterpoise.recipes import Checkpoints, SelfSupervised, SmallCNN, SupervisedContrastive, Views, fit
from counterpoise.recipes.data import LabelledData, digits_lt
from counterpoise.recipes.embedding_evaluation import LinearProbe, knn_scores, pair_similarities, similarity_quantiles
from counterpoise.samplers import CVaR

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def made(loss: Any = None, kind: type = SelfSupervised, **options: Any) -> SelfSupervised:
    torch.manual_seed(0)
    recipe = kind(SmallCNN(1, 10, width=4), loss or NTXentLoss(), num_classes=10, dim=6, hidden=8, **options)
    recipe.log_training = lambda *_: None  # type: ignore[method-assign]
    return recipe


def batch(n: int = 8, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    return {"input": x, "target": torch.randint(3, (n,), generator=g), "index": torch.arange(n)}


def embedded(recipe: SelfSupervised, given: dict[str, Tensor]) -> Tensor:
    views = recipe.views(given["input"], given["index"], 0)
    return recipe.projection(recipe.model(views.flatten(0, 1))).unflatten(0, (len(views), -1))


def test_a_step_is_the_objective_of_the_views() -> None:
    recipe = made()
    expected = ntxent_loss(embedded(copy.deepcopy(recipe), batch()))
    assert_close(recipe.training_step(batch(), 0), expected)


def test_labels_reach_the_objective_in_supervised_contrast() -> None:
    recipe = made(kind=SupervisedContrastive)
    expected = ntxent_loss(embedded(copy.deepcopy(recipe), batch()), labels=batch()["target"])
    assert_close(recipe.training_step(batch(), 0), expected)


def test_with_a_bank_the_keys_are_a_teachers_and_are_queued_behind_the_step() -> None:
    recipe = made(bank_size=20, momentum=0.9)
    assert isinstance(recipe.teacher, MomentumEncoder)
    assert recipe.bank is not None
    recipe.bank.enqueue(torch.randn(5, 6))
    bank = copy.deepcopy(recipe.bank)
    twin = copy.deepcopy(recipe)
    loss = recipe.training_step(batch(), 0)
    views = twin.views(batch()["input"], batch()["index"], 0)
    keys = twin.teacher(views.flatten(0, 1)).unflatten(0, (2, -1))
    assert_close(loss, ntxent_loss(embedded(twin, batch())[0], keys[1], bank=bank))
    assert int(recipe.bank.filled) == 5
    with torch.no_grad():
        for p in recipe.model.parameters():
            p.add_(1.0)
    before = [p.clone() for p in recipe.teacher.parameters()]
    recipe.on_train_batch_end(None, batch(), 0)
    assert int(recipe.bank.filled) == 13
    moved = [float((p - b).abs().max()) for p, b in zip(recipe.teacher.parameters(), before, strict=True)]
    assert any(abs(x - 0.1) < 1e-6 for x in moved)


def test_swav_queues_embeddings_of_its_own() -> None:
    recipe = made(SwAVLoss(num_prototypes=5, embedding_dim=6), bank_size=20)
    assert recipe.teacher is None
    assert recipe.bank is not None
    twin = copy.deepcopy(recipe)
    recipe.training_step(batch(), 0)
    recipe.on_train_batch_end(None, batch(), 0)
    keys = torch.nn.functional.normalize(embedded(twin, batch())[-1].detach(), dim=1)
    assert_close(recipe.bank.keys[:8], keys)


def digits() -> LabelledData:
    return digits_lt(imbalance_factor=5, batch_size=64)


def trained(folder: Path, epochs: int = 3, resume: bool = False, loss: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    recipe = SelfSupervised(SmallCNN(1, 10, width=8), loss or NTXentLoss(), num_classes=10, knn=5, **options)
    callbacks = [Checkpoints(folder / "checkpoints", monitor=recipe.monitor)]
    result = fit(recipe, digits(), folder=folder, max_epochs=epochs, resume=resume, callbacks=callbacks, **QUIET)
    return recipe, result


def test_it_learns_and_the_folder_holds_what_the_report_needs(tmp_path: Path) -> None:
    _, result = trained(tmp_path)
    scores = result.metrics["splits"]["test"]
    assert scores["balanced_knn_accuracy"] > 0.6
    assert scores["balanced_linear_accuracy"] > 0.7
    arrays = np.load(tmp_path / "embeddings.npz")
    data = digits()
    assert arrays["features"].shape == (len(data.splits.train), 32)
    assert arrays["targets"].tolist() == data.train_targets.tolist()
    assert len(arrays["test_features"]) == len(data.splits.test)
    assert sum(result.metrics["similarities"]["positive"]) == pytest.approx(1)
    assert len(result.metrics["neighbours"][0]) == 8
    html = result.report.read_text()
    for shown in ("coloured by class", "Signs of collapse", "nearest training images", "Cosine of embeddings"):
        assert shown in html
    assert "could not be" not in html


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (NTXentLoss, {"bank_size": 100, "schedule": "cosine"}),
        (BarlowTwinsLoss, {}),
        (ASCLLoss, {"bank_size": 100, "key_views": Views(crop=(0.8, 1.0))}),
        (lambda: CACRLoss(mode="queue"), {"bank_size": 100}),
        (BYOLLoss, {"schedule": "cosine"}),
        (lambda: SwAVLoss(num_prototypes=20, embedding_dim=64), {"bank_size": 100}),
        (lambda: CWRGPLoss(block_size=8), {}),
    ],
    ids=["queue and teacher", "statistics", "ASCL", "CACR's queue", "BYOL", "prototypes and bank", "steps counted"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, loss: Any, options: dict[str, Any]) -> None:
    recipe, _ = trained(tmp_path / "whole", loss=loss(), **options)
    stop = Stop(at=9)
    torch.manual_seed(0)
    cut = SelfSupervised(SmallCNN(1, 10, width=8), loss(), num_classes=10, knn=5, **options)
    folder = tmp_path / "cut"
    steps = [Checkpoints(folder / "checkpoints", monitor=cut.monitor, every_n_steps=4)]
    with pytest.raises(RuntimeError, match="by force"):
        fit(cut, digits(), folder=folder, max_epochs=3, callbacks=[*steps, stop], **QUIET)
    resumed, _ = trained(folder, resume=True, loss=loss(), **options)
    for (name, a), b in zip(recipe.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Stop(Checkpoints):
    """Stops the run by force behind a step."""

    def __init__(self, at: int) -> None:
        super().__init__("unused")
        self.at = at

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("stopped by force")

    def on_validation_end(self, *args: Any) -> None: ...

    def on_train_epoch_end(self, *args: Any) -> None: ...


def test_neighbours_vote_by_their_cosines() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0.1]])
    found = knn_scores(features, torch.tensor([0, 1, 2]), torch.tensor([[2.0, 0]]), 4, k=2, temperature=0.5)
    votes = torch.tensor([1.0, 1 / (1 + 0.01) ** 0.5]).div(0.5).exp()
    assert_close(found[0], torch.tensor([votes[0], 0, votes[1], 0]) / votes.sum())


def test_a_linear_probe_separates_what_is_separable_and_knows_unseen_classes() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.arange(60) % 3
    features = torch.eye(3)[target] + 0.1 * torch.randn(60, 3, generator=g)
    scores = LinearProbe(features, target, 4)(features)
    assert (scores.argmax(1) == target).all()
    assert (scores[:, 3] == -torch.inf).all()


def test_pairs_are_split_into_matching_and_other() -> None:
    positive, negative = pair_similarities(torch.eye(3), torch.eye(3))
    assert positive.tolist() == [1, 1, 1]
    assert negative.tolist() == [0] * 6
    assert similarity_quantiles(positive, negative)["positive_similarity_50"] == 1


def test_what_does_not_fit_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="views has num_views 1, expected at least 2"):
        made(views=Views(num_views=1))
    with pytest.raises(ValueError, match="has no teacher"):
        made(key_views=Views())
    with pytest.raises(ValueError, match="reweighter is a CVaR, expected none"):
        made(reweighter=CVaR(alpha=0.5))
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        made(momentum=1.5)
    with pytest.raises(ValueError, match="is a multiclass objective"):
        made(CrossEntropyLoss())
