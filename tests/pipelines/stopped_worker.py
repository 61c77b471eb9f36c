"""One of two workers that meet at every step: python -m tests.pipelines.stopped_worker RUN RANK."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.training.goodput import Books
from pipelines.training.pulse import Pulse
from pipelines.training.run_dir import RunDir


def main(uri, rank):
    run, books = RunDir(uri), Books()
    dist.init_process_group("gloo", init_method=f"file://{uri}/meet", rank=int(rank), world_size=2)
    books.switch("compute")
    with Pulse(run, books, rank=int(rank), limit=None, every=0.1):
        while True:
            with books.spend("data_wait"):
                time.sleep(0.02)
            value = torch.tensor([float(rank == "1" and Path(uri, "last").exists())])
            dist.all_reduce(value)
            if value:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
