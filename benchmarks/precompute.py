"""The whole tokenize job beside the bare encoder loop on the same images, and decoding per core.

`python benchmarks/precompute.py` on a CPU; `--hidden_dim 256 --num_gpus 1 --precision float16` is
the DALL-E encoder on a GPU. The three alternate, and medians are reported:

- bare: one process, the encoder set up as in the job, the rendered pixels in memory, nothing but
  `encode_views`.
- loop: what one would write by hand: the same units read and rendered by a thread, two ahead, while
  the main thread encodes them and writes their files.
- job: `pipelines.tokenize_images` with one encoder: Ray, reading, decoding, rendering, object
  store, files, receipts.

Rates of loop and job are those of the steady state, from the second unit to the last; starting
actors is reported on its own.

Decoding is measured in CPU time, so that neighbours on the machine do not count.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).parent.parent))

from beit.images import decode_image, image_digest
from beit.tokenizers import DalleTokenizer
from beit.views import ViewPolicy, render, sample_view
from pipelines import tokenize_images, unit_tables
from pipelines.config.tokenize_images import ActorsConfig, TokenizeConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.tables import image_files, image_table, tokenizer_store
from pipelines.tokenization import pool as token_pool
from pipelines.tokenization import work as token_work
from pipelines.tokenization.ledger import plan_units
from pipelines.tokenization.task import load_tokenizer, plan_task


def photo(generator, height=375, width=500):
    """A JPEG of about 40 kB with detail at all scales, as photographs have."""
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 12, 36, 108, 324):
        coarse = generator.normal(0, 120 / scale**0.6, (scale, scale * 4 // 3, 3))
        planes = [
            np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height)))
            for c in range(3)
        ]
        pixels += np.stack(planes, axis=-1)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(
        encoded, "JPEG", quality=90
    )
    return encoded.getvalue()


def make_images(uri, count):
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        data = photo(generator)
        rows.append(
            image_files.ImageRow(
                key=f"{index:08d}.jpg",
                image=data,
                height=375,
                width=500,
                label=None,
                digest=image_digest(data),
            )
        )
    part = image_files.write_part(uri, "part-00000.parquet", rows)
    image_table.commit_manifest(
        uri, parts=[part], class_names=[], source={}, options={}, rejected={}, num_items=count
    )
    return [row.image for row in rows]


def cpu_milliseconds(work, items, repeats=5):
    """Median CPU time of one item."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        for item in items:
            work(item)
        times.append((time.process_time() - begin) / len(items) * 1e3)
    return statistics.median(times)


def as_unilm(data, policy, index, sizes):
    """One view with the calls of unilm's loader: decode, jitter the whole image, flip, crop,
    resize twice."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    view = sample_view(policy, image_digest(data), index, image.height, image.width)
    for name in view.order:
        kind = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
        image = getattr(ImageEnhance, kind)(image).enhance(getattr(view, name))
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    filters = {224: Image.Resampling.BICUBIC, 112: Image.Resampling.LANCZOS}
    return [np.asarray(crop.resize((size, size), filters[size])) for size in sizes]


def ours(data, policy, views):
    """`views` tokenizer views of one image, decoded once."""
    image = decode_image(data)
    digest = image_digest(data)
    return [
        render(image, sample_view(policy, digest, i, image.height, image.width), 112, "lanczos")
        for i in range(views)
    ]


def measure_decoding(images):
    policy = ViewPolicy()
    figures = {
        "decode alone (this project)": cpu_milliseconds(decode_image, images),
        "decode alone (Pillow)": cpu_milliseconds(
            lambda data: Image.open(io.BytesIO(data)).convert("RGB"), images
        ),
    }
    for views in (1, 2, 4, 8):
        figures[f"{views} views at 112, decoded once"] = cpu_milliseconds(
            lambda data, views=views: ours(data, policy, views), images
        )
        figures[f"{views} views at 112, as unilm"] = cpu_milliseconds(
            lambda data, views=views: [as_unilm(data, policy, i, (112,)) for i in range(views)],
            images,
        )
    return figures


def bare_rate(tokenizer, pixels, options):
    """Views a second of the encoder alone."""
    begin = time.monotonic()
    token_work.encode_views(
        tokenizer,
        pixels,
        batch_size=options.batch_size,
        device="cuda" if options.num_gpus else "cpu",
    )
    return len(pixels) / (time.monotonic() - begin)


def loop_rate(task, units, tokenizer, output):
    """Views a second of the loop by hand."""
    with ThreadPoolExecutor(1) as pool:

        def begin(unit):
            return pool.submit(token_work.render_unit, task.images_uri, unit, task.identity)

        ahead = deque(begin(unit) for unit in units[:2])
        for index, unit in enumerate(units):
            rendered = ahead.popleft().result()
            ahead.extend(begin(later) for later in units[index + 2 : index + 3])
            ids = token_work.encode_rendered(
                tokenizer, rendered.pixels, task.identity, device=task.device
            )
            token_work.write_unit(
                output, unit.name, rendered.keys, ids, rendered.grey_levels, task.identity
            )
            if index == 0:
                start = time.monotonic()
    views = (len(units) - 1) * (units[0].stop - units[0].start) * task.identity.num_views
    return views / (time.monotonic() - start)


def job_rates(config):
    """Views a second of the job in its steady state; seconds until the first unit; shares."""
    book, times = unit_tables.book, []

    def timed(outcome, ledger, options):
        times.append((time.monotonic(), dict(outcome.facts["seconds"])))
        return book(outcome, ledger, options)

    unit_tables.book = timed
    begin = time.monotonic()
    try:
        result = tokenize_images.run(config)
    finally:
        unit_tables.book = book
    # Units of equal size: the first one booked only starts the clock.
    steady = times[-1][0] - times[0][0]
    views = config.rows_per_unit * config.num_views * (len(times) - 1)
    after = [seconds for _, seconds in times[1:]]
    encoding = sum(s["encode"] for s in after)
    return {
        "rate": views / steady,
        "start_seconds": times[0][0] - begin,
        "unit_seconds": encoding / len(after),
        "encoder_idle": sum(s["idle"] for s in after) / (encoding + sum(s["idle"] for s in after)),
        "units": result.num_units,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--num_views", type=int, default=4)
    parser.add_argument("--rows_per_unit", type=int, default=16)
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_gpus", type=float, default=0)
    parser.add_argument("--num_cpus", type=int, default=4, help="CPUs Ray counts")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--address", default="local", help="address of a running Ray")
    parser.add_argument("--decoding_only", action="store_true")
    parser.add_argument("--output", default="", help="Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"options": vars(options), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as directory:
        images = make_images(f"{directory}/images", options.images)
        report["jpeg_kilobytes"] = sum(map(len, images)) / len(images) / 1000
        report["milliseconds_per_image_and_core"] = measure_decoding(images[:24])
        if not options.decoding_only:
            report |= measure_job(directory, options)
    print(json.dumps(report, indent=1))
    if options.output:
        Path(options.output).write_text(as_markdown(report))


def measure_job(directory, options):
    import ray

    torch.manual_seed(0)
    stored = DalleTokenizer(hidden_dim=options.hidden_dim, has_decoder=False)
    tokenizer_store.save(stored, f"{directory}/tokenizer", source={"stage": "benchmark"})
    del stored
    local = {} if options.address != "local" else {
        "num_cpus": options.num_cpus, "include_dashboard": False,
    }  # fmt: skip
    os.environ.setdefault("RAY_worker_niceness", "0")  # as jobs/ does
    ray.init(address=options.address, log_to_driver=False, logging_level="ERROR", **local)
    config = TokenizeConfig(
        images=f"{directory}/images",
        tokenizer=f"{directory}/tokenizer",
        output=f"{directory}/tokens",
        num_views=options.num_views,
        rows_per_unit=options.rows_per_unit,
        batch_size=options.batch_size,
        precision=options.precision,
        encoders=ActorsConfig(min_actors=1, max_actors=1, num_gpus=options.num_gpus),
        tracking=TrackingConfig(enabled=False),
    )
    table = image_table.ImageTable.open(config.images)
    task = plan_task(config, table, load_tokenizer(config))
    part = table.parts[0]
    planned = plan_units([part.name], [part.rows], options.rows_per_unit)
    units = [
        token_work.Unit(index=index, part=part.to_dict(), start=int(start), stop=int(stop))
        for index, (start, stop) in enumerate(zip(planned.start, planned.stop, strict=True))
    ]
    rendered = token_work.render_unit(config.images, units[0], task.identity)
    pixels = rendered.pixels.reshape(-1, *rendered.pixels.shape[2:])
    tokenizer = token_pool.open_tokenizer(task)
    bare_rate(tokenizer, pixels[: options.batch_size], options)
    bare, loops, jobs = [], [], []
    for index in range(options.rounds):
        repeats = max(1, len(units) // 4)
        bare.append(
            statistics.median(bare_rate(tokenizer, pixels, options) for _ in range(repeats))
        )
        loops.append(loop_rate(task, units, tokenizer, f"{directory}/loop-{index}"))
        jobs.append(job_rates(replace(config, output=f"{directory}/tokens-{index}")))
        print(
            f"round {index}: bare {bare[-1]:.1f}, loop {loops[-1]:.1f}, job {jobs[-1]}",
            file=sys.stderr,
            flush=True,
        )
    rates = [entry["rate"] for entry in jobs]
    return {
        "bare_views_per_second": bare,
        "loop_views_per_second": loops,
        "jobs": jobs,
        "job_of_loop": statistics.median(j / one for j, one in zip(rates, loops, strict=True)),
        "job_of_bare": statistics.median(j / one for j, one in zip(rates, bare, strict=True)),
        "device": torch.cuda.get_device_name() if options.num_gpus else "cpu, 1 thread",
    }


def as_markdown(report):
    """The report as the page that is kept under results/."""
    given = report["options"]
    lines = [
        "# Precompute",
        "",
        f"JPEGs of 500x375 and {report['jpeg_kilobytes']:.0f} kB; torch {report['torch']}. Written "
        "by `benchmarks/precompute.py`.",
        "",
        "## Milliseconds of CPU per image, one core",
        "| | ms |",
        "| --- | --- |",
    ]
    decoding = report["milliseconds_per_image_and_core"]
    lines += [f"| {name} | {value:.2f} |" for name, value in decoding.items()]
    if "jobs" in report:
        bare, loops, jobs = (
            report["bare_views_per_second"], report["loop_views_per_second"], report["jobs"]
        )  # fmt: skip
        lines += [
            "",
            f"## The whole job: {given['images']} images, {given['num_views']} views, units of "
            f"{given['rows_per_unit']} images, encoder of width {given['hidden_dim']} on "
            f"{report['device']}",
            "| round | bare, views/s | loop by hand | job | encoder waits | s a unit | start, s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {i} | {b:.1f} | {loop:.1f} | {j['rate']:.1f} | {j['encoder_idle']:.2%} | "
            f"{j['unit_seconds']:.1f} | {j['start_seconds']:.0f} |"
            for i, (b, loop, j) in enumerate(zip(bare, loops, jobs, strict=True))
        ]
        lines += [
            "",
            f"Median of the rounds' ratios: the job runs at {report['job_of_loop']:.2f} of the "
            f"loop by hand and {report['job_of_bare']:.2f} of the bare encoder.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
