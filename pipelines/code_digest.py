"""Which code this is, by its bytes: what workers of one job must have in common."""

from pathlib import Path

from pipelines import storage


def code_digest() -> str:
    """Hash of the source of the packages that workers run."""
    root = Path(__file__).parents[1]
    files = sorted(path for name in ("beit", "pipelines") for path in (root / name).rglob("*.py"))
    return storage.fingerprint(
        [[str(path.relative_to(root)), storage.digest(path.read_bytes())] for path in files]
    )[:8]
