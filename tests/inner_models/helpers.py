"""Cases, random arguments and autograd references that the tests of inner models share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palf_dist.architecture_config import Architecture
from palf_dist.inner_models import InputShape, build_model
from palf_dist.inner_models.layered import LayeredModel
from palf_dist.randomness import random_generator
from palf_dist.types import InnerModel, Inputs


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    shape: InputShape
    classes: int = 3

    def model(self) -> InnerModel:
        return build_model(self.architecture, self.shape, self.classes)

    def inputs(self, tasks: int, rows: int) -> Inputs:
        """Random inputs; codes include 0, and of the texts one is all padding and others have padding at their end."""
        torch.manual_seed(1)
        shape = self.shape
        if shape.image is not None:
            return (torch.randn(tasks, rows, *shape.image),)
        if shape.tokens:
            tokens = torch.randint(1, shape.vocabulary, (tasks, rows, shape.tokens))
            tokens[:, 1:, shape.tokens // 2 :] = 0
            tokens[:, -1] = 0
            return (tokens,)
        codes = torch.randint(0, max(shape.categories, 1), (tasks, rows, shape.categorical))
        return torch.randn(tasks, rows, shape.numeric), codes


@dataclass(frozen=True)
class Arguments:
    """What the five methods of types.InnerModel are called with, in float64."""

    theta: Tensor
    v: Tensor
    dlogits: Tensor
    dfeatures: Tensor
    dlogits_tangent: Tensor
    dfeatures_tangent: Tensor


def arguments(model: InnerModel, inputs: Inputs, seed: int = 2) -> Arguments:
    tasks = inputs[0].shape[0]
    theta = model.init([random_generator("test", seed, g) for g in range(tasks)]).double()
    torch.manual_seed(seed)
    theta = theta + 0.1 * torch.randn_like(theta)
    with torch.no_grad():
        logits, features = model.apply(theta, inputs)
    like = torch.randn_like
    return Arguments(theta, like(theta), like(logits), like(features), like(logits), like(features))


def views(model: InnerModel, theta: Tensor) -> list[Tensor]:
    """The parameters [G, *shape] of a built-in architecture."""
    assert isinstance(model, LayeredModel)
    return model.parameters(theta)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    """Same shape and dtype, and the difference is small relative to ``expected``."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def assert_derivatives_match_autograd(model: InnerModel, inputs: Inputs, features: bool = True) -> None:
    """backward = vjp, tangent = jvp and backward_tangent = double backward of ``apply``."""
    a = arguments(model, inputs)
    theta = a.theta.clone().requires_grad_()
    outputs = model.apply(theta, inputs)
    cotangents = (a.dlogits, a.dfeatures if features else torch.zeros_like(a.dfeatures))
    tangents = (a.dlogits_tangent, a.dfeatures_tangent if features else torch.zeros_like(a.dfeatures))
    gradient = torch.autograd.grad(outputs, theta, cotangents, create_graph=True)[0]
    gradient_dot = torch.autograd.grad((gradient, *outputs), theta, (a.v, *tangents))[0]
    outputs_dot = torch.autograd.functional.jvp(lambda t: model.apply(t, inputs), a.theta, a.v)[1]

    logits, hidden, tape = model.forward(a.theta, inputs)
    assert close(logits, outputs[0].detach()) and close(hidden, outputs[1].detach())
    optional = a.dfeatures if features else None
    optional_tangent = a.dfeatures_tangent if features else None
    assert close(model.backward(a.theta, tape, a.dlogits, optional), gradient.detach())
    logits_dot, hidden_dot, tangent_tape = model.tangent(a.theta, tape, a.v)
    assert close(logits_dot, outputs_dot[0]) and close(hidden_dot, outputs_dot[1])
    actual = model.backward_tangent(
        a.theta, tape, tangent_tape, a.v, a.dlogits, optional, a.dlogits_tangent, optional_tangent
    )
    assert close(actual, gradient_dot)


def assert_derivatives_match_differences(model: InnerModel, inputs: Inputs, step: float = 1e-6) -> None:
    """tangent and backward_tangent = central differences of forward and backward, cotangents moving too."""
    a = arguments(model, inputs)

    def at(eps: float) -> tuple[Tensor, Tensor, Tensor]:
        theta = a.theta + eps * a.v
        logits, features, tape = model.forward(theta, inputs)
        moved = a.dlogits + eps * a.dlogits_tangent, a.dfeatures + eps * a.dfeatures_tangent
        return logits, features, model.backward(theta, tape, *moved)

    differences = [(up - down) / (2 * step) for up, down in zip(at(step), at(-step), strict=True)]
    _, _, tape = model.forward(a.theta, inputs)
    logits_dot, features_dot, tangent_tape = model.tangent(a.theta, tape, a.v)
    gradient_dot = model.backward_tangent(
        a.theta, tape, tangent_tape, a.v, a.dlogits, a.dfeatures, a.dlogits_tangent, a.dfeatures_tangent
    )
    for actual, expected in zip((logits_dot, features_dot, gradient_dot), differences, strict=True):
        assert close(actual, expected, 1e-6)
