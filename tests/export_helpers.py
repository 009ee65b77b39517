"""Tiny models of random weights to export, and folders as diffusers saves them."""

import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.request import default_sampling
from tiny_diffusion.export.model import ExportedModel
from tiny_diffusion.models.build import make_model
from tiny_diffusion.runs.checkpoint import save_checkpoint
from tiny_diffusion.runs.foreign import about_of

SMALL = {"dataset": "digits", "base_channels": 8, "channel_mult": (1, 2)}
# Networks and processes that diffusers can express, each with something of its own.
EXPRESSIBLE = {
    "epsilon": {"schedule": "linear", "prediction": "epsilon", "patch_size": 1},
    "x0": {"schedule": "cosine", "prediction": "x0", "patch_size": 1, "image_size": (8, 12)},
    "v, shifted": {"schedule": "sigmoid", "prediction": "v", "patch_size": 1, "logsnr_shift": -1.5},
    "flow": {"schedule": "flow", "prediction": "flow", "patch_size": 1, "time_emb_dim": 20},
    "flow, shifted": {"schedule": "flow", "prediction": "flow", "patch_size": 1, "logsnr_shift": -1.0},
    "patches, 40 steps": {"schedule": "exponential", "patch_size": 2, "timesteps": 40, "attention_levels": (0,)},
    "details": {"patch_size": 1, "unet_details": ("norm_eps=1e-06", "downsample_padding=0", "resnet_up_levels=1")},
    "classes": {"class_cond": True, "patch_size": 2, "activation": "gelu"},
}


def random_model(seed=0, **options):
    """A model of tiny networks on 8x8 digits, whose weights are all random."""
    config = resolve({**SMALL, "class_cond": False, **options})
    torch.manual_seed(seed)
    network = make_model(config, 1, 10).eval()
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, mean="norm" in name and "weight" in name, std=0.06)
    names = [str(label) for label in range(10)]
    about = about_of(config, 1, names, default_sampling("ddim", config.timesteps))
    return ExportedModel(about, network.requires_grad_(False))


def save(path, model):
    """The checkpoint of a model; its averaged weights are half of the last ones."""
    state = model.state()
    halves = {name: tensor / 2 for name, tensor in state.items()}
    parts = {"model": state, "ema": halves}
    tensors = {f"{part}/{name}": tensor for part, each in parts.items() for name, tensor in each.items()}
    save_checkpoint(path, {key: value for key, value in model.about.items() if key != "format"}, tensors)
    return path


def save_theirs(path, pipeline="DDPMPipeline", scheduler=None, **unet2d):
    """A pipeline that diffusers itself made and saved, of 8x8 greys; returns its network."""
    import diffusers

    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**{**sizes, **blocks, "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **unet2d})
    scheduler = scheduler or diffusers.DDPMScheduler()
    if pipeline:
        getattr(diffusers, pipeline)(network, scheduler).save_pretrained(path)
    else:
        network.save_pretrained(path)
        scheduler.save_pretrained(path)
    return network.eval()
