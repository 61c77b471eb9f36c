"""`train-tokenizer`: an image table to a tokenizer, trained or placed.

A discrete VAE is trained as DALL-E's was (arXiv 2102.12092, appendix A): Gumbel-softmax relaxation
with a falling temperature, KL to the uniform code distribution with warm-up, logit-Laplace or
Gaussian likelihood, AdamW on a cosine, averaged weights. VQ-KD is trained as BEiT v2's was: cosine
loss of a teacher's features through a codebook that follows the states. K-means and random
projection have nothing to train. `run` is the driver, `train_loop` the training of one worker in
the order in which things happen. Views, order of samples and what is drawn in a step are pure
functions of (seed, step, canonical shard), hence the same for any number of workers, and an
interrupted run continues as if it had not been interrupted.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines import lease, storage
from pipelines.config.train_tokenizer import TrainTokenizerConfig, require_uris
from pipelines.reading.encoded_rows import open_training_tables
from pipelines.reading.ingest import train_batches
from pipelines.steps import ray_is_there
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.teachers.opening import absolute_uri
from pipelines.tracking import Dataset
from pipelines.training import driver
from pipelines.training.checkpoint import Checkpoint, Saver, resume_point
from pipelines.training.data import make_order
from pipelines.training.distributed import (
    World,
    check_device,
    clip_gradients,
    restore,
    snapshot,
    wrap_model,
)
from pipelines.training.log import TrainLog
from pipelines.training.run_dir import RunDir
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.stopping import stop_requested
from pipelines.training.tokenizer_learners import build_learner
from pipelines.training.tokenizer_run import (
    STAGE,
    TokenizerPlan,
    begin,
    check_health,
    conclude,
    make_plan,
    refuse_other,
    require_same,
)
from pipelines.training.tokenizer_step import (
    build_tokenizer,
    learning_rate,
    start_codebook,
    uses_bfloat16,
    view_policy,
)


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
        error = ""
        if "mse" in card:
            error = f"reconstruction error {card['mse']:.4f} ({card['psnr']:.1f} dB), "
        return (
            f"tokenizer {done}: {card['codes_used']:g} of {card['vocab_size']:g} codes used, "
            f"perplexity {card['perplexity']:.1f}, {error}fingerprint {self.fingerprint}, "
            f"{self.output}"
        )


def run(
    config: TrainTokenizerConfig, *, start_ray: Callable[[], None] = ray_is_there
) -> TrainTokenizerResult:
    """Trains the tokenizer, or goes on with it, or says that it is finished.

    Raises:
        InputError: images that cannot be read, or an output that holds something else.
        StageFailed: the codebook collapsed, the loss is not finite, or the workers died too often.
    """
    launched_at = time.time()
    check_device(config.scaling)

    # Everything that can be refused is refused before anything is written.
    require_uris(images=config.images, output=config.output)
    # Workers may have another working directory than this process.
    config = dataclasses.replace(
        config,
        images=storage.absolute(config.images),
        output=storage.absolute(config.output),
        teacher=absolute_uri(config.teacher),
    )
    images = ImageTable.open(config.images)
    plan = make_plan(config, images)
    refuse_other(RunDir(config.output), config, plan)
    if (done := _finished(config, plan)) is not None:
        lease.clear(config.output, config.lease, stage=STAGE)
        return done
    start_ray()
    with lease.held(config.output, config.lease, stage=STAGE) as holder:
        result = _train(config, plan, images, RunDir(config.output, holder.fence), launched_at)
        holder.done()
    return result


def _finished(config: TrainTokenizerConfig, plan: TokenizerPlan) -> TrainTokenizerResult | None:
    manifest = tokenizer_store.read_manifest(config.output)
    if manifest is None:
        return None
    require_same(manifest["source"], config, plan)
    tokenizer_store.check_files(config.output, manifest)
    if storage.exists(RunDir(config.output).at("run.json")):
        return None  # killed between the tokenizer and its record: that is to be made up for
    return _result(config.output, manifest, already_done=True)


def _train(
    config: TrainTokenizerConfig,
    plan: TokenizerPlan,
    images: ImageTable,
    run_dir: RunDir,
    launched_at: float,
) -> TrainTokenizerResult:
    """Training, and what becomes of it."""
    # Who had the lease before may have finished the tokenizer.
    if (done := _finished(config, plan)) is not None:
        return done
    inputs = [Dataset.of_table("image_table", images, "training")]
    if config.teacher:
        digest = plan.source["teacher"]["weights"]
        inputs.append(Dataset(name="weights", uri=config.teacher, digest=digest, context="teacher"))
    manifest = tokenizer_store.read_manifest(config.output)
    already_done = manifest is not None
    if manifest is None:
        # Until the tokenizer is finished its directory is a run's: new, this run's, or another's.
        begin(run_dir, config, plan)
    with driver.start_tracking(config, run_dir, stage=STAGE, inputs=inputs) as tracked:
        if manifest is None:
            loop = train_loop if config.model.trained else place_loop
            driver.train(loop, config, plan, run_dir, tracked, stage=STAGE, launched_at=launched_at)
            manifest = tokenizer_store.read_manifest(config.output)
        assert manifest is not None, "the end of the loop writes it"
        tracked.set_output(
            Dataset(name="tokenizer", uri=config.output, digest=manifest["fingerprint"])
        )
        tracked.set_note(_result(config.output, manifest, already_done=False).summary())
    if driver.is_recorded(config, run_dir):  # else the same command, or `beit sync`, records it
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
    order = make_order(config, images.row_groups.sizes)
    policy = view_policy(config.views, seed=config.seed)

    # Set-up: the network, at the start or at the newest whole checkpoint.
    resumed = resume_point(log.run.checkpoints, world, rejected=log.checkpoint_rejected)
    tokenizer = build_tokenizer(config.model, seed=config.seed)
    if resumed is None and first:  # the other workers are sent its weights
        start_codebook(tokenizer, config, images, device)
    tokenizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = build_learner(tokenizer, config, order, world)
    optimizer = torch.optim.AdamW(
        learner.parameter_groups(config.optim.weight_decay),
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
    )
    model = wrap_model(learner, world, strategy="ddp", compiled=config.scaling.compile)
    parameters = list(learner.trained.parameters())
    if resumed is not None:
        restore(learner.trained, optimizer, resumed.weights, resumed.moments)
        learner.restore(resumed.weights)
    step = log.start(resumed.step if resumed else None)
    autocast = functools.partial(
        torch.autocast, world.device.type, torch.bfloat16, enabled=uses_bfloat16(config, world)
    )
    saver = Saver(
        log.run.checkpoints,
        keep=config.checkpoint.keep,
        asynchronous=True,
        failed=log.checkpoint_failed,
        check=log.run.check,
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
        metrics = StepMetrics(config.log_every, learner.terms, tokenizer.vocab_size, world.device)
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
            with autocast():
                prepared = learner.prepare(pixels, step)
            with autocast():  # another one: it remembers casts, also those without a gradient
                outcome = model(pixels, *prepared)
            loss = outcome.loss / world.size  # gradients are summed over the workers
            loss.backward()
            metrics.add(loss, outcome.terms * len(pixels), outcome.codes, len(pixels))
            grad_norm = clip_gradients(parameters, config.optim.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learner.after_step(outcome, step)
            metrics.close_step(grad_norm, host.row_ids.numpy())
            step += 1

            # Also at checkpoints: a run that goes on from one begins its next period there.
            at_checkpoint = step % config.checkpoint.every_steps == 0 or step == total
            ending = leaving = False
            if step % config.log_every == 0 or at_checkpoint:
                elapsed, wait = books.pace()
                period = metrics.reduce(world, first_step=period_start)
                images_done = (step - period_start) * config.data.global_batch_size
                tracked = {
                    **period.means,
                    "grad_norm_max": float(np.max(period.grad_norms)),
                    "codes_used": period.codes_used or 0,
                    "perplexity": period.perplexity or 0.0,
                    **learner.figures(pixels, step - 1),
                    "lr": learning_rate(config, step - 1),
                    "images_per_second": images_done / elapsed,
                    "data_wait_share": wait / elapsed,
                }
                shown = {
                    "loss": f"{tracked['loss']:.4f}",
                    "codes": f"{tracked['codes_used']:g}",
                    "perplexity": f"{tracked['perplexity']:.1f}",
                }
                log.period(step - 1, {**period.per_step(), **tracked}, shown)
                check_health(tracked, step, config)
                period_start = step
                ending = step < total and log.end_requested(world)
                leaving = step < total and log.node_leaving(world, step)
            if at_checkpoint or ending or leaving:
                with books.spend("checkpoint"):
                    weights, moments = snapshot(learner.trained, optimizer, keep=first)
                    if first:
                        weights |= learner.state()
                        saver.save(
                            Checkpoint(step=step, weights=weights, moments=moments, state={})
                        )
                        log.flush()
            if ending:
                with books.spend("checkpoint"):
                    raise stop_requested(saver, step, total, world)

        # The end: what was learnt becomes the tokenizer, if it is good enough.
        with books.spend("checkpoint"):
            saver.wait()
        if first:
            conclude(learner.finish(), images, config, plan, log, device=device)


def place_loop(
    config: TrainTokenizerConfig, plan: TokenizerPlan, world: World, log: TrainLog
) -> None:
    """The making of a tokenizer that needs no training, by worker 0, as the only step.

    Raises:
        StageFailed: collapse.
    """
    log.start(None)
    if world.rank > 0:
        return
    device = str(world.device)
    images = ImageTable.open(config.images)
    log.books.switch("compute")
    tokenizer = build_tokenizer(config.model, seed=config.seed)
    start_codebook(tokenizer, config, images, device)
    card = conclude(tokenizer, images, config, plan, log, device=device)
    figures = {"codes_used": card.tokens.codes_used, "perplexity": card.tokens.perplexity}
    shown = {name: f"{value:.6g}" for name, value in figures.items()}
    log.period(0, figures, shown)


def _result(output: str, manifest: dict[str, Any], *, already_done: bool) -> TrainTokenizerResult:
    return TrainTokenizerResult(
        output=output,
        fingerprint=manifest["fingerprint"],
        scorecard=manifest["scorecard"],
        already_done=already_done,
    )
