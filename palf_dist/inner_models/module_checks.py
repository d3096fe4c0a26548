"""Refuses user modules whose second derivatives are wrong or missing, naming the module, the reason and the remedy.

Three steps, each at build time: the parameters are looked at, one forward pass is watched operation by operation, and
gradient, tangent and Hessian-vector product are compared with finite differences, which catches everything else.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from palf_dist.errors import UnsupportedModuleError
from palf_dist.randomness import random_generator
from palf_dist.types import InnerModel, Inputs

STEP = 1e-5  # of central differences along a unit direction, in float64
TOLERANCE = 1e-5
ATTEMPTS = 3  # a difference may straddle a kink (ReLU) by chance; a wrong derivative is wrong every time

FUSED_ATTENTION = (
    "fused attention has no second derivative",
    "wrap the call in torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or write softmax(Q K') V",
)
PAIRWISE_DISTANCE = (
    "cdist and pdist have no second derivative",
    "write the distances with broadcasting or matrix products, plus a small constant under the root",
)
RANDOMNESS = (
    "it draws random numbers, so that its derivatives are those of another function at each call",
    "remove dropout and noise, or put that submodule into eval mode",
)
CHECKPOINTING = (
    "torch.utils.checkpoint recomputes with the module's own parameters instead of each task's",
    "call the checkpointed function directly",
)


def _refuse(path: str, reason: str, remedy: str) -> NoReturn:
    raise UnsupportedModuleError(f"module {path}: {reason}; remedy: {remedy}")


def check_parameters(module: nn.Module) -> None:
    """Refuses modules without a trainable parameter, and lazy, integer or shared parameters."""
    owner: dict[Tensor, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        path = f"{type(module).__name__}.{name}"
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            _refuse(path, "a lazy parameter has no size yet", "use the layer that is told its sizes")
        if not parameter.is_floating_point():
            _refuse(path, f"a parameter of {parameter.dtype} cannot be trained", "make it a buffer")
        if parameter in owner:
            _refuse(
                path,
                f"it is the same tensor as {owner[parameter]}, but theta has one entry for each parameter",
                "give each its own parameter, or register one and use it twice in forward",
            )
        owner[parameter] = path
    if not any(parameter.requires_grad for parameter in owner):
        _refuse(type(module).__name__, "it has no parameter that requires a gradient", "add one or unfreeze one")


class _Watch(TorchDispatchMode):
    """Refuses operations known to be unfit, naming the innermost module that ran them."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = self._fault(func)
        if found is not None:
            _refuse(max(self._tracker.parents - {"Global"}, key=len), *found)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _fault(func: Any) -> tuple[str, str] | None:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):  # before randomness: fused kernels can do dropout
            return FUSED_ATTENTION
        if torch.Tag.nondeterministic_seeded in func.tags:
            return RANDOMNESS
        if name in ("_cdist_forward", "_pdist_forward"):
            return PAIRWISE_DISTANCE
        if any(f.f_code.co_filename == torch.utils.checkpoint.__file__ for f, _ in traceback.walk_stack(None)):
            return CHECKPOINTING
        return None


def check_operations(module: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The result of ``run``, a forward pass of ``module`` on probe inputs, watched; refuses changed buffers too."""
    name = type(module).__name__
    before = {path: buffer.clone() for path, buffer in module.named_buffers()}
    try:
        with ModuleTracker() as tracker, _Watch(tracker):
            result = run()
    except UnsupportedModuleError:
        raise
    except Exception as error:  # whatever a user's forward may raise
        raise UnsupportedModuleError(
            f"module {name}: it cannot be run on probe inputs ({error}); remedy: check its input and class counts"
        ) from error
    for path, buffer in module.named_buffers():
        if not torch.equal(buffer, before[path]):
            _refuse(
                f"{name}.{path}",
                "its forward changes this buffer, which all tasks share (BatchNorm's running statistics do)",
                "use GroupNorm or LayerNorm, or track_running_stats=False",
            )
    return result


def check_derivatives(model: InnerModel, name: str, theta: Tensor, inputs: Inputs) -> None:
    """Refuses a model of which a derivative is missing, or differs from finite differences in float64."""
    try:
        right = any(_error(model, theta.double(), inputs, attempt) <= TOLERANCE for attempt in range(ATTEMPTS))
    except RuntimeError as error:
        raise UnsupportedModuleError(
            f"module {name}: its first or second derivative cannot be computed in float64 ({error}); remedy: use "
            "operations that torch can differentiate twice, and create tensors with the dtype of the input"
        ) from error
    if not right:
        _refuse(
            name,
            "its derivatives differ from finite differences",
            "look for detach, no_grad, rounding, custom autograd functions and roots at zero",
        )


def _error(model: InnerModel, theta0: Tensor, inputs: Inputs, attempt: int) -> float:
    """Largest relative error of gradient, tangent and Hessian-vector product, at and along random directions."""
    random = random_generator("module derivatives", attempt)

    def normal(like: Tensor) -> Tensor:
        return torch.from_numpy(random.standard_normal(like.shape))

    # Off the module's own parameters: a derivative taken there by mistake is then seen.
    theta = theta0 + 0.05 * normal(theta0)
    v = torch.nn.functional.normalize(normal(theta), dim=1)
    logits, features, tape = model.forward(theta, inputs)
    cotangents = normal(logits), normal(features)
    still = torch.zeros_like(logits), torch.zeros_like(features)
    gradient = model.backward(theta, tape, *cotangents)
    logits_dot, features_dot, tangent_tape = model.tangent(theta, tape, v)
    gradient_dot = model.backward_tangent(theta, tape, tangent_tape, v, *cotangents, *still)

    def at(sign: int) -> tuple[Tensor, Tensor]:
        moved = theta + sign * STEP * v
        logits, features, tape = model.forward(moved, inputs)
        return torch.cat([logits, features], -1), model.backward(moved, tape, *cotangents)

    (up, gradient_up), (down, gradient_down) = at(1), at(-1)
    difference = (up - down) / (2 * STEP)
    weighted = (difference * torch.cat(cotangents, -1)).sum()
    checks = (
        (torch.cat([logits_dot, features_dot], -1), difference, up),
        ((gradient * v).sum(), weighted, up),
        (gradient_dot, (gradient_up - gradient_down) / (2 * STEP), gradient),
    )
    errors = [(a - b).norm() / torch.maximum(b.norm(), 1e-3 * scale.norm()) for a, b, scale in checks]
    return float(torch.stack(errors).max())  # NaN stays NaN, and is never within the tolerance
