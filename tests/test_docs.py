"""What the documents say: their programs run, their commands parse, their flags and links exist."""

import contextlib
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from jobs import submit
from jobs.cli import OTHERS, STAGES, config_class, main, parse_stage
from pipelines import audit, pretrain
from pipelines.config.audit import AuditConfig
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tables.view_table import ViewTable
from pipelines.training.checkpoint import load
from tests.pipelines.pretrain_fixtures import per_step, small_config

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "infra/README.md"]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a user must give, where a page leaves it out with `…`.
LEFT_OUT = {
    "tokenize": ["--images", "s3://b/i", "--tokenizer", "s3://b/t", "--output", "s3://b/o"],
    "pretrain": ["--images", "s3://b/i", "--tokens", "s3://b/t", "--output", "s3://b/o"],
}


def programs(page):
    """The blocks of Python of a page."""
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == "python"]


def commands(page):
    """Lines of a page's blocks that call `beit`, without what stands for something else."""
    for kind, text in BLOCK.findall(page.read_text()):
        if kind in ("python", "json", "mermaid"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            call = re.match(r"\s*(?:[A-Z_]+=\S+ )*beit (?=[a-z])(.*)", line)
            if call:
                yield call[1]


def run_programs(*names):
    """Runs the programs of pages one after the other, as one."""
    space = {}
    for name in names:
        for text in programs(REPOSITORY / "docs/contracts" / f"{name}.md"):
            exec(compile(text, name, "exec"), space)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An image table, a token table and a view table that the documents' own programs wrote."""
    folder = tmp_path_factory.mktemp("contracts")
    with contextlib.chdir(folder):
        run_programs("image_table", "token_table", "view_table")
    return folder


def test_tables_of_a_third_party_are_ours(written):
    images = ImageTable.open(str(written / "images"))
    assert images.num_rows == 40
    assert images.labels().tolist() == [number % 2 for number in range(40)]
    tokens = TokenTable.open(str(written / "tokens"))
    tokens.check_compatible(images, grid_size=(4, 4), vocab_size=16)
    _, token_ids = tokens.read_rows(20, 30)
    assert token_ids.shape == (10, 2, 16)
    for config in (
        AuditConfig(table=str(written / "images")),
        AuditConfig(table=str(written / "tokens"), images=str(written / "images")),
        AuditConfig(table=str(written / "views"), images=str(written / "images")),
    ):
        audit.run(config)  # raises on any difference


def test_a_training_takes_them_and_its_checkpoint_is_read_and_written(written, tmp_path):
    config = small_config(
        (str(written / "images"), str(written / "tokens")),
        tmp_path / "run",
        model={"patch_size": 8, "depth": 1},
        masking={"num_masked": 6, "min_block": 2},
        optim={"steps": 4},
    )
    pretrain.run(config)
    with contextlib.chdir(tmp_path):
        run_programs("checkpoint")
    step = max(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").iterdir())
    ours = load(str(tmp_path / "run/checkpoints"), step)
    copied = load(str(tmp_path / "copy/checkpoints"), step)
    assert ours.state == copied.state
    for part in ("weights", "moments"):
        left, right = getattr(ours, part), getattr(copied, part)
        assert left.keys() == right.keys()
        assert all(bool((left[name] == right[name]).all()) for name in left)


def test_a_training_takes_their_views_alone(written, tmp_path):
    views = str(written / "views")
    policy = ViewTable.open(views).policy
    config = small_config(
        ("", ""),
        tmp_path / "run",
        tokens=[],
        views=[views],
        policy=policy,
        objective={"kind": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        model={"absolute_positions": True, "relative_positions": "none", "depth": 1},
        masking={"kind": "random", "num_masked": 48},
        optim={"steps": 4},
    )
    pretrain.run(config)
    assert len(per_step(str(tmp_path / "run"))) == 4


def words_of(line):
    """The words of a command: of a choice the first, what may be left out as well as the rest."""
    line = line.partition("  #")[0].replace("[", " ").replace("]", " ")
    return [word.partition("|")[0] for word in shlex.split(line) if word not in ("…", "...")]


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name):
    for line in commands(REPOSITORY / name):
        stage, *flags = words_of(line)
        left_out = LEFT_OUT.get(flags[0] if stage == "submit" else stage, [])
        more = left_out if "…" in line else []
        if stage == "submit":
            own, flags = submit._split(flags)
            options = submit._parser().parse_args(own)
            if options.what not in submit.ACTIONS:
                submit.describe(options.what, [*more, *flags])
        elif stage == "doctor":
            parse_stage(flags[0], flags[1:])
        elif stage in STAGES:
            parse_stage(stage, [*more, *flags])
        else:
            assert stage in OTHERS, line


def test_the_commands_of_the_front_page_print_their_configuration(capsys):
    lines = [words_of(line) for line in commands(REPOSITORY / "README.md")]
    lines = [words for words in lines if words[0] in STAGES and len(words) > 2]
    assert len(lines) >= 8
    for stage, *flags in lines:
        with pytest.raises(SystemExit) as ended:
            main([stage, *flags, "--print_config"])
        assert ended.value.code == 0
        assert (
            flags[min(1, len(flags) - 1)].split("/")[-1] in capsys.readouterr().out
            or "--config" in flags
        )


def fields_of(section, prefix=""):
    """Dotted names of all fields of a configuration, and those of its sections alone."""
    for field in dataclasses.fields(section):
        yield prefix + field.name
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from fields_of(field.type, f"{prefix}{field.name}.")
            yield from fields_of(field.type)


@pytest.mark.parametrize("name", NAMES)
def test_flags_that_are_named_exist(name):
    known = {field for stage in STAGES for field in fields_of(config_class(stage))}
    known |= {action.dest for action in submit._parser()._actions}
    known |= {"config", "print_config", "help"}
    text = BLOCK.sub("", (REPOSITORY / name).read_text())
    ours = [span for span in re.findall(r"`([^`\n]+)`", text) if not span.startswith(FOREIGN)]
    flags = {
        flag for span in ours for flag in re.findall(r"(?<![\w-])--([a-z][\w.]*)(?![\w-])", span)
    }
    assert flags - known - FOREIGN_FLAGS == set()


# Other programs; scripts of other libraries.
FOREIGN = (
    "ray ",
    "sbatch",
    "srun",
    "docker",
    "kubectl",
    "mlflow",
    "pip ",
    "make ",
    "git ",
    "python -m ",
    "run_class_finetuning.py",
    "main_finetune.py",
)
# Of other programs, named without them.
FOREIGN_FLAGS = {"app"}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = REPOSITORY / name
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "#")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve()
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_programs_that_are_called_are_known():
    """No page sends its reader to a make target that does not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`?make (?:[A-Z]+=\S+ )*([a-z-]+)\b", page.read_text()):
            written = f"make {target}"
            if re.search(rf"(`|^){written}", page.read_text(), re.MULTILINE):
                assert target in targets, f"{page.name}: {written}"


def test_the_blocks_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) >= 15
    assert [len(programs(page)) for page in PAGES if "contracts" in str(page)] == [1, 1, 1, 1]
