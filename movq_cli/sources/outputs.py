"""Output folders and files beside sources: none may replace what is read, or be read as part of the source later."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from movq_cli.data.output_files import PICTURE, refuse_foreign
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.sources.kinds.folder import FolderReader
from movq_cli.sources.output_mark import OUTPUT_MARK
from movq_cli.sources.source import Source

_ANOTHER_FOLDER = "Choose another folder for the output."
_ANOTHER_FILE = "Choose another path for it."
_OTHER_NAMES = "Rename one of them in the source."


def protect_source(
    source: Source,
    folders: Sequence[Path],
    files: Sequence[Path],
    *,
    pictures: Sequence[Path] = (),
    also_read: Sequence[Path] = (),
) -> None:
    """Refuse outputs that would replace images that are read, and mark output folders inside the source.

    A marked folder is left out when the source is listed again.

    Args:
        source: Source of the images.
        folders: Folders for the output; the first one is that of `files`.
        files: Files that will be written into these folders.
        pictures: Other pictures that will be written.
        also_read: Files that are read besides the images.

    Raises:
        BadRequestError: An output folder holds images that are read, an output file is one of them, or a picture
            would be an image of the source or replace a file that movq did not write; two outputs would have the same
            path; a folder is a file, or lies below one; or a folder would be read in place of the data set of its name.
        FailureError: An output folder inside the source cannot be marked.
    """
    refuse_collisions(files, pictures)
    for picture in pictures:
        _refuse_file_as_folder(picture.parent)
    root = Path(source.location)
    read = [path.resolve() for path in also_read]
    for folder in folders:
        refuse_name_of_set(source, folder)
        _refuse_file_as_folder(folder)
        if not folder.is_dir():
            continue
        inside = next((path for path in images_at(source) if path.is_relative_to(folder.resolve())), None)
        is_parent = inside is not None and not root.is_dir() and inside.parent == folder.resolve()
        if _is_same(folder, root) or is_parent or (inside is not None and _is_inside(folder, root)):
            raise BadRequestError(f"{folder} holds the images that are read", _ANOTHER_FOLDER)
    written = [file for file in (*files, *pictures) if os.path.lexists(file)]
    if written:
        refuse_replaced(written, [*images_at(source), *read])
        existing = next((file for file in written if file.is_dir()), None)
        if existing is not None:
            raise BadRequestError(f"{existing} is a folder, so that it cannot be a file", _ANOTHER_FOLDER)
    if root.is_dir() and isinstance(source.reader, FolderReader):
        for picture in pictures:
            if _is_inside(picture, root) and not any(_is_inside(picture, folder) for folder in folders):
                message = f"the picture {picture} lies in {root}, so that it would be one of its images the next time"
                raise BadRequestError(message, _ANOTHER_FILE)
    for picture in pictures:
        refuse_foreign(picture, PICTURE)
    for folder in folders:
        mark_output(folder, source.location)


def refuse_collisions(files: Sequence[Path], pictures: Sequence[Path] = ()) -> None:
    """Refuse outputs of which one would replace another one, or need a folder in its place.

    Args:
        files: Files that will be written, each for an image.
        pictures: Other pictures that will be written, at paths of the user's choice.

    Raises:
        BadRequestError: Two outputs have the same path, or one lies below another one.
    """
    paths = list(map(str, files))
    taken = set(paths)
    if len(taken) < len(paths):
        path = next(path for path, number in Counter(paths).items() if number > 1)
        raise BadRequestError(f"the outputs of two images would have the name {path}", _OTHER_NAMES)
    homes = {file.parent for file in files}
    parents = {parent for home in homes for parent in (home, *home.parents)}
    if both := sorted(taken.intersection(map(str, parents))):
        message = f"{both[0]} would be the output of an image, and the folder of the output of another one"
        raise BadRequestError(message, _OTHER_NAMES)
    # Writing replaces a name, and not the file to which a link of it leads: the folders alone are resolved.
    folders = {parent: parent.resolve() for parent in parents} if pictures else {}
    for picture in pictures:
        home = picture.parent.resolve()
        is_file = any(str(folder / picture.name) in taken for folder, resolved in folders.items() if resolved == home)
        if is_file or home / picture.name in folders.values():
            raise BadRequestError(f"the picture {picture} would have the name of the output of an image", _ANOTHER_FILE)


def refuse_name_of_set(source: Source, folder: Path) -> None:
    """Refuse an output folder that has the name of the data set which is read: a path takes precedence over a name.

    Args:
        source: Source of the images.
        folder: Folder for the output.

    Raises:
        BadRequestError: The same command would read the output the next time.
    """
    root = Path(source.location)
    if not root.exists() and folder.resolve() == root.resolve():
        message = f"the folder {folder} would be read in place of the data set {source.location} the next time"
        raise BadRequestError(message, _ANOTHER_FOLDER)


def refuse_replaced(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Refuse to write a file that is read.

    Args:
        written: Files that will be written.
        read: Files that are read.

    Raises:
        BadRequestError: A file is both.
    """
    known = {str(path.resolve()) for path in read}
    for path in written:
        # Writing replaces the name, and not the file to which a link of this name leads.
        if str(path.parent.resolve() / path.name) in known or str(path.resolve()) in known:
            raise BadRequestError(f"{path} is read, so that it cannot be written", _ANOTHER_FILE)


def _refuse_file_as_folder(folder: Path) -> None:
    """Refuse a folder that is a file or lies below one, before the work whose result would be written into it."""
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if existing.exists() and not existing.is_dir():
        raise BadRequestError(f"{existing} is a file, so that nothing can be written into it", _ANOTHER_FOLDER)


def mark_output(folder: Path, location: str) -> None:
    """Mark a folder as the output of a command if it lies inside the folder of the source.

    Args:
        folder: Folder for the output; it is created if it must be marked.
        location: Location of the source.

    Raises:
        FailureError: The mark cannot be written.
    """
    root = Path(location)
    if root.is_dir() and _is_inside(folder, root) and not (folder / OUTPUT_MARK).is_file():
        source = os.path.relpath(root.resolve(), folder.resolve())
        atomic_write(
            folder / OUTPUT_MARK, json.dumps({"format": 1, "source": source}).encode() + b"\n", concurrent=True
        )


def images_at(source: Source) -> Iterator[Path]:
    """Yield the paths of the files that hold the images; their folders are resolved, and links to files as well."""
    reader, root = source.reader, Path(source.location)
    if not isinstance(reader, FolderReader):
        if root.is_file():
            yield root.resolve()
        return
    resolved: dict[Path, Path] = {}  # of the folders: a set of a million images has few
    for member in source.members:
        path = reader.root / reader.files[member]
        if path.parent not in resolved:
            resolved[path.parent] = path.parent.resolve()
        yield resolved[path.parent] / path.name
        if path.is_symlink():
            yield path.resolve()


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, which need not exist, lies in a folder or below it."""
    resolved, root = path.resolve(), folder.resolve()
    return resolved != root and resolved.is_relative_to(root)
