"""What a tokenize run will do, decided once by the driver, and what is there already."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import ray

from beit.tokenizers import ImageTokenizer
from pipelines import storage
from pipelines.config.tokenize_images import ActorsConfig, TokenizeConfig
from pipelines.errors import InputError
from pipelines.rendering.files import RenderTask
from pipelines.steps import say
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageParts
from pipelines.tables.token_files import Identity
from pipelines.tables.token_table import MAX_VOCAB_SIZE
from pipelines.tokenization.reuse import Older, refuse_other_tokens

LIBRARIES = ("numpy", "pillow", "pyarrow", "torch")


@dataclass(frozen=True, kw_only=True)
class TokenizeTask:
    """What every worker is told."""

    images_uri: str
    tokenizer_uri: str
    output: str
    identity: Identity
    num_gpus: float
    num_cpus: float
    decode_cpus: float
    min_actors: int
    max_actors: int
    rows_per_unit: int
    older: tuple[Older, ...]
    """Tables whose tokens are copied."""
    views: RenderTask | None = None
    """The view table whose files are made in the same pass."""

    @property
    def device(self) -> str:
        return self.identity.device

    @property
    def decode_memory(self) -> int:
        """Bytes a decode task needs: a unit's pixels, and again as much for images and copies;
        and what a file of stored views takes, if it makes some."""
        identity = self.identity
        pixels = self.rows_per_unit * identity.num_views * 3 * identity.image_size**2
        return 2 * pixels + (self.views.memory if self.views else 0)


def load_tokenizer(config: TokenizeConfig) -> ImageTokenizer:
    """The tokenizer, if it can do what is asked of it.

    Raises:
        InputError: it is not there, has too many codes, or not this precision.
    """
    tokenizer_uri = storage.absolute(config.tokenizer)
    tokenizer = tokenizer_store.load(tokenizer_uri)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise InputError(
            f"{tokenizer_uri}: vocab_size {tokenizer.vocab_size} does not fit token tables, "
            f"which hold at most {MAX_VOCAB_SIZE} codes"
        )
    if config.precision not in ("auto", *tokenizer.precisions):
        raise InputError(
            f"precision = {config.precision}: the tokenizer {tokenizer_uri} has only "
            f"{' and '.join(tokenizer.precisions)}; choose auto"
        )
    return tokenizer


def known_libraries() -> dict[str, str]:
    """Versions of what computes tokens."""
    return {name: version(name) for name in LIBRARIES}


def settled(
    config: TokenizeConfig, images: ImageParts, tokenizer: ImageTokenizer
) -> dict[str, Any]:
    """What is known of the identity without a cluster."""
    gpus = config.encoders.num_gpus
    values = _identity(config, images, tokenizer, gpus or 0).to_dict()
    if gpus is None:
        del values["device"]
        if config.precision == "auto":
            del values["precision"]
    return values


def plan_task(
    config: TokenizeConfig,
    images: ImageParts,
    tokenizer: ImageTokenizer,
    older: tuple[Older, ...] = (),
    views: RenderTask | None = None,
) -> TokenizeTask:
    """Everything the workers must know, decided once: what the user left open is filled in."""
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running: call ray.init first (jobs/ does)")
    gpus = ray.cluster_resources().get("GPU", 0)
    encoders = config.encoders
    num_gpus = (1.0 if gpus else 0.0) if encoders.num_gpus is None else encoders.num_gpus
    identity = _identity(config, images, tokenizer, num_gpus)
    refuse_other_tokens(older, identity.to_dict())
    task = TokenizeTask(
        images_uri=images.uri,
        tokenizer_uri=storage.absolute(config.tokenizer),
        output=storage.absolute(config.output),
        identity=identity,
        num_gpus=num_gpus,
        num_cpus=encoders.num_cpus,
        decode_cpus=encoders.decode_cpus,
        min_actors=encoders.min_actors,
        max_actors=_most_actors(encoders, num_gpus),
        rows_per_unit=min(config.rows_per_unit, max(part.rows for part in images.parts)),
        older=older,
        views=views,
    )
    _check_room(task, encoders)
    return task


def _identity(
    config: TokenizeConfig, images: ImageParts, tokenizer: ImageTokenizer, num_gpus: float
) -> Identity:
    return Identity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        grid_size=tokenizer.grid_size,
        image_size=tokenizer.image_size,
        interpolation=tokenizer.interpolation,
        policy=config.policy.to_dict(),
        views=(config.first_view, config.first_view + config.num_views),
        device="cuda" if num_gpus else "cpu",
        precision=_precision(config, tokenizer, num_gpus),
        # A unit smaller than a batch would be filled up with views nobody wants.
        batch_size=min(config.batch_size, config.rows_per_unit * config.num_views),
    )


def _precision(config: TokenizeConfig, tokenizer: ImageTokenizer, num_gpus: float) -> str:
    if config.precision != "auto":
        return config.precision
    return tokenizer.precisions[-1] if num_gpus else "float32"


def _most_actors(encoders: ActorsConfig, num_gpus: float) -> int:
    """Largest size of the pool."""
    if encoders.max_actors:
        return max(encoders.max_actors, encoders.min_actors)
    resources = ray.cluster_resources()
    if num_gpus:
        fitting = resources.get("GPU", 0) / num_gpus
    else:
        per_actor = max(encoders.num_cpus + encoders.decode_cpus, 0.1)
        fitting = resources.get("CPU", 0) / per_actor
    return max(int(fitting), encoders.min_actors)


def _check_room(task: TokenizeTask, encoders: ActorsConfig) -> None:
    """Sees to it that the nodes there are can do the job: tasks that fit none would wait for ever.

    A cluster may grow, and then waiting is right: where GPUs or the size of the pool were asked
    for by name, what is missing is said and no more.

    Raises:
        InputError: it does not fit.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    need_cpus = task.decode_cpus + (0 if task.num_gpus else task.num_cpus * task.min_actors)
    need_gpus = task.num_gpus * task.min_actors
    if cpus < need_cpus or gpus < need_gpus:
        missing = (
            f"encoders: {task.min_actors} actors and a decode task need {need_cpus:g} CPUs and "
            f"{need_gpus:g} GPUs, the cluster has {cpus:g} and {gpus:g}"
        )
        if encoders.num_gpus is None and not encoders.max_actors:
            raise InputError(
                f"{missing}; lower encoders.min_actors, num_cpus or decode_cpus (fractions are "
                "allowed), or give encoders.max_actors to wait for more nodes"
            )
        say(f"tokenize: {missing}; waiting for more nodes")
        return
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    if task.decode_memory > most:
        or_of_views = ", view_rows_per_unit" if task.views else ""
        raise InputError(
            f"rows_per_unit: a unit of {task.rows_per_unit} rows in {task.identity.num_views} "
            f"views needs {task.decode_memory / 1e9:.1f} GB to decode, the largest node has "
            f"{most / 1e9:.1f} GB; lower rows_per_unit{or_of_views} or num_views"
        )
