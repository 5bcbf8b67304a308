"""Published methods, each a thin factory."""

from .anil import anil as anil
from .cavia import cavia as cavia
from .ensemble import Ensemble as Ensemble
from .fomaml import fomaml as fomaml
from .from_forward import from_forward as from_forward
from .imaml import imaml as imaml
from .maml import maml as maml
from .maml_plus_plus import Annealing as Annealing
from .maml_plus_plus import cosine_by_epoch as cosine_by_epoch
from .maml_plus_plus import maml_plus_plus as maml_plus_plus
from .maml_plus_plus import multi_step_weights as multi_step_weights
from .maml_plus_plus import update_statistics as update_statistics
from .meta_sgd import meta_sgd as meta_sgd
from .reptile import reptile as reptile
