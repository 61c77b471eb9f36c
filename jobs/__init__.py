"""The commands: `python -m jobs STAGE` and `python -m jobs.STAGE` are `beit STAGE`."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path


class _Stages:
    """Finds `jobs.pretrain` and its like for `python -m`: they are rows of a table, no files."""

    @staticmethod
    def find_spec(name: str, *_path: object) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package != __name__:
            return None
        from jobs.cli import command_of

        main = Path(__file__).with_name("__main__.py")
        return spec_from_file_location(name, main) if command_of(module) else None


sys.meta_path.append(_Stages)
