"""The second pass of a two-pass optimiser (SAM): the same batch again, on which no state may move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def second_pass() -> Iterator[None]:
    """Reweighters and banks leave their state alone inside this context.

    Example: ``with second_pass(): loss = step(batch)`` around the second forward of sharpness-aware minimisation.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def in_second_pass() -> bool:
    """True inside :func:`second_pass`."""
    return _depth > 0
