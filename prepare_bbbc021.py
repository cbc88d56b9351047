"""Make a prepared folder (see data.py): patches and CellProfiler measurements of single cells.

    python prepare_bbbc021.py --simulate --out out/                                    # simulated cells, no download
    python prepare_bbbc021.py --crops DIR --features features.csv.gz --out real/       # BBBC021 crops as they circulate
    python prepare_bbbc021.py --images DIR --cellprofiler EXPORT \\
        --image-csv BBBC021_v1_image.csv --moa BBBC021_v1_moa.csv --out real/          # whole fields (BBBC021 or your own)
    python prepare_bbbc021.py --images DIR --out real/                                 # fields alone: cells are measured here
    python prepare_bbbc021.py --simulate --write-release DIR                           # fields and tables to try that on
    python prepare_bbbc021.py --simulate 700 --depth 16 --size 32 --out stacks/        # z-stacks with one of several structures

Work goes to OUT.partial and becomes OUT when it is whole; an interrupted preparation starts again. Only measuring fields, which
takes hours, goes on where it was: OUT.measured holds a folder for each field that is done.
"""
import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.ndimage as ndi
import torch
from PIL import Image

import data
from data import (
    CELL,
    CELL_COLUMNS,
    CHANNELS,
    FULL_SCALE,
    NUCLEUS,
    SIZE,
    SOLVENT,
    InputError,
    annotate,
    numbers,
    read_csv,
    sort_columns,
)

MAX_MISSING = 0.05      # share of cells without a value, above which a feature is dropped
CLIP = 10.0             # standard deviations (model.CLIP): here only counted
WHITE = 0.999           # quantile of the training pixels that image value 1 stands for with --image-norm percentile


# ---------------------------------------------------------------------------------------------------------------------
# A simulated BBBC021: caricatures of MCF7 cells whose true parameters are the CellProfiler columns

SPAN = (444, 572)       # pixels, height and width of the part of a field where nuclei lie; half a crop stands around it
CELLS_PER_FIELD = 32
APART = 42              # pixels, least distance of two nuclei
WINDOW = 112            # pixels, side of the square in which one cell is drawn
BACKGROUND = np.float32([[[0.010]], [[0.020]], [[0.016]]])      # DAPI, Tubulin, Actin, in CellProfiler's 0..1
NOISE = 0.003           # standard deviation of the camera's noise, same unit

# What the renderer reads, with the mean over DMSO cells and the spread between cells: a factor's log-sd; of an eccentricity the sd.
PARAMETERS = {
    "Nuclei_AreaShape_Area": (850, 0.16),                       # pixels
    "Nuclei_AreaShape_Eccentricity": (0.62, 0.12),
    "Nuclei_AreaShape_Orientation": (0, 90),                    # degrees, -90..90 from the vertical, down-right positive
    "Nuclei_Intensity_MeanIntensity_DAPI": (0.12, 0.15),
    "Nuclei_Intensity_StdIntensity_DAPI": (0.022, 0.20),
    "Cytoplasm_AreaShape_Area": (1700, 0.20),                   # pixels, cell without nucleus
    "Cells_AreaShape_Eccentricity": (0.60, 0.12),
    "Cells_AreaShape_Orientation": (0, 25),                     # sd from the nucleus' direction
    "Cytoplasm_Intensity_MeanIntensity_Tubulin": (0.11, 0.18),
    "Cytoplasm_Intensity_StdIntensity_Tubulin": (0.032, 0.18),
    "Cytoplasm_Intensity_MeanIntensity_Actin": (0.08, 0.18),
    "Cytoplasm_Intensity_StdIntensity_Actin": (0.024, 0.18),
}
NOISE_COLUMNS = [f"Nuclei_Noise_{i}" for i in range(4)]         # no picture shows these: what a generator must not render

# Mechanism: two compounds of BBBC021 (with uM), and factors on the parameters (as `short` calls them), after real medians.
MECHANISMS = {
    "Actin disruptors": (
        ("latrunculin B", 3), ("cytochalasin B", 10),
        {"Cytoplasm_Area": 0.62, "Std_Actin": 2.0}),
    "Aurora kinase inhibitors": (
        ("AZ258", 1), ("AZ841", 0.3),
        {"Nuclei_Area": 1.65, "Mean_DAPI": 0.8, "Std_DAPI": 1.3}),
    "Cholesterol-lowering": (
        ("simvastatin", 6), ("mevinolin/lovastatin", 5),
        {"Cytoplasm_Area": 0.42, "Mean_Tubulin": 1.25}),
    "DNA damage": (
        ("mitomycin C", 1), ("etoposide", 3),
        {"Nuclei_Area": 1.25, "Cytoplasm_Area": 1.3, "Std_DAPI": 1.2}),
    "DNA replication": (
        ("camptothecin", 0.003), ("methotrexate", 10),
        {"Nuclei_Area": 1.22, "Mean_DAPI": 0.78}),
    "Eg5 inhibitors": (
        ("AZ-C", 0.1), ("AZ138", 0.1),
        {"Nuclei_Area": 0.75, "Mean_DAPI": 1.44, "Std_DAPI": 1.5, "Mean_Tubulin": 1.3}),
    "Epithelial": (
        ("PP-2", 3), ("AZ-J", 1),
        {"Cytoplasm_Area": 1.25, "Mean_Actin": 1.5, "Std_Actin": 1.3}),
    "Kinase inhibitors": (
        ("PD-169316", 3), ("alsterpaullone", 0.1),
        {"Mean_Actin": 0.68, "Std_Actin": 0.7, "Std_Tubulin": 1.3}),
    "Microtubule destabilizers": (
        ("nocodazole", 1), ("colchicine", 0.03),
        {"Mean_Tubulin": 0.55, "Std_Tubulin": 0.45, "Nuclei_Area": 0.9}),
    "Microtubule stabilizers": (
        ("taxol", 0.3), ("docetaxel", 0.1),
        {"Mean_Tubulin": 1.5, "Std_Tubulin": 1.9, "Std_DAPI": 1.4}),
    "Protein degradation": (
        ("MG-132", 0.1), ("ALLN", 3),
        {"Nuclei_Area": 0.8, "Cytoplasm_Area": 0.75, "Mean_Tubulin": 1.2}),
    "Protein synthesis": (
        ("emetine", 0.1), ("cyclohexamide", 5),
        {"Mean_Actin": 0.6, "Mean_Tubulin": 0.75, "Nuclei_Area": 0.92}),
}
RELEASED = {             # columns of cells.csv, as BBBC021_v1_image.csv calls them
    "plate": "Image_Metadata_Plate_DAPI",
    "well": "Image_Metadata_Well_DAPI",
    "replicate": "Replicate",
    "compound": "Image_Metadata_Compound",
    "concentration": "Image_Metadata_Concentration",
}
LOWER_DOSES = {"latrunculin B": (1, 0.6), "taxol": (0.03, 0.5)}      # uM, share of the full effect


def simulated_plates(seed):
    """One row a well (plate, well, replicate, compound, concentration, strength, moa): 4 weeks x 3 plates, 3 DMSO wells each.
    As in BBBC021 a compound lives in one week, on three replicate plates."""
    wells = []
    for week in range(4):
        treatments = []         # compound, concentration, strength, moa
        strength = 1.0 if week < 2 else 0.85
        first = week % 2 * 6
        for moa in list(MECHANISMS)[first:first + 6]:
            compound, dose = MECHANISMS[moa][week // 2]
            treatments.append((compound, dose, strength, moa))
            if compound in LOWER_DOSES:
                treatments.append((compound, *LOWER_DOSES[compound], moa))
        treatments += [(SOLVENT, 0, 0.0, SOLVENT)] * 3
        for replicate in range(3):
            plate = f"Week{week + 1}_sim{3 * week + replicate + 1:02d}"
            order = np.random.default_rng([seed, 1, week, replicate]).permutation(len(treatments))
            for k, j in enumerate(order):
                well = f"{'BCDEFG'[k % 6]}{2 + k // 6:02d}"
                wells.append((plate, well, str(replicate + 1), *treatments[j]))
    names = "plate well replicate compound concentration strength moa"
    return pd.DataFrame(wells, columns=names.split())


def simulate_table(n, seed, size=SIZE):
    """n simulated cells -> (cells frame with x, y in pixels of their field, features frame with all true columns)."""
    wells = simulated_plates(seed)
    sites = math.ceil(n / (len(wells) * CELLS_PER_FIELD))
    well = np.arange(len(wells)).repeat(sites)          # of each field
    fields = wells.loc[well].reset_index(drop=True)
    site = fields.index % sites + 1
    fields["site"] = site.astype(str)
    fields["field"] = fields["plate"] + "_" + fields["well"] + "_s" + fields["site"]

    bounds = np.linspace(0, n, len(fields) + 1).round().astype(int)
    share = np.diff(bounds)                             # cells of each field
    cells = fields.loc[fields.index.repeat(share)].reset_index(drop=True)
    number = cells.groupby("field").cumcount()
    cells["cell"] = cells["field"] + "_" + number.astype(str)
    places = [scatter(k, [seed, 2, i], size) for i, k in enumerate(share)]
    cells[["x", "y"]] = np.concatenate(places)
    return cells, simulate_features(cells, wells, well.repeat(share), seed)


def simulate_features(cells, wells, well, seed):
    """The true features of simulated cells, well (N,): the row of `wells` of each. A cell differs by chance, by its treatment, its
    well, and by the staining and lamp of its plate."""
    random = np.random.default_rng([seed, 3])
    plates = wells["plate"].unique()
    gain = random.normal(0, 0.12, (len(plates), 3))
    gain = pd.DataFrame(np.exp(gain), plates, CHANNELS)
    well_effect = random.normal(0, 0.03, (len(wells), len(PARAMETERS)))         # log
    table = pd.DataFrame(index=cells.index)
    for j, (name, (centre, spread)) in enumerate(PARAMETERS.items()):
        z = random.normal(size=len(cells)).clip(-2.5, 2.5)
        if name == "Nuclei_AreaShape_Orientation":
            table[name] = random.uniform(-spread, spread, len(cells))
        elif name == "Cells_AreaShape_Orientation":
            angle = table["Nuclei_AreaShape_Orientation"] + spread * z
            table[name] = (angle + 90) % 180 - 90
        elif name.endswith("Eccentricity"):
            table[name] = np.clip(centre + spread * z, 0.1, 0.92)
        else:
            effect = {SOLVENT: 1}
            for moa, (*_, factors) in MECHANISMS.items():
                effect[moa] = factors.get(short(name), 1)
            factor = cells["moa"].map(effect) ** cells["strength"]
            chance = np.exp(spread * z + well_effect[well, j])
            table[name] = centre * factor * chance
            channel = name.split("_")[-1]
            if channel in gain:
                table[name] *= cells["plate"].map(gain[channel])
    add_derived(table)
    table[NOISE_COLUMNS] = random.normal(size=(len(cells), len(NOISE_COLUMNS)))
    return table


def short(name):
    """Cytoplasm_Intensity_StdIntensity_Actin -> Std_Actin, Nuclei_AreaShape_Area -> Nuclei_Area."""
    return re.sub(r".*_(Mean|Std)Intensity_", r"\1_", name).replace("_AreaShape_", "_")


def add_derived(table):
    """Adds the columns that follow from the renderer's parameters: what CellProfiler would report beside them."""
    nucleus = table["Nuclei_AreaShape_Area"]
    table["Cells_AreaShape_Area"] = nucleus + table["Cytoplasm_AreaShape_Area"]
    table["Nuclei_Intensity_IntegratedIntensity_DAPI"] = nucleus * table["Nuclei_Intensity_MeanIntensity_DAPI"]
    for shape in ("Nuclei_AreaShape_", "Cells_AreaShape_"):
        a, b = half_axes(table[shape + "Area"], table[shape + "Eccentricity"])
        angle = np.radians(table[shape + "Orientation"])
        sin = np.sin(angle)
        cos = np.cos(angle)
        table[shape + "MajorAxisLength"] = 2 * a
        table[shape + "MinorAxisLength"] = 2 * b
        table[shape + "InertiaTensor_0_0"] = ((a * sin) ** 2 + (b * cos) ** 2) / 4
        table[shape + "InertiaTensor_1_1"] = ((a * cos) ** 2 + (b * sin) ** 2) / 4
        table[shape + "InertiaTensor_0_1"] = (b ** 2 - a ** 2) * sin * cos / 4


def half_axes(area, eccentricity):
    """a >= b (pixels) of the ellipse with that area (pixels) and eccentricity."""
    ratio = np.sqrt(1 - eccentricity ** 2)
    return np.sqrt(area / (np.pi * ratio)), np.sqrt(area * ratio / np.pi)


def scatter(k, seed, size):
    """k places (x, y) in a field, APART pixels from each other and far enough from the edge for a crop."""
    random = np.random.default_rng(seed)
    margin = size / 2 + 1           # pixels
    high = np.add(SPAN[::-1], size - margin)
    places = np.empty((0, 2))
    while len(places) < k:
        place = random.uniform(margin, high)
        apart = np.hypot(*(places - place).T)
        if (apart > APART).all():
            places = np.vstack([places, place])
    return places


def waves(random, row, col, k, low, high):
    """A smooth random texture (N, S, S): k plane waves, wavelengths low..high pixels. -|waves| is bright along lines: filaments."""
    total = 0
    turn = 2 * np.pi
    for wave in random.uniform((0, low, 0), (turn, high, turn), (k, len(row), 1, 1, 3)):
        direction, length, phase = np.moveaxis(wave, -1, 0)         # (N, 1, 1) each
        along = row * np.cos(direction) + col * np.sin(direction)
        total += np.sin(along * (turn / length) + phase)
    return total


def ellipse(random, row, col, area, eccentricity, orientation, bumps, soft):
    """(coverage (N, S, S) 0..1 with an edge `soft` pixels wide, distance from the centre in units of the radius)."""
    a, b = half_axes(area, eccentricity)
    t = np.radians(orientation)
    along = row * np.cos(t) + col * np.sin(t)
    across = col * np.cos(t) - row * np.sin(t)
    q = np.hypot(along / a, across / b)
    angle = np.arctan2(col, row)
    each = len(row), 1, 1
    for k in (3, 5):            # bumps that leave area, centre and direction alone to first order
        height = bumps * random.uniform(0.5, 1, each)
        phase = random.uniform(0, 2 * np.pi, each)
        q = q * (1 + height * np.cos(k * angle + phase))
    inside = (1 - q) * np.sqrt(a * b)                   # pixels
    return np.clip(inside / soft + 0.5, 0, 1), q


def fill(mask, pattern, mean, sd):
    """mean + sd * pattern, the pattern brought to mean 0 and sd 1 over the mask (pixels more than half covered)."""
    inside = mask > 0.5
    over = {"axis": (1, 2), "keepdims": True}
    count = inside.sum(**over).clip(1)
    centred = pattern - (pattern * inside).sum(**over) / count
    variance = (centred ** 2 * inside).sum(**over) / count
    spread = np.sqrt(variance).clip(1e-9)
    return np.clip(mean + sd * centred / spread, 0, None)


def draw_cells(table, offset, seed, window=WINDOW):
    """Draws each row of `table` (the columns of PARAMETERS) alone, without background: pictures (N, 3, window, window) float32
    in CellProfiler's 0..1, and how much of each pixel the cell covers (N, window, window). offset (N, 2): row and column of the
    nucleus' centre from the middle of the window, pixels. seed: what the parameters leave open (fibres, texture, bumps).
    Mean and standard deviation of the intensities are exact over the drawn compartments."""
    p = {short(name): table[name].to_numpy()[:, None, None] for name in PARAMETERS}     # {Mean_DAPI: (N, 1, 1), ...}
    grid = np.arange(window) - (window - 1) / 2
    row = grid[:, None] - offset[:, 0, None, None]      # (N, window, 1)
    col = grid - offset[:, 1, None, None]               # (N, 1, window)
    place = np.random.default_rng(seed), row, col

    whole = p["Nuclei_Area"] + p["Cytoplasm_Area"]
    nucleus, q_nucleus = ellipse(
        *place,
        p["Nuclei_Area"],
        p["Nuclei_Eccentricity"],
        p["Nuclei_Orientation"],
        bumps=0.03,
        soft=3,
    )
    cell, q_cell = ellipse(
        *place,
        whole,
        p["Cells_Eccentricity"],
        p["Cells_Orientation"],
        bumps=0.07,
        soft=4,
    )
    cell = np.maximum(cell, nucleus)
    cytoplasm = cell * (1 - nucleus)

    chromatin = -np.abs(waves(*place, 4, 12, 26)) - 1.2 * q_nucleus ** 2
    dapi = nucleus * fill(nucleus, chromatin, p["Mean_DAPI"], p["Std_DAPI"])

    fibres = -0.5 * np.abs(waves(*place, 3, 16, 34))
    fibres -= 0.35 * np.abs(waves(*place, 3, 9, 16))
    tubulin = fill(cytoplasm, fibres - 2.5 * q_cell, p["Mean_Tubulin"], p["Std_Tubulin"])
    tubulin = tubulin * cytoplasm + 0.8 * p["Mean_Tubulin"] * nucleus

    depth = (1 - q_cell) * np.sqrt(whole / np.pi)       # pixels under the edge
    rim = np.exp(-(depth / 3.5) ** 2)
    cortex = 1.5 * rim - 0.4 * np.abs(waves(*place, 3, 10, 30))
    actin = fill(cytoplasm, cortex, p["Mean_Actin"], p["Std_Actin"])
    actin = actin * cytoplasm + 0.7 * p["Mean_Actin"] * nucleus

    pictures = np.stack([dapi, tubulin, actin], 1).astype(np.float32)
    return pictures, cell.astype(np.float32)


def render(table, seed=0, size=SIZE):
    """The simulator as a perfect generator: true parameters -> (N, 3, size, size) float32 in CellProfiler's 0..1, no noise."""
    x, _ = draw_cells(table, np.zeros((len(table), 2)), seed, size)
    return x + BACKGROUND


def simulate_field(table, x, y, seed, size):
    """Simulated cells at x (columns) and y (rows), pixels -> a field (3, H, W) uint16, 12-bit values in the high bits, as BBBC021."""
    place = np.stack([y, x], 1) - (WINDOW - 1) / 2
    corner = np.floor(place)                            # of each cell's window: row, column
    drawn, covers = draw_cells(table, place - corner, seed)

    shape = np.add(SPAN, size + 2 * WINDOW)             # with a margin for cells that reach beyond the field
    canvas = np.zeros((3, *shape), np.float32)
    for picture, cover, (r, c) in zip(drawn, covers, corner.astype(int) + WINDOW):
        view = canvas[:, r:r + WINDOW, c:c + WINDOW]
        np.maximum(view[0], picture[0], out=view[0])    # nuclei shine through
        over = view[1:] * (1 - cover) + picture[1:]
        lit = picture[1:].sum(0) > 0
        view[1:] = np.where(lit, over, view[1:])
    field = canvas[:, WINDOW:-WINDOW, WINDOW:-WINDOW] + BACKGROUND
    camera = np.random.default_rng(seed).standard_normal(field.shape, dtype=np.float32)
    field = field + NOISE * np.sqrt(1 + 8 * field) * camera             # read-out and photons
    bits = (field.clip(0, 1) * 4095).round()
    return bits.astype(np.uint16) * 16


def simulated_fields(cells, table, seed):
    """For each field the rows of its cells, and what `simulate_field` draws it from: (rows, (table, x, y, seed))."""
    for rows in cells.groupby("field", sort=False).indices.values():
        x, y = cells.loc[rows, ["x", "y"]].to_numpy().T
        yield rows, (table.loc[rows], x, y, [seed, 5, rows[0]])


def write_release(folder, n, seed, size):
    """n simulated cells as BBBC021 and CellProfiler write them: images/, BBBC021_v1_image.csv and _moa.csv, cellprofiler/*.csv."""
    cells, table = simulate_table(n, seed, size)
    export = folder / "cellprofiler"
    export.mkdir(parents=True)
    per_field = cells.groupby("field", sort=False)
    fields = per_field.head(1).reset_index(drop=True)
    image = pd.DataFrame({"ImageNumber": fields.index + 1})
    week = fields["plate"].str.split("_").str[0]
    for name, wave in zip(CHANNELS, ("w1", "w2", "w4")):
        image[f"FileName_{name}"] = fields["field"] + f"_{wave}.tif"
        image[f"PathName_{name}"] = week + "/" + fields["plate"]
    write_csv(image, export / "Image.csv")

    released = image.set_index("ImageNumber").add_prefix("Image_").reset_index()
    released.insert(0, "TableNumber", 0)
    told = fields[list(RELEASED)].set_axis(RELEASED.values(), axis=1)
    write_csv(released.join(told), folder / "BBBC021_v1_image.csv", float_format="%.6f")
    moa = fields[["compound", "concentration", "moa"]].drop_duplicates()
    write_csv(moa, folder / "BBBC021_v1_moa.csv", lineterminator="\r")          # as the real one

    for i, (_, what) in enumerate(simulated_fields(cells, table, seed)):
        plate = folder / "images" / image["PathName_DAPI"][i]
        plate.mkdir(parents=True, exist_ok=True)
        for name, channel in zip(CHANNELS, simulate_field(*what, size)):
            Image.fromarray(channel).save(plate / image[f"FileName_{name}"][i])

    # As in real exports the numbers of cells and cytoplasms are not those of their nuclei: Parent_ columns tell
    nucleus = per_field.cumcount() + 1
    last = per_field["cell"].transform("size")
    keys = pd.DataFrame({"ImageNumber": per_field.ngroup() + 1, "ObjectNumber": nucleus})
    placed = keys.assign(Location_Center_X=cells["x"], Location_Center_Y=cells["y"])
    write_objects(placed, table, export, "Nuclei")
    keys["Parent_Nuclei"] = nucleus
    keys["ObjectNumber"] = last + 1 - nucleus
    write_objects(keys, table, export, "Cells")
    keys["ObjectNumber"] = nucleus % last + 1
    write_objects(keys, table, export, "Cytoplasm")


def write_objects(keys, table, export, name, **options):
    """One compartment's CSV as CellProfiler writes it: `keys` (ImageNumber, ...) and the features of `table` named after it."""
    own = table.filter(regex=f"^{name}_")
    own.columns = own.columns.str.removeprefix(name + "_")
    rows = keys.join(own).sort_values(["ImageNumber", "ObjectNumber"])
    write_csv(rows, export / f"{name}.csv", **options)


def write_csv(table, path, **options):
    """A table as a CSV, the same bytes on every system."""
    table.to_csv(path, **{"index": False, "encoding": "utf-8", "lineterminator": "\n", **options})


# ---------------------------------------------------------------------------------------------------------------------
# CellProfiler's exports: a folder of ExportToSpreadsheet, a folder of such folders, or a SQLite file of ExportToDatabase.
# Cells and cytoplasms go to their nucleus by Parent_ columns; the numbers of an image's objects pair nothing.

OBJECTS = ("Nuclei", "Cells", "Cytoplasm")
NUMBERS = ("TableNumber", "ImageNumber", "ObjectNumber")
CENTRE = ["Location_Center_X", "Location_Center_Y"]
BOX = [
    "AreaShape_BoundingBoxMinimum_X",
    "AreaShape_BoundingBoxMinimum_Y",
    "AreaShape_BoundingBoxMaximum_X",
    "AreaShape_BoundingBoxMaximum_Y",
]
PLACE = "Number_Object_Number|Parent_.*|AreaShape_BoundingBoxM.*|Location_Center_[XY]"
ROWS = 20_000                               # read at once: SQLite's values of 900 columns take 0.6 GB then


@dataclass
class Export:
    """What CellProfiler exported: N cells with F measurements."""
    cells: pd.DataFrame     # N rows: cell, image (row of .images), x, y, field, and what else images tell: plate, ...
    images: pd.DataFrame    # the Image table as text, a row a field: field, FileName_*, PathName_*, Metadata_*, ...
    values: np.ndarray      # (N, F) float32 in CellProfiler's units, NaN where missing
    names: list             # F names: Nuclei_AreaShape_Area
    dropped: dict           # {column: why it is no measurement}
    report: list            # lines to print


def objects_argument(text):
    """--objects Nuclei=FilteredNuclei,Cells=... -> {"Nuclei": "FilteredNuclei", ...}: an argparse type."""
    if not re.fullmatch(r"((Nuclei|Cells|Cytoplasm)=\w+(,(?=.)|$))+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected Nuclei=NAME,Cells=NAME,Cytoplasm=NAME or some")
    return dict(pair.split("=") for pair in text.split(","))


# Tables: frames with the columns ImageNumber, ObjectNumber, Nuclei_AreaShape_Area, Cells_Parent_Nuclei, ...


def is_table(path):
    """Whether a file is a table of text; hidden ones are none (macOS leaves ._Image.csv beside Image.csv)."""
    return path.suffix.lower() in (".csv", ".txt", ".tsv") and not path.name.startswith(".")


def is_combined(path):
    """Whether a CSV has two header rows, object and measurement: a combined table, whatever its name."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        file.readline()
        return "ImageNumber" in file.readline()


def is_sqlite(path):
    """Whether a file is a SQLite database."""
    with open(path, "rb") as file:
        return file.read(15) == b"SQLite format 3"


def query(path, text, dtype=None):
    """What a SQLite file answers, in frames of ROWS."""
    try:
        with closing(sqlite3.connect(path)) as sql:
            yield from pd.read_sql(text, sql, dtype=dtype, chunksize=ROWS)
    except (sqlite3.DatabaseError, pd.errors.DatabaseError) as error:
        raise InputError(f"{path}: not a readable SQLite file ({error})") from None


def list_tables(path):
    """The tables of one export: {table or file: its name in lower case}; a combined CSV is called object."""
    if path.is_file():
        text = "select name from sqlite_master where type in ('table', 'view')"
        names = pd.concat(query(path, text))["name"]
        return dict(zip(names, names.str.lower()))
    tables = {}
    for file in filter(is_table, sorted(path.iterdir())):
        tables[file.name] = "object" if is_combined(file) else file.stem.lower()
    return tables


def find_tables(names, objects, where):
    """{table: name in lower case} -> {Nuclei, ..., Image: table}. Names may have a prefix: MyExpt_Nuclei, MyExpt_Per_Nuclei."""
    tables = {}
    for kind in (*objects.values(), "Object", "Image"):
        name = kind.lower()
        found = [table for table in names if names[table] == name]      # goes before names with a prefix
        found = found or [table for table in names if names[table].endswith("_" + name)]
        if len(found) > 1:
            raise InputError(f"{where}: {found[0]} and {found[1]} could both be {kind}; keep one")
        if found:
            tables[kind] = found[0]
    return tables


def check_rows(path):
    """Refuses a CSV with a row of another width than its header: pandas fills short rows and cuts long ones unsaid."""
    read_csv(path, nrows=0, dtype=str)      # says what it is, if it is no CSV
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            width = len(next(rows))
            for number, row in enumerate(rows, 2):
                if row and len(row) != width:
                    raise InputError(f"{path}: row {number} has {len(row)} fields, the header {width}; "
                                     "damaged? export it again")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from None


def read_parts(path, table, owner, dtype=None):
    """The rows of one export's table in frames of ROWS, their columns named after `owner` or as a combined CSV says."""
    if path.is_file():
        yield from query(path, f'select * from "{table}"', dtype)
        return
    file = path / table
    check_rows(file)
    header = [0, 1] if is_combined(file) else 0
    options = {"chunksize": ROWS, "keep_default_na": not dtype, "low_memory": False}
    for part in pd.read_csv(file, header=header, dtype=dtype, **options):
        if part.columns.nlevels > 1:
            yield part.set_axis(part.columns.map("_".join), axis=1)
        else:
            yield part.add_prefix(owner + "_")


def plain_name(column, objects):
    """FilteredNuclei_AreaShape_Area -> Nuclei_AreaShape_Area, by `objects`; Image_ImageNumber -> ImageNumber;
    a column of anything else -> ''."""
    key = column.rpartition("_")[2]
    if key in NUMBERS:
        return key
    for o, name in objects.items():
        if column.startswith(name + "_"):
            return o + column.removeprefix(name)
    return ""


def join_parts(parts, where, objects, keep, dropped):
    """Parts of a table as one frame of numbers: measurements float32, what pairs and places objects float64.
    Other columns go into `dropped`."""
    frames = []
    row = 1                                 # below the header
    for part in parts:
        part = part.set_axis([plain_name(c, objects) for c in part], axis=1)
        features, others, _ = sort_columns(part, keep)
        dropped.update(others)
        is_place = part.columns.str.fullmatch(rf"[A-Za-z]+Number|[A-Za-z]+_({PLACE})")
        dtypes = dict.fromkeys(features, np.float32) | dict.fromkeys(part.columns[is_place], float)
        part = part[list(dtypes)]
        if part.columns.has_duplicates:
            raise InputError(f"{where}: ImageNumber or ObjectNumber stands twice; remove one")
        frames.append(numbers(part, where, row).astype(dtypes))
        row += len(part)
    return pd.concat(frames, ignore_index=True).copy()      # hundreds of separate columns are slow


def read_tables(path, objects, keep, dropped):
    """One export -> (its Image table as text, {object: frame})."""
    found = list_tables(path)
    tables = find_tables(found, objects, path)
    image = tables.pop("Image", None)
    frames = {}
    for owner, table in tables.items():
        parts = read_parts(path, table, owner)
        frame = join_parts(parts, f"{path}, {table}", objects, keep, dropped)
        for o in OBJECTS:
            if frame.columns.str.startswith(o + "_").any():
                frames.setdefault(o, frame)
    if "Nuclei" not in frames or not image:
        raise InputError(f"{path}: expected the tables Image and {objects['Nuclei']}, found {list(found)}; "
                         "objects of other names: --objects Nuclei=...,Cells=...,Cytoplasm=...")
    images = pd.concat(read_parts(path, image, "Image", object), ignore_index=True).copy()
    images.columns = images.columns.str.replace("^(Image_)+", "", regex=True)
    return images, frames


# Objects


def need(table, columns, what):
    """InputError if a table lacks a column."""
    for c in columns:
        if c not in table:
            raise InputError(f"{what} has no column {c}; export it, too")


def counted(objects, what):
    """[How many objects there are of a kind, and the first], or [] if there are none."""
    if objects.empty:
        return []
    row = objects.iloc[0]
    return [f"{what}: {len(objects)}, first: object {row.ObjectNumber:.0f} of image {row.ImageNumber:.0f}"]


def refuse(objects, what):
    """InputError that names the first of the objects, if there are any."""
    for line in counted(objects, what):
        raise InputError(line)


def own_objects(frame, o, fields, where):
    """The objects `o` of a table, sorted by field (row of the Image table) and number; only measurements keep the name of `o`."""
    own = frame.filter(regex=f"^{o}_|^[A-Z][a-z]+Number$")
    plain = own.columns.str.removeprefix(o + "_")
    is_place = plain.str.fullmatch(PLACE)
    own = own.set_axis(plain.where(is_place, own.columns), axis=1)
    # a combined table is as long as its most frequent object; the others end with empty rows
    own = own.dropna(subset=plain[is_place], how="all")
    if "Number_Object_Number" in own:
        own = own.assign(ObjectNumber=own["Number_Object_Number"])
    need(own, NUMBERS[1:], f"{where}: {o}")
    own = own.merge(fields, how="left")     # on ImageNumber, and TableNumber where both have it
    refuse(own[own["field"].isna()], f"{where}: {o} without a row in the Image table; export both again")
    twice = own.filter(NUMBERS).duplicated()
    refuse(own[twice], f"{where}: {o} or their images stand twice in their table; exported twice? keep one")
    return own.sort_values(["field", "ObjectNumber"], ignore_index=True)


def by_field(frame, column):
    """The index of `frame` as a Series that is looked up by field and a number in it."""
    return pd.Series(frame.index, pd.MultiIndex.from_frame(frame[["field", column]]))


def ways_to_nuclei(nuclei, objects):
    """{column: by_field} of what tells a nucleus: Parent_Nuclei, or a parent that each nucleus has for itself."""
    ways = {"Parent_" + objects["Nuclei"]: by_field(nuclei, "ObjectNumber")}
    for c in nuclei.filter(like="Parent_"):
        if not nuclei.duplicated(["field", c]).any():
            ways.setdefault(c, by_field(nuclei, c))
    return ways


def find_nuclei(frame, o, ways, where):
    """The row of the nucleus of each object (-1: none), and which objects are absent: a cell without cytoplasm leaves a row."""
    by = [c for c in ways if c in frame]
    if not by:
        found = list(frame.filter(like="Parent_"))
        raise InputError(f"{where}: {o} has no {' or '.join(ways)}, and numbers do not pair objects; "
                         f"found {found}; export that column, too, or give --objects")
    parent = frame[by[0]]
    absent = ~(parent > 0)
    row = ways[by[0]].reindex(pd.MultiIndex.from_arrays([frame["field"], parent]))
    row = row.fillna(-1).mask(absent.to_numpy(), -1).to_numpy(int)
    twice = pd.Series(row).duplicated() & (row >= 0)
    refuse(frame[twice], f"{where}: {o} have the same {by[0]} as another; filter them in CellProfiler")
    return row, absent


def move_back(frame, absent):
    """Puts back in place what CellProfiler up to 4.2 moves up (its issues 4403, 4583); names of these columns.
    It writes AreaShape (but Feret and Zernike) and Texture of the k objects that exist in a field into the field's
    first k rows, and nothing into the last, as a radius 0. Known by this: all last rows of a column are empty, and rows
    of absent objects are not."""
    there = (~absent).groupby(frame["field"]).transform("sum")
    upper = frame.groupby("field").cumcount() < there
    last = frame[~upper]
    moved = last.isna().all() & frame[upper & absent].notna().any()
    shape = frame.columns.str.contains("AreaShape_(?!.*Feret|Zernike)")
    if moved[shape].any():
        moved |= shape & (last.fillna(0) == 0).all()
    moved = frame.columns[moved]
    # as many rows, in the same order, in every field
    frame.loc[~absent, moved] = frame.loc[upper, moved].to_numpy()
    return list(moved)


def check_boxes(frame, o, where):
    """Refuses objects whose centre lies outside their own bounding box: their AreaShape is of other objects."""
    if {*BOX, *CENTRE} <= set(frame):
        centre = frame[CENTRE].to_numpy()
        box = frame[BOX].to_numpy()
        outside = (centre < box[:, :2]) | (centre > box[:, 2:])
        refuse(frame[outside.any(1)], f"{where}: {o} outside their own bounding box: measure again")


def read_one(path, objects, keep, dropped, report):
    """One export -> (images as text, cells, measurements). A cell is a nucleus that has a cell, if there are cells."""
    images, frames = read_tables(path, objects, keep, dropped)
    need(images, ["ImageNumber"], f"{path}: Image")
    fields = numbers(images.filter(NUMBERS), f"{path}, Image").astype(float)
    fields["field"] = fields.index
    nuclei = own_objects(frames["Nuclei"], "Nuclei", fields, path)
    need(nuclei, CENTRE, f"{path}: Nuclei")
    check_boxes(nuclei, "Nuclei", path)
    values = nuclei.filter(regex="^Nuclei_")
    ways = ways_to_nuclei(nuclei, objects)
    for o, effect in (("Cells", "left out"), ("Cytoplasm", "values missing")):
        if o not in frames:
            continue
        frame = own_objects(frames.pop(o), o, fields, path)
        row, absent = find_nuclei(frame, o, ways, path)
        moved = move_back(frame, absent)
        if moved:
            report.append(f"{path}: {len(moved)} columns of {o} stand beside the rows of absent objects "
                          f"(CellProfiler up to 4.2): moved back, first: {moved[0]}")
        check_boxes(frame[~absent], o, path)
        frame = frame.set_axis(row)
        values = values.join(frame[row >= 0].filter(regex=f"^{o}_"))
        lacking = nuclei.drop(row, errors="ignore")
        report += counted(lacking, f"{path}: nuclei without {o}, {effect}")
        if o == "Cells":
            ways["Parent_" + objects["Cells"]] = by_field(frame, "ObjectNumber")
            nuclei = nuclei.drop(lacking.index)
    cells = nuclei[["field", "ObjectNumber", *CENTRE]].set_axis(["image", "number", "x", "y"], axis=1)
    return images.assign(export=path.stem), cells, values.loc[nuclei.index]


def name_fields(images, channel):
    """A name for each field: its file of `channel` without ending, and before it as many folders (PathName_) as tell
    the fields apart."""
    files = list(images.filter(like="FileName_"))
    if not files:
        return images["export"] + "_" + images["ImageNumber"]
    file = f"FileName_{channel}"
    if file not in files:
        file = files[0]
    folder = images.get(file.replace("File", "Path"), "")
    parts = folder + "/" + images[file].str.replace(r"\.\w+$", "", regex=True)
    parts = parts.str.findall(r"[^/\\]+")
    for depth in range(1, 20):
        names = parts.str[-depth:].str.join("_")
        if names.is_unique:
            break
    return names


def find_exports(path, objects):
    """The exports at or below `path`: folders with a table of that name; other CSVs may lie beside them."""
    objects = "|".join([*objects.values(), "Object"])
    folders = set()
    for file in filter(is_table, path.rglob("*")):
        if re.fullmatch(f"Image|.*({objects})", file.stem, re.IGNORECASE):
            folders.add(file.parent)
    if path in folders or not folders:
        return [path]
    return sorted(folders)


def read_export(path, channel=CHANNELS[0], keep=None, skip_bad=False, objects=None):
    """Cells and measurements of CellProfiler's export(s) at `path`: an Export. channel: whose files name the fields.
    keep: only features that match this regular expression. skip_bad: leaves out a damaged export among several.
    objects: names other than CellProfiler's usual ones, {"Nuclei": "FilteredNuclei"}; features stay Nuclei_...
    InputError wherever a cell could get the measurements of another."""
    path = Path(path)
    objects = dict(zip(OBJECTS, OBJECTS)) | (objects or {})
    if (path / "meta.json").is_file():
        raise InputError(f"{path}: is a prepared folder, no export; open it with data.open_folder, or give it as --data")
    if not path.exists() or path.is_file() and not is_sqlite(path):
        raise InputError(f"{path}: expected the folder of CellProfiler's CSV files or its SQLite file")
    exports, dropped, report = [], {}, []
    names = set()
    rows = 0
    for folder in find_exports(path, objects):
        try:
            images, cells, values = read_one(folder, objects, keep, dropped, report)
            names = names or set(values)
            other = names ^ set(values)
            if other:
                raise InputError(f"{folder}: has other features than the exports before it, e.g. {min(other)}; "
                                 "export all by one pipeline")
            cells["image"] += rows
            rows += len(images)
            exports.append((images, cells, values))
        except InputError as error:
            if not skip_bad:
                raise
            report.append(f"skipped {error}")
    if not any(len(cells) for _, cells, _ in exports):
        raise InputError(f"{path}: no cell in it can be read {report[-1:]}")
    images, cells, values = (pd.concat(parts, ignore_index=True) for parts in zip(*exports))

    images = images.fillna("").astype(str)
    field = name_fields(images, channel)
    twice = field[field.duplicated()]
    if len(twice):
        raise InputError(f"{path}: image file {twice.iloc[0]!r} stands in two rows of the Image tables; "
                         "keep one export")
    cells = cells.astype({"image": int, "number": int})
    cells = cells.join(annotate(images).assign(field=field), on="image")
    cells["cell"] = cells["field"] + "_" + cells.pop("number").astype(str)
    images["field"] = field
    return Export(cells, images, values.to_numpy(np.float32), list(values), dropped, report)


def read_table(path, channel=CHANNELS[0], objects=None):
    """A table for model.generate, one row a cell: `cell` (a name), what is known of plate and treatment, measurements.
    path: an export (see read_export), or a CSV of columns that have their object's name, Nuclei_AreaShape_Area."""
    path = Path(path)
    if path.is_file() and not is_sqlite(path):
        table = read_csv(path)
        cells = annotate(table)
        if "cell" not in cells:
            cells["cell"] = table.index.astype(str)
        features = sort_columns(table)[0]
        return pd.concat([cells, numbers(table[features], path)], axis=1)
    export = read_export(path, channel, objects=objects)
    values = pd.DataFrame(export.values, columns=export.names)
    return pd.concat([export.cells.drop(columns="image"), values], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: simulation, crops and fields each become one of these; what comes after does not know which it was


def listed(cells, what):
    """[How many cells (a column of names) there are of a kind, and the first], or [] if there are none."""
    if cells.empty:
        return []
    return [f"{len(cells)} {what}, first: {cells.iloc[0]}"]


@dataclass
class Source:
    """N cells and where their patches are. A job is a piece of reading, a field or a run of crops: (rows of `cells`, what).
    read(what, wanted): patches (n, C, S, S) uint16 of the job's cells `wanted` (n,), and {position in wanted: why bad}."""
    cells: pd.DataFrame         # what is known, under the names of cells.csv
    names: list                 # of the F features
    values: np.ndarray          # (N, F) float32, in CellProfiler's units, NaN where missing
    dropped: dict               # {column: why it is no feature}
    report: list                # lines for the user
    jobs: list
    read: Callable


def simulation(n, seed, channels, size, keep):
    """n simulated cells, drawn in the named channels; keep: a regular expression, only features that match."""
    cells, table = simulate_table(n, seed, size)
    names, dropped, _ = sort_columns(table.columns, keep)
    order = [CHANNELS.index(channel) for channel in channels]
    return Source(
        cells,
        names,
        table[names].to_numpy(np.float32),
        dropped,
        [],
        list(simulated_fields(cells, table, seed)),
        partial(read_simulated, order=order, size=size),
    )


# For the Statistical Cell: nucleus and cell as solids, and between them in one channel one of these. A drug scatters the envelope

SOLID_CHANNELS = ["DAPI", "Structure", "Actin"]
STRUCTURES = ("nucleoli", "envelope", "membrane", "scattered", "blank", "copy of DAPI", "copy of Actin")
DRUG = "brefeldin"


def solids(n, seed, size, depth, keep):
    """n simulated cells in z-stacks of depth x size x size pixels; depth 1: flat, their middle planes."""
    random = np.random.default_rng([seed, 4])
    table = pd.DataFrame({"Nuclei_AreaShape_Orientation": random.uniform(-90, 90, n)})      # of nucleus and cell
    for name, length in (("Nuclei", 0.36), ("Cells", 0.76)):                                # shares of the patch
        factor = np.exp(random.normal(0, 0.1, n))
        longest = length * size * factor
        table[f"{name}_AreaShape_MajorAxisLength"] = longest
        table[f"{name}_AreaShape_MinorAxisLength"] = longest * random.uniform(0.7, 1, n)
    table["Nuclei_Intensity_MeanIntensity_DAPI"] = random.uniform(0.3, 0.7, n)
    names, dropped, _ = sort_columns(table.columns, keep)
    cells = pd.DataFrame({"cell": "solid" + table.index.astype(str)})
    cells["field"] = cells["cell"]
    cells["plate"] = random.choice(["sim1", "sim2", "sim3", "sim4"], n)
    cells["compound"] = random.choice([DRUG, SOLVENT], n)
    cells["well"] = cells["compound"].map({DRUG: "B02", SOLVENT: "B03"})
    cells[["site", "replicate", "concentration", "moa"]] = "1", "1", 5.0, "envelope disruptor"
    cells["structure"] = random.choice(STRUCTURES, n)
    told = table.join(cells)
    jobs = [(rows, told.iloc[rows]) for rows in in_chunks(np.arange(n))]
    read = partial(read_solids, seed=seed, size=size, depth=depth)
    return Source(cells, names, table[names].to_numpy(np.float32), dropped, [], jobs, read)


def read_solids(table, wanted, seed, size, depth):
    """Patches of one job. A cell's depends on the seed and its own number alone."""
    patches = []
    for number, row in table.iloc[wanted].iterrows():
        random = np.random.default_rng([seed, 5, number])
        picture = draw_solid(row, random, size, depth)
        if depth == 1:
            picture = picture[:, 0]
        patches.append(picture)
    levels = np.stack(patches).clip(0, 1)
    levels = levels * FULL_SCALE
    return levels.astype(np.uint16), {}


def draw_solid(row, random, size, depth):
    """A cell of the parameters `row`: (3, depth, size, size) in 0..1, see SOLID_CHANNELS."""
    z, y, x = np.indices((depth, size, size), sparse=True)
    z = z - (depth - 1) / 2
    y = y - (size - 1) / 2
    x = x - (size - 1) / 2
    turn = np.radians(row["Nuclei_AreaShape_Orientation"])
    along = y * np.cos(turn) + x * np.sin(turn)
    across = x * np.cos(turn) - y * np.sin(turn)

    def radius(name, height):
        """How far each pixel is from the middle, 1 at the surface."""
        a = row[f"{name}_AreaShape_MajorAxisLength"] / 2
        b = row[f"{name}_AreaShape_MinorAxisLength"] / 2
        return np.sqrt((along / a) ** 2 + (across / b) ** 2 + (z / height) ** 2)

    def shell(q):
        return np.exp(-((q - 1) / 0.12) ** 2)

    def blobs(k, where):
        """k round spots, at pixels by chance, as likely as `where`."""
        chance = where.ravel() / where.sum()
        spots = np.zeros(where.size)
        spots[random.choice(where.size, k, p=chance)] = 1
        wide = size / 34 * (np.array(where.shape) > 1)
        spots = ndi.gaussian_filter(spots.reshape(where.shape), wide)
        return spots / spots.max()

    q_nucleus = radius("Nuclei", 0.28 * depth)
    q_cell = radius("Cells", 0.46 * depth)
    nucleus = np.clip((1 - q_nucleus) * 5 + 0.5, 0, 1)
    cell = np.clip((1 - q_cell) * 10 + 0.5, 0, 1)
    dapi = nucleus * row["Nuclei_Intensity_MeanIntensity_DAPI"]
    actin = 0.2 * cell + 0.5 * shell(q_cell)
    blank = np.zeros_like(cell)
    structures = {
        "nucleoli": blobs(4, nucleus ** 4),
        "envelope": shell(q_nucleus),
        "membrane": shell(q_cell),
        "scattered": blobs(20, cell * (1 - nucleus) + 1e-9),
    }
    kind = row["structure"]
    if kind == "envelope" and row["compound"] == DRUG:
        kind = "scattered"
    picture = np.stack([dapi, structures.get(kind, blank), actin])
    picture += np.abs(random.normal(0, 0.01, picture.shape))            # the camera
    if kind == "blank":
        picture[1] = 0
    if kind.startswith("copy"):
        picture[1] = picture[0 if kind.endswith("DAPI") else 2]
    return picture


def read_simulated(what, wanted, order, size):
    """Patches of one field. All its cells are drawn, also those that are not wanted: a picture does not depend on --exclude."""
    table, x, y, seed = what
    field = simulate_field(table, x, y, seed, size)
    return cut(field[order], x[wanted], y[wanted], size), {}


def cut(field, x, y, size=SIZE):
    """Crops (n, C, size, size) uint16 of a field (C, H, W) round x (columns), y (rows), all inside.
    The pixel that the centre lies in becomes pixel size // 2."""
    patches = np.empty((len(x), len(field), size, size), np.uint16)
    corner = np.floor([y, x]).astype(int) - size // 2
    for patch, r, c in zip(patches, *corner):
        patch[:] = field[:, r:r + size, c:c + size]
    return patches


# Crops as they circulate: DIR/<DAPI stem>/<DAPI stem>_<k>.npy and DIR/metadata.csv

KEY = "Single_Cell_Image_Id"
CROPS_AT_ONCE = 256         # files in a job


def crops(folder, features, channels, stored, size, keep):
    """The crops below `folder`, files of (size, size) pixels in the channels `stored`, joined by KEY with the table `features`."""
    names, dropped, other = sort_columns(read_csv(features, nrows=0).columns, keep)
    table, values = read_features(features, names, other)
    described = Path(folder, "metadata.csv")
    metadata = read_csv(described, dtype=str)
    for path, frame in ((features, table), (described, metadata)):
        if KEY not in frame:
            raise InputError(f"{path}: no key column {KEY!r} (the crop's file name), found {list(frame)}")
        twice = frame[KEY][frame[KEY].duplicated()]
        if len(twice):
            raise InputError(
                f"{path}: {KEY} {twice.iloc[0]!r} stands in more than one row; each cell needs one")

    row = pd.Index(table[KEY]).get_indexer(metadata[KEY])
    matched = row >= 0
    report = [f"{matched.sum()} cells matched; metadata columns: {other}"]
    report += listed(metadata[KEY][~matched], f"cells of {described} have no row in {features}")
    if not matched.any():
        raise InputError(f"{report[-1]}, but e.g. {table[KEY][0]}: 0 cells matched")
    cells = annotate(metadata[matched].reset_index(drop=True))
    stems = cells["cell"].str.removesuffix(".npy")
    if "field" not in cells:
        cells["field"] = stems.str.replace(r"_\d+$", "", regex=True)

    files = f"{folder}/" + cells["field"] + "/" + stems + ".npy"
    jobs = []
    for rows in in_chunks(np.arange(len(files)), CROPS_AT_ONCE):
        jobs.append((rows, files[rows].to_numpy()))
    order = [stored.index(channel) for channel in channels]
    return Source(
        cells,
        names,
        values[row[matched]],
        dropped,
        report,
        jobs,
        partial(read_crops, order=order, shape=(size, size, len(stored))),
    )


def read_features(path, names, other):
    """The columns `other` of a CSV as a frame of text, and `names` as an array (N, F) float32. In pieces, or the text of half a
    million cells would fill the memory."""
    text = []
    values = []
    line = 2
    parts = pd.read_csv(
        path,
        dtype=dict.fromkeys(other, str),
        encoding="utf-8-sig",
        chunksize=ROWS,
    )
    try:
        for part in parts:
            text.append(part[other])
            values.append(numbers(part[names], path, line).to_numpy(np.float32))
            line += len(part)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {str(error).strip()}; export it again") from None
    if not text:
        raise InputError(f"{path}: has no rows, expected one for each crop")
    return pd.concat(text, ignore_index=True), np.concatenate(values)


def read_crops(files, wanted, order, shape):
    """Patches of a run of files, each of `shape` (size, size, channels), with their channels put in order."""
    patches = np.zeros((len(wanted), len(order), *shape[:2]), np.uint16)
    bad = {}
    for i, file in enumerate(files[wanted]):
        try:
            crop = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            bad[i] = f"{file}: missing or unreadable ({error})"
            continue
        if crop.shape == shape and crop.dtype == np.uint16:
            patches[i] = crop.transpose(2, 0, 1)[order]
        else:
            bad[i] = (f"{file}: {crop.dtype} {crop.shape}, expected uint16 {shape}; "
                      "see --size and --stored-order")
    return patches, bad


# Whole fields: TIFF files, with cells where CellProfiler found them


def fields(folder, export, image_csv, channels, size, keep, skip_bad, objects):
    """The cells of CellProfiler's `export` whose crops lie inside their fields, TIFF files below `folder`.
    What a field is (plate, compound, ...) tells `image_csv`, or without it the export itself."""
    exported = read_export(export, channels[0], keep, skip_bad, objects)
    cells = exported.cells
    report = exported.report
    images = Images(folder)
    files = images.of(exported.images, channels, export)
    if image_csv:
        here = [row[0] for row in files]
        told = read_image_csv(image_csv, images, channels[0], here)
        cells = cells[["cell", "field", "image", "x", "y"]].join(told, on="image")

    shape = np.full((len(files), 2), np.inf)            # height, width
    for i in cells["image"].unique():
        try:
            shape[i] = read_tiff(files[i][0], header_only=True)
        except InputError:
            if not skip_bad:                            # else said when the patches are read
                raise
    corner = np.floor(cells[["y", "x"]]) - size // 2
    inside = (corner >= 0) & (corner + size <= shape[cells["image"]])
    inside = inside.all(axis=1)
    report += listed(cells["cell"][~inside], "cells lie less than half a crop from the edge of their field: left out")
    cells = cells[inside].reset_index(drop=True)

    jobs = []
    for i, rows in cells.groupby("image").indices.items():
        x, y = cells.loc[rows, ["x", "y"]].to_numpy().T
        jobs.append((rows, (files[i], x, y)))
    return Source(
        cells,
        exported.names,
        exported.values[inside],
        exported.dropped,
        report,
        jobs,
        partial(read_field, size=size),
    )


def read_image_csv(path, images, channel, here):
    """What BBBC021_v1_image.csv tells of the images `here` (a list of files of `channel`): a frame, a row for each of them."""
    table = read_csv(path, dtype=str)
    told = annotate(table).drop(columns=["cell", "field"], errors="ignore")
    told.index = [file for file, in images.of(table, [channel], path)]
    told = told[told.index.isin(here)]
    if told.empty or told.index.has_duplicates:
        raise InputError(f"{path}: {len(told)} rows are of the {len(here)} images, first {here[0].name}; "
                         "expected one for each")
    return told.reindex(here).fillna("").reset_index(drop=True)


def read_field(what, wanted, size):
    """Patches of one field, what = (files, x, y). A file that is bad makes all its cells bad."""
    files, x, y = what
    try:
        return cut(read_channels(files), x[wanted], y[wanted], size), {}
    except InputError as error:
        bad = dict.fromkeys(range(len(wanted)), str(error))
        return np.zeros((len(wanted), len(files), size, size), np.uint16), bad


class Images:
    """The TIFF files below a folder, but hidden ones and thumbnails, found by the names that tables give them."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = {}             # {name in lower case: [paths]}
        for path in sorted(self.folder.rglob("*.*")):
            name = path.name.lower()
            thumb = "thumb" in str(path.relative_to(folder)).lower()
            if re.fullmatch(r"[^.].*\.tiff?", name) and not thumb:
                self.paths.setdefault(name, []).append(path)
        if not self.paths:
            raise InputError(f"{folder}: no .tif or .tiff in it or below; "
                             "give --images the folder of the fields")

    def find(self, name, folder):
        """The path of file `name` (FileName_), whatever its case. Where it stands in several folders, the end of `folder`
        (PathName_, of any system) tells which; those that cannot be told apart are refused."""
        hits = self.paths.get(name.lower(), [self.folder / name])
        wanted = re.split(r"[/\\]+", folder.lower().rstrip("/\\"))

        def agreeing(path):             # how many folders agree, from the last on
            own = path.resolve().as_posix().lower().split("/")
            return len(os.path.commonprefix([own[-2::-1], wanted[::-1]]))

        best, *others = sorted(hits, key=agreeing, reverse=True)
        if others and agreeing(best) == agreeing(others[0]):
            raise InputError(f"{best} and {others[0]} have one name, and PathName_ {folder!r} does not "
                             "tell which is meant; give --images the folder with one of them")
        return best

    def of(self, table, channels, where):
        """The files of each row of an Image table, in the order of `channels`; one that is named for two of them is refused."""
        table = table.set_axis(table.columns.str.removeprefix("Image_"), axis=1)
        columns = []
        for channel in channels:
            names = table.get(f"FileName_{channel}")
            if names is None or "" in set(names):
                found = list(table.filter(like="FileName_"))
                raise InputError(f"{where}: has no FileName_{channel} for every field, but {found}; see --channels")
            folders = table.get(f"PathName_{channel}", [""] * len(table))
            columns.append(list(map(self.find, names, folders)))
        rows = list(zip(*columns))
        for files in rows:
            if len(set(files)) < len(files):
                twice = max(files, key=files.count)
                raise InputError(f"{where}: {twice.name} is named for two channels of one field; mend the table")
        return rows


# One grey TIFF


def read_tiff(path, header_only=False):
    """One grey field (H, W) uint16, 65535 what CellProfiler calls 1: of 8 or 16 bits, or of 32-bit floats in 0..1.
    header_only: just its (H, W). InputError says what is wrong with a file."""
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            grey = image.mode in ("L", "I;16", "I;16B", "F")
            black = image.tag_v2.get(262, 1)            # 0: the picture is a negative
            pages = image.n_frames
            shape = image.height, image.width
            pixels = None if header_only else np.asarray(image)
    except (OSError, SyntaxError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no TIFF that Pillow reads ({error}); "
                         "copy it again, or save it by LZW") from None
    if not grey or black != 1 or pages > 1:
        raise InputError(f"{path}: mode {image.mode}, {pages} pages, expected one grey channel, one page, "
                         "8 or 16 bits or 32-bit floats, black 0")
    if header_only:
        return shape
    if pixels.dtype == np.uint8:
        return pixels * np.uint16(257)
    if pixels.dtype == np.float32:
        low = pixels.min()
        high = pixels.max()
        if not 0 <= low <= high <= 1:
            raise InputError(f"{path}: floats from {low:g} to {high:g}, expected 0 to 1; "
                             "save it so, or as 16 bits")
        pixels = np.rint(pixels * FULL_SCALE)
    return pixels.astype(np.uint16)


def read_channels(files):
    """The files of one field -> (C, H, W) uint16; InputError where their sizes differ."""
    channels = [read_tiff(file) for file in files]
    for file, channel in zip(files, channels):
        if channel.shape != channels[0].shape:
            raise InputError(f"{file}: its size {channel.shape} differs from {files[0].name}'s")
    return np.stack(channels)


# Whole fields without CellProfiler: segmented and measured here, written as CellProfiler's tables

WINDOWS = (68, 96, 128, 178)        # pixels, sides of the squares in which objects are measured; a larger cell is left out


def measure_fields(folder, export, image_csv, channels, workers, skip_bad):
    """Segments and measures every field below `folder` and writes an export like CellProfiler's, one folder a field, at `export`.
    Fields whose folder is there already are not measured again, so that an interrupted call goes on."""
    if len(channels) != 3:
        raise InputError(f"--channels {channels}: measuring needs three, the nucleus first; "
                         "or give --cellprofiler")
    todo = []
    for number, files in enumerate(group_fields(folder, image_csv, channels), 1):
        target = export / "_".join(files[0].relative_to(folder).with_suffix("").parts)
        if not target.exists():
            todo.append((number, files, target))
    work = partial(measure_field, channels=channels, skip_bad=skip_bad)
    with closing(in_order(work, todo, workers)) as results:
        for _ in with_progress(results, [1] * len(todo), "fields measured"):
            pass


def group_fields(folder, image_csv, channels):
    """The files of each field, in the order of `channels`: as `image_csv` names them (Image_FileName_<channel>), or else files
    that share a name up to _w<number>, as BBBC021's do."""
    images = Images(folder)
    fields = {}                     # {(folder, name up to _w): [(number, path)]}
    groups = []
    if image_csv:
        named = images.of(read_csv(image_csv, dtype=str), channels, image_csv)
        groups = [files for files in named if files[0].exists()]
    else:
        for path in chain(*images.paths.values()):
            match = re.match(r"(.+)_w(\d)", path.stem)
            if match:
                fields.setdefault((path.parent, match[1]), []).append((match[2], path))
    for found in fields.values():
        waves, files = zip(*found)                  # paths are sorted, and so are the numbers
        if not len(files) == len(set(waves)) == len(channels):
            raise InputError(f"{files[0]}: files of numbers {waves} share its name up to _w, "
                             f"expected one for each of {channels}")
        groups.append(files)
    if not groups:
        raise InputError(f"{folder}: no field; expected files named ..._w1..., _w2..., _w4..., "
                         "or as --image-csv says")
    return groups


def measure_field(number, files, target, channels, skip_bad):
    """Segments and measures one field, image `number`, and writes its four tables into the folder `target`."""
    try:
        field = read_channels(files)
    except InputError:
        if skip_bad:
            return
        raise
    nuclei, cells = data.segment_field(*field)
    table = measure_objects(field, nuclei, cells, channels)
    if table.empty:
        return
    label = table.index
    keys = pd.DataFrame({"ImageNumber": number, "ObjectNumber": label, "Parent_Nuclei": label}, label)
    y, x = np.transpose(ndi.center_of_mass(nuclei > 0, nuclei, label))
    placed = keys.assign(Location_Center_X=x, Location_Center_Y=y)
    features = table[sort_columns(table.columns)[0]]        # places in a square mean nothing
    image = pd.DataFrame({"ImageNumber": [number]})
    for channel, file in zip(channels, files):
        image[f"FileName_{channel}"] = file.name
        image[f"PathName_{channel}"] = file.parent.resolve().as_posix()

    work = target.with_name("." + target.name)      # of a call that was interrupted, too
    work.mkdir(parents=True, exist_ok=True)
    write_csv(image, work / "Image.csv")
    for name, own in (("Nuclei", placed), ("Cells", keys), ("Cytoplasm", keys)):
        write_objects(own, features, work, name, float_format="%.8g")
    os.replace(work, target)


def measure_objects(field, nuclei, cells, channels):
    """What `data.measure` finds in each cell of a field, field (C, H, W) uint16, nuclei and cells (H, W) labels: a frame by label.
    Objects are cut out in squares whose last two layers are the labels."""
    margin = WINDOWS[-1]
    layers = np.concatenate([field, [nuclei, cells]]).astype(np.uint16)
    layers = np.pad(layers, ((0, 0), (margin, margin), (margin, margin)))
    bounds = []
    for rows, columns in ndi.find_objects(cells):
        bounds.append((rows.start, columns.start, rows.stop, columns.stop))
    start, stop = np.reshape(bounds, (-1, 2, 2)).swapaxes(0, 1)         # (N, 2) each: row, column
    y, x = np.transpose((start + stop) // 2 + margin)
    least = np.searchsorted(WINDOWS, (stop - start).max(1))             # the smallest square that holds the object
    tables = [pd.DataFrame()]
    for i, side in enumerate(WINDOWS):
        here = np.flatnonzero(least == i)
        if len(here):
            label = here + 1
            squares = cut(layers, x[here], y[here], side)
            own = squares[:, -2:] == label[:, None, None, None]
            masks = NUCLEUS * own[:, 0] + CELL * own[:, 1]
            names, values = data.measure(squares[:, :-2], masks.astype(np.uint8), channels)
            tables.append(pd.DataFrame(values, label, names))
    return pd.concat(tables).sort_index()


# ---------------------------------------------------------------------------------------------------------------------
# Splits and standardisation

CHUNK = 1024        # cells handled at once where 32-bit numbers become 64-bit ones


def in_chunks(rows, size=CHUNK):
    """An array in pieces of `size`."""
    return np.split(rows, range(size, len(rows), size))


def split_cells(cells, by, seed):
    """A split for each cell, no group on both sides: groups are shuffled by the seed and go to the split furthest below its share.
    `by`: cell (the paper, whose neighbours in a field then stand on both sides), field, well, plate, compound or moa. A group with over
    10 % of all cells always trains. Returns (N,) names; InputError where a split would be empty."""
    unit = ["plate", "well"] if by == "well" else by
    group = cells.groupby(unit, sort=False).ngroup()
    size = np.bincount(group)
    large = size > 0.1 * len(cells)
    target = np.array([0.8, 0.1, 0.1])              # paper, section 4.1
    have = np.array([size[large].sum(), 0, 0])      # cells in train, val, test
    side = np.zeros(len(size), int)
    for g in np.random.default_rng(seed).permutation(len(size)):
        if not large[g]:
            side[g] = np.argmax(target - have / len(cells))
            have[side[g]] += size[g]
    names = np.array(["train", "val", "test"])
    if not have.all():
        raise InputError(f"--split {by}: {len(size)} groups leave no cell for {names[have == 0]} (one of over "
                         "10 % of the cells always trains); use a finer --split or more cells")
    return names[side[group]]


def in_plate_units(values, cells):
    """--normalise plate-dmso: the features (N, F) in standard deviations of the DMSO cells of their own plate. A plate with DMSO
    cells in training is scaled by those; a held-out one by all its DMSO cells, which become `reference` in cells["split"]."""
    dmso = cells["compound"] == SOLVENT
    training = dmso & (cells["split"] == "train")
    held_out = dmso & ~cells["plate"].isin(cells["plate"][training])
    cells.loc[held_out, "split"] = "reference"
    return data.scale_by_dmso(values, cells["plate"], training | held_out)


def column_moments(values, rows):
    """Count, mean and standard deviation (ddof 0) of the columns of `values` (N, F) over `rows`, missing left out; float64."""
    count, total, square = np.zeros((3, values.shape[1]))
    for chunk in in_chunks(rows):
        block = np.asarray(values[chunk], np.float64, order="F")        # summed column by column
        count += np.isfinite(block).sum(0)
        total += np.nansum(block, 0)
    least_one = np.maximum(count, 1)
    mean = total / least_one
    for chunk in in_chunks(rows):
        block = np.asarray(values[chunk], np.float64, order="F")
        square += np.nansum((block - mean) ** 2, 0)
    return count, mean, np.sqrt(square / least_one)


def columns_to_drop(values, names, moments, drop_duplicates):
    """{name: reason} for columns that are often missing, without spread (`moments` are those of the training cells) or, if asked,
    equal to an earlier one."""
    missing = 1 - np.isfinite(values).mean(0)
    dropped = {}
    first = {}              # {(mean, sd): column}
    for j, (name, count, mean, sd) in enumerate(zip(names, *moments)):
        twin = first.setdefault((mean, sd), j)
        if missing[j] > MAX_MISSING:
            dropped[name] = f"missing in over {MAX_MISSING:.0%} of the cells"
        elif count < 2 or sd <= 1e-7 * abs(mean):       # float32 holds 7 digits
            dropped[name] = "no spread over the training cells"
        elif drop_duplicates and twin < j:
            if np.array_equal(values[:, twin], values[:, j], equal_nan=True):
                dropped[name] = f"identical to {names[twin]}"
    return dropped


def fill_missing(values, names, centre, scale):
    """Puts the centre (F,) where `values` (N, F) are missing, in place. Returns how many were missing, {name: count}, and how many
    lie beyond CLIP standard deviations: those stay."""
    imputed = {}
    clipped = {}
    for j, name in enumerate(names):
        column = values[:, j]
        missing = ~np.isfinite(column)
        if missing.any():
            column[missing] = centre[j]
            imputed[name] = int(missing.sum())
        beyond = np.abs(column - centre[j]) > CLIP * scale[j]
        if beyond.any():
            clipped[name] = int(beyond.sum())
    return imputed, clipped


# ---------------------------------------------------------------------------------------------------------------------
# Writing the folder


def begin_worker():
    """A worker computes in one thread and leaves Ctrl-C to its parent."""
    data.keep_freed_memory()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_order(work, units, workers):
    """work(*unit) of every unit in turn, by `workers` processes that are a few units ahead."""
    if workers == 1:
        for unit in units:
            yield work(*unit)
        return
    pool = ProcessPoolExecutor(workers, initializer=begin_worker)
    ahead = []
    try:
        for unit in units:
            ahead.append(pool.submit(work, *unit))
            if len(ahead) == 4 * workers:
                yield ahead.pop(0).result()
        for job in ahead:
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def with_progress(results, sizes, what):
    """The results as they come, and every 5 seconds a line. sizes: how much of `what` each result is."""
    total = sum(sizes)
    done = 0
    said = 0
    begin = time.perf_counter()
    for size, result in zip(sizes, results):
        yield result
        done += size
        seconds = time.perf_counter() - begin
        if seconds > said + 5 or done == total:
            said = seconds
            print(f"{done}/{total} {what} | {done / seconds:.4g}/s", flush=True)


def write_patches(path, source, stay, shape, workers, skip_bad):
    """Writes the patches of the cells `stay` (N,) bool, job after job, as an array (n, *shape) uint16. A bad patch is refused by
    name, or with skip_bad left out. Returns the rows of source.cells that were written (n,), and why others were not."""
    units = []
    units_rows = []
    for rows, what in source.jobs:
        wanted = np.flatnonzero(stay[rows])
        if len(wanted):
            units.append((what, wanted))
            units_rows.append(rows[wanted])
    written = []
    reasons = []
    header = {"descr": "<u2", "fortran_order": False, "shape": (0, *shape)}
    with open(path, "wb") as file, closing(in_order(source.read, units, workers)) as results:
        np.lib.format.write_array_header_1_0(file, header)
        results = with_progress(results, list(map(len, units_rows)), "cells")
        for (patches, bad), rows in zip(results, units_rows):        # results first: its end is the last line of progress
            if bad and not skip_bad:
                raise InputError(f"{min(bad.values())}; mend it, or leave such cells out with --skip-bad")
            good = np.setdiff1d(np.arange(len(rows)), list(bad))
            file.write(patches[good].astype("<u2").tobytes())
            written.extend(rows[good])
            reasons.extend(bad.values())
        header["shape"] = (len(written), *shape)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)      # numpy leaves room in it for any number of rows
    return np.array(written, int), reasons


def white_levels(path, rows):
    """Per channel, the 99.9 % quantile of the pixels of the given rows."""
    patches = np.load(path, mmap_mode="r")
    count = np.zeros((patches.shape[1], FULL_SCALE + 1), int)
    for chunk in in_chunks(rows):
        for k, channel in enumerate(patches[chunk].swapaxes(0, 1)):
            count[k] += np.bincount(channel.ravel(), minlength=FULL_SCALE + 1)
    below = count.cumsum(1)
    white = (below < WHITE * below[:, -1:]).sum(1)
    return white.clip(1).tolist()


def write_folder(work, source, cells, stay, channels, shape, options, workers, skip_bad):
    """Writes the prepared folder `work` of those cells (a frame like source.cells, completed) that `stay` (N,) bool. shape: of a
    channel's patch, (S, S) or (D, S, S).
    options: split, normalise, drop_duplicates, seed, and whatever else describes the call."""
    shutil.rmtree(work, ignore_errors=True)             # of a preparation that was interrupted
    work.mkdir(parents=True)

    # Cells that stay: those with a measurement and a readable patch
    measured = np.isfinite(source.values).any(1)
    lacking = cells["cell"][stay & ~measured]
    for line in listed(lacking, "cells without measurements dropped"):
        print(line)
    target = work / "patches.npy"
    rows, bad = write_patches(target, source, stay & measured, (len(channels), *shape), workers, skip_bad)
    if bad:
        print(f"{len(bad)} bad patches skipped, first: {bad[0]}")
    if not len(rows):
        raise InputError("no cell that --exclude leaves has both a patch and measurements")
    cells = cells.iloc[rows].reset_index(drop=True)
    cells["split"] = split_cells(cells, options["split"], options["seed"])
    train = np.flatnonzero(cells["split"] == "train")
    white = white_levels(target, train)

    # Features that stay
    values = source.values[rows]
    if options["normalise"] == "plate-dmso":
        values = in_plate_units(values, cells)
    values[np.isinf(values)] = np.nan
    moments = column_moments(values, train)
    dropped = source.dropped | columns_to_drop(values, source.names, moments, options["drop_duplicates"])
    kept = ~np.isin(source.names, list(dropped))
    if not kept.any():
        raise InputError(f"every feature was dropped, e.g. because of {set(dropped.values())}")
    names = np.compress(kept, source.names).tolist()
    values = values.compress(kept, 1)
    _, centre, scale = np.compress(kept, moments, 1)
    imputed, clipped = fill_missing(values, names, centre, scale)
    np.save(work / "features.npy", values)
    columns = CELL_COLUMNS
    if "structure" in cells:
        columns = [*columns, "structure"]
    write_csv(cells[columns], work / "cells.csv")

    counts = count(cells)
    counts["unmeasured_cells"] = len(lacking)
    counts["bad_patches"] = len(bad)
    meta = {
        "format": data.FORMAT,
        "channels": channels,
        "size": shape[-1],
        "depth": shape[0] if len(shape) == 3 else 1,
        "features": names,
        "centre": centre.tolist(),
        "scale": scale.tolist(),
        "normalise": options["normalise"],
        "fitted_on": f"{len(train)} training cells",
        "white": white,
        "dropped": dropped,
        "imputed": imputed,
        "clipped": clipped,
        "counts": counts,
        "options": options,
        "checksums": {name: data.checksum(work / name) for name in data.FILES},
    }
    data.write(work / "meta.json", json.dumps(meta, indent=1) + "\n")


def count(cells):
    """How many cells, plates, treatments, ... a frame of cells has."""
    counts = {"cells": len(cells)}
    for name in ("plate", "field", "compound"):
        counts[name + "s"] = cells[name].nunique()
    counts["wells"] = len(cells.drop_duplicates(["plate", "well"]))
    counts["treatments"] = data.treatment_names(cells).nunique()
    counts["mechanisms"] = len(set(cells["moa"]) - {SOLVENT, "unknown"})
    counts["split"] = cells["split"].value_counts().to_dict()
    return counts


def describe(folder):
    """What a prepared folder holds, as text."""
    counts = folder.meta["counts"].copy()
    split = counts.pop("split")
    counts = ", ".join(f"{k} {name}" for name, k in counts.items())
    return (f"{folder.path}: {counts}, {len(folder.features)} features; split: {split}; "
            "meta.json says why others were dropped")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def excluded(cells, path):
    """Which cells (N,) bool a CSV names. It has some of the columns of cells.csv; a row is a combination."""
    table = read_csv(path, dtype=str)
    columns = list(table)
    if not set(columns) <= set(cells):
        raise InputError(f"{path}: has columns {columns}, expected some of {list(cells)}, "
                         "and a row for each combination")
    table = table.reindex(columns=cells.columns, fill_value="")
    table, _ = data.complete_treatments(table)          # doses as numbers, dmso as DMSO
    named = pd.MultiIndex.from_frame(table[columns])
    return pd.MultiIndex.from_frame(cells[columns]).isin(named)


def name_list(text):
    """DAPI,Tubulin,Actin -> a list, for argparse."""
    return text.split(",")


def positive(text):
    """A whole number of 1 or more, for argparse, which refuses what is no number."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--simulate", type=positive, nargs="?", const=4000, metavar="N",
        help="N simulated cells (default 4000)")
    source.add_argument("--crops", metavar="DIR",
        help="folder of crops, <stem>/<stem>_<k>.npy, with its metadata.csv")
    source.add_argument("--images", metavar="DIR",
        help="whole fields: TIFF files anywhere below DIR")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR",
        help="the prepared folder to write")
    target.add_argument("--write-release", metavar="DIR",
        help="with --simulate: write fields, BBBC021's tables and CellProfiler's instead")
    add = parser.add_argument
    add("--features", metavar="TABLE",
        help="with --crops: CSV of CellProfiler measurements, key column Single_Cell_Image_Id")
    add("--stored-order", type=name_list, default="DAPI,Actin,Tubulin", metavar="NAMES",
        help="with --crops: channels in the files' order (default %(default)s)")
    add("--cellprofiler", metavar="EXPORT",
        help="with --images: CellProfiler's folder of CSV files (or of such folders), or SQLite file "
             "(default: measured here)")
    add("--objects", type=objects_argument, metavar="PAIRS",
        help="with --cellprofiler: other names of its objects, e.g. Nuclei=FilteredNuclei,Cells=BigCells")
    add("--image-csv", metavar="FILE",
        help="with --images: BBBC021_v1_image.csv, what a field is (default: CellProfiler's Metadata_)")
    add("--channels", type=name_list, default="DAPI,Tubulin,Actin", metavar="NAMES",
        help="one to three channels in order; with --images the names of the FileName_ columns (default "
             "%(default)s)")
    add("--size", type=positive, default=SIZE, metavar="PIXELS",
        help="side of a patch (default %(default)s); that of the files with --crops")
    add("--depth", type=positive, metavar="PIXELS",
        help="with --simulate: z-stacks of nucleus, cell and one of several structures (1: flat ones), for the Statistical Cell")
    add("--moa", metavar="FILE",
        help="BBBC021_v1_moa.csv: mechanisms by compound and dose (default: the metadata's own)")
    add("--columns", metavar="REGEX",
        help="keep only features that match, e.g. '^Nuclei_AreaShape'")
    add("--drop-duplicates", action="store_true",
        help="drop features that are identical to an earlier one")
    add("--normalise", choices=["train", "plate-dmso"], default="train",
        help="features as measured, or in standard deviations of the DMSO cells of their own plate")
    add("--split", choices=["cell", "field", "well", "plate", "compound", "moa"], default="cell",
        help="unit that never stands in two splits (default cell, the paper)")
    add("--exclude", metavar="FILE",
        help="CSV of what to leave out: columns of cells.csv, a row for each combination. In BBBC021 taxol "
             "0.3 uM is also the positive control of every plate: name their wells by "
             "plate,well,compound,concentration")
    add("--skip-bad", action="store_true",
        help="leave out cells whose patch or field is missing or malformed, and count them")
    add("--seed", type=data.seed, default=0,
        help="of the split and of the simulation (default 0)")
    add("--workers", type=positive, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that read patches (default: the CPUs, 8 at most)")
    args = parser.parse_args(argv)
    if args.write_release and not args.simulate:
        parser.error("--write-release DIR goes with --simulate")
    if args.depth and (args.write_release or not args.simulate):
        parser.error("--depth goes with --simulate and --out")
    if args.depth and args.channels != list(CHANNELS):
        own = ",".join(SOLID_CHANNELS)
        parser.error(f"--depth has channels of its own, {own}: leave --channels out")
    if args.crops and not args.features:
        parser.error("--crops needs --features TABLE: CellProfiler measurements")
    known = args.stored_order if args.crops else CHANNELS
    unknown = set(args.channels) - set(known)
    if len(args.channels) > 3 or unknown and not args.images:
        parser.error(f"--channels {args.channels}: expected one to three of {known} unless with --images")
    return args


def main(argv=None):
    args = parse(argv)
    data.keep_freed_memory()
    out = Path(args.out or args.write_release)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name, or delete it")
    if args.write_release:
        write_release(out, args.simulate, args.seed, args.size)
        print(f"{out}: images, CellProfiler's and BBBC021's tables; --help shows how to prepare such fields")
        return

    moa = data.read_moa(args.moa) if args.moa else None
    if args.depth:
        args.channels = SOLID_CHANNELS
        source = solids(args.simulate, args.seed, args.size, args.depth, args.columns)
    elif args.simulate:
        source = simulation(args.simulate, args.seed, args.channels, args.size, args.columns)
    elif args.crops:
        source = crops(args.crops, args.features, args.channels, args.stored_order, args.size, args.columns)
    else:
        export = args.cellprofiler
        if not export:
            export = Path(f"{out}.measured", "-".join(args.channels))
            measure_fields(args.images, export, args.image_csv, args.channels, args.workers, args.skip_bad)
        source = fields(
            args.images,
            export,
            args.image_csv,
            args.channels,
            args.size,
            args.columns,
            args.skip_bad,
            args.objects,
        )
    if not source.names:
        raise InputError("no feature column that --columns keeps; expected names like Nuclei_AreaShape_Area")
    cells, completed = data.complete_cells(source.cells, moa)
    print(*source.report, *completed, sep="\n")
    stay = np.ones(len(cells), bool)
    if args.exclude:
        stay = ~excluded(cells, args.exclude)
        print(f"{len(cells) - stay.sum()} cells excluded by {args.exclude}")
    options = vars(args).copy()
    for name in ("out", "workers", "write_release"):
        del options[name]
    work = out.with_name(out.name + ".partial")
    shape = args.size, args.size
    depth = args.depth or 1
    if depth > 1:
        shape = depth, *shape
    try:
        write_folder(
            work,
            source,
            cells,
            stay,
            args.channels,
            shape,
            options,
            args.workers,
            args.skip_bad,
        )
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)         # of a preparation that was refused or stopped
    print(describe(data.open_folder(out)))
    print(f"next: python train.py --data {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (InputError, OSError, re.error) as error:        # re.error: of --columns
        sys.exit(f"prepare_bbbc021.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
