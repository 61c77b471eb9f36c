"""A look into the first tar before the work begins: are image and label of a sample told?

A source whose samples are unclear is unclear throughout, and that is a question to the user; a
single one in a million is rejected when its turn comes.
"""

import io

from pipelines import storage
from pipelines.config.prepare import PrepareConfig, tolerated
from pipelines.errors import InputError
from pipelines.preparation.readers import Item, Reader
from pipelines.preparation.samples import UNCLEAR, sample_of
from pipelines.preparation.sources import Source
from pipelines.preparation.tars import as_text, tar_members
from pipelines.preparation.walking import Entry

HEAD_BYTES = 8 * 2**20
NUM_NAMES = 6


def check_first_samples(config: PrepareConfig, source: Source, reader: Reader) -> None:
    """Asks what is meant where more of the first samples are unclear than may be rejected.

    Raises:
        InputError: naming the first of them, its members and what to give.
    """
    entry = next((entry for entry in source.entries() if not entry.ignored), None)
    if entry is None or entry.reason:
        return
    try:
        head = _head(storage.join(source.root, entry.path))
    except OSError:  # for its reader to judge
        return
    file = io.BytesIO(head)
    members, broken_at = tar_members(file)
    if broken_at is not None and members:
        # The last sample may go on where the head ends.
        last = sample_of(members[-1].name)
        members = [member for member in members if sample_of(member.name) != last]
    items = list(reader.member_items(entry, file, members))
    unclear = [item for item in items if item.reason in UNCLEAR]
    if len(unclear) <= tolerated(config.max_rejected, len(items)):
        return
    names = [as_text(member.name) for member in members]
    raise InputError(_question(entry, unclear[0], names))


def _question(entry: Entry, item: Item, names: list[str]) -> str:
    sample = sample_of(item.key.removeprefix(f"{entry.path}/"))
    inside = [name for name in names if sample_of(name) == sample]
    more = f" and {len(inside) - NUM_NAMES} more" if len(inside) > NUM_NAMES else ""
    what = "which is the image" if item.reason == "unclear_image" else "which is whose label"
    return (
        f"source: {entry.path} has one sample {sample!r} (files with the same name up to the first "
        f"dot) of {', '.join(inside[:NUM_NAMES])}{more}, and their names do not tell {what}; "
        f"{UNCLEAR[item.reason]}"
    )


def _head(uri: str) -> bytes:
    with storage.open_input(uri) as file:
        return bytes(file.read(HEAD_BYTES))
