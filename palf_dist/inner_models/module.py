"""Any user nn.Module as an inner model, through torch.func.functional_call and autograd: the slow path.

Tasks are looped over, not vmapped: what is right for one task alone is then right for G of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from palf_dist.architecture_config import ModuleConfig
from palf_dist.errors import ConfigError, UnsupportedModuleError
from palf_dist.inner_models.module_checks import check_derivatives, check_operations, check_parameters
from palf_dist.inner_models.shapes import InputShape
from palf_dist.randomness import random_generator
from palf_dist.types import Inputs

PROBE_ROWS = 4


@dataclass(frozen=True)
class Tape:
    """theta as a leaf of autograd, and (logits, features) computed from it."""

    theta: Tensor
    outputs: tuple[Tensor, Tensor]


class FunctionalModel:
    """types.InnerModel of a user's module.

    ``build`` returns a fresh module; it is called once for each task's initial parameters, with torch's generator
    seeded from the task's. The module reads one tensor: numeric columns [B, D], tokens [B, L], or images
    [B, channels, H, W] as torch's convolutions want them. It returns (logits [B, C], features [B, D]), or logits
    alone, which then stand for the features too. theta holds the parameters that require gradients in the order of
    named_parameters; frozen parameters and buffers are constants that all tasks share.

    ``probe`` is a batch of inputs with G = 1, as they will come: the module is run and differentiated on it. Raises
    UnsupportedModuleError, naming module, reason and remedy, where second derivatives would be wrong or missing.
    """

    def __init__(self, build: Callable[[], nn.Module], probe: Inputs) -> None:
        self._build = build
        self._module = build()
        check_parameters(self._module)
        free = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in free.items()}
        self._sizes = [p.numel() for p in free.values()]
        self.num_parameters = sum(self._sizes)
        theta = self.init([random_generator("module probe")])
        logits, features = check_operations(self._module, lambda: self.forward(theta, probe)[:2])
        self.num_classes, self.feature_size = logits.shape[-1], features.shape[-1]
        check_derivatives(self, type(self._module).__name__, theta, probe)

    def init(self, generators: list[np.random.Generator]) -> Tensor:
        """Initial parameters [G, P] float32, as a fresh module has them under each task's seed."""
        tasks = []
        for generator in generators:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(generator.integers(2**63)))
                fresh = dict(self._build().named_parameters())
            tasks.append(torch.cat([fresh[name].detach().flatten() for name in self._shapes]))
        return torch.stack(tasks).float()

    def apply(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Logits [G, B, C] and features [G, B, D]; autograd may go through it twice."""
        x = inputs[0].to(theta.dtype) if inputs[0].is_floating_point() else inputs[0]
        if x.dim() == 5:
            x = x.permute(0, 1, 4, 2, 3)
        named = [*self._module.named_buffers(), *self._module.named_parameters()]
        constants = {
            name: tensor.to(theta.device, theta.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in named
            if name not in self._shapes
        }
        outputs = []
        for task, own in zip(theta, x, strict=True):
            pieces = zip(self._shapes.items(), task.split(self._sizes), strict=True)
            parameters = {name: piece.view(shape) for (name, shape), piece in pieces}
            outputs.append(self._read(functional_call(self._module, {**constants, **parameters}, (own,)), len(own)))
        logits, features = zip(*outputs, strict=True)
        return torch.stack(logits), torch.stack(features)

    def _read(self, output: object, rows: int) -> tuple[Tensor, Tensor]:
        pair: tuple[Any, ...] = output if isinstance(output, tuple) and len(output) == 2 else (output, output)
        if not all(isinstance(part, Tensor) and part.dim() == 2 and len(part) == rows for part in pair):
            found = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in pair]
            raise UnsupportedModuleError(
                f"module {type(self._module).__name__}: it returned {found} for {rows} rows; return logits [rows, C] "
                "or (logits [rows, C], features [rows, D])"
            )
        return pair[0], pair[1]

    @torch.enable_grad()
    def forward(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tape]:
        """Logits [G, B, C], features [G, B, D] and the tape."""
        leaf = theta.detach().requires_grad_()
        tape = Tape(leaf, self.apply(leaf, inputs))
        return tape.outputs[0].detach(), tape.outputs[1].detach(), tape

    def backward(self, theta: Tensor, tape: Tape, dlogits: Tensor, dfeatures: Tensor | None) -> Tensor:
        """Gradient [G, P] of <dlogits, logits> + <dfeatures, features>: J' c."""
        return _pull(tape.outputs, tape.theta, (dlogits, dfeatures))

    # J' u is linear in u with derivative J', so that pulling v back through u -> J' u gives J v, whatever u is.
    @torch.enable_grad()
    def tangent(self, theta: Tensor, tape: Tape, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Directional derivatives J v of logits and features; there is nothing to remember."""
        u = [torch.zeros_like(output).requires_grad_() for output in tape.outputs]
        pulled = _pull(tape.outputs, tape.theta, u, create_graph=True)
        logits_dot, features_dot = torch.autograd.grad(pulled, u, v, materialize_grads=True)
        return logits_dot, features_dot, None

    # Along (v, c.) the gradient J' c moves by J' c. + sum over outputs of c (Hessian v); the Hessian is symmetric, so
    # that the second part is the gradient of <J' c, v>.
    @torch.enable_grad()
    def backward_tangent(
        self,
        theta: Tensor,
        tape: Tape,
        tangent_tape: None,
        v: Tensor,
        dlogits: Tensor,
        dfeatures: Tensor | None,
        dlogits_tangent: Tensor,
        dfeatures_tangent: Tensor | None,
    ) -> Tensor:
        """Directional derivative [G, P] of ``backward`` as theta moves along v and the cotangents along theirs."""
        gradient = _pull(tape.outputs, tape.theta, (dlogits, dfeatures), create_graph=True)
        return _pull((*tape.outputs, gradient), tape.theta, (dlogits_tangent, dfeatures_tangent, v))


def _pull(
    outputs: Sequence[Tensor], theta: Tensor, cotangents: Sequence[Tensor | None], create_graph: bool = False
) -> Tensor:
    """Gradient of the sum of <cotangent, output>; outputs that do not depend on theta and None count as zero."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and c is not None]
    if not pairs:
        return torch.zeros_like(theta)
    moving, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(
        moving, theta, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )[0]


def from_factory(architecture: ModuleConfig, shape: InputShape, num_classes: int) -> FunctionalModel:
    """The FunctionalModel of ``architecture.factory``(shape, num_classes); ConfigError where there is no such thing, it
    raises, or its module has another number of classes."""
    path, _, name = architecture.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(path), name)
    except Exception as error:  # whatever a user's package may raise
        raise ConfigError(
            f"architecture module: factory {architecture.factory} cannot be imported ({_told(error)}); give "
            "package.module:function of an installed package, or add its folder to PYTHONPATH"
        ) from error

    def build() -> nn.Module:
        try:
            made = factory(shape, num_classes)
        except Exception as error:  # whatever a user's factory may raise
            raise ConfigError(
                f"architecture module: factory {architecture.factory} raised {_told(error)} for {shape} and "
                f"{num_classes} classes; mend it"
            ) from error
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"architecture module: factory {architecture.factory} must return a torch.nn.Module, "
                f"it returned {type(made).__name__}"
            )
        return made

    model = FunctionalModel(build, (_probe(architecture, shape),))
    if model.num_classes != num_classes:
        raise ConfigError(
            f"architecture module: factory {architecture.factory} was asked for {num_classes} classes, and its module "
            f"returns logits [rows, {model.num_classes}]; use its argument num_classes as the width of the last layer"
        )
    return model


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _probe(architecture: ModuleConfig, shape: InputShape) -> Tensor:
    """Random inputs [1, PROBE_ROWS, ...] of the kind that the module reads."""
    random = random_generator("module probe inputs")
    if architecture.reads == "tokens" and shape.tokens:
        tokens = random.integers(1, shape.vocabulary, (1, PROBE_ROWS, shape.tokens))
        tokens[:, 0, shape.tokens // 2 :] = 0
        return torch.from_numpy(tokens)
    size = shape.image if architecture.reads == "image" else (shape.numeric,)
    if architecture.reads == "tokens" or size is None or 0 in size:
        raise ConfigError(
            f"architecture module: it reads {architecture.reads}, but the dataset has none; change `reads` or the data"
        )
    return torch.from_numpy(random.standard_normal((1, PROBE_ROWS, *size), dtype=np.float32))
