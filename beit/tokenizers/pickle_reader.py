"""Reads the pickle inside a PyTorch file: names become stand-ins, nothing is imported or called.

Python's unpickler gets every class and function from `find_class`. Here that answers with stand-ins
that only collect, for the names that files of tensors use, and refuses all others. What may be in
the pickle is checked first, so that its reading takes time in proportion to its length.

`torch.load(weights_only=True)` is not enough for files of strangers. It cannot read whole networks
saved by torch before 1.6 (they carry their source) nor pickle protocols above 3, it does not check
the CRCs of a zip file, and nested tuples of 126 bytes keep it busy for 40 seconds, of 150 for ever.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# What torch.save writes.
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "ADDITEMS",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL",
    "STACK_GLOBAL", "BINPERSID", "NEWOBJ", "REDUCE", "BUILD",
))  # fmt: skip
MAX_OPCODES = 2_000_000
MAX_TUPLES_AND_LONGS = 10_000
MAX_NETWORKS = 10_000
MAX_DEPTH = 64
MAX_NAME = 100


class UnsafePickleError(ValueError):
    """The file holds something that a file of tensors has no use for, or is damaged."""


class Record:
    """An instance of a known network class: its attributes as the pickle lists them."""

    state: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or any(not isinstance(name, str) for name in state):
            raise UnsafePickleError("malformed pickle: attributes of a network without names")
        self.state = state


class StoredTensor:
    """A tensor of the file; a class of its own, because pickles may set the state of `Tensor`."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("malformed pickle: state for a tensor")


class _Dictionary(dict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        """Attributes of an OrderedDict: the versions in a state dict's metadata."""


class _Function:
    """Stands for a function whose meaning is known."""

    __slots__ = ("meaning",)

    def __init__(self, meaning: Callable[..., Any]) -> None:
        self.meaning = meaning

    def __call__(self, *arguments: Any) -> Any:
        return self.meaning(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("malformed pickle: state for a function")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, StoredTensor):
        raise UnsafePickleError("a tensor without storage")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise UnsafePickleError("a tensor with sizes that are no counts")
    # A stride of zero makes much of little, within the bounds that torch checks.
    if math.prod(size) > storage.value.numel():
        raise UnsafePickleError("a tensor with more elements than its storage")
    return StoredTensor(storage.value.as_strided(size, stride, offset))


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise UnsafePickleError("a parameter without tensor")
    return tensor


# Values that no tensor depends on: a device, a shape, the names of buffers that are not saved.
_unused = _Function(lambda *_: None)
STAND_INS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch.nn.parameter", "Parameter"): _Function(_rebuild_parameter),
    ("collections", "OrderedDict"): _Dictionary,
    ("torch", "device"): _unused,
    ("torch", "Size"): _unused,
    ("builtins", "set"): _unused,
    ("__builtin__", "set"): _unused,
    # Typed storages, as torch.save names them.
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    # The options of a training save, which are looked at by nobody.
    ("argparse", "Namespace"): Record,
    # Networks: the classes of OpenAI's dall_e package (and of the copy in unilm) and the torch
    # modules that they are made of.
    ("dall_e.encoder", "Encoder"): Record,
    ("dall_e.encoder", "EncoderBlock"): Record,
    ("dall_e.decoder", "Decoder"): Record,
    ("dall_e.decoder", "DecoderBlock"): Record,
    ("dall_e.utils", "Conv2d"): Record,
    ("torch.nn.modules.container", "Sequential"): Record,
    ("torch.nn.modules.activation", "ReLU"): Record,
    ("torch.nn.modules.pooling", "MaxPool2d"): Record,
    ("torch.nn.modules.linear", "Identity"): Record,
    ("torch.nn.modules.upsampling", "Upsample"): Record,
}
PersistentLoad = Callable[[Any], Any]


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, persistent_load: PersistentLoad | None) -> None:
        super().__init__(io.BytesIO(pickled))
        self._persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise UnsafePickleError(
                f"the pickle names {f'{module}.{name}'[:100]}: refused, because only tensors and "
                "the classes of dall_e's networks are read"
            )
        return STAND_INS[module, name]

    def persistent_load(self, reference: Any) -> Any:
        if self._persistent_load is None:
            raise UnsafePickleError("a reference to a storage is not expected here")
        return self._persistent_load(reference)


def read_pickle(stream: io.BytesIO, persistent_load: PersistentLoad | None = None) -> Any:
    """The value that the pickle at the stream's position describes; the stream ends behind it.

    Args:
        stream: in memory; whatever follows the pickle is not looked at.
        persistent_load: resolves persistent ids (torch's references to storages).

    Raises:
        UnsafePickleError: naming the opcode or global that is refused.
    """
    start = stream.tell()
    try:
        length = _checked_length(stream)
        stream.seek(start)
        return _Unpickler(stream.read(length), persistent_load).load()
    except UnsafePickleError:
        raise
    # What Python and torch say to values of a wrong kind. None of it prints the value.
    except (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise UnsafePickleError(f"malformed pickle: {type(error).__name__}: {error}") from error


def _checked_length(stream: io.BytesIO) -> int:
    """Bytes of the pickle from here to its STOP, if it can be read in time and memory.

    Tuples are hashed with all that they hold, and forty of them, each twice in the next, are a tree
    of 2^40: so none may be used twice. Their number bounds how deep they are, which C code follows
    on its stack. Integers of more than 32 bits can be chosen to collide.
    """
    start = stream.tell()
    is_tuple: dict[Any, bool] = {}
    on_top, costly = False, 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name not in OPCODES:
            raise UnsafePickleError(
                f"opcode {name} at byte {position} is refused: torch.save does not write it"
            )
        if name == "STOP":
            return stream.tell() - start
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = len(is_tuple) if argument is None else argument
            if slot > count:
                raise UnsafePickleError("malformed pickle: a memo larger than the pickle")
            is_tuple[slot] = on_top
            continue
        if name in ("BINGET", "LONG_BINGET") and is_tuple.get(argument, False):
            raise UnsafePickleError("a tuple that is used twice: torch.save does not write it")
        # BUILD may leave any value on top as it was.
        on_top = name.startswith("TUPLE") or name == "BUILD"
        costly += name.startswith(("TUPLE", "LONG1"))
        if count > MAX_OPCODES or costly > MAX_TUPLES_AND_LONGS:
            raise UnsafePickleError(f"{count} opcodes, {costly} of them tuples: no file of weights")
    raise UnsafePickleError("malformed pickle: no STOP")


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The state dict of an unpickled network or (nested) dictionary; tensors may share memory.

    Raises:
        UnsafePickleError: no tensors, or a structure that no network has.
    """
    found: dict[str, Tensor] = {}
    if isinstance(value, dict):
        for wrapper in ("state_dict", "model"):
            if isinstance(value.get(wrapper), dict):
                value = value[wrapper]
        found = {k: v.value for k, v in value.items() if isinstance(v, StoredTensor)}
        if not found or any(not isinstance(name, str) for name in found):
            raise UnsafePickleError("the file holds no named tensors")
        return found
    if not isinstance(value, Record):
        raise UnsafePickleError(
            f"the file holds a {type(value).__name__}, neither a network nor tensors by name"
        )
    # Depth first; a network may occur in several places, and in itself if somebody is malicious.
    waiting, count = [("", value, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_NETWORKS:
            raise UnsafePickleError("networks nested too deeply, or too many")
        for group in ("_parameters", "_buffers"):
            for name, tensor in _entries(module, group, StoredTensor).items():
                found[prefix + name] = tensor.value
        children = _entries(module, "_modules", Record)
        waiting += [(f"{prefix}{name}.", c, depth + 1) for name, c in reversed(children.items())]
    return found


def _entries(module: Record, group: str, kind: type) -> dict[str, Any]:
    """The entries of one kind by name, without those that are None."""
    entries = module.state.get(group, {})
    if not isinstance(entries, dict) or any(not isinstance(name, str) for name in entries):
        raise UnsafePickleError(f"{group} of a network is no dictionary by name")
    if any(len(name) > MAX_NAME for name in entries):
        raise UnsafePickleError(f"a name of more than {MAX_NAME} characters in {group}")
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    if any(not isinstance(entry, kind) for entry in entries.values()):
        raise UnsafePickleError(f"{group} of a network holds something that is no {kind.__name__}")
    return entries
