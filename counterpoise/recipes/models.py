"""Small models of the recipes; any module from inputs to logits (N, C) does instead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu

from counterpoise._core import check_choice, uniform_by_index
from counterpoise.losses import CosineLinear

if TYPE_CHECKING:
    from counterpoise.recipes.tasks import Task


def classifier_head(in_features: int, num_classes: int, head: str = "linear") -> nn.Module:
    """A linear head, or one whose logits are cosines ("cosine", what LDAM needs)."""
    check_choice("head", head, ("linear", "cosine"))
    return nn.Linear(in_features, num_classes) if head == "linear" else CosineLinear(in_features, num_classes)


class SmallCNN(nn.Module):
    """A stride-2 encoder: three blocks of convolution, batch normalisation and ReLU, average pooling, a head.

    Args:
        in_channels: of the images (N, in_channels, H, W), H and W >= 8.
        num_classes: C.
        width: channels of the first block; the others have twice and four times as many.
        head: "linear" or "cosine".
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32, head: str = "linear") -> None:
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        self.encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = classifier_head(widths[-1], num_classes, head)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, C)."""
        return self.head(self.encoder(x))


class MLP(nn.Module):
    """Hidden layers with ReLU, for tables.

    Args:
        in_features: d of the inputs (N, d); inputs of more dimensions are flattened.
        num_classes: C.
        hidden: widths of the hidden layers.
        dropout: in [0, 1).
        head: "linear" or "cosine".
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        head: str = "linear",
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        self.encoder = nn.Sequential(*layers)
        self.head = classifier_head(widths[-1], num_classes, head)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, d) to logits (N, C)."""
        return self.head(self.encoder(x))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (subsample, pad channels), as in the CIFAR ResNets."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b))
        self.second = nn.Sequential(nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b))
        self.more, self.stride = b - a, stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        if self.more:
            shortcut = pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return relu(self.second(relu(self.first(x))) + shortcut)


class ResNet32(nn.Module):
    """The 32-layer ResNet of the CIFAR long-tail papers.

    Args:
        in_channels: of the images (N, in_channels, H, W).
        num_classes: C.
        head: "linear" or "cosine".

    Source: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2 (n = 5).
    """

    def __init__(self, in_channels: int, num_classes: int, head: str = "linear") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        plan = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.stages = nn.Sequential(
            *[_ResidualBlock(a if i == 0 else b, b, s if i == 0 else 1) for a, b, s in plan for i in range(5)]
        )
        self.head = classifier_head(64, num_classes, head)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, C)."""
        features = self.stages(self.stem(x))
        return self.head(avg_pool2d(features, features.shape[-2:]).flatten(1))


def torchvision_model(
    name: str, num_classes: int, weights: str | None = None, in_channels: int = 3, head: str = "linear"
) -> nn.Module:
    """A torchvision classifier by name ("resnet18", ...), its last linear layer replaced.

    Args:
        name: see ``torchvision.models.list_models()``.
        num_classes: C.
        weights: None (random), or a name of pretrained weights ("DEFAULT").
        in_channels: of the images; these models take 3.
        head: "linear" or "cosine".

    Raises:
        ValueError: an unknown name, or images of other than three channels.
    """
    import torchvision.models

    check_choice("name", name, torchvision.models.list_models())
    if in_channels != 3:
        raise ValueError(f"in_channels is {in_channels}, expected 3: torchvision's models take colour images")
    model = torchvision.models.get_model(name, weights=weights)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"name is {name!r}, a model without a linear layer to replace, expected one that ends in it")
    layer = linear[-1]
    parent = model.get_submodule(layer.rpartition(".")[0])
    old = model.get_submodule(layer)
    setattr(parent, layer.rpartition(".")[2], classifier_head(old.in_features, num_classes, head))  # type: ignore[arg-type]
    return model


class Heads(nn.Module):
    """A linear head for each of several tasks, over the same features.

    A regression's output is ``mean + std * linear``: the head starts at the targets' mean and spread, so that it need
    not grow into their units.

    Args:
        in_features: d.
        tasks: K, see :class:`~counterpoise.recipes.tasks.Task`.

    Buffers: mean_<k> and std_<k> (D,) of a regression, persistent.
    """

    def __init__(self, in_features: int, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.layers = nn.ModuleList(nn.Linear(in_features, task.size) for task in tasks)
        for k, task in enumerate(tasks):
            if not task.classifies:
                self.register_buffer(f"mean_{k}", torch.tensor(task.mean or (0.0,) * task.size))
                self.register_buffer(f"std_{k}", torch.tensor(task.std or (1.0,) * task.size))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features (N, d) to outputs (N, size) by task."""
        found = {}
        for k, (task, layer) in enumerate(zip(self.tasks, self.layers, strict=True)):
            z = layer(features)
            found[task.name] = z if task.classifies else getattr(self, f"mean_{k}") + getattr(self, f"std_{k}") * z
        return found


def with_heads(model: nn.Module, tasks: Sequence[Task]) -> nn.Module:
    """The same model, whose last linear layer is replaced by :class:`Heads`; one that has Heads is left alone.

    Raises:
        ValueError: a model with neither, or whose Heads are of other tasks.
    """
    given = next((m for m in model.modules() if isinstance(m, Heads)), None)
    if given is not None:
        theirs, ours = ([(t.name, t.kind, t.size) for t in of] for of in (given.tasks, tasks))
        if sorted(theirs) != sorted(ours):
            raise ValueError(f"model has Heads of {theirs}, expected {ours}")
        return model
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, CosineLinear))]
    if not linear:
        raise ValueError(f"model is a {type(model).__name__} without a linear layer, expected one to replace by heads")
    name, last = linear[-1]
    heads = Heads(last.weight.shape[1], tasks)
    if not name:
        return heads
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, heads)
    return model


class BatchAugment(nn.Module):
    """Shifts and flips of image batches; the draws are a function of (seed, epoch, index) alone.

    So a resumed run sees the same images, whatever batch, worker or rank an example is in.

    Args:
        shift: largest shift in pixels, >= 0; what moves in is zero.
        flip: mirror half of the images.
        seed: >= 0.
    """

    def __init__(self, shift: int = 2, flip: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.shift, self.flip, self.seed = shift, flip, seed

    def forward(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Images (N, C, H, W) of the examples ``index`` (N,) to augmented images."""
        u = uniform_by_index(index, 3, self.seed, epoch).to(x.device)
        n, _, height, width = x.shape
        if self.flip:
            x = torch.where(u[:, 2].lt(0.5)[:, None, None, None], x.flip(-1), x)
        moves = (u[:, :2] * (2 * self.shift + 1)).long()
        rows = torch.arange(height, device=x.device) + moves[:, :1]
        columns = torch.arange(width, device=x.device) + moves[:, 1:]
        wide = pad(x, [self.shift] * 4)
        return wide[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
            0, 3, 1, 2
        )
