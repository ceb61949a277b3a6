"""Times captions that are written with the cache beside plain ones without.

    OMP_NUM_THREADS=2 python tools/measure.py captions runs/demo-text --shards data/digits-held-out --num-images 500

The plain way is what one would first write: for each token it passes the image and the text so far through the network,
under the causal mask. Both write the likeliest tokens with the same model, and their captions are held against each
other; images are the first of some latent shards, or noise without such. The two take turns (a b, b a, ...); what is
reported is the ratio of the medians of captions a second.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError, say
from cfpretrain.core import seeds
from cfpretrain.core.continuation import Writing, caption_images
from cfpretrain.core.modalities import clean_image_segment
from cfpretrain.core.model import Network
from cfpretrain.core.segments import build_layout, with_rotary_positions
from cfpretrain.core.texts import TEXT, text_segment
from cfpretrain.evaluation.captioning import read_captioned
from cfpretrain.evaluation.source import load_source
from tools.measuring.common import alternate


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both ways."""
    source = load_source(arguments.source, runtime.pick_device(), arguments.precision)
    model, config = source.config.model, source.config
    writing = Writing(source.marks("SOURCE"), model.max_text_tokens)
    if arguments.shards is not None:
        images_BLP, _ = read_captioned(Path(arguments.shards), config, arguments.num_images, "--shards")
    else:
        keys_B = seeds.fold(seeds.key(0, "images"), torch.arange(arguments.num_images))
        images_BLP = seeds.normal(keys_B, (model.num_tokens, model.patch_values))
    images_BLP, ids_B = images_BLP.to(source.device), torch.arange(len(images_BLP))
    found: dict[str, list[list[int]]] = {}

    def rate(name: str) -> float:
        begin = time.perf_counter()
        if name == "cached":
            found[name] = caption_images(source.model, images_BLP, ids_B, writing)
        else:
            found[name] = caption_plainly(source.model, images_BLP, writing)
        return len(images_BLP) / (time.perf_counter() - begin)

    sides = {name: lambda name=name: rate(name) for name in ("cached", "plain")}
    rates = alternate(sides, arguments.pairs, "captions/s")
    num_equal = sum(one == other for one, other in zip(*found.values(), strict=True))
    # Of two tokens that are equally likely but for rounding, either may be taken.
    if num_equal < 0.98 * len(images_BLP):
        raise UserError(f"only {num_equal} of {len(images_BLP)} captions agree: not compared")
    medians = {name: statistics.median(of_side) for name, of_side in rates.items()}
    ratio, num_tokens = medians["cached"] / medians["plain"], sum(map(len, found["cached"])) / len(images_BLP)
    say(
        f"{medians['cached']:.4g} captions/s with the cache, {medians['plain']:.4g} without: {ratio:.2f} times "
        f"({num_equal} of {len(images_BLP)} are equal; {num_tokens:.1f} tokens in the mean)"
    )
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return said | {"ratio": ratio, "equal": num_equal, "tokens": num_tokens} | {
        f"{name}_captions_per_second": value for name, value in medians.items()
    }  # fmt: skip


@torch.no_grad()
def caption_plainly(model: Network, images_BLP: Tensor, writing: Writing) -> list[list[int]]:
    """What `caption_images` does greedily and without guidance, with the whole sequence computed for each token."""
    B, device, marks = len(images_BLP), images_BLP.device, writing.marks
    first_B = torch.zeros(B, dtype=torch.int64)
    image = clean_image_segment(images_BLP, first_B)
    ids_BT = torch.full((B, 1), marks.begin)
    has_ended_B = torch.zeros(B, dtype=torch.bool)
    while not has_ended_B.all() and ids_BT.shape[1] < writing.max_tokens - 1:
        segments = [image, dataclasses.replace(text_segment(ids_BT), ordinal_B=first_B + 1)]
        layout = build_layout(segments)
        if model.has_rotary:
            segments = with_rotary_positions(segments)
        moved = [
            dataclasses.replace(one, **{name: value.to(device) for name, value in one.tensors().items()})  # type: ignore[arg-type]
            for one in segments
        ]
        logits_BTV = model(moved, layout.intervals_BMI.to(device))[TEXT]
        chosen_B = logits_BTV[:, -1].float().argmax(-1).cpu()
        ids_BT = torch.cat([ids_BT, chosen_B[:, None]], 1)
        has_ended_B |= (chosen_B == marks.end) | (chosen_B == marks.image)
    texts = []
    for ids in ids_BT[:, 1:].tolist():
        ends = [i for i, id in enumerate(ids) if id in (marks.end, marks.image)]
        texts.append(ids[: ends[0]] if ends else ids)
    return texts
