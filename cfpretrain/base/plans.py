"""Plans: what some work was done with, by name and JSON-able, kept beside it, so that no other work goes on with it."""

import re
from collections.abc import Mapping
from typing import Any

_NOT_SAID = "not said"


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two plans, for a message: names and values, and of hashes only that they do; "" for nothing.

    Args:
        there: of what was done.
        wanted: of what is to be done.
    """
    values, hashes = [], []
    for name in sorted(there.keys() | wanted.keys()):
        before, now = (plan.get(name, _NOT_SAID) for plan in (there, wanted))
        if before == now:
            continue
        if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{24,}", value) for value in (before, now)):
            hashes.append(f"other {name}")
        else:
            values.append(f"{name}: {before!s:.60} there, {now!s:.60} now")
    return ", ".join(values + hashes)
