"""Checkpoints: self-describing files of tensors and plain JSON that cannot run code.

A file is a torch zip with one JSON text and one flat table of tensors, named like "model/conv_in.weight".  Saving is
atomic: a temporary file beside the target, flushed to disk, renamed.  Loading trusts nothing: it reads the file once,
in the one layout that runs/checkpoint_format.py accepts, then checks the sha256 of the contents and the configuration,
before it builds a network.  No pickle is executed.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny_diffusion.config.student import Student
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.request import Request, order_in_shares, request_from
from tiny_diffusion.errors import FileError, OptionError, printable
from tiny_diffusion.files import atomic_write
from tiny_diffusion.models.build import is_finite, make_meta_model, part_of
from tiny_diffusion.runs.checkpoint_format import StoredTensor, members, read_pickle
from tiny_diffusion.runs.checkpoint_keys import KEYS, OPTIONAL_KEYS, invalid_keys
from tiny_diffusion.runs.foreign import is_diffusers_folder, read_folder, read_safetensors
from tiny_diffusion.runtime.program import typed

FORMAT = 1
MAX_REASON_LENGTH = 300  # characters: a file may hold names and values of any length


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """about: the JSON (see KEYS).   tensors: by name, which begins with model/, ema/, optimizer/ or scaler/."""

    about: dict
    tensors: dict[str, Tensor]

    @property
    def config(self) -> Config:
        return Config.from_dict(self.about["config"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label; none where the images have no classes."""
        return tuple(self.about["class_names"])

    @property
    def class_counts(self) -> list[int]:
        """How many training images each class had; empty without classes, and in the files of earlier versions."""
        return self.about.get("images", {}).get("class_counts", [])

    @property
    def student(self) -> Student | None:
        """What a distilled model was made for; None for any other."""
        return Student(**self.about["student"]) if "student" in self.about else None

    @property
    def trained_labels(self) -> tuple[int, ...]:
        """The labels that had training images; all of them where the checkpoint is too old to say."""
        counts = self.class_counts
        return tuple(label for label in range(len(self.class_names)) if not counts or counts[label])

    def refuse_unknown_images(self, named: str, given: Mapping[str, object]) -> None:
        """Raises OptionError for a model trained elsewhere, unless the options that are given say on which images.

        named: the option that names this checkpoint, and its value.
        """
        elsewhere = "imported" in self.about and not self.about["step"]
        if elsewhere and all(given.get(name) is None for name in ("dataset", "data_dir", "preset", "reference")):
            raise OptionError(
                f"{named} is a model made elsewhere, which does not say what its images are. Add --dataset, or "
                "--dataset folder --data_dir with a folder of images."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.about["channels"], *self.about["image_size"])

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part: model, ema, optimizer or scaler."""
        return part_of(self.tensors, name)

    def classes_in_shares(self) -> tuple[int, ...]:
        """The labels of images 0, 1, ... of a class-conditional model, unless a request says otherwise."""
        return order_in_shares(self.class_counts or [1] * len(self.class_names))

    def request(self, indices: Sequence[int], *, classes: Sequence[int] | None = None, **asked) -> Request:
        """A request for these images as `sample` makes it: the checkpoint's own sampling, changed where asked.

        classes: labels that the images take in turn [those of `order_in_shares`, for the shares of the training set];
        empty to sample without classes, and without guidance unless it is asked for.   asked: fields of Request.
        """
        config = self.config
        if classes is None:
            classes = self.classes_in_shares() if config.class_cond else ()
        if not classes and asked.get("guidance") is None:
            asked["guidance"] = 1.0
        return request_from(self.about["sampling"], config.timesteps, indices, classes=tuple(classes), **asked)


def save_checkpoint(path: Path, about: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file whole or not at all.

    Raises FloatingPointError if a tensor holds NaN or infinity, or OSError; an earlier file of this name then stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise FloatingPointError(f"{name} holds NaN or infinity; {path} is not written")
    about = {"format": FORMAT, **about}
    about["sha256"] = digest(about, tensors)
    with atomic_write(path, fsync=True) as file:
        torch.save({"about": json.dumps(about), "tensors": tensors}, file)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and verifies a checkpoint, on the CPU.  Raises FileError, naming the file and the reason.

    path: a checkpoint of a run, a folder in diffusers' format, or a .safetensors file of `export`.
    """
    path = Path(path)
    if is_diffusers_folder(path):
        about, tensors = read_folder(path)
        return _checked(path, {**about, "sha256": digest(about, part_of(tensors, "ema"))}, tensors)
    if path.is_file() and path.suffix == ".safetensors":
        about, tensors = read_safetensors(path)
        if not isinstance(about, dict) or (set(about) ^ KEYS) - OPTIONAL_KEYS:
            raise FileError(f"{path} is no file of `export`: its configuration has other keys.")
        if about["sha256"] != digest(about, part_of(tensors, "ema")):
            raise FileError(f"{path} is damaged: its contents do not match its sha256. Export the model again.")
        return _checked(path, about, tensors)
    if not path.is_file():
        if path.is_dir():
            name = "Name a checkpoint in it" if any(path.glob("*.pt")) else "It holds no checkpoint; name one"
            raise FileError(f"{path} is a folder. {name}, such as {path / 'model_final.pt'}")
        what, train = "is not a file" if path.exists() else "does not exist", typed("train")
        raise FileError(f"{path} {what}. Train one first: {train} --dataset digits --output_dir outputs/digits")
    try:
        about, tensors = _unpack(members(_read(path)))
        whole = about["sha256"] == digest(about, tensors)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path} is not a checkpoint of this program: it holds more than tensors. Nothing in it was executed."
        ) from error
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = printable(reason, MAX_REASON_LENGTH)
        raise FileError(f"{path} is not a checkpoint of this program, or it is damaged ({reason}).") from error
    if not whole:
        raise FileError(f"{path} is damaged: its contents do not match its sha256. Use another checkpoint of the run.")
    return _checked(path, about, tensors)


def _checked(path: Path, about: dict, tensors: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint, if its JSON is one that a run can have written.  Raises FileError."""
    try:
        config = Config.from_dict(about["config"])
    except (OptionError, TypeError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()), MAX_REASON_LENGTH)
        raise FileError(f"{path} holds a configuration that this version cannot use: {reason}") from error
    if invalid := invalid_keys(about, config):
        raise FileError(f"{path} is not a checkpoint of this program: its {invalid[0]} has an impossible value.")
    return Checkpoint(about, tensors)


def load_model(checkpoint: Checkpoint, weights: str = "ema") -> nn.Module:
    """The network of a checkpoint, on the CPU, in evaluation mode.  Raises FileError if its tensors do not fit."""
    state = checkpoint.part("ema" if weights == "ema" else "model")
    # Shapes before memory.
    model = make_meta_model(checkpoint.config, checkpoint.about["channels"], len(checkpoint.about["class_names"]))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != held or any(tensor.dtype != torch.float32 for tensor in state.values()):
        name = next(
            (name for name in sorted({*wanted, *held}) if wanted.get(name) != held.get(name)), "a tensor's type"
        )
        raise FileError(
            f"the checkpoint's {weights} weights do not fit its configuration (first difference: {printable(name)})."
        )
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _read(path: Path) -> bytearray:
    """The bytes of a file, which are read once, so that what is checked is what is used."""
    with path.open("rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(content) != len(content) or file.read(1):
            raise ValueError("its length changes")
    return content


def _unpack(files: Mapping[str, memoryview]) -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the tensors of these members of the zip.

    Raises ValueError, TypeError, KeyError or RuntimeError if `save_checkpoint` did not write them.
    """
    content = read_pickle(bytes(files["data.pkl"]))
    if not isinstance(content, dict) or set(content) != {"about", "tensors"}:
        raise ValueError("it holds something else, perhaps another program's weights")
    if not isinstance(content["about"], str) or not isinstance(content["tensors"], dict):
        raise ValueError("its parts have other types")
    about = json.loads(content["about"])
    if about.get("format") != FORMAT:
        raise ValueError(f"format {about.get('format')!r}; this version reads format {FORMAT}")
    if wrong := (set(about) ^ KEYS) - OPTIONAL_KEYS:
        raise ValueError(f"keys {sorted(wrong)} do not belong to format {FORMAT}")
    return about, _tensors(content["tensors"], files)


def _tensors(stored: Mapping[str, object], files: Mapping[str, memoryview]) -> dict[str, Tensor]:
    """The tensors that the pickle describes, in memory of their own.  Together they are no larger than the file."""
    tensors, storages, remaining = {}, {}, sum(map(len, files.values()))
    for name, view in stored.items():
        if not isinstance(view, StoredTensor):
            raise ValueError(f"{name!r} is not a plain tensor")
        storage = view.storage
        if storage not in storages:
            data, dtype = files[storage.member], getattr(torch, storage.dtype)
            if len(data) != storage.count * dtype.itemsize:
                raise ValueError(f"{name!r} claims another number of bytes than it has")
            storages[storage] = torch.frombuffer(data, dtype=dtype).clone() if data else torch.empty(0, dtype=dtype)
        tensor = storages[storage].as_strided(view.shape, view.strides, view.offset)
        remaining -= tensor.nbytes
        if remaining < 0 or not tensor.is_contiguous():
            raise ValueError(f"{name!r} is not a plain tensor")
        if not is_finite(tensor):
            raise ValueError(f"{name!r} holds NaN or infinity")
        tensors[name] = tensor
    return tensors


def digest(about: Mapping, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the JSON (without the hash itself) and the name, type, shape and bytes of every tensor."""
    rest = {key: value for key, value in about.items() if key != "sha256"}
    hashed = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
