"""Teachers of VQ-KD from what there is: own runs first, then folders of other libraries."""

from pipelines.teachers.opening import open_teacher

__all__ = ["open_teacher"]
