"""Functions of the inner loop's hot path compiled by inductor (``inner.compile``).

A hot function takes the ``StepParts`` of a group and then tensors, numbers and tuples of them; it changes none of them
in place and returns such tuples. It is traced once for each group of tasks, through all of its Python, and compiled
once for each graph, whatever group it came from; inductor keeps what it made on the disk, too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from palf_dist.errors import ConfigError
from palf_dist.inner_steps import StepParts

HotFunction = Callable[..., tuple[Any, ...]]

_COMPILED: dict[tuple[Any, ...], Callable[..., Sequence[Tensor]]] = {}  # by graph, and by the form of its tensors


class HotPath:
    """Calls hot functions with what the steps of one group of tasks have in common."""

    def __init__(self, parts: StepParts) -> None:
        self.parts = parts
        self._tensors = _tensors(parts)
        self._of_group: list[Tensor] = tree_flatten(self._tensors)[0]
        self._made: dict[tuple[Any, ...], tuple[Callable[..., Sequence[Tensor]], TreeSpec]] = {}

    def __call__(self, function: HotFunction, *arguments: Any) -> Any:
        leaves, tree = tree_flatten(arguments)
        tensors = [*self._of_group, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        key = function, *(_form(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._made:
            self._made[key] = self._make(function, leaves, tree, tensors)
        compiled, result = self._made[key]
        return tree_unflatten(compiled(*tensors), result)

    def _make(
        self, function: HotFunction, leaves: list[Any], tree: TreeSpec, tensors: list[Any]
    ) -> tuple[Callable[..., Sequence[Tensor]], TreeSpec]:
        result: TreeSpec | None = None

        def of_tensors(*given: Tensor) -> list[Tensor]:
            nonlocal result
            each = iter(given)
            parts = _with_tensors(self.parts, tree_map(lambda _: next(each), self._tensors))
            arguments = [next(each) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            made, result = tree_flatten(function(parts, *tree_unflatten(arguments, tree)))
            return made

        graph = make_fx(of_tensors)(*tensors)
        assert result is not None
        if any(node.op == "get_attr" for node in graph.graph.nodes):  # of this group alone, as a module's buffers
            return torch._inductor.compile(graph, tensors), result
        key = graph.code, *map(_form, tensors)
        if key not in _COMPILED:
            _COMPILED[key] = torch._inductor.compile(graph, tensors)  # traced already: torch.compile would guard it
        return _COMPILED[key], result


def counted(step: int) -> Tensor:
    """The number of a step as a tensor [], which compiled functions take for any step; of float64, for its powers."""
    return torch.tensor(step, dtype=torch.float64)


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


def _tensors(parts: StepParts) -> dict[str, Any]:
    """What is of a group alone, by name; the rest is decided by its form."""
    return {name: getattr(parts, name) for name in ("inputs", "labels", "weight_decay")} | {
        "context": {
            item.name: value
            for item in fields(parts.context)
            if isinstance(value := getattr(parts.context, item.name), Tensor)
        }
    }


def _with_tensors(parts: StepParts, tensors: dict[str, Any]) -> StepParts:
    return replace(parts, **tensors | {"context": replace(parts.context, **tensors["context"])})
