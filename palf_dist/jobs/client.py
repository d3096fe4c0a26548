"""The Jobs API of a cluster: reached, refused or answered within seconds, with one clear error for each way it fails.

Requests have a time limit, the token is read afresh for each client, and nothing of it is ever shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from palf_dist.distributed.authentication import REMEDY, is_loopback, origin, own_token, protect_token_file
from palf_dist.distributed.cluster import changed_environment
from palf_dist.errors import ClusterError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""As Ray has it, the first that is set takes the place of --address."""
PROBE_SECONDS = 2.0
REQUEST_SECONDS = (4.0, 30.0)  # to connect, to answer
LOOKUP_SECONDS = 5.0
SUBMIT_SECONDS = 60.0
HEARTBEAT_SECONDS = 30.0
"""A stream whose other end has not answered a ping for half of this is dead."""
CLOSE_SECONDS = 1.0
QUIET_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class UnreachableError(ClusterError):
    """Nothing answers, or not in time: it may do so later."""


class UnknownJobError(ClusterError):
    """The cluster has no such job: it was never there, or the head was started anew."""


class JobsClient(JobSubmissionClient):
    """Ray's client with time limits, and with errors that say what to do. Every method may raise ClusterError."""

    def __init__(self, address: str) -> None:
        """``address``: as ``resolve_address`` gives it."""
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        protect_token_file()
        _refuse_open(address)  # first: one that asks nobody for a token is shown none
        headers = authorisation()
        check_version(address, headers)
        with self._explained():
            super().__init__(address, headers=headers)

    def job(self, job_id: str) -> JobDetails:
        """What the cluster knows of a job. Raises UnknownJobError."""
        with self._explained(job_id):
            return self.get_job_info(job_id)

    def jobs(self) -> list[JobDetails]:
        """The submitted jobs, the newest first."""
        with self._explained():
            jobs = [job for job in self.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far. Raises UnknownJobError."""
        with self._explained(job_id):
            return str(self.get_job_logs(job_id))

    @contextlib.asynccontextmanager
    async def log_stream(self, job_id: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """What a job prints, from its beginning, in messages of text. Ray's own ``tail_job_logs`` does not close its
        connection when it is cut short."""
        url = f"{self._address}/api/jobs/{job_id}/logs/tail"
        closing = aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS)
        async with (
            aiohttp.ClientSession(cookies=self._cookies, headers=self._headers) as session,
            session.ws_connect(url, ssl=self._ssl_context, timeout=closing, heartbeat=HEARTBEAT_SECONDS) as stream,
        ):
            yield stream

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; whether it was running. Raises UnknownJobError."""
        with self._explained(job_id):
            return bool(self.stop_job(job_id))

    def submit(self, submission_id: str, **arguments: Any) -> str:
        """As ``submit_job``, under an id that nothing else has: asked again for a while where the cluster cannot take
        jobs yet, as a head that has just been started."""
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            try:
                with self._explained():
                    return str(self.submit_job(submission_id=submission_id, **arguments))
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
            with contextlib.suppress(ClusterError):  # an answer that was lost on its way
                return str(self.job(submission_id).submission_id)
            time.sleep(1)

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **arguments)

    @contextlib.contextmanager
    def _explained(self, job_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, ConnectionError) as error:
            raise unreachable(self.address, error) from error
        except AuthenticationError as error:
            refused = 401 if "required" in str(error).splitlines()[0] else 403
            raise _unauthorised(self.address, refused) from None
        except RuntimeError as error:
            text = str(error)
            if job_id is not None and "status code 404" in text:
                raise UnknownJobError(
                    f"{self.address} has no job {job_id}; list what there is with palf-dist jobs list"
                ) from None
            if any(f"status code {code}" in text for code in (500, 502, 503, 504)):
                raise UnreachableError(f"{self.address}: the cluster cannot do that now: {_last_line(text)}") from error
            raise ClusterError(f"{self.address}: the cluster refused: {_last_line(text)}") from error


def resolve_address(given: str | None) -> str:
    """The dashboard's URL for ``--address``: an ``http(s)://`` URL; HOST:PORT of the dashboard or of a Ray head;
    ``auto`` for the Ray of this machine; None for Ray's default. RAY_API_SERVER_ADDRESS and RAY_ADDRESS go before it.

    Raises ClusterError where no dashboard can be found.
    """
    named = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    address = os.environ[named] if named else given or DEFAULT_ADDRESS
    source = f"{named}={address}" if named else f"--address {address}"
    if address.startswith(("http://", "https://")):
        _check_url(address, source)
        return address.rstrip("/")
    if ":" in address and "://" not in address:
        url = f"http://{address}"
        _check_url(url, source)
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/api/version", timeout=PROBE_SECONDS).status_code in (200, 401, 403):
                return url
    return _looked_up(address, source)


def authorisation() -> dict[str, str]:
    """The header that shows the token, found where Ray looks for it; empty where there is none.

    Raises ClusterError for a token file that is named but cannot be read.
    """
    token = None if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" else own_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def check_version(address: str, headers: dict[str, str]) -> None:
    """Raises ClusterError where no dashboard answers at ``address``, where it refuses the token, or where the cluster
    runs another Ray."""
    answer = _ask(address, headers)
    if answer.status_code in (401, 403):
        raise _unauthorised(address, answer.status_code)
    theirs = _version_in(address, answer)
    if theirs != ray.__version__:
        raise ClusterError(
            f"{address}: the cluster runs Ray {theirs}, this machine {ray.__version__}; install the same here "
            f"(pip install 'ray[default]=={theirs}'), or start the cluster with {ray.__version__}"
        )


def _refuse_open(address: str) -> None:
    """Raises ClusterError for a dashboard beyond loopback that asks nobody for a token: nothing is sent there."""
    if is_loopback(urlsplit(address).hostname or ""):
        return  # perhaps a tunnel; the job looks again from inside the cluster
    answer = _ask(address, {})
    if answer.status_code not in (401, 403):
        _version_in(address, answer)
        raise ClusterError(f"{address}: takes commands from anybody who reaches it; {REMEDY}")


def _ask(address: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(f"{address}/api/version", headers=headers, timeout=PROBE_SECONDS)
    except requests.RequestException as error:
        raise unreachable(address, error) from error


def _version_in(address: str, answer: requests.Response) -> str:
    """Ray's version; raises ClusterError where no dashboard of Ray has answered."""
    try:
        return str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise ClusterError(
            f"{address}: what answers there (HTTP {answer.status_code}) is not Ray's dashboard; give the URL of the "
            "head's dashboard, which is at port 8265 unless changed"
        ) from None


def unreachable(address: str, error: Exception) -> UnreachableError:
    """What to say where nothing answers."""
    slow = isinstance(error, requests.Timeout)
    reason = "no answer in time" if slow else _reason(error)
    return UnreachableError(
        f"{address}: no Ray dashboard answers there ({reason}); check that the cluster is up and the URL is the "
        "dashboard's, and that the tunnel to it is open (ray dashboard, kubectl port-forward, ssh -L)"
    )


def _reason(error: Exception) -> str:
    """The system's own words, which libraries wrap several times."""
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return found[1] if found else "it does not speak HTTP"


def _unauthorised(address: str, status: int) -> ClusterError:
    if status == 401:
        return ClusterError(
            f"{address}: the cluster asks for a token and none was given; set RAY_AUTH_TOKEN_PATH to the file that "
            "holds the cluster's token (or RAY_AUTH_TOKEN), and do not set RAY_AUTH_MODE=disabled"
        )
    return ClusterError(
        f"{address}: the cluster refuses the token of {origin()}; have the cluster's own there (`ray get-auth-token` "
        "on its head prints it)"
    )


def _check_url(url: str, source: str) -> None:
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
        parts = None
    if not valid or parts is None:
        raise ClusterError(f"{source}: not a URL; write http://HOST:PORT of the cluster's dashboard")
    if parts.username or parts.password:
        raise ClusterError(
            f"{source.split('=')[0].split(' ')[0]}: holds a user or password; leave them out, and put the token into "
            "the file that RAY_AUTH_TOKEN_PATH names"
        )


def _looked_up(address: str, source: str) -> str:
    """The dashboard that a Ray head tells of. Ray's own look-up tries for long, so it is waited for in a thread."""
    found: list[str] = []

    def look_up() -> None:
        mode = os.environ.get("RAY_AUTH_MODE") or ("token" if own_token() else "disabled")
        with contextlib.suppress(Exception), changed_environment({"RAY_AUTH_MODE": mode}):
            found.append(str(get_address_for_submission_client(address)))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    if not found:
        raise UnreachableError(
            f"{source}: no Ray cluster tells of its dashboard there; give the dashboard's URL, http://HOST:8265"
        )
    return found[0].rstrip("/")


def _last_line(text: str) -> str:
    """What a traceback that came as text ends with."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else text
