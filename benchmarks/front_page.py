"""Parts of README.md that are written from results: what stands between two comments of a name."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def marks(name: str) -> tuple[str, str]:
    """The comments around a part."""
    return f"<!-- {name}: written from its results -->", f"<!-- end of {name} -->"


def part(text: str, name: str) -> str:
    """What stands between the comments. Raises ValueError where they are missing."""
    return _found(text, name)[1].strip("\n")


def with_part(text: str, name: str, content: str) -> str:
    """The page with another content between them."""
    before, _, after = _found(text, name)
    return "\n".join([before + marks(name)[0], content.strip("\n"), marks(name)[1] + after])


def _found(text: str, name: str) -> tuple[str, str, str]:
    begin, end = map(re.escape, marks(name))
    found = re.fullmatch(f"(.*){begin}(.*){end}(.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no part {name!r} between {marks(name)}")
    return found[1], found[2], found[3]
