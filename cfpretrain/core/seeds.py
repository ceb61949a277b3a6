"""Stateless randomness: every number is a function of (seed, purpose, step or epoch, sample, index).

There is no generator whose state could be lost, so resume needs none, and 1, 2 or 64 ranks draw the same numbers.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), run on int64 tensors: bits are equal on every device.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_UNIT = 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the same bits as `value` modulo 2^64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
# Numbers of a chunk: on a CPU all passes over one stay in a core's cache (three times 256 KB), and are too short for
# torch to divide them among its threads; on a GPU the kernels' launches do not count (three times 128 MB).
_CPU_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 24


def _shift_right(x: Tensor, bits: int, out: Tensor | None) -> Tensor:
    # torch shifts int64 arithmetically; the hash wants zeros from the left.
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """Hashes in place; `spare` is memory for as many numbers."""
    x.bitwise_xor_(_shift_right(x, 30, spare)).mul_(_FACTOR_1)
    x.bitwise_xor_(_shift_right(x, 27, spare)).mul_(_FACTOR_2)
    return x.bitwise_xor_(_shift_right(x, 31, spare))


def key(seed: int, purpose: str) -> Tensor:
    """The root key of one use of randomness: an int64 scalar on the CPU; `fold` samples, steps or epochs into it.

    `purpose` names the use, e.g. "timestep"; two purposes never share numbers.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def fold(parent: Tensor, index: Tensor | int) -> Tensor:
    """The keys of `parent`'s children: one for each value of `index` (shapes broadcast, int64)."""
    mixed = _mix_(parent.clone())
    if isinstance(index, int):
        return _mix_(mixed.add_(_signed((index + 1) * _GOLDEN_GAMMA)))
    return _mix_(mixed + (index.to(torch.int64) + 1).mul_(_GOLDEN_GAMMA))


def _steps(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first + 1, first + count + 1, device=device).mul_(_GOLDEN_GAMMA)


# What is made of hashes, in their memory or in that to spare.
_Finish = Callable[[Tensor, Tensor | None], Tensor]


def _draw(
    keys: Tensor, shape: Sequence[int], dtype: torch.dtype, finish: _Finish, first: int = 0, out: Tensor | None = None
) -> Tensor:
    """What `finish` makes of 64 random bits an element, as `dtype`; other arguments as for `bits` and `normal`."""
    count, num_keys, device = math.prod(shape), keys.numel(), keys.device
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    if out is None and num_keys * count <= chunk:
        step = _signed((first + 1) * _GOLDEN_GAMMA) if count == 1 else _steps(first, count, device)
        drawn = finish(_mix_(keys.unsqueeze(-1) + step), None)
        return drawn.to(dtype).reshape([*keys.shape, *shape])
    out = torch.empty([*keys.shape, *shape], dtype=dtype, device=device) if out is None else out
    out_KC, keys_K1 = out.detach().view(num_keys, count), keys.reshape(-1, 1)
    width = max(1, min(count, chunk))
    height = max(1, min(num_keys, chunk // width))
    step_C = _steps(first, width, device)
    places = [(row, column) for column in range(0, count, width) for row in range(0, num_keys, height)]
    num_threads = max(1, min(len(places), torch.get_num_threads() if device.type == "cpu" else 1))
    is_inference = torch.is_inference_mode_enabled()  # which other threads do not know

    def fill(thread: int) -> None:
        with torch.inference_mode(is_inference):
            memory = torch.empty((2, height, width), dtype=torch.int64, device=device)
            for row, column in places[thread::num_threads]:
                part = out_KC[row : row + height, column : column + width]
                x, spare = memory[:, : part.shape[0], : part.shape[1]]
                key_K1 = keys_K1[row : row + height] + _signed(column * _GOLDEN_GAMMA)
                torch.add(step_C[: part.shape[1]], key_K1, out=x)
                part.copy_(finish(_mix_(x, spare), spare))

    if num_threads == 1:
        fill(0)
    else:
        # Not torch's own threads: they would wait for each other after each of twenty passes over a chunk.
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(fill, range(num_threads)))
    return out


def bits(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """64 random bits an element, `shape` for each of `keys` (from `fold`): int64 [*keys.shape, *shape], where keys lie.

    Element i of key k is the hash of k + (i + 1) gamma, SplitMix64's i-th number from the seed k.
    """
    return _draw(keys, shape, torch.int64, lambda drawn, _: drawn)


def _to_halves(drawn: Tensor, spare: Tensor | None) -> Tensor:
    """The first 53 bits as a number, plus 1/2: float64, in the memory of the bits."""
    return drawn.view(torch.float64).copy_(_shift_right(drawn, 11, spare)).add_(0.5)


def _to_unit(drawn: Tensor, spare: Tensor | None) -> Tensor:
    return _to_halves(drawn, spare).mul_(_UNIT)


def uniform(keys: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float64 numbers in (0, 1), (53 bits + 1/2) / 2^53; arguments as for `bits`."""
    return _draw(keys, shape, torch.float64, _to_unit)


def uniform_within(
    bound: float, keys: Tensor, shape: Sequence[int] = (), first: int = 0, out: Tensor | None = None
) -> Tensor:
    """Uniform float32 numbers from -bound to bound, (2 u - 1) bound of u as in `uniform`; arguments as for `normal`."""
    # In float64 2 u - 1 is exact, and so is a factor that is a power of 2.
    scale = 2 * _UNIT * bound
    return _draw(keys, shape, torch.float32, lambda *drawn: _to_halves(*drawn).sub_(2.0**52).mul_(scale), first, out)


def normal(keys: Tensor, shape: Sequence[int] = (), first: int = 0, out: Tensor | None = None) -> Tensor:
    """Standard normal float32 numbers, the normal quantile of `uniform`; their last bit may differ between devices.

    Args:
        keys, shape: as for `bits`.
        first: flat index of the first element, so that a slice of a large draw can be made alone.
        out: where to write them: contiguous, of the result's size and on the device of the keys.
    """

    def finish(drawn: Tensor, spare: Tensor | None) -> Tensor:
        unit = _to_unit(drawn, spare)
        return torch.special.ndtri(unit, out=unit)

    return _draw(keys, shape, torch.float32, finish, first, out)


def integers(keys: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform int64 numbers in [0, high); arguments as for `bits`."""
    return (uniform(keys, shape) * high).long().clamp_(max=high - 1)


def permutation(keys: Tensor, length: int) -> Tensor:
    """A uniform random permutation of range(length) for each key: int64 [*keys.shape, length]."""
    return torch.argsort(bits(keys, (length,)), dim=-1)
