"""Masked image modelling on cached visual tokens, on any number of workers, resumable exactly.

`run` is the driver: it checks the inputs, opens the run directory and starts `train_loop` on Ray
Train workers, or right here for `scaling.num_workers = 0`. `train_loop` is the training job, in
the order in which things happen. See docs/pretrain.md.
"""

import contextlib
import itertools
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.mim import BeitMIM
from beit.optim import parameter_groups
from beit.schedules import warmup_cosine
from beit.vit import drop_path_noise
from beit.weights import save_weights
from pipelines import storage
from pipelines.config.pretrain import PretrainConfig, to_dict
from pipelines.training import goodput
from pipelines.training.checkpoint import Checkpoint, Saver, discard, load, load_newest
from pipelines.training.data import WorkerData
from pipelines.training.distributed import (
    World,
    clip_gradients,
    join_world,
    restore,
    snapshot,
    without_sync,
    wrap_model,
)
from pipelines.training.goodput import Books
from pipelines.training.health import HealthMonitor
from pipelines.training.launch import WORKER_FAILED, Plan, Result, launch
from pipelines.training.log import StepMetrics, TrainLog, to_period
from pipelines.training.probing import log_pictures, run_probe
from pipelines.training.run_dir import RunDir, Skips, open_run

# Starts from the same checkpoint, none of which reached the next one, before a run gives up.
MAX_FRUITLESS_STARTS = 4


def run(config: PretrainConfig) -> Result:
    """Trains to the configured number of steps, continuing what the run directory holds.

    Raises:
        InputError: a value, table or fingerprint does not fit; names it.
        StageFailed: a health check stopped the run, or the workers failed too often.
    """
    return launch(config, train_loop)


# One function on purpose: a reader follows the training from top to bottom.
def train_loop(  # noqa: PLR0912, PLR0915
    config: PretrainConfig, plan: Plan, *, in_ray: bool
) -> None:
    """The training job of one worker. Every worker runs it; worker 0 also writes.

    Ends by itself when the run is done or stopped, and says which in its attempt record. An
    exception means that this start failed and another may help.
    """
    entered_at, books = time.time(), Books()

    # --- Set-up: who am I, what do I train on, what do I train.
    world = join_world(use_gpu=config.scaling.use_gpu, in_ray=in_ray)
    precision = resolve_precision(config, world.device)
    if config.scaling.tf32 and world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    run_dir = open_run(config)
    data = WorkerData(config, world)
    model = build_model(config, plan.vocab_size).to(world.device)
    network = wrap_model(
        model, world, strategy=config.scaling.strategy, compiled=config.scaling.compile
    )
    optimizer = build_optimizer(config, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    monitor = HealthMonitor(
        config.health,
        judged_from=plan.warmup_steps + config.health.grace_steps,
        unigram_accuracy=plan.unigram_accuracy,
    )
    metrics = StepMetrics(config.log_every, plan.vocab_size, world.device)
    peak_tflops = device_peak(config, world.device)

    # --- Resume point: the newest checkpoint that is whole.
    step, rejected = resume(run_dir, world, model, optimizer, monitor)
    skips = world.broadcast(run_dir.skips() if world.rank == 0 else None)
    log = TrainLog(
        run_dir,
        tracking_uri=plan.tracking_uri,
        mlflow_run_id=plan.mlflow_run_id,
        books=books,
        entered_at=entered_at,
        launched_at=plan.launched_at,
        start_step=step or 0,
        world=world,
    )
    for at_step, reason in rejected:
        log.event("checkpoint_rejected", at_step=at_step, message=reason)
    saver = Saver(
        run_dir.checkpoints,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        failed=lambda at, reason: log.event("checkpoint_failed", at_step=at, message=reason),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        stack.callback(saver.close)
        stack.callback(data.close)

        def save(at: int) -> None:
            weights, moments = snapshot(model, optimizer, keep=world.rank == 0)
            if world.rank == 0:
                state = checkpoint_state(config, plan, monitor, skips, precision)
                saver.save(Checkpoint(step=at, weights=weights, moments=moments, state=state))
                log.flush()

        if step is None:
            step = 0
            with books.spend("checkpoint"):
                save(0)
        else:
            log.event("resumed", step=step, workers=world.size, message=f"continues at step {step}")
        reason = world.broadcast(hopeless(run_dir, plan.launched_at, step) if log.active else "")
        if reason:
            log.write_attempt(step, outcome="stopped", message=reason)
            return
        batches = data.batches(skips.segments(step, plan.total_steps))
        period_start, first_period = step, True
        books.switch("compute")
        booked = books.seconds()

        # --- The steps.
        while step < plan.total_steps:
            with books.spend("data_wait"):
                batch = next(batches)

            # Learning rate: a pure function of the step.
            lr = warmup_cosine(
                step,
                total_steps=plan.total_steps,
                warmup_steps=plan.warmup_steps,
                peak=config.optim.lr,
                final=config.optim.min_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # Forward and backward. Each micro-batch contributes its share of the global mean over
            # masked patches, so neither workers nor micro-batches with fewer of them weigh more.
            masked = world.sum(torch.tensor(float(batch.num_masked), device=world.device))
            noise = data.my_rows(
                drop_path_noise(
                    seed=config.seed,
                    step=step,
                    num_samples=config.data.global_batch_size,
                    depth=config.model.depth,
                )
            )
            for part in batch.parts:
                with (
                    without_sync(network, last=part is batch.parts[-1]),
                    torch.autocast(world.device.type, torch.bfloat16, precision == "bf16"),
                ):
                    logits = network(
                        data.normalise(part.pixels),
                        part.mask,
                        num_masked=part.num_masked,
                        noise=noise[part.rows].to(world.device, non_blocking=True),
                    )
                    loss = F.cross_entropy(logits.float(), part.targets, reduction="sum")
                    loss = loss / masked.clamp(min=1)
                loss.backward()  # type: ignore[no-untyped-call]
                metrics.add(loss.detach(), logits.detach(), part.targets)

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
            at_probe = bool(config.probe.images) and (
                at_end or step % config.probe.every_steps == 0
            )
            at_pictures = at_end or (
                config.pictures_every > 0 and step % config.pictures_every == 0
            )
            at_log = step % config.log_every == 0
            if not (at_log or at_checkpoint or at_probe or at_pictures):
                continue
            values = metrics.reduce(world)
            before, booked = booked, books.seconds()
            wait = booked["data_wait"] - before["data_wait"]
            elapsed = booked["compute"] - before["compute"] + wait
            wait_share = world.largest(wait / elapsed if elapsed > 0 else 0.0)
            images_per_second = (step - period_start) * config.data.global_batch_size / elapsed
            tracked = {
                "loss": values["loss"],
                "mim_accuracy": values["mim_accuracy"],
                "unigram_accuracy": plan.unigram_accuracy,
                "lr": lr,
                "grad_norm": values["grad_norms"][-1],
                "predicted_perplexity": values["predicted_perplexity"],
                "images_per_second": images_per_second,
                "data_wait_share": wait_share,
                "mfu": goodput.model_flops_utilisation(
                    images_per_second, plan.flops_per_image, world.size, peak_tflops
                ),
                "epoch": skips.position(step - 1) / plan.steps_per_epoch,
            }
            log.period(step - 1, {**values, **tracked, "first_step": period_start}, tracked)

            # Health: the same findings on every worker, for all see the same sums. The first
            # period after a start fills the read-ahead, so its waiting is not judged.
            findings = monitor.check(
                to_period(period_start, values, 0.0 if first_period else wait_share)
            )
            period_start, first_period = step, False
            findings = [data.explain(finding, elapsed) for finding in findings]
            data.start_period()
            for finding in findings:
                log.finding(finding)
            severe = findings[0] if findings and findings[0].action != "warn" else None
            if severe and severe.action == "rollback":
                if len(skips.entries) < config.health.max_rollbacks:
                    with books.spend("restart"):
                        world.broadcast(saver.wait() if world.rank == 0 else None)
                        back, _ = resume(run_dir, world, model, optimizer, monitor)
                        assert back is not None, "a checkpoint is made before the first step"
                        skipped = skips.position(step) - skips.position(back)
                        skips = skips.add(from_step=back, batches=skipped)
                        if world.rank == 0:
                            run_dir.write_skips(skips)
                        log.rewind(back)
                        log.event(
                            "rolled_back",
                            step=step,
                            to_step=back,
                            skipped_batches=skipped,
                            message=f"back to step {back}; {skipped} batches are skipped",
                        )
                        batches = data.batches(skips.segments(back, plan.total_steps))
                        step = period_start = back
                        first_period = True
                    continue
                severe = severe.stopping("health.max_rollbacks is reached")
            if severe:
                saver.wait()
                log.write_attempt(step, outcome="stopped", message=severe.message)
                return

            # Checkpoint.
            if at_checkpoint:
                with books.spend("checkpoint"):
                    save(step)
            # Probe and pictures.
            with books.spend("evaluation"):
                if at_probe:
                    run_probe(config, model, data, world, log, step)
                if at_pictures:
                    log_pictures(config, model, data, batch, world, log, step)

        # --- The end: weights, and nothing left in flight.
        with books.spend("checkpoint"):
            weights, _ = snapshot(model, optimizer, keep=world.rank == 0)
            if world.rank == 0:
                write_weights(config, plan, run_dir, model, weights)
            saver.wait()
        log.write_attempt(step, outcome="finished")
        world.barrier()


def resolve_precision(config: PretrainConfig, device: torch.device) -> str:
    """float32 or bf16; `auto` is bf16 on CUDA."""
    if config.scaling.precision != "auto":
        return config.scaling.precision
    return "bf16" if device.type == "cuda" else "float32"


def build_model(config: PretrainConfig, vocab_size: int) -> BeitMIM:
    """The network with initial weights that follow from the seed alone."""
    m = config.model
    model = BeitMIM(
        image_size=m.image_size,
        patch_size=m.patch_size,
        dim=m.dim,
        depth=m.depth,
        num_heads=m.num_heads,
        vocab_size=vocab_size,
        mlp_ratio=m.mlp_ratio,
        absolute_positions=m.absolute_positions,
        relative_positions=m.relative_positions,
        layer_scale_init=m.layer_scale_init,
        drop_path=m.drop_path,
    )
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.activation_checkpointing = config.scaling.activation_checkpointing
    return model


def build_optimizer(config: PretrainConfig, model: BeitMIM) -> torch.optim.AdamW:
    """Fused AdamW with the groups of the official code."""
    optim = config.optim
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def resume(
    run_dir: RunDir,
    world: World,
    model: BeitMIM,
    optimizer: torch.optim.Optimizer,
    monitor: HealthMonitor,
) -> tuple[int | None, list[tuple[int, str]]]:
    """Loads the newest whole checkpoint: its step (None: there is none), and the rejected ones.

    Worker 0 chooses and checks, so that all take the same one. A rejected checkpoint loses its
    marker: it must not count as one of those that are kept.
    """
    rejected: list[tuple[int, str]] = []
    found: Checkpoint | None = None
    if world.rank == 0:
        found = load_newest(
            run_dir.checkpoints, rejected=lambda step, reason: rejected.append((step, reason))
        )
        for step, _ in rejected:
            discard(run_dir.checkpoints, step)
    chosen: int | None = world.broadcast(None if found is None else found.step)
    if chosen is None:
        return None, rejected
    if found is None:
        found = load(run_dir.checkpoints, chosen)
    restore(model, optimizer, found.weights, found.moments)
    monitor.restore(found.state["health"])
    return chosen, rejected


def checkpoint_state(
    config: PretrainConfig, plan: Plan, monitor: HealthMonitor, skips: Skips, precision: str
) -> dict[str, Any]:
    """What a checkpoint says beside tensors."""
    return {
        "config": to_dict(config),
        "fingerprints": dict(plan.fingerprints),
        "health": monitor.state(),
        "skips": skips.entries,
        # No generator has a state to save: order, masks and drop-path are functions of these and
        # of the step. bf16 needs no loss scaler.
        "rng": {"seed": config.seed, "state": "functions of (seed, step) and (seed, image, epoch)"},
        "scaler": None,
        "precision": precision,
        "torch": torch.__version__,
    }


def hopeless(run_dir: RunDir, launched_at: float, step: int) -> str:
    """Why another start will not help, or "": bad input, or a loop of crashes at one place."""
    failures = [
        event
        for event in run_dir.events()
        if event["event"] == WORKER_FAILED and event["time"] >= launched_at
    ]
    for event in failures:
        if event["final"]:
            return str(event["message"])
    attempts = [a for a in run_dir.attempts() if a.launched_at == launched_at]
    # A start that a larger group followed was ended by growing, not by failing.
    starts = [a for a, after in itertools.pairwise(attempts) if after.workers <= a.workers]
    last = starts[-MAX_FRUITLESS_STARTS:]
    if len(last) == MAX_FRUITLESS_STARTS and all(a.start_step == step for a in last):
        seen = failures[-1]["message"] if failures else "its processes were killed"
        return (
            f"{len(last)} starts in a row did not get from step {step} to the next checkpoint; "
            f"the last time: {seen}. Events: {run_dir.at('events')}"
        )
    return ""


def device_peak(config: PretrainConfig, device: torch.device) -> float:
    """Peak of the device in TFLOP/s: configured, from data sheets, or of a matrix product here."""
    if config.scaling.peak_tflops is not None:
        return config.scaling.peak_tflops
    if device.type == "cuda":
        known = goodput.known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    size, best = 768, 0.0
    a = torch.ones(size, size, device=device)
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def write_weights(
    config: PretrainConfig, plan: Plan, run_dir: RunDir, model: BeitMIM, weights: dict[str, Tensor]
) -> None:
    """`weights/`: the network as later stages load it."""
    plain = BeitMIM(**model.config())
    plain.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as directory:
        save_weights(
            plain,
            directory,
            extra={
                "pixel_mean": list(config.data.mean),
                "pixel_std": list(config.data.std),
                "fingerprints": dict(plan.fingerprints),
                "steps": plan.total_steps,
            },
        )
        storage.store_dir(directory, run_dir.weights, last="config.json")
