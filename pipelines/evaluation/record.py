"""What an evaluation leaves in MLflow and beside its report."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from pipelines import pictures, storage, tracking
from pipelines.evaluation.result import PRETRAINED, TITLES, WITHOUT_BLOCKS, Result, Score


def record(
    tracked: tracking.Run,
    result: Result,
    report: dict[str, Any],
    images: tracking.Dataset,
    examples: Mapping[str, Image.Image],
    where: str,
    *,
    check: Callable[[], None],
) -> None:
    """Figures, note, files and pictures, to MLflow and beside the report.

    `where` names the weights in titles; `check` as in `storage.write_bytes`.
    """
    linear, knn = (result.scores[PRETRAINED][probe] for probe in ("linear", "knn"))
    headline = {
        tracking.HEADLINE: linear.accuracy,
        tracking.LOW: linear.low,
        tracking.HIGH: linear.high,
        "knn_accuracy": knn.accuracy,
    }
    if "attentive" in result.scores[PRETRAINED]:
        headline["attentive_accuracy"] = result.scores[PRETRAINED]["attentive"].accuracy
    metrics = {"majority_accuracy": result.majority, "num_images": result.num_images}
    metrics |= {f"rankme/{name}": value for name, value in report["rankme"].items()}
    if result.head is not None:
        metrics["head_accuracy"] = result.head[0]
    for name, probes in result.scores.items():
        for probe, score in probes.items():
            if name != PRETRAINED:  # the headline
                metrics[f"{probe}_accuracy/{name}"] = score.accuracy
            for layer, value in zip(*_by_block(result, score), strict=True):
                if name not in WITHOUT_BLOCKS:
                    key = f"{probe}_validation_by_block/{name}"
                    tracked.log_metrics({key: value}, step=layer)
    for name, (gain, low, high) in result.gains.items():
        metrics |= {f"gain_over/{name}": gain, f"gain_low/{name}": low, f"gain_high/{name}": high}
    tracked.log_metrics(metrics, step=0)
    tracked.judge(headline, images)
    tracked.set_note(note_of(result))
    tracked.log_artifact_file("evaluation.json", storage.canonical_json(report))
    tracked.log_table(
        "per_class.json",
        {
            "class": result.class_names,
            "images": report["class_counts"],
            **{
                f"{TITLES[name]}, linear": [
                    None if value is None else round(value, 4)
                    for value in probes["linear"].class_accuracy
                ]
                for name, probes in result.scores.items()
            },
        },
    )
    best = result.scores[PRETRAINED]["linear"]
    drawn = {
        **examples,
        "confusion": pictures.confusion(
            report["confusion"],
            result.class_names,
            title=f"Linear probe · {where}",
            note=f"{result.num_images} test images, accuracy {100 * best.accuracy:.1f} % "
            f"[{100 * best.low:.1f}, {100 * best.high:.1f}]",
        ),
        "blocks": pictures.curve(
            {
                f"{TITLES[name]}, {probe}": _by_block(result, score)
                for name, probes in result.scores.items()
                for probe, score in probes.items()
                if name not in WITHOUT_BLOCKS and score.layer_accuracy
            },
            title=f"Features block by block · {where}",
            x_label="block",
            y_label="validation accuracy",
            bands={
                f"{TITLES[name]}, {probe}": _band(score)
                for name, probes in result.scores.items()
                for probe, score in probes.items()
                if name not in WITHOUT_BLOCKS and score.layer_errors
            },
            levels={
                f"{TITLES[name]}, {probe}": (score.layer_accuracy[0], of_series)
                for name in WITHOUT_BLOCKS
                for of_series, (probe, score) in enumerate(result.scores.get(name, {}).items())
            },
            least_span=0.1,
            note="bands: 95 % over folds" if len(best.layers) > 1 else "",
        ),
    }
    if result.gains:
        drawn["gains"] = pictures.forest(
            [
                (f"over {TITLES[name]}", 100 * gain, 100 * low, 100 * high)
                for name, (gain, low, high) in result.gains.items()
            ],
            title=f"What pretraining gains · {where}",
            x_label="points of the linear probe, paired 95 % intervals",
        )
    for name, picture in drawn.items():
        tracked.log_image(name, picture)
        place = storage.join(result.output, f"{name}.png")
        storage.write_bytes(place, pictures.png(picture), check=check)


def _by_block(result: Result, score: Score) -> tuple[list[int], list[float]]:
    """Blocks and accuracies: of all blocks where a baseline is deeper or less deep."""
    found = score.layer_accuracy
    same = len(found) in (0, len(result.layers))
    return result.layers[: len(found)] if same else list(range(1, len(found) + 1)), found


def _band(score: Score) -> tuple[list[float], list[float]]:
    pairs = list(zip(score.layer_accuracy, score.layer_errors, strict=True))
    return [value - 2 * error for value, error in pairs], [v + 2 * e for v, e in pairs]


PROBE_TITLES = {"linear": "linear probe", "knn": "k-NN", "attentive": "attentive probe"}


def _accuracy(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} % [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _row(*cells: str) -> str:
    # MLflow's page leaves no room between columns.
    return "| " + " &nbsp; | ".join(cells) + " |"


def note_of(result: Result) -> str:
    """The table of the description: features, probes, intervals, gains."""
    found = [kind for kind in PROBE_TITLES if kind in result.scores[PRETRAINED]]
    lines = [_row("features", *(PROBE_TITLES[kind] for kind in found), "block")]
    lines.append("| --- " * (len(found) + 2) + "|")
    for name, probes in result.scores.items():
        linear = probes["linear"]
        cells = [_accuracy(probes[kind]) if kind in probes else "-" for kind in found]
        block = str(max(set(linear.layers), key=linear.layers.count) or "-")
        lines.append(_row(TITLES[name], *cells, block))
    rest = [""] * len(found)
    lines.append(_row("most frequent class", f"{100 * result.majority:.1f} %", *rest))
    for name, (gain, low, high) in result.gains.items():
        lines.append(
            f"\nLinear probe against {TITLES[name]}: {100 * gain:+.1f} points, 95 % interval "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] (paired, by group)."
        )
    if result.teacher:
        lines.append(f"\nThe teacher: {result.teacher}.")
    return "\n".join(lines)
