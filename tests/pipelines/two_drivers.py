"""Two drivers on one output: `python -m tests.pipelines.two_drivers DIR ROUNDS SEED [STAGE…]`.

Each round starts the same stage twice. In turn the second one is started at a random moment of the
first and nothing else happens; the first is killed then; it stands still for longer than its lease
and then goes on; or it stands still between a check and the rename of the file behind it, until
the second one has ended. One line of JSON a round says what is different from the output of one
that was alone; nothing should be. Drivers are forked, so that a round costs no imports, and units
are worked off in the driver, without Ray.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from pipelines import (
    evaluate,
    export,
    finetune,
    prepare,
    pretrain,
    render,
    tokenize_images,
    train_tokenizer,
    unit_tables,
)
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.export import ExportConfig
from pipelines.config.lease import LeaseConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import StageFailed
from pipelines.rendering import work as render_work
from pipelines.tables import tokenizer_store
from pipelines.tokenization import task, work
from pipelines.units import Outcome
from tests.chaos import world
from tests.pipelines.finetune_fixtures import make_inputs, small_finetune
from tests.pipelines.image_sources import write_folder
from tests.pipelines.prepare_fixtures import config_of as prepare_config
from tests.pipelines.pretrain_fixtures import make_tables, metrics_of, small_config
from tests.pipelines.test_train_tokenizer import settings
from tests.pipelines.view_fixtures import render_config

EXPIRES = 2.0
KINDS = ("nothing", "killed", "still", "before a rename")
# Of trainings, what tells of times and starts.
OF_STARTS = (
    "_lease", "attempts", "events", "metrics.jsonl", "report.json", "run.json", "tracking.json",
)  # fmt: skip


def prepare_units(task, plan, todo, num_tasks):
    return (prepare._outcome(task, None, unit, plan.listings[unit]).check() for unit in todo)


def tokenize_units(task, units, todo, images, origins, views):
    """Outcomes of units, as workers of the pool give them."""
    tokenizer = tokenizer_store.load(task.tokenizer_uri)
    for number in todo:
        unit = tokenize_images._unit(units, images, number, None, views)
        try:
            rendered = work.render_unit(task.images_uri, unit, task.identity, (), task.views)
        except work.UnitRejected as error:
            yield Outcome(unit=int(number), rejected=str(error))
            continue
        ids = work.encode_rendered(tokenizer, rendered.pixels, task.identity)
        size, digest = work.write_unit(
            task.output, unit.name, rendered.keys, ids, rendered.grey_levels, task.identity
        )
        seconds = dict.fromkeys(("queued", "read", "render", "idle", "encode", "write"), 0.0)
        facts = {"size": size, "hash": digest, "seconds": seconds, "reused": 0}
        facts["views"] = rendered.views
        yield Outcome(unit=int(number), facts=facts)


def render_units(task, units, todo, images):
    for number in todo:
        yield render_work.render_unit(render.unit_of(units, images, int(number)), task).check()


def verify_here(names, uri, check, num_cpus):
    return unit_tables.verify_files(names, uri, check)


def without_ray():
    """What Ray would do, here."""
    prepare._outcomes = prepare_units
    tokenize_images._outcomes = tokenize_units
    render._outcomes = render_units
    render._check_room = lambda task: None
    unit_tables._verified = verify_here
    node = {"Alive": True, "Resources": {"memory": 1e12}}
    task.ray = SimpleNamespace(
        is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2}, nodes=lambda: [node]
    )


def stages(root):
    """Name -> what a driver runs, given its output, by stage."""
    off = TrackingConfig(enabled=False)
    write_folder(root / "pictures", per_class=12)
    tables = make_tables(root / "tables")
    labelled = make_inputs(root / "labelled")
    tokenizer = world.make_tokenizer(str(root / "tokenizer"))
    images = SimpleNamespace(uri=tables[0])
    configs = {
        "prepare": (
            prepare.run,
            lambda out: prepare_config(root / "pictures", out, part_mb=0.004),
        ),
        "train-tokenizer": (
            train_tokenizer.run,
            lambda out: settings(images, out),
        ),
        "tokenize": (
            tokenize_images.run,
            lambda out: world.make_config(tables[0], tokenizer, out, rows_per_unit=8),
        ),
        "tokenize-views": (
            tokenize_images.run,
            lambda out: world.make_config(
                tables[0],
                tokenizer,
                out / "tokens",
                rows_per_unit=8,
                store_views=str(out / "views"),
                view_size=32,
                view_rows_per_unit=8,
            ),
        ),
        "render": (
            render.run,
            lambda out: render_config(tables[0], out, rows_per_unit=8),
        ),
        "pretrain": (
            pretrain.run,
            lambda out: small_config(
                tables, out, optim={"steps": 16, "warmup_steps": 2}, log_every=1
            ),
        ),
        "finetune": (finetune.run, lambda out: small_finetune(labelled, out, log_every=1)),
        "evaluate": (
            evaluate.run,
            lambda out: EvaluateConfig(
                run=labelled["run"],
                images=labelled["images"],
                output=str(out),
                baselines=False,
                num_folds=2,
                tracking=off,
            ),
        ),
        "export": (export.run, lambda out: ExportConfig(run=labelled["run"], output=str(out))),
    }
    lease = LeaseConfig(expires_seconds=EXPIRES)
    return {
        name: lambda out, run=run, of=of: run(dataclasses.replace(of(out), lease=lease))
        for name, (run, of) in configs.items()
    }


def stand_still_at(rename):
    """Stops this process before it gives a file its name for the nth time."""
    counted = 0
    for owner, name in ((Path, "replace"), (os, "link")):
        real = getattr(owner, name)

        def renamed(*paths, real=real):
            nonlocal counted
            counted += 1
            if counted == rename:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(*paths)

        setattr(owner, name, renamed)


def start(stage, output, *, rename=0):
    """A driver of its own: exits 0 done, 1 with a sentence, 3 with a traceback."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        log = output.with_name(f"{output.name}.log")
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
        torch.set_num_threads(1)
        without_ray()
        if rename:
            stand_still_at(rename)
        stage(output)
        code = 0
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def made_of(output):
    """What may not depend on who made it: names of files, and bytes where no time is told."""
    files = [path.relative_to(output) for path in output.rglob("*") if not path.is_dir()]
    run = (output / "run.json").exists()
    made = {
        str(path): (output / path).read_bytes()
        for path in files
        if not run or path.parts[0] not in OF_STARTS
    }
    if run:
        made["metrics"] = [
            (line["step"], line["first_step"], line["losses"], line["samples"])
            for line in metrics_of(str(output))
        ]
    made["lease"] = any(output.rglob("_lease"))
    return made


def play(root, number, seed, name, stage, alone):
    """One round; prints what is wrong."""
    made, seconds, renames = alone
    draw, kind = random.Random(f"{seed} {name} {number}"), KINDS[number % len(KINDS)]
    output, log = root / name, root / f"{name}.log"
    log.write_text("")
    begin = time.monotonic()
    at = draw.randrange(1, renames + 1) if kind == "before a rename" else 0
    first, codes = start(stage, output, rename=at), {}
    if at:
        status = os.waitpid(first, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):  # it had fewer files to write than the one that was alone
            codes[first] = os.waitstatus_to_exitcode(status)
    else:
        time.sleep(seconds * draw.random())
    if kind == "killed":
        os.kill(first, signal.SIGKILL)
    elif kind == "still":
        os.kill(first, signal.SIGSTOP)
    second = start(stage, output)
    if kind == "still":
        while "waiting until" not in log.read_text() and not ended(second):
            time.sleep(0.05)
        time.sleep(EXPIRES * 4 * draw.random())  # taken over meanwhile, or not
    elif at:
        codes[second] = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    if first not in codes:
        os.kill(first, signal.SIGCONT)
    for child in {first, second} - codes.keys():
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    codes = [codes[first], codes[second]]
    taken_over = "was taken over by" in log.read_text() or "has taken this" in log.read_text()
    # Who is slow for longer than its lease, as on a busy machine, ends with a sentence.
    allowed = {0, *((-9,) if kind == "killed" else ()), *((1,) if taken_over else ())}
    wrong = []
    if 0 not in codes or not allowed.issuperset(codes):
        wrong.append(f"exit codes {codes}: {log.read_text()[-2000:]}")
    found = made_of(output)
    wrong += [key for key in made.keys() | found.keys() if made.get(key) != found.get(key)]
    output.rename(root / f"{name}-{number}")
    line = {
        "stage": name,
        "round": number,
        "kind": kind,
        "rename": at,
        "codes": codes,
        "taken_over": taken_over,
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": wrong,
    }
    print(json.dumps(line), flush=True)


def play_alone(root, name, stage):
    """What one driver makes, in how many seconds, with how many renames."""
    counted = root / f"{name}-alone.renames"

    def counting(output):
        for owner, call in ((Path, "replace"), (os, "link")):
            real = getattr(owner, call)

            def renamed(*paths, real=real):
                with counted.open("a") as file:
                    file.write(".")
                return real(*paths)

            setattr(owner, call, renamed)
        return stage(output)

    output, begin = root / name, time.monotonic()
    child = start(counting, output)
    assert os.waitpid(child, 0)[1] == 0, (root / f"{name}.log").read_text()
    made, seconds = made_of(output), time.monotonic() - begin
    output.rename(root / f"{name}-alone")
    return made, seconds, len(counted.read_text())


def main(folder, rounds, seed, *names):
    root = Path(folder)
    for name, stage in stages(root).items():
        if names and name not in names:
            continue
        alone = play_alone(root, name, stage)
        for number in range(int(rounds)):
            play(root, number, seed, name, stage, alone)


if __name__ == "__main__":
    main(*sys.argv[1:])
