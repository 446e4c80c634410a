"""`movq import`: make a run folder of a public tokenizer's weights, which every command takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from movq_cli import checkpoints, files, runs
from movq_cli.checkpoints import DiscriminatorHeader, TokenizerHeader
from movq_cli.console import Console
from movq_cli.interop import containers, hub
from movq_cli.interop.importer import Imported, ImportOptions, import_tokenizer
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.paths import require_utf8
from movq_cli.run_manifest import ImportRecord
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training_settings import TrainVQSettings


@dataclass(frozen=True)
class ImportRequest:
    """The options of `movq import`."""

    source: Path
    """Weight file, folder with weights and a config, or address of one of these on the Hugging Face hub."""
    run: Path
    """Run folder to make."""
    options: ImportOptions


def import_weights(request: ImportRequest, console: Console) -> None:
    """Make the run folder of an imported tokenizer, and report what was used, ignored and assumed.

    Args:
        request: Options of the command.
        console: Console for the report and the result.

    Raises:
        BadRequestError: The weights cannot be imported, or the run folder exists and is not of this import; nothing is
            written then.
        FailureError: The run folder cannot be written, or a download fails.
    """
    target = request.run
    for path in (request.source, target):
        require_utf8(path)
    existed = files.is_filled(target)
    manifest = Run(target, "vq").manifest_file
    if not manifest.exists() or Run(target, "vq").read().imported is None:
        files.require_new_folder(target)  # It fails before a download.
    path, source = _local(request.source)
    imported = import_tokenizer(path, request.options)
    _report(imported, console)
    record = ImportRecord(
        source=source,
        sha256=imported.sha256,
        family=imported.family,
        used=imported.used,
        assumed=tuple(imported.assumed),
        license=imported.license,
    )
    with files.new_folder(target, "movq import", varying={manifest.name}) as folder:
        _write(Run(folder, "vq"), imported, record)
    if existed:
        console.log(f"{target} has the same files already; nothing was written")
    result = {
        "run": str(target),
        **record.model_dump(mode="json"),
        "ignored": imported.ignored,
        "vq": imported.settings.model_dump(mode="json"),
    }
    console.result(result, str(target))


def _local(source: Path) -> tuple[Path, str]:
    """Return the local path of the source, after a download if it is on the hub, and the origin for the manifest."""
    address = hub.address_of(source)
    if address is None:
        return source, str(source)
    repository = hub.open_repository(address)
    return containers.download(repository), repository.pinned


def _report(imported: Imported, console: Console) -> None:
    console.log(f"family: {imported.family}")
    console.log(f"used: {imported.used}")
    console.log(f"ignored: {', '.join(imported.ignored) or 'nothing'}")
    console.log(f"assumed: {'; '.join(imported.assumed) or 'nothing'}")
    console.log(f"license: {imported.license}")
    for text in imported.notes:
        console.log(f"note: {text}")
    settings = imported.settings
    console.log(
        f"tokenizer: {settings.factor} pixels a code position, {settings.chunks} codes a position, "
        f"{settings.codebook_size:,} codebook entries of {settings.code_dim} channels"
    )


def _write(run: Run, imported: Imported, record: ImportRecord) -> None:
    """Write the weights, the settings and the manifest of the run."""
    model = Tokenizer(imported.settings)
    model.load_state_dict(imported.tensors)
    checkpoints.save_weights(run.weights, model, TokenizerHeader(vq=imported.settings))
    training = dict(imported.training)
    if imported.discriminator:
        channels, layers = imported.discriminator_size
        discriminator = PatchDiscriminator(channels, layers)
        discriminator.load_state_dict(imported.discriminator)
        checkpoints.save_weights(
            run.discriminator, discriminator, DiscriminatorHeader(channels=channels, layers=layers)
        )
        training |= {"discriminator_channels": channels, "discriminator_layers": layers}
    settings = Preset(
        description=f"imported from {record.source}", vq=imported.settings, train_vq=TrainVQSettings(**training)
    )
    runs.write_imported(run, settings, record)
