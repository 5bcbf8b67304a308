"""``torch.func``: ``grad`` of the inner loop inside ``grad`` of the query loss, one task after the other."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.func import functional_call, grad, replace_all_batch_norm_modules_

from memmeta import Task

from ..problems import Workload
from .base import Call, Method, Options, twice_differentiable

Tensors = dict[str, Tensor]


def nested(work: Workload, options: Options) -> Call:
    """The graph of one task's T steps at a time.

    On a copy of the network without running statistics, which ``grad`` can't update in place; in training mode batch
    norm does not read them.
    """
    net = replace_all_batch_norm_modules_(copy.deepcopy(work.net))

    def loss(params: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
        return work.loss(functional_call(net, params, (inputs,)), targets)

    def query_loss(params: Tensors, task: Task) -> Tensor:
        for _ in range(work.steps):
            grads = grad(loss)(params, *task.support)
            params = {name: p - work.lr * grads[name] for name, p in params.items()}
        return loss(params, *task.query)

    def call() -> None:
        params = dict(work.net.named_parameters())
        start = {name: p.detach() for name, p in params.items()}
        with twice_differentiable():
            for task in work.tasks:
                for name, found in grad(query_loss)(start, task).items():
                    mean, param = found / len(work.tasks), params[name]
                    param.grad = mean if param.grad is None else param.grad.add_(mean)

    return call


METHODS = (Method("torch.func", "torch.func, nested", nested),)
