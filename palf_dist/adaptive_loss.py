"""The drop-in: a meta-learned policy as a loss module for anybody's PyTorch loop.

It sees what the policy saw in meta-training, at the same moments of a run: the training state is read from the current
batch as often per run, and each example's averaged prediction is gathered and scattered by its row index.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError
from palf_dist.losses import LossContext
from palf_dist.mixture_loss import check_batch, mixture_loss
from palf_dist.online_loss import OnlineLoss
from palf_dist.policies.hedge import HedgePolicy
from palf_dist.policies.meta_learned import check_for_use
from palf_dist.policies.online_learnloss import PER_EXAMPLE, OnlineLearnLoss
from palf_dist.policies.policy_file import PolicyArtefact, load_policy, policy_bytes
from palf_dist.policies.static import restored_controls
from palf_dist.prediction_averages import LateBuffers, PredictionAverages
from palf_dist.training_state import (
    HUTCHINSON_ROWS,
    NEIGHBOUR_FEATURES,
    NOISE_FEATURES,
    VALIDATION_FEATURES,
    Observation,
    StateReader,
    TaskFacts,
    hutchinson_probes,
)
from palf_dist.types import AVERAGED_BASIS, CONTROL_INDEX, CONTROLS

PerClass = Sequence[float] | Tensor  # one number for each class


class AdaptiveLoss(LateBuffers):
    """A loss whose mixture weights and hyper-parameters follow the training state, as a learned policy says.

    ``loss = criterion(logits, y, index=rows); loss.backward(); criterion.step(model, optimizer); optimizer.step()``

    Call ``step`` once per optimiser step, between ``backward`` and ``zero_grad``. In eval mode the module is the plain
    mean cross-entropy. Everything that changes is in its ``state_dict``. It follows the logits to their device.

    In meta-training the Hessian trace is known from t = 0; here the parameters are known only after the first ``step``,
    so that a policy that reads the trace takes its frozen mean at the first refresh.
    """

    phi: Tensor
    controls: Tensor  # [U] in force
    statistics: Tensor  # [1, 4] of the StateReader
    gradient_norm2: Tensor  # [1] NaN where unknown
    history: Tensor  # [1, n, S] the states of all refreshes so far, where the policy reads them
    label_counts: Tensor  # [C] labels seen so far, where class_counts is not given

    def __init__(
        self,
        artefact: PolicyArtefact,
        *,
        total_steps: int,
        class_counts: PerClass | None = None,
        target_prior: str | PerClass = "train",
    ) -> None:
        """
        Args:
            artefact: a loaded policy; ``load`` reads one from a file.
            total_steps: optimiser steps of the whole training run.
            class_counts: [C] how many training labels each class has (counts, not frequencies). Needed for a
                target_prior other than "train"; otherwise estimated from the labels that pass.
            target_prior: class frequencies where the model will be used: "train" (as in training), "uniform", or [C].

        Raises:
            ConfigError: an argument is out of range, or they do not fit together; or the policy needs a model.
        """
        super().__init__()
        check_for_use(artefact.spec)
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(
                f"total_steps: {total_steps!r} is not a positive whole number; give the optimiser steps of the run"
            )
        self.total_steps = total_steps
        self.class_counts = None if class_counts is None else _class_counts(class_counts)
        self.log_prior_ratio = _log_prior_ratio(self.class_counts, target_prior)
        self.policy = artefact.policy()
        self._digest = hashlib.sha256(b"".join(policy_bytes(artefact))).hexdigest()
        self._step, self._refreshed_at = 0, -1
        self.refresh_every = artefact.refresh_in(total_steps)
        self._weight_decay_multiplier = 1.0
        self._context: LossContext | None = None
        self._model_parameters: list[Tensor] = []  # for the Hessian trace
        self._said: set[str] = set()
        rows = 0 if self.class_counts is None else int(self.class_counts.sum())
        self.averages = PredictionAverages(artefact.card.get("ema", InnerConfig().ema), rows)
        self.register_buffer("phi", torch.tensor(artefact.phi), persistent=False)
        self.register_buffer("controls", torch.zeros(len(CONTROLS)))
        self.register_buffer("statistics", torch.zeros(1, 4))
        self.register_buffer("gradient_norm2", torch.full((1,), torch.nan))
        self.register_buffer("label_counts", torch.zeros(0))
        history = torch.zeros(1, 0, len(self.policy.features))
        self.register_buffer("history", history, persistent=self.policy.reads_history)
        unseen = set(self.policy.features) & {*VALIDATION_FEATURES, *NEIGHBOUR_FEATURES}
        if unseen:
            self._say(
                f"the policy reads {', '.join(sorted(unseen))}, which a loss cannot see; held at their usual value"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        total_steps: int,
        class_counts: PerClass | None = None,
        target_prior: str | PerClass = "train",
    ) -> AdaptiveLoss:
        """Read a policy file (or the folder that holds it); the other arguments are the constructor's.

        Raises:
            PolicyFileError: the file is missing, too new, or was changed.
            ConfigError: as the constructor.
        """
        return cls(load_policy(path), total_steps=total_steps, class_counts=class_counts, target_prior=target_prior)

    @staticmethod
    def online(basis: Sequence[str] = PER_EXAMPLE, *, low: float = 0.01, high: float = 100.0) -> OnlineLoss:
        """A loss that learns its mixture weights during the very run that it trains, from the validation errors that
        its ``observe`` is told: no policy file is needed. Arguments are those of ``OnlineLearnLoss``."""
        return OnlineLoss(OnlineLearnLoss(basis, low=low, high=high))

    @staticmethod
    def hedge(basis: Sequence[str] = PER_EXAMPLE, *, horizon: int | None = None) -> OnlineLoss:
        """A loss whose mixture weights follow Hedge over the run's own training losses: its ``observe`` ends a round
        and is told nothing. Arguments are those of ``HedgePolicy``; ``horizon`` counts the calls of ``observe``."""
        return OnlineLoss(HedgePolicy(basis, horizon=horizon))

    @property
    def weight_decay_multiplier(self) -> float:
        """The policy's factor on the L2 strength; 1 before the first batch and for policies that do not set it."""
        return self._weight_decay_multiplier

    @torch.compiler.disable  # tracing it inside of a compiled training step would only break the graph in more places
    def forward(self, logits: Tensor, y: Tensor, features: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """The mean adaptive loss of a batch (in eval mode: the mean cross-entropy).

        Args:
            logits: [n, C] floating point.
            y: [n] int64 labels.
            features: [n, D] penultimate features; needed where the policy's mixture holds info_nce.
            index: [n] which training rows these are, for posterior weights, elr and bootstrap. Without it they are
                left out.

        Raises:
            ConfigError: shapes do not fit, the batch is empty, a label is out of range (not looked for on a GPU), or
                features are missing.
        """
        if not self.training:
            return functional.cross_entropy(logits, y)
        self._check(logits, y, features, index)
        if self.phi.device != logits.device:
            self.to(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
            h = features.flatten(1).to(z.dtype) if features is not None else None
            y = y.to(z.device, torch.int64)
            own = self._observe(z, y, index)
            context = self._task(z) if own is None else self._task(z).with_averages(*own)
            controls = self.controls.to(z.dtype)
            return mixture_loss(z, y, h, controls, context, self.policy.active_basis)[0].mean()

    @torch.compiler.disable
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advance to the next optimiser step; call between ``backward`` and ``zero_grad``.

        With an optimizer given, each group's weight_decay becomes its initial value times the policy's multiplier
        (the initial value is kept in the group, so the optimizer's own state_dict restores it).

        Raises:
            ConfigError: the policy reads the gradient norm and no parameter has a gradient.
        """
        if optimizer is not None:
            for group in optimizer.param_groups:
                initial = group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
                group["weight_decay"] = initial * self._weight_decay_multiplier
        elif "wd" in self.policy.spec.hyperparameters:
            self._say("no optimizer: the policy's weight decay is left out; pass it as step(model, optimizer)")
        self._step += 1
        if self._step % self.refresh_every == 0 and "gradient_norm" in self.policy.features:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not gradients:
                raise ConfigError("step: no parameter has a gradient; call it after backward() and before zero_grad()")
            norm = torch.nn.utils.get_total_norm(gradients)
            self.gradient_norm2 = (norm**2)[None].to(self.gradient_norm2)
        if "hessian_trace" in self.policy.features:
            self._model_parameters = [p for p in model.parameters() if p.requires_grad]

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "refreshed_at": self._refreshed_at,
            "weight_decay_multiplier": self._weight_decay_multiplier,
            "policy": self._digest,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["policy"] != self._digest:
            raise ConfigError("load_state_dict: the state was saved with another policy; load the policy file of then")
        self._step, self._refreshed_at = state["step"], state["refreshed_at"]
        self._weight_decay_multiplier = state["weight_decay_multiplier"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "controls")
        if saved is not None:
            state_dict[prefix + "controls"] = restored_controls(saved)  # in a copy: load_state_dict made one
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check(self, logits: Tensor, y: Tensor, features: Tensor | None, index: Tensor | None) -> None:
        check_batch(logits, y)
        if index is not None and (index.shape != y.shape or index.is_floating_point()):
            raise ConfigError(f"index: {list(index.shape)} {index.dtype} given; needs one whole row number per example")
        if self.class_counts is not None and len(self.class_counts) != logits.shape[1]:
            raise ConfigError(
                f"class_counts: {len(self.class_counts)} classes given, but logits have {logits.shape[1]}"
            )
        if features is None and "info_nce" in self.policy.active_basis:
            raise ConfigError("features: the policy's mixture holds info_nce; pass the penultimate features [n, D]")

    def _task(self, z: Tensor) -> LossContext:
        """The constant facts of the losses, made once per type and place of the logits."""
        context = self._context
        if context is None or context.num_classes.dtype != z.dtype or context.num_classes.device != z.device:
            mask = torch.ones(1, z.shape[1], dtype=torch.bool, device=z.device)
            ratio = torch.zeros(z.shape[1]) if self.log_prior_ratio is None else self.log_prior_ratio
            self._context = context = LossContext.create(mask, ratio.to(z)[None])
        return context

    @torch.no_grad()
    def _observe(self, z: Tensor, y: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Refresh the controls where due and take in the batch. With an index: the averaged own-label probabilities
        [1, n] and seen flags [1, n] as they were before this batch, and where a basis loss reads them the whole
        averages [1, n, C]."""
        if index is not None:
            self.averages.reserve(index, z.shape[1])  # before the move: reading a GPU's values would wait for it
            index = index.to(z.device, torch.int64)
        elif self._remembers:
            self._say(
                "no index: posterior weights, noise features, and what elr and bootstrap read are left out; pass "
                "index=row numbers of the batch"
            )
        if self.class_counts is None:
            if not len(self.label_counts):
                self.label_counts = self.label_counts.new_zeros(z.shape[1])
            self.label_counts.scatter_add_(0, y, torch.ones_like(y, dtype=self.label_counts.dtype))
        if self._step % self.refresh_every == 0 and self._refreshed_at != self._step:
            self._refresh(z, y, index)
        if index is None:
            return None
        own, seen = self.averages.recall(index, y)
        averaged = None
        if {*AVERAGED_BASIS} & {*self.policy.active_basis}:
            averaged = self.averages.averaged[index].to(z.dtype)[None]
        self.averages.update(index, y, torch.softmax(z, 1))
        return own.to(z.dtype)[None], seen[None], averaged

    @property
    def _remembers(self) -> bool:
        """Whether the policy reads averaged predictions."""
        basis, features = {"robust_ce", *AVERAGED_BASIS}, {*NOISE_FEATURES[1:]}
        return bool(basis & {*self.policy.active_basis} or features & {*self.policy.features})

    def _facts(self, z: Tensor, index: Tensor | None) -> TaskFacts:
        """What the constant features are made of. Without class_counts: from the labels seen so far; the training set
        is then taken to end at the largest row index seen."""
        context = self._task(z)
        if self.class_counts is not None:
            counts, rows = self.class_counts.to(z), self.class_counts.sum().to(z)
        else:
            counts, rows = self.label_counts.to(z), z.new_tensor(torch.nan)
            if index is not None:
                rows = (torch.cat([self.averages.seen.nonzero()[:, 0], index]).max() + 1).to(z)
        return TaskFacts(context.class_mask, (counts / counts.sum())[None], rows[None], context.log_prior_ratio)

    def _refresh(self, z: Tensor, y: Tensor, index: Tensor | None) -> None:
        """Read the training state and ask the policy."""
        reader = StateReader(self.policy.features, self._facts(z, index))
        if self._refreshed_at >= 0:
            reader.statistics = self.statistics.to(z)
        observation = Observation(
            time=min(self._step / self.total_steps, 1.0),
            logits=z[None].detach(),
            labels=y[None],
            gradient_norm2=self.gradient_norm2.to(z),
            hessian_trace=self._hessian_trace(z, y),
        )
        if index is not None:
            observation = replace(
                observation,
                averaged=self.averages.averaged.to(z)[None],
                averaged_labels=self.averages.labels[None],
                averaged_mask=self.averages.seen[None],
            )
        state = reader.read(observation)
        assert reader.statistics is not None
        self.statistics = reader.statistics.to(self.statistics)
        if self.policy.reads_history:
            self.history = torch.cat([self.history, state[:, None].to(self.history)], 1)
            state = self.history.to(z)
        self.controls = self.policy.controls(self.phi.to(z), state)[0].to(self.controls)
        self._weight_decay_multiplier = float(self.controls[CONTROL_INDEX["wd"]])
        self._refreshed_at = self._step

    @torch.enable_grad()
    def _hessian_trace(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Hutchinson's trace [1] of the cross-entropy of a few rows, by double backward through the user's model."""
        parameters = self._model_parameters
        if not parameters or not z.requires_grad:
            return None
        few = functional.cross_entropy(z[:HUTCHINSON_ROWS], y[:HUTCHINSON_ROWS])
        sizes = [p.numel() for p in parameters]
        probes = hutchinson_probes(sum(sizes), z.dtype).to(z.device)
        total = z.new_zeros(1)
        try:
            gradients = torch.autograd.grad(
                few, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for probe in probes:
                v = [part.view_as(p).to(p.dtype) for part, p in zip(probe.split(sizes), parameters, strict=True)]
                product = sum((g * part).sum() for g, part in zip(gradients, v, strict=True))
                hv = torch.autograd.grad(
                    product, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                total += sum((a * b).sum() for a, b in zip(hv, v, strict=True)).detach()
        except RuntimeError as error:  # a compiled model or a fused kernel without second derivatives
            self._say(f"no Hessian trace ({error}); the policy takes its usual value")
            return None
        return total / len(probes)

    def _say(self, message: str) -> None:
        """Warn, once."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"AdaptiveLoss: {message}", stacklevel=2)


def _class_counts(values: PerClass) -> Tensor:
    counts = torch.as_tensor(values, dtype=torch.float64).cpu()
    whole = counts.isfinite().all() and (counts >= 0).all() and (counts == counts.round()).all()
    if counts.dim() != 1 or len(counts) < 2 or not whole or counts.sum() < len(counts):
        raise ConfigError(
            f"class_counts: {values} given; needs how many training labels each class has, as whole numbers with a sum "
            "of at least the number of classes (not frequencies)"
        )
    return counts


def _log_prior_ratio(class_counts: Tensor | None, target_prior: str | PerClass) -> Tensor | None:
    """log(pi_train / pi_target) [C] with the training frequencies smoothed by one example per class; None: no shift."""
    if isinstance(target_prior, str):
        if target_prior not in ("train", "uniform"):
            raise ConfigError(
                f"target_prior: {target_prior!r} is unknown; give 'train', 'uniform' or class frequencies"
            )
        if target_prior == "train":
            return None
    if class_counts is None:
        raise ConfigError(
            "class_counts: needed to adjust to a target_prior other than 'train'; count the training labels"
        )
    classes = len(class_counts)
    target = torch.full_like(class_counts, 1 / classes)
    if not isinstance(target_prior, str):
        target = torch.as_tensor(target_prior, dtype=torch.float64).cpu()
        if target.shape != class_counts.shape or not target.isfinite().all() or (target <= 0).any():
            raise ConfigError(
                f"target_prior: {target_prior} given; needs one frequency > 0 for each of {classes} classes"
            )
    train = (class_counts + 1) / (class_counts.sum() + classes)
    return (train * target.sum() / target).log()
