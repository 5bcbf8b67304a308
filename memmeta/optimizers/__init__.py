"""Differentiable inner update rules."""

from .adam import Adam as Adam
from .adam import AdamW as AdamW
from .base import BoundRule as BoundRule
from .base import Hyper as Hyper
from .base import InnerOptimizer as InnerOptimizer
from .rmsprop import RMSprop as RMSprop
from .sgd import SGD as SGD
