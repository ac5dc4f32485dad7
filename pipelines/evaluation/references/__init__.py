"""What samples are compared with: where a reference comes from, and its statistics, computed once and kept."""

from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.references.made import reference_parts, source_statistics, statistics_path

__all__ = ["find_reference", "reference_parts", "source_statistics", "statistics_path"]
