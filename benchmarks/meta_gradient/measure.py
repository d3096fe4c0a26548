"""Times in alternating rounds on one core, errors, products; and memory, of each contender in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import cpu_model
from benchmarks.meta_gradient.contenders import CONTENDERS, OURS, UNROLL, Run
from benchmarks.meta_gradient.record import CaseRecord, Figures, Performance, Spread, ratios
from benchmarks.meta_gradient.workloads import Case, make_problem

ROOT = Path(__file__).parents[2]
PEAK_SIZE, PEAK_TIMES = 1536, 12
MB = 1e6


@contextmanager
def one_core() -> Iterator[None]:
    """One core for this process and the threads that start in here, one thread for torch, no denormals: as in workers
    that meta-train."""
    threads = torch.get_num_threads()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if before is not None:
        os.sched_setaffinity(0, {max(before)})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        if before is not None:
            os.sched_setaffinity(0, before)


def matmul_peak() -> float:
    """Floating-point operations of large matrix products in float32, in a second of CPU time; the best of some."""
    a, b = torch.randn(PEAK_SIZE, PEAK_SIZE), torch.randn(PEAK_SIZE, PEAK_SIZE)
    best = np.inf
    for _ in range(PEAK_TIMES):
        begun = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - begun)
    return 2 * PEAK_SIZE**3 / best


def products(run: Run) -> int:
    """Floating-point operations of the matrix products of one call, counted by torch."""

    def in_place(base: Sequence[int], left: Sequence[int], right: Sequence[int], **_: object) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]  # torch counts baddbmm, and leaves out baddbmm_

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()


def alternate(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU milliseconds of each in rounds, in each of which another one comes first."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            begun, worked = time.perf_counter(), time.process_time()
            runs[name]()
            cpu[name].append(1e3 * (time.process_time() - worked))
            wall[name].append(1e3 * (time.perf_counter() - begun))
    return wall, cpu


def relative(gradient: np.ndarray, reference: np.ndarray) -> float:
    return float(f"{np.linalg.norm(gradient - reference) / np.linalg.norm(reference):.2g}")


def measure(case: Case, names: Sequence[str], rounds: int, peak: float, memory: Mapping[str, float]) -> CaseRecord:
    """The case by these contenders; palf_dist and its unroll are among them. ``memory``: bytes of each, where known."""
    names = [name for name in names if CONTENDERS[name].takes(case)]
    gradients: dict[tuple[str, torch.dtype], np.ndarray] = {}
    for dtype in (torch.float64, torch.float32):
        problem = make_problem(case, dtype)
        runs = {name: CONTENDERS[name].load()(problem) for name in names}
        gradients |= {(name, dtype): run() for name, run in runs.items()}
    reference = gradients[UNROLL, torch.float64]
    flops = {"adjoint": products(runs[OURS]), "unroll": products(runs[UNROLL])}
    wall, cpu = alternate(runs, rounds)
    against = ratios(cpu)

    def figures(name: str) -> Figures:
        spread = Spread.of(cpu[name])
        return Figures(
            wall=Spread.of(wall[name]),
            cpu=spread,
            ratio=against[name],
            error32=relative(gradients[name, torch.float32], reference),
            error64=relative(gradients[name, torch.float64], reference),
            peak_share=round(flops[CONTENDERS[name].products] / (spread.median / 1e3) / peak, 4),
            memory=round(memory[name] / MB, 1) if name in memory else None,
        )

    return CaseRecord(
        letter=case.letter,
        title=case.workload.title,
        tasks=case.tasks,
        optimiser=case.optimiser,
        gigaflops={name: round(count / 1e9, 4) for name, count in flops.items()},
        contenders={name: figures(name) for name in names},
    )


def performance(
    cases: Sequence[Case], absent: Mapping[str, str], rounds: int, tell: Callable[[str], None]
) -> Performance:
    """All of it but the contenders in ``absent``; ``tell`` is told what comes next."""
    names = [name for name in CONTENDERS if name not in absent]
    tell("memory")
    memory = peak_memory(cases, names)
    records = []
    with one_core():
        peak = matmul_peak()
        for case in cases:
            tell(str(case))
            records.append(measure(case, names, rounds, peak, memory.get(case, {})))
    packages = ["torch", "numpy", *(package for name in names for package in CONTENDERS[name].packages)]
    return Performance(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        threads=1,
        python=platform.python_version(),
        versions={package: metadata.version(package) for package in dict.fromkeys(packages)},
        rounds=rounds,
        matmul_gigaflops=round(peak / 1e9, 1),
        missing=absent,
        cases=tuple(records),
    )


def peak_memory(cases: Sequence[Case], names: Sequence[str]) -> dict[Case, dict[str, float]]:
    """Bytes at the peak of each contender, of the cases with the most tasks of their workload; nothing where the
    system does not tell them (Linux does)."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    most = {case.letter: case.tasks for case in sorted(cases, key=lambda case: case.tasks)}
    wanted = [
        (case, name)
        for case in cases
        for name in names
        if case.tasks == most[case.letter] and CONTENDERS[name].takes(case)
    ]
    found: dict[Case, dict[str, float]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (case, name), peak in zip(wanted, pool.map(lambda each: _in_own_process(*each), wanted), strict=True):
            found.setdefault(case, {})[name] = peak
    return found


def _in_own_process(case: Case, name: str) -> float:
    command = [sys.executable, "-m", __name__, case.letter, str(case.tasks), case.optimiser, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return float(json.loads(done.stdout.splitlines()[-1]))


def _take(case: Case, name: str) -> int:
    """Bytes that a meta-gradient takes at its peak: the high-water mark during a second one less the resident size
    before it. What the first one left in the allocator is given back in between."""
    torch.set_num_threads(1)
    run = CONTENDERS[name].load()(make_problem(case, torch.float32))
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _memory_line("VmRSS")
    run()
    return _memory_line("VmHWM") - before


def _memory_line(name: str) -> int:
    """Bytes that /proc/self/status gives for ``name``."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    letter, tasks, optimiser, contender = sys.argv[1:]
    print(json.dumps(_take(Case(letter, int(tasks), optimiser), contender)))
