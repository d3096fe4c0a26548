"""Methods that torch.compile leaves alone, also where its graphs are the first to ask for them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, fx, nn

from palf_dist.untraced import untraced


def make_class() -> type[nn.Module]:
    """A class that nobody has called yet."""

    class Doubled(nn.Module):
        @untraced
        def forward(self, x: Tensor) -> Tensor:
            """Twice that."""
            assert not torch.compiler.is_compiling()
            return x.sinh() * 2

    return Doubled


class Graphs:
    """A backend that keeps what was traced."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, graph: fx.GraphModule, inputs: object) -> fx.GraphModule:
        self.names += [node.name for node in graph.graph.nodes]
        return graph


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_compiled_step_may_be_the_first_to_call_it(asked_before: bool) -> None:
    torch._dynamo.reset()
    module, graphs = make_class()(), Graphs()
    x = torch.linspace(-1, 1, 5)
    if asked_before:
        module(x)

    compiled = torch.compile(lambda value: module(value.cos()).exp(), backend=graphs)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), (2 * x.cos().sinh()).exp())
    assert any("cos" in name for name in graphs.names) and any("exp" in name for name in graphs.names)
    assert not any("sinh" in name for name in graphs.names)


def test_it_is_an_ordinary_method() -> None:
    parent = make_class()

    class Tripled(parent):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    x = torch.ones(2)
    child = copy.deepcopy(Tripled())
    torch.testing.assert_close(child(x), 3 * x.sinh())
    torch.testing.assert_close(parent()(x), 2 * x.sinh())
    assert parent.forward.__doc__ == "Twice that." and [*inspect.signature(parent.forward).parameters] == ["self", "x"]
