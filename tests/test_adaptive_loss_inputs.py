"""What the drop-in loss is given: arguments and batches that it refuses, what it warns of, and other devices."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.errors import ConfigError
from tests.adaptive_cases import artefact, batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(total_steps=0), "total_steps: 0"),
        (dict(total_steps=-3), "total_steps: -3"),
        (dict(total_steps=2.5), "total_steps: 2.5"),
        (dict(total_steps=True), "total_steps: True"),
        (dict(target_prior="uniform"), "class_counts: needed"),
        (dict(target_prior="balanced"), "target_prior: 'balanced' is unknown"),
        (dict(class_counts=[1, 2], target_prior=[0.5, 0.5, 0.0]), "target_prior: .* for each of 2 classes"),
        (dict(class_counts=[1, 2], target_prior=[1.0, 0.0]), "target_prior: .* frequency > 0"),
        (dict(class_counts=[1, -2]), "class_counts"),
        (dict(class_counts=[0, 0]), "class_counts"),
        (dict(class_counts=[3]), "class_counts"),
        (dict(class_counts=[1.0, float("nan")]), "class_counts"),
        (dict(class_counts=[0.9, 0.1]), "class_counts: .* whole numbers .*not frequencies"),
        (dict(class_counts=[10, 2.5]), "class_counts: .* whole numbers"),
        (dict(class_counts=[1.0, 0.0]), "class_counts: .* sum of at least the number of classes"),
    ],
    ids=str,
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveLoss(artefact(), **{"total_steps": 5, **settings})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 2), "training_rows: needs a pair of tensors"),
        ((torch.zeros(3, 2), torch.zeros(4).long()), r"training_rows: shapes \(3, 2\) and \(4,\) do not fit"),
        ((torch.zeros(3), torch.zeros(3).long()), r"training_rows: shapes \(3,\) and"),
        ((torch.zeros(1, 2), torch.zeros(1).long()), "training_rows: .* two rows or more"),
        ((torch.zeros(3, 2), torch.zeros(3)), "training_rows: labels are torch.float32; needs whole numbers"),
        (
            (torch.zeros(3, 2).long(), torch.zeros(3).long()),
            "training_rows: inputs are torch.int64; .* or leave it out",
        ),
    ],
    ids=str,
)
def test_training_rows_that_do_not_fit(rows, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveLoss(artefact(kind="informed"), total_steps=5, training_rows=rows, validation=lambda: None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "validation: needs a pair of tensors"),
        (
            (torch.zeros(3, 2), torch.zeros(3).long()),
            r"validation: returned logits of shape \(3, 2\), .* have 4 classes",
        ),
        ((torch.zeros(3, 4), torch.tensor([0, 4, 1])), "validation: a label is outside of 0 to 3"),
        ((torch.zeros(3, 4), torch.tensor([0, -100, 1])), "validation: a label is outside of 0 to 3"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:AdaptiveLoss. no training_rows")
def test_validation_rows_that_do_not_fit(rows, message):
    logits, y, index = batch(0)
    with pytest.raises(ConfigError, match=message):
        AdaptiveLoss(artefact(kind="informed"), total_steps=5, validation=lambda: rows)(logits, y, index=index)


@pytest.mark.parametrize("given", [3, (torch.zeros(2, 3), torch.zeros(2))])
def test_validation_rows_come_from_a_function(given):
    with pytest.raises(
        ConfigError, match=f"validation: {type(given).__name__} given; needs a function of no arguments"
    ):
        AdaptiveLoss(artefact(kind="informed"), total_steps=5, validation=given)


def test_rows_that_a_policy_reads_are_asked_for_once_and_not_by_others():
    with pytest.warns(UserWarning) as said:
        AdaptiveLoss(artefact(kind="informed"), total_steps=5)
    assert [str(each.message).split(":")[1] for each in said] == [" no validation", " no training_rows"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveLoss(artefact(), total_steps=5)
        criterion = AdaptiveLoss(artefact(), total_steps=5, validation=lambda: 1 / 0)  # not read, so not called
        logits, y, index = batch(0)
        criterion(logits, y, index=index)


def test_a_policy_that_adapts_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.kind: a maml policy .* parameters.* another kind"):
        AdaptiveLoss(artefact(kind="maml"), total_steps=5)


def test_a_policy_with_a_shield_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.shield: .* \(0\.5\), .*logits alone.* Meta-train a policy without"):
        AdaptiveLoss(artefact(shield=0.5), total_steps=5)


def test_batches_that_do_not_fit():
    logits, y, index = batch(0)
    criterion = AdaptiveLoss(artefact(basis=("ce", "info_nce")), total_steps=5, class_counts=[1, 1, 1, 1])
    with pytest.raises(ConfigError, match="pass the penultimate features"):
        criterion(logits, y, index=index)
    with pytest.raises(ConfigError, match="but logits have 3"):
        criterion(logits[:, :3], y.clamp(max=2), logits)
    with pytest.raises(ConfigError, match="whole labels"):
        criterion(logits, y[:3])
    with pytest.raises(ConfigError, match="whole labels"):
        criterion(logits, y.float())
    for wrong in (-1, 4):
        with pytest.raises(ConfigError, match=f"y: labels .*{wrong}.* logits have 4 classes; needs labels from 0"):
            criterion(logits, y.index_fill(0, torch.tensor(2), wrong), logits)
    with pytest.raises(ConfigError, match="the batch is empty"):
        criterion(logits[:0], y[:0], logits[:0])
    with pytest.raises(ConfigError, match="one whole row number"):
        criterion(logits, y, logits, index[:2])
    with pytest.raises(ConfigError, match="index: list given; needs a tensor of whole row numbers"):
        criterion(logits, y, logits, index.tolist())
    with pytest.raises(ConfigError, match="row -1 is negative"):
        criterion(logits, y, logits, index - index.min() - 1)


def test_it_warns_once_without_index():
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    logits, y, _ = batch(0)
    with pytest.warns(UserWarning, match="pass index=row numbers"):
        criterion(logits, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(logits, y)


def test_it_warns_once_where_the_weight_decay_goes_nowhere():
    logits, y, index = batch(0)
    criterion = AdaptiveLoss(artefact(hyperparameters=("wd",)), total_steps=5)
    criterion(logits, y, index=index)
    assert criterion.weight_decay_multiplier != 1
    layer = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.step(layer, torch.optim.SGD(layer.parameters()))
    with pytest.warns(UserWarning, match="weight decay is left out; pass it as step"):
        criterion.step(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.step(layer)
        without = AdaptiveLoss(artefact(hyperparameters=("e",)), total_steps=5)
        without(logits, y, index=index)
        without.step(layer)


def test_it_needs_no_index_where_the_policy_remembers_nothing():
    forgetful = artefact(features=("time", "loss"), basis=("ce", "focal"))
    without, given = (AdaptiveLoss(forgetful, total_steps=5) for _ in range(2))
    logits, labels, index = batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = without(logits, labels)
    assert torch.equal(loss, given(logits, labels, index=index))
    assert not len(given.averages.averaged), "no memory for what nobody reads"


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="fake tensors of torch 2.9 stay on devices that are there")
@pytest.mark.filterwarnings("ignore:AdaptiveLoss. no index")
def test_it_follows_the_logits_to_another_device(monkeypatch):
    """Fake tensors compute nothing but refuse operations between devices. They have no values, so those are made up;
    "lazy" stands for a GPU, since a build of torch without CUDA cannot index even fake CUDA tensors."""
    for name, value in (("__bool__", True), ("__int__", 0), ("__float__", 1.0)):
        monkeypatch.setattr(FakeTensor, name, lambda _, value=value: value)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows real devices only
    policy, other = artefact(hyperparameters=("e",)), artefact(hyperparameters=("e",), basis=("ce", "info_nce"))
    criteria = [
        AdaptiveLoss(policy, total_steps=20, class_counts=[10, 20, 5, 15], target_prior="uniform"),
        AdaptiveLoss(other, total_steps=20),
    ]
    logits, y, index = (part.detach() for part in batch(0))
    features = torch.ones(8, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, features, index = (mode.from_tensor(part) for part in (logits, features, index))
        for device in ("lazy:0", "cpu", "lazy:0"):
            for criterion in criteria:
                for _ in range(4):  # past a refresh
                    with_index = None if criterion.class_counts is None else index
                    assert criterion(logits.to(device), y, features.to(device), with_index).device == torch.device(
                        device
                    )
                    criterion.step(nn.Identity())
                    assert {buffer.device for buffer in criterion.buffers()} == {torch.device(device)}


def test_each_warning_names_the_users_line():
    """Through nn.Module, no_grad and what keeps the loss out of compiled graphs."""
    logits, y, _ = batch(0)
    layer = nn.Linear(2, 2)
    with pytest.warns(UserWarning) as said:
        criterion = AdaptiveLoss(artefact(kind="informed", hyperparameters=("wd",)), total_steps=5)
        criterion(logits, y)
        criterion.step(layer)
    topics = [" no validation", " no training_rows", " no index", " no optimizer"]
    assert [str(each.message).split(":")[1] for each in said] == topics
    assert {each.filename for each in said} == {__file__}


def test_one_step_scales_the_weight_decay_of_all_optimizers():
    logits, y, index = batch(0)
    criterion = AdaptiveLoss(artefact(hyperparameters=("wd",)), total_steps=5)
    layer = nn.Linear(2, 2)
    first, second = (
        torch.optim.SGD([part], weight_decay=decay)
        for part, decay in zip((layer.weight, layer.bias), (0.1, 0.3), strict=True)
    )
    for _ in range(2):
        criterion(logits, y, index=index)
        criterion.step(layer, first, second)
    by = criterion.weight_decay_multiplier
    assert by != 1
    assert [each.param_groups[0]["weight_decay"] for each in (first, second)] == [0.1 * by, 0.3 * by]
    assert criterion.state_dict()["_extra_state"]["step"] == 2
