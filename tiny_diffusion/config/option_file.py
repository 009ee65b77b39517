"""Options in a file: one JSON object of names and values, which --config reads and --save_config writes."""

import json
from pathlib import Path

from tiny_diffusion.config import synonyms
from tiny_diffusion.config.image_size import square
from tiny_diffusion.config.option import REQUIRED, Text, specs
from tiny_diffusion.config.rules import check_values
from tiny_diffusion.config.training import Config, as_given, from_json
from tiny_diffusion.errors import OptionError, not_one_of
from tiny_diffusion.files import check_writable, read_json, write_text


def read_options(path: Path) -> dict[str, object]:
    """The options of a file, each checked by itself.

    The file holds some options, or all of a configuration, as --dry_run prints it and a checkpoint holds it.  Raises
    FileError if it is not JSON, and OptionError for a name or a value that is wrong.
    """
    values = read_json(path, f"--config {path}")
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} holds no options: it must be one JSON object of names and values.")
    for name in values:
        if name not in specs(Config):
            row = synonyms.find(name, specs(Config))
            if row and row.option:
                meant = row.name.removeprefix("no_")
                raise OptionError(f"--config {path}: {name!r} is not one of train's options. Did you mean {meant!r}?")
            raise OptionError(f"--config {path}: {not_one_of(name, specs(Config))}")
    try:
        if set(values) >= {name for name, spec in specs(Config).items() if spec.since is REQUIRED}:
            values = as_given(Config.from_dict(values))  # a whole configuration, some of whose options have no effect
        values = {name: from_json(value) for name, value in values.items() if value is not None}
        check_values(values, Config)
        kinds = {name: spec.type for name, spec in specs(Config).items() if isinstance(spec.type, Text)}
        values |= {name: kinds[name].parse(values[name]) for name in kinds.keys() & values.keys()}  # ~ in paths
    except OptionError as error:
        raise OptionError(f"--config {path}: {error}") from error
    return values | ({"image_size": square(values["image_size"])} if "image_size" in values else {})


def save_options(config: Config, path: Path) -> None:
    """Writes the options that resolve to this configuration.

    Raises OptionError if the file exists with other contents, and FileError if the file cannot be written.
    """
    text = json.dumps(as_given(config), indent=2) + "\n"
    check_writable("save_config", path)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise OptionError(f"--save_config {path} exists and holds something else. Name another file, or delete it.")
    write_text(path, text)


def network_options(config: Config, with_data: bool) -> dict[str, object]:
    """The options that decide the network and the meaning of its output, apart from its classes.

    with_data: and those of its images.
    """
    wanted = {name for name, spec in specs(type(config)).items() if spec.group == "network"}
    wanted -= {"class_cond", "label_dropout"}
    wanted |= {"schedule", "timesteps", "betas", "beta_start", "beta_end", "logsnr_shift", "prediction"}
    wanted |= {"dataset", "data_dir", "image_size"} if with_data else set()
    return {name: value for name, value in as_given(config).items() if name in wanted}
