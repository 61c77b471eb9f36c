"""A notice that a node will be taken away saves what is done; what follows has its own budget."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import finetune, pretrain, train_tokenizer
from pipelines.training import data as train_data
from pipelines.training import distributed, stopping
from pipelines.training.checkpoint import Saver, complete_steps
from pipelines.training.run_dir import RunDir
from pipelines.training.step_metrics import sample_hash
from tests.pipelines.finetune_fixtures import make_inputs, small_finetune
from tests.pipelines.pretrain_fixtures import make_tables, per_step, small_config
from tests.pipelines.test_train_tokenizer import replaced, settings
from tests.pipelines.tokenizer_fixtures import disc, image_table

REPOSITORY = Path(__file__).parents[2]
STEPS = 240


def config_for(tables, output, workers=0, steps=16):
    return small_config(
        tables,
        output,
        optim={"steps": steps, "warmup_steps": 2},
        scaling={"num_workers": workers, "max_failures": 0, "peak_tflops": 0.05},
        checkpoint={"every_steps": 10_000, "keep": 100},
    )


@pytest.fixture
def notices(monkeypatch):
    """Announces the end of a node in the second and third period that all workers ask about."""
    asked = []

    def notice():
        asked.append(1)
        return "node abc with workers [0] will be taken away" if 2 <= len(asked) <= 3 else ""

    real = distributed.join_world
    monkeypatch.setattr(
        "pipelines.training.driver.join_world",
        lambda **where: dataclasses.replace(real(**where), in_ray=True),
    )
    monkeypatch.setattr(stopping, "preemption_notice", notice)
    return asked


def test_a_notice_saves_at_the_end_of_its_period_and_training_goes_on(tmp_path, notices):
    output = str(tmp_path / "run")
    pretrain.run(config_for(make_tables(tmp_path / "tables"), output))
    run = RunDir(output)
    assert complete_steps(run.checkpoints) == [0, 8, 12, 16]
    (event,) = run.events("preemption_notice")
    assert event["step"] == 8
    assert len(notices) == 3  # once a period, and not after the last


# Fine-tuning has a period end with every epoch, which are six steps here.
@pytest.mark.parametrize(("stage", "steps"), [(finetune, [6, 8]), (train_tokenizer, [8, 12])])
def test_the_other_trainings_save_at_a_notice_too(stage, steps, tmp_path, notices, monkeypatch):
    sections = {"optim": {"steps": 16, "warmup_steps": 2}, "checkpoint": {"every_steps": 10_000}}
    config = small_finetune(make_inputs(tmp_path), tmp_path / "run", **sections)
    if stage is train_tokenizer:
        images = image_table(str(tmp_path / "discs"), [disc(seed) for seed in range(70)])
        config = settings(images, tmp_path / "run")
        for section, fields in sections.items():
            config = replaced(config, section, **fields)
    saved, save = [], Saver.save
    monkeypatch.setattr(
        Saver, "save", lambda self, each: (saved.append(each.step), save(self, each))
    )
    stage.run(config)
    assert [step for step in saved if 0 < step < 16] == steps


def slow_loop(config, plan, world, log):
    """`train_loop` at a pace at which a node can go."""
    import time

    from pipelines.pretrain import train_loop

    real = train_data.WorkerData.batches

    def paced(self, segments):
        for batch in real(self, segments):
            time.sleep(0.1)
            yield batch

    train_data.WorkerData.batches = paced
    train_loop(config, plan, world, log)


def drive(tables, output):
    """The driver: a head without CPUs and three nodes, of which one with a worker gets notice."""
    import threading
    import time

    import ray
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100_000_000}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, **memory}, shutdown_at_exit=False
    )
    nodes = [cluster.add_node(num_cpus=1, **memory) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def take_away():
        run, ray_cli = RunDir(output), Path(sys.executable).with_name("ray")
        while not (attempts := run.attempts()) or attempts[-1].next_step < 20:
            time.sleep(0.2)
        busy = {
            actor["node_id"]
            for actor in ray.util.state.list_actors(filters=[("state", "=", "ALIVE")])
            if "Worker" in actor["class_name"]
        }
        victim = next(node for node in nodes if node.node_id in busy)
        subprocess.run(
            [ray_cli, "drain-node", "--address", cluster.address, "--node-id", victim.node_id,
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", "15"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(15)
        cluster.remove_node(victim, allow_graceful=False)

    import ray.util.state

    threading.Thread(target=take_away, daemon=True).start()
    try:
        pretrain.train_loop = slow_loop
        result = pretrain.run(config_for(tables, output, workers=2, steps=STEPS))
        print(json.dumps({"steps": result.steps}))
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.long
def test_a_node_that_is_taken_away_after_a_notice_costs_no_failure(tmp_path, ray_turn):
    tables, output = make_tables(tmp_path / "tables"), str(tmp_path / "run")
    code = (
        "import tests.conftest; from tests.pipelines.test_preemption import drive; "
        f"drive({tables!r}, {output!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True,
        timeout=580, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY),
             "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000",
             "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    run = RunDir(output)
    noticed = run.events("preemption_notice")
    assert len(noticed) == 1, done.stderr[-4000:]
    first, second = run.attempts()
    # Without a regular checkpoint in reach, what was logged before the node went is there.
    assert second.start_step >= noticed[0]["step"] > 0
    assert first.next_step - second.start_step <= 2 * 4
    config = config_for(tables, output, workers=2, steps=STEPS)
    order = train_data.make_order(config, train_data.open_tables(config).row_group_sizes)
    found = per_step(output)
    assert sorted(found) == list(range(STEPS))
    for step, (_, samples) in found.items():
        rows = order.global_batch(*order.locate(step))
        assert int(samples, 16) == sample_hash(rows) % 2**64
