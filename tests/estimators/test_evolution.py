"""The estimators that only evaluate: unbiasedness by statistical tests against exact gradients.

Each test projects many independent estimates on the true gradient's direction and asks by a two-sided t test at level
1e-4 (its false-alarm rate; the keys are fixed, so a pass is a pass for ever) whether their mean is the true value.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig
from palf_dist.estimators import make_estimator
from palf_dist.inner_loop import InnerLoop
from tests.estimators.test_exact import stopped_policy
from tests.groups import make_group

LEVEL = 1e-4
SIGMA = 0.01
WINDOW = 2


@pytest.fixture(scope="module")
def problem() -> tuple[InnerLoop, torch.Tensor]:
    """Nothing is stopped here: the clock is the only feature and no loss reads averaged predictions. SGD with a high
    learning rate, so that early controls matter late and truncation hurts."""
    policy, phi = stopped_policy(("ce", "focal", "label_smoothing", "symmetric_ce"), ("gamma", "eps", "wd"))
    group = make_group("mlp", "sgd", size=16, steps=6, learning_rate=1.0)
    return InnerLoop(group, policy, InnerConfig()), phi


OUTER = OuterLossConfig(every=WINDOW)
ALONG_THE_RUN = OuterLossConfig(every=WINDOW, entropy=0.3, total_variation=0.2, stability=0.5)


def windowed(kind: str, loop: InnerLoop, phi: torch.Tensor, key: int, outer: OuterLossConfig = OUTER) -> np.ndarray:
    """Sum of a truncated estimator's gradients over the windows of one inner run, at constant phi."""
    estimator = make_estimator(EstimatorConfig(kind=kind, pairs=1, sigma=SIGMA), outer)
    state, carried, total = loop.start(), None, 0.0
    for stop in range(WINDOW, loop.steps + 1, WINDOW):
        estimate = estimator.estimate(loop, phi, state, stop, (key,), carried)
        carried = estimate.carried or None
        total = total + estimate.gradient
    return np.asarray(total)


def rejects(samples: np.ndarray, truth: float) -> bool:
    return bool(stats.ttest_1samp(samples, truth).pvalue < LEVEL)


def test_es_is_unbiased_for_the_whole_run(problem: tuple[InnerLoop, torch.Tensor]) -> None:
    loop, phi = problem
    exact = make_estimator(EstimatorConfig(), OUTER).estimate(loop, phi, loop.start(), loop.steps, (0,)).gradient
    es = make_estimator(EstimatorConfig(kind="es", pairs=2, sigma=SIGMA), OUTER)
    direction = exact / np.linalg.norm(exact)
    samples = np.array(
        [es.estimate(loop, phi, loop.start(), loop.steps, (key,)).gradient @ direction for key in range(120)]
    )
    truth = float(exact @ direction)
    assert not rejects(samples, truth)
    assert rejects(samples, 0.0), "the test has power: it would notice a missing gradient"


def test_pes_corrects_the_truncation_bias_that_truncated_unroll_shows(
    problem: tuple[InnerLoop, torch.Tensor],
) -> None:
    loop, phi = problem
    windows = loop.steps // WINDOW
    whole = make_estimator(EstimatorConfig(), OUTER).estimate(loop, phi, loop.start(), loop.steps, (0,)).gradient
    exact = windows * whole  # sum over windows of each window's outer loss
    truncated = windowed("unroll", loop, phi, 0)
    bias = truncated - exact
    assert np.linalg.norm(bias) > 0.2 * np.linalg.norm(exact), "the case shows truncation bias"
    direction = bias / np.linalg.norm(bias)
    pes = np.array([windowed("pes", loop, phi, key) @ direction for key in range(200)])
    assert not rejects(pes, float(exact @ direction))
    assert rejects(pes, float(truncated @ direction)), "the test tells the truncated gradient from the true one"
    es = np.array([windowed("es", loop, phi, key) @ direction for key in range(200)])
    assert rejects(es, float(exact @ direction)), "plain ES on windows has the bias"


@pytest.mark.parametrize("shield", [None, 0.95])
def test_the_terms_along_the_run_and_the_shield_are_followed_by_es_and_pes(shield: float | None) -> None:
    """Over the whole run and over its windows, whose mean is the run's. Under the shield against finite differences, as
    the exact estimators do not follow how far it mixes."""
    policy, phi = stopped_policy(("ce", "label_smoothing"), ("eps", "wd"))
    policy.shield = shield
    loop = InnerLoop(make_group("mlp", "sgd", size=16, steps=6, learning_rate=1.0), policy, InnerConfig())
    adjoint = make_estimator(EstimatorConfig(), ALONG_THE_RUN)
    exact = adjoint.estimate(loop, phi, loop.start(), loop.steps, (0,))
    assert shield is None or 0.1 < exact.metrics["shield_share"] < 1
    direction = exact.gradient / np.linalg.norm(exact.gradient)
    step = 1e-5 * torch.from_numpy(direction)
    up, down = (
        adjoint.estimate(loop, at, loop.start(), loop.steps, (0,)).outer_loss for at in (phi + step, phi - step)
    )
    truth = (up - down) / 2e-5
    assert shield is not None or truth == pytest.approx(float(exact.gradient @ direction), rel=1e-5)
    if shield is None:  # what a gradient without the terms would be, or one with the mixing held constant
        exact = make_estimator(EstimatorConfig(), OUTER).estimate(loop, phi, loop.start(), loop.steps, (0,))
    es = make_estimator(EstimatorConfig(kind="es", pairs=1, sigma=SIGMA), ALONG_THE_RUN)
    windows = loop.steps // WINDOW
    whole = [es.estimate(loop, phi, loop.start(), loop.steps, (key,)).gradient @ direction for key in range(60)]
    parts = [windowed("pes", loop, phi, key, ALONG_THE_RUN) @ direction / windows for key in range(100, 160)]
    assert not rejects(np.array(whole), truth) and not rejects(np.array(parts), truth)
    assert rejects(np.array(whole + parts), float(exact.gradient @ direction)), "the test tells them apart"


def test_perturbations_depend_on_the_keys_alone(problem: tuple[InnerLoop, torch.Tensor]) -> None:
    loop, phi = problem
    first, again, other = (windowed("pes", loop, phi, key) for key in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
