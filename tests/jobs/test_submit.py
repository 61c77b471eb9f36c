"""What a submission carries and what becomes of it, without a cluster."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jobs import submit
from jobs.cli import main, parse_stage
from jobs.recipes import shipped_recipes
from jobs.submission import cluster, package
from jobs.submission.follow import LogPrinter, explain_waiting, job_exit_code
from pipelines.errors import InputError
from pipelines.redaction import HIDDEN, redacted

PREPARE = ["--source", "s3://raw/photos", "--output", "s3://beit/images"]


def test_the_code_is_sent_by_allow_list(tmp_path, monkeypatch):
    for name in ("beit", "pipelines", "jobs", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1")
    results = tmp_path / "jobs/results.bin"
    with results.open("wb") as file:
        file.truncate(2 * 2**30)  # sparse: 2 GB of results beside the code
    monkeypatch.setattr(package, "checkout", lambda: tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    began = time.monotonic()
    size = package.write_package(target, config_text="a: 1\n", with_code=True, include=[])
    assert time.monotonic() - began < 1
    sent = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    code = ["beit/a.py", "jobs/a.py", "pipelines/a.py"]
    assert sent == sorted([*code, "job.yaml", "pipelines/code_version.json"])
    version = json.loads((target / "pipelines/code_version.json").read_text())
    assert len(version["commit"]) == 40
    assert size == 3 * len("x = 1") + len("a: 1\n")


def test_too_much_is_refused_by_name_and_nothing_is_copied(tmp_path):
    big, target = tmp_path / "big", tmp_path / "target"
    big.mkdir()
    target.mkdir()
    for number in range(7):
        with (big / f"{number}.bin").open("wb") as file:
            file.truncate((300 + number) * 2**20)  # 2 GB in all
    began = time.monotonic()
    with pytest.raises(InputError, match=r"6\.bin 306\.0 MiB.*2\.bin 302\.0 MiB") as refused:
        package.write_package(target, config_text="", with_code=False, include=[str(big)])
    assert time.monotonic() - began < 1
    assert "1.bin" not in str(refused.value)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("name", ["job.yaml", ".beit-secrets.json"])
def test_an_included_file_takes_no_place_of_the_jobs_own(name, tmp_path):
    (tmp_path / "sent").mkdir()
    mine = tmp_path / name
    mine.write_text("{}")
    with pytest.raises(InputError, match=f"--include {mine}: a job has a {name} of its own"):
        package.write_package(
            tmp_path / "sent", config_text="", with_code=False, include=[str(mine)]
        )
    assert list((tmp_path / "sent").iterdir()) == []


def test_this_checkout_is_small(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    package.write_package(code, config_text="", with_code=True, include=[])
    assert (code / "jobs/configs/quickstart.yaml").is_file()
    sent = tmp_path / "sent.zip"
    with zipfile.ZipFile(sent, "w") as file:  # as Ray sends it: not compressed
        for path in code.rglob("*"):
            file.write(path, path.relative_to(code))
    assert sent.stat().st_size < 2 * 2**20


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_configuration_that_is_sent_is_the_one_that_was_meant(name, tmp_path):
    chain = name in ("quickstart", "demo", "compare")
    tunes = name.startswith("finetune")
    codes = name.startswith("vqkd")
    stage = "pipeline" if chain else "finetune" if tunes else "pretrain"
    stage = "train-tokenizer" if codes else stage
    flags = ["--config", name, "--output", "/shared/out"]
    reads = ["--run", "/shared/r"] if tunes else ["--tokens", "/shared/t"]
    reads = ["--teacher", "/shared/r"] if codes else reads
    flags += [] if chain else ["--images", "/shared/i", *reads]
    sent = tmp_path / "job.yaml"
    sent.write_text(submit.describe(stage, flags).config_text)
    assert parse_stage(stage, ["--config", str(sent)]) == parse_stage(stage, flags)


def test_jobs_of_other_runs_and_evaluations_are_other_jobs():
    def prefix(stage, *flags):
        return submit.describe(stage, flags).prefix

    run = ["--images", "/i", "--tokens", "/t", "--output", "/runs"]
    assert prefix("pretrain", *run, "--name", "a") != prefix("pretrain", *run, "--name", "b")
    assert prefix("prepare", *PREPARE) == prefix("prepare", *PREPARE[:-1], PREPARE[-1] + "/")
    one, other = (["--run", "/r", "--images", images] for images in ("/a", "/b"))
    assert prefix("evaluate", *one) != prefix("evaluate", *other)


def test_tracking_that_would_go_with_the_job_is_refused():
    for flags, fits in (
        ([], False),
        (["--tracking.uri", "sqlite:///here.db"], False),
        (["--tracking.uri", "sqlite:////shared/mlflow.db"], True),
        (["--tracking.uri", "http://mlflow:5000"], True),
        (["--tracking.enabled", "false"], True),
    ):
        text = submit.describe("prepare", [*PREPARE, *flags]).config_text
        submit.require_shared_tracking(text, ["MLFLOW_TRACKING_URI"])
        if fits:
            submit.require_shared_tracking(text, [])
        else:
            with pytest.raises(InputError, match=r"tracking\.uri"):
                submit.require_shared_tracking(text, [])


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("audit", ["tables/tokens"]),
        ("pretrain", ["--images", "/i", "--tokens", "/t", "--output", "/o",
                      "--probe.images", "labelled"]),
        ("pipeline", ["--config", "quickstart", "--output", "/o", "--prepare.source", "photos"]),
    ],
)  # fmt: skip
def test_relative_paths_are_found_in_every_section(stage, flags):
    with pytest.raises(InputError, match="relative path"):
        submit.describe(stage, flags)


def test_the_id_follows_from_stage_and_output():
    first = submit.describe("prepare", PREPARE)
    assert submit.describe("prepare", [*PREPARE, "--min_side", "8"]).prefix == first.prefix
    other = submit.describe("prepare", [*PREPARE[:-1], "s3://beit/others"])
    assert other.prefix != first.prefix


def test_the_doctor_is_a_job_too():
    alone = submit.describe("doctor", [])
    assert alone.command == "doctor"
    submit.require_shared_tracking(alone.config_text, [])
    asked = submit.describe("doctor", ["prepare", *PREPARE])
    stage = submit.describe("prepare", PREPARE)
    assert asked == submit._rehearsal(stage)
    assert asked.command == "doctor prepare --config job.yaml"
    assert asked.prefix != stage.prefix


@pytest.mark.parametrize("flag", ["--source", "--output"])
def test_a_relative_path_is_refused_by_name(flag):
    with pytest.raises(InputError, match=flag.removeprefix("--")):
        submit.describe("prepare", [*PREPARE, flag, "here"])


def test_no_secret_is_in_metadata():
    flags = [*PREPARE, "--tracking.uri", "https://anna:geheim@mlflow:5000"]
    job = submit.describe("prepare", flags)
    assert "geheim" not in json.dumps(dict(job.metadata))
    assert HIDDEN in job.metadata["beit.tracking"]


def test_the_token_is_looked_for_before_anything_imports_ray():
    """Ray asks once, when it is imported, whether it is to send one."""
    code = (
        "import sys; from jobs import submit\n"
        "submit.use_token = lambda: sys.exit(3 if 'ray' in sys.modules else 4)\n"
        "submit.main(['prepare', '--address', 'http://127.0.0.1:9', '--', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PREPARE, "--tracking.enabled", "false"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr


def test_variables_go_by_name(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim")
    environment, secrets = submit.job_environment(["MLFLOW_TRACKING_PASSWORD"])
    assert secrets == {"MLFLOW_TRACKING_PASSWORD": "geheim"}
    assert "MLFLOW_TRACKING_PASSWORD" not in environment
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    with pytest.raises(InputError, match="--env NOT_SET_ANYWHERE"):
        submit.job_environment(["NOT_SET_ANYWHERE"])


def test_a_log_handed_over_again_is_printed_once():
    stream = io.StringIO()
    printer = LogPrinter(stream)
    printer.feed("one\n")
    printer.feed("tw")
    printer.restart()  # a connection that dropped: the log comes from its beginning
    printer.feed("one\ntwo\n")
    printer.restart()
    printer.feed("on")  # and again, cut off before anything new
    printer.finish("one\ntwo\nthree\n")
    assert stream.getvalue() == "one\ntwo\nthree\n"


def test_what_runs_already_is_attached_to(monkeypatch, capsys):
    job = submit.describe("prepare", PREPARE)
    running = SimpleNamespace(
        submission_id=f"{job.prefix}-3", status=SimpleNamespace(value="RUNNING"),
        metadata=dict(job.metadata),
    )  # fmt: skip
    monkeypatch.setattr(cluster, "connect", lambda *_: None)
    monkeypatch.setattr(cluster, "newest_attempt", lambda *_: (2, running))
    monkeypatch.setattr(cluster, "submit", lambda *_, **__: pytest.fail("a second one"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    own = ["prepare", "--address", "http://h:8265", "--detach", "--env", "MLFLOW_TRACKING_URI"]
    assert submit.main([*own, "--", *PREPARE]) == 0
    assert f"{job.prefix}-3 is running already: attached to it" in capsys.readouterr().out
    assert submit.main([*own, "--", *PREPARE, "--min_side", "8"]) == 2
    assert f"`beit submit stop {job.prefix}-3` first" in capsys.readouterr().err


def test_waiting_is_explained():
    status = "Node status\n-----\n\nResources\n-----\nTotal Usage:\n 2.0/2.0 CPU\n"
    details = SimpleNamespace(status=SimpleNamespace(value="PENDING"), message="needs\n a node")
    for known, have in ((status, "Total Usage:\n 2.0/2.0 CPU"), ("", "unknown")):
        client = SimpleNamespace(cluster_status=lambda known=known: known)
        said = explain_waiting(client, details)
        assert said == f"waiting (PENDING): needs a node\nthe cluster:\n{have}"


@pytest.mark.parametrize(
    ("status", "driver", "log", "code"),
    [
        ("SUCCEEDED", 0, "", 0),
        ("FAILED", 2, "", 2),
        ("FAILED", 1, "", 1),
        ("STOPPED", None, "", 130),
        ("FAILED", None, "error: x\nbeit: exit code 2: error: x\n", 2),
        ("FAILED", -9, "beit: exit code 2: of an earlier attempt\n...\n", 2),
        ("FAILED", None, "killed", 1),
    ],
)
def test_the_drivers_own_exit_code(status, driver, log, code):
    details = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=driver)
    assert job_exit_code(details, lambda: log) == code


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["prepare"], "--address"),
        (["prepare", "--address", "ray://head:10001"], "--address"),
        (["prepare", "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["status", "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["logs", "--address", "http://127.0.0.1:9", "some-id"], "http://127.0.0.1:9"),
        (["brew"], "brew"),
    ],
)
def test_one_sentence_instead_of_a_traceback(flags, named, monkeypatch, capsys):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    stage_flags = ["--", *PREPARE, "--tracking.enabled", "false"] if flags[0] == "prepare" else []
    assert main(["submit", *flags, *stage_flags]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.strip().splitlines()) == 1


def test_the_tracking_environment_counts_and_is_said(tmp_path, monkeypatch, capsys):
    from jobs.command import with_tracking_environment

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:geheim@mlflow:5000")
    config = with_tracking_environment(parse_stage("prepare", PREPARE))
    assert config.tracking.uri == "http://anna:geheim@mlflow:5000"
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI" in said
    assert "geheim" not in said
    own = parse_stage("prepare", [*PREPARE, "--tracking.uri", "http://other:5000"])
    assert with_tracking_environment(own) == own
    chain = parse_stage("pipeline", ["--config", "quickstart", "--output", "/o"])
    updated = with_tracking_environment(chain)
    assert updated.pretrain.tracking.uri == updated.prepare.tracking.uri == config.tracking.uri
    assert yaml.safe_load(submit.describe("prepare", PREPARE).config_text)["tracking"]["uri"] == ""
    assert os.environ["MLFLOW_TRACKING_URI"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://anna:geheim@host/x",
        "http://anna:ge@heim@host",
        "az://box/x?account_key=geheim",
        "https://box/x?sig=geheim&sv=1",
        "s3://bucket/x?secret_key=geheim",
    ],
)
def test_secrets_are_taken_out_of_uris(uri):
    assert "heim" not in redacted(f"see {uri} there")
    assert redacted("s3://bucket/a@b/c?region=eu") == "s3://bucket/a@b/c?region=eu"
