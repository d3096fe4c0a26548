"""Two directives: the fields of a configuration, and the commands of a command line, as tables made from the code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

import yaml
from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

LIMITS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "({} or more)"}
NAMES = {"str": "text", "bool": "true or false", "int": "whole number", "float": "number", "NoneType": "none"}


def field_tables(model: type[BaseModel]) -> Iterator[str]:
    """A heading and a table for each section of a configuration, at its paths of ``--set``."""
    places: dict[type[BaseModel], list[str]] = {}
    _collect(model, "", places)
    for section, paths in places.items():
        yield f"## {', '.join(paths) if paths != [''] else 'The run itself'}\n"
        if section.__doc__:
            yield cleandoc(section.__doc__).replace("``", "`") + "\n"
        yield "| field | takes | default | meaning |\n|---|---|---|---|"
        for name, field in section.model_fields.items():
            takes = _bounded(_type(field.annotation), field.metadata)
            default = "required" if field.is_required() else _default(field.default)
            yield f"| `{name}` | {_cell(takes)} | {_cell(default)} | {_cell(field.description or '')} |"
        yield ""


def _collect(section: type[BaseModel], path: str, places: dict[type[BaseModel], list[str]]) -> None:
    places.setdefault(section, []).append(path)
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        for each in inner:
            kind = f" ({each.model_fields['kind'].default})" if len(inner) > 1 else ""
            _collect(each, f"{path}.{name}{kind}".lstrip("."), places)


def _sections(kind: Any) -> list[type[BaseModel]]:
    """Those that a type is made of: itself, the entries of a list, the kinds of a union."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for part in get_args(kind) for section in _sections(part)]


def _type(kind: Any) -> str:
    """What a value may be, as it is written in YAML."""
    parts = get_args(kind)
    if not parts:
        return "section" if _sections(kind) else NAMES.get(kind.__name__, kind.__name__)
    if hasattr(kind, "__metadata__"):
        return _bounded(_type(parts[0]), kind.__metadata__)
    if get_origin(kind) is tuple:
        return f"list of {_type(parts[0])}" if parts[-1] is Ellipsis else f"[{', '.join(map(_type, parts))}]"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    return " or ".join(dict.fromkeys(map(_type, parts)))  # of a union's sections one


def _bounded(kind: str, metadata: Sequence[Any]) -> str:
    bounds = [bound for entry in metadata for bound in getattr(entry, "metadata", [entry])]
    said = [
        words.format(getattr(each, name)) for each in bounds for name, words in LIMITS.items() if hasattr(each, name)
    ]
    return f"{kind} {', '.join(said)}".rstrip()


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        own = value.model_dump(mode="json", exclude_defaults=True)
        return _default(own) if own else "see below"
    if isinstance(value, tuple) and any(isinstance(each, BaseModel) for each in value):
        return ", ".join(f"`{{kind: {each.kind}}}`" for each in value)
    plain = list(value) if isinstance(value, tuple) else value
    return "`" + yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip() + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def command_tables(command: Any, name: str) -> Iterator[str]:
    """A heading, the help and the options of each command of a typer app."""
    for child, each in sorted(getattr(command, "commands", {}).items()):
        yield from command_tables(each, f"{name} {child}")
    if hasattr(command, "commands"):
        return
    context = command.make_context(name, [], resilient_parsing=True)
    yield f"## {name}\n\n```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield cleandoc(command.help or "") + "\n"
    yield "| option | meaning |\n|---|---|"
    for each in command.params:
        if each.param_type_name == "option":
            option, said = each.get_help_record(context)
            yield f"| `{_cell(option)}` | {_cell(said)} |"
    yield ""


class _Tables(SphinxDirective):
    """``{name} module:object``"""

    required_arguments = 1

    def lines(self, found: Any) -> Iterator[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        text = "\n".join(self.lines(getattr(import_module(module), name)))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class ConfigFields(_Tables):
    def lines(self, found: type[BaseModel]) -> Iterator[str]:
        return field_tables(found)


class Commands(_Tables):
    def lines(self, found: Any) -> Iterator[str]:
        return command_tables(get_command(found), "palf-dist")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
