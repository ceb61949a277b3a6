"""What a block of the trunk computes, as settings: the paper's, and those of language models that a trunk starts from.

    x <- x + W_o attention(q, k, v) + b_o    of  q = W_q h + b_q,  k = W_k h + b_k,  v = W_v h + b_v,  h = norm(x)
    x <- x + W_2 gelu(W_1 h + b_1) + b_2     of  h = norm(x)
      or   + W_2 (silu(W_g h + b_g) * (W_u h + b_u)) + b_2

The settings say which norm and which of the two lines, where there is a bias, whether q and k of each head have a norm,
whether they are rotated by their positions, and how many heads have keys and values of their own. Whatever counts
values or operations of a block takes its sizes from here. No torch is needed: configs are checked by this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockDesign:
    """What a block computes."""

    width: int  # D
    num_heads: int  # H, of queries
    num_kv_heads: int  # of keys and values; each serves H / num_kv_heads heads of queries that lie side by side
    head_width: int  # E
    mlp_width: int  # inside of the MLP
    norm: str  # "layer": LayerNorm; "rms": RMSNorm, without mean and bias (arXiv 1910.07467)
    norm_eps: float
    mlp: str  # "gelu", "gelu_tanh": with its approximation by tanh, "swiglu": the line with silu (arXiv 2002.05202)
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    qk_norm: bool  # over the head width
    rotary_base: float  # of rotary positions (arXiv 2104.09864); 0: none
    # Llama 3's stretch of the slow rotations (`rotary_frequencies` in `block.py`): factor, low_freq_factor,
    # high_freq_factor, original_max_position_embeddings; none: as they are.
    rotary_scaling: tuple[float, ...]
    # Tokens of images and classes have norms and matrices of their own, and texts the others; attention is of all
    # together (LMFusion, arXiv 2412.15188).
    separate_image_weights: bool = False

    @property
    def attended_width(self) -> int:
        """Values of all queries of a token, and of what attention makes of it."""
        return self.num_heads * self.head_width

    @property
    def qkv_width(self) -> int:
        """Values of a token's queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_width

    @property
    def mlp_in_width(self) -> int:
        """Values that the MLP's first matrix makes of a token: with "swiglu" W_g's, and then W_u's."""
        return 2 * self.mlp_width if self.mlp == "swiglu" else self.mlp_width

    @property
    def matrix_values(self) -> int:
        """Values of a block's matrices, each of which takes part in one multiplication for each token."""
        attention = self.width * (self.qkv_width + self.attended_width)
        return attention + self.width * (self.mlp_in_width + self.mlp_width)

    @property
    def largest_matrix(self) -> int:
        """Values of the largest of these matrices."""
        return self.width * max(self.qkv_width, self.attended_width, self.mlp_in_width, self.mlp_width)


_OF_LAYER_NORMS = {"norm": "layer", "norm_eps": 1e-5, "mlp": "gelu_tanh", "proj_bias": True, "mlp_bias": True}
_OF_RMS_NORMS = {"norm": "rms", "mlp": "swiglu", "qkv_bias": False, "proj_bias": False, "mlp_bias": False}
_BLOCKS: dict[str, dict[str, Any]] = {
    "causalfusion": {**_OF_LAYER_NORMS, "qkv_bias": False, "qk_norm": True, "rotary_base": 0.0},
    "gpt2": {**_OF_LAYER_NORMS, "qkv_bias": True, "qk_norm": False, "rotary_base": 0.0},
    "llama": {**_OF_RMS_NORMS, "norm_eps": 1e-5, "qk_norm": False, "rotary_base": 1e4},
    "qwen3": {**_OF_RMS_NORMS, "norm_eps": 1e-6, "qk_norm": True, "rotary_base": 1e6},
}
TRUNKS = tuple(_BLOCKS)
# In what blocks of one kind of trunk differ, beside width and number of heads.
CHANGES = (
    *("num_kv_heads", "head_width", "mlp_width", "mlp", "norm_eps", "rotary_base", "rotary_scaling"),
    "separate_image_weights",
)


def make_design(trunk: str, width: int, num_heads: int, changes: Mapping[str, Any] | None = None) -> BlockDesign:
    """The blocks of a kind of trunk; `changes` has other values of some of `CHANGES`."""
    usual = {"num_kv_heads": num_heads, "head_width": width // num_heads, "mlp_width": 4 * width, "rotary_scaling": ()}
    found = {**usual, **_BLOCKS[trunk], **(changes or {})}
    found["rotary_scaling"] = tuple(found["rotary_scaling"])  # a list where it comes from JSON
    return BlockDesign(width=width, num_heads=num_heads, **found)
