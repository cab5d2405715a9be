"""What a name tells: whether it is an image or a clip, its entry, and whether it may be used."""

from visual_sentences.containers.origin import Entry

CLIPS = {  # suffix → the one demuxer that may read it
    ".mp4": "mov",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
OUTSIDE = "name leaves its folder"
LONGEST = 1024  # characters of a name, folders and all
FRAME = "#"  # "walk.mp4#000123": the frame of that number, from 0


def suffix_of(name: str) -> str:
    """Return the suffix in lower case, with its dot."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    return base[dot:].lower() if dot > 0 else ""


def is_clip(name: str) -> bool:
    """Tell whether an entry is a file of video."""
    return suffix_of(name) in CLIPS


def frame_name(clip: str, number: int) -> str:
    """Name a frame of a file of video, as `read` takes it."""
    return f"{clip}{FRAME}{number:06d}"


def frame_of(name: str) -> tuple[str, int] | None:
    """Return the file of video and the number of its frame, or None for an image."""
    clip, mark, number = name.rpartition(FRAME)
    return (clip, int(number)) if mark and number.isdecimal() and is_clip(clip) else None


def entry_of(name: str, *, group: str | None = None) -> Entry:
    """Return the entry of a relative path; without a class its group is its folder."""
    folder, _, base = name.rpartition("/")
    dot = base.rfind(".")
    stem = name[: len(name) - len(base) + dot] if dot > 0 else name
    return Entry(name, stem, folder if group is None else group)


def fault(name: str) -> str:
    """Return why a name cannot be used, "" if it can."""
    if not name.isprintable() and (why := _unprintable(name)):
        return why
    if name[:1] == "/" or (".." in name and ".." in name.split("/")):
        return OUTSIDE
    return "name too long" if len(name) > LONGEST else ""


def shown(name: str) -> str:
    """Write a name that may not be UTF-8 so that every file and terminal can hold it."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if ord(c) >= 32 else f"\\x{ord(c):02x}" for c in text)


def _unprintable(name: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "name is not UTF-8"
    return "control character in the name" if any(ord(c) < 32 for c in name) else ""
