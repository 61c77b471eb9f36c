"""Writes golden/pretrain_losses.json: losses of the small recipe of the tests, float32 on a CPU.

    .venv/bin/python -m tests.pipelines.golden_pretrain

A change of numerics shows here; state the reason where you commit the new file.
"""

import json
import tempfile
from pathlib import Path

import torch

from pipelines import pretrain
from tests.pipelines.pretrain_fixtures import make_tables, per_step, small_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        result = pretrain.run(small_config(make_tables(root), root / "run"))
        losses = [loss for _, (loss, _) in sorted(per_step(result.run_uri).items())]
    target = Path(__file__).parent / "golden" / "pretrain_losses.json"
    target.parent.mkdir(exist_ok=True)
    # Processors differ in the order of sums; what a changed formula does is far larger.
    target.write_text(json.dumps({"tolerance": 2e-4, "losses": losses}, indent=1) + "\n")
    print(target, losses)
