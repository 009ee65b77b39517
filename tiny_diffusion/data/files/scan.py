"""What is in image files, before they train: how many of which kind, how large, in grey or colour, which are broken.

`data.folders` says which files; `data.decode` reads one.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tiny_diffusion.data.files.decode import Header, UnreadableImage, read_header
from tiny_diffusion.data.files.folders import ImageFiles, readable
from tiny_diffusion.data.files.threads import in_threads
from tiny_diffusion.errors import FileError

MAX_UNREADABLE, MAX_UNREADABLE_SHARE = 10, 0.1  # files: the larger of the two is passed over
MAX_BYTES = 1 << 30  # of one file
NAMED, NAMED_CLASSES = 3, 12  # of many, in one line

Progress = Callable[[Iterable, int, str], Iterable]  # wraps what is gone through: (items, how many, doing what)


@dataclass(frozen=True)
class Scan:
    """What a look into each file has shown.  kinds: PNG -> 12.  bad: index -> why it cannot be read.

    sizes: (height, width) -> how many.  content: a hash of all bytes, or nothing where they were not all read.
    """

    kinds: dict[str, int]
    sizes: dict[tuple[int, int], int]
    channels: int
    bad: dict[int, str] = field(default_factory=dict)
    content: str = ""

    def to_json(self) -> dict:
        sizes = [[*size, count] for size, count in self.sizes.items()]
        bad = [[index, reason] for index, reason in self.bad.items()]
        return {"kinds": self.kinds, "sizes": sizes, "channels": self.channels, "bad": bad, "content": self.content}

    @classmethod
    def from_json(cls, about: dict) -> "Scan":
        sizes = {(height, width): count for height, width, count in about["sizes"]}
        return cls(about["kinds"], sizes, about["channels"], dict(about["bad"]), about["content"])


def scan(files: ImageFiles, workers: int, *, whole: bool, background: tuple[int, int, int], progress: Progress) -> Scan:
    """Looks into each file.  whole: reads and hashes all of it, which a set that will be kept decoded is keyed by."""

    def look(index: int) -> tuple[Header | None, str, bytes]:
        path, digest = files.path(index), bytes(32)
        if files.stats[index][0] > MAX_BYTES:
            return None, f"larger than {MAX_BYTES >> 20:,} MB", digest
        try:
            content = path.read_bytes() if whole else path
            digest = hashlib.sha256(content).digest() if whole else digest
            return read_header(content), "", digest
        except UnreadableImage as error:
            return None, str(error), digest
        except OSError as error:
            return None, "a link to nothing" if path.is_symlink() else error.strerror or str(error), digest

    kinds, sizes, bad = Counter(), Counter(), {}
    grey, colour_behind = True, len(set(background)) > 1
    content = hashlib.sha256()
    found = in_threads(look, range(len(files)), workers)
    for index, (header, reason, digest) in enumerate(progress(found, len(files), "looking into the images")):
        content.update(digest)
        if header is None:
            bad[index] = reason
            continue
        kinds["JPEG" if header.kind == "MPO" else header.kind] += 1
        sizes[header.size] += 1
        grey = grey and header.grey and not (header.transparent and colour_behind)
    refuse_unreadable(files, bad)
    channels = 1 if grey else 3
    return Scan(dict(kinds.most_common()), dict(sizes), channels, bad, content.hexdigest() if whole else "")


def refuse_unreadable(files: ImageFiles, bad: dict[int, str]) -> None:
    """Raises FileError if more files cannot be read than may be passed over, or none is left."""
    if len(bad) == len(files):
        raise FileError(f"none of the {len(files):,} images in {files.root} can be read: {named(files, bad)}.")
    if len(bad) > max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * len(files)):
        raise FileError(
            f"{len(bad):,} of the {len(files):,} images in {files.root} cannot be read: {named(files, bad)}. "
            f"At most {MAX_UNREADABLE} or {MAX_UNREADABLE_SHARE:.0%} are passed over: repair or remove them."
        )


def named(files: ImageFiles, bad: dict[int, str], most: int = NAMED) -> str:
    """The first of the files that cannot be read, and why."""
    return _listed([f"{readable(files.names[index])} ({reason})" for index, reason in sorted(bad.items())], most)


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def report(files: ImageFiles, found: Scan, size: tuple[int, int]) -> Iterator[str]:
    """Lines that say what is in the folder."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.items())
    areas = sorted(found.sizes, key=lambda side: side[0] * side[1])
    (low, high) = (f"{h}x{w}" for h, w in (areas[0], areas[-1]))
    sizes = f"of {low} pixels" if low == high else f"from {low} to {high} pixels (height x width)"
    yield f"{files.root}: {kinds}, {'grey' if found.channels == 1 else 'colour'}, {sizes}"
    if files.class_names:
        counts = Counter(label for index, label in enumerate(files.labels) if index not in found.bad)
        shown = [f"{name} {counts[label]:,}" for label, name in enumerate(files.class_names)]
        yield f"{len(shown)} classes: {_listed(shown, NAMED_CLASSES)}"
        if single := [name for label, name in enumerate(files.class_names) if counts[label] <= 1]:
            yield f"warning: with one image or none a class is learnt by heart: {_listed(single, NAMED)}"
    if files.note:
        yield files.note
    if small := sum(count for (h, w), count in found.sizes.items() if h < size[0] or w < size[1]):
        yield f"enlarged, because smaller than {size[0]}x{size[1]}: {small:,}"
    if found.bad:
        yield f"passed over, because unreadable: {named(files, found.bad, MAX_UNREADABLE)}"
    if files.others:
        yield f"not counted, because no images: {files.others:,} file{'' if files.others == 1 else 's'}"
