"""Heads of representation learning: what projects features, what predicts projections, and the features themselves."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import Tensor, nn

from counterpoise._core import check_number
from counterpoise.losses import CosineLinear


class ProjectionHead(nn.Module):
    """Linear layers with batch normalisation and ReLU between them; nothing behind the last.

    Args:
        in_features: d of the features (N, d).
        out_features: width of the embeddings.
        hidden: width of the hidden layers.
        layers: >= 1; one is a linear map.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020, section 2.1.
    """

    def __init__(self, in_features: int, out_features: int = 64, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        for name, value in (("out_features", out_features), ("hidden", hidden), ("layers", layers)):
            check_number(name, value, 1)
        widths = [in_features, *[hidden] * (layers - 1)]
        hidden_layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            hidden_layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(widths[-1], out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) to embeddings (N, out_features), not normalised."""
        return self.layers(features)


class PredictionHead(ProjectionHead):
    """What BYOL and SimSiam put behind the online branch alone: from embeddings to embeddings of the same width.

    Args:
        width: of the embeddings.
        hidden: width of the hidden layer.

    Source: Grill et al., Bootstrap Your Own Latent, 2020, section 3.1.
    """

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__(width, width, hidden, layers=2)


def feature_extractor(model: nn.Module) -> tuple[nn.Module, int]:
    """A classifier without its last linear (or cosine) layer, and the width d of the features (N, d) that remain.

    The model itself is left as it is; the rest of its modules are shared with it.

    Raises:
        ValueError: a model without such a layer.
    """
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, CosineLinear))]
    if not linear:
        raise ValueError(f"model is a {type(model).__name__} without a linear layer, expected a classifier to cut")
    name, last = linear[-1]
    if not name:
        return nn.Identity(), int(last.weight.shape[1])
    encoder = _shallow(model, name)
    return encoder, int(last.weight.shape[1])


def _shallow(model: nn.Module, name: str) -> nn.Module:
    """The model with ``name`` replaced by the identity; only the modules on the way to it are copied."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    own, _, rest = name.partition(".")
    child = model.get_submodule(own)
    twin._modules[own] = _shallow(child, rest) if rest else nn.Identity()
    return twin


__all__ = ["PredictionHead", "ProjectionHead", "feature_extractor"]
