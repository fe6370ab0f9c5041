"""Whatever remembers: class statistics, banks of past embeddings (a queue, one a class, a slot an example), a teacher.

State lives in persistent buffers, so that a resumed run goes on exactly, and moves only in training and outside of
``second_pass()``.
"""

from counterpoise.memory.bank import MemoryBank
from counterpoise.memory.class_queue import ClassQueue
from counterpoise.memory.class_statistics import ClassCounts, ClassStatistics, effective_number_weights, statistics_of
from counterpoise.memory.index_bank import IndexBank
from counterpoise.memory.momentum import MomentumEncoder, follow, momentum_schedule

__all__ = [
    "ClassCounts",
    "ClassQueue",
    "ClassStatistics",
    "IndexBank",
    "MemoryBank",
    "MomentumEncoder",
    "effective_number_weights",
    "follow",
    "momentum_schedule",
    "statistics_of",
]
