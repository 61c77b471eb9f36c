"""The two failures a stage reports without a traceback, and how names are shown."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names field or file, value and remedy.

    Commands exit with 2.
    """


class StageFailed(RuntimeError):  # noqa: N818 - the stage's verdict, not a programming error
    """A stage ran and its result must not be used (collapsed tokenizer, failed audit, lost run).

    Commands exit with 1.
    """


def printable(text: str, *, keep: str = "") -> str:
    """Text for people: control characters and the like, which would steer a terminal, as `\\x1b`.

    Names of files and classes may hold anything. `keep`: characters that stay.
    """
    return "".join(
        char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text
    )


class StoreError(InputError, OSError):
    """An object store refuses us as a whole: its bucket or our credentials are wrong."""
