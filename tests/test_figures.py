"""A reader's check: every figure of the front page and of the evidence stands in a results file."""

import json
import re

import pytest

from benchmarks import sample
from benchmarks.evidence import document
from benchmarks.evidence.run import RESULTS, read
from benchmarks.front_page import README, marks, part, with_part

ROOT = README.parent
PARTS = ("sample", "evidence")
WRITTEN_BY = (
    "written by `python -m benchmarks.sample`, `python -m benchmarks.evidence.run --most 0`"
)
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])"
# What is stated and not measured: definitions, names, versions, licences, settings of commands.
STATED = (
    r"about 40 % of an image's patches", r"Python 3\.11 to 3\.13", r"BEiT on 2 workers",
    r"port 5000", r"64 or more", r"10\^9 images", r"0 done, 1 failed, 2 bad input, 130 stopped",
    r"under 2 MB", r"CC-BY 4\.0", r"Apache-2\.0", r"arXiv[ .]\S+",
)  # fmt: skip


def prose(text):
    """The page without what is checked elsewhere or is no claim: parts, programs, links."""
    for name in PARTS:
        text = with_part(text, name, "")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text)


def claims(text):
    """(figure, is it a share, the results files that its paragraph or list item names)."""
    for block in re.split(r"\n\n|\n(?=[-|] )|\n(?=\|)", prose(text)):
        files = re.findall(r"\]\((benchmarks/results/[^)#]+)", block)
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", block)
        for phrase in STATED:
            words = re.sub(phrase, " ", " ".join(words.split()))
        for found in re.finditer(rf"({NUMBER})(\s?%)?", words):
            yield found[1], bool(found[2]), files


def numbers(path):
    return [float(n.replace(",", "")) for n in re.findall(NUMBER, path.read_text())]


def stands_in(figure, is_share, values):
    digits = len(figure.partition(".")[2])
    wanted = float(figure.replace(",", ""))
    scales = (1, 100) if is_share else (1,)
    return any(round(scale * value, digits) == wanted for value in values for scale in scales)


def missing(text):
    """Figures of a page that no results file named beside them holds."""
    return [
        (figure, files)
        for figure, is_share, files in claims(text)
        if not any(stands_in(figure, is_share, numbers(ROOT / name)) for name in files)
    ]


def generated():
    """The parts that are written from results, anew."""
    return {
        "sample": sample.table(json.loads(sample.RESULTS.read_text())),
        "evidence": document.front(read(RESULTS)),
    }


def test_every_figure_of_the_front_page_stands_in_a_results_file():
    text = README.read_text()
    assert len(list(claims(text))) >= 10
    assert missing(text) == []


@pytest.mark.parametrize("name", PARTS)
def test_what_is_written_from_results_was_not_changed_by_hand(name):
    assert part(README.read_text(), name) == generated()[name].strip("\n"), WRITTEN_BY


def test_the_page_of_the_evidence_is_what_its_results_say(tmp_path):
    document.write(tmp_path / "docs" / "evidence.md", read(RESULTS))
    written = (tmp_path / "docs" / "evidence.md").read_text()
    assert (ROOT / "docs" / "evidence.md").read_text() == written, WRITTEN_BY
    for drawn in (tmp_path / "docs").glob("pictures/*.svg"):
        assert (ROOT / "docs" / "pictures" / drawn.name).exists()


def test_a_planted_figure_is_found():
    text = README.read_text()
    assert missing(text.replace("6.2 times", "6.3 times"))[0][0] == "6.3"
    assert missing(text + "\n\nOn a GPU it is 31 % faster.")[0] == ("31", [])
    for name in PARTS:
        content = part(text, name)
        found = re.search(NUMBER, content)
        planted = content[: found.start()] + "77.7" + content[found.end() :]
        assert part(with_part(text, name, planted), name) != generated()[name].strip("\n")


def test_the_parts_are_marked():
    with pytest.raises(ValueError, match="sample"):
        part(README.read_text().replace(marks("sample")[1], ""), "sample")


@pytest.mark.parametrize(("dirty", "said"), [("true", "0123456789ab+"), ("false", "0123456789ab")])
def test_figures_of_a_changed_tree_say_so(tmp_path, dirty, said):
    code = {"commit": "0123456789abcdef", "dirty": dirty}
    period = {"mim_accuracy": 0.2, "images_per_second": 180}
    report = {"goodput": {"seconds": {"startup": 1, "compute": 2, "data_wait": 3}}, "steps": 9,
              "last_period": period, "unigram_accuracy": 0.1}  # fmt: skip
    evaluation = {"num_images": 9, "majority": 0.1, "scores": {}, "gains": {}}
    files = {"chain.json": {"machine": "m", "code": code, "stages": {}}, "run/report.json": report,
             "run/evaluation/evaluation.json": evaluation}  # fmt: skip
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    assert sample.measured(tmp_path)["commit"] == said


def test_the_table_of_the_sample_says_no_place():
    """Results are published: no path of the machine that made them."""
    assert not re.search(r"(?<![\w.])/(?:[\w.-]+/)+", sample.RESULTS.read_text())


def test_every_page_is_on_the_front_page():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README.read_text()))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    assert pages | {"infra/README.md"} <= linked
