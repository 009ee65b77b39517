"""Models go out to diffusers and safetensors and come back: weights, outputs, whole chains; foreign ones come in."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from cli_helpers import contents
from export_helpers import EXPRESSIBLE, random_model, save, save_theirs
from import_helpers import diffusers, needs
from numpy.testing import assert_allclose

from tiny_diffusion.config.scheduler import betas_of, process_options_of, scheduler_config
from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.errors import FileError
from tiny_diffusion.export.diffusers import export_diffusers
from tiny_diffusion.export.safetensors import export_safetensors
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
from tiny_diffusion.runs.foreign import OURS

pytestmark = [
    needs("diffusers"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # of torch's tensors, in diffusers
]


def slow(*values):
    """A row of parameters that only -m slow tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(name) -> (the model of EXPRESSIBLE, the folder that it was exported to)."""
    made = {}

    def export(name):
        if name not in made:
            model, folder = random_model(**EXPRESSIBLE[name]), tmp_path_factory.mktemp("exported") / "folder"
            export_diffusers(model, folder)
            made[name] = model, folder
        return made[name]

    return export


@pytest.fixture(scope="module")
def pipeline(exported):
    """pipeline(name) -> the exported model as a pipeline of diffusers, by diffusers' own way to load it."""

    def load(name):
        folder = exported(name)[1]
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that diffusers itself wrote."""
    folder = tmp_path_factory.mktemp("theirs") / "folder"
    save_theirs(folder)
    return folder


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# Out and back


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_there_and_back_gives_bitwise_the_same_model(name, exported):
    model, folder = exported(name)
    back = load_checkpoint(folder)
    assert back.config == model.config
    assert {key: back.about[key] for key in model.about} == model.about
    assert_same_state(load_model(back).state_dict(), model.state())


@pytest.mark.parametrize("name", [name for name, options in EXPRESSIBLE.items() if options["patch_size"] == 1])
def test_what_diffusers_saves_again_is_still_the_same_model(name, exported, tmp_path):
    """Without the file that export adds: the network and the process come from diffusers' own files alone."""
    model, folder = exported(name)
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / OURS).exists()
    back = load_checkpoint(tmp_path)
    x, time, _ = model.inputs(3)
    torch.testing.assert_close(load_model(back)(x, time), model.network(x, time), rtol=0, atol=1e-6)
    ours, theirs = model.config.make_schedule(), back.config.make_schedule()
    assert_allclose(theirs.alpha, ours.alpha, rtol=1e-9, atol=1e-12)
    assert back.config.prediction == model.config.prediction


def test_a_class_is_baked_in_exactly_and_averaged_weights_are_the_default(cli, tmp_path):
    model = random_model(**EXPRESSIBLE["classes"])
    checkpoint = save(tmp_path / "model.pt", model)
    x, time, _ = model.inputs(2)
    for words, weights, label in ((["--classes", 3], "ema", 3), ([], "ema", 10), (["--weights", "raw"], "raw", 10)):
        folder = tmp_path / f"{weights}{label}"
        cli.works("export", "--checkpoint", checkpoint, "--format", "diffusers", "--output", folder, *words)
        network = load_model(load_checkpoint(checkpoint), weights)
        expected = network(x, time, torch.full((2,), label))
        torch.testing.assert_close(load_model(load_checkpoint(folder))(x, time), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"schedule": "cosine", "prediction": "flow"}, "--prediction flow"),
        ({"schedule": "flow", "prediction": "v"}, "--schedule flow"),
        ({"image_size": 14, "channel_mult": (1, 1, 1), "patch_size": 1}, "7 pixels wide"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_and_nothing_is_written(options, word, cli, tmp_path):
    checkpoint = save(tmp_path / "model.pt", random_model(**options))
    before = contents(tmp_path)
    cli.refuses(2, ["export", "--checkpoint", checkpoint, "--format", "diffusers", "--output", tmp_path / "out"], word)
    assert contents(tmp_path) == before


def test_safetensors_is_a_checkpoint_that_draws_the_same_pictures(cli, tmp_path):
    checkpoint = save(tmp_path / "model.pt", random_model(**EXPRESSIBLE["classes"]))
    file = tmp_path / "model.safetensors"
    cli.works("export", "--checkpoint", checkpoint, "--format", "safetensors", "--output", file)
    pictures = []
    for each in (checkpoint, file):
        cli.works("sample", "--checkpoint", each, "--num_images", 4, "--steps", 3, "--output", tmp_path / "x.npz")
        pictures.append(np.load(tmp_path / "x.npz")["arr_0"])
    assert np.array_equal(*pictures)
    assert "class-conditional" in cli.works("info", "--checkpoint", file).out
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    cli.refuses(1, ["info", "--checkpoint", file], "sha256")
    file.write_bytes(content[:-40])
    cli.refuses(1, ["sample", "--checkpoint", file], "half-written")


# Chains: a pipeline of diffusers and our sampler, from the same noise


def chain_of_ours(model, sampler, grid, steps, noise, **options):
    """Our sampler on the network of an exported model, in images from 0 to 1."""
    config = model.config
    levels = make_levels(config.make_schedule(), grid, steps)
    denoise = make_diffusion(config).denoiser(model.network, clip=config.prediction != "flow")
    *_, last = SAMPLERS[sampler].run(denoise, noise * levels[0].sigma, levels, **options)
    return (last.x / 2 + 0.5).clamp(0, 1)


def chain_of_theirs(pipe, scheduler, steps, noises, monkeypatch, **options):
    """The pipeline's own images, with this noise for all that it draws."""
    pipe.scheduler = scheduler(pipe.scheduler)
    fresh = iter(noises)
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm", "schedulers.scheduling_ddim"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(fresh))
    if "diffusers_modules" in type(pipe).__module__:
        monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", lambda *_, **__: next(fresh))
    return pipe(batch_size=2, num_inference_steps=steps, output_type="pt", **options).images


def shuffled(noises, patch_size):
    return [torch.nn.functional.pixel_unshuffle(noise, patch_size) for noise in noises]


@pytest.mark.parametrize(
    "name, steps", [("epsilon", 37), slow("epsilon", 50), slow("x0", 37), slow("x0", 50), slow("v, shifted", 50)]
)
def test_a_ddpm_pipeline_draws_the_pictures_of_our_ddpm(name, steps, exported, pipeline, monkeypatch):
    model, _ = exported(name)
    noises = list(torch.randn(steps + 1, 2, *model.shape, generator=torch.Generator().manual_seed(1)))
    theirs = chain_of_theirs(pipeline(name), lambda own: own, steps, noises, monkeypatch)
    fresh = iter(noises[1:])
    ours = chain_of_ours(model, "ddpm", "trailing", steps, noises[0], draw=lambda: next(fresh))
    assert ours.std() > 0.05
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid, steps", [("leading", 37), slow("trailing", 50), slow("leading", 50)])
def test_a_ddim_pipeline_draws_the_pictures_of_our_ddim(grid, steps, exported, pipeline, monkeypatch):
    """On leading spacing, and on trailing where the steps divide T.  use_clipped_model_output is no pipeline's."""
    model, _ = exported("epsilon")
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))

    def scheduler(own):
        made = diffusers.DDIMScheduler.from_config(own.config, timestep_spacing=grid)
        step = made.step
        made.step = lambda *args, **options: step(*args, **options, use_clipped_model_output=True)
        return made

    theirs = chain_of_theirs(pipeline("epsilon"), scheduler, steps, [noise], monkeypatch)
    ours = chain_of_ours(model, "ddim", grid, steps, noise)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [37, slow(50)])
def test_dpm_solver_draws_the_pictures_of_our_dpmpp_2m_without_clipping(steps, exported, pipeline, monkeypatch):
    """The pipeline of a model of patches, whose schedule has 40 steps otherwise: here the default 1000."""
    model, _ = exported("v, shifted")
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))

    def scheduler(own):
        return diffusers.DPMSolverMultistepScheduler.from_config(
            own.config, algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero"
        )

    theirs = chain_of_theirs(pipeline("v, shifted"), scheduler, steps, [noise], monkeypatch)
    levels = make_levels(model.config.make_schedule(), "trailing", steps)
    denoise = make_diffusion(model.config).denoiser(model.network, clip=False)
    *_, last = SAMPLERS["dpmpp_2m"].run(denoise, noise, levels)
    torch.testing.assert_close(theirs, (last.x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [37, slow(50)])
def test_a_flow_pipeline_draws_the_pictures_of_our_ddim_on_its_own_levels(steps, exported, pipeline, monkeypatch):
    model, _ = exported("flow")
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    pipe = pipeline("flow")
    theirs = chain_of_theirs(pipe, lambda own: own, steps, [noise], monkeypatch)
    schedule, sigmas = model.config.make_schedule(), pipe.scheduler.sigmas.double().tolist()
    levels = [*(schedule.level(1000 * sigma - 1) for sigma in sigmas[:-1]), make_levels(schedule, "trailing", 1)[-1]]
    denoise = make_diffusion(model.config).denoiser(model.network, clip=False)
    *_, last = SAMPLERS["ddim"].run(denoise, noise, levels)
    torch.testing.assert_close(theirs, (last.x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_pipeline_of_patches_and_classes_draws_our_pictures(exported, pipeline, monkeypatch):
    """One line shuffles; classes and guidance are those of the network."""
    model, _ = exported("classes")
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([3, 7])

    def scheduler(own):
        return diffusers.DPMSolverMultistepScheduler.from_config(own.config, final_sigmas_type="zero")

    theirs = chain_of_theirs(
        pipeline("classes"), scheduler, 20, shuffled([noise], 2), monkeypatch, class_labels=label, guidance_scale=1.5
    )
    levels = make_levels(model.config.make_schedule(), "trailing", 20)
    denoise = make_diffusion(model.config).denoiser(model.network, label, guidance=1.5, clip=False)
    *_, last = SAMPLERS["dpmpp_2m"].run(denoise, noise, levels)
    torch.testing.assert_close(theirs, (last.x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


# In


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_process_comes_back_from_its_scheduler(schedule):
    prediction = "flow" if schedule == "flow" else "v"
    config = resolve({"dataset": "digits", "schedule": schedule, "prediction": prediction, "logsnr_shift": -0.7})
    process, _ = process_options_of(json.loads(json.dumps(scheduler_config(config))))
    back = resolve({"dataset": "digits", **process})
    assert_allclose(back.make_schedule().alpha, config.make_schedule().alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [
    {"beta_schedule": "linear"}, {"beta_schedule": "linear", "num_train_timesteps": 200, "beta_end": 0.1},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"beta_schedule": "sigmoid"},
    {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
])  # fmt: skip
def test_every_beta_schedule_of_diffusers_is_a_process_here(options):
    scheduler = diffusers.DDPMScheduler(**options)
    process, clip = process_options_of({"_class_name": "DDPMScheduler", **scheduler.config})
    alpha = resolve({"dataset": "digits", **process}).make_schedule().alpha
    assert_allclose(alpha**2, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-6)
    assert clip


def test_betas_of_a_schedule_are_the_betas_that_it_was_made_of():
    assert_allclose(betas_of(make_schedule("linear")), np.linspace(1e-4, 0.02, 1000), rtol=1e-9)


@pytest.mark.parametrize("pipeline, scheduler", [
    slow("DDPMPipeline", "DDPMScheduler"), ("DDIMPipeline", "DDIMScheduler"), ("", "DPMSolverMultistepScheduler"),
])  # fmt: skip
def test_a_model_made_by_diffusers_is_a_checkpoint(pipeline, scheduler, cli, tmp_path):
    network = save_theirs(folder := tmp_path / "theirs", pipeline, getattr(diffusers, scheduler)())
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        ours = load_model(load_checkpoint(folder))(x, time)
        torch.testing.assert_close(ours, network(x, time).sample, rtol=0, atol=1e-6)
    assert scheduler in cli.works("info", "--checkpoint", folder).out
    output = tmp_path / "x.npz"
    for sampler in SAMPLERS if pipeline == "DDPMPipeline" else ["ddim"]:
        words = ["--sampler", sampler, "--steps", 2, "--num_images", 2, "--output", output]
        cli.works("sample", "--checkpoint", folder, *words)
        assert np.load(output)["arr_0"].shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_a_model_made_by_diffusers_is_scored_and_trained_further(cli, tmp_path):
    save_theirs(folder := tmp_path / "theirs", num_class_embeds=10)
    cli.refuses(2, ["evaluate", "--checkpoint", folder, "--output", tmp_path / "e"], "--dataset")
    cli.works(
        "evaluate", "--checkpoint", folder, "--dataset", "digits", "--num_images", 20, "--steps", 2,
        "--features", "pixels", "--output", tmp_path / "e",
    )  # fmt: skip
    assert (tmp_path / "e" / "evaluation.json").exists()
    run = tmp_path / "run"
    train = ["train", "--init_from", folder, "--output_dir", run, "--max_steps", 1, "--num_samples", 1]
    cli.refuses(2, train, "--dataset")
    cli.works(*train, "--dataset", "digits")
    tuned = load_checkpoint(run / "model_final.pt").config
    assert "attention_head_dim" not in tuned.unet_details and "resnet_time_scale_shift=default" in tuned.unet_details
    assert (tuned.prediction, tuned.schedule, tuned.dataset) == ("epsilon", "linear", "digits")


def test_a_folder_without_folders_is_read_as_early_versions_wrote_it(theirs, tmp_path):
    """google/ddpm-cifar10-32 has model_index.json and everything else beside it."""
    for file in theirs.rglob("*.*"):
        shutil.copy(file, tmp_path)
    assert_same_state(load_checkpoint(tmp_path).tensors, load_checkpoint(theirs).tensors)


def test_weights_of_early_versions_have_their_names_of_today(tmp_path):
    from safetensors.torch import load_file, save_file

    save_theirs(tmp_path)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = load_file(file), {}
    for name, tensor in state.items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = tensor
    expected = load_checkpoint(tmp_path).tensors
    save_file(renamed, file)
    assert renamed.keys() != state.keys()
    assert_same_state(load_checkpoint(tmp_path).tensors, expected)


# Bad input


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BROKEN = {
    "a bin": (lambda f: next((f / "unet").glob("*.safetensors")).rename(f / "unet" / "x.bin"), "pickle"),
    "no weights": (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "half-written"),
    "half the weights": (lambda f: cut(next((f / "unet").glob("*.safetensors"))), "half-written"),
    "half the JSON": (lambda f: cut(f / "unet" / "config.json"), "not a JSON file"),
    "no network": (lambda f: (f / "unet" / "config.json").unlink(), "config.json"),
    "no scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json"),
    "an unknown block": (
        lambda f: change_json(f / "unet" / "config.json", up_block_types=["KUpBlock2D", "UpBlock2D"]), "KUpBlock2D"),
    "an unknown scheduler": (
        lambda f: change_json(f / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"),
        "EDMEulerScheduler"),
    "latents": (
        lambda f: change_json(f / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]),
        "latents"),
    "a text model": (
        lambda f: change_json(f / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]), "texts"),
    "another network": (lambda f: change_json(f / "unet" / "config.json", _class_name="UNet1DModel"), "UNet1DModel"),
    "other shapes": (
        lambda f: change_json(f / "unet" / "config.json", block_out_channels=[8, 24]), "first difference"),
    "a null": (lambda f: change_json(f / "unet" / "config.json", norm_eps=None), "cannot be read"),
    "a text for a number": (lambda f: change_json(f / "unet" / "config.json", layers_per_block="2"), "cannot be read"),
    "prediction": (
        lambda f: change_json(f / "scheduler" / "scheduler_config.json", prediction_type="edm"), "prediction_type"),
}  # fmt: skip


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_read_is_refused_in_one_line(name, theirs, cli, tmp_path):
    shutil.copytree(theirs, folder := tmp_path / "folder")
    breaking, word = BROKEN[name]
    breaking(folder)
    before = contents(tmp_path)
    cli.refuses(1, ["sample", "--checkpoint", folder, "--output", tmp_path / "x.png"], word)
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_no_model(cli, tmp_path):
    (tmp_path / "folder").mkdir()
    cli.refuses(1, ["info", "--checkpoint", tmp_path / "folder"], "folder")
    (tmp_path / "folder" / "config.json").write_text('{"architectures": ["BertModel"]}')
    cli.refuses(1, ["info", "--checkpoint", tmp_path / "folder"], "without a name", "UNet2DModel")
    (tmp_path / "folder" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    cli.refuses(1, ["info", "--checkpoint", tmp_path / "folder"], "a pipeline without a name", "DDPMPipeline")


@pytest.mark.parametrize(
    "words, code, word",
    [
        (["--format", "onnx"], 2, "--output"),
        (["--format", "onnx", "--output", "x.pt"], 2, ".onnx"),
        (["--format", "safetensors", "--output", "x"], 2, ".safetensors"),
        (["--format", "tflite", "--output", "x"], 2, "tflite"),
        (["--format", "diffusers", "--output", "."], 2, "exists already"),
        (["--format", "diffusers", "--output", "x", "--classes", "3"], 2, "--class_cond"),
        (["--format", "diffusers", "--output", "x", "--classes", "all"], 2, "--class_cond"),
        (["--format", "diffusers", "--output", "x", "--weights", "best"], 2, "best"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, code, word, cli, tmp_path):
    checkpoint = save(tmp_path / "model.pt", random_model(**EXPRESSIBLE["epsilon"]))
    before = contents(tmp_path)
    cli.refuses(code, ["export", "--checkpoint", checkpoint, *words], word)
    assert contents(tmp_path) == before


def test_a_class_must_be_one_that_was_trained(cli, tmp_path):
    model = random_model(class_cond=True)
    model.about["images"] = {"class_counts": [1] * 9 + [0]}
    checkpoint = save(tmp_path / "model.pt", model)
    words = ["export", "--checkpoint", checkpoint, "--format", "diffusers", "--output", tmp_path / "x", "--classes"]
    for classes, word in (("9", "no image of class 9"), ("1,2", "one class"), ("12", "no class 12")):
        cli.refuses(2, [*words, classes], word)
    cli.refuses(1, ["export", "--checkpoint", tmp_path / "none.pt", "--format", "onnx", "--output", "x.onnx"], "exist")


@pytest.mark.parametrize("library, format", [("diffusers", "diffusers"), ("onnx", "onnx"), slow("onnxruntime", "onnx")])
def test_a_missing_library_is_named_with_its_extra(library, format, cli, tmp_path, monkeypatch):
    checkpoint = save(tmp_path / "model.pt", random_model(**EXPRESSIBLE["epsilon"]))
    monkeypatch.setitem(sys.modules, library, None)
    before = contents(tmp_path)
    output = tmp_path / ("x.onnx" if format == "onnx" else "x")
    words = ["export", "--checkpoint", checkpoint, "--format", format, "--output", output]
    cli.refuses(1, words, library, f"tiny-diffusion[{format}]")
    assert contents(tmp_path) == before


def test_a_folder_that_diffusers_would_load_differently_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("tiny_diffusion.export.diffusers.TOLERANCE", -1.0)
    with pytest.raises(FileError, match="differs"):
        export_diffusers(random_model(**EXPRESSIBLE["epsilon"]), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_own_file_is_of_another_model_is_refused(exported, tmp_path):
    shutil.copytree(exported("epsilon")[1], folder := tmp_path / "x")
    change_json(folder / "unet" / "config.json", norm_eps=1e-3)
    with pytest.raises(FileError, match="norm_eps"):
        load_checkpoint(folder)


def test_a_safetensors_file_holds_bitwise_the_weights_and_a_configuration(tmp_path):
    model, file = random_model(**EXPRESSIBLE["details"]), tmp_path / "x.safetensors"
    export_safetensors(model, file)
    back = load_checkpoint(file)
    assert_same_state(load_model(back).state_dict(), model.state())
    assert back.config == model.config
