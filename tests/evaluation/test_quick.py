"""What --quick cuts, and that it leaves the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from palf_dist.config_loading import load_config, parse_config
from palf_dist.evaluation.claims import PAPER_BASELINES
from palf_dist.evaluation.methods import LEARNED, REFERENCE, TUNED, select_methods, tuned_together
from palf_dist.evaluation.quick import CONDITIONS, METHODS, cut
from palf_dist.preparation import tune_units
from palf_dist.tasks.inputs import fits
from palf_dist.tasks.suites import load_suite, suite_overrides
from tests.tasks.cases import image_dataset, text_dataset, toy_dataset

PALF12 = Path(__file__).parents[2] / "configs" / "palf12.yaml"


@pytest.fixture(scope="module")
def palf12():
    return load_config(PALF12, suite_overrides(load_suite("palf12"), "0"))


def test_the_published_comparison_has_the_tuned_baselines(palf12):
    tuned = {f"{name}_tuned" for name, *_ in TUNED}
    assert tuned | {"elr", "bootstrap", "generalised_ce", "mae", *PAPER_BASELINES} - {LEARNED["maml"].name} <= set(
        palf12.evaluation.methods
    )
    assert tuned <= {method.name for method in tuned_together(palf12.evaluation.methods)}


def test_the_published_network_reads_every_family(palf12):
    """So that a run can hold out a whole family: what is judged has been tuned and trained on the others."""
    (network,) = palf12.tasks.architectures
    datasets = {dataset.family: dataset for dataset in (toy_dataset(), image_dataset(), text_dataset())}
    assert {*load_suite("palf12").families} == {*datasets}
    assert all(fits(network, dataset) for dataset in datasets.values())


def test_the_published_comparison_becomes_a_small_one(palf12):
    small = cut(palf12)
    assert small.evaluation.seeds == 1 and tune_units(small) == [] != tune_units(palf12)
    assert small.evaluation.suite_conditions == palf12.evaluation.suite_conditions[:CONDITIONS]
    assert {method.name for method in select_methods(small.evaluation.methods)} == set(METHODS)
    assert small.data == palf12.data and small.tasks == palf12.tasks and small.policy == palf12.policy
    assert small.inner.steps == palf12.inner.steps
    assert (small.inner.learning_rate, small.inner.weight_decay) == (0.006, 1.0)


def test_what_the_configuration_leaves_out_or_gives_stays_so():
    text = """
data: {train: [digits], held_out: [iris]}
tasks: {optimisers: [sgd, adam]}
inner: {weight_decay: 0.07}
evaluation: {methods: [s5], noise_rates: [0.3, 0.0, 0.1], conditions: [matched]}
"""
    small = cut(parse_config(text, "a"))
    assert (small.inner.learning_rate, small.inner.weight_decay) == (0.3, 0.07)
    assert {method.name for method in select_methods(small.evaluation.methods)} == {"s5", REFERENCE}
    assert small.evaluation.noise_rates == (0.0, 0.3) and small.evaluation.conditions == ("matched",)
