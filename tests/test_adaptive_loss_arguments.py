"""The arguments that the drop-in shares with torch's cross-entropy mean there what they mean to torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.errors import ConfigError
from palf_dist.types import CONTROL_INDEX
from tests.adaptive_cases import artefact, batch, untrained
from tests.loss_cases import LOGIT_BASIS

pytestmark = pytest.mark.filterwarnings("ignore:AdaptiveLoss. no (index|optimizer)")

CLASSES = 4
PLAIN = untrained(kind="constant", basis=("ce",), hyperparameters=())


def gradient(loss: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Of a loss of any shape, its elements weighed differently."""
    (found,) = torch.autograd.grad((loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum(), z)
    return found


@given(
    shape=st.sampled_from([(), (1,), (5,), (3, 2), (2, 3, 2)]),
    soft=st.booleans(),
    weights=st.none() | st.lists(st.floats(0, 3), min_size=CLASSES, max_size=CLASSES),
    ignore_index=st.sampled_from([-100, 1]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_plain_policy_is_torchs_cross_entropy(
    shape, soft, weights, ignore_index, reduction, label_smoothing, training, seed
):
    """Value and gradient, NaN where it has it: all labels ignored, or of no weight."""
    draw = torch.Generator().manual_seed(seed)
    place = min(1, len(shape))
    shape_of_logits = (*shape[:place], CLASSES, *shape[place:])
    z = (3 * torch.randn(shape_of_logits, generator=draw, dtype=torch.float64)).requires_grad_()
    if soft:
        y, ignore_index = torch.rand(shape_of_logits, generator=draw, dtype=torch.float64), -100
        y = y / y.sum(place, keepdim=True)
    else:
        y = torch.randint(CLASSES, shape, generator=draw)
        y = y.where(torch.rand(shape, generator=draw) < 0.7, ignore_index)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    arguments = {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    ours = AdaptiveLoss(PLAIN, total_steps=5, **arguments).train(training)(z, y)
    theirs = functional.cross_entropy(z, y, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(gradient(ours, z), gradient(theirs, z), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("prior", ["train", "uniform"])
@pytest.mark.parametrize("basis", [(name,) for name in LOGIT_BASIS] + [LOGIT_BASIS], ids="+".join)
def test_a_soft_target_is_the_mean_over_labels(basis, prior):
    """Of each basis loss, with averages of the rows and class weights: of one-hot targets those of the labels, and
    linear in the target."""
    criterion = AdaptiveLoss(
        artefact(basis=basis, hyperparameters=()),
        total_steps=5,
        class_counts=[100, 50, 10, 10],
        target_prior=prior,
        weight=[1.0, 2.0, 0.5, 0.0],
        reduction="none",
    )
    z, y, index = batch(0)
    criterion(2 * z.detach(), y, index=index)  # so that every row has an average
    saved = criterion.state_dict()

    def value_and_gradient(target):
        criterion.load_state_dict(saved)
        loss = criterion(z, target, index=index)
        return loss.detach(), gradient(loss, z)

    def mixed(share):
        """A target whose likeliest class stays y."""
        return (1 - share) * functional.one_hot(y, CLASSES) + share * other

    other = torch.softmax(batch(1)[0].detach(), 1)
    exact = {share: value_and_gradient(mixed(share)) for share in (0.0, 0.2, 0.4)}
    torch.testing.assert_close(exact[0.0], value_and_gradient(y), rtol=1e-5, atol=1e-6)
    for start, middle, end in zip(*exact.values(), strict=True):
        torch.testing.assert_close(middle, (start + end) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(exact[0.0][0], exact[0.4][0]), "the target makes no difference: the test cannot fail"


def test_label_smoothing_is_a_soft_target_whose_label_the_policy_reads():
    z, y, index = batch(0)
    smooth = AdaptiveLoss(artefact(), total_steps=5, label_smoothing=0.3)
    soft = AdaptiveLoss(artefact(), total_steps=5)
    target = 0.7 * functional.one_hot(y, CLASSES) + 0.3 / CLASSES
    torch.testing.assert_close(smooth(z, y, index=index), soft(z, target, index=index))
    assert torch.equal(smooth.controls, soft.controls)


def test_ignored_rows_are_as_if_they_were_not_there():
    """Nothing that a later step reads knows of them."""
    ignoring, without = (AdaptiveLoss(artefact(), total_steps=20) for _ in range(2))
    for step in range(5):
        z, y, index = batch(step)
        ignored = torch.arange(8) < (8 if step == 2 else 3)
        loss = ignoring(z, y.where(~ignored, -100), index=index)
        if step == 2:
            assert loss.isnan() and torch.equal(gradient(loss, z), torch.zeros_like(z)), "as torch's"
        else:
            assert torch.equal(loss, without(z[3:], y[3:], index=index[3:]))
        ignoring.step(torch.nn.Identity())
        without.step(torch.nn.Identity())
    ours, theirs = ignoring.state_dict(), without.state_dict()
    assert ours.pop("_extra_state") == theirs.pop("_extra_state")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_refresh_without_a_label_is_made_up_for_at_the_next_step():
    criterion = AdaptiveLoss(artefact(), total_steps=20)
    z, y, index = batch(0)
    assert criterion(z, torch.full_like(y, -100), index=index).isnan()
    criterion.step(torch.nn.Identity())
    assert not criterion.controls.any()
    assert criterion(z, y, index=index) > 0 and criterion.controls.any()
    refreshed = []
    for _ in range(6):
        before = criterion.controls
        criterion.step(torch.nn.Identity())
        criterion(z, y, index=index)
        refreshed.append(criterion.controls is not before)
    assert refreshed == [False, True, False, False, True, False], "at steps 3 and 6, where it is due"


def test_dense_predictions_are_rows():
    """[n, C, d] with one row number per label is [n d, C], posterior weights included."""
    z = torch.randn(3, CLASSES, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(CLASSES, (3, 5), generator=torch.Generator().manual_seed(1))
    index = torch.arange(15).view(3, 5)
    dense, flat = (AdaptiveLoss(artefact(), total_steps=5, reduction="none") for _ in range(2))
    for scale in (1, 2):
        ours = dense(scale * z, y, index=index)
        theirs = flat(scale * z.movedim(1, 2).reshape(15, CLASSES), y.flatten(), index=index.flatten())
        assert torch.equal(ours, theirs.view(3, 5))
    assert torch.equal(dense.averages.averaged, flat.averages.averaged)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_labels_of_other_whole_number_types(dtype, training):
    """Class 156 in a byte has the bits of -100, which is not to be ignored."""
    y = torch.tensor([1, 0 if dtype is torch.bool else 156])
    z = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    found = AdaptiveLoss(PLAIN, total_steps=5).train(training)(z, y.to(dtype))
    torch.testing.assert_close(found, functional.cross_entropy(z, y))


def test_the_arguments_are_attributes_that_may_be_set_later():
    """As some training loops do with any loss, to see the loss of each example."""
    settings = dict(weight=[1, 2, 3, 4], ignore_index=1, reduction="none", label_smoothing=0.1)
    given, set_later = AdaptiveLoss(artefact(), total_steps=5, **settings), AdaptiveLoss(artefact(), total_steps=5)
    for name in settings:
        setattr(set_later, name, getattr(given, name))
    z, y, index = batch(0)
    for training in (True, False):
        losses = [criterion.train(training)(z, y, index=index) for criterion in (given, set_later)]
        assert torch.equal(*losses) and losses[0].shape == (8,)
    set_later.train().reduction = "batchmean"
    with pytest.raises(ConfigError, match="reduction: 'batchmean' is unknown"):
        set_later(z, y, index=index)


def test_labels_are_counted_exactly_where_there_are_millions():
    """Of pixels and tokens there are; the state of a release that counted in float32 is read."""
    criterion = AdaptiveLoss(artefact(), total_steps=5)
    z, y, index = batch(0)
    criterion(z, y, index=index)
    saved = criterion.state_dict()
    saved["label_counts"] = torch.full((CLASSES,), 2.0**24)
    criterion.load_state_dict(saved)
    criterion(z, y, index=index)
    assert torch.equal(criterion.label_counts, 2**24 + y.bincount(minlength=CLASSES))


def test_class_weights_weigh_whole_losses():
    """The mean is relative to the weights of the labels, and the policy does not read them."""
    z, y, index = batch(0)
    each = AdaptiveLoss(artefact(), total_steps=5, reduction="none")
    weighed = AdaptiveLoss(artefact(), total_steps=5, weight=[1, 2, 3, 4])
    values, scale = each(z, y, index=index), torch.tensor([1.0, 2, 3, 4])[y]
    torch.testing.assert_close(weighed(z, y, index=index), (values * scale).sum() / scale.sum())
    assert torch.equal(each.controls, weighed.controls)
    assert weighed.state_dict().keys() == each.state_dict().keys(), "an argument, not a state"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_half_precision_under_autocast(dtype, soft):
    z, y, index = batch(0)
    target = torch.softmax(batch(1)[0].detach(), 1).to(dtype) if soft else y
    low = z.detach().to(dtype).requires_grad_()
    criterion = AdaptiveLoss(artefact(), total_steps=5, weight=[1, 2, 3, 4], label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(low, target, index=index)
        judged = criterion.eval()(low, target)
    loss.backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == dtype and low.grad.isfinite().all()
    exact = AdaptiveLoss(artefact(), total_steps=5, weight=[1, 2, 3, 4], label_smoothing=0.1)
    wanted = exact(low.detach().float(), target.float() if soft else y, index=index)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert judged.isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reduction="batchmean"), "reduction: 'batchmean' is unknown; give 'none', 'mean' or 'sum'"),
        (dict(ignore_index=None), "ignore_index: None is no whole number"),
        (dict(label_smoothing=1.5), "label_smoothing: 1.5 is not between 0 and 1"),
        (dict(label_smoothing=float("nan")), "label_smoothing: nan"),
        (dict(weight=[1.0, -1.0]), "weight: .* finite number >= 0 for each class"),
        (dict(weight=[1.0, float("inf")]), "weight: "),
        (dict(label_smoothing="0.1"), "label_smoothing: '0.1'"),
        (dict(weight=2.0), "weight: 2.0"),
        (dict(weight="balanced"), "weight: 'balanced' given; needs one finite number"),
        (dict(weight=[[1.0], [2.0, 3.0]]), "weight: "),
    ],
    ids=str,
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveLoss(artefact(), total_steps=5, **settings)


def test_batches_that_do_not_fit():
    z, y, index = batch(0)
    criterion = AdaptiveLoss(artefact(), total_steps=5, weight=[1, 2, 3, 4])
    with pytest.raises(ConfigError, match="weight: 4 classes given, but logits have 3"):
        criterion(z[:, :3], y)
    for target in (y[:, None], torch.ones(8, 3), torch.ones(8)):
        with pytest.raises(ConfigError, match="whole labels of that shape without C, or probabilities of that shape"):
            criterion(z, target)
    with pytest.raises(ConfigError, match="one whole row number per label"):
        criterion(z[..., None], y[:, None], index=index)
    with pytest.raises(ConfigError, match="ignore_index: 1 is no label of probabilities"):
        AdaptiveLoss(artefact(), total_steps=5, ignore_index=1)(z, torch.softmax(z, 1))


def test_info_nce_compares_whole_labels():
    contrastive = artefact(basis=("ce", "info_nce"))
    with pytest.raises(ConfigError, match=r"label_smoothing: .* info_nce"):
        AdaptiveLoss(contrastive, total_steps=5, label_smoothing=0.1)
    criterion = AdaptiveLoss(contrastive, total_steps=5)
    z, y, index = batch(0)
    for target, smoothing in ((torch.softmax(z, 1), 0.0), (y, 0.1)):
        criterion.label_smoothing = smoothing
        with pytest.raises(ConfigError, match=r"y: .* info_nce, .* no probabilities or smoothed"):
            criterion(z, target, z)
    criterion.label_smoothing = 0.0
    with pytest.raises(ConfigError, match=r"features: \[8, 4\] given; needs \[n, D\] for logits \[n, C\]"):
        criterion(z[..., None], y[:, None], z)
    with pytest.raises(ConfigError, match=r"features: \[7, 4\] given"):
        criterion(z, y, z[:7])
    some = criterion(z, y.where(torch.arange(8) > 2, -100), z, index)
    assert torch.equal(some, AdaptiveLoss(contrastive, total_steps=5)(z[3:], y[3:], z[3:], index[3:]))
    assert criterion.controls[CONTROL_INDEX["info_nce"]] > 0
