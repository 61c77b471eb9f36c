"""A lost node shrinks an elastic run, a returned one grows it; the samples stay the same.

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
from pipelines.training.run_dir import RunDir
from pipelines.training.step_metrics import sample_hash
from tests.pipelines.pretrain_fixtures import make_tables, per_step, small_config

pytestmark = [pytest.mark.ray, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
STEPS = 400


def config_for(tables, output):
    return small_config(
        tables,
        output,
        optim={"steps": STEPS, "warmup_steps": 2},
        scaling={"num_workers": (1, 2), "peak_tflops": 0.05},
        checkpoint={"every_steps": 10},
    )


def slow_loop(config, plan, world, log):
    """`train_loop` at a pace at which nodes can come and go."""
    import time

    from pipelines.pretrain import train_loop

    real = train_data.WorkerData.batches

    def paced(self, segments):
        for batch in real(self, segments):
            # Waits while the run is alone, so that it does not end before the node is back.
            time.sleep(0.1 if self.world.size == 2 else 0.4)
            yield batch

    train_data.WorkerData.batches = paced
    train_loop(config, plan, world, log)


def drive(tables, output):
    """The driver: a head without CPUs, two nodes; one is killed and comes back."""
    import functools
    import threading
    import time

    import ray
    import ray.train
    from ray.cluster_utils import Cluster

    from pipelines import pretrain

    memory = {"object_store_memory": 100_000_000}
    # Without hooks at exit, for those cannot be set in the thread that adds a node below.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, **memory}, shutdown_at_exit=False
    )
    cluster.add_node(num_cpus=1, **memory)
    victim = cluster.add_node(num_cpus=1, **memory)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    ray.train.ScalingConfig = functools.partial(
        ray.train.ScalingConfig, elastic_resize_monitor_interval_s=5
    )

    def workers_at(step):
        """Waits until the newest attempt has logged `step`; its number of workers."""
        while True:
            attempts = RunDir(output).attempts()
            if attempts and attempts[-1].next_step >= step:
                return attempts[-1].workers
            time.sleep(0.2)

    def come_and_go():
        assert workers_at(20) == 2
        cluster.remove_node(victim, allow_graceful=False)
        while RunDir(output).attempts()[-1].workers != 1:
            time.sleep(0.2)
        before = RunDir(output).attempts()[-1].start_step
        workers_at(before + 10)
        for _ in range(3):  # Ray gives a node 30 s to start, which a busy machine may miss
            try:
                cluster.add_node(num_cpus=1, **memory)
                break
            except Exception as error:
                print(f"no node yet: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=come_and_go, daemon=True)
    thread.start()
    try:
        pretrain.train_loop = slow_loop
        result = pretrain.run(config_for(tables, output))
        print(json.dumps({"steps": result.steps}))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_shrinks_the_run_and_a_returned_one_grows_it(tmp_path, ray_turn):
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
    workers = [attempt.workers for attempt in attempts]
    assert workers[0] == 2
    assert 1 in workers
    assert workers[-1] == 2, done.stderr[-4000:]
    # Every step took the rows of the order, whoever took them.
    config = config_for(tables, output)
    order = train_data.make_order(config, train_data.open_tables(config).row_group_sizes)
    found = per_step(output)
    assert sorted(found) == list(range(STEPS))
    for step, (_, samples) in found.items():
        rows = order.global_batch(*order.locate(step))
        assert int(samples, 16) == sample_hash(rows) % 2**64
