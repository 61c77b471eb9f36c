"""What a chain says at its end, and what it keeps of it: table, headline, record."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jobs import pipeline
from jobs.cli import parse_stage
from jobs.comparison import Arm, comparison
from jobs.headline import DEMO_STEPS, headline
from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluation.probes import accuracy_interval
from pipelines.evaluation.result import Result, Score
from pipelines.tokenization.report import TokenizeResult
from pipelines.training.weights_run import TrainResult


def judged(output, accuracy, gains=None):
    score = Score(
        accuracy=accuracy, low=accuracy - 0.02, high=accuracy + 0.02,
        class_accuracy=[], layers=[4], layer_accuracy=[],
    )  # fmt: skip
    scores = {name: {"linear": score, "knn": score} for name in ("pretrained", *(gains or {}))}
    return Result(
        scores=scores, gains=gains or {}, head=None, majority=0.2, num_images=100, class_names=[],
        layers=[4], output=str(output), already_done=False,
    )  # fmt: skip


def trained(folder, seconds, steps, accuracy):
    return SimpleNamespace(
        report={"goodput": {"seconds": {"compute": seconds - 1, "data_wait": 1, "startup": 30}}},
        steps=steps,
        mim_accuracy=accuracy,
        unigram_accuracy=None if accuracy is None else 0.024,
        run=SimpleNamespace(at=lambda *parts: str(folder.joinpath(*parts))),
    )


def arm(folder, name, right, *, seconds=100, steps=500, accuracy=0.2, gains=None):
    """An arm whose linear probe got the first `right` of 100 images right."""
    output = folder / name
    output.mkdir(exist_ok=True)
    hits = {"linear": "1" * right + "0" * (100 - right), "groups": list(range(100))}
    storage.write_json(str(output / "hits.json"), hits)
    of = trained(folder, seconds, steps, accuracy)
    found = judged(output, right / 100, gains)
    return Arm(name=name, batch=128, trained=of, judged=found, seed=7)


def test_a_comparison_is_in_pairs_and_tells_times_that_differ(tmp_path):
    first = arm(tmp_path, "beit", 50, gains={"pixels": (-0.02, -0.04, -0.01)})
    same = arm(tmp_path, "beitv2", 53, seconds=104, steps=400)
    longer = arm(tmp_path, "mae", 41, seconds=200, steps=1000, accuracy=None)
    shown = comparison([first, same, longer]).splitlines()
    rows = {line.split()[0]: line for line in shown[1:5]}
    assert "50.0 % [48.0, 52.0]" in rows["beit"]
    assert "20.0 % (2.4)" in rows["beit"]
    assert rows["beit"].split()[-3:] == ["500", "100", "640"]
    # Paired: three images of a hundred were won and none lost.
    assert "+3.0 [+0.0, +7.0]" in rows["beitv2"] or "+3.0 [+0.0, +6.0]" in rows["beitv2"]
    assert "predicts pixels" in rows["mae"]
    assert "raw" in rows
    told = "\n".join(shown[5:])
    assert "mae trained 2.00 times as long as beit; equal: arms.mae.optim.steps = 500" in told
    assert "beitv2 trained" not in told
    assert not any(line.rstrip() != line for line in shown)


def test_intervals_of_a_comparison_are_those_of_its_report(tmp_path):
    """Groups are drawn in the same order, by the seed of the evaluation."""
    arms = [arm(tmp_path, name, 50) for name in ("beit", "mae")]
    marks = np.random.default_rng(1).integers(0, 2, (2, 100))
    groups = np.arange(100) // 9  # twelve: as text, 10 comes before 2
    for each, row in zip(arms, marks, strict=True):
        hits = {"linear": "".join(map(str, row)), "groups": groups.tolist()}
        storage.write_json(str(tmp_path / each.name / "hits.json"), hits)
    gain = marks[1] - marks[0]
    low, high = accuracy_interval(gain, groups, seed=7)
    expected = f"{100 * gain.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert expected in comparison(arms)


@pytest.mark.parametrize(
    ("gain", "words", "short"),
    [
        ((-0.03, -0.05, -0.01), "worse than raw pixels", True),
        ((0.01, -0.01, 0.03), "not told apart from raw pixels", True),
        ((0.03, 0.01, 0.05), "better than raw pixels", False),
    ],
)
def test_the_headline_is_tokens_the_picture_and_features_in_words(tmp_path, gain, words, short):
    of = trained(tmp_path, 100, 220, 0.201)
    said = headline(of, judged(tmp_path, 0.527, {"pixels": gain}))
    assert said.index("20.1 % are predicted right") < said.index(
        "52.7 %, 95 % interval [50.7, 54.7]"
    )
    assert "2.4 %" in said
    assert words in said
    assert ("make demo" in said) == short
    long = headline(
        trained(tmp_path, 100, DEMO_STEPS, 0.201), judged(tmp_path, 0.5, {"pixels": gain})
    )
    assert "make demo" not in long
    assert "picture" not in said
    picture = tmp_path / "pictures" / "reconstruction" / "000000220.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    assert str(picture) in headline(of, judged(tmp_path, 0.5))


def test_the_record_of_a_chain_adds_up_what_was_interrupted(tmp_path):
    uri = str(tmp_path / "chain.json")
    with pytest.raises(KeyError), pipeline.ChainRecord(uri).timed("prepare"):
        raise KeyError
    first = storage.read_json(uri)["stages"]["prepare"]
    assert first["said"] == ""
    record = pipeline.ChainRecord(uri)
    record._stages["prepare"]["seconds"] = 100.0
    with record.timed("prepare") as entry:
        entry.said = "12 images"
    done = storage.read_json(uri)["stages"]["prepare"]
    assert done["said"] == "12 images"
    assert done["seconds"] > 100
    with pipeline.ChainRecord(uri).timed("prepare") as entry:
        entry.said, entry.already_done = "12 images, was done already", True
    assert storage.read_json(uri)["stages"]["prepare"] == done
    # Made again it is another; one that an earlier version made took nobody knows how long.
    record = pipeline.ChainRecord(uri)
    with record.timed("prepare") as entry:
        entry.said = "13 images"
    with record.timed("tokenize") as entry:
        entry.said, entry.already_done = "12 images, were done already", True
    again = storage.read_json(uri)["stages"]
    assert list(again) == ["prepare"]
    assert again["prepare"]["said"] == "13 images"
    assert again["prepare"]["seconds"] < 100


def test_the_record_of_a_chain_keeps_no_secret(tmp_path):
    with pipeline.ChainRecord(str(tmp_path / "chain.json")).timed("prepare") as entry:
        entry.said = "12 images, s3://bucket/images?endpoint=a&access_token=planted"
    assert "endpoint=a&access_token=***" in (tmp_path / "chain.json").read_text()


def test_stages_tell_what_was_done_before():
    assert TrainResult(run=None, resumed_from=9, report={"steps": 9}).already_done
    assert not TrainResult(run=None, resumed_from=8, report={"steps": 9}).already_done
    fields = dict.fromkeys(each.name for each in dataclasses.fields(TokenizeResult))
    assert TokenizeResult(**fields | {"units_computed": 0}).already_done
    assert not TokenizeResult(**fields | {"units_computed": 1}).already_done


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": {"prepare": 5}}'])
def test_a_record_of_another_form_is_named(tmp_path, text):
    (tmp_path / "chain.json").write_text(text)
    with pytest.raises(InputError, match=r"chain\.json: .*remove it"):
        pipeline.ChainRecord(str(tmp_path / "chain.json"))


def test_what_ended_a_stage_is_told_where_its_record_cannot_be_written(tmp_path, monkeypatch):
    def away(*_):
        raise OSError(5, "store is away")

    record = pipeline.ChainRecord(str(tmp_path / "chain.json"))
    monkeypatch.setattr(storage, "write_json", away)
    with pytest.raises(KeyboardInterrupt), record.timed("prepare"):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="store is away"), record.timed("prepare"):
        pass


def test_a_stage_that_refuses_leaves_nothing(tmp_path):
    record = pipeline.ChainRecord(str(tmp_path / "out" / "chain.json"))
    with pytest.raises(InputError), record.timed("prepare"):
        raise InputError("source: there is none")
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_of_the_comparison_differs_in_what_it_compares():
    config = parse_stage("pipeline", ["--config", "compare", "--output", "here"])
    chain = {stage: each for stage, _, each in pipeline.stages(config)}
    assert list(chain)[3:] == [
        "pretrain", "evaluate", "pretrain beitv2", "evaluate beitv2", "pretrain mae",
        "evaluate mae", "report",
    ]  # fmt: skip
    assert chain["report"].runs == ["here/run", "here/run-beitv2", "here/run-mae"]
    kinds = [chain[f"pretrain{arm}"].objective.kind for arm in ("", " beitv2", " mae")]
    assert kinds == ["beit", "beitv2", "mae"]
    assert (chain["pretrain mae"].tokens, chain["pretrain beitv2"].tokens) == ([], ["here/tokens"])
    assert [chain[f"evaluate{arm}"].baselines for arm in ("", " mae")] == [True, False]
    same = ("data", "scaling", "seed", "probe")
    for name in (" beitv2", " mae"):
        for field in same:
            assert getattr(chain[f"pretrain{name}"], field) == getattr(chain["pretrain"], field)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"knd": "mae"}}, "arms.wrong.*knd"),
        ({"optim": {"steps": "many"}}, "arms.wrong.*many"),
        ({"masking": {"num_masked": 0}}, "arms.wrong.*num_masked"),
        ({"nothing": 1}, "arms.wrong.*nothing"),
        ({"optim": None}, "arms.wrong.*optim"),
        ({"optim": 5}, "arms.wrong.*optim"),
        ({"objective": "mae"}, "arms.wrong.*objective"),
    ],
)
def test_a_wrong_arm_is_named_before_anything_runs(changes, said):
    config = parse_stage("pipeline", ["--config", "compare", "--output", "here"])
    wrong = dataclasses.replace(config, arms={"wrong": changes})
    with pytest.raises(InputError, match=said):
        pipeline.run(wrong, start_ray=lambda: None)


@pytest.mark.parametrize("name", ["", "../other", "a b"])
def test_an_arm_is_named_as_its_run_directory_can_be(name, capsys):
    words = ["--config", "compare", "--output", "here", f"--arms={json.dumps({name: {}})}"]
    with pytest.raises(InputError, match=f"arms: '{name}' .*letters"):
        parse_stage("pipeline", words)


def test_evaluations_of_arms_do_not_share_an_output():
    words = ["--config", "compare", "--output", "here", "--evaluate.output", "there"]
    with pytest.raises(InputError, match=r"evaluate\.output = 'there': .*leave it out"):
        parse_stage("pipeline", words)
    chain = pipeline.stages(parse_stage("pipeline", [*words, "--arms={}"]))
    assert {stage: each for stage, _, each in chain}["evaluate"].output == "there"


def test_the_table_is_shown_where_the_report_cannot_be_made(tmp_path, monkeypatch, capsys):
    """The report asks MLflow, the table does not."""

    def no_answer(_):
        raise InputError("no answer from MLflow")

    monkeypatch.setattr("pipelines.report.run", no_answer)
    prepared = SimpleNamespace(num_rows=1000, class_names=("a", "b"))
    monkeypatch.setattr("pipelines.prepare.run", lambda config, start_ray: prepared)
    for module in ("train_tokenizer", "tokenize_images"):
        monkeypatch.setattr(f"pipelines.{module}.run", lambda config, start_ray: "done")
    arms = {"run": ("beit", 50), "run-mae": ("mae", 53)}
    made = {name: arm(tmp_path, *one) for name, one in arms.items()}

    def of(uri):
        return made[uri.rpartition("/")[2]]

    monkeypatch.setattr(
        "pipelines.pretrain.run", lambda config, start_ray: of(config.output).trained
    )
    monkeypatch.setattr("pipelines.evaluate.run", lambda config, **_: of(config.run).judged)
    config = parse_stage("pipeline", ["--config", "compare", "--output", str(tmp_path / "out")])
    config = dataclasses.replace(config, arms={"mae": config.arms["mae"]})
    with pytest.raises(InputError, match="no answer"):
        pipeline.run(config, start_ray=lambda: None)
    assert "53.0 % [51.0, 55.0]  +3.0" in capsys.readouterr().out
