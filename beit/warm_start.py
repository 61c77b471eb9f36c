"""Pretraining that begins with weights: which of them a network takes over."""

from torch import Tensor, nn

from beit.mae import MaeNetwork
from beit.mim import BeitMIM
from beit.weights import check_state

#: Where the names of a network's encoder begin, whatever is around it.
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "rel_pos_bias.", "blocks.")


def taken_over(network: nn.Module, weights: nn.Module, *, source: str) -> dict[str, Tensor]:
    """Tensors of `weights` that `network` begins with; what is not among them stays fresh.

    The whole encoder; and of what is around it (mask token, heads, aggregation head, decoder) all
    that is there in the same shape, if both are of one family: BEiT with or without v2's head, or
    MAE. ValueError naming every tensor in which the encoders differ; `source` is its subject.
    """
    theirs, ours = weights.state_dict(), network.state_dict()
    encoder = {name: value for name, value in theirs.items() if name.startswith(ENCODER)}
    wanted = {name: value for name, value in ours.items() if name.startswith(ENCODER)}
    check_state(encoder, wanted, source=source)
    families = (BeitMIM, MaeNetwork)
    if not any(isinstance(network, kin) and isinstance(weights, kin) for kin in families):
        return encoder
    return {n: v for n, v in theirs.items() if n in ours and v.shape == ours[n].shape}
