"""Blocks of every trunk: the paper's as it was, sizes, heads of keys and values, rotary positions."""

import math

import pytest
import torch
from torch import Tensor

from cfpretrain.base.config import ModelConfig
from cfpretrain.core import seeds
from cfpretrain.core.attention import Visibility, make_visibility
from cfpretrain.core.block import Block, BlockSettings, Mlp, make_rotation, rotary_frequencies, rotate
from cfpretrain.core.design import TRUNKS, BlockDesign, make_design
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import Segment, join_rotary_positions, with_rotary_positions
from cfpretrain.core.work import Work
from cfpretrain.run.metrics import training_flops
from tests.closeness import disagreement

M, WIDTH = 7, 24
UNLIKE = {"num_kv_heads": 2, "head_width": 10, "mlp_width": 14}  # no two sizes of a block are equal


def make_block(design: BlockDesign) -> Block:
    block = Block(design, BlockSettings()).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(seeds.normal(seeds.key(0, name), tuple(parameter.shape)).double() / 3)
    return block


def tokens(purpose: str = "tokens") -> Tensor:
    return seeds.normal(seeds.key(0, purpose), (2, M, WIDTH)).double()


def causal(backend: str = "sdpa") -> Visibility:
    end_M = torch.arange(1, M + 1, dtype=torch.int32)
    return make_visibility(torch.stack([0 * end_M, end_M, 0 * end_M, 0 * end_M], -1)[None], M, backend)


def rotation_of(design: BlockDesign, first: int = 0):
    return make_rotation(design, torch.arange(first, first + M)[None], torch.float64) if design.rotary_base else None


def test_the_papers_block_has_the_parameters_of_before() -> None:
    block = Block(make_design("causalfusion", 16, 2), BlockSettings())
    assert {name: tuple(parameter.shape) for name, parameter in block.named_parameters()} == {
        "norm1.weight": (16,),
        "norm1.bias": (16,),
        "attn.qkv.weight": (48, 16),
        "attn.q_norm.weight": (8,),
        "attn.q_norm.bias": (8,),
        "attn.k_norm.weight": (8,),
        "attn.k_norm.bias": (8,),
        "attn.proj.weight": (16, 16),
        "attn.proj.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "mlp.fc1.weight": (64, 16),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (16, 64),
        "mlp.fc2.bias": (16,),
    }


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("changes", [{}, UNLIKE])
def test_sizes_are_those_of_the_parameters(trunk: str, changes: dict) -> None:
    design = make_design(trunk, WIDTH, 4, changes)
    matrices = [parameter.numel() for parameter in Block(design, BlockSettings()).parameters() if parameter.ndim == 2]
    assert (design.matrix_values, design.largest_matrix) == (sum(matrices), max(matrices))
    model = ModelConfig(width=WIDTH, num_heads=4, depth=3, trunk=trunk, **changes)  # type: ignore[arg-type]
    assert model.design == design
    # A multiplication and an addition of each value for each token, forward and twice as many backward; q k^T and
    # the sum of the values, of each head.
    of_pairs = 4 * 4 * design.head_width
    work = Work(100, 1000, {"image": 0, "text": 0}, 0)
    assert training_flops(model, work) == 3 * 3 * (2 * sum(matrices) * 100 + of_pairs * 1000)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_each_head_of_keys_and_values_serves_neighbouring_queries(trunk: str) -> None:
    grouped = make_block(make_design(trunk, WIDTH, 4, UNLIKE))
    full = make_block(make_design(trunk, WIDTH, 4, {**UNLIKE, "num_kv_heads": 4}))

    def repeat(of_qkv: Tensor) -> Tensor:
        q, k, v = of_qkv.split([40, 20, 20])
        return torch.cat([q, *(one.unflatten(0, (2, 10)).repeat_interleave(2, 0).flatten(0, 1) for one in (k, v))])

    weights = grouped.state_dict()
    full.load_state_dict({name: repeat(one) if ".qkv." in name else one for name, one in weights.items()})
    results = [
        block(tokens(), causal(), None, rotation_of(make_design(trunk, WIDTH, 4, UNLIKE))) for block in (grouped, full)
    ]
    assert disagreement(*results) < 1e-12


def test_the_two_lines_of_mlps_are_their_formulas() -> None:
    x_BMD = tokens()
    for kind in ("gelu", "gelu_tanh", "swiglu"):
        mlp: Mlp = make_block(make_design("gpt2", WIDTH, 2, {"mlp": kind, "mlp_width": 10})).mlp
        inner = x_BMD @ mlp.fc1.weight.T + mlp.fc1.bias
        if kind == "swiglu":
            inner = inner[..., :10] * torch.sigmoid(inner[..., :10]) * inner[..., 10:]
        elif kind == "gelu":
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        else:
            inner = inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))) / 2
        assert disagreement(mlp(x_BMD), inner @ mlp.fc2.weight.T + mlp.fc2.bias) < 1e-12


# ---------------------------------------------------------------------------
# Rotary positions


def test_only_distances_of_rotary_positions_count() -> None:
    design = make_design("llama", WIDTH, 2, {"rotary_base": 100.0})
    block = make_block(design)
    first, later = (block(tokens(), causal(), None, rotation_of(design, begin)) for begin in (0, 11))
    assert disagreement(first, later) < 1e-5  # angles are in fp32
    assert disagreement(first, block(tokens(), causal())) > 1e-3


def test_a_pair_of_values_turns_by_its_frequency() -> None:
    design = make_design("llama", 8, 1, {"rotary_base": 16.0})
    frequency_F = torch.tensor([1.0, 16**-0.25, 16**-0.5, 16**-0.75])
    assert disagreement(rotary_frequencies(design), frequency_F) < 1e-6
    x_BHME = seeds.normal(seeds.key(0, "x"), (1, 1, 1, 8))
    turned = rotate(x_BHME, make_rotation(design, torch.tensor([[3]]), torch.float32)).flatten()
    first, second = x_BHME.flatten().chunk(2)
    as_complex = torch.complex(first, second) * torch.polar(torch.ones(4), 3 * frequency_F)
    assert disagreement(turned, torch.cat([as_complex.real, as_complex.imag])) < 1e-6


def text(length: int, lacks: list[list[bool]] | None = None) -> Segment:
    padding_BL = None if lacks is None else torch.tensor(lacks)
    return Segment("text", torch.arange(length)[None], is_padding_BL=padding_BL)


def positions(segments: list[Segment]) -> list[list[list[int]]]:
    return [one.rotary_BL.tolist() for one in with_rotary_positions(segments) if one.rotary_BL is not None]


def test_a_text_counts_its_tokens_and_an_image_is_one_step() -> None:
    image = image_segment(torch.tensor([[0, 0, 1, 2], [0, 1, 1, 1]]))
    given = Segment("image", torch.zeros(1, 4, dtype=torch.int64))
    segments = [class_segment(2), text(3), image, given, text(2)]
    assert positions(segments) == [[[0, 0]], [[1, 2, 3]], [[4, 4, 4, 4]], [[5, 5, 5, 5]], [[6, 7]]]
    # Of the noised image one clean token stands in the sequence, before all that is noised.
    joined = join_rotary_positions(with_rotary_positions(segments), [2, 3, 1, 4, 2, 0, 0, 4, 0, 0])
    assert joined.tolist() == [[0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 4, 4, 4, 4]]


def test_tokens_that_a_sample_lacks_have_no_place() -> None:
    lacks = [[True, True, False, False], [False, False, True, True], [True] * 4, [False, True, True, False]]
    image = Segment("image", torch.zeros(1, 2, dtype=torch.int64), is_padding_BL=torch.tensor([[False] * 2] * 4))
    before, of_image, after = (torch.tensor(one) for one in positions([text(4, lacks), image, text(2)]))
    has = ~torch.tensor(lacks)
    assert [row[there].tolist() for row, there in zip(before, has, strict=True)] == [[0, 1], [0, 1], [], [0, 1]]
    assert of_image.tolist() == [[2, 2], [2, 2], [0, 0], [2, 2]]
    assert after.tolist() == [[3, 4], [3, 4], [1, 2], [3, 4]]


def test_a_trunk_that_needs_positions_says_so() -> None:
    with pytest.raises(AssertionError, match="rotary positions"):
        join_rotary_positions([text(2)], [2, 0])
