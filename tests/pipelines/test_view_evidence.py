"""What is told of a number of views goes by the results that are published."""

import pytest

from benchmarks.evidence import findings
from benchmarks.evidence.cells import experiments
from benchmarks.evidence.run import RESULTS, read
from pipelines import plan, pretrain, view_evidence
from pipelines.config.plan import PlanConfig
from tests.pipelines.pretrain_fixtures import make_tables, small_config
from tests.pipelines.test_pretrain_objectives import config_for


def test_what_was_tried_are_the_first_experiments_with_all_seeds():
    results, found = read(RESULTS), []
    for experiment in experiments()[:2]:
        reference, *others = experiment.settings
        for setting in others:
            if findings.is_whole(setting, results) and findings.is_whole(reference, results):
                paired = findings.against(setting, reference, results)
                found.append(
                    view_evidence.Tried(
                        epochs=reference.views,
                        views=setting.views,
                        points=round(paired.mean, 1),
                        low=round(paired.low, 1),
                        high=round(paired.high, 1),
                    )
                )
    assert tuple(sorted(found, key=lambda t: (t.epochs_a_view, t.epochs))) == view_evidence.TRIED
    assert view_evidence.MARGIN == findings.MARGIN


def test_it_is_uncertain_beyond_what_was_tried_without_a_loss():
    assert (view_evidence.MOST_EPOCHS_A_VIEW, view_evidence.MOST_EPOCHS) == (120, 120)
    assert not view_evidence.is_uncertain(40, 1)
    assert view_evidence.is_uncertain(40.4, 1), "longer than what is known to cost nothing"
    assert view_evidence.is_uncertain(300, 8), "a longer run, each view seen no more often"
    assert not view_evidence.is_uncertain(300, 300)
    mild, wide, _, often = view_evidence.TRIED
    assert view_evidence.known_of(5, 4) == (
        "each seen in 1.25 epochs; in a run of 40 epochs, 10 a view, no loss showed "
        f"({mild.told()})"
    )
    assert view_evidence.known_of(100, 10) == (
        "each seen in 10 epochs; in a run of 120 epochs, 10 a view, a loss of 1 point may be "
        f"({wide.told()})"
    )
    assert view_evidence.known_of(100, 1).endswith(f"a loss of 1 point may be ({often.told()})")
    told = view_evidence.known_of(300, 8)
    assert told == (
        "each seen in 37.5 epochs: outside of the evidence, which goes to 120 epochs a view, "
        "120 in all"
    )
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


@pytest.mark.parametrize(
    ("epochs", "words"),
    [(40, ""), (100, "a loss of 1 point may be"), (130, "outside of the evidence")],
)
def test_a_run_of_which_it_is_not_known_says_so(tmp_path, capsys, epochs, words):
    images, tokens = make_tables(tmp_path)
    optim = {"epochs": epochs, "steps": None}
    pretrain.plan_run(small_config((images, tokens), tmp_path / "run", optim=optim))
    told = capsys.readouterr().err
    assert words in told
    assert ("beit tokenize --first_view 2" in told) is bool(words)
    pretrain.plan_run(config_for("mae", (images, tokens), tmp_path / "mae", optim=optim))
    assert "evidence" not in capsys.readouterr().err, "it was found with tokens"
