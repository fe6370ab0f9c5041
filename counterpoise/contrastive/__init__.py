"""How views attract and repel: ``(embeddings, ..) -> loss per anchor``.

Called as ``loss(view1, view2)`` or ``loss(embeddings, labels=labels)``. Embeddings are normalised by the objective
unless it is told otherwise; banks and masks are arguments; under several ranks the objectives are exact.
"""

from counterpoise.contrastive.barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from counterpoise.contrastive.gml import GMLLoss, GMLTerms, gml_loss, gml_terms
from counterpoise.contrastive.info_nce import InfoNCE, info_nce
from counterpoise.contrastive.ntxent import NTXentLoss, ntxent_loss
from counterpoise.memory import ClassQueue, MemoryBank

__all__ = [
    "BarlowTwinsLoss",
    "ClassQueue",
    "GMLLoss",
    "GMLTerms",
    "InfoNCE",
    "MemoryBank",
    "NTXentLoss",
    "barlow_twins_loss",
    "gml_loss",
    "gml_terms",
    "info_nce",
    "ntxent_loss",
]
