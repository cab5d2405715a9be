"""Pictures from outside: refused by size before they are decoded, kept as the model sees them."""

from tokenizer.cli import InputError
from tokenizer.images import BadImage, Preprocess, encode_image, read_image

MOST_BYTES = 32 << 20  # of one file
# Of one picture, by its header: 12 bytes a pixel while it is read, 460 MiB. JPEG, which is decoded
# at a smaller scale, up to Pillow's 179: 500 MiB.
MOST_MEGAPIXELS = 40


def clean(data: bytes, *, name: str, size: int, preprocess: Preprocess) -> bytes:
    """Return a PNG of size × size of the bytes of a picture file, without anything else in it.

    Nothing of what cameras write into files (place, time, device) is kept. Raises InputError that
    says what is wrong with the file `name`.
    """
    most = MOST_MEGAPIXELS * 10**6
    try:
        return encode_image(read_image(data, size=size, preprocess=preprocess, most=most))
    except BadImage as error:
        detail = error.detail.removeprefix("bytes").removeprefix(": ")
        seen = f"{name} cannot be used: {error.reason}" + (f" ({detail})" if detail else "")
        if error.reason == "too large":
            wanted = f"wanted at most {MOST_MEGAPIXELS} megapixels: make it smaller first"
        else:
            wanted = "wanted a whole picture file: JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM"
        raise InputError(f"{seen}; {wanted}") from error
