"""Where images are: folders, lists of files, WebDataset tars, Parquet files, clips of video.

recognise   what a path of the spec names          → Origin
parts       its folder, list, tars or Parquet files → Part, each read by itself
contents    the names in a part, and what is wrong with the rest
read        names → what can be decoded
"""

from visual_sentences.containers.names import frame_name, is_clip
from visual_sentences.containers.origin import Contents, Entry, Origin, Part
from visual_sentences.containers.paths import parts, recognise
from visual_sentences.containers.reading import contents, frame_count, read

__all__ = [
    "Contents",
    "Entry",
    "Origin",
    "Part",
    "contents",
    "frame_count",
    "frame_name",
    "is_clip",
    "parts",
    "read",
    "recognise",
]
