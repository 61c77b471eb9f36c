"""Configuration of the `tokenize` stage."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.checks import fields_at_least
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The distribution views are drawn from; the defaults are the paper's."""

    seed: int = 0
    """Another seed gives other views of every image."""
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
    brightness: float = 0.4
    """Factor drawn from [1 - brightness, 1 + brightness]; 0 switches it off."""
    contrast: float = 0.4
    """The same for contrast."""
    saturation: float = 0.4
    """The same for saturation."""


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    """The actors that hold the tokenizer, and the decode tasks before them."""

    min_actors: int = 1
    """Actors to start with."""
    max_actors: int = 0
    """Actors the pool may grow to; 0: what the GPUs of the cluster hold, or where there is none,
    what its CPUs hold beside one decode task for each. Give it where nodes are still to come."""
    num_gpus: float | None = None
    """GPUs of one actor; a fraction lets several share one. Empty: 1 if the cluster has GPUs now,
    else 0. Where it is given, GPUs that are not there yet are waited for."""
    num_cpus: float = 1
    """CPUs of one actor without a GPU; also its number of threads."""
    decode_cpus: float = 1
    """CPUs that one decode task is counted as; it uses one thread."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Stops before GPU days are spent on a tokenizer that collapsed."""

    min_perplexity: float = 0.0
    """Least perplexity of the code usage; 0 switches the check off."""
    min_codes: int = 0
    """Least number of codes used; 0 switches the check off."""
    num_units: int = 8
    """Units looked at. They are spread over the table and computed before all others."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Computes the visual tokens of several views of every image, once and for all."""

    images: str
    """URI of the image table."""
    tokenizer: str
    """URI of the tokenizer."""
    output: str
    """URI of the token table; the same command again goes on with an unfinished one."""
    num_views: int = 4
    """Views of every image. More than 8 are better kept in several tables: training reads all
    views of a table."""
    first_view: int = 0
    """Index of the first view. Views added later: this is where the earlier table ended."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    precision: Literal["auto", "float32", "float16"] = "auto"
    """Arithmetic of the tokenizer. auto: float16 on GPUs, float32 on CPUs."""
    rows_per_unit: int = 1024
    """Images in one unit of work (one file). A unit should take 2 to 60 seconds: units are what
    an interruption loses, and the cost of scheduling is per unit."""
    batch_size: int = 64
    """Views in one call of the tokenizer; every call has exactly this many (the last of a unit
    is filled up), so that tokens never depend on how the work was cut."""
    encoders: ActorsConfig = field(default_factory=ActorsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    max_rejected_units: int = 0
    """Units that may stay without tokens (their work killed its process again and again, or an
    image in them cannot be decoded). More of them fail the stage."""
    retry_rejected: bool = False
    """Try units again that an earlier run gave up."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises InputError naming the field that makes no sense."""
        fields_at_least(
            self, num_views=1, first_view=0, rows_per_unit=1, batch_size=1, max_rejected_units=0
        )
        fields_at_least(
            self.encoders, "encoders.", min_actors=1, max_actors=0, num_cpus=0, decode_cpus=0
        )
        fields_at_least(self.gate, "gate.", min_perplexity=0, min_codes=0, num_units=1)
        if self.encoders.num_gpus is not None and self.encoders.num_gpus < 0:
            raise InputError(f"encoders.num_gpus = {self.encoders.num_gpus}: give 0 or more")
        if self.precision not in ("auto", "float32", "float16"):
            raise InputError(
                f"precision = {self.precision!r}: give auto, float32 or float16 (bfloat16 changes "
                "2 to 3 % of the tokens)"
            )
