"""What a node answers, whether there is room, whether GPUs are GPUs; without a cluster."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.cli import parse_stage
from jobs.needs import is_done, needs_of
from jobs.recipes import shipped_recipes
from pipelines import preflight
from pipelines.preflight import Bundle, Place, accelerator, capacity, node
from pipelines.preflight.node import Question, examine, existing_part

CPU_TORCH = torch.version.cuda is None and torch.version.hip is None


def ask(*places, gpus=0.0):
    return examine(Question(node="n", places=places, gpus=gpus, tracking_uri=""))


def sentences(report):
    return [trouble.sentence("node n") for trouble in report.troubles]


def as_seen_by_another(report, *places):
    """The places as the driver asks another node about them."""
    return [dataclasses.replace(place, seen=report.seen[place.field]) for place in places]


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


def written(folder):
    return preflight._with_mark(Place(field="output", uri=str(folder), written=True))


def test_a_node_that_sees_the_same_places_has_nothing_to_say(table, tmp_path):
    places = (Place(field="images", uri=str(table)), written(tmp_path / "out/put"))
    own = ask(*places)
    assert own.troubles == ()
    other = ask(*as_seen_by_another(own, *places))
    assert other.troubles == ()
    assert other.versions == own.versions
    with preflight._own_marks_removed(places):
        pass
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["images/manifest.json"]
    assert not (tmp_path / "out").exists()


def test_a_disk_of_the_drivers_node_alone_is_named(table, tmp_path):
    places = (Place(field="images", uri=str(table)), written(tmp_path))
    asked = as_seen_by_another(ask(*places), *places)
    (table / "manifest.json").unlink()  # what another node sees, whose disk is another
    table.rmdir()
    Path(places[1].mark).unlink()
    said = sentences(ask(*asked))
    assert len(said) == 2
    assert all("node n" in line and "a directory that all nodes share" in line for line in said)
    assert said[0].startswith(f"images = {table}")
    assert said[1].startswith(f"output = {tmp_path}")


def test_equal_paths_with_other_contents_are_other_places(table):
    place = Place(field="images", uri=str(table))
    (asked,) = as_seen_by_another(ask(place), place)
    (table / "manifest.json").write_text('{"another": 1}')
    assert "something else" in sentences(ask(asked))[0]
    photos = Place(field="source", uri=str(table.parent))
    (asked,) = as_seen_by_another(ask(photos), photos)
    (table.parent / "more").touch()
    assert "something else" in sentences(ask(asked))[0]


def test_a_joined_table_is_seen_where_its_tables_are(table, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/manifest.json").write_text(json.dumps({"tables": [{"uri": str(table)}]}))
    place = Place(field="images", uri=str(tmp_path / "all"))
    (asked,) = as_seen_by_another(ask(place), place)
    assert ask(asked).troubles == ()
    (table / "manifest.json").write_text('{"another": 1}')
    assert "something else" in sentences(ask(asked))[0]
    (table / "manifest.json").unlink()
    assert f"the table {table}, which is joined there, is not seen" in sentences(ask(asked))[0]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (Place(field="images", uri="/not/there"), "nothing is there"),
        (Place(field="images", uri="nostore://x/y"), "cannot open this kind of URI"),
        (Place(field="output", uri="/proc/x", written=True, mark="/proc/m.tmp"), "cannot be wri"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_sentence(place, reason):
    (said,) = sentences(ask(place))
    assert reason in said
    assert said.startswith(f"{place.field} = {place.uri}: on node n: ")
    assert "\n" not in said


def test_marks_that_nodes_leave_beside_each_other_are_not_looked_at(tmp_path):
    """The input may lie where the output will: `--source /data/*.tar --output /data/table`."""
    (tmp_path / "one.tar").touch()
    before = node._names(str(tmp_path))
    (tmp_path / f"{node.MARK}0123.tmp").touch()
    assert node._names(str(tmp_path)) == before
    (tmp_path / "two.tar").touch()
    assert node._names(str(tmp_path)) != before


def test_a_glob_is_looked_at_up_to_its_wildcard():
    assert existing_part("/photos/2024/*/a.jpg") == "/photos/2024"
    assert existing_part("s3://b/shards/{000..010}.tar") == "s3://b/shards"
    assert existing_part("s3://b/x?region=eu") == "s3://b/x?region=eu"


@pytest.mark.skipif(not CPU_TORCH, reason="this torch has CUDA")
def test_gpus_that_are_none_are_refused_by_a_cpu_build():
    (said,) = sentences(ask(gpus=2.0))
    assert "Ray counts 2 GPUs" in said
    assert torch.__version__ in said
    assert "--num-gpus 0" in said


def test_a_gpu_without_driver_or_kernels_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_80 sm_90", raising=False)
    reason, _ = accelerator.accelerator_trouble(1.0)
    assert "no NVIDIA driver" in reason
    for capability, good in (((9, 0), True), ((8, 6), True), ((10, 0), False), ((7, 5), False)):
        monkeypatch.setattr(accelerator, "_driver", lambda c=capability: ("", [c]))
        found = accelerator.accelerator_trouble(1.0)
        assert (found is None) == good
        assert good or f"{capability[0]}.{capability[1]}" in found[0]


def test_kernels_that_can_be_compiled_anew_fit_later_devices():
    assert accelerator.fits(["sm_90", "compute_90"], (12, 0))
    assert not accelerator.fits(["sm_90", "compute_120"], (10, 0))


GPU_NODE, CPU_NODE = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}


@pytest.mark.parametrize(
    ("count", "each", "nodes", "fitting"),
    [
        (2, {"CPU": 4, "GPU": 1}, [GPU_NODE], 2),
        (3, {"CPU": 4, "GPU": 1}, [GPU_NODE, CPU_NODE], 2),
        (2, {"CPU": 3}, [CPU_NODE, CPU_NODE], 2),
        (1, {"CPU": 6}, [CPU_NODE, CPU_NODE], 0),  # no node alone has them
        (4, {"GPU": 0.5}, [GPU_NODE], 4),
        (9, {"CPU": 0.1}, [{"CPU": 0.9}], 9),
    ],
)
def test_room_is_on_nodes_not_in_sums(count, each, nodes, fitting):
    bundle = Bundle(field="scaling.num_workers", count=count, resources=each, remedy="add nodes")
    said = capacity.shortages([bundle], nodes)
    assert bool(said) == (fitting < count)
    assert not said or f"{count} x" in said[0]
    assert not said or f"{fitting} of them fit" in said[0]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_says_what_it_needs(name):
    chain = name in ("quickstart", "demo", "compare")
    tunes = name.startswith("finetune")
    codes = name.startswith("vqkd")
    stage = "pipeline" if chain else "finetune" if tunes else "pretrain"
    stage = "train-tokenizer" if codes else stage
    flags = ["--config", name, "--output", "s3://b/out", "--tracking.uri", "http://mlflow:5000"]
    reads = ["--tokens", "s3://b/t,s3://b/u"]
    if tunes:
        reads = ["--run", "s3://b/r", "--test", "s3://b/v"]
    if codes:
        reads = ["--teacher", "s3://b/r", "--layer", "9"]
    flags = flags[:4] if chain else [*flags, "--images", "s3://b/i", *reads]
    config = parse_stage(stage, flags)
    needs = needs_of(stage, config)
    named = {place.field: place.uri for place in needs.places}
    if chain:
        assert named == {"output": "s3://b/out"}
        tokenized = name != "demo"  # whose mae needs no tokens
        assert len(needs.bundles) == tokenized + 1 + len(config.arms)  # and every pretrain
        return
    inputs = {"tokens[0]": "s3://b/t", "tokens[1]": "s3://b/u"}
    if tunes:
        inputs = {"run": "s3://b/r", "test": "s3://b/v"}
    if codes:
        inputs = {"teacher": "s3://b/r"}
    assert named == {"output": named["output"], "images": "s3://b/i", **inputs}
    (workers,) = needs.bundles[0]
    assert workers.count == config.scaling.worker_range[0]
    assert ("GPU" in workers.resources) == config.scaling.use_gpu == needs.gpu
    assert needs.tracking_uri == "http://mlflow:5000"


@pytest.mark.parametrize(
    ("flag", "gpu", "resources"),
    [([], None, {}), (["0"], False, {"CPU": 1}), (["0.5"], True, {"GPU": 0.5})],
)
def test_tokenize_takes_the_gpus_that_there_are(flag, gpu, resources):
    flags = ["--images", "/i", "--tokenizer", "/t", "--output", "/o"]
    flags += ["--encoders.num_gpus", *flag] if flag else []
    needs = needs_of("tokenize", parse_stage("tokenize", flags))
    assert needs.gpu is gpu
    assert needs.bundles[0][1].resources == resources


@pytest.mark.parametrize(
    ("flags", "gpu", "resources"),
    [
        ([], False, None),
        (["--scaling.num_workers", "8"], None, {"CPU": 1}),
        (["--scaling.num_workers", "8", "--device", "cpu"], False, {"CPU": 1}),
        (["--scaling.num_workers", "8", "--device", "cuda"], True, {"CPU": 1, "GPU": 1}),
    ],
)
def test_evaluate_asks_for_its_actors(flags, gpu, resources):
    flags = ["--run", "s3://b/r", "--images", "s3://b/i", *flags]
    needs = needs_of("evaluate", parse_stage("evaluate", flags))
    assert needs.gpu is gpu
    assert [one.resources for each in needs.bundles for one in each] == [resources] * bool(
        resources
    )
    assert {place.field for place in needs.places} == {"images"}


def test_stored_views_are_a_place_that_nodes_must_see():
    flags = ["--views", "s3://b/v,s3://b/w", "--tokens", "s3://b/t", "--output", "s3://b/o"]
    needs = needs_of("pretrain", parse_stage("pretrain", [*flags, "--probe.every_steps", "0"]))
    named = {place.field: place.uri for place in needs.places}
    assert (named["views[0]"], named["views[1]"]) == ("s3://b/v", "s3://b/w")
    assert "images" not in named


def test_what_is_done_needs_no_nodes(table):
    config = parse_stage("prepare", ["--source", "/s", "--output", str(table)])
    assert is_done("prepare", config)
    assert is_done("render", dataclasses.replace(config, output=str(table)))
    assert not is_done("tokenize", dataclasses.replace(config, output=str(table / "other")))


def test_views_beside_tokens_are_a_place_to_write_and_must_be_done(table, tmp_path):
    flags = ["--images", "/i", "--tokenizer", "/t", "--output", str(table), "--store_views"]
    config = parse_stage("tokenize", [*flags, "/views"])
    assert not is_done("tokenize", config)
    views = tmp_path / "views"
    views.mkdir()
    (views / "manifest.json").write_text("{}")
    assert is_done("tokenize", dataclasses.replace(config, store_views=str(views)))
    (place,) = [each for each in needs_of("tokenize", config).places if each.uri == "/views"]
    assert (place.field, place.written) == ("store_views", True)


@pytest.mark.long
@pytest.mark.skipif(not CPU_TORCH, reason="this torch has CUDA")
def test_a_cluster_with_gpus_that_are_none(ray_turn, tmp_path):
    """The doctor and the stage itself, on a node that claims a GPU, exit with 2 and name it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2, num_gpus=1)
    data = Path(__file__).parents[1] / "data/v0.1.0"
    flags = ["--images", f"{data}/images", "--tokenizer", f"{data}/tokenizer"]
    flags += ["--output", str(tmp_path / "out")]
    environment = {"RAY_ADDRESS": cluster.address, "PATH": "/usr/bin:/bin"}
    environment |= {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    try:
        for command in (["doctor", "tokenize"], ["tokenize"]):
            done = subprocess.run(
                [sys.executable, "-m", "jobs", *command, *flags, "--tracking.enabled", "false"],
                cwd=Path(__file__).parents[2], env=environment, text=True, capture_output=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert "build without CUDA" in done.stderr
            assert "on node " in done.stderr
            assert "Traceback" not in done.stderr
    finally:
        cluster.shutdown()
