"""One file per metric; every number is a ``Metric``: value, interval, count, scorer, data, ideal and direction."""

from surgery.metrics.metric import Metric, mean_metric

__all__ = ["Metric", "mean_metric"]
