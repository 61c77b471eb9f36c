"""`import-tokenizer`: published weights of DALL-E, FLAVA's copy or VQ-KD to a tokenizer.

The published files are pickles, DALL-E's of whole networks: loading them the usual way runs
whatever code the file's author chose. `beit.tokenizers.pickle_reader` reads the tensors and
executes nothing; what is kept is safetensors, and the hashes of what was read.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from beit.tokenizers import ImageTokenizer
from beit.tokenizers.dalle_import import openai_layout, role_of, tokenizer_from
from beit.tokenizers.torch_file import read_tensors
from beit.tokenizers.vqkd_import import is_vqkd, vqkd_from
from pipelines import lease, storage
from pipelines.config.import_tokenizer import ImportTokenizerConfig
from pipelines.config.train_tokenizer import require_uris
from pipelines.errors import InputError
from pipelines.pictures.scorecards import scorecard_pictures
from pipelines.scorecard import Scorecard, score, scorecard_record
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tracking import Dataset, start_run
from pipelines.tracking.datasets import short_name

STAGE = "import-tokenizer"
VQKD = "vqkd"
_WITH_ARTICLE = {"encoder": "an encoder", "decoder": "a decoder", VQKD: "a VQ-KD tokenizer"}
DALLE_SIZE = 112


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that was read."""

    role: str
    """encoder or decoder of DALL-E, or vqkd."""
    uri: str
    format: str
    """zip or legacy (torch.save), or safetensors."""
    num_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.role}: {self.uri} ({self.format}, {self.num_bytes} B) sha256 {self.sha256}"


@dataclass(frozen=True, kw_only=True)
class ImportTokenizerResult:
    """A finished tokenizer."""

    output: str
    fingerprint: str
    vocab_size: int
    grid_size: tuple[int, int]
    files: tuple[SourceFile, ...]
    scorecard: dict[str, float] | None
    already_done: bool

    def summary(self) -> str:
        """What the command prints."""
        done = "already imported" if self.already_done else "imported"
        line = (
            f"tokenizer {done}: {self.vocab_size} codes on a grid of "
            f"{self.grid_size[0]} x {self.grid_size[1]}"
        )
        if self.scorecard is not None:
            line += (
                f", {self.scorecard['codes_used']:g} used, perplexity "
                f"{self.scorecard['perplexity']:.1f} on {self.scorecard['num_images']:g} images"
            )
        hashes = ", ".join(f"{file.role} sha256 {file.sha256}" for file in self.files)
        return f"{line}, {hashes}, fingerprint {self.fingerprint}, {self.output}"


def run(config: ImportTokenizerConfig) -> ImportTokenizerResult:
    """Converts the files, or says that it was done.

    Raises:
        InputError: a file that is missing, has another hash, is no DALL-E network or VQ-KD or holds
            anything but tensors and known class names; or an output that holds something else.
    """
    require_uris(source=config.source, output=config.output)
    output = storage.absolute(config.output)
    images = ImageTable.open(config.images) if config.images else None
    encoder_file, encoder = _read(config.source, "source", "encoder", config.source_sha256)
    files = [encoder_file]
    decoder = None
    if config.decoder:
        decoder_file, decoder = _read(config.decoder, "decoder", "decoder", config.decoder_sha256)
        files.append(decoder_file)
    try:
        if encoder_file.role == VQKD:
            tokenizer = _vqkd(encoder, config)
        else:
            size = config.image_size or DALLE_SIZE
            tokenizer = tokenizer_from(encoder, decoder, image_size=size)
    except ValueError as error:
        raise InputError(f"source = {config.source}: {error}") from error
    source = {
        "stage": STAGE,
        "files": [{**asdict(file), "uri": file.uri.rpartition("/")[2]} for file in files],
        "image_size": tokenizer.image_size,
    }
    if (manifest := _found(output, source)) is not None:
        lease.clear(output, config.lease, stage=STAGE)
        return _result(output, manifest, files, already_done=True)
    with lease.held(output, config.lease, stage=STAGE) as holder:
        # Who had the lease before may have finished it.
        already_done = (manifest := _found(output, source)) is not None
        if manifest is None:
            manifest = _keep(config, tokenizer, output, source, files, images, holder.fence)
        holder.done()
    return _result(output, manifest, files, already_done=already_done)


def _found(output: str, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that is there. Raises InputError if it is of another source."""
    manifest = tokenizer_store.read_manifest(output)
    if manifest is not None and manifest["source"] != source:
        raise InputError(
            f"output = {output}: holds another tokenizer ({manifest['source']}); give another "
            "directory"
        )
    if manifest is not None:
        tokenizer_store.check_files(output, manifest)
    return manifest


def _keep(
    config: ImportTokenizerConfig,
    tokenizer: ImageTokenizer,
    output: str,
    source: dict[str, Any],
    files: list[SourceFile],
    images: ImageTable | None,
    fence: lease.Fence,
) -> dict[str, Any]:
    """Scores and saves it; returns its manifest."""
    with start_run(
        config.tracking,
        stage=STAGE,
        params={name: v for name, v in asdict(config).items() if name not in ("lease", "tracking")},
        tags={f"beit.sha256.{file.role}": file.sha256 for file in files},
        inputs=[Dataset.of_table("image_table", images)] if images else [],
        output=output,
    ) as tracking:
        scorecard: Scorecard | None = None
        if images is not None:
            scorecard = score(tokenizer, images, num_images=config.num_images)
            print(scorecard.summary(), file=sys.stderr)
            tracking.log_metrics({f"scorecard/{k}": v for k, v in scorecard.metrics().items()})
            for name, picture in scorecard_pictures(scorecard, short_name(config.output)).items():
                tracking.log_image(name, picture)
        fence.check()
        manifest = tokenizer_store.save(
            tokenizer,
            output,
            source=source,
            scorecard=scorecard_record(scorecard) if scorecard else None,
            patches=scorecard.nearest.patches if scorecard and scorecard.nearest else None,
        )
        tracking.set_output(Dataset(name="tokenizer", uri=output, digest=manifest["fingerprint"]))
        result = _result(output, manifest, files, already_done=False)
        tracking.set_note(result.summary())
    return manifest


def _read(uri: str, field: str, role: str, sha256: str) -> tuple[SourceFile, dict[str, Tensor]]:
    if uri.startswith(("http://", "https://")):
        raise InputError(f"{field} = {uri}: web addresses are not opened; download the file first")
    try:
        data = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{field} = {uri}: no such file") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256.lower():
        raise InputError(
            f"{field} = {uri}: SHA-256 is {found}, {field}_sha256 demands {sha256.lower()}; the "
            "file is not the one that was meant"
        )
    try:
        raw, file_format = read_tensors(data)
        tensors = raw if is_vqkd(raw) else openai_layout(raw)
    except ValueError as error:
        raise InputError(f"{field} = {uri} (SHA-256 {found}): {error}") from error
    holds = VQKD if is_vqkd(raw) else role_of(tensors)
    if holds != role and (holds, role) != (VQKD, "encoder"):
        raise InputError(
            f"{field} = {uri}: it holds {_WITH_ARTICLE[holds]}, not {_WITH_ARTICLE[role]}"
        )
    role = holds
    file = SourceFile(role=role, uri=uri, format=file_format, num_bytes=len(data), sha256=found)
    print(file, file=sys.stderr)
    return file, tensors


def _vqkd(tensors: dict[str, Tensor], config: ImportTokenizerConfig) -> ImageTokenizer:
    if config.decoder:
        raise InputError(
            f"decoder = {config.decoder}: VQ-KD decodes to features, not to pictures; leave it out"
        )
    return vqkd_from(tensors, image_size=config.image_size)


def _result(
    output: str, manifest: dict[str, Any], files: list[SourceFile], *, already_done: bool
) -> ImportTokenizerResult:
    rows, columns = manifest["grid_size"]
    return ImportTokenizerResult(
        output=output,
        fingerprint=manifest["fingerprint"],
        vocab_size=manifest["vocab_size"],
        grid_size=(rows, columns),
        files=tuple(files),
        scorecard=manifest["scorecard"],
        already_done=already_done,
    )
