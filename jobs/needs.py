"""What a stage's configuration asks of the nodes of a cluster, for the preflight."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.command import output_of
from pipelines import storage
from pipelines.config.common import ScalingConfig
from pipelines.config.evaluate import EvaluateConfig, PoolConfig
from pipelines.config.render import RenderConfig
from pipelines.config.tokenize_images import ActorsConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.preflight import Bundle, Needs, Place

# Fields that name what a stage reads, in any section.
READ = (
    "images", "tokens", "tokenizer", "source", "run", "table", "test", "test_images", "decoder",
    "teacher", "init", "baseline", "reuse", "reuse_images", "views",
)  # fmt: skip
# Those that name what it writes beside `output`.
WRITTEN = ("store_views",)
# The file of an output that is written last.
LAST = {
    "prepare": "manifest.json",
    "train-tokenizer": "manifest.json",
    "tokenize": "manifest.json",
    "render": "manifest.json",
    "pretrain": "weights/config.json",
    "finetune": "weights/config.json",
}


def is_done(stage: str, config: Any) -> bool:
    """Whether the stage will say that there is nothing to do: that needs no other node."""
    last = LAST.get(stage)
    stored = getattr(config, "store_views", "")
    outputs = [output_of(config), *([stored] if stored else [])]
    return last is not None and all(
        storage.exists(storage.join(output, *last.split("/"))) for output in outputs
    )


def needs_of(stage: str, config: Any) -> Needs:
    """What this stage needs; of a chain, what it needs of the outside, and of each stage."""
    configs = [config]
    if stage == "pipeline":
        from jobs.pipeline import stages

        configs = [each for _, _, each in stages(config)]
    gpus = [_wants_gpu(each) for each in configs]
    return Needs(
        places=tuple(_outside(_places(config, configs), output_of(config))),
        bundles=tuple(bundles for each in configs if (bundles := _bundles(each))),
        gpu=True if True in gpus else None if None in gpus else False,
        tracking_uri=next((t.uri for t in _tracked(configs) if t.uri.startswith("http")), ""),
    )


def _outside(places: Iterator[Place], output: str) -> Iterator[Place]:
    """Each place once, and none that a stage of the same chain makes."""
    known: set[tuple[str, bool]] = set()
    for place in places:
        below = output and place.uri.startswith(output.rstrip("/") + "/")
        if not below and (place.uri, place.written) not in known:
            known.add((place.uri, place.written))
            yield place


def _places(config: Any, configs: list[Any]) -> Iterator[Place]:
    if isinstance(config, EvaluateConfig):
        # Actors read images; everything else is read and written where the command runs.
        for field, uri in named(dataclasses.asdict(config), ("images", "test_images")):
            yield Place(field=field, uri=uri)
        return
    if output := output_of(config):
        yield Place(field="output", uri=output, written=True)
    for each in configs:
        for field, uri in named(dataclasses.asdict(each), WRITTEN):
            yield Place(field=field, uri=uri, written=True)
        for field, uri in named(dataclasses.asdict(each), READ):
            yield Place(field=field, uri=uri)
    for tracking in _tracked(configs):
        if tracking.artifact_uri:
            yield Place(field="tracking.artifact_uri", uri=tracking.artifact_uri, written=True)
        if tracking.uri.startswith("sqlite:///"):
            folder = tracking.uri.removeprefix("sqlite:///").rpartition("/")[0] or "."
            yield Place(field="tracking.uri", uri=folder, written=True)


def named(
    values: Mapping[str, Any], fields: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(dotted field, URI) of every field of these names, in any section."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from named(value, fields, f"{prefix}{name}.")
        elif name in fields:
            uris = value if isinstance(value, list) else [value]
            for number, uri in enumerate(uris):
                if isinstance(uri, str) and uri and not uri.startswith("sample:"):
                    yield f"{prefix}{name}" + (f"[{number}]" if len(uris) > 1 else ""), uri


def _tracked(configs: list[Any]) -> list[TrackingConfig]:
    found = [getattr(each, "tracking", None) for each in configs]
    return [tracking for tracking in found if tracking is not None and tracking.enabled]


def _wants_gpu(config: Any) -> bool | None:
    encoders, scaling = getattr(config, "encoders", None), getattr(config, "scaling", None)
    if isinstance(encoders, ActorsConfig):
        return None if encoders.num_gpus is None else encoders.num_gpus > 0
    if isinstance(scaling, PoolConfig):
        automatic = scaling.num_workers > 0 and config.device == "auto"
        return None if automatic else scaling.num_workers > 0 and config.device == "cuda"
    return isinstance(scaling, ScalingConfig) and scaling.use_gpu and scaling.worker_range[1] > 0


def _bundles(config: Any) -> tuple[Bundle, ...]:
    encoders, scaling = getattr(config, "encoders", None), getattr(config, "scaling", None)
    if isinstance(encoders, ActorsConfig):
        gpus = encoders.num_gpus or 0
        return (
            Bundle(
                field="encoders.decode_cpus", count=1, resources={"CPU": encoders.decode_cpus},
                remedy="lower it (fractions are allowed), or add nodes",
            ),
            Bundle(
                field="encoders.min_actors", count=encoders.min_actors,
                resources={"GPU": gpus} if gpus else _encoder_cpus(encoders),
                remedy="lower it or what each takes (fractions are allowed), or add nodes",
            ),
        )  # fmt: skip
    if isinstance(scaling, PoolConfig) and scaling.num_workers > 0:
        gpu = {"GPU": 1} if config.device == "cuda" else {}
        return (
            Bundle(
                field="scaling.cpus_per_worker", count=1,
                resources={"CPU": scaling.cpus_per_worker} | gpu,
                remedy="lower it, or add nodes",
            ),
        )  # fmt: skip
    if isinstance(config, RenderConfig):
        return (
            Bundle(
                field="task_cpus", count=1, resources={"CPU": config.task_cpus},
                remedy="lower it (fractions are allowed), or add nodes",
            ),
        )  # fmt: skip
    if isinstance(scaling, ScalingConfig) and scaling.worker_range[0] > 0:
        resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {})
        return (
            Bundle(
                field="scaling.num_workers", count=scaling.worker_range[0], resources=resources,
                remedy="lower it or scaling.cpus_per_worker, or add nodes",
            ),
        )  # fmt: skip
    return ()


def _encoder_cpus(encoders: ActorsConfig) -> dict[str, float]:
    """Of an actor on CPUs; where `num_gpus` is left open, nodes with GPUs may need none."""
    return {} if encoders.num_gpus is None else {"CPU": encoders.num_cpus}
