"""What a submission carries to the cluster: the checkout's code and one file of configuration.

Sent by allow-list, so that results, caches and data that lie beside the code stay where they are.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jobs.environment import SECRETS_FILE
from pipelines.errors import InputError
from pipelines.tracking.context import CODE_VERSION_FILE, code_version

PACKAGES = ("beit", "pipelines", "jobs")
SUFFIXES = (".py", ".yaml", ".typed")
CONFIG_FILE = "job.yaml"
# The Jobs API takes 100 MiB and answers a larger body with a bare 413, after it was sent.
MAX_BYTES = 90 * 2**20


def checkout() -> Path:
    """The directory that holds the packages running now."""
    return Path(__file__).parents[2]


def code_files(root: Path) -> list[Path]:
    """Source files of the three packages, relative to `root`, in order."""
    found = (path for name in PACKAGES for path in (root / name).rglob("*"))
    return sorted(
        path.relative_to(root) for path in found if path.suffix in SUFFIXES and path.is_file()
    )


def included_files(include: Sequence[str]) -> list[tuple[Path, Path]]:
    """(source, place in the package) of every file that the user adds by name.

    Raises:
        InputError: there is no such file or directory, or it would stand where ours does.
    """
    pairs: list[tuple[Path, Path]] = []
    for name in include:
        path = Path(name)
        if path.is_file():
            pairs.append((path, Path(path.name)))
        elif path.is_dir():
            top = path.resolve()
            files = (file for file in top.rglob("*") if file.is_file())
            pairs += [(file, Path(top.name) / file.relative_to(top)) for file in files]
        else:
            raise InputError(f"--include {name}: no such file or directory")
    for source, place in pairs:
        if str(place) in (CONFIG_FILE, SECRETS_FILE):
            raise InputError(f"--include {source}: a job has a {place} of its own; rename yours")
    return pairs


def write_package(
    target: Path,
    *,
    config_text: str,
    with_code: bool,
    include: Sequence[str],
    secrets: Mapping[str, str] | None = None,
) -> int:
    """Fills the empty directory `target` with what the job needs; returns the bytes.

    Raises:
        InputError: more than the Jobs API takes; names the five largest files. Nothing was copied.
    """
    root = checkout()
    pairs = [(root / path, path) for path in code_files(root)] if with_code else []
    pairs += included_files(include)
    total = check_size(pairs)
    for source, place in pairs:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / place)
    version = code_version() if with_code else {}
    if version:  # the copy has no repository that would tell
        (target / "pipelines" / CODE_VERSION_FILE).write_text(json.dumps(version))
    (target / CONFIG_FILE).write_text(config_text)
    if secrets:
        file = target / SECRETS_FILE
        file.touch(mode=0o600)  # Ray keeps the mode on the nodes
        file.write_text(json.dumps(dict(secrets)))
    return total + len(config_text.encode())


def check_size(pairs: Iterable[tuple[Path, Path]]) -> int:
    """Bytes of all files; raises InputError above `MAX_BYTES`."""
    sizes = sorted(((source.stat().st_size, str(place)) for source, place in pairs), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > MAX_BYTES:
        largest = ", ".join(f"{name} {size / 2**20:.1f} MiB" for size, name in sizes[:5])
        raise InputError(
            f"--include: {total / 2**20:.0f} MiB to send, a Ray cluster takes {MAX_BYTES // 2**20} "
            f"MiB; the largest: {largest}. Put data on storage that the nodes share (s3://...)"
        )
    return total
