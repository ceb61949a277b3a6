"""What a step is made of: kernels by kind, launches, synchronisations; and the kernels of a compiled block."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from cfpretrain.base.config import ModelConfig
from cfpretrain.core import attention
from cfpretrain.core.block import Block, BlockSettings, make_rotation
from tools.measuring.attention import full_intervals
from tools.measuring.common import dtype_of, synchronise

# By a part of the name of a kernel, or on a CPU of an operator; the first that fits counts.
_KINDS = {
    "attention": r"block_causal|^(forward|backward_q|backward_kv)_kernel|attention|flash|fmha|flex|sdpa",
    "communication": r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|broadcast$",
    "matrix products": r"gemm|nvjet|cutlass|cublas|::b?mm$|addmm|::linear|matmul|splitk|mkldnn",
    "optimizer": r"adam|multi_tensor_apply|foreach|lerp",
    "fused by the compiler": r"^triton_|cpp_fused",
    "normalisation": r"layer_?norm|gammabeta|cucompute",
    "copies": r"memcpy|memset|copy|catarray|::cat$|direct_copy|contiguous|clone",
    "sums": r"reduce|::sum|norm",
    "elementwise": r"elementwise|gelu|::(add|mul|div|sub|where|exp|fill|zero)_?$",
}
_OTHERS = "others"
_SYNCHRONISES = re.compile(r"^cuda(Stream|Device|Event)Synchronize$|^cudaMemcpy$")
_IS_NO_LAUNCH = re.compile(r"^Mem(cpy|set)")
_NUM_LISTED = 25
_RANGE = "the measured step"


def kind_of(name: str) -> str:
    """What a kernel, or an operator of a CPU, is for."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, lower)), _OTHERS)


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Runs `call` once under torch's profiler, and prints its operators by time.

    Returns:
        `device_seconds`: in which the device was busy; on a CPU, of its operators. `shares`: of that, by kind, largest
        first. `num_launches`: of kernels. `num_synchronisations`: in which the host waited for the device.
    """
    synchronise(device)
    with torch.profiler.profile() as recorded:
        with torch.profiler.record_function(_RANGE):
            call()
        synchronise(device)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=by, row_limit=_NUM_LISTED, max_name_column_width=60))
    return summarise(recorded.events() or [], on_gpu=device.type == "cuda")


def summarise(events: Iterable[Any], on_gpu: bool) -> dict[str, Any]:
    """What `profile` returns, from the events of the profiler."""
    events = list(events)
    whole = next(event for event in events if event.name == _RANGE and event.device_type == DeviceType.CPU)
    span = whole.time_range
    # What the host has launched may begin later than the range ends.
    inside = [event for event in events if span.start <= event.time_range.start and event.name != _RANGE]
    if on_gpu:
        # Ranges that the host names are shown on the device as well.
        kernels = [
            event
            for event in inside
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        worked = [(event.name, event.time_range.elapsed_us()) for event in kernels]
        busy = _union([(event.time_range.start, event.time_range.end) for event in kernels])
    else:
        worked = [(event.name, event.self_cpu_time_total) for event in inside]
        busy = sum(microseconds for _, microseconds in worked)
    # An EMA in host memory waits too, in a thread of its own.
    here = [event for event in inside if event.thread == whole.thread and event.time_range.end <= span.end]
    waits = [event for event in here if _SYNCHRONISES.match(event.name)]
    return {
        "device_seconds": busy / 1e6,
        "shares": _shares(worked),
        "num_launches": sum(not _IS_NO_LAUNCH.match(name) for name, _ in worked) if on_gpu else 0,
        "num_synchronisations": len(waits),
    }


def _union(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts: kernels of several streams may run at once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _shares(worked: list[tuple[str, float]]) -> dict[str, float]:
    by_kind: Counter[str] = Counter()
    for name, microseconds in worked:
        by_kind[kind_of(name)] += microseconds
    whole = by_kind.total() or 1.0
    return {kind: of / whole for kind, of in by_kind.most_common()}


# ---------------------------------------------------------------------------
# A compiled block


def count_kernels(model: ModelConfig, backend: str, device: torch.device) -> dict[str, int]:
    """Kernels of a compiled block, forward and backward, counted by what the device, or else the compiler, does.

    Returns:
        `launched`: on a GPU, all kernels of one call. `generated`: kernels that the compiler made, attention of a
        library and matrix products not among them. `graphs`: those of two AR splits, 1 where splits do not matter.
        `graph_breaks`: where the compiler gave up, and went on behind.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    dtype = dtype_of(device)
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    with device:
        block = Block(model.design, BlockSettings(attention=backend, compile=True)).to(dtype)

    def run(seed: int) -> None:
        intervals_BMI = full_intervals(seed, 2, model.num_cond_tokens, model.num_tokens).to(device)
        length = intervals_BMI.shape[1]
        visibility = attention.make_visibility(intervals_BMI, length, backend)
        x_BMD = torch.randn(2, length, model.width, device=device, dtype=dtype, requires_grad=True)
        positions_1M = torch.zeros(1, length, dtype=torch.int64, device=device)
        rotation = make_rotation(model.design, positions_1M, dtype) if model.design.rotary_base else None
        block(x_BMD, visibility, None, rotation).sum().backward()

    run(0)
    run(1)
    counted = {
        "generated": int(metrics.generated_kernel_count),
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if device.type != "cuda":
        return counted
    return counted | {"launched": int(profile(lambda: run(0), device)["num_launches"])}
