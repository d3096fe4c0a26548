"""What the policy adds to the time of a training: ``AdaptiveLoss`` against plain cross-entropy in the same PyTorch
loop, by turns in one process, so that what else the machine does meets both.
``python -m benchmarks.overhead --write-docs``"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from palf_dist import AdaptiveLoss
from palf_dist.config import PolicyConfig
from palf_dist.evaluation.overhead import OVERHEAD_JSON, Overhead, Overheads
from palf_dist.evaluation.table import markdown_table
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, load_policy, policy_bytes

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "results_overhead.md"
ROUNDS, STEPS = 31, 150
FEWEST_ROUNDS = 6  # from which on the order of the rounds gives the median a 95 % interval
ROWS, VALIDATION_ROWS, BATCH, CLASSES, VOCABULARY = 640, 160, 32, 10, 2048


class Encoder(nn.Module):
    """Words -> pre-norm encoder -> mean -> classes."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.blocks(self.words(tokens) + self.places).mean(1))


def mlp(inputs: int, *hidden: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))


def conv(inputs: int, *channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in channels:
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a row
    words: bool = False


MODELS = {
    "MLP 64": Model(lambda: mlp(64, 64), (64,)),
    "MLP 512-512": Model(lambda: mlp(784, 512, 512), (784,)),
    "conv 8-16": Model(lambda: conv(1, 8, 16), (1, 8, 8)),
    "conv 32-64-128": Model(lambda: conv(3, 32, 64, 128), (3, 32, 32)),
    "transformer 32": Model(lambda: Encoder(32, 1, 32), (32,), words=True),
    "transformer 64, 2 layers": Model(lambda: Encoder(64, 2, 32), (32,), words=True),
}
"""A small and a larger one of each kind of inner model. The first has the hidden layer of that of configs/palf12.yaml,
which reads pictures of 8 x 8 too."""


def initial_policy() -> PolicyArtefact:
    """The policy that configs/palf12.yaml starts from: its work is that of a trained one."""
    spec = policy_spec(PolicyConfig(kind="informed"))
    mean = np.zeros(len(spec.features), np.float32)
    return PolicyArtefact(spec, LearnedPolicy(spec, mean.tolist(), (mean + 1).tolist()).initial(), mean, mean + 1)


def train(model: Model, policy: PolicyArtefact | None, steps: int) -> float:
    """Seconds of a training with the policy, or with plain cross-entropy; rows, labels and batches are the same. The
    policy is shown validation rows, and training rows that are numbers; plain cross-entropy looks at no such rows."""
    draw = torch.Generator().manual_seed(0)
    shape = (ROWS + VALIDATION_ROWS, *model.shape)
    x = torch.randint(VOCABULARY, shape, generator=draw) if model.words else torch.randn(shape, generator=draw)
    y = torch.randint(CLASSES, (len(x),), generator=draw)
    held_back, held_back_labels = x[ROWS:], y[ROWS:]
    x, y = x[:ROWS], y[:ROWS]
    batches = [torch.randperm(ROWS, generator=draw)[:BATCH] for _ in range(steps)]
    torch.manual_seed(0)
    network = model.make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001, weight_decay=0.01)
    begun = time.perf_counter()
    if policy is None:
        for index in batches:
            functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        criterion = AdaptiveLoss(
            policy,
            total_steps=steps,
            class_counts=torch.bincount(y, minlength=CLASSES),
            validation=lambda: (network(held_back), held_back_labels),
            training_rows=None if model.words else (x, y),
        )
        for index in batches:
            criterion(network(x[index]), y[index], index=index).backward()
            criterion.step(network, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - begun


def measure(model: Model, policy: PolicyArtefact, rounds: int, steps: int) -> Overhead:
    """Rounds of one training each way, which of the two comes first by turns; a round before them does not count."""
    plain, ratios = [], []
    for number in range(rounds + 1):
        order: list[PolicyArtefact | None] = [None, policy] if number % 2 else [policy, None]
        seconds = {each is None: train(model, each, steps) for each in order}
        if number:
            plain.append(seconds[True])
            ratios.append(seconds[False] / seconds[True])
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    assert not math.isnan(interval.low + interval.high), f"{rounds} rounds are too few for an interval"

    def percent(ratio: float) -> float:
        return round(100 * (ratio - 1), 2)

    return Overhead(
        percent=percent(float(np.median(ratios))),
        ci95=(percent(interval.low), percent(interval.high)),
        seconds=round(float(np.median(plain)), 6),
    )


def cells(found: Overheads) -> tuple[list[str], list[list[str]]]:
    header = ["model", "additional time", "95 % interval", "a step with plain cross-entropy", "added to it"]
    return header, [
        [
            name,
            f"{each.percent:+.1f} %",
            f"{each.ci95[0]:+.1f} to {each.ci95[1]:+.1f} %",
            f"{1e6 * each.seconds / found.steps:,.0f} us",
            f"{1e4 * each.percent * each.seconds / found.steps:,.0f} us",
        ]
        for name, each in found.models.items()
    ]


def page(found: Overheads) -> str:
    return f"""# What the policy adds to the time of a training

Written by `python -m benchmarks.overhead --write-docs`; [{OVERHEAD_JSON}]({OVERHEAD_JSON}) has the figures, which
`palf-dist results` reads.

{markdown_table(cells(found))}
`AdaptiveLoss` with {found.measured_with} against `F.cross_entropy`, in the same PyTorch
loop with AdamW: {found.steps} steps of {BATCH} of {ROWS} rows with {CLASSES} classes, the policy asked as often as
in meta-training. A policy that reads them is shown {VALIDATION_ROWS} validation rows each time, and once the training
rows that are numbers, for their neighbours.
Each round trains once either way, one right after the other and by turns first; the figure is the median
over {found.rounds} rounds of the ratio of the two times, its interval by the order of the rounds.
Of each kind there is a small one and a larger one; "MLP 64" has the hidden layer of the inner model of
configs/palf12.yaml.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"at least {FEWEST_ROUNDS}; default {ROUNDS}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training; default {STEPS}")
    parser.add_argument("--policy", help="a policy file or its folder; default: what meta-training starts from")
    parser.add_argument("--write-docs", action="store_true", help=f"also write docs/{PAGE} and docs/{OVERHEAD_JSON}")
    options = parser.parse_args(arguments)
    if options.rounds < FEWEST_ROUNDS or options.steps < 1:
        parser.error(f"--rounds takes {FEWEST_ROUNDS} or more, --steps 1 or more")
    policy = load_policy(options.policy) if options.policy else initial_policy()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AdaptiveLoss: no training_rows")  # words have no neighbours
        models = {name: measure(model, policy, options.rounds, options.steps) for name, model in MODELS.items()}
    found = Overheads(
        rounds=options.rounds,
        steps=options.steps,
        policy=policy.spec.kind,
        digest=json.loads(policy_bytes(policy)[1])["sha256"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        models=models,
    )
    header, rows = cells(found)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if options.write_docs:
        (DOCS / OVERHEAD_JSON).write_text(found.model_dump_json(indent=1) + "\n")
        (DOCS / PAGE).write_text(page(found))


if __name__ == "__main__":
    main()
