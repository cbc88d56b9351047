"""The prepared folder, which prepare_bbbc021.py writes and every other script reads, and CellProfiler's tables. numpy, pandas, torch only.

    out/patches.npy     (N, C, 68, 68) uint16, raw intensities, one cell a patch, channels in the order of meta.json
    out/features.npy    (N, F) float32, CellProfiler measurements in CellProfiler's units, no missing values
    out/cells.csv       one row a cell: cell, field, plate, well, site, replicate, compound, concentration, moa, x, y, split
    out/meta.json       channels, feature names, centre and scale, what was dropped and why, options, counts, a checksum per file

    cells = data.open_folder("out/")
    x = data.scale_images(cells.images(rows), "cell-max")      # (B, C, 68, 68) in 0..1
    table = data.read_table("export/")      # what CellProfiler exported, CSV or SQLite, as one table: one row a cell
"""
import csv
import ctypes
import hashlib
import json
import os
import re
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch

SIZE = 68  # pixels, side of a crop (original parameters.py)
CHANNELS = ("DAPI", "Tubulin", "Actin")
FORMAT = "cp2image-folder-1"
FILES = ("patches.npy", "features.npy", "cells.csv")
CELL_COLUMNS = ["cell", "field", "plate", "well", "site", "replicate", "compound", "concentration", "moa", "x", "y", "split"]
NUMBER_COLUMNS = ("concentration", "x", "y")
TEXT_COLUMNS = {c: str for c in CELL_COLUMNS if c not in NUMBER_COLUMNS}
FULL_SCALE = 65535  # the 16-bit level that CellProfiler calls 1
CHUNK = 1024  # cells handled at once: bounds the memory


class InputError(ValueError):
    """A mistake in what was given: one line with what was found, what was expected and what to do next."""


def checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, content):
    """A file of `content`, a text or a function that saves to a path: a temporary one, flushed to the disk, then renamed, never half a file."""
    temporary = path.with_name("." + path.name)
    temporary.write_text(content) if isinstance(content, str) else content(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def pick_device(name):
    """The torch device for a --device flag; InputError if this machine does not have it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        device = torch.empty(1, device=device).device  # with its number
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError):
        last = max(torch.cuda.device_count() - 1, 0)
        raise InputError(f"--device {name}: not on this machine; expected auto, cpu, cuda or cuda:0..{last}") from None
    return device


def keep_freed_memory():
    """Tells glibc to keep freed memory: giving it back and faulting it in again made a CPU step 2 to 7 times slower, and halved the rate of crops."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1), mallopt(-4, 0)  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no separate mappings
    except (AttributeError, OSError):
        pass  # another C library: nothing to set


class Folder:
    """An open prepared folder: memory-mapped `.patches` and `.raw` features, `.cells` (a frame), `.meta` (a dict).
    Beside them, from meta.json: `.features` (F names), `.channels`, `.centre` and `.scale` ((F,) float64 tensors), `.normalise`, `.white`
    ((C,) 16-bit levels for --image-norm percentile), and `.treatment` ((N,) numbers of compound-concentration pairs)."""

    def __init__(self, path, meta, patches, raw, cells):
        self.path, self.meta, self.patches, self.raw, self.cells = Path(path), meta, patches, raw, cells
        self.features, self.channels, self.normalise, self.white = meta["features"], meta["channels"], meta["normalise"], meta["white"]
        self.identity = meta["checksums"]  # what a run must share with the folder that it goes on with
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
        Centre and scale are (F,), or with plate-dmso (B, F): those of each cell's plate. See model.standardise."""
        raw = torch.from_numpy(np.ascontiguousarray(self.raw[rows]))
        if not self.plate_names:
            return raw, self.centre, self.scale
        return raw, self.plate_centre[self.plate[rows]], self.plate_scale[self.plate[rows]]


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
    n, arrays = meta["counts"]["cells"], []
    for name, dtype, *shape in (("patches.npy", "uint16", n, len(meta["channels"]), SIZE, SIZE),
                                ("features.npy", "float32", n, len(meta["features"]))):
        try:
            array = np.load(path / name, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path / name}: missing or cut short ({error}); prepare the folder again") from None
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise InputError(f"{path / name}: {array.dtype} {array.shape}, meta.json says {dtype} {tuple(shape)}; prepare the folder again")
        arrays.append(array)
    try:
        cells = pd.read_csv(path / "cells.csv", dtype=TEXT_COLUMNS, keep_default_na=False, na_values=dict.fromkeys(NUMBER_COLUMNS, ""))
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'cells.csv'}: not readable ({error}); prepare the folder again") from None
    if list(cells.columns) != CELL_COLUMNS or len(cells) != n:
        raise InputError(f"{path / 'cells.csv'}: {len(cells)} rows with columns {list(cells.columns)}, expected {n} with {CELL_COLUMNS}")
    return Folder(path, meta, *arrays, cells)


# ---------------------------------------------------------------------------------------------------------------------
# Batches: a function of (seed, step, stream) only, so that a resumed run needs no saved generator state


class TreatmentSampler:
    """Draws batches as the released code does: one random training cell per treatment, the treatments in random order.
    `batch`: cells a batch; None or 0 = one per treatment. Fewer: a random part of the treatments. More: all of them, again and again."""

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
    norm "percentile": divided by `white` (C,), one level for the whole set, and clipped at 1: keeps absolute intensity."""
    if norm == "cell-max":
        return x / x.amax((2, 3), keepdim=True).clamp(min=1)
    if norm == "percentile":
        return (x / torch.as_tensor(white, dtype=x.dtype, device=x.device)[:, None, None]).clamp(max=1)
    raise InputError(f"image norm {norm!r}: expected cell-max or percentile")


def composite(x):
    """Images (B, C, H, W) in 0..1 -> (B, H, W, 3) uint8: DAPI blue, tubulin green, actin red, as the paper draws them."""
    return (x.detach().cpu().float().clamp(0, 1).flip(1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def tile(rows, zoom=2, gap=2):
    """A list of rows of pictures, each (n, H, W, 3) uint8 -> one (height, width, 3) uint8 picture on black, enlarged `zoom` times."""
    wide = max(len(r) for r in rows)
    h, w = (s * zoom + gap for s in rows[0].shape[1:3])
    out = np.zeros((h * len(rows) + gap, w * wide + gap, 3), np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row.repeat(zoom, 1).repeat(zoom, 2)):
            out[gap + i * h:(i + 1) * h, gap + j * w:(j + 1) * w] = picture
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Tables of measurements

FEATURE = re.compile(r"(?!Image_|Metadata_|Experiment_|Single_|Multi_)[A-Z][A-Za-z0-9]*_"  # <Object>_<Family>_...
                     r"(?!Metadata_|FileName_|PathName_|URL_)[A-Z][A-Za-z]*_\w+")
BOOKKEEPING = re.compile(r"_Location_|_Parent_|_Children_|_Number_|ObjectNumber|AreaShape_Center|BoundingBox[MX]")
ZERO = re.compile(r"_AreaShape_CentralMoment_(0_1|1_0)$")  # zero by definition; what CellProfiler writes is rounding noise


def sort_columns(columns, keep=None):
    """Column names of a table -> (features, dropped {name: reason}, metadata names); `keep`: only features that match this regex."""
    features, dropped, metadata = [], {}, []
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


def read_csv(path, **options):
    """pandas.read_csv for files of unknown origin: any line ends, no text turned into NaN unless asked, errors in one line."""
    try:
        return pd.read_csv(path, keep_default_na=False, encoding="utf-8-sig", low_memory=False, **options)
    except (OSError, ValueError) as error:  # pandas' parser and empty-data errors are ValueErrors
        raise InputError(f"{path}: not readable as CSV ({str(error).strip().splitlines()[0]})") from None


def numbers(frame, where, first=2):
    """The frame with its text columns as numbers; other text is an InputError with column and row (`first`: number of the first row)."""
    for name in [c for c in frame if not pd.api.types.is_numeric_dtype(frame[c])]:
        value = pd.to_numeric(frame[name], errors="coerce").astype(float)
        missing = frame[name].isna() | frame[name].astype(str).str.strip().str.lower().isin(["", "nan", "na", "null", "none"])
        wrong = value.isna() & ~missing
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise InputError(f"{where}, row {row + first}, column {name}: {frame[name].iloc[row]!r} is not a number")
        frame = frame.assign(**{name: value})
    return frame


def read_moa(path):
    """BBBC021_v1_moa.csv in any of its copies -> {(compound, concentration as float): mechanism}."""
    table, moa = read_csv(path, dtype=str), {}
    for name in ("compound", "concentration", "moa"):
        if name not in table:
            raise InputError(f"{path}: no column {name!r}, found {list(table.columns)}")
    for row, (c, text, mechanism) in enumerate(zip(table["compound"], table["concentration"], table["moa"]), 2):
        pair = c, concentration(text, f"{path}, row {row}")
        if pair in moa:
            raise InputError(f"{path}: treatment {pair} stands in two rows, expected one")
        moa[pair] = mechanism
    return moa


def concentration(text, where):
    """A concentration in uM as a float; empty or 'unknown' is NaN."""
    try:
        return float(text) if text not in ("", "unknown") else float("nan")
    except ValueError:
        raise InputError(f"{where}: concentration {text!r} is not a number") from None


SPELLINGS = {"cell": ("single_cell_image_id", "cell"), "field": ("multi_cell_image_name",), "plate": ("plate", "barcode"),
             **{name: (name,) for name in ("well", "site", "replicate", "compound", "concentration", "moa")}}


def annotate(table):
    """The columns of cells.csv that a table tells under the names in use: Image_Metadata_Plate_DAPI, Metadata_Plate, plate, ..."""
    plain = {re.sub(r"^(image_)?(metadata_)?|_(dapi|dna)$", "", c.lower()): c for c in reversed(list(table.columns))}
    named = {name: next((plain[s] for s in spellings if s in plain), None) for name, spellings in SPELLINGS.items()}
    return pd.DataFrame({name: table[c] for name, c in named.items() if c}, index=table.index)


# ---------------------------------------------------------------------------------------------------------------------
# CellProfiler's exports. A source is one table, {path, table (of SQLite, or None), names, skip (header rows)}; a piece is
# (source, names, place): columns of it, and for each of its rows the cell it belongs to (-1: none)

OBJECTS = ("Nuclei", "Cells", "Cytoplasm")
KEYS = ("TableNumber", "ImageNumber")  # of a field; ImageNumber alone repeats across BBBC021's tables
BOX = [f"AreaShape_BoundingBox{m}imum_{a}" for m in ("Min", "Max") for a in "XY"]
CENTRES = [f"{family}_Center_{a}" for family in ("Location", "AreaShape") for a in "XY"]
PAIRING = {"ObjectNumber", "Number_Object_Number", "Parent_Nuclei", *CENTRES, *BOX}


def csv_source(path, name):
    """The source of one CSV, checked for rows of another width than its header; `name` (Nuclei, ...) goes before its column names.
    name None: a table of all objects, whose header has two rows, object and measurement."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = [row for row, _ in zip(csv.reader(file), range(2))]
            file.seek(0)
            for number, line in enumerate(file, 1):  # pandas fills short rows and cuts long ones without a word
                width = len(next(csv.reader([line]))) if '"' in line else line.count(",") + 1
                if width != len(header[0]) and line.strip():
                    raise InputError(f"{path}: row {number} has {width} fields, the header {len(header[0])}; damaged? export it again")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not header:
        raise InputError(f"{path}: is empty, expected a header; export it again or leave its folder out (--skip-bad)")
    objects, columns = (header[0], header[-1]) if name is None else ([name] * len(header[0]), header[0])
    names = [c if c in KEYS or o == "Image" else f"{o}_{c}" for o, c in zip(objects, columns)]
    used = pd.Index([c for c in names if FEATURE.fullmatch(c) or c in KEYS])
    if used.has_duplicates:
        raise InputError(f"{path}: column {used[used.duplicated()][0]} stands twice; remove one")
    return {"path": path, "table": None, "names": names, "skip": 2 if name is None else 1}


def read_folder(folder):
    """A folder of ExportToSpreadsheet -> (the Image table as text, {object: source}); the names may have a prefix, MyExpt_Nuclei.csv."""
    found = {p.stem.lower(): p for p in sorted(folder.iterdir()) if p.suffix.lower() == ".csv"}

    def find(name):
        hits = [name.lower()] if name.lower() in found else [stem for stem in found if stem.endswith("_" + name.lower())]
        if len(hits) > 1:
            raise InputError(f"{folder}: {found[hits[0]].name} and {found[hits[1]].name} could both be {name}; keep one export a folder")
        return found[hits[0]] if hits else None

    if not find("Image") or not (find("Nuclei") or find("Object")):
        lacks = "Nuclei" if find("Image") else "Image"
        raise InputError(f"{folder}: has no {lacks}.csv, it has {', '.join(p.name for p in found.values())}")
    csv_source(find("Image"), "Image")
    images = read_csv(find("Image"), dtype=str)
    if find("Nuclei"):
        return images, {o: csv_source(find(o), o) for o in OBJECTS if find(o)}
    return images, dict.fromkeys(OBJECTS, csv_source(find("Object"), None))


def open_sqlite(path):
    return closing(sqlite3.connect(f"file:{quote(str(Path(path).resolve()))}?mode=ro", uri=True))


def quoted(columns):
    return ", ".join(f'"{c}"' for c in columns)


def read_sqlite(path):
    """A file of ExportToDatabase, one table per object type or one for all -> (the Image table as text, {object: source})."""
    try:
        with open_sqlite(path) as connection:
            found = {}
            for (table,) in connection.execute("select name from sqlite_master where type in ('table', 'view') order by name").fetchall():
                match = re.fullmatch(r"(?:.*Per_)?(Image|Object|Nuclei|Cells|Cytoplasm)", table)
                if match and found.setdefault(match[1], table) != table:
                    raise InputError(f"{path}: {found[match[1]]} and {table} are two exports in one file; remove one")
            if "Image" not in found or not {"Object", "Nuclei"} & set(found):
                raise InputError(f"{path}: has no Per_Image with Per_Nuclei or Per_Object, expected a file of ExportToDatabase")
            names = {o: [row[1] for row in connection.execute(f'pragma table_info("{table}")')] for o, table in found.items()}
            used = [c for c in names["Image"] if c in KEYS or re.match(r"(Image_)?(FileName|Metadata)_", c)]
            rows = connection.execute(f'select {quoted(used)} from "{found["Image"]}"').fetchall()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: not a readable SQLite file ({error})") from None
    images = pd.DataFrame([["" if v is None else str(v) for v in row] for row in rows], columns=used)
    kinds = {o: o for o in OBJECTS if o in found} if "Nuclei" in found else dict.fromkeys(OBJECTS, "Object")
    return images, {o: {"path": path, "table": found[kind], "names": names[kind], "skip": 0} for o, kind in kinds.items()}


def read_chunks(source, columns):
    """The columns of a source (or of a frame) as frames of numbers, CHUNK rows at a time; anything else is refused by row and column."""
    if isinstance(source, pd.DataFrame):
        yield from (source[columns].iloc[i:i + CHUNK] for i in range(0, len(source), CHUNK))
        return
    path, table, names, skip = source["path"], source["table"], source["names"], source["skip"]
    done, where = skip + 1, f"{path}, table {table}" if table else path
    try:
        with open_sqlite(path) if table else nullcontext() as connection:
            if table:
                frames = pd.read_sql(f'select {quoted(columns)} from "{table}"', connection, chunksize=CHUNK)
            else:
                at = [names.index(c) for c in columns]
                frames = pd.read_csv(path, header=None, skiprows=skip, names=range(len(names)), usecols=at, chunksize=CHUNK,
                                     low_memory=False, encoding="utf-8-sig")
            for frame in frames:
                yield numbers(frame if table else frame[at].set_axis(columns, axis=1), where, done)
                done += len(frame)
    except (sqlite3.DatabaseError, pd.errors.DatabaseError) as error:
        raise InputError(f"{path}: not a readable SQLite file ({error})") from None
    except pd.errors.EmptyDataError:  # a header without rows: no objects
        return


def fill_features(target, names, pieces, after_chunk=lambda: None):
    """Reads all pieces and puts every row where it belongs: target (N, len(names)) float32, one row a cell."""
    column = {name: j for j, name in enumerate(names)}
    for source, columns, place in pieces:
        to, done = np.array([column[c] for c in columns]), 0
        for chunk in read_chunks(source, columns):
            cell = place[done:done + len(chunk)]
            target[cell[cell >= 0][:, None], to] = chunk.to_numpy(np.float32)[cell >= 0]
            done += len(chunk)
            after_chunk()


def keep_cells(cells, pieces, stay):
    """The cells of the mask `stay` (N,), and the pieces of their measurements."""
    new = np.append(np.where(stay, np.cumsum(stay) - 1, -1), -1)  # its last is where place -1 leads
    return cells[stay].reset_index(drop=True), [(source, columns, new[place]) for source, columns, place in pieces]


def read_keys(source, o, keys, fields, where):
    """What places and pairs the objects `o`: (frame sorted by field and number, its index the row in the source; rows of the source)."""
    wanted = {*keys, "ObjectNumber", *(f"{o}_{c}" for c in PAIRING)}
    used = [c for c in dict.fromkeys(source["names"]) if c in wanted]
    table = pd.concat([pd.DataFrame(columns=used, dtype=float), *read_chunks(source, used)], ignore_index=True)
    rows, number = len(table), next((c for c in (f"{o}_Number_Object_Number", f"{o}_ObjectNumber", "ObjectNumber") if c in table), None)
    if number is None:
        raise InputError(f"{where}: {o} has no column ObjectNumber, expected what CellProfiler exports")
    table = table.rename(columns=lambda c: c.removeprefix(o + "_")).assign(number=table[number])
    own = [c for c in table if c in PAIRING and c != "ObjectNumber"]
    table = table.dropna(subset=own, how="all")  # one table for all objects pads the fewer ones with empty rows
    table["image"] = fields.get_indexer(pd.MultiIndex.from_frame(table[keys].astype(float)))
    if (table["image"] < 0).any():
        stray = table["ImageNumber"][table["image"] < 0].iloc[0]
        raise InputError(f"{where}: objects of image {stray:.0f} ({o}) have no row in the Image table; export both again")
    table = table.sort_values(["image", "number"], kind="stable")
    if (twice := table.duplicated(["image", "number"])).any():
        raise InputError(f"{where}: {o} has object {table['number'][twice].iloc[0]:.0f} of one image twice; exported twice? keep one")
    return table, rows


def misplaced(source, o, table, rows, absent, features):
    """Up to 4.2 CellProfiler writes some columns (AreaShape, Texture) of the k objects of a field that exist into its first k rows, the
    others into the rows of their own numbers (its issues 4403, 4583): (names of such columns, rows (k,) bool of `table` that hold them).
    Such a column is empty in all of a field's last rows and filled in some row of an absent object."""
    there = pd.Series(~absent, table.index).groupby(table["image"]).transform("sum")
    first = (table.groupby("image").cumcount() < there).to_numpy()
    if not (absent & first).any():
        return [], first
    columns = features + [f"{o}_{c}" for c in BOX if c in table]
    tail, hole = (np.isin(np.arange(rows), table.index[mask]) for mask in (~first, absent & first))
    empty, filled, done = np.ones(len(columns), bool), np.zeros(len(columns), bool), 0
    for chunk in read_chunks(source, columns):
        there = chunk.notna().to_numpy()
        empty &= ~there[tail[done:done + len(chunk)]].any(0)
        filled |= there[hole[done:done + len(chunk)]].any(0)
        done += len(chunk)
    return [c for c, moved in zip(columns, empty & filled) if moved], first


def check_boxes(table, o, where):
    """An object's centre lies in its own bounding box; where not, its measurements are of others."""
    if {*BOX, "Location_Center_X", "Location_Center_Y"} <= set(table):
        x, y = table["Location_Center_X"], table["Location_Center_Y"]
        outside = (x < table[BOX[0]]) | (y < table[BOX[1]]) | (x > table[BOX[2]]) | (y > table[BOX[3]])
        if outside.any():
            first = table[outside].iloc[0]
            raise InputError(f"{where}: {outside.sum()} of {len(table)} {o} lie outside their own bounding box, first: image "
                             f"{first['ImageNumber']:.0f}, object {first['number']:.0f}; AreaShape is of others: measure again")


def pair_objects(images, sources, where, keep, report):
    """One export -> (cells: image (row of `images`), number, x, y; pieces), one row a nucleus that has a cell.
    Cells and cytoplasms go to their nucleus by Parent_Nuclei, never by number."""
    keys = [k for k in KEYS if k in images and all(k in s["names"] for s in sources.values())]
    if "ImageNumber" not in keys:
        raise InputError(f"{where}: a table has no column ImageNumber, expected what CellProfiler exports")
    fields = pd.MultiIndex.from_frame(numbers(images[keys], f"{where}, Image table").astype(float))
    if fields.has_duplicates:
        raise InputError(f"{where}: image {fields[fields.duplicated()][0][-1]:.0f} stands twice in the Image table; keep one export")

    nuclei, rows = read_keys(sources["Nuclei"], "Nuclei", keys, fields, where)
    check_boxes(nuclei, "Nuclei", where)
    centre = next((f for f in ("Location", "AreaShape") if f"{f}_Center_X" in nuclei and f"{f}_Center_Y" in nuclei), None)
    if not centre:
        raise InputError(f"{where}: Nuclei has neither Location_Center_X, _Y nor AreaShape_Center_X, _Y; export the positions too")
    cells = nuclei[["image", "number", f"{centre}_Center_X", f"{centre}_Center_Y"]].set_axis(["image", "number", "x", "y"], axis=1)
    cells = cells.astype({"image": int, "number": int}).reset_index(drop=True)
    known, has_cell, pieces = pd.MultiIndex.from_frame(nuclei[["image", "number"]]), np.ones(len(nuclei), bool), []
    for o, source in sources.items():
        features = [c for c in sort_columns(source["names"], keep)[0] if c.startswith(o + "_")]
        table, rows = (nuclei, rows) if o == "Nuclei" else read_keys(source, o, keys, fields, where)
        cell, moved, place, moved_place = np.arange(len(table)), [], np.full(rows, -1), np.full(rows, -1)
        if o != "Nuclei":
            if "Parent_Nuclei" not in table:
                raise InputError(f"{where}: {o} has no Parent_Nuclei, and numbers do not pair objects; export the Parent_ columns too")
            parent = table["Parent_Nuclei"].fillna(0).to_numpy()
            absent = parent == 0  # a cell without cytoplasm leaves a row
            cell = np.where(absent, -1, known.get_indexer(pd.MultiIndex.from_arrays([table["image"], parent])))
            if (twice := pd.Series(cell[cell >= 0]).duplicated()).any():
                image, nucleus = known[cell[cell >= 0][twice][0]]
                raise InputError(f"{where}: image {images['ImageNumber'].iloc[image]} has two {o} with parent nucleus {nucleus:.0f}; "
                                 "filter them in CellProfiler")
            moved, first = misplaced(source, o, table, rows, absent, features)
            box = [c for c in BOX if f"{o}_{c}" in moved]
            table.loc[~absent, box] = table.loc[first, box].to_numpy()  # as many rows, in the same order, in every field
            moved_place[table.index[first]] = cell[~absent]
            check_boxes(table[~absent], o, where)
            missing = ~np.isin(np.arange(len(known)), cell)
            by_number = int((parent != table["number"])[~absent].sum()) if source == sources["Nuclei"] else 0
            for count, text in (
                    (len(moved), f"columns of {o} stand beside the rows of absent objects (CellProfiler up to 4.2): moved back"),
                    (by_number, f"{o} stand beside another nucleus, CellProfiler paired them by number: paired again by Parent_Nuclei"),
                    (int(((cell < 0) & ~absent).sum()), f"{o} have a parent nucleus that is not in the Nuclei table: left out"),
                    (int((missing & has_cell).sum()),
                     "nuclei have no cell: left out" if o == "Cells" else f"cells have no {o}: its values are missing")):
                if count:
                    report.append(f"{where}: {count} {text}")
            if o == "Cells":
                has_cell = ~missing
        place[table.index] = cell
        pieces += [(source, [c for c in features if c not in moved], place), (source, [c for c in features if c in moved], moved_place)]
    return keep_cells(cells, [piece for piece in pieces if piece[1]], has_cell)


def read_export(path, channel=CHANNELS[0], keep=None, skip_bad=False):
    """What CellProfiler exported, without the measurements themselves: (cells, images, feature names, dropped, pieces, report).
    `path`: a folder of ExportToSpreadsheet, a folder of such folders, or a SQLite file of ExportToDatabase. cells: one row a nucleus with
    image (row of `images`), field (name of its file of `channel`, without ending), cell (field_number), x, y what `annotate` finds."""
    path, report = Path(path), []
    folders = sorted({p.parent for p in path.rglob("*") if p.suffix.lower() == ".csv"}) if path.is_dir() else [path]
    exports = [path] if path in folders else folders
    if not path.exists() or not exports or path.suffix.lower() == ".csv" and path.is_file():
        raise InputError(f"{path}: expected the folder of CellProfiler's CSV files or its SQLite file")
    all_cells, all_images, pieces, names, dropped, n = [], [], [], None, {}, 0
    for export in exports:
        try:
            images, sources = read_folder(export) if export.is_dir() else read_sqlite(export)
            images = images.rename(columns=lambda c: c.removeprefix("Image_"))
            cells, own = pair_objects(images, sources, export, keep, report)
            features = [c for o in OBJECTS for _, columns, _ in own for c in columns if c.startswith(o + "_")]
            if names is not None and set(features) != set(names):
                raise InputError(f"{export}: has other features than the exports before it, e.g. {min(set(features) ^ set(names))}; "
                                 "export all with one pipeline")
        except InputError as error:
            if not skip_bad or len(exports) == 1:
                raise
            report.append(f"skipped {error}")
            continue
        if names is None:
            names = sorted(features, key=[c for o in sources for c in sources[o]["names"]].index)
            dropped = sort_columns([c for s in sources.values() for c in s["names"]], keep)[1]
            report += [f"{export}: no table of {o}, so no {o}_ features" for o in OBJECTS if o not in sources]
        for c in [c for c in images if c.startswith("FileName_")]:
            images[c] = images[c].str.replace(r".*[/\\]", "", regex=True)
        file = images.get(f"FileName_{channel}", next((images[c] for c in images if c.startswith("FileName_")), None))
        images["field"] = export.stem + "_" + images["ImageNumber"] if file is None else file.str.replace(r"\.\w+$", "", regex=True)
        cells["image"] += sum(map(len, all_images))
        pieces += [(source, columns, np.where(place >= 0, place + n, -1)) for source, columns, place in own]
        n += len(cells)
        all_cells.append(cells), all_images.append(images)
    if not n:
        raise InputError(f"{path}: no cell in it" + (f"; {report[-1]}" if report else ""))
    cells, images = pd.concat(all_cells, ignore_index=True), pd.concat(all_images, ignore_index=True).fillna("")
    if (twice := images["field"].duplicated()).any():
        raise InputError(f"{path}: image file {images['field'][twice].iloc[0]!r} stands in two rows of the Image tables; keep one export")
    if empty := int((~images.index.isin(cells["image"])).sum()):
        report.append(f"{path}: {empty} of {len(images)} fields have no cells")
    told = annotate(images).drop(columns="cell", errors="ignore").assign(field=images["field"]).iloc[cells["image"]].reset_index(drop=True)
    cells = pd.concat([cells[["image", "x", "y"]], told], axis=1)
    cells.insert(0, "cell", cells["field"] + "_" + pd.concat(all_cells)["number"].astype(str).to_numpy())
    return cells, images, names, dropped, pieces, report


def read_table(path, channel=CHANNELS[0]):
    """A table of measurements, one row a cell, for model.generate: any CSV with CellProfiler's prefixed names, or an export (read_export).
    Returns a frame with `cell` (a name), what is known of plate and treatment, and the features; memory holds it whole."""
    if Path(path).is_file() and re.search(r"\.csv(\.gz)?$", str(path), re.IGNORECASE):
        table = read_csv(path)
        features = sort_columns(table.columns)[0]
        cells = annotate(table).assign(**{"cell": lambda t: t["cell"] if "cell" in t else np.arange(len(t))}).astype(str)
        return pd.concat([cells, numbers(table[features], path)], axis=1)
    cells, _, names, _, pieces, _ = read_export(path, channel)
    values = np.full((len(cells), len(names)), np.nan, np.float32)
    fill_features(values, names, pieces)
    return pd.concat([cells.drop(columns="image"), pd.DataFrame(values, columns=names)], axis=1)
