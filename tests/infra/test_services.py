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
    prepared = prepare_config(config)
    validate_config(prepared)
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in prepared["file_mounts"]
    with pytest.raises(Exception, match="worker_typ"):
        validate_config(prepare_config({**config, "worker_typ": 1}))


def test_the_shell_scripts_parse():
    for script in (INFRA / "slurm/beit.sbatch", INFRA / "compose/start-mlflow.sh"):
        assert run("bash", "-n", script).stderr == ""


# A host of its own: names, ports and processes are compose's, and end with the script.
SERVER = r"""
set -eu
ip link set lo up
echo "127.0.0.1 localhost postgres store" >hosts; mount --bind hosts /etc/hosts
mount -t tmpfs tmpfs /var/lib/postgresql
mkdir /var/lib/postgresql/run; echo "$POSTGRES_PASSWORD" >/var/lib/postgresql/password
chown -R postgres /var/lib/postgresql
su postgres -c "cd; $BIN/initdb -D run/data -U mlflow -E UTF8 --pwfile=password -A scram-sha-256
  $BIN/pg_ctl -D run/data -o '-k /var/lib/postgresql/run' -l run/log -w start" >postgres.log
export PGPASSWORD=$POSTGRES_PASSWORD
psql -h postgres -U mlflow -d postgres -c "CREATE DATABASE mlflow" \
  -f "$COMPOSE/create-auth-database.sql"
sh "$COMPOSE/start-mlflow.sh" >mlflow.log 2>&1 &
"$PYTHON" - <<'ASK'
import base64, os, time, urllib.error, urllib.request
def ask(path, login="", host="localhost:5000"):
    request = urllib.request.Request("http://127.0.0.1:5000" + path, headers={"Host": host})
    if login:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_header("Authorization", "Basic " + encoded)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
for _ in range(300):
    if ask("/health"):
        break
    time.sleep(1)
runs = "/api/2.0/mlflow/experiments/search?max_results=5"
right = "admin:" + os.environ["ADMIN_PASSWORD"]
print(ask(runs), ask(runs, "admin:wrong"), ask(runs, right), ask(runs, right, "mlflow:5000"),
      ask(runs, right, "evil.example"))
ASK
"""


@pytest.mark.long
def test_composes_server_asks_for_a_password(tmp_path):
    """compose's own script, on a real PostgreSQL: who has no password gets nothing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if os.geteuid() or not found:
        pytest.skip("needs root and PostgreSQL: apt-get install --no-install-recommends postgresql")
    environment = secrets() | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHON": sys.executable, "BIN": found[-1].parent,
        "COMPOSE": COMPOSE.parent, "ALLOWED_HOSTS": "mlflow,mlflow:*,localhost:*,127.0.0.1:*",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef", "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    spaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        asked = run("unshare", *spaces, "bash", "-c", SERVER, cwd=tmp_path, env=environment)
    finally:
        Path("/tmp/auth.ini").unlink(missing_ok=True)
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("*.log")]
    assert asked.stdout.splitlines()[-1] == "401 401 200 200 403", (asked.stderr, logs)
