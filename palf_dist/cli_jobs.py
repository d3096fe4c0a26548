"""The commands ``submit`` and ``jobs``: parse, call, print."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from palf_dist.cli_shared import (
    AsJson,
    config_of_policy,
    load_run_config,
    load_search,
    option_overrides,
    output,
    overrides_of_suite,
    policy_to_evaluate,
    refuse_quick_results,
)

if TYPE_CHECKING:
    from palf_dist.jobs.client import JobDetails, JobsClient
    from palf_dist.jobs.shipment import Shipment

DashboardUrl = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HOST:8265; RAY_API_SERVER_ADDRESS and RAY_ADDRESS go before it.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as submit and jobs list print it.")]
BEGIN_SECONDS = 60.0
"""How long submit waits to see that the job has begun."""
STOP_SECONDS = 60
"""How long a job that is stopped has for its checkpoint before Ray kills it."""
OWN_OPTIONS_FIRST = {"allow_interspersed_args": False}
"""Settings of submit: what stands behind the submitted command's name belongs to that command."""
SUBMITTED = ("meta-train", "tune", "evaluate")

jobs_app = typer.Typer(help="List, watch and stop the jobs of a cluster.", no_args_is_help=True)


def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND ...", help="meta-train, tune or evaluate with its options.")
    ],
    address: DashboardUrl = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log until it ends, and end with its exit code.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start the driver again, to resume, when it dies.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a command on a cluster as a Ray job, for instance: submit --address URL -- meta-train --config FILE --run-dir
    s3://BUCKET/RUN

    Everything is checked here first. Submitted again, a command goes on with the run in its directory.
    """
    with output(as_json) as emit, tempfile.TemporaryDirectory(prefix="palf-job-") as folder:
        shipment = _shipment(context, command, Path(folder))
        client = _client(address)
        for note in shipment.notes:
            print(f"note: {note}", file=sys.stderr)
        job_id = _send(client, shipment, folder, max_restarts)
        record: dict[str, Any] = {"job": job_id, "address": client.address, "run_dir": shipment.run_dir}
        job = f"{job_id} --address {client.address}"
        lines = (
            f"job     {job_id}",
            *([f"run     {shipment.run_dir}"] if shipment.run_dir else []),
            f"watch   palf-dist jobs logs --follow {job}",
            f"stop    palf-dist jobs stop {job}",
            *(["resume  submit the same command again"] if shipment.resumable else []),
        )
        if not follow:
            status = _begin(client, job_id)
            emit({**record, "status": status}, f"{status}\n", *lines)
            return
        print(*lines, "", sep="\n", flush=True)
        ended, job_id = _follow_to_the_end(client, shipment, folder, max_restarts, job_id)
        code = _ending(ended)
        if as_json:
            emit({**record, "job": job_id, "status": ended.status.value, "exit_code": code})
        raise typer.Exit(code)


@jobs_app.command("list")
def list_jobs(address: DashboardUrl = None, as_json: AsJson = False) -> None:
    """The jobs of a cluster, the newest first."""
    with output(as_json) as emit:
        records = [_record(job) for job in _client(address).jobs()]
        columns = ("job", "status", "command", "run", "started", "ended")
        table = Table(*(Column(name, overflow="fold", no_wrap=name == "job") for name in columns))
        for record in records:
            table.add_row(
                *(escape(str(value if value is not None else "")) for value in list(record.values())[: len(columns)])
            )
        emit({"jobs": records}, table if records else "no jobs")


@jobs_app.command()
def logs(
    job: JobId,
    address: DashboardUrl = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends, and end with its exit code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a job has printed."""
    with output(as_json) as emit:
        client = _client(address)
        if follow:
            code = _ending(_follow(client, job))
            if as_json:
                emit({**_record(client.job(job)), "exit_code": code})
            raise typer.Exit(code)
        text = client.logs(job)
        if as_json:
            emit({**_record(client.job(job)), "log": text})
        else:
            sys.stdout.write(text)


@jobs_app.command()
def stop(job: JobId, address: DashboardUrl = None, as_json: AsJson = False) -> None:
    """End a job; what it has done is saved first, and it goes on when its command is submitted again."""
    with output(as_json) as emit:
        from palf_dist.jobs.follow import wait_until_ended

        client = _client(address)
        running = client.stop(job)
        ended = wait_until_ended(client, job, STOP_SECONDS + 30)
        emit(_record(ended), f"{'stopped' if running else 'had ended before'}: {ended.status.value}")


def _client(address: str | None) -> JobsClient:
    from palf_dist.jobs.client import JobsClient, resolve_address

    return JobsClient(resolve_address(address))


def _shipment(context: typer.Context, command: list[str], folder: Path) -> Shipment:
    """Parse the command as it would be parsed without ``submit``, and pack what it needs."""
    from palf_dist.errors import ConfigError
    from palf_dist.jobs.shipment import Packer

    name, *arguments = command
    group = context.find_root().command
    assert isinstance(group, TyperGroup)
    if name not in SUBMITTED:
        raise ConfigError(f"submit {name}: {', '.join(SUBMITTED)} can be submitted")
    options = group.commands[name].make_context(name, arguments, parent=context.find_root()).params
    if options["address"] is not None:
        raise ConfigError(f"--address {options['address']}: goes before {name}; the job uses the cluster it is sent to")
    packer = Packer(folder)
    config, overrides, as_json = options["config"], options["overrides"], options["as_json"]
    changes = ("overrides", "workers", "concurrent", "suite", "fold")
    if options["resume"] is not None and config is None and any(options.get(name) is not None for name in changes):
        raise ConfigError(
            f"--resume {options['resume']}: its configuration is read on the cluster; give --config too, or leave out "
            "what changes it"
        )
    if name in ("evaluate", "meta-train"):
        overrides = [*overrides_of_suite(options["suite"], options["fold"]), *(overrides or ())]
    if name == "evaluate":
        from palf_dist.policies.policy_file import load_policy

        policy, run_dir, quick, resume = (options[name] for name in ("policy", "run_dir", "quick", "resume"))
        refuse_quick_results(quick, run_dir, resume)
        artefact = None if resume and policy is None else load_policy(policy_to_evaluate(policy, resume))
        config = config or (config_of_policy(policy) if policy is not None and resume is None else None)
        given = config is not None or resume is None
        settings = load_run_config(config, overrides, options["workers"], None) if given else None
        return packer.evaluate(settings, artefact, run_dir, resume, as_json, quick=quick)
    given = config is not None or options["resume"] is None
    if name == "meta-train":
        run = load_run_config(config, overrides, options["workers"], None) if given else None
        return packer.meta_train(run, options["run_dir"], options["resume"], as_json)
    fields = {"concurrent": options["concurrent"]}
    search = load_search(config, [*(overrides or ()), *option_overrides(fields)]) if given else None
    return packer.tune(search, options["run_dir"], options["resume"], options["time_budget"], as_json)


def _send(client: JobsClient, shipment: Shipment, folder: str, max_restarts: int) -> str:
    from palf_dist.jobs.entry import installed_version
    from palf_dist.jobs.shipment import new_job_id

    version = installed_version()
    metadata = {"palf_dist": version, "command": shipment.command, "run_dir": shipment.run_dir or ""}
    return client.submit(
        entrypoint=shipment.entrypoint(version, max_restarts),
        submission_id=new_job_id(shipment.name),
        runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
        metadata=metadata,
    )


def _begin(client: JobsClient, job_id: str) -> str:
    """Wait until the job has begun; how it stands. Raises ClusterError where it could not."""
    from palf_dist.errors import ClusterError
    from palf_dist.jobs.entry import BEGUN
    from palf_dist.jobs.follow import wait_until_begun, why_failed

    job, log = wait_until_begun(client, job_id, BEGUN, BEGIN_SECONDS)
    if BEGUN not in log and job.status.is_terminal():
        raise ClusterError(why_failed(job, log))
    if BEGUN not in log:
        return "waits: the cluster has not started it yet"
    return job.status.value


def _follow(client: JobsClient, job_id: str) -> JobDetails:
    """Print the job's log until it ends. A Ctrl-C leaves the job running, and ends this command."""
    from palf_dist.jobs.follow import follow

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def notice(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        return follow(client, job_id, write, notice)
    except KeyboardInterrupt:
        job = f"{job_id} --address {client.address}"
        notice(f"\nno longer watching; the job goes on: palf-dist jobs logs --follow {job}")
        notice(f"to end it: palf-dist jobs stop {job}")
        raise typer.Exit(130) from None


def _follow_to_the_end(
    client: JobsClient, shipment: Shipment, folder: str, max_restarts: int, job_id: str
) -> tuple[JobDetails, str]:
    """Follow a job; where the head was lost, and the job with it, submit it again. How it ended, and its id."""
    from palf_dist.jobs.client import UnknownJobError

    for attempt in range(max_restarts + 1):
        lost = "the cluster no longer knows the job: its head was started anew"
        with suppress(UnknownJobError):
            ended = _follow(client, job_id)
            if ended.status.value != "FAILED" or ended.driver_exit_code is not None:
                return ended, job_id
            lost = f"the job was lost with its node ({ended.message})"
            if attempt == max_restarts:
                return ended, job_id
        if attempt < max_restarts:
            job_id = _send(client, shipment, folder, max_restarts)
            print(f"{lost}; submitted again ({attempt + 1} of {max_restarts}) as {job_id}", file=sys.stderr)
    goes_on = ", and it goes on with the run in its directory" if shipment.resumable else ""
    raise UnknownJobError(f"{lost}; submit the same command again{goes_on}")


def _ending(job: JobDetails) -> int:
    """Say how a job ended, where it did not end well; its exit code."""
    from palf_dist.jobs.follow import exit_code

    code = exit_code(job)
    if code:
        print(f"job {job.submission_id}: {job.status.value.lower()}, exit code {code}", file=sys.stderr)
    return code


def _record(job: JobDetails) -> dict[str, Any]:
    metadata = job.metadata or {}
    return {
        "job": job.submission_id,
        "status": job.status.value,
        "command": metadata.get("command"),
        "run_dir": metadata.get("run_dir") or None,
        "started": _time(job.start_time),
        "ended": _time(job.end_time),
        "exit_code": job.driver_exit_code,
        "message": job.message,
    }


def _time(milliseconds: int | None) -> str | None:
    return None if not milliseconds else f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
