"""What a user may give as the policy of a loss: a name, a file, a loaded artefact, or an object of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError, PolicyFileError
from palf_dist.own_losses import check_basis
from palf_dist.policies.base import Policy
from palf_dist.policies.hedge import HedgePolicy
from palf_dist.policies.meta_learned import LearnedPolicy, check_for_use
from palf_dist.policies.online_learnloss import OnlineLearnLoss
from palf_dist.policies.policy_file import DEFAULT, PolicyArtefact, load_policy, policy_bytes
from palf_dist.policies.schedule import CurriculumPolicy
from palf_dist.policies.static import fixed_mixture
from palf_dist.training_state import SNAPSHOTS, check_features
from palf_dist.types import PAPER_BASIS

NAMED: dict[str, Callable[[], Policy]] = {
    "cross_entropy": lambda: fixed_mixture({"ce": 1.0}),
    "uniform": lambda: fixed_mixture(dict.fromkeys(PAPER_BASIS, 1 / len(PAPER_BASIS))),
    "s5": lambda: fixed_mixture({"robust_ce": 1.0}),
    "curriculum": CurriculumPolicy,
    "hedge": HedgePolicy,
    "online_learnloss": OnlineLearnLoss,
}
"""The policies that need no file: those of the held-out comparison."""

AnyPolicy = str | Path | PolicyArtefact | Policy
"""A name of ``NAMED``, what ``load_policy`` reads, a loaded one, or any policy."""


@dataclass(frozen=True)
class PolicyInUse:
    """A policy for one run."""

    policy: Policy
    phi: np.ndarray
    refresh_every: int  # optimiser steps
    digest: str  # tells it from all others
    ema: float  # decay of the averaged predictions


def policy_in_use(given: AnyPolicy, total_steps: int) -> PolicyInUse:
    """The policy that is given, for a run of ``total_steps`` optimiser steps.

    One of a file or a name is asked as often per run as in meta-training or in the comparison, however long the run; an
    object every ``refresh`` steps, as it says.

    Raises:
        ConfigError: it is nothing of that, a policy object lacks something, or it needs the model's parameters.
        PolicyFileError: the file is missing, too new, or was changed.
        RegistryError: the registry does not give it.
    """
    usual = InnerConfig()
    if isinstance(given, str) and given in NAMED:
        policy = NAMED[given]()
        every = max(1, round(policy.refresh * total_steps / usual.steps))
        return PolicyInUse(policy, policy.initial(), every, _digest(policy), usual.ema)
    if isinstance(given, str | Path):
        given = loaded(given)
    if isinstance(given, LearnedPolicy):
        given = PolicyArtefact(given.spec, given.initial(), given.mean.numpy(), given.std.numpy())
    if isinstance(given, PolicyArtefact):
        check_for_use(given.spec)
        digest = hashlib.sha256(b"".join(policy_bytes(given))).hexdigest()
        ema = given.card.get("ema", usual.ema)
        return PolicyInUse(given.policy(), given.phi, given.refresh_in(total_steps), digest, ema)
    check_policy_object(given)
    if given.shield is not None:
        raise ConfigError(
            f"policy {type(given).__name__}: shield is {given.shield:g}, but a Lyapunov shield compares gradients with "
            "respect to a model's parameters; a loss sees the logits alone. Set it to None"
        )
    return PolicyInUse(given, given.initial(), given.refresh, _digest(given), usual.ema)


def check_policy_object(policy: Policy) -> None:
    """Refuse, with a ConfigError, what does not have what ``Policy`` says, or says what cannot be."""
    kind = policy if isinstance(policy, type) else type(policy)
    if isinstance(policy, type) and hasattr(policy, "controls"):
        raise ConfigError(f"policy: {kind.__name__} is a class; give an object of it, {kind.__name__}(...)")
    if not callable(getattr(policy, "controls", None)):
        raise ConfigError(
            f"policy: {policy!r} is no policy; give a name ({', '.join(NAMED)}), a policy file or its folder, what "
            "load_policy returned, or an object with what palf_dist.policies.Policy says"
        )
    fields = ("features", "refresh", "active_basis", "num_parameters", "shield", "reads_history", "initial")
    if missing := [name for name in fields if not hasattr(policy, name)]:
        raise ConfigError(
            f"policy {kind.__name__}: it has no {', '.join(missing)}; derive it from "
            "palf_dist.policies.WithoutParameters, and see palf_dist.policies.Policy for the rest"
        )
    if isinstance(policy.refresh, bool) or not isinstance(policy.refresh, int) or policy.refresh < 1:
        raise ConfigError(f"policy {kind.__name__}: refresh is {policy.refresh!r}; needs a positive number of steps")
    for name in ("features", "active_basis"):
        if not isinstance(getattr(policy, name), tuple):
            raise ConfigError(f"policy {kind.__name__}: {name} is {getattr(policy, name)!r}; needs a tuple of names")
    check_basis(policy.active_basis)
    if policy.features != (SNAPSHOTS,):
        check_features(policy.features)


def loaded(path: str | Path) -> PolicyArtefact:
    """``load_policy`` for a loss: a ConfigError for what is no file but looks like a policy's name, or is one."""
    try:
        return load_policy(path)
    except PolicyFileError as error:
        # a path says of itself that it is no name
        if isinstance(path, str) and path.replace("-", "_").isidentifier() and not Path(path).exists():
            if path in NAMED:
                raise ConfigError(
                    f"policy: {path!r} is read from no file; write AdaptiveLoss({path!r}, ...)"
                ) from error
            raise ConfigError(
                f"policy: {path!r} is no policy's name ({', '.join((*NAMED, DEFAULT))}), and there is no such file or "
                "folder"
            ) from error
        raise


def _digest(policy: Policy) -> str:
    """Of a policy that no file describes: of its class and of what it says of itself."""
    kind, settings = type(policy), getattr(policy, "settings", {})
    try:
        names = [kind.__module__, kind.__qualname__, policy.features, policy.active_basis]
        about = json.dumps([*names, settings], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"policy {kind.__name__}: settings are {settings!r}; needs plain data, as JSON holds it"
        ) from error
    return hashlib.sha256(about.encode() + policy.initial().tobytes()).hexdigest()
