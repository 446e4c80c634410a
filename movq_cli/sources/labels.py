"""Sources made from file names: which files are images, and what folders and other files say about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import NamedTuple

from movq_cli.data.images import PLUGIN_SUFFIXES, image_suffixes
from movq_cli.data.shards import MANIFEST
from movq_cli.errors import BadRequestError
from movq_cli.sources.archives import extraction_remedy
from movq_cli.sources.beside import VAL_LISTS, index_labels, read_text
from movq_cli.sources.label_files import label_by_list
from movq_cli.sources.layout import Layout, is_system_folder, is_visible, read_layout
from movq_cli.sources.metadata_tables import TableLabels, table_labels
from movq_cli.sources.numbering import number_values
from movq_cli.sources.source import Reader, Source

CHOICE = "Give each image a class, or pass --no-labels, which stores none"
"""Remedies if some images have no class."""


_OWN_FILES = frozenset([MANIFEST])
"""Files in a folder of samples, which movq itself writes beside the images."""


class _Files(NamedTuple):
    """The files of a folder, an archive or a list."""

    images: dict[str, int]  # member numbers by unique names
    others: dict[str, int]  # the same of the visible files that are no images
    system_folders: Counter[str]  # number of files or folders in or at folders of the system


def assemble(
    location: str, files: Sequence[str], reader: Reader, *, is_list: bool = False, places: Sequence[str] | None = None
) -> Source:
    """Make a source from the file names that a folder, an archive or a list holds.

    Labels come from a `dataset.json` beside the images, else from `metadata` tables, else from class folders; the
    classes of a val split without class folders come from a list beside it, as Tiny ImageNet and Kaggle's ImageNet have
    one.

    Args:
        location: Location as the user gave it.
        files: Names of the files, those of folders with a slash at the end. The member number of a file is its index.
        reader: Access to the files.
        is_list: Whether the user has listed each file: then none is left out for its suffix or for being hidden.
        places: For each file the path that gives its split and class; None = its name.

    Returns:
        The source, with safe and unique names, and with splits, labels and classes as its folders give them.

    Raises:
        BadRequestError: No file is an image.
    """
    listed = _sort_files(files, is_list=is_list)
    if not listed.images:
        raise _no_image(location, listed.others)
    names = tuple(sorted(listed.images))
    source = Source(location, names, tuple(listed.images[name] for name in names), reader)
    found = names if places is None else [_safe_name(places[member]) for member in source.members]
    source, used = _label(source, listed.others, read_layout(found))
    unread = unread_warnings(set(listed.others) - set(used))
    warnings = [*_system_warnings(listed.system_folders), *source.warnings, *unread]
    return replace(source, warnings=tuple(warnings))


def is_image(name: str) -> bool:
    """Return whether the suffix of a file's name is that of an image that can be read."""
    return PurePosixPath(name).suffix.lower() in image_suffixes()


def unlabelled_warning(names: Sequence[str], classes: Sequence[object], choice: str = CHOICE) -> str:
    """Return the sentence about images without a class among images with one.

    Args:
        names: Names of all images.
        classes: Class of each image; None = it has none.
        choice: What can be done about it.
    """
    missing = [name for name, known in zip(names, classes, strict=True) if known is None]
    return (
        f"{len(missing)} of {len(names)} images have no class, such as {missing[0]}, so that no image has one. {choice}"
    )


def _sort_files(files: Sequence[str], *, is_list: bool) -> _Files:
    """Sort the files into images and others, under safe names."""
    listed = _Files({}, {}, Counter())
    latest = {file: member for member, file in enumerate(files)}  # of equal names, the last counts
    for file, member in sorted(latest.items()):
        name = _safe_name(file)
        parts = name.split("/")
        if is_list or (is_image(name) and not file.endswith("/") and all(map(is_visible, parts))):
            listed.images[_unique_name(name, listed.images)] = member
        elif system := next(filter(is_system_folder, parts), None):
            listed.system_folders[system] += 1
        elif name and name not in _OWN_FILES and not file.endswith("/") and all(map(is_visible, parts)):
            listed.others[name] = member
    return listed


def _label(source: Source, others: Mapping[str, int], layout: Layout) -> tuple[Source, Collection[str]]:
    """Return the source with splits and labels, and the files beside the images that gave them."""
    source = replace(source, splits=layout.splits, warnings=layout.warnings)
    index = index_labels(source.names, others, source.reader)
    if index is not None:
        kept, values = _in_splits(source, index.values, layout)
        return (_with_index(kept, values) if index.has_labels else kept), index.used
    tables = table_labels(source.names, others, source.reader)
    if tables.used:
        return _with_tables(*_in_splits(source, tables.values, layout), tables), tables.used
    return _label_by_folders(source, others, layout, tables.warnings)


def _in_splits(
    source: Source, values: Sequence[int | str | None], layout: Layout
) -> tuple[Source, list[int | str | None]]:
    """Return the source and the values of its images without the images that belong to no split."""
    remaining = [value for number, value in enumerate(values) if number not in layout.left_out]
    return _without(source, layout.left_out), remaining


def _label_by_folders(
    source: Source, others: Mapping[str, int], layout: Layout, label_warnings: Sequence[str]
) -> tuple[Source, Collection[str]]:
    """Return the source with the labels of its class folders, and the list of the val split that was used, if any.

    Args:
        source: The source with splits.
        others: Member numbers of the files that are no images, by their names.
        layout: Classes of the images by their folders.
        label_warnings: Sentences about other files that give no classes.
    """
    left_out = layout.left_out | layout.untrained
    source = replace(
        source,
        warnings=(*layout.warnings, *layout.untrained_warnings),
        label_warnings=(*layout.label_warnings, *label_warnings),
    )
    is_val_unlabelled = layout.splits is not None and all(
        (known is None) == (split == "val")
        for number, (known, split) in enumerate(zip(layout.classes, layout.splits, strict=True))
        if number not in left_out
    )
    choice = CHOICE
    if is_val_unlabelled:
        source, name = _with_list(source, layout.classes, left_out, others)
        if name is not None:
            return source, {name}
        choice = f"Name a file with the classes of the val split with --val-labels. {CHOICE}"
    else:
        source = _without(source, left_out)
    classes = [known for number, known in enumerate(layout.classes) if number not in left_out]
    if not any(classes):
        return source, ()
    if None in classes:
        warning = unlabelled_warning(source.names, classes, choice)
        return replace(source, label_warnings=(*source.label_warnings, warning)), ()
    labels = number_values(source.location, classes)
    return (source if labels is None else replace(source, labels=labels[0], classes=labels[1])), ()


def _with_index(source: Source, values: Sequence[int | str | None]) -> Source:
    """Return the source with the labels of its `dataset.json` files."""
    if None in values:
        warning = unlabelled_warning(source.names, values, f"Complete dataset.json. {CHOICE}")
        return replace(source, label_warnings=(warning,))
    known = number_values(f"the dataset.json of {source.location}", values)
    if known is None:
        warning = "the labels in dataset.json are no numbers or names of classes, so that no image has a class"
        return replace(source, label_warnings=(f"{warning}. Correct it, or pass --no-labels",))
    return replace(source, labels=known[0], classes=known[1])


def _with_tables(source: Source, values: Sequence[int | str | None], tables: TableLabels) -> Source:
    """Return the source with the labels of its `metadata` tables, or with a sentence why it has none."""
    table = min(tables.used)
    if tables.faults:
        return replace(source, label_warnings=(*tables.warnings, *tables.faults))
    if None in values:
        warning = unlabelled_warning(source.names, values, f"Complete {table}. {CHOICE}")
        return replace(source, label_warnings=(*tables.warnings, warning))
    known = number_values(f"{table} in {source.location}", values)
    if known is not None and len(known[1]) > 1:
        return replace(source, labels=known[0], classes=known[1], label_warnings=tables.warnings)
    if len(set(values)) == 1:
        return source  # A class of all images says nothing.
    warning = f"the labels in {table} are both numbers and names, or negative, so that no image has a class"
    return replace(source, label_warnings=(*tables.warnings, f"{warning}. Correct it, or pass --no-labels"))


def _with_list(
    source: Source, classes: Sequence[str | None], left_out: Collection[int], others: Mapping[str, int]
) -> tuple[Source, str | None]:
    """Return the source with the classes of its val split from a list beside it, and the name of that list, if any."""
    kept = _without(source, left_out)
    trained = [known for index, known in enumerate(classes) if index not in left_out]
    warnings: list[str] = []
    for name, member in others.items():
        if PurePosixPath(name).name not in VAL_LISTS:
            continue
        lines = read_text(source.reader, member).splitlines()
        try:
            return label_by_list(kept, trained, f"{name} of {source.location}", lines), name
        except BadRequestError as error:
            warnings.append(f"the classes of the val split in {name} were not used: {error.message}")
    return replace(kept, label_warnings=(*kept.label_warnings, *warnings)), None


def _without(source: Source, left_out: Collection[int]) -> Source:
    """Return the source without some of its images."""
    if not left_out:
        return source
    return source.take([index for index in range(len(source)) if index not in left_out])


def _system_warnings(folders: Mapping[str, int]) -> list[str]:
    if not folders:
        return []
    return [f"folders of the system or of a file server were left out: {', '.join(sorted(folders))}"]


def unread_warnings(files: Collection[str]) -> list[str]:
    """Return one sentence that counts files which are not read, by suffix; nothing if there is none.

    Args:
        files: Names of the files.
    """
    counts = _suffix_counts([file for file in files if file not in _OWN_FILES])
    if not counts:
        return []
    sentence = f"{sum(counts.values())} files that are no readable images were left out: {_listed(counts)}"
    return [sentence + plugin_remedy(counts) + extraction_remedy(counts)]


def _no_image(location: str, others: Mapping[str, int]) -> BadRequestError:
    counts = _suffix_counts(others)
    held = f": it holds {_listed(counts)}" if counts else ""
    known = f"Looked for: {' '.join(sorted(image_suffixes()))}."
    return BadRequestError(f"no image in {location}{held}{plugin_remedy(counts)}{extraction_remedy(counts)}", known)


def _suffix_counts(names: Collection[str]) -> Counter[str]:
    return Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in names)


def _listed(counts: Counter[str]) -> str:
    """Return the counts as a text, the largest first."""
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = "" if len(shown) <= _SUFFIXES_SHOWN else f" and {len(shown) - _SUFFIXES_SHOWN} other suffixes"
    return ", ".join(f"{count} {suffix}" for suffix, count in shown[:_SUFFIXES_SHOWN]) + more


_SUFFIXES_SHOWN = 8
"""Number of suffixes that a message lists."""


def plugin_remedy(suffixes: Collection[str]) -> str:
    """Return what reads the files of these suffixes, in parentheses; empty if no plugin does."""
    missing = sorted((PLUGIN_SUFFIXES - image_suffixes()) & set(suffixes))
    return f" (`pip install 'movq[formats]'` reads {' '.join(missing)})" if missing else ""


def _safe_name(file: str) -> str:
    """Return the name as a relative path: output files are named after images, and must stay in their folder."""
    return "/".join(part for part in file.replace("\0", "_").split("/") if part not in {"", ".", ".."})


def _unique_name(name: str, taken: Mapping[str, int]) -> str:
    path, number = PurePosixPath(name), 1
    while name in taken:
        number += 1
        name = str(path.with_stem(f"{path.stem}~{number}"))
    return name
