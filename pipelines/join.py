"""`join`: several image tables as one, whose manifest names their parts where they lie.

Every stage takes the joined table for an image table. Classes are matched by name; images that are
in several tables are rows of each, which is said.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipelines import storage, tracking
from pipelines.config.checks import flatten
from pipelines.config.join import JoinConfig
from pipelines.errors import InputError
from pipelines.redaction import redacted
from pipelines.steps import say_step
from pipelines.tables.class_names import comparable
from pipelines.tables.digests import num_repeated
from pipelines.tables.image_files import Part
from pipelines.tables.image_table import MANIFEST, ImageParts, JoinedRecord, commit_manifest


@dataclass(frozen=True, kw_only=True)
class JoinResult:
    """What the joined table is."""

    uri: str
    fingerprint: str
    num_rows: int
    num_tables: int
    class_names: tuple[str, ...]
    num_repeated: int
    """Rows whose image is in an earlier row, too."""

    def summary(self) -> str:
        """One line for the user."""
        twice = f"; {self.num_repeated:,} rows repeat an image" if self.num_repeated else ""
        return (
            f"{self.uri}: {self.num_rows:,} images of {self.num_tables} tables, "
            f"{len(self.class_names)} classes{twice}"
        )


def run(config: JoinConfig) -> JoinResult:
    """Writes the joined table; the same command again finds it as it is.

    Raises:
        InputError: an input is no sound table or is given twice, or another table is at `output`.
    """
    output = storage.absolute(config.output)
    _refuse_others(output)
    _refuse_passwords(config.images)
    sources = [ImageParts.open(uri) for uri in config.images]
    for source in sources:
        source.check_parts()
    class_names = _union(sources)
    tables = [record for source in sources for record in _records(source, class_names)]
    uris = [table["uri"] for table in tables]
    twice = next((uri for uri in uris if uris.count(uri) > 1 or uri == output), "")
    if twice or not sources:
        raise InputError(
            f"images = {','.join(config.images)}: {twice or 'no table'} is there twice or is the "
            "output; give every table once, and another --output"
        )
    _refuse_passwords(uris)
    inputs = [tracking.Dataset.of_table("image_table", source) for source in sources]
    with tracking.start_run(
        config.tracking, stage="join", params=flatten(asdict(config)), inputs=inputs, output=output
    ) as record:
        commit_manifest(
            output,
            parts=[
                part for number, source in enumerate(sources) for part in _parts(number, source)
            ],
            class_names=class_names,
            source={"uri": ",".join(source.uri for source in sources)},
            options={},
            rejected={},
            num_items=sum(source.num_rows for source in sources),
            tables=tables,
        )
        joined = ImageParts.open(output)
        say_step("join: looking for images that are there twice")
        result = JoinResult(
            uri=output,
            fingerprint=joined.fingerprint,
            num_rows=joined.num_rows,
            num_tables=len(sources),
            class_names=tuple(class_names),
            num_repeated=num_repeated(joined),
        )
        record.set_output(
            tracking.Dataset(name="image_table", uri=output, digest=joined.fingerprint)
        )
        record.set_note(result.summary())
    return result


def _refuse_others(output: str) -> None:
    """Raises InputError where files are that no joined table has: those of a prepare, perhaps."""
    for file in storage.list_files(output):
        if file.path != MANIFEST:
            raise InputError(
                f"output = {output}: holds other files, the first is {file.path!r}; a joined table "
                "is a manifest alone: give an empty folder"
            )


def _refuse_passwords(uris: Sequence[str]) -> None:
    """Raises InputError where addresses of parts, which are kept for ever, would tell a secret."""
    for uri in uris:
        if redacted(uri) != uri:
            raise InputError(
                f"images = {redacted(uri)}: the address holds a secret, which would stand in the "
                "joined manifest; pass it by the store's variables or profile"
            )


def _union(sources: list[ImageParts]) -> list[str]:
    """Classes of all tables, each once, in the order in which they come."""
    names: dict[str, str] = {}
    for source in sources:
        for name in source.class_names:
            names.setdefault(comparable(name), name)
    return list(names.values())


def _records(source: ImageParts, class_names: list[str]) -> list[JoinedRecord]:
    """The tables behind one that is joined: itself, or those that it was joined from."""
    numbers = {comparable(name): number for number, name in enumerate(class_names)}
    labels = [numbers[comparable(name)] for name in source.class_names]
    own = JoinedRecord(
        uri=source.uri,
        fingerprint=source.fingerprint,
        num_parts=len(source.parts),
        labels=list(range(len(labels))),
    )
    tables = source.joined or [own]
    return [{**table, "labels": [labels[i] for i in table["labels"]]} for table in tables]


def _parts(number: int, source: ImageParts) -> list[Part]:
    return [
        replace(part, name=f"{number:03d}-{part.name}", uri=source.part_uri(position))
        for position, part in enumerate(source.parts)
    ]
