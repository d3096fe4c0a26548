"""Keeps secrets out of what is written down: credentials in addresses, values of secret environment variables, and the
cluster's token.

Addresses in a configuration, which is saved and logged as it is, may hold none at all (``refuse_credentials``); every
text that somebody else has worded goes through ``redact`` before it is shown or written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

HIDDEN = "***"
REMEDY = (
    "configurations are saved and logged; leave user, password and keys out and give them in the environment "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, MLFLOW_TRACKING_USERNAME "
    "and MLFLOW_TRACKING_PASSWORD, or an MLFLOW_TRACKING_URI that holds them)"
)
SHORTEST = 8
"""Characters of a secret: shorter ones would blot out innocent words."""

_VARIABLE = re.compile(
    r"(?:^|_)(?:secret|token|credentials?|key)(?:$|_)|passw(?:or)?d|_pwd$|connection_?string", re.IGNORECASE
)
_PLACES = ("_PATH", "_FILE", "_DIR", "_URL", "_URI", "_MODE")  # such a variable says where or how, not what
_ADDRESS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)"
    # user:password@, where a key may hold slashes; but not HOST:PORT/..., nor the container@account of Azure
    r"(?:(?!\[)[^\s/?#'\"@:]*:(?!\d{1,5}(?:[/?#]|$))[^\s'\"]*@|(?<=http://)[^\s/?#'\"]+@|(?<=https://)[^\s/?#'\"]+@)",
    re.IGNORECASE,
)
_PARAMETER = re.compile(
    r"(?P<name>[?&;][\w.-]*(?:passw(?:or)?d|secret|token|credential|key|sig(?:nature)?)=)[^\s&;#'\"]+", re.IGNORECASE
)


def has_credentials(text: str) -> bool:
    """Whether a text holds an address with a user, a password or a key in it."""
    return _ADDRESS.search(text) is not None or ("://" in text and _PARAMETER.search(text) is not None)


def refuse_credentials(text: str) -> str:
    """``text`` as it is; raises ValueError, without repeating it, where it holds the credentials of an address."""
    if has_credentials(text):
        raise ValueError(f"must hold no credentials: {REMEDY}")
    return text


def redact(text: str) -> str:
    """``text`` without credentials of addresses, values of secret environment variables and the token of Ray's file."""
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    return without_credentials(text)


def without_credentials(text: str) -> str:
    """``text`` with the credentials of the addresses in it hidden."""
    return _PARAMETER.sub(rf"\g<name>{HIDDEN}", _ADDRESS.sub(rf"\g<scheme>{HIDDEN}@", text))


def _secret_values() -> list[str]:
    """Values of the variables whose names say that they are secret, and Ray's token from its file; the longest first,
    as one may hold another."""
    values = {
        value for name, value in os.environ.items() if _VARIABLE.search(name) and not name.upper().endswith(_PLACES)
    }
    return sorted((value for value in {*values, _token()} if len(value) >= SHORTEST), key=len, reverse=True)


def _token() -> str:
    """The token in the file where Ray finds it; empty where there is none."""
    try:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):  # not there, not text, nobody's home
        return ""
