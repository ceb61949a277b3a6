"""The judge of generated classes: a classifier fitted on real images. The door to scikit-learn."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.svm import SVC
from torch import Tensor

from cfpretrain.base.console import UserError
from examples.digits.pixels import pixel_features


@dataclass(frozen=True)
class Classifier:
    """A support vector machine with a radial kernel on pixels: deterministic, and fitted in a second on digits."""

    machine: SVC

    def predict(self, images: Tensor) -> npt.NDArray[np.int64]:
        """The class of each image, [N, ...] in the scale that the classifier was fitted on."""
        features_NF, num_features = pixel_features(images, "images to classify"), self.machine.n_features_in_
        if len(features_NF) == 0 or features_NF.shape[1] != num_features:
            raise UserError(
                f"images to classify: expected at least one with {num_features} values as in the real images, "
                f"got {len(features_NF)} with {features_NF.shape[1]}; generate images of the size of the real ones"
            )
        return np.asarray(self.machine.predict(features_NF.numpy()), dtype=np.int64)

    def accuracy(self, images: Tensor, labels_N: Tensor) -> float:
        """The share of images taken for their class in `labels_N` (int64); images as for `predict`."""
        _check_lengths(images, labels_N)
        return float((self.predict(images) == labels_N.cpu().numpy()).mean())


def fit(images: Tensor, labels_N: Tensor) -> Classifier:
    """Fits the classifier on real images, [N, ...]; scaling all pixels by one number does not change the result."""
    _check_lengths(images, labels_N)
    num_classes = len(set(labels_N.tolist()))
    if num_classes < 2:
        raise UserError(
            f"labels of the real images: expected at least 2 classes, got {num_classes}; give more real images"
        )
    features_NF = pixel_features(images, "real images")
    # gamma="scale" divides by the variance of the pixels, C=10 is enough for near-separable digits.
    return Classifier(SVC(C=10.0, kernel="rbf", gamma="scale").fit(features_NF.numpy(), labels_N.cpu().numpy()))


def _check_lengths(images: Tensor, labels_N: Tensor) -> None:
    if len(images) != len(labels_N):
        raise UserError(f"labels: expected one an image, got {len(labels_N)} for {len(images)} images")
