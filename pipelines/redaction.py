"""Secrets stay out of everything that is written: the one place that takes them out.

Two rules. What is recorded loses the secrets of URIs, told by their form (`redacted`): whatever
else a configuration says is kept as it is, for a resumed run is held to it. What is told to people,
in errors and logs, is of libraries' making and may repeat anything: it loses the values of secret
variables as well (`redacted_text`).
"""

import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"
# scheme://user:password@host: the user's name alone may be a token. Also as the value of a query.
_USER_INFO = re.compile(
    r"(?<=://)[^/\s?#]+@|(?<=%3A%2F%2F)(?:(?!%2F|%40)[^/\s?#&])+%40", re.IGNORECASE
)
_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*(?:secret|token|passw|passphrase|pwd|signature|credential|access_?key|account_?key"
    r"|api_?key|connection_?string)[\w.-]*|sig|key)=)[^&\s#]*",
    re.IGNORECASE,
)
# Fields of records that hold sentences.
_TOLD = ("message", "error", "traceback", "cause")


_KNOWN: set[str] = set()


def hide(values: Iterable[str]) -> None:
    """From now on these values (passwords of this process) are taken out of errors and logs."""
    _KNOWN.update(values)


def redacted(text: str) -> str:
    """`text` with user info and secret query values of the URIs in it replaced by `***`."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(_hidden_user, text))


def redacted_text(text: str) -> str:
    """An error or a log, also without the values that `hide` was told."""
    for value in sorted(_KNOWN, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return redacted(text)


def redacted_values(value: Any) -> Any:
    """JSON-like values with every text in them redacted; sentences as errors are."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: _redacted_field(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return value


def _redacted_field(name: str, value: Any) -> Any:
    told = name in _TOLD and isinstance(value, str)
    return redacted_text(value) if told else redacted_values(value)


def _hidden_user(found: re.Match[str]) -> str:
    return HIDDEN + ("@" if found[0].endswith("@") else "%40")
