"""Weight normalisation with a right second derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modes import Lasting


class ExactWeightNorm(Lasting):
    """Inside it, weight norm is computed by elementary operators.

    The double backward of torch's own kernel is wrong (2.13, CPU: it fails ``gradgradcheck``), without a word.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def needed(net: nn.Module) -> bool:
        """Whether a network uses weight norm, as a parametrisation or as torch's older hook."""
        modules = list(net.modules())
        kinds = [type(module).__name__ for module in modules]
        hooks = [type(hook).__name__ for module in modules for hook in module._forward_pre_hooks.values()]
        return "_WeightNorm" in kinds or "WeightNorm" in hooks


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
