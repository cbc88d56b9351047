"""The prepared folder, batches, pictures, what a cell is called, and what CellProfiler would measure in a picture.

    out/patches.npy     (N, C, S, S) uint16, raw intensities, one cell a patch, channels in the order of meta.json; of z-stacks
                        (N, C, D, S, S)
    out/features.npy    (N, F) float32, CellProfiler's measurements in its own units, none missing
                        (prepared with --normalise plate-dmso: in standard deviations of their plate's DMSO cells)
    out/cells.csv       one row a cell: cell, field, plate, well, site, replicate, compound, concentration (uM), moa, x, y, split;
                        perhaps structure, which of several one channel shows
    out/meta.json       channels, size, feature names, centre and scale, what was dropped and why, options, counts, checksums

prepare_bbbc021.py writes such a folder, every other script reads it:

    cells = data.open_folder("out/")
    rows = cells.rows("test")[:8]
    x = data.scale_images(cells.images(rows), "cell-max")       # (8, C, S, S) in 0..1
    table = data.measurements(x, cells.channels)                # 8 rows, what CellProfiler would measure in them

Measuring takes 6 ms a patch and core for 883 features, and agrees with CellProfiler 4.2.8 to 1e-6 (see `measure`).
"""
import argparse
import ctypes
import hashlib
import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from math import ceil, comb, inf, nan, pi, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F

SIZE = 68                            # pixels, side of a crop unless asked otherwise (original parameters.py)
CHANNELS = ("DAPI", "Tubulin", "Actin")
FULL_SCALE = 65535                   # the 16-bit level that CellProfiler calls 1
SOLVENT = "DMSO"                     # the control: its mechanism is called so, too, and its dose is 0
DOSE_TOLERANCE = 0.01                # doses this near, relatively, are one dose; the real ones lie a factor of 3 apart

FORMAT = "cp2image-folder-1"
FILES = ("patches.npy", "features.npy", "cells.csv")
CELL_COLUMNS = [
    "cell",                 # its name, unique
    "field",                # name of the picture that it lies in
    "plate",
    "well",
    "site",                 # number of the field in its well
    "replicate",
    "compound",
    "concentration",        # uM, 0 for the solvent
    "moa",                  # mechanism of action, or DMSO, or unknown
    "x",                    # pixels, column of the nucleus' centre in the field
    "y",                    # pixels, row
    "split",                # train, val, test or reference
]
TREATMENT = ["compound", "concentration"]
NUMBER_COLUMNS = ("concentration", "x", "y")
TEXT_COLUMNS = {name: str for name in CELL_COLUMNS if name not in NUMBER_COLUMNS}


class InputError(ValueError):
    """A mistake in what was given: one line with what was found, what was expected and what to do next."""


def seed(text):
    """The argparse type of every --seed."""
    value = int(text)
    if not 0 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 2^63 - 1")
    return value


def checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def write(path, content):
    """A file at `path`, a Path, of `content`, a text or a function that saves to a path: written under another name, flushed to the
    disk, then renamed, so that it is never there in part. Text is UTF-8, its line ends stay as they are."""
    temporary = path.with_name("." + path.name)
    if isinstance(content, str):
        temporary.write_bytes(content.encode())
    else:
        content(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def pick_device(name):
    """The torch device for a --device flag, any that torch knows and this machine has; else InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device           # with its number
    except (RuntimeError, AssertionError, ImportError):     # what torch raises for a device that it was built without
        raise InputError(f"--device {name}: not on this machine; "
                         "expected auto, cpu, cuda, cuda:1, mps, ...") from None


def keep_freed_memory():
    """Tells glibc to keep freed memory; on other systems nothing. Giving pages back and faulting them in again made a CPU step
    2 to 7 times slower, and halved the rate of crops."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)      # M_MMAP_MAX: no separate mappings
    except (AttributeError, OSError, TypeError):
        pass                # another C library; on Windows CDLL(None) is a TypeError


# ---------------------------------------------------------------------------------------------------------------------
# The prepared folder


class Folder:
    """An open prepared folder of N cells; `open_folder` makes it.
    path; meta (what meta.json says); cells (frame of CELL_COLUMNS); patches (N, C, S, S) uint16, of z-stacks (N, C, D, S, S), and
    raw (N, F) float32, mapped."""

    def __init__(self, path, meta, patches, raw, cells):
        self.path = path
        self.meta = meta
        self.patches = patches
        self.raw = raw
        self.cells = cells
        self.size = patches.shape[-1]                                       # S, pixels
        self.channels = meta["channels"]
        self.features = meta["features"]                                    # F names
        self.normalise = meta["normalise"]                                  # train or plate-dmso
        self.centre = torch.tensor(meta["centre"], dtype=torch.float64)     # (F,), over the training cells
        self.scale = torch.tensor(meta["scale"], dtype=torch.float64)       # (F,)
        self.white = meta["white"]                                          # (C,) 16-bit levels, for image norm percentile
        self.identity = meta["checksums"]                                   # what a run shares with its folder
        self.treatment, self.treatments = pd.factorize(treatment_names(cells), sort=True)   # (N,) numbers, names
        self.label, self.labels = self.treatment, self.treatments           # what a Statistical Cell is told of a cell
        if "structure" in cells:
            self.label, self.labels = pd.factorize(cells["structure"], sort=True)

    def __len__(self):
        return len(self.cells)

    def rows(self, split):
        """Row numbers of the cells of a split: train, val, test, or reference (DMSO cells that only set a plate's scale)."""
        rows = np.flatnonzero(self.cells["split"] == split)
        if not len(rows):
            raise InputError(f"{self.path}: no cell is in split {split!r}; "
                             f"its splits are {self.meta['counts']['split']}")
        return rows

    def images(self, rows):
        """Patches of the given rows: (B, C, S, S) float32 tensor of raw 16-bit intensities."""
        return torch.from_numpy(self.patches[rows].astype(np.float32))

    def told(self, rows):
        """The labels of the given rows, one-hot: (B, labels) float32 tensor."""
        label = torch.from_numpy(self.label[rows])
        return F.one_hot(label, len(self.labels)).float()

    def measurements(self, rows):
        """Measurements of the given rows, in the folder's units: (B, F) float32 tensor. See model.standardise."""
        return torch.from_numpy(self.raw[rows])


def treatment_names(cells):
    """The treatment of each cell, compound and concentration in one text: 'taxol 0.3'."""
    return cells["compound"] + " " + cells["concentration"].map("{:g}".format)


def open_array(path, dtype, shape):
    """A .npy file, mapped; InputError if it is not what meta.json says."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: missing or cut short ({error}); "
                         "prepare the folder again") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: {array.dtype} {array.shape}, meta.json says {dtype} {shape}; "
                         "prepare the folder again")
    return array


def open_folder(path):
    """The prepared folder at `path` (or of the meta.json at `path`). Checks that files are there, and their sizes, headers and
    agreement, not every checksum; InputError."""
    path = Path(path)
    if path.name == "meta.json":
        path = path.parent
    about = path / "meta.json"
    try:
        meta = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a prepared folder (meta.json: {error}); "
                         f"make one with: python prepare_bbbc021.py --simulate --out {path}") from None
    if meta.get("format") != FORMAT or meta.get("plates"):      # plates: an older plate-dmso
        raise InputError(f"{about}: not of this version (format {meta.get('format')!r}; "
                         f"expected {FORMAT!r} and no plates); prepare the folder again")

    n = meta["counts"]["cells"]
    size = meta["size"]
    depth = meta.get("depth", 1)        # absent in older folders
    channels = len(meta["channels"])
    shape = n, channels, size, size
    if depth > 1:
        shape = n, channels, depth, size, size
    patches = open_array(path / "patches.npy", "uint16", shape)
    shape = n, len(meta["features"])
    raw = open_array(path / "features.npy", "float32", shape)
    table = path / "cells.csv"
    cells = read_csv(
        table,
        dtype=TEXT_COLUMNS,
        na_values=dict.fromkeys(NUMBER_COLUMNS, ""),
    )
    found = cells.columns.drop("structure", errors="ignore")
    if list(found) != CELL_COLUMNS or len(cells) != n:
        raise InputError(f"{table}: {len(cells)} rows with columns {list(cells.columns)}, "
                         f"expected {n} with {CELL_COLUMNS}; prepare the folder again")
    return Folder(path, meta, patches, raw, cells)


# ---------------------------------------------------------------------------------------------------------------------
# What a cell is: one reader of names, plates, wells, doses and the solvent, for all scripts

# <Object>_<Family>_...: Nuclei_AreaShape_Area
FEATURE = re.compile(r"(?!Image_|Metadata_|Experiment_|Single_|Multi_)[A-Z][A-Za-z0-9]*_"
                     r"(?!Metadata_|FileName_|PathName_|URL_)[A-Z][A-Za-z]*_\w+")
BOOKKEEPING = re.compile(r"_Location_|_Parent_|_Children_|_Number_|ObjectNumber|"
                         r"AreaShape_Center|BoundingBox[MX]")
ZERO = re.compile(r"_AreaShape_CentralMoment_(0_1|1_0)$")       # zero by definition; CellProfiler writes rounding noise
COUNTER = re.compile(r"metadata_|image_|unnamed|index$|id$|.*(count|number|n_cells|_id$)", re.IGNORECASE)
MISSING = ("", "nan", "na", "null", "none", "unknown")          # in a column of numbers
FLAT = 1e-7         # spread : middle of a column that has no spread; float32 holds 7 digits

SPELLINGS = {           # column of a table, without Image_Metadata_ and _DAPI -> column of cells.csv
    "single_cell_image_id": "cell",
    "cell": "cell",
    "multi_cell_image_name": "field",
    "plate": "plate",
    "barcode": "plate",
    "well": "well",
    "site": "site",
    "replicate": "replicate",
    "compound": "compound",
    "concentration": "concentration",
    "moa": "moa",
}

OTHER_FORMATS = {       # how a file begins that is no CSV, whatever its name
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "an SQLite database",
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x89HDF": "an HDF5 file",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xff\xfe": "text in UTF-16",
}


def sort_columns(columns, keep=None):
    """Column names of a table under CellProfiler's names -> (features, {dropped name: reason}, names of metadata).
    keep: only features that match this regular expression."""
    features = []
    dropped = {}
    metadata = []
    for name in dict.fromkeys(columns):
        if BOOKKEEPING.search(name):
            dropped[name] = "a place, number or parent, not a measurement"
        elif not FEATURE.fullmatch(name):
            metadata.append(name)
        elif ZERO.search(name):
            dropped[name] = "zero by definition"
        elif keep and not re.search(keep, name):
            dropped[name] = "not kept by --columns"
        else:
            features.append(name)
    return features, dropped, metadata


def feature_columns(table):
    """Names of the measurements in any table, and report lines. Where no column has a name of CellProfiler's (embeddings), all
    columns of numbers are, but those that tell of the well, Metadata_* and Image_*, counters, and an index."""
    features, _, others = sort_columns(table.columns)
    if features:
        return features, []
    told = metadata_columns(others).values()
    left_out = []
    for name in others:
        values = pd.to_numeric(table[name], errors="coerce")
        if name in told or values.isna().all():
            continue
        if COUNTER.match(name):
            left_out.append(name)
        else:
            features.append(name)
    return features, ["no column has a name of CellProfiler's: "
                      f"{len(features)} other columns of numbers are the features",
                      f"left out as counters: {left_out}"]


def metadata_columns(columns):
    """{name in cells.csv: the column that tells it}, under the names in use: Image_Metadata_Plate_DAPI, Metadata_Plate, plate, ..."""
    plain = {}
    for column in columns:
        name = re.sub(r"^(image_)?(metadata_)?|_(dapi|dna)$", "", str(column).lower())
        plain.setdefault(name, column)
    found = {}
    for spelling, name in SPELLINGS.items():
        if spelling in plain:
            found.setdefault(name, plain[spelling])
    return found


def refuse_other_formats(path):
    """ValueError that says what a file is, if it is no text."""
    with open(path, "rb") as file:
        head = file.read(16)
    for begin, what in OTHER_FORMATS.items():
        if head.startswith(begin):
            raise ValueError(f"it is {what}; save it as CSV: UTF-8, commas")


def read_csv(path, **options):
    """pandas.read_csv for files of unknown origin: any line ends, no text turned into NaN unless asked; what tells of a plate,
    well, ... is text, so that barcodes stay as written. Errors in one line that says what the file is."""
    settings = {
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "low_memory": False,
        **options,
    }
    try:
        refuse_other_formats(path)
        header = pd.read_csv(path, **settings | {"nrows": 0}).columns
        if len(header) == 1 and re.search("[\t;]", header[0]):
            raise ValueError("its columns are separated by tabs or semicolons, "
                             "expected commas, and points in decimals: save it so")
        settings.setdefault("dtype", dict.fromkeys(metadata_columns(header).values(), str))
        return pd.read_csv(path, **settings)
    except (OSError, ValueError, EOFError) as error:    # pandas' parser and empty-data errors are ValueErrors
        reason = " ".join(str(error).split())           # in one line
        raise InputError(f"{path}: not readable as CSV ({reason})") from None


def numbers(frame, where, first=2):
    """The frame with its columns of text as numbers. Text that is none is an InputError with its row (`first`: number of the
    first row) and column."""
    converted = {}
    for name, column in frame.select_dtypes(exclude=["number", "bool"]).items():
        text = column.fillna("").astype(str).str.strip()
        value = pd.to_numeric(text, errors="coerce").astype(float)
        wrong = value.isna() & ~text.str.lower().isin(MISSING)
        if wrong.any():
            row = wrong.argmax()
            raise InputError(f"{where}, row {row + first}, column {name}: "
                             f"{text.iloc[row]!r} is not a number")
        converted[name] = value
    return frame.assign(**converted)


def as_text(column):
    """A column as text, missing values as ''; a barcode that was read as the number 22123.0 is '22123' again."""
    text = column.astype(object).fillna("").astype(str)
    return text.str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)


def annotate(table):
    """What a table tells of its cells, wells or fields: a frame of text with those of CELL_COLUMNS that it has under any usual name."""
    told = metadata_columns(table.columns)
    return pd.DataFrame({name: as_text(table[column]) for name, column in told.items()}, table.index)


def is_solvent(compounds):
    """Which compounds (a column of text) are the solvent, in any spelling: DMSO, dmso, dimethyl sulfoxide."""
    names = compounds.astype(str).str.strip()
    return names.str.fullmatch(r"dmso|dimethyl ?sul(?:f|ph)oxide", case=False)


def read_moa(path):
    """BBBC021_v1_moa.csv in any of its copies -> frame compound, concentration (float, uM), moa; one row a treatment."""
    table = annotate(read_csv(path, dtype=str))
    columns = [*TREATMENT, "moa"]
    for name in columns:
        if name not in table:
            raise InputError(f"{path}: no column {name!r}, "
                             "expected compound, concentration and moa")
    table["concentration"] = numbers(table[["concentration"]], path)
    twice = table[table.duplicated(TREATMENT)]
    if len(twice):
        first = treatment_names(twice).iloc[0]
        raise InputError(f"{path}: treatment {first} stands in two rows, expected one")
    return table[columns]


def complete_treatments(cells, moa=None, what="cells"):
    """Compound, concentration and mechanism of each row (a cell, a well), in one spelling; returns (cells, report lines).
    cells: frame with compound and perhaps concentration and moa, as from `annotate`. Doses become floats of 6 digits (float32
    has 7), the solvent becomes DMSO with dose 0. moa (see read_moa): the mechanism of each compound and dose."""
    cells = cells.copy()
    if "concentration" not in cells:
        cells["concentration"] = nan
    dose = numbers(cells[["concentration"]], f"the {what}", first=1)
    cells["concentration"] = dose.map("{:.6g}".format).astype(float)
    solvent = is_solvent(cells["compound"])
    cells.loc[solvent, TREATMENT] = SOLVENT, 0.0
    report = []
    if moa is not None:
        cells, report = match_mechanisms(cells, moa)
    if "moa" not in cells:
        cells["moa"] = "unknown"
    cells.loc[solvent, "moa"] = SOLVENT
    return cells, report


def match_mechanisms(cells, moa):
    """The mechanism of each row from its compound and dose, the dose within DOSE_TOLERANCE; returns (cells, report lines).
    The dose becomes the one of the list."""
    treated = cells.loc[cells["compound"] != SOLVENT, TREATMENT].drop_duplicates()
    listed = moa.rename(columns={"concentration": "listed"})
    pairs = treated.merge(listed)                       # every dose used beside every dose listed
    close = np.isclose(pairs["concentration"], pairs["listed"], rtol=DOSE_TOLERANCE, atol=0)
    near = pairs[close]
    near = near.drop_duplicates(TREATMENT)

    found = cells[TREATMENT].merge(near, "left")
    found.index = cells.index
    dose = found["listed"].fillna(cells["concentration"])
    cells = cells.assign(moa=found["moa"].fillna("unknown"), concentration=dose)
    report = [f"{len(near)} of {len(treated)} treatments have a mechanism"]
    elsewhere = sorted(set(pairs["compound"]) - set(near["compound"]))
    if elsewhere:
        report.append(f"{len(elsewhere)} compounds have a mechanism at other doses only: "
                      f"{elsewhere}")
    return cells, report


def complete_cells(cells, moa=None):
    """All of CELL_COLUMNS but split, from those that are there; returns (cells, report lines). Text that is missing is 'unknown'.
    Mechanisms come from `moa` (see complete_treatments) or, without it, from the column moa."""
    if "site" not in cells and "field" in cells:
        cells = cells.assign(site=cells["field"].str.extract(r"_s(\d+)(?:_|$)", expand=False))
    columns = CELL_COLUMNS[:-1]
    if "structure" in cells:
        columns = [*columns, "structure"]
    cells = cells.reindex(columns=columns)              # those that are absent are NaN
    texts = cells.columns.difference(NUMBER_COLUMNS, sort=False)
    cells[texts] = cells[texts].apply(as_text).replace("", "unknown")
    cells, report = complete_treatments(cells, moa)
    for name in texts:
        missing = cells[cells[name] == "unknown"]
        if len(missing):
            report.append(f"{len(missing)} cells have no {name}: "
                          f"set to 'unknown', first: {missing['cell'].iloc[0]}")
    return cells, report


def scale_by_dmso(x, plates, is_dmso, how="z"):
    """Rows of features x (N, F), each plate scaled by its own DMSO rows; a feature without spread in them becomes 0 there.
    z: mean 0, sd 1 (ddof 0). percentile: 1st to 0, 99th to 1 (Ljosa et al. 2013). mad: median 0, 1.4826 MAD 1, clipped to +-10.
    none: as it is. plates (N,), is_dmso (N,) bool; missing values (NaN) stay and count for nothing.
    Returns an array of x's float type; InputError names a plate with fewer than two DMSO rows."""
    x = x.astype(np.result_type(x, np.float32))
    plates = np.asarray(plates)
    is_dmso = np.asarray(is_dmso, bool)
    if how == "none":
        return x
    for plate in pd.unique(plates):
        here = plates == plate
        dmso = x[here & is_dmso].astype(np.float64)
        if len(dmso) < 2:
            raise InputError(f"plate {plate}: {len(dmso)} rows of DMSO, "
                             f"at least 2 are needed to scale it by {how}; leave the plate out")
        centre, spread = centre_and_spread(dmso, how)
        spread[spread <= FLAT * np.abs(centre)] = inf           # makes 0 of everything
        x[here] = (x[here] - centre) / spread
    return x.clip(-10, 10) if how == "mad" else x


def centre_and_spread(x, how):
    """Two (F,) arrays that x (n, F) is scaled by, missing values left out; NaN for a column without values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # of such columns
        if how == "z":
            return np.nanmean(x, 0), np.nanstd(x, 0)
        if how == "percentile":
            low, high = np.nanpercentile(x, [1, 99], axis=0)
            return low, high - low
        assert how == "mad", how
        median = np.nanmedian(x, 0)
        return median, 1.4826 * np.nanmedian(np.abs(x - median), 0)


def normalise_plates(table):
    """A table of measurements (with columns for plate and compound) in standard deviations of each plate's own DMSO rows, which
    is what a model trained with --normalise plate-dmso takes; says so in table.attrs["normalise"]. InputError without DMSO."""
    about = annotate(table)
    for name in ("plate", "compound"):
        if name not in about:
            raise InputError(f"the table has no column {name}, and plates are normalised "
                             "by their own DMSO rows; add the column")
    features, _ = feature_columns(table)
    values = numbers(table[features], "the table").to_numpy(np.float64)
    table = table.copy()
    table[features] = scale_by_dmso(values, about["plate"], is_solvent(about["compound"]))
    table.attrs["normalise"] = "plate-dmso"
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Batches: a function of (seed, step, stream) only, so that a resumed run needs no saved generator state


class TreatmentSampler:
    """Draws batches as the released code does: one random training cell a treatment, the treatments in random order.
    rows: of the training cells; treatment (N,): number of each cell's treatment. batch: cells a batch; None or 0 = one a
    treatment; fewer: a random part of the treatments; more: all of them, again and again."""

    def __init__(self, rows, treatment, batch=None):
        order = np.argsort(treatment[rows], kind="stable")
        self.rows = rows[order]     # grouped by treatment
        _, self.start, self.count = np.unique(treatment[self.rows], return_index=True, return_counts=True)
        self.batch = batch or len(self.count)

    def draw(self, seed, step, stream):
        """Row numbers (batch,) for a step; streams 0 and 1 are independent (features and originals; x_real)."""
        random = np.random.default_rng([seed, step, stream])
        treatments = len(self.count)
        rounds = ceil(self.batch / treatments)
        groups = [random.permutation(treatments) for _ in range(rounds)]
        group = np.concatenate(groups)[:self.batch]
        member = random.integers(self.count[group])
        return self.rows[self.start[group] + member]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def scale_images(x, norm, white=None):
    """Raw intensities (B, C, ..., H, W) -> float32 in 0..1.
    norm "cell-max": each channel of each cell divided by its own maximum (the paper); an all-black channel stays 0.
    norm "percentile": divided by `white` (C,), one level for the whole set, and clipped at 1: keeps absolute intensity."""
    if norm == "cell-max":
        pixels = tuple(range(2, x.ndim))
        brightest = x.amax(pixels, keepdim=True)
        return x / brightest.clamp(min=1)
    assert norm == "percentile", norm
    white = torch.as_tensor(white).to(x)
    white = white.view(-1, *[1] * (x.ndim - 2))
    return (x / white).clamp(max=1)


def turn(x, moves):
    """Images x (B, C, S, S), each by its own move (B,), 0 to 7: 1 turns it upside down, 2 left to right, 4 then swaps rows and
    columns; their sums do both. All flips and quarter turns of a picture."""
    moves = torch.as_tensor(moves, device=x.device)
    moves = moves[:, None, None, None]
    down = moves & 1 > 0
    across = moves & 2 > 0
    swap = moves & 4 > 0
    x = torch.where(down, x.flip(2), x)
    x = torch.where(across, x.flip(3), x)
    x = torch.where(swap, x.mT, x)
    return x


def turned_from(name, move):
    """The measurement of a picture that becomes `name` when the picture makes a move (see `turn`), and its sign; NaN where it
    does not come from one other alone."""
    y = -1 if move & 1 else 1
    x = -1 if move & 2 else 1
    swap = move & 4 > 0
    if move and re.search("Orientation|SpatialMoment|ZernikePhase", name):
        return name, nan
    if name.endswith("HuMoment_6"):                     # knows left from right
        mirrored = -1 if swap else 1
        return name, x * y * mirrored
    moment = re.fullmatch(r"(.+(?:Central|Normalized)Moment)_(\d)_(\d)", name)
    if moment:                                          # of powers p of y and q of x
        kind = moment[1]
        p = int(moment[2])
        q = int(moment[3])
        if swap:
            p, q = q, p
        sign = y ** p * x ** q
        return f"{kind}_{p}_{q}", sign
    if re.search("InertiaTensor_(0_1|1_0)", name):
        return name, x * y
    if swap and "InertiaTensor_0_0" in name:
        return name.replace("0_0", "1_1"), 1
    if swap and "InertiaTensor_1_1" in name:
        return name.replace("1_1", "0_0"), 1
    texture = re.fullmatch(r"(.+_Texture_.+)_0(\d)_(\d+)", name)
    if texture:
        direction = int(texture[2])                     # right, down-right, down, down-left
        if x * y < 0 and direction in (1, 3):
            direction = 4 - direction
        if swap and direction in (0, 2):
            direction = 2 - direction
        kind = texture[1]
        levels = texture[3]
        return f"{kind}_0{direction}_{levels}", 1
    return name, 1


def turned_columns(features):
    """How measurements follow the 8 moves of `turn`: raw (B, F) of a picture that makes move m becomes raw[:, place[m]] * sign[m].
    place (8, F) int64, sign (8, F) float32, NaN where a measurement cannot be told."""
    at = {name: j for j, name in enumerate(features)}
    place = torch.zeros(8, len(features), dtype=torch.int64)
    sign = torch.full((8, len(features)), nan)
    for move in range(8):
        for j, name in enumerate(features):
            source, its_sign = turned_from(name, move)
            if source in at:
                place[move, j] = at[source]
                sign[move, j] = its_sign
    return place, sign


def composite(x):
    """Images (B, C, H, W) of up to 3 channels, float in 0..1 or uint8 as from model.generate -> (B, H, W, 3) uint8: the first
    (DAPI) blue, tubulin green, actin red, as the paper draws them. Of stacks (B, C, D, H, W) the brightest along z and, beside it,
    along x: (B, H, W + D, 3)."""
    x = torch.as_tensor(x).detach().cpu()
    if x.ndim == 5:
        front = x.amax(2)                               # (B, C, H, W)
        side = x.amax(4).mT                             # (B, C, H, D)
        x = torch.cat([front, side], 3)
    assert x.shape[1] <= 3, x.shape
    if x.dtype != torch.uint8:
        x = (x.float().clamp(0, 1) * 255).round().byte()
    x = F.pad(x, (0, 0, 0, 0, 0, 3 - x.shape[1]))       # a channel that is absent is black
    return x.flip(1).permute(0, 2, 3, 1).numpy()


def tile(rows, zoom=2, gap=2):
    """A list of rows of pictures, each (n, H, W, 3) uint8 -> one (height, width, 3) uint8 picture on black, enlarged `zoom` times."""
    longest = max(len(row) for row in rows)
    strips = []
    for row in rows:
        row = row.repeat(zoom, 1).repeat(zoom, 2)
        absent = longest - len(row)
        row = np.pad(row, ((0, absent), (gap, 0), (gap, 0), (0, 0)))
        strips.append(np.concatenate(row, 1))
    sheet = np.concatenate(strips)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)))


# ---------------------------------------------------------------------------------------------------------------------
# What the Statistical Cell's paper measures: seven features of the bright object of a channel, flat or solid

SEVEN = ["Size", "Surface", "Sphericity", "Median", "Mean", "Sd", "Entropy"]


def seven_features(x):
    """Images x (N, ...) of one channel, flat or z-stacks, float in 0..1 -> (N, 7), see SEVEN: of the largest bright object, holes
    filled, its pixels, the length or area of its outline (pixels; the total variation of its smoothed mask), how near that is to
    a ball's (1), and of the intensity in it median, mean, sd and entropy (bits, 64 levels). NaN where nothing is bright.
    Source: Donovan-Maiye et al. 2022, Fig 3."""
    found = np.full((len(x), len(SEVEN)), nan)
    for row, image in zip(found, np.asarray(x, np.float32)):
        smooth = ndi.gaussian_filter(image, 1)
        pixels = smooth.reshape(1, 1, -1)
        level = otsu(pixels).item()
        objects, _ = ndi.label(smooth > level)
        count = np.bincount(objects.ravel())
        count[0] = 0                                    # the dark
        if not count.any():
            continue
        largest = count.argmax()
        mask = ndi.binary_fill_holes(objects == largest)
        size = mask.sum()
        soft = np.pad(mask, 3).astype(float)
        soft = ndi.gaussian_filter(soft, 1)
        slopes = np.square(np.gradient(soft))
        steepness = np.sqrt(slopes.sum(0))
        surface = steepness.sum()
        if mask.ndim == 2:
            ball = 2 * sqrt(pi * size)                  # the outline of a disc of that size
        else:
            ball = (36 * pi * size ** 2) ** (1 / 3)     # the surface of a ball
        values = image[mask]
        share, _ = np.histogram(values, 64, (0, 1))
        share = share[share > 0] / size
        entropy = -(share * np.log2(share)).sum()
        row[:3] = size, surface, ball / surface
        median = np.median(values)
        row[3:] = median, values.mean(), values.std(), entropy
    return found


def solid_features(x, names):
    """The seven features of each channel of images (N, C, ...) in 0..1: frame (N rows, 7 C columns DAPI_Size, ...)."""
    columns = {}
    for k, name in enumerate(names):
        found = seven_features(x[:, k])
        for what, values in zip(SEVEN, found.T):
            columns[f"{name}_{what}"] = values
    return pd.DataFrame(columns)


# ---------------------------------------------------------------------------------------------------------------------
# What CellProfiler would measure in a picture, 1: segment. The nucleus and cell in the middle of a patch, or all of a field;
# numpy and scipy, whole stacks (N, H, W) at once

NUCLEUS, CELL = 1, 2        # bits of a mask
MIN_AREA = 150              # pixels, of a plausible nucleus
MAX_SHARE = 0.75            # of its patch, what a plausible nucleus covers at most
MIN_CONTRAST = 1.5          # nucleus : background in DAPI; blank BBBC021 crops have 1.02-1.06, real nuclei 2.2 and more
CENTRE = 6                  # pixels, how far from the middle of its patch the central nucleus may begin
PLANE = (1, 2)              # axes of an image in a stack (N, H, W)
APART = (1e3, 1, 1)         # pixels between neighbours in a stack: its images are far from each other

FLAT4 = ndi.generate_binary_structure(2, 1)[None]       # (1, 3, 3): a pixel and its 4 neighbours in the same image


def relative(x):
    """Each image of a stack divided by its own maximum."""
    return x / np.maximum(x.max(PLANE, keepdims=True), 1e-12)


def otsu(x, bins=128):
    """Otsu's threshold of each image of a stack: x (N, H, W) float -> (N, 1, 1)."""
    n = len(x)
    x = x.reshape(n, -1)
    low = x.min(1, keepdims=True)
    span = x.max(1, keepdims=True) - low
    level = (x - low) / np.maximum(span, 1e-12) * bins
    level = np.minimum(level, bins - 1).astype(int)
    level += bins * np.arange(n)[:, None]               # one histogram an image, side by side
    count = np.bincount(level.ravel(), minlength=n * bins).reshape(n, bins)
    below = count.cumsum(1)                             # pixels up to each level
    pixels = x.shape[1]
    above = pixels - below
    moment = (count * np.arange(bins)).cumsum(1)
    mean = moment[:, -1:] / pixels
    between = (mean * below - moment) ** 2              # variance between the classes
    between /= np.maximum(below * above, 1)
    best = between.argmax(1, keepdims=True) + 1
    threshold = low + span * (best / bins)
    return threshold[:, :, None]


def foreground(x, level=1.0):
    """Bright pixels of each image, holes filled: smooth by 1 pixel, logarithm, cut at `level` of the way from the
    darkest pixel to Otsu's threshold. x (N, H, W) float32 of any scale -> (smoothed x, (N, H, W) bool)."""
    x = np.maximum(x, 0)
    x = ndi.gaussian_filter(x, (0, 1, 1))
    # in the logarithm a dim nucleus beside a bright one stays; + 0.05: the faint halo of a generated one does not count
    log = np.log(relative(x) + 0.05)
    low = np.percentile(log, 0.1, axis=PLANE, keepdims=True)
    bright = log > low + level * (otsu(log) - low)
    bright = ndi.binary_fill_holes(bright, FLAT4)
    everywhere = bright.all(PLANE, keepdims=True)
    return x, bright & ~everywhere


def hills(height):
    """Label every pixel by the summit that steepest ascent reaches: height (N, H, W) -> (N, H, W) int, unique per summit."""
    _, h, w = height.shape
    index = np.arange(height.size).reshape(height.shape)
    best = height - 1e-9 * (index % (h * w))            # the tilt breaks ties on a plateau
    heights = np.pad(best, ((0, 0), (1, 1), (1, 1)), constant_values=-inf)
    to = index                                          # the highest of each pixel and its neighbours
    for dy, dx in np.ndindex(3, 3):
        neighbour = heights[:, dy:dy + h, dx:dx + w]
        higher = neighbour > best
        to = np.where(higher, index + (dy - 1) * w + dx - 1, to)
        best = np.where(higher, neighbour, best)
    to = to.ravel()
    while (to[to] != to).any():                         # follow the pointers, doubling the stride
        to = to[to]
    return to.reshape(height.shape) + 1


def find_nuclei(dapi):
    """Nuclei of each image: dapi (N, H, W) -> (smoothed dapi, (N, H, W) int labels, 0 = background).
    Touching nuclei are parted where the smoothed distance to the background falls into different hills."""
    smooth, bright = foreground(dapi)
    depth = ndi.distance_transform_edt(bright, sampling=APART)
    depth = ndi.gaussian_filter(depth, (0, 3, 3))
    return smooth, hills(depth) * bright


def find_cells(nuclei, tubulin, actin):
    """Cells around nuclei: every bright pixel of tubulin + actin goes to the nearest nucleus. All (N, H, W) -> int labels."""
    stain = relative(tubulin) + relative(actin)
    _, bright = foreground(stain, level=0.5)            # cells fade out: halfway to Otsu
    nearest = ndi.distance_transform_edt(nuclei == 0, sampling=APART,
                                         return_distances=False, return_indices=True)
    cells = nuclei[tuple(nearest)]
    return cells * (bright | (nuclei > 0))


def keep_connected(mask, seed):
    """The part of each mask that touches its seed, holes filled; both (N, H, W) bool."""
    part = ndi.binary_propagation(seed & mask, FLAT4, mask=mask)
    return ndi.binary_fill_holes(part, FLAT4)


def segment_patches(dapi, tubulin, actin):
    """See `segment`: three (N, H, W) float32 stacks -> masks (N, H, W)."""
    smooth, nuclei = find_nuclei(dapi)
    cells = find_cells(nuclei, tubulin, actin)
    n, h, w = nuclei.shape

    # the nucleus nearest to the middle
    y, x = np.ogrid[:h, :w]
    away = np.hypot(y - (h - 1) / 2, x - (w - 1) / 2)
    away = np.where(nuclei > 0, away, inf)
    nearest = away.min(PLANE, keepdims=True)
    first = away.reshape(n, -1).argmin(1)
    label = nuclei.reshape(n, -1)[np.arange(n), first]
    label = label[:, None, None]
    nucleus = keep_connected(nuclei == label, (away == nearest) & (away <= CENTRE))
    cell = keep_connected(cells == label, nucleus) | nucleus

    # is it plausible?
    area = nucleus.sum(PLANE, keepdims=True)
    bright = (smooth * nucleus).sum(PLANE, keepdims=True)
    bright /= np.maximum(area, 1)
    background = np.where(nuclei > 0, nan, smooth)
    dark = np.nanmedian(background, PLANE, keepdims=True)
    plausible = (area >= MIN_AREA) & (area <= MAX_SHARE * h * w)
    plausible &= bright > MIN_CONTRAST * dark
    masks = NUCLEUS * nucleus + CELL * cell
    return masks * plausible


def segment(images, chunk=256):
    """Nucleus and cell in the middle of each patch.
    images (N, 3, H, W) uint16 or float of any scale, channels DAPI, tubulin, actin. Returns masks (N, H, W) uint8, bit 1 nucleus,
    bit 2 cell (with the nucleus). A patch without a plausible nucleus at its centre (too small, too large, no contrast) is zero."""
    masks = np.zeros_like(images[:, 0], np.uint8)
    for start in range(0, len(images), chunk):
        here = slice(start, start + chunk)
        stacks = np.asarray(images[here], np.float32).swapaxes(0, 1)
        masks[here] = segment_patches(*stacks)
    return masks


def segment_field(dapi, tubulin, actin):
    """Nuclei and cells of one whole field: three (H, W) images -> two (H, W) int32 label images, a cell has its nucleus' label.
    Nuclei below MIN_AREA pixels or MIN_CONTRAST are dropped; labels run from 1 without gaps."""
    field = np.stack([dapi, tubulin, actin]).astype(np.float32)
    dapi, tubulin, actin = field[:, None]                               # each a stack of one image
    smooth, nuclei = find_nuclei(dapi)
    _, rank = np.unique(nuclei, return_inverse=True)
    nuclei = rank.reshape(nuclei.shape)
    label = np.arange(nuclei.max() + 1)
    dark = np.median(smooth[nuclei == 0])
    area = np.bincount(nuclei.ravel())
    bright = ndi.mean(smooth, nuclei, label)
    keep = (area >= MIN_AREA) & (label > 0)
    keep &= bright > MIN_CONTRAST * dark
    nuclei = np.where(keep, keep.cumsum(), 0)[nuclei]
    cells = find_cells(nuclei, tubulin, actin)
    return np.concatenate([nuclei, cells]).astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# What CellProfiler would measure in a picture, 2: measure, as CellProfiler 4.2.8 does: torch, any device, N objects at once.
# Coordinates are 0-based pixel centres, X = column, Y = row. Formulae: CellProfiler's MeasureObject* (scikit-image, centrosome,
# mahotas). m (N, H, W) bool is one object a patch with an empty margin of MARGIN pixels; x (N, C, H, W) float32 in 0..1.
# Every family returns {name: (N,) values}.

MARGIN = 1                          # pixels of nothing around a patch
RINGS = 4
WEDGES = 8
DIAGONAL = sqrt(2) - 1              # what a diagonal step costs more than a straight one
SCALE = 3                           # pixels between the pairs of a texture
DIRECTIONS = [                      # of a texture, (dy, dx)
    (0, 1),                         # right
    (1, 1),                         # down-right
    (1, 0),                         # down
    (1, -1),                        # down-left
]
ZERNIKE = [(n, k) for n in range(10) for k in range(n % 2, n + 1, 2)]


def sort_last(x):
    """x sorted along its last axis; numpy's sort is several times faster than torch's on a CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), -1))
    return x.sort(-1).values


def select(x, keep):
    """x[keep] for a boolean keep; here too numpy is faster on a CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy()[keep.numpy()])
    return x[keep]


def extent(m):
    """The first True along the last axis, and the one after the last."""
    first = m.int().argmax(-1)
    after = m.flip(-1).int().argmax(-1)
    return first, m.shape[-1] - after


def neighbours(x, axis):
    """Sum of the two neighbours of every pixel along an axis. (Only margin rolls over the border.)"""
    return x.roll(1, axis) + x.roll(-1, axis)


def outline(m):
    """Pixels of m with one of their 4 neighbours outside."""
    inside = m.byte()
    return m & (neighbours(inside, 1) + neighbours(inside, 2) < 4)


def distance_to_outside(m):
    """Euclidean distance (pixels) of every pixel to the nearest one outside its object: (N, H, W) float64, 0 outside."""
    distance = [ndi.distance_transform_edt(one) for one in m.cpu().numpy()]
    return torch.from_numpy(np.stack(distance)).to(m.device)


def coordinates(m):
    """Row numbers (H,) and column numbers (W,) of the pixels of m (N, H, W), float64."""
    return [torch.arange(n, dtype=torch.float64, device=m.device) for n in m.shape[1:]]


# AreaShape


def moments(weight, y, x, order):
    """sum of weight * y**p * x**q: weight (N, H, W), y (N, H), x (N, W) -> (order + 1, order + 1, N) [p, q]."""
    y = torch.stack([y ** p for p in range(order + 1)], 1)
    x = torch.stack([x ** q for q in range(order + 1)], 1)
    return (y @ weight @ x.mT).permute(1, 2, 0)


def ellipse(central):
    """Axes and orientation of the ellipse with the same second moments; central moments (4, 4, N)."""
    area = central[0, 0]
    yy = central[2, 0] / area
    xx = central[0, 2] / area
    xy = central[1, 1] / area
    spread = torch.hypot((yy - xx) / 2, xy)
    middle = (yy + xx) / 2
    major = middle + spread
    minor = (middle - spread).clamp(min=0)
    angle = torch.atan2(2 * xy, yy - xx) / 2            # from the vertical; down-right is positive
    diagonal = torch.where(xy > 0, 45.0, -45.0)
    return {
        "Eccentricity": (1 - minor / major).sqrt(),
        "Orientation": torch.where(yy == xx, diagonal, torch.rad2deg(angle)),
        "InertiaTensor_0_0": xx,
        "InertiaTensor_0_1": -xy,
        "InertiaTensor_1_0": -xy,
        "InertiaTensor_1_1": yy,
        "InertiaTensorEigenvalues_0": major,
        "InertiaTensorEigenvalues_1": minor,
        "MajorAxisLength": 4 * major.sqrt(),
        "MinorAxisLength": 4 * minor.sqrt(),
    }


def perimeter(edge):
    """Length of an outline (N, H, W): a pixel weighs by its neighbours on it, 2 for a side and 10 for a corner (Benkrid, Crookes)."""
    edge = edge.byte()
    beside = neighbours(edge, 2)
    sides = beside + neighbours(edge, 1)
    corners = neighbours(beside, 1)
    code = edge * (1 + 2 * sides + 10 * corners)
    weight = torch.zeros(50, device=edge.device).double()
    weight[[5, 7, 15, 17, 25, 27]] = 1
    weight[[21, 33]] = sqrt(2)
    weight[[13, 23]] = (1 + sqrt(2)) / 2
    return weight[code.int()].sum(PLANE)


def euler_number(m):
    """Objects - holes (8-connected) = corners - sides + pixels of the closed pixel squares."""
    m = m.char()
    rows = m | m.roll(1, 1)
    columns = m | m.roll(1, 2)
    corners = rows | rows.roll(1, 2)
    count = corners - (rows + columns) + m
    return count.sum(PLANE)


def radii(m, distance, area):
    """Maximum, mean and median distance of an object's pixels to the outside."""
    outside_last = distance.masked_fill(~m, inf)
    ranked = sort_last(outside_last.flatten(1))
    middle = torch.stack([area - 1, area], 1) // 2
    return {
        "MaximumRadius": distance.amax(PLANE),
        "MeanRadius": distance.sum(PLANE) / area,
        "MedianRadius": ranked.gather(1, middle.long().clamp(min=0)).mean(1),
    }


def dot(u, v):
    """Scalar product of vectors in the plane, written as complex numbers x + iy."""
    return (u.conj() * v).real


def hu_moments(normal):
    """Hu's 7 moments, which do not change when an object turns; normal (4, 4, N): normalised central moments."""
    (
        (_, _, n02, n03),
        (_, n11, n12, _),
        (n20, n21, _, _),
        (n30, _, _, _),
    ) = normal
    a = torch.complex(n20 - n02, 2 * n11)               # a turn by t multiplies these by exp(2it), exp(3it) and exp(it)
    b = torch.complex(n30 - 3 * n12, 3 * n21 - n03)
    c = torch.complex(n30 + n12, n21 + n03).conj()
    bc = b * c * c * c
    return {
        "HuMoment_0": n20 + n02,
        "HuMoment_1": dot(a, a),
        "HuMoment_2": dot(b, b),
        "HuMoment_3": dot(c, c),
        "HuMoment_4": bc.real,
        "HuMoment_5": (a * c * c).real,
        "HuMoment_6": bc.imag,
    }


def enclosing_circle(m):
    """Smallest circle round the pixel centres of each object (Chrystal 1885): centre (N, 1) complex x + iy, radius (N, 1)."""
    left, right = extent(m)                             # of every row
    y, _ = coordinates(m)
    x = torch.cat([left, right - 1], 1).double()
    point = torch.complex(x, y.repeat(len(m), 2))       # (N, 2H)
    absent = ~m.any(2).repeat(1, 2)
    first = (~absent).int().argmax(1, keepdim=True)
    a = point.gather(1, first)                          # a and b: one side of the convex hull
    angle = (point - a).angle()
    angle = angle.masked_fill(absent | (point == a), inf)
    b = point.gather(1, angle.argmin(1, keepdim=True))
    b = torch.where(b.imag < a.imag, a, b)              # a lone pixel has no second point
    while True:
        to_a = a - point
        to_b = b - point
        lengths = (dot(to_a, to_a) * dot(to_b, to_b)).sqrt()
        cosine = (dot(to_a, to_b) / lengths).nan_to_num(-1)
        cosine, index = cosine.masked_fill(absent, -1).max(1, keepdim=True)
        c = point.gather(1, index)                      # sees the side under the smallest angle
        outside = cosine > 0                            # under 90 degrees: outside the circle on ab
        u = b - a
        v = c - a
        blunt_a = outside & (dot(u, v) < 0)
        blunt_b = outside & (dot(u, v - u) > 0)
        if not (blunt_a | blunt_b).any():
            break
        a = torch.where(blunt_a, c, a)                  # the side opposite the blunt angle
        b = torch.where(blunt_b, c, b)
    twice_area = (u.conj() * v).imag
    through_c = dot(u, u) * v - dot(v, v) * u
    through_c = -0.5j * through_c / twice_area
    offset = torch.where(outside, through_c, u / 2)     # the circle through a, b and c, or on the side ab
    return a + offset, offset.abs()


def zernike_coefficients():
    """Each Zernike polynomial of ZERNIKE as coefficients of y**p * x**q: (30, 10, 10) complex."""
    table = np.zeros((len(ZERNIKE), 10, 10), complex)
    for row, (n, k) in enumerate(ZERNIKE):
        for i in range((n - k) // 2 + 1):               # sum over i of a * (y + ix)**(s + k) * (y - ix)**s
            s = (n - k) // 2 - i
            a = (-1) ** i * comb(n - i, i) * comb(n - 2 * i, s)
            product = np.poly([-1j] * (s + k) + [1j] * s)   # coefficients, y's highest power first
            degree = n - 2 * i
            q = np.arange(degree + 1)
            table[row, degree - q, q] += a * product
    return table


def zernike(m):
    """Magnitude of the 30 Zernike moments of each shape in its smallest enclosing circle.
    All pixels count. CellProfiler loses 1-3 on the circle itself to rounding: equal to 0.011."""
    centre, radius = enclosing_circle(m)
    y, x = coordinates(m)
    y = (y - centre.imag) / radius
    x = (x - centre.real) / radius
    moment = moments(m.double(), y, x, 9).flatten(0, 1).T                       # (N, 100)
    polynomial = torch.from_numpy(zernike_coefficients()).to(m.device).flatten(1)
    value = moment.to(torch.complex128) @ polynomial.T                          # (N, 30)
    value = value.abs() / (pi * radius ** 2)
    return {f"Zernike_{n}_{k}": v for (n, k), v in zip(ZERNIKE, value.unbind(1))}


def area_shape(m, edge, distance):
    """Size, ellipse, radii, moments and Zernike moments of each object."""
    top, bottom = extent(m.any(2))
    left, right = extent(m.any(1))
    box = (bottom - top) * (right - left)
    y, x = coordinates(m)
    y = y - top[:, None]                       # from the corner of the box
    x = x - left[:, None]
    raw = moments(m.double(), y, x, 3)
    area = raw[0, 0]
    cy = raw[1, 0] / area
    cx = raw[0, 1] / area
    y = y - cy[:, None]
    x = x - cx[:, None]
    central = moments(m.double(), y, x, 3)
    order = torch.arange(4, device=m.device)
    order = (order[:, None] + order) / 2 + 1
    norm = area[:, None, None] ** order            # (N, 4, 4)
    normal = central / norm.permute(1, 2, 0)
    normal[[0, 0, 1], [0, 1, 0]] = nan          # as scikit-image leaves them
    length = perimeter(edge)
    roundness = 4 * pi * area / length ** 2
    value = {
        "Area": area,
        "BoundingBoxArea": box,
        "BoundingBoxMaximum_X": right - MARGIN,
        "BoundingBoxMaximum_Y": bottom - MARGIN,
        "BoundingBoxMinimum_X": left - MARGIN,
        "BoundingBoxMinimum_Y": top - MARGIN,
        "Center_X": left + cx - MARGIN,
        "Center_Y": top + cy - MARGIN,
        "Compactness": 1 / roundness,
        "EquivalentDiameter": (4 * area / pi).sqrt(),
        "EulerNumber": euler_number(m),
        "Extent": area / box,
        "FormFactor": roundness,
        "Perimeter": length,
    }
    value |= ellipse(central)
    value |= radii(m, distance, area)
    value |= hu_moments(normal)
    tables = [
        ("Spatial", raw, 3),
        ("Central", central, 3),
        ("Normalized", normal, 4),
    ]
    for kind, table, rows in tables:
        for p in range(rows):
            for q in range(4):
                value[f"{kind}Moment_{p}_{q}"] = table[p, q]
    value |= zernike(m)
    return {f"AreaShape_{name}": v for name, v in value.items()}


# Intensity


def quantile(ranked, area, share):
    """CellProfiler's quantile: between the sorted values at position area * share and the next. (N, C, P), (N, 1) -> (N, C)."""
    last = (area - 1).clamp(min=0)
    place = area * share
    low = torch.minimum(place.floor(), last)
    high = torch.minimum(low + 1, last)
    part = place - low
    index = torch.cat([low, high], 1).long()                                    # (N, 2)
    low, high = ranked.take_along_dim(index[:, None], 2).double().unbind(2)
    return low * (1 - part) + high * part


def intensity(x, m, edge, channels):
    """Intensity of each object and of its outline, in every channel."""
    row, column = coordinates(m)
    weight = torch.stack([m, edge, m * row[:, None], m * column], 1).flatten(2)     # (N, 4, P) float64
    m = m.flatten(1)[:, None]                                                   # (N, 1, P)
    edge = edge.flatten(1)[:, None]
    x = x.flatten(2)                                                            # (N, C, P) float32
    area, rim, sum_y, sum_x = weight.sum(2, keepdim=True).unbind(1)             # each (N, 1)
    light = x.double()
    total, total_rim, light_y, light_x = (weight @ light.mT).unbind(1)          # each (N, C)
    mean = total / area
    off = light - mean[..., None]
    off_rim = (weight @ off.mT)[:, 1]
    square, square_rim, _, _ = (weight @ (off ** 2).mT).unbind(1)
    variance_rim = square_rim / rim - (off_rim / rim) ** 2
    shift_y = light_y / total - sum_y / area
    shift_x = light_x / total - sum_x / area

    ranked = sort_last(x.masked_fill(~m, inf))
    median = quantile(ranked, area, 0.5)
    off_median = (ranked - median[..., None].float()).abs()
    value = {
        "IntegratedIntensity": total,
        "MeanIntensity": mean,
        "StdIntensity": (square / area).sqrt(),
        "MinIntensity": ranked[:, :, 0],
        "MaxIntensity": quantile(ranked, area, 1),
        "IntegratedIntensityEdge": total_rim,
        "MeanIntensityEdge": total_rim / rim,
        "StdIntensityEdge": variance_rim.clamp(min=0).sqrt(),
        "MinIntensityEdge": x.masked_fill(~edge, inf).amin(2),
        "MaxIntensityEdge": x.masked_fill(~edge, -inf).amax(2),
        "MassDisplacement": torch.hypot(shift_y, shift_x),
        "LowerQuartileIntensity": quantile(ranked, area, 0.25),
        "MedianIntensity": median,
        "UpperQuartileIntensity": quantile(ranked, area, 0.75),
        "MADIntensity": quantile(sort_last(off_median), area, 0.5),
    }
    named = {}
    for name, v in value.items():
        for c, channel in enumerate(channels):
            named[f"Intensity_{name}_{channel}"] = v[:, c]
    return named


# Texture


def grey_pairs(level):
    """Pairs of grey levels SCALE pixels apart in 4 directions; level (N, H, W) int32 below 256, 0 counts as outside.
    Four (K,) tensors, an entry for each pair that occurs: object * 4 + direction, lower level, higher level, how often."""
    n, _, w = level.shape
    level = F.pad(level, (0, SCALE)).flatten(1)         # nothing beside each row: no pair reaches into the next one
    row = torch.arange(n, dtype=torch.int32, device=level.device) * 4
    keys = []
    for direction, (dy, dx) in enumerate(DIRECTIONS):
        apart = (dy * (w + SCALE) + dx) * SCALE
        a = level[:, :-apart]
        b = level[:, apart:]
        low = torch.minimum(a, b)
        high = torch.maximum(a, b)
        key = (row + direction)[:, None] << 16 | low << 8 | high
        keys.append(select(key, low > 0))
    key = sort_last(torch.cat(keys))
    key, count = key.unique_consecutive(return_counts=True)
    return key >> 16, key >> 8 & 255, key & 255, count.double()


def haralick(row, low, high, count, levels):
    """Haralick's 13 features of the pairs of `grey_pairs`; levels (R,): 1 + the highest level. {name: (R,)}, NaN without pairs."""
    rows = len(levels)
    k = torch.arange(511, dtype=torch.float64, device=row.device)
    k2 = k[:256] ** 2

    def tally(bins, index, weight):
        return torch.bincount(index, weight, rows * bins).double().view(rows, bins)

    def entropy(p):                                                             # of each row, in bits
        return -(p * p.clamp(min=1e-300).log2()).sum(1)

    total = tally(1, row, count)                                                # (R, 1) pairs
    as_low = tally(256, row << 8 | low, count)
    as_high = tally(256, row << 8 | high, count)
    single_p = (as_low + as_high) / (2 * total)
    sum_p = tally(512, (row << 9) + low + high, count)[:, :511] / total
    difference_p = tally(256, (row << 8) + high - low, count) / total
    ordered = torch.where(low == high, count, count / 2)                        # of (low, high), and as many of (high, low)
    logs = tally(1, row, count * ordered.log2())
    joint = (total.log2() - logs / total)[:, 0]
    single = entropy(single_p)
    mean = single_p @ k[:256]
    mean2 = mean ** 2
    variance = single_p @ k2 - mean2
    contrast = difference_p @ k2
    sum_square = sum_p @ k ** 2
    covariance = (sum_square - contrast) / 4 - mean2
    moment = tally(1, row, count * ordered) / total ** 2
    return {
        "AngularSecondMoment": moment[:, 0],
        "Contrast": contrast,
        "Correlation": torch.where(variance == 0, 1, covariance / variance),
        "Variance": variance,
        "InverseDifferenceMoment": difference_p @ (1 / (1 + k2)),
        "SumAverage": 2 * mean,
        "SumVariance": sum_square - 4 * mean2,
        "SumEntropy": entropy(sum_p),
        "Entropy": joint,
        "DifferenceVariance": (difference_p ** 2).sum(1) / levels - 1 / levels ** 2,
        "DifferenceEntropy": entropy(difference_p),
        "InfoMeas1": (joint - 2 * single) / torch.where(single == 0, 1, single),
        "InfoMeas2": (1 - torch.exp(-2 * (2 * single - joint))).clamp(min=0).sqrt(),
    }


def texture(x, m, channels):
    """Haralick's features of each object in every channel, in 256 grey levels and 4 DIRECTIONS.
    0 where a direction has no pair at all, as in CellProfiler."""
    value = {}
    for channel, pixels in zip(channels, x.unbind(1)):
        level = (pixels * 255).round().clamp(0, 255)
        level = level.int() * m
        levels = level.amax(PLANE).repeat_interleave(4) + 1
        for name, v in haralick(*grey_pairs(level), levels).items():
            v = v.view(-1, 4)                                                   # (N, directions)
            lacking = v.isnan().any(1)
            for direction in range(4):
                column = f"Texture_{name}_{channel}_{SCALE}_{direction:02d}_256"
                value[column] = v[:, direction].masked_fill(lacking, 0)
    return value


# RadialDistribution


def sweep(length, step):
    """Carry path lengths from the first row to the last, in place; length and step (H, W, N), step 1 inside and inf outside."""
    new = np.empty_like(length[0, 1:-1])
    for row in range(1, len(length)):
        before = length[row - 1]
        here = length[row, 1:-1]
        np.minimum(before[:-2], before[2:], out=new)
        new += DIAGONAL
        np.minimum(new, before[1:-1], out=new)
        new += step[row, 1:-1]
        np.minimum(new, here, out=here)


def sweep_all(length, step):
    """Carry path lengths down, up, right and left."""
    for _ in range(2):
        sweep(length, step)
        sweep(length[::-1], step[::-1])
        length = length.swapaxes(0, 1)
        step = step.swapaxes(0, 1)


def path_length(m, row, column):
    """Shortest way inside m from pixel (row, column) of each object, by steps of 1 and sqrt(2): (N, H, W), inf = no way.
    In numpy on any device: it is hundreds of small steps."""
    n, h, w = m.shape
    y, x, _ = np.ogrid[:h, :w, :1]                                              # (H, 1, 1), (1, W, 1)
    dy = np.abs(y - row)
    dx = np.abs(x - column)
    free = np.maximum(dy, dx) + DIAGONAL * np.minimum(dy, dx)                   # (H, W, N), with nothing in the way
    free = free.astype(np.float32)
    length = np.where(free == 0, free, np.float32(inf))
    inside = np.ascontiguousarray(m.transpose(1, 2, 0))
    step = np.where(inside, 1, inf).astype(np.float32)
    sweep_all(length, step)
    detour = inside & (length > free + 1e-3)
    todo = np.flatnonzero(detour.any((0, 1)))                                   # another one may be shorter
    while len(todo):
        part = length[..., todo]
        sweep_all(part, step[..., todo])
        shorter = (part < length[..., todo]).any((0, 1))
        length[..., todo] = part
        todo = todo[shorter]
    return length.transpose(2, 0, 1)


def ring_and_wedge(m, distance):
    """Ring * WEDGES + wedge of every pixel seen from the innermost one, in RINGS rings from there to the edge: (N, H, W), -1
    outside. The innermost pixel is the first one farthest from the edge. Where several tie, CellProfiler's choice is arbitrary."""
    centre = distance.flatten(1).argmax(1)
    row, column = torch.unravel_index(centre, m.shape[1:])
    path = path_length(m.cpu().numpy(), row.cpu().numpy(), column.cpu().numpy())
    path = torch.from_numpy(path).to(m.device).double()
    inside = m & path.isfinite()                                                # an island cannot be reached
    ring = path / (path + distance + 0.001) * RINGS
    y, x = coordinates(m)
    dy = y[:, None] - row[:, None, None]
    dx = x - column[:, None, None]
    steep = dy.abs() > dx.abs()
    wedge = (dy > 0).int() + 2 * (dx > 0) + 4 * steep
    sector = ring.nan_to_num().int() * WEDGES + wedge
    return torch.where(inside, sector, -1)


def radial_distribution(x, sector, channels):
    """Share, relative share and unevenness of intensity in the rings of each object, in every channel."""
    n = len(sector)
    inside = sector >= 0
    item = torch.arange(n, dtype=torch.int32, device=x.device) * (RINGS * WEDGES)
    cell = select(sector + item[:, None, None], inside)

    def tally(weight):
        return torch.bincount(cell, weight, n * RINGS * WEDGES).view(n, RINGS, WEDGES)

    pixels = tally(torch.ones_like(cell).double())
    used = pixels > 0
    rings = pixels.sum(2)
    share_of_pixels = rings / rings.sum(1, keepdim=True)
    value = {}
    for channel, image in zip(channels, x.unbind(1)):
        light = tally(select(image, inside).double())
        rings = light.sum(2)
        share = rings / rings.sum(1, keepdim=True)
        mean = (light / pixels).nan_to_num()                                   # of each wedge
        average = mean.sum(2) / used.sum(2)
        off = (mean - average[..., None]) * used
        variance = (off ** 2).sum(2) / used.sum(2)
        kinds = {
            "FracAtD": share,
            "MeanFrac": share / (share_of_pixels + np.finfo(float).eps),
            "RadialCV": (variance.sqrt() / average).nan_to_num(),
        }
        for name, v in kinds.items():
            for i in range(RINGS):
                value[f"RadialDistribution_{name}_{channel}_{i + 1}of{RINGS}"] = v[:, i]
    return value


# Correlation


def correlation(x, m, channels):
    """Correlation, overlap, K and Manders coefficients of every two channels, the last three above 15 % of the maximum."""
    x = x.flatten(2)                                                            # (N, C, P)
    m = m.flatten(1)[:, None]
    least = 0.15 * (x * m).amax(2, keepdim=True)                                # in float32, as CellProfiler does
    above = ((x >= least) & m).double()
    x = x.double()
    total = (x * m).sum(2, keepdim=True)
    mean = total / m.sum(2, keepdim=True)
    off = (x - mean) * m
    covariance = off @ off.mT                                                   # (N, C, C)
    variance = covariance.diagonal(dim1=1, dim2=2)[:, None]
    bright = x * above
    product = bright @ bright.mT
    square = bright ** 2 @ above.mT
    symmetric = {
        "Correlation": covariance / (variance * variance.mT).sqrt(),
        "Overlap": product / (square * square.mT).sqrt(),
    }
    directed = {
        "K": product / square,
        "Manders": bright @ above.mT / bright.sum(2, keepdim=True),
    }
    value = {}
    for (i, a), (j, b) in permutations(enumerate(channels), 2):
        tables = symmetric | directed if i < j else directed
        for name, table in tables.items():
            value[f"Correlation_{name}_{a}_{b}"] = table[:, i, j]
    return value


# All families of all compartments


def measure_patches(images, masks, channels, device):
    """See `measure`; all patches at once."""
    whole = FULL_SCALE if images.dtype.kind in "ui" else 1
    x = torch.from_numpy(images.astype(np.float32) / whole)
    mask = torch.from_numpy(masks)
    margin = (MARGIN,) * 4
    x = F.pad(x.to(device), margin)
    mask = F.pad(mask.to(device), margin)
    nucleus = mask & NUCLEUS > 0
    cell = mask & CELL > 0
    result = {}
    compartments = [                                                            # and their first channel
        ("Nuclei", nucleus, 0),
        ("Cells", cell, 1),
        ("Cytoplasm", cell & ~nucleus, 1),
    ]
    for compartment, m, first in compartments:
        light = x[:, first:]
        stained = channels[first:]
        edge = outline(m)
        distance = distance_to_outside(m)
        value = area_shape(m, edge, distance)
        value |= intensity(light, m, edge, stained)
        value |= texture(light, m, stained)
        value |= radial_distribution(light, ring_and_wedge(m, distance), stained)
        if compartment == "Cells":
            value |= correlation(x, m, channels)
        absent = ~m.any(PLANE)
        for name, v in value.items():
            result[f"{compartment}_{name}"] = v.double().masked_fill(absent, nan)
    values = torch.stack(list(result.values()), 1)
    return list(result), values.cpu().numpy()


def measure(images, masks, channels=CHANNELS, chunk=64, device="cpu"):
    """Measure nucleus, cell and cytoplasm (cell without nucleus) of each patch under CellProfiler 4.2.8's names.
    images (N, C, H, W), uint16 (divided by 65535, as CellProfiler reads a 16-bit TIFF) or float in 0..1; masks (N, H, W) uint8, bit 1
    nucleus, bit 2 cell, as from `segment`. The first channel is measured in nuclei only.
    Returns names, a list of F, and values (N, F) float64; a missing object is NaN, a black channel gives 0 or NaN.
    `chunk` patches, fewer than 8192 (bits in `grey_pairs`), are measured at a time and share nothing."""
    images = np.asarray(images)
    masks = np.asarray(masks, np.uint8)
    n, c, h, w = images.shape
    assert c == len(channels) and masks.shape == (n, h, w), (images.shape, masks.shape)

    def part(start):
        torch.set_num_threads(1)
        here = slice(start, start + chunk)
        return measure_patches(images[here], masks[here], channels, device)

    threads = torch.get_num_threads()   # chunks side by side: threads within such small tensors made it three times slower
    workers = threads if torch.device(device).type == "cpu" else 1
    try:
        with ThreadPoolExecutor(workers) as pool:
            names, values = zip(*pool.map(part, range(0, n, chunk)))
    finally:
        torch.set_num_threads(threads)
    return names[0], np.concatenate(values)


def measurements(x, channels, white=None, device="cpu"):
    """CellProfiler's measurements of the middle cell of pictures (N, 3, H, W), float in 0..1 or uint8 as from model.generate ->
    frame (N rows, F columns); NaN without a nucleus. One segmentation and one engine for real and generated cells; places in
    the crop are left out. white (3,): 16-bit levels that 1 stands for (image norm percentile), intensities are then
    CellProfiler's; without it they are relative."""
    if len(channels) != 3:
        raise InputError(f"channels {', '.join(channels)}: measuring needs three, "
                         "the stain of the nucleus first")
    x = np.asarray(x)
    whole = 255 if x.dtype == np.uint8 else 1
    x = x.astype(np.float32) / whole
    if white is not None:
        white = np.asarray(white, np.float32) / FULL_SCALE
        x = x * white[:, None, None]
    names, values = measure(x, segment(x), channels, device=device)
    values[~np.isfinite(values)] = nan
    table = pd.DataFrame(values, columns=names)
    return table[sort_columns(names)[0]]
