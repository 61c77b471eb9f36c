"""The page on the architecture names every file, by the words of the file itself."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("beit", "pipelines", "jobs")


def first_line(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def test_every_file_stands_in_the_tree():
    lines = (REPOSITORY / "docs/architecture.md").read_text().split("## Files")[1].splitlines()
    listed, folder = {}, ""
    for line in lines:
        if line.endswith("/") and not line.startswith(" "):
            folder = line
        elif line.startswith("    "):
            name, _, words = line.strip().partition(" ")
            listed[folder + name] = words.strip()
    files = [path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")]
    there = {str(path.relative_to(REPOSITORY)): first_line(path) for path in files}
    assert listed == {name: words for name, words in there.items() if words}
