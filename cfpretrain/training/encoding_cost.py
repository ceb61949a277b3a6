"""What encoding images during training costs: FLOPs and memory, counted on a network without values."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cfpretrain.autoencoder import KLAutoencoder, are_pixels, make_network, read_config
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.data.online import encoding_precision


@dataclass(frozen=True)
class EncodingCost:
    """What the autoencoder takes that encodes images during training."""

    flops: int  # of one image
    weights: int  # bytes; those of the decoder too, which is loaded with it
    working: int  # bytes: the pixels of a batch, and the activations that live at once

    @property
    def num_bytes(self) -> int:
        """All of it; it works beside the step, whose memory it does not share."""
        return self.weights + self.working


NO_ENCODING = EncodingCost(0, 0, 0)  # where latents are read


def encoding_cost(config: Config, on_gpu: bool) -> EncodingCost:
    """What encoding takes, counted on a network without values: of the autoencoder its config alone is read.

    FLOPs are those of convolutions and matrix products, exactly. Attention keeps no products of all pairs, as the fused
    kernels do not. Not seen: the workspaces of convolutions, and what DALI holds. UserError where `data.autoencoder`
    cannot be read, or does not take such images.
    """
    data, model = config.data, config.model
    if not data.autoencoder:
        if not are_pixels(model.latent_channels):
            raise UserError(
                "data.autoencoder: expected the folder of the one that encodes the images, since "
                f"model.latent_channels = {model.latent_channels} are no pixels, got none; set it"
            )
        # Pixels as they are decoded, and as floats: in [0, 255], in [0, 1], mirrored, and those that are chosen.
        return EncodingCost(0, 0, (1 + 4 * 4) * data.encode_batch_size * model.latent_channels * model.latent_size**2)
    key = f"data.autoencoder: {data.autoencoder}"
    dtype = torch.bfloat16 if encoding_precision(config, "cuda" if on_gpu else "cpu") == "bf16" else torch.float32
    with torch.device("meta"):
        network = make_network(read_config(Path(data.autoencoder), "data.autoencoder"), key)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    with FakeTensorMode():  # in which a CPU's kernels are chosen, those of attention too
        network.load_state_dict({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, assign=True)
        autoencoder = KLAutoencoder(network, "", "data.autoencoder")
        if autoencoder.latent_channels != model.latent_channels:
            raise UserError(
                f"model.latent_channels: expected {autoencoder.latent_channels}, those of {data.autoencoder}, got "
                f"{model.latent_channels}; set it so, or take another autoencoder"
            )
        side = model.latent_size * autoencoder.stride
        images_BCYX = torch.zeros(data.encode_batch_size, autoencoder.image_channels, side, side)
        with MemoryTracker(of_fakes=True) as memory, FlopCounterMode(display=False) as counter:
            autoencoder.encode(images_BCYX)
    return EncodingCost(
        flops=counter.get_total_flops() // data.encode_batch_size,
        weights=sum(parameter.nbytes for parameter in network.parameters()),
        # Pixels also as they were decoded. What is still held are weights, which count above, and these images.
        working=images_BCYX.numel() + images_BCYX.nbytes + memory.peak - memory.held,
    )


class MemoryTracker(TorchDispatchMode):
    """A context that counts the bytes of living tensors, as `held` and `peak`.

    On a CPU it stands in for `torch.cuda.memory_allocated` and `torch.cuda.max_memory_allocated`.

    A storage counts from the first operation inside the block that sees it until it is freed. What an operation
    allocates and frees inside itself is not seen.

    Args:
        of_fakes: tensors without values count, as if they had some; else those that have some.
    """

    def __init__(self, of_fakes: bool = False) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._of_fakes = of_fakes
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operation, and sees what it took and gave."""
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if (storage.device.type == "meta") == self._of_fakes:
                    self._see(storage)
        self.peak = max(self.peak, self.held)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        # A storage can be resized.
        self.held += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)
