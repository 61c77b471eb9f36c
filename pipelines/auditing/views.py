"""The audit of a view table: its files, its keys, and its views rendered again."""

from typing import Any

import numpy as np

from pipelines import storage
from pipelines.auditing.files import Findings, check_files, read_sample, sample_files
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError
from pipelines.rendering.work import stored_views
from pipelines.tables.image_table import ImageTable
from pipelines.tables.unit_files import differing_field
from pipelines.tables.view_files import check_file, decode_view
from pipelines.tables.view_table import ViewTable


def audit_views(config: AuditConfig, table: ViewTable, findings: Findings) -> tuple[int, int, int]:
    """Returns files and bytes read, and images rendered again (with `--images`)."""
    generator = np.random.default_rng(config.seed)
    sample = sample_files(table.num_files, config.share, generator)
    names = [table.file_name(index) for index in range(table.num_files)]
    changed, total = check_files(
        table.uri, names, table.file_uri, table.file_record, sample, config, findings
    )
    for index in changed:
        data, row_groups = storage.read_bytes(table.file_uri(index)), table.sizes_of(index)
        whole, difference = check_file(table.identity, data, row_groups)
        if difference:
            findings.add(f"{names[index]}: {difference} (file != manifest)")
        elif not whole:
            findings.add(f"{names[index]}: not a whole file of row groups as in the manifest")
    if not config.images:
        return len(sample), total, 0
    images = ImageTable.open(config.images)
    if images.fingerprint != table.image_fingerprint:
        raise InputError(
            f"images = {config.images}: image_fingerprint {images.fingerprint} != "
            f"{table.image_fingerprint} of {table.uri}; give the image table of these views"
        )
    return len(sample), total, _render_again(config, table, images, generator, findings)


def _render_again(
    config: AuditConfig,
    table: ViewTable,
    images: ImageTable,
    generator: np.random.Generator,
    findings: Findings,
) -> int:
    """Compares random slots of random rows with what is rendered now; returns their number."""
    wanted = min(config.samples, table.num_rows)
    rows = np.sort(generator.choice(table.num_rows, wanted, replace=False))
    rows = rows[table.have_file(rows)]
    for position, record in read_sample(images, rows, ("key", "image", "digest"), findings):
        slot = int(generator.integers(len(table.views)))
        try:
            difference = _difference(table, int(rows[position]), slot, record)
        except InputError as error:
            difference = str(error)
        if difference:
            findings.add(f"row {rows[position]}: {difference}")
    return len(rows)


def _difference(table: ViewTable, row: int, slot: int, record: dict[str, Any]) -> str | None:
    """What a slot of a row has otherwise than the view of this record of the image table."""
    identity = table.identity
    group = int(np.searchsorted(table.row_groups.starts, row, side="right")) - 1
    first = table.row_groups[group].start
    (found,) = table.read_group(group, slot).slice(row - first, 1).to_pylist()
    stored = found.pop("image")
    difference = differing_field(found, {name: record[name] for name in found})
    if difference:
        return f"{difference} (view table != images)"
    again = stored_views(record["image"], record["digest"], identity, key=record["key"])[slot]
    pixels, wanted = (
        decode_view(data, identity.form, identity.image_size, key=record["key"])
        for data in (stored, again)
    )
    if not np.array_equal(pixels, wanted):
        return f"slot_{slot}: pixels differ from those rendered now"
    return None
