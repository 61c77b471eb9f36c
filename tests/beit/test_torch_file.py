"""Reading PyTorch files without executing them: good files give their tensors, bad ones nothing."""

import builtins
import importlib
import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from beit.tokenizers import pickle_reader
from beit.tokenizers.pickle_reader import UnsafePickleError, read_pickle
from beit.tokenizers.torch_file import read_tensors
from tests.beit.dalle_package import dall_e


def saved(value, *, legacy=False, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy, **options)
    return buffer.getvalue()


@pytest.fixture(params=["zip", "legacy"])
def legacy(request):
    return request.param == "legacy"


# Good files


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_a_whole_pickled_network_gives_its_state_dict(tmp_path, legacy, role):
    with dall_e(tmp_path) as (Encoder, Decoder):
        torch.manual_seed(0)
        if role == "encoder":
            network = Encoder(n_hid=8, n_blk_per_group=2, vocab_size=32)
        else:
            network = Decoder(n_init=4, n_hid=8, vocab_size=32)
        data = saved(network, legacy=legacy)
        expected = network.state_dict()
    if legacy:
        assert b"class Encoder" in data or b"class Decoder" in data  # torch kept the source
    # The package is gone: nothing can be imported, and nothing has to be.
    assert "dall_e" not in sys.modules
    tensors, file_format = read_tensors(data)
    assert file_format == ("legacy" if legacy else "zip")
    assert list(tensors) == list(expected)
    assert len(tensors) == (74 if role == "encoder" else 76)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_state_dict(legacy, protocol):
    shared = torch.arange(12, dtype=torch.float32)
    state = OrderedDict(
        half=torch.randn(3, 2).half(),
        double=torch.randn(2, dtype=torch.float64),
        ids=torch.arange(4),
        flag=torch.tensor([True, False]),
        brain=torch.randn(5).bfloat16(),
        transposed=torch.arange(6).reshape(2, 3).T.float(),
        first=shared[:6].view(2, 3),
        second=shared[4:],
        empty=torch.empty(0, 3),
        scalar=torch.tensor(2.5),
    )
    for wrapped in (state, {"state_dict": state, "epoch": 3}, {"model": dict(state)}):
        tensors, _ = read_tensors(saved(wrapped, legacy=legacy, pickle_protocol=protocol))
        assert list(tensors) == list(state)
        for name, tensor in state.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    # Views of one storage come out as tensors of their own.
    tensors["first"][0] = -1
    assert torch.equal(tensors["second"], shared[4:])


def test_headers_of_safetensors_are_bounded():
    """Parsed, 90 MB of JSON are gigabytes."""
    data = struct.pack("<Q", 90_000_000) + b"{" + b" " * 89_999_998 + b"}"
    start = time.monotonic()
    with pytest.raises(UnsafePickleError, match="header of 90000000 bytes"):
        read_tensors(data)
    assert time.monotonic() - start < 2


def test_tensors_are_no_larger_than_their_file(legacy):
    shared = torch.zeros(1_000_000, dtype=torch.uint8)
    with pytest.raises(UnsafePickleError, match="tensors of 5000000 bytes in a file of"):
        read_tensors(saved({str(i): shared.view(-1) for i in range(5)}, legacy=legacy))


def test_a_network_with_metadata(legacy):
    network = nn.Sequential(OrderedDict(act=nn.ReLU(), pool=nn.MaxPool2d(2)))
    network.register_parameter("w", nn.Parameter(torch.randn(3), requires_grad=False))
    network.register_buffer("seen", torch.tensor(3))
    network.register_parameter("none", None)
    tensors, _ = read_tensors(saved(network, legacy=legacy))
    assert set(tensors) == {"w", "seen"}
    # The metadata of a state dict is an attribute of its OrderedDict.
    assert set(read_tensors(saved(network.state_dict(), legacy=legacy))[0]) == {"w", "seen"}


def test_safetensors():
    tensors, file_format = read_tensors(save_safetensors({"a": torch.ones(2)}))
    assert file_format == "safetensors"
    assert torch.equal(tensors["a"], torch.ones(2))


# Malicious pickles. Each would create the canary if anything of it were executed.

HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def slots(name):
    """State that sets an attribute of whatever it is given to."""
    return b"N}" + text(name) + b"Ns\x86"


def malicious(canary):
    """name -> (bytes of a pickle, words of the message)."""
    touch = f"open({canary!r}, 'w').close()"
    shell = f"touch {canary}"
    p2, p4 = b"\x80\x02", b"\x80\x04"
    evaluate = pickle.dumps(Call(eval, touch), 2)
    return {
        "os.system": (pickle.dumps(Call(os.system, shell), 2), "posix.system"),
        "os.system by name": (p2 + b"cos\nsystem\n" + text(shell) + b"\x85R.", "os.system"),
        "eval": (evaluate, "__builtin__.eval"),
        "exec, protocol 4": (pickle.dumps(Call(exec, touch), 4), "builtins.exec"),
        "stack global": (
            p4 + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R.",
            "os.system",
        ),
        "text protocol 0": (f"cos\nsystem\n(S'{shell}'\ntR.".encode(), "opcode STRING "),
        "inst": (p2 + f"(S'{shell}'\nios\nsystem\n.".encode(), "opcode STRING "),
        "inst, binary": (p2 + b"(" + text(shell) + b"ios\nsystem\n.", "opcode INST "),
        "obj": (p2 + b"(cos\nsystem\n" + text(shell) + b"o.", "opcode OBJ "),
        "obj of a known class": (
            p2 + b"(cdall_e.utils\nConv2d\n" + text("x") + b"o.",
            "opcode OBJ ",
        ),
        "extension registry": (p2 + b"\x82\x01.", "opcode EXT1 "),
        "newobj_ex": (
            p4 + text("torch.nn.modules.linear") + text("Identity") + b"\x93)}\x92.",
            "opcode NEWOBJ_EX ",
        ),
        "import": (
            p2 + b"cimportlib\nimport_module\n" + text("antigravity") + b"\x85R.",
            "importlib.import_module",
        ),
        "getattr": (p2 + b"c__builtin__\ngetattr\n)R.", "__builtin__.getattr"),
        "torch.load": (
            p2 + b"ctorch.serialization\nload\n" + text(canary) + b"\x85R.",
            "serialization.load",
        ),
        "torch.hub": (p2 + b"ctorch.hub\nload\n)R.", "torch.hub.load"),
        "dotted name": (
            p4 + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
            "__globals__",
        ),
        "another network": (p2 + b"ctorch.nn.modules.linear\nLinear\n)\x81.", "linear.Linear"),
        "a name with spaces": (p2 + b"ctorch system\nx\n)R.", "torch"),
        "call of a network": (
            p2 + b"cdall_e.utils\nConv2d\n" + text(shell) + b"\x85R.",
            "takes no arguments",
        ),
        "network with arguments": (
            p2 + b"cdall_e.utils\nConv2d\n" + text(shell) + b"\x85\x81.",
            "takes no arguments",
        ),
        "call of a text": (
            p2 + text("os.system") + text(shell) + b"\x85R.",
            "'str' object is not callable",
        ),
        "instance of a text": (p2 + text("os.system") + b")\x81.", "must be a type, not str"),
        "state for a text": (p2 + text("x") + b"}K\x01K\x02sb.", "'str' object has no attribute"),
        "state without names": (
            p2 + b"cdall_e.utils\nConv2d\n)\x81}K\x01K\x02sb.",
            "without names",
        ),
        "append to a record": (
            p2 + b"cdall_e.utils\nConv2d\n)\x81K\x01a.",
            "'Record' object has no attribute",
        ),
        "tensor of a text": (
            p2 + b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("x") + b"K\x00)))t" + b"R.",
            "without storage",
        ),
        "parameter of a text": (
            p2 + b"ctorch._utils\n_rebuild_parameter\n(" + text("x") + b"\x89)tR.",
            "without tensor",
        ),
        "storage reference out of place": (p2 + text("x") + b"Q.", "not expected here"),
        "state for a function": (
            p2 + b"ctorch._utils\n_rebuild_tensor_v2\n" + slots("__defaults__") + b"b.",
            "state for a function",
        ),
        "state for a class": (
            p2 + b"cdall_e.utils\nConv2d\n" + slots("__setstate__") + b"b.",
            "missing 1 required positional argument",
        ),
        "state for a dictionary's class": (
            p2 + b"ccollections\nOrderedDict\n" + slots("__setstate__") + b"b.",
            "missing 1 required positional argument",
        ),
        "state for a storage type": (
            p2 + b"ctorch\nFloatStorage\n" + slots("itemsize") + b"b.",
            "object attribute 'itemsize' is read-only|not writable",
        ),
        "text persistent id": (p2 + b"Psystem\n.", "opcode PERSID "),
        "memo index": (p2 + b"K\x01r\xff\xff\xff\xff.", "a memo larger than the pickle"),
        "missing memo": (p2 + b"h\x07.", "malformed"),
        "empty stack": (p2 + b"R.", "malformed"),
        "unbalanced mark": (p2 + b"(K\x01\x85(.", "malformed"),
        "no stop": (p2 + b"K\x01", "malformed|ended"),
        "unknown opcode": (p2 + b"\xff.", "malformed"),
        "cut off text": (p2 + b"X\xff\xff\xff\x7fabc", "malformed"),
        "nothing": (b"", "malformed"),
    }


NAMES = sorted(malicious("x"))


@pytest.mark.parametrize("name", NAMES)
def test_malicious_pickles_are_refused(tmp_path, name):
    """By themselves, as a whole file, and as the object inside either format of torch.save."""
    canary = tmp_path / "canary"
    payload, message = malicious(str(canary))[name]
    with pytest.raises(UnsafePickleError, match=message):
        read_pickle(io.BytesIO(payload))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", payload)
    for data in (
        archive.getvalue(),
        HEADER + SYSTEM + payload,
        payload,
        HEADER + payload,
        HEADER + SYSTEM + pickle.dumps({}, 2) + payload,
    ):
        with pytest.raises(UnsafePickleError):
            read_tensors(data)
    assert not canary.exists()
    assert len(NAMES) >= 12
    # It has not changed how the next file is read.
    good = {"a": torch.ones(2)}
    assert torch.equal(read_tensors(saved(good))[0]["a"], good["a"])


def test_the_corpus_would_work_on_a_real_unpickler(tmp_path):
    """The canary can sing: the refusals above are not for harmless files."""
    for name in ("os.system", "eval", "stack global", "text protocol 0", "inst, binary"):
        canary = tmp_path / name.replace(" ", "_")
        payload, _ = malicious(str(canary))[name]
        pickle.loads(payload)
        assert canary.exists(), name


def test_a_call_hidden_in_a_network(tmp_path, legacy):
    canary = tmp_path / "canary"
    network = nn.Sequential(nn.ReLU())
    network.register_parameter("w", nn.Parameter(torch.ones(2)))
    network.note = Call(os.system, f"touch {canary}")
    data = saved(network, legacy=legacy)
    with pytest.raises(UnsafePickleError, match=r"posix\.system"):
        read_tensors(data)
    assert not canary.exists()


@pytest.mark.parametrize("use", ["key", "member", "size", "device", "storage", "call", "again"])
def test_shared_nested_tuples_cost_nothing(use):
    """Hashing or printing forty doublings would take for ever."""
    bomb = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    # The same, but with something between the tuple and its place in the memo.
    again = bomb.replace(b"q", b"Nbq")
    pickles = {
        "key": b"}" + bomb + b"K\x01s.",
        "member": b"c__builtin__\nset\n]" + bomb + b"a\x85R.",
        "size": b"ctorch\nSize\n" + bomb + b"\x85R.",
        "device": b"ctorch\ndevice\n" + bomb + b"\x85R.",
        "storage": bomb + b"Q.",
        "call": bomb + b")R.",
        "again": b"}" + again + b"K\x01s.",
    }
    start = time.monotonic()
    with pytest.raises(UnsafePickleError):
        read_tensors(HEADER + SYSTEM + b"\x80\x02" + pickles[use])
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("depth", [1_000, 9_900, 1_000_000])
def test_deep_tuples_cost_nothing(depth):
    """Their hash is computed on C's stack."""
    pickled = b"\x80\x02})" + depth * b"\x85" + b"K\x01s."
    with pytest.raises(UnsafePickleError, match=r"no named tensors|of them tuples"):
        read_tensors(HEADER + SYSTEM + pickled + pickle.dumps([], 2))


def test_integers_that_collide_cost_nothing():
    keys = [pickle.dumps(i * (2**61 - 1), 2)[2:-1] for i in range(2**10, 100_000)]
    with pytest.raises(UnsafePickleError, match="no file of weights"):
        read_tensors(HEADER + SYSTEM + b"\x80\x02}(" + b"N".join(keys) + b"Nu.")


def test_a_network_that_is_many():
    """1.8 kB that name 2^25 networks."""
    network = b"cdall_e.utils\nConv2d\n)\x81q"
    pickled = b"\x80\x02" + network + b"\x00"
    for i in range(1, 26):
        child = b"h" + bytes([i - 1])
        children = b"}(" + text("a") + child + text("b") + child + b"u"
        pickled += network + bytes([i]) + b"}" + text("_modules") + children + b"sb"
    start = time.monotonic()
    with pytest.raises(UnsafePickleError, match="too many"):
        read_tensors(HEADER + SYSTEM + pickled + b"." + pickle.dumps([], 2))
    assert time.monotonic() - start < 2


def test_a_structure_that_contains_itself():
    looped = b"\x80\x02cdall_e.utils\nConv2d\n)\x81q\x00}" + text("_modules") + b"}" + text("a")
    with pytest.raises(UnsafePickleError, match="nested too deeply"):
        read_tensors(HEADER + SYSTEM + looped + b"h\x00ssb." + pickle.dumps([], 2))


# Damaged and foreign files


def tensor_file(size, stride, offset=0, numel=4):
    """A legacy file of one tensor with these numbers over a storage of four floats."""

    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    reference = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        + number(numel) + b"Nt"
    )  # fmt: skip
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"Q" + number(offset)
        + numbers(size) + numbers(stride) + b"\x89}tR"
    )  # fmt: skip
    pickled = b"\x80\x02}" + text("a") + tensor + b"s."
    return HEADER + SYSTEM + pickled + pickle.dumps(["0"], 2) + struct.pack("<q4f", 4, 1, 2, 3, 4)


def test_the_numbers_of_a_tensor():
    tensors, _ = read_tensors(tensor_file((2, 2), (2, 1)))
    assert tensors["a"].tolist() == [[1, 2], [3, 4]]
    assert read_tensors(tensor_file((2, 2), (1, 2)))[0]["a"].tolist() == [[1, 3], [2, 4]]
    assert read_tensors(tensor_file((0, 9), (9, 1)))[0]["a"].shape == (0, 9)
    for wrong in (
        {"size": (5,), "stride": (1,)},
        {"size": (4,), "stride": (1,), "offset": 1},
        {"size": (2,), "stride": (4,)},
        {"size": (2,), "stride": (-1,), "offset": 3},
        {"size": (-1,), "stride": (1,)},
        {"size": (4,), "stride": (1,), "offset": -1},
        {"size": (2, 2), "stride": (2,)},
        {"size": (100_000, 100_000), "stride": (0, 0)},
        {"size": (4,), "stride": (1,), "numel": 5},
        {"size": (4,), "stride": (1,), "numel": -1},
    ):
        with pytest.raises(UnsafePickleError):
            read_tensors(tensor_file(**wrong))


def rewritten(data, change):
    """The zip archive with its entries passed through `change(name, content)`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = change(info.filename.partition("/")[2], old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return buffer.getvalue()


def test_damaged_archives():
    good = saved({"a": torch.arange(100.0)})
    assert torch.equal(read_tensors(good)[0]["a"], torch.arange(100.0))
    flipped = bytearray(good)
    at = good.index(struct.pack("<2f", 50, 51))
    flipped[at] ^= 1
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10_000_000)
    for data, message in (
        (bytes(flipped), "CRC"),
        (good[: len(good) // 2], "damaged zip"),
        (rewritten(good, lambda n, c: None if n == "data/0" else c), "data/0 is missing"),
        (rewritten(good, lambda n, c: c[:-4] if n == "data/0" else c), "396 bytes, 400"),
        (rewritten(good, lambda n, c: None if n == "data.pkl" else c), "no single data.pkl"),
        (rewritten(good, lambda n, c: b"big" if n == "byteorder" else c), "big-endian"),
        (compressed.getvalue(), "compressed"),
    ):
        with pytest.raises(UnsafePickleError, match=message):
            read_tensors(data)
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as file:
        file.writestr("net/data.pkl", pickle.dumps({}, 2))
        file.writestr("net/constants.pkl", b"")
    with pytest.raises(UnsafePickleError, match="TorchScript"):
        read_tensors(script.getvalue())


def test_cut_off_and_altered_legacy_files():
    good = saved({"a": torch.arange(100.0)}, legacy=True)
    for length in (1, 10, len(HEADER), len(HEADER + SYSTEM) + 5, len(good) - 401, len(good) - 1):
        with pytest.raises(UnsafePickleError):
            read_tensors(good[:length])
    big = pickle.dumps({"little_endian": False}, 2)
    with pytest.raises(UnsafePickleError, match="big-endian"):
        read_tensors(HEADER + big)
    with pytest.raises(UnsafePickleError, match="no magic number"):
        read_tensors(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UnsafePickleError, match="unknown protocol"):
        read_tensors(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2))
    length = struct.pack("<q", 100)
    with pytest.raises(UnsafePickleError, match="101 elements, 100 are expected"):
        read_tensors(good.replace(length + struct.pack("<f", 0), struct.pack("<qf", 101, 0)))


def test_every_single_byte_may_be_damaged():
    """Whatever a flipped byte does, the outcome is tensors or a refusal, never anything else."""
    generator = torch.Generator().manual_seed(0)
    for legacy in (False, True):
        good = saved({"a": torch.arange(6.0).reshape(2, 3)}, legacy=legacy)
        for position in range(0, len(good), 3 if legacy else 7):
            data = bytearray(good)
            data[position] ^= int(torch.randint(1, 256, (), generator=generator))
            try:
                tensors, _ = read_tensors(bytes(data))
            except UnsafePickleError:
                continue
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (
            b"  <?xml version='1.0'?><Error><Code>PublicAccessNotPermitted</Code></Error>",
            "web page",
        ),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "PNG"),
        (save_safetensors({"a": torch.ones(50)})[:-8], "safetensors"),
        (saved(torch.ones(3)), "neither a network nor tensors by name"),
        (saved({"epoch": 3}), "no named tensors"),
        (saved([1, 2]), "a list"),
        (saved({1: torch.ones(1)}), "no named tensors"),
    ],
)
def test_files_that_are_something_else(data, message):
    with pytest.raises(UnsafePickleError, match=message):
        read_tensors(data)


def test_names_stand_for_nothing_that_does_anything():
    """Stand-ins are this module's own, or types of numbers; no pickle has changed them."""
    for stand_in in pickle_reader.STAND_INS.values():
        own = stand_in if isinstance(stand_in, type) else type(stand_in)
        assert own is torch.dtype or own.__module__ == pickle_reader.__name__
    unpickler = pickle_reader._Unpickler(b"", None)
    for module in (builtins, os, sys, importlib, torch, torch.serialization, pickle):
        for name in dir(module):
            if (module.__name__, name) not in pickle_reader.STAND_INS:
                with pytest.raises(UnsafePickleError, match="names"):
                    unpickler.find_class(module.__name__, name)
