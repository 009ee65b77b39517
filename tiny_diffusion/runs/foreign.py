"""Models made elsewhere, read as checkpoints: a folder in diffusers' format, or a .safetensors file of `export`.

Only JSON and safetensors are read, so nothing is executed.  A reader returns what a checkpoint holds: its JSON and its
tensors.  A folder says nothing about images and classes, unless `export` wrote it: then OURS does.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tiny_diffusion.config.scheduler import process_options_of, scheduler_config
from tiny_diffusion.config.training import Config, resolve
from tiny_diffusion.config.unet2d import DEFAULTS, network_options_of, shown, unet2d_config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.request import default_sampling
from tiny_diffusion.errors import FileError, printable
from tiny_diffusion.files import read_json
from tiny_diffusion.models.build import CLASSES, is_finite
from tiny_diffusion.runs.checkpoint_keys import KEYS, OPTIONAL_KEYS

OURS = "tiny_diffusion.json"  # in a folder: the JSON of the checkpoint that was exported
METADATA = "tiny_diffusion"  # in a .safetensors file: the same, under this key
INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "TinyDiffusionPipeline")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, in old files
MAX_REASON_LENGTH = 300


def is_diffusers_folder(path: Path) -> bool:
    """Whether this folder looks like a pipeline or a network of diffusers, perhaps a broken one."""
    return path.is_dir() and any((path / name).exists() for name in (INDEX, "config.json", "unet", "scheduler"))


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the tensors of a checkpoint, made of a pipeline or of a UNet2DModel with a scheduler.

    Raises FileError, naming the file and the reason.
    """
    index = _read_object(path / INDEX) if (path / INDEX).exists() else {}
    pipeline = _check_pipeline(path, index)
    network, scheduler = _read_network(path, bool(index)), _read_scheduler(path)
    ours = _read_object(path / OURS) if (path / OURS).exists() else None
    if ours is None and pipeline == PIPELINES[-1]:
        raise FileError(f"{path} was exported by this program, but {OURS} is missing in it. Export it again.")
    try:
        about = _about_of_ours(ours, network, scheduler) if ours else _about_of_theirs(path, network, scheduler)
    except (ValueError, TypeError, ArithmeticError, KeyError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__, MAX_REASON_LENGTH)
        raise FileError(f"{path} cannot be read as a model of images: {reason}.") from error
    folder = path / "unet" if (path / "unet").is_dir() else path
    state = {_new_name(name): tensor.float() for name, tensor in _read_weights(folder).items()}
    if about["config"]["class_cond"] and ours is None:  # a null class, which this model was never trained with
        state[CLASSES] = torch.cat([state[CLASSES], state[CLASSES].mean(dim=0, keepdim=True)])
    about["imported"] = f"diffusers, {pipeline or 'UNet2DModel'} with {scheduler.get('_class_name')}"
    return about, _as_parts(state)


def read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the tensors of a file that `export --format safetensors` wrote.  Raises FileError."""
    state, metadata = _load(path)
    if METADATA not in metadata:
        raise FileError(f"{path} holds weights without a configuration. Only files of `export` can be read here.")
    try:
        about = json.loads(metadata[METADATA])
    except ValueError as error:
        raise FileError(f"{path} is damaged: its configuration is not JSON.") from error
    return about, _as_parts(state)


def _about_of_theirs(path: Path, network: Mapping, scheduler: Mapping) -> dict:
    """The JSON of a checkpoint that stands for a model of which only the network and the process are known."""
    options, channels, classes = network_options_of(network)
    process, clip = process_options_of(scheduler)
    labels = {"label_dropout": 0.0} if classes else {}
    values = {"dataset": "folder", "data_dir": str(path), **options, **process, **labels}
    config = resolve({name: value for name, value in values.items() if name != "unet_details" or value})
    sampling = default_sampling(DATASETS["folder"].sampler, config.timesteps) | {"clip": clip}
    return about_of(config, channels, [str(label) for label in range(classes)], sampling)


def _about_of_ours(ours: dict, network: Mapping, scheduler: Mapping) -> dict:
    """The JSON that `export` wrote, if it is still that of this network and this process."""
    if (set(ours) ^ KEYS) - OPTIONAL_KEYS - {"sha256"}:
        raise ValueError(f"{OURS} has other keys than this version writes. Delete {OURS}")
    config = Config.from_dict(ours["config"])
    embeddings = len(ours["class_names"]) + 1 if config.class_cond else 0
    expected = unet2d_config(config, ours["channels"], embeddings)
    if changed := [name for name in DEFAULTS if _plain(network.get(name, DEFAULTS[name])) != _plain(expected[name])]:
        raise ValueError(f"{OURS} does not describe this network, whose {changed[0]} differs. Delete {OURS}")
    expected = scheduler_config(config)
    for name in ("num_train_timesteps", "trained_betas", "prediction_type", "shift"):
        if name in expected and name in scheduler and scheduler[name] != expected[name]:
            raise ValueError(f"{OURS} does not describe this scheduler, whose {name} differs. Delete {OURS}")
    return ours


def about_of(config: Config, channels: int, class_names: list[str], sampling: Mapping) -> dict:
    """The JSON of a checkpoint without a history."""
    return {
        "format": 1, "config": config.to_dict(), "step": 0, "elapsed_seconds": 0.0, "stretch": [0, 0.0],
        "finished": True, "loss_history": [], "heldout_history": [], "best_score": None, "class_names": class_names,
        "image_size": list(config.size), "channels": channels, "images": {}, "background": config.background,
        "sampling": dict(sampling), "versions": {},
    }  # fmt: skip


def _check_pipeline(path: Path, index: Mapping) -> str:
    """The class of the pipeline, "" for a bare network.  Raises FileError for what is no pipeline of images."""
    name = index.get("_class_name", "without a name" if index else "")
    name = name[-1] if isinstance(name, list) and name else name
    parts = {key for key, value in index.items() if isinstance(value, list) and not key.startswith("_") and any(value)}
    if more := sorted(parts - {"unet", "scheduler"}):
        raise FileError(
            f"{path} holds a {shown(name)} with {', '.join(map(shown, more))}: it works on latents or texts, and this "
            "program on pixels. Name a DDPMPipeline or a DDIMPipeline."
        )
    if index and (name not in PIPELINES or not isinstance(name, str)):
        raise FileError(f"{path} holds a pipeline {shown(name)}; {', '.join(PIPELINES[:3])} can be read.")
    return name


def _read_network(path: Path, is_pipeline: bool) -> dict:
    """The configuration of the UNet2DModel in a folder, or in its folder unet."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").exists():
        what = "is half-written: it" if is_pipeline else "is neither a model of diffusers nor a checkpoint: it"
        raise FileError(f"{path} {what} has no {'unet/' if is_pipeline else ''}config.json.")
    network = _read_object(folder / "config.json")
    if (kind := network.get("_class_name", "network without a name")) != "UNet2DModel":
        raise FileError(f"{folder} holds a {shown(kind)}, and only a UNet2DModel can be read.")
    return network


def _read_scheduler(path: Path) -> dict:
    """The configuration of the scheduler, in a folder of its own, or beside or above the network."""
    names = [path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"]
    names.append(path.parent / "scheduler" / "scheduler_config.json")
    for name in names:
        if name.exists():
            return _read_object(name)
    raise FileError(
        f"{path} has no scheduler/scheduler_config.json, which says how noise was added in training. "
        "Save the scheduler there, too: scheduler.save_pretrained(...)."
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the network in a folder.  Raises FileError where they are not in one .safetensors file."""
    if (file := folder / f"{WEIGHTS}.safetensors").exists():
        return _load(file)[0]
    if (folder / f"{WEIGHTS}.safetensors.index.json").exists():
        raise FileError(f"{folder} splits its weights over several files. Save it again with a larger max_shard_size.")
    if pickles := sorted(folder.glob("*.bin")):
        raise FileError(
            f"{pickles[0]} is a pickle, which could run code, and is not read. Where you trust it, convert it: "
            f"UNet2DModel.from_pretrained('{folder}').save_pretrained('{folder}'), which writes {WEIGHTS}.safetensors."
        )
    raise FileError(f"{folder} is half-written: it has no {WEIGHTS}.safetensors.")


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.  Raises FileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = printable(" ".join(str(error).split()), MAX_REASON_LENGTH)
        raise FileError(f"{file} cannot be read, it may be half-written: {reason}.") from error
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise FileError(f"{file} is damaged: {printable(name)} holds something other than finite numbers.")
    return state, metadata


def _read_object(file: Path) -> dict:
    """The JSON object in a file.  Raises FileError."""
    if not isinstance(value := read_json(file), dict):
        raise FileError(f"{file} holds no JSON object.")
    return value


def _new_name(name: str) -> str:
    """The name of a tensor today: early versions of diffusers named the parts of an attention differently."""
    *parents, part, kind = name.split(".") if name.count(".") else ("", "", name)
    return ".".join([*parents, OLD_NAMES[part], kind]) if part in OLD_NAMES and "attentions" in parents else name


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _as_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One set of weights as both the last and the averaged ones."""
    return {f"{part}/{name}": tensor for part in ("model", "ema") for name, tensor in state.items()}
