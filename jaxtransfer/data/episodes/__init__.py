"""Few-shot tasks drawn in JAX from a key: N-way K-shot episodes and sinusoids."""

from jaxtransfer.data.episodes.drawing import Drawn as Drawn
from jaxtransfer.data.episodes.drawing import Rotations as Rotations
from jaxtransfer.data.episodes.drawing import draw as draw
from jaxtransfer.data.episodes.index import ClassIndex as ClassIndex
from jaxtransfer.data.episodes.index import GroupIndex as GroupIndex
from jaxtransfer.data.episodes.index import class_index as class_index
from jaxtransfer.data.episodes.index import group_index as group_index
from jaxtransfer.data.episodes.sampling import Episodes as Episodes
from jaxtransfer.data.episodes.sampling import gather as gather
from jaxtransfer.data.episodes.sampling import sample as sample
from jaxtransfer.data.episodes.saved import fingerprint as fingerprint
from jaxtransfer.data.episodes.saved import load_episodes as load_episodes
from jaxtransfer.data.episodes.saved import save_episodes as save_episodes
from jaxtransfer.data.episodes.sinusoids import sinusoid as sinusoid
from jaxtransfer.data.episodes.splits import omniglot_split as omniglot_split
