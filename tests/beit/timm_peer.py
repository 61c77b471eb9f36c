"""Compares networks with timm's in a process of its own; run by test_timm.py.

timm wants torchvision, whose wheels are built for CUDA: beside a CPU build of torch its own
operators are absent, and their schemas must be there for its import to pass. transformers would
import torchvision too, wherever it is visible. Hence a process apart, with both on its own path.

Arguments: folders written by `beit.foreign.write_timm`, a classifier's last. Output: JSON, what the
networks differ in, and what fine-tuning's parts do.
"""

import itertools
import json
import sys
import types

import numpy as np
import torch
from PIL import Image

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for _module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_module]
    _SCHEMAS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

from beit import augment, mixing
from beit.classifier import Classification
from beit.foreign import load_network
from beit.mim import BeitMIM

FILL = (124, 116, 104)


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


class Fixed(torch.nn.Module):
    """A network with these logits, whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, pixels, *, noise=None):
        return self.logits


def compare_operations() -> list[str]:
    """Operations of RandAugment that do not equal timm's on a picture with structure."""
    from timm.data import auto_augment as theirs

    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((41, 37), Image.Resampling.BICUBIC))
    policy = theirs.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    )
    wrong = []
    for op, name in zip(policy.ops, augment.OPERATIONS, strict=True):
        for level, sign in itertools.product((0.0, 2.5, 9.0, 9.9), (-1, 1)):
            theirs._randomly_negate = lambda value, sign=sign: sign * value
            arguments = op.level_fn(level, op.hparams) if op.level_fn else ()
            expected = np.array(op.aug_fn(Image.fromarray(picture), *arguments, **dict(op.kwargs)))
            found = augment.apply_operations(picture, [(name, sign * level / 10)], FILL)
            if not np.array_equal(found, expected):
                wrong.append(f"{name} against {op.name} at {sign * level}")
    settings = {(op.prob, op.magnitude, op.magnitude_std) for op in policy.ops}
    if (policy.num_layers, settings) != (2, {(augment.OPERATION_PROBABILITY, 9, 0.5)}):
        wrong.append(f"settings: {policy.num_layers} of {settings}")
    return wrong


def compare_mixing() -> float:
    """Largest difference of pixels and loss over mixup, CutMix (also over an edge), neither."""
    from timm.data.mixup import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(6, 3, 20, 24, generator=generator)
    labels = torch.randint(5, (6,), generator=generator)
    logits = 3 * torch.randn(6, 5, generator=generator)
    ours = Classification(Fixed(logits), label_smoothing=0.1)
    pairs = torch.stack((labels, labels.flip(0)), dim=1)
    differences = []
    for share, centre in ((0.3, None), (0.37, (0.5, 0.5)), (0.2, (0.01, 0.9))):
        theirs = Mixup(1.0, 1.0, label_smoothing=0.1, num_classes=5)
        theirs._params_per_batch = lambda share=share, centre=centre: (share, centre is not None)
        mix = mixing.Mix(share=share)
        if centre is not None:
            mix = mixing.pasted(share, (20, 24), centre)
            places = iter(int(c * side) for c, side in zip(centre, (20, 24), strict=True))
            np.random.randint = lambda *_, size=None, places=places: next(places)
        expected, targets = theirs(pixels.clone(), labels)
        shares = torch.tensor([mix.share, 1 - mix.share]).repeat(6, 1)
        loss = ours(pixels, pairs, shares)[0] / 6
        differences.append((mixing.mixed(pixels, mix) - expected).abs().max())
        differences.append((loss - SoftTargetCrossEntropy()(logits, targets)).abs())
    plain = ours(pixels, pairs, torch.tensor([1.0, 0.0]).repeat(6, 1))[0] / 6
    differences.append((plain - LabelSmoothingCrossEntropy(0.1)(logits, labels)).abs())
    return max(difference.item() for difference in differences)


def compare_erasing() -> list[str]:
    """Boxes of random erasing that are not timm's for the same draws."""
    from timm.data import random_erasing

    wrong = []
    for draws in np.random.default_rng(5).random((50, 40)):
        left_over = iter(draws)

        def uniform(low, high, left_over=left_over):
            return low + next(left_over) * (high - low)

        random_erasing.random = types.SimpleNamespace(
            random=lambda: 0.0,
            uniform=uniform,
            randint=lambda low, high, left_over=left_over: int(next(left_over) * (high - low + 1)),
        )
        image = torch.full((3, 32, 32), 7.0)
        random_erasing.RandomErasing(0.25, mode="pixel", device="cpu")(image)
        found = augment._erased_box(draws, 32)
        expected = torch.full((32, 32), False)
        if found is not None:
            top, left, height, width = found
            expected[top : top + height, left : left + width] = True
        if not torch.equal((image != 7.0).all(dim=0), expected):
            wrong.append(str(found))
    return wrong


def compare_layer_decay(folder: str) -> dict:
    """Learning-rate scales by parameter: theirs and ours."""
    from timm.optim import param_groups_layer_decay

    from beit.optim import parameter_groups

    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    return {
        "theirs": {
            names[id(parameter)]: group["lr_scale"]
            for group in param_groups_layer_decay(theirs, layer_decay=0.65)
            for parameter in group["params"]
        },
        "ours": {
            name: group["lr_scale"]
            for group in parameter_groups(load_network(folder), 0.05, layer_decay=0.65)
            for name in group["names"]
        },
    }


if __name__ == "__main__":
    folders = sys.argv[1:]
    result = {
        "networks": [compare(folder) for folder in folders],
        "operations": compare_operations(),
        "mixing": compare_mixing(),
        "erasing": compare_erasing(),
        "layer_decay": compare_layer_decay(folders[-1]),
    }
    print(json.dumps(result))
