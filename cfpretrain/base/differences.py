"""What differs, for messages: between plans (what some work was done with), and between the tensors of models."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NOT_SAID = "not said"
_NUM_NAMES_SHOWN = 5


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two plans: names and values, and of hashes only that they do; "" for nothing.

    Args:
        there: of what was done, by name and JSON-able.
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


def tensor_differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """What differs between the tensors that are there and those of a model, given as shapes by name; "" for nothing."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    return ", ".join(
        f"{kind}: {', '.join(names[:_NUM_NAMES_SHOWN])}"
        + (f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else "")
        for kind, names in kinds.items()
        if names
    )
