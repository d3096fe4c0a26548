"""What ``AdaptiveLoss`` adds to the time of a training step, against plain cross-entropy in the same PyTorch loop on
real data: by model, batch, policy and how often that is asked. All by turns in one process, in CPU time of one thread.
``python -m benchmarks.overhead --write-docs``"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.screen import shown
from palf_dist import AdaptiveLoss
from palf_dist.config import DataConfig, DatasetSource, PolicyConfig
from palf_dist.evaluation.overhead import OVERHEAD_JSON, Cell, Overheads
from palf_dist.evaluation.table import markdown_table
from palf_dist.policies import make_policy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, load_policy, policy_bytes
from palf_dist.tasks.datasets import load_dataset

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "results_overhead.md"
ROUNDS = 31
FEWEST_ROUNDS = 6  # from which on the order of the rounds gives the median a 95 % interval
BATCHES, REFRESHES = (64, 128, 512), (10, 100)
ROWS = 6000  # of a dataset, a tenth of them for validation
VOCABULARY, WORDS = 2048, 32
BLOCK_SECONDS, BLOCK_STEPS = 0.02, 50  # a model is timed for so long at once, in so many steps at most
NEVER = 10**9

POLICIES = {
    "robust": PolicyConfig(kind="robust"),
    "informed": PolicyConfig(kind="informed"),
    "robust, contrastive": PolicyConfig(kind="robust", basis=("ce", "robust_ce", "info_nce")),
    "palf": PolicyConfig(kind="palf"),
}
"""The default one; the kind of the published one, which is shown validation and training rows; the default one with the
contrastive loss in its mixture; the paper's, whose mixture holds it and which reads the Hessian trace."""
PUBLISHED = "informed"


class Classifier(nn.Module):
    """Logits and the features before the last layer."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.output = body, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.output(features), features


class Encoder(nn.Module):
    """Words -> pre-norm encoder -> mean."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.zeros(WORDS, width))
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.words(tokens) + self.places).mean(1)


def mlp(inputs: int, *hidden: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def conv(*channels: int) -> nn.Module:
    layers, inputs = [], 1
    for width in channels:
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Model:
    dataset: str
    body: Callable[[], nn.Module]
    width: int  # of its features


MODELS = {
    "MLP 64": Model("digits", lambda: mlp(64, 64), 64),
    "MLP 512-512": Model("fashion-mnist", lambda: mlp(784, 512, 512), 512),
    "conv 8-16": Model("digits", lambda: conv(8, 16), 16),
    "conv 32-64-128": Model("fashion-mnist", lambda: conv(32, 64, 128), 128),
    "transformer 32": Model("newsgroups", lambda: Encoder(32, 1), 32),
    "transformer 64, 2 layers": Model("newsgroups", lambda: Encoder(64, 2), 64),
}
"""A small and a larger one of each kind of inner model; the first has the hidden layer of configs/palf12.yaml's."""


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    held_back: tuple[Tensor, Tensor]
    classes: int

    @property
    def words(self) -> bool:
        return not self.x.is_floating_point()


def load(name: str) -> Data:
    """Rows of a dataset of the registry, which is fetched where the cache does not hold it."""
    found = load_dataset(DatasetSource(name=name), DataConfig.model_construct())  # its lists are not read
    order = np.random.default_rng(0).permutation(found.rows)[:ROWS]
    if found.images is not None:
        x = torch.from_numpy(found.images[order]).movedim(3, 1).float() / 255
    else:
        assert found.words is not None
        words = found.words[order, :WORDS].astype(np.int64)
        x = torch.from_numpy(np.where(words > 0, 1 + words % (VOCABULARY - 1), 0))
    y, held = torch.from_numpy(found.labels[order]), len(order) // 10
    return Data(x[held:].contiguous(), y[held:], (x[:held].contiguous(), y[:held]), len(found.class_names))


def initial_policy(config: PolicyConfig) -> PolicyArtefact:
    """The policy before meta-training: its work is that of a trained one."""
    spec = policy_spec(config)
    mean, std = np.zeros(len(spec.features), np.float32), np.ones(len(spec.features), np.float32)
    return PolicyArtefact(spec, make_policy(spec, mean.tolist(), std.tolist()).initial(), mean, std)


class Training:
    """One model in training, with a policy or with plain cross-entropy; all start from the same weights, and see the
    same batches."""

    def __init__(self, model: Model, data: Data, batch: int, policy: PolicyArtefact | None) -> None:
        torch.manual_seed(0)
        self.network = Classifier(model.body(), model.width, data.classes)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.001, weight_decay=0.01)
        self.data, self.batch, self.draw = data, batch, torch.Generator().manual_seed(0)
        self.criterion: AdaptiveLoss | None = None
        if policy is not None:
            held_back, labels = data.held_back
            self.criterion = AdaptiveLoss(
                policy,
                total_steps=NEVER,
                class_counts=torch.bincount(data.y, minlength=data.classes),
                validation=lambda: (self.network(held_back)[0], labels),
                training_rows=None if data.words else (data.x, data.y),
            )

    def seconds(self, steps: int, refresh_every: int = NEVER) -> float:
        """CPU seconds of one step, the mean of so many; the policy is asked at the first one, then so often."""
        batches = [torch.randperm(len(self.data.y), generator=self.draw)[: self.batch] for _ in range(steps)]
        x, y, network, optimizer, criterion = self.data.x, self.data.y, self.network, self.optimizer, self.criterion
        if criterion is not None:
            criterion.refresh_every = refresh_every
        begun = time.process_time()
        for index in batches:
            logits, features = network(x[index])
            if criterion is None:
                functional.cross_entropy(logits, y[index]).backward()
            else:
                criterion(logits, y[index], features, index=index).backward()
                criterion.step(network, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        return (time.process_time() - begun) / steps


@dataclass(frozen=True)
class Round:
    """CPU seconds of a step: with plain cross-entropy, with a policy between two refreshes, and at one."""

    plain: float
    between: float
    refresh: float

    def ratio(self, refresh_every: int) -> float:
        """Of the mean step with a policy that is asked so often, to the plain one."""
        return (self.between + (self.refresh - self.between) / refresh_every) / self.plain


def measure(
    model: Model, data: Data, batch: int, policies: Mapping[str, PolicyArtefact], rounds: int
) -> dict[str, list[Round]]:
    """Rounds of a block of steps each way, by turns from the first to the last and from the last to the first."""
    plain = Training(model, data, batch, None)
    adaptive = {name: Training(model, data, batch, policy) for name, policy in policies.items()}
    plain.seconds(2)
    steps = min(max(round(BLOCK_SECONDS / max(plain.seconds(2), 1e-6)), 1), BLOCK_STEPS)
    for training in adaptive.values():
        training.seconds(2, 1)
    found: dict[str, list[Round]] = {name: [] for name in policies}
    for number in range(rounds):
        turn = 1 if number % 2 else -1
        before = plain.seconds(steps)
        seconds = {}
        for name in [*adaptive][::turn]:
            seconds[name] = adaptive[name].seconds(steps), adaptive[name].seconds(max(steps // 4, 1), 1)
        after = plain.seconds(steps)
        for name, both in seconds.items():
            found[name].append(Round((before + after) / 2, *both))
    return found


def cell(model: str, batch: int, policy: str, refresh: int, rounds: Sequence[Round]) -> Cell:
    """The median over the rounds, with its interval by their order."""
    ratios = [each.ratio(refresh) for each in rounds]
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    assert not math.isnan(interval.low + interval.high), f"{len(rounds)} rounds are too few for an interval"
    low, middle, high = (round(100 * (each - 1), 2) for each in (interval.low, float(np.median(ratios)), interval.high))
    plain = round(1e6 * float(np.median([each.plain for each in rounds])), 1)
    return Cell(model=model, batch=batch, policy=policy, refresh=refresh, percent=middle, ci95=(low, high), plain=plain)


def tables(found: Overheads) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By its title, a header and rows: one table for each refresh interval."""
    policies = list(dict.fromkeys(each.policy for each in found.cells))
    made = {}
    for refresh in dict.fromkeys(each.refresh for each in found.cells):
        rows: dict[tuple[str, int], list[str]] = {}
        for each in found.cells:
            if each.refresh == refresh:
                row = rows.setdefault((each.model, each.batch), [each.model, str(each.batch), f"{each.plain:,.0f} us"])
                row.append(f"{each.percent:+.1f} ({each.ci95[0]:+.1f} to {each.ci95[1]:+.1f})")
        title = f"The policy asked every {refresh} steps"
        made[title] = ["model", "batch", "plain step", *(f"{name}, %" for name in policies)], list(rows.values())
    return made


def page(found: Overheads) -> str:
    parts = "\n".join(f"## {title}\n\n{markdown_table(table)}" for title, table in tables(found).items())
    return f"""# What the policy adds to the time of a training

Written by `python -m benchmarks.overhead --write-docs`; [{OVERHEAD_JSON}]({OVERHEAD_JSON}) has the figures, which
`palf-dist results` reads: of them those of {found.measured_with}, asked every {found.refresh} steps.

Additional CPU time of a training step with `AdaptiveLoss` against `F.cross_entropy`, in percent: the median over
{found.rounds} rounds, and its 95 % interval by their order. AdamW, float32, PyTorch {found.torch}. MLP 64 and conv 8-16
read digits (8 x 8), MLP 512-512 and conv 32-64-128 fashion-mnist (28 x 28), the transformers the first {WORDS} words of
newsgroups; up to {ROWS} rows, of which a tenth is held back for validation.

{parts}
Every policy is at its starting point, unless a file was given. *informed* is the kind of the published one: at a
refresh it reads the held-back rows with the model. *contrastive* has info_nce in its mixture. *palf* is the paper's
policy: five basis losses, info_nce among them, and at a refresh the Hessian trace, four backward passes through the
backward pass. A round times steps between two refreshes and steps that are one apart from each other, and weighs them
as a run would. The training rows' neighbours, which an informed policy looks up once before the first step, are not in
it.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"at least {FEWEST_ROUNDS}; default {ROUNDS}")
    parser.add_argument("--policy", help="time a policy file, or its folder, in the place of all others")
    parser.add_argument("--write-docs", action="store_true", help=f"also write docs/{PAGE} and docs/{OVERHEAD_JSON}")
    options = parser.parse_args(arguments)
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds takes {FEWEST_ROUNDS} or more")
    if options.policy:
        given = load_policy(options.policy)
        policies, judged = {given.spec.kind: given}, given.spec.kind
    else:
        policies, judged = {name: initial_policy(config) for name, config in POLICIES.items()}, PUBLISHED
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = {name: load(name) for name in dict.fromkeys(model.dataset for model in MODELS.values())}
    cells = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AdaptiveLoss: no training_rows")  # words have no neighbours
        for name, model in MODELS.items():
            for batch in BATCHES:
                timed = measure(model, data[model.dataset], batch, policies, options.rounds)
                cells += [cell(name, batch, policy, n, timed[policy]) for n in REFRESHES for policy in policies]
    found = Overheads(
        rounds=options.rounds,
        policy=judged,
        refresh=REFRESHES[-1],
        digest=json.loads(policy_bytes(policies[judged])[1])["sha256"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cells=tuple(cells),
    )
    console = Console(width=160)
    for title, of in tables(found).items():
        console.print(shown(of, title))
    if options.write_docs:
        (DOCS / OVERHEAD_JSON).write_text(found.model_dump_json(indent=1) + "\n")
        (DOCS / PAGE).write_text(page(found))


if __name__ == "__main__":
    main()
