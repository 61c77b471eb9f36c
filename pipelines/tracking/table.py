"""What the table of runs shows: names that say what differs, deciding parameters, saved views.

A picture's card in MLflow prints all parameters of its run above the picture; the whole
configuration is the run's `config.yaml`.
"""

import base64
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.config.tracking import TrackingConfig
from pipelines.redaction import redacted
from pipelines.tracking.datasets import short_name
from pipelines.tracking.store import absolute_tracking_uri, address, connect, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

DECIDING = {
    "pretrain": (
        "objective.kind", "model.dim", "model.depth", "model.image_size", "model.patch_size",
        "masking.kind", "masking.num_masked", "optim.lr", "optim.weight_decay", "optim.epochs",
        "optim.steps", "data.global_batch_size", "seed", "images", "tokens", "views",
    ),
    "finetune": (
        "run", "images", "test", "model.encoder", "model.image_size", "model.pooling",
        "model.drop_path", "mixing.mixup", "mixing.cutmix", "optim.lr", "optim.layer_decay",
        "optim.epochs", "optim.steps", "data.global_batch_size", "seed",
    ),
    "train-tokenizer": (
        "model.kind", "model.architecture", "model.vocab_size", "model.dim", "model.image_size",
        "loss.likelihood", "optim.lr", "optim.steps", "data.global_batch_size", "seed", "images",
    ),
    "tokenize": (
        "images", "tokenizer", "num_views", "first_view", "rows_per_unit", "precision",
        "image_size",
    ),
    "render": ("images", "num_views", "first_view", "image_size", "form", "rows_per_unit"),
    "evaluate": (
        "run", "baseline", "teacher", "teacher_layer", "images", "test_images", "pooling",
        "num_folds", "knn_k", "crop_fraction", "max_images", "seed",
    ),
    "prepare": ("source", "output", "max_side", "labels", "max_rejected"),
}  # fmt: skip
"""Parameters by stage; a stage that is not here has all of its own."""
SEPARATOR = " · "

NAMED_BY_OUTPUT = ("pretrain", "finetune", "train-tokenizer")
"""Stages whose options a name cannot tell all: what people call the output tells the rest."""
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}

# Metrics that an evaluation copies to the run whose weights it judges. MLflow's table cuts headings
# after 13 characters: names that stand side by side differ before that.
HEADLINE, LOW, HIGH = "linear_accuracy", "linear_low", "linear_high"
EARLIER = {
    **{f"linear_accuracy_{end}": f"linear_{end}" for end in ("low", "high")},
    **{f"gain_over/pixels_{end}": f"gain_{end}/pixels" for end in ("low", "high")},
}

PRETRAINING, EVALUATIONS = "beit-pretraining", "beit-evaluations"
VIEWS = {
    PRETRAINING: {
        "name": "Pretraining, best first",
        "filter": "tags.`beit.stage` = 'pretrain'",
        "columns": (
            f"metrics.`{HEADLINE}`", f"metrics.`{LOW}`", f"metrics.`{HIGH}`",
            "metrics.`probe/linear_accuracy`", "metrics.`mim_accuracy`", "metrics.`loss`",
            "params.`objective.kind`", "params.`masking.num_masked`", "params.`optim.lr`",
            "params.`seed`", "tags.`beit.error`",
        ),
    },
    EVALUATIONS: {
        "name": "Evaluations",
        "filter": "tags.`beit.stage` = 'evaluate'",
        "columns": (
            f"metrics.`{HEADLINE}`", f"metrics.`{LOW}`", f"metrics.`{HIGH}`",
            "metrics.`knn_accuracy`", "metrics.`gain_over/pixels`",
            "metrics.`gain_low/pixels`", "metrics.`gain_over/random_init`",
            "params.`run`", "params.`pooling`",
        ),
    },
}  # fmt: skip


def renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a run, perhaps of an earlier version, by the names that they have now."""
    earlier = {new: metrics[old] for old, new in EARLIER.items() if old in metrics}
    return earlier | {name: value for name, value in metrics.items() if name not in EARLIER}


def deciding(stage: str, params: Mapping[str, object]) -> dict[str, object]:
    """The parameters that a reader compares runs by."""
    if stage not in DECIDING:
        return dict(params)
    # Steps, where they are given, decide over epochs.
    unused = "optim.steps" if params.get("optim.steps") is None else "optim.epochs"
    names = [name for name in DECIDING[stage] if name != unused]
    return {name: params[name] for name in names if name in params}


def run_name(stage: str, params: Mapping[str, object]) -> str:
    """What tells this run from others of its stage."""
    words = [stage]
    if stage != "train-tokenizer" and "model.dim" in params and "model.depth" in params:
        size = SIZES.get(
            _number(params["model.dim"]), f"{params['model.dim']}x{params['model.depth']}"
        )
        words.append(f"{size}/{params.get('model.patch_size', '')}".rstrip("/"))
    if "model.architecture" in params:  # which of the discrete VAEs, for other kinds have none
        kind = params.get("model.kind", "dvae")
        kind = params["model.architecture"] if kind == "dvae" else kind
        words.append(f"{kind} {params.get('model.vocab_size', '')}".strip())
    if stage == "pretrain":
        words[0] = str(params.get("objective.kind", stage))
        words.append(f"{params.get('masking.kind')} {params.get('masking.num_masked')}")
        words.append(_length(params))
    if stage in ("tokenize", "render") and "num_views" in params:
        words.append(f"{params['num_views']} {params.get('form', '')} views".replace("  ", " "))
    places = ["run", "weights", "source", "images"]
    places += ["tokenizer"] if stage == "tokenize" else []
    names = [short_name(str(params[place])) for place in places if params.get(place)]
    if stage in NAMED_BY_OUTPUT and params.get("output"):
        # MLflow's table shows some twenty characters: what people chose themselves comes first.
        words.insert(1, short_name(str(params["output"])))
    words += (name for name in dict.fromkeys(names) if name not in words)  # a chain has one name
    if stage not in ("evaluate", "tokenize", "prepare") and "seed" in params:
        words.append(f"seed {params['seed']}")
    return SEPARATOR.join(words)


def _length(params: Mapping[str, object]) -> str:
    steps = params.get("optim.steps")
    return f"{params.get('optim.epochs', 0):g} epochs" if steps is None else f"{steps} steps"


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


# Without this switch MLflow opens its view for language-model traces.
TRAINING_VIEW = "?workflowType=machine_learning"


def view_link(server_uri: str, experiment_id: str) -> str:
    """Address of the saved view of an experiment's pretraining runs."""
    page = f"{address(server_uri)}/#/experiments/{experiment_id}/runs"
    return f"{page}{TRAINING_VIEW}&viewStateShareKey={PRETRAINING}"


def run_link(server_uri: str, experiment_id: str, run_id: str) -> str:
    """Address of the page of a run."""
    return f"{address(server_uri)}/#/experiments/{experiment_id}/runs/{run_id}{TRAINING_VIEW}"


def where_to_look(config: TrackingConfig) -> str:
    """How a person sees the runs: a link where a server has them, else a command; "" if nothing
    was recorded."""
    if not config.enabled:
        return ""
    uri = absolute_tracking_uri(config.uri)
    if uri.startswith("http"):
        try:
            return view_link(uri, experiment_id(connect(uri), config, uri))
        except Exception:  # it has been there, and may be again
            return address(uri)
    options = [f"--uri {shlex.quote(redacted(uri))}"] if config.uri else []
    if config.experiment != TrackingConfig().experiment:
        options.append(f"--experiment {shlex.quote(config.experiment)}")
    return " ".join(["beit ui", *options]) if options else "beit ui, or make ui in a checkout"


def save_views(client: "MlflowClient", experiment_id: str) -> None:
    """Writes the saved views of an experiment where they are missing or of another version."""
    tags = client.get_experiment(experiment_id).tags
    for key, view in VIEWS.items():
        name, value = f"mlflow.sharedViewState.{key}", _view_state(view)
        if tags.get(name) != value:
            client.set_experiment_tag(experiment_id, name, value)


def _view_state(view: Mapping[str, str | Sequence[str]]) -> str:
    # The words of MLflow's own table, packed as its button "Share" packs them.
    state = {
        "searchFilter": view["filter"],
        "orderByKey": f"metrics.`{HEADLINE}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(view["columns"]),
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    saved = {"name": view["name"], "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return json.dumps(saved)
