"""`beit pipeline`: the whole chain, stage by stage, with one Ray and one tracking store.

Every stage is the one its own command runs; it resumes, or says that it is done already. So a
chain that was interrupted goes on where it stopped when the same command is given again. With
`arms` it is a comparison: several trainings of the same images, one table, one report.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

from jobs.command import with_changes
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.report import ReportConfig
from pipelines.config.tokenize_images import TokenizeConfig, refuse_idle_views
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.errors import InputError

WITHOUT_RAY = ("report",)
RECORD = "chain.json"
"""What the stages said and how long they took, below `output`."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The stages of the chain; their inputs and outputs are places below `output`.

    Tokenizer and tokens are made where a training predicts them: mae alone needs neither.
    """

    output: str
    """Directory or URI that gets images/, tokenizer/, tokens/ and run/, and views/ if asked for."""
    store_views: bool = False
    """Pixels of the views are stored beside their tokens, in views/ (`tokenize.view_form`), and
    trained on by trainings of `pretrain`'s `image_size` that predict tokens."""
    prepare: PrepareConfig
    """Images to an image table."""
    train_tokenizer: TrainTokenizerConfig
    """Image table to a tokenizer."""
    tokenize: TokenizeConfig
    """Image table and tokenizer to a token table."""
    pretrain: PretrainConfig
    """Image table and token table to a pretrained BEiT."""
    evaluate: EvaluateConfig
    """Frozen features beside random initialisation and raw pixels."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other trainings to compare with `pretrain`, by name: those of its fields that differ. Each
    gets run-NAME/ and an evaluation; all of them get one table, and a report (needs MLflow)."""

    def __post_init__(self) -> None:
        for name in self.arms:
            if not re.fullmatch(r"[\w.-]+", name):
                raise InputError(f"arms: {name!r} names a training; use letters, digits, . _ -")
        if self.arms and self.evaluate.output:
            raise InputError(
                f"evaluate.output = {self.evaluate.output!r}: each training of `arms` has its own "
                "evaluation below its run; leave it out"
            )
        if self.tokenize.store_views:
            raise InputError(
                f"tokenize.store_views = {self.tokenize.store_views!r}: a chain stores views in "
                "views/; give --store_views true instead"
            )
        if not self.store_views:
            refuse_idle_views(self.tokenize, "tokenize.")


def stages(config: PipelineConfig) -> Iterator[tuple[str, str, Any]]:
    """(what it does, module, configuration) of every stage, in the order they run."""
    from pipelines import storage  # imports too much for --help

    names = ("images", "tokenizer", "tokens", "views")
    at = {name: storage.join(config.output, name) for name in names}
    replace, size = dataclasses.replace, config.pretrain.model.image_size
    yield "prepare", "prepare", replace(config.prepare, output=at["images"])
    if any(_predicts_tokens(training) for training in trainings(config).values()):
        yield (
            "train-tokenizer",
            "train_tokenizer",
            replace(config.train_tokenizer, images=at["images"], output=at["tokenizer"]),
        )
        yield (
            "tokenize",
            "tokenize_images",
            replace(
                config.tokenize,
                images=at["images"],
                tokenizer=at["tokenizer"],
                output=at["tokens"],
                **({"store_views": at["views"], "view_size": size} if config.store_views else {}),
            ),
        )
    elif config.store_views:
        raise InputError(
            "store_views = True: views are stored beside tokens, and no training of this chain "
            "predicts tokens (objective.kind = mae); leave it out"
        )
    for name, training in trainings(config).items():
        predicts_tokens = _predicts_tokens(training)
        # MAE has views of its own, and so has another size.
        stored = config.store_views and predicts_tokens and training.model.image_size == size
        yield (
            f"pretrain {name}".rstrip(),
            "pretrain",
            replace(
                training,
                images=at["images"],
                tokens=[at["tokens"]] if predicts_tokens else [],
                tokenizer=at["tokenizer"] if predicts_tokens else "",
                views=[at["views"]] if stored else training.views,
                output=run_of(config, name),
            ),
        )
        # What no training has changed is looked at once.
        baselines = config.evaluate.baselines and not name
        yield (
            f"evaluate {name}".rstrip(),
            "evaluate",
            replace(
                config.evaluate,
                run=run_of(config, name),
                images=at["images"],
                baselines=baselines,
            ),
        )
    if config.arms and config.pretrain.tracking.enabled:
        runs = [run_of(config, name) for name in trainings(config)]
        output, tracking = storage.join(config.output, "report.html"), config.pretrain.tracking
        yield "report", "report", ReportConfig(runs=runs, output=output, tracking=tracking)


def trainings(config: PipelineConfig) -> dict[str, PretrainConfig]:
    """The training of the chain under "", and those of `arms` by their names.

    Raises:
        InputError: an arm names a field that there is not, or a value that it cannot have.
    """
    others = {
        name: with_changes(config.pretrain, changes, label=f"arms.{name}")
        for name, changes in config.arms.items()
    }
    return {"": config.pretrain, **others}


def _predicts_tokens(training: PretrainConfig) -> bool:
    return training.objective.kind != "mae"


def run_of(config: PipelineConfig, name: str) -> str:
    """The run directory of a training."""
    from pipelines import storage

    return storage.join(config.output, f"run-{name}" if name else "run")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What the stages said."""

    output: str
    seconds: float
    stages: tuple[tuple[str, float, str], ...]
    """Name, seconds and summary of each."""
    verdict: str
    """What was learned, in words; of several trainings their table."""
    look: str
    """Where a person sees the runs; "" if nothing was recorded."""

    def summary(self) -> str:
        """What the command prints at the end."""
        width = max(len(name) for name, _, _ in self.stages) + 1
        lines = [
            f"  {name:<{width}}{seconds:5.0f} s  {said}" for name, seconds, said in self.stages
        ]
        return "\n".join(
            [
                f"\nDone in {self.seconds / 60:.1f} minutes; everything is below",
                f"{self.output}/.\n",
                *lines,
                "",
                self.verdict,
                f"\nRuns, curves, pictures, lineage:  {self.look}" if self.look else "",
            ]
        )


def run(config: PipelineConfig, *, start_ray: Callable[[], None]) -> PipelineResult:
    """Runs the chain. Raises what its first failing stage raises."""
    from pipelines import storage

    start = time.monotonic()
    done: list[tuple[str, float, str]] = []
    chain = list(stages(config))
    results: dict[str, Any] = {}
    probed = True
    record = ChainRecord(storage.join(storage.absolute(config.output), RECORD))
    for number, (stage, module, stage_config) in enumerate(chain, start=1):
        print(f"\n[{number}/{len(chain)}] {stage}", flush=True)
        if module == "evaluate" and not probed:
            print("      left out: the images have no labels of two classes", flush=True)
            continue
        options = {} if module in WITHOUT_RAY else {"start_ray": start_ray}
        try:
            with record.timed(stage) as entry:
                result = importlib.import_module(f"pipelines.{module}").run(stage_config, **options)
                entry.said = str(result.summary() if hasattr(result, "summary") else result)
                entry.already_done = getattr(result, "already_done", False)
        except Exception:
            if stage == "report":  # it asks MLflow, the table does not
                print(f"\n{_verdict(config, results)}\n", flush=True)
            raise
        results[stage] = result
        done.append((stage, entry.seconds, entry.said))
        print(f"      {entry.said}  ({entry.seconds:.0f} s)", flush=True)
        if module == "prepare":
            _refuse_too_few(chain, result.num_rows)
            probed = len(result.class_names) > 1
            if config.arms and not probed:
                raise InputError(
                    f"arms: {', '.join(config.arms)} would be compared by probes, and "
                    f"{result.uri} has no labels of two classes. Give images in class folders, or "
                    "one training"
                )
    return PipelineResult(
        output=config.output,
        seconds=time.monotonic() - start,
        stages=tuple(done),
        verdict=_verdict(config, results),
        look=_where_to_look(config),
    )


def _refuse_too_few(chain: list[tuple[str, str, Any]], num_images: int) -> None:
    """Raises InputError if a training has larger batches than there are images, before any runs."""
    larger: dict[str, int] = {}
    for stage, module, config in chain:
        trains = module == "pretrain" or (module == "train_tokenizer" and config.model.trained)
        if trains and config.data.global_batch_size > num_images:
            arm = stage.removeprefix("pretrain").strip()
            section = f"arms.{arm}" if module == "pretrain" and arm else module
            larger[f"{section}.data.global_batch_size"] = config.data.global_batch_size
    if larger:
        fields = ", ".join(f"{name} = {value}" for name, value in larger.items())
        raise InputError(
            f"{fields}: more than the {num_images} images of {chain[0][2].output}. Give at least "
            f"{max(larger.values())} images (and another output), or smaller batches, multiples of "
            "data.num_shards"
        )


def _where_to_look(config: PipelineConfig) -> str:
    from pipelines.tracking.table import where_to_look

    return where_to_look(config.pretrain.tracking)


def _verdict(config: PipelineConfig, results: dict[str, Any]) -> str:
    # What torch and MLflow are imported for is there by now.
    from jobs.comparison import Arm, comparison
    from jobs.headline import headline

    if not config.arms:
        return headline(results["pretrain"], results.get("evaluate"))
    return comparison(
        [
            Arm(
                name=name or config.pretrain.objective.kind,
                batch=training.data.global_batch_size,
                trained=results[f"pretrain {name}".rstrip()],
                judged=results[f"evaluate {name}".rstrip()],
                seed=config.evaluate.seed,
            )
            for name, training in trainings(config).items()
        ]
    )


@dataclass
class _Entry:
    seconds: float = 0.0
    said: str = ""
    already_done: bool = False


class _Stage(TypedDict):
    seconds: float
    said: str


class _Stages(TypedDict):
    stages: dict[str, _Stage]


class ChainRecord:
    """`chain.json`: seconds and words of each stage, over all starts of the chain until it ended.

    A stage that is done already keeps what stands there; one that is made again is told anew.

    Raises:
        InputError: the file is not of this form.
    """

    def __init__(self, uri: str) -> None:
        from pipelines import records, storage

        self._uri = uri
        self._stages: dict[str, _Stage] = {}
        if storage.exists(uri):
            remedy = "remove it, it holds no more than times"
            self._stages = records.read_values(uri, _Stages, remedy)["stages"]

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[_Entry]:
        """Writes down what the block takes, also where it fails; the block sets what it found.

        Of a stage that refuses its input nothing is written.
        """
        began, entry = time.monotonic(), _Entry()
        try:
            yield entry
        except InputError:
            raise
        except BaseException:
            entry.seconds = time.monotonic() - began
            # What ended the stage is told, also where the store is away.
            with contextlib.suppress(Exception):
                self._keep(stage, entry)
            raise
        entry.seconds = time.monotonic() - began
        self._keep(stage, entry)

    def _keep(self, stage: str, entry: _Entry) -> None:
        from pipelines import storage
        from pipelines.redaction import redacted

        before = self._stages.get(stage)
        ended = before is not None and before["said"]
        made = entry.said and not entry.already_done
        if (ended and not made) or (before is None and entry.already_done):
            return
        seconds = entry.seconds + (before["seconds"] if before and not ended else 0.0)
        self._stages[stage] = {"seconds": seconds, "said": redacted(entry.said)}
        storage.write_json(self._uri, {"stages": self._stages, **_made_by()})


def _made_by() -> dict[str, Any]:
    from pipelines.tracking.context import code_version

    version = importlib.metadata.version("torch")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {version}"
    return {"machine": machine, "code": code_version()}


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["pipeline", *sys.argv[1:]]))
