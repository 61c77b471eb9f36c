"""The description of a registered model, from what its run and its evaluations say."""

from typing import TYPE_CHECKING

from pipelines.tracking.datasets import CONTEXT_TAG, INPUT_TAG, TOKENIZER_TAG, dataset_label
from pipelines.tracking.page import evaluations_of, figures, link, makers, verdict
from pipelines.tracking.table import EARLIER, HEADLINE, HIGH, LOW, renamed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LIMITS = (
    "What is known of these weights is what stands above: of other images, sizes and tasks nothing "
    "is. Frozen features were judged, by probes that were fitted on images like those they were "
    "tested on. What the images of the training show and lack, the features have learned and lack."
)


def card(client: "MlflowClient", run: "Run") -> str:
    """Markdown: data, tokenizer, recipe, results with intervals, limits, figures."""
    params, tags = run.data.params, run.data.tags
    recipe = "\n".join(f"| {name} &nbsp; | {value} |" for name, value in sorted(params.items()))
    judged = evaluations_of(client, run)
    results = "\n".join(f"- {verdict(one)} ([{one.info.run_name}]({link(one)}))" for one in judged)
    parts = [
        f"Weights of [{run.info.run_name}]({link(run)}).",
        "### Data\n\n" + (_data(run) or "Not told."),
        f"### Tokenizer\n\n{_tokenizer(client, run)}" if TOKENIZER_TAG in tags else "",
        f"### Recipe\n\n| parameter | value |\n| --- | --- |\n{recipe}\n\n"
        f"Code {tags.get('mlflow.source.git.commit', 'unknown')[:12]}, torch "
        f"{tags.get('beit.torch', 'unknown')}, on {tags.get('beit.device', 'an unknown device')}.",
        f"### Results\n\n{results or 'Not evaluated: `beit evaluate --run RUN`.'}",
        f"### Limits\n\n{LIMITS}",
        *figures(client, run),
    ]
    return "\n\n".join(part for part in parts if part)


def _data(run: "Run") -> str:
    """A line for each table; a fine-tuning has the one that it was tested on, too."""
    lines = []
    for one in run.inputs.dataset_inputs if run.inputs else []:
        uses = [tag.value for tag in one.tags if tag.key == CONTEXT_TAG]
        lines.append("- " + ": ".join([*uses, dataset_label(one.dataset)]))
    return "\n".join(lines)


def _tokenizer(client: "MlflowClient", run: "Run") -> str:
    fingerprint = run.data.tags[TOKENIZER_TAG]
    made = [maker for kind, maker in makers(client, run) if kind == "tokenizer"]
    name = f"[{made[0].info.run_name}]({link(made[0])})" if made else "made elsewhere"
    return f"{name}, fingerprint {fingerprint}"


def update_versions(client: "MlflowClient", run_id: str) -> None:
    """Writes description and tags of the versions that were registered from a run."""
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if not versions:
        return
    run = client.get_run(run_id)
    text = card(client, run)
    told = {
        name: value
        for name, value in run.data.tags.items()
        if name.startswith((INPUT_TAG, TOKENIZER_TAG))
    }
    found = renamed(run.data.metrics)
    values = {name: f"{found[name]:.4f}" for name in (HEADLINE, LOW, HIGH) if name in found}
    for version in versions:
        if version.description != text:
            client.update_model_version(version.name, version.version, text)
        for name, value in {**told, **values}.items():
            if version.tags.get(name) != value:
                client.set_model_version_tag(version.name, version.version, name, value)
        for name in EARLIER.keys() & version.tags.keys():  # would contradict the new ones
            client.delete_model_version_tag(version.name, version.version, name)
