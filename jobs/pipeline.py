"""`beit pipeline`: the whole chain, stage by stage, with one Ray and one tracking store.

Every stage is the one its own command runs; it resumes, or says that it is done already. So a
chain that was interrupted goes on where it stopped when the same command is given again.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig

WITHOUT_RAY = ("evaluate",)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The five stages of the chain; their inputs and outputs are places below `output`."""

    output: str
    """Directory or URI that gets images/, tokenizer/, tokens/ and run/."""
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


def stages(config: PipelineConfig) -> Iterator[tuple[str, str, Any]]:
    """(what it does, module, configuration) of every stage, in the order they run."""
    names = ("images", "tokenizer", "tokens", "run")
    at = {name: storage.join(config.output, name) for name in names}
    replace = dataclasses.replace
    yield "prepare", "prepare", replace(config.prepare, output=at["images"])
    yield (
        "train-tokenizer",
        "train_tokenizer",
        replace(config.train_tokenizer, images=at["images"], output=at["tokenizer"]),
    )
    yield (
        "tokenize",
        "tokenize_images",
        replace(
            config.tokenize, images=at["images"], tokenizer=at["tokenizer"], output=at["tokens"]
        ),
    )
    yield (
        "pretrain",
        "pretrain",
        replace(
            config.pretrain,
            images=at["images"],
            tokens=[at["tokens"]],
            tokenizer=at["tokenizer"],
            output=at["run"],
        ),
    )
    yield "evaluate", "evaluate", replace(config.evaluate, run=at["run"], images=at["images"])


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What the stages said."""

    output: str
    seconds: float
    stages: tuple[tuple[str, float, str], ...]
    """Name, seconds and summary of each."""

    def summary(self) -> str:
        """What the command prints at the end."""
        lines = [f"  {name:<16}{seconds:5.0f} s  {said}" for name, seconds, said in self.stages]
        return "\n".join(
            [
                f"\nDone in {self.seconds / 60:.1f} minutes; everything is below",
                f"{self.output}/.\n",
                *lines,
                "\nLook at it:  make ui    (runs, curves, pictures, lineage in MLflow)",
            ]
        )


def run(config: PipelineConfig, *, start_ray: Callable[[], None]) -> PipelineResult:
    """Runs the chain. Raises what its first failing stage raises."""
    start = time.monotonic()
    done: list[tuple[str, float, str]] = []
    chain = list(stages(config))
    for number, (stage, module, stage_config) in enumerate(chain, start=1):
        print(f"\n[{number}/{len(chain)}] {stage}", flush=True)
        began = time.monotonic()
        options = {} if stage in WITHOUT_RAY else {"start_ray": start_ray}
        result = importlib.import_module(f"pipelines.{module}").run(stage_config, **options)
        said = str(result.summary() if hasattr(result, "summary") else result)
        done.append((stage, time.monotonic() - began, said))
        print(f"      {said}  ({done[-1][1]:.0f} s)", flush=True)
    return PipelineResult(
        output=config.output, seconds=time.monotonic() - start, stages=tuple(done)
    )


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["pipeline", *sys.argv[1:]]))
