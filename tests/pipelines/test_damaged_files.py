"""Every reader, given damaged files: equal data, or an error that names the file. Nothing else."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from beit.images import decode_array
from beit.mim import BeitMIM
from beit.tokenizers.torch_file import read_tensors
from beit.weights import save_weights
from jobs.command import parse
from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.evaluate import Report
from pipelines.evaluation.features import open_weights
from pipelines.preparation.decode_process import Refused, Rules, examine
from pipelines.preparation.readers import Reader
from pipelines.preparation.source_plan import make_plan, read_listing, read_plan
from pipelines.preparation.unit import PrepareTask, process_unit, read_receipt, receipt_uri
from pipelines.preparation.walking import Entry
from pipelines.records import read_values, write_record
from pipelines.tables import image_files, token_files, tokenizer_store, view_table
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tables.view_files import decode_view
from pipelines.tables.view_table import ViewTable
from pipelines.tokenization.ledger import Ledger, plan_units
from pipelines.training import checkpoint
from pipelines.training.goodput import Attempt
from pipelines.training.run_dir import ReportRecord, RunDir, Skips
from tests.fuzzing import Subject, failures, outcomes, row
from tests.pipelines.image_sources import encoded, tar_bytes
from tests.pipelines.test_source_damage import planned
from tests.pipelines.view_fixtures import write_views

DATA = Path(__file__).parents[1] / "data" / "v0.1.0"
SHORT, LONG = 40, 3000
# Names of all subjects; what each is stands in `subjects`.
NAMES = (
    "image manifest", "image part", "token manifest", "token part", "view manifest", "view part",
    "prepare plan", "prepare listing", "prepare receipt", "tokenize identity", "tokenize receipts",
    "run configuration", "run record", "skips", "event", "attempt", "report",
    "checkpoint marker", "checkpoint weights", "checkpoint state",
    "tokenizer manifest", "tokenizer configuration", "tokenizer weights",
    "weights configuration", "weights", "evaluation",
    "torch zip", "torch legacy", "safetensors", "tar", "Parquet source",
)  # fmt: skip


def values_of(tensors: Any) -> dict[str, Any]:
    return {name: (str(t.dtype), t.tolist()) for name, t in tensors.items()}


def known(record: dict[str, Any] | None, form: Any) -> dict[str, Any] | None:
    """Without fields that nobody knows, as a damaged name of the seal is."""
    return record and {name: record[name] for name in form.__annotations__ if name in record}


def read_images() -> Any:
    image_files._OPEN.entries.clear()
    table = ImageTable.open("images")
    return table.read_rows(0, table.num_rows).to_pylist(), table.class_names


def read_tokens() -> Any:
    token_files._footer.cache_clear()
    table = TokenTable.open("tokens")
    keys, token_ids = table.read_rows(0, table.num_rows)
    return keys, token_ids.tolist(), table.identity


def read_views() -> Any:
    view_table._OPEN.entries.clear()
    table = ViewTable.open("views")
    places = [(group, slot) for slot in table.views for group in range(len(table.row_groups))]
    found = [record for place in places for record in table.read_group(*place).to_pylist()]
    for record in found:
        record["image"] = decode_view(record["image"], "lossless", 8, key="").tobytes()
    return found, table.identity, table.image_row_groups.tolist()


def tables(root: Path) -> Iterator[Subject]:
    write_views(ImageTable.open("images"), "views", image_size=8)
    (views, *_) = sorted((root / "views").glob("part-*"))
    part = "part-00000-00000004-00000009.parquet"
    for name, file, read in (
        ("image manifest", "images/manifest.json", read_images),
        ("image part", "images/part-00000.parquet", read_images),
        ("token manifest", "tokens/manifest.json", read_tokens),
        ("token part", f"tokens/{part}", read_tokens),
        ("view manifest", "views/manifest.json", read_views),
        ("view part", f"views/{views.name}", read_views),
    ):
        yield Subject(name=name, path=root / file, read=read)


def unfinished(root: Path) -> Iterator[Subject]:
    """What prepare and tokenize keep while they work."""
    (root / "pictures").mkdir()
    for number in range(3):
        (root / f"pictures/{number}.png").write_bytes(encoded(number, "PNG"))
    output = str(root / "begun")
    config = PrepareConfig(source="pictures", output=output)
    plan = make_plan(config, output)
    [listing] = plan.listings
    task = PrepareTask(
        output=output,
        reader=plan.reader,
        rules=Rules(max_pixels=10**6),
        decode_timeout=60,
        part_bytes=10**6,
        row_group_bytes=10**6,
        digits=5,
    )
    process_unit(task, 0, listing)
    work = root / "begun/_work"
    for name, path, read in (
        ("prepare plan", work / "plan.json", lambda: read_plan(config, output)),
        (
            "prepare listing",
            work / "units/00000000.parquet",
            lambda: read_listing(output, 0, listing),
        ),
        ("prepare receipt", Path(receipt_uri(output, 0)), lambda: read_receipt(output, 0)),
    ):
        yield Subject(name=name, path=path, read=read)

    identity = TokenTable.open("tokens").identity
    units = plan_units(["part-00000.parquet"], [19], 5)

    def claimed() -> None:
        Ledger("tokenizing", units).claim(identity.to_dict() | {"rows_per_unit": 5})

    claimed()
    ledger = Ledger("tokenizing", units)
    for unit in range(len(units)):
        data = Path("tokens", units.name(unit)).read_bytes()
        Path("tokenizing", units.name(unit)).write_bytes(data)
        ledger.add(unit, len(data), storage.digest(data))
    ledger.save()
    expected = list(ledger.files())

    def noted() -> bool:
        """Whether all that counts as done is as it was; the rest is verified by its files."""
        found = Ledger("tokenizing", units)
        found.load()
        return set(found.files()) <= set(expected)

    yield Subject(
        name="tokenize identity", path=root / "tokenizing/_work/identity.json", read=claimed
    )
    [receipts] = (root / "tokenizing/_work").glob("receipts-*")
    yield Subject(name="tokenize receipts", path=receipts, read=noted)


def run_directory(root: Path) -> Iterator[Subject]:
    config = parse(
        PretrainConfig, ["--config=recipes/pretrain.yaml", "--output=new"], stage="pretrain"
    )
    run = RunDir("new")

    def begun() -> None:
        run.begin(config, {"images": "a", "tokens": ["b"]}, may_change=("tracking", "scaling"))

    begun()
    run.write_skips(Skips([{"from_step": 20, "batches": 7}]))
    run.event("rolled_back", step=27, message="back to step 20")
    run.write_attempt(
        Attempt(number=1, launched_at=1.5, entered_at=2.5, start_step=0, next_step=5, workers=1)
    )
    report = {"outcome": "finished", "message": "", "steps": 60, "last_period": {"loss": 1.5}}
    run.write_report({**report, "goodput": {"bottleneck": "compute"}})
    (root / "new/weights").mkdir()
    (root / "new/weights/config.json").write_text("{}")
    (root / "new/weights/weights.safetensors").write_bytes(b"")
    told = ("event", "time", "step", "message")
    [event], [attempt] = (list((root / "new" / kind).iterdir()) for kind in ("events", "attempts"))
    for name, path, read in (
        ("run configuration", "config.yaml", begun),
        ("run record", "run.json", lambda: run.record()["fingerprints"]),
        ("skips", "skips.json", lambda: run.skips().entries),
        ("event", event, lambda: [{name: e.get(name) for name in told} for e in run.events()]),
        ("attempt", attempt, run.attempts),
        ("report", "report.json", lambda: known(run.finished_report(60), ReportRecord)),
    ):
        yield Subject(name=name, path=root / "new" / path, read=read)


def checkpoints(root: Path) -> Iterator[Subject]:
    folder = root / "run_unfinished/checkpoints/step_00000020"

    def read() -> Any:
        found = checkpoint.load("run_unfinished/checkpoints", 20)
        return values_of(found.weights), values_of(found.moments), found.state

    files = {"marker": checkpoint.MARKER, "weights": checkpoint.MODEL, "state": checkpoint.STATE}
    for name, file in files.items():
        yield Subject(
            name=f"checkpoint {name}",
            path=folder / file,
            read=read,
            errors=checkpoint.DamagedCheckpointError,
        )


def networks(root: Path) -> Iterator[Subject]:
    def read_tokenizer() -> Any:
        tokenizer = tokenizer_store.load("tokenizer")
        return values_of(tokenizer.state_dict()), tokenizer.config()

    for name, file in (
        ("manifest", "manifest.json"),
        ("configuration", "config.json"),
        ("weights", "tokenizer.safetensors"),
    ):
        path = root / "tokenizer" / file
        yield Subject(name=f"tokenizer {name}", path=path, read=read_tokenizer)

    model = BeitMIM(
        image_size=16, patch_size=8, dim=8, depth=1, num_heads=2, vocab_size=8,
        absolute_positions=False, relative_positions="shared", layer_scale_init=0.1,
    )  # fmt: skip
    means = {"pixel_mean": [0.5, 0.5, 0.5], "pixel_std": [0.2, 0.2, 0.2]}
    save_weights(model, root / "weights", extra=means)

    def read_weights() -> Any:
        weights = open_weights("weights")
        state = values_of(weights.model.state_dict())
        return state, weights.model.config(), weights.mean, weights.std

    for name, file in (
        ("weights configuration", "config.json"),
        ("weights", "weights.safetensors"),
    ):
        yield Subject(name=name, path=root / "weights" / file, read=read_weights)

    scores = {"pretrained": {"linear": {"accuracy": 0.5}}}
    report = {"scores": scores, "gains": {}, "majority": 0.2, "num_images": 9}
    path = root / "evaluation/evaluation.json"
    write_record(str(path), {**report, "class_names": ["a"], "layers": [1]})
    yield Subject(
        name="evaluation",
        path=path,
        read=lambda: known(read_values(str(path), Report, "remove it"), Report),
    )


def foreign(root: Path) -> Iterator[Subject]:
    """What others wrote. Text and plain numbers may be changed to others without a trace."""
    (root / "foreign").mkdir()
    state = {"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.ones(2, dtype=torch.int64)}}
    state = {"state_dict": {"a": state["a"], "c": state["b"]["c"]}}
    torch.save(state, root / "foreign/zip.pt")
    torch.save(state, root / "foreign/legacy.pt", _use_new_zipfile_serialization=False)
    shutil.copy("weights/weights.safetensors", root / "foreign/plain.safetensors")

    def reader(path: Path) -> Callable[[], Any]:
        def read() -> Any:
            try:
                return values_of(read_tensors(path.read_bytes())[0])
            except ValueError as error:  # `import-tokenizer` adds the name
                raise ValueError(f"{path}: {error}") from error

        return read

    for name, file, checked in (
        ("torch zip", "zip.pt", True),
        ("torch legacy", "legacy.pt", False),
        ("safetensors", "plain.safetensors", False),
    ):
        path = root / "foreign" / file
        yield Subject(name=name, path=path, read=reader(path), errors=ValueError, checked=checked)


def sources(root: Path) -> Iterator[Subject]:
    """Sources: what is wrong with an item is its reason, and the others are as they were."""
    (root / "sources/parquet").mkdir(parents=True)
    pictures = [encoded(number, "PNG") for number in range(4)]
    members = [(f"{i}.png", picture) for i, picture in enumerate(pictures)]
    (root / "sources/a.tar").write_bytes(tar_bytes(members))
    columns = {"image": pictures, "name": ["a", "b", "c", "d"]}
    pq.write_table(pa.table(columns), root / "sources/parquet/a.parquet")
    rules = Rules(max_pixels=10**6)
    tars = Reader(
        root=str(root / "sources"), format="webdataset", labels="none", max_image_bytes=10**6
    )

    def taken(reader: Reader, entries: list[Entry]) -> Callable[[], Any]:
        """Whether the pixels that are taken were there; what is lost tells its reason."""
        whole: dict[str, bytes] = {}

        def read() -> Any:
            found = {}
            for item in reader.items(entries):
                verdict = None if item.reason else examine(item.data, rules)
                if verdict is not None and not isinstance(verdict, Refused):
                    found[item.key] = decode_array(verdict.image).tobytes()
            whole.update(found if not whole else {})
            return all(whole.get(key) == digest for key, digest in found.items())

        return read

    yield Subject(
        name="tar",
        path=root / "sources/a.tar",
        read=taken(tars, [Entry(path="a.tar", size=10**5)]),
    )
    yield Subject(
        name="Parquet source",
        path=root / "sources/parquet/a.parquet",
        read=taken(*planned(root / "sources/parquet")),
    )


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(DATA, root, dirs_exist_ok=True)
    before = Path.cwd()
    os.chdir(root)
    makers = (tables, unfinished, run_directory, checkpoints, networks, foreign, sources)
    yield {subject.name: subject for make in makers for subject in make(root)}
    os.chdir(before)


def test_every_subject_has_a_test(subjects: dict[str, Subject]) -> None:
    assert tuple(subjects) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_harmless_or_named(subjects: dict[str, Subject], name: str) -> None:
    assert not failures(subjects[name], outcomes(subjects[name], SHORT))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_much_damage_is_harmless_or_named(
    subjects: dict[str, Subject], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = outcomes(subjects[name], LONG)
    with capsys.disabled():  # the table of docs/inputs.md
        print(f"\n{row(subjects[name], counts)}")
    assert not failures(subjects[name], counts)
