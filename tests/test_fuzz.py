"""Files that were damaged by chance, thousands of times: each is what it was, or refused in one line, and at once.

Damage to the bytes is mostly caught by checksums; to get behind them, a member of the zip is damaged and the zip made
anew around it, and then a value of the JSON is replaced and the sha256 computed anew.
"""

import io
import json
import math
import pickle
import random
import signal
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import FORMATS, encoded, smooth

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.files.decode import ImageSpec, UnreadableImage, decode, read_header
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.evaluation.images import read_images
from tiny_diffusion.runs.checkpoint import Checkpoint, digest, load_checkpoint, load_model, save_checkpoint
from tiny_diffusion.runs.checkpoint_format import read_pickle

CPU_SECONDS = 10  # that one file may take; each takes about a thousandth of one
MEMORY = 200e6  # bytes that all of them together may
WEBP_MEMORY = 300e6  # for images of WebP: a header of 58 million pixels takes 4 bytes for each before it is refused


class Hang(BaseException):
    """Not an Exception, which some readers catch."""


@contextmanager
def bounded_time():
    def give_up(number, frame):
        raise Hang

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(autouse=True)
def within_bounds(request):
    """No warning from anywhere, and no more memory than stated at any moment (where Linux tells its peak)."""
    of_webp = getattr(request.node, "callspec", None) and request.node.callspec.params.get("webp")
    status, memory = Path("/proc/self/status"), WEBP_MEMORY if of_webp else MEMORY
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here.  proc(5)
            before = peak(status)
        yield
        if sys.platform == "linux":
            assert peak(status) - before < memory
    assert not [str(warning.message) for warning in warned]


def peak(status):
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


# Damage


def damage(content: bytes, chance: random.Random) -> bytes:
    """The same bytes but for one to three accidents."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 4, 16, 100, 1000))
        accident = chance.randrange(9)
        if accident <= 1 and content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        elif accident == 2:
            content[at : at + length] = chance.randbytes(len(content[at : at + length]))
        elif accident == 3:
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif accident == 4:
            content[at : at + length] = b"\xff" * len(content[at : at + length])
        elif accident == 5:
            content[at:at] = chance.randbytes(length)
        elif accident == 6:
            content[at:at] = content[at : at + length]
        elif accident == 7:
            del content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def damage_member(content: bytes, chance: random.Random) -> bytes:
    """A whole zip with right checksums, of which a member is damaged, missing, there twice or another's."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    names, contents = [entry.filename for entry, _ in members], [data for _, data in members]
    i, j = (chance.randrange(len(names)) for _ in range(2))
    accident = chance.randrange(8)
    if accident == 0:
        contents[i], contents[j] = contents[j], contents[i]
    elif accident == 1:
        del names[i], contents[i]
    elif accident == 2:
        names[i] = chance.choice(("../x", "/x", "a" * 70_000, "", "\0", names[j] + "x", names[j].upper()))
    elif accident == 3:
        names.append(names[i])
        contents.append(damage(contents[i], chance))
    else:
        i = chance.choice((i, max(range(len(names)), key=lambda k: "pkl" in names[k])))
        contents[i] = damage(contents[i], chance)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(file, "w", members[0][0].compress_type) as archive:
            for name, data in zip(names, contents, strict=True):
                archive.writestr(zipfile.ZipInfo(name[:65_535]), data, archive.compression)
    return file.getvalue()


STRANGE = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, "", "x", "\0", "ü" * 1000,
    "../../x", "nan", [], [1], [[]], [None] * 9, {}, {"x": 1}, [[1, 2], [3, 4]],
)  # fmt: skip


def strange_value(value, chance: random.Random):
    """The same JSON but for one value, at any depth."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        if chance.random() < 0.1:
            del value[key]
        else:
            value[key] = strange_value(value[key], chance)
        return value
    return chance.choice(STRANGE)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a tiny network, loaded."""
    from cli_helpers import call

    run = tmp_path_factory.mktemp("fuzz") / "run"
    words = ["--dataset", "digits", "--image_size", 4, "--base_channels", 4, "--channel_mult", 1, "--device", "cpu"]
    words += ["--attention_levels", "none", "--timesteps", 5, "--num_samples", 1, "--max_steps", 1, "--class_cond"]
    assert call("train", *words, "--optimizer", "adam", "--output_dir", run) == 0
    return load_checkpoint(run / "model_final.pt")


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory):
    """(bytes, loaded) of the same with few of its tensors: all that damage can tell apart, and soon read."""
    path = tmp_path_factory.mktemp("small") / "x.pt"
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    save_checkpoint(path, about, dict(list(checkpoint.tensors.items())[:3]))
    return path.read_bytes(), load_checkpoint(path)


def load_or_refuse(path: Path) -> Checkpoint | None:
    try:
        with bounded_time():
            return load_checkpoint(path)
    except FileError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1000 + len(str(path))
    return None


def assert_the_same(got: Checkpoint, wanted: Checkpoint) -> None:
    assert got.about == wanted.about and got.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype and torch.equal(got.tensors[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("accident, times", [(damage, 3000), (damage_member, 2000)], ids=["its bytes", "a member"])
def test_a_damaged_checkpoint_loads_as_it_was_or_is_refused(accident, times, small, tmp_path):
    content, wanted = small
    path, chance, refused = tmp_path / "x.pt", random.Random(0), 0
    for _ in range(times):
        path.write_bytes(accident(content, chance))
        got = load_or_refuse(path)
        if got is None:
            refused += 1
        else:
            assert_the_same(got, wanted)
    assert times / 2 < refused < times


@pytest.mark.slow
def test_facts_that_were_changed_under_a_right_sha256_make_sense_or_are_refused(checkpoint, tmp_path):
    """What loads has a configuration that is valid, and a network that fits it or is refused before it is made."""
    path, chance, refused = tmp_path / "x.pt", random.Random(1), 0
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("ema/")}
    for _ in range(300):
        about = strange_value(json.loads(json.dumps(checkpoint.about)), chance)
        if isinstance(about, dict):
            about["sha256"] = digest(about, tensors)
        torch.save({"about": json.dumps(about), "tensors": tensors}, path)
        got = load_or_refuse(path)
        if got is None:
            refused += 1
            continue
        assert got.config == Config.from_dict(got.about["config"])
        try:
            with bounded_time():
                load_model(got)
        except FileError as error:
            assert "\n" not in str(error)
    assert 60 < refused < 300


# Images


@pytest.fixture(scope="module")
def images(webp):
    """Small files of WebP, or of every other format, and of the ways to pack one."""
    picture, formats = smooth(24, 18), [ending for ending in FORMATS if (ending == "webp") == webp]
    files = [encoded(picture, ending) for ending in formats]
    files += [encoded(picture[..., 0], ending) for ending in formats]
    if webp:
        return [*files, encoded(picture, "webp", lossless=False)]
    files += [encoded(picture, "jpg", progressive=True)]
    files += [encoded(picture, "tif", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    files += [encoded(picture[..., 0].astype(np.uint16) * 257), encoded(picture[..., 0] / np.float32(255), "tif")]
    return files


@pytest.mark.slow
@pytest.mark.parametrize("webp", [False, True], ids=["other formats", "WebP"], scope="module")
def test_a_damaged_image_is_an_image_or_unreadable(webp, images):
    chance, read, times = random.Random(2), 0, 500 if webp else 2000
    for _ in range(times):
        content = damage(chance.choice(images), chance)
        try:
            with bounded_time():
                assert min(read_header(content).size) > 0
                pixels = decode(content, ImageSpec((16, 16), 3))
            assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
            read += 1
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 200
    assert times / 20 < read < times * 0.95


# Arrays


@pytest.fixture(scope="module", params=[np.savez, np.savez_compressed], ids=lambda save: save.__name__)
def array(request):
    """(bytes of an .npz, its images)."""
    images, file = smooth(12, 40).reshape(10, 6, 8, 3), io.BytesIO()
    request.param(file, images)
    return file.getvalue(), images


@pytest.mark.slow
@pytest.mark.parametrize("accident", [damage, damage_member], ids=["its bytes", "its member"])
def test_a_damaged_array_is_read_as_images_or_refused(accident, array, tmp_path):
    """Damage behind the checksums may change grey levels, which nothing can tell."""
    (content, images), path, chance, refused = array, tmp_path / "x.npz", random.Random(3), 0
    for _ in range(500):
        path.write_bytes(accident(content, chance))
        try:
            with bounded_time():
                got = read_images("images", str(path)).images
        except (FileError, OptionError) as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500 + len(str(path))
            refused += 1
        else:
            assert got.dtype == torch.uint8 and got.ndim == 4 and got.shape[1] in (1, 3) and got.numel()
            if accident is damage:
                assert np.array_equal(got.numpy().transpose(0, 2, 3, 1), images)
    assert 150 < refused < 500


def array_file(header: bytes, data: bytes, compression: int) -> bytes:
    """An .npz whose arr_0 has this header, whatever its data are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        header = header.ljust(117) + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return file.getvalue()


CLAIMS = {
    "10^12 images": (b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 3)}", bytes(1000)),
    "10^9 images": (b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1, 1, 1)}", bytes(1000)),
    "more than any number": (b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 1, 1, 1)}" % 10**40, b""),
    "fewer than none": (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8, 3)}", bytes(1000)),
    "true of them": (b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, 8, 8, 3)}", bytes(192)),
    "no shape": (b"{'descr': '|u1', 'fortran_order': False}", bytes(1000)),
    "a name for the shape": (b"{'descr': '|u1', 'fortran_order': False, 'shape': open}", bytes(1000)),
    "nesting": (b"(" * 5000, b""),
    "a bomb of texts": (b"{'descr': '<U100000000', 'fortran_order': False, 'shape': (9, 8, 8, 3)}", bytes(1000)),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_an_array_that_claims_what_is_not_there_is_refused_at_once(claim, compression, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(array_file(*CLAIMS[claim], compression))
    with bounded_time(), pytest.raises(FileError) as refused:
        read_images("images", str(path))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_pickle_with_a_text_of_unknown_escapes_is_refused_without_a_warning():
    """Python warns of them while it reads the argument of an opcode that no checkpoint has."""
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        read_pickle(b"\x80\x02S'\\G'\n.")
