"""Image files: decoding, what an image loses by it, and the crop that is stored. The data plane's door to PIL.

The crop is ADM's: of the RGB image, PIL's box filter halves it while its short side is at least twice the wanted one,
the bicubic filter does the rest, and the middle is cut out. As in ADM, EXIF rotation is ignored by default. Transparent
images are composited on a background; images are counted by what they lose.
"""

import errno
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError

import cfpretrain
from cfpretrain.base.console import UserError, count, one_line
from cfpretrain.base.files import read_bytes

Colour = tuple[int, int, int]  # red, green and blue, 0 to 255

PNG_LEVEL = 2  # of photos: a third of the time of PIL's own choice, and a tenth more bytes
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

# Kinds that are decoded, with the suffixes of their files in a folder tree. PIL knows more kinds, one of which runs an
# interpreter on the file.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
Image.init()  # else PIL registers a kind with its first file
_KINDS = [kind for kind in _SUFFIXES if kind in Image.OPEN]
SUFFIXES = frozenset(suffix for kind in _KINDS for suffix in _SUFFIXES[kind])  # in small letters
# Modes of a kind that DALI decodes as PIL does, within 2 of 255, where these are not all.
_DALI_MODES = {"GIF": (), "AVIF": (), "TIFF": ("L", "RGB", "RGBA"), "JPEG2000": ("L", "RGB", "RGBA")}
_OF_THE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EINVAL, errno.ENXIO, errno.EFBIG),  # a pipe or a device, a socket, a file too large
}
_MAX_FILE_BYTES = 2**29  # of all pixels that PIL decodes, in 8 bits
# PIL converts others, 16-bit grey among them, by cutting off what exceeds 255: to white.
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # where PIL refuses to decode
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {  # by its value, what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What an image may lose or be changed by, as the end of a sentence about a number of images.
_CHANGES = {
    "composited": "with transparency are composited on {background} (--background)",
    "turned": "are turned upright, as their EXIF rotation says",
    "not turned": "have an EXIF rotation, which is ignored, as ADM does (make_shards.py --upright applies it)",
    "cut to 8 bits": "of more than 8 bits a channel are cut to 8",
    "of other colours": "in CMYK or CIELAB are converted to RGB without their colour profile",
    "of another profile": "have a colour profile that is not sRGB's, which is not applied",
    "of several frames": "of several frames or pictures give their first",
    "enlarged": "have a side of fewer than {size} pixels and are enlarged",
}
_OF_ONE = {"are": "is", "have": "has", "give": "gives", "their": "its"}  # the words of these where it is one image


# ---------------------------------------------------------------------------------------------------------------------
# What is stored of an image


class RejectedImageError(Exception):
    """An image that cannot be stored; the message says why, and is the same for the same file."""


@dataclass(frozen=True)
class ImageFormat:
    """How images are stored: "lossless", a PNG of the crop, or "original", the bytes of the file.

    DALI decodes and crops an original later; where that would look otherwise, for transparency or a rotation, a PNG of
    all of its pixels is stored.
    """

    store: str
    image_size: int  # pixels a side of the crop
    is_grey: bool = False  # one channel instead of RGB
    background: Colour = WHITE  # behind what is transparent
    is_upright: bool = False  # EXIF rotation is applied

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.is_grey else 3


def parse_background(text: str) -> Colour:
    """A colour from a name that PIL knows, or from #rrggbb; UserError where it is no opaque colour."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text.strip())
        if alpha:
            raise ValueError("transparent")
        return red, green, blue
    except ValueError as error:
        near = get_close_matches(text.strip().lower(), ImageColor.colormap, 1)
        hint = f"; perhaps {near[0]}" if near else ""
        raise UserError(
            f"--background: expected a colour such as white, black or '#2563a8', got {text!r:.40}{hint}"
        ) from error


def colour_name(colour: Colour) -> str:
    """white, black or #rrggbb."""
    return {WHITE: "white", BLACK: "black"}.get(colour, "#{:02x}{:02x}{:02x}".format(*colour))


def describe_changes(counts: Mapping[str, int], background: Colour, image_size: int) -> list[str]:
    """A line for each kind of change to images, from the counts of `stored_image` or `read_image`."""
    lines = []
    for change, text in _CHANGES.items():
        if number := counts.get(change):
            words = [_OF_ONE.get(word, word) for word in text.split(" ")] if number == 1 else [text]
            said = " ".join(words).format(background=colour_name(background), size=image_size)
            lines.append(f"{count(number, 'image')} {said}")
    return lines


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        RejectedImageError: it is not there, no file, or cannot be read, and that is the file's own fault; where the
            disk or the network fails, it is a UserError.
    """
    try:
        return read_bytes(path, _MAX_FILE_BYTES)
    except OSError as error:
        reason = error.strerror or str(error)
        # A disk that goes away for a moment must not cost images for good.
        if error.errno not in _OF_THE_FILE or not path.parent.is_dir():
            raise UserError(
                f"images: {path} cannot be read ({reason}); fix that, and the same command goes on"
            ) from error
        raise RejectedImageError(f"the file cannot be read: {reason}") from error


def stored_image(data: bytes, image_format: ImageFormat, changes: Counter[str] | None = None) -> bytes:
    """The bytes that are stored for an image file; its changes are counted, see `describe_changes`.

    Raises:
        RejectedImageError: it cannot be decoded, or DALI could not decode or crop it later.
    """
    size = image_format.image_size
    decoded = _decode(data, image_format.is_grey, image_format.background, image_format.is_upright)
    image, found = decoded.image, list(decoded.changes)
    if min(image.size) < size:
        found.append("enlarged")
    if image_format.store == "lossless":
        stored = _png(centre_crop(image, size))
    else:
        _scaled(image, size)
        if not decoded.changes.isdisjoint(("composited", "turned")):
            stored = _png(image)
        elif decoded.mode in _DALI_MODES.get(decoded.kind, _EIGHT_BIT_MODES):
            stored = data
        else:
            raise RejectedImageError(
                f"DALI does not decode {decoded.kind} of mode {decoded.mode} as PIL does; --store lossless stores it"
            )
    if changes is not None:
        changes.update(found)
    return stored


def read_image(
    data: bytes,
    is_grey: bool = False,
    background: Colour = WHITE,
    is_upright: bool = False,
    changes: Counter[str] | None = None,
    check_size: Callable[[tuple[int, int]], None] = lambda _: None,
) -> Image.Image:
    """Decodes the bytes of an image file: its first frame, in mode RGB, or of that the grey values in mode L.

    Args:
        data: the file.
        is_grey: of one channel instead of RGB.
        background: behind what is transparent.
        is_upright: whether EXIF rotation is applied.
        changes: counts of what images lose, see `describe_changes`.
        check_size: called with width and height before any pixel is decoded; may raise a UserError.

    Raises:
        RejectedImageError: it is empty, cut short, damaged, of an unknown kind, or too large for PIL.
    """
    decoded = _decode(data, is_grey, background, is_upright, check_size)
    if changes is not None:
        changes.update(decoded.changes)
    return decoded.image


def declared_size(data: bytes | NDArray[np.uint8]) -> tuple[int, int] | None:
    """Width and height that an image file declares; None of what is no image of a known kind, or too large for PIL.

    Of JPEG 2000 also None where it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images above half of PIL's limit
            with Image.open(io.BytesIO(bytes(data)), formats=_KINDS) as file:
                if file.format == "JPEG2000":
                    file.load()  # a cut one ends the process in DALI's decoder
                return file.size
    except Exception:  # whatever a damaged one brings its decoder to
        return None


@dataclass(frozen=True)
class _Decoded:
    image: Image.Image
    kind: str
    mode: str  # in the file
    changes: frozenset[str]  # keys of _CHANGES


def _decode(
    data: bytes,
    is_grey: bool,
    background: Colour,
    is_upright: bool,
    check_size: Callable[[tuple[int, int]], None] = lambda _: None,
) -> _Decoded:
    if not data:
        raise RejectedImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of images above half of PIL's limit
            with Image.open(io.BytesIO(data), formats=_KINDS) as file:
                check_size(file.size)
                if file.mode not in _EIGHT_BIT_MODES:
                    raise ValueError(f"its values (mode {file.mode}) do not fit 8 bits; scale them first")
                num_bits = _num_bits(file, data)  # before it is loaded
                image, is_composited = _opaque(file, background)
                turn = _turn(file)
                changes = frozenset(_losses(file, num_bits, is_composited, turn, is_upright))
                kind, mode = str(file.format), file.mode
    except (MemoryError, UserError):
        raise
    except UnidentifiedImageError as error:
        raise RejectedImageError(f"no image of a known kind, or a damaged one (known: {', '.join(_KINDS)})") from error
    except Exception as error:
        # Decoders trip over damaged files with whatever exception comes.
        raise RejectedImageError(f"it cannot be decoded: {one_line(error):.200}") from error
    if not min(image.size):
        raise RejectedImageError(f"it has no pixels: {image.width} x {image.height}")
    if is_upright and turn is not None:
        image = image.transpose(turn)
    return _Decoded(image.convert("L") if is_grey else image, kind, mode, changes)


def _opaque(file: Image.Image, background: Colour) -> tuple[Image.Image, bool]:
    """The image in RGB, and whether it was composited on the background, since some of it is transparent."""
    if file.has_transparency_data:
        image = file.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            canvas = Image.new("RGBA", image.size, (*background, 255))
            return Image.alpha_composite(canvas, image).convert("RGB"), True
    return file.convert("RGB"), False


def _losses(
    file: Image.Image, num_bits: int, is_composited: bool, turn: Image.Transpose | None, is_upright: bool
) -> Iterator[str]:
    """Keys of _CHANGES."""
    profile = file.info.get("icc_profile") or b""
    if is_composited:
        yield "composited"
    if turn is not None:
        yield "turned" if is_upright else "not turned"
    if num_bits > 8:
        yield "cut to 8 bits"
    if file.mode in ("CMYK", "LAB"):
        yield "of other colours"
    elif profile and b"sRGB" not in profile.replace(b"\0", b""):  # its name may be in UTF-16
        yield "of another profile"
    if _has_more_frames(file):
        yield "of several frames"


def _has_more_frames(file: Image.Image) -> bool:
    try:
        return bool(getattr(file, "is_animated", False))
    except Exception:  # there is a damaged one behind the first
        return True


def _turn(file: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which viewers ignore too
        return None


def _num_bits(file: Image.Image, data: bytes) -> int:
    """Bits of a channel in the file; PIL converts to 8 without notice."""
    if file.format == "PNG":
        return data[24]
    if file.format == "TIFF":
        bits = getattr(file, "tag_v2", {}).get(258, 8)
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    if file.format == "PPM" and isinstance(file, ImageFile.ImageFile):
        arguments = file.tile[0].args  # (raw mode, largest value) where that is not 255
        return int(arguments[1]).bit_length() if isinstance(arguments, tuple) else 8
    if file.format == "JPEG2000":  # of the first component, in the marker SIZ behind SOC
        place = data.find(b"\xff\x4f\xff\x51") + 42
        return (data[place] & 0x7F) + 1 if 42 <= place < len(data) else 8
    if file.format == "AVIF":  # box pixi: version and flags, number of channels, bits of each
        place = data.find(b"pixi") + 9
        return data[place] if 9 <= place < len(data) else 8
    return 8


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """ADM's centre crop: `image_size` pixels a side; RejectedImageError as of `_scaled`."""
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _scaled(image, image_size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _scaled(image: Image.Image, image_size: int) -> tuple[int, int]:
    """Width and height once the short side is `image_size`; RejectedImageError where PIL could not take as much."""
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise RejectedImageError(
            f"it is too thin: {image.width} x {image.height} would become {width} x {height} for the crop"
        )
    return width, height


def _png(image: Image.Image) -> bytes:
    image.info.clear()  # colour profile and transparency would be written too
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def versions() -> dict[str, str]:
    """Of the packages that decide the pixels and bytes that are stored."""
    return {"cfpretrain": cfpretrain.__version__, "pillow": PIL.__version__}
