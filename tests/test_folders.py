"""Folders of images: which files and classes are found, what is reported, what is refused, which batches result."""

import itertools
import os
import shutil
import unicodedata
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from image_helpers import encoded, means, open_folder, plain, smooth, write
from PIL import Image

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.files import scan
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.files.folders import list_images
from tiny_diffusion.data.files.stores import LazyImages, TensorImages, VariableSizeImages
from tiny_diffusion.data.files.threads import MAX_WAITING
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.errors import FileError, OptionError

PNG = encoded(plain(100))  # for tests in which the pixels do not matter
as_root = hasattr(os, "geteuid") and os.geteuid() == 0
not_as_root = pytest.mark.skipif(as_root, reason="root may read everything")


def fill(folder, *names, content=PNG):
    for name in names:
        write(folder / name, content)
    return folder


def found(folder, **options):
    """{name: class or None} of the training images, in their order."""
    files = list_images(folder, **options)
    names = files.class_names
    return {name: names[label] if names else None for name, label in zip(files.names, files.labels, strict=True)}


def refused(folder, error=FileError, **options):
    """The message with which the folder is refused."""
    with pytest.raises(error) as caught:
        open_folder(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# Which files, which classes


def test_a_flat_folder_has_no_classes(tmp_path):
    fill(tmp_path, "a.png", "b.png", "c.png")
    data = open_folder(tmp_path)
    assert found(tmp_path) == {"a.png": None, "b.png": None, "c.png": None}
    assert data.class_names == () and data.labels.tolist() == [0, 0, 0] and data.labels.dtype == torch.int64


def test_sub_folders_are_classes_in_the_order_people_count(tmp_path):
    fill(
        tmp_path, *(f"{name}/{i}.png" for name in ("10", "9", "2", "class 10", "class 9", "alpha") for i in (1, 10, 9))
    )
    assert list_images(tmp_path).class_names == ("2", "9", "10", "alpha", "class 9", "class 10")
    assert list(found(tmp_path))[:3] == ["2/1.png", "2/9.png", "2/10.png"]
    assert all(name.startswith(f"{label}/") for name, label in found(tmp_path).items())


def test_the_order_does_not_depend_on_the_file_systems(tmp_path, monkeypatch):
    """Else a copy of the folder would have other labels."""
    fill(tmp_path, "1/a.png", "01/a.png", "001/a.png", "b/1.png", "b/01.png", "b/00001.png", "B/x.png")
    listed, scandir = list_images(tmp_path), os.scandir
    for order in (reversed, lambda entries: sorted(entries, key=lambda entry: entry.name)):
        monkeypatch.setattr(os, "scandir", lambda path, order=order: nullcontext(list(order(list(scandir(path))))))
        other = list_images(tmp_path)
        assert (other.names, other.class_names, other.labels) == (listed.names, listed.class_names, listed.labels)


def test_folders_within_a_class_are_of_that_class(tmp_path):
    fill(tmp_path, "cat/a.png", "cat/2024/may/b.png", "dog/2024/c.png", "dog/d.png")
    assert found(tmp_path) == {
        "cat/2024/may/b.png": "cat",
        "cat/a.png": "cat",
        "dog/2024/c.png": "dog",
        "dog/d.png": "dog",
    }


@pytest.mark.parametrize("wrapper", ["photos", "photos/images", "train"])
def test_the_one_folder_that_an_archive_unpacks_to_is_no_class(wrapper, tmp_path):
    fill(tmp_path, f"{wrapper}/cat/a.png", f"{wrapper}/dog/b.png", "README.txt")
    assert found(tmp_path) == {f"{wrapper}/cat/a.png": "cat", f"{wrapper}/dog/b.png": "dog"}


def test_images_in_one_folder_alone_have_no_classes(tmp_path):
    fill(tmp_path, "photos/a.png", "photos/b.png")
    assert set(found(tmp_path).values()) == {None}


def test_images_beside_the_sub_folders_leave_no_classes_and_the_report_says_so(tmp_path):
    fill(tmp_path, "cat/a.png", "dog/b.png", "c.png")
    data = open_folder(tmp_path)
    assert data.class_names == () and len(data) == 3
    assert any("no classes, because 1 images lie beside the 2 sub-folders" in line for line in data.report)


# Splits

SPLIT = ("train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "test/cat/4.png", "test/eel/5.png")


def test_sub_folders_train_and_test_are_splits_and_not_classes(tmp_path):
    fill(tmp_path, *SPLIT)
    assert found(tmp_path) == {"train/cat/1.png": "cat", "train/dog/2.png": "dog", "train/dog/3.png": "dog"}
    assert found(tmp_path, heldout=True) == {"test/cat/4.png": "cat", "test/eel/5.png": "eel"}
    train, heldout = open_folder(tmp_path), open_folder(tmp_path, heldout=True)
    assert train.class_names == heldout.class_names == ("cat", "dog", "eel")
    assert any("train" in line and "held out: test" in line for line in train.report)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "TEST"),
        ("training", "testing"),
        ("train", "val"),
        ("train", "validation"),
        ("train", "eval"),
        ("train", "dev"),
    ],
)
def test_splits_may_have_any_of_their_usual_names(names, tmp_path):
    fill(tmp_path, f"{names[0]}/a.png", f"{names[1]}/b.png")
    assert list(found(tmp_path)) == [f"{names[0]}/a.png"]
    assert list(found(tmp_path, heldout=True)) == [f"{names[1]}/b.png"]


def test_splits_may_be_wrapped_and_flat(tmp_path):
    fill(tmp_path, "set/train/a.png", "set/train/b.png", "set/test/c.png")
    assert found(tmp_path) == {"set/train/a.png": None, "set/train/b.png": None}
    assert list(found(tmp_path, heldout=True)) == ["set/test/c.png"]


def test_chosen_splits_train_and_the_others_are_held_out(tmp_path):
    fill(tmp_path, *SPLIT, "val/dog/6.png")
    both = found(tmp_path, splits=("train", "test"))
    assert list(both) == [*SPLIT[3:], *SPLIT[:3]]  # in the order of their names
    assert list(found(tmp_path, splits=("train", "test"), heldout=True)) == ["val/dog/6.png"]
    everything = ("train", "test", "val")
    assert len(found(tmp_path, splits=everything)) == 6
    none_left = open_folder(tmp_path, splits=everything, heldout=True)
    assert len(none_left) == 0 and none_left.images.shape == (0, 3, 8, 8)


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    fill(tmp_path, *SPLIT)
    message = refused(tmp_path, OptionError, splits=("val",))
    assert "--splits val" in message and "test, train" in message


def test_splits_of_a_folder_without_any_are_refused(tmp_path):
    fill(tmp_path, "cat/a.png", "dog/b.png")
    assert "--splits train would be ignored" in refused(tmp_path, OptionError, splits=("train",))


@pytest.mark.parametrize("heldout", ["test", "val", "dev"])
def test_images_outside_of_the_splits_are_left_out_and_counted(heldout, tmp_path):
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{heldout}/cat/3.png", "docs/logo.png", "banner.png")
    assert found(tmp_path) == {"train/cat/1.png": "cat", "train/dog/2.png": "dog"}
    assert found(tmp_path, heldout=True) == {f"{heldout}/cat/3.png": "cat"}
    assert any("left out, because in none of these splits: 2" in line for line in open_folder(tmp_path).report)


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, "bus/a.png", "train/b.png", "tram/c.png")
    assert list_images(tmp_path).class_names == ("bus", "train", "tram")


def test_a_folder_without_splits_has_nothing_to_hold_out(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    heldout = open_folder(tmp_path, heldout=True, channels=1, size=(6, 4))
    assert len(heldout) == 0 and heldout.images.shape == (0, 1, 6, 4)


# Names

SCRIPTS = [
    "猫",
    "قطة",
    "кошка",
    "γάτα",
    "고양이",
    "बिल्ली",
    "🐈",
    "👩‍👩‍👧",
    "Katze im Sack",
    "-rf",
    "a'b\"c",
    "%s",
    "{0}",
    "café",
]


def test_names_may_be_in_any_script(tmp_path):
    fill(tmp_path, *(f"{name}/{other}.png" for name in SCRIPTS for other in SCRIPTS[:3]))
    data = open_folder(tmp_path)
    assert sorted(data.class_names) == sorted(SCRIPTS)
    assert len(data) == 3 * len(SCRIPTS) and data.labels.bincount().tolist() == [3] * len(SCRIPTS)


def test_the_same_letters_composed_and_decomposed_are_the_same_class(tmp_path):
    for form in ("NFC", "NFD"):
        fill(tmp_path, unicodedata.normalize(form, "café") + f"/{form}.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system composes names itself")
    fill(tmp_path, "tea/a.png")
    assert list_images(tmp_path).class_names == (unicodedata.normalize("NFC", "café"), "tea")
    assert len(open_folder(tmp_path)) == 3


def test_names_that_are_not_text_are_read_and_shown_in_one_line(tmp_path):
    """Names that differ stay different classes."""
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8", b"caf\\xe9", b"\xff\xfe", b"a\nb", b"a\tb", b"a b")]
    try:
        fill(tmp_path, *(f"{name}/{name}.png" for name in names))
    except OSError:
        pytest.skip("this file system takes text only")
    data = open_folder(tmp_path)
    shown = [r"caf\xe9", r"caf\xe8", r"caf\\xe9", r"\xff\xfe", r"a\nb", r"a\tb", "a b"]
    assert len(data) == len(names) and sorted(data.class_names) == sorted(shown)
    for line in (*data.report, *data.class_names):
        assert line.encode("utf-8").decode().splitlines() == [line]
    fill(tmp_path, *(f"{name}/broken.png" for name in names), content=b"")
    open_folder(tmp_path)


def test_hidden_files_and_those_of_macos_are_ignored(tmp_path):
    fill(tmp_path, "cat/a.png", "dog/b.png", "cat/._a.png", ".hidden/c.png", "__MACOSX/cat/._a.png", ".d.png")
    fill(tmp_path, ".DS_Store", "cat/.DS_Store", content=b"x")
    files = list_images(tmp_path)
    assert (files.names, files.others) == (("cat/a.png", "dog/b.png"), 0)


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#recycle"])
def test_folders_of_the_operating_system_are_ignored(name, tmp_path):
    """At the top they would be classes, or images beside the classes; below a class, duplicates."""
    fill(tmp_path, "cat/a.png", "dog/b.png", f"{name}/c.png", f"cat/{name}/SYNOPHOTO_THUMB_M.png")
    assert found(tmp_path) == {"cat/a.png": "cat", "dog/b.png": "dog"}


def test_files_that_are_not_images_are_ignored_and_counted(tmp_path):
    fill(tmp_path, "a.png", "b.jpg.txt", "Thumbs.db", "labels.csv", "png", "movie.mp4", "c.psd")
    data = open_folder(tmp_path)
    assert len(data) == 1
    assert any("6 files" in line for line in data.report)


# Links


@pytest.fixture
def link():
    """link(new path, what it points to), skipped where there are no links."""

    def make(path, target):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.symlink_to(target)
        except (OSError, NotImplementedError):
            pytest.skip("no links here")

    return make


def test_links_to_files_and_folders_are_followed(tmp_path, link):
    fill(tmp_path / "elsewhere", "a.png", "deep/b.png")
    link(tmp_path / "set" / "cat", tmp_path / "elsewhere")
    link(tmp_path / "set" / "dog" / "c.png", tmp_path / "elsewhere" / "a.png")
    assert found(tmp_path / "set") == {"cat/a.png": "cat", "cat/deep/b.png": "cat", "dog/c.png": "dog"}
    assert len(open_folder(tmp_path / "set")) == 3


def test_the_folder_itself_may_be_a_link(tmp_path, link):
    fill(tmp_path / "real", "a.png")
    link(tmp_path / "set", tmp_path / "real")
    assert list(found(tmp_path / "set")) == ["a.png"]


def test_a_link_to_a_folder_above_it_is_not_followed(tmp_path, link):
    """To itself, to a folder above it, to the folder that holds the set, and to the root of everything."""
    fill(tmp_path, "beside.png")
    fill(tmp_path / "set", "cat/a.png", "dog/b.png")
    for number, target in enumerate((".", "..", "../..", tmp_path / "set", tmp_path, "/")):
        link(tmp_path / "set" / "cat" / f"loop {number}", target)
    link(tmp_path / "set" / "cat" / "down" / "up", "../..")
    assert list(found(tmp_path / "set")) == ["cat/a.png", "dog/b.png"]


def test_two_folders_that_link_to_each_other_are_read_once_each(tmp_path, link):
    fill(tmp_path, "a/1.png", "b/2.png")
    link(tmp_path / "a" / "to b", tmp_path / "b")
    link(tmp_path / "b" / "to a", tmp_path / "a")
    assert list(found(tmp_path)) == ["a/1.png", "b/2.png"]


def test_a_lattice_of_links_is_read_once(tmp_path, link):
    """Each folder links to all others: there are 14! paths through them."""
    numbers = range(14)
    fill(tmp_path, *(f"{number}/{number}.png" for number in numbers))
    for number, other in itertools.permutations(numbers, 2):
        link(tmp_path / f"{number}" / f"to {other}", tmp_path / f"{other}")
    assert list(found(tmp_path)) == [f"{number}/{number}.png" for number in numbers]


def test_a_folder_that_two_links_lead_to_is_read_by_the_first_and_the_report_says_so(tmp_path, link):
    fill(tmp_path / "elsewhere", "a.png")
    fill(tmp_path / "set" / "own", "b.png")
    for name in ("10", "9", "x"):
        link(tmp_path / "set" / name, tmp_path / "elsewhere")
    link(tmp_path / "set" / "another", "own")
    assert found(tmp_path / "set") == {"9/a.png": "9", "own/b.png": "own"}
    assert any("not followed: 3" in line for line in open_folder(tmp_path / "set").report)


def test_a_link_to_nothing_or_to_itself_is_an_unreadable_image(tmp_path, link):
    fill(tmp_path, "a.png")
    link(tmp_path / "gone.png", tmp_path / "nowhere.png")
    link(tmp_path / "self.png", tmp_path / "self.png")
    link(tmp_path / "self", tmp_path / "self")
    data = open_folder(tmp_path)
    assert len(data) == 1
    (line,) = [line for line in data.report if "unreadable" in line]
    assert "gone.png (a link to nothing)" in line and "self.png (" in line


def test_only_regular_files_are_images(tmp_path):
    """A folder called x.png is a folder; opening a pipe would wait for a writer."""
    fill(tmp_path, "cat/a.png", "folder.png/b.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert found(tmp_path) == {"cat/a.png": "cat", "folder.png/b.png": "folder.png"}
    assert len(open_folder(tmp_path)) == 2


# What is refused


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "no")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    assert "not a folder" in refused(write(tmp_path / "set.zip", b"PK"))


def test_an_empty_folder_is_refused_with_the_known_formats(tmp_path):
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "a" / "b").mkdir(parents=True)
        message = refused(folder)
        assert "holds nothing" in message and "png, jpg" in message


def test_a_folder_of_text_files_is_refused(tmp_path):
    fill(tmp_path, "a.txt")
    assert "no image but 1 other file." in refused(tmp_path)
    fill(tmp_path, "b.csv", "c/d.json")
    assert "no image but 3 other files." in refused(tmp_path)


def test_a_folder_of_broken_images_is_refused_with_the_first_of_them(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(5)), content=b"nonsense")
    message = refused(tmp_path)
    assert "none of the 5 images" in message and "0.png (not a PNG" in message and "and 2 more" in message


def test_one_broken_image_alone_is_refused(tmp_path):
    fill(tmp_path, "a.png", content=b"")
    assert "none of the 1 images" in refused(tmp_path)


ALLOWED = [(2, 1), (12, 10), (101, 10), (110, 11)]


@pytest.mark.parametrize("cache_bytes", [2e9, 0])
@pytest.mark.parametrize("count, allowed", ALLOWED)
def test_the_larger_of_ten_files_and_a_tenth_may_be_unreadable_and_no_more(count, allowed, cache_bytes, tmp_path):
    fill(tmp_path, *(f"good {i}.png" for i in range(count - allowed)))
    fill(tmp_path, *(f"bad {i}.png" for i in range(allowed)), content=b"")
    data = open_folder(tmp_path, cache_bytes=cache_bytes)
    assert len(data) == len(data.labels) == count - allowed
    (line,) = [line for line in data.report if "unreadable" in line]
    for i in range(min(allowed, 10)):
        assert f"bad {i}.png" in line
    (tmp_path / "good 0.png").write_bytes(b"")
    message = refused(tmp_path, cache_bytes=cache_bytes)
    assert f"{allowed + 1} of the {count} images" in message or f"none of the {count} images" in message


@pytest.mark.parametrize("cache_bytes", [2e9, 0])
def test_truncated_images_count_as_unreadable_too(cache_bytes, tmp_path):
    """The header of a truncated image is intact: only decoding shows the damage, now or while training."""
    fill(tmp_path, *(f"good {i}.png" for i in range(20)))
    fill(tmp_path, *(f"bad {i}.png" for i in range(5)), content=b"")
    whole = encoded(np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8))
    fill(tmp_path, *(f"cut {i}.png" for i in range(5)), content=whole[: len(whole) // 2])
    data = open_folder(tmp_path, cache_bytes=cache_bytes)
    assert set(means(data)) == {100}
    fill(tmp_path, "one more.png", content=whole[: len(whole) // 2])
    with pytest.raises(FileError, match="11 of the 31 images"):
        means(open_folder(tmp_path, cache_bytes=cache_bytes))


def test_a_file_of_several_gigabytes_is_not_read(tmp_path):
    fill(tmp_path, "a.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    data = open_folder(tmp_path)
    assert len(data) == 1 and any("huge.png (larger than 1,024 MB)" in line for line in data.report)


@not_as_root
def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path):
    fill(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "dog").chmod(0)
    try:
        assert "dog" in refused(tmp_path) and "ermission" in refused(tmp_path)
    finally:
        (tmp_path / "dog").chmod(0o755)


@not_as_root
def test_a_file_that_may_not_be_read_is_skipped(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").chmod(0)
    data = open_folder(tmp_path)
    assert len(data) == 1 and any("b.png (Permission denied)" in line for line in data.report)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    fill(tmp_path, "a.png")

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert "Permission denied" in refused(tmp_path)


def test_heic_files_are_images_even_where_they_cannot_be_read(tmp_path, monkeypatch):
    """A few are skipped by name; a folder full of them is refused rather than trained on without them."""
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    fill(tmp_path, "a.png", "b.png")
    fill(tmp_path, "c.heic", "d.HEIF", content=heic)
    (line,) = [line for line in open_folder(tmp_path).report if "unreadable" in line]
    assert "c.heic (" in line and "d.HEIF (" in line
    fill(tmp_path, *(f"{i}.heic" for i in range(50)), content=heic)
    assert "52 of the 54 images" in refused(tmp_path)


# The report


def test_the_report_counts_kinds_sizes_and_classes(tmp_path):
    fill(tmp_path, "cat/1.png", content=encoded(smooth(20, 30)))
    fill(tmp_path, "cat/2.jpg", "dog/3.JPEG", content=encoded(smooth(5, 4), "jpg"))
    fill(tmp_path, "dog/4.gif", content=encoded(plain(9, 8, 50), "gif"))
    fill(tmp_path, "dog/broken.png", content=b"")
    fill(tmp_path, "dog/notes.txt", content=b"")
    about, classes, *rest = open_folder(tmp_path).report
    assert about == f"{tmp_path}: 2 JPEG, 1 PNG, 1 GIF, colour, 5x4 to 20x30 pixels (height x width)"
    assert classes == "2 classes: cat 2, dog 2"
    assert rest[0] == "enlarged, because smaller than 8x8: 2"
    assert rest[1].startswith("skipped, because unreadable: dog/broken.png (")
    assert rest[2] == "ignored, because not an image: 1 file"
    assert rest[3].startswith("4 images decoded in ")


def test_one_size_is_reported_once(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    assert open_folder(tmp_path).report[0] == f"{tmp_path}: 2 PNG, grey, 8x8 pixels"


def test_a_class_of_one_image_gets_a_warning(tmp_path):
    fill(tmp_path, "cat/1.png", "cat/2.png", "dog/3.png", "eel/4.png", "eel/5.png")
    (tmp_path / "eel" / "5.png").write_bytes(b"")
    (line,) = [line for line in open_folder(tmp_path).report if line.startswith("warning")]
    assert "memorised: dog, eel" in line


@pytest.mark.parametrize("cache_bytes", [2e9, 0])
@pytest.mark.parametrize("bits, narrow", [(10, True), (12, True), (14, True), (15, False), (16, False)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_data_of_few_bits_in_images_of_16_get_a_warning(ending, bits, narrow, cache_bytes, tmp_path):
    """A single pixel of the largest value shows how many bits there are, in one image of several."""
    for number in range(3):
        values = np.full((40, 40), 30, np.uint16)
        values[20, 20] = 2**bits - 1 if number == 1 else 60
        write(tmp_path / "set" / f"{number}.{ending}", values)
    for _ in range(2):  # from the files, then from the cache
        report = open_folder(tmp_path / "set", cache=Cache(tmp_path / "cache"), cache_bytes=cache_bytes).report
        assert any("16 bits" in line and "multiply" in line for line in report) == narrow


def test_whether_images_use_their_16_bits_is_not_asked_of_huge_ones(tmp_path, monkeypatch):
    """Each is decoded at its full size, which took 2.6 GB for a file of 350 kB."""
    sizes, decode_ = [], scan.decode
    monkeypatch.setattr(scan, "decode", lambda path, spec: sizes.append(spec.size) or decode_(path, spec))
    monkeypatch.setattr(scan, "MAX_DEEP_PIXELS", 1000)
    for name, side in {"a": 31, "b": 32}.items():
        write(tmp_path / f"{name}.png", np.full((side, side), 60, np.uint16))
    assert any("16 bits" in line for line in open_folder(tmp_path).report)
    assert sizes == [(31, 31)]


def test_dark_images_of_8_bits_get_no_warning(tmp_path):
    fill(tmp_path, "a.png", content=encoded(plain(3)))
    assert not any("16 bits" in line for line in open_folder(tmp_path).report)


def test_the_report_names_a_dozen_of_many_classes(tmp_path):
    fill(tmp_path, *(f"{number}/{i}.png" for number in range(1, 31) for i in (1, 2)))
    data = open_folder(tmp_path)
    assert len(data.class_names) == 30
    assert data.report[1] == f"30 classes: {', '.join(f'{number} 2' for number in range(1, 13))} and 18 more"


GREYS = {
    "one bit": Image.fromarray(plain(255) > 0),
    "grey": plain(9),
    "16 bits": np.full((8, 8), 9999, np.uint16),
    "grey and alpha": Image.fromarray(plain(9)).convert("LA"),
    "a palette of greys": Image.fromarray(smooth(8, 8)[..., 0]).quantize(4),
}


@pytest.mark.parametrize("image", GREYS.values(), ids=GREYS)
def test_a_folder_has_one_channel_if_all_of_its_images_are_grey(image, tmp_path):
    fill(tmp_path, "a.png", content=encoded(image))
    assert open_folder(tmp_path).channels == 1
    fill(tmp_path, "b.png", content=encoded(smooth(8, 8)))
    assert open_folder(tmp_path).channels == 3


def test_a_coloured_background_behind_transparent_greys_makes_three_channels(tmp_path):
    fill(tmp_path, "a.png", content=encoded(Image.new("LA", (8, 8), (0, 0))))
    for background, wanted in (("white", [255]), ("black", [0]), ("grey", [128]), ("#ff8000", [255, 128, 0])):
        data = open_folder(tmp_path, background=background)
        assert data.channels == len(wanted)
        assert data.images[:][0, :, 0, 0].tolist() == wanted
    fill(tmp_path, "a.png")
    assert open_folder(tmp_path, background="#ff8000").channels == 1  # no pixel is transparent


def test_progress_sees_each_image(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(7)))
    seen = Counter()

    def progress(items, count, doing):
        for item in items:
            seen[doing, count] += 1
            yield item

    open_folder(tmp_path, progress=progress)
    assert seen == {("scanning the images", 7): 7, ("decoding the images", 7): 7}


# Many files, few files


def test_more_files_than_may_wait_in_memory_at_once(tmp_path):
    for i in range(500):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    data = open_folder(tmp_path, workers=2)
    assert len(data) > 2 * 2 * MAX_WAITING and data.images.shape == (500, 1, 8, 8) and (data.images[:] == 100).all()
    assert list_images(tmp_path).names == tuple(f"{i}.png" for i in range(500))


@pytest.mark.parametrize("cache_bytes", [2e9, 0])
def test_a_folder_smaller_than_a_batch_fills_it(cache_bytes, tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", plain(50 * i))
    batches = Batches(open_folder(tmp_path, cache_bytes=cache_bytes), 8, seed=0)
    seen = torch.cat([batches.at(step)[0].mean((1, 2, 3)) for step in range(3)])
    assert Counter(((seen + 1) * 127.5).round().int().tolist()) == {0: 8, 50: 8, 100: 8}


# In memory and on disk


@pytest.fixture
def photographs(tmp_path):
    """Thirteen images of all shapes, in two classes."""
    for i, (height, width) in enumerate(itertools.product((30, 48, 100), (30, 45, 64, 120))):
        write(tmp_path / "set" / "ab"[i % 2] / f"{i}.jpg", smooth(height, width, seed=i))
    write(tmp_path / "set" / "a" / "last.png", smooth(7, 5, seed=99))
    return tmp_path / "set"


def batches_of(data, **options):
    return Batches(data, 5, seed=4, **options)


def assert_same_batches(first, second, steps=8):
    for step in range(steps):
        for one, other in zip(first.at(step), second.at(step), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("size, hflip, workers", [((16, 16), False, 0), ((24, 16), True, 1), ((24, 16), True, 3)])
def test_images_in_memory_and_images_read_again_make_the_same_batches(size, hflip, random_crop, workers, photographs):
    kept = open_folder(photographs, size, random_crop=random_crop, workers=workers)
    read = open_folder(photographs, size, random_crop=random_crop, workers=workers, cache_bytes=0)
    assert isinstance(kept.images, VariableSizeImages if random_crop else TensorImages) and isinstance(
        read.images, LazyImages
    )
    assert kept.images.shape == read.images.shape == (13, 3, *size)
    assert torch.equal(kept.labels, read.labels)
    assert_same_batches(batches_of(kept, hflip=hflip), batches_of(read, hflip=hflip))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_from_disk_are_a_function_of_the_seed_and_the_step(workers, photographs):
    data = open_folder(photographs, (16, 16), random_crop=True, cache_bytes=0, workers=workers)
    in_order = batches_of(data)
    wanted = [in_order.at(step)[0] for step in range(12)]
    for jumping in (batches_of(data), batches_of(open_folder(photographs, (16, 16), random_crop=True))):
        for step in np.random.default_rng(0).permutation(12).tolist() + [3, 3]:
            assert torch.equal(jumping.at(step)[0], wanted[step])
    resumed = batches_of(open_folder(photographs, (16, 16), random_crop=True, cache_bytes=0, workers=workers))
    for step in range(7, 12):
        assert torch.equal(resumed.at(step)[0], wanted[step])


def test_random_crops_visit_all_of_an_image_and_the_others_its_centre(tmp_path):
    """A ramp along the longer side shows where a crop lies: from its first eight pixels to its last."""
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None], (32, 8))
    write(tmp_path / "a.png", np.ascontiguousarray(ramp))
    positions = np.random.default_rng(0).random((512, 2))
    crops = open_folder(tmp_path, random_crop=True).images.take(np.zeros(512, np.int64), positions)
    tops = crops[:, 0, 0, 0] // 8
    assert tops.tolist() == np.floor(positions[:, 0] * 25).astype(int).tolist()
    centre = open_folder(tmp_path).images[:][0, 0, :, 0]
    assert centre.tolist() == list(range(12 * 8, 20 * 8, 8))


def test_random_crops_differ_between_steps_and_between_seeds(tmp_path):
    write(tmp_path / "a.png", np.ascontiguousarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (200, 8))))
    data = open_folder(tmp_path, random_crop=True, size=8)
    tops = {
        (seed, step): tuple(Batches(data, 16, seed).at(step)[0][:, 0, 0, 0].tolist())
        for seed in range(4)
        for step in range(4)
    }
    assert len(set(tops.values())) == 16


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 5)])
def test_needless_random_crops_are_refused(size, tmp_path):
    fill(tmp_path, "a.png", "b.png")
    assert "--random_crop would be ignored" in refused(tmp_path, OptionError, size=size, random_crop=True)
    write(tmp_path / "c.png", plain(3, 8, 9))
    assert len(open_folder(tmp_path, size=(16, 16), random_crop=True)) == 3
    assert len(open_folder(tmp_path, size=(8, 6), random_crop=True)) == 3


def test_a_long_strip_takes_no_more_memory_than_a_few_images(tmp_path):
    write(tmp_path / "strip.png", plain(7, 1, 60_000))
    data = open_folder(tmp_path, size=64, random_crop=True)
    assert data.images.pixels.numel() <= 4 * 64 * 64
    assert (Batches(data, 4, 0).at(0)[0] == 7 / 127.5 - 1).all()


@pytest.mark.parametrize("random_crop", [False, True])
def test_images_come_in_the_order_of_their_indices(random_crop, photographs):
    for cache_bytes in (2e9, 0):
        data = open_folder(photographs, 16, random_crop=random_crop, cache_bytes=cache_bytes)
        forth, back = data.take(np.arange(13)), data.take(np.arange(13)[::-1].copy())
        assert torch.equal(forth, back.flip(0))
        assert torch.equal(data.images[[5, 5, 2]], forth[[5, 5, 2]])


def test_a_set_that_is_too_large_for_memory_is_decoded_as_it_is_read(photographs):
    kept = open_folder(photographs, 16, cache_bytes=13 * 16 * 16 * 3)
    read = open_folder(photographs, 16, cache_bytes=13 * 16 * 16 * 3 - 1, workers=2)
    assert isinstance(kept.images, TensorImages) and isinstance(read.images, LazyImages)
    assert "more than --cache_mb" in read.report[-1] and "2 threads" in read.report[-1]


# While it trains


@pytest.fixture
def graded(tmp_path):
    """A set on disk of 100 images in four classes; the tens digit of an image's grey is its class."""
    for i in range(100):
        write(tmp_path / "set" / f"class {i // 25}" / f"{i}.png", plain(50 * (i // 25) + i % 25))
    return tmp_path / "set"


def on_disk(folder, workers=2) -> ImageSet:
    data = open_folder(folder, cache_bytes=0, workers=workers)
    assert isinstance(data.images, LazyImages)
    return data


def damage(how, path):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["gone", "cut", "emptied", "a folder"])
def test_a_file_that_breaks_while_training_is_replaced_by_another_of_its_class(how, workers, graded):
    data = on_disk(graded, workers)
    before = data.take(np.arange(100))
    for i in (0, 24, 25, 60, 61, 62, 99):
        damage(how, graded / f"class {i // 25}" / f"{i}.png")
    after = data.take(np.arange(100))
    greys = after[:, 0, 0, 0].int()
    assert torch.equal(greys // 50, data.labels.int())
    changed = [i for i in range(100) if not torch.equal(before[i], after[i])]
    assert changed == [0, 24, 25, 60, 61, 62, 99]
    assert sorted(data.images.unreadable) == changed


def test_an_image_of_a_class_without_files_is_replaced_by_one_of_another_class(graded):
    write(graded / "single" / "a.png", plain(250))
    data = on_disk(graded)
    (graded / "single" / "a.png").unlink()
    assert means(data)[-1] < 250


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_files_that_break_end_the_training(workers, graded):
    data = on_disk(graded, workers)
    batches = batches_of(data)
    batches.at(0)
    for i in range(10):
        damage("gone", graded / "class 0" / f"{i}.png")
    for step in range(40):
        batches.at(step)
    damage("gone", graded / "class 3" / "99.png")
    with pytest.raises(FileError, match="11 of the 100 images") as ended:
        for step in range(40, 80):
            batches.at(step)
    assert "(gone)" in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_ends_the_training_by_name(workers, graded):
    batches = batches_of(on_disk(graded, workers))
    batches.at(0)
    shutil.rmtree(graded)
    # Threads may have found too many files gone before the folder itself was.
    with pytest.raises(FileError, match=r"has vanished|\(gone\)") as ended:
        for step in range(1, 20):
            batches.at(step)
    assert str(graded) in str(ended.value)


def test_a_folder_that_is_emptied_ends_the_training(graded):
    batches = batches_of(on_disk(graded))
    for path in graded.rglob("*.png"):
        path.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        for step in range(20):
            batches.at(step)


def test_images_in_memory_outlive_their_folder(graded):
    data = open_folder(graded)
    before = [batches_of(data).at(step)[0] for step in range(3)]
    shutil.rmtree(graded)
    for step in range(3):
        assert torch.equal(batches_of(data).at(step)[0], before[step])


def test_a_folder_that_vanishes_while_it_is_opened_is_refused(graded):
    def progress(items, count, doing):
        if doing == "decoding the images":
            shutil.rmtree(graded)
        return items

    assert "none of the 100 images" in refused(graded, progress=progress)


def test_heldout_images_are_decoded_only_when_they_are_read(tmp_path):
    fill(tmp_path, "train/a.png", "test/b.png", "test/c.png")
    heldout = open_folder(tmp_path, heldout=True, channels=1)
    assert isinstance(heldout.images, LazyImages) and heldout.images.shape == (2, 1, 8, 8)
    assert means(heldout) == [100, 100]
    assert open_folder(tmp_path, heldout=True, channels=3).take(np.arange(2)).shape == (2, 3, 8, 8)
