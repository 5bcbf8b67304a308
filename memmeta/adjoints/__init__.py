"""One file per way to differentiate an inner loop."""

from .base import Adjoint as Adjoint
from .base import Along as Along
from .base import Solution as Solution
from .displacement import Displacement as Displacement
from .first_order import FirstOrder as FirstOrder
from .forward import Forward as Forward
from .implicit import Implicit as Implicit
from .reversible import Reversible as Reversible
from .stepwise import Stepwise as Stepwise
from .unrolled import Unrolled as Unrolled
