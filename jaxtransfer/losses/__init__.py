"""Losses: pure functions over arrays. No model, no state, no loop.

Losses of examples return one value per example, ``[...]``; average them with `mean`.
Losses of a set (alignment, adversarial, regularisers) return a scalar.
"""

from jaxtransfer.losses.adversarial import (
    domain_accuracy,
    domain_adversarial,
    domain_confusion,
    entropy_weights,
    inverted_label_adversarial,
    multilinear_map,
    randomized_multilinear_map,
)
from jaxtransfer.losses.bituning import (
    ClassQueue,
    categorical_contrastive,
    class_queue,
    contrastive_cross_entropy,
    enqueue,
)
from jaxtransfer.losses.classification import (
    accuracy,
    cross_entropy,
    mean_squared_error,
)
from jaxtransfer.losses.discrepancy import (
    maximum_mean_discrepancy,
    mmd,
)
from jaxtransfer.losses.disparity import (
    class_balance,
    classifier_discrepancy,
    margin_disparity_discrepancy,
)
from jaxtransfer.losses.distillation import (
    cached_knowledge_distillation,
    dist,
    distillation_from_stronger_teacher,
    dynamic_temperature,
    knowledge_distillation,
    logit_matching,
    standardize_logits,
    top_k_knowledge_distillation,
)
from jaxtransfer.losses.ensembles import (
    multi_teacher_distillation,
    mutual_learning,
)
from jaxtransfer.losses.finetuning import (
    attentive_behavioral_regularization,
    behavioral_regularization,
    calibrated_category_relationship,
    category_relationship,
    channel_attention,
    co_tuning,
    delta,
    learning_without_forgetting,
)
from jaxtransfer.losses.importance import (
    SynapticIntelligence,
    fisher_information,
    init_synaptic_intelligence,
    synaptic_importance,
    update_synaptic_intelligence,
)
from jaxtransfer.losses.joint import (
    contrastive_domain_discrepancy,
    joint_maximum_mean_discrepancy,
    local_maximum_mean_discrepancy,
)
from jaxtransfer.losses.labelled_distillation import (
    decoupled_knowledge_distillation,
    nontarget_class_distillation,
    normalized_knowledge_distillation,
    target_class_distillation,
    virtual_teacher_distillation,
    weighted_soft_label_distillation,
)
from jaxtransfer.losses.moments import (
    central_moment_discrepancy,
    coral,
    correlation_alignment,
    log_correlation_alignment,
)
from jaxtransfer.losses.presets import (
    mmd_preset,
)
from jaxtransfer.losses.reduction import (
    mean,
)
from jaxtransfer.losses.regularizers import (
    elastic_weight_consolidation,
    l1_sp,
    l2,
    l2_sp,
)
from jaxtransfer.losses.transport import (
    deep_joint_distribution_transport,
    gradient_penalty,
    sinkhorn_divergence,
    sliced_wasserstein,
    wasserstein_critic,
)
from jaxtransfer.losses.two_sample import (
    optimal_kernel_weights,
    permutation_test,
)

__all__ = [
    "ClassQueue",
    "SynapticIntelligence",
    "accuracy",
    "attentive_behavioral_regularization",
    "behavioral_regularization",
    "cached_knowledge_distillation",
    "calibrated_category_relationship",
    "categorical_contrastive",
    "category_relationship",
    "central_moment_discrepancy",
    "channel_attention",
    "class_balance",
    "class_queue",
    "classifier_discrepancy",
    "co_tuning",
    "contrastive_cross_entropy",
    "contrastive_domain_discrepancy",
    "coral",
    "correlation_alignment",
    "cross_entropy",
    "decoupled_knowledge_distillation",
    "deep_joint_distribution_transport",
    "delta",
    "dist",
    "distillation_from_stronger_teacher",
    "domain_accuracy",
    "domain_adversarial",
    "domain_confusion",
    "dynamic_temperature",
    "elastic_weight_consolidation",
    "enqueue",
    "entropy_weights",
    "fisher_information",
    "gradient_penalty",
    "init_synaptic_intelligence",
    "inverted_label_adversarial",
    "joint_maximum_mean_discrepancy",
    "knowledge_distillation",
    "l1_sp",
    "l2",
    "l2_sp",
    "learning_without_forgetting",
    "local_maximum_mean_discrepancy",
    "log_correlation_alignment",
    "logit_matching",
    "margin_disparity_discrepancy",
    "maximum_mean_discrepancy",
    "mean",
    "mean_squared_error",
    "mmd",
    "mmd_preset",
    "multi_teacher_distillation",
    "multilinear_map",
    "mutual_learning",
    "nontarget_class_distillation",
    "normalized_knowledge_distillation",
    "optimal_kernel_weights",
    "permutation_test",
    "randomized_multilinear_map",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "standardize_logits",
    "synaptic_importance",
    "target_class_distillation",
    "top_k_knowledge_distillation",
    "update_synaptic_intelligence",
    "virtual_teacher_distillation",
    "wasserstein_critic",
    "weighted_soft_label_distillation",
]
