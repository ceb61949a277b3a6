"""Norms over the last axis: LayerNorm, (x - mean) / sqrt(variance + eps) * weight + bias, torch's or NVIDIA apex's, and
RMSNorm, x / sqrt(mean of x^2 + eps) * weight.
"""

import importlib.util

from torch import nn

_EPS = 1e-5


def has_apex(extension: str = "fused_layer_norm_cuda") -> bool:
    """Whether NVIDIA's apex (the registry's package of that name is another) is here, with this CUDA extension."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec(extension) is None:
        return False
    return importlib.util.find_spec("apex.multi_tensor_apply") is not None


def layer_norm(width: int, fused: bool = False, eps: float = _EPS) -> nn.Module:
    """A LayerNorm of so many values; `fused` takes apex's, which breaks a compiled graph, where `has_apex`."""
    if not fused:
        return nn.LayerNorm(width, eps=eps)
    from apex.normalization import FusedLayerNorm

    return FusedLayerNorm(width, eps=eps)


def make_norm(kind: str, width: int, eps: float, fused: bool = False) -> nn.Module:
    """A norm of so many values: "layer", as of `layer_norm`, or "rms"."""
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else layer_norm(width, fused, eps)
