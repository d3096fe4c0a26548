"""What a policy or a basis loss of your own has to do, as checks to call from your tests. This package's own go through
the same.

    def test_my_policy():
        check_policy(MyPolicy())
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.own_losses import BasisLoss, own_values
from palf_dist.policies.base import Policy, check_controls
from palf_dist.policies.meta_learned import AdaptingPolicy
from palf_dist.policies.named import check_policy_object
from palf_dist.randomness import random_generator
from palf_dist.training_state import SNAPSHOTS

TASKS, REFRESHES, ROWS, CLASSES, INPUTS = 4, 3, 8, 4, 3
STEP = 1e-6  # of finite differences in float64
MOST_STEPS = 25  # of the run in AdaptiveLoss

States = list[dict[str, Any]]


def check_policy(policy: Policy) -> None:
    """Check that an object does what ``palf_dist.policies.Policy`` says.

    Its controls are a mixture of its basis losses, with hyper-parameters in their bounds, whatever the state is (NaN
    where a feature is not known), in float32 and float64; each task's by itself; the same at each call; they change no
    argument and no global random state; they are differentiable in phi; and a run in ``AdaptiveLoss`` that is restored
    from a state_dict goes on bit for bit. (Not that, where the policy needs the model's parameters, as under a shield.)

    Raises:
        AssertionError, ConfigError: with what is wrong.
    """
    who = type(policy).__name__
    if not isinstance(policy, AdaptingPolicy):  # the only one with features of its own
        check_policy_object(policy)
    start = policy.initial()
    assert isinstance(start, np.ndarray) and start.dtype == np.float32 and start.shape == (policy.num_parameters,), (
        f"{who}.initial: needs float32 [num_parameters], here [{policy.num_parameters}]"
    )
    assert np.array_equal(start, policy.initial()), f"{who}.initial: it differs from call to call"
    draw = random_generator("check policy")
    for scale in (0.0, 0.3, 3.0, 100.0) if policy.num_parameters else (0.0,):
        moved = start + scale * draw.normal(size=start.shape)
        for dtype in (torch.float32, torch.float64):
            phi, state = torch.from_numpy(moved).to(dtype), _states(policy, draw).to(dtype)
            _check_controls(policy, phi, state)
    if policy.num_parameters:
        _check_gradient(policy, torch.from_numpy(start + 0.3 * draw.normal(size=start.shape)), draw)
    if policy.shield is None and not isinstance(policy, AdaptingPolicy):
        _check_run(policy)


def check_basis_loss(function: BasisLoss) -> None:
    """Check that a function can be a basis loss, whether it is registered yet or not.

    It gives one value of each example, of the logits' type, each by its own row alone; also for one example and for
    none; finite with a finite gradient where the logits are far apart; the same at each call; it changes no argument
    and no global random state; and its gradient by autograd is that of finite differences, in float64.

    Raises:
        AssertionError, ConfigError: with what is wrong.
    """
    who, draw = getattr(function, "__name__", repr(function)), random_generator("check basis loss")
    for classes in (2, CLASSES):
        for rows, scale in ((ROWS, 1.0), (ROWS, 300.0), (1, 1.0), (0, 1.0)):
            labels = torch.from_numpy(draw.integers(0, classes, rows))
            for dtype in (torch.float32, torch.float64):
                z = torch.from_numpy(scale * draw.normal(size=(rows, classes))).to(dtype).requires_grad_()
                values = _unchanged(lambda z, y: own_values(who, function, z, y), z, labels, who=who)
                assert values.dtype == dtype, f"{who}: it gives {values.dtype} for logits of {dtype}"
                assert values.isfinite().all(), f"{who}: it gives {values.tolist()} for logits {z.tolist()}"
                assert values.requires_grad, f"{who}: it is not differentiable; leave out detach() and no_grad()"
                (gradient,) = torch.autograd.grad(values.sum(), z)
                assert gradient.isfinite().all(), f"{who}: its gradient is {gradient.tolist()} for logits {z.tolist()}"
                alone = [function(z[[row]], labels[[row]])[0] for row in range(rows)]
                for row, value in enumerate(alone):
                    torch.testing.assert_close(
                        value, values[row], msg=lambda m: f"{who}: a value depends on the other rows of its batch\n{m}"
                    )
    z = torch.from_numpy(draw.normal(size=(ROWS, CLASSES))).requires_grad_()
    labels = torch.from_numpy(draw.integers(0, CLASSES, ROWS))
    torch.autograd.gradcheck(lambda z: function(z, labels), z)


def _states(policy: Policy, draw: np.random.Generator) -> Tensor:
    """What the policy may read, float64: random states of some tasks, of several refreshes where it reads them all; of
    the first task next to nothing is known."""
    if SNAPSHOTS in policy.features:
        snapshots = draw.exponential(size=(TASKS, REFRESHES, 1 + len(policy.active_basis)))
        snapshots[0, 1, 1:] = np.nan
        snapshots[1:, :, 0] = np.nan
        return torch.from_numpy(snapshots)
    history = (REFRESHES,) if policy.reads_history else ()
    state = 3 * draw.normal(size=(TASKS, *history, len(policy.features)))
    for column, name in enumerate(policy.features):
        if name == "time":
            state[..., column] = draw.random((TASKS, *history))
        else:
            state[0, ..., column] = np.nan
    return torch.from_numpy(state)


def _check_controls(policy: Policy, phi: Tensor, state: Tensor) -> None:
    who = f"{type(policy).__name__}.controls"
    controls = _unchanged(policy.controls, phi, state, who=who)
    assert controls.dtype == state.dtype, f"{who}: it gives {controls.dtype} for a state of {state.dtype}"
    check_controls(policy, controls, len(state))
    own_phi = [(1 + task / 10) * phi for task in range(len(state))]
    pairs = [("tasks are not apart", [phi] * len(state), controls)]
    if policy.num_parameters:
        pairs.append(("it is another one for phi [G, P]", own_phi, policy.controls(torch.stack(own_phi), state)))
    for problem, phis, found in pairs:
        alone = torch.cat([policy.controls(one, state[task : task + 1]) for task, one in enumerate(phis)])
        torch.testing.assert_close(found, alone, msg=lambda m, problem=problem: f"{who}: {problem}\n{m}")  # type: ignore[misc]
    assert _same_bits(copy.deepcopy(policy).controls(phi, state), controls), f"{who}: it differs in a deep copy"


def _check_gradient(policy: Policy, phi: Tensor, draw: np.random.Generator) -> None:
    """Of the controls in phi, along a line, by central differences."""
    state, along = _states(policy, draw), torch.from_numpy(draw.normal(size=len(phi)))
    upstream = torch.from_numpy(draw.normal(size=policy.controls(phi, state).shape))

    def total(at: Tensor) -> Tensor:
        return (policy.controls(at, state) * upstream).sum()

    at = phi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(at), at)
    with torch.no_grad():
        differences = (total(phi + STEP * along) - total(phi - STEP * along)) / (2 * STEP)
    torch.testing.assert_close(
        gradient @ along,
        differences,
        rtol=1e-5,
        atol=1e-6,
        msg=lambda m: f"{type(policy).__name__}.controls: its gradient in phi is another one\n{m}",
    )


def _check_run(policy: Policy) -> None:
    """Losses and weights of a short training, and of the same with a restart in the middle."""
    steps = min(2 * policy.refresh + 3, MOST_STEPS)
    with _random_states_kept(f"{type(policy).__name__} in AdaptiveLoss"):
        whole, _ = _trained(policy, range(steps))
        before, saved = _trained(policy, range(steps // 2))
        after, _ = _trained(policy, range(steps // 2, steps), saved)
    assert whole == before + after, (
        f"{type(policy).__name__}: a restored run is another one; all that a policy remembers has to come to it in its "
        "state (reads_history)"
    )


def _trained(policy: Policy, steps: range, saved: States | None = None) -> tuple[list[float], States]:
    draw = random_generator("check policy, run")
    x = torch.from_numpy(draw.normal(size=(5 * ROWS, INPUTS))).float()
    y = torch.from_numpy(draw.integers(0, CLASSES, len(x)))
    model = nn.utils.skip_init(nn.Linear, INPUTS, CLASSES)  # which draws nothing
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01, momentum=0.9)
    held = x[: 2 * ROWS], y[: 2 * ROWS]
    criterion = AdaptiveLoss(
        policy, total_steps=MOST_STEPS, validation=lambda: (model(held[0]), held[1]), training_rows=(x, y)
    )
    parts = (model, optimizer, criterion)
    for part, state in zip(parts, saved or (), strict=saved is not None):
        part.load_state_dict(state)
    losses = []
    for step in steps:
        index = torch.from_numpy(random_generator("check policy, batch", step).permutation(len(x))[:ROWS])
        loss = criterion(model(x[index]), y[index], x[index].clone(), index)
        loss.backward()
        criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, copy.deepcopy([part.state_dict() for part in parts])


def _unchanged(function: Callable[..., Tensor], *arguments: Tensor, who: str) -> Tensor:
    """What ``function`` gives, the same twice, with its arguments and the global random states as they were."""
    before = [argument.detach().clone() for argument in arguments]
    with _random_states_kept(who):
        first, second = function(*arguments), function(*arguments)
    assert _same_bits(first, second), f"{who}: it differs from call to call"
    for argument, was in zip(arguments, before, strict=True):
        assert _same_bits(argument, was), f"{who}: it changes an argument"
    return first


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Of tensors of one type, which may hold NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def _random_states_kept(who: str) -> Iterator[None]:
    def states() -> tuple[bytes, object, str]:
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())

    before = states()
    yield
    assert states() == before, f"{who}: it draws from a global random state; use a generator of its own"
