"""The Ray side of the tokenize stage: decode tasks, a pool of encoders, and deaths of both.

units -> render tasks (CPU; one block of uint8 pixels each, through the object store) -> encoders
(actors; write the file themselves) -> outcomes to the driver. Rendering is a stage of its own,
not threads in the encoder, because one GPU encodes what 25 to 50 CPU cores render: they must be
able to sit on other nodes. What that costs is measured in docs/tokenize.md.

A process that dies with a unit in its hands is seen by `Attempts`, which counts work that began
and never ended. Ray repeats the work. A unit that began twice without an end is set aside, as is
one whose work ended in an error, and tried alone after all others (`run_alone`).
"""

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle

from beit.tokenizers import ImageTokenizer, Precision
from pipelines import unit_pools
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store
from pipelines.tokenization import work as token_work
from pipelines.tokenization.task import TokenizeTask
from pipelines.tokenization.work import RenderedUnit, Unit, UnitRejected
from pipelines.unit_pools import DEATHS_IN_POOL, in_actors, killer
from pipelines.units import Outcome, attempt, outcome_table, outcomes, rounds

COLUMNS = pa.schema(
    [("unit", pa.string()), ("note", pa.string()), ("keys", pa.string()),
     ("token_ids", pa.large_binary()), ("grey_levels", pa.large_binary()),
     ("pixels", pa.large_binary())]
)  # fmt: skip


def _unit(text: str) -> Unit:
    return Unit(**json.loads(text))


def _trouble(unit: Unit, error: Exception) -> Outcome:
    """Of work that ended in an error: bad input is bad for every unit, and anything else (a
    store, a device, memory) may be of this place and moment only."""
    outcome = Outcome.of_error(unit.index, unit.name, error)
    if outcome.input_error:
        return outcome
    return Outcome(unit=unit.index, suspect=outcome.failed)


def render_blocks(
    batch: pa.Table, task: TokenizeTask, attempts: ActorHandle | None
) -> Iterator[pa.Table]:
    """Decode task: a unit in, a row with its keys and pixels out, or with an outcome instead.

    A unit whose tokens are all copied is written here.
    """
    for text in batch.column("unit").to_pylist():
        unit = _unit(text)
        note: dict[str, Any] = {}
        keys, token_ids, levels, pixels = "[]", b"", b"", b""
        with attempt(attempts, f"render {unit.index}") as deaths:
            try:
                if deaths >= DEATHS_IN_POOL:
                    note["outcome"] = asdict(killer(unit))
                else:
                    done = token_work.render_unit(
                        task.images_uri, unit, task.identity, task.older, task.views
                    )
                    if len(done.pixels):
                        keys, pixels = json.dumps(done.keys), pa.py_buffer(done.pixels)
                        token_ids = done.token_ids.tobytes()
                        if done.grey_levels is not None:
                            levels = done.grey_levels.tobytes()
                        note = {"read": done.read_seconds, "render": done.render_seconds}
                        note |= {"views": done.views, "rendered_at": time.time()}
                    else:
                        note["outcome"] = asdict(_write(unit, done, done.token_ids, task, {}))
            except UnitRejected as error:
                note["outcome"] = asdict(Outcome(unit=unit.index, rejected=str(error)))
            except Exception as error:
                note["outcome"] = asdict(_trouble(unit, error))
        size = len(pixels) if isinstance(pixels, bytes) else pixels.size
        offsets = pa.py_buffer(np.array([0, size], np.int64))
        # Built on the pixels' own buffer: they are copied once, into the object store.
        column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)])
        yield pa.Table.from_arrays(
            [
                *map(pa.array, ([text], [json.dumps(note)], [keys])),
                *(pa.array([data], pa.large_binary()) for data in (token_ids, levels)),
                column,
            ],
            schema=COLUMNS,
        )


class EncodeUnits:
    """Actor: holds the tokenizer, encodes a unit's pixels, writes its file, tells the outcome.

    Two units are at work at a time: while one is written, the next is encoded.
    """

    def __init__(self, task: TokenizeTask, attempts: ActorHandle | None) -> None:
        self.task, self.attempts = task, attempts
        self.refusal: InputError | None = None
        try:
            self.tokenizer = open_tokenizer(task)
        except InputError as error:  # told by the first unit: Ray would show its own frames
            self.refusal = error
        self.lock = threading.Lock()
        # None until the first unit: starting up is no waiting.
        self.free_since: float | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        pixels = [value.as_buffer() for value in batch.column("pixels")]
        rows = batch.drop_columns(["pixels"]).to_pylist()
        return outcome_table(self._one(*row) for row in zip(rows, pixels, strict=True))

    def _one(self, row: dict[str, Any], pixels: pa.Buffer) -> Outcome:
        unit, note = _unit(row["unit"]), json.loads(row["note"])
        if "outcome" in note:
            return Outcome(**note["outcome"])
        if self.refusal is not None:
            return _trouble(unit, self.refusal)
        identity = self.task.identity
        views, size = identity.num_views, identity.image_size
        token_ids = np.frombuffer(row["token_ids"], np.uint16)
        levels = np.frombuffer(row["grey_levels"], np.uint8)
        try:
            outcome = self._encode(
                unit,
                RenderedUnit(
                    keys=json.loads(row["keys"]),
                    token_ids=token_ids.reshape(-1, views, identity.num_patches),
                    grey_levels=levels.reshape(-1, views) if len(levels) else None,
                    pixels=np.frombuffer(pixels, np.uint8).reshape(-1, views, size, size, 3),
                    read_seconds=note["read"],
                    render_seconds=note["render"],
                    views=note["views"],
                ),
            )
        except Exception as error:
            return _trouble(unit, error)
        if outcome.facts:
            seconds = outcome.facts["seconds"]
            seconds["queued"] = max(0.0, seconds.pop("began_at") - note["rendered_at"])
            seconds |= {"read": note["read"], "render": note["render"]}
        return outcome

    def _encode(self, unit: Unit, done: RenderedUnit) -> Outcome:
        with ExitStack() as until_written:
            with self.lock:
                begin = time.monotonic()
                idle = 0.0 if self.free_since is None else begin - self.free_since
                began_at = time.time()
                work = attempt(self.attempts, f"encode {unit.index}")
                if until_written.enter_context(work) >= DEATHS_IN_POOL:
                    return killer(unit)
                try:
                    token_ids = token_work.fill_tokens(
                        done.token_ids,
                        self.tokenizer,
                        done.pixels,
                        self.task.identity,
                        device=self.task.device,
                    )
                except torch.AcceleratorError:
                    # After a fault of the device nothing works in this process; Ray starts
                    # another one.
                    os._exit(1)
                encoded = self.free_since = time.monotonic()
            seconds = {"idle": idle, "encode": encoded - begin, "began_at": began_at}
            return _write(unit, done, token_ids, self.task, seconds)


def _write(
    unit: Unit,
    done: RenderedUnit,
    token_ids: NDArray[np.uint16],
    task: TokenizeTask,
    seconds: dict[str, float],
) -> Outcome:
    """Writes the file of a unit, after so many seconds of other work."""
    begin = time.monotonic()
    size, digest = token_work.write_unit(
        task.output, unit.name, done.keys, token_ids, done.grey_levels, task.identity
    )
    reused = sum(count for _, _, count in unit.reused)
    facts = {"size": size, "hash": digest, "reused": reused, "views": done.views}
    seconds = seconds | {"write": time.monotonic() - begin}
    return Outcome(unit=unit.index, facts=facts | {"seconds": seconds})


def open_tokenizer(task: TokenizeTask) -> ImageTokenizer:
    """The tokenizer on the worker's device.

    Raises:
        InputError: it is not the one the driver saw, or a promised GPU is none.
    """
    token_work.set_reference_arithmetic()
    if task.num_gpus and not torch.cuda.is_available():
        raise InputError(
            f"encoders.num_gpus = {task.num_gpus:g}: torch {torch.__version__} on node "
            f"{platform.node()} finds no CUDA device, although Ray counts GPUs there; install a "
            "CUDA build of torch, start Ray there with --num-gpus 0, or give --encoders.num_gpus 0"
        )
    if not task.num_gpus:
        token_work.keep_freed_memory()
        torch.set_num_threads(max(1, int(task.num_cpus)))
    tokenizer = tokenizer_store.load(
        task.tokenizer_uri, device=task.device, precision=cast(Precision, task.identity.precision)
    )
    expected = task.identity.tokenizer_fingerprint
    if tokenizer.fingerprint() != expected:
        raise InputError(
            f"{task.tokenizer_uri}: tokenizer_fingerprint {tokenizer.fingerprint()!r} != "
            f"{expected!r}; the tokenizer was replaced while its tokens were being made"
        )
    return tokenizer


def run_in_pool(
    units: Iterable[Unit], task: TokenizeTask, attempts: ActorHandle
) -> Iterator[Outcome]:
    """Runs units through the two stages; outcomes come in the order of completion."""
    encoder_options: dict[str, Any] = (
        # Ray Data would count a CPU for each, and decoding might find none.
        {"num_gpus": task.num_gpus, "num_cpus": 0} if task.num_gpus else {"num_cpus": task.num_cpus}
    )
    for dataset in rounds(asdict(unit) for unit in units):
        most = dataset.num_blocks()
        rendered = dataset.map_batches(
            render_blocks,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"task": task, "attempts": attempts},
            num_cpus=task.decode_cpus,
            # A promise to the scheduler. It also tells Ray Data that this stage is unlike the
            # next: tasks and actors of equal needs are fused, and decoding moves into the actors.
            memory=task.decode_memory,
        )
        encoded = in_actors(
            rendered,
            EncodeUnits,
            {"task": task, "attempts": attempts},
            least=min(task.min_actors, most),
            most=min(task.max_actors, most),
            **encoder_options,
        )
        yield from outcomes(encoded)


def tokenize_alone(unit: Unit, task: TokenizeTask) -> Outcome:
    """Both stages of one unit in this process; its stored views are left to `render`."""
    try:
        done = token_work.render_unit(task.images_uri, unit, task.identity, task.older)
        token_ids = token_work.fill_tokens(
            done.token_ids, open_tokenizer(task), done.pixels, task.identity, device=task.device
        )
        return _write(unit, done, token_ids, task, {})
    except UnitRejected as error:
        return Outcome(unit=unit.index, rejected=str(error))
    except Exception as error:
        return Outcome.of_error(unit.index, unit.name, error)


def run_alone(units: Sequence[Unit], task: TokenizeTask) -> Iterator[Outcome]:
    """Tries units that were set aside in a process of their own."""
    return unit_pools.run_alone(
        units,
        tokenize_alone,
        task,
        num_gpus=task.num_gpus,
        num_cpus=0 if task.num_gpus else task.num_cpus,
        memory=task.decode_memory,
    )
