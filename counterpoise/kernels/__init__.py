"""Fused loss kernels: the same functions, faster. Which path runs is chosen here and in the rooms, never by the user.

Every kernel has a plain PyTorch reference in the file of its method and gives its values and gradients. Without a
compiled library (``counterpoise-doctor`` says why) everything runs on the references.

``available()`` lists the operators; ``disabled()`` switches them off inside a context, the environment variable
``COUNTERPOISE_KERNELS=0`` for a whole process. ``COUNTERPOISE_CPU_CAPABILITY`` (baseline, avx2, avx512) limits the
instruction set, ``COUNTERPOISE_CACHE_MIB`` the memory that ``empty_cache()`` returns.
"""

from counterpoise.kernels import binary, pairwise, rows, selection, soft_rows, transport
from counterpoise.kernels._library import available, cpu_capability, disabled, empty_cache, load, runs_on

__all__ = [
    "available",
    "binary",
    "cpu_capability",
    "disabled",
    "empty_cache",
    "pairwise",
    "rows",
    "runs_on",
    "selection",
    "soft_rows",
    "transport",
]

load()
