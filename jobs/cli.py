"""`beit STAGE ...`: one console script for every entrypoint of this package."""

import importlib
import sys
from collections.abc import Sequence

STAGES = {
    "quickstart": ("quickstart", "the whole chain on a small real sample, or on your own folder"),
    "prepare": ("prepare", "images (folder, WebDataset, Parquet) to an image table"),
    "train-tokenizer": ("train_tokenizer", "image table to a trained discrete VAE"),
    "import-tokenizer": ("import_tokenizer", "DALL-E or FLAVA weights to a tokenizer"),
    "tokenize": ("tokenize_images", "image table and tokenizer to a token table"),
    "pretrain": ("pretrain", "image table and token tables to a pretrained BEiT"),
    "evaluate": ("evaluate", "kNN and linear probe beside random initialisation and pixels"),
    "export": ("export", "a run's weights to Hugging Face, timm, unilm or ONNX"),
    "audit": ("audit", "re-reads and re-hashes a table; exit 1 names what is wrong"),
    "plan": ("plan", "what a tokenize or pretrain would cost; touches nothing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands over to the stage's entrypoint and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    stage, *rest = arguments
    if stage not in STAGES:
        print(f"error: unknown stage {stage!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"jobs.{STAGES[stage][0]}").main(rest)
    return code


def _usage() -> str:
    lines = [f"  {stage:<18}{purpose}" for stage, (_, purpose) in STAGES.items()]
    return "\n".join(
        [
            "usage: beit STAGE [--config RECIPE.yaml] [--dotted.field VALUE ...]",
            "",
            "BEiT pretraining on Ray. Stages, in the order they are run:",
            *lines,
            "",
            "`beit STAGE --help` lists a stage's fields; `--print_config` shows the effective",
            "configuration. BEIT_VERBOSE=1 shows Ray's own log.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
