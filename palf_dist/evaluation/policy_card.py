"""What a policy's card says of it: how it was trained and what it measured, from its run; and the card as text."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from palf_dist.config import RunConfig, TrackingConfig
from palf_dist.config_loading import is_search_config, load_config
from palf_dist.errors import PolicyFileError
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.methods import POLICY, REFERENCE
from palf_dist.evaluation.runs import JudgedRun, read_run
from palf_dist.evaluation.table import label_of, to_records
from palf_dist.model_registry import Version, publish
from palf_dist.policies.policy_file import (
    CARD,
    DEFAULT,
    TENSORS,
    PolicyArtefact,
    card_digest,
    load_policy,
    policy_bytes,
    policy_folder,
)
from palf_dist.run_directory import BEST, CONFIG, METRICS, RESULTS
from palf_dist.storage import exists, is_uri, join, read_file, split

NOT_JUDGED = "none: its run has no held-out comparison"
COMMAND = "palf-dist meta-train --config FILE, where FILE holds what stands under config"
LIBRARIES = ("palf-dist", "torch", "numpy")
_FIGURES = ("method", "label", "accuracy", "diff_vs_ce", "se", "ci95")


def policy_place(place: str) -> str:
    """The folder of a run's policy, where ``place`` is a run directory; else ``place``, which names a policy."""
    if place == DEFAULT:
        return place
    is_run = exists(join(place, CONFIG)) and not exists(join(place, CARD))
    return join(place, BEST) if is_run else place


def run_of(policy: str) -> str | None:
    """The run directory that a policy lies in; None where it lies in none."""
    folder = policy_folder(policy)
    run, name = split(folder if is_uri(folder) else Path(folder).absolute())
    known = name == BEST and exists(join(run, CONFIG)) and not is_search_config(join(run, CONFIG))
    return run if known else None


def described(place: str, tracking_uri: str | None = None) -> PolicyArtefact:
    """The policy of a run directory, or the one at ``place`` as ``load_policy`` takes it. Where it lies in a run, its
    card gets that run's configuration, protocol and figures, where that run only evaluated it the last two; else it
    stays as it is. Raises as ``load_policy`` and ``read_run`` do."""
    place = policy_place(place)
    artefact, run = load_policy(place, tracking_uri=tracking_uri), run_of(place)
    if run is None:
        return artefact
    digests = {TENSORS: hashlib.sha256(policy_bytes(artefact)[0]).hexdigest()}
    added: dict[str, Any] = {"versions": {"python": platform.python_version(), **_versions()}, "digests": digests}
    if exists(join(run, METRICS)):  # it was trained there; what evaluate keeps has the configuration of the evaluation
        added |= {"command": COMMAND, "config": _settings(load_config(join(run, CONFIG)))}
    if exists(join(run, RESULTS)):
        judged = read_run(run)
        digests[RESULTS] = hashlib.sha256(read_file(join(run, RESULTS))).hexdigest()
        added |= {"protocol": _protocol(judged), "figures": _figures(judged)}
    return replace(artefact, card=artefact.card | added)


def register_policy(
    artefact: PolicyArtefact, name: str, alias: str | None = None, tracking_uri: str | None = None
) -> tuple[Version, bool]:
    """Publish a policy as a version of the registered model ``name``, with its own figures as metrics; the version, and
    whether it is new. Raises RegistryError, and PolicyFileError for a card that another program wrote."""
    tensors, card = policy_bytes(artefact)
    facts = card_facts(artefact)
    own = artefact.card.get("figures", {}).get("policy", {})
    return publish(
        name,
        {TENSORS: tensors, CARD: card},
        card_digest(artefact),
        alias=alias,
        tracking_uri=tracking_uri,
        experiment=TrackingConfig().experiment,
        metrics={metric: own[metric] for metric in ("accuracy", "diff_vs_ce", "se") if own.get(metric) is not None},
        description="\n".join(f"{fact}: {value}" for fact, value in facts.items()),
    )


def card_facts(artefact: PolicyArtefact) -> dict[str, str]:
    """What the card says, for people: names and values. Raises PolicyFileError for one that another program wrote."""
    try:
        return _facts(artefact)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PolicyFileError(
            f"{CARD}: the card is not one that this palf_dist writes ({type(error).__name__}: {error}); export the "
            "policy from its run again"
        ) from error


def _facts(artefact: PolicyArtefact) -> dict[str, str]:
    spec, card = artefact.spec, artefact.card
    versions = card.get("versions", {})
    return {
        "kind": spec.kind + (f", shield {spec.shield:g}" if spec.shield is not None else ""),
        "basis losses": ", ".join(spec.basis),
        "hyper-parameters": ", ".join(spec.hyperparameters) or "none",
        "features": ", ".join(spec.features) or "none",
        "parameters": str(len(artefact.phi)),
        "asked": f"{_refreshes(artefact)} times in a run",
        "trained on": _datasets(card.get("trained_on")),
        "held out": _datasets(card.get("held_out")),
        "run": _run(card),
        "protocol": _said_protocol(card.get("protocol")),
        **_said_figures(card.get("figures")),
        "described with": ", ".join(f"{name} {number}" for name, number in versions.items()) or "unknown",
        "sha256": card_digest(artefact),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """The fields of a configuration that are not at their defaults, but for where the run was done and tracked."""
    places: dict[str, Any] = {"tracking": True, "checkpoint": True, "data": {"cache"}}
    places |= {"distributed": {"workers", "address"}}
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=places)
    architectures = [item.model_dump(mode="json") for item in config.tasks.architectures]  # each needs its kind
    return {**settings, "tasks": {**settings.get("tasks", {}), "architectures": architectures}}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = "unknown"
    return found


def _protocol(run: JudgedRun) -> dict[str, Any]:
    evaluation = run.config.evaluation
    conditions = [item.name for item in evaluation.suite_conditions] or [
        f"{name}, noise {rate:g}" for name in evaluation.conditions for rate in evaluation.noise_rates
    ]
    return {
        "measure": "clean test accuracy in percent",
        "reference": f"{label_of(REFERENCE)}; its learning rate and weight decay go for all methods that tune none",
        "standard_errors": "of paired differences, clustered by dataset",
        "datasets": run.judged,
        "conditions": conditions,
        "seeds": evaluation.seeds,
        "inner_steps": run.config.inner.steps,
    }


def _figures(run: JudgedRun) -> dict[str, Any]:
    records = to_records(held_out(run.rows)[0])
    own = next(record for record in records if record["method"] == POLICY)
    parts = {name: own[name] for name in (*_FIGURES, "by_condition", "by_noise", "by_dataset", "tasks", "clusters")}
    return {
        "policy": parts,
        "others": [{name: record[name] for name in _FIGURES} for record in records if record is not own],
    }


def _refreshes(artefact: PolicyArtefact) -> str:
    steps = artefact.card.get("inner_steps")
    return "?" if steps is None else str(-(-steps // artefact.spec.refresh))


def _datasets(names: list[str] | None) -> str:
    return "unknown" if names is None else f"{len(names)}: {', '.join(names)}"


def _run(card: Mapping[str, Any]) -> str:
    if "run" not in card:
        return "unknown"
    return f"{card['run']}, seed {card.get('seed')}, outer step {card.get('outer_step')}"


def _said_protocol(protocol: Mapping[str, Any] | None) -> str:
    if protocol is None:
        return "unknown"
    return (
        f"{protocol['measure']}; {len(protocol['datasets'])} datasets, {protocol['seeds']} seeds, "
        f"{protocol['inner_steps']} steps; {', '.join(protocol['conditions'])}"
    )


def _said_figures(figures: Mapping[str, Any] | None) -> dict[str, str]:
    if figures is None:
        return {"figures": NOT_JUDGED}
    own = figures["policy"]
    return {
        "accuracy": f"{own['accuracy']:.2f} % over {own['tasks']} tasks",
        f"over {label_of(REFERENCE)}": f"{_gain(own)} points",
        "by condition": ", ".join(f"{name} {_gain(part)}" for name, part in own["by_condition"].items()),
    }


def _gain(figure: Mapping[str, Any]) -> str:
    if figure["diff_vs_ce"] is None:
        return "-"
    se = "" if figure["se"] is None else f" ({figure['se']:.2f})"
    return f"{figure['diff_vs_ce']:+.2f}{se}"
