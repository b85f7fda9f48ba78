"""Checking of a tenant's limits as they are given: in a file, in the database, or by the API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import did_you_mean
from .tenant import ID, Tenant

_TENANTS = TypeAdapter(dict[str, Tenant])
FIELDS = [field.name for field in fields(Tenant)]
_DEFAULTS = asdict(Tenant())


class LimitsError(ValueError):
    """Limits are not valid; `faults` has, for each fault, where it is and what is wrong."""

    def __init__(self, faults: list[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"{where}: {what}" for where, what in faults))
        self.faults = faults


def parse_tenants(given: Mapping[str, Mapping[str, Any]]) -> dict[str, Tenant]:
    """Parse the limits of tenants by their ids.

    Raises `LimitsError`, whose places are like `acme.weight`, if any of them is not valid.
    """
    for name in given:
        if not ID.fullmatch(name):
            what = "an id is 1 to 63 characters of a-z 0-9 -, and neither begins nor ends with -"
            raise LimitsError([(f"tenant '{name[:80]}'", what)])
    # Checked as JSON: there, strict validation takes a list for a tuple, but no text for a number.
    try:
        return _TENANTS.validate_json(json.dumps(given), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise LimitsError([("limits", str(error))]) from None
        raise LimitsError(list(_faults(error))) from None


def _faults(error: ValidationError) -> Iterator[tuple[str, str]]:
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"]))
        if fault["type"] == "unexpected_keyword_argument":
            yield where, f"unknown key: {did_you_mean(str(fault['loc'][-1]), FIELDS)}"
        elif fault["type"] == "value_error":
            yield where, fault["msg"].removeprefix("Value error, ")
        else:
            yield where, f"{fault['msg']} (found {fault['input']!r})"


def known_tenant(limits: Mapping[str, Any]) -> Tenant:
    """The tenant with stored limits; those that a newer release has added are ignored."""
    known = {name: value for name, value in limits.items() if name in FIELDS}
    return parse_tenants({"x": known})["x"]


def given_limits(tenant: Tenant) -> dict[str, Any]:
    """The limits of a tenant that differ from the defaults, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(tenant)))
    return {name: value for name, value in values.items() if value != _DEFAULTS[name]}
