"""A stand-in for OpenAI's dall_e package, to write files in the format of its published weights.

Own definitions with the class names, attributes and key layout of openai/DALL-E at 5be4b23, made
importable under the same module names for as long as a test saves them.
"""

import importlib
import sys
from contextlib import contextmanager

UTILS = """
import math
import torch
from torch import nn
from torch.nn import functional as F

class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw, use_float16=True, device=None, requires_grad=False):
        super().__init__()
        self.n_in, self.n_out, self.kw = n_in, n_out, kw
        self.use_float16, self.device, self.requires_grad = use_float16, device, requires_grad
        w = torch.empty((n_out, n_in, kw, kw)).normal_(std=1 / math.sqrt(n_in * kw ** 2))
        self.w = nn.Parameter(w, requires_grad=requires_grad)
        self.b = nn.Parameter(torch.randn(n_out) * 0.1, requires_grad=requires_grad)

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)
"""
BLOCK = """
from collections import OrderedDict
import torch
from torch import nn
from dall_e.utils import Conv2d

class {name}Block(nn.Module):
    def __init__(self, n_in, n_out, n_layers):
        super().__init__()
        self.n_in, self.n_out, self.n_layers = n_in, n_out, n_layers
        self.device, self.requires_grad = torch.device("cpu"), False
        self.n_hid = n_out // 4
        self.post_gain = 1 / n_layers ** 2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = [n_in, self.n_hid, self.n_hid, self.n_hid, n_out]
        layers = []
        for i, kw in enumerate({kernels}, start=1):
            layers.append((f"relu_{{i}}", nn.ReLU()))
            layers.append((f"conv_{{i}}", Conv2d(sizes[i - 1], sizes[i], kw)))
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)
"""
ENCODER = (
    BLOCK.format(name="Encoder", kernels="(3, 3, 3, 1)")
    + """
class Encoder(nn.Module):
    group_count = 4

    def __init__(self, n_hid=256, n_blk_per_group=2, vocab_size=8192):
        super().__init__()
        self.n_hid, self.n_blk_per_group, self.vocab_size = n_hid, n_blk_per_group, vocab_size
        self.input_channels, self.use_mixed_precision = 3, True
        self.device = torch.device("cpu")
        n_layers = 4 * n_blk_per_group
        layers = [("input", Conv2d(3, n_hid, 7))]
        sizes = [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        for g in range(1, 5):
            group = [
                (f"block_{i + 1}", EncoderBlock(sizes[g - (i == 0)], sizes[g], n_layers))
                for i in range(n_blk_per_group)
            ]
            if g < 4:
                group.append(("pool", nn.MaxPool2d(kernel_size=2)))
            layers.append((f"group_{g}", nn.Sequential(OrderedDict(group))))
        out = [("relu", nn.ReLU()), ("conv", Conv2d(8 * n_hid, vocab_size, 1, use_float16=False))]
        layers.append(("output", nn.Sequential(OrderedDict(out))))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.blocks(x)
"""
)
DECODER = (
    BLOCK.format(name="Decoder", kernels="(1, 3, 3, 3)")
    + """
class Decoder(nn.Module):
    group_count = 4

    def __init__(self, n_init=128, n_hid=256, n_blk_per_group=2, vocab_size=8192):
        super().__init__()
        self.n_init, self.n_hid, self.n_blk_per_group = n_init, n_hid, n_blk_per_group
        self.vocab_size, self.output_channels = vocab_size, 3
        n_layers = 4 * n_blk_per_group
        layers = [("input", Conv2d(vocab_size, n_init, 1, use_float16=False))]
        sizes = [n_init, 8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid]
        for g in range(1, 5):
            group = [
                (f"block_{i + 1}", DecoderBlock(sizes[g - (i == 0)], sizes[g], n_layers))
                for i in range(n_blk_per_group)
            ]
            if g < 4:
                group.append(("upsample", nn.Upsample(scale_factor=2, mode="nearest")))
            layers.append((f"group_{g}", nn.Sequential(OrderedDict(group))))
        out = [("relu", nn.ReLU()), ("conv", Conv2d(n_hid, 6, 1))]
        layers.append(("output", nn.Sequential(OrderedDict(out))))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.blocks(x)
"""
)


@contextmanager
def dall_e(directory):
    """Makes dall_e.encoder, dall_e.decoder and dall_e.utils importable; yields the first two."""
    package = directory / "dall_e"
    package.mkdir(exist_ok=True)
    for name, text in {
        "__init__": "", "utils": UTILS, "encoder": ENCODER, "decoder": DECODER,
    }.items():  # fmt: skip
        (package / f"{name}.py").write_text(text)
    sys.path.insert(0, str(directory))
    try:
        yield (
            importlib.import_module("dall_e.encoder").Encoder,
            importlib.import_module("dall_e.decoder").Decoder,
        )
    finally:
        sys.path.remove(str(directory))
        for name in [name for name in sys.modules if name.partition(".")[0] == "dall_e"]:
            del sys.modules[name]
