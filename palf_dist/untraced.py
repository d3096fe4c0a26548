"""Leaving methods out of torch.compile's graphs without importing its tracer, which takes as long as torch itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    Method = TypeVar("Method")

    def untraced(method: Method) -> Method: ...

else:

    class untraced:  # a decorator
        """``torch.compiler.disable`` for a method, from the moment at which it is first asked for."""

        def __init__(self, method: Any) -> None:
            self.method = method

        def __set_name__(self, owner: type, name: str) -> None:
            self.owner, self.name = owner, name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            disabled = torch.compiler.disable(self.method)
            setattr(self.owner, self.name, disabled)
            return disabled.__get__(instance, owner)
