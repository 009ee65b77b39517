"""What a distilled model was made for, and how it samples: the part of a checkpoint that no other model has."""

from collections.abc import Mapping
from dataclasses import dataclass

STEPS = (1, 2, 4)  # how many evaluations a model can be distilled to
METHODS = ("moments", "consistency", "phased")  # how it learns: training/moments.py, and training/distill.py
GRID = "angle"  # the levels that a student visits: at 90, 45 and 0 degrees for two evaluations


@dataclass(frozen=True)
class Student:
    """steps: evaluations.   guidance: the weight that is baked in.   teacher: the sha256 of the teacher's checkpoint.

    segments: parts of the path.  With 1 every jump ends at the clean image, and fresh noise is added between
    evaluations; with `steps` of them (phased) a jump ends where the next one begins, and no noise is added.
    """

    steps: int
    segments: int
    guidance: float
    teacher: str
    moments: bool = False

    @property
    def method(self) -> str:
        """The option of `distill` that made it; with one step phased is consistency."""
        return "moments" if self.moments else "phased" if self.segments > 1 else "consistency"

    def sampling(self) -> dict[str, object]:
        """How the student samples by default, in the keys of `default_sampling` that it changes."""
        return {"sampler": "ddim", "steps": self.steps, "grid": GRID, "eta": 1.0 if self.segments == 1 else 0.0}


def is_student(values: object) -> bool:
    """Whether these are the fields of a Student that a run can have written."""
    if not isinstance(values, Mapping) or {*values, "moments"} != set(Student.__dataclass_fields__):
        return False
    steps, segments, guidance = values["steps"], values["segments"], values["guidance"]
    moments = values.get("moments", False)  # the first students do not say
    return (
        type(steps) is type(segments) is int
        and steps in STEPS
        and segments in (1, steps)
        and type(guidance) in (int, float)
        and 0 <= guidance < float("inf")
        and isinstance(values["teacher"], str)
        and type(moments) is bool
        and not (moments and (segments > 1 or guidance != 1))
    )
