"""A profile of a few updates, as a trace that chrome://tracing and Perfetto show."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Trace:
    """Records updates `first` to `first + count - 1` to RUN/trace; nothing where count is 0."""

    def __init__(self, folder: Path, *, first: int, count: int) -> None:
        self.folder, self.first, self.end = folder / "trace", first, first + count
        self.profiler: profile | None = None

    def at(self, step: int) -> None:
        """Start or stop before update `step`; one that a resumed run has passed is not recorded."""
        if step == self.first < self.end:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
        elif step >= self.end:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self.profiler is None:
            return
        recorded, self.profiler = self.profiler, None
        recorded.stop()
        self.folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / f"updates-{self.first}-{self.end - 1}.json"))
