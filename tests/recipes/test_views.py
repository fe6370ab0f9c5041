"""Views: a function of (seed, epoch, index, view) alone; each of its parts does what it says; the heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms import v2

from counterpoise.recipes import PredictionHead, ProjectionHead, SmallCNN, TransformViews, Views
from counterpoise.recipes.heads import feature_extractor

STILL = {"crop": (1.0, 1.0), "contrast": 0.0, "brightness": 0.0}


def images(n: int = 6, size: int = 12) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "views",
    [Views(flip=True, rotation=10, blur=0.5, noise=0.1), TransformViews(v2.RandomCrop(8))],
    ids=["batched", "torchvision"],
)
def test_an_example_sees_the_same_views_in_any_batch(views: nn.Module) -> None:
    x, index = images(), torch.arange(10, 16)
    whole = views(x, index, 3)
    assert whole.shape[:2] == (2, 6)
    assert_close(views(x[2:4], index[2:4], 3), whole[:, 2:4])
    assert not torch.equal(views(x, index, 4), whole)
    assert not torch.equal(whole[0], whole[1])


def test_nothing_drawn_is_the_image_itself() -> None:
    assert_close(Views(num_views=1, **STILL)(images(), torch.arange(6), 0)[0], images(), atol=1e-6, rtol=0)


def test_a_flip_is_a_mirror() -> None:
    seen = Views(flip=True, **STILL)(images(), torch.arange(6), 0)
    x = images().expand(2, -1, -1, -1, -1)
    flipped = (seen - x.flip(-1)).abs().amax((2, 3, 4)) < 1e-5
    kept = (seen - x).abs().amax((2, 3, 4)) < 1e-5
    assert (flipped ^ kept).all()
    assert flipped.any()
    assert kept.any()


def test_a_quarter_turn_is_a_rotation() -> None:
    x = images(1)
    views = Views(num_views=64, rotation=180, **STILL)
    turned = views(x, torch.tensor([0]), 0)[:, 0]
    u = turned.flatten(1)
    assert (u.std(0) > 0).any()
    inner = (slice(None), slice(None), slice(4, 8), slice(4, 8))
    assert_close(turned[inner].mean(), x[inner].mean(), atol=0.12, rtol=0)


def test_crops_keep_their_share_and_stay_inside() -> None:
    ramp = torch.linspace(0, 1, 40).expand(1, 1, 40, 40)
    views = Views(num_views=200, crop=(0.3, 0.6), contrast=0.0, brightness=0.0)
    seen = views(ramp, torch.tensor([7]), 0)[:, 0, 0]
    width = (seen[:, 0, -1] - seen[:, 0, 0]) * 40 / 39
    assert float(width.min()) > (0.3 * 0.75) ** 0.5 - 0.05
    assert float(width.max()) < (0.6 / 0.75) ** 0.5 + 0.05
    assert float(seen.min()) >= 0
    assert float(seen[:, 0, -1].max()) <= 1


def test_tables_get_noise_and_gaps() -> None:
    x = torch.ones(200, 10)
    seen = Views(noise=0.5, drop=0.3)(x, torch.arange(200), 0)
    gaps = seen == 0
    assert abs(float(gaps.double().mean()) - 0.3) < 0.03
    assert abs(float(seen[~gaps].std()) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": (0.0, 1.0)}, "crop is"),
        ({"crop": (0.9, 0.5)}, "crop is"),
        ({"num_views": 0}, "num_views is 0"),
        ({"contrast": 1.5}, "contrast is 1.5"),
        ({"drop": -0.1}, "drop is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**options)  # type: ignore[arg-type]


def test_features_are_what_goes_into_the_last_layer_and_the_model_stays_whole() -> None:
    model = SmallCNN(1, 7, width=4)
    encoder, width = feature_extractor(model.eval())
    assert width == 16
    assert_close(model.head(encoder(images())), model(images()))
    nested, width = feature_extractor(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(144, 5), nn.Linear(5, 2))))
    assert (width, nested(images()).shape) == (5, (6, 5))
    with pytest.raises(ValueError, match="without a linear layer"):
        feature_extractor(nn.Flatten())


def test_heads_end_without_normalisation() -> None:
    head = ProjectionHead(8, out_features=3, hidden=5, layers=3)
    assert head(torch.randn(4, 8)).shape == (4, 3)
    assert isinstance(head.layers[-1], nn.Linear)
    assert isinstance(ProjectionHead(8, 3, layers=1).layers[0], nn.Linear)
    assert PredictionHead(6, hidden=2)(torch.randn(4, 6)).shape == (4, 6)
