"""The formulas of `seeds`, each over a whole tensor of 64-bit numbers: what its chunks must equal bit for bit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA, _FACTOR_1, _FACTOR_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _plain_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The hash of `seeds`."""
    x = (x ^ _plain_shift(x, 30)) * _FACTOR_1
    x = (x ^ _plain_shift(x, 27)) * _FACTOR_2
    return x ^ _plain_shift(x, 31)


def bits(keys: Tensor, shape: Sequence[int], first: int = 0) -> Tensor:
    """As `seeds.bits`."""
    counter = torch.arange(first + 1, first + math.prod(shape) + 1, device=keys.device)
    return mix(keys.unsqueeze(-1) + counter * _GAMMA).reshape([*keys.shape, *shape])


def uniform(keys: Tensor, shape: Sequence[int] = (), first: int = 0) -> Tensor:
    """As `seeds.uniform`."""
    return (_plain_shift(bits(keys, shape, first), 11).double() + 0.5) * 2.0**-53


def uniform_within(bound: float, keys: Tensor, shape: Sequence[int], first: int, out: Tensor) -> Tensor:
    """As `seeds.uniform_within`."""
    return out.copy_(((2 * uniform(keys, shape, first) - 1) * bound).float())


def normal(keys: Tensor, shape: Sequence[int], first: int, out: Tensor) -> Tensor:
    """As `seeds.normal`."""
    return out.copy_(torch.special.ndtri(uniform(keys, shape, first)).float())
