"""Words of other programs are answered with our option, in whichever command they are typed."""

import importlib
import json
import re

import pytest
from cli_helpers import OPTIONS

from tiny_diffusion.cli import COMMAND_NAMES, COMMANDS
from tiny_diffusion.cli.arguments import hint
from tiny_diffusion.config.option import Flag, specs
from tiny_diffusion.config.synonyms import SYNONYMS

SPECS = {
    command: {n: spec for options in sets for n, spec in specs(options).items()} for command, sets in OPTIONS.items()
}
ROWS = [row for row in SYNONYMS if row.option]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.option)
def test_every_answer_is_an_option_of_some_command_with_a_value_that_it_takes(row):
    name, _, value = row.option.partition(" ")
    having = [options[name.removeprefix("no_")] for options in SPECS.values() if name.removeprefix("no_") in options]
    assert having
    if value:
        assert any(not isinstance(spec.type, Flag) and spec.type.read(value) for spec in having)
    if name.startswith("no_"):
        assert any(spec.type.can_be_off for spec in having)
    for mentioned in re.findall(r"--(\w+)", row.note):
        assert any(mentioned in options for options in SPECS.values())


def test_the_words_of_a_row_are_spelt_as_they_are_looked_up():
    for row in SYNONYMS:
        words = row.words.split()
        assert len(set(words)) == len(words) and row.words == row.words.lower().replace("-", "_"), row.option


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_the_table_is_left_without_an_answer(command):
    """And each names an option of this command, or says which commands have it."""
    for row in SYNONYMS:
        for word in row.words.split():
            if word in SPECS[command]:
                continue
            said = hint(f"--{word}", SPECS[command])
            meant = re.match(r"Did you mean --(?:no_)?(\w+)", said)
            elsewhere = re.fullmatch(r"--(\w+) is an option of ([\w, ]+)\.", said)
            if meant:
                assert meant[1] in SPECS[command]
            elif elsewhere:
                assert elsewhere[2].split(", ") == [c for c in COMMANDS if elsewhere[1] in SPECS[c]]
            else:
                assert said in [row.note for row in SYNONYMS if not row.option], word


TYPED = [  # command, what is typed there, the answer
    ("train", "--img_size=32", "Did you mean --image_size?"),
    ("train", "--n_steps", "Did you mean --timesteps? It is T"),
    ("train", "--hidden_channels", "Did you mean --base_channels?"),
    ("train", "--learning_rate", "Did you mean --lr?"),
    ("train", "--learning-rate", "Did you mean --lr?"),
    ("train", "--LEARNING_RATE", "Did you mean --lr?"),
    ("train", "--learning_rat", "Did you mean --lr?"),
    ("train", "--time_embedding_dim", "Did you mean --time_emb_dim?"),
    ("train", "--T", "Did you mean --timesteps?"),
    ("train", "--data_path", "Did you mean --data_dir?"),
    ("train", "--augment", "Did you mean --hflip?"),
    ("train", "--num_epochs", "Did you mean --epochs?"),
    ("train", "--act_fn", "Did you mean --activation?"),
    ("train", "--unconditional", "Did you mean --no_class_cond?"),
    ("train", "--steps", "Did you mean --max_steps?"),
    ("train", "--report_to", "Did you mean --log?"),
    ("train", "--tensorboard", "Did you mean --log tensorboard?"),
    ("train", "--wandb_project", "Did you mean --log wandb?"),
    ("train", "--fp16", "Did you mean --precision fp16?"),
    ("train", "--num_gpus", "torchrun --nproc_per_node=2"),
    ("train", "--guidance_scale", "--guidance is an option of sample, distill, evaluate."),
    ("train", "--num_inference_steps", "--steps is an option of sample, distill, evaluate."),
    ("train", "--ckpt", "Did you mean --resume?"),
    ("sample", "--ckpt", "Did you mean --checkpoint?"),
    ("sample", "--guidance_scale", "Did you mean --guidance?"),
    ("sample", "--num_inference_steps", "Did you mean --steps?"),
    ("sample", "--n_steps", "Did you mean --steps?"),
    ("sample", "--use_ddim", "Did you mean --sampler ddim?"),
    ("sample", "--out_dir", "Did you mean --output?"),
    ("sample", "--epochs", "--epochs is an option of train, distill, classifier."),
    ("visualize", "--beta_schedule", "Did you mean --schedule?"),
    ("visualize", "--T", "Did you mean --timesteps?"),
    ("evaluate", "--cfg_scale", "Did you mean --guidance?"),
    ("distill", "--teacher_path", "Did you mean --checkpoint?"),
    ("benchmark", "--img_size", "Did you mean --image_size?"),
    ("info", "--model_path", "Did you mean --checkpoint?"),
]


@pytest.mark.parametrize("command, word, said", TYPED)
def test_a_word_of_another_program_is_answered_with_the_right_option(command, word, said, cli):
    assert said in cli.refuses(2, [command, word, "1"], f"{word.replace('-rate', '_rate')!r} is not an option here. ")


def test_every_command_says_its_options():
    for command, (module, _) in COMMANDS.items():
        assert importlib.import_module(module).OPTIONS == OPTIONS[command]


@pytest.mark.parametrize("word, command", [(w, name) for name, words in COMMAND_NAMES.items() for w in words.split()])
def test_a_command_of_another_program_is_answered_with_ours(word, command, cli):
    assert command in COMMANDS and word not in COMMANDS
    assert cli(word).err.endswith(f"Did you mean {command!r}?\n")


def test_python_and_files_of_options_are_answered_too(cli, trained, tmp_path):
    from tiny_diffusion import open_model
    from tiny_diffusion.errors import OptionError

    with pytest.raises(OptionError, match="guidance_scale is no option of sampling here. Did you mean --guidance?"):
        open_model(trained / "model_final.pt").sample(guidance_scale=2)
    (tmp_path / "run.json").write_text(json.dumps({"learning_rate": 1e-4}))
    cli.refuses(
        2, ["train", "--config", "run.json"], "'learning_rate' is not one of train's options. Did you mean 'lr'?"
    )
