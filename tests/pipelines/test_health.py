import math

import pytest

from pipelines.config.pretrain import HealthConfig
from pipelines.training.health import HealthMonitor
from pipelines.training.step_metrics import Period


def period(first_step=0, losses=(4.0, 4.0), norms=(1.0, 1.0), accuracy=0.5, perplexity=20.0):
    return Period(
        first_step=first_step,
        losses=losses,
        grad_norms=norms,
        samples=["0"] * len(losses),
        items=1.0,
        means={"loss": losses[0]} | ({} if accuracy is None else {"mim_accuracy": accuracy}),
        perplexity=perplexity,
        codes_used=None,
    )


def monitor(judged_from=0, **config):
    return HealthMonitor(HealthConfig(**config), judged_from=judged_from, unigram_accuracy=0.1)


def test_without_tokens_neither_collapse_nor_floor_is_judged():
    watch = HealthMonitor(
        HealthConfig(exploding_gradient="stop", gradient_ratio=10.0, accuracy_floor="stop"),
        judged_from=0,
        unigram_accuracy=None,
    )
    nothing = {"accuracy": None, "perplexity": None}
    assert watch.check(period(0, (4.0,) * 20, (2.0,) * 20, **nothing)) == []
    assert kinds(watch.check(period(20, (4.0,), (21.0,), **nothing))) == [
        ("exploding_gradient", "stop", 21)
    ]


def kinds(findings):
    return [(finding.kind, finding.action, finding.step) for finding in findings]


def test_a_sound_period_gives_no_finding():
    assert monitor().check(period()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_a_loss_that_is_not_finite_is_found_at_its_step(bad, action):
    found = monitor(non_finite=action).check(period(40, (4.0, bad, bad), (1.0, 1.0, 1.0)))
    assert kinds(found) == [("non_finite", action, 42)]
    assert "optim.lr" in found[0].message


def test_a_gradient_that_is_not_finite_is_found_and_not_remembered():
    watch = monitor()
    assert kinds(watch.check(period(0, (4.0, 4.0), (1.0, math.nan)))) == [
        ("non_finite", "rollback", 2)
    ]
    assert watch.state() == {"norms": [1.0]}


def test_an_exploding_gradient_is_measured_against_its_recent_median():
    watch = monitor(exploding_gradient="stop", gradient_ratio=10.0)
    assert watch.check(period(0, (4.0,) * 20, (2.0,) * 20)) == []
    assert watch.check(period(20, (4.0,), (19.0,))) == []
    found = watch.check(period(21, (4.0, 4.0), (2.0, 21.0)))
    assert kinds(found) == [("exploding_gradient", "stop", 23)]
    assert found[0].limit == 20.0


def test_the_first_gradients_have_nothing_to_be_measured_against():
    assert monitor(gradient_ratio=2.0).check(period(0, (4.0,) * 5, (0.1, 50, 1, 60, 2))) == []


def test_memory_travels():
    watch = monitor(exploding_gradient="stop", gradient_ratio=10.0)
    watch.check(period(0, (4.0,) * 20, (2.0,) * 20))
    other = monitor(exploding_gradient="stop", gradient_ratio=10.0)
    other.restore(watch.state())
    assert kinds(other.check(period(20, (4.0,), (21.0,)))) == [("exploding_gradient", "stop", 21)]


def test_collapse_and_floor_are_judged_after_the_grace_only():
    watch = monitor(judged_from=100, code_collapse="stop", accuracy_floor="warn")
    collapsed = {"perplexity": 1.1, "accuracy": 0.1}
    assert watch.check(period(90, **collapsed)) == []
    found = watch.check(period(100, **collapsed))
    assert kinds(found) == [("code_collapse", "stop", 102), ("accuracy_floor", "warn", 102)]


def test_waiting_for_data_is_found():
    found = monitor(max_data_wait=0.3).check(period(), data_wait_share=0.6)
    assert kinds(found) == [("data_starvation", "warn", 2)]
    assert "60%" in found[0].message


def test_the_most_severe_action_comes_first():
    watch = monitor(non_finite="rollback", data_starvation="stop")
    found = watch.check(period(0, (math.nan,), (1.0,)), data_wait_share=0.9)
    assert [finding.action for finding in found] == ["rollback", "stop"]


def test_everything_can_be_switched_off():
    watch = monitor(
        non_finite="off",
        exploding_gradient="off",
        code_collapse="off",
        accuracy_floor="off",
        data_starvation="off",
    )
    watch.check(period(0, (4.0,) * 20, (1.0,) * 20))
    bad = period(20, (math.nan,), (1e9,), accuracy=0, perplexity=1)
    assert watch.check(bad, data_wait_share=1) == []


def test_a_lasting_warning_is_told_at_its_start_when_it_changes_and_at_its_end():
    watch = monitor(accuracy_floor="warn")
    accuracies = [0.5, 0.04, 0.05, 0.041, 0.09, 0.08, 0.5, 0.5, 0.09]
    told = []
    for step, accuracy in enumerate(accuracies):
        findings = watch.check(period(step, (4.0,), (1.0,), accuracy=accuracy))
        told.append(kinds(watch.news(findings, step + 1)))
    floor = "accuracy_floor"
    assert told == [
        [], [(floor, "warn", 2)], [], [], [(floor, "warn", 5)], [], [(floor, "over", 7)], [],
        [(floor, "warn", 9)],
    ]  # fmt: skip


def test_what_is_not_judged_is_not_over():
    watch = monitor(accuracy_floor="warn", non_finite="warn")
    low = watch.check(period(0, (4.0,), (1.0,), accuracy=0.01))
    assert kinds(watch.news(low, 1)) == [("accuracy_floor", "warn", 1)]
    broken = watch.check(period(1, (math.nan,), (1.0,), accuracy=0.01))
    assert kinds(watch.news(broken, 2)) == [("non_finite", "warn", 2)]
    assert watch.news(watch.check(period(2, (4.0,), (1.0,), accuracy=0.01)), 3) == []


def test_incidents_and_what_stops_a_run_are_told_each_time():
    watch = monitor(accuracy_floor="stop", non_finite="rollback")
    for step in range(3):
        low = watch.check(period(step, (4.0,), (1.0,), accuracy=0.01))
        assert kinds(watch.news(low, step + 1)) == [("accuracy_floor", "stop", step + 1)]
        broken = watch.check(period(step, (math.nan,), (1.0,)))
        assert kinds(watch.news(broken, step + 1)) == [("non_finite", "rollback", step + 1)]
