"""Bad inputs of all kinds in every container, some good ones among them, and what is said of each.

`corpus(folder)` writes them. The origins that it makes are in ORIGINS; beside them, in `outside`,
lies a canary: a magenta image that some of the inputs lead to and nobody may open.
"""

import gzip
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ORIGINS = {  # origin → how a spec names it, relative to the folder
    "files": "files",
    "tars": "tars/*.tar",
    "listed": "listed/list.txt",
    "parquet": "parquet/*.parquet",
    "clips": "clips",
}
GOOD = {  # origin → names that must be read, the odd ones of them too
    "files": {"good.png", "sixteen.png", "cmyk.jpg", "animated.gif", "link in.png", "two.v2.jpg"},
    "tars": {"bad.tar/good.jpg", "bad.tar/twice.jpg", "bad.tar/two.jpg", "cut.tar/0.jpg"}
    | {"damaged.tar/0.jpg"},
    "listed": {"good.png"},
    "parquet": {"rows.parquet/000000"},
    "clips": {"good.mp4", "frames/0.png"},
}
CANARY = (255, 0, 255)
SIZE = 32
NOISE = np.random.default_rng(0).integers(0, 200, (SIZE, SIZE, 3), dtype=np.uint8)


def corpus(folder: Path) -> dict[str, str]:
    """Write all inputs below `folder`; return reason by "ORIGIN/NAME" of the bad ones."""
    for name in ("outside", *ORIGINS):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE), CANARY).save(folder / "outside" / "canary.png")
    write_clip(folder / "outside" / "canary.mp4")
    makers = (files, tars, listed, parquet, clips)
    return {
        f"{origin}/{name}": reason
        for origin, make in zip(ORIGINS, makers, strict=True)
        for name, reason in make(folder / origin).items()
    }


def encoded(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a grey PNG of that size by its header, with `chunks` for content."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + name + data)
        parts.append(struct.pack(">I", zlib.crc32(name + data)))
    return b"".join(parts)


def files(folder: Path) -> dict[str, str]:
    jpeg, png = encoded("JPEG"), encoded("PNG")
    damaged = bytearray(png)
    damaged[60] ^= 0xFF  # in the first pixels, so that their checksum is wrong
    huge = bytearray(jpeg)
    frame = huge.index(b"\xff\xc0")  # start of frame: height and width are 5 bytes on
    huge[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    grey = Image.fromarray
    written: dict[str, tuple[bytes, str]] = {
        "zero.jpg": (b"", "empty file"),
        "zeros.jpg": (b"\0" * 1000, "not an image"),
        "magic.jpg": (b"\xff\xd8\xff\xe0" + b"\0" * 64, "not an image"),
        "text.png": (b"this is no image", "not an image"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "not an image"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "document.png": (b"%PDF-1.4\n", "not an image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "cut.bmp": (encoded("BMP")[:900], "truncated"),
        "cut.ppm": (encoded("PPM")[:900], "truncated"),
        "cut.tif": (encoded("TIFF")[:900], "truncated"),
        "cut.webp": (encoded("WEBP")[:200], "unreadable"),
        "header.png": (png[:20], "truncated"),
        "damaged.png": (bytes(damaged), "unreadable"),
        "huge.png": (png_header(100_000, 100_000, (b"IDAT", zlib.compress(b"\0"))), "too large"),
        "huge.jpg": (bytes(huge), "too large"),
        "bomb.png": (
            png_header(20_000, 20_000, (b"IDAT", zlib.compress(bytes(1 << 22)))),
            "too large",
        ),
        "words.png": (
            png_header(9, 9, (b"zTXt", b"Comment\0\0" + zlib.compress(b" " * (1 << 25)))),
            "unreadable",
        ),
        "float.tif": (encoded("TIFF", grey(np.full((9, 9), 0.5, np.float32))), "unsupported mode"),
        "nan.tif": (encoded("TIFF", grey(np.full((9, 9), np.nan, np.float32))), "unsupported mode"),
        "deep.tif": (encoded("TIFF", grey(np.full((9, 9), 70_000, np.int32))), "unsupported mode"),
        "new\nline.png": (png, "control character in the name"),
    }
    for name, (data, _) in written.items():
        (folder / name).write_bytes(data)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png)
    os.mkfifo(folder / "pipe.png")
    for name, target in {
        "link out.png": "../outside/canary.png",
        "chain.png": "link out.png",
        "folder out": "../outside",
        "again": ".",
        "gone.png": "nowhere.png",
        "itself.png": "itself.png",
        "link in.png": "good.png",
    }.items():
        (folder / name).symlink_to(target)
    for name, data in {
        "good.png": png,
        "two.v2.jpg": jpeg,
        "sixteen.png": encoded("PNG", grey(np.full((9, 9), 40_000, np.uint16))),
        "cmyk.jpg": encoded("JPEG", Image.new("CMYK", (9, 9), (0, 200, 200, 0))),
        "animated.gif": encoded(
            "GIF",
            Image.new("RGB", (9, 9), "red"),
            save_all=True,
            append_images=[Image.new("RGB", (9, 9), "lime")],
        ),
        ".hidden.png": b"",
        "notes.txt": b"no image, and nobody's business",
    }.items():
        (folder / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in written.items()}
    reasons["new\\x0aline.png"] = reasons.pop("new\nline.png")
    return reasons | {
        "caf\\xe9.png": "name is not UTF-8",
        "pipe.png": "not a file",
        "link out.png": "name leaves its folder",
        "chain.png": "name leaves its folder",
        "folder out": "name leaves its folder",
        "again": "link to a folder",
        "gone.png": "missing file",
        "itself.png": "missing file",
    }


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tars(folder: Path) -> dict[str, str]:
    jpeg = encoded("JPEG")

    def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    write_tar(
        folder / "bad.tar",
        [
            ("good.jpg", jpeg),
            ("../outside/canary.jpg", jpeg),
            ("/outside/canary.jpg", jpeg),
            ("a/../../up.jpg", jpeg),
            special("soft.jpg", tarfile.SYMTYPE, "../outside/canary.png"),
            special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
            special("pipe.jpg", tarfile.FIFOTYPE),
            special("folder", tarfile.DIRTYPE),
            ("twice.jpg", jpeg),
            ("twice.jpg", jpeg[:9]),
            ("two.jpg", jpeg),
            ("two.png", jpeg),
            (os.fsdecode(b"caf\xe9.jpg"), jpeg),
            ("long/" * 300 + "1.jpg", jpeg),
            ("empty.jpg", b""),
            ("cut.jpg", jpeg[:300]),
            ("zeros.jpg", bytes(700)),
            ("alone.json", b"{}"),
        ],
    )
    write_tar(folder / "cut.tar", [("0.jpg", jpeg), ("1.jpg", jpeg)])
    os.truncate(folder / "cut.tar", 512 + -(-len(jpeg) // 512) * 512 + 700)
    write_tar(folder / "damaged.tar", [("0.jpg", jpeg), ("1.jpg", jpeg), ("2.jpg", jpeg)])
    with open(folder / "damaged.tar", "r+b") as file:
        file.seek(512 + -(-len(jpeg) // 512) * 512 + 3)
        file.write(b"\xff")
    (folder / "text.tar").write_bytes(b"no tar at all" * 100)
    (folder / "gzip.tar").write_bytes(gzip.compress(NOISE.tobytes()))
    (folder / "zero.tar").write_bytes(b"")
    inside = {
        "../outside/canary.jpg": "name leaves its folder",
        "/outside/canary.jpg": "name leaves its folder",
        "a/../../up.jpg": "name leaves its folder",
        "soft.jpg": "link",
        "hard.jpg": "link",
        "pipe.jpg": "not a file",
        "twice.jpg": "same name twice",
        "two.png": "same name twice",
        "caf\\xe9.jpg": "name is not UTF-8",
        "long/" * 300 + "1.jpg": "name too long",
        "empty.jpg": "empty file",
        "cut.jpg": "truncated",
        "zeros.jpg": "not an image",
        "alone": "missing field",
    }
    return {f"bad.tar/{name}": reason for name, reason in inside.items()} | {
        "cut.tar": "truncated tar",
        "damaged.tar": "unreadable tar",
        "text.tar": "unreadable tar",
        "gzip.tar": "unreadable tar",
        "zero.tar": "empty file",
    }


def listed(folder: Path) -> dict[str, str]:
    (folder / "good.png").write_bytes(encoded("PNG"))
    (folder / "text.png").write_bytes(b"no image")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("../outside/canary.png")
    (folder / "away").symlink_to("../outside")
    lines = [
        b"good.png\tday",
        b"",
        b"./good.png",
        b"../outside/canary.png",
        b"folder.png/../../outside/canary.png",
        str(folder.parent / "outside" / "canary.png").encode(),
        b"away/canary.png",
        b"link.png",
        b"missing.png",
        b"folder.png",
        b"text.png",
        b"walk.mp4",
        b"caf\xe9.png",
    ]
    (folder / "list.txt").write_bytes(b"\r\n".join(lines))
    return {
        "good.png": "same name twice",
        "../outside/canary.png": "name leaves its folder",
        "folder.png/../../outside/canary.png": "name leaves its folder",
        str(folder.parent / "outside" / "canary.png"): "name leaves its folder",
        "away/canary.png": "name leaves its folder",
        "link.png": "name leaves its folder",
        "missing.png": "missing file",
        "folder.png": "not a file",
        "text.png": "not an image",
        "walk.mp4": "missing file",
        "caf\\xe9.png": "name is not UTF-8",
    }


def parquet(folder: Path) -> dict[str, str]:
    jpeg, canary = encoded("JPEG"), str(folder.parent / "outside" / "canary.png")
    rows = [
        {"bytes": jpeg, "path": "0.jpg"},
        None,
        {"bytes": None, "path": canary},
        {"bytes": b"", "path": "3.jpg"},
        {"bytes": b"no image", "path": "4.jpg"},
        {"bytes": jpeg[:300], "path": "5.jpg"},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), folder / "rows.parquet")
    pq.write_table(pa.table({"text": ["a"]}), folder / "words.parquet")
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "text.parquet").write_bytes(b"no Parquet")
    (folder / "zero.parquet").write_bytes(b"")
    return {
        "rows.parquet/000001": "empty file",
        "rows.parquet/000002": "empty file",
        "rows.parquet/000003": "empty file",
        "rows.parquet/000004": "not an image",
        "rows.parquet/000005": "truncated",
        "words.parquet": "no image column",
        "cut.parquet": "unreadable Parquet file",
        "text.parquet": "unreadable Parquet file",
        "zero.parquet": "unreadable Parquet file",
    }


def frame(number: int, *, width: int = 64, height: int = 64) -> np.ndarray:
    """Return uint8 [H, W, 3] whose eight columns are the bits of `number`, white for 1."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8) * 255
    return np.broadcast_to(bits.repeat(width // 8)[None, :, None], (height, width, 3)).copy()


def number_of(pixels: np.ndarray) -> int:
    """Return the number of which `pixels` are the frame, whatever a codec did to them."""
    columns = pixels.mean(axis=(0, 2)).reshape(8, -1).mean(axis=1)
    return int(sum(1 << bit for bit, value in enumerate(columns) if value > 128))


def write_clip(
    path: Path,
    count: int = 12,
    *,
    codec: str = "libx264",
    keys: int = 12,
    between: int = 2,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write numbered frames: a key frame at least every `keys`, `between` B-frames in a row."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.gop_size, stream.max_b_frames = keys, between
        for number in range(count):
            picture = av.VideoFrame.from_ndarray(frame(number), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def clips(folder: Path) -> dict[str, str]:
    write_clip(folder / "good.mp4")
    (folder / "frames").mkdir()
    (folder / "frames" / "0.png").write_bytes(encoded("PNG"))
    for name, options in {
        "cut.mp4": {},
        "fast.mp4": {"movflags": "faststart"},
        "cut.mkv": {},
    }.items():
        data = write_clip(folder / name, container=options).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 3 // 4])
    for name in ("sound.mp4", "none.mkv"):
        with av.open(str(folder / name), "w") as file:
            if name == "none.mkv":
                video = file.add_stream("mpeg4", rate=25)
                video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            sound = file.add_stream("aac", rate=8000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
            samples.rate = 8000
            file.mux([*sound.encode(samples), *sound.encode()])
    canary = folder.parent / "outside" / "canary.mp4"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{canary}\n#EXT-X-ENDLIST\n"
    for name, content in {
        "zero.mp4": b"",
        "zeros.mkv": bytes(2000),
        "text.webm": b"no video",
        "playlist.mp4": playlist.encode(),
        "joined.avi": f"ffconcat version 1.0\nfile '{canary}'\n".encode(),
        "image.mov": encoded("JPEG"),
    }.items():
        (folder / name).write_bytes(content)
    (folder / "link.mp4").symlink_to("../outside/canary.mp4")
    return {
        "cut.mp4": "not a video",  # its table of frames stood at its end
        "fast.mp4": "truncated",
        "cut.mkv": "truncated",
        "sound.mp4": "no video in it",
        "none.mkv": "no frames",
        "zero.mp4": "empty file",
        "zeros.mkv": "not a video",
        "text.webm": "not a video",
        "playlist.mp4": "not a video",
        "joined.avi": "not a video",
        "image.mov": "not a video",
        "link.mp4": "name leaves its folder",
    }
