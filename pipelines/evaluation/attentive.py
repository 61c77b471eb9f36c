"""Attentive probe: a classifier that chooses which patches of a frozen network to look at.

One learned query for each head attends to the patches, whose values it sums up; a linear layer
classifies the sum: the probe of AIM (arXiv 2401.08541, section 3.3). A query and the projection of
keys that it meets are one vector here, for their product is all that counts.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import InputError
from pipelines.evaluation.extraction import Extraction
from pipelines.evaluation.features import Weights, patch_reader
from pipelines.evaluation.probes import Device
from pipelines.evaluation.protocol import Found, Split
from pipelines.progress import Progress

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
"""The best by validation rows is taken."""
WEIGHT_DECAY = 0.05
EPOCHS = 20
BATCH = 256
STEPS_OF_EPOCH = 50
"""Of few images batches are smaller, for so many steps an epoch, but not below 16."""


class AttentiveProbe(nn.Module):
    """Class logits (B, C) of patches (B, N, dim); initial values from `generator`."""

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        *,
        num_heads: int,
        num_classes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        dim = len(mean)
        self.mean, self.scale = mean, scale  # of each channel, over the patches to fit on

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(mean.device) / dim**0.5)

        self.queries = drawn(dim, num_heads)
        self.values = drawn(num_heads, dim, dim // num_heads)
        self.head = nn.Parameter(torch.zeros(dim, num_classes, device=mean.device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=mean.device))

    def forward(self, patches: Tensor) -> Tensor:
        x = (patches.float() - self.mean) / self.scale
        attention = (x @ self.queries).softmax(dim=1)  # (B, N, heads)
        seen = attention.transpose(1, 2) @ x  # (B, heads, dim)
        summed = torch.einsum("bhd,hde->bhe", seen, self.values).flatten(1)
        return summed @ self.head + self.bias


def attentive_found(
    images: Extraction,
    compared: Mapping[str, Weights],
    splits: Sequence[Split],
    chosen: Mapping[str, Sequence[int]],
) -> dict[str, Found]:
    """Probes of the patches after the block that was chosen in each split, by name of `compared`.

    Positions of blocks in what is found are those among the blocks chosen.

    Raises:
        InputError: images do not decode that did before.
    """
    layers = {name: sorted(set(chosen[name])) for name in compared}
    readers = {
        name: patch_reader(each.model, layers=layers[name], mean=each.mean, std=each.std)
        for name, each in compared.items()
    }
    networks = [each.model for each in compared.values()]
    known = set(images.damaged)
    patches = images.read(readers, networks, label="patches")
    if new := sorted(images.damaged.keys() - known):
        # The splits hold it, and the other probes were fitted on it.
        raise InputError(
            f"images: {len(new)} that decoded for the linear probe do not now, such as "
            f"{images.damaged[new[0]]}"
        )
    data, found = images.data, {}
    progress = Progress(len(compared) * len(splits), "attentive probes", "fits")
    for name, each in compared.items():
        positions = [layers[name].index(layer) for layer in chosen[name]]
        predicted = []
        for split, position in zip(splits, positions, strict=True):
            predicted.append(
                attentive_predict(
                    patches[name][position], data.labels, split.train, split.validation, split.test,
                    num_heads=each.model.num_heads, num_classes=len(data.class_names),
                    seed=images.config.seed, device=images.device,
                )
            )  # fmt: skip
            progress.update(progress.done + 1)
        found[name] = Found(
            predicted=np.concatenate(predicted),
            layers=positions,
            by_layer=np.zeros((len(splits), 0)),
        )
    progress.close()
    return found


def attentive_predict(
    patches: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    *,
    num_heads: int,
    num_classes: int,
    seed: int,
    device: Device = "cpu",
) -> np.ndarray:
    """Classes (len(test),) of test rows, by a probe that saw the others alone.

    Args:
        patches: (n, N, dim), also on disk: batches are read as they are needed.
        labels: (n,).
        train: rows that learning rates are compared on.
        validation: rows that they are compared by; the final probe is fitted on both.
        test: rows to classify.
        num_heads: of the attention, a divisor of dim.
        num_classes: number of classes.
        seed: initial values and order of rows follow from it.
        device: where it is computed.
    """

    def fitted(rows: np.ndarray, rate: float) -> AttentiveProbe:
        return _fit(
            patches, labels, rows, rate,
            num_heads=num_heads, num_classes=num_classes, seed=seed, device=device,
        )  # fmt: skip

    right = [
        (_predict(fitted(train, rate), patches, validation) == labels[validation]).mean()
        for rate in LEARNING_RATES
    ]
    best = LEARNING_RATES[int(np.argmax(right))]
    return _predict(fitted(np.concatenate([train, validation]), best), patches, test)


def _fit(
    patches: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    rate: float,
    *,
    num_heads: int,
    num_classes: int,
    seed: int,
    device: Device,
) -> AttentiveProbe:
    mean, scale = _statistics(patches, rows, device)
    probe = AttentiveProbe(
        mean, scale, num_heads=num_heads, num_classes=num_classes,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    batches = -(-len(rows) // min(BATCH, max(16, len(rows) // STEPS_OF_EPOCH)))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * batches)
    order = np.random.default_rng([seed, 3])
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for chosen in np.array_split(order.permutation(rows), batches):
                chosen.sort()  # read in the order of the file
                x = torch.from_numpy(patches[chosen]).to(device)
                truth = torch.from_numpy(labels[chosen]).to(device)
                loss = F.cross_entropy(probe(x), truth)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return probe


def _statistics(patches: np.ndarray, rows: np.ndarray, device: Device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dim,) of each channel."""
    dim = patches.shape[2]
    total, squares = (torch.zeros(dim, dtype=torch.float64, device=device) for _ in range(2))
    for x in _batches(patches, rows, device):
        wide = x.flatten(0, 1).double()
        total += wide.sum(0)
        squares += wide.square().sum(0)
    count = len(rows) * patches.shape[1]
    mean = total / count
    scale = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), (scale.clamp(min=1e-3 * float(scale.max())) + 1e-12).float()


@torch.no_grad()
def _predict(probe: AttentiveProbe, patches: np.ndarray, rows: np.ndarray) -> np.ndarray:
    found = [probe(x).argmax(1).cpu() for x in _batches(patches, rows, probe.mean.device)]
    return torch.cat(found).numpy() if found else np.zeros(0, np.int64)


def _batches(patches: np.ndarray, rows: np.ndarray, device: Device) -> Iterator[Tensor]:
    for start in range(0, len(rows), BATCH):
        yield torch.from_numpy(patches[rows[start : start + BATCH]]).to(device)
