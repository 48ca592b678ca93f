"""Distillation: a student learns what teachers know, in one domain or across two.

:func:`objective` joins a task loss and any number of :class:`Term` s, each a loss
between a layer (or the output) of the student and one of a teacher. :func:`start` makes
what they need besides the student: bridges between features of different shape,
memories, a count of updates for schedules.
"""

from jaxtransfer.methods._counting import counted as counted
from jaxtransfer.methods._stages import stages as stages
from jaxtransfer.methods.distill.augmentation import Augmentation as Augmentation
from jaxtransfer.methods.distill.augmentation import variant_key as variant_key
from jaxtransfer.methods.distill.bridges import match as match
from jaxtransfer.methods.distill.bridges import variational as variational
from jaxtransfer.methods.distill.cache import cache_teacher as cache_teacher
from jaxtransfer.methods.distill.cache_files import (
    DamagedCacheError as DamagedCacheError,
)
from jaxtransfer.methods.distill.cache_open import open_cache as open_cache
from jaxtransfer.methods.distill.cross_domain import (
    cross_domain_objective as cross_domain_objective,
)
from jaxtransfer.methods.distill.data_free import (
    data_free_objective as data_free_objective,
)
from jaxtransfer.methods.distill.data_free import with_generator as with_generator
from jaxtransfer.methods.distill.exits import early_exits as early_exits
from jaxtransfer.methods.distill.exits import exit_head as exit_head
from jaxtransfer.methods.distill.exits import exit_logits as exit_logits
from jaxtransfer.methods.distill.generations import generations as generations
from jaxtransfer.methods.distill.objective import objective as objective
from jaxtransfer.methods.distill.online import init_cohort as init_cohort
from jaxtransfer.methods.distill.online import mutual_objective as mutual_objective
from jaxtransfer.methods.distill.online import of_cohort as of_cohort
from jaxtransfer.methods.distill.review import fusion as fusion
from jaxtransfer.methods.distill.review import review as review
from jaxtransfer.methods.distill.sequences import on_policy as on_policy
from jaxtransfer.methods.distill.sequences import sequence_batch as sequence_batch
from jaxtransfer.methods.distill.start import start as start
from jaxtransfer.methods.distill.student import init as init
from jaxtransfer.methods.distill.student import moving_average as moving_average
from jaxtransfer.methods.distill.student import of_student as of_student
from jaxtransfer.methods.distill.student import predict as predict
from jaxtransfer.methods.distill.student import with_average as with_average
from jaxtransfer.methods.distill.taught import TOP_K as TOP_K
from jaxtransfer.methods.distill.taught import DeviceCache as DeviceCache
from jaxtransfer.methods.distill.taught import TeacherCache as TeacherCache
from jaxtransfer.methods.distill.terms import Term as Term
from jaxtransfer.methods.distill.views import taps as taps
