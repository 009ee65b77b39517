"""Presets: well-known small systems, each as the options that reproduce it here.

A preset sets only options that were not given; what a system leaves open keeps this program's defaults.  A preset that
is slow on a CPU names faster options.  No torch here.  To add one: a row in PRESETS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote


@dataclass(frozen=True)
class Preset:
    """title: one line for --help.   options: by name.

    faster: options of train that reach better images in the same time; empty where the preset is fast.
    """

    title: str
    options: Mapping[str, object]
    faster: str

    def faster_on(self, dataset: str, data_dir: str | None) -> str:
        """The faster command's options on this data set, as they would be typed."""
        return f"--dataset {dataset} {self.faster}" + (f" --data_dir {quote(data_dir)}" if data_dir else "")


# fmt: off
PRESETS = {
    "quick": Preset(
        title="MNIST for 20 epochs in less than ten minutes on two cores: an eighth of the default's arithmetic",
        options={
            "dataset": "mnist", "batch_size": 256, "epochs": 20, "sample_interval": 5,
            "patch_size": 4, "base_channels": 32, "channel_mult": (1,), "attention_levels": (),
        },
        faster="",
    ),
    "cifar10": Preset(
        title="CIFAR-10 at 32x32 in colour: two down blocks, bottleneck, skips; a 2x2 grid every 5 epochs",
        options={
            "class_cond": False,
            "dataset": "cifar10", "image_size": 32, "hflip": True,
            "base_channels": 64, "channel_mult": (1, 2, 2),  # the first two halve the image, the third does not
            "epochs": 100, "sample_interval": 5, "num_samples": 4, "save_interval": 10,
        },
        faster="--hflip --minutes 30",
    ),
    "flowers": Preset(
        title="Flowers-102 in pixel space at 64x64, 300 epochs, a picture every 30",
        options={
            "class_cond": False,
            "dataset": "flowers102", "image_size": 64, "hflip": True, "timesteps": 1000,
            "base_channels": 64, "time_emb_dim": 128,
            "batch_size": 64, "epochs": 300, "sample_interval": 30, "num_samples": 16, "save_interval": 30,
        },
        faster="--hflip --minutes 30",
    ),
    "fashion": Preset(
        title="Fashion-MNIST by the book: linear betas, epsilon, Adam, 64 to 512 channels at 28, 14, 7 and 4 pixels",
        options={
            "class_cond": False,
            "dataset": "fashion_mnist", "image_size": 28, "timesteps": 1000,
            "schedule": "linear", "prediction": "epsilon", "timestep_distribution": "uniform",
            "batch_size": 32, "optimizer": "adam", "lr": 1e-4, "epochs": 50, "sample_interval": 10, "save_interval": 10,
            "patch_size": 1, "base_channels": 64, "channel_mult": (1, 2, 4, 8), "time_emb_dim": 128,
            "attention_levels": (3,), "attention_heads": 4,
        },
        faster="--minutes 10",
    ),
    "folder": Preset(
        title="any folder of images, with class sub-folders or flat: --data_dir, and --image_size 128 or 96x64",
        options={
            "class_cond": False,
            "dataset": "folder", "hflip": True, "schedule": "linear", "base_channels": 64, "ema_decay": 0.999,
            "epochs": 100, "sample_interval": 5, "num_samples": 16, "save_interval": 5,
        },
        faster="--hflip --minutes 30",
    ),
    "tiny": Preset(
        title="MNIST by the book in three scripts: about 2 M parameters, base 64, time embedding 256, 20 epochs",
        options={
            "class_cond": False,
            "dataset": "mnist", "image_size": 28,
            "schedule": "linear", "prediction": "epsilon", "timestep_distribution": "uniform",
            "batch_size": 128, "optimizer": "adam", "lr": 2e-4, "epochs": 20,
            "patch_size": 1, "base_channels": 64, "channel_mult": (1, 1, 1, 1), "time_emb_dim": 256,
            "attention_levels": (),
        },
        faster="--minutes 10",
    ),
}
# fmt: on
