"""Pictures as people have them: every mode, size and container becomes what a person would expect,
or one clear line."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import SMOKE, ModelConfig, UnifiedModel
from vision import ResizeRule, open_image, resize, to_tensor


@pytest.fixture
def photo():
    """A picture without symmetry: left red to right green, dark above, light below."""
    y, x = np.mgrid[:40, :60]
    return Image.fromarray(np.stack([255 - 4 * x, 4 * x, 6 * y], -1).astype(np.uint8))


def near(image, expected, tolerance=12):
    return np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < tolerance


@pytest.mark.parametrize(
    "mode, name",
    [
        ("RGB", "a.png"),
        ("RGB", "a.jpg"),
        ("RGB", "a.webp"),
        ("CMYK", "a.jpg"),
        ("P", "a.png"),
        ("RGBA", "a.png"),
        ("L", "a.png"),
        ("1", "a.png"),
    ],
)
def test_colour_modes(photo, tmp_path, mode, name):
    photo.convert(mode).save(tmp_path / name)
    image = open_image(tmp_path / name)
    expected = photo.convert(mode).convert("RGB") if mode in ("L", "1") else photo
    assert image.mode == "RGB" and near(image, expected, 40 if mode == "P" else 12)


@pytest.mark.parametrize(
    "name, kind, black, white, most",
    [
        ("a.png", np.uint16, 0, 65535, 255),
        ("dark.png", np.uint16, 0, 200, 1),  # 16 bits, whatever the brightest pixel is
        ("a.tif", np.float32, 0, 1, 255),
        ("dark.tif", np.float32, 0, 0.5, 128),
        ("bright.tif", np.float32, 0, 1.2, 255),
        ("a.tif", np.float32, -1, 65535, 255),
        ("a.tif", np.float32, 0, 1e6, 255),
        ("a.tif", np.float32, np.nan, 1, 255),
        ("a.tif", np.int32, 0, 255, 255),
        ("a.tif", np.int32, 0, 2**31 - 1, 255),
    ],
)
def test_grey_beyond_8_bits_uses_its_range(tmp_path, name, kind, black, white, most):
    values = np.array([[black] * 4, [0.4 * white] * 4, [white] * 4]).astype(kind)
    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(open_image(tmp_path / name))[:, 0, 0].astype(int)
    assert found[0] == 0 and abs(found[1] - 0.4 * most) <= 21 and found[2] == most


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 255] * 256)
    palette.save(tmp_path / "palette.png", transparency=3)
    for name in ("clear.png", "palette.png"):
        assert open_image(tmp_path / name).getpixel((4, 4)) == (255, 255, 255), name


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_the_first_frame_of_an_animation_counts(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    red, green, blue = open_image(tmp_path / name).getpixel((8, 8))
    assert red > 200 and green < 50 and blue < 50


def test_a_phone_held_upright(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; show the picture rotated by 90 degrees
    photo.save(tmp_path / "a.jpg", exif=exif)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (40, 60) and near(image, photo.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000), (3, 700), (4000, 3000)])
def test_extreme_sizes_fit_the_tables(size):
    for config in (ModelConfig(**SMOKE), ModelConfig()):
        for rule, side, unit in (
            (config.image_rule, config.latent_side, config.token_pixels),
            (config.vit_rule, config.vit_side, config.vit_patch),
        ):
            width, height = rule.size(*size)
            assert width % unit == height % unit == 0 and 0 < max(width, height) <= side * unit


def test_extreme_pictures_are_read():
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    for size in ((1, 1), (2000, 1), (1, 2000)):
        reference = model.encode_reference(Image.new("RGB", size, "red"))
        assert torch.isfinite(reference.latents).all()
        assert len(reference.patches) == np.prod(reference.patch_grid)


def test_pixels_are_normalised():
    image = to_tensor(resize(Image.new("RGB", (32, 32), (0, 255, 51)), ResizeRule(32, 16, 4)))
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))
