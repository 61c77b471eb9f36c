"""What `tokenize --reuse` saves, and what looking up digests takes.

    python benchmarks/reuse.py [--images 640] [--rounds 3] [--rows 20000000] [--output FILE.md]

Images of which 90 % are in an older table are tokenized whole and with `--reuse` in turns, on CPUs;
medians of the seconds of the stage and their ratio. With `--rows`, so many digests are looked up in
a table of as many, half of them there, without Ray; `--images 0` does that alone.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent.parent))

from beit.images import image_digest
from benchmarks.precompute import photo
from pipelines import tokenize_images
from pipelines.config.tokenize_images import ActorsConfig, TokenizeConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.tables import image_files, image_table, tokenizer_store
from pipelines.tokenization import reuse

ROWS_PER_PART = 5_000


def write_images(uri, pictures):
    rows = [
        image_files.ImageRow(
            key=f"{number:08d}.jpg", image=data, height=375, width=500, label=None,
            digest=image_digest(data),
        )
        for number, data in enumerate(pictures)
    ]  # fmt: skip
    part = image_files.write_part(uri, "part-00000.parquet", rows)
    image_table.commit_manifest(
        uri, parts=[part], class_names=[], source={}, options={}, rejected={}, num_items=len(rows)
    )


def compare_runs(count, rounds):
    """Seconds of the stage from its call to the finished table, whole and with 90 % reused."""
    import ray
    import torch

    from beit.tokenizers import DvaeTokenizer

    generator = np.random.default_rng(0)
    pictures = [photo(generator) for _ in range(count)]
    root = tempfile.mkdtemp(prefix="reuse-")
    write_images(f"{root}/new", pictures)
    # The older table lacks every tenth image.
    write_images(f"{root}/old", [data for number, data in enumerate(pictures) if number % 10])
    torch.manual_seed(0)
    tokenizer = DvaeTokenizer(image_size=112, patch_size=8, dim=64, vocab_size=512)
    tokenizer_store.save(tokenizer, f"{root}/tokenizer", source={})
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    def run(images, output, **options):
        config = TokenizeConfig(
            images=f"{root}/{images}", tokenizer=f"{root}/tokenizer", output=f"{root}/{output}",
            rows_per_unit=64, batch_size=16, encoders=ActorsConfig(max_actors=1),
            num_views=4, tracking=TrackingConfig(enabled=False), **options,
        )  # fmt: skip
        begin = time.monotonic()
        result = tokenize_images.run(config)
        return time.monotonic() - begin, result.seconds

    run("old", "old-tokens")
    older = {"reuse": [f"{root}/old-tokens"], "reuse_images": [f"{root}/old"]}
    whole, less = [], []
    for number in range(rounds):
        whole.append(run("new", f"whole-{number}"))
        less.append(run("new", f"less-{number}", **older))
    lines = [
        f"{count} JPEGs of 500 x 375, 4 views, {rounds} rounds in turns, medians of seconds.",
        "",
        "| | whole | 90 % reused | times |",
        "| --- | --- | --- | --- |",
    ]
    for name, place in (("stage", 0), ("from the first unit on", 1)):
        left, right = (statistics.median(times[place] for times in runs) for runs in (whole, less))
        lines.append(f"| {name} | {left:.1f} | {right:.1f} | {left / right:.1f} |")
    return lines


def look_up(rows):
    """Seconds and memory of `Origins` for `rows` digests in as many."""

    def table(first):
        def iter_parts(_):
            for begin in range(0, rows, ROWS_PER_PART):
                numbers = np.arange(first + begin, first + min(begin + ROWS_PER_PART, rows))
                # Digests are as good as random: two rounds of a mixing of 64 bits.
                mixed = numbers.astype(np.uint64)[:, None] * np.array(
                    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64
                )
                mixed ^= mixed >> np.uint64(29)
                mixed *= np.uint64(0xBF58476D1CE4E5B9)
                data = [None, pa.py_buffer(mixed.tobytes())]
                column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(numbers), data)
                yield pa.table({"digest": column})

        return SimpleNamespace(num_rows=rows, iter_parts=iter_parts)

    tokens = SimpleNamespace(have_file=lambda numbers: np.ones(len(numbers), bool))
    reuse._opened = lambda _: (table(rows // 2), tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    origins = reuse.Origins(table(0), [reuse.Older(tokens="", images="", first=0, rows=rows)])
    seconds = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert origins.num_reused == rows - rows // 2
    return [
        f"{rows:,} digests are looked up in as many, half of them there: {seconds:.0f} s, peak "
        f"{peak / 1e3:,.0f} MB, of which {before / 1e3:,.0f} MB were there before."
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    lines = ["# Reuse of tokens", "", "Written by `benchmarks/reuse.py`.", ""]
    if options.images:
        lines += [*compare_runs(options.images, options.rounds), ""]
    if options.rows:
        lines += look_up(options.rows)
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
