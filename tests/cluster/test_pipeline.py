"""The chain as one job on a small cluster of hosts: followed, stopped, given again, cut off.

What `test_chain.py` shows at length, short enough for every run of the tests.
"""

import contextlib
import os
import signal

import pytest

from tests.cluster import hosts
from tests.cluster.chain import PHOTOS, Chain, upload_photos
from tests.cluster.world import World

RECIPE = f"""
output: s3://beit/out
prepare:
  source: {PHOTOS}
  output: ""
  tracking: {{enabled: false}}
train_tokenizer:
  images: ""
  output: ""
  model: {{kind: projection, image_size: 32, patch_size: 4, vocab_size: 64}}
  data: {{codebook_images: 32, global_batch_size: 16}}
  scaling: {{num_workers: 0}}
  gate: {{num_images: 32, min_codes: 2, min_perplexity: 1}}
  tracking: {{enabled: false}}
tokenize:
  images: ""
  tokenizer: ""
  output: ""
  encoders: {{num_gpus: 0, max_actors: 1, decode_cpus: 0.5}}
  tracking: {{enabled: false}}
pretrain:
  images: ""
  tokens: []
  output: ""
  model: {{image_size: 32, patch_size: 4, dim: 32, depth: 1, num_heads: 2}}
  masking: {{num_masked: 24, min_block: 4}}
  data: {{global_batch_size: 8, num_shards: 4, window: 8}}
  optim: {{steps: 400, warmup_steps: 2}}
  scaling: {{num_workers: 1, cpus_per_worker: 1}}
  log_every: 5
  checkpoint: {{every_steps: 400, asynchronous: false}}
  health: {{data_starvation: "off", accuracy_floor: "off"}}
  tracking: {{enabled: false}}
evaluate:
  run: ""
  images: ""
  num_folds: 2
  one_per_group: false
  attentive: false
  tracking: {{enabled: false}}
"""


# The client hears of it up to 20 s later: the driver looks as seldom on S3.
STARTED = """
import boto3, time
bucket = boto3.resource("s3").Bucket("beit")
while not list(bucket.objects.filter(Prefix="out/run/attempts/")):
    time.sleep(0.1)
"""


@pytest.fixture
def chain(tmp_path, request):
    if reason := hosts.why_not():
        pytest.skip(reason)
    request.getfixturevalue("ray_turn")  # not before: it may take long, for nothing
    world = World(tmp_path, ("head", "cpu", "store", "client"))
    try:
        upload_photos(world, 48)
        (world.hosts["client"].directory / "chain.yaml").write_text(RECIPE)
        yield Chain(world, {"pipeline": "--config /tmp/chain.yaml"})
    finally:
        world.close()


@contextlib.contextmanager
def training_paused(world):
    """Inside, workers stand still: no training, however fast, is done before it is stopped."""
    lines = world.hosts["cpu"].processes()
    workers = [pid for pid, line in lines.items() if line.startswith("ray::RayTrainWorker")]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_chain_that_is_stopped_and_cut_off_ends_as_it_should(chain):
    world = chain.world
    stopped = chain.begin("pipeline")
    stopped.says("[4/5] pretrain")
    world.look(STARTED)
    # Ctrl-C lets the job run on; a second one stops it, with what it has saved.
    with training_paused(world):
        (client,) = world.clients()
        os.kill(client, signal.SIGINT)
        stopped.says("runs on. Follow it again")
        os.kill(client, signal.SIGINT)
        stopped.says("saving after this log")
    stopped.ends_with(130)
    assert world.drivers() == []
    assert stopped.submission.endswith("-1")
    assert "saved at step" in stopped.text
    assert stopped.text.count("[1/5] prepare") == 1

    # The next attempt does nothing twice, and tells all of it although its client is cut off.
    job = chain.begin("pipeline")
    job.says("[1/5] prepare")
    world.hosts["client"].cut()
    job.says("does not answer", seconds=120)
    world.hosts["client"].heal()
    job.ends_with(0)
    assert job.submission.endswith("-2")
    told = "\n".join(chain.shows_all_of(job, "out.logs/"))
    for said in ("prepare: already done", "tokenizer already done", "out/tokens: already done",
                 "continues at step"):  # fmt: skip
        assert said in told
    assert chain.count("out/run/weights/", "weights.safetensors") == 1
    chain.leaves_no_process()
    chain.leaves_no_file("out", "mlruns", "mlflow.db")
