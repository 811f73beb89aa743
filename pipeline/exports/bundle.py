"""Built artifacts as one archive that travels alone: what a colleague needs to run them.

    NAME/README.md          how to run each with its runtime alone, in twenty lines
         SHA256SUMS         of every file, as `sha256sum -c` takes it
         SHA256SUMS.sig     its signature, where the user gave a key; see `pipeline.core.signing`
         manifest.json      which artifacts, with their digests, seals and versions
         labels.txt         a class a line, in the order of the logits
         preprocess.json    how an image becomes the network's input
         LICENSE            of the program that built them
         TARGET/PRECISION/  the artifact, whole, with its artifact.json
         golden/TARGET-PRECISION/   its golden kit: images, what it gives for them, check.py

Equal artifacts give equal bytes: times and owners of files are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.files import read_regular
from pipeline.core.network import LICENCE_REMARK, Network
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.core.signing import Signer
from pipeline.exports.golden import FOLDER, Kit, kit_of, write_kit
from pipeline.exports.unpacked import MANIFEST_FILE, SIGNATURE, SUMS
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.targets.base import Target

_MOST = 8 * 2**30
"""Bytes of one file of an artifact."""

README = """\
# {name}

Built by CARE Deploy. `sha256sum -c SHA256SUMS` tells whether all arrived whole.

{artifacts}

`labels.txt` has a class a line, in the order of the logits. `preprocess.json` says how an image
becomes the input: the shorter side is resized so that the centre crop keeps its share `crop` (with
`crop_mode` squash both sides are; with border the longer one, and the mean colour fills the rest),
the crop has `size` pixels a side, values of 0 to 1 lose `mean` and are divided by `std`, and
channels come first.

{usage}

With CARE Deploy installed:

    care-deploy check .
    care-deploy predict photo.jpg --artifact {first}
    care-deploy bench --artifact {first}
    care-deploy validate --artifact {first} --data folder:PHOTOS

{licence} LICENSE is that of the program.
"""


def write_bundle(
    artifacts: Sequence[Artifact],
    network: Network,
    name: str,
    path: Path,
    *,
    signer: Signer | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write an archive.

    Args:
        artifacts: Which, verified; at least one.
        network: Labels and preprocessing.
        name: The folder in the archive.
        path: Where, such as "NAME.tar.gz"; a file that is there stays.
        signer: Signs the checksums; None for no signature.
        say: Is told which artifact travels without a golden kit, and why.

    Returns:
        The path.

    Raises:
        InputError: There is no artifact, or the file is there already.
        ArtifactError: An artifact has changed meanwhile, or the file cannot be written.
    """
    if not artifacts:
        raise InputError(f"nothing of {name} is chosen to ship: build it, or name --target")
    if path.exists():
        raise InputError(f"{path} is there already: name another file, or remove it first")
    files = dict(_files(artifacts, network, name, say))
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in files.items())
    files[SUMS] = sums.encode()
    if signer is not None:
        files[SIGNATURE] = signer.sign(files[SUMS])
    try:
        with workspace(path) as new:
            new.write_bytes(_archive(files, name))
            put(new, path, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(path, error)) from error
    return path


def _files(
    artifacts: Sequence[Artifact], network: Network, name: str, say: Callable[[str], object]
) -> Iterator[tuple[str, bytes]]:
    kits = {artifact.name: kit_of(artifact) for artifact in artifacts}
    stated = [
        {"name": a.name, "digest": a.digest, "seal": a.seal, "tools": dict(a.tools)}
        for a in artifacts
    ]
    yield "README.md", _readme(artifacts, network, name, kits).encode()
    yield (
        MANIFEST_FILE,
        (json.dumps({"name": name, "artifacts": stated}, indent=1) + "\n").encode(),
    )
    yield "labels.txt", "".join(f"{label}\n" for label in network.labels).encode()
    yield "preprocess.json", (json.dumps(dict(network.preprocess), indent=1) + "\n").encode()
    yield "LICENSE", _licence().encode()
    for artifact in artifacts:
        for file, record in sorted(artifact.files.items()):
            data = read_regular(artifact.folder / file, _MOST)
            if hashlib.sha256(data).hexdigest() != record.sha256:
                raise ArtifactError(f"{artifact.folder / file} has changed: run again")
            yield f"{artifact.name}/{file}", data
        yield f"{artifact.name}/{MANIFEST}", read_regular(artifact.folder / MANIFEST, _MOST)
        yield from _golden(artifact, kits[artifact.name], say)


def _readme(
    artifacts: Sequence[Artifact], network: Network, name: str, kits: Mapping[str, Kit | str]
) -> str:
    """How to run what is in the archive, with names of what is in it."""
    lines = [f"- `{artifact.name}`, {artifact.size / 1e6:.2f} MB" for artifact in artifacts]
    first = next((each for each in artifacts if _target_of(each).anywhere), artifacts[0])
    return README.format(
        name=name,
        artifacts="\n".join(lines),
        usage="\n\n".join(_usages(artifacts, network, kits)),
        first=first.name,
        licence=_licence_of_weights(network),
    )


def _usages(
    artifacts: Sequence[Artifact], network: Network, kits: Mapping[str, Kit | str]
) -> Iterator[str]:
    """How to run what is there: one example of each target, in the order of the registry."""
    for name, target in TARGETS.items():
        for artifact in [each for each in artifacts if _target_of(each).name == name][:1]:
            has_kit = isinstance(kits[artifact.name], Kit)
            kit = _place_of_kit(artifact) if has_kit else ""
            yield target.usage(artifact.name, network.input_shape, kit)


def _target_of(artifact: Artifact) -> Target:
    return TARGETS[artifact.name.partition("/")[0]]


def _place_of_kit(artifact: Artifact) -> str:
    return f"{FOLDER}/{artifact.name.replace('/', '-')}"


def _golden(
    artifact: Artifact, kit: Kit | str, say: Callable[[str], object]
) -> Iterator[tuple[str, bytes]]:
    """The files of an artifact's golden kit; none where it has none."""
    if isinstance(kit, str):
        say(f"{artifact.name} without golden images: {kit}")
        return
    with tempfile.TemporaryDirectory(prefix="care-deploy-") as temporary:
        folder = Path(temporary) / FOLDER
        write_kit(kit, folder)
        for path in sorted(folder.iterdir()):
            yield f"{_place_of_kit(artifact)}/{path.name}", path.read_bytes()


def _licence_of_weights(network: Network) -> str:
    """What the network says of it, in a sentence."""
    stated, remark = (network.description.get(key) for key in ("license", LICENCE_REMARK))
    told = f" ({remark})" if remark else ""
    owner = f"the licence {stated}" if stated else "the licence of whoever trained them"
    return f"The weights have {owner}{told};"


def _licence() -> str:
    """The text of the program's licence: of its distribution, or of its sources."""
    beside = Path(__file__).parents[2] / "LICENSE"
    if beside.is_file():
        return beside.read_text()
    for file in metadata.files("care-deploy") or ():
        if file.name == "LICENSE":
            return file.read_text()
    return "Apache-2.0\n"


def _archive(files: dict[str, bytes], name: str) -> bytes:
    buffer = io.BytesIO()
    # Without a time in gzip's header: equal content is equal bytes.
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for file, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{name}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
