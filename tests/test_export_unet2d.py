"""Networks of diffusers' UNet2DModel, whatever their configuration, are networks here: outputs, gradients, weights."""

import inspect
import json
import random

import pytest
import torch
from import_helpers import diffusers, needs

from tiny_diffusion.config.training import Config, resolve
from tiny_diffusion.config.unet2d import DEFAULTS, network_options_of, unet2d_config
from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.build import make_model

pytestmark = needs("diffusers")

CIFAR = {  # of google/ddpm-cifar10-32, as its config.json says it
    "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def random_config(seed):
    """A UNet2DModel drawn from everything that it lets one choose and that can be read here."""
    pick = random.Random(seed).choice
    levels, groups = pick([2, 3, 4]), pick([2, 4, 8])
    down = [pick(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]) for _ in range(levels)]
    up = [pick(["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]) for _ in range(levels)]
    if seed % 2:  # as most networks are
        up = [name.replace("Down", "Up").replace("Upsample", "Upsample") for name in reversed(down)]
    config = {
        "sample_size": pick([8, 16, [8, 16]]), "in_channels": (channels := pick([1, 3])), "out_channels": channels,
        "block_out_channels": [8 * pick([1, 2, 3]) for _ in range(levels)], "down_block_types": down,
        "up_block_types": up, "layers_per_block": pick([1, 2, 3]), "downsample_padding": pick([0, 1]),
        "downsample_type": pick(["conv", "resnet"]), "upsample_type": pick(["conv", "resnet"]),
        "act_fn": pick(["silu", "swish", "relu", "gelu", "mish"]), "attention_head_dim": pick([None, 2, 4, 8]),
        "norm_num_groups": groups, "attn_norm_num_groups": pick([None, 2, groups]),
        "norm_eps": pick([1e-5, 1e-6, 1e-3]),
        "resnet_time_scale_shift": pick(["default", "scale_shift"]), "add_attention": pick([True, False]),
        "flip_sin_to_cos": pick([True, False]), "freq_shift": pick([0, 1]),
        "time_embedding_dim": pick([None, 20]), "num_class_embeds": pick([None, None, 5]),
    }  # fmt: skip
    return config if levels < 4 else config | {"sample_size": 16}


def config_of(unet2d):
    """(training configuration, channels, class embeddings) of a UNet2DModel."""
    options, channels, embeddings = network_options_of(unet2d)
    options = {name: value for name, value in options.items() if name != "unet_details" or value}
    return resolve({"dataset": "folder", "data_dir": "x", **options}), channels, embeddings


def twins(unet2d, seed=0):
    """(theirs, ours) with the same weights, none of them zero, in float64; ours has a null class more."""
    torch.manual_seed(seed)
    theirs = diffusers.UNet2DModel(**unet2d).double()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean="norm" in name and "weight" in name, std=0.1)
    config, channels, embeddings = config_of(unet2d)
    ours, state = make_model(config, channels, embeddings).double(), theirs.state_dict()
    if embeddings:
        state["class_embedding.weight"] = torch.cat(
            [
                state["class_embedding.weight"],
                torch.zeros(1, 1).expand(
                    1, 20 if unet2d["time_embedding_dim"] else 4 * unet2d["block_out_channels"][0]
                ),
            ]
        )
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def inputs(unet2d, batch=2):
    size = unet2d["sample_size"]
    size = [size, size] if isinstance(size, int) else size
    label = torch.arange(batch) if unet2d.get("num_class_embeds") else None
    x = torch.randn(batch, unet2d["in_channels"], *size, dtype=torch.float64)
    return x, torch.tensor([3.0, 871.0], dtype=torch.float64)[:batch], label


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 24))])
def test_a_random_unet2dmodel_has_the_same_outputs_and_gradients_here(seed):
    unet2d = random_config(seed)
    theirs, ours = twins(unet2d, seed)
    x, time, label = inputs(unet2d)
    expected, output = theirs(x, time, class_labels=label).sample, ours(x, time, label)
    assert expected.std() > 1e-3
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():  # of the embeddings ours has one more, the null class
        torch.testing.assert_close(gradients[name][: len(parameter)], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_a_configuration_comes_back_from_ours_with_the_same_network(seed):
    """unet2d_config and network_options_of are inverses, up to the names of the same thing."""
    config, channels, embeddings = config_of(random_config(seed))
    again = json.loads(json.dumps(unet2d_config(config, channels, embeddings)))
    assert config_of(again) == (config, channels, embeddings)


@pytest.mark.slow
def test_the_network_of_ddpm_cifar10_32_is_one_of_ours():
    theirs, ours = twins(CIFAR | {"time_embedding_dim": None})
    assert sum(parameter.numel() for parameter in ours.parameters()) == 35_746_307
    x, time, _ = inputs(CIFAR, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, time), theirs(x, time).sample, rtol=1e-5, atol=1e-5)


def test_the_defaults_are_those_of_unet2dmodel():
    signature = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in signature.items() if name != "self"}
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()} == DEFAULTS


@pytest.mark.parametrize(
    "change, words",
    [
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"out_channels": 6}, "6 channels of 3"),
        ({"sample_size": None}, "sample_size"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [8, 16, 16]}, "differ in number"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name(change, words):
    unet2d = {
        "block_out_channels": [8, 16],
        "sample_size": 8,
        **{"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]},
    }
    network_options_of(unet2d)
    with pytest.raises(ValueError, match=words):
        network_options_of(unet2d | change)


@pytest.mark.parametrize("options", [{"image_size": 28, "patch_size": 1, "channel_mult": (1, 2, 2, 2)}])
def test_a_network_with_an_odd_level_is_not_expressed(options):
    with pytest.raises(OptionError, match="7 pixels wide"):
        unet2d_config(resolve({"dataset": "mnist", **options}), 1)


def test_details_are_their_own_texts():
    details = UNetDetails(norm_eps=1e-6, up_attention_levels=(0, 2), add_attention=False, freq_shift=1.0)
    assert UNetDetails.of(details.texts()) == details
    assert UNetDetails().texts() == ()
    for wrong in ("norm_eps", "norm=1", "norm_eps=0", "downsample_padding=2", "resnet_up_levels=x", "add_attention=1"):
        with pytest.raises(ValueError):
            UNetDetails.of([wrong])
    config = resolve({"dataset": "digits", "unet_details": ("norm_eps=1e-06",)})
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
