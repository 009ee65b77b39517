"""Pictures show exactly what the arrays hold, and files are whole or absent."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_helpers import read_film
from PIL import Image

from tiny_diffusion.visuals import figures, images
from tiny_diffusion.visuals.animations import save_film
from tiny_diffusion.visuals.class_grid import MAX_COLUMN_CLASSES, class_grid, columns_of
from tiny_diffusion.visuals.figures import save_noise_level_losses, save_sweep
from tiny_diffusion.visuals.images import denoising_frame, grid, near_square, save_png, strip
from tiny_diffusion.visuals.loss_curve import running_average, save_loss_curve, thinned
from tiny_diffusion.visuals.text import text_line, text_width


@pytest.fixture
def draw():
    """draw(n, height, width, channels) -> random uint8 images."""
    rng = np.random.default_rng(0)
    return lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)


def enlarged(image, scale):
    """Each pixel as a block, grey as RGB, computed in another way than by the code under test."""
    block = np.kron(image, np.ones((scale, scale, 1), np.uint8))
    return np.broadcast_to(block, (*block.shape[:2], 3))


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


# Grids


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (6, 3), (7, 4), (10, 5), (16, 4), (30, 6), (64, 8), (100, 10)])
def test_columns_are_those_that_a_person_would_choose(n, columns):
    assert near_square(n) == columns


def test_no_row_is_ragged_where_a_near_square_shape_exists():
    for n in range(1, 500):
        columns = near_square(n)
        rows = math.ceil(n / columns)
        assert rows <= columns <= 3 * rows
        if any(n % c == 0 and n <= c * c <= 3 * n for c in range(1, n + 1)):
            assert n % columns == 0, n


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("size, channels", [((8, 8), 1), ((32, 20), 3), ((64, 64), 1)])
def test_every_pixel_is_at_its_position_enlarged_by_a_whole_factor(n, size, channels, draw):
    x = draw(n, *size, channels)
    columns, padding = near_square(n), 2
    scale = images.whole_scale(size, n, columns, padding)
    h, w = size[0] * scale, size[1] * scale
    assert max(h, w) >= 56
    picture = grid(x)
    assert picture.dtype == np.uint8
    assert picture.shape == (math.ceil(n / columns) * (h + 2) + 2, columns * (w + 2) + 2, 3)
    rest = np.ones(picture.shape[:2], bool)
    for i in range(n):
        y, left = 2 + i // columns * (h + 2), 2 + i % columns * (w + 2)
        assert (picture[y : y + h, left : left + w] == enlarged(x[i], scale)).all()
        rest[y : y + h, left : left + w] = False
    assert (picture[rest] == images.BACKGROUND).all()


def test_a_large_grid_stays_within_its_bounds_and_a_large_image_is_not_shrunk(draw):
    assert max(grid(draw(900, 8, 8, 1)).shape) <= images.PICTURE_PIXELS
    assert grid(draw(1, 2000, 2000, 1)).shape == (2004, 2004, 3)


def test_given_columns_padding_and_scale_are_used(draw):
    assert grid(draw(6, 8, 8, 3), columns=6, padding=1, scale=3).shape == (24 + 2, 6 * 25 + 1, 3)


def test_an_empty_grid_is_refused(draw):
    with pytest.raises(ValueError, match="at least one image"):
        grid(draw(0, 8, 8, 1))


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (32, 3)])
def test_captions_add_height_and_leave_every_image_as_it_was(size, channels, draw):
    x = draw(6, size, size, channels)
    plain, captioned = grid(x), grid(x, captions=list("012345"))
    assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
    tile = (plain.shape[1] - 2) // 3 - 2
    row = (captioned.shape[0] - 2) // 2
    for r in range(2):
        assert (captioned[2 + r * row :][:tile] == plain[2 + r * (tile + 2) :][:tile]).all()
        assert captioned[2 + r * row + tile :][: row - tile].max() > 200  # and there is text


def test_a_long_caption_is_cut_before_its_neighbour(draw):
    x = draw(4, 28, 28, 1)
    short = grid(x, columns=4, captions=["", "a very long name indeed, of a flower", "", ""])
    cell = (short.shape[1] - 2) // 4
    assert cell - 2 == 56 * 3 // 2  # widened by half, no further
    text = short[2 + 56 :, :, 0]
    ink = np.flatnonzero((text != images.BACKGROUND).any(axis=0))
    assert 2 + cell <= ink.min() and ink.max() < 2 * cell


@pytest.mark.parametrize(
    "name", ["a" * 2_000_000, "", "$5_$9", "\x1b[31mred", "\udcff\udcfe", "line\nline", "猫\u202eabc"]
)
def test_any_name_is_a_caption_of_one_line(name, draw):
    """However long or unprintable it is, it is fast to show and moves no other image."""
    x = draw(2, 28, 28, 1)
    named, plain = (grid(x, captions=[caption, "short"]) for caption in (name, "a" * 200))
    assert named.shape[0] == plain.shape[0] and named.shape[1] <= plain.shape[1]


def test_a_name_that_does_not_fit_ends_in_an_ellipsis():
    text, width = "abcdefghij" * 20, 60
    longest = max(end for end in range(len(text)) if text_width(text[:end] + "…", 12) <= width)
    assert longest > 3
    np.testing.assert_array_equal(text_line(text, width, 12, 0), text_line(text[:longest] + "…", width, 12, 0))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 100, 1000])
def test_columns_hold_one_class_each_and_every_image_once(n, classes):
    labels = [(i * i) % classes for i in range(n)]
    cells = columns_of(labels)
    assert sorted(cells[cells >= 0]) == list(range(n))
    for column in cells.T:
        held = column[column >= 0]
        assert len({labels[image] for image in held}) == 1 and list(held) == sorted(held)
        assert (column[: len(held)] == held).all()  # no gap above an image
    assert [labels[image] for image in cells[0]] == sorted(labels[image] for image in cells[0])


def test_a_hundred_images_of_ten_classes_are_ten_rows_of_ten():
    np.testing.assert_array_equal(columns_of(list(range(10)) * 10), np.arange(100).reshape(10, 10))


def test_a_class_grid_shows_each_image_pixel_for_pixel_under_the_name_of_its_class(draw):
    x = draw(4, 8, 8, 1)
    picture, height, width = class_grid(x, [1, 0, 1, 1], ["zero", "one"]), 3 * 58 + 2, 2 * 58 + 2
    assert picture.shape[1] == width and picture.shape[0] > height
    body = picture[-height:]
    np.testing.assert_array_equal(body[2:58, 2:58], enlarged(x[1], 7))
    np.testing.assert_array_equal(body[2:58, 60:116], enlarged(x[0], 7))
    np.testing.assert_array_equal(body[-58:-2, 60:116], enlarged(x[3], 7))
    assert (body[-58:-2, 2:58] == images.BACKGROUND).all()


def test_many_classes_are_named_under_each_image(draw):
    count = MAX_COLUMN_CLASSES + 1
    x, names = draw(count, 8, 8, 1), [str(i) for i in range(count)]
    np.testing.assert_array_equal(class_grid(x, range(count), names), grid(x, captions=names))


def test_a_strip_has_a_row_per_image_and_a_column_per_step(draw):
    steps = [draw(3, 28, 28, 1) for _ in range(5)]
    picture = strip(steps)
    assert picture.shape == (3 * 58 + 2, 5 * 58 + 2, 3)
    headed = strip(steps, [f"t={t}" for t in (999, 700, 400, 200, 0)])
    assert headed.shape[1] == picture.shape[1]
    assert (headed[-len(picture) + 2 :] == picture[2:]).all()
    assert headed[: -len(picture)].max() > 200
    assert (picture[2 + 58 :][:56, 2 + 4 * 58 :][:, :56] == enlarged(steps[4][1], 2)).all()


def test_a_frame_shows_both_grids_whole_and_keeps_its_size(draw):
    noisy, clean = draw(6, 28, 28, 1), draw(6, 28, 28, 1)
    frame, left, right = denoising_frame(noisy, clean), grid(noisy), grid(clean)
    h, w, _ = left.shape
    assert (frame[-h:, :w] == left).all() and (frame[-h:, -w:] == right).all()
    assert (frame[:-h] != images.BACKGROUND).any()
    assert frame.shape == denoising_frame(clean, noisy).shape
    assert denoising_frame(noisy[:1, :8, :8], clean[:1, :8, :8]).shape[1] > 2 * 60  # room for its heading


# Files


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_comes_back_exactly_and_is_the_same_bytes_twice(channels, tmp_path, draw):
    x = draw(20, 30, channels)
    for name in ("a.png", "b.png"):
        save_png(tmp_path / "new" / "folder" / name, x)
    a, b = sorted((tmp_path / "new" / "folder").iterdir())
    assert (read(a).reshape(x.shape) == x).all()
    assert a.read_bytes() == b.read_bytes()


def test_a_grey_animation_is_exact_and_lasts_as_long_as_asked(tmp_path, draw):
    frames = [grid(draw(4, 8, 8, 1)) for _ in range(7)]
    save_film(tmp_path / "a.gif", frames, seconds=2.0, hold_seconds=1.5)
    back, seconds, loop = read_film(tmp_path / "a.gif")
    assert len(back) == 7 and loop == 0
    assert sum(seconds) == pytest.approx(3.5) and max(seconds[:-1]) - min(seconds[:-1]) < 0.011
    assert seconds[-1] == pytest.approx(2 / 7 + 1.5, abs=0.01)
    for frame, original in zip(back, frames, strict=True):
        assert (frame == original).all()


def test_more_frames_than_browsers_can_show_are_thinned_between_the_ends(tmp_path):
    frames = [np.full((4, 4, 3), i, np.uint8) for i in range(200)]
    save_film(tmp_path / "a.gif", frames, seconds=1.0, hold_seconds=0.5)
    back, seconds, _ = read_film(tmp_path / "a.gif")
    assert len(back) == 50 and min(seconds) >= 0.02 and sum(seconds) == pytest.approx(1.5)
    assert back[0].max() == 0 and back[-1].min() == 199


def test_still_moments_and_single_frames_keep_their_time(tmp_path, draw):
    frame = draw(8, 8, 3)
    for frames in ([frame], [frame] * 3, [frame, frame, 255 - frame]):
        save_film(tmp_path / "a.gif", frames, seconds=0.6, hold_seconds=0.4)
        assert sum(read_film(tmp_path / "a.gif")[1]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one frame"):
        save_film(tmp_path / "b.gif", [])


def test_an_npz_holds_one_uint8_array_named_arr_0(tmp_path, draw):
    x = draw(5, 8, 8, 3)
    images.save_npz(tmp_path / "a.npz", x)
    images.save_npz(tmp_path / "b.npz", (image for image in x), len(x))  # one by one
    for name in ("a.npz", "b.npz"):
        with np.load(tmp_path / name) as file:
            assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8 and (file["arr_0"] == x).all()


def test_a_folder_holds_one_numbered_png_per_image(tmp_path, draw):
    x = draw(3, 8, 8, 1)
    images.save_folder(tmp_path / "out", x)
    images.save_folder(tmp_path / "out", x[:2], [7, 123_456])
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["00000.png", "00001.png", "00002.png", "00007.png", "123456.png"]
    assert all((read(f) == image[..., 0]).all() for f, image in zip(files, [*x, *x[:2]], strict=True))


SAVES = {
    "png": lambda path, x: save_png(path, x[0]),
    "gif": lambda path, x: save_film(path, [x[0], x[1]]),
    "npz": lambda path, x: images.save_npz(path, x),
    "loss": lambda path, x: save_loss_curve(path, [1, 2], [1.0, 0.5]),
}
WRITERS = {
    "png": "PIL.Image.Image.save",
    "gif": "PIL.Image.Image.save",
    "npz": "numpy.lib.format.write_array_header_1_0",
    "loss": "matplotlib.figure.Figure.savefig",
}


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_previous_file_and_nothing_else(kind, error, tmp_path, monkeypatch, draw):
    path, x = tmp_path / ("file.gif" if kind == "gif" else "file"), draw(2, 8, 8, 3)
    SAVES[kind](path, x)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        next(a for a in args if hasattr(a, "write")).write(b"half a pic")
        raise error

    monkeypatch.setattr(WRITERS[kind], fail)
    with pytest.raises(type(error)):
        SAVES[kind](path, x)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Figures


@pytest.fixture
def saved(monkeypatch):
    """The matplotlib figures saved so far."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    return saved


def inked(path):
    """The fraction of a picture that is not white."""
    return (read(path)[..., :3] < 250).any(axis=-1).mean()


@pytest.mark.parametrize("count", [1, 2, 60, 20_000])
def test_a_loss_curve_is_plotted_for_any_number_of_steps_and_over_gaps(count, tmp_path, saved):
    losses = 0.03 + np.exp(-np.arange(count) / 10)
    losses[count // 2 : count // 2 + count // 10] = np.nan
    save_loss_curve(tmp_path / "loss.png", range(count), losses, [0, count - 1], [0.9, 0.1], title="a run")
    assert inked(tmp_path / "loss.png") > 0.01
    axes = saved[0].axes[0]
    assert axes.get_title() == "a run" and len(axes.lines) == 3 and max(len(a.get_xdata()) for a in axes.lines) <= 4002
    assert axes.get_yscale() == ("log" if count >= 60 else "linear")


@pytest.mark.parametrize("losses", [[], [np.nan], [np.inf, np.nan], [0.0, 0.0], [-1.0, 5.0]])
def test_losses_without_a_logarithm_are_still_plotted(losses, tmp_path, saved):
    save_loss_curve(tmp_path / "loss.png", range(len(losses)), losses)
    assert saved[0].axes[0].get_yscale() == "linear" and inked(tmp_path / "loss.png") > 0.001


def test_the_running_average_of_a_constant_is_that_constant_and_skips_gaps():
    losses = np.full(100, 0.25)
    losses[[0, 40, 41]] = np.nan
    average = running_average(losses)
    assert (np.isnan(average) == np.isnan(losses)).all()
    np.testing.assert_allclose(average[~np.isnan(average)], 0.25)


def test_a_thinned_line_keeps_every_spike():
    losses = np.ones(100_000)
    losses[54_321], losses[12_345], losses[777] = 9, 0.1, np.nan
    steps, thin = thinned(np.arange(100_000), losses)
    assert len(steps) == len(thin) <= 4000
    assert steps[thin == 9] == pytest.approx([54_321], abs=50)
    assert steps[thin == 0.1] == pytest.approx([12_345], abs=50)


@pytest.mark.parametrize("size, channels, scale, captions", [(8, 1, 18, True), (28, 1, 5, False), (64, 3, 2, True)])
def test_a_forward_figure_shows_every_image_pixel_for_pixel(size, channels, scale, captions, tmp_path, draw):
    """A row for each image and a column for each time; margin 12, padding 6, from the bottom right corner."""
    times = [0, 50, 999]
    noised = [draw(2, size, size, channels) for _ in times]
    captions = [f"alpha {t}" for t in times] if captions else None
    figures.save_forward_figure(tmp_path / "f.png", noised, times, title="forward", captions=captions)
    picture = read(tmp_path / "f.png")[..., :3]
    side = size * scale
    for row, column in np.ndindex(2, 3):
        y = picture.shape[0] - 12 - (2 - row) * (side + 6)
        x = picture.shape[1] - 12 - (3 - column) * (side + 6)
        assert (picture[y : y + side, x : x + side] == enlarged(noised[column][row], scale)).all()


NAMES = ["$5_$9", "a$b", "_hidden", "\udcff", "猫と犬", "\x1b[1m", "x" * 100_000, r"\frac{", "Пчела"]


@pytest.mark.parametrize(
    "title", [r"$5_$9 \frac{", pytest.param("\udcff猫\x1b[1m" + "x" * 100_000, marks=pytest.mark.slow)], ids=range(2)
)
def test_figures_show_any_name(title, tmp_path, saved):
    """Names of folders are shown as they are: none becomes a formula, and no font warns that it lacks a letter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_noise_level_losses(tmp_path / "a.png", [0, 1], {**{name: [1, 2] for name in NAMES}, "held out": [2, 3]})
        save_sweep(tmp_path / "b.png", {name: [(5, 0.1)] for name in NAMES}, 0.05, title=title)
        scores = {name: [(1, 0.5)] for name in NAMES}
        save_loss_curve(tmp_path / "c.png", [1, 2], [1.0, 0.5], title=title, scores=scores)
    for figure in saved:
        shown = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
        assert len(shown) >= len(NAMES)
        for text, name in zip(shown, NAMES, strict=False):
            if name.isprintable() and len(name) < 100:
                assert len(text) == len(name)
                assert text == name or not name.isascii()
    if title.isascii() and len(title) < 100:
        assert saved[2].axes[0].get_title() == title


def test_the_schedules_figure_plots_each_in_three_panels_even_where_the_snr_is_infinite(tmp_path, saved):
    time = np.linspace(0, 1, 200)
    curves = {
        "flow": dict(time=time, alpha=1 - time, sigma=time),
        "circle": dict(time=time, alpha=np.cos(time * np.pi / 2), sigma=np.sin(time * np.pi / 2)),
    }
    figures.save_schedules_figure(tmp_path / "s.png", curves, "two schedules")
    assert inked(tmp_path / "s.png") > 0.01
    levels, log_snr, density = saved[0].axes
    assert len(levels.lines) == 4 and len(density.lines) == 2
    assert all(np.abs(line.get_ydata()).max() == figures.LOG_SNR_LIMIT for line in log_snr.lines)
    flow = density.lines[0]  # t ~ uniform and log-SNR = 2 ln((1-t)/t): a logistic density of scale 2
    s = flow.get_xdata()
    np.testing.assert_allclose(flow.get_ydata(), 1 / (8 * np.cosh(s / 4) ** 2), atol=2e-3)


@pytest.mark.slow
def test_importing_loads_no_plotting_library_and_plotting_never_loads_pyplot(tmp_path):
    code = """if True:
        import sys
        from tiny_diffusion.visuals import figures, film, images
        from tiny_diffusion.visuals.loss_curve import save_loss_curve
        assert not {"PIL", "matplotlib", "imageio", "torch"} & set(sys.modules), "at import"
        save_loss_curve(sys.argv[1], [1], [1.0])
        assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    root = Path(images.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loss.png")], check=True, cwd=root)
