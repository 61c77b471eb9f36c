"""Evaluation: what frozen features know about labels, beside two baselines.

Pretrained features, those of the same network at random initialisation, and raw pixels go
through the same nearest neighbours and the same linear probe. Groups of near-duplicates are never
divided between fitting and testing; the block, the weight decay and everything else that is
chosen is chosen on rows that no test counts.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit.convert import Network
from beit.teachers import Teacher
from pipelines import lease, storage, tracking
from pipelines.config.checks import changed_fields
from pipelines.config.evaluate import MAY_CHANGE, EvaluateConfig
from pipelines.errors import InputError
from pipelines.evaluation.attentive import attentive_found
from pipelines.evaluation.examples import examples
from pipelines.evaluation.extraction import Extraction, own_device
from pipelines.evaluation.features import (
    Reader,
    Weights,
    block_reader,
    check_disk,
    check_memory,
    feature_width,
    head_classes,
    head_hits,
    head_reader,
    num_features,
    open_weights,
    patches_size,
    pixel_reader,
    teacher_reader,
)
from pipelines.evaluation.labelled_images import LabelledImages, joined, read_labelled
from pipelines.evaluation.probes import accuracy_interval, rankme
from pipelines.evaluation.protocol import (
    PROBES,
    Split,
    candidate_layers,
    check_layers,
    fits_at_once,
    probe,
    score,
    splits_of,
)
from pipelines.evaluation.record import record
from pipelines.evaluation.result import (
    BASELINE,
    HEAD,
    PIXELS,
    PRETRAINED,
    RANDOM,
    TEACHER,
    Report,
    Result,
    result_of,
)
from pipelines.progress import Progress
from pipelines.records import read_values, write_record
from pipelines.redaction import redacted_values
from pipelines.steps import ray_is_there, say_step
from pipelines.teachers.opening import absolute_uri, open_teacher
from pipelines.tracking.datasets import short_name
from pipelines.training.checkpoint import checkpoint_name
from pipelines.training.run_dir import RunDir
from pipelines.training.weights import is_unfinished, save_newest

__all__ = ["Result", "run"]

PROTOCOL = 3
"""Raised when the same weights, images and options would give other figures."""


def run(config: EvaluateConfig, *, start_ray: Callable[[], None] = ray_is_there) -> Result:
    """Evaluates and writes `evaluation.json` and pictures to the output directory.

    The same evaluation (weights, images, options) that is there already is returned as it is.

    Raises:
        InputError: no weights, no labels, a layer that the network does not have, or more damaged
            images than may be.
        StageFailed: actors fail again and again.
    """
    for name in ("run", "images"):
        if not getattr(config, name):
            raise InputError(f"{name} = '': give its directory or URI")
    weights = _weights(config.run)
    output = config.output or storage.join(storage.absolute(config.run), "evaluation")
    layers = check_layers(config, weights.model.depth, "this network")
    baseline = _baseline(config, weights) if config.baseline else None
    teacher = None
    if config.teacher:
        side, device = weights.model.grid_size[0], own_device(config)
        teacher = open_teacher(config.teacher, layer=config.teacher_layer, side=side, device=device)
    data, test = _read(config, weights.model)
    identity = {
        "protocol": PROTOCOL,
        "weights": weights.fingerprint,
        "image_table": data.fingerprint,
        "test_table": test.fingerprint if test else "",
        "baseline": baseline.fingerprint if baseline else "",
        "groups": storage.fingerprint(data.groups),  # not part of an image table's fingerprint
        "options": {
            name: value for name, value in asdict(config).items() if name not in MAY_CHANGE
        },
    }
    if teacher is not None:
        identity["teacher"] = teacher.fingerprint
    report_uri = storage.join(output, "evaluation.json")
    if (report := _found(config, report_uri, identity)) is not None:
        lease.clear(output, config.lease, stage="evaluate")
        return result_of(report, output, already_done=True)
    own_device(config)  # or it is refused before anything is waited for
    if config.scaling.num_workers:
        start_ray()
    with lease.held(output, config.lease, stage="evaluate") as holder:
        # Who had the lease before may have done it.
        if (report := _found(config, report_uri, identity)) is not None:
            result = result_of(report, output, already_done=True)
        else:
            result = _run(
                config,
                weights,
                baseline,
                teacher,
                data,
                test,
                layers,
                identity,
                output,
                holder.fence,
            )
        holder.done()
    return result


def _found(config: EvaluateConfig, report_uri: str, identity: dict[str, Any]) -> Any:
    """The report of this evaluation, if it is there and wanted; None else."""
    if config.force or not storage.exists(report_uri):
        return None
    report = read_values(report_uri, Report, "give --force true to evaluate again")
    within = len(report.get("damaged", [])) <= config.max_rejected
    return report if within and _same(report.get("identity"), identity, config) else None


def _run(
    config: EvaluateConfig,
    weights: Weights,
    baseline: Weights | None,
    teacher: Teacher | None,
    data: LabelledImages,
    test: LabelledImages | None,
    layers: list[int],
    identity: dict[str, Any],
    output: str,
    fence: lease.Fence,
) -> Result:
    inputs = [
        tracking.Dataset(name="weights", uri=each.uri, digest=each.fingerprint)
        for each in (weights, baseline)
        if each is not None
    ]
    if teacher is not None:
        uri, digest = absolute_uri(config.teacher), teacher.weights
        inputs.append(tracking.Dataset(name="weights", uri=uri, digest=digest, context="teacher"))
    # Last the one that is tested on.
    inputs += [
        tracking.Dataset.of_table("image_table", table, "evaluation") for table, _ in data.sources
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
        splits = splits_of(config, data.groups, len(test) if test else 0)
        where = short_name(config.run) + (f", step {weights.steps:,}" if weights.steps else "")
        report, shown = _evaluate(config, weights, baseline, teacher, data, layers, splits, where)
        hits = report.pop("hits")
        report["identity"] = identity
        result = result_of(report, output, already_done=False)
        # The report says that everything is there: one of before goes first, its own comes last.
        place = storage.join(output, "evaluation.json")
        fence.check()
        storage.delete(place)
        storage.write_json(storage.join(output, "hits.json"), hits, check=fence.check)
        tracked.log_artifact_file("hits.json", storage.canonical_json(hits))
        record(tracked, result, report, inputs[-1], shown, where, check=fence.check)
        write_record(place, redacted_values(report), check=fence.check)
    return result


def _weights(uri: str, *, field: str = "run") -> Weights:
    """Those of a run, of its newest checkpoint if it is not finished, or of a weights directory."""
    if not is_unfinished(uri):
        return open_weights(uri, field=field)
    with tempfile.TemporaryDirectory() as directory:
        step = save_newest(uri, directory)
        print(f"evaluate: {uri} is not finished: as it was after step {step}", file=sys.stderr)
        return replace(
            open_weights(directory),
            uri=storage.join(storage.absolute(uri), "checkpoints", checkpoint_name(step)),
            run_id=RunDir(uri).record()["mlflow_run_id"],
        )


def _read(config: EvaluateConfig, model: Network) -> tuple[LabelledImages, LabelledImages | None]:
    # All rows, and those of the test table (if there is one), which are the last of them.
    if model.image_size[0] != model.image_size[1]:
        raise InputError(f"run: image_size {model.image_size} is not square")
    data = read_labelled(config.images, config)
    if not config.test_images:
        return data, None
    test = read_labelled(config.test_images, config, field="test_images", test=True)
    return joined(data, test), test


def _compared(
    config: EvaluateConfig, weights: Weights, baseline: Weights | None
) -> dict[str, Weights]:
    """The pretrained network, the baseline's, and with baselines one at random initialisation."""
    compared = {PRETRAINED: weights}
    if baseline is not None:
        compared[BASELINE] = baseline
    if config.baselines:
        untrained = type(weights.model)(**weights.model.config()).eval()
        untrained.init_weights(torch.Generator().manual_seed(config.seed))
        compared[RANDOM] = replace(weights, model=untrained)
    return compared


def _baseline(config: EvaluateConfig, weights: Weights) -> Weights:
    found = _weights(config.baseline, field="baseline")
    if found.model.image_size != weights.model.image_size:
        raise InputError(
            f"baseline = {config.baseline}: its images are of {found.model.image_size} pixels, "
            f"those of the run of {weights.model.image_size}; evaluate each by itself"
        )
    check_layers(config, found.model.depth, f"the network of baseline = {config.baseline}")
    return found


def _features(
    images: Extraction,
    weights: Weights,
    teacher: Teacher | None,
    compared: dict[str, Weights],
    layers: dict[str, list[int]],
) -> dict[str, np.ndarray]:
    """Features (L, n, d) by name, and the logits of a head that knows all classes, as HEAD."""
    pooling = images.config.pooling
    readers: dict[str, Reader] = {
        name: block_reader(
            each.model, layers=layers[name], pooling=pooling, mean=each.mean, std=each.std
        )
        for name, each in compared.items()
    }
    if images.config.baselines:
        readers[PIXELS] = pixel_reader(len(images.data))
    if teacher is not None:
        readers[TEACHER] = teacher_reader(teacher, pooling)
    if head_classes(weights, images.data) is not None:
        readers[HEAD] = head_reader(weights)
    return images.read(readers, [each.model for each in compared.values()], label="features")


def _evaluate(
    config: EvaluateConfig,
    weights: Weights,
    baseline: Weights | None,
    teacher: Teacher | None,
    data: LabelledImages,
    layers: list[int],
    splits: list[Split],
    where: str,
) -> tuple[dict[str, Any], Mapping[str, Image.Image]]:
    """The report, and pictures of examples."""
    device = own_device(config)
    compared = _compared(config, weights, baseline)
    known = {
        name: candidate_layers(config, each.model.depth) for name, each in compared.items()
    } | {PIXELS: [0], TEACHER: [0]}
    width = max(
        num_features(teacher.dim, config.pooling, teacher.grid_size) if teacher else 0,
        *(
            feature_width(each.model, config.pooling, len(data), pixels=config.baselines)
            for each in compared.values()
        ),
    )
    num_fits = fits_at_once(len(data), width, len(splits), device)
    check_memory(len(data), width, device, at_once=num_fits or 1)
    if config.attentive:  # last, and by far the largest
        check_disk(
            sum(
                patches_size(each.model, len(data), min(len(splits), len(known[name])))
                for name, each in compared.items()
            )
        )
    say_step(f"{'probes' if config.scaling.num_workers else 'features and probes'} on {device}")
    threads = config.num_threads or os.cpu_count() or 1
    images = Extraction(config=config, data=data, device=device, num_threads=threads)
    features = _features(images, weights, teacher, compared, known)
    splits = [split.without(list(images.damaged)) for split in splits]
    logits = features.pop(HEAD, None)
    tested = np.concatenate([split.test for split in splits])
    truth, groups = data.labels[tested], [data.groups[row] for row in tested]
    scores: dict[str, dict[str, Any]] = {}
    hits: dict[str, dict[str, np.ndarray]] = {}
    matrix = np.zeros((len(data.class_names),) * 2, np.int64)
    progress = Progress(len(PROBES) * len(features), "probes", "probes")
    for name, blocks in features.items():
        scores[name], hits[name] = {}, {}
        for kind in PROBES:
            found = probe(kind, config, blocks, data.labels, splits, device=device)
            judged, hits[name][kind] = score(
                found, data.labels, data.groups, splits, layers=known[name], seed=config.seed
            )
            scores[name][kind] = asdict(judged)
            if (name, kind) == (PRETRAINED, "linear"):
                np.add.at(matrix, (truth, found.predicted), 1)
            progress.update(progress.done + 1)
    progress.close()
    if config.attentive:
        chosen = {name: scores[name]["linear"]["layers"] for name in compared}
        found_by = attentive_found(images, compared, splits, chosen)
        for name, found in found_by.items():
            of = sorted(set(chosen[name]))
            judged, hits[name]["attentive"] = score(
                found, data.labels, data.groups, splits, layers=of, seed=config.seed
            )
            scores[name]["attentive"] = asdict(judged)
    gains = {}
    baselines = hits.keys() - {PRETRAINED}
    for name in baselines:
        difference = hits[PRETRAINED]["linear"].astype(float) - hits[name]["linear"]
        low, high = accuracy_interval(difference, groups, seed=config.seed)
        gains[name] = [float(difference.mean()), low, high]
    head = None
    if logits is not None:
        right = head_hits(weights, data, logits[0])[tested]
        hits[PRETRAINED][HEAD] = right
        head = [float(right.mean()), *accuracy_interval(right, groups, seed=config.seed)]
    counts = np.bincount(data.labels[splits[0].known])
    block = scores[PRETRAINED]["linear"]["layers"][0]
    own = np.asarray(features[PRETRAINED][layers.index(block)])
    shown = examples(config, weights, data, own, splits[0], block, device, where)
    return {
        "kind": "evaluation",
        "scores": scores,
        "gains": gains,
        "head": head,
        "teacher": teacher.name if teacher else "",
        "majority": float((truth == counts.argmax()).mean()),
        "rankme": {name: rankme(features[name][-1], device=device) for name in compared},
        "num_images": len(truth),
        "damaged": [images.damaged[position] for position in sorted(images.damaged)],
        "num_groups": len(set(groups)),
        "class_names": data.class_names,
        "class_counts": np.bincount(truth, minlength=len(data.class_names)).tolist(),
        "confusion": matrix.tolist(),
        "layers": layers,
        # Image by image, so that two evaluations of the same images can be compared in pairs.
        "hits": {
            **_marks(hits[PRETRAINED]),
            "baselines": {name: _marks(hits[name]) for name in sorted(baselines)},
            "groups": np.unique(groups, return_inverse=True)[1].tolist(),
        },
    }, shown


def _marks(hits: dict[str, np.ndarray]) -> dict[str, str]:
    """A 1 or 0 for each image, by probe."""
    return {kind: "".join(map(str, each.astype(int))) for kind, each in hits.items()}


def _same(found: dict[str, Any] | None, wanted: dict[str, Any], config: EvaluateConfig) -> bool:
    """Whether a report, perhaps of an earlier version, is of this evaluation."""
    if found is None or changed_fields(found["options"], config, MAY_CHANGE):
        return False
    return found | {"options": None} == wanted | {"options": None}
