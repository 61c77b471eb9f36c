"""The evidence program: its table, its intervals, and a cell made from beginning to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import cells, data, document, findings, run, stages, statistics
from benchmarks.front_page import marks, part
from jobs.cli import parse_stage


def result(setting, hits, **other):
    return {
        **dataclasses.asdict(setting), "rows": "r", "hits": hits, "held_out_loss": 4.5,
        "images_seen": 1280, "flops_per_image": 1e9, "training_seconds": 7, "commit": "c",
        "machine": "m", "date": "2026-01-01",
        "scores": {"pretrained": {"linear": 0.5, "knn": 0.4}}, **other,
    }  # fmt: skip


def results_of(experiment, hits):
    return {cell.name: result(cell, hits(cell)) for cell in experiment.cells()}


def test_no_two_cells_share_a_name():
    found = {cell for experiment in cells.experiments() for cell in experiment.cells()}
    assert len({cell.name for cell in found}) == len(found)
    assert all(cell.views in cells.VIEW_EDGES for cell in found), "V views are whole token tables"


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        rows = draw.normal(0, 0.2, 300)
        seeds = draw.normal(0, 0.02, (8, 1))
        hits = draw.random((8, 300)) < np.clip(0.5 + rows + seeds, 0, 1)
        found = statistics.accuracy(hits, draws=500)
        covered += found.low <= 50 <= found.high
    assert 34 <= covered <= 40  # eight seeds are few: a bootstrap is a little narrow


@pytest.mark.parametrize("device", stages.NETWORKS)
def test_the_commands_of_every_kind_of_cell_are_such_as_the_product_takes(device, monkeypatch):
    """A cell's last stages run hours after its first."""
    names = ("train", "probe", "held_out", *data.HALVES)
    folders = {name: Path("pictures") / name for name in names}
    monkeypatch.setattr(data, "write", lambda *_: folders)
    kinds = {}
    for experiment in cells.experiments():
        for one in experiment.settings:
            kind = (
                one.data, one.objective, one.tokenizer, one.mask, one.form, one.precision, one.start
            )  # fmt: skip
            kinds.setdefault(kind, one)
    assert {kind[1] for kind in kinds} == {"beit", "beitv2", "mae"}
    seen = {
        (stage, *flags)
        for one in kinds.values()
        for stage, flags in stages.commands(one, Path("work"), device)
        if device == "cpu" or stage in ("train-tokenizer", "pretrain")  # as far as they differ
    }
    for stage, *flags in seen:
        config = parse_stage(stage, flags)
        if stage == "pretrain":
            assert config.scaling.use_gpu == (device == "cuda")


def test_a_paired_difference_is_narrower_than_the_two_intervals():
    draw = np.random.default_rng(2)
    easy = draw.random(400)
    one = draw.random((3, 400)) < easy
    two = one.copy()
    two[:, :8] = True
    alone, paired = statistics.accuracy(two), statistics.difference(two, one)
    assert paired.mean == pytest.approx(100 * (two.mean() - one.mean()))
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_what_was_not_run_is_open(tmp_path: Path):
    document.write(tmp_path / "evidence.md", {})
    page = (tmp_path / "evidence.md").read_text()
    assert page.count("| open |") == len(cells.experiments())
    assert "rule for V is open" in page
    assert not list((tmp_path / "pictures").iterdir())
    first, second, *_ = cells.experiments()[0].settings
    document.write(tmp_path / "evidence.md", {first.name: result(first, "1100")})
    page = (tmp_path / "evidence.md").read_text()
    assert f"| {first.views} | 1 of 3 | 50.0 % [" in page
    assert f"| {second.views} | open |" in page


def test_the_rule_takes_the_fewest_views_that_cost_less_than_a_point(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)

    def hits(cell):  # one view loses three points, all others none
        return "1" * (57 if cell.views == 1 else 60) + "0" * (43 if cell.views == 1 else 40)

    found = {}
    for experiment in cells.experiments()[:2]:
        found |= results_of(experiment, hits)
    document.write(tmp_path / "evidence.md", found)
    page = (tmp_path / "evidence.md").read_text()
    assert "4 of 40 and 4 of 120; as a share of E at both lengths 0.1." in page
    assert "-3.0 [" in page
    plot = (tmp_path / "pictures" / "evidence-views.svg").read_text()
    assert plot.count("<svg") == 1
    document.write(tmp_path / "evidence.md", found)
    assert (tmp_path / "pictures" / "evidence-views.svg").read_text() == plot


def test_fewer_views_than_some_that_lose_are_not_enough(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)

    def hits(cell):
        return ("000000" if cell.views == 12 else "101010") + "10" * 47

    found = {}
    for experiment in cells.experiments()[:2]:
        found |= results_of(experiment, hits)
    assert "1 of 40 and 40 of 120" in document.rule(found)


def test_a_rule_of_all_views_says_what_fewer_did(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    found = {}
    for experiment in cells.experiments()[:2]:
        most = experiment.settings[0].views
        found |= results_of(experiment, lambda c, m=most: "10" * 50 if c.views == m else "01" * 50)
    told = document.rule(found)
    assert "40 of 40 and 120 of 120; as a share of E at both lengths 1." in told
    assert "Of 120 did not come within it: 12 views +0.0 [-" in told


def test_tokens_of_two_tokenizers_are_not_compared():
    [reference, other, *_] = cells.experiments()[0].settings
    one = {reference.name: result(reference, "01", tokenizer_fingerprint="a")}
    two = {other.name: result(other, "01", tokenizer_fingerprint="b")}
    with pytest.raises(ValueError, match="two tokenizers"):
        findings.against(other, reference, one | two)


def test_the_summary_has_what_has_all_seeds(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    experiment = cells.experiments()[0]
    found = {}
    for cell in experiment.cells():
        if (cell.views, cell.seed) != (1, 2):
            beside = {"baseline_hits": {"pixels": "1000" * 25}} if cell.views == 4 else {}
            found[cell.name] = result(cell, "1100" * 25, **beside)
    told = document.summary(found, tmp_path, "pictures")
    assert f"| {experiment.title} | views 40 | 50.0 %" in told
    assert "| views 4 | 50.0 %" in told
    assert "views 1 |" not in told, "one of its seeds is missing"
    assert "+25.0 [" in told
    assert "pictures/evidence.svg" in told
    assert (tmp_path / "evidence.svg").read_text().count("<svg") == 1
    assert document.front(found).replace("docs/pictures", "pictures") == told


def test_every_row_is_paired_with_raw_pixels_of_its_own_images(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    longer = cells.Cell(steps=3000)
    pixels = {"baseline_hits": {"pixels": "1000" * 25}}
    found = {}
    for seed in cells.SEEDS:
        base = cells.of_baselines("emoji", seed)
        found[base.name] = result(base, "1100" * 25, **pixels)
        one = dataclasses.replace(longer, seed=seed)
        found[one.name] = result(one, "1110" * 25)
    gain = findings.over_baseline(longer, "pixels", found)
    assert gain.mean == pytest.approx(50)
    assert gain.low < 50 < gain.high < 100
    assert findings.over_baseline(cells.Cell(data="fashion"), "pixels", found) is None
    found[longer.name]["rows"] = "others"
    with pytest.raises(ValueError, match="other images"):
        findings.over_baseline(longer, "pixels", found)


def test_rows_of_other_images_are_not_compared(tmp_path: Path):
    experiment = cells.experiments()[0]
    found = results_of(experiment, lambda _: "10")
    one = experiment.settings[1].name
    found[one]["rows"] = "others"
    with pytest.raises(ValueError, match="other images"):
        document.write(tmp_path / "evidence.md", found)


def test_the_halves_that_are_tuned_and_tested_share_no_drawing():
    found = data._emoji()
    names = [{path for path, _ in found[half]} for half in data.HALVES]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {path for path, _ in found["probe"]}
    assert abs(len(names[0]) - len(names[1])) <= 1
    classes = [{path.partition("/")[0] for path in half} for half in names]
    assert classes[0] == classes[1]


def test_the_table_of_what_was_tuned_compares_with_random_weights(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    [experiment] = [e for e in cells.experiments() if e.name == "finetune"]

    def hits(cell):
        return "1100" * 25 if cell.start == "random" else "1110" * 25

    found = results_of(experiment, hits)
    rows = document.table(experiment, found).splitlines()
    assert rows[0].startswith("| start | objective | tokenizer | seeds | test accuracy |")
    assert rows[2].startswith("| random | beit | dvae | 3 | 50.0 % [")
    assert "| pretrained | mae | pixels | 3 | 75.0 % [" in rows[-1]
    assert "| +25.0 [" in rows[-1]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.long
def test_a_killed_program_goes_on_to_the_same_page(tmp_path: Path, monkeypatch):
    small = cells.Cell(images=520, steps=4, views=1, tokenizer="kmeans")
    trial = cells.Experiment(
        name="trial", title="Trial", axis=("views", "objective", "form"),
        settings=(
            small,
            dataclasses.replace(small, form="jpeg90"),
            dataclasses.replace(cells.MAE, images=520, steps=4),
        ),
    )  # fmt: skip
    tuned = cells.Experiment(
        name="tuned", title="Tuned", axis=("start",),
        settings=(dataclasses.replace(small, tuned=6, start="random"),),
    )  # fmt: skip
    for module in (run, document, findings):
        monkeypatch.setattr(module, "experiments", lambda: [trial, tuned])
    for module in (cells, document, findings):
        monkeypatch.setattr(module, "SEEDS", (0,))
    pictures = {name: members[::2] for name, members in data._emoji().items()}
    monkeypatch.setattr(data, "_emoji", lambda: pictures)
    results, page = tmp_path / "results.json", tmp_path / "evidence.md"
    run.run(tmp_path / "work", results, page, most=1)
    assert "open" in page.read_text()
    run.run(tmp_path / "work", results, page)
    first = json.loads(results.read_text())
    assert len(first["cells"]) == 4
    tested = sum(len(pictures[half]) for half in data.HALVES)
    assert len(first["cells"][tuned.settings[0].name]["hits"]) == tested
    results.unlink()
    run.run(tmp_path / "work", results, page)  # every stage says that it is done
    again = json.loads(results.read_text())
    for name, cell in first["cells"].items():
        assert again["cells"][name]["hits"] == cell["hits"]
        assert again["cells"][name].get("scores") == cell.get("scores")
    assert "open" not in page.read_text().split("# Where")[0].split("\n\n", 3)[-1]


def test_the_front_page_has_each_cell_as_soon_as_it_is_there(tmp_path: Path, monkeypatch):
    """Cells take hours: who stops the program keeps results and pages that agree."""
    results, readme = tmp_path / "evidence.json", tmp_path / "README.md"
    readme.write_text("\n".join(marks("evidence")))
    monkeypatch.setattr(run, "RESULTS", results)
    monkeypatch.setattr(run, "README", readme)
    done = []

    def measured(cell, *_):
        if done:
            raise KeyboardInterrupt
        done.append(cell)
        return result(cell, "1100")

    monkeypatch.setattr(run, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "work", results, tmp_path / "evidence.md")
    assert part(readme.read_text(), "evidence") == document.front(run.read(results)).strip("\n")


def test_programs_that_share_results_keep_what_the_other_found(tmp_path: Path, monkeypatch):
    experiment = cells.experiments()[0]
    mine, others = experiment.settings[0], dataclasses.replace(experiment.settings[0], seed=2)
    results = tmp_path / "evidence.json"

    def measured(cell, *_):
        run.add(results, others, result(others, "10"))  # the other one ends first
        return result(cell, "11")

    monkeypatch.setattr(run, "measured", measured)
    run.run(tmp_path / "work", results, tmp_path / "evidence.md", "views", seeds=(0,), most=1)
    assert set(run.read(results)) == {mine.name, others.name}
