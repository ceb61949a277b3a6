"""The block-causal kernels against a dense float64 oracle, in Triton's interpreter, and compiled for an H100."""

import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cfpretrain.core import ar as order
from cfpretrain.core import attention
from cfpretrain.core.attention import block_causal, block_causal_kernels
from cfpretrain.core.block import Block, BlockSettings
from cfpretrain.core.design import make_design
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout, may_attend
from tests.closeness import disagreement
from tests.strictness import make_warnings_errors
from tests.test_ar import text
from tests.test_modalities import errors_of_ways

if not block_causal.is_available():
    pytest.skip("triton is not installed", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


# ---------------------------------------------------------------------------
# Layouts


def random_steps(generator: torch.Generator, num_samples: int, num_tokens: int, last: int) -> Tensor:
    """A split for each sample, of any number of AR steps, whose last ones have equal sizes: int64 [B, L]."""
    rest = num_tokens - last
    share = torch.rand(num_samples, 1, generator=generator)
    cuts_BL = torch.rand(num_samples, num_tokens, generator=generator) < share * share
    cuts_BL[:, 0], cuts_BL[:, rest:], cuts_BL[:, rest] = False, False, rest > 0
    return cuts_BL.long().cumsum(1)


def image(generator: torch.Generator, num_samples: int, num_tokens: int, last: int) -> image_segment:
    return image_segment(random_steps(generator, num_samples, num_tokens, last))


def shared_split(g: torch.Generator) -> Tensor:
    return build_layout([class_segment(7), image(g, 1, 50, 9)]).intervals_BMI


def split_a_sample(g: torch.Generator) -> Tensor:
    return build_layout([class_segment(5), image(g, 2, 85, 13)]).intervals_BMI


def one_ar_step(g: torch.Generator) -> Tensor:
    return build_layout([class_segment(64), image(g, 1, 70, 70)]).intervals_BMI


def steps_of_one_token(g: torch.Generator) -> Tensor:
    return build_layout([class_segment(1), image_segment(torch.arange(65)[None])]).intervals_BMI


def text_after_image(g: torch.Generator) -> Tensor:
    segments = [text(9), image(g, 2, 20, 6), text(40), class_segment(3), image(g, 2, 30, 30)]
    return build_layout(segments).intervals_BMI


def packed(g: torch.Generator) -> Tensor:
    """Samples one after another in a row, each [clean | noised]."""
    parts, first = [], 0
    for num_tokens, last in ((20, 5), (37, 3), (1, 1), (15, 15)):
        intervals_BMI = build_layout([class_segment(4), image(g, 1, num_tokens, last)]).intervals_BMI
        parts.append(intervals_BMI + first)
        first += intervals_BMI.shape[1]
    return torch.cat(parts, 1)


def padded(g: torch.Generator) -> Tensor:
    """Padding between the clean and the noised tokens and at the end; each of its rows sees itself."""
    plain_MI = build_layout([class_segment(6), image(g, 1, 40, 11)]).intervals_BMI[0]
    clean = 6 + 40 - 11
    noised_MI = plain_MI[clean:] + torch.tensor([0, 0, 20, 20])
    rows = torch.arange(clean + 20 + 40 + 14)
    self_MI = torch.stack([0 * rows, 0 * rows, rows, rows + 1], 1)
    parts = [plain_MI[:clean], self_MI[clean : clean + 20], noised_MI, self_MI[-14:]]
    return torch.cat(parts).to(torch.int32)[None]


def closed_up(g: torch.Generator) -> Tensor:
    """Two samples a row, [text | image | text] and [class | image], of which each row lacks other tokens."""
    slots = [text(12), image(g, 2, 30, 6), text(20), class_segment(3), image(g, 2, 25, 25)]
    for i, one in enumerate(slots):
        # Texts lack words at their beginnings, and one row lacks an image.
        num_B1 = torch.randint(0, one.num_tokens + 1, (2, 1), generator=g)
        if one.kind != "text":
            num_B1 = torch.tensor([[0], [one.num_tokens * (i == 1)]])
        slots[i] = dataclasses.replace(one, is_padding_BL=torch.arange(one.num_tokens) < num_B1)
    return build_layout(slots, clean_multiple=16, packed=(3, 2)).intervals_BMI


def rows_that_see_nothing(g: torch.Generator) -> Tensor:
    """Some rows among others, and a whole tile of rows."""
    intervals_BMI = split_a_sample(g).clone()
    intervals_BMI[:, 3::7] = 0
    intervals_BMI[1, :140] = 5
    return intervals_BMI


def any_intervals(g: torch.Generator) -> Tensor:
    """No order at all: two intervals a row that do not overlap, either may be empty."""
    return torch.randint(0, 131, (2, 130, 4), generator=g, dtype=torch.int32).sort(-1).values


LAYOUTS = [
    shared_split,
    split_a_sample,
    one_ar_step,
    steps_of_one_token,
    text_after_image,
    packed,
    padded,
    closed_up,
    rows_that_see_nothing,
    any_intervals,
]


# ---------------------------------------------------------------------------
# The oracle


def dense_attention(q: Tensor, k: Tensor, v: Tensor, intervals_BMI: Tensor) -> Tensor:
    may_attend_B1MK = may_attend(intervals_BMI, k.shape[2]).unsqueeze(1)
    score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~may_attend_B1MK, -1e300)
    return (score.softmax(-1) * may_attend_B1MK) @ v


def relative_errors(
    intervals_BMI: Tensor, head_width: int, dtype: torch.dtype, num_heads: int = 2, device: str = "cpu"
) -> dict[str, float]:
    """The largest error of the output and of each gradient, over the largest value of the oracle's."""
    M, generator = intervals_BMI.shape[1], torch.Generator().manual_seed(1)
    batch_size = 2
    # As in the network: q, k and v are views of one projection.
    qkv = torch.randn(batch_size, M, 3, num_heads, head_width, generator=generator).to(device, dtype)
    grad = torch.randn(batch_size, M, num_heads, head_width, generator=generator).to(device, dtype).transpose(1, 2)
    ours = [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    intervals_BMI = intervals_BMI.to(device)
    out = block_causal.attend(*ours, block_causal.prepare(intervals_BMI, M))
    out_exact = dense_attention(*exact, intervals_BMI)
    out.backward(grad)
    out_exact.backward(grad.double())
    pairs = [(out, out_exact), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    return {name: disagreement(a, b) for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True)}


# ---------------------------------------------------------------------------
# A process in which Triton interprets its kernels


def be_strict() -> None:
    """What a kernel does not write is NaN, and warnings are errors."""
    make_warnings_errors()
    warnings.simplefilter("ignore", DeprecationWarning)  # Triton's own, of how it uses numpy
    allocate = block_causal._allocate
    block_causal._allocate = lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))
    assert block_causal.IS_INTERPRETED


Interpret = Callable[..., Any]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    """Calls a function of this module in a process in which Triton interprets its kernels on the CPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the process imports triton
        try:
            pool.submit(be_strict).result(timeout=120)
        finally:
            del os.environ["TRITON_INTERPRET"]
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)


def assert_close(errors: dict[str, float], dtype: torch.dtype) -> None:
    # A NaN is not below the tolerance either.
    assert {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]} == {}


WIDTHS = {name.__name__: (32, 64, 128)[i % 3] for i, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_oracle(interpret: Interpret, layout: Callable[..., Tensor], dtype: torch.dtype) -> None:
    intervals_BMI = layout(torch.Generator().manual_seed(7))
    assert intervals_BMI.shape[1] <= 192
    width = WIDTHS[layout.__name__]
    errors = interpret(relative_errors, intervals_BMI, width, dtype, 2 if width == 32 else 1)
    assert_close(errors, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("head_width", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_equals_the_oracle_on_many_layouts(interpret: Interpret, head_width: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        for layout in LAYOUTS:
            intervals_BMI = layout(torch.Generator().manual_seed(seed))
            num_heads = 2 if head_width == 32 else 1
            assert_close(interpret(relative_errors, intervals_BMI, head_width, dtype, num_heads), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_width", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_equals_the_oracle_on_a_gpu(head_width: int, dtype: torch.dtype) -> None:
    long = [
        build_layout([class_segment(64), image(torch.Generator().manual_seed(i), 2, L, last)]).intervals_BMI
        for i, (L, last) in enumerate([(256, 7), (256, 256), (1024, 40)])
    ]
    for intervals_BMI in [*(layout(torch.Generator().manual_seed(3)) for layout in LAYOUTS), *long]:
        assert_close(relative_errors(intervals_BMI, head_width, dtype, device="cuda"), dtype)


def unusual_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    tiles = block_causal.prepare(shared_split(generator), 98)
    # Neighbours in a row are not neighbours in memory; the gradient of a sum has stride 0.
    q, k, v = (torch.randn(1, 1, 32, 98, generator=generator).transpose(2, 3).requires_grad_() for _ in range(3))
    out = block_causal.attend(q, k, v, tiles)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    exact = dense_attention(*(x.double() for x in (q, k, v)), tiles.intervals_BMI)
    grads_exact = torch.autograd.grad(exact.sum(), (q, k, v))
    pairs = zip((out, *grads), (exact, *grads_exact), strict=True)
    return {name: disagreement(a, b) for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True)}


def test_any_strides(interpret: Interpret) -> None:
    assert_close(interpret(unusual_inputs), torch.float32)


def rows_without_keys() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    intervals_BMI = shared_split(generator).clone()
    intervals_BMI[:, 10:20] = 0
    q, k, v = (torch.randn(1, 1, 98, 32, generator=generator).requires_grad_() for _ in range(3))
    out = block_causal.attend(q, k, v, block_causal.prepare(intervals_BMI, 98))
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    return out.detach()[0, 0, 10:20], dq[0, 0, 10:20]


def test_rows_that_see_nothing_give_zero_and_get_no_gradient(interpret: Interpret) -> None:
    out, dq = interpret(rows_without_keys)
    assert not out.any()
    assert not dq.any()


# ---------------------------------------------------------------------------
# Tiles


def count_executed_tiles(intervals_BMI: Tensor) -> dict[str, int]:
    """How many tiles each kernel computes, for one sample and one head."""
    counts, helpers = {}, ("_attend_tile", "_grad_q_tile", "_grad_kv_tile")
    originals = {name: getattr(block_causal_kernels, name) for name in helpers}

    def counting(name: str) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            counts[name] += 1
            return originals[name](*args)

        return count

    M = intervals_BMI.shape[1]
    q, k, v = (torch.randn(1, 1, M, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    for name in helpers:
        counts[name] = 0
        setattr(block_causal_kernels, name, counting(name))
    try:
        out = block_causal.attend(q, k, v, block_causal.prepare(intervals_BMI, M))
        out.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(block_causal_kernels, name, original)
    return counts


def tiles_by_the_bounds(intervals_MI: Tensor) -> dict[str, int]:
    """The same from the intervals alone: tiles of the hulls of each tile of rows, and of the ranges of rows."""

    def hulls(rows: int, keys: int) -> int:
        count = 0
        for tile_MI in intervals_MI.split(rows):
            for begin, end in (tile_MI[:, :2].unbind(1), tile_MI[:, 2:].unbind(1)):
                has = begin < end
                if has.any():
                    count += -(-int(end[has].max() - begin[has].min()) // keys)
        return count

    forward, backward_q, backward_kv = (
        block_causal.LAUNCHES[name, 64, 2] for name in ("forward", "backward_q", "backward_kv")
    )
    tiles, rows, count = block_causal.prepare(intervals_MI[None], len(intervals_MI)), backward_kv.rows, 0
    for ranges, whole in zip(tiles.row_ranges_BT4[0].tolist(), tiles.whole_ranges_BT4[0].tolist(), strict=True):
        for i in (0, 2):
            num_whole = (whole[i + 1] - whole[i]) // rows
            before = whole[i + 1] - num_whole * rows - ranges[i]
            count += num_whole - (-before // rows) - (-(ranges[i + 1] - whole[i + 1]) // rows)
    return {
        "_attend_tile": hulls(forward.rows, forward.keys),
        "_grad_q_tile": hulls(backward_q.rows, backward_q.keys),
        "_grad_kv_tile": count,
    }


def test_tiles_that_no_row_sees_are_not_computed(interpret: Interpret) -> None:
    segments = [class_segment(32), image_segment(order.steps_from_sizes([32, 96])[None])]
    intervals_BMI = build_layout(segments).intervals_BMI
    executed = interpret(count_executed_tiles, intervals_BMI)
    assert executed == tiles_by_the_bounds(intervals_BMI[0])
    # Tiles of 64 rows and 64 keys, 64 and 32, 128 and 64; dense: 9, 18 and 6.
    assert executed == {"_attend_tile": 7, "_grad_q_tile": 13, "_grad_kv_tile": 4}


@pytest.mark.parametrize(("num_tokens", "at_most"), [(256, 0.72), (1024, 0.50)])
def test_tiles_computed_of_all(num_tokens: int, at_most: float) -> None:
    """Head width 64, decay 0.9, 64 condition tokens: the area of the computed tiles over M * K."""
    share = dict.fromkeys(("_attend_tile", "_grad_q_tile", "_grad_kv_tile"), 0.0)
    num_layouts = 20
    for seed in range(num_layouts):
        steps_BL = order.draw_steps(torch.tensor(seed), torch.tensor([seed]), num_tokens, 0.9)
        intervals_MI = build_layout([class_segment(64), image_segment(steps_BL)]).intervals_BMI[0]
        for (name, count), kernel in zip(
            tiles_by_the_bounds(intervals_MI).items(), ("forward", "backward_q", "backward_kv"), strict=True
        ):
            launch = block_causal.LAUNCHES[kernel, 64, 2]
            share[name] += count * launch.rows * (launch.keys or block_causal.KEY_TILE) / len(intervals_MI) ** 2
    means = {name: total / num_layouts for name, total in share.items()}
    assert max(means.values()) < at_most, means


@given(st.integers(0, 2**20), st.sampled_from(LAYOUTS), st.sampled_from([16, 64]))
def test_the_ranges_of_a_tile_hold_every_row_that_sees_it(seed, layout, key_tile) -> None:
    intervals_BMI = layout(torch.Generator().manual_seed(seed))
    B, M, _ = intervals_BMI.shape
    tiles = block_causal.prepare(intervals_BMI, M, key_tile)
    may_attend_BMK = may_attend(intervals_BMI, M)
    row_M = torch.arange(M)
    for b in range(B):
        for t, may_attend_MK in enumerate(may_attend_BMK[b].split(key_tile, dim=1)):
            ranges, whole = tiles.row_ranges_BT4[b, t].tolist(), tiles.whole_ranges_BT4[b, t].tolist()
            held = [(ranges[i] <= row_M) & (row_M < ranges[i + 1]) for i in (0, 2)]
            assert not (held[0] & held[1]).any()
            sees_M = may_attend_MK.any(1)
            assert not (sees_M & ~held[0] & ~held[1]).any()
            for i, held_M in zip((0, 2), held, strict=True):
                assert ranges[i] <= whole[i] <= whole[i + 1] <= ranges[i + 1]
                assert may_attend_MK[whole[i] : whole[i + 1]].all()
                assert not held_M.any() or (sees_M[ranges[i]] and sees_M[ranges[i + 1] - 1])


def test_rows_that_see_a_clean_tile_whole_need_no_mask() -> None:
    steps_BL = order.steps_from_sizes([64, 64, 64])[None]
    intervals_BMI = build_layout([class_segment(64), image_segment(steps_BL)]).intervals_BMI
    tiles = block_causal.prepare(intervals_BMI, 384)
    assert tiles.row_ranges_BT4[0].tolist() == [
        [0, 192, 192, 384],  # the condition: all rows
        [64, 192, 256, 384],  # step 1, clean: its own rows and later ones
        [128, 192, 320, 384],
        [0, 0, 192, 256],  # step 1, noised: itself
        [0, 0, 256, 320],
        [0, 0, 320, 384],
    ]
    assert torch.equal(tiles.whole_ranges_BT4, tiles.row_ranges_BT4)


# ---------------------------------------------------------------------------
# The operator


def check_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    intervals_BMI = shared_split(generator)
    M = intervals_BMI.shape[1]
    q, k, v = torch.randn(1, M, 3, 1, 32, generator=generator).permute(2, 0, 3, 1, 4).requires_grad_().unbind(0)
    tiles = block_causal.prepare(intervals_BMI, M)
    torch.library.opcheck(
        block_causal._forward,
        (q, k, v, *tiles),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_operator_is_registered_as_torch_wants_it(interpret: Interpret) -> None:
    interpret(check_operator)


def test_packed_and_padded_samples_are_those_alone(interpret: Interpret) -> None:
    """Texts and images of a whole network, forward and backward."""
    errors = interpret(errors_of_ways, "triton", ("packed", "padded", "alone"), True)
    assert len(errors) > 100
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def compile_a_block() -> list[bool]:
    """Whether outputs and gradients of a compiled block are those of the same block run eagerly."""
    generator = torch.Generator().manual_seed(0)
    block = Block(make_design("causalfusion", 32, 1), BlockSettings(attention="triton"))
    compiled = torch.compile(block._compute, fullgraph=True, dynamic=False, backend="aot_eager")
    x_BMD = torch.randn(1, 98, 32, generator=generator)
    weight, equal = block.attn.qkv.weight, []
    for _ in range(2):
        visibility = attention.make_visibility(shared_split(generator), 98, "triton")
        with torch.compiler.set_stance("default" if not equal else "fail_on_recompile"):
            out = compiled(x_BMD, visibility, None, None)
            (grad,) = torch.autograd.grad(out.square().sum(), weight)
        out_eager = block(x_BMD, visibility)
        (grad_eager,) = torch.autograd.grad(out_eager.square().sum(), weight)
        equal += [torch.equal(out, out_eager), torch.equal(grad, grad_eager)]
    return equal


def test_a_compiled_block_is_one_graph_for_all_layouts_of_a_length(interpret: Interpret) -> None:
    assert interpret(compile_a_block) == [True] * 4


def refusals() -> list[str]:
    tiles = block_causal.prepare(torch.zeros(1, 8, 4, dtype=torch.int32), 8)
    x, narrow, long = torch.zeros(1, 1, 8, 32), torch.zeros(1, 1, 8, 48), torch.zeros(1, 1, 9, 32)
    messages = []
    for q, k, v in ((narrow,) * 3, (x, x, x.bfloat16()), (x.double(),) * 3, (x, x, long), (long,) * 3):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011 the caller looks at what it says
            block_causal.attend(q, k, v, tiles)
        messages.append(str(refusal.value))
    return messages


def test_what_is_not_supported_is_refused(interpret: Interpret) -> None:
    for message, expected in zip(
        interpret(refusals),
        ("head widths 32, 64, 128, got 48", "one dtype.*bfloat16", "float64", "[B, H, K, E]", "1 samples.*9 rows"),
        strict=True,
    ):
        assert re.search(expected if ".*" in expected else re.escape(expected), message), message


def test_refuses_the_cpu() -> None:
    x = torch.zeros(1, 1, 8, 32)
    with pytest.raises(ValueError, match="runs on a GPU, got tensors on the cpu"):
        block_causal.attend(x, x, x, block_causal.prepare(torch.zeros(1, 8, 4, dtype=torch.int32), 8))


def test_module_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from cfpretrain.core.attention import block_causal\n"
        "assert not block_causal.is_available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------
# Compiled for an H100, without one


def compile_for_sm90(name: str, head_width: int, value_bytes: int) -> Any:
    """A kernel as it is launched for bf16 (2 bytes) or fp32, compiled for an H100."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, launch = getattr(block_causal, f"{name}_kernel"), block_causal.LAUNCHES[name, head_width, value_bytes]
    values = {2: "*bf16", 4: "*fp32"}[value_bytes]
    constants = {"E": head_width, "ROWS": launch.rows, "KEYS": launch.keys or block_causal.KEY_TILE}
    types = {"scale": "fp32", "lse": "*fp32", "delta": "*fp32"} | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("intervals", "row_ranges", "whole_ranges"), "*i32")
    types |= {f"num_{of}": "i32" for of in ("heads", "rows", "keys")}
    signature = {a: types.get(a, "i32" if a.startswith("stride") else values) for a in kernel.arg_names}
    # Pointers and strides are multiples of 16 in the network, and Triton is told so when it launches.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (a, kind) in enumerate(signature.items())
        if kind.startswith("*") or a.startswith("stride")
    }
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )


def resource_usage(cubin: bytes, tmp_path: Path) -> dict[str, int]:
    """REG, STACK (spills go there), SHARED (static), LOCAL ... of a kernel, by NVIDIA's own tool."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", listing)}


class Recorder:
    """In place of a kernel: what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def test_kernels_are_compiled_once_for_all_lengths_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what Triton itself recompiles for: types, numbers that are 1 and those that 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernels = {name: getattr(block_causal, f"{name}_kernel") for name in ("forward", "backward_q", "backward_kv")}
    recorders = {name: Recorder() for name in kernels}
    for name, recorder in recorders.items():
        monkeypatch.setattr(block_causal, f"{name}_kernel", recorder)
    # Lengths and numbers of key tiles that 16 divides and that it does not, and masks of one and of all samples.
    for num_rows, batch_size in ((98, 2), (101, 1), (320, 3), (1024, 1), (1008, 2), (1, 1)):
        qkv = torch.zeros(batch_size, num_rows, 3, 2, 64, dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tiles = block_causal.prepare(torch.zeros(batch_size, num_rows, 4, dtype=torch.int32), num_rows)
        out, lse = block_causal._forward(q, k, v, *tiles)
        block_causal._backward(out, q, k, v, out, lse, *tiles)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for name, kernel in kernels.items():
        specialise = create_function_from_signature(kernel.signature, kernel.params, backend)
        found = {str(specialise(*args, **kwargs)[1]) for args, kwargs in recorders[name].launches}
        assert len(recorders[name].launches) == 6
        assert len(found) == 1, found


@pytest.mark.parametrize(
    ("name", "head_width", "value_bytes"),
    [
        pytest.param(*case, marks=[] if case[1:] in ((64, 2), (128, 2)) else pytest.mark.slow)
        for case in block_causal.LAUNCHES
    ],
)
def test_compiled_for_an_h100_kernels_fit(name, head_width, value_bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = compile_for_sm90(name, head_width, value_bytes)
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    most_spilled = {
        ("backward_kv", 128, 4): 128,  # four fp32 tiles of 64 keys and 128 values do not fit into the registers
        ("backward_kv", 64, 2): 192,  # the fastest on an H200 all the same
    }
    assert usage["STACK"] <= most_spilled.get((name, head_width, value_bytes), 0)
    assert usage["LOCAL"] == 0
    assert 0 < usage["REG"] <= 255
    assert compiled.metadata.shared <= 227 * 1024
    if value_bytes == 2:
        # The matrix products run on tensor cores, and tiles are fetched ahead.
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"]
