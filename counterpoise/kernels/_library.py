"""Loads the compiled libraries, keeps the operators' schemas, and says which path a call takes.

Schemas and fake kernels are defined in Python, whether or not anything is compiled; a library only adds
implementations for its device to them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FOLDER = Path(__file__).parent
FLOOR = (2, 11)  # the version whose stable interface the libraries are built against
LIBRARY = torch.library.Library("counterpoise", "DEF")
OPERATORS: list[str] = []
TYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

LARGE = 2**18  # entries from which the host's gradients lie in memory that is used again

_implemented: set[tuple[str, str]] = set()  # (operator, device)
_why_not: dict[str, str] = {}  # device to the reason for which it has no kernels
_off = os.environ.get("COUNTERPOISE_KERNELS", "1") == "0"
_enabled = not _off


def define(schema: str) -> None:
    """Adds an operator: ``"name(Tensor x) -> Tensor"``."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS.append(schema.partition("(")[0])


def _path(device: str) -> Path:
    return FOLDER / f"libcounterpoise_{device}.so"


def _load(device: str) -> str:
    """Loads the library of a device; an empty string, or the reason for which there is none."""
    if not _path(device).exists():
        return "not compiled: no library beside the package"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < FLOOR:
        return f"torch is {torch.__version__}, the library needs {'.'.join(map(str, FLOOR))} or later"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(str(_path(device)))
    except OSError as error:
        return f"does not load: {error.__cause__ or error}"
    return ""


def load() -> None:
    """Loads what there is; called once, behind the definition of all operators."""
    for device in ("cpu", "cuda"):
        _why_not[device] = _load(device)
        for name in OPERATORS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"counterpoise::{name}", device.upper()):
                _implemented.add((name, device))


def cpu_function(name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A function of the host's library that is no operator, with its types of :mod:`ctypes`; None without kernels."""
    if _why_not.get("cpu", "not loaded"):
        return None
    function = getattr(ctypes.CDLL(str(_path("cpu"))), name)
    function.restype, function.argtypes = result, arguments
    return function


def seen_by_others(x: Tensor) -> bool:
    """Whether a tracer or counter follows every operator, or ``x`` is not what lies at its address."""
    return torch._C._len_torch_dispatch_stack() > 0 or x.is_neg()


define("gradient_like(Tensor x) -> Tensor")
LIBRARY.impl("gradient_like", torch.empty_like, "Meta")  # register_fake takes fifty times as long at import
_gradient_op = torch.ops.counterpoise.gradient_like.default


def gradient_like(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of a contiguous ``x``; see :func:`empty_cache`."""
    if x.numel() < LARGE or not x.is_cpu or torch.compiler.is_compiling():
        return torch.empty_like(x)
    return _gradient_op(x)


_SCALARS = {
    dtype: torch.empty((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cpu")
    for dtype in TYPES
}  # whatever the default device was when this was imported


def scalar_like(x: Tensor) -> Tensor:
    """Memory for a loss of ``x``, at least float32."""
    scalar = _SCALARS[x.dtype]  # a copy of its form takes two thirds of the time that new_empty does
    return torch.empty_like(scalar) if x.is_cpu else torch.empty_like(scalar, device=x.device)


def empty_cache() -> None:
    """Returns to the system what the host's large gradients have left for the next step.

    Memory of a gradient of 262,144 entries or more is kept when the gradient goes, up to ``COUNTERPOISE_CACHE_MIB``
    (default 512, 0 = nothing) in all: fresh memory costs a page fault for every page, as much time as a loss takes.
    """
    function = cpu_function("counterpoise_empty_cache", None)
    if function is not None:
        function()


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "baseline", "avx2", "avx512", or "none" without kernels."""
    function = cpu_function("counterpoise_cpu_capability", ctypes.c_char_p)
    return "none" if function is None else function().decode()


def available() -> dict[str, dict[str, bool | str]]:
    """Every operator: whether it runs on "cpu" and on "cuda", and "why_not" where it does not.

    Example: ``available()["binary_total"]`` is ``{"cpu": True, "cuda": False, "why_not": "cuda: not compiled ..."}``.
    """
    found: dict[str, dict[str, bool | str]] = {}
    for name in OPERATORS:
        row: dict[str, bool | str] = {}
        reasons = []
        for device in ("cpu", "cuda"):
            reason = _reason(name, device)
            row[device] = not reason
            if reason:
                reasons.append(f"{device}: {reason}")
        row["why_not"] = "; ".join(reasons)
        found[name] = row
    return found


def _reason(name: str, device: str) -> str:
    if _off:
        return "switched off by COUNTERPOISE_KERNELS=0"
    if not _enabled:
        return "switched off by kernels.disabled()"
    if _why_not[device]:
        return _why_not[device]
    return "" if (name, device) in _implemented else f"no {device} implementation"


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, every loss and objective runs on its plain PyTorch reference."""
    global _enabled
    before = _enabled
    _enabled = False
    try:
        yield
    finally:
        _enabled = before


def runs_on(x: Tensor, name: str = "") -> bool:
    """Whether a call on ``x`` may take the fused path: kernels are on, and there are some for its device and type.

    Tensor subclasses, functorch transforms (vmap, torch.func.grad) and forward-mode differentiation take the plain one.

    Args:
        x: the differentiable input, any shape.
        name: an operator that must exist for the device of ``x``; empty = any, for operators that both devices have.
    """
    device = "cpu" if x.is_cpu else x.device.type
    if not _enabled or _why_not.get(device, "no kernels for this device") or x.dtype not in TYPES:
        return False
    if (type(x) is not Tensor and type(x) is not torch.nn.Parameter) or (name and (name, device) not in _implemented):
        return False
    if torch.compiler.is_compiling():
        return True
    return forward_ad._current_level < 0 and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether one of them stands inside a functorch transform (a batched gradient, say)."""
    functorch = torch._C._functorch
    wrapped = functorch.is_functorch_wrapped_tensor
    return any(x is not None and (wrapped(x) or functorch.is_legacy_batchedtensor(x)) for x in tensors)


def in_transform() -> bool:
    """Whether a functorch transform (vmap, torch.func.grad, a batched gradient) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def wants_plain(upstream: Tensor) -> bool:
    """Whether a backward pass must be differentiable or batched: its gradient then comes from the plain form."""
    return torch.is_grad_enabled() or in_transform() or torch._C._functorch.is_legacy_batchedtensor(upstream)


def differentiable(plain: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of ``plain`` at ``x`` times ``upstream``, with a graph of its own: for second derivatives."""
    with torch.enable_grad(), disabled():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(plain(leaf), leaf, upstream, create_graph=True)[0]
