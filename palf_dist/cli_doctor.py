"""The command ``doctor``: ask, judge, print."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from palf_dist.cli_shared import AsJson, ConfigFile, output

if TYPE_CHECKING:
    from palf_dist.config import RunConfig
    from palf_dist.doctor.survey import Survey
    from palf_dist.search.config import SearchConfig

SURVEY_SECONDS = 180.0
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL|auto|HOST:PORT",
            help="The cluster's dashboard, http://HOST:8265; on one of its nodes also auto. Default: this machine.",
        ),
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Try to write a run directory from every node.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Look at every node of a cluster, or at this machine, and say what is wrong and what to do about it.

    With --config also whether its MLflow server answers and its workers find room. Exit code 1: there is a problem.
    """
    with output(as_json) as emit:
        from palf_dist.doctor.judgement import Finding, judge
        from palf_dist.doctor.node import own_versions
        from palf_dist.doctor.survey import load_any_config, take_survey
        from palf_dist.errors import ClusterError
        from palf_dist.jobs.shipment import refuse_secrets

        refuse_secrets("--run-dir", run_dir or "")
        settings = None if config is None else load_any_config(config)
        try:
            if address is not None and address.startswith(("http://", "https://")):
                survey = _survey_by_job(address, run_dir, settings)
            else:
                survey = take_survey(address, run_dir, settings)
            findings = judge(survey, own_versions())
        except ClusterError as error:
            findings = [Finding("cluster", "problem", str(error))]
        table = Table("check", "", "what was found", show_lines=False)
        for finding in findings:
            remedy = f"\n[dim]{escape(finding.remedy)}[/dim]" if finding.remedy else ""
            status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
            table.add_row(finding.check, status, escape(finding.message) + remedy)
        problems = sum(finding.status == "problem" for finding in findings)
        warnings = sum(finding.status == "warning" for finding in findings)
        record = {"findings": [asdict(finding) for finding in findings], "problems": problems, "warnings": warnings}
        emit(record, table, f"{problems} problem(s), {warnings} warning(s)")
        raise typer.Exit(1 if problems else 0)


def _survey_by_job(address: str, run_dir: str | None, config: RunConfig | SearchConfig | None) -> Survey:
    """The survey as a job of the cluster takes it. Raises ClusterError where it cannot."""
    from palf_dist.doctor.survey import SURVEY_MARK, Survey
    from palf_dist.errors import ClusterError
    from palf_dist.jobs.client import JobsClient, resolve_address
    from palf_dist.jobs.follow import wait_until_ended, why_failed
    from palf_dist.jobs.shipment import Packer, new_job_id

    client = JobsClient(resolve_address(address))
    with tempfile.TemporaryDirectory(prefix="palf-job-") as folder:
        options = [] if run_dir is None else ["--run-dir", run_dir]
        if config is not None:
            options += Packer(Path(folder)).configuration(config)
        entrypoint = shlex.join(["python", "-m", "palf_dist.doctor", *options])
        job_id = client.submit(
            entrypoint=entrypoint, submission_id=new_job_id("doctor"), runtime_env={"working_dir": folder}
        )
    job = wait_until_ended(client, job_id, SURVEY_SECONDS)
    log = client.logs(job_id)
    for line in log.splitlines():
        if line.startswith(SURVEY_MARK):
            return Survey.from_plain(json.loads(line.removeprefix(SURVEY_MARK)))
    raise ClusterError(why_failed(job, log))
