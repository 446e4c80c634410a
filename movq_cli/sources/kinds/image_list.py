"""Text files that list images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from movq_cli.errors import BadRequestError
from movq_cli.sources.kinds.folder import FolderReader
from movq_cli.sources.labels import assemble, unlabelled_warning
from movq_cli.sources.numbering import number_classes
from movq_cli.sources.source import Source, SourceKind
from movq_cli.sources.text_files import read_lines


class ImageListKind(SourceKind):
    """A .txt file with the path of one image in each line, and optionally a class after a tab."""

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a .txt file."""
        return path is not None and not path.is_dir() and path.suffix.lower() == ".txt"

    def open(self, location: str, path: Path | None) -> Source:
        """List the images; their classes count if every line has one."""
        assert path is not None
        lines = read_lines(path, "list")
        rows = [line.partition("\t") for line in lines if line.strip()]
        files = tuple(file for file, _, _ in rows)
        if not any((path.parent / file).exists() for file in files):
            remedy = (
                "Each line has one path, absolute or relative to the folder of the list, and optionally a tab and a "
                "class."
            )
            raise BadRequestError(f"none of the {len(files)} images that {path} lists exists", remedy)
        source = assemble(location, files, FolderReader(path.parent, files), is_list=True)
        class_names = [rows[member][2].strip() for member in source.members]
        if any(class_names) and not all(class_names):
            warning = unlabelled_warning(source.names, [name or None for name in class_names])
            return replace(source, labels=None, classes=(), label_warnings=(warning,))
        if not all(class_names):
            return source
        labels, classes = number_classes(class_names)
        return replace(source, labels=labels, classes=classes)


KIND = ImageListKind()
