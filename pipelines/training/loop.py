"""What training loops hold between their steps, and what they do at the end of a period.

`pretrain` and `finetune` call it, in an order that is theirs to read. All workers call the same
methods after the same steps.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipelines.config.checks import to_dict
from pipelines.config.finetune import FinetuneConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import StageFailed
from pipelines.redaction import redacted_values
from pipelines.training import goodput
from pipelines.training.checkpoint import Checkpoint, Saver, resume_point
from pipelines.training.data import WorkerFeed
from pipelines.training.distributed import World, restore, snapshot
from pipelines.training.health import HealthMonitor
from pipelines.training.log import TrainLog
from pipelines.training.step_metrics import Period, StepMetrics
from pipelines.training.stopping import stop_requested
from pipelines.training.weights_run import TrainPlan


class LoopState:
    """Where a training stands: its step, its data, its open period, its checkpoints.

    As a context it begins with a checkpoint, if there is none, and ends reading and saving.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        plan: TrainPlan,
        world: World,
        log: TrainLog,
        *,
        data: WorkerFeed[Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        monitor: HealthMonitor,
        metrics: StepMetrics,
        precision: str,
    ) -> None:
        """Takes over the newest checkpoint that is whole."""
        self.config, self.plan, self.world, self.log = config, plan, world, log
        self.data, self.model, self.optimizer = data, model, optimizer
        self.monitor, self.metrics = monitor, metrics
        self.precision = precision
        # Of other precisions it does nothing.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.skipped_updates = 0
        self.peak_tflops = log.peak(config.scaling.peak_tflops)
        found = self._resume()
        self.fresh = found is None
        self.skips = world.broadcast(log.run.skips() if world.rank == 0 else None)
        self.step = log.start(found)
        self.saver = Saver(
            log.run.checkpoints,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            failed=log.checkpoint_failed,
            check=log.run.check,
        )
        self.period_start, self.first_period = self.step, True
        self.elapsed = self.wait_share = 0.0

    def __enter__(self) -> Self:
        books = self.log.books
        if self.fresh:
            try:
                with books.spend("checkpoint"):
                    self.save()
            except BaseException:
                self.__exit__()  # which Python calls only of a context that was entered
                raise
        books.switch("compute")
        books.pace()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.closing(self.saver):
            self.data.close()

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps (0: never), and at the end, is due."""
        return self.at_end or (every > 0 and self.step % every == 0)

    @property
    def at_end(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.plan.total_steps

    @property
    def at_log(self) -> bool:
        """Whether a period ends here, whatever else is due."""
        return self.step % self.config.log_every == 0 or self.due(
            self.config.checkpoint.every_steps
        )

    def segments(self) -> list[tuple[int, int]]:
        """What of the order is still to be read: [(first position, count), ...]."""
        segments: list[tuple[int, int]] = self.skips.segments(self.step, self.plan.total_steps)
        return segments

    def end_period(self) -> Period:
        """The steps since the last log, over all workers, and how fast they were."""
        period = self.metrics.reduce(self.world, first_step=self.period_start)
        self.elapsed, wait = self.log.books.pace()
        self.wait_share = self.world.largest(wait / self.elapsed if self.elapsed > 0 else 0.0)
        return period

    def tell(self, period: Period, figures: Mapping[str, float], *, accuracy: float | None) -> None:
        """Logs a period: its sums, its pace, and the stage's own figures."""
        num_images = (self.step - self.period_start) * self.config.data.global_batch_size
        images_per_second = num_images / self.elapsed
        record = {
            **period.per_step(),
            **period.means,
            "grad_norm": period.grad_norms[-1],
            "images_per_second": images_per_second,
            "data_wait_share": self.wait_share,
            **goodput.model_flops_utilisation(
                images_per_second, self.plan.flops_per_image, self.world.size, self.peak_tflops
            ),
            "epoch": self.skips.position(self.step - 1) / self.plan.steps_per_epoch,
            **figures,
        }
        if self.scaler.is_enabled():
            record |= self._tell_of_scale(period)
        shown = {
            "loss": f"{period.means['loss']:.3f}",
            "img/s": f"{images_per_second:.0f}",
            "wait": f"{self.wait_share:.0%}",
        }
        if accuracy is not None:
            shown["accuracy"] = f"{accuracy:.3f}"
        self.log.period(self.step - 1, record, shown)

    def _tell_of_scale(self, period: Period) -> dict[str, float]:
        """The loss scale, and the updates that it was too large for."""
        skipped = sum(not math.isfinite(norm) for norm in period.grad_norms)
        self.skipped_updates += skipped
        scale = self.scaler.get_scale()
        if skipped:
            self.log.event(
                "updates_skipped",
                step=self.step,
                skipped=skipped,
                loss_scale=scale,
                message=f"step {self.step}: {skipped} updates were left out, for gradients "
                f"were not finite in fp16; {self.skipped_updates} so far; the loss scale is "
                f"{scale:g} now",
            )
        return {"loss_scale": scale, "skipped_updates": self.skipped_updates}

    def judge(self, period: Period) -> bool:
        """Acts on what is wrong with a period; opens the next one.

        The findings are the same on every worker, for all see the same sums. True: training has
        gone back to a checkpoint, and its data must be read from `segments` again.

        Raises:
            StageFailed: a health check stops the run.
        """
        # The first period after a start fills the read-ahead, so its waiting is not judged.
        wait_share = 0.0 if self.first_period else self.wait_share
        findings = [
            self.data.explain(finding, self.elapsed)
            for finding in self.monitor.check(
                period, data_wait_share=wait_share, loss_scale=self.scaler.get_scale()
            )
        ]
        self.data.start_period()
        self.period_start, self.first_period = self.step, False
        for finding in self.monitor.news(findings, self.step):
            self.log.finding(finding)
        severe = findings[0] if findings and findings[0].action != "warn" else None
        if severe and severe.action == "rollback":
            if len(self.skips.entries) < self.config.health.max_rollbacks:
                with self.log.books.spend("restart"):
                    self._roll_back()
                return True
            raise StageFailed(f"{severe.message} Stopped: health.max_rollbacks is reached.")
        if severe:
            raise StageFailed(severe.message)
        return False

    def checkpoint(self) -> None:
        """Saves where that is due, and where the run was asked to end: here, on all workers.

        Raises:
            StopRequested: it was, and has saved.
        """
        ending = not self.at_end and self.log.end_requested(self.world)
        leaving = not self.at_end and self.log.node_leaving(self.world, self.step)
        with self.log.books.spend("checkpoint"):
            if ending or leaving or self.due(self.config.checkpoint.every_steps):
                self.save()
            if ending:
                raise stop_requested(self.saver, self.step, self.plan.total_steps, self.world)

    def save(self) -> None:
        """Hands a checkpoint of this step to the saver."""
        weights, moments = snapshot(self.model, self.optimizer, keep=self.world.rank == 0)
        if self.world.rank == 0:
            self.saver.save(
                Checkpoint(step=self.step, weights=weights, moments=moments, state=self._state())
            )
            self.log.flush()

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU, on worker 0; the others, who must ask, get nothing."""
        return snapshot(self.model, self.optimizer, keep=self.world.rank == 0)[0]

    def _resume(self) -> int | None:
        """Loads the newest whole checkpoint: its step, or None if there is none."""
        log = self.log
        found = resume_point(log.run.checkpoints, self.world, rejected=log.checkpoint_rejected)
        if found is None:
            return None
        if (before := found.state["precision"]) != self.precision:
            # `auto` goes by the GPUs of each start, and no precision repeats another's steps.
            log.event(
                "precision_changed",
                step=found.step,
                message=f"precision: {before} up to step {found.step}, {self.precision} from there",
            )
        restore(self.model, self.optimizer, found.weights, found.moments)
        self.monitor.restore(found.state["health"])
        if self.scaler.is_enabled() and (scaler := found.state["scaler"]):
            self.scaler.load_state_dict(scaler)
            self.skipped_updates = scaler["skipped_updates"]
        return found.step

    def _roll_back(self) -> None:
        """Goes back to the newest checkpoint, leaving out the data since."""
        self.world.broadcast(self.saver.wait() if self.world.rank == 0 else None)
        back = self._resume()
        assert back is not None, "a checkpoint is made before the first step"
        skipped = self.skips.position(self.step) - self.skips.position(back)
        self.skips = self.skips.add(from_step=back, batches=skipped)
        if self.world.rank == 0:
            self.log.run.write_skips(self.skips)
        self.log.rewind(back)
        self.log.event(
            "rolled_back",
            step=self.step,
            to_step=back,
            skipped_batches=skipped,
            message=f"back to step {back}; {skipped} batches are skipped",
        )
        self.step = self.period_start = back
        self.first_period = True

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says beside tensors."""
        # No generator has a state to save: order, views, masks and drop-path are functions of
        # these and of the step.
        state = "functions of (seed, step) and (seed, image, epoch)"
        scaler = {**self.scaler.state_dict(), "skipped_updates": self.skipped_updates}
        return {
            "config": redacted_values(to_dict(self.config)),
            "fingerprints": dict(self.plan.fingerprints),
            "health": self.monitor.state(),
            "skips": self.skips.entries,
            "rng": {"seed": self.config.seed, "state": state},
            "scaler": scaler if self.scaler.is_enabled() else None,
            "precision": self.precision,
            "torch": torch.__version__,
        }
