"""Finished runs that one report joins: what each has judged, and whether they belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from math import inf
from typing import Any

from palf_dist.config import DatasetSource, RunConfig
from palf_dist.config_loading import RESUMABLE, config_differences, is_search_config, load_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.methods import LEARNED, REFERENCE, select_methods
from palf_dist.evaluation.results_file import ResultsFile, read_results
from palf_dist.evaluation.statistics import task_of
from palf_dist.evaluation.transfer import FREE_OF_TRANSFERS, KINDS, transfer_of
from palf_dist.policies.policy_file import load_policy, trained_on
from palf_dist.run_directory import BEST, CONFIG, RESULTS, no_run
from palf_dist.storage import exists, join
from palf_dist.tasks.registry import REGISTRY

FREE = (*RESUMABLE, "name", "data.train", "data.held_out")
"""Fields in which the runs of one report may differ."""

FREE_OF_FAMILIES = ("tasks.architectures", "inner.learning_rate", "inner.weight_decay", "evaluation.methods")
"""Fields in which runs that hold out a family may differ besides: what no training dataset can be read by cannot be
tuned, or has to be left out. Their table is one of its own."""

ROUNDED = 0.05
"""Share of tasks on which versions of palf_dist, which round differently, may give one training another accuracy..."""
ROUNDING = 0.02
"""... and by how much at most; two rows of a hundred. On palf12 a new version moved 1 % of the tasks, by .004; another
loss, or values tuned on each task, move 70 % of them and more."""

COLUMNS = ("method", "dataset", "family", "architecture", "noise_rate", "condition", "seed", "target_prior", "accuracy")
"""Of results.parquet, without which there is no report."""

PARQUET = ".parquet"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class JudgedRun:
    """A run with its held-out comparison."""

    place: str  # as the user named it: a path or a URI
    config: RunConfig
    card: Mapping[str, Any]  # of its policy
    rows: Sequence[Row]  # of results.parquet
    learned: str | None = None  # the method that its policy is, beside that of the other runs: one of ``LEARNED``
    transfer: str | None = None  # the policy judged on what it was not trained on: one of ``transfer.KINDS``
    alone: bool = False  # its results.parquet is all there is: neither its trajectories nor its policy

    @property
    def judged(self) -> list[str]:
        """The datasets, in order of name."""
        return sorted({row["dataset"] for row in self.rows})

    @property
    def family(self) -> str | None:
        """The family that is held out as a whole, none of it being trained on. None for a fold over datasets, and
        where it is not known what the training datasets are."""
        trained = {_family(source) for source in self.config.data.train}
        held_out = {row["family"] for row in self.rows}
        return None if len(held_out) > 1 or trained & {*held_out, None} else held_out.pop()


@dataclass(frozen=True)
class JoinedRuns:
    """The runs of one report, in an order that does not depend on how they were named."""

    config: RunConfig  # of the first; the others are equal but for ``FREE``
    folds: list[JudgedRun]  # each dataset is judged by a policy of the other datasets
    families: list[JudgedRun]  # ... of the other families
    transfers: dict[str, list[JudgedRun]]  # evaluations by kind of transfer

    @property
    def explained(self) -> list[JudgedRun]:
        """The folds of the policy itself whose trajectories and policy are there."""
        return [run for run in self.folds if run.learned is None and not run.alone]

    @property
    def all(self) -> list[JudgedRun]:
        return [*self.folds, *self.families, *chain.from_iterable(self.transfers.values())]

    @property
    def rows(self) -> list[Row]:
        return _join(self.folds)

    def trained_apart(self, run: JudgedRun) -> bool:
        """Whether a transfer judges a policy that is none of the folds' own."""
        return run.transfer is not None and all(run.card != fold.card for fold in self.folds)

    @property
    def family_rows(self) -> list[Row]:
        return _join(self.families)


def read_runs(places: Sequence[str]) -> JoinedRuns:
    """The runs at these paths or URIs. Raises RunDirectoryError where one has not been evaluated, where they do not
    belong together, and where a policy was trained on what it judged; ConfigError and PolicyFileError for damaged
    files."""
    read = [read_run(place) for place in places]
    runs = _with_learned([run for run in read if not run.transfer])
    runs.sort(key=lambda run: (run.family or "", run.learned or "", run.judged, run.place))
    if not runs:
        raise RunDirectoryError(
            f"{places[0]}: all runs are evaluations of a transfer; name the runs of a suite's folds, and these besides"
        )
    first = runs[0]
    for run in runs:
        free = (
            *(("policy", "evaluation.methods") if run.learned else ()),
            *(FREE_OF_FAMILIES if run.family else ()),
        )
        _check_one_design(first, run, free)
        _check_unseen(run)
    folds = [run for run in runs if run.family is None]
    families = [run for run in runs if run.family is not None]
    if not any(run.learned is None for run in folds):
        raise RunDirectoryError(
            f"{first.place}: all runs hold out a whole family; name the runs of a suite's folds, and these besides"
        )
    for kind in (folds, families):
        _check_judged_once(kind)
        _check_same_tasks(kind)
    return JoinedRuns(first.config, folds, families, _transfers(first, [run for run in read if run.transfer]))


def _transfers(first: JudgedRun, runs: Sequence[JudgedRun]) -> dict[str, list[JudgedRun]]:
    """The evaluations of each kind of transfer, of the design of ``first`` but for what they transfer to."""
    transfers = {}
    for kind in KINDS:
        judged = sorted((run for run in runs if run.transfer == kind), key=lambda run: (run.judged, run.place))
        for run in judged:
            _check_one_design(first, run, FREE_OF_TRANSFERS)
            _check_one_design(judged[0], run)
            if run.card.get("architectures") != judged[0].card.get("architectures"):
                raise RunDirectoryError(
                    f"{run.place}: its policy was trained on other architectures than that of {judged[0].place}; name "
                    "evaluations of one design"
                )
            _check_unseen(run)
        _check_judged_once(judged)
        if judged:
            transfers[kind] = judged
    return transfers


def _check_one_design(first: JudgedRun, run: JudgedRun, free: Sequence[str] = ()) -> None:
    """That two configurations differ in ``FREE`` and ``free`` only."""
    places = (f"in {first.place}", f"in {run.place}")
    different = config_differences(first.config, run.config, (*FREE, *free), places)
    if different:
        raise RunDirectoryError(
            f"{run.place}: its configuration is not that of {first.place}; runs of one report may differ in name, "
            "datasets and where they ran, so name runs of one design\n" + "\n".join(different)
        )


def read_run(place: str) -> JudgedRun:
    """The run at a path or URI, or whose results.parquet, by whatever name ending so, is there alone. Raises
    RunDirectoryError where it has not been evaluated, or not as its configuration asks for; ConfigError and
    PolicyFileError for damaged files."""
    alone = place.endswith(PARQUET)
    results = read_results(place) if alone else _results_of(place)
    if results.config is None or results.card is None:
        raise RunDirectoryError(
            f"{place}: does not say of which configuration and policy it has the results; name the run's folder"
        )
    columns = results.table.column_names
    if missing := sorted({*COLUMNS} - {*columns} | {"trained_on", "origins"} - results.card.keys()):
        raise RunDirectoryError(f"{place}: its results or its policy's card lack {', '.join(missing)}; restore the run")
    transfer = transfer_of(results.config, results.card, place)
    run = JudgedRun(place, results.config, results.card, results.table.to_pylist(), transfer=transfer, alone=alone)
    _check_complete(run)
    return run


def _results_of(place: str) -> ResultsFile:
    """Of a run directory, with its configuration and the card of its policy."""
    if not exists(join(place, CONFIG)):
        raise no_run(place)
    if is_search_config(join(place, CONFIG)):
        raise RunDirectoryError(f"{place}: holds a search and no meta-training; name a run of palf-dist meta-train")
    config = load_config(join(place, CONFIG))
    if not exists(join(place, RESULTS)):
        raise RunDirectoryError(
            f"{place}: has not been evaluated ({RESULTS} is missing); finish it with palf-dist meta-train --resume "
            f"{place}, or an evaluation with palf-dist evaluate --resume {place}"
        )
    results = read_results(join(place, RESULTS))
    if results.config and (changed := config_differences(results.config, config, places=("then", "now"))):
        raise RunDirectoryError(
            f"{place}: {CONFIG} is not what {RESULTS} was made with; restore it\n" + "\n".join(changed)
        )
    return ResultsFile(results.table, config, load_policy(join(place, BEST)).card)


def _check_complete(run: JudgedRun) -> None:
    """That it has all results which its configuration asks for, those of the policy among them."""
    evaluation = run.config.evaluation
    methods = [method.name for method in select_methods(evaluation.methods)]
    if "policy" not in methods:
        raise RunDirectoryError(f"{run.place}: evaluation.methods leave the policy out; name a run that has it")
    cells = len(evaluation.suite_conditions) or len(evaluation.noise_rates) * len(evaluation.conditions)
    wanted = dict.fromkeys(product(methods, (item.name for item in run.config.data.held_out)), cells * evaluation.seeds)
    if Counter((row["method"], row["dataset"]) for row in run.rows) != wanted:
        raise RunDirectoryError(
            f"{run.place}: {RESULTS} does not hold what the run's own {CONFIG} asks for, each method on each task of "
            f"{', '.join(item.name for item in run.config.data.held_out)}; restore that file"
        )


def _with_learned(runs: list[JudgedRun]) -> list[JudgedRun]:
    """Runs of policies of ``LEARNED`` are methods to compare with, beside runs of another policy."""
    if all(run.config.policy.kind in LEARNED for run in runs):
        return runs
    kinds = [run.config.policy.kind for run in runs]
    return [replace(run, learned=kind if kind in LEARNED else None) for run, kind in zip(runs, kinds, strict=True)]


def _check_unseen(run: JudgedRun) -> None:
    for dataset, origin in sorted({(row["dataset"], row.get("origin") or "") for row in run.rows}):
        if trained_on(run.card, dataset, origin.split()):
            raise RunDirectoryError(f"{run.place}: its policy was trained on rows of {dataset}, which it judges")


def _check_judged_once(runs: Iterable[JudgedRun]) -> None:
    judges: dict[tuple[str | None, str], str] = {}
    for run in runs:
        for dataset in run.judged:
            other = judges.get((run.learned, dataset))
            if other is not None:
                raise RunDirectoryError(
                    f"{dataset}: is judged by both {other} and {run.place}; name one run for each fold or family"
                )
            judges[run.learned, dataset] = run.place


def unlike(rows: Iterable[Row], other: Iterable[Row]) -> str | None:
    """The dataset on which the reference has another accuracy in ``rows`` than in ``other``, or none there: those are
    other tasks, or tuned to other values. None where it has the same, but for rounding."""
    reference = {task_of(row): row["accuracy"] for row in other if row["method"] == REFERENCE}
    judged = [row for row in rows if row["method"] == REFERENCE]
    changed = [row for row in judged if reference.get(task_of(row), inf) != row["accuracy"]]
    for row in changed:
        there, here = reference.get(task_of(row)), row["accuracy"]
        if there is None or here is None or not abs(there - here) <= ROUNDING:
            return str(row["dataset"])
    return str(changed[0]["dataset"]) if len(changed) > ROUNDED * len(judged) else None


def _check_same_tasks(runs: Sequence[JudgedRun]) -> None:
    """Runs of ``LEARNED`` have to have judged under the same tuned values."""
    others = [row for run in runs if not run.learned for row in run.rows]
    for run in runs:
        if run.learned and (dataset := unlike(run.rows, others)) is not None:
            raise RunDirectoryError(
                f"{run.place}: {REFERENCE} has another result there on {dataset} than in the other runs, or none in "
                "these; name runs of the same folds, made by one version on one kind of machine"
            )


def _join(runs: Iterable[JudgedRun]) -> list[Row]:
    """All rows, those of the policies of ``learned`` runs under the names of these methods."""
    rows: list[Row] = []
    for run in runs:
        name = run.learned and LEARNED[run.learned].name
        rows += run.rows if name is None else [{**row, "method": name} for row in _of(run, "policy")]
    return rows


def _of(run: JudgedRun, method: str) -> list[Row]:
    return [row for row in run.rows if row["method"] == method]


def _family(source: DatasetSource) -> str | None:
    """Of a Parquet path it is known only where the configuration says it."""
    return source.family or (REGISTRY[source.name].family if source.path is None else None)
