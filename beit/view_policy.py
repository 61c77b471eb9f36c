"""The distribution that views are drawn from; `beit.views` draws them.

A file of its own that imports nothing, so that configurations can hold a policy as it is.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

# Raised whenever any (policy, digest, index, height, width) would give another view or pixels.
VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Which part of an image a view shows, and if mirrored; aspects are drawn log-uniformly."""

    min_area: float = 0.08
    """Smallest crop, as a share of the image's area."""
    max_area: float = 1.0
    """Largest crop."""
    min_aspect: float = 3 / 4
    """Narrowest crop, width over height."""
    max_aspect: float = 4 / 3
    """Widest crop."""
    flip_probability: float = 0.5
    """Share of mirrored views; 0 where left and right mean something (text)."""

    called: ClassVar[str] = "policy"
    """Argument or section that errors name."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that makes no sense."""
        self._require(
            0 < self.min_area <= self.max_area <= 1,
            "give shares of the image with 0 < min_area <= max_area <= 1",
            "min_area",
            "max_area",
        )
        self._require(
            0 < self.min_aspect <= self.max_aspect < math.inf,
            "give ratios with 0 < min_aspect <= max_aspect",
            "min_aspect",
            "max_aspect",
        )
        self._require(0 <= self.flip_probability <= 1, "give a share in [0, 1]", "flip_probability")

    def _require(self, condition: bool, remedy: str, *names: str) -> None:
        if not condition:
            fields = ", ".join(f"{self.called}.{name}" for name in names)
            values = ", ".join(str(getattr(self, name)) for name in names)
            raise ValueError(f"{fields} = {values}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class ViewPolicy(Framing):
    """The distribution that views are drawn from; the defaults are the paper's."""

    seed: int = 0
    """Another seed gives other views of every image."""
    brightness: float = 0.4
    """Factor drawn from [1 - brightness, 1 + brightness]; 0 switches it off."""
    contrast: float = 0.4
    """The same for contrast."""
    saturation: float = 0.4
    """The same for saturation."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that makes no sense."""
        super().__post_init__()
        self._require(0 <= self.seed < 2**64, "give an integer in [0, 2**64)", "seed")
        for name in ("brightness", "contrast", "saturation"):
            self._require(0 <= getattr(self, name) < math.inf, "give a number >= 0", name)

    def to_dict(self) -> dict[str, int | float]:
        """All fields and the version of the drawing and rendering code, for manifests."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, int | float]) -> "ViewPolicy":
        """The inverse of `to_dict`. Raises ValueError on another version or other fields."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields | {"version"}:
            odd = sorted(set(values) ^ (fields | {"version"}))
            raise ValueError(f"view policy: missing or unknown field {', '.join(odd)}")
        if values["version"] != VERSION:
            raise ValueError(
                f"view policy version = {values['version']}: this code draws version {VERSION}; "
                "use the release that wrote it, or make the token table again"
            )
        return cls(
            seed=int(values["seed"]),
            **{name: float(values[name]) for name in fields - {"seed"}},
        )
