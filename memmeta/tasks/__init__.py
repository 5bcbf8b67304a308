"""Addressable task sources: the same (seed, step, index) gives the same task anywhere."""

from ..task import Address as Address
from ..task import Task as Task
from .base import TaskBatch as TaskBatch
from .base import TaskSource as TaskSource
from .draws import Draws as Draws
from .glyphs import Glyphs as Glyphs
from .image_folders import ImageFolders as ImageFolders
from .learn2learn import Learn2Learn as Learn2Learn
from .omniglot import Omniglot as Omniglot
from .sinusoid import Sinusoid as Sinusoid
