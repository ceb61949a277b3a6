"""The CausalFusion transformer: modalities around a trunk that takes (tokens, intervals, cache).

A pre-norm decoder without adaLN: timesteps are added to the noised tokens, classes are condition tokens (section 3 of
arXiv 2412.12095). Its block is in `block.py`; what is particular to images or classes is in `modalities.py`.

Every parameter belongs to a module whose `forward` uses it, since ZeRO-3 gathers parameters only there.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfpretrain.core import seeds
from cfpretrain.core.attention import make_visibility
from cfpretrain.core.block import Block, BlockSettings, Routes, make_rotation, make_routes
from cfpretrain.core.design import BlockDesign, make_design
from cfpretrain.core.modalities import Classes, Images, Modality, Vectors, join, sincos_positions, take_pieces
from cfpretrain.core.segments import Segment, join_rotary_positions
from cfpretrain.core.texts import TEXT, Texts

_EMBEDDING_STD = 0.02


class KeyValueCache:
    """Keys and values of the clean context, for each block; sequences may differ in length."""

    def __init__(self, depth: int, capacity: int) -> None:
        """`capacity`: tokens that it can hold for a sequence, those of the current call included."""
        self.length = 0  # of the longest sequence
        self.length_B: Tensor | None = None  # of each, where they differ
        self._capacity = capacity
        self._blocks: list[Tensor | None] = [None] * depth  # keys and values, [2, B, H, capacity, E]

    def extend(self, block: int, k_BHME: Tensor, v_BHME: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a call's keys and values behind the kept ones and returns all; `keep` decides whether they stay."""
        end = self.length + k_BHME.shape[2]
        assert end <= self._capacity, (end, self._capacity)
        kept = self._blocks[block]
        if kept is None:
            B, H, _, E = k_BHME.shape
            # Of zeros: an attention that sees none of a key still multiplies its value by 0.
            self._blocks[block] = kept = k_BHME.new_zeros(2, B, H, self._capacity, E)
        for tensor, given_BHME in zip(kept, (k_BHME, v_BHME), strict=True):
            if self.length_B is None:
                tensor[:, :, self.length : end] = given_BHME
            else:
                places_BM = self.length_B[:, None] + torch.arange(given_BHME.shape[2], device=given_BHME.device)
                tensor.scatter_(2, places_BM[:, None, :, None].expand_as(given_BHME), given_BHME)
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def of_first(self, num_sequences: int) -> "KeyValueCache":
        """The cache of the first sequences of the batch, in the same memory; for calls that keep nothing."""
        if self._blocks[0] is not None and self._blocks[0].shape[1] == num_sequences:
            return self
        view = KeyValueCache(len(self._blocks), self._capacity)
        view.length = self.length
        view.length_B = None if self.length_B is None else self.length_B[:num_sequences]
        view._blocks = [None if kept is None else kept[:, :num_sequences] for kept in self._blocks]
        return view

    def take(self, rows: Sequence[int | None], room: int) -> "KeyValueCache":
        """See `Context.take`; those that have read nothing hold another's keys and values, which they do not see."""
        held = [self.length] * (max(row or 0 for row in rows) + 1) if self.length_B is None else self.length_B.tolist()
        lengths = [0 if row is None else held[row] for row in rows]
        taken = KeyValueCache(len(self._blocks), max(lengths) + room)
        taken.length = max(lengths)
        for i, kept in enumerate(self._blocks):
            if kept is None:
                continue
            own = kept.new_zeros(2, len(rows), kept.shape[2], taken._capacity, kept.shape[4])
            places_B = torch.tensor([row or 0 for row in rows], device=kept.device)
            own[:, :, :, : taken.length] = kept[:, places_B, :, : taken.length]
            taken._blocks[i] = own
            taken.length_B = torch.tensor(lengths, device=kept.device) if len(set(lengths)) > 1 else None
        return taken

    def keep(self, num_tokens: int | Tensor) -> None:
        """Keeps the first tokens of the last call as context for the next ones: so many, or int64 [B] of each."""
        if isinstance(num_tokens, int) and self.length_B is None:
            self.length += num_tokens
            return
        self.length_B = (self.length if self.length_B is None else self.length_B) + torch.as_tensor(num_tokens)
        self.length = int(self.length_B.max())


# ---------------------------------------------------------------------------
# The network


class Trunk(nn.Module):
    """The blocks."""

    def __init__(self, design: BlockDesign, depth: int, settings: BlockSettings) -> None:
        super().__init__()
        self.design, self.settings = design, settings
        self.blocks = nn.ModuleList(Block(design, settings) for _ in range(depth))

    def forward(
        self,
        x_BMD: Tensor,
        intervals_BMI: Tensor | None,
        cache: KeyValueCache | None,
        rotary_BM: Tensor | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Tokens through all blocks; arguments as of `Network.forward`. The cache is extended by all tokens.

        `rotary_BM` has the tokens' rotary positions, int64 [B or 1, M], where the design has such; `routes` say which
        are of images, where these have weights of their own.
        """
        assert (rotary_BM is not None) == (self.design.rotary_base > 0), "positions for rotations, and none else"
        settings = self.settings
        backend = settings.sampling_attention if intervals_BMI is None else settings.attention
        if intervals_BMI is not None and cache is not None:
            backend = "sdpa"  # of few rows, in too many lengths to compile
        num_keys = x_BMD.shape[1] + (0 if cache is None else cache.length)
        visibility = make_visibility(intervals_BMI, num_keys, backend)
        rotation = None if rotary_BM is None else make_rotation(self.design, rotary_BM, x_BMD.dtype)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x_BMD = block(x_BMD, visibility, functools.partial(cache.extend, i), rotation, routes)
            elif settings.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random: no state of a generator to keep.
                x_BMD = checkpoint(
                    block, x_BMD, visibility, None, rotation, routes, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BMD = block(x_BMD, visibility, None, rotation, routes)
        return x_BMD


class Network(nn.Module):
    """Modalities, one for each kind of token, around a trunk.

    For gradients, a call uses all parameters: those of kinds that its segments lack embed and predict no tokens, and
    get gradients of zero. And it calls modules in one order, each once for all segments of a kind. ZeRO-3 needs both
    from ranks whose micro-batches hold other kinds, or other numbers of them: each call gathers a module's parameters
    from all ranks, and each gradient is summed over all.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        design: BlockDesign,
        depth: int,
        blocks: BlockSettings | None = None,
        max_segments: int = 0,  # of a sample, that are told their places among its segments; 0: none is told
    ) -> None:
        super().__init__()
        self.depth = depth
        self.modalities = {one.kind: one for one in modalities}
        for one in modalities:
            self.add_module(f"{one.kind}_embedder", one.embedder)
        self.ordinal_table = nn.Embedding(max_segments, design.width) if max_segments else None
        self.trunk = Trunk(design, depth, blocks or BlockSettings())
        for one in modalities:
            if one.head is not None:
                self.add_module(one.head_name, one.head)

    @property
    def has_rotary(self) -> bool:
        """Whether tokens are told rotary positions (`Segment.rotary_BL`)."""
        return self.trunk.design.rotary_base > 0

    def forward(
        self,
        segments: Sequence[Segment],
        intervals_BMI: Tensor | None = None,
        cache: KeyValueCache | None = None,
        place_BM: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predicts what is to be learned of the segments.

        Args:
            segments: in order; the sequence is [clean tokens of all | noised tokens of all].
            intervals_BMI: int32 [B or 1, M, 4], what each row sees (`segments.Layout`); None: all, and the whole cache.
            cache: context of earlier calls, to which tokens of this call may be added (`KeyValueCache.keep`).
            place_BM: int64, which of these tokens stands where in the sequence (`segments.Layout`).

        Returns:
            For each kind of which something is predicted in this call, the predictions for its segments, one behind
            another: [B, N, P] for the noised tokens of images. Where segments have targets, of these alone. For
            gradients, those of no tokens are there too.
        """
        vectors, num_segments = self._embed(segments), len(segments)
        # Of each segment, the clean tokens and then the noised ones, as they stand in the sequence.
        sizes = [self.modalities[one.kind].num_clean(one) for one in segments]
        sizes += [0 if one.noised is None else one.noised.shape[1] for one in segments]
        places = {kind: [i for i, one in enumerate(segments) if one.kind == kind] for kind in sorted(self.modalities)}
        entering: dict[int, Tensor] = {}
        for kind, parts in vectors.items():
            for begin, part in zip((0, num_segments), parts, strict=True):
                if part is not None:
                    of_kind = [begin + i for i in places[kind]]
                    entering |= zip(of_kind, take_pieces(part, [sizes[i] for i in of_kind]), strict=True)
        empty = [part for parts in vectors.values() for part in parts if part is not None and not part.numel()]
        if self.ordinal_table is not None:
            empty += self._tell_ordinals(self.ordinal_table, segments, entering)
        sequence = [entering[i] for i in sorted(entering) if sizes[i]]
        if torch.is_grad_enabled():
            sequence += [part.reshape(len(sequence[0]), 0, part.shape[-1]) for part in empty]
        rotary_BM = join_rotary_positions(segments, sizes) if self.has_rotary else None
        kinds = zip([*segments, *segments], sizes, strict=True) if self.trunk.design.separate_image_weights else ()
        is_image = [one.kind != TEXT for one, size in kinds for _ in range(size)]
        made_BND = self._through_trunk(join(sequence), intervals_BMI, cache, place_BM, rotary_BM, is_image)
        made = list(take_pieces(made_BND, sizes))
        learned = [i for i, one in enumerate(segments) if one.targets is not None]
        predictions: dict[str, Tensor] = {}
        for kind, of_kind in places.items():
            modality = self.modalities[kind]
            if modality.head is not None:
                wanted, none = [i for i in of_kind if i in learned or not learned], made[0][:, :0]
                clean = join([made[i] for i in wanted] or [none])
                noised = join([made[num_segments + i] for i in wanted] or [none])
                read = modality.read(clean, noised)
                if read.shape[1] or torch.is_grad_enabled():
                    predictions[kind] = modality.head(read)
        return predictions

    @staticmethod
    def _tell_ordinals(table: nn.Embedding, segments: Sequence[Segment], entering: dict[int, Tensor]) -> list[Tensor]:
        """Adds vectors of their places among their sample's to segments, whose tokens' own places repeat otherwise.

        Where none is told its place, the result is an empty part that takes the parameters.
        """
        told = {i: one.ordinal_B for i, one in enumerate(segments) if one.ordinal_B is not None}
        none_BN = torch.zeros(1, 0, dtype=torch.int64, device=table.weight.device)
        vectors_BND = table(torch.stack(torch.broadcast_tensors(*told.values()), 1) if told else none_BN)
        for i, vector_BD in zip(told, vectors_BND.unbind(1), strict=True):
            for at in (i, i + len(segments)):
                if at in entering:
                    entering[at] = entering[at] + vector_BD.unsqueeze(1)
        return [] if told else [vectors_BND]

    def _through_trunk(
        self,
        given_BND: Tensor,
        intervals_BMI: Tensor | None,
        cache: KeyValueCache | None,
        place_BM: Tensor | None,
        rotary_BM: Tensor | None,
        is_image: Sequence[bool],
    ) -> Tensor:
        """What the trunk makes of tokens, each of which goes to its place and comes back from it; 0 for one without."""
        routes = self._find_routes(given_BND, place_BM, is_image) if self.trunk.design.separate_image_weights else None
        if place_BM is None:
            return self.trunk(given_BND, intervals_BMI, cache, rotary_BM, routes)
        places_BMD = place_BM.unsqueeze(-1).expand(-1, -1, given_BND.shape[-1])
        if rotary_BM is not None:
            rotary_BM = rotary_BM.expand(len(place_BM), -1).gather(1, place_BM)
        made_BMD = self.trunk(given_BND.gather(1, places_BMD), intervals_BMI, cache, rotary_BM, routes)
        return torch.zeros_like(given_BND).scatter(1, places_BMD, made_BMD)

    @staticmethod
    def _find_routes(given_BND: Tensor, place_BM: Tensor | None, is_image: Sequence[bool]) -> Routes:
        is_image_N = torch.tensor(is_image).to(given_BND.device, non_blocking=True)
        is_image_BM = is_image_N.expand(len(given_BND), -1) if place_BM is None else is_image_N[place_BM]
        return make_routes(is_image_BM, sum(is_image), len(is_image) - sum(is_image))

    def _embed(self, segments: Sequence[Segment]) -> dict[str, Vectors]:
        device = next(iter(segments[0].tensors().values())).device
        vectors: dict[str, Vectors] = {}
        for kind, modality in sorted(self.modalities.items()):
            of_kind = [one for one in segments if one.kind == kind]
            empty = modality.empty_segment(of_kind, device) if torch.is_grad_enabled() else None
            if of_kind or empty is not None:
                vectors[kind] = modality.embedder(of_kind if empty is None else [*of_kind, empty])
        return vectors


class CausalFusion(Network):
    """CausalFusion for images of one size, with class conditions, and with texts where there is a vocabulary."""

    def __init__(
        self,
        *,
        grid: int,  # rows = columns of the tokens: L = grid^2
        patch_values: int,  # P
        width: int,  # D
        depth: int,
        num_heads: int,  # divides the width
        num_cond_tokens: int,  # Q
        num_classes: int,  # without the null class; 0: there is no class condition
        learnable_positions: bool = True,  # else fixed 2-d sin-cos
        trunk_kind: str = "causalfusion",  # what its blocks compute: one of `design.TRUNKS`
        block_changes: Mapping[str, Any] | None = None,  # as of `make_design`
        blocks: BlockSettings | None = None,
        vocabulary: int = 0,
        max_text_tokens: int = 0,  # of one text
        max_segments: int = 0,  # see `Network`
    ) -> None:
        design = make_design(trunk_kind, width, num_heads, block_changes)
        images = Images(grid, patch_values, width, learnable_positions)
        classes = [Classes(num_classes, num_cond_tokens, width)] if num_classes else []
        texts = [Texts(vocabulary, max_text_tokens, design)] if vocabulary else []
        super().__init__([images, *classes, *texts], design, depth, blocks, max_segments)
        self.grid, self.patch_values = grid, patch_values
        self.num_cond_tokens, self.num_classes = num_cond_tokens, num_classes
        self.null_class = num_classes  # the label that stands for "no class"; 0 without classes


_FROZEN = {"trunk": ("trunk.",), "text": ("text_embedder.", "text_head.", "ordinal_table.")}


def is_frozen(name: str, parts: Collection[str]) -> bool:
    """Whether a parameter is of these parts of a model, which together give a text without images its logits.

    They are "trunk", but for separate weights of images in its blocks; and "text", the embedder and the head of texts
    with the vectors of segments' places, which are added to a text too.
    """
    return any(name.startswith(_FROZEN[part]) for part in parts) and ".image." not in name


# ---------------------------------------------------------------------------
# Initial weights


# (name, shape of the whole parameter, flat offset, fp32 [numel]): writes the values from the offset on
WriteInitialValues = Callable[[str, tuple[int, ...], int, Tensor], None]


def write_initial_values(seed: int, grid: int, name: str, shape: Sequence[int], offset: int, values: Tensor) -> None:
    """Writes a range of a parameter's initial values: functions of the seed and the name, whoever holds the range.

    Linear weights are Xavier uniform, U(-a, a) with a = sqrt(6 / (inputs + outputs)), and biases 0, but the noise head
    is 0; embeddings are N(0, 0.02^2); learnable positions begin as 2-d sin-cos; norms as the identity. Beside `values`
    (float32, contiguous, from flat index `offset` on), it takes a bounded memory, on their device.
    """
    leaf, count = name.rsplit(".", 2), len(values)
    if leaf[-1] == "pos_embed":
        values.copy_(sincos_positions(grid, shape[-1]).flatten()[offset : offset + count])
        return
    if leaf[-1] == "bias" or name == "noise_head.linear.weight":
        values.zero_()
        return
    if leaf[-1] == "weight" and "norm" in leaf[-2]:
        values.fill_(1)
        return
    key = seeds.key(seed, f"initial/{name}").to(values.device)
    if leaf[-1] == "cond_pos_embed" or leaf[-2].endswith("_table"):
        seeds.normal(key, (count,), offset, values).mul_(_EMBEDDING_STD)
        return
    assert leaf[-1] == "weight", name
    assert len(shape) == 2, name
    seeds.uniform_within(math.sqrt(6 / (shape[0] + shape[1])), key, (count,), offset, values)


def initialise(model: CausalFusion, seed: int) -> None:
    """Gives an unsharded model its initial weights, on its device."""
    for name, parameter in model.named_parameters():
        write_initial_values(seed, model.grid, name, parameter.shape, 0, parameter.detach().view(-1))
