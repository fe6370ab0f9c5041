"""A small network trained a little on images, for the scores and features that a selection needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.models import SmallCNN


def train_proxy(
    images: Any, num_classes: int, *, epochs: int = 5, batch_size: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and features (N, D) of the images, from a small stride-2 network trained on them.

    Args:
        images: data set of ``dict(input (channels, H, W), target)``, see ``recipes.data.Examples``.
        num_classes: C.
        epochs: >= 1; few, since scores of a network that knows everything say nothing.
        batch_size: of training, >= 2.
        seed: of weights and order.
    """
    check_number("epochs", epochs, 1)
    x = torch.stack([item["input"] for item in images])
    y = torch.as_tensor(images.targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SmallCNN(x.shape[1], num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    generator = generator_for(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(batch_size):
            if len(rows) < 2:  # batch normalisation needs two
                continue
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return outputs_of(model, x.split(256))


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and features (N, D), what goes into the model's last linear layer, in evaluation mode.

    Args:
        model: with a module named ``head``, or a linear layer, the last of which is taken.
        inputs: batches (B, ...), in order.

    Raises:
        ValueError: a model with neither.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = getattr(model, "head", None) or (linear[-1] if linear else None)
    if head is None:
        raise ValueError(f"{type(model).__name__} has neither a head nor a linear layer, so its features are not known")
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().flatten(1).cpu()))
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        logits = [model(x.to(device)).float().cpu() for x in inputs]
    finally:
        hook.remove()
        model.train(was_training)
    return torch.cat(logits), torch.cat(seen)
