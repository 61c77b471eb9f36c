"""Compares networks with timm's in a process of its own; run by test_timm.py.

timm wants torchvision, whose wheels are built for CUDA: beside a CPU build of torch its own
operators are absent, and their schemas must be there for its import to pass. transformers would
import torchvision too, wherever it is visible. Hence a process apart, with both on its own path.

Arguments: folders written by `beit.foreign.write_timm`. Output: JSON, one entry a folder.
"""

import json
import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for _module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_module]
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

from beit.foreign import load_network
from beit.mim import BeitMIM


def compare(folder: str) -> dict:
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_network(folder).eval()
    pixels = torch.randn(2, 3, *ours.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if isinstance(ours, BeitMIM):
            expected, found = ours.features(pixels), theirs.forward_features(pixels)
        else:
            expected, found = ours(pixels), theirs(pixels)
    return {
        "shape": list(found.shape),
        "difference": (found - expected).abs().max().item(),
        "size": expected.abs().mean().item(),
        "names_equal": set(theirs.state_dict()) == set(timm_names(ours)),
        "mean": list(theirs.pretrained_cfg["mean"]),
    }


def timm_names(model) -> list[str]:
    from beit.convert import to_timm

    return list(to_timm(model)[0])


if __name__ == "__main__":
    print(json.dumps([compare(folder) for folder in sys.argv[1:]]))
