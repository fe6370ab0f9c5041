r"""The Power of Few: weights are learned on a coreset, and every example takes those of its nearest coreset example.

.. math:: d_i = \lVert h_i - \mu_{y_i} \rVert, \quad \text{keep } \mathrm{round}(f\, n_c) \text{ of each class with the
          smallest } |d_i - \mathrm{median}_c(d)|; \qquad w_j = w_{nn(j)}

1. :func:`moderate_coreset` leaves out outliers and near-copies of the class mean alike.
2. :class:`MetaWeightNet` learns weights on the coreset: :func:`meta_weight_loss` is the loss on a small clean set after
   one virtual step, as a function of the net's parameters.
3. :func:`propagate_weights` hands the weights on; training then minimises sum w_i l_i / sum w_i over all data.

Distances to the class mean use the features as they are, nearest neighbours unit features. A class of several modes
makes the median shell meaningless.

Source: Jafari et al., The Power of Few: Accelerating and Enhancing Data Reweighting with Coreset Selection, 2024
(derived from its summary); median rule: Xia et al., Moderate Coreset, 2023; net: Shu et al., Meta-Weight-Net, 2019, eq.
3 to 5 (from memory).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from counterpoise._core import at_least_float32, check_choice, check_number, check_per_row
from counterpoise.samplers.selection import Selection, check_features, check_targets

Parameters = dict[str, Tensor]
TILE = 1 << 21  # numbers in a tile of similarities


def distances_to_class_mean(features: Tensor, targets: Tensor) -> Tensor:
    """(N,) float64 distances of each example to the mean of its class; features (N, D), targets (N,)."""
    check_features(features)
    check_targets(targets, features)
    x, targets = features.detach().double(), targets.long()
    counts = torch.bincount(targets)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, targets, x)
    return torch.linalg.vector_norm(x - (sums / counts.clamp_min(1)[:, None])[targets], dim=1)


def moderate_coreset(features: Tensor, targets: Tensor, fraction: float) -> Selection:
    """The examples of median distance to their class mean.

    Args:
        features: (N, D), finite.
        targets: (N,) class indices.
        fraction: of each class, in (0, 1]; at least one example a class.

    Returns:
        A selection in ascending order of index, whose weights are n_c over the number kept of the class (sum N). Ties
        go to the lowest index.

    Raises:
        ValueError, TypeError: a shape, type or setting that does not fit.
    """
    check_number("fraction", fraction, 0, 1, open_low=True)
    distance = distances_to_class_mean(features, targets)
    kept: list[Tensor] = []
    weights = torch.zeros_like(distance)
    for k in targets.unique().tolist():
        members = (targets == k).nonzero().flatten()
        d = distance[members]
        count = max(1, round(fraction * len(members)))
        closest = members[(d - _median(d)).abs().argsort(stable=True)[:count]]
        weights[closest] = len(members) / count
        kept.append(closest)
    indices = torch.cat(kept).sort().values
    return Selection(indices, weights[indices])


def _median(values: Tensor) -> Tensor:
    """The middle of the values, of an even number the mean of the two middle ones."""
    ordered, n = values.sort().values, len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def propagate_weights(
    weights: Tensor,
    coreset_features: Tensor,
    features: Tensor,
    *,
    coreset_targets: Tensor | None = None,
    targets: Tensor | None = None,
    neighbors: int = 1,
    metric: str = "cosine",
) -> Tensor:
    """Every example takes the mean weight of its nearest coreset examples.

    With both targets, neighbours are of the same class, since a weight was learned for its label's loss; a class that
    the coreset lacks takes neighbours of any. Distances are formed in tiles.

    Args:
        weights: (M,) of the coreset.
        coreset_features: (M, D).
        features: (N, D).
        coreset_targets: (M,) class indices, with ``targets``.
        targets: (N,) class indices.
        neighbors: how many neighbours' weights are averaged, >= 1; a class with fewer averages those it has.
        metric: "cosine" (of unit features) or "euclidean".

    Returns:
        (N,) in the type of the weights, at least float32.

    Raises:
        ValueError, TypeError: shapes, types or settings that do not fit.
    """
    nearest = nearest_in_coreset(
        coreset_features, features, coreset_targets=coreset_targets, targets=targets, neighbors=neighbors, metric=metric
    )
    check_per_row("weights", weights, coreset_features)
    taken = at_least_float32(weights)[nearest.clamp_min(0)]
    found = (nearest >= 0).to(taken.dtype)
    return (taken * found).sum(1) / found.sum(1)


def nearest_in_coreset(
    coreset_features: Tensor,
    features: Tensor,
    *,
    coreset_targets: Tensor | None = None,
    targets: Tensor | None = None,
    neighbors: int = 1,
    metric: str = "cosine",
) -> Tensor:
    """(N, neighbors) positions in the coreset, nearest first, -1 where a class has no more; see propagate_weights."""
    check_features(coreset_features, "coreset_features")
    check_features(features)
    if coreset_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, expected (N, {coreset_features.shape[1]}), the width of "
            "coreset_features"
        )
    if (targets is None) != (coreset_targets is None):
        raise ValueError("targets and coreset_targets go together, expected both or neither")
    check_number("neighbors", neighbors, 1, len(coreset_features))
    check_choice("metric", metric, ("cosine", "euclidean"))
    keys = _mapped(coreset_features, metric)
    if targets is None or coreset_targets is None:
        return _nearest(features, keys, neighbors, metric)
    check_targets(targets, features)
    check_per_row("coreset_targets", coreset_targets, coreset_features)
    nearest = torch.full((len(features), neighbors), -1, device=features.device)
    for k in targets.unique().tolist():
        members, allowed = (targets == k).nonzero().flatten(), (coreset_targets == k).nonzero().flatten()
        if len(allowed) == 0:
            allowed = torch.arange(len(keys), device=features.device)
        count = min(neighbors, len(allowed))
        nearest[members, :count] = allowed[_nearest(features[members], keys[allowed], count, metric)]
    return nearest


def _mapped(features: Tensor, metric: str) -> Tensor:
    x = features.detach().double()
    return normalize(x, dim=1) if metric == "cosine" else x


def _nearest(features: Tensor, keys: Tensor, neighbors: int, metric: str) -> Tensor:
    """(N, neighbors) positions of the nearest keys."""
    tiles = features.split(max(1, TILE // len(keys)))
    found = [torch.cdist(_mapped(tile, metric), keys).topk(neighbors, dim=1, largest=False) for tile in tiles]
    return torch.cat([nearest.indices for nearest in found])


class MetaWeightNet(nn.Module):
    """Weights in (0, 1) from losses: a perceptron 1 - hidden - 1 with ReLU inside and a sigmoid at the end.

    Args:
        hidden: width >= 1.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        check_number("hidden", hidden, 1)
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """Losses (N,) to weights (N,); the losses are detached, the weights are not."""
        return self.layers(losses.detach()[:, None])[:, 0]


def meta_weight_loss(
    model: nn.Module,
    weight_net: nn.Module,
    row_losses: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    clean: tuple[Tensor, Tensor],
    step_size: float,
) -> Tensor:
    r"""Mean loss on the clean examples after one virtual step on the weighted batch.

    .. math:: \theta' = \theta - \alpha \nabla_\theta \frac{1}{B} \sum_i V(\ell_i; \phi)\, \ell_i(\theta)

    Its gradient reaches the parameters phi of the net, and not those of the model. Step an optimiser of phi on it, then
    train the model with the net's new weights. The model's buffers are read and not written; put it into the mode that
    the virtual step shall see.

    Args:
        model: maps inputs to logits.
        weight_net: maps losses (B,) to weights (B,), such as :class:`MetaWeightNet`.
        row_losses: maps logits and targets to one loss a row, such as a loss with ``reduction="none"``.
        batch: (inputs, targets) of training.
        clean: (inputs, targets) of a small clean and balanced set.
        step_size: alpha > 0 of the virtual step.

    Returns:
        0-d.
    """
    check_number("step_size", step_size, 0, open_low=True)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def losses_at(parameters: Parameters, inputs: Tensor, targets: Tensor) -> Tensor:
        return row_losses(functional_call(model, {**parameters, **buffers}, (inputs,)), targets)

    losses = losses_at(theta, *batch)
    total = (weight_net(losses) * losses).mean()
    slopes = torch.autograd.grad(total, list(theta.values()), create_graph=True, allow_unused=True)
    moved = {
        name: p.detach() if slope is None else p.detach() - step_size * slope
        for (name, p), slope in zip(theta.items(), slopes, strict=True)
    }
    return losses_at(moved, *clean).mean()
