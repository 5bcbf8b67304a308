"""Published methods, each a thin factory."""

from .maml import maml as maml
