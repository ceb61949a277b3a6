"""Attention backends under row intervals against a float64 dense oracle; what cannot run is refused."""

import importlib.util
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import UserError, say
from cfpretrain.core import ar as order
from cfpretrain.core import attention, seeds
from cfpretrain.core.attention import attend, block_causal, flash, flex, make_visibility
from cfpretrain.core.block import Block, BlockSettings
from cfpretrain.core.design import make_design
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import Layout, Segment, build_layout, may_attend
from tests.closeness import disagreement
from tests.test_ar import text
from tests.test_config import TINY

HEAD_WIDTHS = (32, 64, 128)


def oracle(q, k, v, may_attend):
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~may_attend, -torch.inf).softmax(-1) @ v.double()


def random_segments(key: torch.Tensor, batch_size: int, most_tokens: int) -> list[Segment]:
    """A condition and two segments of random kinds; images with a split for each sample or a shared one."""
    kinds = seeds.integers(seeds.fold(key, torch.arange(3)), 4).tolist()
    sizes = (2 + seeds.integers(seeds.fold(key, torch.arange(3, 6)), most_tokens - 1)).tolist()
    segments: list[Segment] = [class_segment(sizes[0])]
    for i, (kind, size) in enumerate(zip(kinds[1:], sizes[1:], strict=True)):
        image_key = seeds.fold(key, 10 + i)
        if kind == 0:
            segments.append(text(size))
        elif kind == 1:
            segments.append(image_segment(order.draw_shared_steps(image_key, 1, size, 0.9)))
        else:
            sample_keys = seeds.fold(image_key, torch.arange(batch_size))
            segments.append(image_segment(order.draw_steps(image_key, sample_keys, size, 0.9)))
    return segments


def random_case(number: int, most_tokens: int, dtype: torch.dtype = torch.float32):
    """q, k, v as the network makes them (views of one projection), a direction and the intervals of a random layout."""
    key = seeds.fold(seeds.key(0, "layouts"), number)
    batch_size, num_heads = 1 + number % 3, 1 + number % 2
    layout = build_layout(random_segments(key, batch_size, most_tokens))
    M, E = layout.step_BM.shape[1], HEAD_WIDTHS[number % 3]
    qkv = seeds.normal(seeds.fold(key, 100), (batch_size, M, 3, num_heads, E)).to(dtype)
    direction = seeds.normal(seeds.fold(key, 101), (batch_size, num_heads, M, E)).to(dtype)
    return qkv, direction, layout.intervals_BMI


def split(qkv):
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("tenth", range(10))
def test_sdpa_over_500_layouts(tenth) -> None:
    for number in range(50 * tenth, 50 * tenth + 50):
        qkv, direction, intervals = random_case(number, 40)
        ours, theirs = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
        M = qkv.shape[1]
        out = attend(*split(ours), make_visibility(intervals, M, "sdpa"))
        want = oracle(*split(theirs), may_attend(intervals, M).unsqueeze(1))
        assert disagreement(out, want) < 1e-5, number
        (out * direction).sum().backward()
        (want * direction).sum().backward()
        assert disagreement(ours.grad, theirs.grad) < 1e-5, number


def test_sdpa_in_bf16() -> None:
    for number in range(12):
        qkv, direction, intervals = random_case(number, 40, torch.bfloat16)
        ours, theirs = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
        out = attend(*split(ours), make_visibility(intervals, qkv.shape[1], "sdpa"))
        want = oracle(*split(theirs), may_attend(intervals, qkv.shape[1]).unsqueeze(1))
        assert disagreement(out, want) < 2e-2
        (out * direction).sum().backward()
        (want * direction.double()).sum().backward()
        assert disagreement(ours.grad, theirs.grad) < 2e-2


def layout_of_one_length(number: int, batch_size: int) -> Layout:
    """Layouts of 179 tokens, more than a tile of FlexAttention and no multiple of one."""
    keys = seeds.fold(seeds.fold(seeds.key(0, "layouts of one length"), number), torch.arange(3 * batch_size))
    inner = order.draw_steps(seeds.fold(keys[0], 1), keys[:batch_size], 20, 0.9)
    last = order.draw_steps(seeds.key(8, "last step"), keys[batch_size : 2 * batch_size], 60, 0.9)
    return build_layout([class_segment(30), image_segment(inner), text(9), image_segment(last)])


@pytest.mark.parametrize(
    ("num_splits", "head_width", "dtype"),
    [(2, 64, torch.float32), (1, 32, torch.float32), (2, 128, torch.bfloat16)],
    ids=str,
)
def test_flex_forward(num_splits, head_width, dtype) -> None:
    """Two samples, each with a split of its own or both with one. The backward needs a GPU."""
    torch._dynamo.reset()
    for number in range(10):
        layout = layout_of_one_length(number, num_splits)
        M = layout.step_BM.shape[1]
        qkv = seeds.normal(seeds.key(number, "qkv"), (2, M, 3, 2, head_width)).to(dtype)
        with torch.no_grad():
            out = attend(*split(qkv), make_visibility(layout.intervals_BMI, M, "flex"))
        want = oracle(*split(qkv), may_attend(layout.intervals_BMI, M).unsqueeze(1))
        assert disagreement(out, want) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_flex_is_compiled_once_for_all_layouts_of_a_length(batch_size) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, backend=graphs, dynamic=False)
    for number in range(4):
        layout = layout_of_one_length(number, batch_size)
        M = layout.step_BM.shape[1]
        q, k, v = seeds.normal(seeds.fold(seeds.key(number, "qkv"), torch.arange(3)), (3, 1, M, 32))
        compiled(q, k, v, block_mask=make_visibility(layout.intervals_BMI, M, "flex").mask)
    assert graphs.frame_count == 1


def test_a_compiled_block_with_flex_is_one_graph_for_all_layouts_of_a_length() -> None:
    torch._dynamo.reset()
    block = Block(make_design("causalfusion", 64, 2), BlockSettings(attention="flex"))
    compiled = torch.compile(block._compute, backend="eager", fullgraph=True, dynamic=False)
    for number in range(2):
        layout = layout_of_one_length(number, 2)
        M = layout.step_BM.shape[1]
        x_BMD = seeds.normal(seeds.key(number, "tokens"), (2, M, 64))
        tiled, dense = (make_visibility(layout.intervals_BMI, M, backend) for backend in ("flex", "sdpa"))
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            out = compiled(x_BMD, tiled, None, None)
        assert disagreement(out, block(x_BMD, dense)) < 1e-5


def test_tiles_of_flex_are_those_of_the_dense_mask() -> None:
    for number in range(30):
        _, _, intervals = random_case(number, 60)
        M = intervals.shape[1]
        dense = may_attend(intervals, M)
        missing = -M % 16
        seen, whole = flex._tiles_seen(intervals, M, 16)
        rows = torch.nn.functional.pad(dense, (0, 0, 0, missing), value=False).unflatten(1, (-1, 16)).any(2)
        all_rows = torch.nn.functional.pad(dense, (0, 0, 0, missing), value=True).unflatten(1, (-1, 16)).all(2)
        want = torch.nn.functional.pad(rows, (0, missing), value=False).unflatten(2, (-1, 16)).any(3)
        want_whole = torch.nn.functional.pad(all_rows, (0, missing), value=True).unflatten(2, (-1, 16)).all(3)
        assert torch.equal(seen, want)
        # A tile that two intervals cover between them may pass for one seen in part.
        assert not (whole & ~want_whole).any()
        assert (whole | ~want_whole).float().mean() > 0.95


def test_no_intervals_means_everything_is_visible() -> None:
    q, k, v = seeds.normal(seeds.fold(seeds.key(0, "qkv"), torch.arange(3)), (1, 1, 4, 8))
    want = oracle(q, k, v, torch.ones(4, 4, dtype=torch.bool))
    assert disagreement(attend(q, k, v, make_visibility(None, 4, "sdpa")), want) < 1e-5


# ---------------------------------------------------------------------------
# On a GPU

GPU = "cuda"


def layout_of_2112_tokens(number: int) -> Layout:
    """64 condition tokens and all 1024 of an image, twice; a split for each of two samples."""
    key = seeds.fold(seeds.key(0, "long layouts"), number)
    while True:
        steps_BL = order.draw_steps(key, seeds.fold(key, torch.arange(2)), 1024, 0.9)
        layout = build_layout([class_segment(64), image_segment(steps_BL)], clean_multiple=1024)
        if layout.step_BM.shape[1] == 2112:  # one AR step has no clean tokens
            return layout
        key = seeds.fold(key, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "flex", "triton"])
@pytest.mark.parametrize(
    ("head_width", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)], ids=str
)
def test_long_sequences_on_a_gpu(backend, head_width, dtype) -> None:
    """Both directions, against the oracle."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for number in range(2):
        intervals = layout_of_2112_tokens(number).intervals_BMI.to(GPU)
        M, key = intervals.shape[1], seeds.key(number, "long")
        qkv = seeds.normal(key, (2, M, 3, 2, head_width)).to(GPU, dtype)
        direction = seeds.normal(seeds.fold(key, 1), (2, 2, M, head_width)).to(GPU, dtype)
        ours, theirs = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
        out = attend(*split(ours), make_visibility(intervals, M, backend))
        want = oracle(*split(theirs), may_attend(intervals, M).unsqueeze(1))
        assert disagreement(out, want) < tolerance
        out.backward(direction)
        want.backward(direction.double())
        assert disagreement(ours.grad, theirs.grad) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_a_compiled_block_on_a_gpu(backend) -> None:
    """One graph for all layouts of a length, and what the block computes in float64."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.device(GPU):
        block = Block(make_design("causalfusion", 256, 4), BlockSettings(attention=backend, compile=True)).bfloat16()
        exact = Block(make_design("causalfusion", 256, 4), BlockSettings()).double()
    exact.load_state_dict(block.state_dict())
    for number in range(3):
        intervals = layout_of_2112_tokens(number).intervals_BMI.to(GPU)
        M, key = intervals.shape[1], seeds.key(number, "tokens")
        x_BMD = seeds.normal(key, (2, M, 256)).to(GPU, torch.bfloat16).requires_grad_()
        direction = seeds.normal(seeds.fold(key, 1), (2, M, 256)).to(GPU, torch.bfloat16)
        wide_BMD = x_BMD.detach().double().requires_grad_()
        out = block(x_BMD, make_visibility(intervals, M, backend))
        want = exact(wide_BMD, make_visibility(intervals, M, "sdpa"))
        inputs = (
            [x_BMD, block.attn.qkv.weight, block.mlp.fc1.weight],
            [
                wide_BMD,
                exact.attn.qkv.weight,
                exact.mlp.fc1.weight,
            ],
        )
        got = [out, *torch.autograd.grad(out, inputs[0], direction)]
        expected = [want, *torch.autograd.grad(want, inputs[1], direction.double())]
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b).norm() < 2e-2 * b.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------------------
# Choosing


def choose(name: str, device_type: str, head_width: int) -> str:
    return attention.choose(name, "training", device_type, "bf16", head_width, say)


def choose_cached(name: str, device_type: str, precision: str, head_width: int) -> str:
    return attention.choose(name, "sampling", device_type, precision, head_width, say)


def test_auto() -> None:
    assert [choose("auto", "cuda", width) for width in (32, 64, 128)] == ["triton"] * 3
    assert [choose("auto", "cuda", width) for width in (16, 48, 256)] == ["flex"] * 3
    assert choose("auto", "cuda", 8) == "sdpa"
    assert choose("sdpa", "cuda", 64) == "sdpa"
    assert {choose("auto", "cpu", width) for width in (8, 16, 64)} == {"sdpa"}
    assert choose_cached("auto", "cpu", "bf16", 64) == "sdpa"


def test_auto_without_triton(monkeypatch, capsys) -> None:
    """Torch compiles FlexAttention with Triton."""
    monkeypatch.setattr(block_causal, "is_available", lambda: False)
    attention._say_once.cache_clear()
    assert {choose("auto", "cuda", width) for width in (16, 64)} == {"sdpa"}
    assert "training attends by sdpa, not by triton, which needs the package triton" in capsys.readouterr().out
    for name in ("flex", "triton"):
        with pytest.raises(ValueError, match=rf"{name} needs the package triton.*\(pip install triton\); or use sdpa"):
            choose(name, "cuda", 64)


@pytest.mark.parametrize("name", ["auto", "sdpa", "flex", "triton"])
def test_the_config_knows_what_is_compiled_for_each_length(name) -> None:
    for width in (8, 16, 24, 32, 48, 64, 96, 128, 256):
        overrides = ["model.num_heads=2", f"model.width={2 * width}", f"engine.attention={name}"]
        config = configs.load(TINY, overrides)
        if name != "auto" and width not in attention.BACKENDS[name].head_widths:
            with pytest.raises(ValueError, match=f"{name} needs heads of width (16 or more|32, 64, 128); or use sdpa"):
                choose(name, "cuda", width)
            continue
        is_flex = choose(name, "cuda", width) == "flex"
        assert config.compiles_lengths() == is_flex, width
        assert (config.clean_token_multiple() > 1) == is_flex, width


@pytest.mark.parametrize("key", ["attention", "cached_attention"])
def test_a_backend_that_there_is_not_is_refused(key) -> None:
    known = {"attention": "auto, triton, flex, sdpa", "cached_attention": "auto, flash, sdpa"}[key]
    with pytest.raises(UserError, match=f"engine.{key}: expected one of {known}; got 'xformers'"):
        config_checks.check(configs.load(TINY, [f"engine.{key}=xformers"]), world_size=1)


def test_the_kernel_can_do_what_is_said_of_it() -> None:
    assert {width for _, width, _ in block_causal.LAUNCHES} == {*attention.BACKENDS["triton"].head_widths}


@pytest.mark.parametrize("name", ["flex", "triton"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(name) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a GPU.*use sdpa"):
        choose(name, "cpu", 64)


@pytest.fixture
def capability(monkeypatch) -> Callable[[int, int], None]:
    """Sets the compute capability of a GPU that is taken to be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def set_to(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))

    return set_to


@pytest.fixture
def flash_attn(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
    """Puts a package flash_attn of the given source where Python finds it first."""

    def forget() -> None:
        flash._load.cache_clear()
        attention._say_once.cache_clear()
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)

    def install(source: str) -> None:
        forget()
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    forget()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the real package is installed")
def test_a_missing_flash_attn_is_named(capability, flash_attn, capsys) -> None:
    capability(9, 0)
    with pytest.raises(ValueError, match=r"flash needs the package \(pip install 'flash-attn.*; or use sdpa"):
        choose_cached("flash", "cuda", "bf16", 64)
    assert choose_cached("auto", "cuda", "bf16", 64) == "sdpa"
    assert "not by flash, which needs the package (pip install 'flash-attn>=2.8'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source",
    ["raise ImportError('flash_attn_2_cuda.so:\\nundefined symbol: _ZN3c104cuda')", "1 / 0", "", "import flash_attn.x"],
)
def test_a_broken_flash_attn_is_found_when_it_is_chosen(source, capability, flash_attn, capsys) -> None:
    """Not at the first sample; and said in one line, once, where a GPU could have used it."""
    flash_attn(source)
    capability(9, 0)
    with pytest.raises(
        ValueError, match=r"flash needs a package flash-attn that can be imported, got .*Error: "
    ) as caught:
        choose_cached("flash", "cuda", "bf16", 64)
    assert "\n" not in str(caught.value)
    for precision in ("fp32", "bf16", "bf16"):
        assert choose_cached("auto", "cuda", precision, 64) == "sdpa"
    [said] = capsys.readouterr().out.splitlines()
    assert "sampling attends by sdpa, not by flash, which needs a package flash-attn that can be imp" in said


def test_flash_needs_an_ampere_gpu_bf16_and_heads_that_are_not_too_wide(capability, flash_attn) -> None:
    flash_attn("def flash_attn_func(q, k, v): ...")
    capability(8, 0)
    assert choose_cached("auto", "cuda", "bf16", 256) == "flash"
    assert choose_cached("auto", "cuda", "fp32", 64) == "sdpa"
    assert choose_cached("auto", "cuda", "bf16", 320) == "sdpa"
    with pytest.raises(ValueError, match=r"flash needs heads of width 256 or less; or use sdpa"):
        choose_cached("flash", "cuda", "bf16", 320)
    with pytest.raises(ValueError, match=r"a GPU from Ampere on .* and engine.precision=bf16"):
        choose_cached("flash", "cpu", "fp32", 64)
    capability(7, 5)
    assert choose_cached("auto", "cuda", "bf16", 64) == "sdpa"
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        choose_cached("flash", "cuda", "bf16", 64)


def test_flash_is_called_with_tokens_before_heads(flash_attn) -> None:
    """The package builds on GPU machines only: a stand-in with its documented signature [B, M, H, E]."""
    flash_attn(
        "from torch.nn.functional import scaled_dot_product_attention as attend\n"
        "def flash_attn_func(q, k, v):\n"
        "    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)"
    )
    q = seeds.normal(seeds.key(0, "q"), (2, 3, 5, 8))
    k, v = seeds.normal(seeds.fold(seeds.key(0, "kv"), torch.arange(2)), (2, 3, 9, 8))
    out = attend(q, k, v, make_visibility(None, 9, "flash"))
    assert disagreement(out, oracle(q, k, v, torch.ones(5, 9, dtype=torch.bool))) < 1e-5
