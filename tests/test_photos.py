import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFilter

from dreambooth import photo_checks, photos
from dreambooth.errors import UserError
from dreambooth.smart_crop import busiest_corner, edge_energy

DREAMBENCH = Path(__file__).parents[1] / ".." / "shared" / "dreambench"
real_photos = pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="needs ../shared/dreambench")


def noise(width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def decoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> np.ndarray:
    return np.asarray(photos.decode(encoded(image, form, **options), "dog"))


def photo(name: str = "dog6/00.jpg") -> Image.Image:
    return photos.decode((DREAMBENCH / name).read_bytes(), name)


# decode: pixels

UPRIGHT = {  # EXIF 2.32, tag 274: what to do with the stored rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_each_exif_orientation_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(decoded(noise(), exif=exif), UPRIGHT[orientation](noise()))


def test_decode_ignores_a_broken_exif_block() -> None:
    np.testing.assert_array_equal(decoded(noise(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"), noise())


def test_decode_scales_16_bit_grey_and_does_not_clip() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    want = np.round(levels / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decoded(levels)[..., 1], want)


def test_decode_keeps_the_upper_byte_of_16_bit_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    np.testing.assert_array_equal(np.asarray(photos.decode(data, "dog")), (pixels >> 8).astype(np.uint8))


def test_decode_lays_alpha_on_white() -> None:
    alpha = np.linspace(0, 255, 48 * 32).astype(np.uint8).reshape(32, 48, 1)
    want = noise() * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    got = decoded(np.concatenate([noise(), alpha], 2))
    assert np.abs(got - want).max() <= 1


def test_decode_lays_grey_with_alpha_on_white() -> None:
    pixels = np.zeros((4, 4, 2), np.uint8)
    pixels[:, 2:, 1] = 255
    assert decoded(Image.fromarray(pixels, "LA"))[0].tolist() == [[255] * 3, [255] * 3, [0] * 3, [0] * 3]


def test_decode_lays_a_transparent_palette_entry_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    assert decoded(image, transparency=0)[0, :2].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_decode_makes_grey_three_equal_channels() -> None:
    np.testing.assert_array_equal(decoded(noise()[..., 0]), np.repeat(noise()[..., :1], 3, 2))


def test_decode_reads_adobe_inverted_cmyk_the_right_way_round() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red; PIL writes the Adobe marker
    data = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in data[:200]
    assert np.abs(np.asarray(photos.decode(data, "dog")).astype(int) - [255, 0, 0]).max() <= 3


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries changed places: converting to sRGB swaps the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_decode_converts_an_icc_profile_to_srgb() -> None:
    got = decoded(noise(), icc_profile=swapped_profile())
    assert np.abs(got.astype(int) - noise()[..., ::-1]).max() <= 2


@pytest.mark.parametrize("profile", [b"garbage", swapped_profile()[:200]])
def test_decode_ignores_a_broken_icc_profile(profile: bytes) -> None:
    np.testing.assert_array_equal(decoded(noise(), icc_profile=profile), noise())


def test_decode_ignores_an_rgb_profile_on_a_grey_picture() -> None:
    np.testing.assert_array_equal(decoded(noise()[..., 0], icc_profile=swapped_profile())[..., 0], noise()[..., 0])


def test_decode_leaves_no_metadata_that_would_be_applied_twice() -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = photos.decode(encoded(noise(), exif=exif, icc_profile=swapped_profile()), "dog")
    assert image.info == {} and image.getexif().get(274) is None


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_decode_gives_the_same_pixels_from_every_lossless_format(form: str) -> None:
    np.testing.assert_array_equal(decoded(noise(), form, **({"lossless": True} if form == "WEBP" else {})), noise())


def test_decode_takes_the_first_picture_of_an_mpo() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))], quality=95)
    assert np.asarray(photos.decode(data, "dog")).std() > 30


# decode: refusals


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_decode_refuses_a_cut_off_file(form: str, share: float) -> None:
    data = encoded(noise(), form)
    with pytest.raises(UserError, match=r"^dog\.jpg must .*; save it again as JPEG or PNG, or delete it$"):
        photos.decode(data[: int(len(data) * share)], "dog.jpg")


def test_decode_never_returns_a_png_with_wrong_pixels() -> None:
    data = bytearray(encoded(noise()))
    for place in range(60, len(data) - 20, 101):
        data[place] ^= 255
        with pytest.raises(UserError):
            photos.decode(bytes(data), "dog")
        data[place] ^= 255


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_decode_raises_nothing_but_user_errors_on_damaged_files(form: str) -> None:
    clean, random = encoded(noise(), form), np.random.default_rng(0)
    for _ in range(60):
        data = np.frombuffer(clean, np.uint8).copy()
        data[random.integers(0, len(data), 5)] = random.integers(0, 256, 5)
        try:
            photos.decode(data.tobytes(), "dog")
        except UserError:
            pass


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF"])
def test_decode_refuses_an_animation(form: str) -> None:
    data = encoded(noise(), form, save_all=True, append_images=[Image.fromarray(noise(seed=1))])
    with pytest.raises(UserError, match="dog must be one picture, got 'an animation of 2 frames'; save the frame"):
        photos.decode(data, "dog")


def test_decode_says_that_heic_cannot_be_read_and_what_to_do() -> None:
    with pytest.raises(UserError, match="got 'HEIC'; HEIC cannot be read here: export it as JPEG"):
        photos.decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "IMG_1.HEIC")


def test_decode_says_that_a_file_is_empty() -> None:
    with pytest.raises(UserError, match=r"dog must be a photo, but the file is empty \(0 bytes\)"):
        photos.decode(b"", "dog")


def test_decode_refuses_text() -> None:
    with pytest.raises(UserError, match="got 'no known image format'"):
        photos.decode(b"a photo of a sks dog", "dog.jpg")


def test_decode_refuses_more_pixels_than_the_limit_before_decoding_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="dog must have at most 1,000 pixels, got '1,536'"):
        photos.decode(encoded(noise()), "dog")


def test_decode_refuses_a_decompression_bomb() -> None:
    data = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = (60000).to_bytes(4, "little") * 2
    with pytest.raises(UserError, match="must have at most 120,000,000 pixels"):
        photos.decode(bytes(data), "dog")


def test_decode_refuses_the_preview_of_a_camera_raw_file() -> None:
    with pytest.raises(UserError, match="must be a developed photo"):
        photos.decode(encoded(noise(), "TIFF", tiffinfo={254: 1}), "dog.nef")


def test_decode_refuses_floating_point_pixels() -> None:
    with pytest.raises(UserError, match="got 'PIL mode F'"):
        photos.decode(encoded(Image.new("F", (8, 8)), "TIFF"), "dog.tif")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "AVIF"])
def test_image_format_names_what_pil_writes(form: str) -> None:
    assert photos.image_format(encoded(noise(), form)[:32]) == form


@pytest.mark.parametrize("head", [b"", b"BM is how this note begins", b"a photo of a dog", b"%PDF-1.7"])
def test_image_format_is_none_for_other_files(head: bytes) -> None:
    assert photos.image_format(head) is None


# check


@pytest.mark.parametrize(
    ("size", "level", "words"),
    [
        ((64, 64), "ok", ""),
        ((200, 63), "warning", "63 px on the short side, below the resolution of 64: it is enlarged 1.0 times"),
        ((40, 40), "warning", "enlarged 1.6 times"),
        ((32, 32), "warning", "enlarged 2.0 times"),
        ((31, 64), "refused", "31 px on the short side"),
        ((128, 64), "ok", ""),
        ((64, 160), "warning", "2.5 times as long as wide: a square crop drops 60% of it"),
        ((260, 64), "refused", "a square crop drops 75% of it"),
    ],
)
def test_check_judges_the_size(size: tuple[int, int], level: str, words: str) -> None:
    verdict = photo_checks.check(Image.fromarray(noise(*size)), 64)
    assert (verdict.level, verdict.accepted) == (level, level != "refused")
    assert words in "; ".join(verdict.reasons)


def test_check_refuses_one_flat_colour() -> None:
    assert photo_checks.check(Image.new("RGB", (64, 64), "red"), 64) == ("refused", ("shows (nearly) one flat colour",))


def test_check_refuses_the_noise_of_a_covered_lens() -> None:
    dark = np.random.default_rng(0).normal(8, 3, (512, 512, 3)).clip(0, 255).astype(np.uint8)
    assert photo_checks.check(Image.fromarray(dark), 512).level == "refused"


def test_check_accepts_colours_of_equal_brightness() -> None:
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    image.paste((0, 200, 0), (20, 20, 40, 40))
    assert photo_checks.check(image, 64).accepted


@real_photos
def test_check_finds_the_black_bars_of_cat2_and_nothing_else_in_real_photos() -> None:
    levels = {path: photo_checks.check(photo(path), 512).reasons for path in ("dog6/00.jpg", "vase/00.jpg", "cat2/00.jpg", "cat2/03.jpg")}
    bars = "has black bars over 31% of it, which the model would learn: crop them away"
    assert levels == {"dog6/00.jpg": (), "vase/00.jpg": (), "cat2/00.jpg": (bars,), "cat2/03.jpg": ()}


@real_photos
def test_check_warns_of_a_photo_that_is_blurred_everywhere() -> None:
    blurred = photo().resize((512, 512)).filter(ImageFilter.GaussianBlur(4))
    assert photo_checks.check(blurred, 512) == ("warning", ("looks blurred: no part of it has sharp detail",))


@real_photos
def test_check_does_not_call_a_photo_blurred_whose_subject_alone_is_sharp() -> None:
    sharp = photo().resize((512, 512))
    blurred = sharp.filter(ImageFilter.GaussianBlur(8))
    blurred.paste(sharp.crop((20, 120, 300, 500)), (20, 120))
    assert photo_checks.check(blurred, 512).level == "ok"


def test_black_bars_measures_their_share() -> None:
    pixels = np.full((320, 640, 3), 90, np.uint8)
    pixels[:, :160] = pixels[:, 560:] = 3
    assert photo_checks.black_bars(Image.fromarray(pixels)) == pytest.approx((160 + 80) / 640)


def test_black_bars_needs_two_opposite_sides() -> None:
    pixels = np.full((320, 640, 3), 90, np.uint8)
    pixels[:, :160] = 0
    assert photo_checks.black_bars(Image.fromarray(pixels)) == 0.0


def test_perceptual_hash_is_the_sign_of_the_neighbours_difference() -> None:
    ramp = np.tile(np.arange(17, dtype=np.uint8) * 10, (16, 1))
    assert photo_checks.perceptual_hash(Image.fromarray(ramp)) == 2**256 - 1
    assert photo_checks.perceptual_hash(Image.fromarray(ramp[:, ::-1].copy())) == 0


@real_photos
def test_perceptual_hash_knows_a_recompressed_copy_from_another_photo() -> None:
    first, second = photo("dog6/01.jpg"), photo("dog6/02.jpg")
    copy = Image.open(io.BytesIO(encoded(first.resize((400, 400)), "JPEG", quality=60)))
    distance = [(photo_checks.perceptual_hash(first) ^ photo_checks.perceptual_hash(other)).bit_count() for other in (copy, second)]
    assert distance[0] <= photo_checks.NEAR_DUPLICATE_BITS < distance[1]


# crops


@pytest.mark.parametrize(
    ("width", "height", "mode", "u", "box"),
    [
        (10, 6, "center", (0.9, 0.9), (2, 0, 8, 6)),
        (11, 6, "center", (0.0, 0.0), (2, 0, 8, 6)),
        (6, 9, "center", (0.5, 0.5), (0, 1, 6, 7)),
        (6, 6, "random", (0.99, 0.99), (0, 0, 6, 6)),
        (10, 6, "random", (0.0, 0.0), (0, 0, 6, 6)),
        (10, 6, "random", (0.4, 0.0), (2, 0, 8, 6)),
        (10, 8, "random", (0.999, 0.999), (4, 2, 10, 8)),
    ],
)
def test_crop_box_by_hand(width: int, height: int, mode: photos.Mode, u: tuple[float, float], box: tuple[int, ...]) -> None:
    assert photos.crop_box(width, height, 6, mode, u) == box


def test_crop_box_random_gives_every_position_an_equal_share() -> None:
    lefts = [photos.crop_box(9, 6, 6, "random", (u / 1000, 0.0))[0] for u in range(1000)]
    assert np.bincount(lefts).tolist() == [250] * 4


@pytest.mark.parametrize(("arguments", "words"), [((5, 9, 6), "fit the picture, got 5 x 9"), ((9, 9, 6, "top"), "'top'")])
def test_crop_box_refuses_what_it_cannot_do(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        photos.crop_box(*arguments)


@pytest.mark.parametrize("u", [1.0, -0.1, float("nan")])
def test_crop_box_refuses_numbers_outside_0_to_1(u: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        photos.crop_box(9, 9, 6, "random", (u, 0.0))


@pytest.mark.parametrize(("size", "fitted"), [((100, 50), (32, 16)), ((50, 101), (16, 32)), ((10, 8), (20, 16)), ((3000, 17), (2824, 16))])
def test_fit_short_side_keeps_the_proportions(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert photos.fit_short_side(Image.new("RGB", size), 16).size == fitted


def test_prepare_never_squashes_a_circle() -> None:
    y, x = np.mgrid[:120, :300]
    disc = np.repeat((((x - 150) ** 2 + (y - 60) ** 2 < 50**2) * 255).astype(np.uint8)[..., None], 3, 2)
    inside = photos.prepare(Image.fromarray(disc), 60)[..., 0] > 127
    assert abs(int(inside.any(0).sum()) - int(inside.any(1).sum())) <= 1


def test_prepare_antialiases_when_it_shrinks() -> None:
    checkers = np.repeat(((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)[..., None], 3, 2)
    assert np.abs(photos.prepare(Image.fromarray(checkers), 32)[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_prepare_at_the_same_size_returns_the_pixels_themselves() -> None:
    np.testing.assert_array_equal(photos.prepare(Image.fromarray(noise(32, 32)), 32), noise(32, 32))


def test_prepare_crops_where_u_says() -> None:
    got = photos.prepare(Image.fromarray(noise(48, 32)), 32, "random", u=(0.999, 0.0))
    np.testing.assert_array_equal(got, noise(48, 32)[:, 16:])


def test_prepare_flips_after_the_crop() -> None:
    image = Image.fromarray(noise(48, 32))
    np.testing.assert_array_equal(
        photos.prepare(image, 32, "random", True, (0.0, 0.0)), photos.prepare(image, 32, "random", False, (0.0, 0.0))[:, ::-1]
    )


@pytest.mark.parametrize("u", [(0.0, 0.0), (0.3, 0.7), (0.99, 0.99)])
def test_prepare_of_the_fitted_picture_is_bitwise_prepare_of_the_original(u: tuple[float, float]) -> None:
    image = Image.fromarray(noise(301, 203))
    np.testing.assert_array_equal(photos.prepare(photos.fit_short_side(image, 64), 64, "random", u=u), photos.prepare(image, 64, "random", u=u))


# pixel values


def test_to_pixel_values_maps_0_and_255_to_minus_1_and_1() -> None:
    values = photos.to_pixel_values(np.array([[[0, 255, 51]]], np.uint8))
    assert values.dtype == torch.float32 and values.shape == (3, 1, 1)
    torch.testing.assert_close(values.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_to_pixel_values_moves_the_channels_and_nothing_else() -> None:
    batch = np.stack([noise(), noise(seed=1)])
    want = torch.from_numpy(batch).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    torch.testing.assert_close(photos.to_pixel_values(batch).double(), want, rtol=0, atol=1e-6)


def test_to_uint8_inverts_to_pixel_values_for_all_256_levels() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(photos.to_uint8(photos.to_pixel_values(levels)), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clamps() -> None:
    values = torch.tensor([-7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 254.6 / 127.5 - 1, 1.001, 9.0]).view(2, 3, 1, 1)
    assert photos.to_uint8(values).ravel().tolist() == [0, 1, 0, 255, 255, 255]


def test_to_uint8_takes_half_precision_with_gradients() -> None:
    assert photos.to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)).ravel().tolist() == [128] * 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_numbers_that_would_come_out_black(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        photos.to_uint8(torch.full((1, 3, 2, 2), bad))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 3), np.uint8)])
def test_to_pixel_values_refuses_other_types_and_layouts(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        photos.to_pixel_values(pixels)


# frame, cut and the smart crop


def test_crop_box_of_a_rectangle_is_centered() -> None:
    assert photos.crop_box(100, 80, (64, 48)) == (18, 16, 82, 64)


@pytest.mark.parametrize("size", [(72, 56), (56, 72), (128, 32), 64])
@pytest.mark.parametrize("crop", ["center", "random", "smart"])
def test_prepare_never_squashes(size: photos.Size, crop: photos.Mode) -> None:
    """A circle stays a circle, in every shape of picture and of bucket."""
    grid = np.hypot(*np.meshgrid(np.arange(200) - 100, np.arange(150) - 75))  # (150, 200)
    disc = Image.fromarray(((grid < 20)[..., None] * np.array([255, 255, 255])).astype(np.uint8))
    seen = photos.prepare(disc, size, crop, u=(0.5, 0.5))[..., 0] > 128
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert seen.shape == photos.sides(size)[::-1]
    assert abs((rows[-1] - rows[0]) - (columns[-1] - columns[0])) <= 1


def test_mask_is_cut_as_its_photo() -> None:
    """A photo that is its own mask: whatever the scale, the crop and the flip, both show the same."""
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[20:70, 100:140] = 255
    image = Image.fromarray(pixels)
    for crop, flip, u in (("center", False, (0.5, 0.5)), ("random", True, (0.9, 0.1)), ("random", False, (0.6, 0.7)), ("smart", True, (0.5, 0.5))):
        place = photos.frame(image, (56, 72), crop, u)
        shown, mask = photos.cut(image, place, flip), photos.cut(image.convert("L"), place, flip)
        assert shown.shape == (72, 56, 3) and mask.shape == (72, 56)
        assert ((shown[..., 0] > 128) != (mask > 128)).mean() < 0.03 and 0 < (mask > 128).mean() < 1


def test_smart_crop_goes_where_the_detail_is() -> None:
    pixels = np.full((64, 200, 3), 120, np.uint8)
    pixels[10:50, 140:170] = noise(30, 40)
    place = photos.frame(Image.fromarray(pixels), 64, "smart")
    assert place.box[0] <= 140 and place.box[2] >= 170


def test_smart_crop_of_a_picture_without_detail_is_its_center() -> None:
    image = Image.new("RGB", (200, 64), "grey")
    assert photos.frame(image, 64, "smart") == photos.frame(image, 64, "center")


def test_smart_crop_agrees_with_the_sum_over_every_window() -> None:
    grey = np.random.default_rng(3).integers(0, 256, (20, 31), dtype=np.uint8)
    grey[:, :9] //= 8
    energy = edge_energy(grey)
    sums = {(left, top): energy[top : top + 12, left : left + 14].sum() for left in range(18) for top in range(9)}
    assert sums[busiest_corner(grey, 14, 12)] >= 0.98 * max(sums.values())


def test_edge_energy_by_hand() -> None:
    assert edge_energy(np.array([[0, 3], [10, 1]], np.uint8)).tolist() == [[13, 2], [9, 0]]


def test_check_lets_a_long_photo_pass_where_buckets_keep_its_shape() -> None:
    long = Image.fromarray(noise(160, 64))
    assert photo_checks.check(long, 64).level == "warning" and photo_checks.check(long, 64, square=False).level == "ok"


def test_decode_with_alpha_gives_the_transparency_that_shows() -> None:
    alpha = np.zeros((24, 32), np.uint8)
    alpha[4:8] = 255
    image = Image.fromarray(np.dstack([noise(32, 24), alpha]))
    assert np.array_equal(np.asarray(photos.decode_with_alpha(encoded(image), "dog")[1]), alpha)
    assert photos.decode_with_alpha(encoded(Image.fromarray(np.dstack([noise(), np.full(noise().shape[:2], 255, np.uint8)]))), "dog")[1] is None
