"""Data: sources, arrays, pipelines, pairs of domains, few-shot episodes."""

from jaxtransfer.data.arrays import as_arrays as as_arrays
from jaxtransfer.data.arrays import check_arrays as check_arrays
from jaxtransfer.data.arrays import check_finite as check_finite
from jaxtransfer.data.arrays import check_labels as check_labels
from jaxtransfer.data.augment import compose as compose
from jaxtransfer.data.augment import horizontal_flip as horizontal_flip
from jaxtransfer.data.augment import random_crop as random_crop
from jaxtransfer.data.domains import pair as pair
from jaxtransfer.data.domains import shift as shift
from jaxtransfer.data.episodes import ClassIndex as ClassIndex
from jaxtransfer.data.episodes import class_index as class_index
from jaxtransfer.data.episodes import omniglot_split as omniglot_split
from jaxtransfer.data.episodes import sample as sample
from jaxtransfer.data.episodes import sinusoid as sinusoid
from jaxtransfer.data.pipeline import batches as batches
from jaxtransfer.data.pipeline import evaluation_batches as evaluation_batches
from jaxtransfer.data.pipeline import pairs as pairs
from jaxtransfer.data.records import Source as Source
from jaxtransfer.data.sources import find_prepared as find_prepared
from jaxtransfer.data.sources import load as load
