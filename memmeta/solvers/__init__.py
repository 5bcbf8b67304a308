"""Linear solvers that need products with the matrix alone, for implicit differentiation."""

from .base import Matvec as Matvec
from .base import Solver as Solver
from .base import SolverResult as SolverResult
from .cg import CG as CG
from .neumann import Neumann as Neumann
