"""What is minimised. `base` says what a loss is; each family has a file, `catalogue` lists them; `misuse` says
what can be said against their arguments; `wrapped` accepts torch's own losses and any callable."""

from fallline.losses.base import Loss, loss_maker
from fallline.losses.binary import asymmetric, binary_cross_entropy, binary_cross_entropy_with_logits
from fallline.losses.catalogue import get, registry
from fallline.losses.classification import cross_entropy, multi_margin, nll
from fallline.losses.combination import weighted_sum
from fallline.losses.contrastive import info_nce, siglip, supervised_contrastive
from fallline.losses.counts import negative_binomial_nll, poisson_nll, tweedie
from fallline.losses.distributions import crps, kl_div
from fallline.losses.embeddings import cosine_embedding, hinge_embedding, margin_ranking, triplet_margin
from fallline.losses.likelihoods import beta_nll, evidential, gaussian_nll
from fallline.losses.margins import hinge, multilabel_margin, multilabel_soft_margin, soft_margin, squared_hinge
from fallline.losses.misuse import CODES, Finding, check, checked, require
from fallline.losses.overlap import dice, jaccard, lovasz, tversky
from fallline.losses.ranks import ordinal
from fallline.losses.redundancy import barlow_twins, vicreg
from fallline.losses.regression import charbonnier, huber, l1, log_cosh, mse, quantile, smooth_l1
from fallline.losses.reweighted import focal, generalized_cross_entropy, poly, symmetric_cross_entropy
from fallline.losses.sequences import ctc
from fallline.losses.vocabulary import linear_cross_entropy
from fallline.losses.wrapped import as_loss

__all__ = [
    "CODES",
    "Finding",
    "Loss",
    "as_loss",
    "asymmetric",
    "barlow_twins",
    "beta_nll",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "charbonnier",
    "check",
    "checked",
    "cosine_embedding",
    "cross_entropy",
    "crps",
    "ctc",
    "dice",
    "evidential",
    "focal",
    "gaussian_nll",
    "generalized_cross_entropy",
    "get",
    "hinge",
    "hinge_embedding",
    "huber",
    "info_nce",
    "jaccard",
    "kl_div",
    "l1",
    "linear_cross_entropy",
    "log_cosh",
    "loss_maker",
    "lovasz",
    "margin_ranking",
    "mse",
    "multi_margin",
    "multilabel_margin",
    "multilabel_soft_margin",
    "negative_binomial_nll",
    "nll",
    "ordinal",
    "poisson_nll",
    "poly",
    "quantile",
    "registry",
    "require",
    "siglip",
    "smooth_l1",
    "soft_margin",
    "squared_hinge",
    "supervised_contrastive",
    "symmetric_cross_entropy",
    "triplet_margin",
    "tversky",
    "tweedie",
    "vicreg",
    "weighted_sum",
]
