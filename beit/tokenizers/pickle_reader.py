"""Reads the pickle inside a PyTorch file without executing it.

Python's unpickler imports modules and calls what it finds. This one is a small interpreter of the
opcodes that torch.save writes: it builds numbers, texts, containers and inert records, and it has
no operation that imports or calls anything. A name outside a short list, an opcode outside of
torch.save's and any value that does not fit raise `UnsafePickleError`; nothing else can happen.
"""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from beit.tokenizers.stored_tensor import STORAGE_TYPES, StoredTensor

# Networks that may appear as inert records: the classes of OpenAI's dall_e package (and of the
# copy in unilm) and the torch modules they are made of.
MODULES = frozenset(
    {
        ("dall_e.encoder", "Encoder"),
        ("dall_e.encoder", "EncoderBlock"),
        ("dall_e.decoder", "Decoder"),
        ("dall_e.decoder", "DecoderBlock"),
        ("dall_e.utils", "Conv2d"),
        ("torch.nn.modules.container", "Sequential"),
        ("torch.nn.modules.activation", "ReLU"),
        ("torch.nn.modules.pooling", "MaxPool2d"),
        ("torch.nn.modules.linear", "Identity"),
        ("torch.nn.modules.upsampling", "Upsample"),
    }
)
# Callables whose meaning is known; they are interpreted here, never called.
CALLABLES = frozenset(
    {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.nn.parameter", "Parameter"),
        ("collections", "OrderedDict"),
        ("torch", "device"),
        ("torch", "Size"),
        ("builtins", "set"),
        ("__builtin__", "set"),
    }
)
MAX_OPCODES = 2_000_000
MAX_DEPTH = 64


class UnsafePickleError(ValueError):
    """The pickle holds something that a file of tensors has no use for."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An instance of a known network class: its attributes as the pickle lists them."""

    kind: Name
    state: dict[str, Any] = field(default_factory=dict)


class _Mark:
    """Where a container's items begin on the stack."""


_MARK = _Mark()
PersistentLoad = Callable[[Any], Any]


def read_pickle(stream: BytesIO, persistent_load: PersistentLoad | None = None) -> Any:
    """The value that the pickle at the stream's position describes; the stream ends behind it.

    Args:
        stream: in memory; whatever follows the pickle is not looked at.
        persistent_load: resolves persistent ids (torch's references to storages).

    Raises:
        UnsafePickleError: naming the opcode or global that is refused.
    """
    try:
        return _Interpreter(persistent_load).run(stream)
    except UnsafePickleError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # pickletools complains of malformed opcodes with ValueError; the others are values of a
        # wrong kind in our own operations.
        raise UnsafePickleError(f"malformed pickle: {type(error).__name__}: {error}") from error


class _Interpreter:
    def __init__(self, persistent_load: PersistentLoad | None) -> None:
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BytesIO) -> Any:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise UnsafePickleError(f"more than {MAX_OPCODES} opcodes: no file of weights")
            if opcode.name == "STOP":
                (value,) = self.stack
                return value
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name not in _IGNORED:
                operation = _OPERATIONS.get(opcode.name)
                if operation is None:
                    raise UnsafePickleError(
                        f"opcode {opcode.name} at byte {position} is refused: torch.save does not "
                        "write it"
                    )
                operation(self, argument)
        raise UnsafePickleError("malformed pickle: no STOP")

    # Stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise UnsafePickleError("malformed pickle: unexpected mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise UnsafePickleError(
                f"malformed pickle: {kind.__name__} expected, {type(value).__name__} found"
            )
        return value

    # Operations, by what pickle calls them

    def mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def empty_dict(self, _: object) -> None:
        self.stack.append({})

    def empty_list(self, _: object) -> None:
        self.stack.append([])

    def empty_set(self, _: object) -> None:
        self.stack.append(set())

    def make_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def append(self, _: object) -> None:
        item = self.pop()
        self.top(list).append(item)

    def extend(self, _: object) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def add_items(self, _: object) -> None:
        items = self.pop_to_mark()
        self.top(set).update(_plain(items))

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict).update(zip(_plain([key]), [value], strict=True))

    def set_items(self, _: object) -> None:
        items = self.pop_to_mark()
        target = self.top(dict)
        if len(items) % 2:
            raise UnsafePickleError("malformed pickle: a key without value")
        target.update(zip(_plain(items[::2]), items[1::2], strict=True))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_known(Name(module, name)))

    def stack_name(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafePickleError("malformed pickle: a global without name")
        self.stack.append(_known(Name(module, name)))

    def persistent_id(self, _: object) -> None:
        if self.persistent_load is None:
            raise UnsafePickleError("a reference to a storage is not expected here")
        self.stack.append(self.persistent_load(self.pop()))

    def new_object(self, _: object) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or (kind.module, kind.name) not in MODULES:
            raise UnsafePickleError("an instance of something that is no known network is refused")
        if arguments != ():
            raise UnsafePickleError(f"{kind} with constructor arguments is refused")
        self.stack.append(Record(kind))

    def reduce(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise UnsafePickleError("malformed pickle: a call of something that has no name")
        self.stack.append(_interpret(function, arguments))

    def build(self, _: object) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, dict) and isinstance(state, dict):
            return  # attributes of an OrderedDict: the versions in a state dict's metadata
        if not isinstance(target, Record) or not isinstance(state, dict):
            raise UnsafePickleError(f"malformed pickle: state for a {type(target).__name__}")
        if any(not isinstance(name, str) for name in state):
            raise UnsafePickleError(f"malformed pickle: attributes of {target.kind} without names")
        target.state.update(state)


def _plain(values: Iterable[Any]) -> list[Any]:
    """The values if all are texts or numbers.

    Only such become keys: the hash or the text of a few nested, shared tuples takes for ever.
    """
    values = list(values)
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise UnsafePickleError(f"malformed pickle: {type(value).__name__} where text belongs")
    return values


def _known(name: Name) -> Name:
    key = (name.module, name.name)
    storage = name.module == "torch" and name.name in STORAGE_TYPES
    if key in MODULES or key in CALLABLES or storage:
        return name
    raise UnsafePickleError(
        f"the pickle names {str(name)[:100]}: refused, because only tensors and the classes of "
        "dall_e's networks are read"
    )


def _interpret(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What a call in the pickle stands for."""
    key = (function.module, function.name)
    if key == ("torch._utils", "_rebuild_tensor_v2"):
        storage, offset, size, stride, *_ = arguments
        if not isinstance(storage, StoredTensor):
            raise UnsafePickleError("a tensor without storage")
        try:
            return storage.view(offset, size, stride)
        except ValueError as error:
            raise UnsafePickleError(str(error)) from error
    if key in {("torch._utils", "_rebuild_parameter"), ("torch.nn.parameter", "Parameter")}:
        if not isinstance(arguments[0], StoredTensor):
            raise UnsafePickleError("a parameter without tensor")
        return arguments[0]
    if key == ("collections", "OrderedDict"):
        pairs = [(name, value) for name, value in (arguments[0] if arguments else ())]
        return dict(zip(_plain(name for name, _ in pairs), (v for _, v in pairs), strict=True))
    if key == ("torch", "device"):
        return _plain(arguments)[0]
    if key == ("torch", "Size"):
        return tuple(_plain(arguments[0]))
    if function.name == "set" and key in CALLABLES:
        return set(_plain(arguments[0] if arguments else ()))
    raise UnsafePickleError(f"a call of {function} is refused")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
)
_IGNORED = frozenset({"PROTO", "FRAME"})
_OPERATIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "MARK": _Interpreter.mark,
    "EMPTY_DICT": _Interpreter.empty_dict,
    "EMPTY_LIST": _Interpreter.empty_list,
    "EMPTY_SET": _Interpreter.empty_set,
    "TUPLE": _Interpreter.make_tuple,
    "TUPLE1": lambda self, _: self.tuple_of(1),
    "TUPLE2": lambda self, _: self.tuple_of(2),
    "TUPLE3": lambda self, _: self.tuple_of(3),
    "APPEND": _Interpreter.append,
    "APPENDS": _Interpreter.extend,
    "ADDITEMS": _Interpreter.add_items,
    "SETITEM": _Interpreter.set_item,
    "SETITEMS": _Interpreter.set_items,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "MEMOIZE": _Interpreter.memoize,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "GLOBAL": _Interpreter.name,
    "STACK_GLOBAL": _Interpreter.stack_name,
    "BINPERSID": _Interpreter.persistent_id,
    "NEWOBJ": _Interpreter.new_object,
    "REDUCE": _Interpreter.reduce,
    "BUILD": _Interpreter.build,
}


def tensors_of(value: Any) -> dict[str, StoredTensor]:
    """The state dict of an unpickled network or (nested) dictionary of tensors.

    Raises:
        UnsafePickleError: no tensors, or a structure that no network has.
    """
    if isinstance(value, dict):
        for wrapper in ("state_dict", "model"):
            if isinstance(value.get(wrapper), dict):
                value = value[wrapper]
        found = {k: v for k, v in value.items() if isinstance(v, StoredTensor)}
        if not found or any(not isinstance(name, str) for name in found):
            raise UnsafePickleError("the file holds no named tensors")
        return found
    if not isinstance(value, Record):
        raise UnsafePickleError(
            f"the file holds a {type(value).__name__}, neither a network nor tensors by name"
        )
    tensors: dict[str, StoredTensor] = {}
    _collect(value, "", 0, tensors)
    return tensors


def _collect(module: Record, prefix: str, depth: int, into: dict[str, StoredTensor]) -> None:
    if depth > MAX_DEPTH:
        raise UnsafePickleError("networks nested too deeply")
    for group in ("_parameters", "_buffers"):
        for name, tensor in _entries(module, group):
            if tensor is None:
                continue
            if not isinstance(tensor, StoredTensor):
                raise UnsafePickleError(f"{prefix}{name} in {group} is no tensor")
            into[prefix + name] = tensor
    for name, child in _entries(module, "_modules"):
        if child is None:
            continue
        if not isinstance(child, Record):
            raise UnsafePickleError(f"{prefix}{name} in _modules is no network")
        _collect(child, f"{prefix}{name}.", depth + 1, into)


def _entries(module: Record, group: str) -> list[tuple[str, Any]]:
    entries = module.state.get(group, {})
    if not isinstance(entries, dict) or any(not isinstance(name, str) for name in entries):
        raise UnsafePickleError(f"{group} of {module.kind} is no dictionary by name")
    return list(entries.items())
