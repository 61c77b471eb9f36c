"""Flags, recipes, exit codes: what a user meets before any work starts."""

import errno
import importlib
import json
import os
import shutil
import signal
import site
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cli, command
from jobs.command import _start_ray, connect_to_ray, exit_code, import_root, parse
from jobs.interrupts import terminated_as_interrupted
from jobs.terminal import printable_output
from pipelines import storage
from pipelines.errors import InputError, StageFailed


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimiser."""

    lr: float = 1e-3
    """Peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy stage."""

    output: str
    """Where to."""
    tokens: list[str] = field(default_factory=list)
    """Token tables."""
    optim: Optim = field(default_factory=Optim)
    """Optimiser."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output: '' is no directory; give a path or URI")


def test_recipe_then_dotted_override(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: here\noptim:\n  lr: 1e-4\n")
    assert parse(Toy, ["--config", str(recipe)], stage="toy").optim.lr == 1e-4
    overridden = parse(Toy, ["--config", str(recipe), "--optim.lr", "2e-4"], stage="toy")
    assert overridden == Toy(output="here", optim=Optim(lr=2e-4))


@pytest.mark.parametrize(
    "flags",
    [["--tokens", "a,b"], ["--tokens=a,b"], ["--tokens", "[a, b]"], ["--tokens+=a", "--tokens+=b"]],
)
def test_lists_are_written_as_users_write_them(flags: list[str]) -> None:
    assert parse(Toy, ["--output", "o", *flags], stage="toy").tokens == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--outptu", "x"], "outptu"),
        (["--outp", "x"], "--outp"),  # not even where only one key begins so
        (["--output", "o", "--optim.lr", "fast"], "optim.lr"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(flags: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse(Toy, flags, stage="toy")


def test_a_value_the_configuration_refuses_is_bad_input() -> None:
    with pytest.raises(InputError, match="output: '' is no directory"):
        parse(Toy, ["--output", ""], stage="toy")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("images: 'x'"), 2),
        (StageFailed("collapsed"), 1),
        (KeyboardInterrupt(), 130),
        (MemoryError("9 GB"), 1),
    ],
)
def test_expected_failures_become_a_message_and_a_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(_: object) -> None:
        raise error

    assert exit_code(action) == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.ENOSPC, 1, "free some there"),
        (errno.EIO, 1, "when this is mended"),
        (errno.EACCES, 2, "its rights"),
        (errno.EROFS, 2, "its rights"),
        (errno.ENOTDIR, 2, "check the path"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    number: int, code: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(_: object) -> None:
        raise OSError(number, os.strerror(number), "a\x1b\nplace")

    assert exit_code(action) == code
    [line] = capsys.readouterr().err.splitlines()
    assert "a\\x1b\\nplace" in line
    assert os.strerror(number) in line
    assert remedy in line


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (storage.write_bytes, storage.create):
        with pytest.raises(OSError, match=r"No space left on device.*file\.json"):
            write(str(tmp_path / "file.json"), b"data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 3), (9, 3)])
def test_ray_is_given_time_on_a_busy_machine(
    failures: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []

    def init(**options: object) -> None:
        begun.append(options)
        if len(begun) <= failures:
            raise Exception("The current node timed out during startup. And more.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    with pytest.raises(Exception, match="timed out") if failures > starts else nullcontext():
        _start_ray()
    assert len(begun) == starts


def test_workers_import_nothing_from_the_users_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    monkeypatch.setitem(
        sys.modules,
        "ray",
        SimpleNamespace(
            is_initialized=lambda: False,
            init=lambda **_: places.append(Path.cwd()),
            cluster_resources=dict,
        ),
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    connect_to_ray()
    assert places == [import_root()]
    assert Path.cwd() == tmp_path
    checkout = import_root()
    assert (checkout / "jobs").is_dir()
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(checkout)])
    assert import_root() == Path("/")


@pytest.mark.parametrize("during", [True, False])
def test_sigterm_ends_a_stage_as_ctrl_c_does_once_ray_has_started(
    during: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray.init` puts a handler of its own in place: `sys.exit(15)`, here as in Ray 2.60."""

    def leave(number: int, _: object) -> None:
        sys.exit(number)

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, leave)
        if during:
            signal.raise_signal(signal.SIGTERM)

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, cluster_resources=dict)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("atexit.register", lambda _: None)  # that would end the tests
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with terminated_as_interrupted(), pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        connect_to_ray()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_the_start_of_ray_sees_no_crash(number: int) -> None:
    """`ray.init` that is left half-way ends the process by a crash, here as in Ray 2.60."""
    program = (
        "import atexit, os, signal, sys\n"
        "from types import SimpleNamespace\n"
        "from jobs.command import connect_to_ray, exit_code\n"
        "from jobs.interrupts import terminated_as_interrupted\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def init(**_):\n"
        "    atexit.register(os.abort)\n"
        f"    signal.raise_signal({int(number)})\n"
        "sys.modules['ray'] = SimpleNamespace(is_initialized=lambda: False, init=init)\n"
        "with terminated_as_interrupted():\n"
        "    code = exit_code(lambda _: connect_to_ray())\n"
        "sys.exit(code)"
    )
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("interrupted.")) == (130, 1)
    assert "Run the same command again" in ended.stderr


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    # Tests that a shell runs in the background are started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminated_as_interrupted():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # while the first is answered
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_as_interrupted(signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("command_line", "meant"),
    [
        ("pretrain --optim.step 10", ": --optim.step 10; did you mean --optim.steps?"),
        ("pipeline --pretrain.optim.stepz=10", "; did you mean --pretrain.optim.steps?"),
        ("pretrian --output here", "unknown stage 'pretrian'; did you mean pretrain?"),
        ("qwxyz", "unknown stage 'qwxyz'\n"),
        ("pretrain --qwxyz 1", "unrecognized arguments: --qwxyz 1; `beit pretrain --help`"),
    ],
)  # fmt: skip
def test_what_was_meant_is_named(
    command_line: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command_line.split()) == 2
    assert meant in capsys.readouterr().err


def test_help_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    shown = capsys.readouterr().out
    assert "--print_config[=flags]" in shown
    assert "x08" not in shown


def test_of_a_node_that_is_lost_ray_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = "(raylet) Raylet is terminated. Possible reasons include: (1) SIGKILL."
    with printable_output():
        print(f"{said} Last 20 lines of the Raylet logs:\n    *** StackTrace ***\n    main\n")
        print("(raylet) The node has been marked dead. \t(1) It crashed \n\t(2) It lags.")
        print("two\nlines")
    assert capsys.readouterr().out.splitlines() == [
        said, "(raylet) The node has been marked dead. \t(1) It crashed", "two", "lines"
    ]  # fmt: skip


def test_what_is_printed_has_no_secret_of_a_uri(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_output():
        print("done: s3://bucket/run?region=eu&session_token=geheim at http://anna:geheim@host/")
        print("warning: s3://key:geheim@bucket", file=sys.stderr)
    shown = capsys.readouterr()
    assert shown.out == "done: s3://bucket/run?region=eu&session_token=*** at http://***@host/\n"
    assert shown.err == "warning: s3://***@bucket\n"


def test_programming_errors_keep_their_traceback() -> None:
    def action(_: object) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        exit_code(action)


def test_unknown_stage_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 2
    assert "pretrian" in capsys.readouterr().err


@pytest.mark.parametrize("stage", sorted(cli.STAGES))
def test_help_is_instant_because_nothing_heavy_is_imported(stage: str) -> None:
    code = (
        "import sys\nfrom jobs import cli\n"
        f"try:\n    cli.main(['{stage}', '--help'])\n"
        "except SystemExit as stopped:\n    assert stopped.code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        ("jobs", "pretrain"),
        ("jobs.pretrain", "pretrain"),
        ("jobs.train_tokenizer", "train-tokenizer"),
        ("jobs.tokenize", "tokenize"),
        ("jobs.tokenize_images", "tokenize"),
        ("jobs.submit", "submit"),
        ("jobs.ui", "ui"),
    ],
)
def test_a_stage_is_a_module_too(module: str, stage: str) -> None:
    flags = [stage] if module == "jobs" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *flags, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: beit {stage} ")


def test_no_other_name_is_a_module() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jobs.pretrian")


DATA = Path(__file__).parents[1] / "data/v0.1.0"
IMAGES, TOKENIZER = ["--images", str(DATA / "images")], ["--tokenizer", str(DATA / "tokenizer")]
NOPE = "/not/there"


@pytest.mark.parametrize(
    ("stage", "flags", "named"),
    [
        ("prepare", ["--source", NOPE], NOPE),
        ("train-tokenizer", ["--images", NOPE], NOPE),
        ("train-tokenizer", [*IMAGES, "--data.global_batch_size", "1000"], "global_batch_size"),
        ("tokenize", ["--images", NOPE, *TOKENIZER], NOPE),
        ("tokenize", [*IMAGES, "--tokenizer", NOPE], NOPE),
        ("tokenize", [*IMAGES, *TOKENIZER, "--reuse", NOPE], NOPE),
        (
            "tokenize",
            [*IMAGES, *TOKENIZER, "--reuse", str(DATA / "tokens")],
            "batch_size: 10 != 64",
        ),
        ("render", ["--images", NOPE], NOPE),
        ("pretrain", [*IMAGES, "--tokens", str(DATA / "tokens"), "--views", NOPE], NOPE),
        ("pretrain", ["--images", NOPE, "--tokens", NOPE], NOPE),
        ("pretrain", [*IMAGES, "--tokens", NOPE], NOPE),
        ("pretrain", [*IMAGES, "--tokens", str(DATA / "tokens")], "image_size"),
        ("finetune", [*IMAGES, "--run", NOPE], NOPE),
        ("pipeline", ["--config", "quickstart", "--prepare.source", NOPE], NOPE),
    ],
)
def test_what_needs_no_ray_is_refused_before_ray_starts(
    stage: str,
    flags: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late() -> None:
        raise AssertionError("Ray was started first")

    monkeypatch.setattr(command, "connect_to_ray", too_late)
    monkeypatch.setattr(command, "prepare_environment", lambda: None)
    assert cli.main([stage, *flags, "--output", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_images_that_are_there_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(DATA / "images", images)
    record = json.loads((images / "manifest.json").read_text())
    monkeypatch.setattr(command, "prepare_environment", lambda: None)
    flags = ["prepare", "--config", str(DATA / "recipes/prepare.yaml"), "--output", str(images)]
    assert cli.main([*flags, "--source", record["source"]["uri"]]) == 0
    said = capsys.readouterr()
    assert "prepare: already done, 40 images; nothing to do" in said.err
    assert (said.out + said.err).count(record["fingerprint"]) == 1


def test_tokens_that_are_there_are_said_or_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the older tables that they were copied from are gone."""

    def too_late() -> None:
        raise AssertionError("Ray was started first")

    monkeypatch.setattr(command, "connect_to_ray", too_late)
    monkeypatch.setattr(command, "prepare_environment", lambda: None)
    tokens = tmp_path / "tokens"
    shutil.copytree(DATA / "tokens", tokens)
    record = json.loads((tokens / "manifest.json").read_text())
    flags = ["tokenize", *IMAGES, *TOKENIZER, "--output", str(tokens), "--reuse", NOPE]
    for name in ("rows_per_unit", "batch_size"):
        flags += [f"--{name}", str(record[name])]
    flags += ["--num_views", str(record["views"][1]), "--policy.seed"]
    assert cli.main([*flags, "7"]) == 0
    assert "already done, 40 images" in capsys.readouterr().err
    assert cli.main([*flags, "7", "--encoders.num_gpus", "1"]) == 2
    assert "device: 'cpu' != 'cuda'" in capsys.readouterr().err
    # A run that was begun, and would go on otherwise.
    (tokens / "manifest.json").unlink()
    (tokens / "_work").mkdir()
    kept = ("files", "kind", "fingerprint", "parts", "rejected", "schema_version")
    begun = {name: value for name, value in record.items() if name not in kept}
    (tokens / "_work/identity.json").write_text(json.dumps(begun))
    assert cli.main([*flags, "8"]) == 2
    assert "policy.seed: 7 != 8" in capsys.readouterr().err
