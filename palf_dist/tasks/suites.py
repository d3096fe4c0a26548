"""Suites: the datasets that a policy is judged on, under which conditions, and what is held out when; YAML files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from pydantic import Field, model_validator

from palf_dist.config import Condition, DataConfig, DatasetSource, Family
from palf_dist.config_loading import Path_, parse_section, read_config, too_noisy
from palf_dist.errors import ConfigError, DataError
from palf_dist.sections import Count, Section
from palf_dist.tasks.datasets import fetch, list_datasets
from palf_dist.tasks.files import parquet_files
from palf_dist.tasks.registry import REGISTRY, find_entry

FOLDER = Path(__file__).parent.parent / "suites"
"""Where the suites that come with palf_dist lie."""


class SuiteDataset(DatasetSource):
    """A dataset of a suite: a registry name alone, or a Parquet path with its family."""

    family: Family

    @model_validator(mode="before")
    @classmethod
    def _family_of_the_registry(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("name"), str) and value.get("path") is None:
            try:
                known = find_entry(value["name"]).family
            except DataError as error:
                raise ValueError(str(error)) from None
            if value.get("family", known) != known:
                raise ValueError(f"{value['name']} is of the family {known}; leave family out")
            value = {**value, "family": known}
        return value

    @property
    def origin(self) -> str:
        """Datasets with the same origin hold the same rows. Of files only what their path says: ``load_all`` reads
        them."""
        return REGISTRY[self.name].origin if self.path is None else self.path

    @property
    def source(self) -> DatasetSource:
        return DatasetSource(name=self.name, path=self.path, columns=self.columns, family=self.family)


class Suite(Section):
    """An evaluation: every dataset under every condition, judged once, by a policy that never saw it."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    datasets: tuple[SuiteDataset, ...] = Field(min_length=2, description="each is judged once")
    train_only: tuple[SuiteDataset, ...] = Field(default=(), description="trained on in every fold, judged in none")
    folds: tuple[tuple[str, ...], ...] = Field(
        min_length=2, description="names of datasets: a fold is held out while the policy trains on the others"
    )
    conditions: tuple[Condition, ...] = Field(min_length=1)
    max_rows: Count = DataConfig.model_fields["max_rows"].default
    max_classes: Annotated[int, Field(strict=True, ge=2)] = DataConfig.model_fields["max_classes"].default

    @property
    def families(self) -> tuple[Family, ...]:
        """Those of the datasets that are judged."""
        return tuple(family for family in get_args(Family) if any(item.family == family for item in self.datasets))


def shipped_suites() -> list[str]:
    """Names of the suites that come with palf_dist."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(suite: str | Path) -> Suite:
    """The suite of that name, or of the YAML file at that path. Raises ConfigError with a line for each wrong field."""
    known = shipped_suites()
    if str(suite) in known:
        path = FOLDER / f"{suite}.yaml"
    elif Path(suite).suffix:
        path = Path(suite)
    else:
        near = difflib.get_close_matches(str(suite), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)};"
        raise ConfigError(f"unknown suite {suite}: {hint} For a suite of your own, name its YAML file.")
    return parse_section(read_config(path), str(path), (), Suite, _cross_checks)


def fold_data(suite: Suite, fold: int) -> DataConfig:
    """The fold's datasets held out, all others to train on."""
    names = suite.folds[fold]
    return _data(suite, [item for item in suite.datasets if item.name in names], suite.train_only, f"folds.{fold}")


def family_data(suite: Suite, family: Family) -> DataConfig:
    """All datasets of a family held out, and no dataset of that family to train on. Raises ConfigError where the suite
    has no such family, or no other one."""
    if family not in suite.families:
        raise ConfigError(f"suite {suite.name}: no family {family}; it has {', '.join(suite.families)}")
    held_out = [item for item in suite.datasets if item.family == family]
    others = [item for item in suite.train_only if item.family != family]
    return _data(suite, held_out, others, f"without the family {family}")


def list_suite(suite: Suite, cache: str | None = None) -> list[dict[str, Any]]:
    """As ``list_datasets``, for the datasets of a suite: with the number of the fold, none where a dataset is only
    trained on. Of a Parquet path, which is not read, sizes are none."""
    known = {record["name"]: record for record in list_datasets(cache)}
    folds = {name: fold for fold, names in enumerate(suite.folds) for name in names}
    unread = dict.fromkeys(("rows", "classes", "origin", "cached"))
    return [
        (known[item.name] if item.path is None else {"name": item.name, "package": item.path, **unread})
        | {"family": item.family, "fold": folds.get(item.name)}
        for item in suite.datasets + suite.train_only
    ]


def fetch_suite(suite: Suite, cache: str | None = None) -> dict[str, str]:
    """See that a suite's Parquet paths can be reached, then bring its registry datasets into the cache: where each
    dataset lies, by name. Raises one DataError for all paths that cannot be reached, or as ``fetch`` does."""
    items = suite.datasets + suite.train_only
    paths = {item.name: item.path for item in items if item.path is not None}
    problems = []
    for path in paths.values():
        try:
            parquet_files(path)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    fetched = fetch([item.name for item in items if item.path is None], cache)
    return {item.name: paths.get(item.name) or str(fetched[item.name]) for item in items}


def suite_overrides(suite: Suite, held_out: str) -> list[str]:
    """What makes a configuration one of the suite, as ``--set`` writes it: its data and its conditions. ``held_out`` is
    the number of a fold, or a family. Raises ConfigError."""
    if held_out.isdecimal() and int(held_out) < len(suite.folds):
        data = fold_data(suite, int(held_out))
    elif held_out in get_args(Family):
        data = family_data(suite, cast(Family, held_out))
    else:
        raise ConfigError(
            f"--fold {held_out}: suite {suite.name} has the folds 0 to {len(suite.folds) - 1} and the families "
            f"{', '.join(suite.families)}; name one of them"
        )
    fields = {f"data.{name}": value for name, value in data.model_dump(mode="json", exclude={"cache"}).items()}
    fields["evaluation.suite_conditions"] = [item.model_dump(mode="json") for item in suite.conditions]
    return [f"{field}={json.dumps(value)}" for field, value in fields.items()]


def _data(suite: Suite, held_out: Sequence[SuiteDataset], extra: Sequence[SuiteDataset], where: str) -> DataConfig:
    train = [item for item in suite.datasets if item not in held_out] + list(extra)
    if not train:
        raise ConfigError(f"suite {suite.name}, {where}: no dataset is left to train on")
    for item in held_out:
        for other in train:
            if item.origin == other.origin:
                raise ConfigError(
                    f"suite {suite.name}, {where}: held-out dataset {item.name} and training dataset {other.name} hold "
                    f"the same rows (origin {item.origin}); leave one of them out"
                )
    return DataConfig(
        train=tuple(item.source for item in train),
        held_out=tuple(item.source for item in held_out),
        max_rows=suite.max_rows,
        max_classes=suite.max_classes,
    )


def _cross_checks(suite: Suite) -> dict[Path_, str]:
    """What is wrong although every field is right by itself."""
    problems: dict[Path_, str] = {}
    by_name: dict[str, SuiteDataset] = {}
    for field in ("datasets", "train_only"):
        for index, item in enumerate(getattr(suite, field)):
            if item.name in by_name:
                problems[field, index] = f"{item.name} is named more than once; name it once"
            by_name[item.name] = item
    conditions = [condition.name for condition in suite.conditions]
    for index, name in enumerate(conditions):
        if name in conditions[:index]:
            problems["conditions", index] = f"{name} is named more than once; name it once"
        if problem := too_noisy(suite.conditions[index].noise_kind, suite.conditions[index].noise_rate):
            problems["conditions", index, "noise_rate"] = problem
    judged = {item.name: item for item in suite.datasets}
    fold_of: dict[str, int] = {}
    for fold, names in enumerate(suite.folds):
        for index, name in enumerate(names):
            if name not in judged:
                near = difflib.get_close_matches(name, judged, 1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                problems["folds", fold, index] = f"{name} is none of the datasets{hint}"
            elif name in fold_of:
                problems["folds", fold, index] = f"{name} is in fold {fold_of[name]} too; each is judged once"
            else:
                fold_of[name] = fold
    left_out = [name for name in judged if name not in fold_of]
    if left_out:
        problems["folds",] = f"{', '.join(left_out)} in no fold; each dataset is judged once"
    if problems:
        return problems
    for index, item in enumerate(suite.train_only):
        same = next((other.name for other in suite.datasets if other.origin == item.origin), None)
        if same:
            problems["train_only", index] = f"{item.name} holds rows of {same} (origin {item.origin}), which is judged"
    for index, item in enumerate(suite.datasets):
        for other in suite.datasets[:index]:
            if item.origin == other.origin and fold_of[item.name] != fold_of[other.name]:
                problems["folds", fold_of[item.name]] = (
                    f"{item.name} holds rows of {other.name} (origin {item.origin}): put them in one fold"
                )
    return problems or _unbalanced(suite)


def _unbalanced(suite: Suite) -> dict[Path_, str]:
    for family in suite.families:
        # What holds the same rows has to be in one fold, and counts once.
        counts = [
            len({item.origin for item in suite.datasets if item.family == family and item.name in names})
            for names in suite.folds
        ]
        if max(counts) - min(counts) > 1:
            shown = ", ".join(map(str, counts))
            return {
                ("folds",): f"hold {shown} {family} datasets; balance them, so that each fold trains on every family"
            }
    return {}
