"""The audit of a view table: its files, its keys, and its views rendered again."""

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
        data, rows = storage.read_bytes(table.file_uri(index)), len(table.file_rows(index))
        whole, difference = check_file(table.identity, data, rows)
        if difference:
            findings.add(f"{names[index]}: {difference} (file != manifest)")
        elif not whole:
            findings.add(f"{names[index]}: not a whole file of {rows} rows")
    if not config.images:
        return len(sample), total, 0
    images = ImageTable.open(config.images)
    if images.fingerprint != table.image_fingerprint:
        raise InputError(
            f"images = {config.images}: image_fingerprint {images.fingerprint} != "
            f"{table.image_fingerprint} of {table.uri}; give the image table of these views"
        )
    return len(sample), total, _render_again(config, table, images, set(changed), findings)


def _render_again(
    config: AuditConfig, table: ViewTable, images: ImageTable, broken: set[int], findings: Findings
) -> int:
    generator = np.random.default_rng([config.seed, 1])
    wanted = min(config.samples, table.num_rows)
    rows = np.sort(generator.choice(table.num_rows, wanted, replace=False))
    present = [table.file_rows(i) for i in range(table.num_files) if i not in broken]
    rows = np.array([r for r in rows.tolist() if any(r in span for span in present)], np.int64)
    identity, done = table.identity, 0
    for position, record in read_sample(images, rows, ("key", "image", "digest"), findings):
        row = int(rows[position])
        slot = int(generator.integers(identity.num_views))
        group = int(np.searchsorted(table.row_groups.starts, row, side="right")) - 1
        try:
            stored = table.read_group(group, slot).slice(
                row - int(table.row_groups.starts[group]), 1
            )
            found = {name: stored[name][0].as_py() for name in stored.column_names}
            wanted_views = stored_views(
                record["image"], record["digest"], identity, key=record["key"]
            )
            pixels, again = (
                decode_view(data, identity.form, identity.image_size, key=record["key"])
                for data in (found["image"], wanted_views[slot])
            )
        except InputError as error:
            findings.add(f"row {row}: {error}")
            continue
        names = {name: found[name] for name in ("key", "digest")}
        difference = differing_field(names, {name: record[name] for name in names})
        if difference:
            findings.add(f"row {row}: {difference} (view table != images)")
        if not np.array_equal(pixels, again):
            findings.add(f"row {row}: slot_{slot}: pixels differ from those rendered now")
        done += 1
    return done
