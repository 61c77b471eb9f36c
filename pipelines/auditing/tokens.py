"""The audit of a token table: its files, its keys, and its tokens computed again."""

import sys
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from beit.tokenizers import ImageTokenizer, Precision
from pipelines import storage
from pipelines.auditing.files import Findings, check_files, read_sample, sample_files
from pipelines.config.audit import AuditConfig
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_files import UNKNOWN_LEVEL, check_file, split_columns
from pipelines.tables.token_table import MISSING, TokenTable
from pipelines.tokenization import work as token_work

COLUMNS = ("key", "image", "digest")
# Rows of a changed file that are computed again to find the first wrong one.
MAX_ROWS_SEARCHED = 64


def audit_tokens(
    config: AuditConfig, table: TokenTable, findings: Findings
) -> tuple[int, int, int, float]:
    """Returns files and bytes read, views computed again, and the share of equal tokens."""
    generator = np.random.default_rng(config.seed)
    images = ImageTable.open(config.images) if config.images else None
    if images is not None:
        table.check_compatible(images, allow_missing=True)
    tokenizer, device = _load_tokenizer(config, table)
    files = table.manifest["files"]
    names = [table.file_name(index) for index in range(table.num_files)]
    sample = sample_files(len(names), config.share, generator)
    changed, total = check_files(
        table.uri,
        names,
        lambda index: storage.join(table.uri, names[index]),
        lambda index: (files["size"][index], files["hash"][index]),
        sample,
        config,
        findings,
    )
    online = _Online(table, images, tokenizer, device) if images is not None else None
    for index in changed:
        _search_file(table, index, online, findings)
    samples, agreement = 0, 1.0
    if online is not None:
        samples, agreement = _tokenize_again(config, online, set(changed), generator, findings)
    return len(sample), total, samples, agreement


def _load_tokenizer(config: AuditConfig, table: TokenTable) -> tuple[ImageTokenizer | None, str]:
    import torch

    made_on = table.identity.device
    device = made_on if config.device == "auto" else config.device
    if device == "cuda" and config.device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    if not config.tokenizer:
        return None, device
    if not config.images:
        raise InputError("images is empty: computing tokens again needs the image table, too")
    tokenizer = tokenizer_store.load(
        config.tokenizer, device=device, precision=cast(Precision, table.precision)
    )
    if tokenizer.fingerprint() != table.tokenizer_fingerprint:
        raise InputError(
            f"{config.tokenizer}: tokenizer_fingerprint {tokenizer.fingerprint()!r} != "
            f"{table.tokenizer_fingerprint!r} of {table.uri}; give the tokenizer of this table"
        )
    token_work.set_reference_arithmetic()
    if device != made_on and config.min_agreement == 1:
        print(
            f"the tokens were made on {made_on} and are computed again on {device}, where some "
            "come out otherwise: audit on the same kind of device, or give --min_agreement 0.99",
            file=sys.stderr,
        )
    return tokenizer, device


class _Online:
    """Keys and tokens as they are made from the image table now."""

    def __init__(
        self,
        table: TokenTable,
        images: ImageTable,
        tokenizer: ImageTokenizer | None,
        device: str,
    ) -> None:
        self.table, self.images = table, images
        self.tokenizer, self.device = tokenizer, device

    def keys(self, start: int, stop: int) -> list[str]:
        keys: list[str] = self.images.read_rows(start, stop, ["key"])["key"].to_pylist()
        return keys

    def pixels(self, record: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """All views of one row with these columns, (V, size, size, 3), and their grey levels."""
        return token_work.tokenizer_views(
            record["image"], record["digest"], self.table.identity, key=record["key"]
        )

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Token ids (n, N) of views (n, size, size, 3)."""
        assert self.tokenizer is not None
        return token_work.encode_views(
            self.tokenizer, pixels, batch_size=self.table.identity.batch_size, device=self.device
        )


def _search_file(table: TokenTable, index: int, online: _Online | None, findings: Findings) -> None:
    """Names row and field of a file that is not what was written, as far as it can be read."""
    name, span = table.file_name(index), table.file_rows(index)
    data = storage.read_bytes(storage.join(table.uri, name))
    whole, difference = check_file(table.identity, data, len(span))
    if difference:
        findings.add(f"{name}: {difference} (file != manifest)")
    elif not whole:
        findings.add(f"{name}: not a whole file of {len(span)} rows")
    if difference or not whole:
        return
    keys, token_ids = split_columns(pq.read_table(pa.BufferReader(data)), table.identity)
    above = np.flatnonzero((token_ids >= table.vocab_size).any(axis=(1, 2)))
    if len(above):
        findings.add(f"{name}: row {span.start + above[0]}: token_ids above vocab_size")
    if online is None:
        return
    for row, (found, wanted) in enumerate(
        zip(keys, online.keys(span.start, span.stop), strict=True)
    ):
        if found != wanted:
            findings.add(f"{name}: row {span.start + row}: key {found!r} != {wanted!r}")
            break
    if online.tokenizer is None:
        return
    searched = online.images.read_rows(
        span.start, min(span.stop, span.start + MAX_ROWS_SEARCHED), COLUMNS
    )
    for row, record in enumerate(searched.to_pylist()):
        pixels, _ = online.pixels(record)
        again = online.encode(pixels)
        if (again != token_ids[row]).any():
            view, position = np.argwhere(again != token_ids[row])[0]
            findings.add(
                f"{name}: row {span.start + row}: token_ids: view {table.views[int(view)]}, "
                f"position {position}: {token_ids[row, view, position]} != {again[view, position]} "
                "(file != computed now)"
            )
            break


def _tokenize_again(
    config: AuditConfig,
    online: _Online,
    broken: set[int],
    generator: np.random.Generator,
    findings: Findings,
) -> tuple[int, float]:
    """Compares random views with what is computed now; returns their number and agreement."""
    table = online.table
    rows = np.sort(generator.integers(0, table.num_rows, config.samples))
    views = generator.integers(0, len(table.views), config.samples)
    bad_rows = [table.file_rows(index) for index in broken]
    readable = np.array([all(row not in span for span in bad_rows) for row in rows.tolist()], bool)
    rows, views = rows[readable], views[readable]
    pixels, cached, chosen = [], [], []
    for position, record in read_sample(online.images, rows, COLUMNS, findings):
        row, view = int(rows[position]), int(views[position])
        try:
            keys, token_ids, levels = table.read_with_levels(row, row + 1)
            if token_ids[0, 0, 0] == MISSING:
                continue
            rendered, wanted = online.pixels(record)
        except InputError as error:
            findings.add(f"row {row}: {error}")
            continue
        if keys[0] != record["key"]:
            findings.add(f"row {row}: key {keys[0]!r} != {record['key']!r} (token table != images)")
        found, level = int(levels[0, view]), int(wanted[view])
        if found not in (UNKNOWN_LEVEL, level):
            findings.add(f"row {row}: grey_levels: {found} != {level} (table != computed now)")
        chosen.append((row, view))
        pixels.append(rendered[view])
        cached.append(token_ids[0, view])
    if online.tokenizer is None or not chosen:  # keys and grey levels were compared, no tokens
        return 0, 1.0
    same = online.encode(np.stack(pixels)) == np.stack(cached)
    agreement = float(same.mean())
    if agreement < config.min_agreement:
        for position in np.flatnonzero(~same.all(axis=1)).tolist():
            row, view = chosen[position]
            findings.add(
                f"row {row}: token_ids: view {table.views[view]}: "
                f"{int((~same[position]).sum())} of {same.shape[1]} tokens differ from those "
                "computed now"
            )
    elif agreement < 1:
        print(f"{agreement:.3%} of the tokens computed again are the same", file=sys.stderr)
    return len(chosen), agreement
