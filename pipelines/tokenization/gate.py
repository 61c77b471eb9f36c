"""The gate of the `tokenize` stage: a tokenizer that has collapsed is not run to the end."""

import numpy as np

from pipelines import scorecard
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.tokenization import report as token_report
from pipelines.tokenization.ledger import Ledger
from pipelines.tokenization.task import TokenizeTask


class Gate:
    """Looks at the tokens of some units, spread over the table, as soon as they are there."""

    def __init__(self, config: TokenizeConfig, task: TokenizeTask, ledger: Ledger) -> None:
        self.options, self.task, self.ledger = config.gate, task, ledger
        self.open = bool(self.options.min_codes or self.options.min_perplexity)
        self.units = scorecard.evenly_spaced(len(ledger.units), self.options.num_units)
        self.skipped: set[int] = set()

    def first(self, todo: np.ndarray) -> np.ndarray:
        """`todo` with the units that the gate waits for in front."""
        if not self.open:
            return todo
        waited = np.isin(todo, self.units)
        return np.concatenate([todo[waited], todo[~waited]])

    def skip(self, unit: int) -> None:
        """This unit is not waited for: it was set aside."""
        self.skipped.add(unit)

    def check(self, *, last: bool = False) -> None:
        """Raises StageFailed once if the tokenizer uses too few codes."""
        if not self.open:
            return
        done = self.ledger.size[self.units] >= 0
        given_up = self.skipped | self.ledger.rejected.keys()
        awaited = [unit for unit in self.units[~done].tolist() if unit not in given_up]
        ready = self.units[done]
        if not len(ready) or (awaited and not last):
            return
        self.open = False
        names = [self.ledger.units.name(unit) for unit in ready]
        token_report.check_usage(self.task, names, self.options)
