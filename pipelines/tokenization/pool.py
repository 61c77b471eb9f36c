"""The Ray side of the tokenize stage: decode tasks, a pool of encoders, and deaths of both.

units -> render tasks (CPU; one block of uint8 pixels each, through the object store) -> encoders
(actors; write the file themselves) -> receipts to the driver. Rendering is a stage of its own,
not threads in the encoder, because one GPU encodes what 25 to 50 CPU cores render: they must be
able to sit on other nodes. What that costs is measured in docs/tokenize.md.

A process that dies with a unit in its hands is seen by `Attempts`, which counts work that began
and never ended. Ray repeats the work. A unit that began twice without an end is set aside, as is
one whose work ended in an error, and tried alone after all others (`run_alone`).
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.actor import ActorHandle

from beit.tokenizers import ImageTokenizer, Precision
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store
from pipelines.tables.token_files import Identity, check_file
from pipelines.tokenization import work as token_work
from pipelines.tokenization.attempts import begin_attempt, end_attempt
from pipelines.tokenization.work import Unit, UnitRejected

# A process is shared (files are written while the next unit is encoded, a node has several), so
# two deaths are a suspicion; deaths of a process that held nothing else are proof.
DEATHS_IN_POOL = 2
DEATHS_ALONE = 3
# A unit is written while the next is encoded, and the next two lie ready. Ray Data adds actors when
# those it has are given 1.75 units for each that they work on at a time; fewer, and no pool grows.
UNITS_AT_WORK = 2
UNITS_PER_ACTOR = 4
# Units given to Ray Data at once: it keeps an object in the driver's memory for each.
UNITS_PER_ROUND = 16384

COLUMNS = pa.schema(
    [("unit", pa.string()), ("note", pa.string()), ("keys", pa.string()),
     ("pixels", pa.large_binary())]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told."""

    images_uri: str
    tokenizer_uri: str
    output: str
    identity: Identity
    num_gpus: float
    num_cpus: float
    decode_cpus: float
    min_actors: int
    max_actors: int
    rows_per_unit: int

    @property
    def device(self) -> str:
        return self.identity.device

    @property
    def decode_memory(self) -> int:
        """Bytes a decode task needs: a unit's pixels, and again as much for images and copies."""
        identity = self.identity
        return 2 * self.rows_per_unit * identity.num_views * 3 * identity.image_size**2


@dataclass(kw_only=True)
class Receipt:
    """What became of a unit."""

    unit: int
    size: int = -1
    hash: str = ""
    rejected: str = ""
    """Why the unit can never have tokens."""
    suspect: str = ""
    """Why the unit is set aside for now: its process died twice, or the work ended in an error."""
    failed: str = ""
    """What stops the whole job."""
    seconds: dict[str, float] = field(default_factory=dict)


def _unit(text: str) -> Unit:
    return Unit(**json.loads(text))


def _error(error: Exception, unit: Unit) -> dict[str, Any]:
    """Field of the receipt for work that ended in an error: bad input is bad for every unit, and
    anything else (a store, a device, memory) may be of this place and moment only."""
    if isinstance(error, InputError):
        return {"failed": f"unit {unit.name}: {error}"}
    return {"suspect": f"unit {unit.name}: {_cause(error)}"}


def _cause(error: Exception) -> str:
    if isinstance(error, InputError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def render_blocks(batch: pa.Table, job: Job, attempts: ActorHandle | None) -> Iterator[pa.Table]:
    """Decode task: a unit in, a row with its keys and pixels out, or with a note why not."""
    for text in batch.column("unit").to_pylist():
        unit = _unit(text)
        note: dict[str, Any] = {}
        keys, pixels = "[]", b""
        if begin_attempt(attempts, "render", unit.index) >= DEATHS_IN_POOL:
            note = {"suspect": f"unit {unit.name}: killed its process twice"}
        else:
            try:
                done = token_work.render_unit(job.images_uri, unit, job.identity)
            except UnitRejected as error:
                note = {"rejected": str(error)}
            except Exception as error:
                note = _error(error, unit)
            else:
                keys, pixels = json.dumps(done.keys), pa.py_buffer(done.pixels)
                note = {"read": done.read_seconds, "render": done.render_seconds}
                note |= {"rendered_at": time.time()}
        end_attempt(attempts, "render", unit.index)
        size = len(pixels) if isinstance(pixels, bytes) else pixels.size
        offsets = pa.py_buffer(np.array([0, size], np.int64))
        # Built on the pixels' own buffer: they are copied once, into the object store.
        column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)])
        yield pa.Table.from_arrays(
            [pa.array([text]), pa.array([json.dumps(note)]), pa.array([keys]), column],
            schema=COLUMNS,
        )


class EncodeUnits:
    """Actor: holds the tokenizer, encodes a unit's pixels, writes its file, returns a receipt.

    Two units are at work at a time: while one is written, the next is encoded.
    """

    def __init__(self, job: Job, attempts: ActorHandle | None) -> None:
        self.job, self.attempts = job, attempts
        self.tokenizer = open_tokenizer(job)
        self.lock = threading.Lock()
        # None until the first unit: starting up is no waiting.
        self.free_since: float | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        receipts = [
            self._one(*row)
            for row in zip(
                batch.column("unit").to_pylist(),
                batch.column("note").to_pylist(),
                batch.column("keys").to_pylist(),
                [value.as_buffer() for value in batch.column("pixels")],
                strict=True,
            )
        ]
        return pa.table({"receipt": [json.dumps(asdict(receipt)) for receipt in receipts]})

    def _one(self, text: str, note_text: str, keys: str, pixels: pa.Buffer) -> Receipt:
        unit, note = _unit(text), json.loads(note_text)
        if "render" not in note:
            return Receipt(unit=unit.index, **note)
        receipt = Receipt(unit=unit.index)
        try:
            if self._encode(unit, json.loads(keys), pixels, receipt):
                receipt.seconds |= {
                    "read": note["read"],
                    "render": note["render"],
                    "queued": max(0.0, receipt.seconds.pop("began_at") - note["rendered_at"]),
                }
        except torch.AcceleratorError:
            # After a fault of the device nothing works in this process; Ray starts another one.
            os._exit(1)
        except Exception as error:
            receipt = Receipt(unit=unit.index, **_error(error, unit))
        end_attempt(self.attempts, "encode", unit.index)
        return receipt

    def _encode(self, unit: Unit, keys: list[str], pixels: pa.Buffer, receipt: Receipt) -> bool:
        identity = self.job.identity
        shape = (unit.stop - unit.start, identity.num_views, identity.image_size)
        with self.lock:
            begin = time.monotonic()
            idle = 0.0 if self.free_since is None else begin - self.free_since
            began_at = time.time()
            if begin_attempt(self.attempts, "encode", unit.index) >= DEATHS_IN_POOL:
                receipt.suspect = f"unit {unit.name}: killed its process twice"
                return False
            token_ids = token_work.encode_rendered(
                self.tokenizer,
                np.frombuffer(pixels, np.uint8).reshape(*shape, identity.image_size, 3),
                identity,
                device=self.job.device,
            )
            encoded = self.free_since = time.monotonic()
        receipt.size, receipt.hash = token_work.write_unit(
            self.job.output, unit.name, keys, token_ids, identity
        )
        receipt.seconds = {
            "idle": idle,
            "encode": encoded - begin,
            "write": time.monotonic() - encoded,
            "began_at": began_at,
        }
        return True


def open_tokenizer(job: Job) -> ImageTokenizer:
    """The tokenizer on the worker's device.

    Raises:
        InputError: it is not the one the driver saw.
    """
    token_work.set_reference_arithmetic()
    if not job.num_gpus:
        token_work.keep_freed_memory()
        torch.set_num_threads(max(1, int(job.num_cpus)))
    tokenizer = tokenizer_store.load(
        job.tokenizer_uri, device=job.device, precision=cast(Precision, job.identity.precision)
    )
    expected = job.identity.tokenizer_fingerprint
    if tokenizer.fingerprint() != expected:
        raise InputError(
            f"{job.tokenizer_uri}: tokenizer_fingerprint {tokenizer.fingerprint()!r} != "
            f"{expected!r}; the tokenizer was replaced while its tokens were being made"
        )
    return tokenizer


def run_in_pool(units: Sequence[Unit], job: Job, attempts: ActorHandle | None) -> Iterator[Receipt]:
    """Runs units through the two stages; receipts come in the order of completion."""
    texts = [json.dumps(asdict(unit)) for unit in units]
    encoder_options: dict[str, Any] = (
        # Ray Data would count a CPU for each, and decoding might find none.
        {"num_gpus": job.num_gpus, "num_cpus": 0} if job.num_gpus else {"num_cpus": job.num_cpus}
    )
    dataset = (
        ray.data.from_items([{"unit": text} for text in texts], override_num_blocks=len(texts))
        .map_batches(
            render_blocks,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"job": job, "attempts": attempts},
            num_cpus=job.decode_cpus,
            # A promise to the scheduler. It also tells Ray Data that this stage is unlike the
            # next: tasks and actors of equal needs are fused, and decoding moves into the actors.
            memory=job.decode_memory,
        )
        .map_batches(
            EncodeUnits,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"job": job, "attempts": attempts},
            compute=ray.data.ActorPoolStrategy(
                min_size=min(job.min_actors, len(texts)),
                max_size=min(job.max_actors, len(texts)),
                max_tasks_in_flight_per_actor=UNITS_PER_ACTOR,
                max_concurrent_calls_per_actor=UNITS_AT_WORK,
                enable_true_multi_threading=True,
            ),
            **encoder_options,
        )
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for text in batch.column("receipt").to_pylist():
            yield Receipt(**json.loads(text))


def tokenize_alone(unit: Unit, job: Job) -> Receipt:
    """Both stages of one unit in this process."""
    receipt = Receipt(unit=unit.index)
    try:
        rendered = token_work.render_unit(job.images_uri, unit, job.identity)
        token_ids = token_work.encode_rendered(
            open_tokenizer(job), rendered.pixels, job.identity, device=job.device
        )
        receipt.size, receipt.hash = token_work.write_unit(
            job.output, unit.name, rendered.keys, token_ids, job.identity
        )
    except UnitRejected as error:
        receipt.rejected = str(error)
    except Exception as error:
        receipt.failed = f"unit {unit.name}: {_cause(error)}"
    return receipt


def run_alone(units: Sequence[Unit], job: Job) -> Iterator[Receipt]:
    """Tries units that were set aside in a process of their own, three times at most."""
    task = ray.remote(
        num_gpus=job.num_gpus,
        num_cpus=0 if job.num_gpus else job.num_cpus,
        memory=job.decode_memory,
        max_retries=0,
        # A process that served one unit is not used for the next.
        max_calls=1,
    )(tokenize_alone)
    running = {task.remote(unit, job): (unit, 0) for unit in units}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        unit, deaths = running.pop(done)
        try:
            yield ray.get(done)
            continue
        except (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError):
            pass  # The node went, not the process.
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            deaths += 1
            if deaths >= DEATHS_ALONE:
                yield Receipt(
                    unit=unit.index,
                    rejected=f"killed its process {DEATHS_ALONE} times: {_first_line(error)}",
                )
                continue
        running[task.remote(unit, job)] = (unit, deaths)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def verify_files(names: Sequence[tuple[int, str, int]], job: Job) -> Iterator[tuple[int, int, str]]:
    """Re-reads files of (unit, name, rows) that have no receipt.

    Yields (unit, size, hash), size -1 for a file that is not whole.

    Raises:
        InputError: a file belongs to a table of another identity.
    """
    task = ray.remote(_verify).options(num_cpus=job.decode_cpus)
    waiting = [task.remote(names[start : start + 64], job) for start in range(0, len(names), 64)]
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        for unit, size, digest, difference in ray.get(done):
            if difference:
                raise InputError(
                    f"{job.output}: {difference} (what its files were made with != what is asked "
                    "for now); use another --output"
                )
            yield unit, size, digest


def _verify(
    names: Sequence[tuple[int, str, int]], job: Job
) -> list[tuple[int, int, str, str | None]]:
    results: list[tuple[int, int, str, str | None]] = []
    for unit, name, rows in names:
        data = storage.read_bytes(storage.join(job.output, name))
        whole, difference = check_file(data, job.identity, rows)
        size = len(data) if whole else -1
        results.append((unit, size, storage.digest(data), difference))
    return results
