"""Secrets stay out of everything that is written: the one place that takes them out."""

import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"
# scheme://user:password@host: the user's name alone may be a token.
_USER_INFO = re.compile(r"(?<=://)[^/\s?#]+@")
_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*(?:secret|token|passw|passphrase|pwd|signature|credential|access_?key|account_?key"
    r"|api_?key)[\w.-]*|sig)=)[^&\s#]*",
    re.IGNORECASE,
)


_KNOWN: set[str] = set()


def hide(values: Iterable[str]) -> None:
    """From now on these values (passwords of this process) are taken out, too."""
    _KNOWN.update(values)


def redacted(text: str) -> str:
    """`text` with user info and secret query values of the URIs in it, and what `hide` was told,
    replaced by `***`.
    """
    for value in sorted(_KNOWN, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def redacted_values(value: Any) -> Any:
    """JSON-like values with every text in them redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return value
