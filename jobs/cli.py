"""`beit STAGE ...`: one console script for every stage; `python -m jobs STAGE` is the same."""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from pydoc import locate
from typing import Any

from jobs.command import parse, stage_main
from jobs.recipes import shipped_recipes
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stands behind a command."""

    purpose: str
    config: str
    """Class of its configuration, by dotted name: nothing is imported for the other stages."""
    module: str
    """Module whose `run(config)` does it."""
    ray: str
    """always, never, or `workers`: only where training workers or decode tasks are asked for."""


def _stage(purpose: str, config: str, *, ray: str = "always") -> Stage:
    module, _, name = config.partition(":")
    return Stage(
        purpose=purpose,
        config=f"pipelines.config.{module}.{name}",
        module=f"pipelines.{module}",
        ray=ray,
    )


STAGES = {
    "pipeline": Stage(
        purpose="the whole chain in one go; what is done already is skipped",
        config="jobs.pipeline.PipelineConfig",
        module="jobs.pipeline",
        ray="always",
    ),
    "prepare": _stage(
        "images (folder, WebDataset, Parquet) to an image table", "prepare:PrepareConfig"
    ),
    "join": _stage("several image tables as one, without a copy", "join:JoinConfig", ray="never"),
    "train-tokenizer": _stage(
        "image table to a tokenizer: discrete VAE, VQ-KD, k-means, projection",
        "train_tokenizer:TrainTokenizerConfig",
        ray="workers",
    ),
    "import-tokenizer": _stage(
        "DALL-E, FLAVA or VQ-KD weights to a tokenizer",
        "import_tokenizer:ImportTokenizerConfig",
        ray="never",
    ),
    "tokenize": _stage(
        "image table and tokenizer to a token table", "tokenize_images:TokenizeConfig"
    ),
    "render": _stage(
        "image table to a view table: stored pixels, where decoding is too slow",
        "render:RenderConfig",
    ),
    "pretrain": _stage(
        "image table and token tables to a pretrained BEiT",
        "pretrain:PretrainConfig",
        ray="workers",
    ),
    "finetune": _stage(
        "a pretrained network and labelled images to a classifier",
        "finetune:FinetuneConfig",
        ray="workers",
    ),
    "evaluate": _stage(
        "kNN, linear and attentive probe beside random initialisation and pixels",
        "evaluate:EvaluateConfig",
        ray="workers",
    ),
    "export": _stage(
        "a run's weights to Hugging Face, timm, unilm, MAE or ONNX",
        "export:ExportConfig",
        ray="never",
    ),
    "audit": _stage(
        "re-reads and re-hashes a table; exit 1 names what is wrong",
        "audit:AuditConfig",
        ray="never",
    ),
    "lineage": _stage(
        "what an artefact was made from, back to the images, and what was made from it",
        "lineage:LineageConfig",
        ray="never",
    ),
    "report": _stage(
        "runs side by side in one HTML file: what differs, intervals, curves, pictures, cost",
        "report:ReportConfig",
        ray="never",
    ),
    "sync": _stage(
        "fills MLflow from run directories: later, or where no server was",
        "sync:SyncConfig",
        ray="never",
    ),
    "plan": _stage(
        "what a tokenize or pretrain would cost; touches nothing", "plan:PlanConfig", ray="never"
    ),
}
# Fields that stand without their flag; those in the plural take several.
BARE = {"audit": "table", "sync": "runs", "lineage": "artefact", "report": "runs"}
# Modules of `jobs` that read their flags themselves.
OWN_FLAGS = ("submit", "doctor", "ui")
OTHERS = {
    "quickstart": "`pipeline` on a small real sample, or on your own folder",
    "doctor": "can every node do what a stage needs; makes nothing",
    "ui": "MLflow's pages of what was run here, opened at the table of runs",
    "submit": "any of these as a job on a Ray cluster; status, logs, stop, list",
    "recipes": "the configurations that ship, by the name that --config takes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stage, or what stands beside the stages, and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in OWN_FLAGS:
        code: int = importlib.import_module(f"jobs.{name}").main(rest)
        return code
    if name == "recipes":
        print(_recipes())
        return 0
    if name == "quickstart":
        given = any(flag.partition("=")[0] == "--config" for flag in rest)
        name, rest = "pipeline", rest if given else ["--config", "quickstart", *rest]
    if name not in STAGES:
        near = get_close_matches(name, [*STAGES, *OTHERS], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        print(f"error: unknown stage {name!r}{meant}\n\n{_usage()}", file=sys.stderr)
        return 2
    stage = STAGES[name]
    flags = stage_flags(name, rest)
    return stage_main(name, config_class(name), stage.module, flags, ray=stage.ray)


def command_of(module: str) -> str:
    """The command that `python -m jobs.MODULE` is, by its own name or its pipeline's; "": none."""
    names = {name.replace("-", "_"): name for name in (*STAGES, *OTHERS)}
    names |= {stage.module.rpartition(".")[2]: name for name, stage in STAGES.items()}
    return names.get(module, "")


def config_class(name: str) -> type:
    """The class of a stage's configuration. Raises InputError for another name."""
    if name not in STAGES:
        raise InputError(f"{name!r} is no stage; choose {', '.join(STAGES)}")
    found = locate(STAGES[name].config)
    assert isinstance(found, type)
    return found


def stage_flags(name: str, flags: Sequence[str]) -> list[str]:
    """The flags with what may stand without one: the table of `audit`, the runs of `sync`."""
    bare = list(takewhile(lambda flag: not flag.startswith("-"), flags))
    if not bare or name not in BARE:
        return list(flags)
    field = BARE[name]
    given = json.dumps(bare) if field.endswith("s") else bare[0]
    rest = flags[len(bare) :] if field.endswith("s") else flags[1:]
    return [f"--{field}={given}", *rest]


def parse_stage(name: str, flags: Sequence[str]) -> Any:
    """The configuration of a stage from its flags, as its own command reads them."""
    return parse(config_class(name), stage_flags(name, flags), stage=name)


def _recipes() -> str:
    recipes = shipped_recipes()
    width = max(map(len, recipes)) + 2
    return "\n".join(f"{name:<{width}}{_first_sentence(path)}" for name, path in recipes.items())


def _first_sentence(recipe: Path) -> str:
    comment = takewhile(lambda line: line.startswith("#"), recipe.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")


def _usage() -> str:
    purposes = {name: stage.purpose for name, stage in STAGES.items()} | OTHERS
    lines = [f"  {name:<18}{purpose}" for name, purpose in purposes.items()]
    return "\n".join(
        [
            "usage: beit STAGE [--config RECIPE] [--dotted.field VALUE ...]",
            "",
            "BEiT pretraining on Ray. Stages, in the order they are run:",
            *lines,
            "",
            "`beit STAGE --help` lists a stage's fields; `--print_config` shows the effective",
            "configuration. BEIT_VERBOSE=1 shows Ray's own log.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
