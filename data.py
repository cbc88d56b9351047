"""The prepared folder: what prepare_bbbc021.py writes and every other script reads. Needs numpy, pandas and torch only.

    out/patches.npy     (N, C, 68, 68) uint16, raw intensities, one cell a patch, channels in the order of meta.json
    out/features.npy    (N, F) float32, CellProfiler measurements in CellProfiler's units, no missing values
    out/cells.csv       one row a cell: cell, field, plate, well, site, replicate, compound, concentration, moa, x, y, split
    out/meta.json       channels, feature names, centre and scale, what was dropped and why, options, counts, a checksum per file

    cells = data.open_folder("out/")
    x = data.scale_images(cells.images(rows), "cell-max")      # (B, C, 68, 68) in 0..1
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

SIZE = 68  # pixels, side of a crop (original parameters.py)
CHANNELS = ("DAPI", "Tubulin", "Actin")
FORMAT = "cp2image-folder-1"
FILES = ("patches.npy", "features.npy", "cells.csv")
CELL_COLUMNS = ["cell", "field", "plate", "well", "site", "replicate", "compound", "concentration", "moa", "x", "y", "split"]
TEXT_COLUMNS = {c: str for c in CELL_COLUMNS if c not in ("concentration", "x", "y")}
FULL_SCALE = 65535  # the 16-bit level that CellProfiler calls 1


class InputError(ValueError):
    """A mistake in what was given: one line with what was found, what was expected and what to do next."""


def checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Folder:
    """An open prepared folder: memory-mapped `.patches` and `.raw` features, `.cells` (a frame), `.meta` (a dict).

    Beside them, from meta.json: `.features` (F names), `.channels`, `.centre` and `.scale` ((F,) float64 tensors), `.normalise`,
    `.white` ((C,) 16-bit levels for --image-norm percentile), and `.treatment` ((N,) numbers of compound-concentration pairs).
    """

    def __init__(self, path, meta, patches, raw, cells):
        self.path, self.meta, self.patches, self.raw, self.cells = Path(path), meta, patches, raw, cells
        self.features, self.channels, self.normalise, self.white = meta["features"], meta["channels"], meta["normalise"], meta["white"]
        self.centre, self.scale = torch.tensor(meta["centre"]).double(), torch.tensor(meta["scale"]).double()
        self.treatment, self.treatments = pd.factorize(treatment_names(cells), sort=True)
        self.plate_names = sorted(meta["plates"])  # empty unless plate-dmso
        if self.plate_names:
            self.plate_centre = torch.tensor([meta["plates"][p]["centre"] for p in self.plate_names]).double()
            self.plate_scale = torch.tensor([meta["plates"][p]["scale"] for p in self.plate_names]).double()
            self.plate = np.searchsorted(self.plate_names, cells["plate"].to_numpy(str))

    def __len__(self):
        return len(self.cells)

    def rows(self, split):
        """Row numbers of the cells of a split (train, val, test; reference: DMSO wells that only set a plate's scale)."""
        rows = np.flatnonzero(self.cells["split"].to_numpy() == split)
        if not len(rows):
            raise InputError(f"{self.path}: no cell is in split {split!r}; its splits are {self.meta['counts']['split']}")
        return rows

    def images(self, rows):
        """Raw patches (B, C, 68, 68) of the given rows, as a float32 tensor of 16-bit intensities."""
        return torch.from_numpy(self.patches[rows].astype(np.float32))

    def measurements(self, rows):
        """The measurements (B, F) float32 of the given rows in CellProfiler's units, and the centre and scale to standardise them by.

        Centre and scale are (F,), or with plate-dmso (B, F): those of each cell's plate. See model.standardise.
        """
        raw = torch.from_numpy(np.ascontiguousarray(self.raw[rows]))
        if not self.plate_names:
            return raw, self.centre, self.scale
        return raw, self.plate_centre[self.plate[rows]], self.plate_scale[self.plate[rows]]

    def identity(self):
        """What a run must share with the folder it goes on with: the checksums of its files."""
        return dict(self.meta["checksums"])


def treatment_names(cells):
    """The treatment of each cell, compound and concentration in one text: 'taxol 0.3'."""
    return cells["compound"].astype(str) + " " + cells["concentration"].map("{:g}".format)


def open_folder(path):
    """The prepared folder at `path`. Checks the files' presence, sizes, headers and agreement, not every checksum; InputError."""
    path = Path(path)
    if not (path / "meta.json").is_file():
        raise InputError(f"{path}: not a prepared folder (no meta.json); make one with: python prepare_bbbc021.py --simulate --out {path}")
    try:
        meta = json.loads((path / "meta.json").read_text())
    except ValueError as error:
        raise InputError(f"{path / 'meta.json'}: not readable as JSON ({error}); prepare the folder again") from None
    if meta.get("format") != FORMAT:
        raise InputError(f"{path / 'meta.json'}: format is {meta.get('format')!r}, expected {FORMAT!r}; prepare the folder again")
    n, f, c = meta["counts"]["cells"], len(meta["features"]), len(meta["channels"])
    arrays = {}
    for name, shape, dtype in [("patches.npy", (n, c, SIZE, SIZE), np.uint16), ("features.npy", (n, f), np.float32)]:
        try:
            arrays[name] = np.load(path / name, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path / name}: missing or cut short ({error}); prepare the folder again") from None
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise InputError(f"{path / name}: {arrays[name].dtype} {arrays[name].shape}, meta.json says {np.dtype(dtype)} {shape}; prepare again")
    try:
        cells = pd.read_csv(path / "cells.csv", dtype=TEXT_COLUMNS, keep_default_na=False, na_values={"x": "", "y": "", "concentration": ""})
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'cells.csv'}: not readable ({error}); prepare the folder again") from None
    if list(cells.columns) != CELL_COLUMNS or len(cells) != n:
        raise InputError(f"{path / 'cells.csv'}: {len(cells)} rows with columns {list(cells.columns)}, expected {n} with {CELL_COLUMNS}")
    return Folder(path, meta, arrays["patches.npy"], arrays["features.npy"], cells)


def check_folder(path):
    """Compares the checksum of every file of a prepared folder with meta.json: {file: True if equal}."""
    folder = open_folder(path)
    return {name: checksum(folder.path / name) == folder.meta["checksums"][name] for name in FILES}


# ---------------------------------------------------------------------------------------------------------------------
# Batches: a function of (seed, step, stream) only, so that a resumed run needs no saved generator state


class TreatmentSampler:
    """Draws batches as the released code does: one random training cell per treatment, the treatments in random order.

    `batch`: cells a batch; None or 0 = one per treatment. Fewer: a random part of the treatments. More: all of them, again and again.
    """

    def __init__(self, rows, treatment, batch=None):
        order = np.argsort(treatment[rows], kind="stable")
        self.rows = rows[order]  # grouped by treatment
        _, self.start, self.count = np.unique(treatment[self.rows], return_index=True, return_counts=True)
        self.batch = batch or len(self.count)

    def draw(self, seed, step, stream):
        """Row numbers (batch,) for a step; streams 0 and 1 are independent (features and originals; x_real)."""
        random = np.random.default_rng([seed, step, stream])
        rounds = -(-self.batch // len(self.count))
        group = np.concatenate([random.permutation(len(self.count)) for _ in range(rounds)])[:self.batch]
        return self.rows[self.start[group] + random.integers(self.count[group])]


# ---------------------------------------------------------------------------------------------------------------------
# Images


def scale_images(x, norm, white=None):
    """Raw intensities (B, C, H, W) -> float32 in 0..1.

    norm "cell-max": each channel of each cell divided by its own maximum (the paper); an all-black channel stays 0.
    norm "percentile": divided by `white` (C,), one level for the whole set, and clipped at 1: keeps absolute intensity.
    """
    if norm == "cell-max":
        return x / x.amax((2, 3), keepdim=True).clamp(min=1)
    if norm == "percentile":
        return (x / torch.as_tensor(white, dtype=x.dtype, device=x.device)[:, None, None]).clamp(max=1)
    raise InputError(f"image norm {norm!r}: expected cell-max or percentile")


def composite(x):
    """Images (B, C, H, W) in 0..1 -> (B, H, W, 3) uint8: DAPI blue, tubulin green, actin red, as the paper draws them."""
    x = x.detach().cpu().float().clamp(0, 1)
    rgb = torch.zeros(len(x), 3, *x.shape[2:])
    for channel, colour in zip(range(x.shape[1]), (2, 1, 0)):
        rgb[:, colour] = x[:, channel]
    return (rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def tile(rows, zoom=2, gap=2):
    """A list of rows of pictures, each (n, H, W, 3) uint8 -> one (height, width, 3) uint8 picture on black, enlarged `zoom` times."""
    wide = max(len(r) for r in rows)
    h, w = (s * zoom + gap for s in rows[0].shape[1:3])
    out = np.zeros((h * len(rows) + gap, w * wide + gap, 3), np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(np.repeat(np.repeat(row, zoom, 1), zoom, 2)):
            out[gap + i * h:(i + 1) * h, gap + j * w:(j + 1) * w] = picture
    return out
