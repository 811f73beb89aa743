"""Make the embedded Fashion-MNIST files again, byte for byte.

    python -m care.assets.make [FOLDER]      # FOLDER holds Fashion-MNIST's four idx .gz files

The test split is copied as published. For calibration, 100 training images of each class are drawn
with a fixed seed, kept in the training split's order. (Another zlib than the usual one may compress
to other bytes; the images stay the same.)
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from care.data.fashion_mnist import read_idx

ASSETS = Path(__file__).parent
SEED = 0
PER_CLASS = 100


def main(source: Path) -> None:
    """Write the files, then their checksums."""
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        write(ASSETS / name, (source / name).read_bytes())
    images = read_idx(source / "train-images-idx3-ubyte.gz")
    labels = read_idx(source / "train-labels-idx1-ubyte.gz")
    rng = np.random.default_rng(SEED)
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:PER_CLASS] for c in np.unique(labels)]
    chosen = np.sort(np.concatenate(drawn))
    write_idx(ASSETS / "calibration-images-idx3-ubyte.gz", images[chosen])
    write_idx(ASSETS / "calibration-labels-idx1-ubyte.gz", labels[chosen])
    files = sorted([*ASSETS.glob("*.gz"), ASSETS / "labels.txt"])
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    write(ASSETS / "SHA256SUMS", "".join(lines).encode())


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    """Write bytes as a gzipped idx file without a time stamp."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    write(path, gzip.compress(header + values.tobytes(), compresslevel=9, mtime=0))


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist"))
