"""Scores of a model: counting, measuring, reporting and drawing."""

from .measure import Measurement, best_threshold, measure
from .score import conclude_training, score_weights

__all__ = ["Measurement", "best_threshold", "conclude_training", "measure", "score_weights"]
