"""Writing texts behind a context, token by token."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.context import Context
from cfpretrain.core.segments import Segment
from cfpretrain.core.texts import TEXT, Marks, pad_texts, text_segment
from cfpretrain.core.token_choice import TokenChoice


def writing_keys(seed: int, ids_B: Tensor) -> Tensor:
    """What a text's draws are functions of: (seed, sample), and the token's place."""
    return seeds.fold(seeds.key(seed, "tokens of texts"), ids_B)


@torch.no_grad()
def write_texts(
    context: Context,
    prefixes: Sequence[Sequence[int]],
    marks: Marks,
    max_tokens: int,
    choice: TokenChoice,
    keys_B: Tensor,
    guidance: float = 1.0,
    ordinal_B: Tensor | None = None,
    go_on: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Writes a text behind each context, and reads it: the tokens of each, from its beginning to the one that ends it.

    Args:
        context: of B sequences, and with guidance of B more, by which they are without what guidance is towards.
        prefixes: how each text begins, after the token that begins it; it may be empty.
        marks: the tokens that frame texts.
        max_tokens: of a text; one that has not ended by then is ended.
        choice: of the next token.
        keys_B: its randomness, see `writing_keys`; on the model's device.
        guidance: scale of log p(without) + scale * (log p - log p(without)) of the next token; 1 is none.
        ordinal_B: int64, the text's place among the segments of each sequence, where the model is told them.
        go_on: asked before each token, with whether a text is open; for ranks that call the model in step.
    """
    device, copies = keys_B.device, 1 if guidance == 1 else 2
    texts = [[marks.begin, *prefix] for prefix in prefixes]
    logits_BTV, length_B = read_texts(context, texts * copies, marks.pad, device, ordinal_B)
    logits_BV = logits_BTV[torch.arange(len(length_B), device=device), length_B - 1]
    length_B = length_B[: len(texts)]
    is_open_B = torch.ones(len(texts), dtype=torch.bool, device=device)
    written = []
    while go_on(bool(is_open_B.any())):
        chosen_B = choice(_guide(logits_BV, guidance), seeds.fold(keys_B, length_B))
        # The last place is of a token that ends a text, by which an image may follow too.
        chosen_B = torch.where((length_B >= max_tokens - 1) & (chosen_B != marks.image), marks.end, chosen_B)
        written.append(torch.where(is_open_B, chosen_B, marks.pad))
        places_B = length_B.clamp(max=max_tokens - 1)  # of a text that has ended, whose tokens are not kept
        token = Segment(
            TEXT,
            clean=chosen_B.repeat(copies)[:, None],
            positions_BL=places_B.repeat(copies)[:, None],
            ordinal_B=ordinal_B,
        )
        logits_BV = context.read(token, is_open_B.long().repeat(copies))[TEXT][:, -1]
        is_open_B = is_open_B & (chosen_B != marks.end) & (chosen_B != marks.image)
        length_B = length_B + 1
    for text, tokens in zip(texts, torch.stack(written, 1).tolist(), strict=True):
        ends = [i for i, id in enumerate(tokens) if id in (marks.end, marks.image)]
        text += tokens[: ends[0] + 1]
    return texts


def read_texts(
    context: Context,
    texts: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    ordinal_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads texts, of which some may be empty: the logits behind each token [B, T, V], and their lengths, int64 [B].

    Arguments as of `write_texts`, but that texts have the tokens that frame them.
    """
    ids_BT, length_B = pad_texts(texts, pad)
    is_ragged = len(set(length_B.tolist())) > 1
    segment = text_segment(ids_BT, length_B if is_ragged else None)
    assert segment.clean is not None
    assert segment.positions_BL is not None
    clean, positions_BL = segment.clean.to(device), segment.positions_BL.to(device)
    segment = dataclasses.replace(segment, clean=clean, positions_BL=positions_BL, ordinal_B=ordinal_B)
    return context.read(segment)[TEXT], length_B.to(device)


def _guide(logits_BV: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return logits_BV
    towards, without = logits_BV.float().log_softmax(-1).chunk(2)
    return without + scale * (towards - without)
