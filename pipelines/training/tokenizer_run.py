"""Before and after the making of a tokenizer: its plan, what it is refused for, its judgement."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from beit.tokenizers import ImageTokenizer
from pipelines import storage
from pipelines.config.checks import changed_fields
from pipelines.config.train_tokenizer import MAY_CHANGE, TrainTokenizerConfig, deciding_options
from pipelines.errors import InputError, StageFailed
from pipelines.pictures.scorecards import scorecard_pictures
from pipelines.records import read_values
from pipelines.scorecard import Scorecard, check_gate, score, scorecard_record
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.teachers.opening import check_grid, open_teacher
from pipelines.tracking.datasets import short_name
from pipelines.training.data import make_order
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir, refuse_changes
from pipelines.training.tokenizer_step import view_policy

STAGE = "train-tokenizer"
OLD_RECORD = "training.json"
ELSEWHERE = "then make it in another output"
REMEDIES = {
    "dvae": "raise loss.kl_weight or loss.start_temperature, lower model.vocab_size or optim.lr, "
    "or give more varied images; then train into another output",
    "vqkd": "lower vqkd.decay (0.9 in a training of some hundred steps) or model.vocab_size, raise "
    "vqkd.restart_below, give more varied images or another layer; " + ELSEWHERE,
    "kmeans": "give more varied images or more data.codebook_images, or lower model.vocab_size; "
    + ELSEWHERE,
    "projection": "raise model.code_dim or give more varied images; " + ELSEWHERE,
}


class OldRecord(TypedDict):
    """What must stand in training.json."""

    source: dict[str, Any]
    mlflow_run_id: str


@dataclass(frozen=True, kw_only=True)
class TokenizerPlan:
    """What the driver works out once for all workers and restarts."""

    total_steps: int
    source: Mapping[str, Any]
    """What the tokenizer is made from, for its manifest."""

    @property
    def figures(self) -> dict[str, float]:
        """What report.json repeats."""
        return {}


def make_plan(config: TrainTokenizerConfig, images: ImageTable) -> TokenizerPlan:
    """Everything that follows from configuration, table and teacher.

    Raises:
        InputError: a batch larger than the table or with fewer patches than there are codes, or a
            teacher that cannot be read or does not fit.
    """
    source: dict[str, Any] = {
        "stage": STAGE,
        "image_table": images.fingerprint,
        "options": deciding_options(config),
    }
    if config.model.trained:
        source["sample_order"] = make_order(config, images.row_groups.sizes).to_dict()
    if config.teacher:
        model = config.model
        side = model.image_size // model.stride
        teacher = open_teacher(config.teacher, layer=config.layer, side=side)
        check_grid(teacher, (side, side), image_size=model.image_size)
        _check_vocabulary(config, side * side)
        source["teacher"] = {
            "fingerprint": teacher.fingerprint,
            "weights": teacher.weights,
            "name": teacher.name,
        }
    return TokenizerPlan(
        total_steps=config.optim.steps if config.model.trained else 1, source=source
    )


def _check_vocabulary(config: TrainTokenizerConfig, num_patches: int) -> None:
    """Raises InputError unless the first batch has a patch for every code to start at."""
    batch, vocab_size = config.data.global_batch_size, config.model.vocab_size
    if batch * num_patches < vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size}: the first batch has only {batch * num_patches} "
            f"patches to place codes at; raise data.global_batch_size (= {batch}) or lower "
            "model.vocab_size"
        )


def refuse_other(run_dir: RunDir, config: TrainTokenizerConfig, plan: TokenizerPlan) -> str:
    """Refuses an output that another run has begun.

    Earlier versions kept one file there in place of a run directory's records; such a run goes on,
    and so does its MLflow run, which is returned.

    Raises:
        InputError: the output was begun with other settings or images; names them.
    """
    run_id = ""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        old = read_values(run_dir.at(OLD_RECORD), OldRecord, "give another output")
        require_same(old["source"], config, plan)
        run_id = old["mlflow_run_id"]
    run_dir.holds(config, _fingerprints(plan), may_change=MAY_CHANGE)
    return run_id


def begin(run_dir: RunDir, config: TrainTokenizerConfig, plan: TokenizerPlan) -> None:
    """Starts the run in the output, or goes on with the one it holds."""
    run_id = refuse_other(run_dir, config, plan)
    run_dir.begin(config, _fingerprints(plan), may_change=MAY_CHANGE, mlflow_run_id=run_id)
    storage.delete(run_dir.at(OLD_RECORD))


def _fingerprints(plan: TokenizerPlan) -> dict[str, str]:
    fingerprints = {"image_table": plan.source["image_table"]}
    if "sample_order" in plan.source:
        fingerprints["order"] = storage.fingerprint(plan.source["sample_order"])
    if "teacher" in plan.source:
        fingerprints["teacher"] = plan.source["teacher"]["fingerprint"]
    return fingerprints


def require_same(old: Mapping[str, Any], config: TrainTokenizerConfig, plan: TokenizerPlan) -> None:
    """Raises InputError naming every option in which a tokenizer's source is not this plan's."""
    if old.get("stage") != STAGE:
        raise InputError(
            f"output = {config.output}: holds a tokenizer made by {old.get('stage')!r}; give "
            "another one"
        )
    changed = changed_fields(old["options"], config, MAY_CHANGE)
    tables = old["image_table"], plan.source["image_table"]
    if tables[0] != tables[1]:
        changed["image_table"] = tables
    teachers = [source.get("teacher", {}).get("fingerprint") for source in (old, plan.source)]
    if teachers[0] != teachers[1]:
        changed["teacher"] = (teachers[0], teachers[1])
    refuse_changes(config.output, "other settings or images", changed)


def check_health(metrics: Mapping[str, float], step: int, config: TrainTokenizerConfig) -> None:
    """Raises StageFailed for a loss that is not finite, or tokens of few codes."""
    if not math.isfinite(metrics["loss"]):
        raise StageFailed(
            f"the loss is {metrics['loss']} at step {step}: lower optim.lr "
            f"(= {config.optim.lr:g}), set optim.clip_grad_norm, or train in float32"
        )
    judged = step > config.gate.grace_steps
    if judged and metrics["perplexity"] < config.gate.min_perplexity:
        raise StageFailed(
            f"the tokenizer has collapsed at step {step}: perplexity {metrics['perplexity']:.2f}, "
            f"{metrics['codes_used']:g} of {config.model.vocab_size} codes used since the last "
            f"log, below gate.min_perplexity = {config.gate.min_perplexity:g}; "
            f"{REMEDIES[config.model.kind]}"
        )


def conclude(
    tokenizer: ImageTokenizer,
    images: ImageTable,
    config: TrainTokenizerConfig,
    plan: TokenizerPlan,
    log: TrainLog,
    *,
    device: str,
) -> Scorecard:
    """Judges the tokenizer (on `device`), tells of it, and saves it if it passes.

    Raises:
        StageFailed: it has collapsed.
    """
    policy = view_policy(config.views, seed=config.seed)
    with log.books.spend("evaluation"):
        scorecard = score(
            tokenizer, images, num_images=config.gate.num_images, policy=policy, device=device
        )
        log.tracked({f"scorecard/{k}": v for k, v in scorecard.metrics().items()}, plan.total_steps)
        where = f"{short_name(config.output)}, step {plan.total_steps:,}"
        for name, picture in scorecard_pictures(scorecard, where).items():
            log.picture(name, picture, plan.total_steps)
    check_gate(
        scorecard,
        min_perplexity=config.gate.min_perplexity,
        min_codes=config.gate.min_codes,
        remedy=REMEDIES[config.model.kind],
    )
    log.run.check()
    tokenizer_store.save(
        tokenizer.to("cpu"),
        config.output,
        source=dict(plan.source),
        scorecard=scorecard_record(scorecard),
        patches=scorecard.nearest.patches if scorecard.nearest else None,
    )
    return scorecard
