"""Masked image modelling on cached visual tokens, on any number of workers, resumable exactly.

`run` is the driver: it checks the inputs, plans, opens the run directory and has `train_loop` done
by Ray Train workers, or right here for `scaling.num_workers = 0`. `train_loop` is the training of
one worker, in the order in which things happen. See docs/pretrain.md.
"""

import copy
import time
from collections.abc import Callable

import torch

from beit.optim import parameter_groups
from beit.vit import drop_path_noise
from pipelines.config.pretrain import MAY_CHANGE, PretrainConfig, run_uri
from pipelines.steps import ray_is_there
from pipelines.tracking import Dataset
from pipelines.training.data import WorkerData
from pipelines.training.distributed import (
    World,
    autocast,
    check_device,
    resolve_precision,
    unsharded,
    without_sync,
    wrap_model,
)
from pipelines.training.fixed_images import FixedImages
from pipelines.training.health import HealthMonitor
from pipelines.training.log import TrainLog
from pipelines.training.loop import LoopState
from pipelines.training.objective import build_objective, warm_start
from pipelines.training.pretraining import (
    PretrainPlan,
    PretrainResult,
    input_datasets,
    plan_run,
    with_absolute_uris,
)
from pipelines.training.probing import Prober
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.update import adamw, set_rates, update
from pipelines.training.weights import save_encoder
from pipelines.training.weights_run import train_to_weights

STAGE = "pretrain"


def run(config: PretrainConfig, *, start_ray: Callable[[], None] = ray_is_there) -> PretrainResult:
    """Trains to the configured number of steps, continuing what the run directory holds.

    Raises:
        InputError: a value, table or fingerprint does not fit; names it.
        StageFailed: a health check stopped the run, or the workers failed too often.
    """
    launched_at = time.time()

    # Everything that can be refused is refused before anything is written.
    check_device(config.scaling)
    config = with_absolute_uris(config)
    tables, plan = plan_run(config)

    inputs = input_datasets(config, tables)
    if config.init:
        inputs.append(Dataset(name="weights", uri=config.init, digest=plan.fingerprints["init"]))
    return train_to_weights(
        train_loop,
        config,
        plan,
        PretrainResult,
        uri=run_uri(config),
        inputs=inputs,
        stage=STAGE,
        may_change=MAY_CHANGE,
        launched_at=launched_at,
        start_ray=start_ray,
    )


# One function on purpose: a reader follows the training from top to bottom.
def train_loop(  # noqa: PLR0915
    config: PretrainConfig, plan: PretrainPlan, world: World, log: TrainLog
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
    data = WorkerData(config, world)
    vocabulary = plan.vocabulary
    vocab_size = None if vocabulary is None else vocabulary.size
    objective = build_objective(config, vocab_size)
    if config.init:
        warm_start(config, objective.network)
    strategy, compiled = config.scaling.strategy, config.scaling.compile
    spare = copy.deepcopy(objective) if strategy == "fsdp" else None
    objective = objective.to(world.device)
    model = objective.network  # what is optimised and checkpointed
    wrapped = wrap_model(
        objective, world, strategy=strategy, compiled=compiled, precision=precision
    )
    optimizer = adamw(parameter_groups(model, config.optim.weight_decay), config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    monitor = HealthMonitor(
        config.health,
        judged_from=plan.warmup_steps + config.health.grace_steps,
        unigram_accuracy=None if vocabulary is None else vocabulary.unigram_accuracy,
    )
    metrics = StepMetrics(config.log_every, objective.metrics, vocab_size, world.device)

    # --- Resume point: the newest checkpoint that is whole, or a first one.
    with LoopState(
        config,
        plan,
        world,
        log,
        data=data,
        model=model,
        optimizer=optimizer,
        monitor=monitor,
        metrics=metrics,
        precision=precision,
    ) as state:
        fixed = FixedImages(config, data, world)
        prober = Prober(config, data, world, fixed, first_step=state.step)
        batches = data.batches(state.segments())

        def look(*, at_probe: bool, at_pictures: bool) -> None:
            if not (at_probe or at_pictures):
                return
            with unsharded(objective, spare) as seen:
                if at_probe:
                    prober.run(seen, log, state.step)
                if at_pictures:
                    fixed.log_pictures(seen, log, state.step)
                    prober.log_curve(log, state.step)

        # Who was killed after the last checkpoint may not have come to what follows it.
        if state.at_end:
            with books.spend("evaluation"):
                at_probe = config.probe.every_steps > 0 and not prober.told(log, state.step)
                look(at_probe=at_probe, at_pictures=True)

        # --- The steps.
        while state.step < plan.total_steps:
            with books.spend("data_wait"):
                batch = next(batches)
            rates = set_rates(optimizer, config.optim, plan, state.step)

            # Forward and backward. Each micro-batch contributes its share of the global mean over
            # masked patches, so neither workers nor micro-batches with fewer of them weigh more.
            masked = world.sum(torch.full((), float(batch.num_masked), device=world.device))
            noise = data.my_rows(
                drop_path_noise(
                    seed=config.seed,
                    step=state.step,
                    num_samples=config.data.global_batch_size,
                    num_branches=objective.num_branches,
                )
            )
            for part in batch.parts:
                with (
                    without_sync(wrapped, last=part is batch.parts[-1]),
                    autocast(world, precision),
                ):
                    outcome = wrapped(
                        data.normalise(part.pixels),
                        part.mask,
                        part.targets,
                        num_masked=part.num_masked,
                        noise=noise[part.rows],
                    )
                    loss = outcome.sums[0] / masked.clamp(min=1)
                state.scaler.scale(loss).backward()
                metrics.add(loss, outcome.sums, outcome.codes, part.num_masked)
            norm = update(optimizer, state.scaler, parameters, config.optim.clip_grad_norm)
            metrics.close_step(norm, batch.row_ids)
            state.step += 1

            # Log, at the end of a period.
            at_probe = config.probe.every_steps > 0 and state.due(config.probe.every_steps)
            at_pictures = state.due(config.pictures_every)
            if not (state.at_log or at_probe or at_pictures):
                continue
            period = state.end_period()
            figures = {**rates, "masked_patches": period.items}
            if vocabulary is not None and period.perplexity is not None:
                figures["predicted_perplexity"] = period.perplexity
                figures["unigram_accuracy"] = vocabulary.unigram_accuracy
            state.tell(period, figures, accuracy=period.means.get("mim_accuracy"))

            # Health: back to a checkpoint, or the end, if something is badly wrong.
            if state.judge(period):
                batches = data.batches(state.segments())
                continue

            # Checkpoint, also where the run was asked to end.
            state.checkpoint()

            # Asked first: a sharded network is gathered for what is done only.
            with books.spend("evaluation"):
                at_probe = at_probe and prober.affordable(state.step)
                look(at_probe=at_probe, at_pictures=at_pictures)
        prober.tell_left_out(log, state.step)

        # --- The end: the encoder as later stages load it, and nothing left in flight.
        with books.spend("checkpoint"):
            weights = state.weights()
            if world.rank == 0:
                prints, steps = plan.fingerprints, plan.total_steps
                with log.run.new_weights() as folder:
                    save_encoder(
                        config, objective, weights, folder, fingerprints=prints, steps=steps
                    )
            state.saver.wait()
        world.barrier()
