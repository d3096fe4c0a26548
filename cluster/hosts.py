"""Several hosts on one Linux machine, with Ray across them: for trying out and testing what crosses a network.

    python cluster/hosts.py up --hosts 3
    python cluster/hosts.py exec laptop -- ray status --address head:6379
    python cluster/hosts.py cut worker-1         # pull its network cable; `heal` plugs it in again
    python cluster/hosts.py down

A host is a set of Linux namespaces: its own network card, hostname, processes, /dev/shm and /run, in which its home
folder (with Ray's token file) and Ray's session folder lie; the rest of the file system is shared, as over NFS. A
switch connects them with each other and with the 'laptop', which has no Ray, and with nothing else. Nothing is left on
the disk: all hosts are gone once the laptop's first process is. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LAPTOP = "laptop"
HEAD = "head"
GCS_PORT = 6379
DASHBOARD_PORT = 8265
NETWORK = "10.77.0"
HOME = "/run/home"
SESSIONS = "/run/ray"
STORE_BYTES = 100_000_000
START_SECONDS = 180
START_ATTEMPTS = 3
RAYLET = "raylet"
WORKER = "ray::Worker"  # the name that Ray gives to processes of palf_dist's actor
NAMESPACES = ("--mount", "--uts", "--net", "--pid")
TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "hostname": "hostname"}
ON_A_BARE_PATH = str(Path(sys.executable).parent)  # where `ray` is, also when no virtual environment is active

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
}
"""A host that is cut off is noticed after about 4 s, with Ray's own settings after a minute."""

FIRST_PROCESS = """
set -e
read -r token
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/home/.ray /run/ray
umask 077
echo "$token" > /run/home/.ray/auth_token
if test -n "$2"; then
  echo "$2" > /run/hosts
  chmod 644 /run/hosts
  mount --bind /run/hosts /etc/hosts
fi
ip link set lo up
exec "$3" -ISc "$4" "$0"
"""
STAY = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)
sys.stdin.read()
"""
"""A host lives as long as this program: until its standard input ends, or it is killed. It adopts the host's orphans,
which are gone at once when they end: nobody has to wait for them. That the host is ready is for it to say: while the
shell becomes this program, the process has no command line to be found by."""


class HostsError(RuntimeError):
    """The hosts cannot be had, or there are none; the message says why."""


def check() -> None:
    """Raises HostsError where this machine or this user cannot have hosts of his own."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise HostsError("hosts of network namespaces need Linux and root")
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise HostsError(f"a tool is missing: apt-get install {' '.join(missing)}")
    trial = ("unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/run")
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"namespaces are forbidden here: {done.stderr.strip()}")


class Hosts:
    """The hosts of one name on this machine. Which there are is read from the process table, never from a file."""

    def __init__(self, name: str = "palf") -> None:
        self.name = name
        self._started: list[subprocess.Popen[str]] = []
        self._lifeline: int | None = None  # while this end of a pipe is open, the hosts live

    def up(self, count: int = 3, cpus: int = 1, *, daemon: bool = True) -> None:
        """``wire`` hosts and start Ray on all of them, with ``cpus`` CPUs each. All or none."""
        names = self.wire(count, daemon=daemon)
        try:
            self.join(HEAD, cpus)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda name: self.join(name, cpus), names[1:]))
        except BaseException:
            self.down()
            raise

    def wire(self, count: int, *, daemon: bool = True) -> list[str]:
        """Make ``count`` hosts without Ray, the head and its workers, and connect them. Returns their names.

        What an earlier call left is removed first. Unless ``daemon``, they end with this process, however it ends.
        """
        check()
        self.down()
        token = secrets.token_hex(32)
        names = [HEAD, *(f"worker-{number}" for number in range(1, count))]
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate([*names, LAPTOP], 1)}
        table = "\n".join(f"{address} {name}" for name, address in {"localhost": "127.0.0.1", **addresses}.items())
        try:
            self._start_first_process(LAPTOP, token, table, daemon=daemon)
            self._ip(LAPTOP, "link add switch type bridge")
            self._ip(LAPTOP, f"address add {addresses[LAPTOP]}/24 dev switch")
            self._ip(LAPTOP, "link set switch up")
            for name in names:
                self._start_first_process(name, token, within=self._first(LAPTOP))
                self._ip(LAPTOP, f"link add {name} type veth peer name eth0 netns {self._first(name)}")
                self._ip(LAPTOP, f"link set {name} master switch up")
                self._ip(name, f"address add {addresses[name]}/24 dev eth0")
                self._ip(name, "link set eth0 up")
        except BaseException:
            self.down()
            raise
        return names

    def down(self) -> None:
        """End everything that runs on these hosts, and them. Nothing happens where there are none."""
        with contextlib.suppress(HostsError, ProcessLookupError):
            first = self._first(LAPTOP)
            os.kill(first, signal.SIGKILL)  # takes all hosts along: they are within its process namespace
            while Path(f"/proc/{first}/ns/pid").exists():
                time.sleep(0.02)
        for process in self._started:
            process.communicate()
        self._started = []
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def join(self, host: str, cpus: int = 1) -> None:
        """Start Ray on ``host``, in place of all that runs there. Workers need the head."""
        settings = [
            f"--num-cpus={cpus}",
            f"--object-store-memory={STORE_BYTES}",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        ]
        address = self._address(host)
        if host == HEAD:
            settings += [
                "--head",
                f"--port={GCS_PORT}",
                "--dashboard-host=0.0.0.0",
                f"--dashboard-port={DASHBOARD_PORT}",
                f"--temp-dir={SESSIONS}",
                f"--system-config={json.dumps(HEALTH_CHECKS)}",
            ]
        else:
            settings.append(f"--address={self._address(HEAD)}:{GCS_PORT}")
        log = f"{SESSIONS}/start.log"  # Ray's processes keep their starter's output open: a pipe would never end
        start = f'ray start "$@" >{log} 2>&1 </dev/null || {{ cat {log} >&2; exit 1; }}'
        arguments = ("sh", "-c", start, "sh", f"--node-ip-address={address}", *settings)
        for _ in range(START_ATTEMPTS):  # Ray gives a node 30 s, which a busy machine can exceed
            self.signal(host, signal.SIGKILL)
            try:
                done = self.run(host, *arguments, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise HostsError(f"Ray did not start on {host} within {START_SECONDS} s") from error
            if done.returncode == 0:
                return
        raise HostsError(f"Ray did not start on {host}:\n{done.stderr}")

    def command(self, host: str, *command: str) -> list[str]:
        """What to call on this machine to have ``command`` run on ``host``, in the same folder and with the token."""
        variables = [f"HOME={HOME}", f"RAY_TMPDIR={SESSIONS}", "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"]
        variables.append(f"PATH={ON_A_BARE_PATH}:{os.environ.get('PATH', os.defpath)}")
        forgotten = [f"--unset={name}" for name in os.environ if name.startswith("RAY_")]
        enter = ["nsenter", f"--target={self._first(host)}", *NAMESPACES, "--"]
        return [*enter, "env", f"--chdir={Path.cwd()}", *forgotten, *variables, *command]

    def run(self, host: str, *command: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` on a host."""
        return subprocess.run(self.command(host, *command), check=False, **options)

    def cut(self, host: str) -> None:
        """Pull the network cable of ``host``: everything on it goes on, and nobody hears of it any more."""
        self._ip(LAPTOP, f"link set {host} down")

    def heal(self, host: str) -> None:
        """Plug the cable in again. A host that was given up meanwhile has to ``join`` once more."""
        self._ip(LAPTOP, f"link set {host} up")

    def signal(self, host: str, number: int, process: str = "") -> int:
        """Send a signal to every process on ``host`` but its first whose name begins with ``process``, such as RAYLET
        or WORKER; number 0 sends nothing. Returns how many there were."""
        first = self._first(host)
        namespace = os.readlink(f"/proc/{first}/ns/pid")
        hit = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int(folder.name) == first or os.readlink(folder / "ns/pid") != namespace:
                    continue
                if (folder / "comm").read_text().startswith(process):
                    os.kill(int(folder.name), number)
                    hit += 1
        return hit

    def _start_first_process(
        self, host: str, token: str, table: str = "", *, within: int | None = None, daemon: bool = True
    ) -> None:
        enter = () if within is None else ("nsenter", f"--target={within}", "--mount", "--net", "--pid", "--")
        unshare = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
        read, write = os.pipe()
        process = subprocess.Popen(
            [*enter, *unshare, "sh", "-c", FIRST_PROCESS, self._mark(host), host, table, sys.executable, STAY],
            stdin=read,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=(write,) if daemon else (),  # who holds the other end himself never comes to the end
        )
        os.write(write, f"{token}\n".encode())
        os.close(read)
        if daemon:
            os.close(write)
        else:
            self._lifeline = write
        self._started.append(process)
        assert process.stdout is not None
        said = process.stdout.readline()
        if said != "ready\n":
            raise HostsError(f"{host} did not start: {said}{process.stdout.read()}")

    def _mark(self, host: str) -> str:
        return f"palf-hosts/{self.name}/{host}"

    def _first(self, host: str) -> int:
        """The first process of a host, as numbered outside."""
        mark = self._mark(host).encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "cmdline").read_bytes().split(b"\0"):
                    status = (folder / "status").read_text()
                    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                    if len(numbers) > 1 and numbers[-1] == "1":
                        return int(folder.name)
        raise HostsError(f"there is no host {host!r} of the name {self.name!r}; see `python cluster/hosts.py up`")

    def _address(self, host: str) -> str:
        for line in Path(f"/proc/{self._first(host)}/root/etc/hosts").read_text().splitlines():
            address, name = line.split()
            if name == host:
                return address
        raise AssertionError(host)

    def _ip(self, host: str, arguments: str) -> None:
        enter = ["nsenter", f"--target={self._first(host)}", "--net", "--", "ip"]
        done = subprocess.run([*enter, *arguments.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostsError(f"ip {arguments}: {done.stderr.strip()}")


@contextlib.contextmanager
def hosts(count: int = 3, cpus: int = 1) -> Iterator[Hosts]:
    """Hosts with Ray that are there inside the block, for as long as this process lives, and touch no others."""
    made = Hosts(f"palf-{os.getpid()}")
    made.up(count, cpus, daemon=False)
    try:
        yield made
    finally:
        made.down()


def main() -> None:
    """The commands above. What goes wrong is one message on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description="Several hosts with Ray on one Linux machine.")
    parser.add_argument("--name", default="palf", help="tells several sets of hosts apart (default %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start hosts with Ray: head, worker-1, worker-2, ...")
    up.add_argument("--hosts", type=int, default=3, help="how many, the head included (default %(default)s)")
    commands.add_parser("down", help="end the hosts, and whatever an earlier crash left of them")
    execute = commands.add_parser("exec", help="run a command on a host, or on 'laptop', which has no Ray")
    described = {
        "cut": "pull the network cable of a host",
        "heal": "plug it in again",
        "kill-raylet": "SIGKILL what makes a host a node of the cluster",
        "freeze": "SIGSTOP the palf_dist workers of a host: a slow node",
        "thaw": "SIGCONT them",
        "join": "start Ray on a host again",
    }
    for command in (up, commands.add_parser("join", help=described.pop("join"))):
        command.add_argument("--cpus", type=int, default=1, help="CPUs of each host (default %(default)s)")
    for name, help_text in described.items():
        commands.add_parser(name, help=help_text)
    for name, command in commands.choices.items():
        if name not in ("up", "down"):
            command.add_argument("host", metavar="HOST")
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    chosen = parser.parse_args()
    try:
        _do(Hosts(chosen.name), chosen)
    except HostsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _do(here: Hosts, chosen: argparse.Namespace) -> None:
    match chosen.command:
        case "up":
            here.up(chosen.hosts, chosen.cpus)
            print(f"dashboard and jobs: http://{HEAD}:{DASHBOARD_PORT}, to be reached from the hosts and the laptop")
        case "down":
            here.down()
        case "exec":
            arguments = chosen.arguments[chosen.arguments[:1] == ["--"] :]
            command = here.command(chosen.host, *(arguments or ["bash"]))
            os.execvp(command[0], command)
        case "cut":
            here.cut(chosen.host)
        case "heal":
            here.heal(chosen.host)
        case "join":
            here.join(chosen.host, chosen.cpus)
        case "kill-raylet":
            here.signal(chosen.host, signal.SIGKILL, RAYLET)
        case "freeze":
            here.signal(chosen.host, signal.SIGSTOP, WORKER)
        case "thaw":
            here.signal(chosen.host, signal.SIGCONT, WORKER)


if __name__ == "__main__":
    main()
