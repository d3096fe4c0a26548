from __future__ import annotations

import pytest
import torch

from palf_dist.config import OuterLossConfig
from palf_dist.outer_loss import accuracy, checkpoints, outer_loss


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
    got = outer_loss(config, logits, labels, mask, class_mask)
    want = torch.stack([by_hand(kind, logits[0], labels[0], 3.0), by_hand(kind, logits[1, :4, :3], labels[1, :4], 3.0)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_soft_error_is_blind_to_confidence(case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, mask, class_mask = case
    config = OuterLossConfig()
    torch.testing.assert_close(
        outer_loss(config, logits, labels, mask, class_mask),
        outer_loss(config, 50 * logits, labels, mask, class_mask),
        rtol=1e-5,
        atol=1e-5,
    )


def test_constant_logits_have_finite_gradients() -> None:
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    labels, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    value = outer_loss(OuterLossConfig(), logits, labels, mask, torch.ones(1, 2, dtype=torch.bool))
    value.sum().backward()
    assert value.item() == pytest.approx(0.5) and logits.grad is not None and logits.grad.isfinite().all()


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
