"""Fine-tuning: a pretrained network and labelled images to a classifier, on any number of workers.

`run` is the driver: it checks the inputs, plans, opens the run directory and has `train_loop` done
by Ray Train workers, or right here for `scaling.num_workers = 0`. `train_loop` is the training of
one worker, in the order in which things happen. A finished run may be what the next one begins
with: intermediate fine-tuning is this stage twice. See docs/finetune.md.
"""

import contextlib
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from beit.classifier import BeitClassifier, Classification
from beit.optim import parameter_groups
from beit.schedules import warmup_cosine
from beit.vit import drop_path_noise
from beit.weights import save_weights
from pipelines import lease, storage
from pipelines.config.finetune import MAY_CHANGE, FinetuneConfig
from pipelines.errors import StageFailed
from pipelines.tables.weights_store import weights_fingerprint
from pipelines.tracking import Dataset
from pipelines.training import driver, goodput
from pipelines.training.checkpoint import Checkpoint, Saver
from pipelines.training.distributed import (
    World,
    check_device,
    clip_gradients,
    resolve_precision,
    snapshot,
    without_sync,
    wrap_model,
)
from pipelines.training.finetuning import (
    FinetunePlan,
    FinetuneResult,
    build_classifier,
    input_datasets,
    plan_run,
    result_of,
    test_images,
    with_absolute_uris,
)
from pipelines.training.health import HealthMonitor
from pipelines.training.labelled import LabelledData
from pipelines.training.log import TrainLog
from pipelines.training.recovery import checkpoint_state, resume, roll_back
from pipelines.training.run_dir import RunDir
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.stopping import stop_requested
from pipelines.training.testing import TestScore, run_test

STAGE = "finetune"


def run(config: FinetuneConfig) -> FinetuneResult:
    """Trains to the configured number of steps, continuing what the run directory holds.

    Raises:
        InputError: a value, table, fingerprint or the weights do not fit; names it.
        StageFailed: a health check stopped the run, or the workers failed too often.
    """
    launched_at = time.time()
    check_device(config.scaling)

    # Everything that can be refused is refused before anything is written.
    config = with_absolute_uris(config)
    tables, source, plan = plan_run(config)

    # The run directory: new, this run's, or another's; then ours alone.
    run_dir = RunDir(config.output)
    run_dir.holds(config, plan.fingerprints, may_change=MAY_CHANGE)
    done = run_dir.finished_report(plan.total_steps)
    if done is not None and driver.is_recorded(config, run_dir):
        return result_of(run_dir, done, resumed_from=plan.total_steps)
    inputs = input_datasets(config, plan, tables, source)
    with lease.held(run_dir.uri, config.lease, stage=STAGE) as holder:
        run_dir = RunDir(run_dir.uri, holder.fence)
        result = _train(config, plan, inputs, run_dir, launched_at)
        holder.done()
    return result


def _train(
    config: FinetuneConfig,
    plan: FinetunePlan,
    inputs: Sequence[Dataset],
    run_dir: RunDir,
    launched_at: float,
) -> FinetuneResult:
    """Training, and what becomes of it."""
    run_dir.begin(config, plan.fingerprints, may_change=MAY_CHANGE)
    # Who had the lease before may have finished the run.
    done = run_dir.finished_report(plan.total_steps)
    before = driver.newest_step(run_dir) if done is None else plan.total_steps
    if done is not None and driver.is_recorded(config, run_dir):
        return result_of(run_dir, done, resumed_from=before)
    with driver.start_tracking(config, run_dir, stage=STAGE, inputs=inputs) as tracked:
        # A run that was done before it was recorded is recorded now.
        report = done or driver.train(
            train_loop, config, plan, run_dir, tracked, stage=STAGE, launched_at=launched_at
        )
        result = result_of(run_dir, report, resumed_from=before)
        tracked.set_note(result.summary())
        identity = weights_fingerprint(run_dir.weights)
        tracked.set_output(Dataset(name="weights", uri=run_dir.weights, digest=identity))
        tracked.log_weights(run_dir.weights, registered_model_name=config.tracking.registered_model)
    return result


# One function on purpose: a reader follows the training from top to bottom.
def train_loop(  # noqa: PLR0912, PLR0915
    config: FinetuneConfig, plan: FinetunePlan, world: World, log: TrainLog
) -> None:
    """The training of one worker, see `driver.Loop`. Every worker runs it; worker 0 also writes.

    Raises:
        StageFailed: a health check stopped the run; on all workers at once.
    """
    run_dir, books = log.run, log.books

    # --- Set-up: what do I train on, what do I train.
    precision = resolve_precision(config.scaling, world.device)
    low_precision = precision == "bf16"
    if config.scaling.tf32 and world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    data = LabelledData(
        config,
        world,
        image_size=plan.image_size,
        grid_size=plan.grid_size,
        mean=plan.mean,
        std=plan.std,
    )
    test = test_images(config, plan)
    classification = Classification(
        build_classifier(config, plan), label_smoothing=config.mixing.label_smoothing
    ).to(world.device)
    network = classification.network  # what is optimised and checkpointed
    wrapped = wrap_model(
        classification, world, strategy=config.scaling.strategy, compiled=config.scaling.compile
    )
    optimizer = build_optimizer(config, network)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    monitor = HealthMonitor(config.health, judged_from=plan.warmup_steps, unigram_accuracy=None)
    metrics = StepMetrics(config.log_every, classification.metrics, None, world.device)
    peak_tflops = log.peak(config.scaling.peak_tflops)

    # --- Resume point: the newest checkpoint that is whole.
    found = resume(log, world, network, optimizer, monitor)
    skips = world.broadcast(run_dir.skips() if world.rank == 0 else None)
    step = log.start(found)
    saver = Saver(
        run_dir.checkpoints,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        failed=log.checkpoint_failed,
        check=run_dir.check,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(saver.close)
        stack.callback(data.close)

        def save(at: int) -> None:
            weights, moments = snapshot(network, optimizer, keep=world.rank == 0)
            if world.rank == 0:
                state = checkpoint_state(config, plan.fingerprints, monitor, skips, precision)
                saver.save(Checkpoint(step=at, weights=weights, moments=moments, state=state))
                log.flush()

        def tested(at: int) -> TestScore | None:
            if test is None:
                return None
            with books.spend("evaluation"):
                return run_test(
                    config, test, network, data, world, log, at, low_precision=low_precision
                )

        if found is None:
            begun = f"is fresh: {plan.why_fresh}" if plan.why_fresh else "of the weights goes on"
            log.event("head", kept=plan.keep_head, message=f"the head {begun}")
            with books.spend("checkpoint"):
                save(step)
        batches = data.batches(skips.segments(step, plan.total_steps))
        period_start, first_period = step, True
        books.switch("compute")
        books.pace()

        # --- The steps.
        while step < plan.total_steps:
            with books.spend("data_wait"):
                batch = next(batches)

            # Learning rate: a pure function of the step, lower in each layer than in the next.
            lr = warmup_cosine(
                step,
                total_steps=plan.total_steps,
                warmup_steps=plan.warmup_steps,
                peak=config.optim.lr,
                final=config.optim.min_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # Forward and backward. Each micro-batch contributes its share of the global mean.
            noise = data.my_rows(
                drop_path_noise(
                    seed=config.seed,
                    step=step,
                    num_samples=config.data.global_batch_size,
                    num_branches=network.depth,
                )
            )
            for part in batch.parts:
                with (
                    without_sync(wrapped, last=part is batch.parts[-1]),
                    torch.autocast(world.device.type, torch.bfloat16, low_precision),
                ):
                    sums = wrapped(
                        part.pixels,
                        part.labels,
                        part.shares,
                        noise=noise[part.rows],
                    )
                    loss = sums[0] / config.data.global_batch_size
                loss.backward()
                metrics.add(loss, sums, None, 0 if data.idle else len(part.pixels))

            # Clip and step. An update with a gradient that is not finite is left out on the
            # device itself, so nothing has to be waited for and no weight is ever lost to it.
            norm = clip_gradients(parameters, config.optim.clip_grad_norm)
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.close_step(norm, batch.row_ids)
            step += 1

            # Log, at the end of a period.
            at_end = step == plan.total_steps
            at_checkpoint = at_end or step % config.checkpoint.every_steps == 0
            at_test = test is not None and not at_end and step % plan.test_every_steps == 0
            if not (step % config.log_every == 0 or at_checkpoint or at_test):
                continue
            period = metrics.reduce(world, first_step=period_start)
            elapsed, wait = books.pace()
            wait_share = world.largest(wait / elapsed if elapsed > 0 else 0.0)
            images_per_second = (step - period_start) * config.data.global_batch_size / elapsed
            tracked = {
                **period.means,
                "lr": lr,
                "grad_norm": period.grad_norms[-1],
                "images_per_second": images_per_second,
                "data_wait_share": wait_share,
                **goodput.model_flops_utilisation(
                    images_per_second, plan.flops_per_image, world.size, peak_tflops
                ),
                "epoch": skips.position(step - 1) / plan.steps_per_epoch,
            }
            shown = {
                "loss": f"{period.means['loss']:.3f}",
                "accuracy": f"{period.means['train_accuracy']:.3f}",
                "img/s": f"{images_per_second:.0f}",
                "wait": f"{wait_share:.0%}",
            }
            log.period(step - 1, {**period.per_step(), **tracked}, shown)

            # Health: the same findings on every worker, for all see the same sums. The first
            # period after a start fills the read-ahead, so its waiting is not judged.
            judged_wait = 0.0 if first_period else wait_share
            findings = monitor.check(period, data_wait_share=judged_wait)
            period_start, first_period = step, False
            findings = [data.explain(finding, elapsed) for finding in findings]
            data.start_period()
            for finding in monitor.news(findings, step - 1):
                log.finding(finding)
            severe = findings[0] if findings and findings[0].action != "warn" else None
            if severe and severe.action == "rollback":
                if len(skips.entries) < config.health.max_rollbacks:
                    with books.spend("restart"):
                        step, skips = roll_back(
                            log, world, network, optimizer, monitor, saver, skips, step
                        )
                        batches = data.batches(skips.segments(step, plan.total_steps))
                        period_start, first_period = step, True
                    continue
                severe = severe.stopping("health.max_rollbacks is reached")
            if severe:
                raise StageFailed(severe.message)

            # Checkpoint, also where the run was asked to end: here, on all workers.
            ending = not at_end and log.end_requested(world)
            leaving = not at_end and log.node_leaving(world, step)
            if at_checkpoint or ending or leaving:
                with books.spend("checkpoint"):
                    save(step)
            if ending:
                with books.spend("checkpoint"):
                    raise stop_requested(saver, step, plan.total_steps, world)
            if at_test:
                tested(step)

        # --- The end: the test that counts, weights, and nothing left in flight.
        score = tested(step)
        with books.spend("checkpoint"):
            weights, _ = snapshot(network, optimizer, keep=world.rank == 0)
            if world.rank == 0:
                write_weights(plan, run_dir, network, weights, score)
            saver.wait()
        world.barrier()


def build_optimizer(config: FinetuneConfig, network: BeitClassifier) -> torch.optim.AdamW:
    """Fused AdamW with the groups of the official code, a learning rate for each layer."""
    optim = config.optim
    return torch.optim.AdamW(
        parameter_groups(network, optim.weight_decay, layer_decay=optim.layer_decay),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def write_weights(
    plan: FinetunePlan,
    run_dir: RunDir,
    network: BeitClassifier,
    weights: dict[str, Tensor],
    score: TestScore | None,
) -> None:
    """`weights/`: the classifier as later stages load it."""
    whole = BeitClassifier(**network.config())
    whole.load_state_dict(weights, strict=True)
    with tempfile.TemporaryDirectory() as directory:
        save_weights(
            whole,
            directory,
            extra={
                "pixel_mean": list(plan.mean),
                "pixel_std": list(plan.std),
                "class_names": list(plan.class_names),
                "fingerprints": dict(plan.fingerprints),
                "steps": plan.total_steps,
                **({} if score is None else {"test": score.to_dict()}),
            },
        )
        run_dir.check()
        storage.store_dir(directory, run_dir.weights, last="config.json")
