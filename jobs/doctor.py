"""`beit doctor [STAGE FLAGS]`: can every node of the cluster do what a stage needs?

Without a stage it looks at the nodes alone: versions, GPUs. With one, as its own command takes it,
also at every place that it reads and writes, at the tracking server, at the room for what must run
at once, and at whether the artefacts belong together. Nothing is made. `beit submit STAGE
--dry_run` does this on the cluster.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from pipelines.errors import InputError

USAGE = "usage: beit doctor [STAGE [--config RECIPE] [--dotted.field VALUE ...]]"


def main(argv: Sequence[str]) -> int:
    """Looks, says what it found, and returns 0, or 2 if something does not fit."""
    from jobs.cli import STAGES, parse_stage
    from jobs.command import connect_to_ray, exit_code, with_tracking_environment
    from jobs.environment import prepare_environment

    if argv and argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    stage = argv[0] if argv else ""

    def run(_: object) -> None:
        if stage and stage not in STAGES:
            raise InputError(f"{stage!r} is no stage; {USAGE}")
        config = with_tracking_environment(parse_stage(stage, argv[1:])) if stage else None
        prepare_environment()
        connect_to_ray()
        examine(stage, config)

    return exit_code(run)


def examine(stage: str, config: Any) -> None:
    """Prints what the cluster is and what fits.

    Raises:
        InputError: something does not fit; a sentence for each.
    """
    import ray

    from jobs.needs import needs_of
    from pipelines import preflight
    from pipelines.tracking.store import absolute_tracking_uri, connect

    for node in ray.nodes():
        if node["Alive"]:
            print(f"node {node['NodeManagerAddress']}: {_shown(node['Resources'])}", flush=True)
    needs = needs_of(stage, config) if stage else preflight.Needs()
    found = preflight.findings(needs)
    if needs.tracking_uri and not any(line.startswith("tracking.uri") for line in found):
        try:
            connect(absolute_tracking_uri(needs.tracking_uri))
        except InputError as error:
            found.append(str(error))
    if stage and not found:
        rehearse(stage, config)
    if found:
        raise InputError("\n".join(found))
    checked = ["versions", *(["GPUs"] if needs.gpu is not False else [])]
    checked += [place.field for place in needs.places]
    checked += ["tracking.uri"] if needs.tracking_uri else []
    print(f"doctor: nothing to object to ({', '.join(checked)})")


def rehearse(stage: str, config: Any) -> None:
    """Lets a stage that can say whether its inputs belong together do so; nothing is made."""
    from pipelines import render, tokenize_images
    from pipelines.training import finetuning, pretraining

    if stage == "tokenize":
        tokenize_images.run(dataclasses.replace(config, dry_run=True))
    elif stage == "render":
        render.run(dataclasses.replace(config, dry_run=True))
    elif stage == "pretrain":
        pretraining.plan_run(pretraining.with_absolute_uris(config))
    elif stage == "finetune":
        finetuning.plan_run(finetuning.with_absolute_uris(config))


def _shown(resources: dict[str, float]) -> str:
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    counts = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    return ", ".join([*counts, f"{resources.get('memory', 0) / 1e9:.0f} GB", *kinds])


if __name__ == "__main__":
    from jobs.cli import main as beit

    sys.exit(beit(["doctor", *sys.argv[1:]]))
