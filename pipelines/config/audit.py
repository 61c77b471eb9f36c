"""Configuration of the `audit` stage."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import Ge, Gt, Le, check


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Reads a table again and checks that it is what its manifest says."""

    table: str
    """URI of an image table, a token table or a view table."""
    images: str = ""
    """Image table of a token table or view table. Empty: those are not compared with the images."""
    tokenizer: str = ""
    """Tokenizer of a token table. Empty: tokens are not computed again."""
    share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the files that is read; 1 reads all, 0.01 is a sample of one in a hundred."""
    samples: Annotated[int, Ge(0)] = 200
    """Images of a table that are decoded again, or views that are rendered or tokenized again."""
    min_agreement: Annotated[float, Gt(0), Le(1)] = 1.0
    """Least share of tokens that come out the same. Below 1 only for an audit on another kind of
    device than the tokens were made on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tokens are computed. auto: the kind of device that they were made on, if it is here."""
    seed: int = 0
    """Another seed takes another sample."""
    num_threads: Annotated[int, Ge(1)] = 8
    """Files read at a time."""

    def __post_init__(self) -> None:
        check(self)
