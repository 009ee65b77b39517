"""Presets: each is the system of its name, sets only options that were not given, and trains on its real data."""

import dataclasses
import json
import math
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from cli_helpers import SOME_VALUES, typed

from tiny_diffusion.benchmarking.rates import forward_gflop
from tiny_diffusion.config.option import specs
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.training import Config, as_given, resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.request import default_sampling
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.build import make_model
from tiny_diffusion.models.layers import Attention, Downsample, ResidualBlock, TimeEmbedding
from tiny_diffusion.runs.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data"
NEEDED = {name: {"data_dir": "photos"} if name == "folder" else {} for name in PRESETS}
every_preset = pytest.mark.parametrize("name", PRESETS)


def preset(name, **given):
    """The configuration of a preset with these other options."""
    return resolve({"preset": name, **NEEDED[name], **given})


def network(config):
    """The network on the meta device, which has shapes and no memory."""
    dataset = DATASETS[config.dataset]
    with torch.device("meta"):
        return make_model(config, dataset.channels, len(dataset.classes))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def parts(config):
    """(type, channels out, height) of each residual block, attention and down-sampling, in the order of use."""
    dataset, seen = DATASETS[config.dataset], []
    model = make_model(config, dataset.channels, len(dataset.classes)).eval()
    for layer in model.modules():
        if isinstance(layer, ResidualBlock | Attention | Downsample):
            layer.register_forward_hook(lambda layer, _, output: seen.append((type(layer), *output.shape[1:3])))
    with torch.no_grad():
        model(torch.zeros(1, dataset.channels, *config.size), torch.zeros(1))
    return seen


# What each promises


def test_quick_is_mnist_for_20_epochs_at_an_eighth_of_the_default_work():
    config = preset("quick")
    assert (config.dataset, config.epochs) == ("mnist", 20)
    image, moment = torch.zeros(1, 1, 28, 28, device="meta"), torch.zeros(1, device="meta")
    work = [forward_gflop(network(c), image, moment) for c in (config, resolve({"dataset": "mnist"}))]
    assert work[0] < work[1] / 8


def test_cifar10_is_two_down_blocks_a_bottleneck_and_skips_with_flips_on_colour_images_of_32_pixels():
    config = preset("cifar10")
    assert (config.dataset, config.image_size, DATASETS["cifar10"].channels) == ("cifar10", 32, 3)
    assert config.hflip and config.epochs == 100
    assert (config.sample_interval, config.num_samples) == (5, 4)  # a 2x2 grid every 5 epochs
    layers = parts(config)
    sides = [side for kind, _, side in layers if kind is Downsample]
    assert len(sides) == 2 and sides[1] * 2 == sides[0]
    bottleneck = min(side for _, _, side in layers)
    assert bottleneck == sides[-1]
    model = network(config)
    assert isinstance(model.time_embedding, TimeEmbedding)
    joined = [block.conv1.in_channels - block.conv2.in_channels for up in model.up_blocks for block in up.resnets]
    assert len(joined) == 3 * (config.layers_per_block + 1) and min(joined) > 0  # each has a skip beside it


@pytest.mark.parametrize("base", [16, 64, 96])
def test_base_channels_set_the_width_of_cifar10(base):
    config = preset("cifar10", base_channels=base)
    assert [width // base for _, width, _ in parts(config)][0] == 1
    assert {width % base for _, width, _ in parts(config)} == {0}
    assert config.time_emb_dim == 4 * base


def test_flowers_is_64_pixels_in_batches_of_64_for_300_epochs_with_a_picture_every_30():
    config = preset("flowers")
    assert (config.dataset, config.image_size, DATASETS["flowers102"].channels) == ("flowers102", 64, 3)
    assert (config.batch_size, config.timesteps, config.base_channels, config.time_emb_dim) == (64, 1000, 64, 128)
    assert (config.epochs, config.sample_interval) == (300, 30) and config.hflip
    assert network(config).time_embedding.linear_2.out_features == 128


def test_flowers_trains_on_the_centre_of_every_photograph_by_default():
    config = preset("flowers")
    assert DATASETS["flowers102"].images(config.splits) == 8189 and not config.random_crop
    assert DATASETS["flowers102"].images(preset("flowers", splits=("train", "val")).splits) == 2040
    assert preset("flowers", random_crop=True).random_crop


def test_fashion_is_the_textbook_process():
    """Ho et al. (2020), section 4: 1,000 linear betas from 1e-4 to 0.02, epsilon, every timestep equally often."""
    config = preset("fashion")
    assert (config.dataset, config.image_size) == ("fashion_mnist", 28)
    assert (config.timesteps, config.schedule, config.prediction) == (1000, "linear", "epsilon")
    assert (config.beta_start, config.beta_end, config.timestep_distribution) == (1e-4, 0.02, "uniform")
    assert (config.loss, config.loss_weight, config.logsnr_shift) == ("mse", "uniform", 0.0)
    betas = 1 - config.make_schedule().alpha ** 2 / [1, *config.make_schedule().alpha[:-1] ** 2]
    torch.testing.assert_close(torch.tensor(betas), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def test_fashion_is_adam_in_batches_of_32_for_50_epochs_with_pictures_every_10():
    config = preset("fashion")
    assert (config.batch_size, config.optimizer, config.lr) == (32, "adam", 1e-4)
    assert (config.epochs, config.sample_interval, config.time_emb_dim) == (50, 10, 128)


def test_fashion_has_64_128_256_512_channels_at_28_14_7_4_pixels_and_attention_in_heads_at_the_lowest_alone():
    layers = parts(preset("fashion"))
    assert {place for kind, *place in map(list, layers) if kind is ResidualBlock for place in [tuple(place)]} == {
        (64, 28), (128, 14), (256, 7), (512, 4)
    }  # fmt: skip
    assert {place[1:] for place in layers if place[0] is Attention} == {(512, 4)}
    assert [place[2] for place in layers if place[0] is Downsample] == [14, 7, 4]
    heads = {512 // layer.head_width for layer in network(preset("fashion")).modules() if isinstance(layer, Attention)}
    assert heads == {4}


def test_folder_is_any_folder_at_any_size_with_an_average_and_pictures_and_checkpoints_every_few_epochs():
    config = preset("folder")
    assert (config.dataset, config.data_dir, config.image_size) == ("folder", "photos", 64)
    assert config.ema_decay > 0.99 and 1 <= config.sample_interval <= 10 and 1 <= config.save_interval <= 10
    for size in (64, 128, 256, (96, 64), (128, 256)):
        assert preset("folder", image_size=size).image_size == size
    for schedule in ("linear", "cosine", "exponential"):
        assert preset("folder", schedule=schedule).schedule == schedule


def test_tiny_is_about_two_million_parameters_of_base_64_and_embedding_256():
    config = preset("tiny")
    assert (config.dataset, config.image_size) == ("mnist", 28)
    assert (config.base_channels, config.time_emb_dim) == (64, 256)
    assert parameters(network(config)) == pytest.approx(2e6, rel=0.1)
    assert (config.lr, config.batch_size, config.epochs) == (2e-4, 128, 20)
    for schedule in ("linear", "cosine"):
        assert preset("tiny", schedule=schedule).schedule == schedule


@every_preset
def test_models_sample_in_a_tenth_of_their_timesteps_and_runs_save_numbered_checkpoints(name):
    config = preset(name)
    assert default_sampling(DATASETS[config.dataset].sampler, config.timesteps)["steps"] < config.timesteps / 10
    assert config.save_interval <= config.epochs


# Parameters


def diffusers_shapes(config, channels, classes):
    """The weights of diffusers' UNet2DModel with the options of a configuration, by name."""
    diffusers = pytest.importorskip("diffusers")
    widths = [config.base_channels * multiplier for multiplier in config.channel_mult]
    attends = [level in config.attention_levels for level in range(len(widths))]
    with torch.device("meta"):
        model = diffusers.UNet2DModel(
            in_channels=channels * config.patch_size**2,
            out_channels=channels * config.patch_size**2,
            block_out_channels=widths,
            down_block_types=["AttnDownBlock2D" if attending else "DownBlock2D" for attending in attends],
            up_block_types=["AttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)],
            add_attention=any(attends),
            attention_head_dim=widths[-1] // config.attention_heads,
            layers_per_block=config.layers_per_block,
            time_embedding_dim=config.time_emb_dim,
            norm_num_groups=8,
            attn_norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=classes + 1 if config.class_cond else None,
        )
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.slow
@every_preset
def test_the_network_has_weight_for_weight_the_shapes_of_diffusers(name):
    config = preset(name)
    ours = {key: tuple(tensor.shape) for key, tensor in network(config).state_dict().items()}
    assert ours == diffusers_shapes(config, DATASETS[config.dataset].channels, len(DATASETS[config.dataset].classes))
    assert parameters(network(config)) == sum(map(math.prod, ours.values()))


# Only options that were not given


FOLLOWS = {  # from an option, where a preset does not say it
    "dataset": {"class_cond", "splits", "background", "cache_mb", "image_size", "patch_size", "epochs",
                "sample_interval", "save_interval", "channel_mult", "attention_levels", "logsnr_shift"},
    "image_size": {"patch_size", "channel_mult", "attention_levels", "logsnr_shift"},
    "patch_size": {"channel_mult", "attention_levels"},
    "base_channels": {"time_emb_dim"},
    "schedule": {"beta_start", "beta_end"},
    "eval_interval": {"eval_images"},
}  # fmt: skip
MOOT = {  # by an option, although a preset says it
    "channel_mult": {"attention_levels"},
    "attention_levels": {"attention_heads"},
    "minutes": {"epochs"},
    "dataset": {"data_dir"},
}


def with_another(name, option):
    """(value, configuration) for each other value of an option that can stand beside the preset."""
    spec, before = specs(Config)[option], preset(name)
    for value in SOME_VALUES.get(option) or spec.type.choices or [not getattr(before, option)]:
        beside = {"data_dir": "photos"} if (option, value) == ("dataset", "folder") else {}
        try:
            config = preset(name, **beside, **{option: value})
        except OptionError:
            continue
        if value != getattr(before, option):
            yield value, config


@pytest.mark.parametrize("option", [option for option in specs(Config) if option != "preset"])
@every_preset
def test_a_given_option_wins_and_changes_only_what_follows_from_it(name, option):
    before, said = preset(name), PRESETS[name].options
    may_change = {option} | (FOLLOWS.get(option, set()) - set(said)) | MOOT.get(option, set())
    for value, config in with_another(name, option):
        assert getattr(config, option) == value
        changed = {other for other in specs(Config) if getattr(config, other) != getattr(before, other)}
        assert option in changed and changed <= may_change, value
        assert config.preset == name


@every_preset
def test_every_option_of_a_preset_can_be_overridden(name):
    """Each value of a preset is right, and another value can be given beside the preset."""
    for option, value in PRESETS[name].options.items():
        assert specs(Config)[option].type.check(value) is None
        assert list(with_another(name, option)), option


@every_preset
def test_a_preset_is_its_options_typed_out(name):
    options = {**NEEDED[name], **PRESETS[name].options}
    assert preset(name) == dataclasses.replace(resolve(options), preset=name)


@pytest.mark.parametrize("dataset", DATASETS)
@every_preset
def test_a_preset_works_with_every_data_set(name, dataset):
    config = preset(name, dataset=dataset, data_dir="photos")
    size = PRESETS[name].options.get("image_size", DATASETS[dataset].size)
    assert (config.dataset, config.image_size, config.splits) == (dataset, size, DATASETS[dataset].train)
    assert config.background == ("white" if dataset == "folder" else None)
    assert parameters(network(config)) > 0


@every_preset
def test_a_preset_by_the_clock_has_no_epochs(name):
    config = preset(name, minutes=2.5)
    assert (config.minutes, config.epochs) == (2.5, None)


@pytest.mark.parametrize("schedule", SCHEDULES)
@every_preset
def test_another_schedule_brings_its_own_betas(name, schedule):
    prediction = {"prediction": "v"} if schedule == "flow" else {}
    config = preset(name, schedule=schedule, **prediction)
    assert (config.beta_start, config.beta_end) == (SCHEDULES[schedule].ends or (None, None))


# The command


@every_preset
def test_the_options_that_a_preset_resolves_to_resolve_to_it(name):
    config = preset(name)
    assert resolve(as_given(config)) == config
    assert resolve(as_given(preset(name, class_cond=True))) == preset(name, class_cond=True)


@every_preset
def test_dry_run_prints_a_presets_options_its_size_and_the_faster_command(name, cli, tmp_path):
    argv = ["train", "--preset", name, *typed(NEEDED[name]), "--dry_run"]
    ended = cli.works(*argv)
    assert Config.from_dict(json.loads(ended.out)) == preset(name)
    assert f"{parameters(network(preset(name))):,} parameters" in ended.err
    assert PRESETS[name].title in ended.err and not list(tmp_path.iterdir())
    (tmp_path / "printed.json").write_text(ended.out)
    assert cli.works("train", "--config", "printed.json", "--dry_run").out == ended.out


@pytest.mark.parametrize("given", [[], ["--dataset", "folder", "--data_dir", "my photos"]], ids=["its own", "a folder"])
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].faster])
def test_the_faster_command_can_be_typed_and_trains_on_the_same_data(name, given, cli):
    import shlex

    err = cli.works("train", "--preset", name, *(given or typed(NEEDED[name])), "--dry_run").err
    faster = shlex.split(err.partition("faster: python -m tiny_diffusion train ")[2])
    config = Config.from_dict(json.loads(cli.works("train", *faster, "--dry_run").out))
    wanted = preset(name, **({"dataset": "folder", "data_dir": "my photos"} if given else {}))
    assert (config.dataset, config.data_dir) == (wanted.dataset, wanted.data_dir)
    assert config.preset is None and config.minutes is not None and config.hflip == wanted.hflip


def unpacked_cifar10(folder):
    """Thirty images of each class, train and test, of the packed folder of images."""
    with tarfile.open(DATA / "cifar10-images.tar.gz") as archive:
        few = (member for member in archive if member.isdir() or int(Path(member.name).stem, 36) < int("0030", 36))
        filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.3 and older have none
        archive.extractall(folder, members=few, **filtered)
    return folder / "cifar10-images"


REAL = {  # the folder of the images, and their channels, side and classes
    "quick": ("MNIST/raw", 1, 28, 10),
    "cifar10": ("cifar10-images.tar.gz", 3, 32, 10),
    "flowers": ("flowers-102/jpg", 3, 64, 102),
    "fashion": ("FashionMNIST/raw", 1, 28, 10),
    "folder": ("flowers-102/jpg", 3, 64, 0),
    "tiny": ("MNIST/raw", 1, 28, 10),
}


@pytest.mark.slow
@every_preset
def test_every_preset_trains_on_its_real_data_and_samples(name, cli, tmp_path, monkeypatch):
    place, channels, side, classes = REAL[name]
    if not (DATA / place).exists():
        pytest.skip(f"{DATA / place} is not here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tiny_diffusion.runs.images.VALIDATION_IMAGES", 2)
    where = {
        "cifar10": lambda: ["--dataset", "folder", "--data_dir", unpacked_cifar10(tmp_path)],
        "folder": lambda: ["--data_dir", DATA / place, "--cache_mb", 0],
    }.get(name, lambda: ["--data_dir", DATA])()
    small = ["--max_steps", 1, "--num_samples", 1, "--batch_size", 2, "--device", "cpu", "--output_dir", "run"]
    ended = cli.works("train", "--preset", name, *where, *small)
    assert (f"--preset {name} is made for a GPU" in ended.err) == bool(PRESETS[name].faster)
    assert PRESETS[name].faster in ended.err
    about = load_checkpoint("run/model_final.pt").about
    assert (about["image_size"], about["channels"], len(about["class_names"])) == ([side, side], channels, classes)
    argv = ["sample", "--checkpoint", "run/model_final.pt", "--num_images", 1, "--steps", 2, "--output"]
    cli.works(*argv, "drawn.png")
    assert Path("drawn.png").stat().st_size > 100 and Path("run/training_loss.png").exists()
    shutil.rmtree(tmp_path)  # half a gigabyte of weights
