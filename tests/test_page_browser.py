"""The page in a real browser: Debian's Chromium without a window, driven by playwright.

Skipped where one of the two is not installed.  axe-core, which looks for barriers, comes with axe-playwright-python.
"""

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tiny_diffusion.data.pixels import to_pictures
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
PIXELS = "(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
SECONDS = 60  # for a busy machine


@pytest.fixture(scope="module")
def file(loud, tmp_path_factory):
    """The page of a class-conditional model whose images differ with whatever is asked, with what evaluate writes."""
    from cli_helpers import call

    path = tmp_path_factory.mktemp("page") / "run.html"
    assert call("report", "--run", loud.parent, "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is missing")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, file):
    """open_page(width, scheme, path) -> an open page that has drawn; it must log nothing and ask for nothing."""
    contexts, heard, asked = [], [], []

    def open_page(width=1280, scheme="light", path=file):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.get_by_text("Done:").nth(1).wait_for(timeout=SECONDS * 1000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []


def canvas(page, label):
    return page.get_by_role("img", name=label, exact=True)


def live(page):
    return page.locator("#live-body")


def pixels(page, label):
    """The grey levels of a canvas: (H, W)."""
    found = canvas(page, label)
    height, width = (int(found.get_attribute(side)) for side in ("height", "width"))
    return np.array(found.evaluate(PIXELS), dtype=np.uint8).reshape(height, width, 4)[..., 0]


def changes(page, label, act):
    """Whether the picture is another one soon after the act."""
    before = pixels(page, label)
    act()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if (pixels(page, label) != before).any():
            return True
        page.wait_for_timeout(50)
    return False


def settled(page, label):
    """The picture once it no longer changes."""
    last = pixels(page, label)
    while True:
        page.wait_for_timeout(400)
        now = pixels(page, label)
        if (now == last).all():
            return now
        last = now


def move(slider, key="ArrowLeft", times=3):
    slider.focus()
    for _ in range(times):
        slider.press(key)


def test_forward_and_reverse_follow_their_controls(open_page):
    page = open_page()
    real, recorded = "Real images under noise", "The noisy images x_t of the recording"
    assert changes(page, real, lambda: move(page.get_by_label("Timestep t")))
    move(page.get_by_role("slider", name="alpha and sigma over the timestep"), "Home", 1)
    assert page.get_by_label("Timestep t").input_value() == "0"
    page.get_by_label("Timestep t").press("End")
    page.get_by_label("Timestep t").press("PageDown")
    assert changes(page, real, lambda: page.get_by_label("Schedule").select_option("flow"))
    assert changes(page, recorded, lambda: move(page.locator("#reverse-body").get_by_label("Frame"), "Home", 1))
    assert changes(page, recorded, lambda: page.get_by_role("button", name="Play").click())
    page.get_by_role("button", name="Play").wait_for(timeout=SECONDS * 1000)  # it ends by itself


def test_the_page_draws_the_picture_of_sample_py(open_page, loud):
    page = open_page()
    checkpoint = load_checkpoint(loud)
    page.get_by_label("Seed", exact=True).fill("12")
    live(page).get_by_label("Sampler").select_option("abm")
    steps = live(page).get_by_label("Steps").first
    steps.focus()
    while int(steps.input_value()) > 10:
        steps.press("ArrowLeft")
    live(page).get_by_label("Class").first.select_option("4")
    drawn = settled(page, "Setting: x_t")
    request = checkpoint.request([0], sampler="abm", steps=10, seed=12, classes=(4,), guidance=1.0)
    images = sample(load_model(checkpoint), make_diffusion(checkpoint.config), request, checkpoint.shape)
    wanted = to_pictures(images)[0, :, :, 0]
    assert np.abs(drawn.astype(int) - wanted).max() <= 2
    assert "--seed 12 --indices 0 --sampler abm --steps 10" in page.get_by_text("The same picture").inner_text()


def test_every_setting_changes_the_picture_and_two_can_be_compared(open_page):
    page = open_page()
    label = "Setting: x_t"
    for number, act in enumerate(
        (
            lambda: page.get_by_role("button", name="Next seed").click(),
            lambda: page.get_by_label("Image of the seed").fill("5"),
            lambda: live(page).get_by_label("Sampler").select_option("ddim"),
            lambda: move(page.get_by_label("eta, fresh noise"), "End", 1),
            lambda: live(page).get_by_label("Class").first.select_option("7"),
            lambda: move(page.get_by_label("Guidance"), "ArrowRight", 6),
            lambda: move(page.get_by_label("Guided to time"), "ArrowLeft", 50),
            lambda: move(live(page).get_by_label("Steps").first),
        )
    ):
        settled(page, label)
        assert changes(page, label, act), number
    page.get_by_role("button", name="Compare").click()
    live(page).get_by_label("Sampler").nth(1).select_option("heun")
    assert (settled(page, "Second setting: x_t") != settled(page, label)).any()


def test_a_drawing_by_pointer_or_by_keys_is_denoised(open_page):
    page = open_page()
    page.get_by_role("button", name="Clear").click()
    settled(page, "The drawing denoised")
    easel = page.get_by_role("application")
    easel.scroll_into_view_if_needed()
    box = easel.bounding_box()

    def stroke():
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 3 / 4, box["y"] + box["height"] * 3 / 4, steps=5)
        page.mouse.up()

    assert changes(page, "The drawing denoised", stroke)
    drawn = np.array(easel.evaluate(PIXELS), dtype=np.uint8).reshape(8, 8, 4)[..., 0]
    assert drawn[4, 4] == 255 and drawn[0, 7] == 0
    settled(page, "The drawing denoised")

    def keys():
        easel.focus()
        for key in ("ArrowLeft", "ArrowLeft", " ", "ArrowDown", " "):
            easel.press(key)

    assert changes(page, "The drawing denoised", keys)
    settled(page, "The drawing denoised")
    assert changes(page, "The drawing under noise", lambda: move(page.get_by_label("Noise to add"), "End", 1))


def test_the_keyboard_reaches_every_control(open_page):
    page = open_page()
    wanted = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, summary, [tabindex]")]
             .filter((element) => element.checkVisibility() && !element.disabled)
             .map((element, i) => element.dataset.n = i).length"""
    )
    reached = set()
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.dataset.n"))
    assert {str(number) for number in range(wanted)} <= reached


def test_reload_shows_the_page_that_was_written_since(open_page, file, tmp_path):
    """As `report --watch` writes it; the page of a run that has ended has no such button."""
    text, path = file.read_text("utf-8"), tmp_path / "run.html"
    path.write_text(text, "utf-8")
    page = open_page(path=path)
    path.write_text(text.replace("its state after step 1.", "its state after step 2."), "utf-8")
    page.get_by_role("button", name="Reload").click()
    page.get_by_text("its state after step 2.").wait_for(timeout=SECONDS * 1000)
    path.write_text(re.sub('The run has not ended[^"]*', "", text), "utf-8")
    assert open_page(path=path).get_by_role("button", name="Reload").count() == 0


@pytest.mark.parametrize("width, scheme", [(1280, "dark"), (390, "light")])
def test_nothing_is_wider_than_the_window_and_axe_finds_no_barrier(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("All options").click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is missing: pip install axe-playwright-python")
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text("utf-8"))
    found = page.evaluate("() => axe.run()")["violations"]
    barriers = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert barriers == []


def test_on_paper_there_are_no_controls_and_all_options(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.get_by_role("button", name="Play").is_visible()
    assert page.get_by_role("heading", name="Judged").is_visible()
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_text("--timestep_distribution").first.is_visible()


def test_without_webassembly_plain_javascript_draws_the_same(open_page, file, tmp_path):
    fast = settled(open_page(), "Setting: x_t")
    plain = tmp_path / "plain.html"
    plain.write_text(file.read_text("utf-8").replace('"kernel":"AGFzbQ', '"kernel":"AAAAAA'), "utf-8")
    page = open_page(path=plain)
    assert "plain JavaScript" in page.locator("#live-body").inner_text()
    assert np.abs(settled(page, "Setting: x_t").astype(int) - fast).max() <= 1


def test_a_curve_names_the_whole_step_under_its_mark(open_page):
    """Rounded to three digits, the last of 1,405 steps would be step 1410, which there never was."""
    curve = "chart({label: 'loss', x: 'step', series: [{name: 'loss', points: [[0, 2], [1405, 0.5]]}]})"
    assert "step 1405: loss 0.5" in open_page().evaluate(f"{curve}.element.textContent")


def test_a_value_that_was_measured_at_another_step_says_so(open_page):
    """The held-out loss has a point an epoch, the training loss one a step."""
    curve = "chart({label: 'loss', x: 'step', series: [{name: 'held out', points: [[10, 2], [20, 1]], dots: true}]})"
    page = open_page()
    page.evaluate(f"() => {{ window.drawn = {curve}; document.body.append(drawn.element) }}")
    for at, text in ((20, "step 20: held out 1"), (13, "step 13: held out 2 of step 10")):
        assert (
            page.evaluate(f"() => {{ drawn.mark({at}); return drawn.element.querySelector('p').textContent }}") == text
        )
