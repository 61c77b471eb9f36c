"""The training loop without Ray: what a step does, what health and books say, what is refused."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from beit.weights import load_weights, read_weights_config
from pipelines import evaluate, pretrain, storage
from pipelines.config.checks import changed_fields, to_dict
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.pretrain import MAY_CHANGE, PretrainConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.reading import ingest
from pipelines.reading.encoded_rows import TrainingTables
from pipelines.records import read_values, write_record
from pipelines.tables import image_table
from pipelines.tracking.spool import LinesFile
from pipelines.training import checkpoint, pretraining, probing
from pipelines.training import data as train_data
from pipelines.training.distributed import join_world
from pipelines.training.fixed_images import FixedImages
from pipelines.training.objective import build_objective
from pipelines.training.run_dir import ReportRecord, RunDir, Skips
from pipelines.training.step_metrics import sample_hash
from tests.chaos.world import make_tokenizer
from tests.pipelines.pretrain_fixtures import (
    Killed,
    dies_after,
    events_of,
    make_tables,
    metrics_of,
    per_step,
    poison,
    replaced,
    small_config,
    weight_bytes,
    write_images,
    write_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "golden" / "pretrain_losses.json"


@pytest.fixture(scope="module")
def finished(tables, tmp_path_factory):
    """An undisturbed run."""
    config = small_config(tables, tmp_path_factory.mktemp("run") / "run")
    return config, pretrain.run(config)


def losses(result_or_uri):
    uri = result_or_uri if isinstance(result_or_uri, str) else result_or_uri.run_uri
    return [loss for _, (loss, _) in sorted(per_step(uri).items())]


class TestRun:
    def test_it_learns_and_leaves_what_later_stages_need(self, finished):
        config, result = finished
        assert result.steps == 12
        assert result.resumed_from == 0
        first, last = metrics_of(result.run_uri)[0], metrics_of(result.run_uri)[-1]
        assert last["loss"] < first["loss"] - 0.2
        assert last["mim_accuracy"] > result.unigram_accuracy
        assert 0 <= last["data_wait_share"] <= 1
        assert last["mfu"] > 0
        model = load_weights(result.weights_uri)
        assert model.depth == 2
        extra = read_weights_config(result.weights_uri)["extra"]
        assert extra["pixel_mean"] == list(config.data.mean)
        assert extra["fingerprints"]["tokenizer"] == "c" * 32

    def test_the_books_sum_to_wall_clock(self, finished):
        goodput = finished[1].report["goodput"]
        assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"], abs=1e-6)
        assert goodput["seconds"]["compute"] > 0
        assert goodput["seconds"]["restart"] == 0
        assert goodput["knob"]

    def test_the_rows_of_every_step_are_those_of_the_order(self, finished):
        config, result = finished
        order = train_data.make_order(config, train_data.open_tables(config).row_group_sizes)
        for step, (_, found) in per_step(result.run_uri).items():
            rows = order.global_batch(*order.locate(step))
            assert found == f"{sample_hash(rows) % 2**64:016x}"

    def test_run_again_it_is_done_already(self, finished):
        config, result = finished
        start = time.monotonic()
        again = pretrain.run(config)
        assert time.monotonic() - start < 5
        assert again.resumed_from == again.steps == 12
        assert "were done already" in again.summary()
        assert again.loss == result.loss

    def test_golden_losses(self, finished):
        """Regenerate: .venv/bin/python -m tests.pipelines.golden_pretrain (and say why)."""
        golden = json.loads(GOLDEN.read_text())
        assert losses(finished[1]) == pytest.approx(golden["losses"], abs=golden["tolerance"])


class TestEquivalence:
    """1 x 16 = accumulation of 2 and of 3: equal up to the order of sums in float32."""

    @pytest.mark.parametrize("pieces", [2, 3])
    def test_accumulation_changes_nothing(self, finished, tables, tmp_path, pieces):
        result = pretrain.run(
            small_config(tables, tmp_path / "run", scaling={"accumulate_steps": pieces})
        )
        assert losses(result) == pytest.approx(losses(finished[1]), abs=2e-5)

    def test_activation_checkpointing_changes_nothing(self, finished, tables, tmp_path):
        result = pretrain.run(
            small_config(tables, tmp_path / "run", scaling={"activation_checkpointing": True})
        )
        assert losses(result) == pytest.approx(losses(finished[1]), abs=2e-5)

    def test_saving_at_once_changes_nothing(self, finished, tables, tmp_path):
        result = pretrain.run(
            small_config(tables, tmp_path / "run", checkpoint={"asynchronous": False})
        )
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)

    def test_bf16_is_near(self, finished, tables, tmp_path):
        result = pretrain.run(small_config(tables, tmp_path / "run", scaling={"precision": "bf16"}))
        assert losses(result) == pytest.approx(losses(finished[1]), abs=0.05)
        assert losses(result) != losses(finished[1])


class TestResume:
    @pytest.mark.parametrize("died_at", [2, 5, 8, 11])
    def test_it_goes_on_bit_for_bit(self, finished, tables, tmp_path, monkeypatch, died_at):
        config = small_config(tables, tmp_path / "run")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", dies_after(died_at))
            pretrain.run(config)
        result = pretrain.run(config)
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)
        assert per_step(result.run_uri) == per_step(finished[1].run_uri)
        assert result.report["goodput"]["attempts"] == 2
        resumed = [event for event in events_of(result.run_uri) if event["event"] == "resumed"]
        assert resumed[0]["step"] <= died_at

    def test_a_damaged_newest_checkpoint_is_passed_over_and_told(
        self, finished, tables, tmp_path, monkeypatch
    ):
        config = small_config(tables, tmp_path / "run")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", dies_after(10))
            pretrain.run(config)
        file = tmp_path / "run/checkpoints/step_00000008/model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        result = pretrain.run(config)
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)
        told = [e for e in events_of(result.run_uri) if e["event"] == "checkpoint_rejected"]
        assert told[0]["at_step"] == 8
        assert "1000 bytes instead of" in told[0]["message"]

    def test_a_full_disk_does_not_stop_training_and_is_told(
        self, finished, tables, tmp_path, monkeypatch
    ):
        write = storage.write_bytes

        def full(uri, data, **check):
            if "step_00000008" in uri:
                raise OSError(28, "No space left on device")
            write(uri, data, **check)

        monkeypatch.setattr(storage, "write_bytes", full)
        result = pretrain.run(small_config(tables, tmp_path / "run"))
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)
        told = [e for e in events_of(result.run_uri) if e["event"] == "checkpoint_failed"]
        assert [event["at_step"] for event in told] == [8]


class TestRefusals:
    def test_a_changed_field_is_named_with_both_values(self, finished):
        config, _ = finished
        with pytest.raises(InputError, match=r"optim\.lr: 0\.003 != 0\.001.*new run"):
            pretrain.run(replaced(config, "optim", lr=1e-3))

    def test_what_decides_only_how_it_is_computed_may_change(self, finished):
        config, _ = finished
        changed = dataclasses.replace(
            replaced(config, "scaling", num_workers=2, accumulate_steps=2),
            log_every=7,
            checkpoint=dataclasses.replace(config.checkpoint, every_steps=3),
        )
        assert changed_fields(to_dict(config), changed, MAY_CHANGE) == {}

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"masking": {"num_masked": 25}}, {"data": {"window": 16}}]
    )
    def test_what_decides_what_is_computed_may_not(self, finished, tables, change):
        config, _ = finished
        with pytest.raises(InputError, match="started with another configuration"):
            pretrain.run(small_config(tables, config.output, **change))

    def test_other_tokens_are_refused_by_fingerprint(self, finished, tables, tmp_path):
        from pipelines.tables.image_table import ImageTable

        write_tokens(str(tmp_path / "more"), ImageTable.open(tables[0]), views=(2, 3))
        config = dataclasses.replace(finished[0], tokens=[tables[1], str(tmp_path / "more")])
        with pytest.raises(InputError, match="fingerprint of tokens"):
            pretrain.run(config)

    def test_a_token_table_of_other_images_is_refused_by_field(self, tables, tmp_path):
        other = make_tables(tmp_path, 64)
        with pytest.raises(InputError, match="image_fingerprint"):
            pretrain.run(small_config((tables[0], other[1]), tmp_path / "run"))

    def test_another_tokenizer_than_that_of_the_tokens_is_refused(self, tables, tmp_path):
        tokenizer = make_tokenizer(str(tmp_path / "tokenizer"))
        for uri, message in (
            (tokenizer, "were made by c{32}"),
            (str(tmp_path / "nowhere"), "nowhere"),
        ):
            config = small_config(tables, tmp_path / "run", tokenizer=uri)
            with pytest.raises(InputError, match=message):
                pretrain.run(config)

    def test_a_probe_that_could_not_work_is_refused_at_the_start(self, tables, tmp_path):
        unlabelled = write_images(str(tmp_path / "images"), 8, labelled=False)
        for probe, message in (
            ({"images": str(tmp_path / "typo")}, "typo"),
            ({"images": unlabelled.uri}, "labelled images of 0 classes"),
            ({"layers": [0, 2]}, r"probe.layers = \[0, 2\]: blocks count from 1"),
            ({"layers": [3]}, r"probe.layers = \[3\]: the network has 2 blocks"),
            ({"images": tables[0], "num_folds": 99}, "num_folds = 99 needs 99"),
            ({"tokens": [tables[1]]}, "name probe.images"),
        ):
            probe = {"every_steps": 500, **probe}  # noqa: PLW2901
            with pytest.raises(InputError, match=message):
                pretrain.run(small_config(tables, tmp_path / "run", probe=probe))

    def test_a_grid_that_does_not_fit_the_tokens_is_refused(self, tables, tmp_path):
        config = small_config(
            tables, tmp_path / "run", model={"patch_size": 8}, masking={"num_masked": 6}
        )
        with pytest.raises(InputError, match=r"model\.image_size / model\.patch_size"):
            pretrain.run(config)

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"optim": {"steps": 2}}, r"optim\.warmup_steps"),
            ({"data": {"global_batch_size": 400}}, "global_batch_size"),
            ({"tokens": []}, "tokens"),
            ({"output": ""}, "output"),
        ],
    )
    def test_values_that_cannot_work_are_refused_before_anything_starts(
        self, tables, tmp_path, sections, message
    ):
        plain = {name: value for name, value in sections.items() if not isinstance(value, dict)}
        nested = {name: value for name, value in sections.items() if name not in plain}
        config = dataclasses.replace(small_config(tables, tmp_path / "run", **nested), **plain)
        with pytest.raises(InputError, match=message):
            pretrain.run(config)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"model": {"num_heads": 5}}, r"model\.num_heads = 5"),
            ({"masking": {"min_block": 30}}, r"masking\.min_block = 30"),
            ({"masking": {"num_masked": 65}}, r"masking\.num_masked = 65"),
            ({"scaling": {"num_workers": (2, 8)}}, r"data\.num_shards = 4"),
            ({"scaling": {"num_workers": (2, 1)}}, r"scaling\.num_workers"),
            ({"scaling": {"strategy": "fsdp"}}, r"scaling\.strategy"),
            ({"checkpoint": {"keep": 1}}, r"checkpoint\.keep = 1"),
            ({"health": {"data_starvation": "rollback"}}, r"health\.data_starvation"),
            ({"health": {"non_finite": "panic"}}, r"health\.non_finite = 'panic'"),
        ],
    )
    def test_the_configuration_checks_itself(self, tables, sections, message):
        with pytest.raises(ValueError, match=message):
            small_config(tables, "run", **sections)

    def test_a_fixed_number_of_workers_divides_the_shards(self, tables, tmp_path):
        with pytest.raises(InputError, match=r"scaling\.num_workers = 3 .* choose 2 workers"):
            pretraining.check_workers(small_config(tables, tmp_path, scaling={"num_workers": 3}))


class TestHealth:
    def test_a_nan_rolls_back_and_skips_the_window(self, tables, tmp_path, monkeypatch):
        poison(monkeypatch, {5})
        result = pretrain.run(small_config(tables, tmp_path / "run"))
        names = [event["event"] for event in events_of(result.run_uri)]
        assert names == ["non_finite", "rolled_back"]
        found, rolled = events_of(result.run_uri)
        # Counted as curves are: of the steps that were done, the last one.
        assert (found["step"], found["action"]) == (6, "rollback")
        assert (rolled["to_step"], rolled["skipped_batches"]) == (4, 4)
        # Steps 4 to 11 took the batches 8 to 15 of the order.
        config = small_config(tables, tmp_path / "run")
        order = train_data.make_order(config, train_data.open_tables(config).row_group_sizes)
        positions = [*range(4), *range(8, 16)]
        for (_, (loss, found)), position in zip(
            sorted(per_step(result.run_uri).items()), positions, strict=True
        ):
            assert np.isfinite(loss)
            rows = order.global_batch(*order.locate(position))
            assert int(found, 16) == sample_hash(rows) % 2**64

    def test_a_rolled_back_run_resumes_bit_for_bit(self, tables, tmp_path, monkeypatch):
        poison(monkeypatch, {5})
        whole = pretrain.run(small_config(tables, tmp_path / "whole"))
        config = small_config(tables, tmp_path / "killed")
        # Dies in the stream after the rollback: 8 batches before it, then 1 of the new one.
        streams = iter([ingest.train_batches, dies_after(1)])

        def next_stream(*args, **options):
            return next(streams)(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", next_stream)
            pretrain.run(config)
        result = pretrain.run(config)
        assert weight_bytes(result.run_uri) == weight_bytes(whole.run_uri)
        assert per_step(result.run_uri) == per_step(whole.run_uri)

    def test_a_warned_nan_is_left_out_and_training_goes_on(self, tables, tmp_path, monkeypatch):
        poison(monkeypatch, {5})
        config = small_config(tables, tmp_path / "run", health={"non_finite": "warn"})
        result = pretrain.run(config)
        values = losses(result)
        assert [step for step, loss in enumerate(values) if loss is None] == [5]
        assert result.loss < 4.1
        assert all(torch.isfinite(p).all() for p in load_weights(result.weights_uri).parameters())

    def test_stop_stops_and_says_why(self, tables, tmp_path, monkeypatch):
        poison(monkeypatch, {5})
        config = small_config(tables, tmp_path / "run", health={"non_finite": "stop"})
        with pytest.raises(StageFailed, match="step 6: loss nan"):
            pretrain.run(config)
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["outcome"] == "stopped"

    def test_rollbacks_are_limited(self, tables, tmp_path, monkeypatch):
        poison(monkeypatch, set(range(4, 100)))
        config = small_config(tables, tmp_path / "run", health={"max_rollbacks": 2})
        with pytest.raises(StageFailed, match=r"health\.max_rollbacks is reached"):
            pretrain.run(config)
        names = [event["event"] for event in events_of(str(tmp_path / "run"))]
        assert names.count("rolled_back") == 2

    def test_predictions_that_collapse_are_found(self, tables, tmp_path):
        config = small_config(
            tables,
            tmp_path / "run",
            health={"code_collapse": "stop", "min_perplexity": 60.0, "grace_steps": 2},
        )
        with pytest.raises(StageFailed, match="predictions use"):
            pretrain.run(config)

    def test_no_better_than_the_floor_is_found(self, tables, tmp_path, monkeypatch):
        monkeypatch.setattr(pretraining, "unigram_floor", lambda data: (0.99, 1.0))
        config = small_config(
            tables, tmp_path / "run", health={"accuracy_floor": "stop", "grace_steps": 0}
        )
        with pytest.raises(StageFailed, match="no better than always guessing"):
            pretrain.run(config)


class TestStarvation:
    def config(self, tables, tmp_path):
        return small_config(
            tables,
            tmp_path / "run",
            health={"data_starvation": "stop", "max_data_wait": 0.5},
            data={"window": 4},
            checkpoint={"every_steps": 100},
        )

    def test_a_slow_disk_is_named(self, tables, tmp_path, monkeypatch):
        real = TrainingTables.read

        def slow(self, start, stop, epoch):
            time.sleep(0.6)
            return real(self, start, stop, epoch)

        monkeypatch.setattr(TrainingTables, "read", slow)
        with pytest.raises(StageFailed, match=r"waiting for data.*Cause: reading"):
            pretrain.run(self.config(tables, tmp_path))

    def test_decoding_that_is_too_slow_is_named(self, tables, tmp_path, monkeypatch):
        from pipelines.reading import decoding

        real = decoding.render_encoded

        def slow(*args, **options):
            time.sleep(0.04)
            return real(*args, **options)

        monkeypatch.setattr(decoding, "render_encoded", slow)
        with pytest.raises(
            StageFailed, match=r"waiting for data.*Cause: decoding.*num_threads.*beit render"
        ):
            pretrain.run(self.config(tables, tmp_path))


class TestDoneAlready:
    def test_a_run_without_weights_or_with_a_failed_report_is_not_done(
        self, finished, tables, tmp_path
    ):
        run_uri = pretrain.run(small_config(tables, tmp_path / "run")).run_uri
        weights = weight_bytes(run_uri)
        storage.delete_prefix(storage.join(run_uri, "weights"))
        assert pretrain.run(small_config(tables, tmp_path / "run")).resumed_from == 12
        assert weight_bytes(run_uri) == weights
        storage.delete_prefix(storage.join(run_uri, "checkpoints"))
        # Who needs room deletes checkpoints: it is done all the same.
        assert pretrain.run(small_config(tables, tmp_path / "run")).resumed_from == 12
        assert not storage.list_files(storage.join(run_uri, "checkpoints"))
        assert not storage.list_files(storage.join(run_uri, "_lease"))
        report_uri = storage.join(run_uri, "report.json")
        write_record(report_uri, read_values(report_uri, ReportRecord, "") | {"outcome": "stopped"})
        assert pretrain.run(small_config(tables, tmp_path / "run")).report["outcome"] == "finished"


class TestAwayStore:
    def test_records_that_cannot_be_written_do_not_stop_training(
        self, finished, tables, tmp_path, monkeypatch, caplog
    ):
        def away(*args, **options):
            raise OSError("the store is away")

        monkeypatch.setattr(RunDir, "event", away)
        monkeypatch.setattr(LinesFile, "flush", away)
        monkeypatch.setattr(checkpoint, "retain", away)
        result = pretrain.run(small_config(tables, tmp_path / "run"))
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)
        assert "cannot be written now: the store is away" in caplog.text


class TestProbes:
    def test_they_give_the_figures_of_evaluate_and_do_not_disturb(self, finished, tables, tmp_path):
        protocol = {"num_folds": 2, "pooling": "cls", "knn_k": 40}
        probe = {"every_steps": 5, "max_share": 1, "images": tables[0], **protocol}
        result = pretrain.run(small_config(tables, tmp_path / "run", probe=probe))
        told = [event for event in events_of(result.run_uri) if event["event"] == "probe"]
        assert [event["step"] for event in told] == [5, 10, 12]
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)
        assert per_step(result.run_uri) == per_step(finished[1].run_uri)
        assert result.report["goodput"]["seconds"]["evaluation"] > 0
        judged = evaluate.run(
            EvaluateConfig(
                run=result.run_uri, images=tables[0], baselines=False, attentive=False,
                tracking=TrackingConfig(enabled=False), **protocol,
            )
        )  # fmt: skip
        figures = told[-1]["figures"]
        for kind, score in judged.scores["pretrained"].items():
            name = f"probe/{kind}_accuracy"
            assert figures[name] == told[-1][f"{kind}_accuracy"] == score.accuracy
            assert (figures[f"{name}_low"], figures[f"{name}_high"]) == (score.low, score.high)
        report = storage.read_json(f"{result.run_uri}/evaluation/evaluation.json")
        assert figures["probe/rankme"] == pytest.approx(report["rankme"]["pretrained"])

    def test_they_keep_to_their_share_of_the_time(self, tables, tmp_path, monkeypatch):
        clock = itertools.count()  # each look at the clock a second later
        monkeypatch.setattr(probing, "monotonic", lambda: float(next(clock)))
        monkeypatch.setattr(probing, "seconds_of_chosen_linear", lambda *_, **__: 0.0)
        probe = {"every_steps": 1, "max_share": 0.7, "num_folds": 2}
        result = pretrain.run(small_config(tables, tmp_path / "run", probe=probe))
        told = [event for event in events_of(result.run_uri) if event["event"] == "probe"]
        assert [event["step"] for event in told] == list(range(6, 13))
        assert all(0 < event["share_of_time"] <= 0.7 for event in told)
        monkeypatch.setattr(probing, "seconds_of_chosen_linear", lambda *_, **__: 60.0)
        result = pretrain.run(small_config(tables, tmp_path / "fits", probe=probe))
        [event] = events_of(result.run_uri)
        assert event["event"] == "probe_left_out"
        assert re.match(
            r"no probe: it would take about 1\d\d s of \d+; see --probe", event["message"]
        )
        monkeypatch.undo()
        result = pretrain.run(small_config(tables, tmp_path / "short", probe={"every_steps": 500}))
        [event] = events_of(result.run_uri)
        assert event["event"] == "probe_left_out", "two seconds are too short for one"

    def test_damage_that_the_reckoning_meets_leaves_them_out(self, tables, tmp_path, monkeypatch):
        """The other workers wait for what the first one says."""

        def damaged(*_):
            raise InputError("image 7 does not decode")

        monkeypatch.setattr(probing.Prober, "_seconds_of_pixels", damaged)
        clock = itertools.count()
        monkeypatch.setattr(probing, "monotonic", lambda: float(next(clock)))
        probe = {"every_steps": 1, "max_share": 0.9, "num_folds": 2}
        result = pretrain.run(small_config(tables, tmp_path / "run", probe=probe))
        [event] = events_of(result.run_uri)
        assert event["event"] == "probe_left_out"
        assert event["message"] == "no probe: image 7 does not decode"

    def test_their_images_are_read_once(self, tables, tmp_path, monkeypatch):
        labelled = str(tmp_path / "labelled")
        shutil.copytree(tables[0], labelled)
        reads, real = [], image_table.read_row_groups

        def read(uri, part, indices, columns=None):
            if uri == labelled and "image" in columns:
                reads.extend((part.name, index) for index in indices)
            return real(uri, part, indices, columns)

        monkeypatch.setattr(image_table, "read_row_groups", read)
        probe = {"images": labelled, "every_steps": 6, "max_share": 1, "num_folds": 2}
        result = pretrain.run(small_config(tables, tmp_path / "run", probe=probe))
        assert len([e for e in events_of(result.run_uri) if e["event"] == "probe"]) == 2
        groups = image_table.ImageTable.open(labelled).row_groups
        assert len(groups) < image_table.ImageTable.open(labelled).num_rows / 4
        assert len(reads) == len(set(reads)) == len(groups)

    def test_one_without_room_on_disk_is_left_out(self, finished, tables, tmp_path, monkeypatch):
        sizes, real = [], os.posix_fallocate

        def full(file, offset, size):
            sizes.append(size)
            if len(sizes) in (1, 3):  # of the pixels, then of the features
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", full)
        probe = {"every_steps": 4, "max_share": 1, "num_folds": 2}
        result = pretrain.run(small_config(tables, tmp_path / "run", probe=probe))
        told = [(event["event"], event["step"]) for event in events_of(result.run_uri)]
        assert told == [("probe_left_out", 4), ("probe_left_out", 8), ("probe", 12)]
        message = events_of(result.run_uri)[0]["message"]
        assert re.search(r"needed on disk, in .*: No space left on device; set TMPDIR", message)
        assert sizes == [size := 96 * 3 * 32 * 32, size, room := 2 * 96 * 32 * 4, room]
        assert weight_bytes(result.run_uri) == weight_bytes(finished[1].run_uri)

    def test_the_curve_bears_probes_made_again_and_those_of_an_older_version(self, monkeypatch):
        def event(step, value, ends=("", "_low", "_high")):
            figures = {f"probe/linear_accuracy{end}": value for end in ends}
            return {"step": step, "figures": figures, "images": 9}

        drawn = []
        monkeypatch.setattr(probing.pictures, "curve", lambda series, **_: drawn.append(series))
        old = event(2, 0.1, ends=("",))
        probing.probe_curve([old, event(4, 0.2), event(8, 0.3), event(4, 0.4)], title="t")
        assert drawn == [{"linear": ([4, 8], [0.4, 0.3])}]
        assert probing.probe_curve([old, event(4, 0.2), event(4, 0.4)], title="t") is None

    def test_the_fixed_loss_is_of_the_same_images_and_masks_in_every_run(self, tables, tmp_path):
        """Whatever the seed, and with other images where they are given with their tokens."""
        seen = {}
        for name, options in {
            "one": {}, "other": {"seed": 7},
            "held out": {"probe": {"images": tables[0], "tokens": [tables[1]]}},
        }.items():  # fmt: skip
            config = small_config(tables, tmp_path / name, **options)
            world = join_world(use_gpu=False, in_ray=False)
            data = train_data.WorkerData(config, world)
            fixed = FixedImages(config, data, world)
            objective = build_objective(small_config(tables, tmp_path), data.tables.vocab_size)
            seen[name] = fixed.batch, fixed.loss(objective.eval())
        (pixels, mask, ids), losses = seen["one"]
        assert set(losses) == {"fixed/loss", "fixed/mim_accuracy"}
        with torch.no_grad():
            logits = objective.network(data.normalise(pixels), mask)
        expected = torch.nn.functional.cross_entropy(logits, ids[mask])
        assert losses["fixed/loss"] == pytest.approx(float(expected), rel=1e-5)
        for name in ("other", "held out"):
            assert all(map(torch.equal, seen[name][0], seen["one"][0]))
        assert seen["other"][1] == losses
        assert seen["held out"][1]["held_out/loss"] == losses["fixed/loss"]


class TestTracking:
    def test_a_killed_and_resumed_run_is_one_mlflow_run(
        self, tables, tmp_path, monkeypatch, mlflow_uri
    ):
        from mlflow import MlflowClient

        config = small_config(
            tables,
            tmp_path / "run",
            tracking={
                "enabled": True,
                "uri": mlflow_uri,
                "artifact_uri": str(tmp_path / "artifacts"),
            },
        )
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ingest, "train_batches", dies_after(6))
            pretrain.run(config)
        result = pretrain.run(config)
        client = MlflowClient(mlflow_uri)
        experiment = client.search_experiments(filter_string="name = 'beit'")[0]
        runs = client.search_runs([experiment.experiment_id])
        assert [run.info.run_id for run in runs] == [result.mlflow_run_id]
        run = runs[0]
        assert run.info.status == "FINISHED"
        assert run.data.params["optim.lr"] == "0.003"
        for name in ("loss", "mim_accuracy", "unigram_accuracy", "lr", "grad_norm", "mfu"):
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
            assert steps == [4, 8, 12], name  # as of the pictures
        tags = run.data.tags
        assert tags["beit.input.image_table"]
        assert tags["beit.input.token_table"]
        assert tags["beit.input.tokenizer"] == "c" * 32
        assert tags["beit.output.weights"]
        images = {file.path for file in client.list_artifacts(run.info.run_id, "images")}
        assert any("masked_input" in path for path in images)
        assert any("tokens_predicted" in path for path in images)


class TestPieces:
    def test_skips_map_steps_to_positions(self):
        skips = Skips([]).add(from_step=4, batches=3).add(from_step=8, batches=2)
        assert [skips.position(step) for step in (0, 3, 4, 7, 8, 9)] == [0, 3, 7, 10, 13, 14]
        assert skips.segments(2, 10) == [(2, 2), (7, 4), (13, 2)]
        assert skips.segments(4, 6) == [(7, 2)]
        assert Skips([]).segments(3, 3) == []

    def test_metrics_of_steps_done_again_are_dropped(self, tmp_path):
        uri = str(tmp_path / "metrics.jsonl")
        file = LinesFile(uri, start_step=0)
        for step in (3, 7, 11):
            file.append({"step": step})
        with Path(uri).open("a") as torn:
            torn.write('{"step": 1')
        LinesFile(uri, start_step=8).append({"step": 11, "again": True})
        lines = [json.loads(line) for line in Path(uri).read_text().splitlines()]
        assert all(line.pop("time") > 0 for line in lines)
        assert lines == [{"step": 3}, {"step": 7}, {"step": 11, "again": True}]

    def test_hashes_of_a_divided_batch_add_up(self):
        rows = np.arange(64) ** 5
        whole = sample_hash(rows) % 2**64
        parts = sum(sample_hash(part) for part in np.split(rows, 4)) % 2**64
        assert whole == parts
        assert sample_hash(rows[:63]) % 2**64 != whole

    def test_a_directory_that_got_no_further_than_its_configuration_is_started_anew(
        self, tables, tmp_path
    ):
        config = small_config(tables, tmp_path)
        run = RunDir(str(tmp_path))
        run.begin(config, {"images": "x"}, may_change=MAY_CHANGE)
        (tmp_path / "run.json").unlink()
        run.begin(config, {"images": "y"}, may_change=MAY_CHANGE)
        assert run.record()["fingerprints"] == {"images": "y"}

    def test_lengths_follow_from_epochs_or_steps(self):
        optim = PretrainConfig(images="i", tokens=["t"], output="o").optim
        assert optim.total_steps(625) == 500_000
        assert optim.total_warmup_steps(625) == 6_250
        assert dataclasses.replace(optim, steps=10, warmup_steps=3).total_steps(625) == 10

    @pytest.mark.parametrize("max_share", [0.02, 1])
    def test_what_follows_the_last_checkpoint_is_made_up_for(
        self, tables, tmp_path, monkeypatch, max_share
    ):
        """Each once, and the probe although nothing was trained since the start."""
        config = small_config(
            tables,
            tmp_path,
            optim={"steps": 4, "warmup_steps": 1},
            probe={"every_steps": 4, "max_share": max_share, "num_folds": 2},
        )

        def killed(*_):
            raise StageFailed("killed here")

        for _ in range(2):
            with monkeypatch.context() as patch, pytest.raises(StageFailed, match="killed here"):
                patch.setattr(FixedImages, "log_pictures", killed)
                pretrain.run(config)
        assert not list(tmp_path.glob("pictures/*/*.png"))
        assert pretrain.run(config).resumed_from == 4
        assert (tmp_path / "pictures/masked_input/000000004.png").exists()
        told = [(event["event"], event["step"]) for event in events_of(str(tmp_path))]
        assert [event for event in told if "probe" in event[0]] == [("probe", 4)]

    def test_no_weights_are_gathered_for_a_probe_that_is_left_out(
        self, tables, tmp_path, monkeypatch
    ):
        gathered, real = [], pretrain.unsharded
        monkeypatch.setattr(
            pretrain, "unsharded", lambda *args: gathered.append(args) or real(*args)
        )
        probe = {"every_steps": 1}
        optim = {"steps": 4, "warmup_steps": 1}
        pretrain.run(small_config(tables, tmp_path, optim=optim, probe=probe))
        assert len(gathered) == 1, "for the pictures at the end"
