"""Makes `tests` importable here and in Ray workers, before any package of that name."""
