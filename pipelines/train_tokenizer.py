"""`train-tokenizer`: an image table to a discrete VAE, trained as DALL-E's was.

Gumbel-softmax relaxation with a falling temperature, KL to the uniform code distribution with
warm-up, logit-Laplace or Gaussian likelihood, AdamW on a cosine, averaged weights (arXiv
2102.12092, appendix A). `train` is the run in execution order. Views, order of samples and
relaxation noise are pure functions of (seed, step, canonical shard), hence the same for any number
of workers, and an interrupted run continues as if it had not been interrupted.
"""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from pipelines import pictures, storage
from pipelines.config.train_tokenizer import (
    TrainTokenizerConfig,
    deciding_options,
    flat_options,
    require_uris,
)
from pipelines.errors import InputError, StageFailed
from pipelines.reading.ingest import open_training_tables, train_batches
from pipelines.scorecard import Scorecard, check_gate, score, scorecard_record
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tracking import Dataset, start_run
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.training import checkpoint
from pipelines.training.distributed import (
    World,
    clip_gradients,
    join_world,
    restore,
    snapshot,
    wrap_model,
)
from pipelines.training.ray_workers import ProgressSink, fit_with_ray
from pipelines.training.tokenizer_record import RECORD, STAGE, open_output, require_same
from pipelines.training.tokenizer_step import (
    AveragedWeights,
    Period,
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

FAILURE = "failure.json"
CHECKPOINTS = "checkpoints"
RAY_STATE = "ray"
REMEDY = (
    "raise loss.kl_weight or loss.start_temperature, lower model.vocab_size or optim.lr, or give "
    "more varied images; then train into another output"
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told."""

    config: TrainTokenizerConfig
    output: str
    source: dict[str, Any]
    tracking_uri: str
    run_id: str


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
    require_uris(images=config.images, output=config.output)
    # Workers may have another working directory than this process.
    config = dataclasses.replace(config, images=storage.absolute(config.images))
    output = storage.absolute(config.output)
    images = ImageTable.open(config.images)
    source = {
        "stage": STAGE,
        "image_table": images.fingerprint,
        "sample_order": sample_order(config, images).to_dict(),
        "options": deciding_options(config),
    }
    manifest = tokenizer_store.read_manifest(output)
    if manifest is not None:
        require_same(manifest["source"], source, output)
        return _result(output, manifest, already_done=True)

    record = open_output(output, source)
    with start_run(
        config.tracking,
        stage=STAGE,
        params=flat_options(config),
        inputs=[
            Dataset(
                name="image_table", uri=images.uri, digest=images.fingerprint, context="training"
            )
        ],
        resume_run_id=record["mlflow_run_id"] or None,
        system_metrics=config.scaling.num_workers == 0,
    ) as tracking:
        storage.write_json(
            storage.join(output, RECORD), {**record, "mlflow_run_id": tracking.run_id}
        )
        storage.delete(storage.join(output, FAILURE))
        job = Job(
            config=config,
            output=output,
            source=source,
            tracking_uri=tracking.tracking_uri,
            run_id=tracking.run_id,
        )
        _train_somewhere(job)
        manifest = tokenizer_store.read_manifest(output)
        if manifest is None:
            raise InputError(
                f"output = {output}: the workers have written the tokenizer, and it is not there: "
                "nodes see different disks; use a directory that all of them share, or s3://"
            )
        tracking.set_output(Dataset(name="tokenizer", uri=output, digest=manifest["fingerprint"]))
    for leftover in (CHECKPOINTS, RAY_STATE):
        storage.delete_prefix(storage.join(output, leftover))
    return _result(output, manifest, already_done=False)


def train(job: Job, world: World, progress: ProgressSink) -> None:  # noqa: PLR0915
    """One worker's whole run; rank 0 writes checkpoints and, at the end, the tokenizer.

    Raises:
        StageFailed: collapse or a loss that is not finite; on all workers at once.
    """
    config, total = job.config, job.config.optim.steps
    device = str(world.device)
    first = world.rank == 0
    images = ImageTable.open(config.images)
    order = sample_order(config, images)
    policy = view_policy(config.views, seed=config.seed)

    # Set-up: the network, at the start or at the newest whole checkpoint.
    root = storage.join(job.output, CHECKPOINTS)
    resumed = _newest_checkpoint(root, world)
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
    start_step = 0
    if resumed is not None:
        start_step = resumed.step
        restore(tokenizer, optimizer, resumed.weights, resumed.moments)
        average.restore(resumed.weights)
    low_precision = uses_bfloat16(config, world)
    shards = order.shards_of(world.rank, world.size)
    noise_shape = (order.shard_batch_size, tokenizer.vocab_size, *tokenizer.grid_size)
    # Closed however this ends: the curves of a collapsed run are those worth looking at.
    with contextlib.ExitStack() as closing:
        logger = MetricLogger(job.tracking_uri, job.run_id if first else "")
        closing.callback(logger.close)
        saver = checkpoint.Saver(
            root, keep=config.checkpoint.keep, asynchronous=True, failed=_report_failed_checkpoint
        )
        closing.callback(saver.close)
        period = Period(tokenizer.vocab_size, world)
        period_start, waited = time.monotonic(), 0.0
        # Without tokens every epoch is a view of its own: no image is seen twice in one crop.
        batches = train_batches(
            open_training_tables(config.images, policy=policy),
            order,
            image_size=tokenizer.image_size,
            interpolation=tokenizer.interpolation,
            fast=False,
            grid_size=tokenizer.grid_size,
            seed=config.seed,
            start_step=start_step,
            stop_step=total,
            rank=world.rank,
            num_ranks=world.size,
            num_threads=config.data.num_threads or config.scaling.cpus_per_worker,
            prefetch_batches=config.data.prefetch_batches,
            pin_memory=world.device.type == "cuda",
        )
        closing.callback(batches.close)
        progress.start(total, start_step)

        # The loop.
        for step in range(start_step, total):
            wait_start = time.monotonic()
            batch = next(batches).pixels.to(device, non_blocking=True)
            waited += time.monotonic() - wait_start

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            temperature, kl_weight = relaxation(config, step)
            noise = relaxation_noise(
                seed=config.seed, step=step, shards=shards, shape=noise_shape, device=device
            )
            with torch.autocast(world.device.type, torch.bfloat16, enabled=low_precision):
                loss, terms, counts = model(
                    batch, noise, torch.tensor(temperature), torch.tensor(kl_weight)
                )
            (loss / world.size).backward()  # gradients are summed over the workers
            grad_norm = clip_gradients(parameters, config.optim.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            period.add(terms, counts, grad_norm)

            done = step + 1
            if done % config.log_every == 0 or done == total:
                metrics = period.metrics()
                seconds = time.monotonic() - period_start
                metrics |= {
                    "hard_reconstruction": float(relaxed.hard_reconstruction(batch)),
                    "temperature": temperature,
                    "kl_weight": kl_weight,
                    "lr": learning_rate(config, step),
                    "images_per_second": period.steps * config.data.global_batch_size / seconds,
                    "data_wait_share": waited / seconds,
                }
                logger.log(metrics, done)
                progress.update(
                    done,
                    loss=f"{metrics['loss']:.4f}",
                    codes=f"{metrics['codes_used']:g}",
                    perplexity=f"{metrics['perplexity']:.1f}",
                )
                _check_health(metrics, done, config)
                period.clear()
                period_start, waited = time.monotonic(), 0.0
            if done % config.checkpoint.every_steps == 0 or done == total:
                weights, moments = snapshot(tokenizer, optimizer, keep=first)
                if first:
                    weights |= average.state()
                    saver.save(
                        checkpoint.Checkpoint(step=done, weights=weights, moments=moments, state={})
                    )

        # The end: judge the averaged weights and make them the tokenizer.
        saver.wait()
        if first:
            if config.optim.ema_decay > 0:
                average.copy_to(tokenizer)
            scorecard = score(
                tokenizer,
                images,
                num_images=config.gate.num_images,
                policy=policy,
                device=device,
            )
            _log_scorecard(scorecard, logger, total)
            check_gate(
                scorecard,
                min_perplexity=config.gate.min_perplexity,
                min_codes=config.gate.min_codes,
                remedy=REMEDY,
            )
            tokenizer_store.save(
                tokenizer.to("cpu"),
                job.output,
                source=job.source,
                scorecard=scorecard_record(scorecard),
            )
        progress.close()


def _train_somewhere(job: Job) -> None:
    """In this process, or in the workers of Ray Train; failures come out as they are meant."""
    scaling = job.config.scaling
    if scaling.num_workers == 0:
        train(job, join_world(use_gpu=scaling.use_gpu, in_ray=False), ProgressSink(STAGE))
        return
    try:
        fit_with_ray(
            _worker,
            job,
            label=STAGE,
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            cpus_per_worker=scaling.cpus_per_worker,
            max_failures=scaling.max_failures,
            state_uri=storage.join(job.output, RAY_STATE),
        )
    finally:
        _raise_verdict(job)


def _worker(job: Job, progress: ProgressSink) -> None:
    """A verdict is written down, and whoever finds one ends at once: a restart changes nothing."""
    failure = storage.join(job.output, FAILURE)
    if storage.exists(failure):
        return
    world = join_world(use_gpu=job.config.scaling.use_gpu, in_ray=True)
    try:
        train(job, world, progress)
    except StageFailed as error:
        # The same on all workers, or of rank 0 after the last step.
        if world.rank == 0:
            storage.write_json(failure, {"message": str(error), "bad_input": False})
    except InputError as error:
        storage.write_json(failure, {"message": str(error), "bad_input": True})
        raise  # the others wait for this one


def _raise_verdict(job: Job) -> None:
    """Raises what a worker has written down as the end of the run, as it was meant there."""
    try:
        failure = storage.read_json(storage.join(job.output, FAILURE))
    except FileNotFoundError:
        return
    raise (InputError if failure["bad_input"] else StageFailed)(failure["message"])


def _newest_checkpoint(root: str, world: World) -> checkpoint.Checkpoint | None:
    """The same one on all workers."""

    def rejected(step: int, reason: str) -> None:
        print(f"checkpoint of step {step} passed over: {reason}", file=sys.stderr)

    newest = checkpoint.load_newest(root, rejected=rejected) if world.rank == 0 else None
    step = world.broadcast(newest.step if newest else None)
    return newest if step is None or newest is not None else checkpoint.load(root, step)


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


def _log_scorecard(scorecard: Scorecard, logger: MetricLogger, step: int) -> None:
    logger.log({f"scorecard/{k}": v for k, v in scorecard.metrics().items()}, step)
    if scorecard.reconstructions is not None:
        grid = pictures.tokenizer_grid(scorecard.images, scorecard.reconstructions)
        logger.log_image("tokenizer", grid, step)
    logger.log_image("codebook_usage", pictures.codebook_usage(scorecard.counts), step)


def _report_failed_checkpoint(step: int, reason: str) -> None:
    print(f"checkpoint of step {step} could not be saved: {reason}", file=sys.stderr)


def _result(output: str, manifest: dict[str, Any], *, already_done: bool) -> TrainTokenizerResult:
    return TrainTokenizerResult(
        output=output,
        fingerprint=manifest["fingerprint"],
        scorecard=manifest["scorecard"],
        already_done=already_done,
    )
