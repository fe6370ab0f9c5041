"""Supervised contrast: embeddings of one class attract; features judged by nearest neighbours and a linear probe."""

from __future__ import annotations

from counterpoise.recipes.self_supervised import SelfSupervised


class SupervisedContrastive(SelfSupervised):
    """Representation learning with labels: ``SupervisedContrastive(SmallCNN(1, 10), SupConLoss(), num_classes=10)``.

    As :class:`~counterpoise.recipes.self_supervised.SelfSupervised`, with the classes of the batch handed to the
    objective as ``labels=``; a bank keeps them beside its keys. The classifier is the linear probe: with frozen
    features and balanced class weights.

    Args:
        loss: an objective that takes labels.

    Source: Khosla et al., Supervised Contrastive Learning, 2020, section 3.
    """

    labelled = True
