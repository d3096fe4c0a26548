"""The drop-in's state_dict: the run that loads it goes on bit for bit, and one of something else is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.errors import ConfigError
from palf_dist.randomness import random_generator
from palf_dist.types import CONTROL_INDEX, FIRST_CONTROLS
from tests.adaptive_cases import artefact, batch

pytestmark = pytest.mark.filterwarnings("ignore:AdaptiveLoss. no (index|optimizer)")


@pytest.mark.parametrize("kind", ["robust", "recurrent"])
@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("counts", [None, [10, 20, 5, 15]])
def test_a_restored_state_continues_bit_for_bit(with_index, counts, kind):
    def make():
        return AdaptiveLoss(artefact(kind=kind), total_steps=20, class_counts=counts)

    def losses(criterion, steps):
        result = []
        for step in steps:
            logits, y, index = batch(step)
            loss = criterion(logits, y, index=index if with_index else None)
            loss.backward()
            result += [loss.item(), logits.grad, criterion.weight_decay_multiplier]
            criterion.step(nn.Identity())
        return result

    whole = losses(make(), range(14))
    first, second = make(), make()
    before = losses(first, range(7))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    after = losses(second, range(7, 14))
    assert len(before + after) == len(whole)
    for ours, theirs in zip(before + after, whole, strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
    assert losses(make(), range(7, 14))[0] != after[0], "the state makes no difference: the test cannot fail"


def test_a_deep_copy_goes_on_by_itself():
    original = AdaptiveLoss(artefact(kind="recurrent"), total_steps=20, weight=[1, 2, 3, 4])
    whole, part = copy.deepcopy(original), original
    for step in range(9):
        if step == 5:
            part = copy.deepcopy(original)
        logits, y, index = batch(step)
        assert torch.equal(part(logits, y, index=index), whole(logits, y, index=index))
        for criterion in (part, whole):
            criterion.step(nn.Identity())
    assert original.get_extra_state()["step"] == 5 and original.history.shape[1] == 2 < part.history.shape[1]


@pytest.mark.parametrize("assign", [False, True])
def test_a_loss_in_use_goes_back_to_a_state(assign):
    """Nothing that it worked out of its controls outlives them."""

    def losses(criterion):
        found = []
        for step in range(5, 9):
            logits, y, index = batch(step)
            found.append(criterion(logits, y, index=index).item())
            criterion.step(nn.Identity())
        return found

    criterion = AdaptiveLoss(artefact(), total_steps=20)
    losses(criterion)
    saved = copy.deepcopy(criterion.state_dict())
    after = losses(criterion)
    for _ in range(2):
        criterion.load_state_dict(copy.deepcopy(saved), assign=assign)
        assert losses(criterion) == after
    logits, y, _ = batch(0)
    before = criterion(logits, y)
    criterion.controls[CONTROL_INDEX["e"]] = 0.9  # in place, as a broadcast does it
    assert criterion(logits, y) != before


@pytest.mark.parametrize("stopped", [5, 6], ids=["between refreshes", "at one"])
def test_a_policy_that_reads_the_model_continues_bit_for_bit(stopped):
    """Gradient norm and Hessian trace, also where the first thing after the restart is a refresh."""
    x = torch.from_numpy(random_generator("resumed").normal(size=(8, 3))).float()

    def parts():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        criterion = AdaptiveLoss(artefact(kind="palf", basis=("ce", "focal")), total_steps=20)
        return model, torch.optim.Adam(model.parameters()), criterion

    def train(model, optimizer, criterion, steps):
        for step in steps:
            criterion(model(x), batch(step)[1]).backward()
            criterion.step(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        return [*model.parameters(), criterion.controls]

    whole = train(*parts(), range(10))
    first, second = parts(), parts()
    train(*first, range(stopped))
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    for ours, theirs in zip(train(*second, range(stopped, 10)), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_a_release_with_fewer_basis_losses_is_read_by_names():
    """Its controls are those of then, one after the other: what follows alpha stood elsewhere."""

    def trained():
        criterion = AdaptiveLoss(artefact(), total_steps=20)
        for step in range(2):
            logits, y, index = batch(step)
            criterion(logits, y, index=index)
            criterion.step(nn.Identity())
        return criterion

    new, old = trained(), trained().state_dict()
    old["controls"] = old["controls"][[CONTROL_INDEX[name] for name in FIRST_CONTROLS]]
    assert old["controls"].shape == (15,)
    restored = AdaptiveLoss(artefact(), total_steps=20)
    restored.load_state_dict(old)
    assert torch.equal(restored.controls, new.controls) and old["controls"].shape == (15,)
    logits, y, index = batch(2)  # before the next refresh
    assert torch.equal(restored(logits, y, index=index), new(logits, y, index=index))


def test_only_a_recurrent_policy_keeps_what_it_has_seen():
    criterion = AdaptiveLoss(artefact(kind="recurrent"), total_steps=20)
    for step in range(7):
        logits, y, index = batch(step)
        criterion(logits, y, index=index)
        criterion.step(nn.Identity())
    assert criterion.state_dict()["history"].shape == (1, 3, len(criterion.policy.features)), "refreshed at 0, 3 and 6"
    assert "history" not in AdaptiveLoss(artefact(), total_steps=20).state_dict()


def test_a_state_of_another_policy_is_refused():
    other = artefact()
    other.phi[0] += 1
    with pytest.raises(ConfigError, match="another policy"):
        AdaptiveLoss(artefact(), total_steps=5).load_state_dict(AdaptiveLoss(other, total_steps=5).state_dict())
