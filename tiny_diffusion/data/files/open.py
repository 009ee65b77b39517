"""Sets of image files: Flowers-102 and any folder.  Decoded once and kept, or decoded as they are asked for."""

import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from tiny_diffusion.data.catalog import background_colour
from tiny_diffusion.data.downloads import download
from tiny_diffusion.data.files.decode import ImageSpec, covering
from tiny_diffusion.data.files.folders import ImageFiles, list_images, stats_of, status
from tiny_diffusion.data.files.scan import Scan, refuse_unreadable, report, scan
from tiny_diffusion.data.files.stores import LazyImages, VariableSizeImages, decode_all
from tiny_diffusion.data.files.threads import worker_count
from tiny_diffusion.data.image_set import ImageSet, OpenRequest
from tiny_diffusion.errors import FileError, OptionError


def flowers102(opening: OpenRequest) -> ImageSet:
    """torchvision's Flowers-102: photographs, and two .mat files with their classes and splits, checked by md5."""
    place, root = "flowers-102", opening.folder
    if not all((root / place / name).exists() for name in ("jpg", "imagelabels.mat", "setid.mat")):
        download(opening.dataset, root, place)
    from torchvision.datasets import Flowers102

    names, labels = [], []
    for split in opening.parts:
        try:
            data = Flowers102(str(root), split=split)
        except RuntimeError as error:
            raise FileError(
                f"{root / place} is not the Flowers-102 of torchvision: imagelabels.mat or setid.mat is missing or "
                "its md5 differs. Delete the folder to download it again."
            ) from error
        names += [f"jpg/{Path(path).name}" for path in data._image_files]
        labels += data._labels
    stats = [stats_of(status(root / place / name)) for name in names]
    files = ImageFiles(root / place, tuple(names), tuple(labels), opening.dataset.classes, tuple(stats))
    return open_files(opening, files)


def folder(opening: OpenRequest) -> ImageSet:
    return open_files(opening, list_images(opening.folder, opening.splits, opening.heldout))


def open_files(opening: OpenRequest, files: ImageFiles, found: Scan | None = None) -> ImageSet:
    """The images of these files, and a report of them.  found: what a look into them has shown, if there was one."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities in a file that are no concern of who trains on it
    workers, cache = worker_count(opening.workers), opening.cache
    background, _ = background_colour(opening.background)
    if not len(files):
        return ImageSet.empty(opening.channels or opening.dataset.channels, opening.size, files.class_names)
    if opening.heldout and opening.channels is not None:  # a few of them will be looked at
        look = ImageSpec(opening.size, opening.channels, background)
        return ImageSet(LazyImages(files, look, workers), _labels(files), files.class_names)

    size = 3 * opening.size[0] * opening.size[1] * len(files) * (1.5 if opening.random_crop else 1)
    whole = size <= opening.cache_bytes and cache.folder is not None
    signature = cache.key(files.signature(), opening.size, opening.random_crop, background)
    if found is None and (remembered := cache.note(signature)):
        found = Scan.from_json(remembered)
    if found is None or (whole and not found.content):
        found = scan(files, workers, whole=whole, background=background, progress=opening.progress)
    if opening.random_crop and all(covering(sides, opening.size) == opening.size for sides in found.sizes):
        raise OptionError(
            f"--random_crop would be ignored: every image in {files.root} has the shape of --image_size "
            f"{opening.size[0]}x{opening.size[1]}. Leave it out, or choose another shape."
        )
    look = ImageSpec(opening.size, found.channels, background, cropped=not opening.random_crop)
    if size <= opening.cache_bytes:
        images, labels, found, how = _in_memory(opening, files, found, look, workers)
    else:
        images, labels = LazyImages(files, look, workers, found.bad), _labels(files.without(found.bad))
        how = f"{size / 1e6:,.1f} MB when decoded, more than --cache_mb {opening.cache_bytes / 1e6:.0f}: decoded "
        how += f"by {workers} threads as they are read" if workers else "as they are read"
    cache.remember(signature, found.to_json())
    return ImageSet(images, labels, files.class_names, (*report(files, found, opening.size), how))


def _in_memory(
    opening: OpenRequest, files: ImageFiles, found: Scan, look: ImageSpec, workers: int
) -> tuple[torch.Tensor | VariableSizeImages, torch.Tensor, Scan, str]:
    """Images and labels, from the cache if they are there; what was found, with what decoding has shown; a line."""
    cache = opening.cache
    key = cache.key(found.content, files.names, files.labels, files.class_names, look)
    tensors, about = (cache.tensors(key), cache.note(key)) if found.content else (None, None)
    if tensors is None or about is None:
        started = time.monotonic()
        pixels, sides, late = decode_all(files.without(found.bad), look, workers, opening.progress)
        index_of = [i for i in range(len(files)) if i not in found.bad]
        found = replace(found, bad=found.bad | {index_of[i]: reason for i, reason in late.items()})
        refuse_unreadable(files, found.bad)
        tensors = {"pixels": pixels, "labels": _labels(files.without(found.bad))}
        tensors |= {} if sides is None else {"sides": sides}
        line = f"{len(tensors['labels']):,} images decoded in {time.monotonic() - started:.1f} seconds"
        if found.content and cache.keep(key, tensors):
            cache.remember(key, found.to_json())
            line += f", kept in {cache.folder}"
    else:
        found = Scan.from_json(about)
        line = f"{len(tensors['labels']):,} images, decoded before and kept in {cache.folder}"
    images = VariableSizeImages(tensors["pixels"], tensors["sides"], look) if "sides" in tensors else tensors["pixels"]
    return images, tensors["labels"], found, line


def _labels(files: ImageFiles) -> torch.Tensor:
    return torch.tensor(files.labels, dtype=torch.int64)
