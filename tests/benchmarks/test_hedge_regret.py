"""What the benchmark of Hedge's regret rests on: its sequences, and its fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import hedge_regret
from benchmarks.hedge_regret import LEARNERS, ROUNDS, SEQUENCES, fit, rates, regret, worst


@pytest.mark.parametrize("experts", [2, 16, 256])
def test_the_worst_case_comes_close_to_the_proven_bound(experts: int) -> None:
    bound = math.sqrt(math.log(experts) / 2 / 1000)
    got = regret(torch.from_numpy(worst(1000, experts, 0)), "known horizon")
    assert 0.9 * bound < got <= bound


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_regret_is_that_of_a_plain_loop(name: str, learner: str) -> None:
    losses = SEQUENCES[name][0](40, 3, 1)
    assert losses.shape == (40, 3) and set(np.unique(losses)) <= {0.0, 1.0}
    paid, cumulative = 0.0, np.zeros(3)
    for number, loss in enumerate(losses, 1):
        eta = math.sqrt(8 * math.log(3) / (number if learner == "anytime" else 40))
        weights = np.exp(-eta * cumulative)
        paid += weights @ loss / weights.sum()
        cumulative += loss
    assert regret(torch.from_numpy(losses), learner) == pytest.approx((paid - cumulative.min()) / 40)


def test_the_fit_finds_both_exponents_and_the_verdict_follows() -> None:
    theorem, proven = rates()
    for rate, exponent in ((theorem, 1.0), (proven, 0.5)):
        its = fit(0.3 * rate)
        assert (its.of_rounds, its.of_log_experts) == pytest.approx((-0.5, exponent), abs=1e-6)
        found = {("worst case", "known horizon"): 0.3 * rate}
        said = "log K / sqrt(T)" if exponent == 1 else "sqrt(log K / T)"
        assert hedge_regret.verdict(found).startswith(f"**In the worst case {said} is the rate that holds.**")
    assert ROUNDS[-1] / ROUNDS[0] >= 100, "two decades"
