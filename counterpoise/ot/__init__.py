"""How mass moves: ``(cost, marginals) -> plan, potentials, labels``."""

from counterpoise.ot.assignment import balanced_assignment
from counterpoise.ot.costs import Cosine, Euclidean, PointCost, SquaredEuclidean
from counterpoise.ot.divergence import sinkhorn_divergence
from counterpoise.ot.exact import emd
from counterpoise.ot.mesh import MESHResult, mesh
from counterpoise.ot.partial import partial_sinkhorn
from counterpoise.ot.progressive_partial import P2OTResult, mass_schedule, p2ot_labels
from counterpoise.ot.pseudo_labels import PseudoLabels, two_view_label_loss
from counterpoise.ot.result import OTResult
from counterpoise.ot.semantic import SP2OTResult, knn_affinity, sp2ot_labels, sub_affinity
from counterpoise.ot.sinkhorn import sinkhorn
from counterpoise.ot.unbalanced import unbalanced_sinkhorn

__all__ = [
    "Cosine",
    "Euclidean",
    "MESHResult",
    "OTResult",
    "P2OTResult",
    "PointCost",
    "PseudoLabels",
    "SP2OTResult",
    "SquaredEuclidean",
    "balanced_assignment",
    "emd",
    "knn_affinity",
    "mass_schedule",
    "mesh",
    "p2ot_labels",
    "partial_sinkhorn",
    "sinkhorn",
    "sinkhorn_divergence",
    "sp2ot_labels",
    "sub_affinity",
    "two_view_label_loss",
    "unbalanced_sinkhorn",
]
