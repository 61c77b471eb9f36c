"""The two failures a stage reports without a traceback."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names field or file, value and remedy.

    Commands exit with 2.
    """


class StageFailed(RuntimeError):  # noqa: N818 - the stage's verdict, not a programming error
    """A stage ran and its result must not be used (collapsed tokenizer, failed audit, lost run).

    Commands exit with 1.
    """
