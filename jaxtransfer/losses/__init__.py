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
from jaxtransfer.losses.channels import (
    flow_of_solution_procedure,
    inter_channel_correlation,
    neuron_selectivity_transfer,
)
from jaxtransfer.losses.classification import (
    accuracy,
    cross_entropy,
    mean_squared_error,
)
from jaxtransfer.losses.confidence import (
    centroid_pseudo_labels,
    diversity,
    entropy,
    information_maximization,
    minimum_class_confusion,
    pseudo_label,
    virtual_adversarial,
)
from jaxtransfer.losses.contrastive import (
    ContrastiveMemory,
    contrastive_distillation,
    contrastive_memory,
    contrastive_representation_distillation,
    sample_negatives,
    update_contrastive_memory,
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
from jaxtransfer.losses.factors import (
    attention_map,
    attention_transfer,
    channel_distillation,
    factor_transfer,
    pearson_feature_distillation,
)
from jaxtransfer.losses.features import (
    activation_boundary,
    hierarchical_context,
    hint,
    masked_generative,
    overhaul,
    overhaul_margin,
    reused_classifier,
    simkd,
    variational_information_distillation,
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
from jaxtransfer.losses.neighbors import (
    NeighborBank,
    neighbor_bank,
    neighborhood_reciprocal_clustering,
    update_neighbor_bank,
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
from jaxtransfer.losses.relational import (
    correlation_congruence,
    probabilistic_knowledge_transfer,
    relational_angle,
    relational_distance,
    relational_knowledge_distillation,
    similarity_preserving,
)
from jaxtransfer.losses.sequence import (
    chunked_token_distillation,
    sequence_distillation,
    token_distillation,
)
from jaxtransfer.losses.spectral import (
    adaptive_feature_norm,
    batch_nuclear_norm,
    batch_spectral_penalization,
    batch_spectral_shrinkage,
    nuclear_wasserstein_discrepancy,
)
from jaxtransfer.losses.transformers import (
    attention_matching,
    hidden_cosine,
    hidden_matching,
    minilm_attention,
    minilm_values,
    patient_distillation,
    uniform_layers,
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
    "ContrastiveMemory",
    "NeighborBank",
    "SynapticIntelligence",
    "accuracy",
    "activation_boundary",
    "adaptive_feature_norm",
    "attention_map",
    "attention_matching",
    "attention_transfer",
    "attentive_behavioral_regularization",
    "batch_nuclear_norm",
    "batch_spectral_penalization",
    "batch_spectral_shrinkage",
    "behavioral_regularization",
    "cached_knowledge_distillation",
    "calibrated_category_relationship",
    "categorical_contrastive",
    "category_relationship",
    "central_moment_discrepancy",
    "centroid_pseudo_labels",
    "channel_attention",
    "channel_distillation",
    "chunked_token_distillation",
    "class_balance",
    "class_queue",
    "classifier_discrepancy",
    "co_tuning",
    "contrastive_cross_entropy",
    "contrastive_distillation",
    "contrastive_domain_discrepancy",
    "contrastive_memory",
    "contrastive_representation_distillation",
    "coral",
    "correlation_alignment",
    "correlation_congruence",
    "cross_entropy",
    "decoupled_knowledge_distillation",
    "deep_joint_distribution_transport",
    "delta",
    "dist",
    "distillation_from_stronger_teacher",
    "diversity",
    "domain_accuracy",
    "domain_adversarial",
    "domain_confusion",
    "dynamic_temperature",
    "elastic_weight_consolidation",
    "enqueue",
    "entropy",
    "entropy_weights",
    "factor_transfer",
    "fisher_information",
    "flow_of_solution_procedure",
    "gradient_penalty",
    "hidden_cosine",
    "hidden_matching",
    "hierarchical_context",
    "hint",
    "information_maximization",
    "init_synaptic_intelligence",
    "inter_channel_correlation",
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
    "masked_generative",
    "maximum_mean_discrepancy",
    "mean",
    "mean_squared_error",
    "minilm_attention",
    "minilm_values",
    "minimum_class_confusion",
    "mmd",
    "mmd_preset",
    "multi_teacher_distillation",
    "multilinear_map",
    "mutual_learning",
    "neighbor_bank",
    "neighborhood_reciprocal_clustering",
    "neuron_selectivity_transfer",
    "nontarget_class_distillation",
    "normalized_knowledge_distillation",
    "nuclear_wasserstein_discrepancy",
    "optimal_kernel_weights",
    "overhaul",
    "overhaul_margin",
    "patient_distillation",
    "pearson_feature_distillation",
    "permutation_test",
    "probabilistic_knowledge_transfer",
    "pseudo_label",
    "randomized_multilinear_map",
    "relational_angle",
    "relational_distance",
    "relational_knowledge_distillation",
    "reused_classifier",
    "sample_negatives",
    "sequence_distillation",
    "similarity_preserving",
    "simkd",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "standardize_logits",
    "synaptic_importance",
    "target_class_distillation",
    "token_distillation",
    "top_k_knowledge_distillation",
    "uniform_layers",
    "update_contrastive_memory",
    "update_neighbor_bank",
    "update_synaptic_intelligence",
    "variational_information_distillation",
    "virtual_adversarial",
    "virtual_teacher_distillation",
    "wasserstein_critic",
    "weighted_soft_label_distillation",
]
