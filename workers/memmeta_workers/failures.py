"""What ends a command with exit code 1 or 130: it began well, and could not go on. (Bad input is ``InputError``.)"""

from __future__ import annotations

from memmeta.errors import MemmetaError


class RunFailed(MemmetaError):
    """A run that began and could not go on; the message says why, and what is left."""


class Interrupted(MemmetaError):
    """A run that was stopped, after its checkpoint was written; the message says how to go on."""


class JobFailed(MemmetaError):
    """A job that ended badly, or a cluster that went away; the message says why."""


class NodeFailed(MemmetaError):
    """A node that could not start, or that ended by itself."""
