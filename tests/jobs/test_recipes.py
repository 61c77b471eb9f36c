"""Recipes: text stays text, nothing is taken in silence, and errors name the file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from jobs.command import parse
from pipelines.errors import InputError
from tests.fuzzing import Subject, failures, outcomes
from tests.names import ODD_NAMES


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section."""

    title: str | None = "x"
    mode: Literal["on", "off"] = "on"
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy stage."""

    output: str = ""
    tokens: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    section: Section = field(default_factory=Section)


def recipe(tmp_path: Path, text: str | bytes) -> Toy:
    file = tmp_path / "toy.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return parse(Toy, [f"--config={file}"], stage="toy")


@pytest.mark.parametrize("word", ["007", "1e3", "no", "2024-04-12", "0x1f", "1_000", ".inf", "a#b"])
def test_text_stays_what_was_written(tmp_path: Path, word: str) -> None:
    found = recipe(tmp_path, f"output: {word}\ntokens: [{word}, b]\nsection: {{title: {word}}}\n")
    assert found == Toy(output=word, tokens=[word, "b"], section=Section(title=word))
    assert parse(Toy, [f"--output={word}", "--tokens", f"{word},b"], stage="toy") == Toy(
        output=word, tokens=[word, "b"]
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_a_path_in_recipes_and_flags(tmp_path: Path, name: str) -> None:
    text = yaml.safe_dump({"output": name, "tokens": [name]}, allow_unicode=True)
    assert recipe(tmp_path, text) == Toy(output=name, tokens=[name])
    assert parse(Toy, [f"--output={name}"], stage="toy").output == name


def test_numbers_and_other_types_are_still_read(tmp_path: Path) -> None:
    text = "layers: [1, 2]\nsection: {rate: 1e-3, title: null, mode: off}\n"
    section = Section(rate=1e-3, title=None, mode="off")
    assert recipe(tmp_path, text) == Toy(layers=[1, 2], section=section)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", b"\xef\xbb\xbf", "section:\n#  rate: 1\n"]
)
def test_an_empty_recipe_says_nothing(tmp_path: Path, text: str | bytes) -> None:
    assert recipe(tmp_path, text) == Toy()


def test_aliases_and_merged_keys(tmp_path: Path) -> None:
    text = "output: &name 007\ntokens: [*name]\n"
    assert recipe(tmp_path, text) == Toy(output="007", tokens=["007"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output: a\noutput: b\n", "line 2: 'output' is given twice"),
        ("section:\n  rate: 1\n  rate: 2\n", "line 3: 'rate' is given twice"),
        ("section:\n\trate: 1\n", "line 2, column 1"),
        ("a: [1\n", "line 2, column 1"),
        ("a: 1\n---\nb: 1\n", "expected a single document"),
        ("- a\n", "no fields"),
        ("word\n", "no fields"),
        (b"output: \xff\n", "not valid YAML"),
        ("a: " + 600 * "[", "not valid YAML"),
        ("outptu: a\n", "outptu"),
        ("section: {rate: fast}\n", "rate.*fast"),
    ],
)
def test_what_is_wrong_names_the_file(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        recipe(tmp_path, text)
    assert str(tmp_path / "toy.yaml") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_recipes_that_cannot_be_opened(tmp_path: Path) -> None:
    for name in ("missing.yaml", "."):
        with pytest.raises(InputError, match="beit recipes"):
            parse(Toy, [f"--config={tmp_path / name}"], stage="toy")


def test_damage_is_another_recipe_or_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "# A comment.\noutput: s3://bucket/name\ntokens: [a, b/c]\n"
        "section:\n  title: 'a title'\n  rate: 2.5e-4\n  mode: 'off'\n"
    )

    def read() -> Toy:
        return parse(Toy, [f"--config={path}"], stage="toy")

    subject = Subject(name="recipe", path=path, read=read, checked=False)
    assert not failures(subject, outcomes(subject, 100))
