"""TorchOpt, higher and learn2learn: one task after the other through autograd, as these libraries are used.

Networks and losses are written as their users would write them, for one task; the losses share one log-softmax.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.meta_gradient.workloads import Problem
from palf_dist.architecture_config import ConvConfig, MLPConfig, TransformerConfig
from palf_dist.inner_models.layered import LayeredModel
from palf_dist.inner_optimisers import ADAM_EPSILON, Adam, cosine_rate
from palf_dist.losses import FOCAL_FLOOR, MASKED_LOGIT, NORM_FLOOR, REVERSE_CLIP
from palf_dist.policies.meta_learned import OUTPUT_SCALE
from palf_dist.types import DEFAULT_HYPERPARAMETERS

TAU, EPS = DEFAULT_HYPERPARAMETERS["tau"], DEFAULT_HYPERPARAMETERS["eps"]
BETAS = Adam.beta1, Adam.beta2


class MLP(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = functional.relu(self.first(x))
        return self.last(h), h


class Conv(nn.Module):
    def __init__(self, channels: tuple[int, ...], groups: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((1, *channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(groups, outputs), nn.ReLU()]
        self.body, self.last = nn.Sequential(*layers), nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).mean((2, 3))
        return self.last(h), h


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, feedforward: int, words: int, length: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, feedforward),
            nn.Linear(feedforward, width),
        )
        self.last = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(tokens) + self.places.weight
        rows, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        # fused attention has no double backward
        attention = torch.softmax(query @ key.transpose(2, 3) * (width // self.heads) ** -0.5, -1)
        x = x + self.out((attention @ value).transpose(1, 2).reshape(rows, length, width))
        x = x + self.down(functional.relu(self.up(self.norm2(x))))
        h = x.mean(1)
        return self.last(h), h


def network(problem: Problem) -> nn.Module:
    """The inner model of one task, its parameters in palf_dist's order."""
    workload = problem.case.workload
    architecture, shape, classes = workload.architecture, workload.shape, workload.classes
    if isinstance(architecture, MLPConfig):
        return MLP(shape.numeric, architecture.hidden[0], classes)
    if isinstance(architecture, ConvConfig):
        return Conv(architecture.channels, architecture.groups, classes)
    assert isinstance(architecture, TransformerConfig)
    widths = architecture.width, architecture.heads, architecture.feedforward
    return Transformer(*widths, shape.vocabulary, shape.tokens, classes)


def adaptive_loss(z: Tensor, h: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """The mixture of the paper's five basis losses: logits z [n, C], features h [n, D], labels y [n], alpha [5]."""
    log_p = torch.log_softmax(z, -1)
    own = log_p.gather(1, y[:, None])[:, 0]
    ce = -own.mean()
    focal = -((-torch.expm1(own)).clamp_min(FOCAL_FLOOR) ** 2 * own).mean()
    smooth = (1 - EPS) * ce - EPS * log_p.mean()
    symmetric = ce + REVERSE_CLIP * (1 - own.exp()).mean()
    f = h * torch.rsqrt((h * h).sum(-1, keepdim=True) + NORM_FLOOR)
    itself = torch.eye(len(y), dtype=torch.bool)
    positive = (y[:, None] == y) & ~itself
    log_q = torch.log_softmax((f @ f.T / TAU).masked_fill(itself, MASKED_LOGIT), -1)
    contrast = -((positive * log_q).sum(-1) / positive.sum(-1).clamp_min(1)).mean()
    return torch.stack([ce, focal, smooth, symmetric, contrast]) @ alpha


class Task:
    """What one task's inner run needs: minibatches, outer rows, learning rates and initial parameters."""

    def __init__(self, problem: Problem, net: nn.Module, index: int) -> None:
        group = problem.group
        assert isinstance(group.model, LayeredModel)
        self.steps = problem.loop.steps

        def rows(column: Tensor, at: Tensor) -> Tensor:
            x = column[index][at]
            return x.movedim(-1, 1).contiguous() if x.dim() == 4 else x  # images: channels first

        batches = group.batches[:, index]
        self.batches = [(rows(group.train.inputs[0], at), group.train.labels[index][at]) for at in batches]
        everything = torch.arange(group.meta_validation.labels.shape[1])
        self.outer = rows(group.meta_validation.inputs[0], everything), group.meta_validation.labels[index]
        self.peak = float(group.learning_rate[index, 0])
        views = group.model.parameters(group.theta0[index : index + 1])
        self.theta0 = [
            # palf_dist has the taps of a convolution before its channels
            value[0].unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2).contiguous() if p.dim() == 4 else value[0].clone()
            for p, value in zip(net.parameters(), views, strict=True)
        ]

    def rate(self, step: int) -> float:
        return self.peak * cosine_rate(step, self.steps)


class Unrolled(Protocol):
    """The outer loss of one task after its inner run, with its graph back to ``alphas`` [steps, 5]."""

    def __call__(self, net: nn.Module, task: Task, optimiser: str, alphas: list[Tensor]) -> Tensor: ...


def outer_loss(outputs: tuple[Tensor, Tensor], task: Task) -> Tensor:
    return functional.cross_entropy(outputs[0], task.outer[1])


def with_torchopt() -> Unrolled:
    import torchopt

    def unrolled(net: nn.Module, task: Task, optimiser: str, alphas: list[Tensor]) -> Tensor:
        if optimiser == "sgd":
            meta: Any = torchopt.MetaSGD(net, lr=task.rate)
        else:
            meta = torchopt.MetaAdam(net, lr=task.rate, betas=BETAS, eps=0.0, eps_root=ADAM_EPSILON**2)
        for (x, y), alpha in zip(task.batches, alphas, strict=True):
            z, h = net(x)
            meta.step(adaptive_loss(z, h, y, alpha))
        return outer_loss(net(task.outer[0]), task)

    return unrolled


def _adam(slots: list[Tensor], gradient: Tensor, step: int, rate: float) -> Tensor:
    """palf_dist's Adam: what is added to a parameter. Neither library has one with its epsilon under the root, without
    which the meta-gradient is not finite."""
    slots[0] = BETAS[0] * slots[0] + (1 - BETAS[0]) * gradient
    slots[1] = BETAS[1] * slots[1] + (1 - BETAS[1]) * gradient * gradient
    root = torch.sqrt(slots[1] / (1 - BETAS[1] ** (step + 1)) + ADAM_EPSILON**2)
    return slots[0] / root * (-rate / (1 - BETAS[0] ** (step + 1)))


def with_higher() -> Unrolled:
    import higher

    class RootAdam(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **_: Any) -> None:
            for group, gradients, states in zip(self.param_groups, grouped_grads, self.state, strict=True):
                for index, (p, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
                    kept = states[index].setdefault("slots", [torch.zeros_like(gradient), torch.zeros_like(gradient)])
                    step = states[index]["step"] = states[index].get("step", -1) + 1
                    group["params"][index] = p + _adam(kept, gradient, step, group["lr"])

    higher.register_optim(torch.optim.Adam, RootAdam)

    def unrolled(net: nn.Module, task: Task, optimiser: str, alphas: list[Tensor]) -> Tensor:
        kind = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
        with higher.innerloop_ctx(net, kind(net.parameters(), lr=task.peak)) as (inner, meta):
            for step, ((x, y), alpha) in enumerate(zip(task.batches, alphas, strict=True)):
                z, h = inner(x)
                meta.step(adaptive_loss(z, h, y, alpha), override={"lr": [task.rate(step)]})
            return outer_loss(inner(task.outer[0]), task)

    return unrolled


def with_learn2learn() -> Unrolled:
    """By learn2learn.utils, which is what its MAML is made of. The package itself imports gym and torchvision, whose
    wheel on PyPI wants another build of torch: it is left out."""
    if "learn2learn" not in sys.modules:
        found = importlib.util.find_spec("learn2learn")
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'learn2learn'")
        package = types.ModuleType("learn2learn")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["learn2learn"] = package
    from learn2learn.utils import clone_module, update_module

    def unrolled(net: nn.Module, task: Task, optimiser: str, alphas: list[Tensor]) -> Tensor:
        learner = clone_module(net)
        slots = [[torch.zeros_like(p), torch.zeros_like(p)] for p in learner.parameters()]
        for step, ((x, y), alpha) in enumerate(zip(task.batches, alphas, strict=True)):
            z, h = learner(x)
            loss, rate = adaptive_loss(z, h, y, alpha), task.rate(step)
            gradients = torch.autograd.grad(loss, list(learner.parameters()), create_graph=True)
            if optimiser == "sgd":
                updates = [-rate * gradient for gradient in gradients]
            else:
                updates = [_adam(own, gradient, step, rate) for own, gradient in zip(slots, gradients, strict=True)]
            update_module(learner, updates=updates)
        return outer_loss(learner(task.outer[0]), task)

    return unrolled


def policy(problem: Problem, phi: Tensor, states: Tensor) -> Tensor:
    """alpha [refreshes, 5] from normalised states [refreshes, 6]."""
    hidden, inputs, outputs = problem.policy.spec.hidden, states.shape[1], len(problem.policy.spec.basis)
    w1, b1, w2, b2 = phi.split([inputs * hidden, hidden, hidden * outputs, outputs])
    raw = torch.tanh(states @ w1.view(inputs, hidden) + b1) @ w2.view(hidden, outputs) + b2
    return torch.softmax(OUTPUT_SCALE * raw + math.log(1 / outputs), -1)


def prepare(problem: Problem, unrolled: Unrolled) -> Callable[[], np.ndarray]:
    """The meta-gradient of a problem of A to C, the tasks one after the other."""
    net, states = network(problem).to(problem.phi.dtype), problem.normalised_states
    tasks = [Task(problem, net, index) for index in range(problem.case.tasks)]
    refresh = problem.policy.refresh
    kept = [(module, name) for module in net.modules() for name in module._parameters]

    def reset(values: list[Tensor]) -> None:
        """TorchOpt leaves what it made in the network, with its graph."""
        for (module, name), value in zip(kept, values, strict=True):
            module._parameters[name] = nn.Parameter(value.clone())

    def run() -> np.ndarray:
        phi = problem.phi.clone().requires_grad_(True)
        for index, task in enumerate(tasks):
            reset(task.theta0)
            alphas = policy(problem, phi, states[:, index])
            of_steps = [alphas[step // refresh] for step in range(task.steps)]
            (unrolled(net, task, problem.case.optimiser, of_steps) / len(tasks)).backward()
        reset(tasks[0].theta0)
        assert phi.grad is not None
        return phi.grad.double().numpy()

    return run
