"""Evaluation: what frozen features know about labels, beside two baselines.

Pretrained features, those of the same network at random initialisation, and raw pixels go
through the same nearest neighbours and the same linear probe. Groups of near-duplicates are never
divided between fitting and testing; the block, the weight decay and everything else that is
chosen is chosen on rows that no test counts.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from beit.convert import Network
from pipelines import lease, storage, tracking
from pipelines.config.checks import changed_fields
from pipelines.config.evaluate import MAY_CHANGE, EvaluateConfig
from pipelines.errors import InputError
from pipelines.evaluation.features import (
    LabelledImages,
    Weights,
    block_features,
    head_hits,
    joined,
    open_weights,
    pixel_features,
    read_labelled,
)
from pipelines.evaluation.probes import (
    accuracy_interval,
    chosen_linear,
    grouped_folds,
    knn_accuracy,
    knn_predict,
    linear_accuracy,
)
from pipelines.evaluation.record import record
from pipelines.evaluation.result import PIXELS, PRETRAINED, RANDOM, TITLES, Report, Result, Score
from pipelines.progress import Progress
from pipelines.records import read_values, write_record
from pipelines.redaction import redacted_values
from pipelines.training.checkpoint import checkpoint_name
from pipelines.training.run_dir import RunDir
from pipelines.training.weights import is_unfinished, save_newest

__all__ = ["Result", "knn_accuracy", "linear_accuracy", "run"]

VALIDATION_FOLDS = 5


def run(config: EvaluateConfig) -> Result:
    """Evaluates and writes `evaluation.json` and pictures to the output directory.

    The same evaluation (weights, images, options) that is there already is returned as it is.

    Raises:
        InputError: no weights, no labels, or a layer that the network does not have.
    """
    for name in ("run", "images"):
        if not getattr(config, name):
            raise InputError(f"{name} = '': give its directory or URI")
    weights = _weights(config.run)
    output = config.output or storage.join(storage.absolute(config.run), "evaluation")
    layers = config.layers or list(range(1, weights.model.depth + 1))
    if max(layers) > weights.model.depth:
        raise InputError(f"layers = {layers}: this network has {weights.model.depth} blocks")
    data, test = _read(config, weights.model)
    identity = {
        "weights": weights.fingerprint,
        "image_table": data.fingerprint,
        "test_table": test.fingerprint if test else "",
        "groups": storage.fingerprint(data.groups),  # not part of an image table's fingerprint
        "options": {
            name: value for name, value in asdict(config).items() if name not in MAY_CHANGE
        },
    }
    report_uri = storage.join(output, "evaluation.json")
    if (report := _found(config, report_uri, identity)) is not None:
        return _result(report, output, already_done=True)
    with lease.held(output, config.lease, stage="evaluate") as holder:
        # Who had the lease before may have done it.
        if (report := _found(config, report_uri, identity)) is not None:
            result = _result(report, output, already_done=True)
        else:
            result = _run(config, weights, data, test, layers, identity, output, holder.fence)
        holder.done()
    return result


def _found(config: EvaluateConfig, report_uri: str, identity: dict[str, Any]) -> Any:
    """The report of this evaluation, if it is there and wanted; None else."""
    if config.force or not storage.exists(report_uri):
        return None
    report = read_values(report_uri, Report, "give --force true to evaluate again")
    return report if _same(report.get("identity"), identity, config) else None


def _run(
    config: EvaluateConfig,
    weights: Weights,
    data: LabelledImages,
    test: LabelledImages | None,
    layers: list[int],
    identity: dict[str, Any],
    output: str,
    fence: lease.Fence,
) -> Result:
    inputs = [
        tracking.Dataset(name="weights", uri=weights.uri, digest=weights.fingerprint),
        tracking.Dataset(
            name="image_table",
            uri=data.uri,
            digest=data.fingerprint,
            context="evaluation",
            rows=len(data.labels),
        ),
    ]
    params = {
        name: value for name, value in asdict(config).items() if name not in ("lease", "tracking")
    }
    tags = {"beit.pretrain_run_id": weights.run_id} if weights.run_id else {}
    if weights.tokenizer:
        tags[tracking.TOKENIZER_TAG] = weights.tokenizer
    with tracking.start_run(
        config.tracking,
        stage="evaluate",
        params=params,
        tags=tags,
        inputs=inputs,
        parent_run_id=weights.run_id,
        output=output,
    ) as tracked:
        splits = _splits(config, data, len(test.labels) if test else 0)
        report = _evaluate(config, weights, data, layers, splits)
        hits = report.pop("hits")
        report["identity"] = identity
        # First, for the report says that everything is there.
        storage.write_json(storage.join(output, "hits.json"), hits, check=fence.check)
        tracked.log_artifact_file("hits.json", storage.canonical_json(hits))
        place = storage.join(output, "evaluation.json")
        write_record(place, redacted_values(report), check=fence.check)
        result = _result(report, output, already_done=False)
        record(tracked, result, report, inputs[-1])
    return result


def _weights(uri: str) -> Weights:
    """Those of a run, of its newest checkpoint if it is not finished, or of a weights directory."""
    if not is_unfinished(uri):
        return open_weights(uri)
    with tempfile.TemporaryDirectory() as directory:
        step = save_newest(uri, directory)
        print(f"evaluate: {uri} is not finished: as it was after step {step}", file=sys.stderr)
        return replace(
            open_weights(directory),
            uri=storage.join(storage.absolute(uri), "checkpoints", checkpoint_name(step)),
            run_id=RunDir(uri).record()["mlflow_run_id"],
        )


Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def _read(config: EvaluateConfig, model: Network) -> tuple[LabelledImages, LabelledImages | None]:
    # All rows, and those of the test table (if there is one), which are the last of them.
    if model.image_size[0] != model.image_size[1]:
        raise InputError(f"run: image_size {model.image_size} is not square")
    options: dict[str, Any] = {
        "size": model.image_size[0],
        "max_images": config.max_images,
        "crop_fraction": config.crop_fraction,
    }
    data = read_labelled(config.images, one_per_group=config.one_per_group, **options)
    if not config.test_images:
        return data, None
    test = read_labelled(config.test_images, one_per_group=False, least_classes=1, **options)
    return joined(data, test), test


def _splits(config: EvaluateConfig, data: LabelledImages, test_rows: int) -> list[Split]:
    # Rows to fit on, to choose by, to test on.
    rows = np.arange(len(data.labels))
    if test_rows:
        train = rows[:-test_rows]
        groups = data.groups[:-test_rows]
        validation = grouped_folds(groups, VALIDATION_FOLDS, seed=config.seed + 1) == 0
        return [(train[~validation], train[validation], rows[-test_rows:])]
    fold = grouped_folds(data.groups, config.num_folds, seed=config.seed)
    splits = []
    for number in range(config.num_folds):
        rest = rows[fold != number]
        groups = [data.groups[row] for row in rest]
        validation = grouped_folds(groups, VALIDATION_FOLDS, seed=config.seed + 1) == 0
        splits.append((rest[~validation], rest[validation], rows[fold == number]))
    return splits


def _evaluate(
    config: EvaluateConfig,
    weights: Weights,
    data: LabelledImages,
    layers: list[int],
    splits: list[Split],
) -> dict[str, Any]:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    networks: dict[str, Network] = {PRETRAINED: weights.model}
    if config.baselines:
        untrained = type(weights.model)(**weights.model.config())
        untrained.init_weights(torch.Generator().manual_seed(config.seed))
        networks[RANDOM] = untrained
    features: dict[str, Sequence[np.ndarray]] = {
        name: block_features(
            network,
            data.pixels,
            layers=layers,
            mean=weights.mean,
            std=weights.std,
            pooling=config.pooling,
            batch_size=config.batch_size,
            device=device,
            label=f"features, {TITLES[name]}",
        )
        for name, network in networks.items()
    }
    if config.baselines:
        features[PIXELS] = [pixel_features(data.pixels)]
    tested = np.concatenate([test for _, _, test in splits])
    truth, groups = data.labels[tested], [data.groups[row] for row in tested]
    num_classes = len(data.class_names)
    progress = Progress(2 * len(features) * len(splits), "probes", "fits")
    scores: dict[str, dict[str, Any]] = {}
    correct: dict[str, np.ndarray] = {}
    hits_by_probe: dict[str, str] = {}
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for name, arrays in features.items():
        scores[name] = {}
        for probe in ("linear", "knn"):
            found, chosen, by_layer = [], [], []
            for train, validation, test in splits:
                fold = _probe(probe, config, arrays, data.labels, (train, validation, test))
                found.append(fold[0])
                chosen.append(0 if name == PIXELS else layers[fold[1]])
                by_layer.append(fold[2])
                progress.update(progress.done + 1)
            predicted = np.concatenate(found)
            hits = predicted == truth
            low, high = accuracy_interval(hits, groups, seed=config.seed)
            if name == PRETRAINED:
                hits_by_probe[probe] = "".join(map(str, hits.astype(int)))
            scores[name][probe] = asdict(
                Score(
                    accuracy=float(hits.mean()),
                    low=low,
                    high=high,
                    class_accuracy=[
                        float(hits[truth == c].mean()) if (truth == c).any() else None
                        for c in range(num_classes)
                    ],
                    layers=chosen,
                    layer_accuracy=np.mean(by_layer, axis=0).tolist(),
                    layer_errors=(np.std(by_layer, axis=0, ddof=1) / len(splits) ** 0.5).tolist()
                    if len(splits) > 1
                    else [],
                )
            )
            if probe == "linear":
                correct[name] = hits
                if name == PRETRAINED:
                    np.add.at(matrix, (truth, predicted), 1)
    progress.close()
    gains = {}
    for name in correct.keys() - {PRETRAINED}:
        difference = correct[PRETRAINED].astype(float) - correct[name]
        low, high = accuracy_interval(difference, groups, seed=config.seed)
        gains[name] = [float(difference.mean()), low, high]
    own = head_hits(weights, data, tested, batch_size=config.batch_size, device=device)
    head = None
    if own is not None:
        head = [float(own.mean()), *accuracy_interval(own, groups, seed=config.seed)]
    counts = np.bincount(data.labels[np.concatenate([splits[0][0], splits[0][1]])])
    return {
        "kind": "evaluation",
        "scores": scores,
        "gains": gains,
        "head": head,
        "majority": float((truth == counts.argmax()).mean()),
        "num_images": len(truth),
        "num_groups": len(set(groups)),
        "class_names": data.class_names,
        "class_counts": np.bincount(truth, minlength=num_classes).tolist(),
        "confusion": matrix.tolist(),
        "layers": layers,
        # Image by image, so that two evaluations of the same images can be compared in pairs.
        "hits": {**hits_by_probe, "groups": np.unique(groups, return_inverse=True)[1].tolist()},
    }


def _probe(
    probe: str,
    config: EvaluateConfig,
    arrays: Sequence[np.ndarray],
    labels: np.ndarray,
    split: Split,
) -> tuple[np.ndarray, int, list[float]]:
    # Predicted classes of the test rows, position of the chosen layer, validation accuracies.
    train, validation, test = split
    num_classes = int(labels.max()) + 1
    if probe == "linear":
        fitted, layer, _, by_layer = chosen_linear(
            arrays, labels, train, validation, num_classes=num_classes
        )
        return fitted.predict(arrays[layer][test]), layer, by_layer
    by_layer = []
    for x in arrays:
        found = knn_predict(
            x[train], labels[train], x[validation], num_classes=num_classes, k=config.knn_k
        )
        by_layer.append(float((found == labels[validation]).mean()))
    layer = int(np.argmax(by_layer))
    known = np.concatenate([train, validation])
    x = arrays[layer]
    found = knn_predict(x[known], labels[known], x[test], num_classes=num_classes, k=config.knn_k)
    return found, layer, by_layer


def _same(found: dict[str, Any] | None, wanted: dict[str, Any], config: EvaluateConfig) -> bool:
    """Whether a report, perhaps of an earlier version, is of this evaluation."""
    if found is None or changed_fields(found["options"], config, MAY_CHANGE):
        return False
    return found | {"options": None} == wanted | {"options": None}


def _result(report: dict[str, Any], output: str, *, already_done: bool) -> Result:
    return Result(
        scores={
            name: {probe: Score(**score) for probe, score in probes.items()}
            for name, probes in report["scores"].items()
        },
        head=tuple(report["head"]) if report.get("head") else None,
        gains={name: tuple(values) for name, values in report["gains"].items()},
        majority=report["majority"],
        num_images=report["num_images"],
        class_names=report["class_names"],
        layers=report["layers"],
        output=output,
        already_done=already_done,
    )
