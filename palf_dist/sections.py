"""What every configuration is made of: sections, and the numbers that their fields take."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from palf_dist.redaction import refuse_credentials

Positive = Annotated[FiniteFloat, Field(strict=True, gt=0)]
NonNegative = Annotated[FiniteFloat, Field(strict=True, ge=0)]
Share = Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)]
Decay = Annotated[FiniteFloat, Field(strict=True, ge=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1)]


def distinct(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Refuses a list that names something twice; numbers are told apart by 6 digits, as in tables of results, sections
    by their names."""
    seen = [round(value, 6) if isinstance(value, float) else getattr(value, "name", value) for value in values or ()]
    twice = sorted({str(value) for value in seen if seen.count(value) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named more than once; name it once")
    return values


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are never coerced silently, objects are frozen, and none
    of their texts holds the credentials of an address."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: object) -> object:
        return refuse_credentials(value) if isinstance(value, str) else value
