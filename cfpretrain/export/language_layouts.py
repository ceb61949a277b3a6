"""Language models in Hugging Face's layout: what their config.json means in our settings, their tensors by our names.

| ours | GPT-2's | Llama's and Qwen3's |
|---|---|---|
| `text_embedder.embedding_table` | wte | embed_tokens |
| `text_embedder.position_table` | wpe | none: positions are rotary |
| `trunk.blocks.i.norm1`, `norm2` | h.i.ln_1, ln_2 | layers.i.input_layernorm, post_attention_layernorm |
| `attn.qkv` | attn.c_attn | self_attn.q_proj, k_proj, v_proj |
| `attn.q_norm`, `k_norm` | none | self_attn.q_norm, k_norm of Qwen3 |
| `attn.proj` | attn.c_proj | self_attn.o_proj |
| `mlp.fc1` | mlp.c_fc | mlp.gate_proj, up_proj |
| `mlp.fc2` | mlp.c_proj | mlp.down_proj |
| `text_head.norm` | ln_f | norm |
| `text_head.linear` | lm_head, or wte where they are tied | lm_head, or embed_tokens |

GPT-2's matrices are stored as [inputs, outputs] (its Conv1D), all others as torch's linear layers have them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.base.typed import Range, from_plain
from cfpretrain.core.block import Block, BlockSettings
from cfpretrain.core.design import BlockDesign, make_design

EMBEDDING, HEAD = "text_embedder.embedding_table.weight", "text_head.linear.weight"
POSITIONS = "text_embedder.position_table.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LanguageSettings:
    """What a config.json says of a model, as far as it decides what is computed."""

    trunk: str  # one of `core.design.TRUNKS`
    width: int
    num_heads: int
    changes: Mapping[str, Any]  # of its blocks, as of `make_design`
    depth: int
    vocabulary: int
    max_tokens: int  # of a text; with learned positions, how many there are
    is_tied: bool  # the head's matrix is the table of embeddings

    @property
    def design(self) -> BlockDesign:
        """What a block computes."""
        return make_design(self.trunk, self.width, self.num_heads, self.changes)


# ---------------------------------------------------------------------------------------------------------------------
# config.json


# As large as our own may be. A 0 would stand for what is usual.
_Depth = Annotated[int, Range(1, 512)]
_Width = Annotated[int, Range(1, 65536)]
_MlpWidth = Annotated[int, Range(1, 262_144)]
_Heads = Annotated[int, Range(1, 1024)]
_Size = Annotated[int, Range(1, 2**24)]
_Eps = Annotated[float, Range(1e-30, 1)]
_Base = Range(1e-9, 1e30)


@dataclass(frozen=True)
class _Gpt2:
    """Keys of its config.json, with what transformers takes where one is missing; so are the next ones."""

    n_embd: _Width = 768
    n_layer: _Depth = 12
    n_head: _Heads = 12
    n_inner: _MlpWidth | None = None
    n_positions: _Size = 1024
    vocab_size: _Size = 50257
    activation_function: str = "gelu_new"
    layer_norm_epsilon: _Eps = 1e-5
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class _Llama:
    hidden_size: _Width = 4096
    num_hidden_layers: _Depth = 32
    num_attention_heads: _Heads = 32
    num_key_value_heads: _Heads | None = None
    head_dim: _Width | None = None
    intermediate_size: _MlpWidth = 11008
    max_position_embeddings: _Size = 2048
    vocab_size: _Size = 32000
    rms_norm_eps: _Eps = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Annotated[float, _Base] = 1e4
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # both in one, as transformers 5 writes them


@dataclass(frozen=True)
class _Qwen3(_Llama):
    num_key_value_heads: _Heads | None = 32
    head_dim: _Width | None = 128
    intermediate_size: _MlpWidth = 22016
    max_position_embeddings: _Size = 32768
    vocab_size: _Size = 151936


_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Other values would compute something else than our blocks do.
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": (*_ACTIVATIONS, None),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    "llama": {"hidden_act": ("silu", None), "attention_bias": (False, None), "mlp_bias": (False, None)},
    "qwen3": {"hidden_act": ("silu", None), "attention_bias": (False, None), "use_sliding_window": (False, None)},
}


def read_settings(plain: Mapping[str, Any], source: str) -> LanguageSettings:
    """The settings of a config.json; UserError where our blocks do not compute what it says.

    Args:
        plain: its values.
        source: the file, for messages.
    """
    kind = plain.get("model_type")
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise UserError(f"{source}: model_type: expected one of {', '.join(_REQUIRED)}, got {kind!r:.40}")
    for key, allowed in (_REQUIRED[kind] | {"quantization_config": (None,)}).items():
        if plain.get(key) not in allowed:
            wanted = " or ".join(repr(one) for one in allowed if one is not None) or "none"
            raise UserError(f"{source}: {key}: expected {wanted}, got {plain[key]!r:.60}; take another checkpoint")
    settings = _read_gpt2(plain, source) if kind == "gpt2" else _read_llama(kind, plain, source)
    num_kv_heads = settings.design.num_kv_heads
    if settings.num_heads % num_kv_heads:
        raise UserError(
            f"{source}: expected a number of key-value heads that divides {settings.num_heads}, got {num_kv_heads}"
        )
    if not settings.design.head_width:
        raise UserError(
            f"{source}: num_attention_heads: expected at most hidden_size = {settings.width}, got {settings.num_heads}"
        )
    if settings.width % settings.num_heads and "head_width" not in settings.changes:
        raise UserError(f"{source}: n_head: expected a divisor of n_embd = {settings.width}, got {settings.num_heads}")
    return settings


def _read_gpt2(plain: Mapping[str, Any], source: str) -> LanguageSettings:
    found: _Gpt2 = from_plain(_Gpt2, plain, source, ignore_unknown=True)
    changes = {
        "mlp": _ACTIVATIONS[found.activation_function],
        "norm_eps": found.layer_norm_epsilon,
        "mlp_width": found.n_inner or 4 * found.n_embd,
    }
    sizes = (found.n_layer, found.vocab_size, found.n_positions)
    return LanguageSettings("gpt2", found.n_embd, found.n_head, changes, *sizes, found.tie_word_embeddings)


def _read_llama(kind: str, plain: Mapping[str, Any], source: str) -> LanguageSettings:
    found: _Llama = from_plain(_Qwen3 if kind == "qwen3" else _Llama, plain, source, ignore_unknown=True)
    rope = found.rope_parameters or found.rope_scaling or {}
    changes: dict[str, Any] = {
        "num_kv_heads": found.num_key_value_heads or found.num_attention_heads,
        "head_width": found.head_dim or found.hidden_size // found.num_attention_heads,
        "mlp_width": found.intermediate_size,
        "norm_eps": found.rms_norm_eps,
    }
    try:
        changes["rotary_base"] = float(rope.get("rope_theta", found.rope_theta))
        _Base.check(changes["rotary_base"])
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        scaling = {"default": (), "llama3": _ROPE_KEYS}[rope_type]
        changes["rotary_scaling"] = tuple(float(rope[key]) for key in scaling)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{source}: rope_scaling: expected none, or rope_type llama3 with {', '.join(_ROPE_KEYS)}, got "
            f"{rope!r:.120}; take another checkpoint"
        ) from error
    heads, sizes = found.num_attention_heads, (found.num_hidden_layers, found.vocab_size, found.max_position_embeddings)
    return LanguageSettings(kind, found.hidden_size, heads, changes, *sizes, found.tie_word_embeddings)


def write_settings(settings: LanguageSettings) -> dict[str, Any]:
    """The config.json of a model, of which `read_settings` reads the settings.

    Raises:
        UserError: there is none, since models of this kind compute something else than its blocks.
    """
    design, kind = settings.design, settings.trunk
    of_kind = {"gpt2": _write_gpt2, "llama": _write_llama, "qwen3": _write_llama}
    if kind not in of_kind:
        raise UserError(f"model.trunk: expected one of {', '.join(of_kind)}, which transformers knows, got {kind}")
    plain = of_kind[kind](settings)
    if read_settings(plain, "config.json").design != design:
        raise UserError(
            f"model.trunk: expected blocks as models of the kind {kind} have them in transformers, got others: "
            f"{', '.join(f'{key}={value}' for key, value in settings.changes.items())}"
        )
    return plain


def _write_gpt2(settings: LanguageSettings) -> dict[str, Any]:
    design = settings.design
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": design.width,
        "n_layer": settings.depth,
        "n_head": design.num_heads,
        "n_inner": design.mlp_width,
        "n_positions": settings.max_tokens,
        "vocab_size": settings.vocabulary,
        "activation_function": "gelu" if design.mlp == "gelu" else "gelu_new",
        "layer_norm_epsilon": design.norm_eps,
        "tie_word_embeddings": settings.is_tied,
    }


def _write_llama(settings: LanguageSettings) -> dict[str, Any]:
    design, (*factors, length) = settings.design, settings.design.rotary_scaling or (0.0,)
    scaling = (
        {"rope_type": "llama3", **dict(zip(_ROPE_KEYS, [*factors, int(length)], strict=True))} if factors else None
    )
    return {
        "model_type": settings.trunk,
        "architectures": [f"{settings.trunk.capitalize()}ForCausalLM"],
        "hidden_size": design.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": design.num_heads,
        "num_key_value_heads": design.num_kv_heads,
        "head_dim": design.head_width,
        "intermediate_size": design.mlp_width,
        "max_position_embeddings": settings.max_tokens,
        "vocab_size": settings.vocabulary,
        "rms_norm_eps": design.norm_eps,
        "rope_theta": design.rotary_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": settings.is_tied,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Names


@dataclass(frozen=True)
class Entry:
    """One of our tensors, and the ones there that hold its rows."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...]  # that each of them holds
    is_transposed: bool = False  # as all of GPT-2's matrices of linear layers are

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the tensors there."""
        found = {name: (rows, *self.shape[1:]) for name, rows in zip(self.theirs, self.rows, strict=True)}
        return {name: shape[::-1] if self.is_transposed else shape for name, shape in found.items()}

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from a function that reads one there."""
        parts = [read(name).T if self.is_transposed else read(name) for name in self.theirs]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors there, from ours."""
        parts = values.split(list(self.rows))
        return {
            name: (part.T if self.is_transposed else part).contiguous()
            for name, part in zip(self.theirs, parts, strict=True)
        }


# In a block: ours, and theirs in the order of our rows.
_OF_GPT2_BLOCK = {
    "norm1": ("ln_1",),
    "attn.qkv": ("attn.c_attn",),
    "attn.proj": ("attn.c_proj",),
    "norm2": ("ln_2",),
    "mlp.fc1": ("mlp.c_fc",),
    "mlp.fc2": ("mlp.c_proj",),
}
_OF_LLAMA_BLOCK = {
    "norm1": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.proj": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.fc2": ("mlp.down_proj",),
}
# What their modules once kept beside weights: masks, and the frequencies of positions.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def prefix_of(settings: LanguageSettings) -> str:
    """What stands before the names of all tensors but the head's; a model saved without its head has no prefix."""
    return "transformer." if settings.trunk == "gpt2" else "model."


def is_buffer(name: str) -> bool:
    """Whether a tensor there is computed from others, and not read."""
    return name.endswith(_BUFFERS)


def make_entries(settings: LanguageSettings) -> list[Entry]:
    """All tensors of a model, of the head last."""
    with torch.device("meta"):
        block = Block(settings.design, BlockSettings())
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    is_gpt2, prefix = settings.trunk == "gpt2", prefix_of(settings)
    table = (settings.vocabulary, settings.width)
    embed, norm = ("wte", "ln_f") if is_gpt2 else ("embed_tokens", "norm")
    found = [Entry(EMBEDDING, table, (f"{prefix}{embed}.weight",), table[:1])]
    if is_gpt2:
        places = (settings.max_tokens, settings.width)
        found.append(Entry(POSITIONS, places, (f"{prefix}wpe.weight",), places[:1]))
    for i in range(settings.depth):
        within = f"{prefix}{'h' if is_gpt2 else 'layers'}.{i}."
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            theirs = (_OF_GPT2_BLOCK if is_gpt2 else _OF_LLAMA_BLOCK)[module]
            found.append(
                Entry(
                    f"trunk.blocks.{i}.{name}",
                    shape,
                    tuple(f"{within}{one}.{leaf}" for one in theirs),
                    _rows(module, len(theirs), shape[0], settings.design),
                    is_gpt2 and len(shape) == 2,
                )
            )
    for name in (one for one in shapes if one.startswith("norm1.")):
        leaf = name.rpartition(".")[2]
        found.append(Entry(f"text_head.norm.{leaf}", shapes[name], (f"{prefix}{norm}.{leaf}",), shapes[name]))
    head = found[0].theirs if settings.is_tied else (LM_HEAD,)
    return [*found, Entry(HEAD, table, head, table[:1])]


def _rows(module: str, num_parts: int, num_rows: int, design: BlockDesign) -> tuple[int, ...]:
    if module == "attn.qkv" and num_parts > 1:
        of_keys = design.num_kv_heads * design.head_width
        return design.attended_width, of_keys, of_keys
    return (num_rows // num_parts,) * num_parts
