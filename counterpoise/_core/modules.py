"""What modules share: buffers that keep their precision, and the options of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core.reduction import check_reduction


class PreciseBuffers(nn.Module):
    """A module whose floating buffers follow ``.to(device)`` but not ``.half()``, ``.bfloat16()`` or ``.double()``.

    Duals, priors and class weights are small and must not lose digits: log-weights that move by 0.001 a step stand
    still in bfloat16. Where a device has no float64 (MPS), float32 is kept instead.
    """

    def __getattr__(self, name: str) -> Any:
        """Buffers and parts: losses read theirs on every call, and torch looks through parameters first."""
        own = self.__dict__
        if "_modules" in own:  # the last that torch makes
            if name in own["_buffers"]:
                return own["_buffers"][name]
            if name in own["_modules"]:
                return own["_modules"][name]
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = self._buffers[name]
            if moved is None or moved.dtype == old.dtype or moved.device.type == "meta":
                continue
            dtype = torch.float32 if moved.device.type == "mps" else old.dtype
            self._buffers[name] = old.to(device=moved.device, dtype=dtype)
        return self


class Loss(PreciseBuffers):
    """Keeps the keyword options of a loss as attributes, and hands them back as ``**self.options``.

    Every loss class is this plus one call of its function. ``reduction``, ``normalizer`` and ``sync`` are among the
    options of every loss.
    """

    reduction: str
    normalizer: str | float
    sync: bool

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_reduction(options["reduction"], options["normalizer"])
        self._option_names = tuple(options)
        self._options: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options as they stand now."""
        if len(self._options) == len(self._option_names):
            return self._options.copy()
        return {name: getattr(self, name) for name in self._option_names}

    # Where they are: every call reads both, and torch's search for them takes as long as a check of the input.
    @property
    def class_weight(self) -> Tensor | None:
        """(C,) class weights of a loss that has them, None = ones."""
        if "class_weight" in self._buffers:
            return self._buffers["class_weight"]
        raise AttributeError(f"{type(self).__name__} has no class_weight")

    @class_weight.setter
    def class_weight(self, value: Tensor | None) -> None:  # torch itself sets what is registered already
        self._buffers["class_weight"] = value

    @property
    def statistics(self) -> Any:
        """The :class:`~counterpoise.memory.ClassStatistics` of a loss that has class counts."""
        if "statistics" in self._modules:
            return self._modules["statistics"]
        raise AttributeError(f"{type(self).__name__} has no statistics")

    @statistics.setter
    def statistics(self, value: Any) -> None:  # as it does modules
        if value is not None:
            raise TypeError(f"statistics is a {type(value).__name__}, expected a module that holds class counts")
        self._modules["statistics"] = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Options that are not tensors are at hand together: looking up each takes as long as a small loss."""
        super().__setattr__(name, value)
        if name not in self.__dict__.get("_option_names", ()):
            return
        self._options[name] = value
        if isinstance(value, Tensor):
            del self._options[name]

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Class weights switched on or off since the module was made are taken over as they were saved."""
        if "class_weight" in self._buffers:
            saved = state_dict.get(f"{prefix}class_weight")
            here = self._buffers["class_weight"]
            if (saved is None) != (here is None):
                self._buffers["class_weight"] = None if saved is None else torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_class_weight(self, class_weight: Sequence[float] | Tensor | None) -> None:
        """Replaces the class weights (C,) of a loss that has them; what deferred re-weighting calls."""
        if "class_weight" not in self._buffers:
            raise ValueError(f"{type(self).__name__} takes no class_weight")
        here = self._buffers["class_weight"]
        given = None if class_weight is None else torch.as_tensor(class_weight).detach().clone()
        self.class_weight = given if given is None or here is None else given.to(here.device)
