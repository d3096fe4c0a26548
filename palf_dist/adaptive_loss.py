"""The drop-in: a meta-learned policy as a loss module for anybody's PyTorch loop.

It sees what the policy saw in meta-training, at the same moments of a run: the training state is read from the current
batch as often per run, and each example's averaged prediction is gathered and scattered by its row index. Where several
ranks train one model, each sees what one rank would see that had the rows of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from palf_dist.class_priors import checked_class_counts, log_prior_ratio
from palf_dist.cross_entropy_arguments import CrossEntropyArguments, LabelledRows, PerClass, full_precision
from palf_dist.data_parallel import joined, last_of_each, of_first_rank, ranks, whole
from palf_dist.errors import ConfigError
from palf_dist.explanation import Explanation, explain
from palf_dist.graph_curvature import graph_hessian_trace
from palf_dist.loss_head import Softmax
from palf_dist.losses import Columns, LossContext
from palf_dist.own_losses import own_names
from palf_dist.policies.base import check_controls
from palf_dist.policies.meta_learned import LearnedPolicy
from palf_dist.policies.named import AnyPolicy, loaded, policy_in_use
from palf_dist.policies.static import restored_controls
from palf_dist.prediction_averages import LateBuffers, PredictionAverages
from palf_dist.row_mixture import row_mixture
from palf_dist.shown_rows import LabelledTensor, ShownRows
from palf_dist.snapshots import Snapshots
from palf_dist.training_state import NOISE_FEATURES, SNAPSHOTS, Observation, RowStatistics, StateReader, TaskFacts
from palf_dist.types import AVERAGED_BASIS, CONTROL_INDEX, CONTROLS
from palf_dist.untraced import untraced
from palf_dist.user_warnings import warn_user


class LossSettings(TypedDict, total=False):
    """What ``AdaptiveLoss`` may be told besides the policy and the length of the run."""

    class_counts: PerClass | None
    target_prior: str | PerClass
    weight: PerClass | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    validation: Callable[[], LabelledTensor] | None
    training_rows: LabelledTensor | None


class AdaptiveLoss(CrossEntropyArguments, LateBuffers):
    """A loss whose mixture weights and hyper-parameters follow the training state, as a policy says.

    ``loss = criterion(logits, y, index=rows); loss.backward(); criterion.step(model, optimizer); optimizer.step()``

    Call ``step`` once per optimiser step, between ``backward`` and ``zero_grad``. In eval mode and under
    ``torch.no_grad()`` it is torch's cross-entropy with the same arguments and changes nothing. Everything that ever
    changes is in its ``state_dict``. It follows the logits to their device.

    Where torch.distributed is initialised, every rank of the default process group must call it in step with the
    others, as under DistributedDataParallel; controls and ``state_dict`` are then the same on all of them.
    """

    phi: Tensor
    controls: Tensor  # [U] in force, and after them the weights of a user's own losses
    statistics: Tensor  # [1, 4] of the StateReader
    gradient_norm2: Tensor  # [1] NaN where unknown
    history: Tensor  # [1, n, S] the states (or the snapshots, [1, n, 1 + K]) of all refreshes, where they are read
    label_counts: Tensor  # [C] int64: labels seen so far, where class_counts is not given

    def __init__(
        self,
        policy: AnyPolicy,
        *,
        total_steps: int,
        class_counts: PerClass | None = None,
        target_prior: str | PerClass = "train",
        weight: PerClass | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        validation: Callable[[], LabelledTensor] | None = None,
        training_rows: LabelledTensor | None = None,
    ) -> None:
        """
        Args:
            policy: "cross_entropy", "uniform", "s5", "curriculum", "hedge" or "online_learnloss"; what ``load`` reads;
                a loaded one; or an object with what ``palf_dist.policies.Policy`` says.
            total_steps: optimiser steps of the whole training run.
            class_counts: [C] how many training labels each class has (counts, not frequencies). Needed for a
                target_prior other than "train"; otherwise estimated from the labels that pass.
            target_prior: class frequencies where the model will be used: "train" (as in training), "uniform", or [C].
            weight: [C] class weights.
            ignore_index: the label of what has none; such rows are as if they were not in the batch.
            reduction: "none", "mean" or "sum".
            label_smoothing: in [0, 1]; the policy reads the labels themselves.
            validation: for policies that read validation rows ("online_learnloss" does): gives the model's logits
                [V, C] of them, in eval mode, and their labels [V], as noisy as those of training. Called at every
                refresh, without gradient.
            training_rows: for policies that read neighbours: all training inputs [N, ...] and labels [N]; read once.

        ``weight`` to ``label_smoothing`` mean what they mean to ``torch.nn.CrossEntropyLoss``: a basis loss l(z, y)
        takes the place of -log p_y everywhere.

        Raises:
            ConfigError: an argument is out of range, or they do not fit together; or the policy needs a model.
            PolicyFileError: the policy's file is missing, too new, or was changed.
            RegistryError: the registry does not give it.
        """
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(
                f"total_steps: {total_steps!r} is not a positive whole number; give the optimiser steps of the run"
            )
        self.total_steps = total_steps
        self.class_counts = None if class_counts is None else checked_class_counts(class_counts)
        self.log_prior_ratio = log_prior_ratio(self.class_counts, target_prior)
        use = policy_in_use(policy, total_steps)
        self.policy = use.policy
        self._names = (*CONTROLS, *own_names(self.policy.active_basis))
        if label_smoothing and "info_nce" in self.policy.active_basis:
            raise ConfigError(
                "label_smoothing: the policy's mixture holds info_nce, which compares whole labels; use 0"
            )
        self._digest = use.digest
        self._step, self._refreshed_at = 0, -1
        self.refresh_every = use.refresh_every
        self._weight_decay_multiplier = 1.0
        self._context: LossContext | None = None
        self._taken: tuple[Tensor, int, Columns] | None = None  # controls, their version and their columns
        basis, features = {*self.policy.active_basis}, {*self.policy.features}
        self._reads_averages = bool({"robust_ce", *AVERAGED_BASIS} & basis or {*NOISE_FEATURES[1:]} & features)
        self._reads_predictions = bool({*AVERAGED_BASIS} & basis)
        self._counts_labels = self.class_counts is None and "imbalance" in features
        self._said: set[str] = set()
        rows = 0 if self.class_counts is None else int(self.class_counts.sum())
        self.averages = PredictionAverages(use.ema, rows)
        self.register_buffer("phi", torch.tensor(use.phi), persistent=False)
        self.register_buffer("controls", torch.zeros(len(self._names)))
        self.register_buffer("statistics", torch.zeros(1, 4))
        self.register_buffer("gradient_norm2", torch.full((1,), torch.nan))
        # whole numbers: a float32 stops at 2^24, which the labels of images and texts soon reach
        self.register_buffer("label_counts", torch.zeros(0, dtype=torch.int64))
        self.snapshots = Snapshots(self.policy, validation) if SNAPSHOTS in self.policy.features else None
        self._reads_history = self.policy.reads_history or self.snapshots is not None
        seen = len(self.policy.features) if self.snapshots is None else 1 + len(self.policy.active_basis)
        self.register_buffer("history", torch.zeros(1, 0, seen), persistent=self._reads_history)
        self._shown = ShownRows(self.policy.features, validation, training_rows)
        for missing in self._shown.missing:
            self._say(missing)

    @classmethod
    def load(cls, path: str | Path, *, total_steps: int, **settings: Unpack[LossSettings]) -> AdaptiveLoss:
        """Read a policy: its file or folder, a registered one (models:/palf@champion), or "default", which comes with
        palf_dist; the other arguments are the constructor's.

        Raises:
            PolicyFileError: a file is missing, too new, or was changed.
            RegistryError: the registry does not give it.
            ConfigError: as the constructor.
        """
        return cls(loaded(path), total_steps=total_steps, **settings)

    def explain(self) -> Explanation:
        """What a learned policy does in which state: its controls along each feature. ConfigError for others."""
        return explain(self.policy, self.phi)

    @property
    def alpha(self) -> dict[str, float]:
        """The mixture weights in force, by basis loss; 0 before the first batch."""
        weights = dict(zip(self._names, self.controls.tolist(), strict=True))
        return {name: weights[name] for name in self.policy.active_basis}

    @property
    def weight_decay_multiplier(self) -> float:
        """The policy's factor on the L2 strength; 1 before the first batch and for policies that do not set it."""
        return self._weight_decay_multiplier

    @untraced  # tracing it inside of a compiled training step would only break the graph in more places
    def forward(self, logits: Tensor, y: Tensor, features: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """The adaptive loss of a batch (in eval mode and under no_grad: the cross-entropy), in float32 at least.

        Args:
            logits: [n, C] floating point, or [C], or dense ones [n, C, d1, ...].
            y: [n] (or [], or [n, d1, ...]) whole labels; or class probabilities of the logits' shape, of which the
                loss is the mean over labels, and the policy reads the likeliest class as the label.
            features: [n, D] penultimate features; needed where the policy's mixture holds info_nce.
            index: of the labels' shape: which training rows these are, for posterior weights, elr and bootstrap.
                Without it they are left out.

        Returns:
            [], or with reduction "none" the labels' shape. Without a label that counts, "mean" is NaN, as torch's.

        Raises:
            ConfigError: shapes do not fit, the batch is empty, a label is out of range (not looked for on a GPU),
                features are missing, or the policy cannot take probabilities.
        """
        # evaluation; a loop that gives the model alone its eval mode does that under no_grad
        if not (self.training and torch.is_grad_enabled()):
            return self._plain(logits, y)
        active = self.policy.active_basis
        rows = self._rows(logits, y, features if "info_nce" in active else None, index)
        if "info_nce" in active and features is None:
            raise ConfigError("features: the policy's mixture holds info_nce; pass the penultimate features [n, D]")
        if "info_nce" in active and rows.targets is not None:
            raise ConfigError(
                "y: the policy's mixture holds info_nce, which compares whole labels, no probabilities or smoothed ones"
            )
        z = rows.z
        if self.class_counts is not None and len(self.class_counts) != z.shape[1]:
            raise ConfigError(f"class_counts: {len(self.class_counts)} classes given, but logits have {z.shape[1]}")
        if self.phi.device != z.device:
            self.to(z.device)
        with full_precision(z.device.type):
            context, controls, softmax = self._observe(rows)
            mean = self.reduction == "mean" and rows.divisor is None and rows.targets is None
            values = row_mixture(rows, controls, context, active, plain=softmax, mean=mean)
            return values if mean else self._reduced(values, rows)

    @untraced
    def step(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Advance to the next optimiser step; call between ``backward`` and ``zero_grad``, once for all optimizers.

        In these, each group's weight_decay becomes its initial value times the policy's multiplier (the initial value
        is kept in the group, so the optimizer's own state_dict restores it).

        Raises:
            ConfigError: the policy reads the gradient norm and no parameter has a gradient.
        """
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            initial = group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
            group["weight_decay"] = initial * self._weight_decay_multiplier
        if not optimizers and self._weight_decay_multiplier != 1:
            self._say("no optimizer: the policy's weight decay is left out; pass it as step(model, optimizer)")
        self._step += 1
        if self._step % self.refresh_every == 0 and "gradient_norm" in self.policy.features:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not gradients:
                raise ConfigError("step: no parameter has a gradient; call it after backward() and before zero_grad()")
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            self.gradient_norm2 = (norm**2)[None].to(self.gradient_norm2)

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

    def _task(self, z: Tensor) -> LossContext:
        """The constant facts of the losses, made once per type, place and classes of the logits."""
        context = self._context
        if context is None or context.uniform.shape[2] != z.shape[1] or not _alike(context.uniform, z):
            self._taken = None  # what was worked out of the controls and of the facts before
            mask = torch.ones(1, z.shape[1], dtype=torch.bool, device=z.device)
            ratio = torch.zeros(z.shape[1]) if self.log_prior_ratio is None else self.log_prior_ratio
            self._context = context = LossContext.create(mask, ratio.to(z)[None])
        return context

    @torch.no_grad()
    def _observe(self, rows: LabelledRows) -> tuple[LossContext, Columns, Softmax | None]:
        """Take in the rows of all ranks, and refresh the controls where due. The context of the losses, with averages
        as they were before this batch; the columns of the controls of this batch; the softmax, where it was made."""
        z, y, context, softmax, joint_index = rows.z, rows.labels, self._task(rows.z), None, None
        if self.snapshots is not None:
            self.snapshots.add(z, y, context)
        due = self._step // self.refresh_every > self._refreshed_at // self.refresh_every
        # not averaged, nor gathered from the ranks, for nobody to read
        index = rows.index if self._reads_averages or "log_rows" in self.policy.features else None
        if index is None:
            if self._reads_averages:
                self._say(
                    "no index: posterior weights, noise features, and what elr and bootstrap read are left out; pass "
                    "index=row numbers of the batch"
                )
            if not (due or self._counts_labels):
                return context, self._columns(z), None
            (joint_labels,) = joined(y)
        else:
            own_index, softmax = index.to(z.device, torch.int64), Softmax(z[None], y[None])
            joint_labels, joint_index, p = joined(y, own_index, softmax.p[0])
            # of one rank, from where the caller has it: reading a GPU's values would wait for it
            self.averages.reserve(joint_index if ranks() > 1 else index, z.shape[1])
        if not len(joint_labels):
            return context, self._columns(z), softmax
        if self._counts_labels:
            if not len(self.label_counts):
                self.label_counts = self.label_counts.new_zeros(z.shape[1])
            self.label_counts.scatter_add_(0, joint_labels, torch.ones_like(joint_labels))
        if due:
            self._refresh(z, y, joint_index)
        controls = self._columns(z)
        if joint_index is not None:
            before, seen = self.averages.recall(joint_index)
            joint = own = context.recalling(before, seen, joint_labels, self._reads_predictions)
            if ranks() > 1:
                own = context.recalling(*self.averages.recall(own_index), y, self._reads_predictions)
                controls = controls.among_all(own, joint)
                last = last_of_each(joint_index)  # ranks can have the same row
                joint_labels, before, p = joint_labels[last], before[last], p[last]
            self.averages.update(joint_index, joint_labels, before, p)
            context = own
        return context, controls, softmax

    def _columns(self, z: Tensor) -> Columns:
        """The columns of the controls in force, of the logits' type: taken once for each refresh and ``_task``."""
        taken, now = self._taken, self.controls
        if taken is None or taken[0] is not now or taken[1] != now._version:
            self._taken = taken = now, now._version, Columns.of(now[None].to(z.dtype), self._names)
        return taken[2]

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
        frequencies, agreement = (counts / counts.sum())[None], self._shown.agreement(z)
        return TaskFacts(context.class_mask, frequencies, rows[None], context.log_prior_ratio, agreement)

    def _refresh(self, z: Tensor, y: Tensor, index: Tensor | None) -> None:
        """Read the training state and ask the policy."""
        state = of_first_rank(self._state(z, y, index) if self.snapshots is None else self.snapshots.taken(z))
        if self._reads_history:
            self.history = torch.cat([self.history, state[:, None].to(self.history)], 1)
            state = self.history.to(z)
        controls = self.policy.controls(self.phi.to(z), state)
        if not isinstance(self.policy, LearnedPolicy):  # a user's own may say anything
            check_controls(self.policy, controls, tasks=1)
        self.controls = controls[0].to(self.controls)
        self._weight_decay_multiplier = float(self.controls[CONTROL_INDEX["wd"]])
        self._refreshed_at = self._step

    def _state(self, z: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        """The features [1, S] that the policy reads."""
        reader = StateReader(self.policy.features, self._facts(z, index))
        if self._refreshed_at >= 0:
            reader.statistics = self.statistics.to(z)
        of_own = RowStatistics.of(z[None].detach(), y[None], self._task(z).class_mask)
        observation = Observation(
            time=min(self._step / self.total_steps, 1.0),
            minibatch=RowStatistics(*(column[None] for column in joined(*(own[0] for own in of_own)))),
            gradient_norm2=self.gradient_norm2.to(z),
            hessian_trace=self._hessian_trace(z, y) if "hessian_trace" in self.policy.features else None,
        )
        if index is not None:
            observation = replace(
                observation,
                averaged=self.averages.averaged.to(z)[None],
                averaged_labels=self.averages.labels[None],
                averaged_mask=self.averages.seen[None],
            )
        state = reader.read(self._shown.added(observation, z))
        assert reader.statistics is not None
        self.statistics = reader.statistics.to(self.statistics)
        return state

    def _hessian_trace(self, z: Tensor, y: Tensor) -> Tensor:
        """The trace [1] on the first rows of the first rank where it is known; NaN where that is nowhere."""
        trace = None
        try:
            trace = graph_hessian_trace(z, y)
        except RuntimeError as error:
            self._say(f"no Hessian trace ({error}); the policy takes its usual value")
        (traces,) = joined(z.new_full((1,), torch.nan) if trace is None else trace)
        known = traces[~traces.isnan()]
        return known[:1] if len(known) else traces[:1]

    def _say(self, message: str) -> None:
        """Warn, once."""
        if message not in self._said:
            self._said.add(message)
            warn_user(f"AdaptiveLoss: {message}")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether they are of one type, and in one place."""
    return a.dtype == b.dtype and a.device == b.device
