"""Configuration of the `prepare` stage: every knob, its meaning and its limits."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.config.checks import Ge, Gt, Le, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError

Format = Literal["auto", "folder", "webdataset", "parquet"]
Labels = Literal["auto", "folder", "field", "none"]


_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Images of any source to an image table."""

    source: str
    """Folder, glob (`*`, `**`, `[ab]`, `{000..010}`) or file, local or s3://...: images in a tree,
    WebDataset tars, or Parquet files with an image column; or `sample:emoji`, the bundled
    sample."""
    output: str
    """Directory or URI that gets the image table."""
    against: str = ""
    """URI of an older image table: how many images are new, and how many are gone, is said."""
    format: Format = "auto"
    """What the source holds; auto looks at the file names."""

    labels: Labels = "auto"
    """Where classes come from: a directory below the source, a field of the sample, nowhere;
    auto: directories for a folder, the field for the others if it is there; field: a tar's sample
    without it is rejected."""
    label_level: Annotated[int, Ge(1), "folders count from 1"] = 1
    """Which folder on the way to a file is its class: 1, the first below the source."""
    label_field: str = ""
    """Parquet column (default `label`), or WebDataset member: `cls` (default), or `json:NAME`."""
    image_field: str = ""
    """Parquet column with the encoded images, found by name and type if empty; or WebDataset
    extension (`jpg`, `rgb.png`; `jpg;png`: the first that is there; `*.png`: all of them, each an
    image of its own), needed where a sample has several pictures."""
    key_field: str = ""
    """Parquet column to name rows by; row numbers if empty."""
    group_field: str = ""
    """Parquet column naming what must not be split between training and held-out rows."""
    group_pattern: str = ""
    """The same from the key: a regular expression whose first group is the name."""

    max_side: int = 0
    """Images with a longer side are shrunk to it and stored as JPEG; 0: as they are."""
    quality: Annotated[int, Ge(1), Le(100)] = 95
    """JPEG quality of shrunk images (4:4:4, so that colours stay sharp)."""
    min_side: Annotated[int, Ge(1)] = 1
    """Images with a shorter side, in pixels, are rejected; with `max_side`, as they are stored."""
    max_pixels: Annotated[int, Ge(1)] = 89_478_485
    """Images with more pixels are rejected before they are decoded."""
    max_image_mb: Annotated[float, Gt(0), Le(1900)] = 128
    """Larger encoded images are rejected unread."""
    decode_timeout: Annotated[float, Gt(0)] = 60
    """Seconds after which decoding one image is given up."""
    max_rejected: int | float | str = 0.05
    """Rejected items tolerated: a share of them (and of the bytes lost with whole files), as 5% or
    0.05, or a number of items, as 5."""

    part_mb: Annotated[float, Gt(0), Le(1024)] = 256
    """Megabytes of images in a part, about; also the unit of work and of loss."""
    row_group_mb: Annotated[float, Gt(0), Le(128)] = 12
    """Megabytes of images in a row group, the smallest piece that is read later."""
    num_tasks: Annotated[int, Ge(0)] = 0
    """Units worked on at once; 0: as many as the cluster has CPUs for."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        check(self)
        self._require(self.max_side == 0 or self.max_side >= 8, "max_side", "give 0 or at least 8")
        # What later stages decode: `beit.images.DEFAULT_MAX_PIXELS`.
        most = 89_478_485
        shrunk = 0 < self.max_side**2 <= most
        self._require(
            self.max_pixels <= most or shrunk, "max_pixels", f"give at most {most}, or set max_side"
        )
        self._require_tolerance()
        try:
            groups = re.compile(self.group_pattern).groups
        except re.error as error:
            raise InputError(f"group_pattern = {self.group_pattern!r}: {error}") from error
        self._require(
            not self.group_pattern or groups >= 1, "group_pattern", "put a part in parentheses"
        )
        self._require(
            not (self.group_pattern and self.group_field), "group_field", "group_pattern is set too"
        )

    def _require_tolerance(self) -> None:
        limit = self.max_rejected
        if isinstance(limit, str):
            percent = _PERCENT.fullmatch(limit.strip())
            valid = percent is not None and float(percent.group(1)) <= 100
        else:
            # 1.0 looks like all items and like one; 2.0 can only be two.
            share, count = 0 <= limit < 1, limit >= 1 and limit == int(limit)
            valid = share or (count and not (isinstance(limit, float) and limit == 1))
        remedy = "give a share as 5% or 0.05 (all items: 100%), or a number of items as 5 (one: 1)"
        self._require(valid and not isinstance(limit, bool), "max_rejected", remedy)

    def _require(self, condition: bool, name: str, remedy: str) -> None:
        require(condition, name, getattr(self, name), remedy)


def tolerated_share(max_rejected: float | str) -> float | None:
    """The share of items that may be rejected; None if `max_rejected` is a number of them."""
    if isinstance(max_rejected, str):
        return float(max_rejected.strip().removesuffix("%")) / 100
    return max_rejected if max_rejected < 1 else None


def tolerated(max_rejected: float | str, num_items: float) -> float:
    """How many of so many items may be rejected."""
    share = tolerated_share(max_rejected)
    return float(max_rejected) if share is None else share * num_items


# What may differ when an interrupted prepare goes on; everything else decides what the table
# contains.
MAY_CHANGE = (
    "output",
    "against",
    "max_rejected",
    "num_tasks",
    "lease",
    "tracking",
    "decode_timeout",
)


def identity(config: PrepareConfig) -> dict[str, object]:
    """The options that decide what the table contains, without the source."""
    fields = vars(config).items()
    return {name: value for name, value in fields if name not in (*MAY_CHANGE, "source")}
