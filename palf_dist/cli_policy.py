"""The commands ``policy register|show|export|compare``: parse, call, print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from palf_dist.cli_shared import AsJson, near, output

if TYPE_CHECKING:
    from palf_dist.evaluation.policy_comparison import Difference
    from palf_dist.explanation import Explanation

Place = Annotated[
    str,
    typer.Argument(
        metavar="POLICY", help="A run directory, a policy's file or folder, a URI, models:/NAME@ALIAS, or default."
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(metavar="URI", help="MLflow server or database; default $MLFLOW_TRACKING_URI, else mlflow.db here."),
]
MOST_MOVED = 3
"""Controls that the table of ``show`` names for each feature."""

policy_app = typer.Typer(
    help="Register, show, export and compare policies: their files, cards and what they do.", no_args_is_help=True
)


@policy_app.command()
def register(
    policy: Place,
    name: Annotated[str, typer.Option(metavar="NAME", help="The registered model, which is made when it is new.")],
    alias: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="What the version is called, for instance champion.")
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Put a policy and its card into MLflow's model registry as a new version; its run adds how it was trained and its
    held-out figures to the card. One that is there already only gets the alias."""
    with output(as_json) as emit:
        from palf_dist.evaluation.policy_card import described, register_policy

        version, new = register_policy(described(policy, tracking_uri), name, alias, tracking_uri)
        address = f"models:/{name}@{alias}" if alias else version.address
        record = {"name": name, "version": version.version, "alias": alias, "new": new, "sha256": version.digest}
        emit(
            {**record, "address": address},
            f"{'registered as' if new else 'was there already as'} version {version.version} of {escape(name)}",
            f"address {address}",
        )


@policy_app.command()
def show(
    policy: Place,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for pictures of the controls against each feature.")
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """The card of a policy, and what it does in which state."""
    with output(as_json) as emit:
        import torch
        from rich.console import Group

        from palf_dist.evaluation.policy_card import card_facts, described
        from palf_dist.explanation import explain

        artefact = described(policy, tracking_uri)
        explanation = explain(artefact.policy(), torch.from_numpy(artefact.phi))
        paths = _draw(explanation, plots) if plots else []
        table = Table("", Column(overflow="fold"), show_header=False)
        for fact, value in card_facts(artefact).items():
            table.add_row(fact, escape(value))
        record = {
            "spec": asdict(artefact.spec),
            "card": artefact.card,
            "explanation": _explanation_record(explanation),
            "pictures": [str(path) for path in paths],
        }
        emit(record, Group(table, _explanation_table(explanation)), *(f"plot    {near(path)}" for path in paths))


@policy_app.command()
def export(
    policy: Place,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where policy.safetensors and policy.json go.")],
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Write a policy, with the card that register would give it, into a folder, and read it again."""
    with output(as_json) as emit:
        from palf_dist.errors import PolicyFileError
        from palf_dist.evaluation.policy_card import described
        from palf_dist.policies.policy_file import CARD, TENSORS, card_digest, load_policy, save_policy
        from palf_dist.storage import is_uri

        if is_uri(folder):
            raise PolicyFileError(f"{folder}: is a URI; export into a local folder and copy its two files")
        target = Path(folder)
        if any((target / name).exists() for name in (TENSORS, CARD)):
            raise PolicyFileError(f"{folder}: holds a policy already; name another folder")
        artefact = described(policy, tracking_uri)
        with _written(target):
            path = save_policy(target, artefact)
        sha256 = card_digest(load_policy(target))
        emit({"policy": str(path), "sha256": sha256}, f"policy  {escape(str(near(path)))}", f"sha256  {sha256}")


@policy_app.command()
def compare(
    first: Place,
    second: Place,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Two policies' cards side by side, and how far their controls differ: in the states that the run of one of them
    recorded, or else over a grid of states."""
    with output(as_json) as emit:
        from rich.console import Group

        from palf_dist.evaluation.policy_card import card_facts, described
        from palf_dist.evaluation.policy_comparison import compare_behaviour, states_for

        places = (first, second)
        artefacts = one, other = [described(place, tracking_uri) for place in places]
        states = states_for(places, artefacts)
        difference = compare_behaviour(one, other, states)
        facts = [card_facts(artefact) for artefact in artefacts]
        table = Table("", *(Column(escape(place), overflow="fold") for place in places))
        for name in dict.fromkeys([*facts[0], *facts[1]]):
            own = [each.get(name, "-") for each in facts]
            table.add_row(name, *map(escape, own if own[0] != own[1] else (own[0], "the same")))
        record = {"cards": [artefact.card for artefact in artefacts], "states": states.origin}
        emit(
            {**record, "controls": _difference_record(difference)},
            Group(table, _difference_table(difference)),
            f"states  {states.origin}",
        )


def _draw(explanation: Explanation, folder: Path) -> list[Path]:
    from palf_dist.evaluation.policy_plots import pictures

    paths = []
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures(explanation).items():
            paths.append(folder / f"{name}.png")
            paths[-1].write_bytes(picture)
    return paths


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What cannot be written is one message."""
    from palf_dist.errors import PolicyFileError
    from palf_dist.storage import first_line

    try:
        yield
    except OSError as error:
        raise PolicyFileError(
            f"{folder}: cannot be written to ({first_line(error)}); name a folder that can be"
        ) from error


def _explanation_record(item: Explanation) -> dict[str, Any]:
    return {
        "usual": dict(zip(item.controls, item.usual.tolist(), strict=True)),
        "features": {
            feature: {
                "usual": item.usual_state[row],
                "values": item.values[row].tolist(),
                "controls": dict(zip(item.controls, item.curves[row].T.tolist(), strict=True)),
            }
            for row, feature in enumerate(item.features)
        },
    }


def _explanation_table(item: Explanation) -> Table:
    """A line for each feature, those that move the controls most first."""
    usual = ", ".join(f"{name} {value:.3g}" for name, value in zip(item.controls, item.usual, strict=True))
    table = Table("feature", "from", "to", "what moves most", title="One feature at a time, the others as usual")
    table.caption = f"In the usual state: {usual}"
    widest = item.reach.max(0, initial=1e-12)
    for row in item.order:
        most = sorted(range(len(item.controls)), key=lambda column: -item.reach[row, column] / widest[column])
        ends = item.curves[row, [0, -1]]
        moved = ", ".join(
            f"{item.controls[column]} {ends[0, column]:.3g} to {ends[1, column]:.3g}" for column in most[:MOST_MOVED]
        )
        table.add_row(item.features[row], f"{item.values[row, 0]:.3g}", f"{item.values[row, -1]:.3g}", moved)
    return table


def _difference_record(item: Difference) -> dict[str, dict[str, float]]:
    return {
        name: {
            "mean_first": item.means[0, column],
            "mean_second": item.means[1, column],
            "mean_change": item.mean_change[column],
            "largest_change": item.largest_change[column],
        }
        for column, name in enumerate(item.controls)
    }


def _difference_table(item: Difference) -> Table:
    table = Table("control", "mean, first", "mean, second", "mean change", "largest change")
    for name, row in _difference_record(item).items():
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    return table
