"""Autoencoders in Latent Diffusion's layout (MAR's KL-16, Stable Diffusion's f8) -> diffusers' AutoencoderKL.

An exact renaming. diffusers' own converter of single files is not used: it knows the attention of the middle blocks
alone, finds no place for the 20 tensors of MAR's last encoder block, and is no public part of diffusers.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cfpretrain.base.console import UserError

# A whole checkpoint of Stable Diffusion holds several networks.
_PREFIX = "first_stage_model."
# What an autoencoder was trained with, besides its weights: a discriminator, and averages of the weights.
_LEFT_OUT = ("loss.", "model_ema.")

_RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
        (r"^encoder\.down\.", "encoder.down_blocks."),
        (r"^decoder\.up\.", "decoder.up_blocks."),
        (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
        (r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.attentions\.(\d+)\.norm\.", r".attentions.\1.group_norm."),
        (r"\.attentions\.(\d+)\.([qkv])\.", r".attentions.\1.to_\2."),
        (r"\.attentions\.(\d+)\.proj_out\.", r".attentions.\1.to_out.0."),
    )
)

# Name, what the latents are multiplied by, and the keys of the config that identify it.
_PUBLISHED = (
    (
        "MAR's KL-16",
        0.2325,
        {
            "block_out_channels": (128, 128, 256, 256, 512),
            "layers_per_block": 2,
            "latent_channels": 16,
            "down_block_types": (*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D",) * 5,
        },
    ),
    (
        "Stable Diffusion's f8",
        0.18215,
        {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
    ),
)


def pick_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the autoencoder in what a checkpoint's file holds, without a prefix.

    Other networks beside it, its discriminator, averages and counters are left out.
    """
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    content = {name: value for name, value in content.items() if isinstance(name, str)}
    prefixed = {name[len(_PREFIX) :]: value for name, value in content.items() if name.startswith(_PREFIX)}
    return {
        name: value.resolve_neg()
        for name, value in (prefixed or content).items()
        if isinstance(value, Tensor) and not name.startswith(_LEFT_OUT)
    }


def from_ldm(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Weights in Latent Diffusion's layout -> config and state dict of diffusers' AutoencoderKL.

    The config follows from the tensors of `pick_tensors`, which come from `name`. Whether each has its place there is
    for `autoencoder.fill_network` to say.
    """
    try:
        config = _infer_config(tensors)
    except (KeyError, IndexError) as error:
        found = ", ".join(sorted(tensors)[:3]) or "none"
        raise UserError(
            f"{name}: expected an autoencoder's tensors in Latent Diffusion's layout, as MAR's and Stable Diffusion's "
            f"checkpoints have them, but {error} is missing; got {len(tensors)} tensors ({found} ...)"
        ) from error
    num_levels = len(config["block_out_channels"])
    state: dict[str, Tensor] = {}
    for old, value in tensors.items():
        new, value = _rename(old, value, num_levels)
        if new in state:
            raise UserError(
                f"{name}: expected each tensor once, got {new} of diffusers' AutoencoderKL twice; give another file"
            )
        state[new] = value
    return config, state


def recognise(config: Mapping[str, Any]) -> tuple[str, float] | None:
    """The published autoencoder of this layout, and what its latents are multiplied by; None where it is none."""
    for name, factor, known in _PUBLISHED:
        if known.items() <= config.items() and config["use_quant_conv"] and config["use_post_quant_conv"]:
            return name, factor
    return None


def _infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    def kinds(side: str, plain: str, with_attention: str) -> tuple[str, ...]:
        have = [any(name.startswith(f"{side}.{level}.attn.") for name in tensors) for level in range(num_levels)]
        return tuple(with_attention if has else plain for has in have)

    num_levels = count(r"encoder\.down\.(\d+)\.")
    channels = (tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels))
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(channels),
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": kinds("encoder.down", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        # Latent Diffusion counts the decoder's levels from the pixels up, diffusers as they are gone through.
        "up_block_types": kinds("decoder.up", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        # Those of Stable Diffusion 3 and FLUX have none.
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        # No tensor says these two: Latent Diffusion has one number of groups, and trained on images of this size.
        "norm_num_groups": 32,
        "sample_size": 256,
    }


def _rename(name: str, value: Tensor, num_levels: int) -> tuple[str, Tensor]:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    name = re.sub(r"(?<=^decoder\.up_blocks\.)\d+", lambda match: str(num_levels - 1 - int(match[0])), name)
    if ".attentions." in name and value.ndim == 4:
        value = value.flatten(1)  # 1x1 convolutions there, matrices here
    return name, value
