"""What is told of a number of views goes by the results that are published."""

import pytest

from benchmarks.evidence import document
from benchmarks.evidence.cells import BATCH, experiments
from benchmarks.evidence.run import RESULTS, read
from pipelines import plan, pretrain, view_evidence
from pipelines.config.plan import PlanConfig
from tests.pipelines.pretrain_fixtures import make_tables, small_config


def test_what_was_tried_are_the_first_experiments_with_all_seeds():
    results, found = read(RESULTS), []
    for experiment in experiments()[:2]:
        reference, *others = experiment.settings
        for setting in others:
            if document.is_whole(setting, results) and document.is_whole(reference, results):
                paired = document.against(setting, reference, results)
                found.append(
                    view_evidence.Tried(
                        epochs=reference.views,
                        views=setting.views,
                        points=round(paired.mean, 1),
                        low=round(paired.low, 1),
                        high=round(paired.high, 1),
                    )
                )
    assert tuple(sorted(found, key=lambda tried: tried.epochs_a_view)) == view_evidence.TRIED
    assert BATCH == 128


def test_it_is_outside_beyond_the_most_that_was_tried():
    most = view_evidence.most_epochs_a_view()
    assert not view_evidence.is_outside(8 * most, 8)
    assert view_evidence.is_outside(8 * most + 1, 8)
    assert "outside of the evidence" in view_evidence.known_of(most + 1, 1)
    nearest = view_evidence.TRIED[0]
    assert nearest.told() in view_evidence.known_of(nearest.epochs_a_view, 1)
    assert view_evidence.known_of(5, 5) == "a new view each epoch"


def test_a_plan_prices_other_numbers_of_views():
    stated = {"num_images": 10**6, "epochs": 300, "num_gpus": 8, "num_cpus": 200}
    result = plan.run(PlanConfig(num_views=4, **stated))
    assert [other.num_views for other in result.views] == [1, 4, 30, 300]
    by_number = {other.num_views: other for other in result.views}
    assert by_number[4].tokenize_hours == pytest.approx(result.tokenize_hours)
    assert by_number[4].token_bytes == result.token_bytes
    alone = plan.run(PlanConfig(num_views=30, **stated))
    assert by_number[30].tokenize_hours == pytest.approx(alone.tokenize_hours)
    assert "outside of the evidence" in by_number[1].line()


def test_a_run_outside_of_the_evidence_says_so(tmp_path, capsys):
    tables = make_tables(tmp_path)
    views = 2
    for epochs, is_said in ((views * view_evidence.most_epochs_a_view(), False), (1000, True)):
        config = small_config(
            tables, tmp_path / "run", optim={"epochs": int(epochs), "steps": None}
        )
        pretrain.plan_run(config)
        told = capsys.readouterr().err
        assert ("outside of the evidence" in told) is is_said
        assert ("--first_view 2" in told) is is_said
