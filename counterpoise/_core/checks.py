"""Input checks. One sentence each: which argument, what was expected, what came."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from numbers import Real

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it came in a narrower or integer type; float32 and float64 pass through."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switches autocast off on the device of ``x``: similarities and covariances need float32."""
    return torch.autocast(x.device.type, enabled=False)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``", did you mean 'gamma'?"`` or an empty string."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if type(value) is str and type(choices) is tuple and value in choices:
        return
    options = list(choices)
    if value not in options:
        hint = did_you_mean(str(value), [str(o) for o in options])
        raise ValueError(f"{name} is {value!r}, expected one of {options}{hint}")


def check_number(
    name: str, value: object, low: float = -float("inf"), high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Raises unless ``value`` is a real number in [low, high], or (low, high] with ``open_low``."""
    if type(value) is float and (low < value <= high or (value == low and not open_low)):  # nearly always
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), expected a number")
    number = float(value)
    if not (low < number <= high if open_low else low <= number <= high):
        raise ValueError(f"{name} is {value}, expected a number in {'(' if open_low else '['}{low}, {high}]")


def check_per_row(name: str, x: Tensor | None, like: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Raises unless ``x`` is None or a tensor of shape (N,), N the rows of ``like``; optionally of one dtype."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor of shape ({like.shape[0]},)")
    if x.shape != like.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({like.shape[0]},)")
    if not (x.is_cpu and like.is_cpu):
        check_device(name, x, like)
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {dtype}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless ``x`` is where ``like`` is."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}, where the values are that it goes with")


def check_embeddings(name: str, z: Tensor, like: Tensor | None = None) -> None:
    """Raises unless ``z`` is a floating (N, d) tensor, of the shape of ``like`` where that is given."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} is a {type(z).__name__}, expected a tensor of shape (N, d)")
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"{name} has shape {tuple(z.shape)} and dtype {z.dtype}, expected a floating (N, d) tensor")
    if like is not None and z.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(z.shape)}, expected {tuple(like.shape)}")


def readable(x: Tensor) -> bool:
    """Whether a value of ``x`` can be read here and now: on the host, outside of compilation and of vmap."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_within(name: str, values: Tensor, low: float, high: float, *, what: str, ignore: int | None = None) -> None:
    """Raises ValueError if a value lies outside [low, high] (or is NaN), except where it equals ``ignore``.

    Only the data can show this, and reading it back from an accelerator would stall the queue. So the host raises a
    precise error for CPU tensors, and an asynchronous device assertion speaks elsewhere and under ``torch.compile``.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(values):
        return  # inside vmap or grad transforms
    within = (values >= low) & (values <= high)
    if ignore is not None:
        within = within | (values == ignore)
    if not readable(values):
        torch._assert_async(within.all(), f"{name} holds a value outside [{low}, {high}], expected {what}")
    elif not within.all():
        raise ValueError(f"{name} holds {values[~within][0].item()}, expected {what} in [{low}, {high}]")
