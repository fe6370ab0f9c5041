"""The segmentation recipe: aligned views, scores of dense and sparse images apart, AdaWAC's weights, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterpoise.losses import CrossEntropyLoss
from counterpoise.recipes import AlignedViews, SemiSegmentation, SmallCNN, SmallUNet, fit
from counterpoise.recipes.data import LabelledData, digits_scenes
from counterpoise.recipes.segmentation_evaluation import PixelConfusion, overlap, segmentation_metrics
from counterpoise.recipes.semi_segmentation import soft_dice_loss
from counterpoise.samplers import AdaWAC, GroupDRO

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def scenes(n_train: int = 60) -> LabelledData:
    return digits_scenes(classes=3, n_train=n_train, n_val=40, n_test=40, batch_size=16)


def recipe(data: LabelledData, **options: Any) -> SemiSegmentation:
    torch.manual_seed(0)
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    model = SmallUNet(1, data.num_classes, width=6)
    return SemiSegmentation(model, CrossEntropyLoss(), num_classes=data.num_classes, **{**adam, **options})


def test_it_learns_and_reports(tmp_path: Path) -> None:
    data = scenes(240)
    weigher = AdaWAC(240, step_size=0.5)
    result = fit(recipe(data, reweighter=weigher), data, folder=tmp_path, max_epochs=8, **QUIET)
    assert result["mean_iou"] > 0.3
    assert result["dense_mean_iou"] != result["sparse_mean_iou"]
    means = result.metrics["weights"]["mean"]
    assert means["dense"] > means["sparse"] + 0.02  # crowded images are trained on their labels
    page = (tmp_path / "report.html").read_text()
    assert "not available" not in page
    assert page.count("data:image/png;base64") == 3 * 8
    for told in ("Share of the supervised loss", "8 test images: input, true classes", "background"):
        assert told in page


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_baselines_have_one_share_for_all(share: float, tmp_path: Path) -> None:
    data = scenes()
    made = recipe(data, share=share)
    assert made.shares(torch.rand(3), torch.rand(3), torch.arange(3)).tolist() == [share] * 3
    result = fit(made, data, folder=tmp_path, max_epochs=1, **QUIET)
    assert "weights" not in result.metrics
    assert "every example has the same share" in (tmp_path / "report.html").read_text()


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    states = []
    for name, plan in (("at once", [3]), ("in two", [1, 3])):
        for epochs in plan:
            data = scenes()
            made = recipe(data, reweighter=AdaWAC(60))
            fit(made, data, folder=tmp_path / name, max_epochs=epochs, resume=True, **QUIET)
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert last["reweighter.logits"].dtype == torch.float64
        assert last["reweighter.logits"].abs().min() > 0  # every example has been seen
        states.append(torch.cat([x.flatten().double() for x in last.values()]))
    assert torch.equal(*states)


def test_the_step_is_the_equation() -> None:
    data = scenes()
    made = recipe(data, reweighter=AdaWAC(60, step_size=2.0), views=AlignedViews("none", 0, 0, 0))
    made.log_training = lambda *_: None  # type: ignore[method-assign]
    batch = torch.utils.data.default_collate([data.splits.train[i] for i in range(6)])
    total = made.training_step(batch, 0)
    logits = made.model(batch["input"].repeat(2, 1, 1, 1))[:6]  # both views are the image: no consistency loss
    losses = nn.functional.cross_entropy(logits, batch["target"], reduction="none").mean((1, 2))
    torch.testing.assert_close(made.reweighter.logits[:6], 2 * losses.double(), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    dice = soft_dice_loss(logits.repeat(2, 1, 1, 1), batch["target"].repeat(2, 1, 1))
    expected = 0.5 * dice + 0.5 * (torch.sigmoid(2 * losses) * losses).mean()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_views_are_undone_and_depend_on_seed_epoch_and_index_alone() -> None:
    images, index = torch.rand(8, 1, 8, 8), torch.arange(8)
    flips_alone = AlignedViews("both", contrast=0, brightness=0, noise=0)
    views, flips = flips_alone(images, index, 0)
    assert torch.equal(flips_alone.undo(views, flips), images.repeat(2, 1, 1, 1))
    assert 0 < int(flips.sum()) < flips.numel()
    assert not torch.equal(views, images.repeat(2, 1, 1, 1))
    made = AlignedViews(seed=3)
    whole = made(images, index, 5)[0]
    assert torch.equal(made(images[2:4], index[2:4], 5)[0], whole[[2, 3, 10, 11]])
    assert not torch.equal(made(images, index, 6)[0], whole)
    assert not torch.equal(whole[:8], whole[8:])
    with pytest.raises(ValueError, match="did you mean 'horizontal'"):
        AlignedViews("horisontal")


def test_noise_is_standard_normal() -> None:
    noise = AlignedViews("none", 0, 0, noise=1.0)(torch.zeros(50, 1, 20, 20), torch.arange(50), 0)[0]
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    assert torch.isfinite(noise).all()


def test_features_of_a_flipped_image_lie_where_the_image_had_them() -> None:
    images = torch.rand(4, 1, 8, 12)
    model = SmallUNet(1, 3, width=4).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)  # what mirrored content looks like
        torch.testing.assert_close(model.encode(images.flip(-1))[-1].flip(-1), model.encode(images)[-1])
        assert model(images).shape == (4, 3, 8, 12)
    with pytest.raises(ValueError, match="images have 9 x 12 pixels, expected multiples of 4"):
        model(torch.rand(1, 1, 9, 12))


def test_scores_of_a_small_example() -> None:
    target = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [2, 0]]])
    predicted = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [2, -1]]]).clamp(min=0)
    found = segmentation_metrics(predicted, target, class_names=["background", "a", "b"])
    assert found.scalars == pytest.approx(
        {
            "mean_iou": (1 / 3 + 1) / 2,
            "mean_dice": (1 / 2 + 1) / 2,
            "dense_mean_iou": (1 / 2 + 1) / 2,
            "dense_mean_dice": (2 / 3 + 1) / 2,
            "sparse_mean_iou": 0.0,
            "sparse_mean_dice": 0.0,
            "sparse_false_alarms": 1 / 4,
            "pixel_accuracy": 6 / 8,
        }
    )
    assert found.details["density"] == {"sparse": 1, "dense": 1, "sparse_below": 0.12}
    empty = segmentation_metrics(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), class_names=["background", "a"])
    assert empty.scalars["mean_iou"] is None
    assert any("dense" in note for note in empty.notes)


def test_pixels_are_counted_over_batches_without_the_ignored() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(-1, 3, (6, 4, 4), generator=generator)
    predicted = torch.randint(3, (6, 4, 4), generator=generator)
    counted = PixelConfusion(3)
    for rows in torch.arange(6).split(4):
        counted.update(predicted[rows], target[rows])
    confusion = counted.compute()
    assert int(confusion.sum()) == int((target >= 0).sum())
    iou, dice = overlap(confusion)
    torch.testing.assert_close(dice, 2 * iou / (1 + iou))


def test_soft_dice_is_zero_for_the_truth_and_differentiable() -> None:
    target = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    target[0, 0, 0] = -1
    sure = 50.0 * nn.functional.one_hot(target.clamp(min=0), 3).movedim(-1, 1).float()
    torch.testing.assert_close(soft_dice_loss(sure, target), torch.tensor(0.0), atol=1e-6, rtol=0)
    logits = torch.zeros(2, 3, 4, 4, requires_grad=True)
    soft_dice_loss(logits, target).backward()
    assert logits.grad is not None
    assert float(logits.grad[0, :, 0, 0].abs().sum()) == 0  # an ignored pixel
    assert float(logits.grad.abs().sum()) > 0


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = scenes()
    with pytest.raises(ValueError, match="reweighter is a GroupDRO, expected AdaWAC"):
        recipe(data, reweighter=GroupDRO([1, 2]))
    with pytest.raises(ValueError, match="SmallCNN has no encode and decode"):
        SemiSegmentation(SmallCNN(1, 4), CrossEntropyLoss(), num_classes=4)
    with pytest.raises(ValueError, match=r"share is 2, expected a number in \[0, 1\]"):
        recipe(data, share=2)
    made = recipe(data)
    made.example_weight = torch.ones(60)
    with pytest.raises(ValueError, match="weighs by itself"):
        fit(made, data, folder=tmp_path, max_epochs=1, **QUIET)


def test_scenes_are_sparse_or_dense_and_repeat_by_seed() -> None:
    first, again, other = (digits_scenes(seed=seed).splits for seed in (1, 1, 2))
    assert torch.equal(first.train.inputs, again.train.inputs)  # type: ignore[attr-defined]
    assert not torch.equal(first.train.inputs, other.train.inputs)  # type: ignore[attr-defined]
    share = (first.train.targets > 0).double().mean((1, 2))
    assert not ((share > 0.12) & (share < 0.15)).any()
    assert 0.4 < float((share <= 0.12).double().mean()) < 0.6
    assert first.class_names == ["background", "0", "1", "2", "3"]
    assert first.class_counts == first.train.targets.flatten().bincount().tolist()
    with pytest.raises(ValueError, match="cells is 3, expected an even number"):
        digits_scenes(cells=3)
