"""`train-tokenizer`: an image table to a discrete VAE, trained as DALL-E's was.

Gumbel-softmax relaxation with a falling temperature, KL to the uniform code distribution with
warm-up, logit-Laplace or Gaussian likelihood, AdamW on a cosine, averaged weights (arXiv
2102.12092, appendix A). `run` is the driver, `train_loop` the training of one worker in the order
in which things happen. Views, order of samples and
relaxation noise are pure functions of (seed, step, canonical shard), hence the same for any number
of workers, and an interrupted run continues as if it had not been interrupted.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines import pictures, storage
from pipelines.config.checks import changed_fields
from pipelines.config.train_tokenizer import (
    MAY_CHANGE,
    TrainTokenizerConfig,
    deciding_options,
    require_uris,
)
from pipelines.errors import InputError, StageFailed
from pipelines.reading.ingest import open_training_tables, train_batches
from pipelines.scorecard import Scorecard, check_gate, score, scorecard_record
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tracking import Dataset
from pipelines.training import driver
from pipelines.training.checkpoint import Checkpoint, Saver, resume_point
from pipelines.training.distributed import (
    World,
    clip_gradients,
    restore,
    snapshot,
    wrap_model,
)
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir, refuse_changes
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.stopping import stop_requested
from pipelines.training.tokenizer_step import (
    AveragedWeights,
    RelaxedVae,
    build_tokenizer,
    learning_rate,
    relaxation,
    relaxation_noise,
    sample_order,
    start_codebook,
    uses_bfloat16,
    view_policy,
)

STAGE = "train-tokenizer"
TERMS = ("loss", "reconstruction", "kl")
OLD_RECORD = "training.json"
REMEDY = (
    "raise loss.kl_weight or loss.start_temperature, lower model.vocab_size or optim.lr, or give "
    "more varied images; then train into another output"
)


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


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerResult:
    """A finished tokenizer."""

    output: str
    fingerprint: str
    scorecard: dict[str, float]
    already_done: bool

    def summary(self) -> str:
        """What the command prints."""
        done = "already done" if self.already_done else "done"
        card = self.scorecard
        return (
            f"tokenizer {done}: {card['codes_used']:g} of {card['vocab_size']:g} codes used, "
            f"perplexity {card['perplexity']:.1f}, reconstruction error {card['mse']:.4f} "
            f"({card['psnr']:.1f} dB), fingerprint {self.fingerprint}, {self.output}"
        )


def run(config: TrainTokenizerConfig) -> TrainTokenizerResult:
    """Trains the tokenizer, or goes on with it, or says that it is finished.

    Raises:
        InputError: images that cannot be read, or an output that holds something else.
        StageFailed: the codebook collapsed, the loss is not finite, or the workers died too often.
    """
    launched_at = time.time()

    # Everything that can be refused is refused before anything is written.
    require_uris(images=config.images, output=config.output)
    # Workers may have another working directory than this process.
    config = dataclasses.replace(
        config, images=storage.absolute(config.images), output=storage.absolute(config.output)
    )
    images = ImageTable.open(config.images)
    plan = make_plan(config, images)
    run_dir = RunDir(config.output)
    inputs = [
        Dataset(name="image_table", uri=images.uri, digest=images.fingerprint, context="training")
    ]
    manifest = tokenizer_store.read_manifest(config.output)
    already_done = manifest is not None
    if manifest is not None:
        require_same(manifest["source"], config, plan)
        if not storage.exists(run_dir.at("run.json")):
            return _result(config.output, manifest, already_done=True)
        # Killed between the tokenizer and its record: that is made up for below.
    else:
        # Until the tokenizer is finished its directory is a run's: new, this run's, or another's.
        begin(run_dir, config, plan)

    # Training, and what becomes of it.
    with driver.start_tracking(config, run_dir, stage=STAGE, inputs=inputs) as tracked:
        if manifest is None:
            driver.train(
                train_loop, config, plan, run_dir, tracked, stage=STAGE, launched_at=launched_at
            )
            manifest = tokenizer_store.read_manifest(config.output)
        assert manifest is not None, "the end of the loop writes it"
        tracked.set_output(
            Dataset(name="tokenizer", uri=config.output, digest=manifest["fingerprint"])
        )
    run_dir.remove()
    return _result(config.output, manifest, already_done=already_done)


def train_loop(  # noqa: PLR0915
    config: TrainTokenizerConfig, plan: TokenizerPlan, world: World, log: TrainLog
) -> None:
    """The training of one worker, see `driver.Loop`; worker 0 writes checkpoints and tokenizer.

    Raises:
        StageFailed: collapse or a loss that is not finite; on all workers at once.
    """
    total, books = plan.total_steps, log.books
    device = str(world.device)
    first = world.rank == 0
    images = ImageTable.open(config.images)
    order = sample_order(config, images)
    policy = view_policy(config.views, seed=config.seed)

    # Set-up: the network, at the start or at the newest whole checkpoint.
    resumed = resume_point(log.run.checkpoints, world, rejected=log.checkpoint_rejected)
    tokenizer = build_tokenizer(config.model, seed=config.seed)
    if resumed is None and first:  # the other workers are sent its weights
        start_codebook(tokenizer, config, images, device)
    tokenizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    relaxed = RelaxedVae(tokenizer, config.loss)
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(),
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
        weight_decay=config.optim.weight_decay,
    )
    model = wrap_model(relaxed, world, strategy="ddp", compiled=config.scaling.compile)
    parameters = list(tokenizer.parameters())
    average = AveragedWeights(tokenizer, config.optim.ema_decay)
    if resumed is not None:
        restore(tokenizer, optimizer, resumed.weights, resumed.moments)
        average.restore(resumed.weights)
    step = log.start(resumed.step if resumed else None)
    low_precision = uses_bfloat16(config, world)
    shards = order.shards_of(world.rank, world.size)
    noise_shape = (order.shard_batch_size, tokenizer.vocab_size, *tokenizer.grid_size)
    saver = Saver(
        log.run.checkpoints,
        keep=config.checkpoint.keep,
        asynchronous=True,
        failed=log.checkpoint_failed,
    )
    with contextlib.ExitStack() as closing:
        closing.callback(saver.close)
        # Without tokens every epoch is a view of its own: no image is seen twice in one crop.
        batches = train_batches(
            open_training_tables(config.images, policy=policy),
            order,
            image_size=tokenizer.image_size,
            interpolation=tokenizer.interpolation,
            fast=False,
            grid_size=tokenizer.grid_size,
            seed=config.seed,
            start_step=step,
            stop_step=total,
            rank=world.rank,
            num_ranks=world.size,
            num_threads=config.data.num_threads or config.scaling.cpus_per_worker,
            prefetch_batches=config.data.prefetch_batches,
            pin_memory=world.device.type == "cuda",
        )
        closing.callback(batches.close)
        metrics = StepMetrics(config.log_every, TERMS, tokenizer.vocab_size, world.device)
        period_start = step
        books.switch("compute")
        books.pace()

        # The loop.
        while step < total:
            with books.spend("data_wait"):
                host = next(batches)
                pixels = host.pixels.to(device, non_blocking=True)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            temperature, kl_weight = relaxation(config, step)
            noise = relaxation_noise(
                seed=config.seed, step=step, shards=shards, shape=noise_shape, device=device
            )
            with torch.autocast(world.device.type, torch.bfloat16, enabled=low_precision):
                loss, terms, codes = model(
                    pixels, noise, torch.tensor(temperature), torch.tensor(kl_weight)
                )
            loss = loss / world.size  # gradients are summed over the workers
            loss.backward()
            metrics.add(loss, terms * len(pixels), codes, len(pixels))
            grad_norm = clip_gradients(parameters, config.optim.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            metrics.close_step(grad_norm, host.row_ids.numpy())
            step += 1

            # Also at checkpoints: a run that goes on from one begins its next period there.
            at_checkpoint = step % config.checkpoint.every_steps == 0 or step == total
            ending = False
            if step % config.log_every == 0 or at_checkpoint:
                elapsed, wait = books.pace()
                period = metrics.reduce(world, first_step=period_start)
                images_done = (step - period_start) * config.data.global_batch_size
                tracked = {
                    **period.means,
                    "grad_norm_max": float(np.max(period.grad_norms)),
                    "codes_used": period.codes_used or 0,
                    "perplexity": period.perplexity or 0.0,
                    "hard_reconstruction": float(relaxed.hard_reconstruction(pixels)),
                    "temperature": temperature,
                    "kl_weight": kl_weight,
                    "lr": learning_rate(config, step - 1),
                    "images_per_second": images_done / elapsed,
                    "data_wait_share": wait / elapsed,
                }
                shown = {
                    "loss": f"{tracked['loss']:.4f}",
                    "codes": f"{tracked['codes_used']:g}",
                    "perplexity": f"{tracked['perplexity']:.1f}",
                }
                log.period(step - 1, {**period.per_step(), **tracked}, tracked, shown)
                _check_health(tracked, step, config)
                period_start = step
                ending = step < total and log.end_requested(world)
            if at_checkpoint or ending:
                with books.spend("checkpoint"):
                    weights, moments = snapshot(tokenizer, optimizer, keep=first)
                    if first:
                        weights |= average.state()
                        saver.save(
                            Checkpoint(step=step, weights=weights, moments=moments, state={})
                        )
                        log.flush()
            if ending:
                with books.spend("checkpoint"):
                    raise stop_requested(saver, step, total, world)

        # The end: judge the averaged weights and make them the tokenizer.
        with books.spend("checkpoint"):
            saver.wait()
        if first:
            if config.optim.ema_decay > 0:
                average.copy_to(tokenizer)
            with books.spend("evaluation"):
                scorecard = score(
                    tokenizer,
                    images,
                    num_images=config.gate.num_images,
                    policy=policy,
                    device=device,
                )
                _log_scorecard(scorecard, log, total)
            check_gate(
                scorecard,
                min_perplexity=config.gate.min_perplexity,
                min_codes=config.gate.min_codes,
                remedy=REMEDY,
            )
            tokenizer_store.save(
                tokenizer.to("cpu"),
                config.output,
                source=dict(plan.source),
                scorecard=scorecard_record(scorecard),
            )


def make_plan(config: TrainTokenizerConfig, images: ImageTable) -> TokenizerPlan:
    """Everything that follows from configuration and table.

    Raises:
        InputError: a batch larger than the table.
    """
    source = {
        "stage": STAGE,
        "image_table": images.fingerprint,
        "sample_order": sample_order(config, images).to_dict(),
        "options": deciding_options(config),
    }
    return TokenizerPlan(total_steps=config.optim.steps, source=source)


def begin(run_dir: RunDir, config: TrainTokenizerConfig, plan: TokenizerPlan) -> None:
    """Starts the run in the output, or checks that this is the one it holds.

    Earlier versions kept one file there in place of a run directory's records; such a run goes on.

    Raises:
        InputError: the output was begun with other settings or images; names them.
    """
    run_id = ""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        old = storage.read_json(run_dir.at(OLD_RECORD))
        require_same(old["source"], config, plan)
        run_id = old["mlflow_run_id"]
    fingerprints = {
        "image_table": plan.source["image_table"],
        "order": storage.fingerprint(plan.source["sample_order"]),
    }
    run_dir.begin(config, fingerprints, may_change=MAY_CHANGE, mlflow_run_id=run_id)
    storage.delete(run_dir.at(OLD_RECORD))


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
    refuse_changes(config.output, "other settings or images", changed)


def _check_health(metrics: dict[str, float], step: int, config: TrainTokenizerConfig) -> None:
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
            f"log, below gate.min_perplexity = {config.gate.min_perplexity:g}; {REMEDY}"
        )


def _log_scorecard(scorecard: Scorecard, log: TrainLog, step: int) -> None:
    log.tracked({f"scorecard/{k}": v for k, v in scorecard.metrics().items()}, step)
    if scorecard.reconstructions is not None:
        grid = pictures.tokenizer_grid(scorecard.images, scorecard.reconstructions)
        log.picture("tokenizer", grid, step)
    log.picture("codebook_usage", pictures.codebook_usage(scorecard.counts), step)


def _result(output: str, manifest: dict[str, Any], *, already_done: bool) -> TrainTokenizerResult:
    return TrainTokenizerResult(
        output=output,
        fingerprint=manifest["fingerprint"],
        scorecard=manifest["scorecard"],
        already_done=already_done,
    )
