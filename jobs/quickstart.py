"""`beit quickstart`: the whole chain, stage by stage, with one Ray and one tracking store.

Every stage is the one its own command runs; it resumes, or says that it is done already. So a
quickstart that was interrupted goes on where it stopped when the same command is given again.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.command import connect_to_ray, exit_code, parse, prepare_environment
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
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


def stages(config: QuickstartConfig) -> Iterator[tuple[str, str, Any]]:
    """(what it does, module, configuration) of every stage, in the order they run."""
    at = {name: f"{config.output}/{name}" for name in ("images", "tokenizer", "tokens", "run")}
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chain and returns the exit code of its first stage that failed, else 0."""

    def run() -> None:
        config = parse(QuickstartConfig, argv, stage="quickstart")
        prepare_environment()
        start = time.monotonic()
        connect_to_ray()
        summaries = []
        chain = list(stages(config))
        for number, (stage, module, stage_config) in enumerate(chain, start=1):
            print(f"\n[{number}/{len(chain)}] {stage}", flush=True)
            stage_start = time.monotonic()
            result = importlib.import_module(f"pipelines.{module}").run(stage_config)
            seconds = time.monotonic() - stage_start
            summaries.append(
                (stage, seconds, str(result.summary() if hasattr(result, "summary") else result))
            )
            print(f"      {summaries[-1][2]}  ({seconds:.0f} s)", flush=True)
        print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes; everything is below")
        print(f"{config.output}/.\n")
        for stage, seconds, summary in summaries:
            print(f"  {stage:<16}{seconds:5.0f} s  {summary}")
        print("\nLook at it:  make ui    (runs, curves, pictures, lineage in MLflow)")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
