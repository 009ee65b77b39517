"""Opens sets of image files, Flowers-102 and any folder: decoded once and kept, or decoded each time."""

import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from tiny_diffusion.data.catalog import background_colour
from tiny_diffusion.data.downloads import download
from tiny_diffusion.data.files.decode import ImageSpec
from tiny_diffusion.data.files.folders import ImageFiles, list_images, stats_of, status
from tiny_diffusion.data.files.scaling import covering
from tiny_diffusion.data.files.scan import Scan, refuse_unreadable, report, scan
from tiny_diffusion.data.files.stores import ImageStore, LazyImages, decode_all, store_of
from tiny_diffusion.data.files.threads import worker_count
from tiny_diffusion.data.image_set import ImageSet, OpenRequest
from tiny_diffusion.errors import FileError, OptionError


def flowers102(request: OpenRequest) -> ImageSet:
    """torchvision's Flowers-102: photographs, and two .mat files with their classes and splits, checked by md5."""
    name, root = "flowers-102", request.folder / "flowers-102"
    if not all((root / part).exists() for part in ("jpg", "imagelabels.mat", "setid.mat")):
        download(request.dataset, request.folder, name)
    from torchvision.datasets import Flowers102

    names, labels = [], []
    for split in request.opened_splits:
        try:
            data = Flowers102(str(request.folder), split=split)
        except RuntimeError as error:
            raise FileError(
                f"{root} is not torchvision's Flowers-102: imagelabels.mat or setid.mat is missing or "
                "its md5 differs. Delete the folder to download it again."
            ) from error
        names += [f"jpg/{Path(path).name}" for path in data._image_files]
        labels += data._labels
    stats = [stats_of(status(root / name)) for name in names]
    files = ImageFiles(root, tuple(names), tuple(labels), request.dataset.classes, tuple(stats))
    return open_files(request, files)


def folder(request: OpenRequest) -> ImageSet:
    """Any folder of images: see `list_images`."""
    return open_files(request, list_images(request.folder, request.splits, request.heldout))


def open_files(request: OpenRequest, files: ImageFiles, found: Scan | None = None) -> ImageSet:
    """The images of these files, with a report of what they are.  found: their scan, if there is one already.

    Raises FileError if too many files are unreadable, OptionError if --random_crop would do nothing.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about oddities in files, which do not matter for training
    if not len(files):
        return ImageSet.empty(request.channels or request.dataset.channels, request.size, files.class_names)
    workers = worker_count(request.workers)
    background, _ = background_colour(request.background)
    if request.heldout and request.channels is not None:  # only a few of these images will be read
        spec = ImageSpec(request.size, request.channels, background)
        return ImageSet(LazyImages(files, spec, workers), _labels(files), files.class_names)

    size = _decoded_bytes(request, len(files))
    in_memory = size <= request.cache_bytes
    signature = request.cache.key(files.signature(), request.size, request.random_crop, background)
    found = found or _scan(request, files, workers, background, signature, in_memory)
    if request.random_crop:
        _refuse_needless_crops(request, files, found)
    spec = ImageSpec(request.size, found.channels, background, cropped=not request.random_crop)
    if in_memory:
        images, found, line = _in_memory(request, files, found, spec, workers)
    else:
        images = LazyImages(files, spec, workers, found.unreadable)
        line = f"{size / 1e6:,.1f} MB when decoded, more than --cache_mb {request.cache_bytes / 1e6:.0f}: decoded "
        line += f"by {workers} threads as they are read" if workers else "as they are read"
    if not found.passing:
        request.cache.remember(signature, found.to_json())
    labels = _labels(files.without(found.unreadable))
    fingerprint = {"files": files.fingerprint(), "content": "" if found.passing else found.content}
    return ImageSet(images, labels, files.class_names, (*report(files, found, request.size), line), fingerprint)


def _decoded_bytes(request: OpenRequest, count: int) -> float:
    """About how many bytes the decoded images take: half more for random crops, whose images are longer one way."""
    height, width = request.size
    return 3 * height * width * count * (1.5 if request.random_crop else 1)


def _scan(
    request: OpenRequest, files: ImageFiles, workers: int, background: tuple[int, int, int], signature: str,
    in_memory: bool,
) -> Scan:  # fmt: skip
    """What an earlier scan of these files has found, if it is enough; otherwise scans them.

    A set that will be kept in the cache needs a hash of its content, for which every file is read whole.
    """
    needs_content = in_memory and request.cache.folder is not None
    remembered = request.cache.note(signature)
    if remembered and (remembered["content"] or not needs_content):
        return Scan.from_json(remembered)
    return scan(files, workers, whole=needs_content, background=background, progress=request.progress)


def _refuse_needless_crops(request: OpenRequest, files: ImageFiles, found: Scan) -> None:
    if all(covering(sides, request.size) == request.size for sides in found.sizes):
        raise OptionError(
            f"--random_crop would be ignored: every image in {files.root} has the shape of --image_size "
            f"{request.size[0]}x{request.size[1]}. Leave it out, or choose another shape."
        )


def _in_memory(
    request: OpenRequest, files: ImageFiles, found: Scan, spec: ImageSpec, workers: int
) -> tuple[ImageStore, Scan, str]:
    """The decoded images, from the cache if they are there; the scan with what decoding has shown; a report line."""
    cache = request.cache
    key = cache.key(found.content, files.names, files.labels, files.class_names, spec)
    if found.content and (tensors := cache.tensors(key)) and (remembered := cache.note(key)):
        images = store_of(tensors, spec)
        return images, Scan.from_json(remembered), f"{len(images):,} images, decoded before and kept in {cache.folder}"
    started = time.monotonic()
    index_of = [i for i in range(len(files)) if i not in found.unreadable]
    digests = [found.digests[i] for i in index_of] if found.digests else ()
    decoded = decode_all(files.without(found.unreadable), spec, workers, request.progress, digests)
    unreadable = found.unreadable | {index_of[i]: reason for i, reason in decoded.unreadable.items()}
    found = replace(found, unreadable=unreadable, passing=found.passing or not decoded.lasting)
    refuse_unreadable(files, found.unreadable)
    images = store_of(decoded.tensors, spec)
    line = f"{len(images):,} images decoded in {time.monotonic() - started:.1f} seconds"
    if found.content and not found.passing and cache.keep(key, decoded.tensors):
        cache.remember(key, found.to_json())
        line += f", kept in {cache.folder}"
    return images, found, line


def _labels(files: ImageFiles) -> torch.Tensor:
    return torch.tensor(files.labels, dtype=torch.int64)
