"""Following a job's log over connections that break: no line twice, none lost, and the job's exit code at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from palf_dist.errors import ClusterError
from palf_dist.jobs.client import JobsClient, UnreachableError

RETRY_SECONDS = (0.5, 10.0)  # between attempts to connect: first, longest
GIVE_UP_SECONDS = 900.0
STOPPED = 130


def follow(client: JobsClient, job_id: str, write: Callable[[str], None], notice: Callable[[str], None]) -> JobDetails:
    """Pass what a job has printed and prints to ``write``, each character once, until it ends; what became of it.

    ``notice`` hears of connections lost and found. Raises UnknownJobError where the cluster has no such job (any more),
    UnreachableError where it has not answered for GIVE_UP_SECONDS. A Ctrl-C raises KeyboardInterrupt; the job goes on.
    """
    return asyncio.run(_Follower(client, job_id, write, notice).run())


def exit_code(job: JobDetails) -> int:
    """Of a job that has ended, as a shell would have it."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    code = job.driver_exit_code or 1
    return 128 - code if code < 0 else code


class _Follower:
    def __init__(
        self, client: JobsClient, job_id: str, write: Callable[[str], None], notice: Callable[[str], None]
    ) -> None:
        self._client, self._job_id, self._write, self._notice = client, job_id, write, notice
        self._written = 0  # characters of the log that ``write`` has had

    async def run(self) -> JobDetails:
        lost_at: float | None = None
        wait = RETRY_SECONDS[0]
        while True:
            before = self._written
            await self._tail()
            try:
                job = await asyncio.to_thread(self._client.job, self._job_id)
                if job.status.is_terminal():
                    self._take(await asyncio.to_thread(self._client.logs, self._job_id), 0)
                    return job
            except UnreachableError as error:
                if lost_at is None or self._written > before:
                    lost_at, wait = time.monotonic(), RETRY_SECONDS[0]
                    self._notice(f"connection lost ({error}); trying again, the job goes on meanwhile")
                if time.monotonic() - lost_at > GIVE_UP_SECONDS:
                    raise
            else:
                if lost_at is not None:
                    self._notice("connected again")
                lost_at, wait = None, RETRY_SECONDS[0]
            await asyncio.sleep(wait)
            wait = min(2 * wait, RETRY_SECONDS[1])

    async def _tail(self) -> None:
        """Read the log, from its beginning as Ray has it, until the connection ends for whatever reason."""
        position = 0
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._client.log_stream(self._job_id) as stream:
                async for message in stream:
                    if message.type != aiohttp.WSMsgType.TEXT:
                        break
                    self._take(message.data, position)
                    position += len(message.data)

    def _take(self, text: str, position: int) -> None:
        """``text`` stands at ``position`` of the log: write what of it is new."""
        new = text[max(0, self._written - position) :]
        if new:
            self._write(new)
            self._written += len(new)


def wait_until_begun(client: JobsClient, job_id: str, sign: str, seconds: float) -> tuple[JobDetails, str]:
    """The job and its log once ``sign`` stands in it, the job has ended, or ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    while True:
        job = client.job(job_id)
        log = client.logs(job_id)
        if sign in log or job.status.is_terminal() or time.monotonic() > deadline:
            return job, log
        time.sleep(0.3)


def wait_until_ended(client: JobsClient, job_id: str, seconds: float) -> JobDetails:
    """The job once it has ended. Raises ClusterError where it has not after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        job = client.job(job_id)
        if job.status.is_terminal():
            return job
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job_id} is still {job.status.lower()} after {seconds:g} s; look again later")
        time.sleep(0.3)


def why_failed(job: JobDetails, log: str) -> str:
    """In short, why a job has ended before its work began."""
    if "No module named" in log and "palf_dist" in log:
        return (
            f"job {job.submission_id}: the cluster's python has no palf_dist that takes jobs; install the same "
            "palf_dist there as here, on every node (cluster/ has an image recipe)"
        )
    said = [line for line in log.splitlines() if line.startswith("error: ")]
    return f"job {job.submission_id} could not begin: {said[-1].removeprefix('error: ') if said else job.message}"
