"""The drop-in loss in ordinary PyTorch loops, and against the inner loop it was meta-trained in."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies.policy_file import save_policy
from palf_dist.policies.static import control_vector
from palf_dist.randomness import random_generator
from palf_dist.training_state import PAPER_FEATURES, hutchinson_probes
from palf_dist.types import CONTROL_INDEX
from tests.adaptive_cases import artefact, batch, untrained
from tests.groups import make_group

pytestmark = pytest.mark.filterwarnings("ignore:AdaptiveLoss. no optimizer")  # most tests need none


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "robust"},
        {"kind": "recurrent"},
        {"kind": "informed"},
        {"basis": ("generalised_ce", "elr", "bootstrap"), "hyperparameters": ("q", "lam", "beta")},
    ],
    ids=["robust", "recurrent", "informed", "averages"],
)
def test_it_sees_what_the_policy_saw_in_meta_training(settings):
    """Same losses, gradients' sources and controls as the inner loop, step for step, in float64."""
    group = make_group(size=2, steps=11, batch=5)
    policy = artefact(**settings)
    learned, phi = policy.policy(), torch.from_numpy(policy.phi).double()
    loop = InnerLoop(group, learned, InnerConfig())
    task = 1  # the one with a shifted prior and without padding
    rows = group.train.mask[task] > 0
    counts = torch.bincount(group.train.labels[task][rows], minlength=4)
    target = (counts + 1) / (counts + 1).sum() / group.log_prior_ratio[task].double().exp()
    criterion = AdaptiveLoss(
        policy,
        total_steps=11,
        class_counts=counts,
        target_prior=target / target.sum(),
        validation=lambda: validated(loop, theta, task),
        training_rows=(group.train.inputs[0][task][rows], group.train.labels[task][rows]),
    )
    torch.testing.assert_close(criterion.log_prior_ratio, group.log_prior_ratio[task].double() + target.sum().log())
    criterion.log_prior_ratio = group.log_prior_ratio[task].double()  # the same up to that constant
    state = loop.start()
    for step in range(11):
        theta = state.theta.clone()  # before the step, when the state is read
        seen = loop.step(state, phi)
        ours = criterion(seen.logits[task], seen.batch.labels[task], index=group.batches[step, task])
        assert state.controls is not None
        torch.testing.assert_close(criterion.controls.double(), state.controls[task], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, seen.adaptive_loss()[task], rtol=1e-5, atol=1e-6)
        assert criterion.weight_decay_multiplier == pytest.approx(state.controls[task, CONTROL_INDEX["wd"]].item())
        criterion.step(nn.Identity())


def validated(loop, theta, task):
    """Logits and labels of the validation rows of a task, as its inner run has them now."""
    validation = loop.group.validation
    known = validation.mask[task] > 0
    return loop.evaluate(theta, validation)[task][known], validation.labels[task][known]


def test_it_starts_where_the_policy_file_says(tmp_path):
    save_policy(tmp_path, untrained(start={"e": 0.4, "wd": 3.0, "gamma": 1.5}))
    criterion = AdaptiveLoss.load(tmp_path, total_steps=10)
    logits, y, index = batch(0)
    criterion(logits, y, index=index)
    got = {name: criterion.controls[CONTROL_INDEX[name]].item() for name in ("e", "wd", "gamma", "la")}
    assert got == pytest.approx({"e": 0.4, "wd": 3.0, "gamma": 1.5, "la": 1.0})
    assert criterion.weight_decay_multiplier == pytest.approx(3.0)


def train_digits(criterion, epochs: int, noise: float = 0.3) -> float:
    """Clean test accuracy of a small MLP after training on digits with noisy labels, by the README's own loop."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    order = torch.from_numpy(random_generator("digits").permutation(len(y)))
    train, test = order[:500], order[500:]
    draw = random_generator("digits noise")
    noisy = torch.from_numpy(draw.random(500)) < noise
    labels = torch.where(noisy, torch.from_numpy(draw.integers(0, 10, 500)), y[train])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for epoch in range(epochs):
        for index in torch.from_numpy(random_generator("epoch", epoch).permutation(500)).split(50):
            loss = criterion(model(x[train[index]]), labels[index], index=index)
            optimizer.zero_grad()
            loss.backward()
            criterion.step(model, optimizer)
            optimizer.step()
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


def test_a_training_loop_from_a_policy_file(tmp_path):
    save_policy(tmp_path, untrained())
    criterion = AdaptiveLoss.load(tmp_path, total_steps=400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy = train_digits(criterion, epochs=40)
    assert accuracy > 0.82
    assert accuracy > train_digits(PlainCrossEntropy(), epochs=40) + 0.04  # which learns the noise by then


class PlainCrossEntropy:
    def __call__(self, logits, y, index):
        return functional.cross_entropy(logits, y)

    def step(self, model, optimizer):
        pass


def test_it_leaves_the_global_random_state_alone():
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    before = torch.get_rng_state()
    logits, y, index = batch(0)
    criterion(logits, y, index=index).backward()
    criterion.step(nn.Identity())
    assert torch.equal(before, torch.get_rng_state())


def test_a_policy_without_features_sets_learned_constants():
    criterion = AdaptiveLoss(artefact(features=()), total_steps=20)
    learned = []
    for step in range(4):
        logits, y, index = batch(step)
        assert criterion(logits, y, index=index).isfinite()
        learned.append(criterion.controls)
        criterion.step(nn.Identity())
    assert learned[0] is not learned[3] and torch.equal(learned[0], learned[3])


@pytest.mark.parametrize("by", ["eval", "no_grad"])
def test_evaluation_is_plain_cross_entropy_and_changes_nothing(by):
    """Also in a loop that gives the model alone its eval mode, and at a step at which a refresh is due."""
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    logits, y, index = batch(0)
    criterion(logits, y, index=index)
    for _ in range(criterion.refresh_every):
        criterion.step(nn.Identity())
    before = copy.deepcopy(criterion.state_dict())
    with torch.set_grad_enabled(by == "eval"):
        judged = criterion.train(by != "eval")(logits * 2, y, index=index)
    assert torch.equal(judged, functional.cross_entropy(logits * 2, y))
    after = criterion.state_dict()
    assert after.pop("_extra_state") == before.pop("_extra_state")
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_the_weight_decay_follows_the_policy_from_its_initial_value():
    criterion = AdaptiveLoss(artefact(), total_steps=20)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}], lr=0.1
    )
    multipliers = set()
    for step in range(7):
        logits, y, index = batch(step)
        criterion(logits, y, index=index)
        multipliers.add(criterion.weight_decay_multiplier)
        criterion.step(layer, optimizer)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 * criterion.weight_decay_multiplier)
        assert optimizer.param_groups[1]["weight_decay"] == 0
    assert len(multipliers) == 3  # refreshed at steps 0, 3 and 6


@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1], ids=["at a refresh", "between two"])
def test_it_gets_over_logits_that_are_not_finite(overflow, place):
    """As after a GradScaler skipped that step: neither rows nor training state are lost for ever."""
    criterion = AdaptiveLoss(artefact(basis=("robust_ce", "elr", "bootstrap")), total_steps=20)
    logits, y, index = (part.detach() for part in batch(0))
    for step in range(7):
        bad = step == 3 + place
        given = logits.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(overflow)) if bad else logits
        assert criterion(given, y, index=index).isfinite() != bad
        criterion.step(nn.Identity())
    assert criterion.statistics.isfinite().all()
    p, times = torch.softmax(logits, 1), torch.full((8, 1), 7).index_fill(0, torch.tensor(2), 6)
    averaged = p + criterion.averages.decay**times * (1 / 4 - p)
    torch.testing.assert_close(criterion.averages.averaged[index], averaged)


def test_accumulated_batches_share_one_refresh():
    criterion = AdaptiveLoss(artefact(), total_steps=20)
    criterion(*batch(0)[:2], index=batch(0)[2])
    first = criterion.controls
    criterion(*batch(1)[:2], index=batch(1)[2])
    assert criterion.controls is first


def test_the_six_features_of_the_paper(monkeypatch):
    """Gradient norm and Hessian trace come from the user's own model."""
    criterion = AdaptiveLoss(artefact(kind="palf", basis=("ce", "focal")), total_steps=20)
    model = nn.Linear(3, 4)
    x = torch.from_numpy(random_generator("x").normal(size=(8, 3))).float()
    y = batch(0)[1]
    states = []
    monkeypatch.setattr(
        criterion.policy, "controls", lambda phi, state: states.append(state) or control_vector({"ce": 1.0})[None]
    )
    for _ in range(4):
        model.zero_grad()
        criterion(model(x), y).backward()
        criterion.step(model)
    first, second = (dict(zip(PAPER_FEATURES, state[0].tolist(), strict=True)) for state in states)
    assert first["time"] == 0 and second["time"] == pytest.approx(3 / 20)
    assert str(first["gradient_norm"]) == "nan", "no gradient yet"
    norm2 = sum((p.grad**2).sum() for p in model.parameters())
    assert second["gradient_norm"] == pytest.approx(norm2.log().item(), rel=1e-5)

    def mean_loss(flat):  # in the order of the graph
        return functional.cross_entropy(x @ flat[4:].view(4, 3).T + flat[:4], y)

    at = torch.cat([model.bias, model.weight.flatten()]).detach()
    hessian = torch.autograd.functional.hessian(mean_loss, at)
    probes = hutchinson_probes(16, torch.float32)
    trace = torch.einsum("qi,ij,qj->q", probes, hessian, probes).mean()
    assert trace > 0
    assert first["hessian_trace"] == second["hessian_trace"] == pytest.approx(trace.log1p().item(), rel=1e-5)


def test_a_model_without_second_derivatives_goes_on_without_the_trace():
    criterion = AdaptiveLoss(artefact(kind="palf", basis=("ce", "focal")), total_steps=20)

    layer = nn.Linear(4, 4, bias=False)

    def model():  # the backward of cdist has no derivative
        return -torch.cdist(layer(torch.eye(8, 4)), torch.eye(4), p=1)

    with pytest.warns(UserWarning, match="no Hessian trace"):
        criterion(model(), batch(0)[1]).backward()
    for _ in range(3):
        criterion.step(layer)
        criterion(model(), batch(0)[1]).backward()
    assert layer.weight.grad.isfinite().all()


def test_step_needs_gradients_where_the_policy_reads_their_norm():
    criterion = AdaptiveLoss(artefact(features=("gradient_norm",)), total_steps=20)
    layer = nn.Linear(2, 2)
    criterion.step(layer)
    criterion.step(layer)
    with pytest.raises(ConfigError, match="before zero_grad"):
        criterion.step(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_number_types(dtype):
    criterion = AdaptiveLoss(artefact(basis=("ce", "info_nce", "robust_ce")), total_steps=5)
    logits, y, index = batch(0)
    low = logits.detach().to(dtype).requires_grad_()
    features = torch.ones(8, 3, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(low, y, features, index)
    loss.backward()
    assert loss.dtype == (dtype if dtype is torch.float64 else torch.float32)
    assert low.grad.dtype == dtype and low.grad.isfinite().all() and features.grad.isfinite().all()
    exact = AdaptiveLoss(artefact(basis=("ce", "info_nce", "robust_ce")), total_steps=5)
    torch.testing.assert_close(
        loss.float(), exact(low.detach().float(), y, torch.ones(8, 3), index), rtol=1e-5, atol=1e-5
    )


def test_a_compiled_model_and_a_compiled_step():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.from_numpy(random_generator("compiled").normal(size=(8, 5))).float()
    _, y, index = batch(0)

    def train(model, criterion):
        losses = []
        for _ in range(4):
            loss = criterion(model(x), y, index=index)
            loss.backward()
            criterion.step(model)
            losses.append(loss.item())
        return losses

    eager = train(model, AdaptiveLoss(artefact(), total_steps=5))
    compiled = torch.compile(model, backend="aot_eager")
    assert train(compiled, AdaptiveLoss(artefact(), total_steps=5)) == pytest.approx(eager, rel=1e-6)
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    whole = torch.compile(lambda x, y, index: criterion(model(x), y, index=index), backend="aot_eager")
    whole(x, y, index).backward()
    assert whole(x, y, index).isfinite()


def test_averages_grow_with_the_rows():
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    logits, y, _ = batch(0)
    p = torch.softmax(logits.detach(), 1)
    criterion(logits, y, index=torch.arange(8))
    criterion(logits, y, index=torch.arange(8) + 100)
    criterion(logits, y, index=torch.arange(8))
    averages = criterion.averages
    torch.testing.assert_close(averages.averaged[100:108], 0.7 / 4 + 0.3 * p)
    torch.testing.assert_close(averages.averaged[:8], 0.7 * (0.7 / 4 + 0.3 * p) + 0.3 * p)
    assert averages.seen.nonzero()[:, 0].tolist() == [*range(8), *range(100, 108)]
    assert torch.equal(averages.labels[100:108], y)


@pytest.mark.parametrize("prior", ["uniform", [0.1, 0.2, 0.3, 0.4]])
def test_the_target_prior_shifts_the_loss_and_train_does_not(prior):
    counts = [100, 50, 10, 10]
    logits, y, index = batch(0)
    policy = artefact()
    train = AdaptiveLoss(policy, total_steps=5, class_counts=counts)
    other = AdaptiveLoss(policy, total_steps=5, class_counts=counts, target_prior=prior)
    target = torch.tensor(prior) if prior != "uniform" else torch.full((4,), 0.25)
    smoothed = (torch.tensor(counts) + 1) / 174
    torch.testing.assert_close(other.log_prior_ratio.float(), (smoothed / target).log())
    assert train.log_prior_ratio is None
    assert train(logits, y, index=index) != other(logits, y, index=index)


@pytest.mark.parametrize(("total_steps", "interval"), [(150, 3), (1500, 30), (20, 1)])
def test_the_refresh_interval_scales_with_the_run(total_steps: int, interval: int) -> None:
    policy = replace(artefact(), card={"inner_steps": 150})
    criterion = AdaptiveLoss(policy, total_steps=total_steps)
    refreshed = []
    for step in range(min(total_steps, 2 * interval + 1)):
        logits, y, index = batch(step)
        before = criterion._refreshed_at
        criterion(logits, y, index=index)
        refreshed += [step] if criterion._refreshed_at != before else []
        criterion.step(nn.Linear(1, 1))
    assert refreshed == [0, interval, 2 * interval]
