"""``python docs/pictures.py``: the pictures of the method pages, drawn with the library's own functions."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from counterpoise.losses import asymmetric_loss, sigmoid_focal_loss
from counterpoise.samplers import (
    chi_square_weights,
    cvar_weights,
    facility_location,
    herding,
    k_center_greedy,
    kl_ball_weights,
    tilted_weights,
)

IMAGES = Path(__file__).parent / "images"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "counterpoise",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def save(name: str, draw: object, panels: int = 1) -> None:
    """``draw(*axes)`` into images/<name>.svg."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((4.2 * panels, 2.8), layout="constrained")
        draw(*np.atleast_1d(figure.subplots(1, panels)))  # type: ignore[operator]
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None})


def focal(axes: Axes) -> None:
    """The loss of a positive against its probability."""
    p = torch.linspace(0.01, 0.999, 200)
    z, t = torch.logit(p)[:, None], torch.ones(200, 1)
    for gamma, style in ((0.0, ":"), (0.5, "-."), (2.0, "-"), (5.0, "--")):
        axes.plot(p, sigmoid_focal_loss(z, t, gamma=gamma, reduction="none"), style, label=f"gamma = {gamma:g}")
    axes.set_xlabel("probability of the true label")
    axes.set_ylabel("loss")
    axes.set_ylim(0, 4)
    axes.legend()


def asymmetric(axes: Axes) -> None:
    """The gradient of an absent label against its probability."""
    p = torch.linspace(0.001, 0.99, 200)
    for label, gamma, clip, style in (
        ("cross-entropy", 0.0, 0.0, ":"),
        ("focal, gamma = 4", 4.0, 0.0, "-."),
        ("asymmetric: gamma- = 4, margin 0.05", 4.0, 0.05, "-"),
    ):
        z = torch.logit(p)[:, None].requires_grad_()
        loss = asymmetric_loss(z, torch.zeros(200, 1), gamma_neg=gamma, margin=clip, reduction="sum")
        axes.plot(p, torch.autograd.grad(loss, z)[0][:, 0], style, label=label)
    axes.set_xlabel("probability of an absent label")
    axes.set_ylabel("gradient of its logit")
    axes.legend()


def coresets(*panels: Axes) -> None:
    """Twelve picks of three selectors from three clouds and a few outliers."""
    draw = torch.Generator().manual_seed(0)
    clouds = torch.tensor([[0.0, 0.0], [4.0, 0.5], [1.5, 3.5]]).repeat_interleave(torch.tensor([180, 70, 30]), 0)
    points = clouds + 0.6 * torch.randn(280, 2, generator=draw)
    points = torch.cat([points, torch.tensor([[6.5, 4.0], [-2.5, 3.5], [5.0, -2.5]])])
    for axes, (name, select) in zip(
        panels,
        (("k-center", k_center_greedy), ("facility location", facility_location), ("herding", herding)),
        strict=True,
    ):
        picked = points[select(points, 12).indices]  # type: ignore[operator]
        axes.scatter(*points.T, s=6, color="0.75", linewidths=0)
        axes.scatter(*picked.T, s=26, color="C3", linewidths=0)
        axes.set_title(name)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])


def robust(axes: Axes) -> None:
    """Weights of a hundred losses, as multiples of equal weights."""
    losses = torch.linspace(0, 4, 100, dtype=torch.float64)
    for name, weights, style in (
        ("CVaR, worst third", cvar_weights(losses, 1 / 3), "-"),
        ("chi-square, radius 0.5", chi_square_weights(losses, 0.5), "--"),
        ("KL, radius 0.5", kl_ball_weights(losses, 0.5), "-."),
        ("tilt -1", tilted_weights(losses, -1.0), ":"),
    ):
        axes.plot(losses, 100 * weights, style, label=name)
    axes.set_xlabel("loss of an example")
    axes.set_ylabel("weight, 1 = equal")
    axes.legend()


if __name__ == "__main__":
    save("focal", focal)
    save("asymmetric", asymmetric)
    save("coresets", coresets, panels=3)
    save("robust", robust)
