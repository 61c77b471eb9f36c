"""The `audit` stage: is a table still what was written, and would it be written again?

Files are read and hashed; a file that changed is opened to name the row and field. Of an image
table some images are decoded again; of a token table some tokens are computed again, online; of a
view table some views are rendered again.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq

from beit.images import UnusableImage, decode_image, image_digest
from pipelines import storage
from pipelines.auditing.files import Findings, check_files, read_sample, sample_files
from pipelines.auditing.tokens import audit_tokens
from pipelines.auditing.views import audit_views
from pipelines.config.audit import AuditConfig
from pipelines.errors import DamagedFileError, InputError, StageFailed, parsing
from pipelines.tables.image_files import IMAGE_SCHEMA
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tables.view_table import ViewTable

Table = TypeVar("Table", ImageTable, TokenTable, ViewTable)

# By kind of table: what is done again, and what must be given for it.
DONE_AGAIN = {
    "image_table": ("images decoded", ""),
    "token_table": ("views tokenized", "--images and --tokenizer"),
    "view_table": ("views rendered", "--images"),
}


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What was looked at. A table with findings raises instead."""

    table: str
    kind: str
    fingerprint: str
    num_files: int
    """Files read and hashed."""
    num_bytes: int
    samples: int
    """Images decoded again, or views that were rendered or whose tokens were computed again."""
    token_agreement: float
    """Share of the tokens computed again that are those of the table."""

    def summary(self) -> str:
        """One line for the user."""
        done, needs = DONE_AGAIN[self.kind]
        again = f"{self.samples:,} {done} again"
        if needs and not self.samples:
            again = f"no {done} again (that needs {needs})"
        return (
            f"{self.table}: sound. {self.num_files:,} files ({self.num_bytes / 1e6:,.1f} MB) "
            f"re-hashed, {again}"
        )


def run(config: AuditConfig) -> AuditResult:
    """Audits a table.

    Raises:
        InputError: there is no table, or the given images or tokenizer are not its own.
        StageFailed: something differs; names file, row and field.
    """
    uri = storage.absolute(config.table)
    try:
        manifest = storage.read_json(storage.join(uri, "manifest.json"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{uri}: no manifest.json, so no finished table; run the stage that makes it again"
        ) from error
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    findings = Findings()
    if kind == "image_table":
        result = _audit_images(config, _opened(ImageTable, uri), findings)
    elif kind == "token_table":
        table = _opened(TokenTable, uri)
        num_files, num_bytes, samples, agreement = audit_tokens(config, table, findings)
        result = AuditResult(
            table=uri,
            kind=kind,
            fingerprint=table.fingerprint,
            num_files=num_files,
            num_bytes=num_bytes,
            samples=samples,
            token_agreement=agreement,
        )
    elif kind == "view_table":
        views = _opened(ViewTable, uri)
        num_files, num_bytes, samples = audit_views(config, views, findings)
        result = AuditResult(
            table=uri,
            kind=kind,
            fingerprint=views.fingerprint,
            num_files=num_files,
            num_bytes=num_bytes,
            samples=samples,
            token_agreement=1.0,
        )
    else:
        raise InputError(f"{uri}: kind is {kind!r}; give an image, token or view table")
    findings.raise_if_any(uri)
    return result


def _opened(kind: type[Table], uri: str) -> Table:
    """Opens a table. What its reader refuses in a table that is there is a finding."""
    try:
        return kind.open(uri)
    except InputError as error:
        raise StageFailed(str(error)) from error


def _audit_images(config: AuditConfig, table: ImageTable, findings: Findings) -> AuditResult:
    generator = np.random.default_rng(config.seed)
    parts = table.parts
    sample = sample_files(len(parts), config.share, generator)
    changed, total = check_files(
        table.uri,
        [part.name for part in parts],
        table.part_uri,
        lambda index: (parts[index].bytes, parts[index].hash),
        sample,
        config,
        findings,
    )
    for index in changed:
        _search_part(table, index, findings)
    samples = _decode_again(config, table, set(changed), generator, findings)
    return AuditResult(
        table=table.uri,
        kind="image_table",
        fingerprint=table.fingerprint,
        num_files=len(sample),
        num_bytes=total,
        samples=samples,
        token_agreement=1.0,
    )


def _search_part(table: ImageTable, index: int, findings: Findings) -> None:
    """Names rows and fields of a part that is not what was written, as far as it can be read."""
    name = table.parts[index].name
    try:
        with storage.open_input(table.part_uri(index)) as file, parsing(name, "not as written"):
            reader = pq.ParquetFile(file)
            if not reader.schema_arrow.equals(IMAGE_SCHEMA):
                findings.add(f"{name}: columns {reader.schema_arrow.names} are not the schema's")
                return
            row, last = 0, ""
            for batch in reader.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    if image_digest(record["image"]) != record["digest"]:
                        findings.add(f"{name}: row {row}: image does not match its digest")
                    if record["key"] <= last:
                        findings.add(f"{name}: row {row}: key {record['key']!r} is out of order")
                    row, last = row + 1, record["key"]
            if row != table.parts[index].rows:
                findings.add(f"{name}: rows {row} != {table.parts[index].rows} (file != manifest)")
    except (DamagedFileError, OSError) as error:
        findings.add(f"{name}: cannot be read: {str(error).splitlines()[0]}")


def _decode_again(
    config: AuditConfig,
    table: ImageTable,
    broken: set[int],
    generator: np.random.Generator,
    findings: Findings,
) -> int:
    wanted = min(config.samples, table.num_rows)
    rows = np.sort(generator.choice(table.num_rows, wanted, replace=False))
    part_of = np.searchsorted(table.part_starts, rows, side="right") - 1
    rows, part_of = (values[~np.isin(part_of, sorted(broken))] for values in (rows, part_of))
    done = 0
    for position, record in read_sample(table, rows, None, findings):
        where = f"{table.parts[part_of[position]].name}: row {rows[position]}"
        try:
            image = decode_image(record["image"])
        except UnusableImage as error:
            findings.add(f"{where}: image: {error}")
            continue
        if image_digest(record["image"]) != record["digest"]:
            findings.add(f"{where}: digest is not that of the image")
        for name, value in (("height", image.height), ("width", image.width)):
            if record[name] != value:
                findings.add(f"{where}: {name} {record[name]} != {value} (table != image)")
        done += 1
    return done
