"""tools/edit.py, whole: images of any size, regions of any kind, and what it refuses."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.core.latents import LatentScaling
from cfpretrain.evaluation.editing import encode_tokens, read_crop, read_region
from cfpretrain.evaluation.pictures import grid_layout
from cfpretrain.run import build
from examples.digits.seams import seam_steps
from tests.digits import digits
from tests.processes import REPOSITORY, run_tool
from tests.runs import write_run
from tests.test_config import TINY

SCRIPT = "tools/edit.py"
QUICK = ["--solver", "ddim", "--num-denoising-steps", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run folder with random weights; tests read it only."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", shards)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real digit, 8 x 8."""
    path = tmp_path_factory.mktemp("images") / "digit.png"
    Image.fromarray(np.uint8(digits(1)[0][2][0] * 255)).save(path)
    return path


run = partial(run_tool, SCRIPT)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_pixels_outside_of_the_region_stay_and_all_is_drawn(tmp_path: Path, source: Path, digit: Path) -> None:
    command = [source, "--image", digit, "--region", "top", "--class", "3", "8", "--num-seeds", 3, *QUICK]
    ended = run([*command, "--out", tmp_path / "edit.png", "--images", tmp_path / "edits"])
    assert (ended.code, ended.err) == (0, "")
    assert "8 of 16 tokens are regenerated: AR steps 1, denoising steps 2 (ddim)" in ended.out
    assert f"6 edits: {tmp_path / 'edit.png'}" in ended.out
    edits = [pixels(tmp_path / "edits" / f"row_{row}_edit_{n}.png") for row in (1, 2) for n in (1, 2, 3)]
    original = pixels(digit)[..., None]
    for edit in edits:
        # Pixels are latents here, so kept tokens are kept pixels.
        assert (edit[4:] == original[4:]).all()
        assert (edit[:4] != original[:4]).any()
    assert len({edit.tobytes() for edit in edits}) == 6
    title = f"{source}, step 7, EMA weights, region top, guidance 2\nAR steps 1, denoising steps 2 (ddim)"
    names = ["-> 3", "-> 8"]
    layout = grid_layout(10, 8, 8, names, 96, title, has_column_names=True)
    shown = pixels(tmp_path / "edit.png")

    def cell(row: int, column: int) -> np.ndarray:
        y, x = layout.corner(row, column)
        return shown[y : y + 96, x : x + 96][6::12, 6::12]

    for row in (0, 1):
        assert (cell(row, 0) == original).all()
        assert (cell(row, 1)[4:] == original[4:]).all()
        blueness = cell(row, 1)[:4, :, 2] - cell(row, 1)[:4, :, 0]
        assert (blueness > 40).all(), "the region is tinted"
        for n in range(3):
            assert (cell(row, 2 + n) == edits[3 * row + n]).all()


def test_a_generated_image_is_the_one_that_sample_makes(tmp_path: Path, source: Path) -> None:
    edit = [source, "--generate", "7", "--region", "tokens:0,5", "--class", "2", "--num-seeds", 1, *QUICK]
    ended = run([*edit, "--out", tmp_path / "edit.png", "--images", tmp_path / "edits"])
    assert (ended.code, ended.err) == (0, "")
    sample = [source, "--classes", "7", "--num-images", 1, "--out", tmp_path / "sample", "--batch-size", 1, *QUICK]
    ended = run_tool("tools/sample.py", sample)
    assert (ended.code, ended.err) == (0, "")
    made, edited = pixels(tmp_path / "sample" / "000000.png"), pixels(tmp_path / "edits" / "row_1_edit_1.png")
    kept = np.ones((4, 4), bool)
    kept[0, 0] = kept[1, 1] = False
    by_token = (made != edited).any(-1).reshape(4, 2, 4, 2).any((1, 3))
    assert (by_token == ~kept).all()


def test_a_photo_and_its_mask_are_cropped_alike(tmp_path: Path) -> None:
    """Of 300 x 200 pixels the middle 200 x 200 are seen, by 8 x 8."""
    photo = np.zeros((200, 300, 3), np.uint8)
    photo[:, 50:150] = 255
    mask = np.zeros((200, 300), np.uint8)
    mask[100:, 150:] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image, size = read_crop(tmp_path / "photo.png", 8, is_grey=False)
    assert (image.shape, size) == ((1, 3, 8, 8), (300, 200))
    assert (image[0, :, :, :3] > 0.8).all()
    assert (image[0, :, :, 5:] < 0.2).all()
    region = read_region(f"mask:{tmp_path / 'mask.png'}", 4, 8, size)
    assert region.reshape(4, 4).int().tolist() == [[0] * 4] * 2 + [[0, 0, 1, 1]] * 2
    assert torch.equal(region, read_region("box:2,2,4,4", 4, 8, size))


def test_masks_of_tokens_and_of_other_sizes(tmp_path: Path) -> None:
    mask = np.zeros((4, 4), np.uint8)
    mask[0, 3] = 255
    Image.fromarray(mask).save(tmp_path / "tokens.png")
    assert read_region(f"mask:{tmp_path / 'tokens.png'}", 4, 8, None).nonzero().tolist() == [[3]]
    Image.fromarray(np.full((6, 6), 255, np.uint8)).save(tmp_path / "other.png")
    wanted = "--region: expected a mask of 8 x 8 pixels, as the image, or 4 x 4, one a token, got 6 x 6"
    with pytest.raises(UserError, match=wanted):
        read_region(f"mask:{tmp_path / 'other.png'}", 4, 8, (300, 200))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"--region: .*text\.png: no.* image of a known kind"):
        read_region(f"mask:{tmp_path / 'text.png'}", 4, 8, None)


def test_an_image_is_edited_as_viewers_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Upright and without hidden colours; and a mask drawn over that fits."""
    seen = np.full((40, 60, 4), (0, 200, 0, 0), np.uint8)
    seen[:, :30] = (250, 0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(seen, "RGBA").transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "photo.png", exif=exif)
    image, size = read_crop(tmp_path / "photo.png", 8, False, (255, 255, 255))
    assert size == (60, 40)
    said = capsys.readouterr().out
    assert "--image: 1 image with transparency is composited on white (--background)\n" in said
    assert "--image: 1 image is turned upright, as its EXIF rotation says\n" in said
    assert (image[0, :, :, 5:] > 0.98).all(), "the hidden green is white"
    assert (image[0, 0, :, :3] > 0.95).all()
    assert (image[0, 1:, :, :3] < 0.05).all()
    assert (read_crop(tmp_path / "photo.png", 8, False, (0, 0, 0))[0][0, :, :, 5:] < 0.02).all()
    mask = np.zeros((40, 60, 4), np.uint8)
    mask[:20, 30:] = 255  # strokes on nothing
    mask[20:, :, :3] = 255  # of which an eraser leaves the colour
    Image.fromarray(mask, "RGBA").save(tmp_path / "mask.png")
    region = read_region(f"mask:{tmp_path / 'mask.png'}", 4, 8, size)
    assert region.reshape(4, 4).int().tolist() == [[0, 0, 1, 1]] * 2 + [[0] * 4] * 2


def test_a_picture_shows_what_the_autoencoder_does_without_an_edit(tmp_path: Path, shards: Path) -> None:
    folder = REPOSITORY / "configs" / "autoencoders" / "digits"
    autoencoder = KLAutoencoder.load(folder, "cpu")
    source = write_run(
        tmp_path / "run",
        shards,
        *("model.latent_size=4", "model.latent_channels=4", "model.patch_size=1", f"data.autoencoder={folder}"),
        *autoencoder.scaling_overrides().split(),
    )
    image = digits(1)[0][2].repeat(4, 1).repeat(4, 2)
    Image.fromarray(np.uint8(image[0] * 255)).save(tmp_path / "digit.png")
    command = [source, "--image", tmp_path / "digit.png", "--region", "top", "--class", "3", "--num-seeds", 1, *QUICK]
    ended = run([*command, "--out", tmp_path / "edit.png"])
    assert (ended.code, ended.err) == (0, "")
    pixels_1CYX, _ = read_crop(tmp_path / "digit.png", 32, is_grey=True)
    scaling = LatentScaling(autoencoder.shift, autoencoder.scale)
    decoded = autoencoder.decode(scaling.to_model(autoencoder.encode(pixels_1CYX)[0]))
    title = f"{source}, step 7, EMA weights, region top, guidance 2\nAR steps 1, denoising steps 2 (ddim)"
    layout = grid_layout(4, 4, 32, ["-> 3"], 96, title, has_column_names=True)
    shown = pixels(tmp_path / "edit.png")

    def cell(column: int) -> np.ndarray:
        y, x = layout.corner(0, column)
        return shown[y : y + 96, x : x + 96][1::3, 1::3]

    assert (cell(0) == pixels(tmp_path / "digit.png")[..., None]).all()
    assert np.abs(cell(1)[..., 0] - decoded[0, 0].clamp(0, 1).numpy() * 255).max() <= 1
    assert (cell(1) != cell(0)).any(), "an autoencoder changes any image"
    assert (cell(2)[16:] == cell(0)[16:]).all(), "the region is shown on the original"


def test_tokens_are_what_the_model_was_trained_on() -> None:
    """The scale of training: pixels in [0, 1] become [-1, 1]."""
    config = configs.load(TINY)
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = encode_tokens(config, build.make_autoencoder(config, torch.device("cpu")), image)
    assert torch.equal(tokens[0, 1], (image[0, 0, 0:2, 2:4].flatten() - 0.5) * 2)


def test_a_seam_is_the_step_across_the_border_of_the_region() -> None:
    """2 x 2 tokens of 3 x 3 pixels; the region is the token in the upper left, of value 1 in an image of 0.25."""
    region = torch.tensor([True, False, False, False])
    images = torch.full((2, 3, 6, 6), 0.25)
    images[0, :, :3, :3] = 1.0
    images[1, :, 4:, 4:] = 1.0  # a step elsewhere
    assert seam_steps(images, region).tolist() == [0.75, 0.0]
    images[0, :, 0, 3] = 1.0  # one of six pairs has no step
    assert seam_steps(images, ~region).tolist() == [0.625, 0.0]


MISTAKES = [
    (["--image", "absent.png"], "--image: absent.png: the file cannot be read: No such file or directory; give an im"),
    (["--image", "README.md"], "--image: README.md: no"),
    (["--generate", "x"], "--generate: expected a name, or a number from 0 to 9, got 'x'"),
    (["--generate", "1", "--region", "left"], "--region: expected centre, top, bottom, outside, box:Y0,X0,Y1,X1 or t"),
    (["--generate", "1", "--region", "box:0,0,9,9"], "--region: expected a box with 0 <= Y0 < Y1 <= 4 and 0 <= X0"),
    (["--generate", "1", "--region", "mask:absent.png"], "--region: absent.png: the file cannot be read"),
    (["--generate", "1", "--num-ar-steps", "9"], "--num-ar-steps: expected 1 to 8, got 9"),
    (["--generate", "1", "--num-seeds", "0"], "--num-seeds: expected 1 to 1000, got 0"),
    (["--generate", "1", "--num-seeds", "1000000000000"], "--num-seeds: expected 1 to 1000, got 1000000000000"),
    (["--image", "/dev/zero"], "--image: expected a file, got /dev/zero, which is none; give an image such as a PNG"),
    (["--generate", "1", "--region", "mask:/dev/zero"], "--region: expected a file, got /dev/zero, which is none"),
    (["--generate", "1", "--out", "edit.jpg"], "--out: expected a name that ends in .png, got edit.jpg"),
    (["--generate", "1", "--images", "edit.png"], "--images: expected another place than that of --out, got edit.png"),
    (["--generate", "1", "--images", "tools"], "--images: expected a place where nothing is yet, got tools; delete it"),
    (
        ["--generate", "1", "--out", "docs/images/demo_samples.png"],
        "--out: expected a place where nothing is yet, got d",
    ),
    (["--generate", "1", "--out", "nowhere/edit.png"], "--out: expected a place in a folder that is there, got nowher"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes(source: Path, options, message) -> None:
    region = [] if "--region" in options else ["--region", "top"]
    ended = run([source, "--class", "3", *region, *QUICK, *options])
    assert ended.code == EXIT_USER_ERROR
    assert f"[cfpretrain] error: {message}" in ended.err
    assert ended.err.count("\n") == 1


def test_latents_without_an_autoencoder_are_not_edited(tmp_path: Path, shards: Path) -> None:
    folder = write_run(tmp_path / "run", shards, "model.latent_channels=4")
    ended = run([folder, "--generate", "1", "--region", "top", "--class", "3"])
    assert ended.code == EXIT_USER_ERROR
    assert "expected a model that names its autoencoder (data.autoencoder)" in ended.err
