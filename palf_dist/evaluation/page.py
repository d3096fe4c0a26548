"""HTML pages that hold everything themselves: the look, the pictures, and what a report was made with."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jinja2

PACKAGES = ("palf-dist", "torch", "ray", "mlflow", "numpy", "pyarrow", "scipy")


def render_page(template: str, pictures: Mapping[str, bytes], captions: Mapping[str, str], **values: Any) -> str:
    """The page of a template that extends page.html.j2, with PNG ``pictures`` in the order of their ``captions``.

    ``values`` are what the template asks for; all need name, headline, facts (name -> text) and configuration.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("palf_dist", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        pictures=[
            (name, caption, _display_width(pictures[name]), base64.b64encode(pictures[name]).decode())
            for name, caption in captions.items()
            if name in pictures
        ],
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        machine=platform.platform(),
        **values,
    )


def _display_width(png: bytes) -> int:
    """Width in CSS pixels at which every picture's text has the same size: the PNG header's width at 100 dpi."""
    return int.from_bytes(png[16:20]) * 100 // 150


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on sys.path
        return "not installed"
