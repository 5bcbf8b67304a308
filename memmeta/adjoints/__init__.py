"""One file per way to differentiate an inner loop."""

from .base import Adjoint as Adjoint
from .base import Along as Along
from .base import Solution as Solution
from .first_order import FirstOrder as FirstOrder
from .stepwise import Stepwise as Stepwise
from .unrolled import Unrolled as Unrolled
