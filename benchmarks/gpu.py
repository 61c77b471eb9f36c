"""Every GPU test and benchmark, and one file of results with the device's name: `make gpu`.

    python -m benchmarks.gpu [--only tests attention ...] [--results benchmarks/results]

Each part is a process of its own and has its section, also when it fails; what it printed last is
then there. Exit code 0: all went well; 1: a part failed; 2: there is no GPU here.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
#: Name to arguments of python. Each benchmark takes the GPU where there is one.
PARTS = {
    "tests": ["-m", "pytest", "-m", "gpu", "-q", "tests/gpu"],
    "attention": ["-m", "benchmarks.attention", "--batch", "256"],
    "model": ["-m", "benchmarks.model", "--sizes", "base", "large", "--encoder"],
    "objectives": ["-m", "benchmarks.objectives", "--sizes", "base", "large"],
    "tokenizer": ["-m", "benchmarks.tokenizer", "--device", "cuda", "--batch", "256"],
    "teacher": ["-m", "benchmarks.teacher", "--batch", "64"],
    "train": ["-m", "benchmarks.train", "--device", "cuda", "--model", "base", "--batch", "256",
              "--precision", "bf16", "--compile", "--images", "1024", "--steps", "20",
              "--threads", "12"],
    "precompute": ["-m", "benchmarks.precompute", "--images", "2048", "--rows_per_unit", "256",
                   "--hidden_dim", "256", "--batch_size", "256", "--num_gpus", "1",
                   "--precision", "float16"],
}  # fmt: skip
LIMIT_SECONDS = 1800


def run_part(arguments: list[str]) -> tuple[bool, str]:
    """Whether a part went well, and what it said."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"not done after {LIMIT_SECONDS} s"
    said = done.stdout.strip()
    if done.returncode:
        said = "\n".join((said + "\n" + done.stderr.strip()).strip().splitlines()[-30:])
    return done.returncode == 0, said


def file_name(device: str) -> str:
    """gpu-NAME.md, the name in letters that every file system takes."""
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"


def section(name: str, arguments: list[str], *, well: bool, said: str, seconds: float) -> str:
    """A part in the file: tables as they were printed, everything else as text."""
    command = f"`python {' '.join(arguments)}`: {'' if well else 'FAILED, '}{seconds:.0f} s."
    body = said if well and said.startswith("#") else f"```\n{said}\n```"
    return f"# {name}\n\n{command}\n\n{body}\n"


def main() -> int:
    """Runs the parts; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"gpu: torch {torch.__version__} finds no CUDA device here; run this on a machine that "
            "has one, with a build of torch for it (make TORCH=auto)",
            file=sys.stderr,
        )
        return 2
    device = torch.cuda.get_device_name()
    path = args.results / file_name(device)
    head = f"{torch.cuda.device_count()} x {device}, torch {torch.__version__}"
    sections, failed = [], []
    for name in args.only:
        print(f"gpu: {name} ...", flush=True)
        began = time.monotonic()
        well, said = run_part(PARTS[name])
        seconds = time.monotonic() - began
        sections.append(section(name, PARTS[name], well=well, said=said, seconds=seconds))
        failed += [] if well else [name]
        # After each part, so that what was measured stays when the machine goes.
        path.write_text("\n".join([f"{head}.\n", *sections]))
    print(f"gpu: {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
