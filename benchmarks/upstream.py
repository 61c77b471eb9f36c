"""The transform of BEiT's pretraining code, as its loaders run it.

Torchvision's v1 transforms on Pillow images, in plain Pillow, for torchvision cannot be installed
beside a CPU build of torch: decode, jitter on the full image, flip, one crop, two resizes,
to float, normalise.
"""

import io
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


class Upstream:
    """The two-view transform of BEiT's pretraining, for one encoded image."""

    def __init__(self, seed: int = 0, *, jitter: bool = True) -> None:
        self.random = random.Random(seed)
        self.jitter = jitter
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __call__(self, data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised patch view (3, 224, 224) and mapped tokenizer view (3, 112, 112)."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if self.jitter:
            enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            self.random.shuffle(enhancers)
            for enhancer in enhancers:
                image = enhancer(image).enhance(self.random.uniform(0.6, 1.4))
        if self.random.random() < 0.5:
            image = ImageOps.mirror(image)
        crop = image.crop(self.box(image.width, image.height))
        patches = self.to_tensor(crop.resize((224, 224), Image.Resampling.BICUBIC))
        tokens = self.to_tensor(crop.resize((112, 112), Image.Resampling.LANCZOS))
        return (patches - self.mean) / self.std, 0.8 * tokens + 0.1

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * self.random.uniform(0.08, 1.0)
            aspect = math.exp(self.random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = self.random.randint(0, width - w), self.random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height

    @staticmethod
    def to_tensor(image: Image.Image) -> torch.Tensor:
        array = torch.from_numpy(np.array(image))
        return array.permute(2, 0, 1).contiguous().float().div(255)


class UpstreamFolder(torch.utils.data.Dataset):
    """Files of a folder through the upstream transform, for a torch DataLoader."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.transform = paths, Upstream()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.paths[index].read_bytes())
