"""Raw tensors of a PyTorch file: bounds-checked views of its storages."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Typed storages as torch.save names them.
STORAGE_TYPES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(eq=False)
class Storage:
    """One storage of the file; `data` may be filled in after the pickle was read."""

    key: str
    dtype: torch.dtype
    numel: int
    data: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A strided view of a storage, read when asked for."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, offset: Any, size: Any, stride: Any) -> "StoredTensor":
        """Another view of the same storage. Raises ValueError unless it lies inside."""
        numbers = (offset, *size, *stride)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a tensor with sizes that are no counts")
        if len(size) != len(stride):
            raise ValueError("a tensor with more sizes than strides, or fewer")
        # The last element; a tensor without elements touches none.
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        numel = math.prod(size)
        if numel and (last >= self.storage.numel or numel > self.storage.numel):
            raise ValueError(
                f"a tensor of size {tuple(size)} reaches beyond its storage of "
                f"{self.storage.numel} elements"
            )
        return StoredTensor(self.storage, offset, tuple(size), tuple(stride))

    def read(self) -> Tensor:
        """A copy with its own memory."""
        assert self.storage.data is not None
        if not self.storage.numel:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(bytearray(self.storage.data), dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset).clone()
