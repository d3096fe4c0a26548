"""From YAML to a configuration and back: one message that names every wrong field, its value and what is allowed.

Field paths are dotted (``tasks.architectures.0.hidden``) and are the same in files, in ``--set`` and in messages.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from palf_dist.config import MOST_WRONG, NoiseKind, RunConfig
from palf_dist.errors import ConfigError
from palf_dist.policies.meta_learned import misread
from palf_dist.redaction import redact
from palf_dist.sections import Section
from palf_dist.storage import first_line, read_file
from palf_dist.training_state import FEATURES

Path_ = tuple[str | int, ...]
C = TypeVar("C", bound=Section)

RESUMABLE = (
    "distributed.workers",
    "distributed.address",
    "distributed.unit_timeout",
    "distributed.max_attempts",
    "data.cache",
    "checkpoint",
    "tracking",
)
"""Fields (or whole sections) that a resumed run may change: none of them touches a result."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, reads 1e-3 as a number and leaves dates as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} must be text: put it in quotes", key_node.start_mark
                )
            line = key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice (first on line {seen[key]}): keep one", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what ``_Loader`` would read as something else than text."""


_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # Appended after the rule for whole numbers, which therefore wins where both match.
    _cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration of a YAML file with ``key=value`` overrides applied.

    Raises ConfigError with one line for every wrong field of the file and of the overrides.
    """
    return parse_config(read_config(path), str(path), overrides)


def read_config(path: str | Path) -> str:
    """The text of a configuration file. Raises ConfigError where it cannot be read."""
    try:
        return read_file(path).decode()
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({first_line(error)}); name a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path} is not UTF-8 text; name a YAML file") from None


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """As ``load_config``, from YAML text; ``source`` is what messages call it."""
    return parse_section(text, source, overrides, RunConfig, _cross_checks)


def parse_section(
    text: str,
    source: str,
    overrides: Sequence[str],
    kind: type[C],
    check: Callable[[C], dict[Path_, str]],
    files: Sequence[Path_] = (),
) -> C:
    """As ``parse_config``, for any section as a whole file; ``check`` says what is wrong with an object whose every
    field is right by itself. Paths in it that are relative are so to the folder of the file ``source``. ``files``:
    fields that may be the path of a run's configuration file; an override of a field of that one reads it first."""
    data = _parse_yaml(text, source)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must hold sections of 'key: value' lines, not {_shown(data)}")
    folder = Path(source).parent
    overridden = [_apply_override(data, override, kind, folder, files) for override in overrides]
    try:
        config = kind.model_validate(data, context={"folder": folder})
        problems = check(config)
    except ValidationError as error:
        problems = _problems(error.errors(include_url=False), data, kind)
    if not problems:
        return config
    lines = []
    for where, message in problems.items():
        from_set = any(where[: len(path)] == path or path[: len(where)] == where for path in overridden)
        lines.append(f"{'--set' if from_set else source}: {_dotted(where)}: {message}")
    raise ConfigError("\n".join(lines))


def dump_config(config: Section) -> str:
    """The complete configuration as YAML that ``load_config`` reads back equal."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_search_config(path: str | Path) -> bool:
    """Whether a configuration file is that of a search (palf_dist.search.config), rather than of a meta-training.
    Raises ConfigError where it cannot be read."""
    data = _parse_yaml(read_config(path), str(path))
    return isinstance(data, dict) and "target" in data


def config_differences(
    old: C, new: C, free: Sequence[str] = RESUMABLE, places: tuple[str, str] = ("in the run", "now")
) -> list[str]:
    """Fields on which ``new`` differs from the run's ``old`` configuration so that it cannot resume the run.

    Each entry reads ``field: OLD in the run, NEW now``, or as ``places`` has it; the ``free`` fields may differ.
    """
    before, after = decisive(old, free), decisive(new, free)
    return [
        f"{field}: {_shown(before.get(field))} {places[0]}, {_shown(after.get(field))} {places[1]}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    ]


def decisive(config: Section, free: Sequence[str] = RESUMABLE) -> dict[str, Any]:
    """Dotted path -> value of all fields but the ``free`` ones, as JSON: by default what the results depend on."""
    return {
        field: value
        for field, value in leaves(config.model_dump(mode="json")).items()
        if not any(field == name or field.startswith(name + ".") for name in free)
    }


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None


def _apply_override(
    data: dict[str, Any], override: str, kind: type[Section], folder: Path, files: Sequence[Path_]
) -> Path_:
    """Writes one ``key=value`` into the raw data and returns its path. Sections are made as needed, those that
    ``files`` names read from the file, beside ``folder``, that stands for them."""
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {redact(override)}: write it as field=value, for instance --set inner.steps=200")
    value = _parse_yaml(text, f"--set {dotted}")
    path: list[str | int] = []
    node: Any = data
    default: Any = _defaults(kind)
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(node, list):
            if not name.isdecimal() or int(name) > len(node):
                raise ConfigError(
                    f"--set {dotted}: {_dotted(path)} is a list of {len(node)}: name an entry by its number, "
                    f"0 to {len(node)}, not {name!r}"
                )
            key: str | int = int(name)
            if key == len(node):
                node.append({})
            default = None
        elif isinstance(node, dict):
            key = name
            default = default.get(name) if isinstance(default, dict) else None
            if not last and node.get(name) is None:
                # An entry of a list that the file leaves out: the rest of the list keeps its defaults.
                node[name] = copy.deepcopy(default) if isinstance(default, list) else {}
        else:
            raise ConfigError(f"--set {dotted}: {_dotted(path)} is {_shown(node)}, which has no field {name!r}")
        path.append(key)
        if last:
            node[key] = value
        else:
            if tuple(path) in files and isinstance(node[key], str):
                node[key] = load_config(folder / node[key]).model_dump(mode="json")
            node = node[key]
    return tuple(path)


def _defaults(section: type[Section]) -> dict[str, Any]:
    """Default values of a section as plain data; sections that must be given are left out."""
    values = {name: field.default for name, field in section.model_fields.items() if not field.is_required()}
    return section.model_construct(**values).model_dump(mode="json", warnings=False)


def too_noisy(kind: NoiseKind, rate: float) -> str | None:
    """What is wrong with a rate of this kind of noise: from ``MOST_WRONG`` on, labels would mean something else."""
    if kind in ("uniform", "pair_flip") or rate < MOST_WRONG:
        return None
    return f"must be less than {MOST_WRONG} with {kind} noise, where it is the share of wrong labels, not {rate:g}"


def _cross_checks(config: RunConfig) -> dict[Path_, str]:
    """What is wrong although every field is right by itself."""
    problems: dict[Path_, str] = {}
    window, steps = config.estimator.window, config.inner.steps
    if window is not None and window > steps:
        problems["estimator", "window"] = f"must be at most inner.steps ({steps}), not {window}; or leave it out"
    if window is not None and config.distributed.mode == "async":
        problems["distributed", "mode"] = "must be sync where estimator.window is given: inner states are carried over"
    if config.estimator.task_clip is not None and config.estimator.kind not in ("adjoint", "one_step"):
        problems["estimator", "task_clip"] = (
            f"{config.estimator.kind} has no gradients of single tasks; leave it out, or choose estimator.kind: adjoint"
        )
    for index, name in enumerate(config.policy.features or ()):
        if name not in FEATURES:
            nearest = difflib.get_close_matches(name, FEATURES, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known features: {', '.join(FEATURES)}"
            problems["policy", "features", index] = f"unknown feature {name!r}; {hint}"
    if config.policy.features is not None and (problem := misread(config.policy.kind, config.policy.features)):
        problems["policy", "features"] = problem
    noise, evaluation = config.tasks.noise, config.evaluation
    rates: list[tuple[Path_, NoiseKind, float]] = [(("tasks", "noise", "high"), noise.kind, noise.high)]
    if not evaluation.suite_conditions:
        rates.append((("evaluation", "noise_rates"), noise.kind, max(evaluation.noise_rates)))
    for index, item in enumerate(evaluation.suite_conditions):
        rates.append((("evaluation", "suite_conditions", index, "noise_rate"), item.noise_kind, item.noise_rate))
    return problems | {where: problem for where, kind, rate in rates if (problem := too_noisy(kind, rate))}


def _problems(errors: Iterable[ErrorDetails], data: Any, top: type[Section]) -> dict[Path_, str]:
    """What is wrong with each field; the alternatives of a union are joined into one message."""
    alternatives: dict[Path_, list[str]] = {}
    values: dict[Path_, Any] = {}
    for error in errors:
        given, kind = error["input"], error["type"]
        if kind == "too_short" and len(given) >= error["ctx"]["min_length"]:
            continue  # only because entries of the list are wrong, which have messages of their own
        where = _field_path(error["loc"], data, keep_last=kind == "missing")
        sections = _sections_at(error["loc"], top)
        if kind == "missing":
            message = "is required"
        elif kind == "extra_forbidden":
            message = _unknown_key(where, sections)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            where += ("kind",)
            kinds = [repr(section.model_fields["kind"].default) for section in sections]
            message = f"must be {' or '.join(kinds)}"
            values[where] = given.get("kind")
        elif kind == "value_error":
            message = str(error["ctx"]["error"])
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            message = "must be a section of 'key: value' lines"
            values[where] = given
        else:
            message = (
                error["msg"].replace("Input should be", "must be").replace("tuple", "list").replace("Tuple", "list")
            )
            values[where] = given
        alternatives.setdefault(where, []).append(message)
    return {
        where: " or ".join([messages[0], *(message.removeprefix("must be ") for message in messages[1:])])
        + (f", not {_shown(values[where])}" if where in values else "")
        for where, messages in alternatives.items()
    }


def _field_path(location: Path_, data: Any, keep_last: bool) -> Path_:
    """Pydantic's location without the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    for depth, key in enumerate(location):
        inside = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if inside:
            data = data[key]
        if inside or (keep_last and depth == len(location) - 1):
            path.append(key)
    return tuple(path)


def _sections_at(location: Path_, top: type[Section]) -> list[type[Section]]:
    """The section (or the alternatives, for a union that is not decided) that holds the last key of a location."""
    sections: list[type[Section]] = [top]
    for key in location:
        tagged = [section for section in sections if "kind" in section.model_fields and _tag(section) == key]
        if tagged and len(sections) > 1:
            sections = tagged
        elif isinstance(key, str) and len(sections) == 1 and key in sections[0].model_fields:
            inner = _sections_in(sections[0].model_fields[key].annotation)
            sections = inner or sections
    return sections


def _tag(section: type[Section]) -> Any:
    return section.model_fields["kind"].default


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _unknown_key(where: Path_, sections: list[type[Section]]) -> str:
    known = [name for section in sections for name in section.model_fields]
    nearest = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
    if nearest:
        return f"unknown key; did you mean {_dotted((*where[:-1], nearest[0]))}?"
    return f"unknown key; known here: {', '.join(known)}"


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every field in nested mappings."""
    if isinstance(value, dict):
        return {field: leaf for key, inner in value.items() for field, leaf in leaves(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path)) or "the file"


def _shown(value: Any) -> str:
    text = redact(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}..."
