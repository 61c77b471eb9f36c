"""The whole chain by `beit submit` on a cluster of hosts, while links, hosts and drivers fail.

What comes out equals what an undisturbed cluster makes, the client is told the truth throughout,
and nothing is left running.
"""

import json
import os
import re
import signal

import pytest

from jobs.environment import SECRETS_FILE
from tests.cluster import hosts
from tests.cluster import world as worlds
from tests.cluster.chain import PHOTOS, Chain, upload_photos

IMAGES, TOKENIZER, TOKENS = (f"s3://beit/{name}" for name in ("images", "tokenizer", "tokens"))
FLAGS = {
    "prepare": f"--source {PHOTOS} --output {IMAGES}",
    "train-tokenizer": f"--images {IMAGES} --output {TOKENIZER} --model.image_size 32 "
    "--model.patch_size 4 --model.vocab_size 64 --model.dim 16 --model.hidden_dim 16 "
    "--model.init_dim 8 --model.encoder_blocks 1 --model.decoder_blocks 1 --optim.steps 20 "
    "--optim.lr 1e-3 --loss.kl_warmup_steps 10 --loss.temperature_steps 20 "
    "--data.global_batch_size 16 --data.num_shards 4 --data.window 16 --data.codebook_images 64 "
    "--gate.num_images 32 --gate.min_codes 2 --gate.min_perplexity 1 --log_every 5 "
    "--checkpoint.every_steps 10",
    "tokenize": f"--images {IMAGES} --tokenizer {TOKENIZER} --num_views 2 --rows_per_unit 1 "
    "--batch_size 16 --encoders.max_actors 2 --encoders.decode_cpus 0.5",
    "pretrain": f"--images {IMAGES} --tokens {TOKENS} --model.image_size 32 --model.patch_size 4 "
    "--model.dim 32 --model.depth 2 --model.num_heads 2 --masking.num_masked 24 "
    "--masking.min_block 4 --data.global_batch_size 16 --data.num_shards 4 --data.window 8 "
    "--optim.steps 160 --optim.warmup_epochs 0 --optim.warmup_steps 2 --optim.lr 3e-3 "
    "--scaling.num_workers 2 --scaling.cpus_per_worker 2 --scaling.stall_seconds 60 "
    "--scaling.peak_tflops 0.05 --log_every 5 --checkpoint.every_steps 5 "
    "--checkpoint.asynchronous false --health.data_starvation off --health.accuracy_floor off",
    "evaluate": f"--run s3://beit/run --images {IMAGES} --num_folds 2 --one_per_group false",
    "export": "--run s3://beit/run --format hf --output s3://beit/hf",
}


@pytest.fixture
def chain(tmp_path, ray_turn):
    if reason := hosts.why_not() or worlds.missing():
        pytest.skip(reason)
    world = worlds.World(tmp_path)
    try:
        upload_photos(world, 96)
        world.fence_in()
        yield Chain(world, FLAGS)
    finally:
        world.close()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_chain_survives_what_a_cluster_does(chain):
    prepare_while_the_client_is_cut_off(chain)
    train_a_tokenizer_while_the_dashboard_stands_still(chain)
    bad_input_and_failure_have_codes_of_their_own(chain)
    tokenize_while_a_host_is_switched_off(chain)
    pretrain_through_everything(chain)
    chain.run("evaluate")
    chain.run("export")
    assert chain.count("run/", "evaluation") > 0
    assert chain.count("hf/", "model.safetensors") == 1
    nothing_is_left(chain)
    no_secret_is_written(chain)


def prepare_while_the_client_is_cut_off(chain):
    client = chain.world.hosts["client"]
    job = chain.begin("prepare")
    job.says("Ray is there")
    client.cut()
    job.says("does not answer", seconds=120)
    client.heal()
    job.ends_with(0)
    chain.shows_all_of(job, "images.logs/")


def train_a_tokenizer_while_the_dashboard_stands_still(chain):
    head = chain.world.hosts["head"]
    (dashboard,) = (p for p, line in head.processes().items() if "/dashboard/dashboard.py" in line)
    job = chain.begin("train-tokenizer")
    job.says("Ray is there")
    os.kill(dashboard, signal.SIGSTOP)
    try:
        job.says("does not answer", seconds=180)
    finally:
        os.kill(dashboard, signal.SIGCONT)
    job.says("the cluster answers again")
    job.ends_with(0)


def bad_input_and_failure_have_codes_of_their_own(chain):
    """2 for the GPU that is none, 1 for a tokenizer that collapses by the limits that are set."""
    output = ("--output", "s3://beit/refused")
    refused = chain.begin("tokenize", *output)
    refused.ends_with(2)
    assert "GPU" in refused.text
    failed = chain.begin("tokenize", *output, "--encoders.num_gpus", "0",
                         "--gate.min_perplexity", "64", "--gate.num_units", "1")  # fmt: skip
    failed.ends_with(1)
    assert chain.count("refused/", "manifest.json") == 0


def tokenize_while_a_host_is_switched_off(chain):
    world = chain.world
    cpus = ("--encoders.num_gpus", "0")
    job = chain.begin("tokenize", "--output", TOKENS, *cpus)
    world.wait(lambda: chain.count("tokens/", ".parquet") >= 2, "the first units")
    world.hosts["cpu"].off()
    assert chain.count("tokens/", "manifest.json") == 0
    job.ends_with(0)
    world.hosts["cpu"].on()
    world.add_worker("cpu")
    world.wait(lambda: world.nodes() == 3, "the host that was off")
    chain.run("tokenize", "--output", "s3://beit/reference-tokens", *cpus)
    assert world.look(EQUAL_TABLES).strip() == "equal"


EQUAL_TABLES = """
from pipelines import storage
def contents(uri):
    return {
        file.path: storage.digest(storage.read_bytes(storage.join(uri, file.path)))
        for file in storage.list_files(uri, ".parquet")
    }
one, other = (contents(f"s3://beit/{name}") for name in ("tokens", "reference-tokens"))
print("equal" if one and one == other else (one, other))
"""


def pretrain_through_everything(chain):
    """A link is lost and comes back, the driver is killed, the job is stopped; then to the end."""
    world, output = chain.world, ("--output", "s3://beit/run")

    def saved(step):
        def newest():
            steps = re.findall(r"checkpoints/step_(\d+)/", "\n".join(chain.names("run/")))
            return max(map(int, steps), default=0)

        world.wait(lambda: newest() >= step, f"a checkpoint of step {step}", 600)

    job = chain.begin("pretrain", *output)
    saved(20)
    world.hosts["gpu"].cut()
    job.says("has been marked dead")
    world.hosts["gpu"].heal()
    job.says("continues at step")
    saved(60)
    (driver,) = world.drivers()
    os.kill(driver, signal.SIGKILL)
    job.ends_with(137)

    job = chain.begin("pretrain", *output)
    saved(100)
    chain.stop(job)
    job.ends_with(130)
    assert ["pretrain", "KILLED"] in json.loads(world.look(RUNS))

    chain.run("pretrain", *output)
    chain.run("pretrain", "--output", "s3://beit/reference")
    assert world.look(EQUAL_RUNS).strip() == "equal"


EQUAL_RUNS = """
from tests.pipelines.pretrain_fixtures import per_step, weight_bytes
one, other = ("s3://beit/" + name for name in ("run", "reference"))
assert sorted(per_step(one)) == list(range(160)), "steps are missing"
assert per_step(one) == per_step(other), "samples or losses differ"
print("equal" if weight_bytes(one) == weight_bytes(other) else "weights differ")
"""


def nothing_is_left(chain):
    """No process, no lease, no file beside the store, no run that is open."""
    chain.leaves_no_process()
    chain.leaves_no_file("images", "tokens", "run", "mlruns", "mlflow.db")
    # What was given up says so; what is finished has none.
    leases = [name for name in chain.names("") if "/_lease/" in name]
    assert {name.partition("/")[0] for name in leases} == {"refused"}
    assert any(name.endswith(".end") for name in leases)
    # One run for each artefact, however often it was begun; those that were refused began none.
    assert json.loads(chain.world.look(RUNS)) == [
        ["evaluate", "FINISHED"], ["prepare", "FINISHED"], ["pretrain", "FINISHED"],
        ["pretrain", "FINISHED"], ["tokenize", "FAILED"], ["tokenize", "FINISHED"],
        ["tokenize", "FINISHED"], ["train-tokenizer", "FINISHED"],
    ]  # fmt: skip


RUNS = """
import json
from mlflow import MlflowClient
client = MlflowClient()
runs = client.search_runs([client.get_experiment_by_name("beit").experiment_id])
print(json.dumps(sorted((run.data.tags["beit.stage"], run.info.status) for run in runs)))
"""


def no_secret_is_written(chain):
    """Only the file that hands them over has them: not Ray's logs, nor results, nor MLflow."""
    world = chain.world
    dump = [worlds.POSTGRES / "pg_dump", "--host=127.0.0.1", "--username=postgres", "mlflow"]
    texts = {"PostgreSQL": world.hosts["tracker"].run(*dump), "S3": world.look(OBJECTS)}
    assert "beit.stage" in texts["PostgreSQL"]
    assert "evaluate" in texts["S3"]
    files = list(world.directory.glob("*.log"))
    for name in ("head", "cpu", "gpu", "client"):
        files += [file for file in world.hosts[name].directory.rglob("*") if file.is_file()]
    handed = [file for file in files if file.name == SECRETS_FILE]
    assert handed
    assert {file.stat().st_mode & 0o777 for file in handed} == {0o600}
    assert any(file.name.startswith("runtime_env_agent") for file in files)  # Ray's, with env_vars
    for file in set(files) - set(handed):
        texts[str(file)] = file.read_text(errors="replace")
    for secret in (*worlds.SECRETS.values(), worlds.RAY["RAY_AUTH_TOKEN"]):
        assert [place for place, text in texts.items() if secret in text] == []


OBJECTS = """
import boto3
s3 = boto3.resource("s3")
for name in ("beit", "mlflow"):
    for each in s3.Bucket(name).objects.all():
        print(each.key, each.get()["Body"].read())
"""
