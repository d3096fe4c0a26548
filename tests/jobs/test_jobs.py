"""Jobs on a real head: refused, submitted, followed over cuts, killed, stopped and resumed, and looked at by doctor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from palf_dist.jobs.client import JobsClient, UnknownJobError
from palf_dist.jobs.follow import follow
from tests.command import SMOKE, Command
from tests.jobs.head import Head, Proxy, processes, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

RUN = ("meta-train", "--config", SMOKE, "--set", "tracking.enabled=false", "--set", "meta_learner.outer_steps=40")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started(tmp_path_factory.getbasetemp() / "palf_cache") as head:
        yield head


@pytest.fixture(autouse=True)
def as_client(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)


def in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


def wait_for(condition: Callable[[], object], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps_logged(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def drivers(run_dir: Path) -> list[psutil.Process]:
    return [found for found in processes(str(run_dir)) if {"palf_dist", "meta-train"} <= set(found.cmdline())]


def test_a_token_that_is_missing_or_wrong(cli: Command, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ("submit", "--address", head.url, "--", *RUN, "--run-dir", "/none")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    assert "the cluster refuses the token of RAY_AUTH_TOKEN" in cli.refused(*submit)
    assert "the cluster refuses the token" in cli.refused("jobs", "list", "--address", head.url)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for a token and none was given" in cli.refused(*submit)
    assert "asks for a token and none was given" in cli("doctor", "--address", head.url).out.replace("\n", " ")


def test_versions_that_differ(cli: Command, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ("submit", "--address", head.url, "--", *RUN, "--run-dir", "/none")
    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.59.1")
        assert "this machine 2.59.1; install the same here" in cli.refused(*submit)
    monkeypatch.setattr("palf_dist.jobs.entry.installed_version", lambda: "0.0.9")
    assert "the job was submitted with 0.0.9; install the same on both sides" in cli.refused(*submit)


def test_addresses_as_ray_has_them(cli: Command, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    of_head = f"127.0.0.1:{head.port}"
    assert json.loads(cli("jobs", "list", "--address", of_head, "--json").out)["jobs"] is not None
    monkeypatch.setenv("RAY_ADDRESS", head.url)
    assert cli("jobs", "list", "--address", "http://127.0.0.1:1").code == 0
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1: no Ray dashboard answers there (Connection refused)" in cli.refused("jobs", "list")


def test_what_answers_is_no_dashboard(cli: Command, head: Head) -> None:
    assert "no Ray dashboard answers" in cli.refused("jobs", "list", "--address", f"http://127.0.0.1:{head.port}")


def test_following_over_cuts_and_a_ctrl_c(cli: Command, head: Head) -> None:
    """Every line once and in order, although the connection breaks twice, and is refused for a while."""
    enough = cli.folder / "enough"
    job_id = JobsClient(head.url).submit(
        "printer",
        entrypoint=f"for i in $(seq 2000); do test -e {enough} && break; echo line $i; sleep 0.1; done; "
        "printf 'no end of line'; exit 7",
    )
    proxy = Proxy(int(head.url.rpartition(":")[2]))
    proxy.mend()
    client = JobsClient(proxy.url)

    def ctrl_c() -> None:
        wait_for(lambda: any(b"/logs/tail" in data for data in proxy.sent))
        os.kill(os.getpid(), signal.SIGINT)

    in_background(ctrl_c)
    ended = cli("jobs", "logs", "--follow", job_id, "--address", proxy.url)
    assert ended.code == 130
    assert "the job goes on" in ended.err and f"palf-dist jobs stop {job_id}" in ended.err
    texts: list[str] = []
    notices: list[str] = []

    def write(text: str) -> None:
        texts.append(text)
        if len(texts) in (2, 5) and cuts() < 2:
            in_background(outage)
        if len(texts) == 6:
            enough.touch()

    def cuts() -> int:
        return sum("connection lost" in notice for notice in notices)

    def outage() -> None:
        before = cuts()
        proxy.cut()
        wait_for(lambda: cuts() > before)
        proxy.mend()

    job = follow(client, job_id, write, notices.append)
    assert job.driver_exit_code == 7
    log = "".join(texts)
    assert log == client.logs(job_id)
    lines = [line for line in log.splitlines() if line.startswith("line ")]
    assert lines == [f"line {i + 1}" for i in range(len(lines))]
    assert log.endswith("no end of line")
    assert cuts() == 2, notices
    assert cli("jobs", "logs", "--follow", job_id, "--address", head.url).code == 7
    with pytest.raises(UnknownJobError, match="has no job nobody"):
        follow(client, "nobody", print, print)
    proxy.cut()


def test_a_run_is_stopped_resumed_killed_and_lost_and_ends_as_if_nothing_had_been(
    cli: Command, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = cli.folder / "run"
    submit = ("submit", "--address", head.url, "--max-restarts", "1")
    what = ("--", *RUN, "--run-dir", str(run_dir))
    sent = cli(*submit, "--json", *what)
    assert sent.code == 0, sent.err
    begun = json.loads(sent.out)
    assert begun["status"] == "RUNNING"
    wait_for(lambda: steps_logged(run_dir) >= 4)
    stopped = json.loads(cli("jobs", "stop", begun["job"], "--address", head.url, "--json").out)
    assert (stopped["status"], stopped["run_dir"]) == ("STOPPED", str(run_dir))
    assert "interrupted and saved" in cli("jobs", "logs", begun["job"], "--address", head.url).out
    before = steps_logged(run_dir)
    assert 4 <= before < 40

    def kill_driver_then_its_supervisor() -> None:
        wait_for(lambda: steps_logged(run_dir) >= before + 4)
        [driver] = drivers(run_dir)
        driver.kill()
        wait_for(lambda: [found for found in drivers(run_dir) if found.pid != driver.pid])
        resumed_at = steps_logged(run_dir)
        wait_for(lambda: steps_logged(run_dir) >= resumed_at + 4)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "JobSupervisor" in " ".join(process.cmdline()) and str(head.folder) in str(process.environ()):
                    process.kill()

    with ThreadPoolExecutor() as pool:
        killer = pool.submit(kill_driver_then_its_supervisor)
        ended = cli(*submit, "--follow", *what)
        killer.result()
    assert ended.code == 0, ended
    assert f"--resume {run_dir}" in ended.out
    assert "the driver was killed by SIGKILL" in ended.out and "restart 1 of 1" in ended.out
    assert "the job was lost with its node" in ended.err and "submitted again (1 of 1)" in ended.err
    alone = cli(*RUN, "--workers", "0", "--run-dir", "alone")
    assert alone.code == 0, alone.err
    policy = Path("best", "policy.safetensors")
    assert (run_dir / policy).read_bytes() == (cli.folder / "alone" / policy).read_bytes()

    jobs = json.loads(cli("jobs", "list", "--address", head.url, "--json").out)["jobs"]
    assert [job["status"] for job in jobs if job["run_dir"] == str(run_dir)] == ["SUCCEEDED", "FAILED", "STOPPED"]
    assert begun["job"] in cli("jobs", "list", "--address", head.url).out
    described = json.dumps([job.model_dump() for job in JobsClient(head.url).jobs()], default=str)
    assert head.token not in described and "outer_steps" not in described


def test_doctor_looks_at_the_cluster(cli: Command, head: Head) -> None:
    run_dir = str(cli.folder / "doctors" / "run")
    ended = cli("doctor", "--address", head.url, "--run-dir", run_dir, "--config", SMOKE, "--json")
    assert ended.code == 0, ended
    record = json.loads(ended.out)
    found = {finding["check"]: finding for finding in record["findings"]}
    assert {check for check, finding in found.items() if finding["status"] != "ok"} <= {"ports", "gpus"}
    assert found["room"]["message"] == "for 2 worker(s); the configuration asks for 2"
    assert run_dir in found["storage"]["message"] and not Path(run_dir).parent.exists()
    (head.folder / "token").chmod(0o644)
    config = cli.folder / "many.yaml"
    config.write_text(Path(SMOKE).read_text() + "distributed: {workers: 3}\n")
    ended = cli("doctor", "--address", f"127.0.0.1:{head.port}", "--config", str(config), "--run-dir", "/proc/none")
    (head.folder / "token").chmod(0o600)
    assert ended.code == 1
    shown = " ".join(ended.out.replace("│", " ").split())
    assert "3 workers" in shown and "cannot write /proc/none" in shown
    assert "other users of the machine can read the token" in shown and "2 problem(s)" in shown
