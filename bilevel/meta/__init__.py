"""Meta-learning with implicit gradients: :class:`bilevel.IMAML`, tasks for it, and what ``bilevel imaml`` runs.

``IMAML``, the task containers, samplers and networks need torch and numpy alone. ``omniglot`` and the modules of the command
(``training``, ``report``, ``command``) need the packages of ``pip install ".[cli]"``, in a clone, when they are used.
"""

from bilevel.meta.distortion import Distortion
from bilevel.meta.glyphs import draw_glyphs
from bilevel.meta.images import LabelledImages, split_classes
from bilevel.meta.imaml import IMAML
from bilevel.meta.models import conv_network, mlp
from bilevel.meta.omniglot import download_omniglot, load_omniglot
from bilevel.meta.sampler import FewShotSampler
from bilevel.meta.sinusoid import SinusoidSampler
from bilevel.meta.tasks import Tasks, pad_tasks

__all__ = [
    "IMAML",
    "Distortion",
    "FewShotSampler",
    "LabelledImages",
    "SinusoidSampler",
    "Tasks",
    "conv_network",
    "download_omniglot",
    "draw_glyphs",
    "load_omniglot",
    "mlp",
    "pad_tasks",
    "split_classes",
]
