"""Attention under the row intervals of `segments.Layout`: one function, a file for each backend.

| backend | under the intervals | without (all visible) | what it is |
|---|---|---|---|
| sdpa | yes | yes | torch's scaled dot product attention, under a dense mask; the oracle, and what runs on a CPU |
| flex | on a GPU | no | torch's FlexAttention, compiled for each length; its tiles come from the intervals |
| triton | on a GPU, heads of 32, 64 or 128 | no | our kernel, driven by the intervals themselves |
| flash | no | on a GPU from Ampere on, in bf16 | FlashAttention 2, for sampling with a cache |

A further backend is a file here and a line in `BACKENDS`. The file has four functions:

    can_run(device_type, precision)       what this device or precision lacks, as a text; "" where it runs
    missing_package()                     what must be installed, as a text; "" where it is
    prepare(intervals_BMI, num_keys)      what the intervals become, once a forward, for all blocks
    attend(q, k, v, prepared)             softmax(q k^T / sqrt(E)) v over the visible keys

Where fewer heads have keys and values than queries, these are repeated before a backend has them, but for one that
takes them as they are. It costs the copy, of keys and values of as many heads as there are queries, in each block: in
training kept for the backward, and beside a cache made of the whole context in each call.

This module loads neither torch nor a backend before one is used: configs are checked by it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_MOST_GRAPHS = 64  # of one compiled function: shapes, with and without gradients


@dataclass(frozen=True)
class Backend:
    """What is known of a backend before it is loaded."""

    file: str  # its module in this folder
    jobs: Sequence[str]  # "training", where intervals say who sees whom; "sampling", where each query sees all keys
    head_widths: Sequence[int] = range(1, sys.maxsize)
    widths: str = ""  # the same in words
    has_dense_mask: bool = False  # it takes a mask of all pairs, which needs memory
    takes_kv_heads: bool = False  # k and v may have fewer heads than q, each of which serves several side by side
    needs_padding: bool = False  # it is compiled for each length of a sequence, so that there should be few

    def load(self) -> Any:
        """Its module."""
        return importlib.import_module(f"{__name__}.{self.file}")


# The first that can do a job is what "auto" takes.
BACKENDS = {
    "triton": Backend("block_causal", ("training",), (32, 64, 128), "32, 64, 128"),
    "flash": Backend("flash", ("sampling",), range(1, 257), "256 or less", takes_kv_heads=True),
    "flex": Backend("flex", ("training",), range(16, sys.maxsize), "16 or more", needs_padding=True),
    "sdpa": Backend("sdpa", ("training", "sampling"), has_dense_mask=True),
}


# ---------------------------------------------------------------------------
# Choosing a backend


def names(job: str) -> list[str]:
    """The backends that a config may ask for, "auto" among them."""
    return ["auto", *(name for name, backend in BACKENDS.items() if job in backend.jobs)]


def needs_padding(name: str, head_width: int) -> bool:
    """Whether training on a GPU would compile kernels for each length, where all packages are installed."""
    if name == "auto":
        fitting = (one for one in BACKENDS.values() if "training" in one.jobs and head_width in one.head_widths)
        return next(fitting).needs_padding
    return BACKENDS[name].needs_padding


def choose(name: str, job: str, device_type: str, precision: str, head_width: int, say: Callable[[str], None]) -> str:
    """The backend that does a job ("training" or "sampling") on a device ("cpu" or "cuda").

    "auto" says, once a process, which package keeps it from a backend that the run could use.

    Raises:
        ValueError: it cannot do it here; the message says what is missing and how to get it.
    """
    if name != "auto":
        lacks = [*_lacks(name, device_type, precision, head_width), BACKENDS[name].load().missing_package()]
        if any(lacks):
            raise ValueError(f"{name} needs {' and '.join(filter(None, lacks))}; or use sdpa")
        return name
    missing: dict[str, str] = {}
    for one in names(job)[1:]:
        if not any(_lacks(one, device_type, precision, head_width)):
            # Imported now: a package that does not fit torch fails here, and not at the first sample.
            missing[one] = BACKENDS[one].load().missing_package()
            if not missing[one]:
                break
    for other in list(missing)[:-1]:
        _say_once(say, f"{job} attends by {one}, not by {other}, which needs {missing[other]}")
    return one


def _lacks(name: str, device_type: str, precision: str, head_width: int) -> tuple[str, str]:
    backend = BACKENDS[name]
    width = "" if head_width in backend.head_widths else f"heads of width {backend.widths}"
    return backend.load().can_run(device_type, precision), width


@functools.cache
def _say_once(say: Callable[[str], None], text: str) -> None:
    say(text)


# ---------------------------------------------------------------------------
# Attention


class Visibility(NamedTuple):
    """Who sees whom, made once for a forward and shared by its blocks."""

    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # of the backend
    mask: Any  # what its `prepare` made of the intervals; None: every query sees every key
    takes_kv_heads: bool  # as of `Backend`


def make_visibility(intervals_BMI: Tensor | None, num_keys: int, backend: str) -> Visibility:
    """The form that a backend takes of the row intervals, int32 [B or 1, M, 4]; without them all is visible."""
    module = BACKENDS[backend].load()
    mask = None if intervals_BMI is None else module.prepare(intervals_BMI, num_keys)
    return Visibility(module.attend, mask, BACKENDS[backend].takes_kv_heads)


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys: [B, H, M, E]; k and v may have fewer heads."""
    num_served = q_BHME.shape[1] // k_BHKE.shape[1]
    if num_served > 1 and not visibility.takes_kv_heads:
        k_BHKE, v_BHKE = k_BHKE.repeat_interleave(num_served, 1), v_BHKE.repeat_interleave(num_served, 1)
    return visibility.attend(q_BHME, k_BHKE, v_BHKE, visibility.mask)


def compile_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a graph for each shape of the arguments; more than a few dozen shapes are an error."""
    import torch._dynamo.config

    # Past its limit of 8, torch would go on without compiling and only log it.
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)
