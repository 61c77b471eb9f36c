"""What `make demo` found with several seeds (benchmarks/results/demo.md).

    make demo ARGS="--output work/demo-1 --pretrain.seed 1"
    python -m benchmarks.demo work/demo work/demo-1 work/demo-2

Reads what each chain has left: chain.json, and report.json and evaluation.json of its run. The time
is that of the first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.evaluation.result import TITLES

RESULTS = Path(__file__).parent / "results" / "demo.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chains", type=Path, nargs="+")
    RESULTS.write_text(page([found(chain) for chain in parser.parse_args().chains]))
    print(RESULTS)


def found(chain: Path) -> dict[str, Any]:
    """The figures of a chain that has ended."""

    def read(*parts: str) -> Any:
        return json.loads(chain.joinpath(*parts).read_text())

    record, evaluation = read("chain.json"), read("run", "evaluation", "evaluation.json")
    return {
        "machine": record["machine"],
        "commit": record["code"].get("commit", "")[:12],
        "minutes": sum(stage["seconds"] for stage in record["stages"].values()) / 60,
        "steps": read("run", "report.json")["steps"],
        "images": evaluation["num_images"],
        "scores": {name: of["linear"]["accuracy"] for name, of in evaluation["scores"].items()},
        "gain": evaluation["gains"]["pixels"],
    }


def page(chains: list[dict[str, Any]]) -> str:
    """The whole result as Markdown."""
    first = chains[0]
    seeds = [f"seed {number}" for number in range(len(chains))]
    rows = [["features", *seeds, "mean"], ["---"] * (len(chains) + 2)]
    for name in ("pretrained", "random_init", "pixels"):
        values = [chain["scores"][name] for chain in chains]
        cells = [f"{100 * value:.1f} %" for value in (*values, sum(values) / len(values))]
        rows.append([TITLES[name], *cells])
    gains = [[100 * value for value in chain["gain"]] for chain in chains]
    rows.append(
        [
            "gain over raw pixels, 95 % interval (paired, by base emoji)",
            *(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" for mean, low, high in gains),
            f"{sum(gain[0] for gain in gains) / len(gains):+.1f}",
        ]
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# The demo

Linear probe of {first["images"]:,} emoji, folds by base emoji, after `make demo` (MAE,
{first["steps"]:,} steps), once for each seed of the pretraining. The first was alone on the machine
and took {first["minutes"]:.1f} minutes in all.

    make demo ARGS="--output work/demo-1 --pretrain.seed 1"

{first["machine"]}, commit {first["commit"]}.

{table}
"""


if __name__ == "__main__":
    main()
