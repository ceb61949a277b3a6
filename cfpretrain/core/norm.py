"""LayerNorm: torch's, or the fused one of NVIDIA apex (the package of that name on the registry is another)."""

import importlib.util

from torch import nn

_EPS = 1e-5


def has_apex(extension: str = "fused_layer_norm_cuda") -> bool:
    """Whether NVIDIA's apex is installed with this CUDA extension of its own; left out, that of its LayerNorm."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec(extension) is None:
        return False
    return importlib.util.find_spec("apex.multi_tensor_apply") is not None


def layer_norm(width: int, fused: bool = False) -> nn.Module:
    """A LayerNorm over the last dimension, with weight and bias.

    Args:
        width: the last dimension's size.
        fused: apex's kernel, where `has_apex`; a compiled graph would break at it.
    """
    if not fused:
        return nn.LayerNorm(width, eps=_EPS)
    from apex.normalization import FusedLayerNorm

    return FusedLayerNorm(width, eps=_EPS)
