"""The service around memmeta: experiments, outer updates, run folders and the ``memmeta`` command."""

from .experiment import Experiment as Experiment
from .experiment import ExperimentFile as ExperimentFile
from .experiment import load as load
from .update import OuterUpdate as OuterUpdate
