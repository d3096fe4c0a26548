"""Functions of the inner loop's hot path, as they are or compiled by inductor (``inner.compile``).

A hot function takes a model, a loss head and then tensors, tuples of tensors, numbers and one LossContext; it changes
nothing in place and returns tensors. It is traced once for each group of tasks, through all of its Python, and compiled
once for each graph, whatever group it came from; inductor keeps what it made on the disk, too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from palf_dist.errors import ConfigError
from palf_dist.loss_head import LossHead
from palf_dist.losses import LossContext
from palf_dist.types import InnerModel

HotFunction = Callable[..., tuple[Tensor, ...]]

_COMPILED: dict[tuple[Any, ...], HotFunction] = {}  # by graph, and by the form of the tensors that it is given


class HotPath:
    """Calls hot functions with the model and the loss head of one group of tasks."""

    def __init__(self, model: InnerModel, head: LossHead, *, compiled: bool) -> None:
        self.model, self.head, self.compiled = model, head, compiled
        self._made: dict[tuple[Any, ...], HotFunction] = {}

    def __call__(self, function: HotFunction, *arguments: Any) -> tuple[Tensor, ...]:
        if not self.compiled:
            return function(self.model, self.head, *arguments)
        leaves, tree = tree_flatten([_tensors(a) if isinstance(a, LossContext) else a for a in arguments])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = function, *(_form(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._made:
            template = next(a for a in arguments if isinstance(a, LossContext))
            self._made[key] = self._make(function, leaves, tree, template)
        return self._made[key](*tensors)

    def _make(self, function: HotFunction, leaves: list[Any], tree: TreeSpec, template: LossContext) -> HotFunction:
        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            whole = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
            arguments = [replace(template, **each) if isinstance(each, dict) else each for each in whole]
            return function(self.model, self.head, *arguments)

        tensors: list[Any] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        graph = make_fx(of_tensors)(*tensors)
        if any(node.op == "get_attr" for node in graph.graph.nodes):  # of this group alone, as a module's buffers
            return torch._inductor.compile(graph, tensors)
        key = graph.code, *map(_form, tensors)
        if key not in _COMPILED:
            _COMPILED[key] = torch._inductor.compile(graph, tensors)  # traced already: torch.compile would guard it
        return _COMPILED[key]


def check_compiler() -> None:
    """Raises ConfigError where inductor has no compiler for the CPU."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        raise ConfigError(
            f"inner.compile: needs a C++ compiler, and there is no {command}; install it, name another one in CXX, or "
            "leave inner.compile out"
        )


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _tensors(context: LossContext) -> dict[str, Tensor]:
    """What a context holds of its group and batch; the rest is decided once for a group."""
    values = {item.name: getattr(context, item.name) for item in fields(context)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
