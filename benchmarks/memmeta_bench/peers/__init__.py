"""What is compared: memmeta, its peers and the floors, one file each."""

from .base import Call as Call
from .base import Method as Method
from .registry import REFERENCES as REFERENCES
from .registry import find as find
from .registry import methods as methods
