"""Every loss of features, relations, predictions and sets beside its slow twin.

The value, and the gradient by finite differences of fourth order, both to nine digits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from tests.losses import slow
from tests.losses.case import det

MAPS, TEACHER_MAPS = det((2, 4, 3, 2), 201, 2.0), det((2, 4, 3, 2), 202, 2.0)
LARGE = det((2, 7, 5, 3), 203, 2.0)
NEXT, TEACHER_NEXT = det((2, 4, 3, 3), 204), det((2, 4, 3, 3), 205)
PER_CHANNEL = det((2,), 206)
ROWS, WIDE, SAME = det((5, 3), 207), det((5, 4), 208), det((5, 3), 209)
OTHERS, EIGHT = det((4, 3), 210) + 0.3, det((8, 3), 218)
LOGITS, TEACHER = det((5, 3), 211, 3.0), det((5, 3), 212, 3.0)
MORE = det((4, 3), 213, 3.0)
TEACHERS = det((3, 5, 3), 214, 3.0)
ROUTING = np.abs(det((3, 5), 215))
LABELS, SOFT = np.array([0, 1, 2, 2, 0]), np.array([2, 1, 1, 0])
POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def _middle(values):
    """The lower of two middle values."""
    return np.sort(np.ravel(values))[(np.size(values) - 1) // 2]


def _median_of_pairs():
    table = slow.table_of(np.concatenate([ROWS, OTHERS]))
    return np.median(table[~np.eye(len(table), dtype=bool)])


def _scaled(base):
    return [base * power for power in POWERS]


MEAN = _scaled(slow.mean_distance(ROWS, OTHERS))
TLLIB = _scaled(slow.mean_distance(ROWS, OTHERS, with_diagonal=True))
TLLIB_SAME = _scaled(slow.mean_distance(ROWS, SAME, with_diagonal=True))
LOWER = [_middle(slow.table_of(ROWS))]
SOURCE_SOFT = np.array([slow.softmax(row) for row in LOGITS])
TARGET_SOFT = np.array([slow.softmax(row) for row in MORE])
BY_LAYER = [MEAN, [2.0, 5.0]]


def _loss(name, *others, **options):
    """A loss as a function of its first argument alone."""
    return lambda x: getattr(losses, name)(x, *others, **options)


def _twin(function, *others, **options):
    return lambda x: function(x, *others, **options)


def _mmd(**options):
    return _loss("mmd", OTHERS, **options)


def _preset(preset, target=OTHERS):
    return _loss("mmd_preset", target, preset=preset)


def _joint(estimator):
    return lambda x: losses.joint_maximum_mean_discrepancy(
        [x, SOURCE_SOFT],
        [OTHERS, TARGET_SOFT],
        bandwidth=[None, (2.0, 5.0)],
        estimator=estimator,
    )


def _joint_twin(estimator):
    sets = [OTHERS, TARGET_SOFT]
    return lambda x: slow.joint([x, SOURCE_SOFT], sets, BY_LAYER, estimator)


def _disparity(module, of_source, of_target, form):
    """By the second classifier's logits; the first one's are constants."""
    return module.margin_disparity_discrepancy(
        TEACHER, of_source, MORE, of_target, form=form
    )


def _pair(name, twin, *others, **options):
    """The loss and its twin, called alike."""
    return _loss(name, *others, **options), _twin(twin, *others, **options)


vid = "variational_information_distillation"
cdd = "contrastive_domain_discrepancy"
lmmd = "local_maximum_mean_discrepancy"

# By name: the loss and its twin, both of one array, and that array.
TWINS = {
    "hint": (*_pair("hint", slow.mean_square, TEACHER_MAPS), MAPS),
    "reused": (*_pair("reused_classifier", slow.mean_square, TEACHER_MAPS), MAPS),
    "variational": (*_pair(vid, slow.variational, TEACHER_MAPS, PER_CHANNEL), MAPS),
    "variational, variances": (
        lambda a: losses.variational_information_distillation(MAPS, TEACHER_MAPS, a),
        lambda a: slow.variational(MAPS, TEACHER_MAPS, a),
        PER_CHANNEL,
    ),
    "boundary": (
        *_pair("activation_boundary", slow.boundary, TEACHER_MAPS, margin=0.5),
        MAPS,
    ),
    "overhaul": (
        _loss("overhaul", TEACHER_MAPS, -np.abs(PER_CHANNEL)),
        _twin(slow.overhaul, TEACHER_MAPS, margins=-np.abs(PER_CHANNEL)),
        MAPS,
    ),
    "context": (
        *_pair("hierarchical_context", slow.context, LARGE[..., :2], levels=(4, 2, 1)),
        det((2, 7, 5, 2), 216),
    ),
    "generated": (
        _loss("masked_generative", TEACHER_MAPS, weight=0.25),
        lambda s: 0.25 * s[0].size * slow.mean_square(s, TEACHER_MAPS),
        MAPS,
    ),
    "attention map": (*_pair("attention_map", slow.attention_maps, power=3.0), MAPS),
    "attention": (
        *_pair("attention_transfer", slow.attention_transfer, LARGE, power=3.0),
        MAPS,
    ),
    "attention, paper": (
        *_pair("attention_transfer", slow.attention_transfer, LARGE, form="paper"),
        MAPS,
    ),
    "factor": (*_pair("factor_transfer", slow.factors, TEACHER_MAPS, power=1.0), MAPS),
    "factor, squared": (
        *_pair("factor_transfer", slow.factors, TEACHER_MAPS, power=2.0),
        MAPS,
    ),
    "factor, attention": (
        _loss("factor_transfer", LARGE, form="attention"),
        _twin(slow.attention_factors, LARGE),
        MAPS,
    ),
    "channels": (
        *_pair("channel_distillation", slow.channels, TEACHER_MAPS, temperature=2.0),
        MAPS,
    ),
    "pearson": (
        *_pair("pearson_feature_distillation", slow.pearson, TEACHER_MAPS),
        MAPS,
    ),
    "similarity": (*_pair("similarity_preserving", slow.similarity, WIDE), ROWS),
    "congruence": (
        *_pair("correlation_congruence", slow.congruence, WIDE, gamma=0.7, order=3),
        ROWS,
    ),
    "congruence, code": (
        _loss("correlation_congruence", SAME, form="code"),
        _twin(slow.adjacent, SAME),
        ROWS,
    ),
    "distances": (*_pair("relational_distance", slow.distances, WIDE), ROWS),
    "angles": (*_pair("relational_angle", slow.angles, WIDE), ROWS),
    "relational": (
        _loss("relational_knowledge_distillation", WIDE),
        lambda s: 25 * slow.distances(s, WIDE) + 50 * slow.angles(s, WIDE),
        ROWS,
    ),
    "neighbours": (
        *_pair("probabilistic_knowledge_transfer", slow.neighbours, WIDE),
        ROWS,
    ),
    "flow": (
        *_pair(
            "flow_of_solution_procedure",
            slow.flow,
            *(NEXT, TEACHER_MAPS, TEACHER_NEXT),
            form="paper",
        ),
        MAPS,
    ),
    "flow, norms": (
        *_pair(
            "flow_of_solution_procedure",
            slow.flow,
            *(NEXT, TEACHER_MAPS, TEACHER_NEXT),
            form="norms",
        ),
        MAPS,
    ),
    "selectivity": (
        *_pair("neuron_selectivity_transfer", slow.selectivity, NEXT),
        MAPS,
    ),
    "channels together": (
        *_pair("inter_channel_correlation", slow.together, LARGE[..., :2]),
        MAPS,
    ),
    "entropy": (*_pair("entropy", slow.entropy), LOGITS),
    "diversity": (*_pair("diversity", slow.diversity), LOGITS),
    "information": (
        _loss("information_maximization"),
        lambda z: np.mean(slow.entropy(z)) + slow.diversity(z),
        LOGITS,
    ),
    "confusion": (
        _loss("minimum_class_confusion"),
        _twin(slow.confusion, LOGITS),
        LOGITS,
    ),
    "pseudo-label": (
        *_pair("pseudo_label", slow.pseudo, TEACHER, threshold=0.8),
        LOGITS,
    ),
    "nuclear norm": (
        _loss("batch_nuclear_norm"),
        lambda z: -slow.nuclear(z) / len(z),
        LOGITS,
    ),
    "nuclear norm, code": (
        _loss("batch_nuclear_norm", form="code"),
        lambda z: -slow.nuclear(z) / min(z.shape),
        LOGITS,
    ),
    "penalization": (
        _loss("batch_spectral_penalization", OTHERS, largest=2),
        lambda x: slow.largest(x, 2) + slow.largest(OTHERS, 2),
        ROWS,
    ),
    "shrinkage": (
        _loss("batch_spectral_shrinkage", smallest=2),
        _twin(slow.smallest, 2),
        ROWS,
    ),
    "nuclear discrepancy": (
        _loss("nuclear_wasserstein_discrepancy", MORE),
        lambda z: slow.nuclear(z) / len(z) - slow.nuclear(MORE) / len(MORE),
        LOGITS,
    ),
    "nuclear discrepancy, target": (
        lambda z: losses.nuclear_wasserstein_discrepancy(LOGITS, z),
        lambda z: slow.nuclear(LOGITS) / len(LOGITS) - slow.nuclear(z) / len(z),
        MORE,
    ),
    "feature norm": (
        _loss("adaptive_feature_norm", step=0.5),
        _twin(slow.norms, ROWS, 0.5),
        ROWS,
    ),
    "disagreement": (
        *_pair("classifier_discrepancy", slow.disagreement, TEACHER),
        LOGITS,
    ),
    "balance": (*_pair("class_balance", slow.balance, epsilon=1e-3), LOGITS),
    **{
        f"disparity, {form}": (
            lambda a, form=form: _disparity(losses, a, MORE[::-1], form),
            lambda a, form=form: _disparity(slow, a, MORE[::-1], form),
            LOGITS,
        )
        for form in ("paper", "code")
    },
    **{
        f"disparity, {form}, target": (
            lambda a, form=form: _disparity(losses, LOGITS, a, form),
            lambda a, form=form: _disparity(slow, LOGITS, a, form),
            MORE[::-1],
        )
        for form in ("paper", "code")
    },
    **{
        f"teachers, {combine}": (
            _loss(
                "multi_teacher_distillation",
                TEACHERS,
                combine=combine,
                weights=ROUTING,
                temperature=2.0,
            ),
            _twin(slow.ensemble, TEACHERS, combine, ROUTING),
            LOGITS,
        )
        for combine in ("probabilities", "logits", "divergences")
    },
    "peers": (_loss("mutual_learning"), _twin(slow.peers, TEACHERS), TEACHERS),
    "coral": (*_pair("coral", slow.coral, OTHERS, form="paper"), ROWS),
    "coral, means": (*_pair("coral", slow.coral, OTHERS, form="mean_covariance"), ROWS),
    "log-coral": (
        _loss("log_correlation_alignment", OTHERS, epsilon=0.1),
        _twin(slow.log_coral, OTHERS, 0.1),
        ROWS,
    ),
    "moments": (
        *_pair(
            "central_moment_discrepancy",
            slow.central_moments,
            OTHERS,
            bounds=(-1.0, 2.0),
        ),
        ROWS,
    ),
    "mmd": (_mmd(), _twin(slow.mmd, OTHERS, MEAN), ROWS),
    "mmd, unbiased": (
        _mmd(estimator="unbiased"),
        _twin(slow.mmd, OTHERS, MEAN, "unbiased"),
        ROWS,
    ),
    "mmd, median": (
        _mmd(bandwidth="median"),
        _twin(slow.mmd, OTHERS, _scaled(_median_of_pairs())),
        ROWS,
    ),
    "mmd, weights": (
        _mmd(bandwidth=(1.0, 3.0), kernel_weights=(0.2, 0.8)),
        _twin(slow.mmd, OTHERS, (1.0, 3.0), weights=(0.2, 0.8)),
        ROWS,
    ),
    "mmd, linear": (
        _mmd(estimator="linear", bandwidth=(1.0, 3.0)),
        _twin(slow.by_blocks, OTHERS, (1.0, 3.0), 2),
        ROWS,
    ),
    "mmd, block": (
        _loss("mmd", EIGHT, estimator="block", block_size=3, bandwidth=(1.0, 3.0)),
        _twin(slow.by_blocks, EIGHT, (1.0, 3.0), 3),
        det((7, 3), 217),
    ),
    "preset, deepda": (_preset("deepda"), _twin(slow.mmd, OTHERS, MEAN), ROWS),
    "preset, tllib": (
        _preset("tllib"),
        lambda x: slow.mmd(x, OTHERS, TLLIB, "unbiased") + 2 / (len(x) - 1),
        ROWS,
    ),
    "preset, tllib_linear": (
        _preset("tllib_linear", SAME),
        lambda x: slow.neighbouring(x, SAME, TLLIB_SAME) + 2 / (len(x) - 1),
        ROWS,
    ),
    "preset, pytorch_adapt": (
        _preset("pytorch_adapt"),
        _twin(slow.mmd, OTHERS, LOWER, "unbiased"),
        ROWS,
    ),
    "preset, pytorch_adapt_linear": (
        _preset("pytorch_adapt_linear"),
        _twin(slow.by_blocks, OTHERS, LOWER, 2),
        ROWS,
    ),
    "preset, domainbed": (
        _preset("domainbed"),
        _twin(slow.mmd, OTHERS, [10.0**power for power in range(-3, 4)]),
        ROWS,
    ),
    "preset, dassl": (
        _preset("dassl"),
        _twin(slow.mmd, OTHERS, [2.0 * size**2 for size in (1, 5, 10)], "unbiased"),
        ROWS,
    ),
    **{
        f"joint, {estimator}": (_joint(estimator), _joint_twin(estimator), ROWS)
        for estimator in ("biased", "unbiased")
    },
    "local": (
        _loss(lmmd, OTHERS, LABELS, TARGET_SOFT),
        _twin(slow.local, OTHERS, LABELS, TARGET_SOFT, MEAN),
        ROWS,
    ),
    "local, target": (
        lambda y: losses.local_maximum_mean_discrepancy(ROWS, y, LABELS, TARGET_SOFT),
        lambda y: slow.local(ROWS, y, LABELS, TARGET_SOFT, MEAN),
        OTHERS,
    ),
    "contrastive": (
        _loss(cdd, OTHERS, LABELS, SOFT, classes=3),
        _twin(slow.contrastive, OTHERS, LABELS, SOFT, MEAN),
        ROWS,
    ),
    "contrastive, target": (
        lambda y: losses.contrastive_domain_discrepancy(
            ROWS, y, LABELS, SOFT, classes=3
        ),
        lambda y: slow.contrastive(ROWS, y, LABELS, SOFT, MEAN),
        OTHERS,
    ),
}


def weights_of(values):
    """Different weights for the examples, so that none can hide behind another."""
    return 1.0 + np.arange(np.size(values)).reshape(np.shape(values)) / 7.0


def slope(function, array, step=2e-3):
    """The gradient by finite differences of fourth order."""
    result = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        for factor, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
            moved = array.copy()
            moved[place] += factor * step
            result[place] += weight * function(moved) / (12.0 * step)
    return result


@pytest.mark.parametrize("name", TWINS)
def test_value_and_gradient(float64, name):
    loss, twin, array = TWINS[name]

    def both(x):
        value = loss(x)
        return jnp.sum(weights_of(value) * value), value

    run = jax.jit(jax.grad(both, has_aux=True))
    expected = twin(array)
    wanted = slope(lambda x: np.sum(weights_of(expected) * twin(x)), array)
    for dtype, tolerance in ((jnp.float64, 1e-9), (jnp.float32, 1e-5)):
        gradient, value = run(jnp.asarray(array, dtype))
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=atol)
        atol = tolerance * np.abs(wanted).max()
        np.testing.assert_allclose(gradient, wanted, rtol=tolerance, atol=atol)
