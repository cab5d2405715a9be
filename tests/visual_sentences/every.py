"""A folder with every kind of sentence and every kind of container, for builds."""

import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenizer.images import save_image

SIZE = 32

EVERY = """
seed = 5
row_len = 512

[[source]]
name = "image"
kind = "image"
path = "tars/rgb-*.tar"
splits = {val = 0.3}

[[source]]
name = "listed"
kind = "image"
path = "photos/list.txt"
augment = 2

[[source]]
name = "category"
kind = "category"
path = "classes"
classes = 2

[[source]]
name = "labelled"
kind = "category"
path = "parquet/*.parquet"

[[source]]
name = "video"
kind = "video"
path = "videos"
stride = [1, 3]

[[source]]
name = "orbit"
kind = "orbit"
path = "orbits"
stride = [1, 2]

[[source]]
name = "pair"
kind = "pair"
inputs = "tars/rgb-*.tar"
targets = "tars/depth-*.tar"
augment = 2
splits = {val = 0.3}

[[source]]
name = "colorize"
kind = "colorize"
path = "photos"

[[source]]
name = "inpaint"
kind = "inpaint"
path = "photos"
preprocess = "crop"

[[source]]
name = "style"
kind = "style"
inputs = "classes"
targets = "styled"

[[source]]
name = "annotated"
kind = "annotated"
path = "photos"
annotations = {depth = "depth", seg = "seg"}

[[source]]
name = "clips"
kind = "annotated_video"
path = "frames"
annotations = {mask = "masks"}
stride = [1, 2]
"""


def write_images(folder: Path, names: list[str], *, seed: int) -> None:
    """Write one image of smooth noise for each name, suffix included."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        save_image(path, coarse.repeat(SIZE // 4, 0).repeat(SIZE // 4, 1))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_video(path: Path, *, frames: int, seed: int) -> None:
    """Write a clip of smooth pictures that change from frame to frame."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 2 * SIZE
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(coarse, format="rgb24")))
        file.mux(stream.encode())


def write_every(root: Path) -> Path:
    """Write every.toml and what it names."""
    write_images(root / "photos", [f"{i % 2}/{i}.png" for i in range(13)], seed=11)
    names = "\n".join(f"{i % 2}/{i}.png" for i in range(0, 13, 2))
    (root / "photos/list.txt").write_text(names + "\n")
    for seed, name in enumerate(("depth", "seg")):
        write_images(root / name, [f"{i % 2}/{i}.jpg" for i in range(13)], seed=12 + seed)
    classes = [f"{c}/{i}.png" for c in ("ant", "bee", "cat") for i in range(7)]
    write_images(root / "classes", classes, seed=14)
    write_images(root / "styled", classes, seed=15)
    write_images(root / "orbits", [f"{o}/{v}.png" for o in "abc" for v in range(9)], seed=16)
    frames = [f"{c}/{f}.png" for c in "pq" for f in range(10)]
    write_images(root / "frames", frames, seed=17)
    write_images(root / "masks", frames, seed=18)
    for number in range(2):
        write_video(root / f"videos/{number}.mp4", frames=14 + 8 * number, seed=number)
    write_images(root / "videos/still", [f"{i}.png" for i in range(5)], seed=19)
    for role, seed in (("rgb", 20), ("depth", 21)):
        write_images(root / "tarred" / role, [f"{i}.png" for i in range(24)], seed=seed)
        files = {
            f"{i:04d}.png": (root / "tarred" / role / f"{i}.png").read_bytes() for i in range(24)
        }
        for part in range(3):
            some = {n: files[n] for n in list(files)[8 * part : 8 * part + 8]}
            write_tar(root / f"tars/{role}-{part}.tar", some)
    for part in range(2):
        data = [
            (root / "tarred/rgb" / f"{i}.png").read_bytes()
            for i in range(10 * part, 10 * part + 10)
        ]
        rows = [{"image": {"bytes": b, "path": f"{i}.png"}} for i, b in enumerate(data)]
        labels = [{"label": i % 3} for i in range(10)]
        table = pa.Table.from_pylist([r | label for r, label in zip(rows, labels, strict=True)])
        (root / "parquet").mkdir(exist_ok=True)
        pq.write_table(table, root / f"parquet/{part}.parquet", row_group_size=4)
    (root / "every.toml").write_text(EVERY)
    return root
