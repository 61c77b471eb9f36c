"""Fine-tuning: a pretrained network and labelled images to a classifier, on any number of workers.

`run` is the driver: it checks the inputs, plans, opens the run directory and has `train_loop` done
by Ray Train workers, or right here for `scaling.num_workers = 0`. `train_loop` is the training of
one worker, in the order in which things happen. A finished run may be what the next one begins
with: intermediate fine-tuning is this stage twice. See docs/finetune.md.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from beit.classifier import BeitClassifier, Classification
from beit.optim import parameter_groups
from beit.vit import drop_path_noise
from beit.weights import save_weights
from pipelines.config.finetune import MAY_CHANGE, FinetuneConfig
from pipelines.steps import ray_is_there
from pipelines.training.distributed import (
    World,
    autocast,
    check_device,
    resolve_precision,
    without_sync,
    wrap_model,
)
from pipelines.training.finetuning import (
    FinetunePlan,
    FinetuneResult,
    build_classifier,
    input_datasets,
    plan_run,
    test_images,
    with_absolute_uris,
)
from pipelines.training.health import HealthMonitor
from pipelines.training.labelled import LabelledData
from pipelines.training.log import TrainLog
from pipelines.training.loop import LoopState
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.testing import TestScore, run_test
from pipelines.training.update import adamw, set_rates, update
from pipelines.training.weights_run import train_to_weights

STAGE = "finetune"


def run(config: FinetuneConfig, *, start_ray: Callable[[], None] = ray_is_there) -> FinetuneResult:
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

    return train_to_weights(
        train_loop,
        config,
        plan,
        FinetuneResult,
        uri=config.output,
        inputs=input_datasets(config, plan, tables, source),
        stage=STAGE,
        may_change=MAY_CHANGE,
        launched_at=launched_at,
        start_ray=start_ray,
    )


# One function on purpose: a reader follows the training from top to bottom.
def train_loop(  # noqa: PLR0915
    config: FinetuneConfig, plan: FinetunePlan, world: World, log: TrainLog
) -> None:
    """The training of one worker, see `driver.Loop`. Every worker runs it; worker 0 also writes.

    Raises:
        StageFailed: a health check stopped the run; on all workers at once.
    """
    books = log.books

    # --- Set-up: what do I train on, what do I train.
    precision = resolve_precision(config.scaling, world)
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
        classification,
        world,
        strategy=config.scaling.strategy,
        compiled=config.scaling.compile,
        precision=precision,
    )
    decay, layer_decay = config.optim.weight_decay, config.optim.layer_decay
    optimizer = adamw(parameter_groups(network, decay, layer_decay=layer_decay), config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    monitor = HealthMonitor(config.health, judged_from=plan.warmup_steps, unigram_accuracy=None)
    metrics = StepMetrics(config.log_every, classification.metrics, None, world.device)

    # --- Resume point: the newest checkpoint that is whole, or a first one.
    with LoopState(
        config,
        plan,
        world,
        log,
        data=data,
        model=network,
        optimizer=optimizer,
        monitor=monitor,
        metrics=metrics,
        precision=precision,
    ) as state:
        if state.fresh:
            begun = f"is fresh: {plan.why_fresh}" if plan.why_fresh else "of the weights goes on"
            log.event("head", kept=plan.keep_head, message=f"the head {begun}")
        batches = data.batches(state.segments())

        # --- The steps.
        while state.step < plan.total_steps:
            with books.spend("data_wait"):
                batch = next(batches)
            rates = set_rates(optimizer, config.optim, plan, state.step)

            # Forward and backward. Each micro-batch contributes its share of the global mean.
            noise = data.my_rows(
                drop_path_noise(
                    seed=config.seed,
                    step=state.step,
                    num_samples=config.data.global_batch_size,
                    num_branches=network.depth,
                )
            )
            for part in batch.parts:
                with (
                    without_sync(wrapped, last=part is batch.parts[-1]),
                    autocast(world, precision),
                ):
                    sums = wrapped(part.pixels, part.labels, part.shares, noise=noise[part.rows])
                    loss = sums[0] / config.data.global_batch_size
                state.scaler.scale(loss).backward()
                metrics.add(loss, sums, None, 0 if data.idle else len(part.pixels))
            norm = update(optimizer, state.scaler, parameters, config.optim.clip_grad_norm)
            metrics.close_step(norm, batch.row_ids)
            state.step += 1

            # Log, at the end of a period.
            at_test = not state.at_end and state.due(plan.test_every_steps)
            if not (state.at_log or (test and at_test)):
                continue
            period = state.end_period()
            state.tell(period, rates, accuracy=period.means["train_accuracy"])

            # Health: back to a checkpoint, or the end, if something is badly wrong.
            if state.judge(period):
                batches = data.batches(state.segments())
                continue

            # Checkpoint, also where the run was asked to end.
            state.checkpoint()

            if test and at_test:
                run_test(config, test, network, data, world, log, state.step, precision=precision)

        # --- The end: the test that counts, weights, and nothing left in flight.
        score = None
        if test:
            score = run_test(
                config, test, network, data, world, log, state.step, precision=precision
            )
        with books.spend("checkpoint"):
            weights = state.weights()
            if world.rank == 0:
                with log.run.new_weights() as folder:
                    save_classifier(plan, network, weights, score, folder)
            state.saver.wait()
        world.barrier()


def save_classifier(
    plan: FinetunePlan,
    network: BeitClassifier,
    weights: dict[str, Tensor],
    score: TestScore | None,
    directory: str,
) -> None:
    """The classifier as later stages load it, into a local directory."""
    whole = BeitClassifier(**network.config())
    whole.load_state_dict(weights, strict=True)
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
