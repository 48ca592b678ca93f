"""Meta-learning: learn from many tasks how to learn the next one from a few examples.

A :class:`Learner` adapts to a task; :func:`objective` is what is minimised over tasks.

    learner = meta.maml(meta.task(model), optax.sgd(0.4), steps=1)
    step = train_step(meta.objective(learner), optax.adam(1e-3))
"""

from jaxtransfer.methods._counting import counted as counted
from jaxtransfer.methods._stages import stages as stages
from jaxtransfer.methods.meta.baselines import cosine_head as cosine_head
from jaxtransfer.methods.meta.baselines import fine_tuning as fine_tuning
from jaxtransfer.methods.meta.baselines import nearest_neighbors as nearest_neighbors
from jaxtransfer.methods.meta.baselines import simple_shot as simple_shot
from jaxtransfer.methods.meta.descent import anil as anil
from jaxtransfer.methods.meta.descent import boil as boil
from jaxtransfer.methods.meta.descent import cavia as cavia
from jaxtransfer.methods.meta.descent import maml as maml
from jaxtransfer.methods.meta.following import check_finite as check_finite
from jaxtransfer.methods.meta.following import trajectory as trajectory
from jaxtransfer.methods.meta.gradients import Backward as Backward
from jaxtransfer.methods.meta.implicit import implicit_maml as implicit_maml
from jaxtransfer.methods.meta.implicit import proximal as proximal
from jaxtransfer.methods.meta.learned import Learned as Learned
from jaxtransfer.methods.meta.learned import meta_curvature as meta_curvature
from jaxtransfer.methods.meta.learned import meta_sgd as meta_sgd
from jaxtransfer.methods.meta.learned import per_layer_per_step as per_layer_per_step
from jaxtransfer.methods.meta.learner import Adapted as Adapted
from jaxtransfer.methods.meta.learner import Learner as Learner
from jaxtransfer.methods.meta.learner import Statistics as Statistics
from jaxtransfer.methods.meta.learner import StepStatistics as StepStatistics
from jaxtransfer.methods.meta.learner import Task as Task
from jaxtransfer.methods.meta.learner import task as task
from jaxtransfer.methods.meta.metric import matching as matching
from jaxtransfer.methods.meta.metric import prototypical as prototypical
from jaxtransfer.methods.meta.metric import ridge as ridge
from jaxtransfer.methods.meta.outer import multi_step_weights as multi_step_weights
from jaxtransfer.methods.meta.outer import objective as objective
from jaxtransfer.methods.meta.outer import reptile as reptile
from jaxtransfer.methods.meta.proto_maml import proto_maml as proto_maml
from jaxtransfer.methods.meta.relation import relation as relation
from jaxtransfer.methods.meta.transductive import (
    transductive_fine_tuning as transductive_fine_tuning,
)
from jaxtransfer.methods.meta.transductive import (
    with_unlabelled_query as with_unlabelled_query,
)
