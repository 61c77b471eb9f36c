"""The image, built for real without an engine, and a stage that runs in it.

Needs root, network for Debian's and Python's packages, and on Debian
`apt-get install --no-install-recommends buildah mmdebstrap`. The base is made of Debian's packages:
what the build argument BASE is for. A folder of wheels (UV_FIND_LINKS) and the machine's
certificates are mounted, never copied.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.infra.slurm import REPOSITORY

DATA = REPOSITORY / "tests/data/v0.1.0"
PACKAGES = "python3,python3-venv,ca-certificates"
MOST_GB = 2.2
PROGRAMS = ("buildah", "mmdebstrap")


@pytest.fixture(scope="module")
def buildah(ray_turn, tmp_path_factory):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() or missing:
        pytest.skip(f"{__doc__} Missing: {missing}")
    home = tmp_path_factory.mktemp("image")
    store = ["--storage-driver", "vfs", "--root", f"{home}/store", "--runroot", f"{home}/run"]

    def run(*command, check=True):
        done = subprocess.run(
            ["buildah", *store, *command],
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0 or not check, (done.stdout + done.stderr)[-3000:]
        return done

    base = home / "base"
    base.mkdir()
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm",
         base / "base.tar"],
        check=True,
    )  # fmt: skip
    (base / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    run("bud", "--isolation", "chroot", "-t", "localhost/base", str(base))
    yield run
    run("rm", "--all", check=False)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def container(buildah):
    """A container of the target `cpu`."""
    volumes = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    options = ["--system-certs"]
    if Path(links := os.environ.get("UV_FIND_LINKS", "none")).is_dir():
        volumes += ["--volume", f"{links}:/wheels:ro"]
        options.append("--find-links /wheels")
    else:
        options.append("--torch-backend=cpu")
    buildah(
        "bud", "--isolation", "chroot", "--target", "cpu", "-t", "localhost/beit-ray:cpu",
        "--build-arg", "BASE=localhost/base", "--build-arg", f"UV_OPTIONS={' '.join(options)}",
        *volumes, "-f", "infra/docker/Dockerfile", ".",
    )  # fmt: skip
    return buildah("from", "localhost/beit-ray:cpu").stdout.strip()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_stage_runs_in_the_image(buildah, container, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(DATA / "source", data / "source")
    data.chmod(0o777)

    def inside(*command):
        mounted = ["--isolation", "chroot", "--volume", f"{data}:/data"]
        return buildah("run", *mounted, container, "--", *command, check=False)

    assert inside("id", "-u").stdout.strip() == "1000"
    flags = ["--source", "/data/source", "--output", "/data/images"]
    done = inside("beit", "prepare", *flags, "--tracking.uri", "sqlite:////data/mlflow.db")
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((data / "images/manifest.json").read_text())
    assert manifest["num_rows"] == len(list((data / "source").rglob("*.png"))) - 1  # one is damaged
    assert inside("beit", "prepare", "--source", "/nope", "--output", "/data/x").returncode == 2
    # What KubeRay and Ray's launcher call, in login shells or not; how the launcher copies.
    found = inside("bash", "--login", "-c", "which ray beit rsync ssh").stdout.split()
    assert [Path(path).name for path in found] == ["ray", "beit", "rsync", "ssh"]
    # What compose starts: MLflow with users, PostgreSQL and S3.
    assert inside("python", "-c", "import psycopg, boto3, flask_wtf").returncode == 0
    # By allow-list: no tests, no results; and nothing that only tests need.
    assert inside("python", "-c", "import pytest").returncode == 1
    kilobytes = int(inside("du", "-skx", "/").stdout.split()[0])
    assert kilobytes < MOST_GB * 2**20, f"{kilobytes / 2**20:.2f} GB"
