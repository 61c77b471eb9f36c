"""What audits of all tables share: a list of findings, and the hashes of files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError, StageFailed
from pipelines.progress import Progress
from pipelines.tables.image_table import IGNORED, REJECTED, ImageTable

MAX_FINDINGS = 20


@dataclass
class Findings:
    """What is wrong, in the order found."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= MAX_FINDINGS:
            self.lines.append(line)

    def raise_if_any(self, uri: str) -> None:
        """Raises StageFailed naming every finding."""
        if self.count:
            more = f"\n  and {self.count - MAX_FINDINGS} more" if self.count > MAX_FINDINGS else ""
            raise StageFailed(f"{uri}: {self.count} findings\n  " + "\n  ".join(self.lines) + more)


def sample_files(count: int, share: float, generator: np.random.Generator) -> list[int]:
    wanted = max(1, round(count * share)) if count else 0
    return sorted(int(i) for i in generator.choice(count, wanted, replace=False))


def read_sample(
    images: ImageTable, rows: np.ndarray, columns: Sequence[str] | None, findings: Findings
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Positions in `rows` (ascending) and what stands there in the image table.

    Each row group is read once. Rows that cannot be read are findings.
    """
    groups = np.searchsorted(images.row_groups.starts, rows, side="right") - 1
    for group in np.unique(groups):
        positions = np.flatnonzero(groups == group).tolist()
        try:
            ((_, table),) = images.read_scattered(rows[positions], columns)
        except InputError as error:
            for position in positions:
                findings.add(f"row {rows[position]}: {error}")
            continue
        yield from zip(positions, table.to_pylist(), strict=True)


def check_files(
    uri: str,
    names: list[str],
    where: Callable[[int], str],
    expected: Callable[[int], tuple[int, str]],
    sample: list[int],
    config: AuditConfig,
    findings: Findings,
) -> tuple[list[int], int]:
    """Hashes files, `where` they lie; returns those that changed, and the number of bytes read.

    Other Parquet files below `uri` are findings.
    """
    changed: list[int] = []
    total = 0
    progress = Progress(len(sample), "audit", "files")

    def look(index: int) -> tuple[int, str] | None:
        try:
            return _hash_file(where(index))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(config.num_threads) as pool:
        for done, (index, found) in enumerate(
            zip(sample, _in_order(pool, look, sample, 2 * config.num_threads), strict=True), 1
        ):
            size, digest = expected(index)
            if found is None:
                findings.add(f"{names[index]}: missing")
            elif found != (size, digest):
                what = (
                    f"size {found[0]} != {size}"
                    if found[0] != size
                    else (f"hash {found[1]} != {digest}")
                )
                findings.add(f"{names[index]}: {what} (file != manifest)")
                changed.append(index)
            total += found[0] if found else 0
            progress.update(done)
    progress.close()
    known = {*names, REJECTED, IGNORED}
    for info in storage.list_files(uri, ".parquet", recursive=False):
        if info.path not in known:
            findings.add(f"{info.path}: not in the manifest")
    return changed, total


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int], ahead: int
) -> Iterator[Any]:
    """`map` that has at most `ahead` items under way: memory stays small for many files."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _hash_file(uri: str) -> tuple[int, str]:
    """Size and BLAKE2b-128 of a file, read in pieces."""
    state, size = hashlib.blake2b(digest_size=16), 0
    with storage.open_input(uri) as file:
        while piece := file.read(16 * 2**20):
            state.update(piece)
            size += len(piece)
    return size, state.hexdigest()
