"""Correct uses of the losses for scores and for embeddings.

Neighbours: `correct_of_classes`, `correct_of_sequences`, `correct_of_values`, `correct_of_training`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from census.case import Made, correct
from census.scenes import classes, fitted, inputs, network, yes_or_no
from fallline import losses

# Scores and embeddings.


@correct("scores and embeddings")
def hinge_of_signs() -> Made:
    """−1 and 1."""
    x = inputs()
    return losses.hinge(), network(8, 1)(x), 2 * yes_or_no(x) - 1


@correct("scores and embeddings")
def squared_hinge_of_a_trained_machine() -> Made:
    """Every margin is kept: the loss and its gradient are exactly 0."""
    x = inputs()
    y = 2 * yes_or_no(x) - 1
    model = fitted(network(8, 1), x, y, lambda p, t: (1 - t * p).clamp(min=0).square().mean(), 300)
    return losses.squared_hinge(), model(x), y, model


@correct("scores and embeddings")
def soft_margin_of_signs() -> Made:
    """SoftMarginLoss with −1 and 1."""
    x = inputs()
    return nn.SoftMarginLoss(), network(8, 3)(x), 2 * yes_or_no(x, 3) - 1


@correct("scores and embeddings")
def multilabel_margin_of_indices() -> Made:
    """Class indices, −1 after the last."""
    target = torch.tensor([[0, 3, -1, -1], [2, -1, -1, -1], [1, 2, 3, -1], [3, -1, 0, 0]]).repeat(8, 1)
    return nn.MultiLabelMarginLoss(), network(8, 4)(inputs(32)), target


@correct("scores and embeddings")
def multilabel_soft_margin_of_logits() -> Made:
    """0 or 1 for each class."""
    x = inputs()
    return nn.MultiLabelSoftMarginLoss(), network(8, 6)(x), yes_or_no(x, 6, share=0.3)


@correct("scores and embeddings")
def margin_ranking_of_pairs() -> Made:
    """Two scores, and which is to be higher."""
    model, x, z = network(8, 1), inputs(), inputs()
    return nn.MarginRankingLoss(margin=0.5), (model(x), model(z)), 2 * yes_or_no(x) - 1, model


@correct("scores and embeddings")
def margin_ranking_where_the_first_is_always_better() -> Made:
    """Pairs are sorted: every target is 1."""
    model, x, z = network(8, 1), inputs(), inputs()
    return nn.MarginRankingLoss(margin=0.5), (model(x), model(z)), torch.ones(64, 1), model


@correct("scores and embeddings")
def hinge_embedding_of_distances() -> Made:
    """Distances and signs."""
    model, x, z = network(8, 4), inputs(), inputs()
    return nn.HingeEmbeddingLoss(), (model(x) - model(z)).norm(dim=1), 2 * yes_or_no(x).squeeze(1) - 1, model


@correct("scores and embeddings")
def cosine_embedding_of_pairs() -> Made:
    """Pairs and signs."""
    model, x, z = network(8, 4), inputs(), inputs()
    return nn.CosineEmbeddingLoss(margin=0.2), (model(x), model(z)), 2 * yes_or_no(x).squeeze(1) - 1, model


@correct("scores and embeddings")
def cosine_embedding_of_similar_pairs_only() -> Made:
    """Two views that should agree, and no pair that should not: every target is 1."""
    model, x = network(8, 16), inputs()
    return nn.CosineEmbeddingLoss(), (model(x), model(x + 0.1 * inputs()).detach()), torch.ones(64), model


@correct("scores and embeddings")
def triplets() -> Made:
    """An anchor, a positive, a negative."""
    model, x = network(8, 4), inputs()
    return nn.TripletMarginLoss(), (model(x), model(x + 0.1 * inputs()), model(inputs())), None, model


@correct("scores and embeddings")
def fallline_triplets_of_normalised_embeddings() -> Made:
    """On the sphere, with a margin of 0.2."""
    model, x = network(8, 4), inputs()
    parts = [functional.normalize(model(z), dim=1) for z in (x, x + 0.1 * inputs(), inputs())]
    return losses.triplet_margin(margin=0.2), tuple(parts), None, model


@correct("scores and embeddings")
def info_nce_of_two_views() -> Made:
    """Two views of 32 samples; there is no target."""
    model, x = network(8, 16), inputs(32)
    return losses.info_nce(), (model(x), model(x + 0.1 * inputs(32))), None, model


@correct("scores and embeddings")
def supervised_contrastive_of_classes() -> Made:
    """Embeddings and labels."""
    x = inputs()
    return losses.supervised_contrastive(), functional.normalize(network(8, 16)(x), dim=1), classes(x, 4)


@correct("scores and embeddings")
def siglip_of_two_views() -> Made:
    """Images and texts."""
    x = inputs(32)
    return losses.siglip(), (network(8, 16)(x), network(8, 16)(x)), None


@correct("scores and embeddings")
def vicreg_of_two_views() -> Made:
    """VICReg."""
    model, x = network(8, 16), inputs(32)
    return losses.vicreg(), (model(x), model(x + 0.1 * inputs(32))), None


@correct("scores and embeddings")
def barlow_twins_of_two_views() -> Made:
    """Barlow Twins."""
    model, x = network(8, 16), inputs(32)
    return losses.barlow_twins(), (model(x), model(x + 0.1 * inputs(32))), None
