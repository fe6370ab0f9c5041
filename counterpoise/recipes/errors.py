"""The user's mistakes, in one sentence."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something in the configuration does not fit; the message is one sentence that names the key. Exit code 2."""


def one_sentence(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
