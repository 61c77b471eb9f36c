"""Names of classes, as they are compared: Macs and others write the same accent in two ways."""

import unicodedata


def comparable(name: str) -> str:
    """The one way of writing that equal names have."""
    return unicodedata.normalize("NFC", name)
