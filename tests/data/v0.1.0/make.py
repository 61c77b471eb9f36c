"""Makes the artefacts beside this file with the release that is installed: see README.md.

    python make.py DIRECTORY

Every stage runs as the command of that release, once to its end and once until it is killed.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

RECIPES = Path(__file__).parent / "recipes"
# What is left of a stage that was killed when the first of these files was there.
KILLED = {
    "prepare": ("images", "_work/receipts/*.json", signal.SIGINT),
    "train-tokenizer": ("tokenizer", "checkpoints/*/COMPLETE", signal.SIGKILL),
    "tokenize": ("tokens", "*.parquet", signal.SIGINT),
    "pretrain": ("run", "checkpoints/step_00000020/COMPLETE", signal.SIGKILL),
}


def draw(seed: int, size: int = 24) -> Image.Image:
    """A disc in a random colour at a random place."""
    generator = np.random.default_rng(seed)
    ys, xs = np.mgrid[:size, :size]
    centre = generator.uniform(0.2 * size, 0.8 * size, 2)
    pixels = np.full((size, size, 3), generator.integers(0, 256, 3), np.uint8)
    inside = np.hypot(ys - centre[0], xs - centre[1]) < generator.uniform(0.2, 0.4) * size
    pixels[inside] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels)


def command(stage: str, *flags: str) -> list[str]:
    recipe = str(RECIPES / f"{stage}.yaml")
    return [sys.executable, "-m", "jobs.cli", stage, "--config", recipe, *flags]


def run_until_killed(root: Path, stage: str) -> None:
    """Until the stage has left something to go on from, and not so long that it is finished."""
    name, sign, deadly = KILLED[stage]
    target = root / f"{name}_unfinished"
    while True:
        shutil.rmtree(target, ignore_errors=True)
        process = subprocess.Popen(command(stage, f"--output={target}"), cwd=root)
        while process.poll() is None and not any(target.glob(sign)):
            time.sleep(0.002)
        process.send_signal(deadly)
        process.wait()
        if not (target / "manifest.json").exists() and not (target / "weights").exists():
            return
        print(f"{stage} was faster; again")


if __name__ == "__main__":
    root = Path(sys.argv[1]).absolute()
    for number in range(40):
        folder = root / "source" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        draw(number).save(folder / f"{number:02d}.png")
    (root / "source" / "a" / "damaged.png").write_bytes(b"no picture")
    for stage in KILLED:
        run_until_killed(root, stage)
        subprocess.run(command(stage), cwd=root, check=True)
