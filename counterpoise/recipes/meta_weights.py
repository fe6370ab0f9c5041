r"""Weights learned on examples so that a step on them helps a small clean set: the reweighting of The Power of Few.

.. math:: \phi \leftarrow \phi - \beta \nabla_\phi\, L_{clean}\big(\theta - \alpha \nabla_\theta \tfrac{1}{B} \sum_i
          V(\ell_i; \phi)\, \ell_i\big), \qquad
          \theta \leftarrow \theta - \alpha \nabla_\theta \frac{\sum_i V(\ell_i; \phi)\, \ell_i}{\sum_i V(\ell_i; \phi)}

Source: Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, 2019, algorithm 1, from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterpoise._core import generator_for
from counterpoise.samplers import MetaWeightNet, meta_weight_loss


def learn_meta_weights(
    model: nn.Module,
    loss: nn.Module,
    examples: tuple[Tensor, Tensor],
    clean: tuple[Tensor, Tensor],
    *,
    batch_size: int,
    epochs: int,
    step_size: float = 0.1,
    weight_rate: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """(M,) weights of the examples, in (0, 1): the mean of what they had over the second half of the epochs.

    Args:
        model: is trained from the weights it has; pass a copy.
        loss: of logits and targets; taken per row.
        examples: (inputs (M, ...), targets (M,)).
        clean: the same of a small clean and balanced set, on the same device.
        batch_size: of both.
        epochs: over the examples, >= 1.
        step_size: alpha of the virtual and of the real step, SGD with momentum 0.9 for the latter.
        weight_rate: beta, of Adam.
        seed: of the order of both sets.
    """
    loss.reduction = "none"  # type: ignore[assignment]
    net = MetaWeightNet()
    with torch.no_grad():  # starts at weights of one half, whatever the global generator says
        for parameter in net.layers[2].parameters():
            parameter.zero_()
    of_net = torch.optim.Adam(net.parameters(), lr=weight_rate, weight_decay=1e-4)
    of_model = torch.optim.SGD(model.parameters(), lr=step_size, momentum=0.9, weight_decay=2e-4)
    generator = generator_for(seed)
    x, y = examples
    total, counted = torch.zeros(len(y), dtype=torch.float64), 0
    model.train()
    for epoch in range(epochs):
        of_epoch = torch.zeros(len(y), dtype=torch.float64)
        for rows in torch.randperm(len(y), generator=generator).split(batch_size):
            if len(rows) < 2:  # batch normalisation needs two
                continue
            drawn = torch.randint(len(clean[1]), (batch_size,), generator=generator)
            batch = x[rows], y[rows]
            step = meta_weight_loss(model, net, loss, batch, (clean[0][drawn], clean[1][drawn]), step_size)
            of_net.zero_grad()
            step.backward()
            of_net.step()
            of_epoch[rows] = _weighted_step(model, net, loss, batch, of_model)
        if 2 * epoch >= epochs - 1:
            total, counted = total + of_epoch, counted + 1
    return total / counted


def _weighted_step(
    model: nn.Module, net: nn.Module, loss: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> Tensor:
    """One step of the model on the weighted batch; gives the weights (B,)."""
    losses = loss(model(batch[0]), batch[1])
    with torch.no_grad():
        w = net(losses)
    optimizer.zero_grad()
    ((w * losses).sum() / w.sum().clamp_min(1e-12)).backward()
    optimizer.step()
    return w.double()
