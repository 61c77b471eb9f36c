"""Probes against scikit-learn, splits against leaks, and the stage against a table of shapes."""

import io
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from beit.images import image_digest
from beit.mim import BeitMIM
from beit.weights import save_weights
from pipelines import evaluate, storage
from pipelines.config.evaluate import EvaluateConfig, PoolConfig
from pipelines.config.protocol import ProtocolConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.evaluation import attentive, probes
from pipelines.evaluation.attentive import AttentiveProbe, attentive_predict
from pipelines.evaluation.features import (
    block_reader,
    open_weights,
    pixel_reader,
    pooled,
    read_features,
)
from pipelines.evaluation.labelled_images import LabelledImages, joined, read_labelled
from pipelines.evaluation.probes import (
    accuracy_interval,
    chosen_linear,
    grouped_folds,
    knn_predict,
    rankme,
)
from pipelines.evaluation.protocol import PROBES, probe, splits_of
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import commit_manifest
from pipelines.tables.weights_store import open_network, weights_fingerprint
from pipelines.tracking.lineage import lineage

OFF = TrackingConfig(enabled=False)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def blobs(count, dim, *, seed=0, spread=1.0, classes=3):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    labels = generator.integers(0, classes, count)
    return (centres[labels] + spread * generator.normal(size=(count, dim))).astype("f4"), labels


# Probes


@torch.no_grad()
def fit_linear(x, y, *, weight_decay, max_iterations):
    """The probe of one weight decay, from zero."""
    problem = probes._Problem(x, num_classes=3, device="cpu")
    start, labels = problem.start(), torch.from_numpy(y)
    return problem.probe(
        probes._solve(problem.rows, labels, start, weight_decay, max_iterations=max_iterations)
    )


@pytest.mark.parametrize(("count", "dim"), [(200, 12), (60, 150)])
def test_linear_probe_equals_scikit_learn(count, dim):
    """Tall and wide problems (the latter solved in the span of the rows): the same optimum."""
    x, y = blobs(count, dim)
    decay = 0.05
    scale = x.std(0)
    rows = (x - x.mean(0)) / np.maximum(scale, 1e-3 * scale.max())
    reference = LogisticRegression(C=1 / (count * decay), tol=1e-8, max_iter=5000).fit(rows, y)
    probe = fit_linear(x, y, weight_decay=decay, max_iterations=500)
    ours = torch.softmax(torch.from_numpy(rows) @ probe.weight + probe.bias, dim=1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(rows), atol=2e-3)
    assert np.array_equal(probe.predict(x), reference.predict(rows))


def test_knn_equals_scikit_learn():
    x, y = blobs(300, 10, spread=2.0)
    test, _ = blobs(120, 10, seed=1, spread=2.0)
    reference = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07), algorithm="brute"
    ).fit(x, y)
    assert np.array_equal(
        knn_predict(x, y, test, num_classes=3, k=7), reference.predict(test.astype("f8"))
    )


def test_probes_are_the_same_in_any_number_of_parts(monkeypatch):
    """What bounds memory at a million images decides nothing."""
    x, y = blobs(200, 8, spread=2.0)
    test, _ = blobs(100, 8, seed=1, spread=2.0)

    def found():
        linear = fit_linear(x, y, weight_decay=0.1, max_iterations=200)
        return np.stack([knn_predict(x, y, test, num_classes=3, k=500), linear.predict(test)])

    whole = found()
    monkeypatch.setattr(probes, "CHUNK", 600)
    assert np.array_equal(found(), whole)


def test_the_linear_probe_keeps_no_graph_of_its_logits(monkeypatch):
    """L-BFGS asks for its loss with gradients enabled: logits of all rows would be kept."""
    kept, real = [], probes._loss_and_gradient

    def looked_at(*given):
        kept.append(real(*given))
        return kept[-1]

    monkeypatch.setattr(probes, "_loss_and_gradient", looked_at)
    fit_linear(*blobs(60, 4), weight_decay=0.1, max_iterations=2)
    assert kept
    assert not any(value.requires_grad for values in kept for value in values)


def test_more_features_than_rows_are_reckoned_with_their_span(monkeypatch):
    """It is done for each block and the final probe, and grows with the cube of the rows."""
    spans, real = [], probes._span
    monkeypatch.setattr(probes, "CUBIC_ROWS", 16)
    monkeypatch.setattr(probes, "_span", lambda x: spans.append(tuple(x.shape)) or real(x))
    monkeypatch.setattr(probes.time, "monotonic", itertools.count().__next__)
    options = {"num_layers": 3, "num_classes": 2}
    solutions = 3 + len(probes.WEIGHT_DECAYS) + 1
    assert probes.seconds_of_chosen_linear(64, 32, **options) == solutions
    assert not spans
    assert probes.seconds_of_chosen_linear(64, 128, **options) == solutions + 4 * 4**3
    assert spans == [(16, 32)] * 2
    assert probes.seconds_of_rankme(64, 128) == 4**3
    compared = 3 * 0.16 * 4096 + 1024
    seconds = probes.seconds_of_knn(4096, 1024, 8, **options)
    assert seconds == pytest.approx(compared / probes.KNN_ROWS)


@pytest.mark.parametrize("kind", PROBES)
def test_what_is_found_does_not_depend_on_the_number_of_cores(kind):
    """As of networks: few directions are large, so that a solver's steps magnify the last bits, in
    which products on two cores differ from those on one."""
    draw, before = np.random.default_rng(0), torch.get_num_threads()
    protocol = ProtocolConfig(num_folds=2)
    labels = draw.integers(0, 9, 700)
    mixed = draw.normal(size=(1000, 1000)) * np.geomspace(1, 1e-3, 1000)[:, None]
    features = (draw.normal(size=(2, 700, 1000)) @ mixed).astype("f4")
    splits = splits_of(protocol, [str(row) for row in range(700)])
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(probe(kind, protocol, features, labels, splits))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, two = found
    assert one.layers == two.layers
    np.testing.assert_array_equal(one.predicted, two.predicted)
    np.testing.assert_array_equal(one.by_layer, two.by_layer)


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "dim", "num_layers", "num_classes"),
    [(400, 128, 4, 9), (400, 1024, 4, 9), (1700, 128, 4, 9), (1200, 384, 6, 100)],
)
def test_probes_take_what_was_reckoned(
    count, dim, num_layers, num_classes, monkeypatch, one_thread
):
    """In seconds of a processor, which no other program on the machine changes."""
    monkeypatch.setattr(probes.time, "monotonic", time.process_time)
    draw = np.random.default_rng(0)
    labels = draw.integers(0, num_classes, count)
    # As of networks: few directions are large, and classes overlap in them.
    mixed = draw.normal(size=(dim, dim)) * np.geomspace(1, 1e-3, dim)[:, None]
    centres = 0.3 * draw.normal(size=(num_layers, num_classes, dim))
    features = (draw.normal(size=(num_layers, count, dim)) + centres[:, labels]) @ mixed
    features = features.astype("f4")
    protocol = ProtocolConfig(num_folds=3)
    splits = splits_of(protocol, [str(row) for row in range(count)])
    known, tested = len(splits[0].known), len(splits[0].test)
    sizes = {"num_layers": num_layers, "num_classes": num_classes}
    reckoned = 3 * (
        probes.seconds_of_knn(known, tested, dim, **sizes)
        + probes.seconds_of_chosen_linear(known, dim, **sizes)
    ) + probes.seconds_of_rankme(count, dim)
    start = time.process_time()
    for kind in PROBES:
        probe(kind, protocol, features, labels, splits)
    rankme(features[-1])
    seconds = time.process_time() - start
    print(f"{count} x {dim}: reckoned {reckoned:.2f} s, real {seconds:.2f} s")
    assert 0.8 * seconds < reckoned < 2.5 * seconds


def test_rankme_is_its_formula():
    """arXiv 2210.02885, equations 2 and 3, with numpy."""
    x = np.random.default_rng(0).normal(size=(300, 6)) * [9, 5, 3, 1, 0, 0] + 2
    values = np.linalg.svd(x, compute_uv=False)
    shares = values / np.abs(values).sum() + 1e-7
    assert rankme(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert rankme(x.T) == pytest.approx(rankme(x), rel=1e-5)
    assert rankme(np.eye(5)) == pytest.approx(5, rel=1e-5)
    assert rankme(np.ones((9, 5))) == pytest.approx(1, rel=1e-3)


def test_the_informative_layer_is_chosen_and_constant_features_do_no_harm():
    x, y = blobs(200, 8, spread=0.5)
    noise = np.random.default_rng(5).normal(size=x.shape).astype("f4")
    constant = np.ones_like(x) * 3
    rows = np.arange(200)
    probe, layer, _, by_layer = chosen_linear(
        [noise, constant, x], y, rows[:120], rows[120:], num_classes=3
    )
    assert layer == 2
    assert by_layer[2] > max(by_layer[:2])
    assert (probe.predict(x) == y).mean() > 0.9


@given(
    sizes=st.lists(st.integers(1, 5), min_size=5, max_size=40),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_groups_are_never_divided(sizes, num_folds, seed):
    groups = [f"g{index}" for index, size in enumerate(sizes) for _ in range(size)]
    fold = grouped_folds(groups, num_folds, seed=seed)
    homes = {}
    for group, number in zip(groups, fold, strict=True):
        homes.setdefault(group, set()).add(int(number))
    assert all(len(folds) == 1 for folds in homes.values())
    share = np.bincount([next(iter(folds)) for folds in homes.values()], minlength=num_folds)
    assert share.max() - share.min() <= 1
    assert np.array_equal(fold, grouped_folds(groups, num_folds, seed=seed))


def test_the_interval_covers_the_truth_for_near_duplicates():
    """400 worlds of 40 groups of 5 equal rows: rows drawn singly would cover about 60 %."""
    covered = 0
    groups = [str(index // 5) for index in range(200)]
    for world in range(400):
        hits = (np.random.default_rng(world).random(40) < 0.7).repeat(5)
        low, high = accuracy_interval(hits, groups, seed=world, num_draws=200)
        covered += low <= 0.7 <= high
    assert covered / 400 > 0.88


def test_the_attentive_probe_finds_the_patch_that_tells_and_is_deterministic(monkeypatch):
    """One patch of 16 is marked, and its class stands in it: their mean drowns it in the others."""
    monkeypatch.setattr(attentive, "LEARNING_RATES", (1e-2,))
    generator = np.random.default_rng(0)
    patches = generator.normal(size=(400, 16, 8)).astype("f2")
    labels, told = generator.integers(0, 3, 400), generator.integers(0, 16, 400)
    patches[np.arange(400), told, 3] += 8
    patches[np.arange(400), told, labels] += 4
    rows = np.split(np.arange(400), [200, 260])
    options = {"num_heads": 2, "num_classes": 3, "seed": 0}
    found = attentive_predict(patches, labels, *rows, **options)
    mean = patches.mean(1, dtype="f4")
    linear, *_ = chosen_linear([mean], labels, *rows[:2], num_classes=3)
    right = labels[rows[2]]
    assert (found == right).mean() > 0.85 > 0.7 > (linear.predict(mean[rows[2]]) == right).mean()
    assert np.array_equal(found, attentive_predict(patches, labels, *rows, **options))


def test_the_attentive_probe_is_attention_with_a_learned_query():
    """Query and projection of keys in one vector: what torch's own attention gives."""
    generator = torch.Generator().manual_seed(0)
    probe = AttentiveProbe(
        torch.zeros(8), torch.ones(8), num_heads=2, num_classes=3, generator=generator
    )
    torch.nn.init.normal_(probe.head, generator=generator)
    x, keys = torch.randn(5, 7, 8), torch.randn(8, 8)
    query = torch.randn(8)
    with torch.no_grad():
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            probe.queries[:, head] = keys[part].T @ query[part] / 4**0.5
    values = torch.cat(list(probe.values), dim=1)

    def heads(y):
        return y.unflatten(-1, (2, 4)).transpose(-3, -2)

    expected = torch.nn.functional.scaled_dot_product_attention(
        heads(query.expand(5, 1, 8)), heads(x @ keys.T), heads(x @ values)
    )
    torch.testing.assert_close(probe(x), expected.transpose(1, 2).flatten(1) @ probe.head)


# Features


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    return BeitMIM(
        **{
            "image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "num_heads": 2,
            "vocab_size": 8, "absolute_positions": True, "relative_positions": "shared",
            "layer_scale_init": 0.1, **options,
        }
    )  # fmt: skip


def test_block_features_are_those_of_the_network():
    model = small_model().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    normalised = torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)
    normalised = normalised / torch.tensor(STD).view(3, 1, 1)
    for pooling in ("mean", "cls", "grid"):
        reader = block_reader(model, layers=[3, 1], pooling=pooling, mean=MEAN, std=STD)
        batches = (pixels[at : at + 2] for at in (0, 2, 4))
        found = read_features({"own": reader}, batches, 5)["own"]
        for layer, features in zip([3, 1], found, strict=True):
            with torch.no_grad():
                expected = pooled(model.features(normalised, layer=layer), pooling, (4, 4))
            np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_pooling_keeps_what_it_says():
    tokens = torch.arange(2 * 17 * 3, dtype=torch.float32).view(2, 17, 3)
    assert torch.equal(pooled(tokens, "cls", (4, 4)), tokens[:, 0])
    assert torch.equal(pooled(tokens, "mean", (4, 4)), tokens[:, 1:].mean(1))
    grid = pooled(tokens, "grid", (4, 4))
    assert torch.equal(grid.view(2, 3, 16), tokens[:, 1:].transpose(1, 2))


def test_large_pixels_are_shrunk():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 128), dtype=np.uint8)
    [features] = pixel_reader(2)(torch.from_numpy(images))
    assert features.shape == (2, 3 * 64 * 64)
    assert pixel_reader(10**6)(torch.from_numpy(images))[0].shape == (2, 3 * 16 * 16)
    mean = images.reshape(2, 3, 64, 2, 64, 2).mean((3, 5)).reshape(2, -1)
    np.testing.assert_allclose(features.numpy() * 255, mean, atol=1e-3)


# The stage

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220))


def picture(generator, label, *, noise=40):
    pixels = np.full((16, 16, 3), 255.0)
    top, left = generator.integers(0, 8, 2)
    pixels[top : top + 8, left : left + 8] = COLOURS[label]
    pixels += generator.normal(0, noise, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(uri, rows, class_names=("red", "green", "blue", "unused")):
    """`rows`: (image bytes, label or None, group or None)."""
    records = [
        ImageRow(
            key=f"{index:05d}", image=data, height=16, width=16, label=label,
            digest=image_digest(data), group=group,
        )
        for index, (data, label, group) in enumerate(rows)
    ]  # fmt: skip
    part = write_part(str(uri), "part-00000.parquet", records, row_group_bytes=20_000)
    commit_manifest(
        str(uri), parts=[part], class_names=list(class_names), source={}, options={},
        rejected={}, num_items=len(records),
    )  # fmt: skip
    return str(uri)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    generator = np.random.default_rng(0)
    rows = [
        (picture(generator, index % 3), index % 3 if index % 10 else None, None)
        for index in range(150)
    ]
    return write_table(tmp_path_factory.mktemp("shapes"), rows)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_weights(small_model(), path / "weights", extra={"pixel_mean": MEAN, "pixel_std": STD})
    storage.write_json(str(path / "run.json"), {"fingerprints": {}, "mlflow_run_id": "r" * 32})
    return str(path)


def test_the_stage_reports_files_and_tracks(shapes, trained_run, tmp_path, mlflow_uri):
    tracking = TrackingConfig(uri=mlflow_uri)
    config = EvaluateConfig(
        run=trained_run, images=shapes, output=str(tmp_path / "out"), num_folds=2, knn_k=5,
        tracking=tracking,
    )  # fmt: skip
    result = evaluate.run(config)
    assert result.num_images == 135
    assert result.class_names == ["red", "green", "blue"]  # classes without an image are left out
    assert result.scores["pixels"]["linear"].accuracy > 0.8
    for by_probe in result.scores.values():
        for score in by_probe.values():
            assert score.low <= score.accuracy <= score.high
    assert 0.3 < result.majority < 0.4
    assert set(result.gains) == {"random_init", "pixels"}
    gain, low, high = result.gains["pixels"]
    linear = {name: found["linear"].accuracy for name, found in result.scores.items()}
    assert gain == pytest.approx(linear["pretrained"] - linear["pixels"])
    assert low <= gain <= high
    assert f"linear probe {100 * linear['pretrained']:.1f} %" in result.summary()
    hits = storage.read_json(str(tmp_path / "out/hits.json"))
    for name, kept in {"pretrained": hits, **hits["baselines"]}.items():
        assert kept["linear"].count("1") / 135 == pytest.approx(linear[name])
    assert hits["baselines"].keys() == linear.keys() - {"pretrained"}

    report = storage.read_json(str(tmp_path / "out/evaluation.json"))
    confusion = np.array(report["confusion"])
    assert confusion.sum() == 135
    assert np.trace(confusion) / 135 == pytest.approx(linear["pretrained"])
    assert confusion.sum(1).tolist() == report["class_counts"]
    assert (tmp_path / "out/confusion.png").exists()

    client = MlflowClient(tracking.uri)
    [tracked] = client.search_runs([client.get_experiment_by_name("beit").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.tags["beit.pretrain_run_id"] == "r" * 32
    assert tracked.data.metrics["linear_accuracy/pixels"] == pytest.approx(linear["pixels"])
    node = lineage(tracked.info.run_id, tracking_uri=tracking.uri)
    assert set(node.inputs) == {"weights", "image_table"}
    history = client.get_metric_history(
        tracked.info.run_id, "linear_validation_by_block/pretrained"
    )
    assert [metric.step for metric in history] == [1, 2, 3]

    again = evaluate.run(config)
    assert again.already_done
    assert "was done already" in again.summary()
    assert again.scores == result.scores
    assert len(client.search_runs([tracked.info.experiment_id])) == 1


def test_another_checkpoint_is_a_baseline_image_by_image(shapes, trained_run, tmp_path):
    deeper, larger = tmp_path / "deeper", tmp_path / "larger"
    extra = {"pixel_mean": MEAN, "pixel_std": STD}
    save_weights(small_model(seed=1, depth=4), deeper, extra=extra)
    save_weights(small_model(image_size=32), larger, extra=extra)
    options = {
        "run": trained_run, "images": shapes, "output": str(tmp_path / "out"), "num_folds": 2,
        "baselines": False, "attentive": False, "tracking": OFF,
    }  # fmt: skip
    same = evaluate.run(EvaluateConfig(**options, baseline=trained_run))
    assert same.gains == {"baseline": (0.0, 0.0, 0.0)}
    result = evaluate.run(EvaluateConfig(**options, baseline=str(deeper)))
    assert not result.already_done
    gain, low, high = result.gains["baseline"]
    own, other = (result.scores[name]["linear"] for name in ("pretrained", "baseline"))
    assert gain == pytest.approx(own.accuracy - other.accuracy)
    assert low <= gain <= high
    assert len(other.layer_accuracy) == 4
    assert evaluate.run(EvaluateConfig(**options, baseline=str(deeper))).already_done
    with pytest.raises(InputError, match=r"baseline = .*larger: its images are of \(32, 32\)"):
        evaluate.run(EvaluateConfig(**options, baseline=str(larger)))
    shallow = tmp_path / "shallow"
    save_weights(small_model(depth=2), shallow, extra=extra)
    with pytest.raises(InputError, match=r"layers = \[3\]: the network of .*shallow has 2 blocks"):
        evaluate.run(EvaluateConfig(**options, layers=[3], baseline=str(shallow)))
    with pytest.raises(InputError, match=r"baseline: nothing at .*nowhere"):
        evaluate.run(EvaluateConfig(**options, baseline=str(tmp_path / "nowhere")))


def test_a_teacher_stands_beside(shapes, trained_run, tmp_path):
    """Asked for the states after a block, a run as its own teacher knows what that block knows."""
    options = {
        "run": trained_run, "images": shapes, "output": str(tmp_path / "out"), "num_folds": 2,
        "baselines": False, "attentive": False, "tracking": OFF, "pooling": "grid",
    }  # fmt: skip
    depth = open_network(trained_run).network.depth
    of_run = EvaluateConfig(**options, layers=[depth], teacher=trained_run, teacher_layer=depth)
    result = evaluate.run(of_run)
    assert result.gains == {"teacher": (0.0, 0.0, 0.0)}
    own, other = (result.scores[name]["linear"] for name in ("pretrained", "teacher"))
    assert own.layer_accuracy == other.layer_accuracy
    assert other.layers == [0, 0]
    assert "teacher" in result.summary()
    assert evaluate.run(of_run).already_done
    assert not evaluate.run(replace(of_run, teacher_layer=1)).already_done
    with pytest.raises(InputError, match=r"teacher = .*scaling\.num_workers 0"):
        EvaluateConfig(**options, teacher=trained_run, scaling=PoolConfig(num_workers=1))


def test_near_duplicates_cannot_answer_for_each_other(tmp_path, trained_run):
    """Six copies of each picture, labelled by a coin: only a leak could predict the label."""
    generator = np.random.default_rng(1)
    rows = []
    for group in range(60):
        data, label = picture(generator, 0), int(generator.integers(0, 2))
        rows.extend((data, label, f"group-{group}") for _ in range(6))
    table = write_table(tmp_path / "table", rows)
    options = {
        "run": trained_run,
        "images": table,
        "layers": [2],
        "tracking": OFF,
        "knn_k": 1,
        "attentive": False,
    }
    whole = evaluate.run(
        EvaluateConfig(**options, one_per_group=False, output=str(tmp_path / "whole"))
    )
    assert whole.num_images == 360
    for by_probe in whole.scores.values():
        assert all(score.accuracy < 0.75 for score in by_probe.values())
    single = evaluate.run(EvaluateConfig(**options, output=str(tmp_path / "single")))
    assert single.num_images == 60


def test_a_test_table_is_tested_as_a_whole(shapes, trained_run, tmp_path):
    generator = np.random.default_rng(7)
    test = write_table(
        tmp_path / "test", [(picture(generator, index % 3), index % 3, None) for index in range(30)]
    )
    result = evaluate.run(
        EvaluateConfig(
            run=trained_run,
            images=shapes,
            test_images=test,
            output=str(tmp_path / "out"),
            baselines=False,
            layers=[1, 3],
            tracking=OFF,
        )
    )
    assert result.num_images == 30
    assert list(result.scores) == ["pretrained"]
    assert result.gains == {}
    assert len(result.scores["pretrained"]["linear"].layer_accuracy) == 2


def labelled(names, labels, *, known=None):
    """Labelled images without pixels to speak of, as read from a table."""
    return LabelledImages(
        sources=(), labels=np.array(labels),
        groups=[f"{name}" for name in labels], class_names=names, known=known or names,
        fingerprint="f", uri="table",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ((["cat", "dog"], [0, 1]), (["cat", "dog"], [1, 0]), "cat dog | dog cat"),
        ((["cat", "dog"], [0, 1]), (["dog", "cat"], [1, 0]), "cat dog | cat dog"),
        ((["cat", "dog", "owl"], [2, 0, 1]), (["owl"], [0]), "owl cat dog | owl"),
        # `dog` was in the table, and the sample lost it.
        ((["cat", "owl"], [1, 0], ["cat", "dog", "owl"]), (["owl", "dog"], [0, 1, 1]),
         "owl cat | owl dog dog"),
        ((["caf\u00e9", "bar"], [0, 1]), (["cafe\u0301"], [0]), "caf\u00e9 bar | caf\u00e9"),
    ],
)  # fmt: skip
def test_classes_of_two_tables_are_matched_by_name(train, test, names):
    tables = labelled(*train[:2], known=(*train, None)[2]), labelled(*test)
    both = joined(*tables)
    assert set(both.labels) == set(range(len(both.class_names))), "no class without an image"
    found = [both.class_names[label] for label in both.labels]
    expected = [name.split() for name in names.split("|")]
    assert found == [*expected[0], *expected[1]]
    assert both.class_names == [name for name in tables[0].known if name in found]


def test_a_class_that_is_only_tested_is_refused():
    with pytest.raises(InputError, match=r"test_images: table has no image of 'owl', but of 'cat'"):
        joined(labelled(["cat", "dog"], [0, 1]), labelled(["dog", "owl"], [0, 1]))


def test_a_class_that_a_sample_lost_is_missed_and_not_mistaken(trained_run, tmp_path):
    generator = np.random.default_rng(3)
    # One row in 30 is green, and the sample leaves all of these out.
    labels = [1 if index == 1 else 2 * (index % 2) for index in range(30)]
    rows = [(picture(generator, label), label, None) for label in labels]
    images = write_table(tmp_path / "images", rows)
    other = [(picture(generator, label), number, None)
             for number, label in [(0, 2), (1, 1), (0, 2), (1, 1)]]  # fmt: skip
    test = write_table(tmp_path / "test", other, class_names=("blue", "green"))
    options = {"run": trained_run, "images": images, "test_images": test, "layers": [1],
               "tracking": OFF, "max_images": 10, "attentive": False}  # fmt: skip
    result = evaluate.run(EvaluateConfig(**options, output=str(tmp_path / "out")))
    assert result.class_names == ["red", "green", "blue"]
    score = result.scores["pixels"]["linear"]
    assert score.class_accuracy == [None, 0.0, pytest.approx(score.accuracy * 2)]
    report = storage.read_json(str(tmp_path / "out/evaluation.json"))
    assert report["class_counts"] == [0, 2, 2]


def test_other_options_are_another_evaluation(shapes, trained_run, tmp_path):
    options = {
        "run": trained_run, "images": shapes, "output": str(tmp_path), "baselines": False,
        "num_folds": 2, "attentive": False, "tracking": OFF,
    }  # fmt: skip
    evaluate.run(EvaluateConfig(**options))
    assert evaluate.run(EvaluateConfig(**options, batch_size=7)).already_done
    assert evaluate.run(EvaluateConfig(**options, device="cuda:99")).already_done, "not computed"
    assert not evaluate.run(EvaluateConfig(**options, pooling="grid")).already_done
    assert not evaluate.run(EvaluateConfig(**options, pooling="grid", force=True)).already_done


@pytest.mark.parametrize("before", [{}, {"pooling": "grid"}])
def test_one_that_was_killed_in_the_middle_is_done_again(
    shapes, trained_run, tmp_path, monkeypatch, before
):
    """Its report comes last; one of other options does not stand beside its pictures."""
    options = {
        "run": trained_run, "images": shapes, "output": str(tmp_path), "baselines": False,
        "num_folds": 2, "attentive": False, "tracking": OFF,
    }  # fmt: skip
    if before:
        evaluate.run(EvaluateConfig(**options | before))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.evaluation.record.pictures.curve", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(EvaluateConfig(**options))
    monkeypatch.undo()
    for again in [before] * bool(before) + [{}]:
        assert not evaluate.run(EvaluateConfig(**options | again)).already_done
    assert {"blocks.png", "confusion.png", "hits.json"} <= {one.name for one in tmp_path.iterdir()}
    assert evaluate.run(EvaluateConfig(**options)).already_done


def test_bad_input_is_named(shapes, trained_run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"run: .*finish `beit pretrain`"):
        open_weights(str(tmp_path / "nothing"))
    with monkeypatch.context() as patched:  # two arguments that are mistaken for each other
        patched.setattr(storage, "read_bytes", lambda uri: pytest.fail(f"copies {uri}"))
        with pytest.raises(InputError, match=r"run: nothing at .*finish `beit pretrain`"):
            open_weights(shapes)
        with pytest.raises(InputError, match=r"run = .*: no weights are there \(\.pth, "):
            open_network(shapes)
    save_weights(small_model(), tmp_path / "weights")
    with pytest.raises(InputError, match=r"extra\.pixel_mean"):
        open_weights(str(tmp_path))
    with pytest.raises(InputError, match=r"layers = \[4\]: this network has 3 blocks"):
        evaluate.run(EvaluateConfig(run=trained_run, images=shapes, layers=[4], tracking=OFF))
    with pytest.raises(InputError, match=r"run = '': give its directory"):
        evaluate.run(EvaluateConfig(run="", images=shapes, tracking=OFF))
    with pytest.raises(InputError, match=r"num_folds = 1: must be at least 2"):
        EvaluateConfig(run="r", images="i", num_folds=1)
    generator = np.random.default_rng(0)
    table = write_table(tmp_path / "none", [(picture(generator, 0), None, None)] * 3)
    with pytest.raises(InputError, match=r"labelled images of 0 classes"):
        evaluate.run(EvaluateConfig(run=trained_run, images=table, tracking=OFF))


@pytest.mark.parametrize(
    ("num_folds", "too_few", "message"),
    [(2, 3, "of 3 groups; num_folds = 2 needs 4"), (3, 2, "of 2 groups; num_folds = 3 needs 3")],
)
def test_every_fold_leaves_groups_to_fit_on_and_to_choose_by(tmp_path, num_folds, too_few, message):
    protocol = ProtocolConfig(num_folds=num_folds)
    generator = np.random.default_rng(0)
    few, enough = (
        write_table(tmp_path / f"{n}", [(picture(generator, i % 2), i % 2, None) for i in range(n)])
        for n in (too_few, too_few + 1)
    )
    with pytest.raises(InputError, match=message):
        read_labelled(few, protocol)
    for split in splits_of(protocol, read_labelled(enough, protocol).groups):
        assert min(map(len, (split.train, split.validation, split.test))) > 0


def test_a_full_disk_is_told_before_anything_is_computed(
    shapes, trained_run, tmp_path, monkeypatch
):
    need = 2 * 2 * 135 * small_model().num_patches * small_model().dim * 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - 1))
    monkeypatch.setattr(evaluate.Extraction, "read", None)
    config = EvaluateConfig(
        run=trained_run, images=shapes, output=str(tmp_path), num_folds=2, tracking=OFF
    )
    with pytest.raises(InputError, match=r"are needed on disk, .*attentive: false"):
        evaluate.run(config)


def test_weights_are_found_in_a_run_or_by_themselves(trained_run):
    inside, alone = open_weights(trained_run), open_weights(f"{trained_run}/weights")
    assert inside.fingerprint == alone.fingerprint
    assert (inside.run_id, alone.run_id) == ("r" * 32, "")
    assert inside.mean == pytest.approx(MEAN)


def test_what_lies_beside_the_weights_is_not_part_of_them(tmp_path):
    for name in ("weights.safetensors", "config.json"):
        (tmp_path / name).write_bytes(name.encode())
    before = weights_fingerprint(str(tmp_path))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) == before
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) != before
