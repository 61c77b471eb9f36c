"""Image, compose file, launcher and Slurm script: read by the tools that their users run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = INFRA / "compose/compose.yaml"
BIN = Path(sys.executable).parent


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def compose_config(file, environment):
    path = {"PATH": os.environ["PATH"]}
    return run(BIN / "docker-compose", "-f", file, "config", "-q", env={**path, **environment})


def secrets():
    lines = (INFRA / "compose/.env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if re.match(r"[A-Z_]+=", line)]
    return dict.fromkeys(names, "a1b2c3d4e5f6")


def test_compose_reads_the_services_and_asks_for_every_secret():
    assert compose_config(COMPOSE, secrets()).returncode == 0
    for name in secrets():
        without = {key: value for key, value in secrets().items() if key != name}
        refused = compose_config(COMPOSE, without)
        assert refused.returncode != 0
        assert name in refused.stderr


def test_compose_refuses_a_planted_fault(tmp_path):
    text = COMPOSE.read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("healthcheck:", "healthchek:", 1))
    assert compose_config(tmp_path / "compose.yaml", secrets()).returncode != 0


def test_nothing_of_compose_listens_beyond_this_machine():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_passes_the_linter(tmp_path):
    file = INFRA / "docker/Dockerfile"
    sound = run(BIN / "hadolint", file)
    assert (sound.returncode, sound.stdout) == (0, "")
    planted = tmp_path / "Dockerfile"
    planted.write_text(file.read_text().replace("USER 1000", "USER root"))
    assert run(BIN / "hadolint", planted).returncode != 0


def test_rays_launcher_accepts_its_file():
    config = yaml.safe_load((INFRA / "ray-cluster/aws.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="worker_typ"):
        validate_config(prepare_config({**config, "worker_typ": 1}))


def test_the_shell_scripts_parse():
    for script in (INFRA / "slurm/beit.sbatch", INFRA / "compose/start-mlflow.sh"):
        assert run("bash", "-n", script).stderr == ""
