"""Hedge's mean regret against the best static loss over T rounds and K losses, beside log K / sqrt(T), the rate of
PALF's Theorem 2, and sqrt(log K / T), Hedge's own: tables, a fit of both exponents and a picture.
``python -m benchmarks.hedge_regret --write-docs``"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy.optimize import curve_fit
from torch import Tensor

from benchmarks.screen import shown
from palf_dist.evaluation.plots import BLACK, BLUE, FIGURE_STYLE, GREEN, TITLE, VERMILION
from palf_dist.policies.hedge import hedge_rate, hedge_weights
from palf_dist.randomness import random_generator

ROUNDS = (100, 316, 1_000, 3_162, 10_000)
EXPERTS = (2, 4, 16, 64, 256, 1_024)
SEEDS = 5  # of each random sequence
GAP = 0.1  # of the means of stochastic losses
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results_hedge.md"
PICTURE = ROOT / "docs" / "images" / "hedge_regret.png"
LEARNERS = ("known horizon", "anytime")


def worst(rounds: int, experts: int, seed: int) -> np.ndarray:
    """Made against Hedge (after Gravin, Peres and Sivan 2017): the losses are 1 in turn for the one half of the experts
    and for the other, then for all but one, until that one has the weight."""
    last = min(rounds, math.ceil(2 * (math.log(experts) + 3) / float(hedge_rate(experts, rounds))))
    losses = np.zeros((rounds, experts))
    losses[::2, ::2] = losses[1::2, 1::2] = 1
    losses[rounds - last :] = 1
    losses[rounds - last :, 0] = 0
    return losses


def coins(rounds: int, experts: int, seed: int) -> np.ndarray:
    """Fair coins, for which no algorithm at all has less regret in expectation."""
    return _random("coins", rounds, experts, seed).integers(0, 2, (rounds, experts)).astype(float)


def stochastic(rounds: int, experts: int, seed: int) -> np.ndarray:
    """Coins of which one is better than the others."""
    means = np.full(experts, 0.5)
    means[0] -= GAP
    return (_random("stochastic", rounds, experts, seed).random((rounds, experts)) < means).astype(float)


def _random(name: str, *keys: int) -> np.random.Generator:
    return random_generator("hedge regret", name, *keys)


SEQUENCES: dict[str, tuple[Callable[[int, int, int], np.ndarray], str]] = {
    "worst case": (worst, VERMILION),
    "fair coins": (coins, BLUE),
    "stochastic": (stochastic, GREEN),
}


@dataclass(frozen=True)
class Fit:
    """regret = c * T ** of_rounds * (log K) ** of_log_experts, with 95 % intervals' half widths."""

    of_rounds: float
    of_log_experts: float
    rounds_error: float
    log_experts_error: float


Regrets = dict[tuple[str, str], np.ndarray]
"""Mean regret [T, K] by sequence and learner."""


def regret(losses: Tensor, learner: str) -> float:
    """Mean over rounds of what Hedge pays beyond the best column of losses [T, K]."""
    rounds, experts = losses.shape
    known = torch.arange(1, rounds + 1, dtype=losses.dtype)[:, None] if learner == "anytime" else rounds
    weights = hedge_weights(losses.cumsum(0) - losses, hedge_rate(experts, known))
    return float((weights * losses).sum() - losses.sum(0).min()) / rounds


def measure() -> Regrets:
    found = {(name, learner): np.zeros((len(ROUNDS), len(EXPERTS))) for name in SEQUENCES for learner in LEARNERS}
    for name, (make, _) in SEQUENCES.items():
        for place in np.ndindex(len(ROUNDS), len(EXPERTS)):
            for seed in range(1 if make is worst else SEEDS):
                losses = torch.from_numpy(make(ROUNDS[place[0]], EXPERTS[place[1]], seed))
                for learner in LEARNERS:
                    found[name, learner][place] += regret(losses, learner) / (1 if make is worst else SEEDS)
    return found


def rates() -> tuple[np.ndarray, np.ndarray]:
    """log K / sqrt(T) and sqrt(log K / T), [T, K] each."""
    rounds, log_experts = np.array(ROUNDS, float)[:, None], np.log(EXPERTS)[None]
    return log_experts / np.sqrt(rounds), np.sqrt(log_experts / rounds)


def fit(measured: np.ndarray) -> Fit:
    """Least squares in logarithms over all T and K."""
    logs = np.log(np.array(ROUNDS, float)), np.log(np.log(EXPERTS))
    grid = np.stack([part.ravel() for part in np.meshgrid(*logs, indexing="ij")])
    values, covariance = curve_fit(lambda x, c, p, q: c + p * x[0] + q * x[1], grid, np.log(measured.ravel()))
    errors = 1.96 * np.sqrt(np.diag(covariance))
    return Fit(values[1], values[2], errors[1], errors[2])


def fits(found: Regrets) -> tuple[list[str], list[list[str]]]:
    header = ["losses", "eta", "exponent of T", "exponent of log K", "most, of sqrt(log K / 2T)"]
    rows = []
    for (name, learner), measured in found.items():
        its = fit(measured)
        most = (measured / rates()[1]).max() * math.sqrt(2)
        exponents = (
            f"{its.of_rounds:+.2f} ± {its.rounds_error:.2f}",
            f"{its.of_log_experts:+.2f} ± {its.log_experts_error:.2f}",
        )
        rows.append([name, learner, *exponents, f"{most:.2f}"])
    return header, rows


def by_experts(found: Regrets) -> tuple[list[str], list[list[str]]]:
    """At the longest T: sqrt(T) * regret, and its ratio to both rates."""
    measured = found["worst case", LEARNERS[0]][-1]
    theorem, proven = (measured / rate[-1] for rate in rates())
    header = ["K", "sqrt(T) * regret", "regret / (log K / sqrt(T))", "regret / sqrt(log K / T)"]
    columns = (measured * math.sqrt(ROUNDS[-1]), theorem, proven)
    rows = [[str(k), *(f"{value:.3f}" for value in values)] for k, *values in zip(EXPERTS, *columns, strict=True)]
    return header, rows


def verdict(found: Regrets) -> str:
    """What the figures say of the two rates, for the sequence that decides: the one made against Hedge."""
    measured = found["worst case", LEARNERS[0]]
    its, shares = fit(measured), [measured / rate for rate in rates()]
    spread = [share.max() / share.min() for share in shares]
    holds = "sqrt(log K / T)" if spread[1] < spread[0] else "log K / sqrt(T)"
    return (
        f"**In the worst case {holds} is the rate that holds.** There, eta for the known horizon, the regret goes as "
        f"T^{its.of_rounds:.2f} (log K)^{its.of_log_experts:.2f}; divided by sqrt(log K / T) it stays within a factor "
        f"of {spread[1]:.2f} over all T and K, divided by log K / sqrt(T) within one of {spread[0]:.2f}. Both rates "
        "fall with T alike: only K tells them apart. From three losses on log K / sqrt(T) is the larger of the two, so "
        "that Theorem 2 is true of Hedge as an upper bound, and not tight."
    )


@matplotlib.rc_context(FIGURE_STYLE)
def picture(found: Regrets) -> Figure:
    """Regret over T at the middle K, and sqrt(T) * regret over log K at the longest T; eta for the known horizon."""
    figure = Figure(figsize=(10, 4.4))
    left, right = figure.subplots(1, 2)
    middle, log_experts = len(EXPERTS) // 2, np.log(EXPERTS)
    for name, (_, colour) in SEQUENCES.items():
        measured = found[name, LEARNERS[0]]
        left.plot(ROUNDS, measured[:, middle], "o-", color=colour, label=name)
        right.plot(log_experts, measured[-1] * math.sqrt(ROUNDS[-1]), "o-", color=colour)
    theorem, proven = rates()
    for rate, style, label in ((theorem, "--", "log K / sqrt(T)"), (proven, ":", "sqrt(log K / T)")):
        left.plot(ROUNDS, rate[:, middle], style, color=BLACK, label=label)
        right.plot(log_experts, rate[-1] * math.sqrt(ROUNDS[-1]), style, color=BLACK)
    left.set(xscale="log", yscale="log", xlabel="rounds T", ylabel="mean regret", title=f"K = {EXPERTS[middle]}")
    right.set(xscale="log", yscale="log", xlabel="log K", ylabel="sqrt(T) * mean regret", title=f"T = {ROUNDS[-1]:,}")
    figure.suptitle("Hedge against the best static loss", **TITLE)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def page(found: Regrets) -> str:
    return f"""# Hedge and Theorem 2, as measured

Written by `python -m benchmarks.hedge_regret --write-docs`. PALF's Theorem 2 puts the gap of an adaptive loss to the
best static one at O(log K / sqrt(T)) for K losses over T rounds; Hedge's proven bound is sqrt(log K / (2 T)), losses
being in [0, 1]. Measured: Hedge's mean regret, with the weights that `HedgePolicy` uses, T from {ROUNDS[0]:,} to
{ROUNDS[-1]:,}, K from {EXPERTS[0]} to {EXPERTS[-1]:,}.

{textwrap.fill(verdict(found), 120)}

{_markdown(*fits(found))}

Least squares in logarithms over all T and K, with 95 % intervals. The worst case is made against Hedge with the horizon
known (after Gravin, Peres and Sivan 2017). Fair coins are losses on which no algorithm can do better; the expected
maximum of K sums reaches sqrt(2 log K) only slowly, hence the larger exponent. Stochastic losses are coins of which one
is better by {GAP}; means of {SEEDS} seeds. The anytime eta, which begins large, soon finds it.

The worst case at T = {ROUNDS[-1]:,}:

{_markdown(*by_experts(found))}

![Mean regret over T and K](images/{PICTURE.name})
"""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hedge_regret", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="also write docs/results_hedge.md and its picture")
    options = parser.parse_args(arguments)
    found, console = measure(), Console()
    for cells in (fits(found), by_experts(found)):
        console.print(shown(cells))
    console.print(verdict(found))
    if options.write_docs:
        PAGE.write_text(page(found))
        picture(found).savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
