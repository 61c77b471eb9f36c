"""A tokenizer's scorecard in pictures: through the codebook and back, what codes are, their use."""

from PIL import Image

from pipelines import painting, pictures
from pipelines.scorecard import NUM_EXAMPLES, Nearest, Scorecard


def scorecard_pictures(card: Scorecard) -> dict[str, Image.Image]:
    """Pictures by the names under which they are logged."""
    note = painting.DECODED if card.nearest is None else painting.PATCHED
    drawn = {
        "tokenizer": pictures.tokenizer_grid(card.images, card.reconstructions, note=note),
        "codebook_usage": pictures.codebook_usage(card.counts),
    }
    if card.nearest is not None:
        drawn["codes"] = _codes(card.nearest, card)
    return drawn


def _codes(nearest: Nearest, card: Scorecard) -> Image.Image:
    labels = []
    for code in nearest.codes.tolist():
        share = 100 * float(card.counts[code]) / card.tokens.num_tokens
        labels += [f"{code}: {share:.2g} %", *[""] * (NUM_EXAMPLES - 1)]
    return pictures.contact_sheet(
        nearest.examples.flatten(0, 1).numpy(),
        labels=labels,
        columns=NUM_EXAMPLES,
        title="Codes: the image patches nearest to them",
        note="a row is a code, with its share of all tokens; from the most frequent to the rarest",
    )
