"""Scores of a model: counting, measuring, reporting and drawing."""

from .measure import Measurement, best_threshold, measure
from .score import check_what_is_scored, conclude_training, score

__all__ = ["Measurement", "best_threshold", "check_what_is_scored", "conclude_training", "measure", "score"]
