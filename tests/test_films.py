"""Films as other readers see them: PIL for GIF and WebP, ffmpeg for MP4 (and for the others, where it is there)."""

import sys

import numpy as np
import pytest
from image_helpers import read_film
from PIL import Image

from tiny_diffusion.errors import FileError
from tiny_diffusion.visuals.animations import FILMS, dithered, film_palette, save_film


def read_by_ffmpeg(path):
    """(frames int (T, H, W, 3), seconds in all)."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is an extra")
    film = ffmpeg.read_frames(str(path))
    about = next(film)
    width, height = about["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in film]
    return np.stack(frames).astype(int), about["duration"]


@pytest.fixture
def photograph():
    """Six frames of smooth colours that come out of noise, on a background of one grey."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:66] / 66
    colours = 255 * np.stack([x, y, 0.5 + 0.5 * np.sin(6 * x + 3 * y)], axis=-1).clip(0, 1)
    noise = random.integers(0, 256, colours.shape)
    frames = np.stack([(1 - k / 5) * noise + k / 5 * colours for k in range(6)]).astype(np.uint8)
    frames[:, :8], frames[:, :, -9:] = 80, 80
    return frames


def test_a_gif_of_a_photograph_has_its_frames_durations_and_colours(photograph, tmp_path):
    save_film(tmp_path / "a.gif", photograph, seconds=1.2, hold_seconds=0.8)
    frames, seconds, _ = read_film(tmp_path / "a.gif")
    assert len(frames) == 6 and seconds == pytest.approx([0.2] * 5 + [1.0])
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256  # one palette for the film
    assert (frames[:, :8] == 80).all() and (frames[:, :, -9:] == 80).all()
    cells = (frames[-1] - photograph[-1].astype(int))[8:, :56].reshape(10, 4, 14, 4, 3)
    assert np.abs(cells.mean((1, 3))).mean() < 6  # a cell of the dither has about the mean colour of the image
    by_ffmpeg, _ = read_by_ffmpeg(tmp_path / "a.gif")
    assert np.abs(by_ffmpeg[0] - frames[0]).max() <= 1 and np.abs(by_ffmpeg[-1] - frames[-1]).max() <= 1


def test_a_webp_is_exact(photograph, tmp_path):
    save_film(tmp_path / "a.webp", photograph, seconds=1.2, hold_seconds=0.8)
    frames, seconds, _ = read_film(tmp_path / "a.webp")
    assert np.array_equal(frames, photograph) and seconds == pytest.approx([0.2] * 5 + [1.0])


@pytest.mark.parametrize("cut", [0, 1])
def test_an_mp4_has_its_frames_durations_and_colours(cut, photograph, tmp_path):
    """An odd side gains a pixel, because players want even ones."""
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is an extra")
    odd = photograph[:, cut:, cut:]
    save_film(tmp_path / "a.mp4", odd, seconds=1.2, hold_seconds=0.8)
    frames, seconds = read_by_ffmpeg(tmp_path / "a.mp4")
    assert seconds == pytest.approx(2.0, abs=0.02) and len(frames) == 6 + 4  # the last is shown four times more
    assert frames.shape[1:3] == (48, 66)
    assert np.abs(frames[5:, : odd.shape[1], : odd.shape[2]] - odd[-1]).mean() < 4
    assert np.abs(frames[:, :4, :-12] - 80).max() <= 8  # the background
    luma = [0.2126, 0.7152, 0.0722]  # which is not subsampled, as the colours of noise are
    shown, wanted = frames[:6, : odd.shape[1], : odd.shape[2]] @ luma, odd @ luma
    assert [int(np.abs(frame - wanted).mean((1, 2)).argmin()) for frame in shown] == list(range(6))


@pytest.mark.parametrize("ending", FILMS)
def test_grey_films_keep_their_greys(ending, tmp_path):
    if ending == ".mp4":
        pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is an extra")
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None], (64, 64, 3))
    grey = np.stack([ramp, ramp[:, ::-1], ramp.transpose(1, 0, 2)])
    grey[2] = grey[2, :, :, :1]
    save_film(tmp_path / f"a{ending}", grey, seconds=0.3, hold_seconds=0)
    frames = (read_by_ffmpeg if ending == ".mp4" else read_film)(tmp_path / f"a{ending}")[0]
    assert len(frames) == 3
    assert np.abs(frames - grey).max() <= (3 if ending == ".mp4" else 0)


def test_what_does_not_move_does_not_flicker(photograph):
    still = np.stack([photograph[-1]] * 3)
    still[1, 20:30, 20:30] = [200, 30, 10]
    indices = dithered(still, film_palette(still))
    assert np.array_equal(indices[0], indices[2])
    moved = indices[0] != indices[1]
    assert not moved[:20].any() and not moved[30:].any() and moved[20:30, 20:30].all()


def test_a_film_of_few_colours_is_exact():
    colours = np.random.default_rng(1).integers(0, 256, (200, 3)).astype(np.uint8)
    frames = colours[np.random.default_rng(2).integers(0, 200, (3, 20, 20))]
    palette = film_palette(frames)
    assert np.array_equal(palette[dithered(frames, palette)], frames)


def test_a_film_of_several_batches_shows_every_image_at_its_place(loud, cli):
    words = ["sample", "--checkpoint", loud, "--num_images", 5, "--batch_size", 2, "--steps", 3, "--output"]
    cli.works(*words, "film.webp")
    cli.works(*words, "grid.png")
    frames, seconds, _ = read_film("film.webp")
    grid = np.asarray(Image.open("grid.png").convert("RGB"))
    assert len(frames) == 4 and sum(seconds) == pytest.approx(6)  # the noise and three steps
    right = frames[-1][-grid.shape[0] :, -grid.shape[1] :]
    assert np.array_equal(right, grid)


def test_an_interpolation_is_a_film_of_the_asked_format(loud, cli):
    cli.works("sample", "--checkpoint", loud, "--interpolate", "0,1", "--frames", 4, "--steps", 2, "--output", "x.webp")
    assert len(read_film("x.webp")[0]) == 4 and Image.open("x.png")


def test_a_missing_encoder_is_named_before_sampling(loud, cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    argv = ["sample", "--checkpoint", loud, "--output", "film.mp4"]
    cli.refuses(1, argv, "film.mp4 needs imageio-ffmpeg. Run: pip install imageio-ffmpeg", ".webp or .gif")
    with pytest.raises(FileError, match="imageio-ffmpeg"):
        save_film(tmp_path / "a.mp4", np.zeros((2, 4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_an_ending_that_is_none_is_refused_with_those_that_are(loud, cli, tmp_path):
    for name in ("film.avi", "film.mov", "film"):
        cli.refuses(2, ["sample", "--checkpoint", loud, "--output", name], name, *FILMS)
    assert not list(tmp_path.iterdir())
