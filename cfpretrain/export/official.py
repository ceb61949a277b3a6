"""The state dict layout of the official CausalFusion code, both ways: an exact renaming."""

from collections.abc import Mapping

from torch import Tensor

from cfpretrain.model.transformer import sincos_positions

_OURS_BY_OFFICIAL = {
    "x_proj.": "image_embedder.x_proj.",
    "pos_embed": "image_embedder.pos_embed",
    "t_embedder.": "image_embedder.t_embedder.",
    "y_embedder.embedding_table.": "class_embedder.embedding_table.",
    "cond_pos_embed": "class_embedder.cond_pos_embed",
    "blocks.": "trunk.blocks.",
    "final_layer.0.": "noise_head.norm.",
    "final_layer.1.": "noise_head.linear.",
}


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"tensor {name!r} is not part of a CausalFusion model; known: {', '.join(prefixes)}")


def from_official(tensors: Mapping[str, Tensor], learnable_positions: bool = True) -> dict[str, Tensor]:
    """Official names -> ours; fixed sin-cos positions are no parameter of ours and are left out.

    Raises:
        ValueError: a tensor that the official model does not have.
    """
    renamed = {_rename(name, _OURS_BY_OFFICIAL): value for name, value in tensors.items()}
    if not learnable_positions:
        del renamed["image_embedder.pos_embed"]
    return renamed


def to_official(tensors: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Our names -> the official ones; fixed sin-cos positions are written out, as the official state dict has them.

    Raises:
        ValueError: a tensor that our model does not have.
    """
    official_by_ours = {ours: official for official, ours in _OURS_BY_OFFICIAL.items()}
    renamed = {_rename(name, official_by_ours): value for name, value in tensors.items()}
    if "pos_embed" not in renamed:
        renamed["pos_embed"] = sincos_positions(grid, renamed["x_proj.bias"].shape[0])[None]
    return renamed
