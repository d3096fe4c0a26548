"""What the commands share: common options, how a configuration is chosen, and how a result is printed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from palf_dist.config import RunConfig
    from palf_dist.search.config import SearchConfig

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override one field, e.g. inner.steps=200; may be repeated."),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N|auto", help="Ray workers; 0 runs the same code in process, auto follows the cluster."
    ),
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="auto|HOST:PORT", help="A running Ray cluster; else a private one.")
]
SuiteOption = Annotated[
    str | None, typer.Option("--suite", metavar="SUITE", help="Suite: palf12, palf12-hub, or a YAML file of your own.")
]
FoldOption = Annotated[
    str | None,
    typer.Option("--fold", metavar="FOLD|FAMILY", help="What of the suite is held out: a fold by number, or a family."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def option_overrides(options: dict[str, Any]) -> list[str]:
    """Options that stand for a field of the configuration, as ``--set`` writes them; None: not given."""
    return [f"{field}={json.dumps(value)}" for field, value in options.items() if value is not None]


def overrides_of_suite(suite: str | None, fold: str | None) -> list[str]:
    """The data and conditions of a suite, as ``--set`` writes them."""
    from palf_dist.errors import ConfigError
    from palf_dist.tasks.suites import load_suite, suite_overrides

    if (suite is None) != (fold is None):
        raise ConfigError("--suite and --fold go together: name the suite, and what of it is held out")
    return [] if suite is None or fold is None else suite_overrides(load_suite(suite), fold)


def new_folder(name: str) -> str:
    """Where a new run goes when nothing else is said."""
    return f"runs/{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def named(config: str | Path | None, example: str) -> str | Path:
    """The configuration file that has to be named. Raises ConfigError where it is not."""
    from palf_dist.errors import ConfigError

    if config is None:
        raise ConfigError(f"--config: name the YAML file of the run, for instance --config {example}")
    return config


def load_run_config(
    config: str | Path | None, overrides: list[str] | None, workers: str | None, address: str | None
) -> RunConfig:
    """The configuration of a meta-training or an evaluation, from a file and the command's options."""
    from palf_dist.config_loading import load_config
    from palf_dist.evaluation.methods import select_methods

    count = int(workers) if workers and workers.lstrip("-").isdecimal() else workers
    fields = {"distributed.workers": count, "distributed.address": address}
    settings = load_config(named(config, "configs/quick.yaml"), [*(overrides or ()), *option_overrides(fields)])
    select_methods(settings.evaluation.methods)
    return settings


def load_search(config: Path | None, overrides: list[str]) -> SearchConfig:
    """The configuration of a search."""
    from palf_dist.search.config import load_search_config

    return load_search_config(named(config, "configs/tune-digits.yaml"), overrides)


def config_of_policy(policy: str | Path) -> str | Path | None:
    """The configuration of the run that a policy file, or its folder, lies in; both may be URIs."""
    from palf_dist.policies.policy_file import policy_folder
    from palf_dist.run_directory import CONFIG
    from palf_dist.storage import exists, is_uri, join, split

    folder = policy_folder(policy)  # a search's best has its config beside it
    folder = folder if is_uri(folder) else str(Path(folder).absolute())
    return next((file for file in (join(folder, CONFIG), join(split(folder)[0], CONFIG)) if exists(file)), None)


def resumed_config(resume: str, run_dir: str | None, command: Literal["meta-train", "tune", "evaluate"]) -> str | Path:
    """The configuration file of the run to go on with. Raises ConfigError, and RunDirectoryError also for a run that
    ``command`` has not begun."""
    from palf_dist.config_loading import is_search_config
    from palf_dist.errors import ConfigError, RunDirectoryError
    from palf_dist.run_directory import CONFIG, no_run, open_run_directory
    from palf_dist.storage import exists, is_remote, join

    if run_dir is not None:
        raise ConfigError(f"--run-dir {run_dir}: a resumed run goes on in its own folder; leave --run-dir out")
    config: str | Path
    if command != "tune" and is_remote(resume):
        config = join(resume, CONFIG)
        if not exists(config):
            raise no_run(resume)
    else:
        config = open_run_directory(resume) / CONFIG
    search = is_search_config(config)
    if search and command != "tune":
        raise RunDirectoryError(f"--resume {resume}: holds a search; go on with palf-dist tune --resume {resume}")
    if command == "tune" and not search:
        raise RunDirectoryError(
            f"--resume {resume}: holds no search; go on with palf-dist meta-train --resume {resume}, or with palf-dist "
            f"evaluate --resume {resume} where it is an evaluation"
        )
    return config  # of a meta-training or an evaluation: which of the two the driver finds


def resumed_run_config(
    resume: str,
    run_dir: str | None,
    command: Literal["meta-train", "evaluate"],
    config: Path | None,
    overrides: list[str] | None,
    workers: str | None,
    address: str | None,
) -> RunConfig:
    """The configuration to go on with: the run's own, but for fields that touch no result."""
    from palf_dist.config_loading import config_differences, load_config

    own = resumed_config(resume, run_dir, command)
    settings = load_run_config(config or own, overrides, workers, address)
    refuse_differences(resume, config_differences(load_config(own), settings))
    return settings


def refuse_quick_results(quick: bool, run_dir: str | None, resume: str | None) -> None:
    """Raises ConfigError where a quick evaluation would be kept."""
    from palf_dist.errors import ConfigError

    for option, where in {"--run-dir": run_dir, "--resume": resume}.items():
        if quick and where is not None:
            raise ConfigError(f"{option} {where}: --quick gives no results to keep; leave one of them out")


def policy_to_evaluate(policy: str | None, resume: str | None) -> str:
    """Where the policy is: as named, else that of the evaluation to go on with. Raises ConfigError where neither is,
    RunDirectoryError where that has none."""
    from palf_dist.errors import ConfigError, RunDirectoryError
    from palf_dist.policies.policy_file import CARD
    from palf_dist.run_directory import BEST
    from palf_dist.storage import exists, join

    if policy is not None:
        return policy
    if resume is None:
        raise ConfigError("POLICY: name the policy to evaluate, for instance default, or an evaluation with --resume")
    if not exists(join(join(resume, BEST), CARD)):
        raise RunDirectoryError(
            f"--resume {resume}: holds no policy yet; go on with palf-dist meta-train --resume {resume}, or with "
            f"palf-dist evaluate POLICY --resume {resume} where it is an evaluation"
        )
    return str(join(resume, BEST))


@contextlib.contextmanager
def told_how_to_go_on(run_dir: str | None, go_on: str, what: str = "interrupted") -> Iterator[None]:
    """A Ctrl-C that ends the block prints ``go_on`` where there is something to go on with in the run directory, as far
    as can be told."""
    from palf_dist.errors import PalfError
    from palf_dist.run_directory import CONFIG
    from palf_dist.storage import exists, join

    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(PalfError):
            if run_dir is not None and exists(join(run_dir, CONFIG)):
                print(f"{what}; {go_on}", file=sys.stderr)
        raise


def refuse_differences(resume: str, differences: list[str]) -> None:
    """Raises ConfigError where a resumed run's configuration is not the one that it began with."""
    from palf_dist.errors import ConfigError

    if differences:
        raise ConfigError(
            f"--resume {resume}: the configuration differs from the run's; start a new run, or undo\n"
            + "\n".join(differences)
        )


def near(path: str | Path) -> str | Path:
    """The path as seen from the working folder, where it lies in there."""
    if isinstance(path, str):  # a URI
        return path
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class Emit(Protocol):
    """Prints the result of a command."""

    def __call__(self, record: dict[str, Any], table: RenderableType = "", *lines: str) -> None:
        """``record`` as JSON, or for people the table and below it the lines, which are never wrapped."""
        ...


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Emit]:
    """Yields how to print the result.

    With ``as_json`` everything else that is written to stdout meanwhile, by native code and child processes too, goes
    to stderr.
    """
    if not as_json:
        yield _print_for_people
        return
    printed: list[str] = []
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda record, table="", *lines: printed.append(json.dumps(record, allow_nan=False))
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        print(*printed, sep="\n", end="\n" if printed else "")


def _print_for_people(record: dict[str, Any], table: RenderableType = "", *lines: str) -> None:
    Console().print(table)
    for line in lines:
        print(line)
