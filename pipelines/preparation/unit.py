"""One unit of `prepare`: read its items, examine every image, write its part, leave a receipt.

All of it is a function of the listing and the options. Doing a unit again, or in two places at
once, writes the same bytes to the same names; so a lost worker costs the unit it was at.
"""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from beit.git_lfs import is_pointer
from pipelines import storage
from pipelines.errors import DamagedFileError, StageFailed
from pipelines.lease import Fence
from pipelines.preparation.child import run_child
from pipelines.preparation.decode_process import Decoded, DecodeProcess, Rules
from pipelines.preparation.readers import Item, Reader, rehearse
from pipelines.preparation.source_plan import read_listing
from pipelines.preparation.sources import SUFFIXES
from pipelines.preparation.walking import Entry
from pipelines.records import read_record, write_record
from pipelines.tables.image_files import ImageRow, Part, PartWriter
from pipelines.units import work_uri

# A part may grow to this many times `part_bytes` before a second one is begun: a unit ends with
# the file that fills it, and that may be a tar.
MAX_PART_GROWTH = 2
NUM_EXAMPLES = 3
REHEARSAL = f"{rehearse.__module__}:{rehearse.__name__}"
# Workers that may die at a unit before its files are tried one by one, and before that is final.
SUSPICIOUS_DEATHS, MAX_DEATHS = 3, 12


@dataclass(frozen=True, kw_only=True)
class PrepareTask:
    """What is the same for all units of a prepare."""

    output: str
    reader: Reader
    rules: Rules
    decode_timeout: float
    part_bytes: int
    row_group_bytes: int
    digits: int
    """Digits of a unit's number in file names: as many as all need, so that names sort."""
    fence: Fence | None = None
    """Of the driver: a worker of one that was taken over from leaves no receipt."""
    rehearsal: str = REHEARSAL
    """`module:function` that reads entries without keeping them."""

    def check(self) -> None:
        """Raises LeaseLost when another driver has taken over."""
        if self.fence is not None:
            self.fence.check()


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a finished unit leaves behind, as a small JSON file."""

    listing: str
    """Hash of the listing it was made from."""
    items: int
    source_bytes: int
    parts: tuple[Part, ...]
    rejected: tuple[tuple[str, str, int], ...]
    """Key, reason and size of every item that is no row."""
    max_label: int
    """-1: no row has a label."""
    lost_bytes: int
    """Of containers that are rejected as a whole or from some place on."""
    # What receipts of release 0.1.0 do not say.
    ignored: tuple[tuple[str, str, int], ...] = ()
    """As `rejected`, of what lies beside the data, and is no item."""
    labels: dict[int, int] = dataclasses.field(default_factory=dict)
    """Rows of each class that has any."""

    def to_dict(self) -> dict[str, Any]:
        labels = {str(label): count for label, count in sorted(self.labels.items())}
        parts = [part.to_dict() for part in self.parts]
        return {**vars(self), "parts": parts, "labels": labels}

    def summary(self, unit: int) -> dict[str, Any]:
        """What the driver is sent: some numbers and a few examples."""
        return {
            "unit": unit,
            "items": self.items,
            "source_bytes": self.source_bytes,
            "lost_bytes": self.lost_bytes,
            "rejected": dict(Counter(reason for _, reason, _ in self.rejected)),
            "ignored": dict(Counter(reason for _, reason, _ in self.ignored)),
            "examples": [list(row) for row in self.rejected[:NUM_EXAMPLES]],
        }


def receipt_uri(output: str, unit: int) -> str:
    """Address of a unit's receipt."""
    return work_uri(output, "receipts", f"{unit:08d}.json")


def read_receipt(output: str, unit: int) -> Receipt:
    """Raises FileNotFoundError, or InputError if it is damaged."""
    remedy = "remove it, and the same command does the unit again"
    return read_record(receipt_uri(output, unit), Receipt, remedy)


PART_NAME = re.compile(r"part-\d{5,}(_\d{2,})?\.parquet")


def part_name(unit: int, digits: int, position: int) -> str:
    """`part-00012.parquet`; further parts of one unit sort directly behind it."""
    more = f"_{position:02d}" if position else ""
    return f"part-{unit:0{digits}d}{more}.parquet"


def process_unit(task: PrepareTask, unit: int, listing: str, *, deaths: int = 0) -> dict[str, Any]:
    """Makes the unit's parts and receipt, unless another driver has; returns a summary.

    Args:
        deaths: Of workers at this unit, so far.

    Raises:
        InputError: the listing is not the planned one.
        StageFailed: workers die at the unit for no reason that lies in its files.
        LeaseLost: another driver has taken over.
        OSError: the store does not answer, in spite of retries.
    """
    try:
        receipt = read_receipt(task.output, unit)
        if receipt.listing == listing:
            return receipt.summary(unit)
    except (FileNotFoundError, DamagedFileError):
        pass
    entries = read_listing(task.output, unit, listing)
    if deaths >= SUSPICIOUS_DEATHS:
        entries = _without_killers(task, unit, entries, deaths)
    build = _Build(task, unit)
    for item in task.reader.items(entries):
        build.add(item)
    parts = build.finish()
    containers = {entry.path for entry in entries if task.reader.format in SUFFIXES}
    receipt = Receipt(
        listing=listing,
        items=build.items,
        source_bytes=sum(entry.size for entry in entries if not entry.ignored),
        parts=parts,
        rejected=tuple(sorted(build.rejected)),
        ignored=tuple(sorted(build.ignored)),
        max_label=max(build.labels, default=-1),
        labels=dict(build.labels),
        lost_bytes=sum(size for key, _, size in build.rejected if key in containers),
    )
    write_record(receipt_uri(task.output, unit), receipt.to_dict(), check=task.check)
    return receipt.summary(unit)


def _without_killers(
    task: PrepareTask, unit: int, entries: list[Entry], deaths: int
) -> list[Entry]:
    """The entries of a unit at which workers died, without those that kill their reader.

    Images are decoded elsewhere, so what is left to kill a worker is a container that crashes its
    parser, or too little memory; and the machine itself, which proves nothing against the unit.
    """
    if deaths >= MAX_DEATHS:
        raise StageFailed(
            f"unit {unit} ({entries[0].path} to {entries[-1].path}) ended its worker {deaths} "
            "times, most likely for lack of memory; give --num_tasks fewer, or a smaller "
            "--part_mb with another output."
        )
    if task.reader.format not in SUFFIXES:
        return entries
    return [
        entry
        if entry.ignored or entry.reason or _survives(task, entry)
        else dataclasses.replace(entry, reason="reader_crash")
        for entry in entries
    ]


def _survives(task: PrepareTask, entry: Entry) -> bool:
    """Whether a process that reads this entry lives through it; an error is no death."""
    text = json.dumps([dataclasses.asdict(task.reader), dataclasses.asdict(entry)])
    return run_child(task.rehearsal, text).survived


class _Build:
    """The parts of a unit while they are being made."""

    def __init__(self, task: PrepareTask, unit: int) -> None:
        self.task, self.unit = task, unit
        self.decoder = _decoder(task.rules, task.decode_timeout)
        self.items = 0
        self.labels: Counter[int] = Counter()
        self.last_key: str | None = None
        self.rejected: list[tuple[str, str, int]] = []
        self.ignored: list[tuple[str, str, int]] = []
        self.parts: list[Part] = []
        self.writer: PartWriter | None = None

    def add(self, item: Item) -> None:
        """Takes an item to the part, the rejected or the ignored ones; nothing else can happen."""
        if item.ignored:
            self.ignored.append((item.key, item.reason, item.size))
            return
        repeated = item.key == self.last_key
        self.last_key = item.key
        reason = "duplicate_key" if repeated else item.reason
        if not reason:
            verdict = self.decoder.examine(item.data)
            if isinstance(verdict, Decoded):
                self.items += 1
                self._write(item, verdict)
                return
            reason = verdict.reason
            if is_pointer(item.data):
                reason = "lfs_pointer"
        if not item.claims and reason in ("not_an_image", "empty", "lfs_pointer"):
            self.ignored.append((item.key, reason, item.size))
            return
        self.items += 1
        self.rejected.append((item.key, reason, item.size))

    def _write(self, item: Item, image: Decoded) -> None:
        if self.writer is None:
            self.writer = PartWriter(row_group_bytes=self.task.row_group_bytes)
        self.writer.add(
            ImageRow(
                key=item.key,
                image=image.image,
                height=image.height,
                width=image.width,
                label=item.label,
                digest=image.digest,
                group=item.group,
            )
        )
        if item.label is not None:
            self.labels[item.label] += 1
        if self.writer.image_bytes >= MAX_PART_GROWTH * self.task.part_bytes:
            self._close_part()

    def _close_part(self) -> None:
        if self.writer is None:
            return
        name = part_name(self.unit, self.task.digits, len(self.parts))
        data, part = self.writer.finish(name)
        storage.write_bytes(storage.join(self.task.output, name), data)
        self.parts.append(part)
        self.writer = None

    def finish(self) -> tuple[Part, ...]:
        self._close_part()
        return tuple(self.parts)


# A worker process does one unit after another; its decoder stays.
_DECODERS: dict[tuple[Rules, float], DecodeProcess] = {}


def _decoder(rules: Rules, timeout: float) -> DecodeProcess:
    if (rules, timeout) not in _DECODERS:
        for old in _DECODERS.values():
            old.close()
        _DECODERS.clear()
        _DECODERS[rules, timeout] = DecodeProcess(rules, timeout=timeout)
    return _DECODERS[rules, timeout]
