"""The page of a run in MLflow: the verdict first, then what it was made from, judged by and shows.

MLflow folds a description after about three lines, so the first one says it all.
"""

from typing import TYPE_CHECKING

from pipelines.tracking.datasets import INPUT_TAG, OUTPUT_TAG, STAGE_TAG
from pipelines.tracking.table import HEADLINE, HIGH, LOW, renamed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NOTE_TAG, OWN_NOTE_TAG, PARENT_TAG = "mlflow.note.content", "beit.note", "mlflow.parentRunId"
ERROR_TAG, MODEL_MISSING_TAG = "beit.error", "beit.model_missing"
FIGURES = "figures"


def update_page(client: "MlflowClient", run_id: str) -> None:
    """Writes the description of a run anew, from what is known of it now."""
    run = client.get_run(run_id)
    text = page(client, run)[:8000]
    if run.data.tags.get(NOTE_TAG, "") != text:
        client.set_tag(run_id, NOTE_TAG, text)


def page(client: "MlflowClient", run: "Run") -> str:
    """The description as Markdown."""
    judged = evaluations_of(client, run)
    own = run.data.tags.get(OWN_NOTE_TAG, "")
    error = run.data.tags.get(ERROR_TAG, "")
    missing = run.data.tags.get(MODEL_MISSING_TAG, "")
    is_judge = run.data.tags.get(STAGE_TAG) == "evaluate" and HEADLINE in run.data.metrics
    judge = run if is_judge else judged[0] if judged else None
    parts = [f"**{verdict(judge)}**" if judge else "", own]
    parts += [f"**It did not end well:** {error}"] if error and not own else []
    parts += [f"No model is here: {missing}"] if missing else []
    made_from = [
        f"{kind.replace('_', ' ')} [{maker.info.run_name}]({link(maker)})"
        for kind, maker in makers(client, run)
    ]
    if made_from:
        parts.append("Made from " + ", ".join(made_from))
    if judged:
        parts.append(
            "Evaluations:\n"
            + "\n".join(f"- [{one.info.run_name}]({link(one)}): {verdict(one)}" for one in judged)
        )
    parts += figures(client, run)
    return "\n\n".join(part for part in parts if part)


def figures(client: "MlflowClient", run: "Run") -> list[str]:
    """The figures of a run, to be shown at full size."""
    run_id = run.info.run_id
    names = [file.path for file in client.list_artifacts(run_id, FIGURES)]
    return [
        f"![{name.rpartition('/')[2]}](get-artifact?path={name}&run_uuid={run_id})"
        for name in names
        if name.endswith(".png")
    ]


def link(run: "Run") -> str:
    """A link that works within MLflow's pages."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def verdict(evaluation: "Run") -> str:
    """One sentence with its intervals."""
    values = renamed(evaluation.data.metrics)
    text = (
        f"Linear probe {_percent(values, HEADLINE)} % "
        f"[{_percent(values, LOW)}, {_percent(values, HIGH)}]"
    )
    if "gain_over/pixels" in values:
        gain, low, high = (100 * values[f"gain_{end}/pixels"] for end in ("over", "low", "high"))
        word = "a gain" if low > 0 else "a loss" if high < 0 else "no clear difference"
        text += f", {gain:+.1f} points [{low:+.1f}, {high:+.1f}] over raw pixels: {word}"
    return text + "."


def _percent(values: dict[str, float], name: str) -> str:
    return f"{100 * values[name]:.1f}" if name in values else "?"


def evaluations_of(client: "MlflowClient", run: "Run") -> "list[Run]":
    """Finished evaluations of a run's weights, newest first."""
    if not run.data.tags.get(f"{OUTPUT_TAG}weights"):
        return []
    condition = f"tags.`{PARENT_TAG}` = '{run.info.run_id}' AND tags.`{STAGE_TAG}` = 'evaluate'"
    found = client.search_runs([run.info.experiment_id], condition, order_by=["start_time DESC"])
    return [one for one in found if HEADLINE in one.data.metrics]


def makers(client: "MlflowClient", run: "Run") -> "list[tuple[str, Run]]":
    """Kind and maker of everything that a run read, as far as its experiment knows them."""
    found = []
    for name, value in sorted(run.data.tags.items()):
        if not name.startswith(INPUT_TAG):
            continue
        kind = name.removeprefix(INPUT_TAG)
        for fingerprint in value.split(","):
            condition = f"tags.`{OUTPUT_TAG}{kind}` = '{fingerprint}'"
            made = client.search_runs(
                [run.info.experiment_id], condition, max_results=1, order_by=["start_time DESC"]
            )
            found += [(kind, maker) for maker in made if maker.info.run_id != run.info.run_id]
    return found
