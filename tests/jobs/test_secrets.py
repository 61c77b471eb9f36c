"""Secrets in every URI and variable: after a whole chain on S3 they stand in nothing written."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jobs.environment import ENVIRONMENT
from pipelines.preparation.sample_images import list_images, read_image
from tests.jobs.test_chain import CONFIGS, MAE, SMALLER
from tests.s3_server import ACCESS_KEY, SECRET_KEY, start_s3
from tests.servers import free_port, mlflow_server, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
PLANTED = b"geheim"
ENDED = "command ended with "
PROGRAM = f"""
import json, sys
from jobs.cli import main
for words in json.load(sys.stdin):
    print({ENDED!r} + str(main(words)), flush=True)
"""


class Chain:
    """Commands, one after the other in one process, and all that they have left."""

    def __init__(self, directory, ray, s3, port):
        self.directory, self.ray, self.s3, self.told = directory, ray, s3, []
        self.bucket = s3.new_bucket()
        self.tracking = f"http://anna:planted-1-geheim@127.0.0.1:{port}"

    def uri(self, *name):
        """A place in the bucket whose query has a secret that no driver asks for."""
        return self.s3.uri(self.bucket, *name) + "&allow_token=planted-2-geheim"

    def run(self, commands):
        """Runs (words, exit code) of each; what each said."""
        variables = {
            "MLFLOW_TRACKING_URI": self.tracking,
            "HTTPS_PROXY": "http://anna:planted-3-geheim@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
            "MLFLOW_TRACKING_TOKEN": "planted-4-geheim",
            "HF_TOKEN": "planted-5-geheim",
            "AWS_SESSION_TOKEN_OLD": "planted-6-geheim",
            "TEAM_PASSWORD": "images",  # a word that stands in places, too
            "BEIT_JOB": "job",  # logs are kept beside the output
            "RAY_TMPDIR": str(self.ray),
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=self.directory, input=json.dumps([words for words, _ in commands]), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=1500,
            env={**os.environ, **ENVIRONMENT, **variables, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        self.told.append(done.stdout)
        parts = done.stdout.split(ENDED)
        codes = [int(part.split()[0]) for part in parts[1:]]
        assert codes == [code for _, code in commands], done.stdout[-6000:]
        return parts[:-1]

    def leaks(self):
        """Names of files, objects and outputs that hold a secret."""
        files = {
            str(path): path.read_bytes()
            for directory in (self.directory, self.ray)
            for path in directory.rglob("*")
            if path.is_file()
        }
        client = self.s3.client()
        for listed in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for one in listed["Contents"]:
                body = client.get_object(Bucket=self.bucket, Key=one["Key"])["Body"]
                files[f"s3://{one['Key']}"] = body.read()
        files |= {f"output {number}": text.encode() for number, text in enumerate(self.told)}
        assert len(files) > 100
        return [n for n, data in files.items() if PLANTED in data or SECRET_KEY.encode() in data]


@pytest.fixture(name="chain")
def chain_fixture(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    # Ray's sockets need a short path.
    ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        with running(mlflow_server(tmp_path, store, str(tmp_path / "served"))) as server:
            yield Chain(tmp_path, ray, start_s3(), server.port)
    finally:
        shutil.rmtree(ray, ignore_errors=True)


def test_a_chain_on_s3_leaves_no_secret_anywhere(chain, ray_turn):
    for key, _ in list_images()[::10]:
        chain.s3.client().put_object(Bucket=chain.bucket, Key=f"raw/{key}", Body=read_image(key))
    images, tokens, run = (chain.uri("out", name) for name in ("images", "tokens", "run"))
    quickstart = [
        "quickstart", "--config", str(CONFIGS / "quickstart.yaml"),
        "--prepare.source", chain.uri("raw"), "--output", chain.uri("out"), *SMALLER,
        "--pretrain.optim.steps=12", "--pretrain.optim.warmup_steps=2",
        "--pretrain.probe.every_steps=6", "--pretrain.probe.max_share=1",
        "--pretrain.tracking.registered_model=beit",
        f"--arms={json.dumps({'mae': {**MAE, 'probe': {'images': images}}})}",
    ]  # fmt: skip
    nobody = f"http://anna:planted-7-geheim@127.0.0.1:{free_port()}"
    other = ["pretrain", "--output", chain.uri("other"), "--tokens", json.dumps([tokens])]
    said = chain.run(
        [
            (quickstart, 0),
            # The same configuration, secrets and all, is still that of this chain.
            (quickstart, 0),
            (["export", "--run", run, "--output", "exported"], 0),
            (["report", run], 0),
            (["sync", run], 0),
            (["audit", images], 0),
            (["lineage", "models:/beit/1"], 0),
            ([*other, "--images", chain.uri("missing")], 2),
            ([*other, "--images", "s3://a/b?secret=planted-8-geheim"], 2),
            (["report", run, "--tracking.uri", nobody], 2),
        ]
    )
    assert "done already" in said[1]
    assert "secret=***" in said[8]
    assert "no answer from http://***@127.0.0.1" in said[9]
    kept = chain.s3.client().get_object(Bucket=chain.bucket, Key="out/run/config.yaml")
    assert b"/images?" in kept["Body"].read(), "words of secret variables stay in places"
    assert chain.leaks() == []
    assert ACCESS_KEY not in "".join(chain.told)
