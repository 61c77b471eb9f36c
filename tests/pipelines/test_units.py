"""Messages and attempts of the runner of units; rounds are tested through the stages."""

import time
from types import SimpleNamespace

import pytest

from pipelines import steps, units
from pipelines.errors import InputError, StageFailed
from pipelines.units import Attempts, Outcome, attempt, outcome_table


def test_work_that_never_ended_is_counted() -> None:
    attempts = Attempts()
    assert [attempts.begin("unit 1") for _ in range(3)] == [0, 1, 2]
    assert attempts.begin("unit 2") == 0
    attempts.end("unit 1")
    assert attempts.begin("unit 1") == 0


def test_without_the_count_work_goes_on() -> None:
    with attempt(None, "unit 1") as deaths:
        assert deaths == 0


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (InputError("no such part"), InputError, "unit part-7: no such part"),
        (StageFailed("unit 7 ended its worker"), StageFailed, "unit 7 ended.*\n.*the same command"),
        (
            OSError(5, "I/O error"),
            StageFailed,
            r"unit part-7: OSError: .*I/O.*\n.*the same command",
        ),
    ],
)
def test_what_ends_the_job_is_told_in_the_driver(error, raised, message) -> None:
    sent = outcome_table([Outcome.of_error(7, "part-7", error)]).column("outcome")[0].as_py()
    with pytest.raises(raised, match=message):
        Outcome.from_json(sent).check()


def test_an_outcome_arrives_as_it_was_sent() -> None:
    outcome = Outcome(unit=3, facts={"size": 9, "seconds": {"read": 0.5}})
    sent = outcome_table([outcome]).column("outcome")[0].as_py()
    assert Outcome.from_json(sent).check() == outcome


def test_who_waits_for_the_first_unit_is_told(monkeypatch) -> None:
    said: list[str] = []

    def batches(**_: object):
        deadline = time.monotonic() + 60
        while len(said) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield outcome_table([Outcome(unit=0)])
        time.sleep(0.2)
        before = len(said)
        time.sleep(0.3)
        assert len(said) == before  # none once units come
        yield outcome_table([Outcome(unit=1)])

    monkeypatch.setattr(steps, "say_step", said.append)
    monkeypatch.setattr(units, "WAITING_EVERY", 0.1)
    found = list(units.outcomes(SimpleNamespace(iter_batches=batches)))
    assert [outcome.unit for outcome in found] == [0, 1]
    assert said[0].startswith("still waiting for the first unit after ")
