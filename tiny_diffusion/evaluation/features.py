"""Features: the vectors in which images are compared.  Every number is printed with the name and hash of its features.

To add one: write a function (dataset, shape, device) -> Features, and add a row to FEATURES.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.evaluation.classifier import MIN_PHOTOGRAPH, WEIGHTS, load_classifier, weights_path
from tiny_diffusion.runtime.memory import ran_out_of_memory

BATCH = 500
PHOTOGRAPHS, PHOTOGRAPH = "cifar10", (3, None, None)  # whose classifier makes the features of any, and their shape
MAX_PIXELS = 4096  # values per image, above which their covariance is too large


@dataclass(frozen=True, eq=False)
class Features:
    """A function from images to vectors, and what is known of it.

    name: as it is printed.  hash: of the weights, "none" for pixels.  extract: uint8 (B, C, H, W) -> (B, D).
    classify: the same images -> probabilities (B, classes) of class_names; None if it cannot.  shape: of the images it
    takes, with None for a side of any length; None for images of any shape.  accuracy: of the classifier on held-out
    images.
    """

    name: str
    hash: str
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, int | None, int | None] | None = None
    accuracy: float | None = None
    class_names: tuple[str, ...] = ()

    def of(self, images: Tensor) -> Tensor:
        """(N, D) float32 of all images, a batch at a time."""
        with torch.inference_mode():
            return torch.cat([self.extract(batch).float().cpu() for batch in _batches(images)])

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, classes) float32 of all images, a batch at a time."""
        with torch.inference_mode():
            return torch.cat([self.classify(batch).float().cpu() for batch in _batches(images)])


def make_features(asked: str, dataset: str, shape: tuple[int, int, int], device: torch.device) -> Features:
    """The features that --features asks for.

    asked: a name in FEATURES, the printed name of a shipped classifier such as mnist-classifier-v1, or a TorchScript
    (.pt, .ts), ONNX (.onnx) or classifier (.safetensors) file.  dataset: whose classifier "classifier" means.
    shape: (C, H, W) of the images.  Raises OptionError or FileError.
    """
    if asked in FEATURES:
        features = FEATURES[asked](dataset, shape, device)
    elif asked in (shipped := [path.stem for path in sorted(WEIGHTS.glob("*.safetensors"))]):
        features = _classifier_file(WEIGHTS / f"{asked}.safetensors", device)
    else:
        path = Path(asked)
        if path.suffix.lower() not in OF_FILES:
            raise OptionError(
                f"--features {asked} is none of {', '.join([*FEATURES, *shipped])}, "
                f"nor a file that ends in {', '.join(OF_FILES)}. Name one of these."
            )
        if not path.is_file():
            raise FileError(f"--features {asked} does not exist. Use one of {', '.join(FEATURES)}.")
        features = OF_FILES[path.suffix.lower()](path, device)
    if features.shape is not None and not _fits(features.shape, shape):
        wanted = "x".join(str(side or f"({MIN_PHOTOGRAPH} or more)") for side in features.shape)
        given = "x".join(map(str, shape))
        raise OptionError(
            f"--features {asked} takes images of {wanted}, and these are {given}. Use pixels, or another file."
        )
    return features


def default_features(dataset: str | None, shape: tuple[int, int, int]) -> str:
    """The name "classifier" if the data set has one for images of this shape, then that of a classifier of photographs
    for colour images, otherwise "pixels"."""
    if dataset is not None and weights_path(dataset).is_file():
        _, about = load_classifier(weights_path(dataset))
        if _fits(_shape_of(about), shape):
            return "classifier"
    return weights_path(PHOTOGRAPHS).stem if _fits(PHOTOGRAPH, shape) else "pixels"


def _shape_of(about: Mapping) -> tuple[int, int | None, int | None]:
    """The images that a classifier takes: grey ones of one size, or colour ones of any, as photographs come in many."""
    return (1, *about["size"]) if about.get("channels", 1) == 1 else PHOTOGRAPH


def _fits(wanted: tuple[int, int | None, int | None], shape: tuple[int, int, int]) -> bool:
    """Whether images of a shape are of the wanted one, in which None is a side of MIN_PHOTOGRAPH or more."""
    return all(
        has == wants if wants is not None else has >= MIN_PHOTOGRAPH for wants, has in zip(wanted, shape, strict=True)
    )


def file_hash(path: Path) -> str:
    """The first 12 hexadecimal digits of the file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _batches(images: Tensor) -> Iterator[Tensor]:
    """Batches with contiguous strides: grey images may look channels-last, and convolutions then round differently."""
    for batch in images.split(BATCH):
        yield batch.reshape(-1).view(batch.shape)


def _scaled(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in [-1, 1], on the device."""
    return to_float(images.to(device))


def _pixels(dataset: str, shape: tuple[int, int, int], device: torch.device) -> Features:
    """The pixels themselves, as one vector.  Raises OptionError where their covariance would be too large."""
    channels, height, width = shape
    if (count := channels * height * width) > MAX_PIXELS:
        raise OptionError(
            f"--features pixels: images of {channels}x{height}x{width} are {count:,} values each, too many for a "
            f"covariance (at most {MAX_PIXELS:,}). Use inception, or a file of your own features."
        )
    return Features("pixels", "none", lambda images: _scaled(images, device).flatten(1))


def _classifier(dataset: str, shape: tuple[int, int, int], device: torch.device) -> Features:
    """The last hidden layer of the package's classifier for this data set.  Raises OptionError if it has none."""
    path = weights_path(dataset)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
        raise OptionError(
            f"--features classifier: there is none for {dataset}. Name one of {shipped}, use pixels, or train one by "
            "python -m tiny_diffusion classifier."
        )
    return _classifier_file(path, device)


def _classifier_file(path: Path, device: torch.device) -> Features:
    model, about = load_classifier(path)
    model = model.to(device)
    return Features(
        path.stem,
        file_hash(path),
        lambda images: model.features(_scaled(images, device)),
        lambda images: model(_scaled(images, device)).softmax(1),
        _shape_of(about),
        about.get("accuracy"),
        tuple(about["classes"]),
    )


def _inception(dataset: str, shape: tuple[int, int, int], device: torch.device) -> Features:
    """The Inception network of Heusel et al. (2017) with its original weights, which torch-fidelity fetches."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise FileError(
            "--features inception needs the original weights: pip install torch-fidelity, or name the TorchScript "
            "file inception-2015-12-05.pt by --features. No other features are used instead."
        ) from error
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval().to(device)
    except Exception as error:  # a failed download may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise FileError(
            f"--features inception: torch-fidelity could not fetch the weights ({reason}). "
            "Name the TorchScript file inception-2015-12-05.pt by --features instead."
        ) from error
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in model.state_dict().values())).hexdigest()

    def extract(images: Tensor) -> Tensor:
        return model(images.to(device).expand(-1, 3, -1, -1))[0]

    return Features("inception-2015-12-05", digest[:12], extract)


def _of_torchscript(path: Path, device: torch.device) -> Features:
    """A TorchScript module: uint8 (B, C, H, W) -> features; Inception takes (B, 3, H, W)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch recommends another format
            model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise FileError(f"--features {path} is not a TorchScript file ({reason}). Name another file.") from error
    inception = path.name == "inception-2015-12-05.pt"  # returns logits unless it is asked for features

    def extract(images: Tensor) -> Tensor:
        images = images.to(device)
        if inception:
            return model(images.expand(-1, 3, -1, -1), return_features=True)
        return model(images)

    return Features(path.stem, file_hash(path), _checked(path, extract))


def _of_onnx(path: Path, device: torch.device) -> Features:
    """An ONNX network: float32 (B, C, H, W) in [-1, 1] -> features, its first output."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FileError(f"--features {path} needs onnxruntime. Run: pip install onnxruntime.") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FileError(
            f"--features {path} is not an ONNX file ({str(error).splitlines()[0][:120]}). Name another file."
        ) from error
    name = session.get_inputs()[0].name

    def extract(images: Tensor) -> Tensor:
        scaled = _scaled(images, torch.device("cpu")).numpy()
        return torch.from_numpy(session.run(None, {name: scaled})[0])

    return Features(path.stem, file_hash(path), _checked(path, extract))


def _checked(path: Path, extract: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`extract`, but OptionError is raised where the user's network fails, or returns something else than features."""

    def checked(images: Tensor) -> Tensor:
        given = "x".join(map(str, images.shape[1:]))
        try:
            found = extract(images).flatten(1).float()
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OptionError(
                f"--features {path} fails on uint8 images of {given} ({reason[:120]}). Name another file."
            ) from error
        if len(found) != len(images) or not torch.isfinite(found).all():
            raise OptionError(
                f"--features {path} returns an array of {list(found.shape)} for {len(images)} images of {given}, or "
                "values that are not finite. It must return a row per image. Name another file."
            )
        return found

    return checked


FEATURES = {"pixels": _pixels, "classifier": _classifier, "inception": _inception}
OF_FILES = {".pt": _of_torchscript, ".ts": _of_torchscript, ".onnx": _of_onnx, ".safetensors": _classifier_file}
