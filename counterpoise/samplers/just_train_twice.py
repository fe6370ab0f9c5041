r"""Just Train Twice: the weights of the second training, from the mistakes of the first.

.. math:: w_i = \begin{cases} \lambda & i \in E \\ 1 & \text{otherwise} \end{cases}, \qquad
          E = \{ i : \arg\max_c z_{ic} \ne y_i \}

with the error set E of a model trained briefly (early stopping is what makes E the rare groups) and evaluated in
``eval()`` mode. The second training starts afresh. The two lengths and lambda are tuned on the worst group of the
validation split, which needs its groups. Under class imbalance E holds mostly the rare classes.

The released code appends ``up_weight`` copies of E to the data, so that an error counts 1 + up_weight times where the
paper says lambda; here the weight is said directly.

Source: Liu et al., Just Train Twice: Improving Group Robustness without Training Group Information, 2021, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_number


def just_train_twice_weights(error: Tensor, up_weight: float | str) -> Tensor:
    """Weights (N,) float32 of the second training: ``up_weight`` for errors, 1 for the rest.

    Args:
        error: (N,) bool, True = the first model got it wrong.
        up_weight: lambda >= 0, or "auto": :func:`balancing_up_weight`, but 1 at least.

    Raises:
        TypeError, ValueError: an error mask that is not boolean (N,), or a weight below zero.
    """
    if up_weight == "auto":
        up_weight = max(balancing_up_weight(error), 1)
    check_number("up_weight", up_weight, 0)
    _check_error(error)
    return torch.where(error, float(up_weight), 1.0)


def balancing_up_weight(error: Tensor) -> int:
    """The whole number floor((N - |E|) / |E|) that lets errors weigh about as much as the rest; 1 without errors.

    Args:
        error: (N,) bool, True = the first model got it wrong.

    Raises:
        TypeError, ValueError: an error mask that is not boolean (N,).
    """
    _check_error(error)
    errors = int(error.sum())
    return (len(error) - errors) // errors if errors else 1


def _check_error(error: Tensor) -> None:
    if not isinstance(error, Tensor) or error.dtype != torch.bool:
        raise TypeError(f"error is {getattr(error, 'dtype', type(error).__name__)}, expected a bool tensor (N,)")
    if error.ndim != 1:
        raise ValueError(f"error has shape {tuple(error.shape)}, expected (N,)")
