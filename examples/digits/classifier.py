"""The judge of generated classes: a classifier fitted on real images. The door to scikit-learn."""

import numpy as np
import numpy.typing as npt
from sklearn.svm import SVC
from torch import Tensor

from cfpretrain.base.console import UserError
from examples.digits.pixels import pixel_features


class Classifier:
    """A support vector machine with a radial kernel on pixels: deterministic, and fitted in a second on digits."""

    def __init__(self, machine: SVC, num_features: int) -> None:
        self._machine = machine
        self._num_features = num_features

    def predict(self, images: Tensor) -> npt.NDArray[np.int64]:
        """The class of each image.

        Args:
            images: [N, ...] in the scale that the classifier was fitted on.
        """
        features_NF = pixel_features(images, "images to classify")
        if len(features_NF) == 0 or features_NF.shape[1] != self._num_features:
            raise UserError(
                f"images to classify: expected at least one with {self._num_features} values as in the real images, "
                f"got {len(features_NF)} with {features_NF.shape[1]}; generate images of the size of the real ones"
            )
        return np.asarray(self._machine.predict(features_NF.numpy()), dtype=np.int64)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images taken for the class in `labels` (int64 [N]); images and errors as for `predict`."""
        _check_lengths(images, labels)
        return float((self.predict(images) == labels.cpu().numpy()).mean())


def fit(images: Tensor, labels: Tensor) -> Classifier:
    """Fits the classifier on real images.

    Args:
        images: [N, ...]; scaling all pixels by one number does not change the result.
        labels: int64 [N], at least two different classes.
    """
    _check_lengths(images, labels)
    num_classes = len(set(labels.tolist()))
    if num_classes < 2:
        raise UserError(
            f"labels of the real images: expected at least 2 classes, got {num_classes}; give more real images"
        )
    features_NF = pixel_features(images, "real images")
    # gamma="scale" divides by the variance of the pixels, C=10 is enough for near-separable digits.
    machine = SVC(C=10.0, kernel="rbf", gamma="scale").fit(features_NF.numpy(), labels.cpu().numpy())
    return Classifier(machine, features_NF.shape[1])


def _check_lengths(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels):
        raise UserError(f"labels: expected one an image, got {len(labels)} for {len(images)} images")
