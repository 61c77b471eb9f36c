"""What a render made, and how it is told."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RenderResult:
    """What the stage made."""

    uri: str
    fingerprint: str
    """Of the view table; empty after a dry run."""
    num_rows: int
    num_views: int
    num_units: int
    units_computed: int
    """Units that this run wrote; 0 if all was done before."""
    rejected_units: int
    seconds: float
    """Spent on units, from the first one given out to the last receipt."""
    images_per_second: float
    num_bytes: int

    @property
    def already_done(self) -> bool:
        """There was nothing left to do."""
        return not self.units_computed

    def summary(self) -> str:
        """One line for the user."""
        if not self.fingerprint:
            return f"{self.uri}: nothing was done (dry run)"
        rate = f" at {self.images_per_second:,.1f} images/s" if self.units_computed else ""
        done = f", {self.rejected_units} units rejected" if self.rejected_units else ""
        each = self.num_bytes / (self.num_rows * self.num_views) / 1e3
        return (
            f"{self.uri}: {self.num_views} views of {self.num_rows:,} images{rate}{done}; "
            f"{self.num_bytes / 1e9:,.2f} GB, {each:.1f} kB a view"
        )
