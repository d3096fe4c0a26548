"""Policies and batches for the tests of the drop-in loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from palf_dist.config import PolicyConfig
from palf_dist.policies import make_policy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact
from palf_dist.randomness import random_generator


def artefact(**settings) -> PolicyArtefact:
    """A policy that does follow its state: random parameters instead of the zero output layer."""
    policy = untrained(refresh=3, **settings)
    phi = random_generator("adaptive loss test").normal(size=len(policy.phi)) * 0.2
    return replace(policy, phi=phi.astype("float32"))


def untrained(**settings) -> PolicyArtefact:
    """The policy before meta-training: its static starting point."""
    spec = policy_spec(PolicyConfig(**settings))
    mean, std = np.zeros(len(spec.features), np.float32), np.ones(len(spec.features), np.float32)
    return PolicyArtefact(spec, make_policy(spec, mean, std).initial(), mean, std)


def batch(seed: int, n: int = 8, classes: int = 4):
    draw = random_generator("batch", seed)
    logits = torch.from_numpy(draw.normal(size=(n, classes))).float().requires_grad_()
    return logits, torch.from_numpy(draw.integers(0, classes, n)), torch.from_numpy(draw.permutation(50)[:n])
