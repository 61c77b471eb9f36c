"""Whether training is going wrong: checks on reduced metrics, the same on every worker.

The monitor sees only numbers that were summed over all workers, so every worker comes to the same
findings without asking the others. Its memory travels in the checkpoint: a resumed run judges as
the undisturbed one does.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import common
from pipelines.config.pretrain import HealthConfig
from pipelines.training.step_metrics import Period

MEMORY = 100  # gradient norms the median is taken over
MIN_MEMORY = 10
LASTING = {"code_collapse", "accuracy_floor", "data_starvation"}
NEWS_RATIO = 2
OVER = "over"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, and what the configuration says to do about it."""

    kind: str
    """Field of the `health` section that decides about it."""
    action: str
    """warn, stop or rollback; `over` where a warning has passed."""
    step: int
    """Steps that were done when it was seen: the last of them is what is wrong."""
    value: float | None
    """The measured number; None stands for one that is not finite."""
    limit: float | None
    message: str

    def over(self, step: int) -> "Finding":
        """What is told when it has passed."""
        message = f"step {step}: {self.kind} is over; it was told at step {self.step}."
        return replace(self, action=OVER, step=step, value=None, message=message)


class HealthMonitor:
    """Judges one period of metrics after the other.

    `judged_from` is the step from which collapse and accuracy are judged: warm-up plus grace.
    `unigram_accuracy` is what always guessing the most frequent token would reach; None where
    nothing predicts tokens, and then neither is judged.
    """

    def __init__(
        self, config: common.HealthConfig, *, judged_from: int, unigram_accuracy: float | None
    ) -> None:
        self.config = config
        self.judged_from = judged_from
        self.unigram_accuracy = unigram_accuracy
        self.norms: deque[float] = deque(maxlen=MEMORY)
        self.told: dict[str, Finding] = {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike."""
        return {"norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over `state()` of an earlier process."""
        self.norms = deque(state.get("norms", []), maxlen=MEMORY)

    def check(
        self, period: Period, *, data_wait_share: float = 0.0, loss_scale: float = 1.0
    ) -> list[Finding]:
        """Findings of a period, most severe action first.

        `data_wait_share` is the largest share of wall-clock that a worker waited for data.
        `loss_scale` is that of fp16 after the period: above 1, gradients that are not finite are
        its fault, and its own affair.
        """
        findings = [*self._non_finite(period, loss_scale), *self._exploding(period)]
        last = period.first_step + len(period.losses)
        # What is predicted is judged in pretraining only.
        config = self.config if isinstance(self.config, HealthConfig) else None
        if config and period.first_step >= self.judged_from and not findings:
            findings += self._collapse(config, period, last) + self._floor(config, period, last)
        findings += self._starvation(data_wait_share, last)
        order = {"rollback": 0, "stop": 1, "warn": 2}
        return sorted(findings, key=lambda finding: order[finding.action])

    def news(self, findings: Sequence[Finding], step: int) -> list[Finding]:
        """What of a period's findings is to be told: a lasting warning at its start, when its
        value has doubled or halved since, and at its end; everything else each time."""
        news = [finding for finding in findings if self._is_new(finding)]
        for finding in news:
            if finding.kind in LASTING:
                self.told[finding.kind] = finding
        found = {finding.kind for finding in findings}
        if found <= LASTING:  # in a period of other troubles these are not judged
            news += [self.told.pop(kind).over(step) for kind in sorted(self.told.keys() - found)]
        return news

    def _is_new(self, finding: Finding) -> bool:
        before = self.told.get(finding.kind)
        if before is None or finding.action != "warn":
            return True
        low, high = sorted((before.value or 0.0, finding.value or 0.0))
        return high >= NEWS_RATIO * low and high > low

    def _non_finite(self, period: Period, loss_scale: float) -> list[Finding]:
        if self.config.non_finite == "off":
            return []
        pairs = zip(period.losses, period.grad_norms, strict=True)
        for step, (loss, norm) in enumerate(pairs, start=period.first_step + 1):
            if not (math.isfinite(loss) and (math.isfinite(norm) or loss_scale > 1)):
                return [
                    Finding(
                        kind="non_finite",
                        action=self.config.non_finite,
                        step=step,
                        value=None,
                        limit=None,
                        message=f"step {step}: loss {loss}, gradient norm {norm}; the update was "
                        "not applied. Look at the learning rate (optim.lr) and the precision.",
                    )
                ]
        return []

    def _exploding(self, period: Period) -> list[Finding]:
        found: list[Finding] = []
        for step, norm in enumerate(period.grad_norms, start=period.first_step + 1):
            if not math.isfinite(norm):
                continue
            if len(self.norms) >= MIN_MEMORY and not found:
                limit = self.config.gradient_ratio * statistics.median(self.norms)
                if norm > limit and self.config.exploding_gradient != "off":
                    found.append(
                        Finding(
                            kind="exploding_gradient",
                            action=self.config.exploding_gradient,
                            step=step,
                            value=norm,
                            limit=limit,
                            message=f"step {step}: gradient norm {norm:.3g} is above {limit:.3g} "
                            f"(health.gradient_ratio = {self.config.gradient_ratio:g} times the "
                            "recent median); lower optim.lr or optim.clip_grad_norm.",
                        )
                    )
            self.norms.append(norm)
        return found

    def _collapse(self, config: HealthConfig, period: Period, step: int) -> list[Finding]:
        perplexity, limit = period.perplexity, config.min_perplexity
        if config.code_collapse == "off" or perplexity is None or perplexity >= limit:
            return []
        return [
            Finding(
                kind="code_collapse",
                action=config.code_collapse,
                step=step,
                value=perplexity,
                limit=limit,
                message=f"step {step}: predictions use {perplexity:.2f} tokens (perplexity), fewer "
                f"than health.min_perplexity = {limit:g}; the tokenizer may have collapsed, or "
                "optim.lr is too high.",
            )
        ]

    def _floor(self, config: HealthConfig, period: Period, step: int) -> list[Finding]:
        accuracy, floor = period.means.get("mim_accuracy"), self.unigram_accuracy
        if config.accuracy_floor == "off" or accuracy is None or floor is None:
            return []
        if accuracy > floor:
            return []
        return [
            Finding(
                kind="accuracy_floor",
                action=config.accuracy_floor,
                step=step,
                value=accuracy,
                limit=floor,
                message=f"step {step}: masked-token accuracy {accuracy:.4f} is no better "
                f"than always guessing the most frequent token ({floor:.4f}); the "
                "model has learned nothing from its context yet.",
            )
        ]

    def _starvation(self, share: float, step: int) -> list[Finding]:
        limit = self.config.max_data_wait
        if self.config.data_starvation == "off" or share <= limit:
            return []
        return [
            Finding(
                kind="data_starvation",
                action=self.config.data_starvation,
                step=step,
                value=share,
                limit=limit,
                message=f"step {step}: {share:.0%} of the time went into waiting for data "
                f"(health.max_data_wait = {limit:.0%}).",
            )
        ]
