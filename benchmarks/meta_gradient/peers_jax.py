"""JAX: vmap over the tasks, scan over the steps, jit over all; in reverse mode, and by the adjoint.

Convolutions are products with patches: under vmap they would be grouped ones, which XLA has no fast code for on a CPU.
Everything is written for one task and one minibatch.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from benchmarks.meta_gradient.workloads import Problem, Workload
from palf_dist.architecture_config import ConvConfig, MLPConfig, TransformerConfig
from palf_dist.inner_models.layered import LayeredModel
from palf_dist.inner_models.normalisation import Normalise
from palf_dist.inner_optimisers import ADAM_EPSILON, Adam, cosine_rate
from palf_dist.losses import (
    FOCAL_FLOOR,
    MASKED_LOGIT,
    NOISE_FLOOR,
    NORM_FLOOR,
    OWN_FLOOR,
    REVERSE_CLIP,
    UNSEEN_WEIGHT,
    WEIGHT_FLOOR,
)
from palf_dist.policies.meta_learned import _LOG_RANGE, _UPPER, OUTPUT_SCALE
from palf_dist.types import DEFAULT_HYPERPARAMETERS

Tree = Any
"""Arrays in lists, tuples or dictionaries."""


def mlp(p: Tree, x: Any) -> tuple[Any, Any]:
    h = jax.nn.relu(x @ p[0].T + p[1])
    return h @ p[2].T + p[3], h


def _group_norm(x: Any, groups: int) -> Any:
    """x [n, H, W, channels]."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    return (centred * lax.rsqrt((centred * centred).mean((1, 3), keepdims=True) + Normalise.EPS)).reshape(x.shape)


def conv(groups: int, p: Tree, x: Any) -> tuple[Any, Any]:
    *body, head, bias = p
    for weight, shift, gamma, beta in zip(*(body[part::4] for part in range(4)), strict=True):
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [padded[:, top : top + height : 2, left : left + width : 2] for top in range(3) for left in range(3)]
        x = jnp.concatenate(taps, -1) @ weight.T + shift
        x = jax.nn.relu(_group_norm(x, groups) * gamma + beta)
    h = x.mean((1, 2))
    return h @ head.T + bias, h


def _layer_norm(x: Any, gamma: Any, beta: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + Normalise.EPS) * gamma + beta


def transformer(heads: int, p: Tree, tokens: Any) -> tuple[Any, Any]:
    words, places, gamma1, beta1, qkv, of_qkv, out, of_out, gamma2, beta2, up, of_up, down, of_down, head, bias = p
    x = words[tokens] + places
    rows, length, width = x.shape
    split = (_layer_norm(x, gamma1, beta1) @ qkv.T + of_qkv).reshape(rows, length, 3, heads, width // heads)
    query, key, value = split.transpose(2, 0, 3, 1, 4)
    attention = jax.nn.softmax(query @ key.swapaxes(2, 3) * (width // heads) ** -0.5, -1)
    x = x + (attention @ value).swapaxes(1, 2).reshape(rows, length, width) @ out.T + of_out
    x = x + jax.nn.relu(_layer_norm(x, gamma2, beta2) @ up.T + of_up) @ down.T + of_down
    h = x.mean(1)
    return h @ head.T + bias, h


def _network(workload: Workload) -> Callable[[Tree, Any], tuple[Any, Any]]:
    architecture = workload.architecture
    if isinstance(architecture, MLPConfig):
        return mlp
    if isinstance(architecture, ConvConfig):
        return partial(conv, architecture.groups)
    assert isinstance(architecture, TransformerConfig)
    return partial(transformer, architecture.heads)


def basis_losses(z: Any, h: Any, y: Any, controls: Tree, task: Tree, averages: tuple[Any, Any] | None) -> Tree:
    """Mean over the batch of each basis loss that has a weight in ``controls``; z [n, C], h [n, D], y [n]."""
    log_p = jax.nn.log_softmax(z + task["padding"])
    own = jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]
    ce = -own.mean()
    found = {"ce": ce}
    if "focal" in controls:
        found["focal"] = -(jnp.maximum(-jnp.expm1(own), FOCAL_FLOOR) ** 2 * own).mean()
        eps = DEFAULT_HYPERPARAMETERS["eps"]
        found["label_smoothing"] = (1 - eps) * ce - eps * log_p.mean()
        found["symmetric_ce"] = ce + REVERSE_CLIP * (1 - jnp.exp(own)).mean()
        f = h * lax.rsqrt((h * h).sum(-1, keepdims=True) + NORM_FLOOR)
        itself = jnp.eye(len(y), dtype=bool)
        positive = (y[:, None] == y) & ~itself
        log_q = jax.nn.log_softmax(jnp.where(itself, MASKED_LOGIT, f @ f.T / DEFAULT_HYPERPARAMETERS["tau"]))
        found["info_nce"] = -((positive * log_q).sum(-1) / jnp.maximum(positive.sum(-1), 1)).mean()
    if "robust_ce" in controls:
        assert averages is not None
        log_r = jax.nn.log_softmax(z + task["padding"] + controls["la"] * task["log_prior_ratio"])
        kept = jnp.take_along_axis(log_r, y[:, None], 1)[:, 0] + jnp.log1p(-controls["e"])
        log_m = jnp.logaddexp(kept, jnp.log((controls["e"] + NOISE_FLOOR) / task["k"]))
        probability, seen = averages
        believed = (1 - controls["ew"]) * jnp.maximum(probability, OWN_FLOOR)
        belief = jnp.where(seen, believed / (believed + controls["ew"] / task["k"]), UNSEEN_WEIGHT)
        found["robust_ce"] = -(belief / jnp.maximum(belief.mean(), WEIGHT_FLOOR) * log_m).mean()
    return found


def outer_loss(workload: Workload, z: Any, task: Tree) -> Any:
    z, y = z + task["padding"], task["outer_labels"]
    if workload.outer.kind == "cross_entropy":
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()
    assert workload.outer.kind == "soft_error"
    own = jnp.take_along_axis(z, y[:, None], 1)[:, 0]
    other = jnp.where(jnp.arange(z.shape[1]) == y[:, None], MASKED_LOGIT, z).max(-1)
    margin = jnp.clip(own - other, -1e3, 1e3)
    return jax.nn.sigmoid(-workload.outer.sharpness * margin / jnp.sqrt((margin * margin).mean() + 1e-6)).mean()


class Run:
    """One task's inner run as pure functions; steps come in stretches that end with a reading of the outer loss."""

    def __init__(self, problem: Problem) -> None:
        self.workload = problem.case.workload
        self.model = _network(self.workload)
        self.spec = problem.policy.spec
        self.adam = problem.case.optimiser == "adam"
        self.keeps_averages = "robust_ce" in self.spec.basis
        self.ema = problem.loop.inner.ema
        self.stretches = self.workload.steps // self.workload.outer.every

    def controls(self, phi: Any, states: Any) -> Tree:
        """Of each step, by name [stretches, steps, G], from normalised states [refreshes, G, S]."""
        spec, inputs = self.spec, states.shape[-1]
        names = (*spec.basis, *spec.hyperparameters)
        cuts = np.cumsum([inputs * spec.hidden, spec.hidden, spec.hidden * len(names)])
        w1, b1, w2, b2 = jnp.split(phi, cuts)
        hidden = jnp.tanh(states @ w1.reshape(inputs, -1) + b1)
        raw = OUTPUT_SCALE * (hidden @ w2.reshape(-1, len(names)) + b2)
        start = jnp.log(jnp.array(spec.initial_weights, raw.dtype))
        alpha = jax.nn.softmax(start + raw[..., : len(spec.basis)])
        found = {name: alpha[..., index] for index, name in enumerate(spec.basis)}
        for index, name in enumerate(spec.hyperparameters, len(spec.basis)):
            at = DEFAULT_HYPERPARAMETERS[name]
            if name in _UPPER:
                share = at / _UPPER[name]
                found[name] = _UPPER[name] * jax.nn.sigmoid(raw[..., index] + np.log(share / (1 - share)))
            else:
                found[name] = at * jnp.exp(jnp.clip(raw[..., index], *_LOG_RANGE[name]))
        of_steps = {name: jnp.repeat(value, spec.refresh, 0)[: self.workload.steps] for name, value in found.items()}
        return {name: value.reshape(self.stretches, -1, value.shape[1]) for name, value in of_steps.items()}

    def loss(self, theta: Tree, controls: Tree, step: Tree, task: Tree, averages: Any) -> tuple[Any, Any]:
        """The adaptive loss and the logits."""
        z, h = self.model(theta, step["x"])
        losses = basis_losses(z, h, step["y"], controls, task, averages)
        return sum(controls[name] * losses[name] for name in self.spec.basis), z

    def update(self, step: Tree, theta: Tree, slots: Tree, gradient: Tree, decay: Any) -> tuple[Tree, Tree]:
        if not self.adam:
            moved = jax.tree.map(lambda p, g: p - step["rate"] * g, theta, gradient)
        else:
            b1, b2 = Adam.beta1, Adam.beta2
            m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, slots[0], gradient)
            v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, slots[1], gradient)
            size = step["rate"] / step["c1"]
            moved = jax.tree.map(
                lambda p, m, v: p - size * m * lax.rsqrt(v / step["c2"] + ADAM_EPSILON**2), theta, m, v
            )
            slots = m, v
        if "wd" in self.spec.hyperparameters:
            moved = jax.tree.map(lambda p, q: p - step["rate"] * decay * q, moved, theta)
        return moved, slots

    def recall(self, memory: Tree, step: Tree) -> Any:
        """Own-label averaged predictions and seen flags [n] of the minibatch, before the step."""
        if not self.keeps_averages:
            return None
        averaged, seen = memory
        own = jnp.take_along_axis(averaged[step["rows"]], step["y"][:, None], 1)[:, 0]
        return own, seen[step["rows"]]

    def remember(self, memory: Tree, step: Tree, task: Tree, z: Any) -> Tree:
        if not self.keeps_averages:
            return memory
        averaged, seen = memory
        p = jax.nn.softmax(lax.stop_gradient(z) + task["padding"])
        after = p + self.ema * (averaged[step["rows"]] - p)
        return averaged.at[step["rows"]].set(after), seen.at[step["rows"]].set(True)

    def start(self, task: Tree) -> Tree:
        theta = task["theta0"]
        zeros = jax.tree.map(jnp.zeros_like, theta)
        memory = (task["averaged"], jnp.zeros(len(task["averaged"]), bool)) if self.keeps_averages else ()
        return theta, (zeros, zeros) if self.adam else (), memory

    def step(self, carry: Tree, controls: Tree, step: Tree, task: Tree) -> tuple[Tree, Tree]:
        """What follows, and the averages that were read."""
        theta, slots, memory = carry
        averages = self.recall(memory, step)
        gradient, z = jax.grad(self.loss, has_aux=True)(theta, controls, step, task, averages)
        decay = controls.get("wd", 0.0) * task["decay"]
        return (*self.update(step, theta, slots, gradient, decay), self.remember(memory, step, task, z)), averages

    def outer(self, theta: Tree, task: Tree) -> Any:
        return outer_loss(self.workload, self.model(theta, task["outer_inputs"])[0], task) / self.stretches

    def objective(self, controls: Tree, steps: Tree, task: Tree) -> Any:
        """J of one task: what reverse mode differentiates."""

        def one(carry: Tree, at: Tree) -> tuple[Tree, None]:
            controls, step = at
            return self.step(carry, controls, step, task)[0], None

        def stretch(carry: Tree, at: Tree) -> tuple[Tree, Any]:
            carry, _ = lax.scan(one, carry, at)
            return carry, self.outer(carry[0], task)

        return lax.scan(stretch, self.start(task), (controls, steps))[1].sum()

    def adjoint(self, controls: Tree, steps: Tree, task: Tree) -> Tree:
        """The derivatives of J in the controls of each step of one task: forward keeping theta, slots and averages,
        and back with the derivative of the gradient along the cotangent that the optimiser gives it."""

        def forward(carry: Tree, at: Tree) -> tuple[Tree, Tree]:
            controls, step = at
            after, averages = self.step(carry, controls, step, task)
            return after, (carry[0], carry[1], averages)

        def stretch(carry: Tree, at: Tree) -> tuple[Tree, Tree]:
            carry, kept = lax.scan(forward, carry, at)
            return carry, (kept, carry[0])

        def back(cotangent: Tree, at: Tree) -> tuple[Tree, Tree]:
            controls, step, (theta, slots, averages) = at

            def gradients(theta: Tree) -> Tree:
                def loss(theta: Tree, controls: Tree) -> Any:
                    return self.loss(theta, controls, step, task, averages)[0]

                return jax.grad(loss, argnums=(0, 1))(theta, controls)

            (gradient, _), along_tangent = jax.linearize(gradients, theta)
            decay = controls.get("wd", jnp.zeros_like(step["rate"])) * task["decay"]
            _, pull = jax.vjp(partial(self.update, step), theta, slots, gradient, decay)
            of_theta, of_slots, along, of_decay = pull(cotangent)
            curvature, of_controls = along_tangent(along)
            if "wd" in of_controls:
                of_controls = of_controls | {"wd": of_decay * task["decay"]}
            return (jax.tree.map(jnp.add, of_theta, curvature), of_slots), of_controls

        def stretch_back(cotangent: Tree, at: Tree) -> tuple[Tree, Tree]:
            controls, steps, (kept, theta) = at
            of_theta = jax.tree.map(jnp.add, cotangent[0], jax.grad(self.outer)(theta, task))
            return lax.scan(back, (of_theta, cotangent[1]), (controls, steps, kept), reverse=True)

        carry, trace = lax.scan(stretch, self.start(task), (controls, steps))
        zeros = jax.tree.map(jnp.zeros_like, carry[:2])
        return lax.scan(stretch_back, zeros, (controls, steps, trace), reverse=True)[1]


STEP_AXES = {"x": 2, "y": 2, "rows": 2, "rate": 2, "c1": None, "c2": None}
"""Of the arrays [stretches, steps, G, ...] of the inner run; the two corrections are those of all tasks."""


def prepare(problem: Problem, mode: str) -> Callable[[], np.ndarray]:
    """The meta-gradient in ``mode`` reverse or adjoint, compiled."""
    run = Run(problem)
    arrays = _arrays(problem, run)
    axes = {name: axis for name, axis in STEP_AXES.items() if name in arrays["steps"]}

    def gradient(phi: Any, states: Any, steps: Tree, tasks: Tree) -> Any:
        in_axes = (2, axes, 0)
        if mode == "reverse":
            of_tasks = jax.vmap(run.objective, in_axes)
            return jax.grad(lambda phi: of_tasks(run.controls(phi, states), steps, tasks).mean())(phi)
        controls, pull = jax.vjp(lambda phi: run.controls(phi, states), phi)
        return pull(jax.vmap(run.adjoint, in_axes, 2)(controls, steps, tasks))[0] / problem.case.tasks

    with jax.enable_x64(problem.phi.dtype == torch.float64):
        placed = jax.tree.map(jnp.asarray, tuple(arrays[name] for name in ("phi", "states", "steps", "tasks")))
        compiled = jax.jit(gradient).lower(*placed).compile()
    return lambda: np.asarray(compiled(*placed), np.float64)


def _arrays(problem: Problem, run: Run) -> dict[str, Tree]:
    group, steps, workload = problem.group, problem.loop.steps, run.workload
    assert isinstance(group.model, LayeredModel)
    dtype = problem.phi.numpy().dtype
    minibatches = [problem.loop.minibatch(step) for step in range(steps)]
    number = np.arange(1, steps + 1)
    shares = np.array([cosine_rate(step, steps) for step in range(steps)])
    along = {
        "x": np.stack([inputs[0].numpy() for inputs, _ in minibatches]),
        "y": np.stack([labels.numpy() for _, labels in minibatches]).astype(np.int32),
        "rate": (shares[:, None] * group.learning_rate[:, 0].numpy()).astype(dtype),
        "c1": (1 - Adam.beta1**number).astype(dtype),
        "c2": (1 - Adam.beta2**number).astype(dtype),
    }
    if along["x"].dtype == np.int64:
        along["x"] = along["x"].astype(np.int32)
    tasks = {
        "theta0": [value.numpy() for value in group.model.parameters(group.theta0)],
        "outer_inputs": group.meta_validation.inputs[0].numpy(),
        "outer_labels": group.meta_validation.labels.numpy().astype(np.int32),
        "padding": np.where(group.class_mask.numpy(), 0.0, MASKED_LOGIT).astype(dtype),
        "log_prior_ratio": group.log_prior_ratio.numpy(),
        "k": group.num_classes.numpy(),
        "decay": group.weight_decay[:, 0].numpy(),
    }
    if run.keeps_averages:
        along["rows"] = group.batches.numpy().astype(np.int32)
        tasks["averaged"] = problem.loop.start().averaged.numpy()
    cut = {name: value.reshape(run.stretches, workload.outer.every, *value.shape[1:]) for name, value in along.items()}
    return {"phi": problem.phi.numpy(), "states": problem.normalised_states.numpy(), "steps": cut, "tasks": tasks}
