"""The meta-gradient benchmark: that every contender is asked for the same gradient, and that the page has what was
measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.meta_gradient import __main__ as command
from benchmarks.meta_gradient import measure, peers_torch
from benchmarks.meta_gradient.contenders import COMPILED, CONTENDERS, OURS, UNROLL, missing
from benchmarks.meta_gradient.page import compiled_summary, page, summary, table, title
from benchmarks.meta_gradient.record import CaseRecord, Figures, Performance, Spread, ratios
from benchmarks.meta_gradient.workloads import WORKLOADS, Case, make_problem
from palf_dist.losses import LossContext, reference_mixture
from palf_dist.policies.static import control_vector
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX

SMALL = {"A": Case("A", 1, "sgd"), "B": Case("B", 1, "sgd"), "C": Case("C", 1, "adam"), "D": Case("D", 2, "adam")}


def figures(cpu: float, ratio: float, memory: float | None = None) -> Figures:
    spread = Spread(median=cpu, least=cpu - 1, most=cpu + 1)
    against = Spread(median=ratio, least=ratio, most=ratio)
    return Figures(wall=spread, cpu=spread, ratio=against, error32=2e-6, error64=3e-14, peak_share=0.123, memory=memory)


def found() -> Performance:
    contenders = {
        OURS: figures(10, 1, 12.5),
        UNROLL: figures(40, 4, 250),
        "TorchOpt": figures(300, 30),
        "higher": figures(200, 20),
        "JAX adjoint": figures(11, 1.1),
    }
    case = CaseRecord(
        letter="A",
        title="MLP",
        tasks=8,
        optimiser="sgd",
        gigaflops={"adjoint": 1.0, "unroll": 0.8},
        contenders=contenders,
    )
    alone = case.model_copy(update={"tasks": 1, "contenders": {OURS: figures(3, 1), UNROLL: figures(9, 3)}})
    return Performance(
        cpu="a processor",
        cores=2,
        threads=1,
        python="3.11",
        versions={"torch": "2"},
        rounds=5,
        matmul_gigaflops=80.0,
        missing={"learn2learn": "No module named 'learn2learn'"},
        cases=(alone, case),
    )


def test_ratios_are_those_of_each_round() -> None:
    cpu = {OURS: [1.0, 2.0, 4.0], "other": [3.0, 4.0, 20.0]}
    of_other = ratios(cpu)["other"]
    assert (of_other.median, of_other.least, of_other.most) == (3.0, 2.0, 5.0), "not 4 / 2, that of the medians"
    assert ratios(cpu)[OURS].most == 1.0


def test_everyone_comes_first_by_turns_and_is_timed_in_every_round() -> None:
    order: list[str] = []

    def note(name: str) -> np.ndarray:
        order.append(name)
        return np.zeros(1)

    wall, cpu = measure.alternate({name: lambda name=name: note(name) for name in "abc"}, 4)  # type: ignore[misc]
    assert "".join(order) == "abcbcacababc"
    assert all(len(times[name]) == 4 and min(times[name]) >= 0 for times in (wall, cpu) for name in "abc")


def test_products_are_counted_also_where_they_are_added_in_place() -> None:
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)

    def run() -> np.ndarray:
        return torch.bmm(a, b).baddbmm_(a, b).numpy()

    assert measure.products(run) == 2 * (2 * 2 * 3 * 4 * 5)


def test_the_page_has_every_figure_and_who_is_not_installed() -> None:
    performance = found()
    text = page(performance)
    header, rows = summary(performance)
    assert rows[0][1:4] == ["-", "-", "-"] and rows[0][header.index(UNROLL)].startswith("3x")
    assert rows[1][1:3] == ["20x (20-20)", "higher"], "the fastest of the libraries, JAX not among them"
    for case in performance.cases:
        assert title(case) in text
        _, lines = table(case, performance)
        assert [line[0] for line in lines] == [*case.contenders, "learn2learn: not installed"]
        assert all(f"| {' | '.join(line)} |" in text for line in lines)
    assert "| palf_dist | 10 (9-11) | 10 (9-11) | 1x (1-1) | 2.0e-06 | 3.0e-14 | 12.5 | 12.3 % |" in text
    assert "learn2learn is not installed: No module named" in text
    assert Performance.model_validate_json(performance.model_dump_json()) == performance


@pytest.mark.parametrize("letter", ["A", "B", "C"])
def test_networks_and_losses_of_the_peers_are_those_of_palf_dist(letter: str) -> None:
    problem = make_problem(SMALL[letter], torch.float64)
    group, model = problem.group, problem.group.model
    net = peers_torch.network(problem).double()
    task = peers_torch.Task(problem, net, 0)
    for p, value in zip(net.parameters(), task.theta0, strict=True):
        p.data = value
    inputs, labels = problem.loop.minibatch(3)
    logits, features = model.apply(group.theta0, inputs)
    z, h = net(task.batches[3][0])
    torch.testing.assert_close(z, logits[0])
    torch.testing.assert_close(h, features[0])
    alpha = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]).double()
    controls = control_vector(dict(zip(BASIS_LOSSES[:5], alpha.tolist(), strict=True)), {})[None].double()
    context = LossContext.create(group.class_mask, group.log_prior_ratio)
    want = reference_mixture(logits, labels, features, controls, context, BASIS_LOSSES[:5])
    torch.testing.assert_close(peers_torch.adaptive_loss(z, h, task.batches[3][1], alpha), want[0])
    states = problem.normalised_states
    given = problem.policy.controls(problem.phi, problem.states[:, 0])
    columns = [CONTROL_INDEX[name] for name in BASIS_LOSSES[:5]]
    torch.testing.assert_close(peers_torch.policy(problem, problem.phi, states[:, 0]), given[:, columns])


def test_both_types_have_the_same_numbers_and_the_real_one_pads() -> None:
    single, double = (make_problem(SMALL["D"], dtype) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.group.theta0.double(), double.group.theta0, rtol=0, atol=0)
    torch.testing.assert_close(single.phi.double(), double.phi, rtol=0, atol=0)
    whole = make_problem(Case("D", 8, "adam"), torch.float32).group
    assert not whole.class_mask.all() and not whole.train.mask.all() and (whole.log_prior_ratio != 0).any()
    own = whole.train.mask[torch.arange(8)[None, :, None], whole.batches]
    assert own.all(), "minibatches have real rows alone"


def test_the_compiled_one_is_compared_where_there_is_one() -> None:
    without = found()
    assert compiled_summary(without)[1] == [] and "compiled, by the medians" not in page(without)
    alone, case = without.cases
    case = case.model_copy(update={"contenders": {**case.contenders, COMPILED: figures(5, 0.5)}})
    both = without.model_copy(update={"cases": (alone, case)})
    assert compiled_summary(both)[1] == [["A, 8, sgd", "40x", "-", "2.2x", "8x", "2x"]]
    assert "| A, 8, sgd | 40x | - | 2.2x | 8x | 2x |" in page(both)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != UNROLL])
@pytest.mark.parametrize("letter", WORKLOADS)
def test_every_contender_computes_the_same_gradient(letter: str, name: str) -> None:
    case, contender = SMALL[letter], CONTENDERS[name]
    if name in missing() or not contender.takes(case):
        pytest.skip(f"{name} is not installed, or does not take part")
    if name == COMPILED and letter != "A":
        pytest.skip("a compilation takes long; tests/estimators/test_compiled.py has the other architectures")
    problem = make_problem(case, torch.float64)
    want, got = (CONTENDERS[which].load()(problem)() for which in (UNROLL, name))
    assert measure.relative(got, want) <= (1e-5 if name == "TorchOpt" else 1e-9)


@pytest.mark.slow
def test_a_small_one_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {name: "left out" for name in CONTENDERS if name not in (OURS, UNROLL)}
    monkeypatch.setattr(command, "missing", lambda: absent)
    monkeypatch.setattr(command, "DOCS", tmp_path)
    monkeypatch.setattr(command, "CASES", (SMALL["A"],))
    threads = torch.get_num_threads()
    command.main(["--rounds", "2", "--write-docs"])
    assert torch.get_num_threads() == threads
    assert "TorchOpt: not installed" in capsys.readouterr().out
    written = Performance.model_validate_json((tmp_path / "performance.json").read_text())
    (case,) = written.cases
    assert list(case.contenders) == [OURS, UNROLL] and written.missing == absent
    own, unroll = case.contenders[OURS], case.contenders[UNROLL]
    assert own.ratio.median == 1.0 and own.error64 < 1e-10 and unroll.error64 == 0.0 and own.error32 < 1e-5
    assert own.memory is not None and unroll.memory is not None and 0 < own.memory < unroll.memory
    assert 0 < own.peak_share < 1 and case.gigaflops["adjoint"] > 0
    assert page(written) == (tmp_path / "performance.md").read_text()


def test_what_cannot_be_done_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--rounds", "0"], "--rounds takes 1 or more"),
        (["--workloads", "A", "--write-docs"], "leave --workloads out"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err
