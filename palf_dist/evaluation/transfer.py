"""Transfer: what a policy is worth on architectures, or in runs of a length, that its meta-training had none of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from palf_dist.architecture_config import Architecture
from palf_dist.config import RunConfig
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.headline import Figure
from palf_dist.evaluation.methods import REFERENCE
from palf_dist.evaluation.statistics import Comparison
from palf_dist.evaluation.table import to_markdown

KINDS = ("architecture", "horizon")

FREE_OF_TRANSFERS = (
    "tasks.architectures",
    "inner.steps",
    "inner.grids",
    "inner.learning_rate",
    "inner.weight_decay",
    "evaluation",
    "distributed.memory_per_worker",
)
"""Fields in which an evaluation of a transfer may differ from the runs that it is reported with."""


@dataclass(frozen=True)
class Transfer:
    """The held-out comparison of one kind of transfer."""

    setting: str  # what was trained on, and what was judged
    tuning: str  # where learning rate and L2 strength come from
    compared: Sequence[Comparison]
    pairs: Sequence[Comparison]


def transfer_of(config: RunConfig, card: Mapping[str, Any], place: str) -> str | None:
    """Which of ``KINDS`` an evaluation is, by its configuration and the card of its policy; None where the policy is
    judged as it was trained. Raises RunDirectoryError where it is part one and part the other."""
    steps = card.get("inner_steps", config.inner.steps) != config.inner.steps
    judged = config.tasks.architectures
    try:
        trained = _trained_on(card) if "architectures" in card else judged  # cards of earlier versions do not tell
    except ValidationError as error:
        raise RunDirectoryError(
            f"{place}: the card of its policy names an architecture that this version does not know "
            f"({error.errors()[0]['msg']}); use the version that trained it"
        ) from error
    known = [item.kind for item in judged if item in trained]
    if len(known) < len(judged) and (known or steps):
        also = f"with {', '.join(known)}, which its policy was trained on" if known else "in runs of another length"
        raise RunDirectoryError(
            f"{place}: judges a policy on other architectures than those of its training, and {also}: change one of "
            "tasks.architectures and inner.steps, and name no architecture of the training among others"
        )
    return "horizon" if steps else None if known else "architecture"


def compare_transfer(
    kind: str, config: RunConfig, card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Transfer:
    """What the rows say of a kind of transfer; ``config`` and ``card`` are those of one of the runs that have them."""
    if kind == "horizon":
        setting = f"meta-trained in runs of {card['inner_steps']} steps, at use in runs of {config.inner.steps}"
    else:
        trained, kinds = _trained_on(card), {row["architecture"] for row in rows}
        judged = [item for item in config.tasks.architectures if item.kind in kinds]
        whole = any(item.kind in kinds for item in trained)  # their kinds alone do not tell them apart
        setting = f"meta-trained on {_named(trained, whole)}, at use on {_named(judged, whole)}"
    datasets = sorted({row["dataset"] for row in rows})
    return Transfer(f"{setting}, judged on {', '.join(datasets)} alone", _tuning(config), *held_out(rows))


def _trained_on(card: Mapping[str, Any]) -> tuple[Architecture, ...]:
    """The architectures that a card names, with the defaults of fields that its version did not have."""
    return TypeAdapter(tuple[Architecture, ...]).validate_python(card["architectures"])


def _named(architectures: Sequence[Architecture], whole: bool) -> str:
    """Their kinds, with what differs from the defaults where it is to be ``whole``."""
    words = []
    for item in architectures:
        fields = item.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True) if whole else {}
        given = ", ".join(f"{name} {value}" for name, value in fields.items())
        words.append(f"{item.kind} ({given})" if given else item.kind)
    return ", ".join(sorted(dict.fromkeys(words)))


def _tuning(config: RunConfig) -> str:
    values = {"Learning rate": config.inner.learning_rate, "L2 strength": config.inner.weight_decay}
    tuned = " and ".join(name for name, value in values.items() if value == "tuned")
    given = " and ".join(f"{name} {value:g}" for name, value in values.items() if value != "tuned")
    return " ".join(
        [f"Tuned anew for CE there, on the training datasets: {tuned}."] * bool(tuned)
        + [f"Given, and not tuned there: {given}."] * bool(given)
    )


def transfer_figures(transfers: Mapping[str, Transfer]) -> dict[str, Figure]:
    """A figure for each of ``KINDS``: the policy against tuned CE where it is put to the other use."""
    figures = {}
    for kind in KINDS:
        name = f"diff_{kind}_transfer"
        figures[name] = Figure(name, f"takes a run of palf-dist evaluate with another {kind}, kept by --run-dir")
        if kind in transfers:
            pair = next(item for item in transfers[kind].pairs if item.reference == REFERENCE)
            estimate, words = pair.overall.difference, f"{kind} transfer: {transfers[kind].setting}"
            figures[name] = (
                Figure(name, words, estimate.mean, estimate, REFERENCE)
                if estimate.tasks
                else Figure(name, f"no task on which the policy has a result; {words}")
            )
    return figures


def transfer_page(transfers: Mapping[str, Transfer]) -> list[str]:
    """The sections of results.md."""
    return [
        part
        for kind, transfer in transfers.items()
        for part in (
            f"## {kind.capitalize()} transfer\n",
            f"The policy, {transfer.setting}. {transfer.tuning}\n",
            to_markdown(transfer.compared, transfer.pairs),
        )
    ]
