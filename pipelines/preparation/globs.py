"""Globs over paths: `*` and `?` stay within a directory, `**/` is any number of directories,
`[ab]` is a choice, `{000..010}` a range of numbers.
"""

import re

from pipelines.errors import InputError

WILD = re.compile(r"[*?[]|\{\d+\.\.\d+\}")
# A question mark begins the options of a remote URI.
WILD_REMOTE = re.compile(r"[*[]|\{\d+\.\.\d+\}")

_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|\{\d+\.\.\d+\}|.", re.DOTALL)
_FIXED = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Glob:
    """Which paths are meant, and which directories need to be listed to find them."""

    def __init__(self, pattern: str = "**") -> None:
        names = pattern.split("/")
        crossing = [position for position, name in enumerate(names) if "**" in name]
        self.unbounded = bool(crossing)
        self.exact = False
        """It is one file that the user has named."""
        self.path = _Matcher(pattern)
        self.directories = [_Matcher(name) for name in names[: (crossing or [-1])[0]]]

    def matches(self, path: str) -> bool:
        """Whether this file is meant."""
        return self.path.matches(path)

    def may_hold(self, directory: str) -> bool:
        """Whether files that are meant may lie below a directory whose parent may hold some."""
        depth = directory.count("/")
        if depth >= len(self.directories):
            return self.unbounded
        return self.directories[depth].matches(directory.rpartition("/")[2])


def exactly(name: str) -> Glob:
    """The glob of one file, whatever characters its name has."""
    glob = Glob("".join(f"[{char}]" if char in "*?[{" else char for char in name))
    glob.exact = True
    return glob


class _Matcher:
    """A regular expression whose groups are numbers that lie in ranges."""

    def __init__(self, pattern: str) -> None:
        self.ranges: list[tuple[int, int]] = []
        try:
            self.regex = re.compile("".join(map(self._regex, _TOKEN.findall(pattern))), re.DOTALL)
        except re.error as error:
            raise InputError(f"source: {pattern!r} is no glob ({error})") from error

    def _regex(self, token: str) -> str:
        if token in _FIXED:
            return _FIXED[token]
        if len(token) > 2 and token.startswith("["):
            return "[" + ("^" if token[1] == "!" else "") + _escaped(token[1:-1]) + "]"
        if len(token) > 2 and token.startswith("{"):
            first, last = token[1:-1].split("..")
            self.ranges.append((int(first), int(last)))
            padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
            return f"([0-9]{{{max(len(first), len(last))}}})" if padded else "(0|[1-9][0-9]*)"
        return re.escape(token)

    def matches(self, text: str) -> bool:
        found = self.regex.fullmatch(text)
        return found is not None and all(
            low <= int(number) <= high
            for number, (low, high) in zip(found.groups(), self.ranges, strict=True)
        )


def _escaped(choice: str) -> str:
    """The inside of `[...]`: ranges stay, nothing else is special."""
    return choice.removeprefix("!").replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
