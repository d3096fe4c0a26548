"""What is ablated: a YAML file of variants, each with what it changes of the base configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from palf_dist.config import RunConfig
from palf_dist.config_loading import Path_, config_differences, dump_config, parse_config, parse_section, read_config
from palf_dist.errors import ConfigError
from palf_dist.evaluation.derived import DESCRIBED
from palf_dist.policies import policy_spec
from palf_dist.sections import Section
from palf_dist.units import groups_seen

BASE = "base"
METHODS = ("policy", "ce")
"""What is compared: each variant's policy with the base's, and both with the reference."""

VARIED = ("seed", "policy", "estimator", "outer_loss", "meta_learner", "tasks.pool")
"""Fields, or whole sections, that a variant may change: how the policy is meta-trained. What it is trained on and what
it is judged by are the base's, and so are learning rate and L2 strength."""

OF_REPORTS = (".md", ".json", ".png")
"""Endings of the report's files, which may lie beside the variants' folders."""

LEFT_OUT = {"basis": "basis losses", "features": "state features", "hyperparameters": "loss hyper-parameters"}
"""Lists of the policy of which every entry can be left out in turn, and what their groups are called."""


class Variant(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="of its folder, too")]
    group: Annotated[str, Field(min_length=1, description="p-values are corrected within it")]
    set: Annotated[dict[str, Any], Field(min_length=1, description="field: value, as --set names them")]


class Ablations(Section):
    leave_out: tuple[Literal["basis", "features", "hyperparameters"], ...] = Field(
        default=(), description="a variant for each entry of these lists of the base's policy, without it"
    )
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Design:
    """The base or a variant, with its configuration for each fold. Folds have names of folders."""

    name: str
    configs: Mapping[str, RunConfig]
    group: str = ""  # of a variant
    changes: Mapping[str, Any] = field(default_factory=dict)
    words: str = "the base configuration"  # what it changes, for people

    @property
    def config(self) -> RunConfig:
        """Of the first fold; the others differ in their data."""
        return next(iter(self.configs.values()))

    def folder(self, run_dir: Path, fold: str) -> Path:
        """Its run directory."""
        return run_dir / fold / self.name


def load_ablations(path: str | Path) -> Ablations:
    """The ablations of a YAML file. Raises ConfigError with a line for each wrong field."""
    return parse_section(read_config(path), str(path), (), Ablations, _cross_checks)


def designs_of(ablations: Ablations, bases: Mapping[str, RunConfig]) -> list[Design]:
    """The base and its variants, in order; ``bases``: the base's configuration for each fold. Raises one ConfigError
    for all variants that are wrong, change what all have to share, or change nothing."""
    judged = [source.name for base in bases.values() for source in base.data.held_out]
    twice = sorted({name for name in judged if judged.count(name) > 1})
    if twice:
        raise ConfigError(f"--fold: {', '.join(twice)} is held out in more than one; name folds, or one family")
    bases = {
        fold: base.model_copy(update={"evaluation": base.evaluation.model_copy(update={"methods": METHODS})})
        for fold, base in bases.items()
    }
    base = next(iter(bases.values()))
    designs = [Design(BASE, bases)]
    text = dump_config(base)
    known = [(BASE, _of_variant(base))]
    if "features" in ablations.leave_out and base.policy.kind == "maml":
        raise ConfigError(
            "leave_out: a maml policy reads its own validation loss, one sum for each control, and nothing that could "
            "be left out; take features out of the list, or another base"
        )
    problems: list[str] = []
    for variant, words in _all_variants(ablations, base):
        try:
            config = _varied(variant, base, text)
            found = next((name for name, other in known if other == _of_variant(config)), None)
            if found is not None:
                raise ConfigError(f"is the configuration of {found}; leave one of them out")
            if any(variant.name == name for name, _ in known):
                raise ConfigError("is the name of more than one; name each another way")
        except ConfigError as error:
            problems += [f"{variant.name}: {line}" for line in str(error).splitlines()]
        else:
            known.append((variant.name, _of_variant(config)))
            configs = {fold: _on(config, other) for fold, other in bases.items()}
            designs.append(Design(variant.name, configs, variant.group, variant.set, words))
    if problems:
        raise ConfigError("\n".join(problems))
    return designs


def _all_variants(ablations: Ablations, base: RunConfig) -> list[tuple[Variant, str]]:
    """Generated ones and those of the file, each with what it changes."""
    found = []
    spec = policy_spec(base.policy)
    for list_name in ablations.leave_out:
        values = getattr(spec, list_name)
        for left_out in values if list_name != "basis" or len(values) > 1 else ():  # there has to be a loss
            changes = {f"policy.{list_name}": [value for value in values if value != left_out]}
            variant = Variant(name=f"no-{left_out}", group=LEFT_OUT[list_name], set=changes)
            found.append((variant, f"policy.{list_name} without {left_out}"))
    return found + [(variant, ", ".join(_assignments(variant.set))) for variant in ablations.variants]


def _assignments(changes: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in changes.items()]


def _varied(variant: Variant, base: RunConfig, text: str) -> RunConfig:
    """The base, whose configuration is ``text``, with the variant's changes."""
    config = parse_config(text, "base", [*_assignments(variant.set), f"name={base.name}.{variant.name}"])
    changed = config_differences(base, config, (*VARIED, "name"), ("in the base", "here"))
    if changed:
        raise ConfigError(
            f"a variant may change {', '.join(VARIED)}; what all of them share is for the base's own --set\n"
            + "\n".join(changed)
        )
    return config


def _on(variant: RunConfig, base: RunConfig) -> RunConfig:
    """The variant of the same base on another fold."""
    tasks = base.tasks.model_copy(update={"pool": variant.tasks.pool})
    whole = (name for name in (*VARIED, "name") if "." not in name)
    return base.model_copy(update={name: getattr(variant, name) for name in whole} | {"tasks": tasks})


def _of_variant(config: RunConfig) -> tuple[object, ...]:
    """What makes a variant: equal policies are equal, however their configurations say so, and a pool as large as the
    run is none."""
    return (
        *(config.seed, policy_spec(config.policy), config.estimator),
        *(config.outer_loss, config.meta_learner, groups_seen(config)),
    )


def _cross_checks(ablations: Ablations) -> dict[Path_, str]:
    """What is wrong although every field is right by itself."""
    problems: dict[Path_, str] = {}
    if not ablations.leave_out and not ablations.variants:
        problems["variants",] = "there are none; name some, or lists to leave_out"
    names = [variant.name for variant in ablations.variants]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems["variants", index, "name"] = f"{name} is there more than once; name each another way"
        elif name == BASE or name in DESCRIBED:
            problems["variants", index, "name"] = f"{name} is what tables call something else; choose another name"
        elif name.endswith(OF_REPORTS):
            problems["variants", index, "name"] = f"{name} may be a file of the report; leave out its ending"
    for index, variant in enumerate(ablations.variants):
        for name, value in variant.set.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                problems["variants", index, "set"] = (
                    f"{variant.name}: {name} is a {type(value).__name__}, which no configuration holds; write a text, "
                    "a number, a list or a section"
                )
    return problems
