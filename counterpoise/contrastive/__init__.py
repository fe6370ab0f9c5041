"""How views attract and repel: ``(embeddings, ..) -> loss per anchor``.

Called as ``loss(view1, view2)`` or ``loss(embeddings, labels=labels)``. Embeddings are normalised by the objective
unless it is told otherwise; banks and masks are arguments; under several ranks the objectives are exact.
"""

from counterpoise.contrastive.ascl import ASCLLoss, ASCLTargets, ascl_loss, ascl_targets
from counterpoise.contrastive.ascl_byol import ASCLBYOLLoss, ascl_byol_loss
from counterpoise.contrastive.barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from counterpoise.contrastive.byol import BYOLLoss, byol_loss
from counterpoise.contrastive.cacr import CACRLoss, cacr_loss
from counterpoise.contrastive.clip import CLIPLoss, clip_loss
from counterpoise.contrastive.convirt import ConVIRTLoss, convirt_loss
from counterpoise.contrastive.cw_rgp import CWRGPLoss, cw_rgp_loss
from counterpoise.contrastive.diagnostics import CollapseStatistics, collapse_statistics
from counterpoise.contrastive.gml import GMLLoss, GMLTerms, gml_loss, gml_terms
from counterpoise.contrastive.image_tabular import ImageTabularCLIPLoss, image_tabular_clip_loss
from counterpoise.contrastive.info_nce import InfoNCE, info_nce
from counterpoise.contrastive.ntxent import NTXentLoss, ntxent_loss
from counterpoise.contrastive.siglip import SigLIPLoss, siglip_loss
from counterpoise.contrastive.simsiam import SimSiamLoss, simsiam_loss
from counterpoise.contrastive.supcon import SupConLoss, supcon_loss
from counterpoise.contrastive.swav import SwAVLoss, swav_loss
from counterpoise.contrastive.vicreg import VICRegLoss, VICRegTerms, vicreg_loss, vicreg_terms
from counterpoise.contrastive.whitening import Whitening, whiten
from counterpoise.contrastive.wmse import WMSELoss, wmse_loss
from counterpoise.memory import ClassQueue, IndexBank, MemoryBank, MomentumEncoder, momentum_schedule

__all__ = [
    "ASCLBYOLLoss",
    "ASCLLoss",
    "ASCLTargets",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CACRLoss",
    "CLIPLoss",
    "CWRGPLoss",
    "ClassQueue",
    "CollapseStatistics",
    "ConVIRTLoss",
    "GMLLoss",
    "GMLTerms",
    "ImageTabularCLIPLoss",
    "IndexBank",
    "InfoNCE",
    "MemoryBank",
    "MomentumEncoder",
    "NTXentLoss",
    "SigLIPLoss",
    "SimSiamLoss",
    "SupConLoss",
    "SwAVLoss",
    "VICRegLoss",
    "VICRegTerms",
    "WMSELoss",
    "Whitening",
    "ascl_byol_loss",
    "ascl_loss",
    "ascl_targets",
    "barlow_twins_loss",
    "byol_loss",
    "cacr_loss",
    "clip_loss",
    "collapse_statistics",
    "convirt_loss",
    "cw_rgp_loss",
    "gml_loss",
    "gml_terms",
    "image_tabular_clip_loss",
    "info_nce",
    "momentum_schedule",
    "ntxent_loss",
    "siglip_loss",
    "simsiam_loss",
    "supcon_loss",
    "swav_loss",
    "vicreg_loss",
    "vicreg_terms",
    "whiten",
    "wmse_loss",
]
