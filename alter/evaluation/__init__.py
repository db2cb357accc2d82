"""What a model achieves: distances and scores of images, by the published protocols."""

from .classifier import SmallClassifier, accuracy, errors_by_timestep, train_classifier
from .distances import frechet_distance

__all__ = ["SmallClassifier", "accuracy", "errors_by_timestep", "frechet_distance", "train_classifier"]
