"""FlashAttention 2 (the package flash-attn), where every query sees every key: sampling beside a cache."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MIN_CAPABILITY = (8, 0)
_INSTALL = "pip install 'flash-attn>=2.8', which builds with nvcc"


def can_run(device_type: str, precision: str) -> str:
    """What this device or precision lacks."""
    has_gpu = device_type == "cuda" and torch.cuda.is_available()
    is_new_enough = has_gpu and torch.cuda.get_device_capability() >= _MIN_CAPABILITY
    lacks = [] if is_new_enough else ["a GPU from Ampere on (compute capability 8.0)"]
    return " and ".join([*lacks, *(["engine.precision=bf16"] if precision != "bf16" else [])])


def missing_package() -> str:
    """What it takes to have FlashAttention's function."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Callable[..., Any] | None, str]:
    """The function and an empty text, or None and what it takes to have it."""
    if importlib.util.find_spec("flash_attn") is None:
        return None, f"the package ({_INSTALL})"
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # whatever code built for another torch or GPU raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"a package flash-attn that can be imported, got {reason:.200} ({_INSTALL})"
    return flash_attn_func, ""


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask: None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over all keys: [B, H, M, E]."""
    flash, problem = _load()
    assert flash is not None, problem
    return flash(q_BHME.transpose(1, 2), k_BHKE.transpose(1, 2), v_BHKE.transpose(1, 2)).transpose(1, 2)
