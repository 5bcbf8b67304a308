"""Forward over reverse: a flat program of tensor operators, made to carry tangents."""

from .rules import RULES as RULES
from .rules import Rule as Rule
from .transform import Unsupported as Unsupported
from .transform import carry as carry
