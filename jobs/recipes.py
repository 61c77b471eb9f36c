"""Recipes: YAML files of flags, read by the types of the fields that they set.

YAML makes numbers, booleans and dates of words. A field that is text keeps what was written
(`name: 007`), a key that is given twice is refused, and errors name the file.
"""

import dataclasses
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pipelines.errors import InputError

FLAG = "--config"


def shipped_recipes() -> dict[str, Path]:
    """Recipes of the package by name, wherever it is installed."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("configs").glob("*.yaml"))}


def with_recipes(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with what the recipes say in place of their names.

    `--config` takes a file, a shipped recipe's name, or its path in a checkout that is not here.

    Raises:
        InputError: a recipe is not there or cannot be read; names it.
    """
    read: list[str] = []
    for argument in _joined(arguments):
        if not argument.startswith(f"{FLAG}="):
            read.append(argument)
        elif text := recipe_text(config_class, _found(argument.removeprefix(f"{FLAG}="))):
            read.append(f"{FLAG}={text}")
    return read


def recipe_names(arguments: Sequence[str]) -> list[str]:
    """The recipes among the arguments, as they are given."""
    given = [argument.partition("=") for argument in _joined(arguments)]
    return [name for flag, _, name in given if flag == FLAG]


def _joined(arguments: Sequence[str]) -> list[str]:
    return [f"{FLAG}={a}" if before == FLAG else a
            for before, a in zip(["", *arguments], arguments, strict=False)
            if a != FLAG]  # fmt: skip


def _found(name: str) -> Path:
    given = Path(name)
    known = shipped_recipes().get(given.name.removesuffix(".yaml"))
    return given if known is None or given.is_file() else known


def recipe_text(config_class: type, path: Path) -> str:
    """What a recipe says, as YAML with text in quotes; "" where it says nothing.

    Raises:
        InputError: it is not there, is no YAML, or gives a key twice; names the file.
    """
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
        if root is not None:
            _check(root, config_class, path, set())
    except OSError as error:
        raise InputError(
            f"config = {path}: {error.strerror}; `beit recipes` lists those that ship"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"config = {path}: not valid YAML: {_one_line(error)}") from error
    if root is None or _is_null(root):
        return ""
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"config = {path}: it holds no fields, written `name: value`")
    text: str = yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True)
    return text


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = " ".join(filter(None, [getattr(error, "context", ""), getattr(error, "problem", "")]))
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def _check(node: Any, hint: Any, path: Path, seen: set[int]) -> None:
    """Quotes what is text by its field's type; refuses keys that are given twice."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        # A section of which all is commented out says nothing.
        node.value = [
            (key, value)
            for key, value in node.value
            if not (_is_null(value) and dataclasses.is_dataclass(_type_of(hint, key.value)))
        ]
        names: set[str] = set()
        for key, value in node.value:
            if key.value in names and key.value != "<<":
                raise InputError(
                    f"config = {path}: line {key.start_mark.line + 1}: {key.value!r} is given "
                    "twice; keep one"
                )
            names.add(key.value)
            _check(value, _type_of(hint, key.value), path, seen)
    elif isinstance(node, yaml.SequenceNode):
        [element] = get_args(hint)[:1] if get_origin(hint) in (list, tuple) else [None]
        for value in node.value:
            _check(value, element, path, seen)
    elif is_text(hint) and not _is_null(node):
        node.tag, node.style = "tag:yaml.org,2002:str", '"'


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def is_text(hint: Any) -> bool:
    """Whether a field of this type holds text, perhaps beside None."""
    if get_origin(hint) is Annotated:
        return is_text(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return all(is_text(one) for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return all(isinstance(one, str) for one in get_args(hint))
    return hint is str


def _type_of(section: Any, name: str) -> Any:
    """The type of a field of a section; of a dotted name the field it leads to."""
    name, _, rest = name.partition(".")
    if not (isinstance(section, type) and dataclasses.is_dataclass(section)):
        return None
    hint = get_type_hints(section, include_extras=True).get(name)
    return _type_of(hint, rest) if rest else hint


def with_lists(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Lets a list be written `--tokens A` or `--tokens A,B`, beside YAML's `--tokens=[A, B]`."""
    lists = {
        f"--{name}": is_text(get_args(hint)[0])
        for name, hint in get_type_hints(config_class).items()
        if get_origin(hint) is list
    }
    bracketed: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        before = bracketed[-1] if bracketed else ""
        if flag in lists and equals and not value.startswith("["):
            bracketed.append(f"{flag}={_bracketed(value, text=lists[flag])}")
        elif before in lists and not argument.startswith("["):
            bracketed.append(_bracketed(argument, text=lists[before]))
        else:
            bracketed.append(argument)
    return bracketed


def _bracketed(value: str, *, text: bool) -> str:
    # A path is text, also one that looks like a number.
    return json.dumps(value.split(","), ensure_ascii=False) if text else f"[{value}]"
