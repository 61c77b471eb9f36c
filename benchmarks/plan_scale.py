"""What the driver of a tokenize job needs for 10^9 images: seconds and memory, by simulation.

`python benchmarks/plan_scale.py [--images 1000000000]` synthesises the manifest of an image table,
then does what the driver does: opens it, plans units, believes receipts of half of them as after
an interruption, hands out units, builds and writes the token table's manifest, opens it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))


def image_manifest(directory, *, images, image_bytes, part_bytes=512 * 2**20):
    """Writes a manifest as `prepare` would for so many images; in a process of its own."""
    from pipelines import storage
    from pipelines.tables.image_files import ROW_GROUP_BYTES, Part
    from pipelines.tables.image_table import commit_manifest

    per_group = max(1, ROW_GROUP_BYTES // image_bytes)
    per_part = max(1, part_bytes // image_bytes)
    groups = tuple([per_group] * (per_part // per_group) + [per_part % per_group or per_group])
    rows = sum(groups)
    parts = [
        Part(
            name=f"part-{index:06d}.parquet",
            rows=rows,
            bytes=rows * image_bytes,
            hash=storage.digest(b"%d" % index),
            content=storage.digest(b"c%d" % index),
            row_groups=groups,
        )
        for index in range(-(-images // rows))
    ]
    commit_manifest(
        directory,
        parts=parts,
        class_names=[],
        source={},
        options={},
        rejected={},
        num_items=rows * len(parts),
    )


def peak_megabytes():
    # Not getrusage: its peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def drive(directory, rows_per_unit):
    """The driver's share of the work, step by step."""
    from beit.views import ViewPolicy
    from pipelines import storage, tokenize_images
    from pipelines.tables.image_table import ImageParts
    from pipelines.tables.token_files import Identity
    from pipelines.tables.token_table import build_manifest
    from pipelines.tables.unit_files import encode_manifest
    from pipelines.tokenization.ledger import Ledger, plan_units
    from pipelines.units import UNITS_PER_ROUND

    steps = {"imports": (0.0, peak_megabytes())}
    clock = time.monotonic()

    def step(name):
        nonlocal clock
        steps[name] = (time.monotonic() - clock, peak_megabytes())
        clock = time.monotonic()

    images = ImageParts.open(directory)
    step("open the image table")
    names, rows = [p.name for p in images.parts], [p.rows for p in images.parts]
    units = plan_units(names, rows, rows_per_unit)
    ledger = Ledger(str(Path(directory, "tokens")), units)
    step("plan units")
    half = len(units) // 2
    for unit in range(half):
        ledger.add(unit, 1_000_000, storage.digest(b"%d" % unit))
    ledger.save()
    # As a second driver finds them; the listing of files is stood in for by their sizes.
    again = Ledger(ledger.uri, units)
    listed = np.where(np.arange(len(units)) < half, 1_000_000, -1)
    (receipts,) = Path(ledger.uri, "_work").glob("receipts-*")
    again._read_receipts(receipts.read_bytes(), listed)
    todo = again.todo()
    assert len(todo) == len(units) - half
    step("take up half of them from receipts")
    texts = []
    for start in range(0, len(todo), UNITS_PER_ROUND):
        chunk = todo[start : start + UNITS_PER_ROUND]
        texts = [
            json.dumps(vars(tokenize_images._unit(units, images, unit, None, None)))
            for unit in chunk
        ]
    del texts
    step("hand out the other half, round by round")
    for unit in todo:
        again.add(int(unit), 1_000_000, storage.digest(b"%d" % unit))
    again.save()
    step("book their receipts")
    identity = Identity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        tokenizer_fingerprint="0" * 32,
        vocab_size=8192,
        grid_size=(14, 14),
        image_size=112,
        interpolation="lanczos",
        policy=ViewPolicy().to_dict(),
        views=(0, 4),
        device="cuda",
        precision="float16",
        batch_size=64,
    )
    manifest = build_manifest(
        identity=identity,
        part_names=names,
        part_rows=rows,
        files=again.files(),
        rejected=[],
        rows_per_unit=rows_per_unit,
        libraries={},
    )
    storage.write_bytes(str(Path(directory, "token_manifest.json")), encode_manifest(manifest))
    step("build and write the token manifest")
    size = Path(directory, "token_manifest.json").stat().st_size
    print(f"{images.num_rows:,} images, {len(images.parts):,} parts, {len(units):,} units")
    print(f"image manifest {Path(directory, 'manifest.json').stat().st_size / 1e6:.0f} MB, "
          f"token manifest {size / 1e6:.0f} MB")  # fmt: skip
    for name, (seconds, megabytes) in steps.items():
        print(f"{name:<42}{seconds:7.1f} s   peak {megabytes:6.0f} MB")
    print(f"{'together':<42}{sum(s for s, _ in steps.values()):7.1f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--image_bytes", type=int, default=110_000)
    parser.add_argument("--rows_per_unit", type=int, default=4096)
    parser.add_argument("--drive", default="")
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.rows_per_unit)
        return
    with tempfile.TemporaryDirectory() as directory:
        image_manifest(directory, images=options.images, image_bytes=options.image_bytes)
        # Its memory is the figure, so the driver's share runs in a process of its own.
        command = [sys.executable, __file__, "--drive", directory]
        subprocess.run([*command, "--rows_per_unit", str(options.rows_per_unit)], check=True)


if __name__ == "__main__":
    main()
