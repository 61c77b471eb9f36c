"""What a pretraining run can be refused for before it starts, rather than days later."""

from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError
from pipelines.reading.ingest import TrainingTables
from pipelines.tables import tokenizer_store
from pipelines.training.data import largest_divisor
from pipelines.training.probing import probe_rows


def check_workers(config: PretrainConfig) -> None:
    """A fixed number of workers must divide the canonical shards.

    Raises:
        InputError: it does not.
    """
    low, high = config.scaling.worker_range
    if low == high > 0 and config.data.num_shards % high:
        raise InputError(
            f"scaling.num_workers = {high} does not divide data.num_shards = "
            f"{config.data.num_shards}: choose "
            f"{largest_divisor(config.data.num_shards, high)} workers, or start a new "
            "run with another data.num_shards"
        )


def check_tokenizer(config: PretrainConfig, data: TrainingTables) -> None:
    """Pictures must be drawn by the tokenizer of the tokens.

    Raises:
        InputError: it is another one, or none.
    """
    if not config.tokenizer:
        return
    manifest = tokenizer_store.read_manifest(config.tokenizer)
    found = (
        manifest["fingerprint"]
        if manifest is not None
        else tokenizer_store.load(config.tokenizer).fingerprint()
    )
    wanted = data.fingerprints()["tokenizer"]
    if found != wanted:
        raise InputError(
            f"tokenizer = {config.tokenizer!r}: its fingerprint is {found}, the token tables were "
            f"made by {wanted}; name that one, or leave it empty"
        )


def check_probe(config: PretrainConfig) -> None:
    """The probe must not fail days later.

    Raises:
        InputError: no such table or block, no labels, or too few groups to hold some out.
    """
    if not config.probe.images:
        return
    if config.probe.layer is not None and config.probe.layer > config.model.depth:
        raise InputError(
            f"probe.layer = {config.probe.layer}: the network has {config.model.depth} blocks"
        )
    _, rows, _, held_out = probe_rows(config.probe.images, config.probe.max_images)
    if not len(rows) or held_out.all() or not held_out.any():
        raise InputError(
            f"probe.images = {config.probe.images!r}: {len(rows)} labelled images, "
            f"{int(held_out.sum())} of them held out; give a labelled table with more groups, or "
            "leave it empty"
        )
