"""Functions of the inner loop's hot path compiled by inductor (``inner.compile``).

A hot function takes the ``StepParts`` of a group and then tensors, numbers and tuples of them; it changes none of them
in place and returns such tuples. It is traced once for each group of tasks, through all of its Python, and compiled
once for each graph, whatever group it came from; inductor keeps what it made on the disk, too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from palf_dist.errors import ConfigError
from palf_dist.inner_steps import StepParts

HotFunction = Callable[..., tuple[Any, ...]]
Nesting = tuple[type, tuple[Any, ...]] | None
"""How tuples are nested: the kind of one and its entries' nesting; None for what is no tuple."""

_COMPILED: dict[tuple[Any, ...], Callable[..., Sequence[Tensor]]] = {}  # by graph, and by the form of its tensors


class HotPath:
    """Calls hot functions with what the steps of one group of tasks have in common."""

    def __init__(self, parts: StepParts) -> None:
        self.parts = parts
        self._tensors = _tensors(parts)
        self._made: dict[tuple[Any, ...], tuple[Callable[..., Sequence[Tensor]], Nesting]] = {}

    def __call__(self, function: HotFunction, *arguments: Any) -> Any:
        leaves: list[Any] = []
        nesting = _flatten(arguments, leaves)
        tensors = [*self._tensors.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        key = function, nesting, *(_form(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._made:
            self._made[key] = self._make(function, leaves, nesting, tensors)
        compiled, result = self._made[key]
        return _nested(result, iter(compiled(*tensors)))

    def _make(
        self, function: HotFunction, leaves: list[Any], nesting: Nesting, tensors: list[Any]
    ) -> tuple[Callable[..., Sequence[Tensor]], Nesting]:
        result: Nesting = None

        def of_tensors(*given: Tensor) -> list[Tensor]:
            nonlocal result
            each = iter(given)
            parts = _with_tensors(self.parts, **{name: next(each) for name in self._tensors})
            arguments = [next(each) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            made: list[Tensor] = []
            result = _flatten(function(parts, *_nested(nesting, iter(arguments))), made)
            return made

        graph = make_fx(of_tensors)(*tensors)
        if any(node.op == "get_attr" for node in graph.graph.nodes):  # of this group alone, as a module's buffers
            return torch._inductor.compile(graph, tensors), result
        key = graph.code, *map(_form, tensors)
        if key not in _COMPILED:
            _COMPILED[key] = torch._inductor.compile(graph, tensors)  # traced already: torch.compile would guard it
        return _COMPILED[key], result


def check_compiler() -> None:
    """Raises ConfigError where inductor has no compiler for the CPU."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        raise ConfigError(
            f"inner.compile: needs a C++ compiler, and there is no {command}; install it, name another one in CXX, or "
            "leave inner.compile out"
        )


def _flatten(value: Any, leaves: list[Any]) -> Nesting:
    """How tuples are nested in ``value``; what they hold is added to ``leaves``. (torch's own does it more slowly.)"""
    if isinstance(value, tuple):
        return type(value), tuple([_flatten(each, leaves) for each in value])
    leaves.append(value)
    return None


def _nested(nesting: Nesting, leaves: Iterator[Any]) -> Any:
    """The inverse of ``_flatten``."""
    if nesting is None:
        return next(leaves)
    kind, parts = nesting
    values = [_nested(part, leaves) for part in parts]
    return tuple(values) if kind is tuple else kind(*values)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _tensors(parts: StepParts) -> dict[str, Tensor]:
    """What is of a group alone, by name; the rest is decided by its form."""
    of_context = {item.name: getattr(parts.context, item.name) for item in fields(parts.context)}
    found = {"weight_decay": parts.weight_decay} | of_context
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _with_tensors(parts: StepParts, weight_decay: Tensor, **of_context: Any) -> StepParts:
    return replace(parts, weight_decay=weight_decay, context=replace(parts.context, **of_context))
