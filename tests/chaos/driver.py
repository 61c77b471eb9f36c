"""A tokenize driver that can be killed: `python -m tests.chaos.driver JOB.json`.

Workers and driver write down when work on a unit begins and when its receipt is booked, so that
the one who kills can count what was lost.
"""

import json
import os
import sys
import time
from pathlib import Path

from pipelines import tokenize_images, unit_tables
from pipelines.tokenization import pool as token_pool
from tests.chaos import world


def note(event, unit):
    """Appends a line; lines of several processes do not mix."""
    line = json.dumps({"event": event, "unit": unit, "time": time.time()}) + "\n"
    journal = os.open(os.environ["CHAOS_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, line.encode())
    os.close(journal)


def unit_seconds():
    """How long a unit takes here: as real work would, so that kills meet units in every state."""
    return float(os.environ["CHAOS_UNIT_SECONDS"])


def render_and_note(batch, task, attempts):
    for text in batch.column("unit").to_pylist():
        note("render", json.loads(text)["index"])
        time.sleep(unit_seconds() / 2)
    yield from token_pool.render_blocks(batch, task, attempts)


class EncodeAndNote(token_pool.EncodeUnits):
    def _encode(self, unit, *rendered):
        note("encode", unit.index)
        time.sleep(unit_seconds())
        return super()._encode(unit, *rendered)


def main(path):
    import ray

    job = json.loads(Path(path).read_text())
    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("CHAOS_", "AWS_", "OMP_", "PYTHONPATH"))
    }
    ray.init(
        address=job["address"],
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": passed_on},
    )
    book = unit_tables.book

    def book_and_note(outcome, ledger, config):
        done = book(outcome, ledger, config)
        note("booked", outcome.unit)
        return done

    unit_tables.book = book_and_note
    token_pool.render_blocks = render_and_note
    token_pool.EncodeUnits = EncodeAndNote
    config = world.make_config(job["images"], job["tokenizer"], job["output"], **job["changes"])
    print(tokenize_images.run(config))


if __name__ == "__main__":
    main(sys.argv[1])
