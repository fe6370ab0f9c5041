"""Encoders that come from somewhere: the weights of another run, and a linear map that does nothing yet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def identity_linear(width: int) -> nn.Linear:
    """A square linear layer that does nothing yet."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def load_encoder(encoder: nn.Module, path: str) -> None:
    """Takes the weights of the encoder from a checkpoint of any recipe with the same model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a checkpoint that lacks a weight of the encoder.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"encoder_checkpoint {file.absolute()} does not exist, expected a checkpoint")
    saved = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    there = {name.removeprefix("model."): x for name, x in saved.items() if name.startswith("model.")}
    wanted = encoder.state_dict()
    lacking = [name for name, x in wanted.items() if name not in there or there[name].shape != x.shape]
    if lacking:
        raise ValueError(f"encoder_checkpoint has no {lacking[0]} of the model's shape, expected one of the same model")
    encoder.load_state_dict({name: there[name] for name in wanted})


__all__ = ["identity_linear", "load_encoder"]
