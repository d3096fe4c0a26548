from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palf_dist import training_state
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import task_facts
from palf_dist.training_state import (
    FEATURES,
    SMOOTHING,
    Observation,
    RowStatistics,
    StateReader,
    bimodality,
    hessian_trace,
    hutchinson_probes,
    likely_noise_rate,
    neighbour_agreement,
    normalise,
)
from tests.groups import make_group

LOGITS = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def observe(logits: torch.Tensor = LOGITS, **changes: object) -> tuple[StateReader, Observation]:
    torch.manual_seed(1)
    group = make_group()
    facts = task_facts(group, needs_neighbours=True)
    values: dict[str, object] = {
        "time": 0.25,
        "minibatch": RowStatistics.of(logits, group.train.labels[:, :6], group.class_mask),
        "averaged": torch.softmax(torch.randn(3, 14, 4, dtype=torch.float64), -1),
        "averaged_labels": group.train.labels,
        "averaged_mask": torch.ones(3, 14, dtype=torch.bool),
        "gradient_norm2": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
        "hessian_trace": torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64),
        "validation_logits": torch.randn(3, 5, 4, dtype=torch.float64),
        "validation_labels": group.validation.labels,
        "validation_mask": group.validation.mask,
    }
    return StateReader(FEATURES, facts), Observation(**(values | changes))  # type: ignore[arg-type]


def test_a_reader_of_nothing_reads_nothing() -> None:
    reader, seen = observe()
    assert StateReader((), reader.facts).read(seen).shape == (3, 0)


def test_batch_features_are_their_formulas() -> None:
    reader, seen = observe()
    labels = make_group().train.labels[:, :6]
    state = dict(zip(FEATURES, reader.read(seen).unbind(1), strict=True))
    for task, k in ((0, 3), (1, 4)):
        p = torch.softmax(LOGITS[task, :, :k], -1)
        ce = -p[torch.arange(6), labels[task]].log()
        want = {
            "time": 0.25,
            "entropy": float(-(p * p.log()).sum(1).mean() / math.log(k)),
            "loss": math.log1p(float(ce.mean()) / math.log(k)),
            "loss_variance": math.log1p(float(ce.var(unbiased=False))),
            "accuracy": float((p.argmax(1) == labels[task]).double().mean()),
            "log_classes": math.log(k),
            "log_rows": math.log(14),
        }
        for name, value in want.items():
            assert state[name][task].item() == pytest.approx(value), name
    assert state["gradient_norm"].tolist() == pytest.approx([math.log(0.5), 0, math.log(2)], abs=1e-9)
    assert state["hessian_trace"].tolist() == pytest.approx([-math.log(4), 0, math.log(4)])
    assert state["prior_shift"][0] == 0 < state["prior_shift"][1]
    assert state["accuracy_gap"].tolist() == pytest.approx((state["accuracy"] - state["validation_accuracy"]).tolist())


def test_batch_statistics_are_smoothed() -> None:
    reader, seen = observe()
    first = reader.read(seen)
    _, other = observe(3 * LOGITS)
    fresh, _ = observe()
    second, alone = reader.read(other), fresh.read(other)
    index = FEATURES.index("entropy")
    torch.testing.assert_close(second[:, index], SMOOTHING * first[:, index] + (1 - SMOOTHING) * alone[:, index])


def test_unknown_parts_are_nan_and_normalise_to_the_mean() -> None:
    reader, seen = observe(gradient_norm2=None, hessian_trace=None, averaged=None, validation_logits=None)
    state = reader.read(seen)
    missing = {FEATURES[index] for index in state.isnan().all(0).nonzero()[:, 0].tolist()}
    assert missing == {name for name in FEATURES if "validation" in name or name.endswith("_gap")} | {
        "gradient_norm",
        "hessian_trace",
        "noise_rate",
        "disagreement",
        "bimodality",
    }
    flat = normalise(state, torch.ones(len(FEATURES)).double(), torch.full((len(FEATURES),), 0.01).double())
    assert flat.isfinite().all() and flat.abs().max() == 4
    assert (flat[:, FEATURES.index("bimodality")] == 0).all()


@given(rate=st.sampled_from([0.0, 0.2, 0.4, 0.6]), k=st.integers(2, 10))
def test_noise_rate_is_recovered(rate: float, k: int) -> None:
    draw = np.random.default_rng(int(100 * rate) + k)
    resampled = draw.random(3000) < rate
    wrong = resampled & (draw.integers(0, k, 3000) != 0)
    own = torch.from_numpy(np.where(wrong, 0.001, 0.99))[None]
    estimate = likely_noise_rate(own, torch.ones(1, 3000, dtype=torch.bool), torch.tensor([float(k)]).double())
    assert estimate.item() == pytest.approx(rate, abs=0.06)


def test_bimodality_is_the_best_split_by_brute_force() -> None:
    torch.manual_seed(3)
    losses = torch.rand(2, 9, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    for task, n in ((0, 9), (1, 6)):
        ordered = losses[task, :n].sort()[0]
        best = max((i / n) * (1 - i / n) * (ordered[:i].mean() - ordered[i:].mean()) ** 2 for i in range(1, n))
        want = best / (ordered.var(unbiased=False) + 1e-4)
        torch.testing.assert_close(bimodality(losses, mask)[task], want)
    two_lumps = torch.cat([torch.zeros(1, 20), torch.full((1, 20), 5.0)], 1)
    assert bimodality(two_lumps, torch.ones(1, 40, dtype=torch.bool)).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("at_once", [4, 256])
def test_neighbour_agreement_against_a_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "_NEIGHBOUR_ROWS", at_once)
    group = make_group()
    got = neighbour_agreement(group.train)
    assert got is not None
    x, y = group.train.inputs[0], group.train.labels
    for task in range(3):
        real = int(group.train.mask[task].sum())
        unit = x[task, :real] / (x[task, :real].square().sum(1, keepdim=True) + 1e-6).sqrt()
        shares = []
        for row in range(real):
            order = sorted((j for j in range(real) if j != row), key=lambda j: -float(unit[row] @ unit[j]))[:5]
            shares.append(np.mean([float(y[task, j] == y[task, row]) for j in order]))
        assert got[task].item() == pytest.approx(float(np.mean(shares)))


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical"])
def test_hutchinson_against_the_exact_trace(name: str) -> None:
    """With probes sqrt(P) e_i the estimate is the trace itself; with sign probes its mean is."""
    group = make_group(name)
    inputs, labels = group.train.batch(group.batches[0])
    size = group.theta0.shape[1]

    def loss(theta: torch.Tensor, task: int) -> torch.Tensor:
        full = group.theta0.clone()
        full[task] = theta
        logits = group.model.apply(full, inputs)[0].masked_fill(~group.class_mask[:, None, :], -1e9)
        return torch.nn.functional.cross_entropy(logits[task], labels[task])

    exact = torch.stack(
        [
            torch.autograd.functional.hessian(lambda t, task=task: loss(t, task), group.theta0[task]).trace()
            for task in range(3)
        ]
    )
    unit_probes = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
    got = hessian_trace(group.model, group.theta0, inputs, labels, group.class_mask, unit_probes)
    torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


def test_banked_probes_are_signs_and_fixed() -> None:
    probes = hutchinson_probes(1000, torch.float32)
    assert set(probes.unique().tolist()) == {-1.0, 1.0} and abs(probes.mean()) < 0.1
    assert torch.equal(probes, hutchinson_probes(1000, torch.float32))


def test_a_class_ruled_out_by_its_logit_has_no_share_in_the_entropy() -> None:
    """As one that the mask rules out: -inf is how a user's model says that."""
    group = make_group()
    labels = torch.zeros(3, 6, dtype=torch.int64)
    without = LOGITS.index_fill(2, torch.tensor(3), -math.inf)
    masked = group.class_mask & (torch.arange(4) < 3)
    ours = RowStatistics.of(without, labels, torch.ones_like(group.class_mask))
    torch.testing.assert_close(ours, RowStatistics.of(LOGITS, labels, masked))
    assert ours.entropy.isfinite().all()


def test_unknown_feature_is_refused() -> None:
    reader, _ = observe()
    with pytest.raises(ConfigError, match=r"policy.features: unknown momentum; allowed: gradient_norm"):
        StateReader(("momentum",), reader.facts)
