"""Scans image files before training: how many there are of each format and size, grey or colour, which are unreadable.

`files.folders` says which files there are; `files.decode` reads one.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from tiny_diffusion.data.files.decode import Header, ImageSpec, UnreadableImage, as_unreadable, decode, read_header
from tiny_diffusion.data.files.folders import ImageFiles, readable
from tiny_diffusion.data.files.memory import file_content
from tiny_diffusion.data.files.threads import in_threads
from tiny_diffusion.errors import FileError, printable

MAX_UNREADABLE, MAX_UNREADABLE_SHARE = 10, 0.1  # files that may be skipped: the larger of the two
MAX_BYTES = 1 << 30  # of one file
MAX_DEEP_READ, MAX_NARROW_LEVELS = 16, 65  # 16-bit images whose pixels are looked at; 14 bits span 65 of 256 levels
MAX_DEEP_PIXELS = 1 << 25  # of each of those, which is decoded at its full size
MAX_NAMED_FILES, MAX_NAMED_CLASSES = 3, 12  # in one line

Progress = Callable[[Iterable, int, str], Iterable]  # wraps a loop: (items, how many, what is done with them)


@dataclass(frozen=True)
class Scan:
    """What reading each file has shown.  formats: PNG -> 12 files.  unreadable: index -> reason.

    sizes: (height, width) -> how many files.  content: a hash of all bytes, or "" if the files were not read whole.
    narrow: whether images of 16 bits use no more than 14 of them.
    Not kept in JSON:  digests: the SHA-256 of each file, if they were read whole.  passing: whether a file could not be
    read for a reason that may be gone next time, so that none of this may be kept.
    """

    formats: dict[str, int]
    sizes: dict[tuple[int, int], int]
    channels: int
    unreadable: dict[int, str] = field(default_factory=dict)
    content: str = ""
    narrow: bool = False
    digests: tuple[bytes, ...] = ()
    passing: bool = False

    def to_json(self) -> dict:
        sizes = [[*size, count] for size, count in self.sizes.items()]
        unreadable = [[index, reason] for index, reason in self.unreadable.items()]
        about = {"kinds": self.formats, "sizes": sizes, "channels": self.channels}
        return {**about, "bad": unreadable, "content": self.content, "narrow": self.narrow}

    @classmethod
    def from_json(cls, about: dict) -> "Scan":
        sizes = {(height, width): count for height, width, count in about["sizes"]}
        return cls(
            about["kinds"], sizes, about["channels"], dict(about["bad"]), about["content"], narrow=about["narrow"]
        )


def scan(files: ImageFiles, workers: int, *, whole: bool, background: tuple[int, int, int], progress: Progress) -> Scan:
    """Reads the header of each file.  whole: also reads and hashes all bytes, by which decoded sets are cached.

    Raises FileError if more files are unreadable than may be skipped.
    """

    def scan_one(index: int) -> tuple[Header | UnreadableImage, bytes]:
        path, digest = files.path(index), bytes(32)
        if files.stats[index][0] > MAX_BYTES:
            return UnreadableImage(f"larger than {MAX_BYTES >> 20:,} MB"), digest
        try:
            with file_content(path) if whole else nullcontext(path) as content:
                digest = hashlib.sha256(content).digest() if whole else digest
                return read_header(content), digest
        except FileNotFoundError as error:
            return UnreadableImage("a link to nothing" if path.is_symlink() else error.strerror), digest
        except (UnreadableImage, OSError, MemoryError) as error:
            return as_unreadable(error), digest

    formats, sizes, failures, digests, deep = Counter(), Counter(), {}, [], []
    all_grey, coloured_background = True, len(set(background)) > 1
    scanned = in_threads(scan_one, range(len(files)), workers)
    for index, (header, digest) in enumerate(progress(scanned, len(files), "scanning the images")):
        digests.append(digest)
        if not isinstance(header, Header):
            failures[index] = header
            continue
        formats[header.format] += 1
        sizes[header.size] += 1
        all_grey = all_grey and header.grey and not (header.transparent and coloured_background)
        deep += [index] if header.deep and math.prod(header.size) <= MAX_DEEP_PIXELS else []
    reasons = {index: str(failure) for index, failure in failures.items()}
    refuse_unreadable(files, reasons)
    return Scan(
        dict(formats.most_common()),
        dict(sizes),
        channels=1 if all_grey else 3,
        unreadable=reasons,
        content=hashlib.sha256(b"".join(digests)).hexdigest() if whole else "",
        narrow=_levels_spanned(files, deep) <= MAX_NARROW_LEVELS if deep else False,
        digests=tuple(digests) if whole else (),
        passing=any(failure.passing for failure in failures.values()),
    )


def _levels_spanned(files: ImageFiles, deep: Sequence[int]) -> int:
    """How many of 256 levels the values of 16-bit images span: of all together, as far as a few images show it."""
    lowest, highest = 255, 0
    for index in deep[:: math.ceil(len(deep) / MAX_DEEP_READ)]:
        with suppress(UnreadableImage, OSError):
            path = files.path(index)
            pixels = decode(path, ImageSpec(read_header(path).size, 3, (0, 0, 0)))
            lowest, highest = min(lowest, int(pixels.min())), max(highest, int(pixels.max()))
    return highest - lowest + 1 if highest >= lowest else 256


def refuse_unreadable(files: ImageFiles, unreadable: dict[int, str]) -> None:
    """Raises FileError if more files are unreadable than may be skipped, or all of them are."""
    if len(unreadable) == len(files):
        raise FileError(
            f"none of the {len(files):,} images in {files.root} can be read: {named_files(files, unreadable)}."
        )
    if len(unreadable) > max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * len(files)):
        raise FileError(
            f"{len(unreadable):,} of the {len(files):,} images in {files.root} cannot be read: "
            f"{named_files(files, unreadable)}. At most {MAX_UNREADABLE} files or {MAX_UNREADABLE_SHARE:.0%} of them "
            "are skipped: repair or remove the others."
        )


def report(files: ImageFiles, found: Scan, size: tuple[int, int]) -> Iterator[str]:
    """Lines that describe the images of a folder.  size: (height, width) that they will be decoded to."""
    formats = ", ".join(f"{count:,} {name}" for name, count in found.formats.items())
    yield f"{files.root}: {formats}, {'grey' if found.channels == 1 else 'colour'}, {_sizes(found)}"
    if files.class_names:
        counts = Counter(label for index, label in enumerate(files.labels) if index not in found.unreadable)
        shown = [f"{printable(name)} {counts[label]:,}" for label, name in enumerate(files.class_names)]
        yield f"{len(shown)} classes: {_joined(shown, MAX_NAMED_CLASSES)}"
        if small := [printable(name) for label, name in enumerate(files.class_names) if counts[label] <= 1]:
            yield f"warning: a class of one image is memorised: {_joined(small, MAX_NAMED_FILES)} (one image or none)"
    if files.note:
        yield files.note
    if small := sum(count for (h, w), count in found.sizes.items() if h < size[0] or w < size[1]):
        yield f"enlarged, because smaller than {size[0]}x{size[1]}: {small:,}"
    if found.narrow:
        yield (
            "warning: the images of 16 bits use a quarter of their range or less, as data of 10 to 14 bits do, which "
            "leaves few grey levels in 8 bits: multiply their values, for example by 16 if they are of 12 bits"
        )
    if found.unreadable:
        yield f"skipped, because unreadable: {named_files(files, found.unreadable, MAX_UNREADABLE)}"
    if files.others:
        yield f"ignored, because not an image: {files.others:,} file{'' if files.others == 1 else 's'}"


def _sizes(found: Scan) -> str:
    by_area = sorted(found.sizes, key=lambda sides: sides[0] * sides[1])
    smallest, largest = (f"{height}x{width}" for height, width in (by_area[0], by_area[-1]))
    return f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels (height x width)"


def named_files(files: ImageFiles, unreadable: dict[int, str], max_named: int = MAX_NAMED_FILES) -> str:
    """The names of the first unreadable files, with the reasons."""
    reasons = [f"{printable(readable(files.names[index]))} ({reason})" for index, reason in sorted(unreadable.items())]
    return _joined(reasons, max_named)


def _joined(names: Sequence[str], max_named: int) -> str:
    more = len(names) - max_named
    return ", ".join(names[:max_named]) + (f" and {more:,} more" if more > 0 else "")
