"""The cache: an unchanged set is decoded once, and damage to the cache never changes what is opened."""

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import encoded, open_folder, plain, smooth, write

from tiny_diffusion.data.files import cache as cache_module
from tiny_diffusion.data.files import decode, scan, stores
from tiny_diffusion.data.files.cache import Cache, cache_folder
from tiny_diffusion.data.files.stores import LazyImages, VariableSizeImages

COUNT = 12


@pytest.fixture
def photographs(tmp_path):
    """Twelve images in two classes, a file that is not an image, and a truncated image."""
    for i in range(COUNT):
        write(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", smooth(20, 12 + i, seed=i))
    write(tmp_path / "set" / "a" / "broken.png", b"nonsense")
    noise = encoded(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8))
    write(tmp_path / "set" / "b" / "cut.png", noise[: len(noise) // 2])
    return tmp_path / "set"


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def reads(monkeypatch):
    """reads() -> how many files were scanned, and how many decoded, since the last call."""
    counts = {"scanned": 0, "decoded": 0}

    def counted(name, function):
        def count(*args):
            counts[name] += 1
            return function(*args)

        return count

    monkeypatch.setattr(scan, "read_header", counted("scanned", decode.read_header))
    monkeypatch.setattr(stores, "decode", counted("decoded", decode.decode))

    def since():
        done = counts["scanned"], counts["decoded"]
        counts.update(scanned=0, decoded=0)
        return done

    return since


ALL = (COUNT + 2, COUNT + 1)  # the file that is not an image is scanned and not decoded
variants = pytest.mark.parametrize(
    "options", [{}, {"random_crop": True}, {"background": "black"}, {"size": (6, 10)}], ids=str
)


def assert_same(first, second):
    """The same images, labels, names and report, except for the line on decoding."""
    everything = np.arange(len(first))
    assert torch.equal(first.take(everything), second.take(everything))
    assert torch.equal(first.labels, second.labels) and first.class_names == second.class_names
    assert first.report[:-1] == second.report[:-1]
    assert type(first.images) is type(second.images)
    if isinstance(first.images, VariableSizeImages):
        assert torch.equal(first.images.pixels, second.images.pixels)


# Hits


@variants
def test_the_second_opening_reads_no_file_and_gives_the_same(options, photographs, cache, reads):
    fresh = open_folder(photographs, **{"size": 8, **options})
    assert reads() == ALL
    first = open_folder(photographs, cache=cache, **{"size": 8, **options})
    assert reads() == ALL
    second = open_folder(photographs, cache=cache, **{"size": 8, **options})
    assert reads() == (0, 0)
    assert_same(fresh, first)
    assert_same(first, second)
    assert len(second) == COUNT and any("broken.png" in line and "cut.png" in line for line in second.report)
    assert "kept in" in first.report[-1] and "decoded before" in second.report[-1]


def test_a_moved_or_copied_folder_is_not_decoded_again(photographs, cache, reads, tmp_path):
    first = open_folder(photographs, cache=cache)
    reads()
    shutil.copytree(photographs, tmp_path / "copy")
    copied = open_folder(tmp_path / "copy", cache=cache)
    assert reads() == (COUNT + 2, 0)  # read once, to compare the content
    assert open_folder(tmp_path / "copy", cache=cache).images.shape == first.images.shape
    assert reads() == (0, 0)
    photographs.rename(tmp_path / "moved")
    moved = open_folder(tmp_path / "moved", cache=cache)
    assert reads() == (COUNT + 2, 0)
    for other in (copied, moved):
        assert torch.equal(other.images[:], first.images[:]) and torch.equal(other.labels, first.labels)


def test_touched_files_are_read_and_not_decoded_again(photographs, cache, reads):
    open_folder(photographs, cache=cache)
    reads()
    os.utime(photographs / "a" / "0.png", (0, 0))
    open_folder(photographs, cache=cache)
    assert reads() == (COUNT + 2, 0)


def test_a_set_that_is_read_from_disk_is_scanned_once(photographs, cache, reads):
    first = open_folder(photographs, cache=cache, cache_bytes=0)
    assert reads() == (COUNT + 2, 0) and isinstance(first.images, LazyImages)
    second = open_folder(photographs, cache=cache, cache_bytes=0)
    assert reads() == (0, 0) and second.report == first.report and len(second) == len(first)
    assert not list(cache.folder.glob("*.safetensors"))
    open_folder(photographs, cache=cache)  # now it is kept, so all of it is read
    assert reads() == ALL


# Misses


def rewrite_one_byte(photographs):
    """The change that is hardest to notice: the same size and the same modification time."""
    path = photographs / "a" / "0.png"
    about, content = path.stat(), bytearray(encoded(smooth(20, 12, seed=0)))
    assert path.read_bytes() == content
    image = smooth(20, 12, seed=0)
    for channel in range(256):  # another first pixel, packed to as many bytes
        image[0, 0, 0] = channel
        if len(encoded(image)) == len(content) and encoded(image) != content:
            break
    else:
        pytest.skip("no other image packs to as many bytes")
    path.write_bytes(encoded(image))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


CHANGES = {
    "a byte": rewrite_one_byte,
    "a name": lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "00.png"),
    "a class": lambda folder: (folder / "a" / "0.png").rename(folder / "b" / "0.png"),
    "the name of a class": lambda folder: (folder / "a").rename(folder / "z"),
    "a new file": lambda folder: write(folder / "a" / "new.png", plain(3)),
    "a file less": lambda folder: (folder / "a" / "0.png").unlink(),
    "two that change places": lambda folder: swap(folder / "a" / "0.png", folder / "b" / "1.png"),
    "a file that is whole again": lambda folder: write(folder / "a" / "broken.png", plain(3)),
}


def swap(one, other):
    one_had, other_had = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_had)
    other.write_bytes(one_had)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_set_that_has_changed_is_decoded_again(change, photographs, cache, reads):
    open_folder(photographs, cache=cache)
    reads()
    change(photographs)
    changed = open_folder(photographs, cache=cache)
    scanned, decoded = reads()
    assert scanned > 0 and decoded >= COUNT
    assert_same(open_folder(photographs), changed)


@pytest.mark.parametrize("options", [{"size": 9}, {"size": (8, 9)}, {"random_crop": True}, {"background": "black"}])
def test_another_size_crop_or_background_is_decoded_again(options, photographs, cache, reads):
    open_folder(photographs, cache=cache)
    reads()
    options = {"size": 8, **options}
    assert_same(open_folder(photographs, **options), open_folder(photographs, cache=cache, **options))
    assert reads() == tuple(2 * count for count in ALL)


def test_two_sizes_of_a_set_are_kept_side_by_side(photographs, cache, reads):
    for _ in range(2):
        for size in (8, 9):
            assert open_folder(photographs, size, cache=cache).images.shape[2:] == (size, size)
    assert reads() == tuple(2 * count for count in ALL)


# Errors that pass, and files that change meanwhile


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=repr)
@pytest.mark.parametrize("readings", [0, 1])  # before the error: none, or the scan's
@pytest.mark.parametrize("cache_bytes", [2e9, 0])
def test_an_error_that_passes_is_not_remembered(cache_bytes, readings, error, photographs, cache, monkeypatch):
    victim, opened, real_open = photographs / "a" / "4.png", [], builtins.open

    def failing(file, *args, **kwargs):
        if file == victim and not opened.append(file) and len(opened) > readings:
            raise error
        return real_open(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", failing)
        ill = open_folder(photographs, cache=cache, cache_bytes=cache_bytes)
        if len(opened) > readings:
            assert any("4.png" in line for line in ill.report)
    fresh, again = (open_folder(photographs, cache=kept, cache_bytes=cache_bytes) for kept in (Cache(None), cache))
    assert len(ill) == len(fresh) - (len(opened) > readings)
    assert_same(fresh, again)


@pytest.mark.parametrize("was_opened_before", [False, True])
def test_a_file_that_changes_between_scan_and_decoding_is_not_kept_under_its_old_content(
    was_opened_before, photographs, cache
):
    victim = photographs / "a" / "4.png"
    old = victim.read_bytes()
    if was_opened_before:
        open_folder(photographs, cache=cache)
        for kept in cache.folder.glob("*.safetensors"):
            kept.unlink()

    def changing(items, count, doing):
        if doing == "decoding the images":
            write(victim, plain(200, 20, 16))
        return items

    changed = open_folder(photographs, cache=cache, progress=changing)
    assert_same(open_folder(photographs), changed)
    write(victim, old)
    assert_same(open_folder(photographs), open_folder(photographs, cache=cache))


# Damage


def damaged(path, how):
    content = path.read_bytes()
    if how == "empty":
        content = b""
    elif how == "nonsense":
        content = b"\0nonsense" * 100
    elif how == "all but a byte":
        content = content[:-1]
    elif how == "zeros at the end":  # as after a power failure
        content = content[:-100] + bytes(100)
    elif how == "another byte in the middle":
        content = (
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    elif how == "another type of JSON":
        content = b"[1, 2, 3]"
    elif how == "another version's JSON":
        content = json.dumps({"kinds": {}}).encode()
    path.write_bytes(content)


HOW = ("empty", "nonsense", "all but a byte", "zeros at the end", "another byte in the middle")


@variants
@pytest.mark.parametrize(
    "ending, how",
    [
        *((ending, how) for ending in ("safetensors", "json") for how in HOW),
        ("json", "another type of JSON"),
        ("json", "another version's JSON"),
    ],
)
def test_a_damaged_cache_counts_as_missing_and_is_written_again(ending, how, options, photographs, cache, reads):
    options = {"size": 8, **options}
    first = open_folder(photographs, cache=cache, **options)
    reads()
    for path in cache.folder.glob(f"*.{ending}"):
        damaged(path, how)
    assert_same(first, open_folder(photographs, cache=cache, **options))
    assert reads()[1] == COUNT + (1 if ending == "json" else 0)  # the scan says that the truncated file is unreadable
    assert_same(first, open_folder(photographs, cache=cache, **options))
    assert reads() == (0, 0)


def test_any_byte_of_a_kept_set_may_be_wrong(photographs, cache):
    fresh = open_folder(photographs, cache=cache)
    (kept,) = cache.folder.glob("*.safetensors")
    content, draws = kept.read_bytes(), np.random.default_rng(0)
    for place in [*range(0, 300, 16), *draws.integers(0, len(content), 16).tolist()]:
        wrong = bytearray(content)
        wrong[place] ^= 1 << draws.integers(8)
        kept.write_bytes(wrong)
        assert_same(fresh, open_folder(photographs, cache=cache))


def test_any_digit_of_a_note_may_be_wrong(photographs, cache):
    """JSON with another digit, of a count or a size, is valid JSON all the same."""
    fresh = open_folder(photographs, cache=cache)
    for note in cache.folder.glob("*.json"):
        text = note.read_text()
        for place in [place for place, letter in enumerate(text) if letter.isdigit()][:: len(text) // 16]:
            note.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
            assert_same(fresh, open_folder(photographs, cache=cache))


def test_any_file_of_the_cache_may_be_missing(photographs, cache):
    fresh = open_folder(photographs, cache=cache)
    for path in list(cache.folder.iterdir()):
        path.unlink()
        assert_same(fresh, open_folder(photographs, cache=cache))


def test_an_interrupted_write_leaves_no_half_set(photographs, cache, reads, monkeypatch):
    import safetensors.torch

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half a")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_folder(photographs, cache=cache)
    assert not list(cache.folder.iterdir())
    reads()
    open_folder(photographs, cache=cache)
    assert reads() == ALL


def test_a_full_disk_is_no_error(photographs, cache, monkeypatch):
    import safetensors
    import safetensors.torch

    for failure in (OSError(28, "No space left on device"), safetensors.SafetensorError("IoError(No space left)")):

        def full(tensors, path, metadata, failure=failure):
            path.write_bytes(b"half a")
            raise failure

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        data = open_folder(photographs, cache=cache)
        assert len(data) == COUNT and "kept" not in data.report[-1]
        assert not list(cache.folder.glob("*.part")) and not list(cache.folder.glob(".*"))


# Where it is


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_no_error(place, photographs, tmp_path):
    write(tmp_path / "file")
    for options in ({}, {"cache_bytes": 0}, {"random_crop": True}):
        data = open_folder(photographs, cache=Cache(tmp_path / place), **options)
        assert "kept" not in data.report[-1]
        assert_same(open_folder(photographs, **options), data) if "cache_bytes" not in options else None


def test_a_cache_that_may_only_be_read_is_read(photographs, cache, reads, monkeypatch):
    open_folder(photographs, cache=cache)
    reads()

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    for name in ("utime", "replace"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(Path, "write_text", read_only)
    assert len(open_folder(photographs, cache=cache)) == COUNT
    assert reads() == (0, 0)


def test_the_cache_is_in_the_users_cache_folder_or_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(tmp_path / "run") == tmp_path / "xdg" / "tiny_diffusion"
    assert list((tmp_path / "xdg" / "tiny_diffusion").iterdir()) == []
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache_folder(tmp_path / "run") == tmp_path / "home" / ".cache" / "tiny_diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file")))
    assert cache_folder(tmp_path / "run") == tmp_path / "run" / "cache"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder(tmp_path / "run") == tmp_path / "run" / "cache"


@pytest.mark.skipif(os.name == "nt", reason="no permissions")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_the_cache_have_the_permissions_that_the_umask_leaves(umask, mode, photographs, cache):
    before = os.umask(umask)
    try:
        open_folder(photographs, cache=cache)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {mode}


# Two at once, and room


def test_two_threads_that_fill_it_at_once_both_succeed(photographs, cache, reads):
    fresh, opened, start = open_folder(photographs), [], threading.Barrier(4)

    def fill():
        start.wait()
        opened.append(open_folder(photographs, cache=cache))

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for data in opened:
        assert torch.equal(data.images[:], fresh.images[:]) and torch.equal(data.labels, fresh.labels)
    reads()
    assert_same(fresh, open_folder(photographs, cache=cache))
    assert reads() == (0, 0)
    assert not list(cache.folder.glob(".*"))


FILL = """
import sys
from pathlib import Path
from tiny_diffusion.data.files.cache import Cache, cache_folder
from tiny_diffusion.data.sources import open_dataset
data = open_dataset("folder", data_dir=sys.argv[1], size=8, cache=Cache(cache_folder(Path("nowhere"))))
print(len(data), int(data.images[:].sum()))
"""


@pytest.mark.slow  # the threads above show the same, sooner
def test_two_processes_that_fill_it_at_once_both_succeed(photographs, reads):
    processes = [
        subprocess.Popen([sys.executable, "-c", FILL, photographs], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    fresh = open_folder(photographs)
    wanted = f"{COUNT} {int(fresh.images[:].sum())}\n"
    assert [process.communicate()[0] for process in processes] == [wanted] * 2
    reads()
    assert_same(fresh, open_folder(photographs, cache=Cache(cache_folder(Path("nowhere")))))
    assert reads() == (0, 0)


def test_the_sets_not_used_for_longest_make_room_for_new_ones(photographs, cache, reads, monkeypatch):
    """Room for two; the one that was used again outlives the one that came after it."""
    kept = {}
    for age, size in ((200, 8), (100, 9)):
        open_folder(photographs, size, cache=cache)
        (kept[size],) = set(cache.folder.glob("*.safetensors")) - set(kept.values())
        os.utime(kept[size], (0, time.time() - age))
    open_folder(photographs, 8, cache=cache)
    monkeypatch.setattr(cache_module, "MAX_BYTES", 2.5 * kept[9].stat().st_size)
    open_folder(photographs, 10, cache=cache)
    reads()
    for size, again in ((8, False), (10, False), (9, True)):
        open_folder(photographs, size, cache=cache)
        assert (reads()[1] > 0) == again


def test_a_set_larger_than_all_room_is_kept_alone(photographs, cache, reads, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_BYTES", 1)
    for size in (8, 9):
        open_folder(photographs, size, cache=cache)
        assert len(list(cache.folder.glob("*.safetensors"))) == 1
    reads()
    open_folder(photographs, 9, cache=cache)
    assert reads() == (0, 0)


def test_old_temporary_files_of_killed_writers_are_removed(photographs, cache):
    old, new = (write(cache.folder / f".{name}.part", b"half a set") for name in ("old", "new"))
    os.utime(old, (0, 0))
    open_folder(photographs, cache=cache)
    assert not old.exists() and new.exists()
