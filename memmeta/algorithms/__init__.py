"""Published methods, each a thin factory."""

from .imaml import imaml as imaml
from .maml import maml as maml
