"""One adapter a vector file: translates its spelling into ours and returns what is compared.

An adapter reads every parameter and input of its file's schema; an unread one fails the case. What is left out by
choice raises NotMapped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.golden.adapters import (
    asymmetric,
    cacr_ascl,
    clustering,
    contrastive,
    coresets,
    dro,
    fairness,
    losses,
    multi_task,
    pairwise,
    samplers,
    transport,
    whitening,
)
from tests.golden.runner import Case

ADAPTERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    **asymmetric.ADAPTERS,
    **cacr_ascl.ADAPTERS,
    **clustering.ADAPTERS,
    **contrastive.ADAPTERS,
    **coresets.ADAPTERS,
    **dro.ADAPTERS,
    **fairness.ADAPTERS,
    **losses.ADAPTERS,
    **multi_task.ADAPTERS,
    **pairwise.ADAPTERS,
    **samplers.ADAPTERS,
    **transport.ADAPTERS,
    **whitening.ADAPTERS,
}
