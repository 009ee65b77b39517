"""Checkpoints: what is saved comes back bit for bit, and nothing else is let in."""

import copy
import dataclasses
import errno
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.errors import FileError
from tiny_diffusion.models.build import to_device
from tiny_diffusion.runs.checkpoint import FORMAT, digest, load_checkpoint, load_model, save_checkpoint
from tiny_diffusion.runs.checkpoint_keys import KEYS
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.writer import Callbacks, RunWriter
from tiny_diffusion.training.trainer import Trainer

CPU = torch.device("cpu")
ABOUT = {
    "config": resolve({"dataset": "digits", "base_channels": 8}).to_dict(),
    "step": 7,
    "elapsed_seconds": 1.5,
    "loss_history": [[1, 0.5], [2, None]],
    "heldout_history": [[7, 1 / 3]],
    "best_score": None,
    "class_names": ["zero", "ü"],
    "image_size": [8, 8],
    "channels": 1,
    "background": None,
    "sampling": {"sampler": "ddim", "steps": 20, "grid": "trailing", "guidance": 1.0, "clip": True},
    "stretch": [0, 0.0],
    "images": {"count": 8, "files": "", "content": ""},
    "finished": False,
    "versions": {"torch": "2"},
}
TENSORS = {
    "model/weight": torch.linspace(-1, 1, 12).view(3, 4),
    "ema/weight": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "optimizer/step": torch.tensor(3.0),
    "scaler/loss_scale": torch.tensor([1.0, 0.0]),
}


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint: everything but tensors that fit its configuration."""
    path = tmp_path / "model.pt"
    save_checkpoint(path, ABOUT, TENSORS)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_trainer):
    trainer, folder = make_trainer(steps=2, class_cond=True), tmp_path_factory.mktemp("original")
    for _ in trainer.run():
        pass
    writer = RunWriter(trainer.config, RunFolder(folder / "run"), trainer, trainer.batches.data, Callbacks())
    assert writer.save(folder / "network.pt", 1.0)
    return folder / "network.pt", trainer


def test_a_request_without_classes_is_one_without_guidance(original):
    """There is nothing to guide by, whatever the model's default is."""
    checkpoint = load_checkpoint(original[0])
    sampling = {**checkpoint.about["sampling"], "guidance": 1.5, "guidance_interval": [0.2, 0.8]}
    guided = dataclasses.replace(checkpoint, about={**checkpoint.about, "sampling": sampling})
    assert (guided.request([0]).guidance, guided.request([0]).guidance_interval) == (1.5, (0.2, 0.8))
    plain = guided.request([0], classes=())
    assert (plain.classes, plain.guidance, plain.guidance_interval) == ((), 1.0, None)
    assert guided.request([0], classes=(), guidance=2).guidance == 2  # by a guide


@pytest.fixture
def network(original, tmp_path):
    """(path, trainer): a checkpoint of a real network that was trained for two steps, the file a copy to spoil."""
    return Path(shutil.copy(original[0], tmp_path)), original[1]


def rewrite(path, change=None, rehash=True):
    """The checkpoint with its contents changed, by one who knows how to compute the sha256."""
    content = torch.load(path, weights_only=True)
    about, tensors = json.loads(content["about"]), content["tensors"]
    change(about, tensors)
    if rehash:
        about["sha256"] = digest(about, tensors)
    torch.save({"about": json.dumps(about), "tensors": tensors}, path)


def assert_refused(path, *words):
    with pytest.raises(FileError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


def peak_memory():
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def assert_bitwise_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(left, right), name


# There and back


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    tensors = {
        **TENSORS,
        "minus zero": torch.tensor([-0.0, 0.0, 1e-45, 3.4e38]),
        "none at all": torch.empty(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.tensor([1.5]).expand(5),
        "a part": torch.arange(1000.0)[3:5],
        "needs a gradient": torch.nn.Parameter(torch.ones(2)),
        **{str(kind): torch.arange(9).to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64)},
        **{str(kind): torch.arange(9).to(kind) for kind in (torch.uint8, torch.int64, torch.bool)},
    }
    save_checkpoint(tmp_path / "x.pt", ABOUT, tensors)
    loaded = load_checkpoint(tmp_path / "x.pt")
    assert_bitwise_equal(loaded.tensors, {name: tensor.detach() for name, tensor in tensors.items()})
    assert {key: value for key, value in loaded.about.items() if key not in ("sha256", "format")} == ABOUT
    assert loaded.about["format"] == FORMAT and loaded.about.keys() == KEYS
    assert loaded.config.to_dict() == ABOUT["config"]


def test_a_part_is_its_tensors_by_their_own_names(saved):
    checkpoint = load_checkpoint(saved)
    assert_bitwise_equal(checkpoint.part("model"), {"weight": TENSORS["model/weight"]})
    assert_bitwise_equal(checkpoint.part("scaler"), {"loss_scale": TENSORS["scaler/loss_scale"]})
    assert checkpoint.part("mod") == {}


def test_saving_makes_the_folder_and_leaves_one_file(tmp_path):
    path = tmp_path / "some" / "where" / "x.pt"
    save_checkpoint(path, ABOUT, TENSORS)
    assert list((tmp_path / "some" / "where").iterdir()) == [path]


def test_saving_leaves_the_tensors_and_the_facts_alone(tmp_path):
    about, tensors = copy.deepcopy(ABOUT), {name: tensor.clone() for name, tensor in TENSORS.items()}
    save_checkpoint(tmp_path / "x.pt", about, tensors)
    assert about == ABOUT
    assert_bitwise_equal(tensors, TENSORS)
    assert tensors["ema/weight"].stride() == TENSORS["ema/weight"].stride()


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_model_of_a_checkpoint_computes_what_was_saved(weights, network):
    path, trainer = network
    source = trainer.ema.model if weights == "ema" else trainer.model
    model = load_model(load_checkpoint(path), weights)
    assert_bitwise_equal(model.state_dict(), source.state_dict())
    generator = torch.Generator().manual_seed(0)
    x, time, label = torch.randn(5, 1, 8, 8, generator=generator), torch.linspace(0, 999, 5), torch.arange(5)
    with torch.no_grad():
        for given in (label, None):
            assert torch.equal(to_device(model, CPU)(x, time, given), source.eval()(x, time, given))


def test_the_two_models_of_a_checkpoint_differ(network):
    checkpoint = load_checkpoint(network[0])
    ema, raw = (load_model(checkpoint, weights).state_dict() for weights in ("ema", "raw"))
    assert not torch.equal(ema["conv_in.weight"], raw["conv_in.weight"])


def test_a_loaded_model_is_for_evaluation(network):
    model = load_model(load_checkpoint(network[0]))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_holds_all_that_a_trainer_needs_to_go_on(network, make_trainer):
    path, trainer = network
    other: Trainer = make_trainer(steps=2, class_cond=True)
    other.load(load_checkpoint(path).tensors, 2)
    assert_bitwise_equal(other.tensors(), trainer.tensors())


# Saving is whole or not at all


class Full(OSError):
    def __init__(self):
        super().__init__(errno.ENOSPC, "No space left on device")


def half_a_save(content, file):
    file.write(b"half a file")
    raise Full


def fail(*args, **kwargs):
    raise Full


FAILURES = {"writing": (torch, "save", half_a_save), "flushing": (os, "fsync", fail), "renaming": (os, "replace", fail)}


@pytest.mark.parametrize("module, function, failure", FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_leaves_the_previous_checkpoint_and_nothing_else(
    module, function, failure, saved, monkeypatch
):
    before = saved.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(module, function, failure)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(saved, {**ABOUT, "step": 8}, TENSORS)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    save_checkpoint(saved, {**ABOUT, "step": 8}, TENSORS)
    assert load_checkpoint(saved).about["step"] == 8


def test_an_interrupted_save_leaves_the_previous_checkpoint_and_nothing_else(saved, monkeypatch):
    def interrupted(content, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, {**ABOUT, "step": 8}, TENSORS)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_file_is_on_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    """A rename may reach the disk before the data does, unless that is flushed first."""
    order = []
    monkeypatch.setattr(os, "fsync", lambda number, fsync=os.fsync: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (order.append("replace"), replace(a, b)))
    save_checkpoint(tmp_path / "x.pt", ABOUT, TENSORS)
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TENSORS)
def test_weights_that_are_not_finite_are_not_saved(name, value, saved):
    before = saved.read_bytes()
    tensors = {key: tensor.clone().contiguous() for key, tensor in TENSORS.items()}
    tensors[name].view(-1)[-1:] = value
    with pytest.raises(FloatingPointError, match=name):
        save_checkpoint(saved, ABOUT, tensors)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# What is no checkpoint


def test_a_missing_file_is_refused_with_how_to_train_one(tmp_path):
    assert_refused(tmp_path / "none.pt", "does not exist", "train --dataset")


def test_a_folder_is_refused_with_what_to_name_in_it(tmp_path):
    assert_refused(tmp_path, "is a folder", "model_final.pt")


def png():
    return b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10


def zip_of(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


OTHERS = {
    "nothing": b"",
    "one byte": b"P",
    "text": b"model:\n  weights: none\n" * 100,
    "a picture": png(),
    "an empty zip": zip_of({}),
    "a zip of text": zip_of({"a.txt": "hello", "b/c.txt": "world"}),
    "a zip with a pickle": zip_of({"archive/data.pkl": pickle.dumps({"about": "{}", "tensors": {}})}),
    "a zip bomb": zip_of({"archive/data.pkl": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED),
    "a pickle": pickle.dumps({"about": "{}", "tensors": {}}),
    "a state_dict": torch_file(torch.nn.Linear(2, 2).state_dict()),
    "another program's checkpoint": torch_file({"state_dict": {"w": torch.ones(2)}, "epoch": 3, "lr": 0.1}),
    "a state_dict in the old format": torch_file(
        torch.nn.Linear(2, 2).state_dict(), _use_new_zipfile_serialization=False
    ),
    "a module": torch_file(torch.nn.Linear(2, 2)),
    "a tensor": torch_file(torch.ones(3)),
    "a list": torch_file([1, 2]),
    "nothing inside": torch_file({"about": "{}", "tensors": {}}),
    "no JSON": torch_file({"about": "{step: 1", "tensors": {}}),
    "JSON of a list": torch_file({"about": "[]", "tensors": {}}),
    "JSON that nests too deep": torch_file({"about": "[" * 100_000, "tensors": {}}),
    "bytes for JSON": torch_file({"about": torch.ones(3), "tensors": {}}),
    "a list of tensors": torch_file({"about": json.dumps({"format": FORMAT}), "tensors": [torch.ones(2)]}),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_kind_is_refused_by_name(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert_refused(path)


def test_compressed_entries_are_refused(saved):
    """A few kilobytes of zeros could become any amount of memory."""
    with zipfile.ZipFile(saved) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    saved.write_bytes(zip_of(files))
    load_checkpoint(saved)
    saved.write_bytes(zip_of(files, zipfile.ZIP_DEFLATED))
    assert_refused(saved, "compressed")


def test_an_entry_that_claims_more_than_the_file_has_is_refused_at_once(saved):
    damaged = bytearray(saved.read_bytes())
    at = damaged.index(b"PK\x01\x02")
    struct.pack_into("<II", damaged, at + 20, 2**31, 2**31)  # both sizes in the zip's directory
    saved.write_bytes(damaged)
    started = time.monotonic()
    assert_refused(saved)
    assert time.monotonic() - started < 1


def entries_of(content):
    """(name, bytes) of each member of a zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def plain_zip(entries, base=0, directory_at=None, gap=b"", comment=b"", own_name=None, large=False):
    """A zip of stored members as bytes, and what may be odd about it.

    base: where it will lie in a file.  directory_at: where the end record says that the directory begins.  gap: bytes
    after each member.  own_name: the name in the members' own headers.  large: the directory's numbers are of 64 bits.
    """
    body, directory = b"", b""
    for name, data in entries:
        at, name, size, checksum = base + len(body), name.encode(), len(data), zlib.crc32(data)
        local = own_name or name
        body += (
            struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, checksum, size, size, len(local), 0)
            + local
            + data
            + gap
        )
        extra = struct.pack("<2H3Q", 1, 24, size, size, at) if large else b""
        size, at = (2**32 - 1, 2**32 - 1) if large else (size, at)
        head = (b"PK\1\2", 20, 20, 0, 0, 0, 33, checksum, size, size, len(name), len(extra), 0, 0, 0, 0, at)
        directory += struct.pack("<4s6H3I5H2I", *head) + name + extra
    start = base + len(body) if directory_at is None else directory_at
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), start, len(comment))
    return body + directory + end + comment


def two_directories(content):
    """A harmless zip before the end, and the other one where the end record says: readers differ in which they take."""
    entries = entries_of(content)
    other = plain_zip([(name, data[::-1]) for name, data in entries])[:-22]
    return other + plain_zip(entries, len(other), len(other) - (len(other) - other.index(b"PK\1\2")))


def zip64_elsewhere(content):
    """The records of zip64 once more in front of the true ones, to which the locator points."""
    at = content.rindex(b"PK\6\6")
    changed = bytearray(content[:at] + content[at : at + 56] + content[at:])
    struct.pack_into("<Q", changed, changed.rindex(b"PK\6\7") + 8, at)
    return bytes(changed)


AMBIGUOUS = {
    "two directories": two_directories,
    "bytes in front": lambda content: b"#!" + content,
    "a program in front": lambda content: b"PK\3\4" + bytes(60) + content,
    "bytes after the end": lambda content: content + b"\0",
    "a comment": lambda content: plain_zip(entries_of(content), comment=b"hello"),
    "an end record in a comment": lambda content: plain_zip(entries_of(content), comment=content[-22:]),
    "gaps": lambda content: plain_zip(entries_of(content), gap=b"\0"),
    "a member twice": lambda content: plain_zip([*entries_of(content), entries_of(content)[0]]),
    "a member of another name": lambda content: plain_zip([*entries_of(content), ("archive/x", b"")]),
    "another folder": lambda content: plain_zip(
        [("other/data.pkl", entries_of(content)[0][1]), *entries_of(content)[1:]]
    ),
    "members that call themselves otherwise": lambda content: plain_zip(
        entries_of(content), own_name=b"archive/data.pkl"
    ),
    "records of zip64 elsewhere": zip64_elsewhere,
}


@pytest.mark.parametrize("change", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_file_that_two_readers_could_read_differently_is_refused(change, saved):
    saved.write_bytes(change(saved.read_bytes()))
    assert_refused(saved)


@pytest.mark.parametrize("large", [False, True], ids=["numbers of 32 bits", "numbers of 64 bits"])
def test_a_plain_zip_of_the_same_members_is_the_same_checkpoint(large, saved):
    """Files of more than 4 GB have numbers of 64 bits, in fields of their own."""
    wanted = load_checkpoint(saved)
    saved.write_bytes(plain_zip(entries_of(saved.read_bytes()), large=large))
    got = load_checkpoint(saved)
    assert got.about == wanted.about
    assert_bitwise_equal(got.tensors, wanted.tensors)


def test_a_checkpoint_is_read_without_unpickling(saved, monkeypatch):
    """What checks a file is what reads it: no other reader sees it."""

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    assert load_checkpoint(saved).tensors.keys() == TENSORS.keys()


def with_pickle(content, text):
    """The file with another pickle."""
    return plain_zip([(name, text if name.endswith("data.pkl") else data) for name, data in entries_of(content)])


def doubled(times):
    """A pickle of a tuple of two equal tuples of two equal tuples ..., which has 2^times leaves."""
    text = b")q\0"
    for index in range(times):
        text += b"h%ch%c\x86q%c" % (index, index, index + 1)
    return text


KEYS_TO_HASH = {
    "a key": b"\x80\x02}" + doubled(60) + b"K\1s.",
    "keys": b"\x80\x02}(" + doubled(60) + b"K\1u.",
    "a shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\0K\0" + doubled(60) + b"))\x89}tR.",
    "a storage": b"\x80\x02" + doubled(60) + b"Q.",
    "everything": b"\x80\x02" + doubled(60) + b".",
    "a set": b"\x80\x04" + doubled(60) + b"(h\x3c\x91.",
    "a function": b"\x80\x02" + doubled(60) + b")R.",
}


@pytest.mark.parametrize("text", KEYS_TO_HASH.values(), ids=KEYS_TO_HASH)
def test_nested_tuples_are_refused_before_anything_walks_them(text, saved):
    saved.write_bytes(with_pickle(saved.read_bytes(), text))
    started = time.monotonic()
    assert_refused(saved)
    assert time.monotonic() - started < 1


def test_many_tensors_of_the_same_bytes_are_no_larger_than_the_file(saved):
    """A thousand views of a megabyte would be a gigabyte to hash and to copy."""
    large = torch.zeros(250_000)
    content = torch.load(saved, weights_only=True)
    content["tensors"] = {f"model/{index}": large.view(500, 500) for index in range(1000)}
    torch.save(content, saved)
    assert saved.stat().st_size < 2e6
    assert_refused(saved, "not a plain tensor")


ESCAPES = "\x1b[2J\nline\u202e"
HOSTILE_NAMES = {
    "a tensor": lambda about, tensors: tensors.update({ESCAPES: torch.ones(2).expand(3, 2)}),
    "a key": lambda about, tensors: about.update({ESCAPES: 1}),
    "an option": lambda about, tensors: about["config"].update({ESCAPES: 1}),
    "a schedule": lambda about, tensors: about["config"].update(schedule=ESCAPES),
    "a format": lambda about, tensors: about.update(format=ESCAPES),
}


@pytest.mark.parametrize("change", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_names_of_a_file_do_not_act_on_the_terminal(change, saved):
    rewrite(saved, change)
    assert assert_refused(saved).isprintable()


# Damage


def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(saved):
    whole = saved.read_bytes()
    for kept in [*range(0, len(whole), 61), *range(len(whole) - 40, len(whole))]:
        saved.write_bytes(whole[:kept])
        assert_refused(saved)


def test_a_flipped_bit_is_refused_unless_nothing_depends_on_it(saved):
    """Some bytes are padding, dates and attributes; what comes through must be equal to what was saved."""
    whole, wanted = saved.read_bytes(), load_checkpoint(saved)
    refused = 0
    for byte in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        saved.write_bytes(damaged)
        try:
            got = load_checkpoint(saved)
        except FileError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert got.about == wanted.about
            assert_bitwise_equal(got.tensors, wanted.tensors)
    assert refused > 100


@pytest.mark.parametrize("name", TENSORS)
def test_a_changed_value_does_not_match_the_sha256(name, saved):
    def change(about, tensors):
        tensors[name].view(-1)[-1:] += 1

    rewrite(saved, change, rehash=False)
    assert_refused(saved, "sha256")


@pytest.mark.parametrize(
    "change",
    [
        lambda about, tensors: about.update(step=8),
        lambda about, tensors: about["config"].update(lr=1e-3),
        lambda about, tensors: tensors.update({"model/other": tensors.pop("model/weight")}),
        lambda about, tensors: tensors.update({"model/weight": tensors["model/weight"].view(4, 3)}),
        lambda about, tensors: tensors.update({"model/weight": tensors["model/weight"].view(torch.int32)}),
        lambda about, tensors: tensors.pop("model/weight"),
    ],
    ids=["a step", "an option", "a name", "a shape", "a type", "a tensor less"],
)
def test_the_sha256_covers_everything(change, saved):
    rewrite(saved, change, rehash=False)
    assert_refused(saved, "sha256")


# Malice


class Bomb:
    """Unpickling it calls the function, were it ever unpickled."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


BOMBS = {  # each creates the marker file
    "a method": lambda marker: Bomb(Path.touch, marker),
    "os.system": lambda marker: Bomb(os.system, f"touch {marker}"),
    "eval": lambda marker: Bomb(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
    "exec": lambda marker: Bomb(exec, f"open({str(marker)!r}, 'w')"),
}
PLACES = {
    "alone": lambda bomb: bomb,
    "for the tensors": lambda bomb: {"about": json.dumps({"format": FORMAT}), "tensors": bomb},
    "among the tensors": lambda bomb: {"about": "{}", "tensors": {**TENSORS, "model/weight": bomb}},
    "for a name": lambda bomb: {"about": "{}", "tensors": {bomb: torch.ones(1)}},
    "for the JSON": lambda bomb: {"about": bomb, "tensors": {}},
    "beside": lambda bomb: {"about": "{}", "tensors": {}, "more": bomb},
}
WRITERS = {
    "as torch writes it": lambda content: torch_file(content),
    "as torch wrote it": lambda content: torch_file(content, _use_new_zipfile_serialization=False),
    "as a pickle": lambda content: pickle.dumps(content),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_nothing_in_a_checkpoint_is_ever_executed(bomb, place, write, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    path.write_bytes(write(place(bomb(marker))))
    assert_refused(path)
    assert not marker.exists()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_what_those_files_would_execute_leaves_its_mark(bomb, tmp_path):
    function, arguments = bomb(tmp_path / "executed").__reduce__()
    function(*arguments)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_a_right_sha256_too(value, saved):
    def change(about, tensors):
        tensors["model/weight"][0, 0] = value

    rewrite(saved, change)
    assert_refused(saved, "model/weight", "NaN")


ODD_TENSORS = {
    "expanded": lambda: torch.ones(1).expand(10**12),
    "transposed": lambda: torch.ones(3, 4).t(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "without memory": lambda: torch.empty(10**12, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "a number": lambda: 3.0,
    "a text": lambda: "weight",
    "nothing": lambda: None,
}


@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_an_odd_kind_is_refused_before_it_costs_memory(make, saved):
    content = torch.load(saved, weights_only=True)
    content["tensors"]["model/weight"] = make()
    torch.save(content, saved)
    assert_refused(saved)


def test_one_number_that_stands_for_half_a_gigabyte_is_refused_before_it_is_spread_out(saved):
    before = peak_memory()
    content = torch.load(saved, weights_only=True)
    content["tensors"]["model/weight"] = torch.ones(1).expand(500_000_000)
    torch.save(content, saved)
    assert_refused(saved, "model/weight", "not a plain tensor")
    assert peak_memory() - before < 200e6


def test_tensors_that_claim_more_than_their_storage_holds_are_refused(saved):
    """The pickle's sizes are changed, the storage is not."""
    tensors = {"model/weight": torch.ones(257)}  # 257 is unlike any other number in the file
    save_checkpoint(saved, ABOUT, tensors)
    whole = saved.read_bytes()
    number, larger = pickle.dumps(257, 2)[2:5], pickle.dumps(60_000, 2)[2:5]
    assert number in whole
    with zipfile.ZipFile(saved) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        if name.endswith("data.pkl"):
            files[name] = files[name].replace(number, larger)
    saved.write_bytes(zip_of(files))
    assert_refused(saved)


def set_config(**values):
    return lambda about, tensors: about["config"].update(values)


def remove(key):
    return lambda about, tensors: about.pop(key)


CHANGED = {  # what is wrong with the JSON, and words of the message
    "format 2": (lambda about, tensors: about.update(format=2), ["format 2", "format 1"]),
    "format 0": (lambda about, tensors: about.update(format=0), ["format 0", "format 1"]),
    "no format": (remove("format"), ["format None", "format 1"]),
    **{f"no {key}": (remove(key), [key]) for key in sorted(KEYS - {"format", "sha256", "images"})},
    "an extra key": (lambda about, tensors: about.update(colour="red"), ["colour", "format 1"]),
    "a network of 10^9 channels": (set_config(base_channels=10**9), ["--base_channels", "1000000000"]),
    "10^400 channels": (set_config(base_channels=10**400), []),
    "10^12 weights": (set_config(base_channels=2048, channel_mult=[64], attention_levels=[]), ["billion"]),
    "minus 8 channels": (set_config(base_channels=-8), ["--base_channels"]),
    "10^9 timesteps": (set_config(timesteps=10**9), ["--timesteps"]),
    "images of 10^6 pixels": (set_config(image_size=10**6), ["--image_size"]),
    "no size": (set_config(image_size=None), []),
    "a thousand levels": (set_config(channel_mult=[1] * 1000), ["--channel_mult"]),
    "text for a number": (set_config(lr="fast"), ["--lr"]),
    "a list for a number": (set_config(seed=[1]), ["--seed"]),
    "NaN for a number": (set_config(dropout=float("nan")), ["--dropout"]),
    "an unknown schedule": (set_config(schedule="x" * 5), ["--schedule", "xxxxx"]),
    "an unknown option": (set_config(colour="red"), ["colour"]),
    "no options": (lambda about, tensors: about.update(config={}), []),
    "a list of options": (lambda about, tensors: about.update(config=[1, 2]), []),
    "a number for the options": (lambda about, tensors: about.update(config=3), []),
    "no channels": (lambda about, tensors: about.update(channels=0), []),
    "10^9 channels of an image": (lambda about, tensors: about.update(channels=10**9), []),
    "NaN channels": (lambda about, tensors: about.update(channels=float("nan")), []),
    "a text for the channels": (lambda about, tensors: about.update(channels="1"), []),
    "a float for the channels": (lambda about, tensors: about.update(channels=1.0), []),
    "half a channel": (lambda about, tensors: about.update(channels=1.5), []),
    "10^6 classes": (lambda about, tensors: about.update(class_names=["a"] * 10**6), []),
    "a number of classes": (lambda about, tensors: about.update(class_names=10), []),
    "a text for the step": (lambda about, tensors: about.update(step="7"), []),
    "a negative step": (lambda about, tensors: about.update(step=-1), []),
    "a text for the time": (lambda about, tensors: about.update(elapsed_seconds="long"), []),
    "a text for the history": (lambda about, tensors: about.update(heldout_history="[]"), []),
    "a text for the stretch": (lambda about, tensors: about.update(stretch="[]"), []),
    "half a stretch": (lambda about, tensors: about.update(stretch=[1]), []),
    "a text for the sampling": (lambda about, tensors: about.update(sampling="ddim"), []),
    "an unknown sampler": (lambda about, tensors: about["sampling"].update(sampler="xxxxx"), []),
    "an unknown grid": (lambda about, tensors: about["sampling"].update(grid="xxxxx"), []),
    "10^9 steps": (lambda about, tensors: about["sampling"].update(steps=10**9), []),
    "noise for a sampler without": (lambda about, tensors: about["sampling"].update(sampler="abm", eta=0.0), []),
    "more noise than ddim has": (lambda about, tensors: about["sampling"].update(eta=1.5), []),
    "a text for the noise": (lambda about, tensors: about["sampling"].update(eta="1"), []),
    "no guidance": (lambda about, tensors: about["sampling"].pop("guidance"), []),
    "images of another size": (lambda about, tensors: about.update(image_size=[10**6, 10**6]), []),
    "images on their side": (set_config(image_size=[8, 16]), ["image_size"]),
    "another background": (lambda about, tensors: about.update(background="white"), ["background"]),
    "a size of three": (set_config(image_size=[8, 8, 1]), ["--image_size"]),
    "an option of other images": (set_config(splits=["val"]), ["--splits"]),
    "a number for the size": (lambda about, tensors: about.update(image_size=8), []),
    "a text for the end": (lambda about, tensors: about.update(finished="yes"), []),
}


@pytest.mark.parametrize("change, words", CHANGED.values(), ids=CHANGED)
def test_facts_that_cannot_be_are_refused_with_a_right_sha256_too(change, words, saved):
    rewrite(saved, change)
    assert_refused(saved, *words)


@pytest.mark.parametrize("value", [None, "", [], 1, True, "0" * 64])
def test_a_checkpoint_with_another_sha256_is_refused(value, saved):
    rewrite(saved, lambda about, tensors: about.update(sha256=value), rehash=False)
    assert_refused(saved, "sha256")


def test_a_checkpoint_without_its_sha256_is_refused(saved):
    rewrite(saved, remove("sha256"), rehash=False)
    assert_refused(saved, "sha256")


# Tensors that do not fit the configuration


FIRST = "conv_in.weight"
UNFIT = {
    "one is missing": (lambda state: state.pop(FIRST), FIRST),
    "one is too many": (lambda state: state.update(another=torch.ones(1)), "another"),
    "one has another shape": (lambda state: state.update({FIRST: state[FIRST][:, :, :2]}), FIRST),
    "one has no shape": (lambda state: state.update({FIRST: torch.tensor(1.0)}), FIRST),
    "one holds whole numbers": (lambda state: state.update({FIRST: state[FIRST].long()}), "type"),
    "one is of double precision": (lambda state: state.update({FIRST: state[FIRST].double()}), "type"),
    "all are of half precision": (
        lambda state: state.update({name: tensor.half() for name, tensor in state.items()}),
        "type",
    ),
    "there are none": (lambda state: state.clear(), ""),
}


@pytest.mark.parametrize(
    "weights, fault",
    [*(("ema", fault) for fault in UNFIT), ("raw", "one is missing"), ("raw", "one has another shape")],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused_by_name(weights, fault, network):
    change, named = UNFIT[fault]
    part = "ema" if weights == "ema" else "model"

    def change_part(about, tensors):
        state = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
        for name in state:
            del tensors[f"{part}/{name}"]
        change(state)
        tensors.update({f"{part}/{name}": tensor.contiguous() for name, tensor in state.items()})

    path, _ = network
    rewrite(path, change_part)
    checkpoint = load_checkpoint(path)
    with pytest.raises(FileError, match="do not fit") as refused:
        load_model(checkpoint, weights)
    assert named in str(refused.value) and "\n" not in str(refused.value)
    load_model(checkpoint, "raw" if weights == "ema" else "ema")


def test_a_network_of_seven_gigabytes_is_refused_without_making_it(network):
    path, _ = network
    rewrite(path, set_config(base_channels=512, channel_mult=[8], attention_levels=[], time_emb_dim=8192))
    checkpoint, before = load_checkpoint(path), peak_memory()
    with pytest.raises(FileError, match="do not fit"):
        load_model(checkpoint)
    assert peak_memory() - before < 200e6
