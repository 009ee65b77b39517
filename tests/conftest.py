"""What every test starts from."""

import functools
import gc
import itertools
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Kept from session to session: matplotlib takes seconds to list this computer's fonts, in each process without a list.
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir(), "tiny_diffusion-tests-matplotlib")))


def pytest_collection_finish():
    """Eight thousand tests are 370,000 objects, through which each collection of garbage would look again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory):
    """Never the user's own cache folder: names of folders that are nobody's yet, the first of them for the session."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "session"))
        yield (str(folder / f"{number}") for number in itertools.count())


@pytest.fixture(autouse=True)
def cache_of_its_own(caches, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", next(caches))


@pytest.fixture
def nothing_from_outside(monkeypatch):
    """No network, none of the system's data and none of the user's, but what a test puts in their place."""
    import urllib.error
    import urllib.request

    from tiny_diffusion.data import arrays

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(arrays, "SYSTEM_FOLDERS", {})
    monkeypatch.delenv("TINY_DIFFUSION_DATA", raising=False)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On tensors as small as the tests', threads only wait for each other: ten times as long on two busy cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def figures():
    """The figures of runs and evaluations in this process are empty files: drawing one takes longer than a tiny run.

    ``with figures():`` draws them, and so do the functions that tests/test_visuals.py has imported before.
    """
    from tiny_diffusion.files import atomic_write
    from tiny_diffusion.visuals import figures, loss_curve

    places = ((loss_curve, "save_loss_curve"), (figures, "save_noise_level_losses"), (figures, "save_sweep"))
    drawing = [(module, name, getattr(module, name)) for module, name in places]

    def save_nothing(path, *_, **__):
        with atomic_write(path):
            pass

    @contextmanager
    def drawn():
        with pytest.MonkeyPatch.context() as patch:
            for module, name, function in drawing:
                patch.setattr(module, name, function)
            yield

    with pytest.MonkeyPatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, save_nothing)
        yield drawn


@pytest.fixture(autouse=True, scope="session")
def digits_parsed_once():
    """Each run reads the digits twice, from a text."""
    from tiny_diffusion.data import arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "read_digits", functools.cache(arrays.read_digits))
        yield


@pytest.fixture(autouse=True, scope="session")
def few_images_by_noise():
    """The error by noise level, of 256 images otherwise, takes longest of what a small evaluation measures."""
    from tiny_diffusion.evaluation import error_by_noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error_by_noise, "MAX_IMAGES", 8)
        yield


@pytest.fixture(autouse=True, scope="session")
def without_bf16():
    """Runs are fp32 on every processor: what a clock decided would not be the same twice."""
    from tiny_diffusion.training import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_bf16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def digits():
    """The training part of the digits: 1,498 images of 8x8."""
    from tiny_diffusion.data.sources import open_dataset

    return open_dataset("digits")


@pytest.fixture(scope="session")
def make_trainer(digits):
    """make_trainer(steps, **options) -> a new trainer of a tiny network of one level on the digits, on the CPU."""
    from tiny_diffusion.config.training import resolve
    from tiny_diffusion.data.batches import Batches
    from tiny_diffusion.models.build import make_model, to_device
    from tiny_diffusion.randomness import seed_torch
    from tiny_diffusion.training.run_length import RunLength
    from tiny_diffusion.training.trainer import Trainer

    def make(steps=10, length=None, clock=lambda: 0.0, **options):
        config = resolve({"dataset": "digits", "base_channels": 8, "channel_mult": (1,), "batch_size": 16, **options})
        seed_torch(config.seed, "weights")
        model = to_device(make_model(config, 1, 10), torch.device("cpu"))
        batches = Batches(digits, config.batch_size, config.seed, hflip=config.hflip)
        return Trainer(model, config, batches, length or RunLength(steps=steps), clock, num_classes=10)

    return make


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs commands in this process, in an empty working folder: see cli_helpers.Cli."""
    from cli_helpers import Cli

    monkeypatch.chdir(tmp_path)
    return Cli(capsys)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of three steps on the digits, to look at and not to change."""
    from cli_helpers import TINY, call

    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert call("train", *TINY, "--max_steps", 3, "--output_dir", folder) == 0
    return folder


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    """A checkpoint of a model without classes, of one step on the digits."""
    from cli_helpers import TINY, call

    folder = tmp_path_factory.mktemp("runs") / "unlabelled"
    assert call("train", *TINY, "--no_class_cond", "--max_steps", 1, "--output_dir", folder) == 0
    return folder / "model_final.pt"


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """A class-conditional checkpoint of random weights, T = 30: whatever is asked of it shows in its images."""
    from cli_helpers import TINY, call, change_tensors

    folder = tmp_path_factory.mktemp("runs") / "loud"
    assert call("train", *TINY, "--timesteps", 30, "--max_steps", 1, "--output_dir", folder) == 0
    noise = torch.Generator().manual_seed(0)

    def random(name, tensor):
        return (
            tensor + 0.2 * torch.randn(tensor.shape, generator=noise) if name.startswith(("model", "ema")) else tensor
        )

    change_tensors(folder / "model_final.pt", folder / "model_final.pt", random)
    return folder / "model_final.pt"


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Runs commands in processes of their own: see warm_process.WarmProcess."""
    from warm_process import WarmProcess

    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    process = WarmProcess(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def whole(warm, tmp_path_factory):
    """The folder of a run, run_helpers.RUN, that nothing befell."""
    from run_helpers import OFTEN, RUN

    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = warm.run(*RUN, "--output_dir", folder, faults=OFTEN)
    assert code == 0, said
    return folder
