from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from palf_dist.config import OuterLossConfig
from palf_dist.outer_loss import (
    accuracy,
    checkpoints,
    complexity,
    last_layer_variance,
    mixture_entropy,
    outer_loss,
    outer_terms,
    soft_information,
    validation_loss,
)
from palf_dist.types import CONTROLS, FIRST_BASIS, NUM_BASIS

ALL_TERMS = OuterLossConfig(kind="cross_entropy", information=0.7, beta=0.4, gamma=0.3)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.float64)
    mask[1, 4:] = 0
    class_mask = torch.tensor([[True] * 4, [True, True, True, False]])
    return logits, labels, mask, class_mask


def by_hand(kind: str, logits: torch.Tensor, label: torch.Tensor, sharpness: float) -> torch.Tensor:
    """One task, no padding."""
    rows = torch.arange(len(label))
    own = logits[rows, label]
    if kind == "soft_error":
        others = logits.clone()
        others[rows, label] = -float("inf")
        margin = own - others.max(1)[0]
        return torch.sigmoid(-sharpness * margin / (margin.square().mean() + 1e-6).sqrt()).mean()
    p = torch.softmax(logits, 1)[rows, label]
    return (1 - p).mean() if kind == "one_minus_p" else -p.log().mean()


@pytest.mark.parametrize("kind", ["soft_error", "one_minus_p", "cross_entropy"])
def test_formula_on_real_rows_and_classes_only(kind: str, case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, mask, class_mask = case
    config = OuterLossConfig(kind=kind, sharpness=3.0)
    got = validation_loss(config, logits, labels, mask, class_mask)
    want = torch.stack([by_hand(kind, logits[0], labels[0], 3.0), by_hand(kind, logits[1, :4, :3], labels[1, :4], 3.0)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_soft_error_is_blind_to_confidence(case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, mask, class_mask = case
    config = OuterLossConfig()
    torch.testing.assert_close(
        validation_loss(config, logits, labels, mask, class_mask),
        validation_loss(config, 50 * logits, labels, mask, class_mask),
        rtol=1e-5,
        atol=1e-5,
    )


def test_constant_logits_have_finite_gradients() -> None:
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    labels, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    value = validation_loss(OuterLossConfig(), logits, labels, mask, torch.ones(1, 2, dtype=torch.bool))
    value.sum().backward()
    assert value.item() == pytest.approx(0.5) and logits.grad is not None and logits.grad.isfinite().all()


def random_task(rows: int, classes: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, C], features [n, D] and labels [n] of one task without padding."""
    draw = np.random.default_rng(seed)
    numbers = (torch.from_numpy(draw.normal(size=(rows, size))) for size in (classes, width))
    return *numbers, torch.from_numpy(draw.integers(0, classes, rows))


def padded(task: tuple[Tensor, Tensor, Tensor], rows: int, classes: int, junk: float) -> list[Tensor]:
    """One task as a group of one, with padding that holds ``junk``: logits, features, labels, mask, class_mask."""
    logits, features, labels = task
    n, k = logits.shape
    wide = torch.full((1, n + rows, k + classes), junk).double()
    wide[0, :n, :k] = logits
    tall = torch.full((1, n + rows, features.shape[1]), junk).double()
    tall[0, :n] = features
    mask = (torch.arange(n + rows) < n).double()[None]
    return [wide, tall, nn.functional.pad(labels, (0, rows))[None], mask, (torch.arange(k + classes) < k)[None]]


def by_loops(logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, float]:
    """The three parts of equation (3), example by example; gradients by autograd through a last layer."""
    n, k = logits.shape
    p = torch.softmax(logits, 1)
    joint = [[sum(float(p[i, a]) for i in range(n) if labels[i] == y) / n for y in range(k)] for a in range(k)]
    information = 0.0
    for a in range(k):
        for y in range(k):
            if joint[a][y] > 0:
                both = sum(joint[a]) * sum(row[y] for row in joint)
                information += joint[a][y] * math.log(joint[a][y] / both)
    layer = nn.Linear(features.shape[1], k).double()
    gradients = []
    for row, feature, label in zip(logits, features, labels, strict=True):
        offset = row - layer(feature).detach()  # the layer's own logits are made these ones
        loss = nn.functional.cross_entropy(layer(feature) + offset, label)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, layer.parameters())]))
    losses = [float(-p[i, labels[i]].log()) for i in range(n)]
    variance = float(torch.stack(gradients).var(0, correction=0).sum())
    return {"information": information, "cross_entropy": sum(losses) / n, "gradient_variance": variance}


@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 5),
    width=st.integers(1, 4),
    more_rows=st.integers(0, 4),
    more_classes=st.integers(0, 3),
    junk=st.sampled_from([0.0, 7.0, -50.0]),
    seed=st.integers(0, 10**6),
)
def test_terms_of_equation_3_equal_loops_whatever_the_padding(
    rows: int, classes: int, width: int, more_rows: int, more_classes: int, junk: float, seed: int
) -> None:
    task = random_task(rows, classes, width, seed)
    inputs = padded(task, more_rows, more_classes, junk)
    for tensor in inputs[:2]:
        tensor.requires_grad_(True)
    terms = outer_terms(ALL_TERMS, *inputs)
    got = {name: term.item() for name, term in terms.items()}
    want = by_loops(*task)
    assert got == pytest.approx(want | {"validation": want["cross_entropy"]}, rel=1e-9, abs=1e-10)
    value = outer_loss(ALL_TERMS, terms)
    objective = want["information"] - 0.4 * want["cross_entropy"] - 0.3 * want["gradient_variance"]
    assert value.item() == pytest.approx(want["cross_entropy"] - 0.7 * objective, rel=1e-9, abs=1e-10)
    of_logits, of_features = torch.autograd.grad(value.sum(), inputs[:2])
    assert of_logits.isfinite().all() and of_features.isfinite().all()
    assert not of_logits[:, rows:].any() and not of_logits[..., classes:].any() and not of_features[:, rows:].any()


def test_information_is_the_label_entropy_for_sure_predictions_and_0_for_none() -> None:
    truth = torch.eye(3)[torch.tensor([0, 0, 1, 2])][None]
    weight = torch.full((1, 4), 0.25)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert soft_information(truth, truth, weight).item() == pytest.approx(entropy, rel=1e-6)
    swapped = truth[..., [1, 2, 0]]
    assert soft_information(swapped, truth, weight).item() == pytest.approx(entropy, rel=1e-6), "names do not matter"
    nothing = torch.full((1, 4, 3), 1 / 3)
    assert soft_information(nothing, truth, weight).item() == pytest.approx(0, abs=1e-6)


def test_gradients_are_finite_where_probabilities_underflow() -> None:
    logits = torch.tensor([[[500.0, 0.0, -500.0], [500.0, 0.0, -500.0]]], requires_grad=True)
    features, labels = torch.ones(1, 2, 2), torch.tensor([[0, 2]])
    class_mask = torch.ones(1, 3, dtype=torch.bool)
    value = outer_loss(ALL_TERMS, outer_terms(ALL_TERMS, logits, features, labels, torch.ones(1, 2), class_mask))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_equal_examples_have_no_gradient_variance() -> None:
    residual = torch.tensor([[[0.3, -0.3]]], dtype=torch.float64).repeat(1, 5, 1)
    features = torch.tensor([[[2.0, -1.0, 0.5]]], dtype=torch.float64).repeat(1, 5, 1)
    weight = torch.full((1, 5), 0.2, dtype=torch.float64)
    assert last_layer_variance(residual, features, weight).item() == pytest.approx(0, abs=1e-14)


def test_terms_without_weight_are_not_computed(case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, mask, class_mask = case
    features = torch.full((2, 6, 3), float("nan"), dtype=torch.float64)
    inputs = (logits, features, labels, mask, class_mask)
    plain = OuterLossConfig(beta=3.0, gamma=5.0)
    assert list(outer_terms(plain, *inputs)) == ["validation"]
    assert torch.equal(outer_loss(plain, outer_terms(plain, *inputs)), validation_loss(plain, *inputs[:1], *inputs[2:]))
    pure = OuterLossConfig(information=1.0, beta=0.0)
    terms = outer_terms(pure, *inputs)
    assert list(terms) == ["validation", "information"]
    torch.testing.assert_close(outer_loss(pure, terms), terms["validation"] - terms["information"])


def random_controls(seed: int, refreshes: int) -> list[Tensor]:
    """Of 2 tasks; some basis losses, of the first and of the last, are not in the mixture."""
    torch.manual_seed(seed)
    controls = torch.randn(refreshes, 2, len(CONTROLS)).double()
    alpha = torch.softmax(3 * controls[:, :, :5], 2)
    controls[:, :, :NUM_BASIS] = 0
    controls[:, :, [0, 1, 3, 6, 8]] = alpha
    return list(controls)


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), edge=st.booleans(), seed=st.integers(0, 10**6))
def test_complexity_equals_loops_over_the_steps(lengths: list[int], edge: bool, seed: int) -> None:
    """``edge``: the stretch begins with a refresh, and something else was in force before."""
    lengths = [0, *lengths] if edge else lengths
    controls = random_controls(seed, len(lengths))
    terms = complexity(OuterLossConfig(entropy=-0.3, total_variation=2.0), controls, lengths)
    for task in range(2):
        entropies, changes, before = [], 0.0, None
        for each, steps in zip(controls, lengths, strict=True):
            alpha = each[task, :NUM_BASIS].tolist()
            entropies += steps * [-sum(a * math.log(a) for a in alpha if a > 0)]
            changes += 0.0 if before is None else sum(abs(a - b) for a, b in zip(alpha, before, strict=True))
            before = alpha
        assert terms["entropy"][task].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-12)
        assert terms["total_variation"][task].item() == pytest.approx(changes, rel=1e-12)


def test_basis_losses_that_came_later_do_not_change_the_bits_of_mixtures_without_them() -> None:
    torch.manual_seed(0)
    controls = [torch.randn(200, len(CONTROLS)) for _ in range(3)]
    first = [torch.softmax(each[:, : len(FIRST_BASIS)], 1) for each in controls]
    for each, alpha in zip(controls, first, strict=True):
        each[:, :NUM_BASIS] = nn.functional.pad(alpha, (0, NUM_BASIS - len(FIRST_BASIS)))
    terms = complexity(OuterLossConfig(entropy=1.0, total_variation=1.0), controls, [2, 2, 1])
    entropies = [steps * mixture_entropy(alpha) for steps, alpha in zip([2, 2, 1], first, strict=True)]
    assert torch.equal(terms["entropy"], torch.stack(entropies).sum(0) / 5)
    assert torch.equal(terms["total_variation"], torch.stack(first).diff(dim=0).abs().sum((0, 2)))


def test_complexity_has_the_terms_that_weigh_something() -> None:
    controls, lengths = random_controls(0, 3), [2, 2, 1]
    assert complexity(OuterLossConfig(), controls, lengths) == {}
    assert list(complexity(OuterLossConfig(entropy=0.1), controls, lengths)) == ["entropy"]
    assert list(complexity(OuterLossConfig(total_variation=0.1), controls, lengths)) == ["total_variation"]


def test_entropy_of_a_vertex_is_0_and_of_the_uniform_mixture_log_k() -> None:
    alpha = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4], requires_grad=True)
    entropy = mixture_entropy(alpha)
    assert entropy.tolist() == pytest.approx([0, math.log(4)])
    (gradient,) = torch.autograd.grad(entropy.sum(), alpha)
    assert gradient.isfinite().all()


def test_stability_has_the_cross_entropy_read_and_weighs_nothing_at_a_checkpoint(
    case: tuple[torch.Tensor, ...],
) -> None:
    logits, labels, mask, class_mask = case
    config = OuterLossConfig(stability=5.0, gamma=1.0)
    terms = outer_terms(config, logits, torch.ones(2, 6, 1).double(), labels, mask, class_mask)
    assert list(terms) == ["validation", "cross_entropy"]
    want = validation_loss(OuterLossConfig(kind="cross_entropy"), logits, labels, mask, class_mask)
    torch.testing.assert_close(terms["cross_entropy"], want)
    torch.testing.assert_close(outer_loss(config, terms), terms["validation"])


def test_accuracy_ignores_padding() -> None:
    logits = torch.tensor([[[0.0, 1.0, 9.0], [5.0, 0.0, 9.0], [0.0, 1.0, 9.0]]])
    labels, mask = torch.tensor([[1, 1, 0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert accuracy(logits, labels, mask, torch.tensor([[True, True, False]])).item() == 0.5


@pytest.mark.parametrize(
    ("every", "start", "stop", "want"),
    [(25, 0, 60, [25, 50, 60]), (25, 25, 50, [50]), (100, 0, 7, [7]), (1, 2, 4, [3, 4])],
)
def test_checkpoints(every: int, start: int, stop: int, want: list[int]) -> None:
    assert checkpoints(every, start, stop) == want


def test_cross_entropy_that_is_read_for_the_stability_alone_is_no_part_of_a_checkpoint() -> None:
    terms = {"validation": torch.tensor([0.25]), "cross_entropy": torch.tensor([math.inf])}
    assert outer_loss(OuterLossConfig(stability=1.0), terms).tolist() == [0.25]
