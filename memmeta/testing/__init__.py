"""Conformance checks for new adjoints and inner optimisers: no test framework needed, faults are AssertionErrors.

from memmeta.testing import check_adjoint, check_optimizer

print(check_adjoint(MyAdjoint()))
print(check_optimizer(MyRule(lr=0.1), reference=lambda params: torch.optim.SGD(params, lr=0.1)))
"""

from .adjoints import check_adjoint as check_adjoint
from .conformance import Conformance as Conformance
from .measures import central_difference as central_difference
from .measures import central_gradient as central_gradient
from .measures import error as error
from .measures import random_like as random_like
from .optimizers import check_optimizer as check_optimizer
from .problems import Case as Case
from .problems import built_in as built_in
from .problems import inner_optimizers as inner_optimizers
