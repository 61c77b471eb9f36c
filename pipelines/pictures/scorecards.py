"""A tokenizer's scorecard in pictures: through the codebook and back, what codes are, their use."""

from PIL import Image

from pipelines import painting, pictures
from pipelines.scorecard import NUM_EXAMPLES, Nearest, Scorecard


def scorecard_pictures(card: Scorecard, where: str) -> dict[str, Image.Image]:
    """Pictures by the names under which they are logged; `where` names the tokenizer in titles."""
    note = painting.DECODED if card.nearest is None else painting.PATCHED
    drawn = {
        "tokenizer": pictures.tokenizer_grid(
            card.images,
            card.reconstructions,
            title=f"Pictures through the codebook · {where}",
            note=note,
        ),
        "codebook_usage": pictures.codebook_usage(card.counts, title=f"Codebook usage · {where}"),
    }
    if card.nearest is not None:
        drawn["codes"] = _codes(card.nearest, card, where)
    return drawn


def _codes(nearest: Nearest, card: Scorecard, where: str) -> Image.Image:
    labels = []
    for code in nearest.codes.tolist():
        share = 100 * float(card.counts[code]) / card.tokens.num_tokens
        labels += [f"{code}: {share:.2g} %", *[""] * (NUM_EXAMPLES - 1)]
    return pictures.contact_sheet(
        nearest.examples.flatten(0, 1).numpy(),
        labels=labels,
        columns=NUM_EXAMPLES,
        title=f"Codes: the image patches nearest to them · {where}",
        note="a row is a code, with its share of all tokens; from the most frequent to the rarest",
    )
