"""A lost node shrinks an elastic run; the samples stay the same.

Runs in a process of its own, because a cluster of several nodes cannot share one with the Ray of
the other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training import data as train_data
from pipelines.training.log import sample_hash
from pipelines.training.run_dir import RunDir
from tests.pipelines.pretrain_fixtures import make_tables, per_step, small_config

pytestmark = [pytest.mark.ray, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
STEPS = 120


def config_for(tables, output):
    return small_config(
        tables,
        output,
        optim={"steps": STEPS, "warmup_steps": 2},
        scaling={"num_workers": (1, 2), "peak_tflops": 0.05},
        checkpoint={"every_steps": 10},
    )


def slow_loop(config, plan, *, in_ray):
    """`train_loop` at a pace at which a node can be lost."""
    import time

    from pipelines.pretrain import train_loop

    real = train_data.TrainData.batches

    def paced(self, segments):
        for batch in real(self, segments):
            time.sleep(0.1 if self.world.size == 2 else 0.0)
            yield batch

    train_data.TrainData.batches = paced
    train_loop(config, plan, in_ray=in_ray)


def drive(tables, output):
    """The driver: a head without CPUs, two nodes; one is killed."""
    import threading
    import time

    import ray
    from ray.cluster_utils import Cluster

    from pipelines.training.launch import launch

    memory = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    cluster.add_node(num_cpus=1, **memory)
    victim = cluster.add_node(num_cpus=1, **memory)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose_a_node():
        while not any(attempt.next_step >= 20 for attempt in RunDir(output).attempts()):
            time.sleep(0.2)
        cluster.remove_node(victim, allow_graceful=False)

    thread = threading.Thread(target=lose_a_node, daemon=True)
    thread.start()
    result = launch(config_for(tables, output), slow_loop)
    print(json.dumps({"steps": result.steps}))
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_shrinks_the_run(tmp_path, ray_turn):
    tables = make_tables(tmp_path / "tables")
    output = str(tmp_path / "run")
    code = (
        "import tests.conftest; from tests.pipelines.test_elastic import drive; "
        f"drive({tables!r}, {output!r})"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = RunDir(output).attempts()
    assert [attempts[0].workers, attempts[-1].workers] == [2, 1]
    # Every step took the rows of the order, whoever took them.
    config = config_for(tables, output)
    order = train_data.make_order(config, train_data.open_tables(config))
    found = per_step(output)
    assert sorted(found) == list(range(STEPS))
    for step, (_, samples) in found.items():
        rows = order.global_batch(*order.locate(step))
        assert int(samples, 16) == sample_hash(rows) % 2**64
