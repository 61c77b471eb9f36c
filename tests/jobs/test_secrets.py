"""Secrets in every URI and variable: after a whole chain on S3 they stand in nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.environment import ENVIRONMENT
from pipelines.config.checks import to_dict
from tests.pipelines.image_sources import write_folder
from tests.pipelines.pretrain_fixtures import small_config, write_images, write_tokens
from tests.s3_server import ACCESS_KEY, SECRET_KEY, start_s3
from tests.servers import free_port, mlflow_server, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
PLANTED = b"geheim"
VARIABLES = {
    "HTTPS_PROXY": "http://anna:planted-1-geheim@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "MLFLOW_TRACKING_TOKEN": "planted-2-geheim",
    "HF_TOKEN": "planted-3-geheim",
    "AWS_SESSION_TOKEN_OLD": "planted-4-geheim",
    "TEAM_PASSWORD": "images",  # a word that stands in places, too
    "BEIT_JOB": "job",  # logs are kept beside the output
}


class Chain:
    """Commands in processes of their own, and all that they have left."""

    def __init__(self, directory, s3, bucket, port):
        self.directory, self.s3, self.bucket, self.told = directory, s3, bucket, []
        self.tracking = f"http://anna:planted-5-geheim@127.0.0.1:{port}"

    def uri(self, name):
        """A place in the bucket whose query has a secret that no driver asks for."""
        return self.s3.uri(self.bucket, name) + "&allow_token=planted-6-geheim"

    def beit(self, *words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *words],
            cwd=self.directory, capture_output=True, check=False, timeout=300,
            env={**os.environ, **ENVIRONMENT, **VARIABLES, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        text = (done.stdout + done.stderr).decode()
        assert done.returncode == code, text[-4000:]
        self.told.append(text)
        return text

    def leaks(self):
        """Names of files, objects and outputs that hold a secret."""
        files = {str(path): path.read_bytes() for path in self.directory.rglob("*")
                 if path.is_file() and path.name != "recipe.yaml"}  # fmt: skip
        client = self.s3.client()
        for listed in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for one in listed["Contents"]:
                body = client.get_object(Bucket=self.bucket, Key=one["Key"])["Body"]
                files[f"s3://{one['Key']}"] = body.read()
        files |= {f"output {number}": text.encode() for number, text in enumerate(self.told)}
        assert len(files) > 50
        return [n for n, data in files.items() if PLANTED in data or SECRET_KEY.encode() in data]


@pytest.fixture(name="chain")
def chain_fixture(empty_store, tmp_path):
    s3 = start_s3()
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with running(mlflow_server(tmp_path, store, str(tmp_path / "served"))) as server:
        yield Chain(tmp_path, s3, s3.new_bucket(), server.port)


def test_a_chain_on_s3_leaves_no_secret_anywhere(chain, tmp_path, ray_turn):
    tables = chain.uri("images"), chain.uri("tokens")
    write_tokens(tables[1], write_images(tables[0]))
    config = small_config(
        tables, chain.uri("run"), probe={"images": tables[0], "every_steps": 6, "max_share": 1.0},
        tracking={"enabled": True, "uri": chain.tracking, "registered_model": "beit"},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(config)))
    for key, data in write_folder(tmp_path / "raw").items():
        chain.s3.client().put_object(Bucket=chain.bucket, Key=f"raw/{key}", Body=data)
    tracked = ("--tracking.uri", chain.tracking)
    run = chain.uri("run")

    chain.beit("prepare", "--source", chain.uri("raw"), "--output", chain.uri("made"), *tracked)
    chain.beit("pretrain", "--config", "recipe.yaml")
    kept = chain.s3.client().get_object(Bucket=chain.bucket, Key="run/config.yaml")["Body"].read()
    assert b"/images?" in kept, "words of secret variables stay in places"
    # The same configuration, secrets and all, is still that of this run.
    assert "12 steps" in chain.beit("pretrain", "--config", "recipe.yaml")
    chain.beit("evaluate", "--run", run, "--images", tables[0], "--num_folds", "2", *tracked)
    chain.beit("export", "--run", run, "--output", "exported")
    chain.beit("report", run, *tracked)
    chain.beit("sync", run, *tracked)
    chain.beit("audit", tables[0])
    assert "no run of this store made" in chain.beit("lineage", "models:/beit/1", *tracked, code=1)

    wrong = ("--output", chain.uri("other"), "--config", "recipe.yaml")
    chain.beit("pretrain", *wrong, "--images", chain.uri("missing"), code=2)
    text = chain.beit("pretrain", *wrong, "--images", "s3://a/b?secret=planted-7-geheim", code=2)
    assert "secret=***" in text
    nobody = f"http://anna:planted-8-geheim@127.0.0.1:{free_port()}"
    text = chain.beit("pretrain", *wrong, "--tracking.uri", nobody, code=2)
    assert "no answer from http://***@127.0.0.1" in text

    assert chain.leaks() == []
    assert ACCESS_KEY not in "".join(chain.told)
