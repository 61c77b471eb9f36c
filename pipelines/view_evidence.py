"""How many stored views are enough, as far as it was measured: docs/evidence.md.

The mask is drawn anew each time an image is seen, so that a view that comes again is not the same
task. How often it may come without a loss is known from one small network on drawings of 64 pixels.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One count of views, against a view of its own for each epoch."""

    epochs: int
    views: int
    points: float
    """By which the linear probe was better."""
    low: float
    """Of the 95 % interval, as is `high`."""
    high: float

    @property
    def epochs_a_view(self) -> float:
        """How often a view was seen."""
        return self.epochs / self.views

    def told(self) -> str:
        """What was found."""
        return f"{self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}]"


TRIED = (
    Tried(epochs=40, views=4, points=0.6, low=-0.8, high=2.0),
    Tried(epochs=120, views=12, points=0.5, low=-1.1, high=2.1),
    Tried(epochs=40, views=1, points=1.1, low=-0.2, high=2.4),
    Tried(epochs=120, views=1, points=0.5, low=-1.2, high=2.3),
)
"""From benchmarks/results/evidence.json, by which a test goes; few epochs a view first."""
MARGIN = -1.0
"""Points that fewer views may cost (benchmarks/evidence/protocol.md)."""
MOST_EPOCHS = max(tried.epochs for tried in TRIED)
MOST_EPOCHS_A_VIEW = max(tried.epochs_a_view for tried in TRIED)


def known_of(epochs: float, views: int) -> str:
    """What the evidence says of so many views in a run of so many epochs."""
    if views >= epochs:
        return "a new view each epoch"
    each = f"each seen in {epochs / views:.3g} epochs"
    nearest = _nearest(epochs, views)
    if nearest is None:
        return (
            f"{each}: outside of the evidence, which goes to {MOST_EPOCHS_A_VIEW:g} epochs a view, "
            f"{MOST_EPOCHS} in all"
        )
    cost = "no loss showed" if nearest.low > MARGIN else f"a loss of {-MARGIN:g} point may be"
    return (
        f"{each}; in a run of {nearest.epochs} epochs, {nearest.epochs_a_view:g} a view, {cost} "
        f"({nearest.told()})"
    )


def is_uncertain(epochs: float, views: int) -> bool:
    """Whether so many views may, for all that was tried, cost `MARGIN` or more."""
    nearest = _nearest(epochs, views)
    return views < epochs and (nearest is None or nearest.low <= MARGIN)


def _nearest(epochs: float, views: int) -> Tried | None:
    """The mildest that was tried of those no shorter, with views seen no less often."""
    return next(
        (t for t in TRIED if t.epochs >= epochs and t.epochs_a_view * views >= epochs), None
    )
