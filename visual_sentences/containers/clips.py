"""Files of video: how many frames, and frames by number. Needs PyAV, the extra `video`.

A frame's number is its place in the order in which frames are shown, from 0. It does not depend on
where decoding starts: the times of all frames are known from one pass over the packets, which
decodes nothing.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenizer.cli import InputError
from tokenizer.images import MOST_PIXELS, BadImage
from visual_sentences.containers.names import CLIPS, frame_name, suffix_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Source = Callable[[], io.RawIOBase]  # opens the file
VIDEO_SUFFIXES = frozenset(CLIPS)
SEGMENT = b"\x18\x53\x80\x67"  # the Matroska element that holds all others
HEAD = 4096  # bytes in which it begins
BUFFER = 1 << 18  # bytes read at once
LEAP = 16  # frames that are decoded on the way rather than sought past


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What the packets of a clip tell.

    places  time at which a frame is shown → its number; empty if the file does not say
    keys    (number, time) of frames at which decoding can start, ascending
    """

    count: int
    places: dict[int, int]
    keys: tuple[tuple[int, int], ...]


def frame_count(source: Source, name: str) -> int:
    """Return how many frames a file of video has, counted; raises BadImage with the reason."""
    with closing(_File(source, name)) as file:
        return file.times().count


def frames(
    source: Source, name: str, numbers: Sequence[int]
) -> Iterator[tuple[str, np.ndarray | BadImage]]:
    """Yield ("NAME#000123", uint8 [H, W, 3]) for each number, in the given order.

    Ascending numbers are decoded in one pass, which leaps to a later key frame where one is far. A
    frame that cannot be decoded is BadImage, and so is each of a file that cannot be opened.
    """
    done = 0
    with closing(_File(source, name)) as file:
        try:
            decoder = _Decoder(file)
            for number in numbers:
                yield frame_name(name, number), decoder.frame(number)
                done += 1
        except BadImage as error:
            for number in numbers[done:]:
                yield frame_name(name, number), error


class _File:
    """A file of video, opened as often as wanted, one at a time."""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name
        self.container: InputContainer | None = None
        self.bytes: io.RawIOBase | None = None

    def open(self) -> tuple["InputContainer", "VideoStream"]:
        """Open at the beginning with the demuxer of the suffix; raises BadImage.

        FFmpeg's own guess would take a playlist for video, and read the files that it names.
        """
        try:
            import av
        except ImportError as error:
            raise InputError(
                f'{self.name} is video, which needs PyAV: pip install "large-vision-models[video]"'
            ) from error
        self.close()
        demuxer = CLIPS[suffix_of(self.name)]
        try:
            self.bytes = self.source()
            size = self.bytes.seek(0, io.SEEK_END)
            self.bytes.seek(0)
            head = self.bytes.read(HEAD) or b""
            self.bytes.seek(0)
            if not size:
                raise BadImage("empty file", self.name)
            if demuxer == "matroska" and _is_cut(head, size):
                raise BadImage("truncated", self.name)
            container = av.open(
                self.bytes, "r", format=demuxer, metadata_errors="replace", buffer_size=BUFFER
            )
        except FileNotFoundError as error:
            raise BadImage("missing file", self.name) from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise BadImage("not a video", f"{self.name}: {error}") from error
        self.container = container
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise BadImage("no video in it", self.name)
        stream.codec_context.thread_count = 1  # a worker has one core
        if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
            raise BadImage("too large", self.name)
        return container, stream

    def times(self) -> Times:
        """Pass over the packets; what an edit list cuts away is no frame."""
        return _times(*self.open(), self.name)

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
        if self.bytes is not None:
            self.bytes.close()
        self.container = self.bytes = None


class _Decoder:
    """Decodes forward and holds the latest frame and its number."""

    at: int  # number of the latest frame
    held: "VideoFrame | None"
    leapt: bool  # nothing found since the last leap
    broken: bool  # the latest frame is made of damaged ones

    def __init__(self, file: _File) -> None:
        self.file, self.times = file, file.times()
        self._start(0)

    def frame(self, number: int) -> np.ndarray | BadImage:
        if not 0 <= number < self.times.count:
            return BadImage("missing frame", f"{number} of {self.times.count}")
        key = bisect_right(self.times.keys, number, key=lambda key: key[0]) - 1
        if number < self.at or (key >= 0 and self.times.keys[key][0] - self.at > LEAP):
            self._start(max(key, 0))
        found = self._forward(number)
        if found is None and self.leapt:  # some demuxers leap too far
            self._start(0)
            found = self._forward(number)
        self.leapt = False
        if found is None or self.broken:
            return BadImage("unreadable", f"frame {number}")
        return _upright(found)

    def _start(self, key: int) -> None:
        """Let decoding go on from a key frame; 0: from the beginning, whatever is known of it."""
        self.at, self.held, self.decoded = -1, None, 0
        self.leapt, self.broken = key > 0, False
        if not key:
            self.container, self.stream = self.file.open()
        else:
            self.container.seek(self.times.keys[key][1], stream=self.stream)
        self.left = self._frames()

    def _forward(self, number: int) -> "VideoFrame | None":
        """Decode up to a frame; None if it does not come, and the next one is held.

        What follows a damaged or lost frame is made of it, up to the next key frame.
        """
        while self.at < number:
            frame = next(self.left, None)
            if frame is None:
                return None
            place = self._place(frame.pts)
            lost = 0 <= self.at < place - 1
            self.broken = frame.is_corrupt or (not frame.key_frame and (self.broken or lost))
            self.at, self.held = max(self.at, place), frame
            self.decoded += 1
        return self.held if self.at == number else None

    def _frames(self) -> "Iterator[VideoFrame]":
        """Decode the packets that follow; one that cannot be decoded is passed over."""
        import av

        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                yield from packet.decode()
            except (av.error.InvalidDataError, ValueError):
                self.broken = True
            except av.error.FFmpegError:
                return

    def _place(self, time: int | None) -> int:
        """Return the number of a frame by its time, by counting where the file has no times."""
        if not self.times.places:
            return self.decoded
        return -1 if time is None else self.times.places.get(time, -1)


def _times(container: "InputContainer", stream: "VideoStream", name: str) -> Times:
    import av

    packets: list[tuple[int | None, bool]] = []
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise BadImage("truncated", name)
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe))
    except av.error.FFmpegError as error:
        raise BadImage("truncated", f"{name}: {error}") from error
    if not packets:
        raise BadImage("no frames", name)
    shown = sorted({time for time, _ in packets if time is not None})
    if len(shown) < len(packets) or suffix_of(name) == ".avi":  # whose times are those of decoding
        return Times(count=len(packets), places={}, keys=())
    places = {time: number for number, time in enumerate(shown)}
    keys = sorted((places[time], time) for time, key in packets if key and time is not None)
    return Times(count=len(packets), places=places, keys=tuple(keys))


def _is_cut(head: bytes, size: int) -> bool:
    """Tell by the length of a Matroska segment whether the file ends early; FFmpeg does not."""
    at = head.find(SEGMENT) + len(SEGMENT)
    if at < len(SEGMENT) or at + 8 > len(head):
        return False
    width = 9 - head[at].bit_length()  # the first bit that is set tells how many bytes
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(head[at : at + width], "big") & mask
    return length != mask and at + width + length > size  # all ones: not known


def _upright(frame: "VideoFrame") -> np.ndarray:
    """Return uint8 [H, W, 3] turned as a player shows it."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
