"""Stateless randomness: every number is a function of (seed, purpose, step or epoch, sample, index).

There is no generator whose state could be lost, so resume needs none, and 1, 2 or 64 ranks draw the same numbers.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), run on int64 tensors: bits are equal on every device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_UNIT = 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the same bits as `value` modulo 2^64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the hash wants zeros from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def key(seed: int, purpose: str) -> Tensor:
    """The root key of one use of randomness.

    Args:
        seed: the run's seed.
        purpose: names the use, e.g. "timestep"; two purposes never share numbers.

    Returns:
        An int64 scalar on the CPU; `fold` samples, steps or epochs into it.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def fold(parent: Tensor, index: Tensor | int) -> Tensor:
    """The keys of `parent`'s children: one for each value of `index` (shapes broadcast, int64)."""
    if isinstance(index, int):
        index = torch.tensor(index, device=parent.device)
    return _mix(_mix(parent) + (index.to(torch.int64) + 1) * _signed(_GOLDEN_GAMMA))


def bits(keys: Tensor, shape: Sequence[int], first: int = 0) -> Tensor:
    """64 random bits for each element, as int64 of shape [*keys.shape, *shape].

    Args:
        keys: int64 of any shape, from `key` and `fold`; the result lies on their device.
        shape: what each key draws.
        first: flat index of the first element, so that a slice of a large draw can be made alone.
    """
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(first + 1, first + count + 1, device=keys.device)
    drawn = _mix(keys.unsqueeze(-1) + counter * _signed(_GOLDEN_GAMMA))
    return drawn.reshape([*keys.shape, *shape])


def uniform(keys: Tensor, shape: Sequence[int] = (), first: int = 0) -> Tensor:
    """Uniform float64 numbers in the open interval (0, 1); arguments as for `bits`."""
    return (_shift_right(bits(keys, shape, first), 11).double() + 0.5) * _UNIT


def normal(keys: Tensor, shape: Sequence[int] = (), first: int = 0) -> Tensor:
    """Standard normal float32 numbers; arguments as for `bits`."""
    return torch.special.ndtri(uniform(keys, shape, first)).float()


def integers(keys: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform int64 numbers in [0, high); arguments as for `bits`."""
    return (uniform(keys, shape) * high).long().clamp_(max=high - 1)


def permutation(keys: Tensor, length: int) -> Tensor:
    """A uniform random permutation of range(length) for each key: int64 [*keys.shape, length]."""
    return torch.argsort(bits(keys, (length,)), dim=-1)
