"""What `make run` found, as data (benchmarks/results/sample.json), and README's table of it.

    python -m benchmarks.sample [--chain work/quickstart]

Reads what the chain has left: chain.json, the run's report.json, evaluation.json.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.front_page import README, with_part
from jobs.cli import STAGES
from pipelines.evaluation.result import TITLES

RESULTS = Path(__file__).parent / "results" / "sample.json"
PART = "sample"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chain", type=Path, default=Path("work/quickstart"))
    chain = parser.parse_args().chain.absolute()
    found = measured(chain)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    README.write_text(with_part(README.read_text(), PART, table(found)))
    print(f"{RESULTS} and the table of {README}")


def measured(chain: Path) -> dict[str, Any]:
    """The figures of a chain that has ended, without the place where it ran."""

    def read(*parts: str) -> Any:
        return json.loads(chain.joinpath(*parts).read_text())

    record, report = read("chain.json"), read("run", "report.json")
    evaluation = read("run", "evaluation", "evaluation.json")
    books = report["goodput"]["seconds"]
    return {
        "command": "make run",
        "machine": record["machine"],
        "commit": record["code"].get("commit", "")[:12]
        + "+" * (record["code"].get("dirty") == "true"),
        "stages": {
            name: {
                "seconds": round(stage["seconds"]),
                "said": stage["said"].replace(f"{chain}/", "").replace(str(chain), "."),
            }
            for name in STAGES  # the record keeps names in the order of the alphabet
            if (stage := record["stages"].get(name))
        },
        "training": {
            "steps": report["steps"],
            "mim_accuracy": report["last_period"]["mim_accuracy"],
            "unigram_accuracy": report["unigram_accuracy"],
            "images_per_second": report["last_period"]["images_per_second"],
            "startup_seconds": books["startup"],
            "step_seconds": books["compute"] + books["data_wait"],
        },
        "evaluation": {
            "images": evaluation["num_images"],
            "majority": evaluation["majority"],
            "linear": {
                name: [probes["linear"][each] for each in ("accuracy", "low", "high")]
                for name, probes in evaluation["scores"].items()
            },
            "gains": evaluation["gains"],
        },
    }


def table(found: dict[str, Any]) -> str:
    """README's part: the surest figures first, then what each stage took and said."""
    training, evaluation = found["training"], found["evaluation"]
    stages = found["stages"].items()
    minutes = sum(stage["seconds"] for _, stage in stages) / 60
    linear = [f"{TITLES[name]} {_interval(*v)}" for name, v in evaluation["linear"].items()]
    gains = [f"over {TITLES[name]} {_gain(*v)}" for name, v in evaluation["gains"].items()]
    right, floor, majority = (
        f"{100 * share:.1f} %"
        for share in (
            training["mim_accuracy"], training["unigram_accuracy"], evaluation["majority"]
        )
    )  # fmt: skip
    images = f"{evaluation['images']:,} emoji, folds by base emoji"
    lines = [
        f"`{found['command']}`, commit {found['commit']}, {found['machine']}:",
        f"{minutes:.1f} minutes.",
        "",
        f"- **Masked tokens**: {right} are predicted right after {training['steps']} steps;",
        f"  always naming the most frequent one gives {floor}.",
        f"- **Features**, by a linear probe of {images}:",
        f"  {', '.join(sorted(linear))},",
        f"  most frequent class {majority}. What pretraining gains, in points, image by image:",
        f"  {', '.join(gains)}.",
        "",
        "| stage | seconds | what it said |",
        "| --- | --- | --- |",
        *(f"| {name} | {stage['seconds']} | {_short(stage['said'])} |" for name, stage in stages),
    ]
    return "\n".join(lines)


def _interval(accuracy: float, low: float, high: float) -> str:
    return f"{100 * accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _gain(gain: float, low: float, high: float) -> str:
    return f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _short(said: str) -> str:
    """Without places, fingerprints and the list of classes."""
    kept = [part for part in said.split("; ") if not part.startswith(("run: ", "look first"))]
    return re.sub(r"(classes): [^()]*\(by [^)]*\)", r"\1", "; ".join(kept)).partition(
        ", fingerprint"
    )[0]


if __name__ == "__main__":
    main()
