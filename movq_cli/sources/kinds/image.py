"""Single image files."""

from __future__ import annotations

from pathlib import Path

from movq_cli.sources.kinds.folder import FolderReader
from movq_cli.sources.labels import is_image
from movq_cli.sources.source import Source, SourceKind


class ImageKind(SourceKind):
    """A single image file."""

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a file with an image's suffix."""
        return path is not None and not path.is_dir() and is_image(path.name)

    def open(self, location: str, path: Path | None) -> Source:
        """Make a source of this one image."""
        assert path is not None
        return Source(location, (path.name,), (0,), FolderReader(path.parent, (path.name,)))


KIND = ImageKind()
