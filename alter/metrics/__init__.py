"""What a model achieves: distances and scores of images, by the published protocols."""

from .classifier import SmallClassifier, accuracy, output_error, train_classifier
from .distances import frechet_distance

__all__ = ["SmallClassifier", "accuracy", "frechet_distance", "output_error", "train_classifier"]
