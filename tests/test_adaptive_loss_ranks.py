"""The drop-in under DistributedDataParallel and FSDP: two real processes, against one that has the rows of both."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from palf_dist.adaptive_loss import AdaptiveLoss
from palf_dist.data_parallel import last_of_each
from palf_dist.policies import HedgePolicy
from palf_dist.randomness import random_generator
from tests.adaptive_cases import artefact

RANKS, STEPS, ROWS = 2, 10, 8  # of one rank; as many as the Hessian trace is read on


def joint_batch(step: int):
    """Inputs, labels and row numbers of all ranks; some rows are in it twice, as a DistributedSampler's last ones."""
    draw = random_generator("ranks", step)
    x = torch.from_numpy(draw.normal(size=(RANKS * ROWS, 3))).float()
    y = torch.from_numpy(draw.integers(0, 4, len(x)))
    return x, y, torch.from_numpy(draw.integers(0, 30, len(x)))


TRAINING_ROWS = joint_batch(100)[:2]
CASES = {
    "robust": ({"kind": "robust"}, {"target_prior": "uniform", "class_counts": [20, 10, 30, 4]}),
    "recurrent": ({"kind": "recurrent"}, {}),
    "averages": ({"basis": ("elr", "robust_ce", "bootstrap"), "hyperparameters": ("lam", "beta", "ew")}, {}),
    "informed": ({"kind": "informed"}, {"training_rows": TRAINING_ROWS}),
    "six features": ({"kind": "palf", "basis": ("ce", "focal")}, {}),
    "gradient norm": ({"features": ("gradient_norm", "loss")}, {}),
    "Hessian trace": ({"features": ("hessian_trace", "loss")}, {}),
    "snapshots": (HedgePolicy(refresh=3), {}),
}
pytestmark = pytest.mark.filterwarnings("ignore:AdaptiveLoss. no (index|optimizer)")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def loss_of(case: str, model: nn.Module) -> AdaptiveLoss:
    policy, settings = CASES[case]
    if case == "informed":
        x, y, _ = joint_batch(101)
        settings = settings | {"validation": lambda: (model(x), y)}
    return AdaptiveLoss(artefact(**policy) if isinstance(policy, dict) else policy, total_steps=20, **settings)


def train(case: str, model: nn.Module, criterion: AdaptiveLoss, rank: int | None, steps: range) -> list[torch.Tensor]:
    """Controls after each step, then the parameters; ``rank`` None: all rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    found = []
    for step in steps:
        x, y, index = joint_batch(step) if rank is None else (part.chunk(RANKS)[rank] for part in joint_batch(step))
        criterion(model(x), y, index=None if case == "six features" else index).backward()
        criterion.step(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found.append(criterion.controls.clone())
    return found + [parameter.detach().clone() for parameter in model.parameters()]


def take_uneven_batches(criterion: AdaptiveLoss, rank: int | None, ignored: tuple[int, ...] = (3, 5, 8, 16)) -> dict:
    """Batches of which so many rows, from the first one on, have no label: those of rank 0, or all. No training."""
    weight = nn.Parameter(torch.cat([torch.eye(3), torch.ones(3, 1)], 1))
    for step in range(STEPS):
        x, y, index = joint_batch(step)
        z = x @ weight
        y[: ignored[step % len(ignored)]] = -100
        if rank is not None:
            z, y, index = (part.chunk(RANKS)[rank] for part in (z, y, index))
        criterion(z, y, index=index)
        criterion.step(nn.Identity())
    return criterion.state_dict()


def on_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(minutes=1)
    )
    found = {}
    for case in CASES:
        model = DistributedDataParallel(make_model())
        criterion = loss_of(case, model)
        whole = train(case, model, criterion, rank, range(STEPS))
        found[case] = {"whole": whole, "state": criterion.state_dict()}
        for stopped in (5, 6):  # between two refreshes and at one
            model = DistributedDataParallel(make_model())
            criterion = loss_of(case, model)
            train(case, model, criterion, rank, range(stopped))
            saved = [criterion.state_dict()]
            distributed.broadcast_object_list(saved)  # that of rank 0, for all
            again = loss_of(case, model)
            again.load_state_dict(saved[0])
            assert torch.equal(again.controls, criterion.controls)
            resumed = train(case, model, again, rank, range(stopped, STEPS))
            found[case][f"resumed {stopped}"] = resumed
    found["uneven"] = take_uneven_batches(loss_of("robust", nn.Identity()), rank)
    found["without labels"] = take_uneven_batches(loss_of("Hessian trace", nn.Identity()), rank, (ROWS,))
    static = DistributedDataParallel(make_model(), static_graph=True)
    found["static graph"] = train("Hessian trace", static, loss_of("Hessian trace", static), rank, range(STEPS))
    sharded = make_model()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    found["sharded"] = train("gradient norm", sharded, loss_of("gradient norm", sharded), rank, range(STEPS))[:STEPS]
    x, y, _ = (part.chunk(RANKS)[rank] for part in joint_batch(0))
    loss = loss_of("Hessian trace", sharded)(sharded(x), y if rank else torch.full_like(y, -100))
    loss.backward()
    found["sharded, without labels"] = loss.detach()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(on_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def same_bits(ours: dict, theirs: dict) -> None:
    ours, theirs = copy.copy(ours), copy.copy(theirs)
    assert ours.pop("_extra_state") == theirs.pop("_extra_state")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one_that_has_all_rows(found: list[dict], case: str) -> None:
    """The posterior weights too, which are relative to the batch; but for the rounding of DDP's mean."""
    model = make_model()
    criterion = loss_of(case, model)
    whole = train(case, model, criterion, None, range(STEPS))
    torch.testing.assert_close(found[0][case]["whole"], whole, rtol=1e-4, atol=1e-5)
    assert found[0][case]["state"]["_extra_state"]["refreshed_at"] == 9
    model = make_model()
    alone = train(case, model, loss_of(case, model), 0, range(STEPS))
    assert not torch.allclose(alone[9], whole[9], rtol=1e-4, atol=1e-5), "own rows say the same: the test cannot fail"


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_to_the_bit(found: list[dict], case: str) -> None:
    first, second = (each[case] for each in found)
    assert all(torch.equal(a, b) for a, b in zip(first["whole"], second["whole"], strict=True))
    same_bits(first["state"], second["state"])


@pytest.mark.parametrize("stopped", [5, 6])
@pytest.mark.parametrize("case", CASES)
def test_the_state_of_rank_0_resumes_all_to_the_bit(found: list[dict], case: str, stopped: int) -> None:
    for each in found:
        resumed, whole = each[case][f"resumed {stopped}"], each[case]["whole"][stopped:]
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_a_rank_without_labels_leaves_the_trace_to_the_others(found: list[dict]) -> None:
    whole = take_uneven_batches(loss_of("Hessian trace", nn.Identity()), None, (ROWS,))
    for each in found:
        torch.testing.assert_close(each["without labels"]["controls"], whole["controls"])


def test_the_trace_does_not_take_the_one_backward_pass_of_a_static_graph(found: list[dict]) -> None:
    """It did, and the models of the ranks parted."""
    first, second = (each["static graph"] for each in found)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[STEPS - 1].any()


def test_sharded_gradients_have_the_norm_of_whole_ones(found: list[dict]) -> None:
    whole = train("gradient norm", make_model(), loss_of("gradient norm", nn.Identity()), None, range(STEPS))
    for each in found:
        torch.testing.assert_close(each["sharded"], whole[:STEPS], rtol=1e-4, atol=1e-5)


def test_a_rank_without_labels_makes_the_backward_passes_of_a_sharded_model(found: list[dict]) -> None:
    """Which gather parameters, so that the others would wait for it."""
    assert [each["sharded, without labels"].isfinite().item() for each in found] == [False, True]


def test_a_row_that_is_there_twice_is_written_as_the_last_one() -> None:
    """Whatever the order of writing, which a GPU or several threads choose."""
    assert last_of_each(torch.tensor([5, 3, 5, 3, 7])).tolist() == [2, 3, 2, 3, 4]


def test_ranks_may_have_different_numbers_of_labels(found: list[dict]) -> None:
    same_bits(found[0]["uneven"], found[1]["uneven"])
    same_bits(found[0]["uneven"], take_uneven_batches(loss_of("robust", nn.Identity()), None))
