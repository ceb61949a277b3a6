"""Which networks are loaded, from which files, and what their distances may be called."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from cfpretrain.base.console import UserError
from cfpretrain.evaluation import features
from cfpretrain.evaluation.features import make_extractor
from tests.test_inception import photographs, random_weights
from tests.test_nothing_is_run import bombs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights; tests read it only."""
    file = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_weights(), file)
    return file


def test_other_weights_need_a_name_and_are_never_called_fid(weights: Path) -> None:
    with pytest.raises(
        UserError, match=r"whose SHA-256 begins with 6726825d, got .* name these weights by --feature-l"
    ):
        make_extractor("inception", CPU, weights)
    extractor = make_extractor("inception", CPU, weights, "random")
    assert (extractor.name, extractor.is_fid) == ("fd_inception_random", False)
    assert extractor.weights.endswith(hashlib.sha256(weights.read_bytes()).hexdigest())
    made = extractor(photographs(64))
    assert made.spatial_BF is not None
    assert made.logits_BK is not None
    assert (made.pooled_BF.shape, made.spatial_BF.shape, made.logits_BK.shape) == ((2, 2048), (2, 2023), (2, 1008))


def test_the_published_weights_are_known_by_their_hash(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "_PUBLISHED_SHA256", digest[:8])
    assert make_extractor("inception", CPU, weights).is_fid
    with pytest.raises(UserError, match="--feature-label: expected for other weights alone"):
        make_extractor("inception", CPU, weights, "random")


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({name: value for name, value in random_weights().items() if name != "fc.bias"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"expected the \d+ tensors of Inception, got others \(missing: fc.bias\)"):
        make_extractor("inception", CPU, tmp_path / "less.pth", "less")
    trace = tmp_path / "trace"
    (tmp_path / "bomb.pth").write_bytes(bombs(trace)["torch"])
    with pytest.raises(UserError, match="could run code"):
        make_extractor("inception", CPU, tmp_path / "bomb.pth", "bomb")
    assert not trace.exists()


def test_the_embedded_features_bring_their_weights(tmp_path: Path) -> None:
    extractor = make_extractor("effnet_lite0", CPU)
    assert extractor.name == "fd_effnet_lite0"
    made = extractor(photographs(64))
    assert (made.pooled_BF.shape, made.spatial_BF, made.logits_BK) == ((2, 320), None, None)
    with pytest.raises(UserError, match="--feature-weights: expected none with --features effnet_lite0"):
        make_extractor("effnet_lite0", CPU, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="--feature-label: expected with --features inception alone"):
        make_extractor("effnet_lite0", CPU, label="x")


def test_other_features_come_from_a_function() -> None:
    extractor = make_extractor("tests.small_features:make", CPU)
    assert extractor.name == "fd_small"
    none = extractor.none()
    assert none.spatial_BF is not None
    assert (none.pooled_BF.shape, none.spatial_BF.shape) == ((0, 24), (0, 12))
    # Logits without spatial features.
    network = dataclasses.replace(extractor, network=lambda images: (images[:, 0, 0], None, images[:, 1, 0]))
    assert network(photographs(64)).spatial_BF is None
    with pytest.raises(UserError, match="cannot be imported"):
        make_extractor("tests.small_features:absent", CPU)
