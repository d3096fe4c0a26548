"""Policies that need no file in anybody's loop, by name or as objects: the same as in the held-out comparison."""

from __future__ import annotations

import copy
import io
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from palf_dist import AdaptiveLoss
from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError, PolicyFileError
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.inner_loop import InnerLoop
from palf_dist.losses import LossContext, reference_losses
from palf_dist.policies import CurriculumPolicy, HedgePolicy, OnlineLearnLoss, StaticPolicy, fixed_mixture
from palf_dist.policies.named import NAMED
from palf_dist.policies.policy_file import load_policy, save_policy
from palf_dist.policies.static import control_vector
from palf_dist.randomness import random_generator
from palf_dist.types import BASIS_LOSSES, PAPER_BASIS
from tests.adaptive_cases import artefact, batch
from tests.groups import make_group

BASIS = ("ce", "focal", "label_smoothing", "symmetric_ce")
STATIC = ("cross_entropy", "uniform", "s5")
FEATURES = torch.from_numpy(random_generator("features").normal(size=(8, 3))).float()


def validated():
    return batch(100)[:2]


def make(name: str, total_steps: int = 150, **settings) -> AdaptiveLoss:
    """With what the policy of that name asks for."""
    shown = {"validation": validated} if name == "online_learnloss" else {}
    return AdaptiveLoss(name, total_steps=total_steps, **shown, **settings)


def run(criterion: AdaptiveLoss, steps: range) -> list:
    """Loss, gradient and controls of one batch after another, of a model that learns."""
    found: list = []
    for step in steps:
        logits, y, index = batch(step)
        features = FEATURES if "info_nce" in criterion.policy.active_basis else None
        loss = criterion(logits + 0.1 * step * functional.one_hot(y, 4), y, features, index)
        (gradient,) = torch.autograd.grad(loss, logits)
        found += [loss.detach(), gradient, criterion.controls.clone()]
        criterion.step(nn.Identity())
    return found


def losses_of(z: torch.Tensor, y: torch.Tensor, basis=BASIS, h=None) -> torch.Tensor:
    """[K, n] by the plain formulas, in the order of ``basis``."""
    context = LossContext.create(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4))
    rows = reference_losses(z[None], y[None], None if h is None else h[None], control_vector({})[None], context, basis)
    return rows[[BASIS_LOSSES.index(name) for name in basis], 0]


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_the_policy_of_the_comparison(name: str) -> None:
    """Controls and losses of its inner loop, step for step, where batches are of all rows: there snapshots are the
    same. Of 11 steps each is a refresh."""
    group = make_group(size=2, steps=11, batch=5)
    task = 1  # without padded classes; its padded rows come last
    rows = int(group.train.mask[task].sum())
    group = replace(group, batches=torch.arange(rows).expand(11, 2, rows).clone())
    policy = baseline_policy(METHODS["ce" if name == "cross_entropy" else name])
    policy.refresh = 1
    loop = InnerLoop(group, policy, InnerConfig())
    state = loop.start()

    def shown():
        validation, known = group.validation, group.validation.mask[task] > 0
        return loop.evaluate(theta, validation)[task][known], validation.labels[task][known]

    criterion = AdaptiveLoss(name, total_steps=11, **({"validation": shown} if name == "online_learnloss" else {}))
    assert name in STATIC or criterion.refresh_every == 1
    criterion.log_prior_ratio = group.log_prior_ratio[task].double()
    for step in range(11):
        theta = state.theta.clone()
        seen = loop.step(state, torch.zeros(0))
        assert state.controls is not None
        inputs, _ = loop.minibatch(step)
        h = group.model.apply(theta, inputs)[1][task] if name == "uniform" else None
        ours = criterion(seen.logits[task], seen.batch.labels[task], h, index=group.batches[step, task])
        torch.testing.assert_close(criterion.controls.double(), state.controls[task], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours, seen.adaptive_loss()[task], rtol=1e-4, atol=1e-6)
        criterion.step(nn.Identity())
    if name not in STATIC:
        assert [make(name, steps).refresh_every for steps in (150, 600)] == [10, 40], "as often per run"


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight": [1.0, 2.0, 0.5, 0.0], "ignore_index": 2, "reduction": "sum"}, {"label_smoothing": 0.2}],
    ids=str,
)
def test_cross_entropy_is_torchs(settings: dict) -> None:
    logits, y, _ = batch(0)
    ours = make("cross_entropy", **settings)(logits, y)
    if "weight" in settings:
        settings = settings | {"weight": torch.tensor(settings["weight"])}
    theirs = functional.cross_entropy(logits, y, **settings)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (ours, theirs)))


def test_uniform_is_the_mean_of_the_papers_losses() -> None:
    logits, y, _ = batch(0)
    h = FEATURES.clone().requires_grad_()
    ours = make("uniform")(logits, y, h)
    theirs = losses_of(logits, y, PAPER_BASIS, h).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (logits, h)) for loss in (ours, theirs)))
    with pytest.raises(ConfigError, match="features: the policy's mixture holds info_nce"):
        make("uniform")(logits, y)


@pytest.mark.filterwarnings("ignore:AdaptiveLoss. no index")
def test_models_of_other_classes_and_types_can_share_a_loss() -> None:
    policy = fixed_mixture({"robust_ce": 0.5, "label_smoothing": 0.5}, e=0.3)
    shared = AdaptiveLoss(policy, total_steps=10)
    for classes, dtype in ((4, torch.float32), (20, torch.float32), (4, torch.float32), (4, torch.float64)):
        logits, y, _ = batch(0, classes=classes)
        logits = logits.to(dtype)
        assert torch.equal(shared(logits, y), AdaptiveLoss(policy, total_steps=10)(logits, y))


@pytest.mark.parametrize("total_steps", [150, 600, 20])
def test_the_curriculum_follows_the_clock(total_steps: int) -> None:
    criterion, every = make("curriculum", total_steps), max(1, total_steps // 15)
    for step in range(total_steps):
        criterion(*batch(step)[:2])
        time = step // every * every / total_steps
        want = (max(0, 1 - 2 * time), 1 - abs(1 - 2 * time), max(0, 2 * time - 1))
        assert [criterion.alpha[name] for name in ("label_smoothing", "ce", "focal")] == pytest.approx(want, abs=1e-6)
        criterion.step(nn.Identity())


@pytest.mark.parametrize(
    "policy", [OnlineLearnLoss(refresh=3), HedgePolicy(refresh=3), HedgePolicy(("ce", "focal"), horizon=4, refresh=3)]
)
def test_it_learns_from_the_mean_losses_between_two_refreshes(policy: OnlineLearnLoss | HedgePolicy) -> None:
    """The snapshots of an object, asked as often as it says: batches of any size count by their rows, those without a
    label do not, and what is not finite is left out by LearnLoss."""
    criterion = AdaptiveLoss(policy, total_steps=1000, validation=validated)
    seen: list[torch.Tensor] = []
    snapshots: list[torch.Tensor] = []
    for step in range(10):
        logits, y, _ = batch(step, n=8 - step % 3)
        logits = (logits + 0.4 * step * functional.one_hot(y, 4)).detach()
        if step == 7:
            logits[0] = torch.nan
        given = torch.cat([y, torch.tensor([-100])])
        criterion(torch.cat([logits, logits[:1]]), given)
        seen.append(losses_of(logits, y, policy.active_basis).T)
        if step % 3 == 0:
            error = functional.cross_entropy(*validated())
            snapshots.append(torch.cat([error[None], torch.cat(seen).mean(0)]).detach())
            seen = []
            want = policy.controls(torch.zeros(0), torch.stack(snapshots)[None])[0]
            torch.testing.assert_close(criterion.controls, want, rtol=1e-4, atol=1e-5)
        criterion.step(nn.Identity())
    assert snapshots[3].isnan().any() and not snapshots[2].isnan().any()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("cut", [4, 10])
def test_a_restored_state_continues_bit_for_bit(name: str, cut: int) -> None:
    """Also in the middle of what a snapshot gathers, at 45 steps three batches; as does a pickled or deep copy."""
    whole = run(make(name, 45), range(14))
    first = make(name, 45)
    before = run(first, range(cut))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    restored = make(name, 45)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for again in (restored, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        for ours, theirs in zip(before + run(again, range(cut, 14)), whole, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMED)
def test_the_global_random_states_are_left_alone(name: str) -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    run(make(name), range(12))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_a_state_of_another_policy_is_refused() -> None:
    states = {name: make(name).state_dict() for name in NAMED}
    objects = {
        "horizon": HedgePolicy(horizon=9),
        "basis": HedgePolicy(("ce", "focal")),
        "constants": fixed_mixture({"robust_ce": 1.0}, e=0.3),
    }
    states |= {name: AdaptiveLoss(policy, total_steps=150).state_dict() for name, policy in objects.items()}
    for name in NAMED:
        for other, state in states.items():
            if other == name:
                make(name).load_state_dict(state)
            else:
                with pytest.raises((ConfigError, RuntimeError), match=r"another policy|Unexpected key|Missing key"):
                    make(name).load_state_dict(state)
    make("hedge").load_state_dict(AdaptiveLoss(HedgePolicy(), total_steps=150).state_dict())


def test_hedge_takes_what_other_policies_take() -> None:
    """Dense predictions, probabilities and smoothed labels."""
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([[0, 1, -100], [3, 2, 1]])
    criterion = make("hedge")
    assert criterion(z, y).isfinite() and criterion.alpha == dict.fromkeys(BASIS, 0.25)
    soft = functional.one_hot(y.clamp_min(0), 4).movedim(-1, 1).float()
    torch.testing.assert_close(make("hedge")(z, soft), make("hedge")(z, y.clamp_min(0)))
    assert make("hedge", label_smoothing=0.1)(z, y).isfinite()


@pytest.mark.filterwarnings("ignore:AdaptiveLoss. no optimizer")
def test_a_file_a_folder_and_a_loaded_policy_are_one(tmp_path) -> None:
    policy = artefact()
    path = save_policy(tmp_path, policy)
    losses = [
        run(AdaptiveLoss(given, total_steps=20), range(4))
        for given in (policy, tmp_path, str(tmp_path), path, load_policy(path))
    ]
    for found in losses[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, losses[0], strict=True))


@pytest.mark.filterwarnings("error")
def test_a_static_policy_warns_of_nothing() -> None:
    criterion = make("cross_entropy")
    logits, y, _ = batch(0)
    criterion(logits, y)
    criterion.step(nn.Identity())
    assert criterion.weight_decay_multiplier == 1


class Unwritable(CurriculumPolicy):
    settings = {"table": torch.zeros(2)}  # noqa: RUF012


class Nothing:
    def controls(self, phi, state):
        return phi


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "unifrom",
            "policy: 'unifrom' is no policy's name .*cross_entropy, uniform, s5, curriculum, hedge.*, default.",
        ),
        ("cross-entropy", "policy: 'cross-entropy' is no policy's name .*cross_entropy"),
        (3, "policy: 3 is no policy; give a name .*a policy file or its folder"),
        (None, "policy: None is no policy; give a name"),
        (CurriculumPolicy, "policy: CurriculumPolicy is a class; give an object of it"),
        (
            Nothing(),
            "policy Nothing: it has no features, refresh, .*derive it from palf_dist.policies.With",
        ),
        (Unwritable(), "policy Unwritable: settings are .*; needs plain data, as JSON holds it"),
        (CurriculumPolicy(refresh=0), "policy CurriculumPolicy: refresh is 0; needs a positive number of steps"),
        ("online_learnloss", "validation: online LearnLoss learns from the validation error; pass validation="),
    ],
)
def test_what_is_no_policy_is_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveLoss(given, total_steps=10)


def test_a_name_is_not_loaded() -> None:
    with pytest.raises(ConfigError, match=r"'s5' is read from no file; write AdaptiveLoss\('s5', ...\)"):
        AdaptiveLoss.load("s5", total_steps=10)
    with pytest.raises(ConfigError, match="'unifrom' is no policy's name"):
        AdaptiveLoss.load("unifrom", total_steps=10)


def test_a_missing_file_is_named_as_one(tmp_path) -> None:
    for given in (tmp_path / "none", str(tmp_path / "none"), Path("hedge")):
        with pytest.raises(PolicyFileError, match=r"there is no policy.safetensors"):
            AdaptiveLoss(given, total_steps=10)


@pytest.mark.parametrize(
    ("alpha", "hyperparameters", "message"),
    [
        ({"ce": 0.5}, {}, "mixture weights .* are no shares >= 0 of sum 1"),
        ({"ce": 1.5, "mae": -0.5}, {}, "are no shares >= 0 of sum 1"),
        ({"ce": 0.5, "mea": 0.5}, {}, "basis: no loss is called mea; there are ce, focal"),
        ({}, {}, "basis: nothing given"),
        ({"ce": float("nan")}, {}, "not finite"),
        ({"focal": 1.0}, {"gama": 1.0}, "gama: no such hyper-parameter; there are e, la"),
        ({"robust_ce": 1.0}, {"e": 1.0}, "hyper-parameter e is .1.0.; needs numbers from 0 to 0.95"),
        ({"focal": 1.0}, {"gamma": -1.0}, "gamma is .-1.0.; needs numbers from 0 to inf"),
    ],
)
def test_a_mixture_that_is_none_is_refused(alpha: dict, hyperparameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fixed_mixture(alpha, **hyperparameters)


def test_a_fixed_mixture_has_its_weights_and_constants() -> None:
    policy = fixed_mixture({"focal": 0.25, "ce": 0.75}, gamma=0.0)
    assert isinstance(policy, StaticPolicy) and policy.active_basis == ("ce", "focal")
    logits, y, _ = batch(0)
    criterion = AdaptiveLoss(policy, total_steps=10)
    torch.testing.assert_close(criterion(logits, y), functional.cross_entropy(logits, y))
    assert criterion.alpha == {"ce": 0.75, "focal": 0.25}


def test_a_training_loop_learns_from_its_own_validation_rows() -> None:
    """The loop of docs/learnloss.md on digits, a tenth of the labels wrong."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    draw = random_generator("online digits")
    noisy = torch.where(torch.from_numpy(draw.random(len(y)) < 0.1), torch.from_numpy(draw.integers(0, 10, len(y))), y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    criterion = AdaptiveLoss(
        "online_learnloss", total_steps=200, validation=lambda: (model(x[600:900]), noisy[600:900])
    )
    for _ in range(200):
        rows = torch.from_numpy(draw.integers(0, 600, 50))
        criterion(model(x[rows]), noisy[rows]).backward()
        criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert (model(x[900:]).argmax(1) == y[900:]).float().mean() > 0.85
    assert max(criterion.alpha.values()) > 0.3, "it moved away from where it began"
