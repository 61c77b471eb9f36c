"""The driver of a pretraining run: checks, run directory, MLflow run, Ray Train, report."""

import dataclasses
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import storage, tracking
from pipelines.config.checks import flatten
from pipelines.config.pretrain import PretrainConfig, to_dict
from pipelines.errors import InputError, StageFailed
from pipelines.evaluation.features import weights_fingerprint
from pipelines.reading.ingest import TrainingTables
from pipelines.training import checkpoint
from pipelines.training import data as train_data
from pipelines.training.goodput import account, flops_per_image
from pipelines.training.log import ProgressThread
from pipelines.training.preflight import check_probe, check_tokenizer, check_workers
from pipelines.training.run_dir import RunDir, open_run

FLOOR_ROWS = 4096  # rows of the token table that the unigram floor is estimated from
FLOOR_SLICES = 16
WORKER_FAILED = "worker_failed"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the driver works out once for all workers and restarts."""

    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    vocab_size: int
    unigram_accuracy: float
    """Masked-token accuracy of always guessing the most frequent token."""
    unigram_entropy: float
    """Loss of a model that knows the tokens' frequencies and nothing else, in nats."""
    flops_per_image: float
    fingerprints: Mapping[str, Any]
    launched_at: float
    """Seconds since the epoch."""
    tracking_uri: str = ""
    mlflow_run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run has to say."""

    run_uri: str
    weights_uri: str
    mlflow_run_id: str
    steps: int
    resumed_from: int
    """Steps that were done before this call; equal to `steps` if there was nothing left to do."""
    loss: float
    """Of the last logging period, as all figures here."""
    mim_accuracy: float
    unigram_accuracy: float
    images_per_second: float
    data_wait_share: float
    mfu: float
    report: Mapping[str, Any]
    """report.json."""

    def summary(self) -> str:
        """One line for a person."""
        books = self.report["goodput"]
        done = "were done already" if self.resumed_from == self.steps else "done"
        return (
            f"pretrain: {self.steps} steps {done}; loss {self.loss:.3f}, masked-token accuracy "
            f"{self.mim_accuracy:.3f} (floor {self.unigram_accuracy:.3f}), "
            f"{self.images_per_second:.0f} images/s, {self.data_wait_share:.0%} data wait, "
            f"MFU {self.mfu:.1%}; look first at {books['bottleneck']}; run: {self.run_uri}"
        )


TrainLoop = Callable[..., None]


def launch(config: PretrainConfig, train_loop: TrainLoop) -> Result:
    """Checks everything that can be checked, runs `train_loop`, and reports.

    Raises:
        InputError: a value, table or fingerprint does not fit; names it.
        StageFailed: a health check stopped the run, or the workers failed too often.
    """
    launched_at = time.time()
    config = _absolute(config)
    run = open_run(config)
    data = train_data.open_tables(config)
    plan = make_plan(config, data, launched_at)
    check_workers(config)
    check_tokenizer(config, data)
    check_probe(config)
    record = run.prepare(config, plan.fingerprints)
    before = max(checkpoint.complete_steps(run.checkpoints), default=0)
    finished = _finished_report(run)
    if before == plan.total_steps and finished is not None:
        return _result(run, plan, record["mlflow_run_id"], before, finished)
    with tracking.start_run(
        config.tracking,
        stage="pretrain",
        params=flatten(to_dict(config)),
        tags={"beit.run_dir": run.uri},
        inputs=_inputs(config, data),
        resume_run_id=record["mlflow_run_id"] or None,
        system_metrics=False,
    ) as tracked:
        run.set_run_id(record, tracked.run_id)
        plan = dataclasses.replace(
            plan, tracking_uri=tracked.tracking_uri, mlflow_run_id=tracked.run_id
        )
        try:
            with ProgressThread(run, total_steps=plan.total_steps, start_step=before):
                if config.scaling.worker_range[1] == 0:
                    train_loop(config, plan, in_ray=False)
                else:
                    _train_on_ray(config, plan, train_loop, run)
        finally:
            report = _report(run, plan)
            run.write_report(report)
        if report["outcome"] != "finished":
            raise StageFailed(
                report["message"] or f"the run did not finish; see {run.at('events')}"
            )
        result = _result(run, plan, tracked.run_id, before, report)
        tracked.log_artifact_file("report.json", storage.canonical_json(report))
        tracked.log_artifact_file("config.yaml", storage.read_bytes(run.at("config.yaml")))
        tracked.set_note(result.summary())
        identity = weights_fingerprint(run.weights)
        tracked.set_output(tracking.Dataset(name="weights", uri=run.weights, digest=identity))
        tracked.log_weights(run.weights, registered_model_name=config.tracking.registered_model)
    return result


def _absolute(config: PretrainConfig) -> PretrainConfig:
    # Workers may have another working directory than this process.
    def absolute(uri: str) -> str:
        return storage.absolute(uri) if uri else uri

    return dataclasses.replace(
        config,
        images=absolute(config.images),
        tokens=[absolute(uri) for uri in config.tokens],
        output=absolute(config.output),
        tokenizer=absolute(config.tokenizer),
        probe=dataclasses.replace(config.probe, images=absolute(config.probe.images)),
    )


def _finished_report(run: RunDir) -> dict[str, Any] | None:
    # A report is written however a launch ends; weights are the last thing a run makes.
    if not storage.exists(storage.join(run.weights, "config.json")):
        return None
    try:
        report: dict[str, Any] = storage.read_json(run.at("report.json"))
    except FileNotFoundError:
        return None
    return report if report["outcome"] == "finished" else None


def make_plan(config: PretrainConfig, data: TrainingTables, launched_at: float) -> Plan:
    """Everything that follows from configuration and tables.

    Raises:
        InputError: warm-up as long as the run, or a batch larger than the table.
    """
    order = train_data.make_order(config, data)
    total = config.optim.total_steps(order.steps_per_epoch)
    warmup = config.optim.total_warmup_steps(order.steps_per_epoch)
    if warmup >= total:
        raise InputError(
            f"optim.warmup_steps / warmup_epochs = {warmup} steps, but the run has {total}: "
            "shorten the warm-up (--optim.warmup_steps) or lengthen the run"
        )
    assert data.vocab_size is not None
    accuracy, entropy = unigram_floor(data)
    return Plan(
        total_steps=total,
        warmup_steps=warmup,
        steps_per_epoch=order.steps_per_epoch,
        vocab_size=data.vocab_size,
        unigram_accuracy=accuracy,
        unigram_entropy=entropy,
        flops_per_image=flops_per_image(
            dim=config.model.dim,
            depth=config.model.depth,
            mlp_ratio=config.model.mlp_ratio,
            num_patches=config.model.num_patches,
            patch_size=config.model.patch_size,
            vocab_size=data.vocab_size,
            num_masked=config.masking.num_masked,
        ),
        fingerprints={**data.fingerprints(), "order": storage.fingerprint(order.to_dict())},
        launched_at=launched_at,
    )


def unigram_floor(data: TrainingTables) -> tuple[float, float]:
    """Largest frequency and entropy (nats) of the tokens, from slices spread over the table."""
    table, counts = data.tokens[0], np.zeros(65536, np.int64)
    slice_rows = max(1, min(FLOOR_ROWS, table.num_rows) // FLOOR_SLICES)
    for start in np.linspace(0, table.num_rows - slice_rows, FLOOR_SLICES).astype(int).tolist():
        _, token_ids = table.read_rows(start, start + slice_rows)
        counts += np.bincount(token_ids.ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(share.max()), float(-(share * np.log(share)).sum())


def _inputs(config: PretrainConfig, data: TrainingTables) -> list[tracking.Dataset]:
    prints = data.fingerprints()
    inputs = [
        tracking.Dataset(
            name="image_table",
            uri=data.images.uri,
            digest=data.images.fingerprint,
            context="training",
        )
    ]
    inputs += [
        tracking.Dataset(
            name="token_table", uri=table.uri, digest=table.fingerprint, context="training"
        )
        for table in data.tokens
    ]
    return [
        *inputs,
        tracking.Dataset(name="tokenizer", uri=config.tokenizer, digest=str(prints["tokenizer"])),
    ]


def _train_on_ray(config: PretrainConfig, plan: Plan, train_loop: TrainLoop, run: RunDir) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scaling = config.scaling
    low, high = scaling.worker_range
    _say_if_too_small(config)
    filesystem, path = storage.resolve(run.at("ray"))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "plan": plan, "train_loop": train_loop},
        torch_config=TorchConfig(
            backend="nccl" if scaling.use_gpu and _has_cuda() else "gloo", timeout_s=300
        ),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=scaling.use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker,
                **({"GPU": 1} if scaling.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            # A fresh name each time: what Ray remembers of earlier launches is not used, and a
            # half-written record of it cannot stand in the way.
            name=f"launch_{plan.launched_at:.3f}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        raise StageFailed(
            f"the workers failed more than scaling.max_failures = {scaling.max_failures} times; "
            f"the last time: {last}. Events: {run.at('events')}"
        ) from error
    finally:
        storage.delete_prefix(run.at("ray"))


def _worker(job: Mapping[str, Any]) -> None:
    try:
        job["train_loop"](job["config"], job["plan"], in_ray=True)
    except Exception as error:
        from ray.train import get_context

        rank = get_context().get_world_rank()
        # Bad input stays bad: the next start reads this and gives up, see `pretrain.hopeless`.
        open_run(job["config"]).event(
            WORKER_FAILED,
            rank=rank,
            final=isinstance(error, InputError),
            message=f"worker {rank}: {type(error).__name__}: {error}",
            traceback=traceback.format_exc()[-4000:],
        )
        raise


def _has_cuda() -> bool:
    # The driver may run on a node without GPU: then what the cluster counts must be believed.
    import ray
    import torch

    return torch.version.cuda is not None and ray.cluster_resources().get("GPU", 0) > 0


def _say_if_too_small(config: PretrainConfig) -> None:
    import ray

    need = config.scaling.worker_range[0] * config.scaling.cpus_per_worker
    have = ray.cluster_resources().get("CPU", 0)
    if need > have:
        print(
            f"pretrain: {need} CPUs are needed (scaling.num_workers x scaling.cpus_per_worker), "
            f"the cluster has {have:.0f}; waiting for more nodes",
            file=sys.stderr,
        )


def _report(run: RunDir, plan: Plan) -> dict[str, Any]:
    attempts = run.attempts()
    events = run.events()
    last = attempts[-1] if attempts else None
    counts: dict[str, int] = {}
    for event in events:
        counts[event["event"]] = counts.get(event["event"], 0) + 1
    return {
        "outcome": last.outcome if last else "",
        "message": last.message if last else "",
        "steps": last.next_step if last else 0,
        "total_steps": plan.total_steps,
        "goodput": account(attempts, time.time()).to_dict(),
        "events": counts,
        "flops_per_image": plan.flops_per_image,
        "unigram_accuracy": plan.unigram_accuracy,
        "unigram_entropy": plan.unigram_entropy,
        "last_period": _last_period(run),
    }


def _last_period(run: RunDir) -> dict[str, Any]:
    try:
        lines = storage.read_bytes(run.at("metrics.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return {}
    if not lines:
        return {}
    period: dict[str, Any] = json.loads(lines[-1])
    return {name: value for name, value in period.items() if not isinstance(value, list)}


def _result(run: RunDir, plan: Plan, run_id: str, before: int, report: Mapping[str, Any]) -> Result:
    period = report["last_period"]

    def figure(name: str) -> float:
        value = period.get(name)
        return math.nan if value is None else float(value)

    return Result(
        run_uri=run.uri,
        weights_uri=run.weights,
        mlflow_run_id=run_id,
        steps=report["steps"],
        resumed_from=before,
        loss=figure("loss"),
        mim_accuracy=figure("mim_accuracy"),
        unigram_accuracy=plan.unigram_accuracy,
        images_per_second=figure("images_per_second"),
        data_wait_share=figure("data_wait_share"),
        mfu=figure("mfu"),
        report=report,
    )
