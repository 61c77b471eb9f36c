"""Configuration of the `tokenize` stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from beit.view_policy import ViewPolicy
from pipelines.config.checks import Ge, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.render import RenderConfig
from pipelines.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    """The actors that hold the tokenizer, and the decode tasks before them."""

    min_actors: Annotated[int, Ge(1)] = 1
    """Actors to start with."""
    max_actors: Annotated[int, Ge(0)] = 0
    """Actors the pool may grow to; 0: what the GPUs of the cluster hold, or where there is none,
    what its CPUs hold beside one decode task for each. Give it where nodes are still to come."""
    num_gpus: Annotated[float | None, Ge(0)] = None
    """GPUs of one actor; a fraction lets several share one. Empty: 1 if the cluster has GPUs now,
    else 0. Where it is given, GPUs that are not there yet are waited for."""
    num_cpus: Annotated[float, Ge(0)] = 1
    """CPUs of one actor without a GPU; also its number of threads."""
    decode_cpus: Annotated[float, Ge(0)] = 1
    """CPUs that one decode task is counted as; it uses one thread."""

    def __post_init__(self) -> None:
        check(self, "encoders.")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Stops before GPU days are spent on a tokenizer that collapsed."""

    min_perplexity: Annotated[float, Ge(0)] = 0.0
    """Least perplexity of the code usage; 0 switches the check off."""
    min_codes: Annotated[int, Ge(0)] = 0
    """Least number of codes used; 0 switches the check off."""
    num_units: Annotated[int, Ge(1)] = 8
    """Units looked at. They are spread over the table and computed before all others."""

    def __post_init__(self) -> None:
        check(self, "gate.")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Computes the visual tokens of several views of every image, once and for all."""

    images: str
    """URI of the image table."""
    tokenizer: str
    """URI of the tokenizer."""
    output: str
    """URI of the token table; the same command again goes on with an unfinished one."""
    num_views: Annotated[int, Ge(1)] = 4
    """Views of every image. More than 8 are better kept in several tables: training reads all
    views of a table."""
    first_view: Annotated[int, Ge(0)] = 0
    """Index of the first view. Views added later: this is where the earlier table ended."""
    policy: ViewPolicy = field(default_factory=ViewPolicy)
    precision: Literal["auto", "float32", "float16"] = "auto"
    """Arithmetic of the tokenizer. auto: float16 on GPUs where the tokenizer has it (k-means and
    projection have not), float32 on CPUs; bfloat16 is not offered, it changes 2 to 3 % of the
    tokens."""
    rows_per_unit: Annotated[int, Ge(1)] = 1024
    """Images in one unit of work (one file). A unit should take 2 to 60 seconds: units are what
    an interruption loses, and the cost of scheduling is per unit."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Views in one call of the tokenizer; every call has exactly this many (the last of a unit
    is filled up), so that tokens never depend on how the work was cut."""
    reuse: list[str] = field(default_factory=list)
    """URIs of older token tables of other images, made in the same way: the tokens of an image that
    is in one of them are copied."""
    reuse_images: list[str] = field(default_factory=list)
    """URIs of the image tables that those are of; `images` itself need not be named."""
    store_views: str = ""
    """URI of a view table that gets the pixels of the same views, made in the same pass: images are
    read and decoded once for both. It is the table of `render` with these options, which may have
    begun or finished it. Empty: none."""
    view_form: Literal["lossless", "jpeg95", "jpeg90"] = "lossless"
    """Of stored views: `form` of `render`."""
    view_size: Annotated[int, Ge(1)] = 224
    """Of stored views: `image_size` of `render`."""
    view_rows_per_unit: Annotated[int, Ge(1)] = 256
    """Of stored views: `rows_per_unit` of `render`. Few beside `rows_per_unit`: where a file of
    views reaches over the end of a unit, its rows there are decoded twice."""
    encoders: ActorsConfig = field(default_factory=ActorsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    max_rejected_units: Annotated[int, Ge(0)] = 0
    """Units that may stay without tokens (their work killed its process again and again, or an
    image in them cannot be decoded). More of them fail the stage."""
    retry_rejected: bool = False
    """Try units again that an earlier run gave up."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)


def refuse_idle_views(config: TokenizeConfig, prefix: str = "") -> None:
    """Raises InputError for what is said of stored views where none are asked for."""
    for name in ("view_form", "view_size", "view_rows_per_unit"):
        value = getattr(config, name)
        kept = value == getattr(TokenizeConfig, name)
        require(kept, prefix + name, value, "give --store_views, or leave it out")


def stored_views(config: TokenizeConfig) -> RenderConfig | None:
    """The `render` that makes the view table of `store_views`, if one is asked for."""
    if not config.store_views:
        return None
    return RenderConfig(
        images=config.images,
        output=config.store_views,
        num_views=config.num_views,
        first_view=config.first_view,
        policy=config.policy,
        image_size=config.view_size,
        form=config.view_form,
        rows_per_unit=config.view_rows_per_unit,
        max_rejected_units=config.max_rejected_units,
        retry_rejected=config.retry_rejected,
        dry_run=config.dry_run,
        lease=config.lease,
        tracking=config.tracking,
    )
