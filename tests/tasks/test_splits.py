from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from palf_dist.config import TasksConfig
from palf_dist.errors import DataError
from palf_dist.tasks.splits import (
    MIN_CLASS_ROWS,
    SPLITS,
    draw_rows,
    imbalanced_capacity,
    num_task_classes,
    train_capacity,
)
from tests.tasks.cases import task_spec, toy_dataset

TASKS = TasksConfig()


@st.composite
def tasks_and_specs(draw: st.DrawFn) -> tuple[TasksConfig, object, object]:
    tasks = TasksConfig(
        validation_share=draw(st.floats(0.1, 1)),
        meta_validation_size=draw(st.integers(8, 300)),
        test_size=draw(st.integers(8, 900)),
    )
    rows, classes = draw(st.integers(60, 2000)), draw(st.integers(2, 12))
    assume(rows >= 25 * classes)
    dataset = toy_dataset(rows=rows, classes=classes, seed=draw(st.integers(0, 99)))
    spec = task_spec(
        keys=(draw(st.integers(0, 2**32)), "x"),
        train_size=draw(st.integers(min(20, train_capacity(dataset, tasks)), train_capacity(dataset, tasks))),
        imbalance=draw(st.sampled_from([1.0, 3.0, 10.0])),
        target_prior=draw(st.sampled_from(["train", "uniform"])),
    )
    return tasks, dataset, spec


@given(tasks_and_specs())
def test_no_row_is_in_two_splits_and_every_split_has_two_classes(case: tuple) -> None:
    tasks, dataset, spec = case
    task = draw_rows(dataset, spec, tasks)
    together = np.concatenate([task.rows[split] for split in SPLITS])
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0 and together.max() < dataset.rows
    for split in SPLITS:
        assert len(np.unique(task.labels[task.rows[split]])) >= 2
    np.testing.assert_array_equal(task.labels[together], dataset.labels[together])
    assert len(task.rows["train"]) <= spec.train_size
    assert len(task.rows["test"]) <= tasks.test_size
    assert len(task.rows["meta_validation"]) <= tasks.meta_validation_size


@given(tasks_and_specs())
def test_the_draw_depends_on_the_keys_alone(case: tuple) -> None:
    tasks, dataset, spec = case
    first, again = draw_rows(dataset, spec, tasks), draw_rows(dataset, spec, tasks)
    other = draw_rows(dataset, dataclasses.replace(spec, keys=(*spec.keys, 1)), tasks)
    for split in SPLITS:
        np.testing.assert_array_equal(first.rows[split], again.rows[split])
    assert any(not np.array_equal(first.rows[split], other.rows[split]) for split in SPLITS)


def counts(imbalance: float, target_prior: str, split: str, rows: int = 20_000) -> np.ndarray:
    spec = task_spec(train_size=800, imbalance=imbalance, target_prior=target_prior)
    task = draw_rows(toy_dataset(rows=rows, classes=4), spec, TASKS)
    return np.bincount(task.labels[task.rows[split]], minlength=4)


def test_sizes_are_those_asked_for_where_the_data_is_large() -> None:
    expected = {"train": 800, "validation": 200, "meta_validation": 128, "test": 500}
    assert {split: counts(1.0, "train", split).sum() for split in SPLITS} == expected


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("target_prior", ["train", "uniform"])
def test_training_and_validation_follow_the_exponential_profile(split: str, target_prior: str) -> None:
    ordered = np.sort(counts(10.0, target_prior, split))[::-1]
    profile = 10 ** -np.linspace(0, 1, 4)
    np.testing.assert_allclose(ordered, ordered.sum() * profile / profile.sum(), atol=1)


@pytest.mark.parametrize("split", ["test", "meta_validation"])
def test_the_target_prior_decides_the_clean_splits(split: str) -> None:
    train = counts(10.0, "train", "train")
    matched = counts(10.0, "train", split)
    np.testing.assert_allclose(matched / matched.sum(), train / train.sum(), atol=1.5 / matched.sum())
    uniform = counts(10.0, "uniform", split)
    assert uniform.max() - uniform.min() <= 1


def test_small_data_shrinks_every_split_and_keeps_the_frequencies() -> None:
    spec = task_spec(train_size=50, imbalance=10.0, target_prior="train")
    task = draw_rows(toy_dataset(rows=150, classes=3), spec, TASKS)
    assert 15 <= len(task.rows["test"]) <= 45 and 8 <= len(task.rows["meta_validation"]) <= 23
    train = np.bincount(task.labels[task.rows["train"]])
    test = np.bincount(task.labels[task.rows["test"]], minlength=3)
    np.testing.assert_allclose(test / test.sum(), train / train.sum(), atol=1.5 / test.sum() + 1 / train.sum())


def test_rare_classes_are_left_out() -> None:
    labels = np.array([0] * 100 + [1] * (MIN_CLASS_ROWS - 1) + [2] * 100 + [3] * MIN_CLASS_ROWS)
    dataset = toy_dataset(rows=len(labels), classes=4, labels=labels)
    assert num_task_classes(dataset) == 3
    task = draw_rows(dataset, task_spec(train_size=80), TASKS)
    drawn = np.concatenate([task.rows[split] for split in SPLITS])
    assert 1 not in labels[drawn]
    assert set(task.labels[labels == 1]) == {-1}
    assert [set(task.labels[labels == value]) for value in (0, 2, 3)] == [{0}, {1}, {2}]
    assert 3 in labels[task.rows["test"]]


def test_a_rare_class_is_in_small_splits_too() -> None:
    labels = np.array([0] * 980 + [1] * 20)
    dataset = toy_dataset(rows=1000, classes=2, labels=labels)
    for seed in range(20):
        task = draw_rows(dataset, task_spec(keys=(seed,), train_size=60), TASKS)
        assert all((task.labels[task.rows[split]] == 1).any() for split in SPLITS)


def test_training_size_larger_than_the_data() -> None:
    with pytest.raises(DataError, match=r"^toy: a training size of 5000 is larger .* 400 rows 176 can.*train_size"):
        draw_rows(toy_dataset(rows=400, classes=2), task_spec(train_size=5000), TASKS)


@pytest.mark.parametrize(("rows", "found"), [((7, 7, 7), 0), ((100, 7, 7), 1)])
def test_a_dataset_without_two_classes_that_have_enough_rows(rows: tuple[int, ...], found: int) -> None:
    labels = np.repeat(np.arange(3), rows)
    dataset = toy_dataset(rows=len(labels), classes=3, labels=labels)
    for call in (lambda: train_capacity(dataset, TASKS), lambda: draw_rows(dataset, task_spec(train_size=5), TASKS)):
        with pytest.raises(
            DataError, match=f"^toy: {found} of its 3 classes have 8 rows or more, and a task needs two;"
        ):
            call()


def test_a_dataset_too_small_for_two_classes_in_each_split() -> None:
    with pytest.raises(DataError, match=r"^toy: its 400 rows give a task 1 test rows, not enough for two classes"):
        draw_rows(toy_dataset(rows=400), task_spec(), TasksConfig(test_size=1))


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ((2000, 2000), 2),
        ((3800, 200), 2),
        ((3900, 2300, 374, 326, 293, 190, 144, 60, 20, 9), 7),  # as Reuters is
        ((50, 50, 50), 3),  # none is large enough: those that are as large as the second
        ((400, 60, 30), 2),
    ],
)
def test_imbalanced_tasks_keep_their_ratio_and_their_classes(rows: tuple[int, ...], kept: int) -> None:
    """Whichever class is to be the frequent one, also one that is rare in the data."""
    labels = np.repeat(np.arange(len(rows)), rows)
    dataset = toy_dataset(rows=len(labels), classes=len(rows), labels=labels)
    size, least = imbalanced_capacity(dataset, TASKS, 10.0)
    largest = set()
    for key in range(40):
        spec = task_spec(keys=(key,), train_size=size, imbalance=10.0, class_rows=least)
        task = draw_rows(dataset, spec, TASKS)
        counts = np.bincount(task.labels[task.rows["train"]], minlength=task.num_classes)
        assert len(counts) == task.num_classes == kept and abs(counts.sum() - size) <= 1
        assert counts.min() >= 1 and (counts.max() + 1) / (counts.min() - 1 or 0.5) > 10 > (counts.max() - 1) / (
            counts.min() + 1
        ), "10 but for whole rows"
        largest.add(int(counts.argmax()))
    assert largest == set(range(kept)), "every class is the most frequent one in some task"


def test_an_imbalance_that_leaves_no_row_of_the_rarest_class() -> None:
    with pytest.raises(DataError, match=r"^toy: an imbalance of 10 leaves the rarest class of a task no training row"):
        imbalanced_capacity(toy_dataset(rows=30, classes=3, labels=np.arange(30) % 3), TASKS, 10.0)
