"""The page of a run: what its scripts compute is what torch computes, and what it holds is the run and nothing else."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from page_helpers import NODE, in_node, needs_node

from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.pixels import to_uint8
from tiny_diffusion.diffusion.editing import levels_from
from tiny_diffusion.diffusion.edits import SDEdit
from tiny_diffusion.diffusion.grids import GRIDS, make_levels
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.sampling import from_noise, sample
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.models.build import make_diffusion, make_model
from tiny_diffusion.models.layers import ACTIVATIONS
from tiny_diffusion.page.facts import binned
from tiny_diffusion.page.judged import judged_of
from tiny_diffusion.page.model import model_of
from tiny_diffusion.page.scripts import FOLDER, PAGE, WORKER
from tiny_diffusion.page.weights import MAX_PARAMETERS, network_of, too_large
from tiny_diffusion.randomness import stream
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model, save_checkpoint

SMALL = {"dataset": "digits", "base_channels": 8}
NETWORKS = [
    {},
    {"channel_mult": (1,), "attention_levels": (0,)},
    {"image_size": (9, 7), "channel_mult": (1, 2, 2)},
    {"image_size": (15, 22), "attention_levels": (0, 1), "attention_heads": 4},
    {"patch_size": 2},
    {"patch_size": 4, "image_size": (16, 12)},
    {"channels": 3},
    {"channels": 3, "patch_size": 2, "layers_per_block": 2},
    {"class_cond": False},
    {"attention_levels": ()},
    {"base_channels": 10, "channel_mult": (1, 3), "time_emb_dim": 12, "attention_heads": 3},
    *({"activation": name} for name in ACTIVATIONS),
]


def network(options):
    """A network of random weights as large as those that training leaves, and its configuration."""
    options = dict(options)
    channels = options.pop("channels", 1)
    config = resolve({**SMALL, **options})
    torch.manual_seed(3)
    model = make_model(config, channels, 10).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model, config, (channels, *config.size)


# The network


@needs_node
def test_one_evaluation_equals_torch_within_the_rounding_of_the_weights():
    """In WebAssembly and in plain JavaScript, for the null class and for a class."""
    cases, wanted = [], []
    for options in NETWORKS:
        model, config, shape = network(options)
        x, label = torch.randn(1, *shape), 7 if config.class_cond else None
        output = model(x, torch.tensor([345.6]), None if label is None else torch.tensor([label]))
        cases.append({"network": network_of(model, config, shape), "x": x.flatten().tolist(), "label": label})
        wanted.append(output.flatten())
    found = in_node(
        """return cases.map(({ network, x, label }) => [KERNEL, null].map((kernel) => {
             const unet = new UNet(network.shape, readWeights(network), new Memory(kernel));
             return unet.evaluate(Float32Array.from(x), 345.6, label);
           }));""",
        cases=cases,
    )
    for options, (fast, plain), output in zip(NETWORKS, found, wanted, strict=True):
        assert output.std() > 0.05
        torch.testing.assert_close(torch.tensor(fast), output, rtol=0, atol=2e-3, msg=lambda m, o=options: f"{o}: {m}")
        torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=0, atol=2e-5)


@needs_node
def test_the_product_in_webassembly_is_that_of_numpy_whatever_the_shape():
    """Also where tiles reach beyond the last pixel and the last channel."""
    shapes = [(1, 1, 1), (5, 3, 7), (4, 8, 8), (13, 6, 9), (2, 1, 17), (33, 5, 24)]
    random = np.random.default_rng(0)
    cases = [(random.normal(size=(m, k)), random.normal(size=(k, n)), random.normal(size=n)) for m, k, n in shapes]
    found = in_node(
        """return cases.map(([left, right, bias]) => [KERNEL, null].map((kernel) => {
             const [m, k, n] = [left.length, right.length, bias.length], memory = new Memory(kernel);
             const a = memory.store(left.flat()), b = memory.pack(k, n, (i, j) => right[i][j]);
             const c = memory.packBias(bias, n), out = memory.allocateOutput(m, n);
             memory.multiply(a, 1, m, 0, k, 1, k, 0, b, c, n, out);
             return memory.floats.slice(out, out + m * n);
           }));""",
        cases=[[value.tolist() for value in case] for case in cases],
    )
    for (left, right, bias), both in zip(cases, found, strict=True):
        for product in both:
            np.testing.assert_allclose(product, (left @ right + bias).ravel(), rtol=1e-5, atol=1e-5)


def test_the_bytes_of_the_kernel_are_its_text_assembled():
    pytest.importorskip("wasmtime", reason="wasmtime, which assembles the kernel, is not installed")
    from tiny_diffusion.page.assemble import assembled

    assert (FOLDER / "kernel.wasm").read_bytes() == assembled((FOLDER / "kernel.wat").read_text("utf-8"))


def test_a_network_beyond_the_limits_is_named():
    assert too_large(MAX_PARAMETERS, (64, 64)) is None
    assert "million parameters" in too_large(MAX_PARAMETERS + 1, (28, 28))
    assert "65 x 64 pixels" in too_large(1000, (65, 64))


# Noise, levels, pictures


@needs_node
def test_the_noise_of_a_seed_is_that_of_numpy():
    # In (5, 1) one number is accepted or not by the last bit of a 32-bit sum.
    asked = [(0, 0, 40_000), (5, 1, 12_000), (7, 3, 500), (2**63 - 1, 10**6, 500), (12345678901, 1, 500)]
    found = in_node(
        'return asked.map(([seed, index, count]) => new Stream(seed, "image", index).normals(count));',
        asked=[[str(seed), index, count] for seed, index, count in asked],
    )
    for (seed, index, count), numbers in zip(asked, found, strict=True):
        wanted = stream(seed, "image", index).standard_normal(count, dtype=np.float32)
        np.testing.assert_allclose(numbers, wanted, rtol=3e-7)


@needs_node
def test_levels_are_those_of_every_schedule_and_grid():
    schedules = [(name, timesteps, shift) for name in SCHEDULES for timesteps, shift in ((200, 0.0), (37, -1.3))]
    cases = [(*schedule, grid, steps) for schedule in schedules for grid in GRIDS for steps in (1, 10, 37)]
    found = in_node(
        """return cases.map(([name, timesteps, shift, grid, steps]) => {
             const schedule = new Schedule({ name, timesteps, shift });
             return [makeLevels(schedule, grid, steps), levelsFrom(schedule, grid, 5, 0.6)]
               .map((levels) => levels.map(({ time, alpha, sigma }) => [time, alpha, sigma]));
           });""",
        cases=cases,
    )
    for case, (whole, part) in zip(cases, found, strict=True):
        name, timesteps, shift, grid, steps = case
        schedule = make_schedule(name, timesteps, logsnr_shift=shift)
        for levels, wanted in (
            (whole, make_levels(schedule, grid, steps)),
            (part, levels_from(schedule, grid, 5, 0.6)),
        ):
            table = [[level.time, level.alpha, level.sigma] for level in wanted]
            np.testing.assert_allclose(levels, table, rtol=1e-9, atol=1e-9, err_msg=str(case))


@pytest.mark.slow
@needs_node
def test_every_sampler_draws_the_picture_of_sample_py(loud):
    """Within two grey levels after ten steps, with guidance, in an interval, without a class, and from an image."""
    checkpoint = load_checkpoint(loud)
    model, diffusion = load_model(checkpoint), make_diffusion(checkpoint.config)
    asked = [{"sampler": name, "guidance": 1.0} for name in SAMPLERS]
    asked += [{"sampler": "ddim", "eta": 0.5, "guidance": 2.0}, {"sampler": "abm", "guidance": 0.0}]
    asked += [{"sampler": "heun", "guidance": 2.0, "guidance_interval": (0.3, 0.8)}, {"sampler": "abm", "classes": ()}]
    asked += [{"sampler": "sa_solver", "guidance": 1.0, "strength": 0.5}]
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    requests, wanted = [], []
    for number, options in enumerate(asked):
        strength = options.pop("strength", None)
        request = checkpoint.request([number], steps=10, seed=5, **options)
        edit = from_noise if strength is None else SDEdit(image, strength)
        wanted.append(to_uint8(sample(model, diffusion, request, checkpoint.shape, edit=edit)).flatten().int())
        requests.append(
            {
                **{name: getattr(request, name) for name in ("seed", "sampler", "steps", "grid", "eta", "guidance")},
                "index": number,
                "label": None if request.labels() is None else request.labels()[0],
                "interval": request.guidance_interval,
                **({} if strength is None else {"image": image.flatten().tolist(), "strength": strength}),
            }
        )
    found = in_node(
        """const model = new Model(about, KERNEL);
           return requests.map((request) => Array.from([...model.sample(request)].pop().x, greyLevel));""",
        about=model_of(checkpoint),
        requests=requests,
    )
    for request, picture, other in zip(requests, found, wanted, strict=True):
        assert (torch.tensor(picture) - other).abs().max() <= 2, request
        assert other.max() - other.min() > 100


# The file


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The page of a small run."""
    from cli_helpers import call

    path = tmp_path_factory.mktemp("page") / "run.html"
    assert call("report", "--run", trained, "--output", path) == 0
    return path.read_text("utf-8")


def content_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_refers_to_nothing_outside_of_itself(page):
    assert not re.findall(r'\b(?:src|href)="(?!data:|#)[^"]*"|url\([^)]*\)', page)
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "connect-src" not in page and "default-src 'none'" in page
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|importScripts|sendBeacon)\b", page)


def test_the_page_says_what_was_trained(page, trained):
    content = content_of(page)
    shown = dict(map(tuple, content["run"]["facts"]))
    checkpoint = load_checkpoint(trained / "model_final.pt")
    parameters = sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
    assert f"{parameters:,}" in shown["network"] and "3 steps" in shown["training"] and "digits" in shown["data"]
    changed = {name: (value, default) for name, value, default in content["run"]["changed"]}
    assert changed["--base_channels"] == ("8", "32") and changed["--max_steps"] == ("3", "unset")
    assert "--precision" not in changed  # what the default, auto, became is no choice of the user
    assert "--lr" not in changed and not [name for name in changed if name in ("--output_dir", "--device")]
    assert content["film"]["levels"][0][2] == pytest.approx(1, abs=1e-3) and content["film"]["levels"][-1][2] == 0


def test_a_name_in_the_data_cannot_end_the_script_that_holds_it():
    from tiny_diffusion.page.build import page_of

    page = page_of({"title": "</title><script>alert(1)</script>", "name": "</script><script>alert(2)</script>{{data}}"})
    assert "alert(1)</script>" not in page and "alert(2)</script>" not in page
    assert content_of(page)["name"] == "</script><script>alert(2)</script>{{data}}"


def test_a_curve_of_many_steps_keeps_its_mean():
    pairs = [(step, float(step % 7)) for step in range(1, 10_001)]
    points = binned(pairs)
    assert len(points) == 300 and points[0][0] < points[1][0]
    assert np.mean([y for _, y in points]) == pytest.approx(3, abs=0.05)
    assert binned(pairs[:5]) == [[float(step), loss] for step, loss in pairs[:5]]


def test_a_damaged_evaluation_is_named_and_a_missing_one_says_how_to_make_it(tmp_path):
    assert "evaluate --checkpoint x.pt" in judged_of(tmp_path, "x.pt")["command"]
    (tmp_path / "evaluation.json").write_text('{"results": 3}')
    assert "cannot be read" in judged_of(tmp_path, "x.pt")["missing"]


@needs_node
def test_every_script_parses():
    names = sorted({*WORKER, *PAGE})
    parse = (
        'for (const path of process.argv.slice(1)) new (require("vm").Script)(require("fs").readFileSync(path, "utf8"))'
    )
    subprocess.run([NODE, "-e", parse, *(FOLDER / name for name in names)], check=True)


def test_no_script_is_long():
    """As the files of Python are: 260 lines at most."""
    for path in FOLDER.glob("*.*s*"):
        if path.suffix in (".js", ".css"):
            assert len(path.read_text("utf-8").splitlines()) <= 260, path.name


# The command


@pytest.mark.parametrize(
    "argv, code, words",
    [
        ([], 2, ["--run is required"]),
        (["--run", "nowhere"], 1, ["--run nowhere does not exist"]),
        (["--run", "{trained}/model_final.pt", "--output", "x.html"], 1, ["is a file", "Name the folder"]),
        (["--run", "{trained}", "--output", "page.pdf"], 2, ["--output page.pdf", ".html"]),
        (["--run", "{trained}", "--student", "{trained}"], 2, ["--student", "distill"]),
        (["--run", "{trained}", "--student", "nowhere.pt"], 1, ["nowhere.pt does not exist"]),
        (["--run", "."], 1, ["holds no checkpoint"]),
    ],
)
def test_what_cannot_be_shown_is_refused_by_its_option(argv, code, words, cli, trained):
    cli.refuses(code, ["report", *(word.format(trained=trained) for word in argv)], *words)


def test_a_page_follows_a_run_until_it_ends(cli, trained, tmp_path, monkeypatch):
    """It is written at once, then after each change, and the command ends with the run."""
    from tiny_diffusion.cli import report

    run = tmp_path / "run"
    shutil.copytree(trained, run)  # three steps: it has not ended
    passes = []

    def wait(seconds):
        passes.append((run / "report.html").exists())
        assert len(passes) < 9
        if len(passes) == 2:
            checkpoint = load_checkpoint(run / "model_final.pt")
            about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
            save_checkpoint(run / "model_final.pt", about | {"finished": True, "step": 4}, checkpoint.tensors)

    monkeypatch.setattr(report.time, "sleep", wait)
    ended = cli.works("report", "--run", run, "--watch")
    assert ended.out.count("wrote") == 2 and passes == [True, True]
    assert "of step 3" in ended.out and "of step 4" in ended.out


def test_a_model_that_is_too_large_is_shown_by_its_recordings(trained, monkeypatch):
    from tiny_diffusion.page import build, weights

    monkeypatch.setattr(weights, "MAX_PARAMETERS", 100)
    content = build.content_of(build.open_run(trained))
    assert "cannot run in a page: it has" in content["live"]["missing"] and "models" not in content["live"]
    assert "runs in this page" not in content["summary"] and content["film"]["count"] >= 4


def test_a_page_without_its_data_set_says_so(tmp_path, nothing_from_outside):
    from tiny_diffusion.page.recordings import real_images

    config = resolve({"dataset": "mnist", "data_dir": str(tmp_path)})
    assert "mnist" in real_images(config, tmp_path, None)["missing"]


def test_a_student_of_the_run_is_in_the_page_with_its_own_steps(trained, tmp_path):
    from tiny_diffusion.config.student import Student
    from tiny_diffusion.page.build import content_of as content_of_run
    from tiny_diffusion.page.build import open_run

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = load_checkpoint(run / "model_final.pt")
    student = Student(steps=2, segments=1, guidance=1.0, teacher=checkpoint.about["sha256"])
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    about |= {"student": vars(student), "sampling": about["sampling"] | student.sampling()}
    (run / "student").mkdir()
    save_checkpoint(run / "student" / "model_final.pt", about, checkpoint.tensors)
    models = content_of_run(open_run(run))["live"]["models"]
    assert list(models) == ["main", "student"]
    assert (models["student"]["sampling"]["sampler"], models["student"]["sampling"]["steps"]) == ("ddim", 2)
