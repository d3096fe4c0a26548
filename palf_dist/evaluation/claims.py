"""What the PALF paper claims, and what was measured of it. Its own figures were simulated: claims to test.

Verdicts follow the one rule of ``verdicts.judge``. The claims about every single dataset, about distinct phases, about
features and about the frequency of updates have rules of their own, by intervals as well, and that about time goes by a
benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from palf_dist.config import RunConfig
from palf_dist.evaluation.ablation_figures import AblationRecord, losses_left_out, update_frequency
from palf_dist.evaluation.change_points import PAPER_PHASES, Phases
from palf_dist.evaluation.conditions import imbalanced
from palf_dist.evaluation.derived import BEST_STATIC
from palf_dist.evaluation.headline import PAPER_STATICS, Figure, best_adaptive, reached_words
from palf_dist.evaluation.inference import Estimate, clustered_mean
from palf_dist.evaluation.inner_runs import dataset_facts
from palf_dist.evaluation.interpretation import ALL, Interpretation
from palf_dist.evaluation.interpretation_tables import in_words, ranking
from palf_dist.evaluation.measures import MEASURES
from palf_dist.evaluation.methods import LEARNED, PAPER_BASIS, POLICY, REFERENCE, is_baseline
from palf_dist.evaluation.statistics import Comparison, compare_each
from palf_dist.evaluation.table import interval, label_of, signed
from palf_dist.evaluation.verdicts import FEWEST_CLUSTERS, Finding, Verdict, all_of, judge, judged, scaled, too_little
from palf_dist.policies import policy_spec

PAPER_BASELINES = (
    *(name for name in PAPER_BASIS if name != "info_nce"),
    *("uniform", "curriculum", LEARNED["maml"].name),
)
"""The baselines of the paper that are methods here. InfoNCE alone trains no output layer."""

OF_STATICS = (BEST_STATIC, *PAPER_STATICS)
"""What a claim about the best static loss takes: the choice, and the paper's losses in it."""

PHASE_WEIGHTS = (("focal", "info_nce"), ("ce", "label_smoothing"), ("label_smoothing", "symmetric_ce"))
"""The basis losses that are said to gain weight in each phase."""

PAPER_INFORMATIVE = ("gradient_norm", "entropy")
"""The state features that are said to be the most informative."""


@dataclass(frozen=True)
class Evidence:
    """All that verdicts are taken from."""

    config: RunConfig
    figures: Mapping[str, Figure]  # of ``headline``
    family_figures: Mapping[str, Figure]  # the same of the runs that hold out a family; empty without such runs
    rows: Sequence[Mapping[str, Any]]
    compared: Sequence[Comparison]
    pairs: Sequence[Comparison]
    trajectories: pa.Table | None  # of the last outer steps of meta-training
    interpretation: Interpretation | None = None  # of these
    ablations: Sequence[AblationRecord] = ()


@dataclass(frozen=True)
class Claim:
    text: str  # as the paper has it, with its section
    find: Callable[[Evidence], Finding]


def findings(evidence: Evidence) -> list[dict[str, str]]:
    """One entry per claim: claim, measured, verdict."""
    entries = []
    for claim in CLAIMS:
        finding = claim.find(evidence)
        entries.append({"claim": claim.text, "measured": finding.measured, "verdict": finding.verdict})
    return entries


def _gain(figure: Figure, claimed: float = 0.0, needed: Sequence[str] | None = None) -> Finding:
    """``needed``: what the claim takes of the figure's ``missing`` methods; None: all."""
    if figure.estimate is None:
        return Finding(f"nothing: {figure.meaning}", "not measured")
    lacking = [name for name in figure.missing if needed is None or name in needed]
    others = [label_of(name) for name in figure.missing if name not in lacking]
    missing = f" (missing: {', '.join(others)})" if others else ""
    finding = judged(figure.estimate, f"points against {label_of(figure.of or REFERENCE)}{missing}", claimed)
    if lacking:
        return Finding(f"{finding.measured}; a verdict takes {', '.join(map(label_of, lacking))}", "not measured")
    return finding


def _headline(name: str, claimed: float = 0.0, needed: Sequence[str] | None = None) -> Callable[[Evidence], Finding]:
    return lambda evidence: _gain(evidence.figures[name], claimed, needed)


def _nothing(reason: str) -> Callable[[Evidence], Finding]:
    return lambda evidence: Finding(f"nothing: {reason}", "not measured")


def _errors_avoided(evidence: Evidence) -> Finding:
    """The gain in accuracy as a share of the reference's errors, whose mean is taken as known."""
    policy = next(item.overall for item in evidence.compared if item.method == POLICY)
    estimate = policy.difference
    errors = 100 - (policy.value - estimate.mean)  # on the tasks where both have a result
    if not errors > 1e-9:
        return Finding(f"nothing: {label_of(REFERENCE)} makes no errors to avoid", "not measured")
    return judged(scaled(estimate, 100 / errors), f"% of the errors of {label_of(REFERENCE)} avoided", 15.0)


def _every_dataset(evidence: Evidence) -> Finding:
    """By the 95 % interval of each dataset over its own tasks. Reproduced: above zero against every other method on
    every dataset; opposite: on every dataset below zero against some other method."""
    baselines = [item for item in evidence.pairs if is_baseline(item.reference)]
    if missing := [name for name in PAPER_BASELINES if name not in {item.reference for item in baselines}]:
        return Finding(f"nothing: takes {', '.join(map(label_of, missing))}", "not measured")
    clusters = min(item.overall.difference.clusters for item in baselines)
    if clusters < FEWEST_CLUSTERS:
        return Finding(
            f"nothing: {clusters} independent datasets, and a verdict takes {FEWEST_CLUSTERS}", "not measured"
        )
    by_dataset = [[item.by_dataset[name].difference for item in baselines] for name in baselines[0].by_dataset]
    if any(math.isnan(estimate.se) for estimates in by_dataset for estimate in estimates):
        return Finding("nothing: a dataset with fewer than two tasks has no interval", "not measured")
    won = sum(all(estimate.low > 0 for estimate in estimates) for estimates in by_dataset)
    lost = sum(any(estimate.high < 0 for estimate in estimates) for estimates in by_dataset)
    verdict: Verdict = (
        "reproduced" if won == len(by_dataset) else "opposite" if lost == len(by_dataset) else "not reproduced"
    )
    return Finding(
        f"by the 95 % intervals over each dataset's own tasks ahead of all {len(baselines)} other methods on {won} of "
        f"{len(by_dataset)} datasets, behind one or more on {lost}",
        verdict,
    )


def _fewer_steps(evidence: Evidence) -> Finding:
    policy = next(item for item in evidence.compared if item.method == POLICY)
    steps = policy.others.get("steps_to_95")
    if steps is None or not steps.overall.value - steps.overall.difference.mean > 0:
        return Finding("nothing: the rows of these runs have no learning curves", "not measured")
    reference = steps.overall.value - steps.overall.difference.mean
    unit = f"% fewer steps to 95 % of the best accuracy of {label_of(REFERENCE)}"
    finding = judged(scaled(steps.overall.difference, -100 / reference), unit, 40.0)
    return replace(finding, measured=f"{finding.measured}; {reached_words(policy, 'reached_95')}")


def _additional_time(evidence: Evidence) -> Finding:
    """Reproduced: the upper end of the interval is no more than is claimed, for any model that was timed. There is no
    opposite."""
    figure = evidence.figures["overhead_percent"]
    if figure.value is None or figure.upper is None:
        return Finding(f"nothing: {figure.meaning}", "not measured")
    return Finding(
        f"{figure.value:.1f} {figure.meaning}; at most {figure.upper:.1f} of any",
        "reproduced" if figure.upper <= 3.2 else "not reproduced",
    )


def _imbalance(evidence: Evidence) -> Finding:
    """Balanced accuracy on the tasks with imbalanced training rows, with test rows as imbalanced and with balanced
    ones: two things, and the claim is of both."""
    names = imbalanced(evidence.config.evaluation)
    found = []
    for words, prior in (("as imbalanced", "train"), ("balanced", "uniform")):
        rows = [
            row
            for row in evidence.rows
            if row["method"] in (POLICY, REFERENCE) and row["condition"] in names and row["target_prior"] == prior
        ]
        if not rows:
            found.append(Finding(f"test rows {words}: nothing, there is no such task", "not measured"))
            continue
        estimate = compare_each(rows, POLICY, MEASURES["balanced_accuracy"])[0].overall.difference
        unit = f"points of balanced accuracy against {label_of(REFERENCE)}"
        finding = judged(estimate, unit)
        found.append(replace(finding, measured=f"test rows {words}: {finding.measured}"))
    measured = "imbalanced training rows; " + "; ".join(finding.measured for finding in found)
    return Finding(measured, all_of([finding.verdict for finding in found]))


def _other_families(evidence: Evidence) -> Finding:
    if not evidence.family_figures:
        return Finding("nothing: no run that holds out a family", "not measured")
    return _gain(evidence.family_figures["diff_vs_tuned_ce"])


def phase_gains(trajectories: pa.Table, steps: int, clusters: Mapping[str, str]) -> list[Estimate]:
    """For each of ``PAPER_PHASES``, in percent, the weight of its ``PHASE_WEIGHTS`` there above that before it; of the
    first phase, above that after it. Means over tasks, clustered by ``clusters`` of their datasets; ``steps``: of an
    inner run. None at all where the policy was not asked in every phase. The column ``run`` tells several runs
    apart."""
    alpha = sorted({f"alpha_{name}" for names in PHASE_WEIGHTS for name in names})
    keys = ["run", "outer_step", "group", "task", "dataset"]
    frame = trajectories.select([*keys, "inner_step", *alpha]).to_pandas().dropna()
    frame["phase"] = np.searchsorted([stop * steps for _, stop in PAPER_PHASES[:-1]], frame["inner_step"], side="right")
    if set(frame["phase"]) != set(range(len(PAPER_PHASES))):
        return []
    means = frame.groupby([*keys, "phase"])[alpha].mean().unstack("phase").dropna()
    gains = []
    for phase, names in enumerate(PHASE_WEIGHTS):
        weight = sum(means[f"alpha_{name}"] for name in names)
        gain = weight[phase] - weight[phase - 1 if phase else 1]
        of_tasks = [clusters[name] for name in means.index.get_level_values("dataset")]
        gains.append(clustered_mean(100 * gain.to_numpy(), of_tasks))
    return gains


def _phases(evidence: Evidence) -> Finding:
    basis = policy_spec(evidence.config.policy).basis
    missing = sorted({name for names in PHASE_WEIGHTS for name in names} - set(basis))
    if missing:
        return Finding(f"nothing: this policy mixes {', '.join(basis)}, without {', '.join(missing)}", "not measured")
    if evidence.trajectories is None:
        return Finding("nothing: these runs have no trajectories", "not measured")
    names = evidence.trajectories["dataset"].unique().to_pylist()
    facts = dataset_facts(names, evidence.config.data.train, evidence.rows)
    clusters = {name: fact.cluster for name, fact in facts.items()}
    gains = phase_gains(evidence.trajectories, evidence.config.inner.steps, clusters)
    if not gains:
        return Finding("nothing: the policy was not asked in every phase", "not measured")
    words = ", ".join(
        f"{' + '.join(label_of(name) for name in names)} {signed(gain)} in {start:.0%} to {stop:.0%}"
        for (start, stop), names, gain in zip(PAPER_PHASES, PHASE_WEIGHTS, gains, strict=True)
    )
    return Finding(f"percent of weight gained: {words}", all_of([judge(gain) for gain in gains]))


def _three_phases(evidence: Evidence) -> Finding:
    """Of all controls that the policy moves, whatever losses it mixes. Reproduced: three constants explain more of the
    mean controls over time than a line with one bend does, and on datasets left out than two constants do, and the
    paper's boundaries lie within the intervals of the two change points, which are no wider than a refresh to each
    side. Opposite: they explain less than the line, so that the change is gradual."""
    item = evidence.interpretation
    if item is None:
        return Finding("nothing: these runs have no trajectories", "not measured")
    if ALL not in item.phases:
        return Finding(f"nothing: {item.not_measured['phases']}", "not measured")
    phases = item.phases[ALL]
    if phases.clusters < FEWEST_CLUSTERS:
        few = f"{phases.clusters} independent datasets, and a verdict takes {FEWEST_CLUSTERS}"
        return Finding(f"{in_words(phases)}; {few}", "not measured")
    return Finding(in_words(phases), _phase_verdict(phases))


def _phase_verdict(phases: Phases) -> Verdict:
    if phases.ahead[1] < 0:
        return "opposite"
    real = phases.ahead[0] > 0 and phases.third[0] > 0
    return "reproduced" if real and all(phases.agree) else "not reproduced"


def _informative(evidence: Evidence) -> Finding:
    """By permutation importance. Reproduced: the lesser of the two moves the controls more than any other feature;
    opposite: the greater of the two less than each other feature."""
    item = evidence.interpretation
    if item is None or item.importance is None:
        reason = item.not_measured["importance"] if item else "these runs have no trajectories"
        return Finding(f"nothing: {reason}", "not measured")
    importance = item.importance
    first = ", ".join(importance.features[index].replace("_", " ") for index in ranking(importance)[:3])
    words = f"the controls are moved most by {first}"
    if missing := [name for name in PAPER_INFORMATIVE if name not in importance.features]:
        return Finding(f"{words}; this policy does not read {', '.join(missing)}", "not measured")
    named = [index for index, name in enumerate(importance.features) if name in PAPER_INFORMATIVE]
    others = np.delete(importance.by_run, named, axis=1)
    if not others.shape[1]:
        return Finding(f"{words}; this policy reads nothing else", "not measured")
    total = importance.by_run.mean(0)
    weaker, stronger = sorted(named, key=lambda index: total[index])
    rivals = np.delete(total, named)
    ahead, behind = (
        clustered_mean(importance.by_run[:, own] - others[:, rival], item.runs.clusters.tolist())
        for own, rival in ((weaker, rivals.argmax()), (stronger, rivals.argmin()))
    )
    if reason := too_little(ahead):
        return Finding(f"{words}; {reason}", "not measured")
    verdict: Verdict = "reproduced" if ahead.low > 0 else "opposite" if behind.high < 0 else "not reproduced"
    name = importance.features[weaker].replace("_", " ")
    return Finding(
        f"{words}; {name} against the strongest other feature {signed(ahead)} standard deviations, 95 % interval "
        f"{interval(ahead)}",
        verdict,
    )


CLAIMS = (
    Claim(
        "15-35 % better performance (abstract; read as test errors avoided, which its table 1 fits)", _errors_avoided
    ),
    Claim(
        "+2.3 points over the best static loss (5.2; its own table 1 gives +2.6)",
        _headline("diff_vs_best_static", 2.3, OF_STATICS),
    ),
    Claim(
        "+1.7 points over the best adaptive baseline (5.2; its own table 1 gives +2.2)",
        lambda evidence: _gain(best_adaptive(evidence.pairs), 1.7),
    ),
    Claim("better than every baseline on every dataset (5.2, table 1)", _every_dataset),
    Claim(
        "95 % of the final performance in 40-60 % fewer epochs (abstract, 5.2; read as of tuned CE's best)",
        _fewer_steps,
    ),
    Claim("3.2 % of additional training time (5.2)", _additional_time),
    Claim("more robust: label noise (abstract; read as a gain at .3 or more)", _headline("diff_at_high_noise")),
    Claim("more robust: class imbalance (abstract, 6; read as a gain in balanced accuracy)", _imbalance),
    Claim("adaptation generalises across tasks (1), here to datasets never seen", _headline("diff_vs_tuned_ce")),
    Claim(
        "adaptation generalises across tasks (1), here over CE tuned on the noisy validation split of each task",
        _headline("diff_vs_ce_by_validation"),
    ),
    Claim("adaptation generalises across tasks (1), here to families never seen", _other_families),
    Claim("better than any fixed loss (corollary 1)", _headline("diff_vs_best_static", needed=OF_STATICS)),
    Claim(
        "the gap to the best static loss closes as log K / sqrt T (theorem 2)",
        _nothing("docs/results_hedge.md tells which rate holds, for the Hedge policy"),
    ),
    Claim("converges to a stationary point with probability 1 (theorem 1)", _nothing("no finite run can show it")),
    Claim("three distinct phases, with boundaries at 20 % and 80 % of the run (6)", _three_phases),
    Claim(
        "phases: focal and InfoNCE in 0-20 % of the run, cross-entropy and label smoothing in 20-80 %, label smoothing "
        "and symmetric cross-entropy in 80-100 % (6)",
        _phases,
    ),
    Claim(
        "pictures prefer focal early, texts label smoothing, tables symmetric cross-entropy (6)",
        _nothing("the weights by family are on this page, without a test of their order"),
    ),
    Claim(
        "residual networks adapt more aggressively, dense ones conservatively, transformers prefer "
        "information-theoretic losses (6)",
        _nothing("the weights by architecture are on this page, without a test of their order"),
    ),
    Claim(
        "without InfoNCE 1.3 points are lost, without focal 1.1 (5.3)",
        lambda evidence: losses_left_out(evidence.ablations),
    ),
    Claim(
        "gradient norm and prediction entropy are the most informative features (5.3, from runs without each; here: "
        "those that move the controls most)",
        _informative,
    ),
    Claim(
        "updating the policy every 100 iterations is best (5.3)",
        lambda evidence: update_frequency(evidence.ablations),
    ),
)
"""The claims of the paper that could be wrong, in the order of its sections."""
