"""The layout of a checkpoint file: a zip as torch.save writes it, with a pickle that describes tensors.

Knows neither torch nor what the tensors mean.  One reader both checks and reads: `members` accepts a zip in only one
layout, in which no byte can be read in two ways, and `read_pickle` interprets the few opcodes that plain tensors need,
instead of unpickling.  Both raise ValueError for anything that save_checkpoint does not write.
"""

import pickle
import pickletools
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

LOCAL, DIRECTORY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
END, END_64, LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
DESCRIPTOR, DESCRIPTOR_64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")
HAS_DESCRIPTOR, UTF8 = 8, 0x800  # flags of a zip entry
MAX_32 = 0xFFFFFFFF  # in place of a number that does not fit: it follows in an extra field
MAX_DIMENSIONS = 16
MEMBER = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d{1,9}", re.ASCII
)
DTYPES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
}  # fmt: skip
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
GLOBALS = {ORDERED_DICT, REBUILD, *(f"torch {kind}" for kind in DTYPES)}


@dataclass(frozen=True)
class Storage:
    """dtype: its name in torch.   member: the name of the zip member that holds its bytes.   count: of items."""

    dtype: str
    member: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """The view of a storage that a tensor is; offset and strides count items."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def members(content: bytearray) -> dict[str, memoryview]:
    """The bytes of each member by its name, without the folder that all of them lie in.

    The file must consist of nothing but members, one directory of them in the same order, and the end records.
    """
    directory, directory_end, count = _end_records(content)
    view, found, start, folders = memoryview(content), {}, 0, set()
    at = directory
    for _ in range(count):
        signature, *_, flags, method, _, _, checksum, packed, size = DIRECTORY.unpack_from(content, at)[:10]
        name_length, extra_length, comment, disk, _, _, offset = DIRECTORY.unpack_from(content, at)[10:]
        raw = bytes(view[at + DIRECTORY.size : at + DIRECTORY.size + name_length])
        at += DIRECTORY.size + name_length
        size, packed, offset = _large(bytes(view[at : at + extra_length]), size, packed, offset)
        at += extra_length
        if signature != b"PK\1\2" or comment or disk or flags & ~(HAS_DESCRIPTOR | UTF8):
            raise ValueError("an entry of its directory that this program never writes")
        if method or packed != size:
            raise ValueError("compressed entries, which this program never writes")
        if offset != start or at > directory_end:
            raise ValueError("entries that overlap, or gaps between them")
        begin, start = _extent(content, start, raw, flags, checksum, size)
        if start > directory:
            raise ValueError("its entries claim more bytes than the file has")
        folder, _, name = raw.decode().partition("/")
        if not MEMBER.fullmatch(name) or name in found:
            raise ValueError(f"an entry {raw.decode()!r}, which this program never writes")
        folders.add(folder)
        found[name] = view[begin : begin + size]
        if zlib.crc32(found[name]) != checksum:
            raise ValueError(f"wrong checksum of {name}")
    if at != directory_end or start != directory or len(folders) != 1 or "data.pkl" not in found:
        raise ValueError("a zip that this program never writes")
    if found.get("byteorder", b"little") != b"little":
        raise ValueError("numbers in an order of bytes that this program never writes")
    return found


def _end_records(content: bytearray) -> tuple[int, int, int]:
    """(start, end, entries) of the directory, which the end records follow to the last byte of the file.

    torch writes the records of zip64 always; without them the plain record alone counts.
    """
    end = len(content) - END.size
    if end < 0 or not content.startswith(b"PK\3\4") or content[end : end + 4] != b"PK\5\6":
        raise ValueError("not a zip file, or cut short")
    _, *disks, here, count, size, start, comment = END.unpack_from(content, end)
    locator = end - LOCATOR.size
    if content[locator : locator + 4] == b"PK\6\7":
        end = locator - END_64.size
        if end < 0 or LOCATOR.unpack_from(content, locator) != (b"PK\6\7", 0, end, 1):
            raise ValueError("end records that this program never writes")
        signature, length, _, _, *more_disks, here_64, count_64, size_64, start_64 = END_64.unpack_from(content, end)
        plain = (min(count_64, 0xFFFF), min(size_64, MAX_32), min(start_64, MAX_32))
        if signature != b"PK\6\6" or length != END_64.size - 12 or here_64 != count_64 or plain != (count, size, start):
            raise ValueError("end records that contradict each other")
        disks, here, count, size, start = disks + more_disks, here_64, count_64, size_64, start_64
    if any(disks) or comment or here != count or start + size != end:
        raise ValueError("a directory that is not where the end of the file says")
    return start, end, count


def _large(extra: bytes, *numbers: int) -> list[int]:
    """The numbers of an entry of the directory, of which those that do not fit stand in its extra field."""
    large = numbers.count(MAX_32)
    if extra and (not large or len(extra) != 4 + 8 * large or extra[:4] != struct.pack("<2H", 1, 8 * large)):
        raise ValueError("an extra field that this program never writes")
    if large and not extra:
        raise ValueError("a number that is missing")
    values = iter(struct.unpack(f"<{large}Q", extra[4:]))
    return [next(values) if number == MAX_32 else number for number in numbers]


def _extent(content: bytearray, start: int, name: bytes, flags: int, checksum: int, size: int) -> tuple[int, int]:
    """(where the bytes of the member at `start` begin, where the next member does).

    Raises ValueError or struct.error unless the header before the bytes and the descriptor after them repeat what the
    directory says.  torch fills the header's extra field to align the bytes.
    """
    signature, _, own_flags, method, _, _, *numbers, name_length, extra_length = LOCAL.unpack_from(content, start)
    begin = start + LOCAL.size + name_length + extra_length
    end = begin + size
    own_name = content[start + LOCAL.size : start + LOCAL.size + name_length]
    if signature != b"PK\3\4" or own_flags != flags or method or own_name != name or end > len(content):
        raise ValueError("an entry that contradicts the directory")
    if not flags & HAS_DESCRIPTOR:
        if numbers != [checksum, size, size]:
            raise ValueError("an entry that contradicts the directory")
        return begin, end
    for layout in (DESCRIPTOR, DESCRIPTOR_64):
        if end + layout.size <= len(content) and layout.unpack_from(content, end) == (b"PK\7\10", checksum, size, size):
            return begin, end + layout.size
    raise ValueError("an entry that contradicts the directory")


def read_pickle(content: bytes) -> object:
    """What a pickle of texts, dictionaries and tensors describes: str, dict and StoredTensor.

    Raises pickle.UnpicklingError if unpickling it would call anything else, and ValueError if it is malformed.  Keys
    are texts only, because hashing nested tuples can take for ever.
    """
    stack, marks, memo = [], [], {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences in an argument, which are read before it is refused
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "STOP":
                    return stack.pop()
                _execute(opcode.name, argument, stack, marks, memo)
    except (LookupError, TypeError) as error:
        raise ValueError("a malformed pickle") from error
    raise ValueError("a pickle without an end")


def _execute(name: str, argument: object, stack: list, marks: list[int], memo: dict[int, object]) -> None:
    """One opcode of a pickle.  marks: the places on the stack where tuples and items of dictionaries begin."""
    match name:
        case "PROTO":
            pass
        case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
            stack.append(argument)
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "NEWFALSE":
            stack.append(False)
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(_pop_from(stack, len(stack) - int(name[-1])))
        case "MARK":
            marks.append(len(stack))
        case "TUPLE":
            stack.append(_pop_from(stack, marks.pop()))
        case "SETITEM":
            _set_items(stack, _pop_from(stack, len(stack) - 2))
        case "SETITEMS":
            _set_items(stack, _pop_from(stack, marks.pop()))
        case "GLOBAL" if argument in GLOBALS:
            stack.append(argument)
        case "BINPERSID":
            stack.append(_storage(*stack.pop()))
        case "REDUCE":
            function, arguments = _pop_from(stack, len(stack) - 2)
            stack.append(_reduce(function, arguments))
        case _:
            raise pickle.UnpicklingError(f"{name} {argument}")


def _pop_from(stack: list, start: int) -> tuple:
    """Takes what lies on the stack from there on."""
    if not 0 <= start <= len(stack):
        raise IndexError("an empty stack")
    items = tuple(stack[start:])
    del stack[start:]
    return items


def _set_items(stack: list, items: tuple) -> None:
    keys, target = items[::2], stack[-1]
    if type(target) is not dict or not all(type(key) is str for key in keys):
        raise pickle.UnpicklingError("a key that is no text")
    target.update(zip(keys, items[1::2], strict=True))


def _reduce(function: object, arguments: object) -> dict | StoredTensor:
    """What the two functions that a tensor is pickled with return."""
    if function == ORDERED_DICT and arguments == ():
        return {}
    if function != REBUILD:
        raise pickle.UnpicklingError("a function that no plain tensor needs")
    storage, offset, shape, strides, requires_grad, hooks = arguments
    sizes = (offset, *shape, *strides)
    if type(storage) is not Storage or requires_grad is not False or hooks != {} or len(shape) != len(strides):
        raise ValueError("a tensor of an odd kind")
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError("a tensor of an impossible shape")
    return StoredTensor(storage, offset, shape, strides)


def _storage(what: object, kind: object, key: object, device: object, count: object) -> Storage:
    """The storage that a persistent id of torch means."""
    texts = type(kind) is str and type(key) is str and kind.removeprefix("torch ") in DTYPES
    if what != "storage" or not texts or device != "cpu" or type(count) is not int or count < 0:
        raise ValueError("a storage of an odd kind")
    return Storage(DTYPES[kind.removeprefix("torch ")], f"data/{key}", count)
