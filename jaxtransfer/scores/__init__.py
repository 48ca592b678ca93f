"""Scores: what to transfer, and which adapted model to keep. Pure functions of arrays.

**Which source to transfer** to a labelled task, before any training. All: larger is
better.

| score | needs, of the labelled examples of the task |
|---|---|
| `leep` | probabilities of the source's classifier, labels |
| `nce` | classes that the source's classifier predicts, labels |
| `log_me` | features, labels (or targets of a regression) |
| `h_score` | features, labels; with few examples, shrinkage |
| `transrate` | features of one scale, labels |
| `gbc` | features, labels |

**Which adapted model to keep** when the target has no labels. All: larger is better, so
that `choose` picks one; risks are negated.

| validator | needs |
|---|---|
| `source_accuracy` | source logits and labels |
| `negative_entropy`, `prediction_diversity` | target logits |
| `mutual_information` (IM) | target logits |
| `nuclear_norm` (BNM), `snd` | target logits, of all of the target at once |
| `iwcv`, `dev` | source losses, their weights by `density_ratio` |

Entropy and density are taken in by a model that predicts one class throughout, as
unadapted models often do; `mutual_information` and `nuclear_norm` are not. None of the
validators takes a label of the target: `oracle_target_accuracy` alone does.

**How far two domains are apart**: `proxy_a_distance` (smaller is nearer), of the logits
of any domain classifier on examples held out from it; `held_out_domain_logits` fits a
linear one.

Rows masked by ``where`` count for nothing and may hold anything. Scores are meant to be
compared, not differentiated.
"""

from jaxtransfer.scores.domains import (
    density_ratio,
    held_out_domain_logits,
    proxy_a_distance,
)
from jaxtransfer.scores.features import (
    h_score,
    log_maximum_evidence,
    log_me,
)
from jaxtransfer.scores.predictions import (
    leep,
    log_expected_empirical_prediction,
    nce,
    negative_conditional_entropy,
)
from jaxtransfer.scores.selection import (
    choose,
    oracle_target_accuracy,
)
from jaxtransfer.scores.separability import (
    gaussian_bhattacharyya,
    gbc,
    transrate,
)
from jaxtransfer.scores.validators import (
    deep_embedded_validation,
    dev,
    importance_weighted_validation,
    iwcv,
    mutual_information,
    negative_entropy,
    nuclear_norm,
    prediction_diversity,
    snd,
    soft_neighborhood_density,
    source_accuracy,
)

__all__ = [
    "choose",
    "deep_embedded_validation",
    "density_ratio",
    "dev",
    "gaussian_bhattacharyya",
    "gbc",
    "h_score",
    "held_out_domain_logits",
    "importance_weighted_validation",
    "iwcv",
    "leep",
    "log_expected_empirical_prediction",
    "log_maximum_evidence",
    "log_me",
    "mutual_information",
    "nce",
    "negative_conditional_entropy",
    "negative_entropy",
    "nuclear_norm",
    "oracle_target_accuracy",
    "prediction_diversity",
    "proxy_a_distance",
    "snd",
    "soft_neighborhood_density",
    "source_accuracy",
    "transrate",
]
