"""The problems that are measured, one file each."""

from .base import Pair as Pair
from .base import Workload as Workload
from .base import make as make
from .base import names as names
from .base import sizes_of as sizes_of
