"""Code as a user writes it, with all of the public interface: tests/test_packaging.py has mypy --strict read it against
the installed wheel. It is never run."""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor, nn

from palf_dist import AdaptiveLoss, basis_loss
from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config, load_config
from palf_dist.errors import ConfigError, PalfError
from palf_dist.evaluation.report import make_report
from palf_dist.learnloss import TuneLossClassifier
from palf_dist.policies import CurriculumPolicy, HedgePolicy, Policy, WithoutParameters, fixed_mixture, mixture_controls
from palf_dist.search import TuneLossSearcher
from palf_dist.testing import check_basis_loss, check_policy


@basis_loss
def spherical(logits: Tensor, labels: Tensor) -> Tensor:
    p = torch.softmax(logits, 1)
    return torch.ones(len(p)) - p.gather(1, labels[:, None])[:, 0] / p.square().sum(1).sqrt()


class Distrust(WithoutParameters):
    features = ("disagreement",)
    active_basis = ("ce", "mae")
    refresh = 20

    def __init__(self, limit: float) -> None:
        self.settings = {"limit": limit}

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return mixture_controls(torch.cat([1 - state, state], 1), self.active_basis)


class Parametrised:
    """Without the package's base class."""

    features, active_basis = ("time",), ("ce", "focal")
    refresh, num_parameters, reads_history, shield = 10, 2, False, None

    def initial(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.zeros(2, np.float32)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return mixture_controls(torch.softmax(phi * state, 1), self.active_basis)


policies: list[Policy] = [
    Distrust(0.8),
    Parametrised(),
    fixed_mixture({"ce": 0.5, "spherical": 0.5}, gamma=1.0),
    HedgePolicy(("ce", "focal"), refresh=50),
    CurriculumPolicy(),
]
for policy in policies:
    check_policy(policy)
check_basis_loss(spherical)
assert_type(spherical(torch.zeros(2, 3), torch.zeros(2)), Tensor)  # as it was before it was registered


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]], validate: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    criterion = AdaptiveLoss.load(
        Path("runs/first/best"),
        total_steps=1000,
        class_counts=[10, 20],
        target_prior="uniform",
        weight=torch.ones(2),
        ignore_index=-1,
        reduction="sum",
        label_smoothing=0.1,
        validation=validate,
        training_rows=(batches[0][0], batches[0][1]),
    )
    assert_type(criterion, AdaptiveLoss)
    assert_type(AdaptiveLoss("hedge", total_steps=10).alpha, dict[str, float])
    optimizer = torch.optim.AdamW(model.parameters())
    for x, y, index in batches:
        loss = criterion(model(x), y, index=index)
        loss.backward()
        criterion.step(model, optimizer)
        optimizer.step()
    assert_type(criterion.weight_decay_multiplier, float)
    assert_type(criterion.explain().features, tuple[str, ...])
    criterion.load_state_dict(criterion.state_dict())


def configure() -> str:
    try:
        config = load_config("configs/quick.yaml", ["inner.steps=300"])
    except ConfigError as error:
        assert isinstance(error, PalfError)
        raise SystemExit(str(error)) from error
    assert_type(config, RunConfig)
    assert_type(config.inner.steps, int)
    return dump_config(config)


assert_type(make_report("runs/first").comparisons[0].method, str)
classifier = TuneLossClassifier().fit(np.zeros((4, 2)), np.array([0, 1, 0, 1]))
assert_type(classifier, TuneLossClassifier)
searcher = TuneLossSearcher({"l2": (1e-6, 1.0)}, metric="error", mode="min")
