"""Make a prepared folder (see data.py): patches and CellProfiler measurements of single cells, in memory-mapped arrays.

    python prepare_bbbc021.py --simulate --out out/                                       # simulated cells, no download
    python prepare_bbbc021.py --crops DIR --features features.csv.gz --out real/          # BBBC021 crops as they circulate
    python prepare_bbbc021.py --images DIR --cellprofiler EXPORT --image-csv BBBC021_v1_image.csv --moa BBBC021_v1_moa.csv --out real/
    python prepare_bbbc021.py --simulate --write-release DIR                              # fields and tables to try the line above on
    python prepare_bbbc021.py --check out/                                                # compare every checksum

Work goes to OUT.partial and is renamed to OUT when it is whole; an interrupted preparation goes on where it was. Memory stays bounded
whatever the number of cells.
"""
import argparse
import filecmp
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import CELL_COLUMNS, CHANNELS, CHUNK, FULL_SCALE, SIZE, InputError, concentration, read_csv, read_moa, sort_columns

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of cells (paper, section 4.1)
MAX_MISSING = 0.05  # share of cells without a value, above which a feature is dropped
CLIP = 10.0  # standard deviations (model.CLIP): here only counted
SAVE_EVERY = 2.0  # seconds: what an interrupted preparation reads again at most
WHITE = 0.999  # quantile of the training pixels that image value 1 stands for with --image-norm percentile


# ---------------------------------------------------------------------------------------------------------------------
# A simulated BBBC021: caricatures of MCF7 cells whose true parameters are the CellProfiler columns

FIELD = (512, 640)  # pixels, height and width of a simulated field
CELLS_PER_FIELD = 32
APART = 42  # pixels, least distance of two simulated nuclei
WINDOW = 112  # pixels, side of the square in which one cell is drawn
BACKGROUND = (0.010, 0.020, 0.016)  # DAPI, Tubulin, Actin, in CellProfiler's 0..1
NOISE = 0.003  # standard deviation of the camera's noise, same unit

# What the renderer reads, with the mean over DMSO cells and the spread between cells (a factor's log-sd, or an sd where marked +).
PARAMETERS = {
    "Nuclei_AreaShape_Area": (850, 0.16),  # pixels
    "Nuclei_AreaShape_Eccentricity": (0.62, "+0.12"),
    "Nuclei_AreaShape_Orientation": (0, "uniform"),  # degrees, -90..90 from the vertical, down-right positive (CellProfiler)
    "Nuclei_Intensity_MeanIntensity_DAPI": (0.12, 0.15),
    "Nuclei_Intensity_StdIntensity_DAPI": (0.022, 0.20),
    "Cytoplasm_AreaShape_Area": (1700, 0.20),  # pixels, cell without nucleus
    "Cells_AreaShape_Eccentricity": (0.60, "+0.12"),
    "Cells_AreaShape_Orientation": (0, "near nucleus"),
    "Cytoplasm_Intensity_MeanIntensity_Tubulin": (0.11, 0.18),
    "Cytoplasm_Intensity_StdIntensity_Tubulin": (0.032, 0.18),
    "Cytoplasm_Intensity_MeanIntensity_Actin": (0.08, 0.18),
    "Cytoplasm_Intensity_StdIntensity_Actin": (0.024, 0.18),
}
NOISE_COLUMNS = [f"Nuclei_Noise_{i}" for i in range(4)]  # no picture shows these: what a generator must not pretend to render

# Mechanism: two compounds of BBBC021 and the factors on the parameters above (by their names as `short` makes them), after real medians.
MECHANISMS = {
    "Actin disruptors": (("latrunculin B", 3), ("cytochalasin B", 10), {"Cytoplasm_Area": 0.62, "Std_Actin": 2.0}),
    "Aurora kinase inhibitors": (("AZ258", 1), ("AZ841", 0.3), {"Nuclei_Area": 1.65, "Mean_DAPI": 0.8, "Std_DAPI": 1.3}),
    "Cholesterol-lowering": (("simvastatin", 6), ("mevinolin/lovastatin", 5), {"Cytoplasm_Area": 0.42, "Mean_Tubulin": 1.25}),
    "DNA damage": (("mitomycin C", 1), ("etoposide", 3), {"Nuclei_Area": 1.25, "Cytoplasm_Area": 1.3, "Std_DAPI": 1.2}),
    "DNA replication": (("camptothecin", 0.003), ("methotrexate", 10), {"Nuclei_Area": 1.22, "Mean_DAPI": 0.78}),
    "Eg5 inhibitors": (("AZ-C", 0.1), ("AZ138", 0.1), {"Nuclei_Area": 0.75, "Mean_DAPI": 1.44, "Std_DAPI": 1.5, "Mean_Tubulin": 1.3}),
    "Epithelial": (("PP-2", 3), ("AZ-J", 1), {"Cytoplasm_Area": 1.25, "Mean_Actin": 1.5, "Std_Actin": 1.3}),
    "Kinase inhibitors": (("PD-169316", 3), ("alsterpaullone", 0.1), {"Mean_Actin": 0.68, "Std_Actin": 0.7, "Std_Tubulin": 1.3}),
    "Microtubule destabilizers": (("nocodazole", 1), ("colchicine", 0.03), {"Mean_Tubulin": 0.55, "Std_Tubulin": 0.45, "Nuclei_Area": 0.9}),
    "Microtubule stabilizers": (("taxol", 0.3), ("docetaxel", 0.1), {"Mean_Tubulin": 1.5, "Std_Tubulin": 1.9, "Std_DAPI": 1.4}),
    "Protein degradation": (("MG-132", 0.1), ("ALLN", 3), {"Nuclei_Area": 0.8, "Cytoplasm_Area": 0.75, "Mean_Tubulin": 1.2}),
    "Protein synthesis": (("emetine", 0.1), ("cyclohexamide", 5), {"Mean_Actin": 0.6, "Mean_Tubulin": 0.75, "Nuclei_Area": 0.92}),
}
LOWER_DOSES = [("latrunculin B", 1, 0.6), ("taxol", 0.03, 0.5)]  # compound, uM, share of the full effect


def simulated_plates(seed):
    """One row a well (plate, well, replicate, compound, concentration, moa, strength) of 4 weeks x 3 plates with 3 DMSO wells each.
    As in BBBC021 a compound lives in one week, on three replicate plates."""
    wells = []
    for week in range(4):
        here = []
        for i, (moa, (first, second, _)) in enumerate(MECHANISMS.items()):
            if i // 6 == week % 2:
                compound, dose = (first, second)[week // 2]
                here.append((compound, dose, moa, 1.0 if week < 2 else 0.85))
                here += [(c, d, moa, share) for c, d, share in LOWER_DOSES if c == compound]
        here += [("DMSO", 0, "DMSO", 0.0)] * 3
        for replicate in range(3):
            order = np.random.default_rng([seed, 1, week, replicate]).permutation(len(here))
            plate = f"Week{week + 1}_sim{3 * week + replicate + 1:02d}"
            wells += [(plate, f"{'BCDEFG'[k % 6]}{2 + k // 6:02d}", str(replicate + 1), *here[j]) for k, j in enumerate(order)]
    return pd.DataFrame(wells, columns=["plate", "well", "replicate", "compound", "concentration", "moa", "strength"])


def simulate_table(n, seed):
    """n simulated cells -> (cells frame with x, y in pixels of their field, features frame with all true columns)."""
    wells = simulated_plates(seed)
    sites = max(1, -(-n // (len(wells) * CELLS_PER_FIELD)))
    fields = wells.loc[wells.index.repeat(sites)].reset_index(drop=True)
    fields["site"] = [str(s % sites + 1) for s in range(len(fields))]
    fields["field"] = fields["plate"] + "_" + fields["well"] + "_s" + fields["site"]
    share = np.diff(np.linspace(0, n, len(fields) + 1).round().astype(int))  # cells of each field
    cells = fields.loc[fields.index.repeat(share)].reset_index(drop=True)
    cells["cell"] = cells["field"] + "_" + cells.groupby("field").cumcount().astype(str)
    cells[["x", "y"]] = np.concatenate([scatter(k, [seed, 2, i]) for i, k in enumerate(share)])

    random = np.random.default_rng([seed, 3])
    gain = np.exp(random.normal(0, 0.12, (12, 3)))[pd.factorize(cells["plate"], sort=True)[0]]  # staining and lamp, per plate and channel
    well_effect = random.normal(0, 0.03, (len(wells), len(PARAMETERS)))[wells.index.repeat(sites).repeat(share)]  # log, per well
    table = pd.DataFrame(index=cells.index)
    for j, (name, (centre, spread)) in enumerate(PARAMETERS.items()):
        z = np.clip(random.normal(size=n), -2.5, 2.5)
        if spread == "uniform":
            table[name] = random.uniform(-90, 90, n)
        elif spread == "near nucleus":
            table[name] = (table["Nuclei_AreaShape_Orientation"] + 25 * z + 90) % 180 - 90
        elif str(spread).startswith("+"):
            table[name] = np.clip(centre + float(spread) * z, 0.1, 0.92)
        else:
            factor = cells["moa"].map({m: effect.get(short(name), 1.0) for m, (_, _, effect) in MECHANISMS.items()}).fillna(1.0)
            table[name] = centre * factor ** cells["strength"] * np.exp(spread * z + well_effect[:, j])
            for c, channel in enumerate(CHANNELS):
                if name.endswith(channel):
                    table[name] *= gain[:, c]
    return cells, with_derived(table, random.normal(size=(n, len(NOISE_COLUMNS))))


def short(name):
    """Cytoplasm_Intensity_StdIntensity_Actin -> Std_Actin, Nuclei_AreaShape_Area -> Nuclei_Area."""
    return re.sub(r".*_(Mean|Std)Intensity_", r"\1_", name).replace("_AreaShape_", "_")


def with_derived(table, noise):
    """The renderer's parameters plus the columns that follow from them, and noise columns: what CellProfiler would report."""
    out = table.copy()
    nucleus, cytoplasm = table["Nuclei_AreaShape_Area"], table["Cytoplasm_AreaShape_Area"]
    out["Cells_AreaShape_Area"] = nucleus + cytoplasm
    out["Nuclei_Intensity_IntegratedIntensity_DAPI"] = nucleus * table["Nuclei_Intensity_MeanIntensity_DAPI"]
    for name, area in (("Nuclei", nucleus), ("Cells", nucleus + cytoplasm)):
        a, b = axes(area, table[f"{name}_AreaShape_Eccentricity"])
        angle = np.radians(table[f"{name}_AreaShape_Orientation"])
        out[f"{name}_AreaShape_MajorAxisLength"], out[f"{name}_AreaShape_MinorAxisLength"] = 2 * a, 2 * b
        out[f"{name}_AreaShape_InertiaTensor_0_0"] = ((a * np.sin(angle)) ** 2 + (b * np.cos(angle)) ** 2) / 4  # variance along columns
        out[f"{name}_AreaShape_InertiaTensor_1_1"] = ((a * np.cos(angle)) ** 2 + (b * np.sin(angle)) ** 2) / 4  # variance along rows
        out[f"{name}_AreaShape_InertiaTensor_0_1"] = -(a ** 2 - b ** 2) * np.sin(angle) * np.cos(angle) / 4
    out[NOISE_COLUMNS] = noise
    return out


def axes(area, eccentricity):
    """Half axes a >= b (pixels) of the ellipse with that area (pixels) and eccentricity."""
    ratio = np.sqrt(1 - eccentricity ** 2)
    return np.sqrt(area / (np.pi * ratio)), np.sqrt(area * ratio / np.pi)


def scatter(k, seed):
    """k places (x, y) in a field, APART pixels from each other and far enough from the edge for a crop."""
    random = np.random.default_rng(seed)
    low, high = np.array([35.0, 35.0]), np.array([FIELD[1] - 35.0, FIELD[0] - 35.0])
    places = np.empty((0, 2))
    while len(places) < k:
        for p in random.uniform(low, high, (200, 2)):
            if len(places) < k and (not len(places) or ((places - p) ** 2).sum(1).min() > APART ** 2):
                places = np.vstack([places, p])
    return places


def draw_cells(table, offset, seed, window=WINDOW):
    """Draws each row of `table` (the columns of PARAMETERS) alone, without background: pictures (N, 3, window, window) float32 in
    CellProfiler's 0..1, and how much of each pixel the cell covers (N, window, window). `offset` (N, 2): row and column of the nucleus'
    centre from the middle of the window, pixels. `seed`: what the parameters leave open (fibres, texture, the outline's bumps). Mean and
    standard deviation of the intensities are exact over the drawn compartments."""
    random, n = np.random.default_rng(seed), len(table)
    p = {short(name): table[name].to_numpy(np.float64)[:, None, None] for name in PARAMETERS}
    grid = np.arange(window) - (window - 1) / 2
    row = grid[None, :, None] - offset[:, 0, None, None]
    col = grid[None, None, :] - offset[:, 1, None, None]
    angle = np.arctan2(col, row)

    def waves(k, low, high):
        """A smooth random texture (N, window, window): k plane waves, wavelengths low..high pixels."""
        total = np.zeros((n, window, window))
        for direction, length, phase in random.uniform((0, low, 0), (2 * np.pi, high, 2 * np.pi), (k, n, 1, 1, 3)).transpose(0, 4, 1, 2, 3):
            total += np.sin((row * np.cos(direction) + col * np.sin(direction)) * (2 * np.pi / length) + phase)
        return total

    def ellipse(area, eccentricity, orientation, bumps, soft):
        """(coverage 0..1 with an edge `soft` pixels wide, distance from the centre in units of the radius)"""
        a, b = axes(area, eccentricity)
        t = np.radians(orientation)
        q = np.hypot((row * np.cos(t) + col * np.sin(t)) / a, (col * np.cos(t) - row * np.sin(t)) / b)
        for k in (3, 5):  # bumps that leave area, centre and direction alone to first order
            q = q * (1 + bumps * random.uniform(0.5, 1, (n, 1, 1)) * np.cos(k * angle + random.uniform(0, 2 * np.pi, (n, 1, 1))))
        return np.clip((1 - q) * np.sqrt(a * b) / soft + 0.5, 0, 1), q

    def fill(mask, pattern, mean, sd):
        """mean + sd * pattern, the pattern brought to mean 0 and sd 1 over the mask (pixels more than half covered)"""
        inside = mask > 0.5
        count = np.maximum(inside.sum((1, 2), keepdims=True), 1)
        centred = pattern - (pattern * inside).sum((1, 2), keepdims=True) / count
        spread = np.sqrt((centred ** 2 * inside).sum((1, 2), keepdims=True) / count)
        return np.clip(mean + sd * centred / np.maximum(spread, 1e-9), 0, None)

    nucleus, q_nucleus = ellipse(p["Nuclei_Area"], p["Nuclei_Eccentricity"], p["Nuclei_Orientation"], 0.03, 3)
    whole = p["Nuclei_Area"] + p["Cytoplasm_Area"]
    cell, q_cell = ellipse(whole, p["Cells_Eccentricity"], p["Cells_Orientation"], 0.07, 4)
    cell = np.maximum(cell, nucleus)
    cytoplasm = cell * (1 - nucleus)

    # -|waves| is bright along lines: filaments
    dapi = fill(nucleus, -np.abs(waves(4, 12, 26)) - 1.2 * q_nucleus ** 2, p["Mean_DAPI"], p["Std_DAPI"])
    fibres = -0.5 * np.abs(waves(3, 16, 34)) - 0.35 * np.abs(waves(3, 9, 16))
    tubulin = fill(cytoplasm, fibres - 2.5 * q_cell, p["Mean_Tubulin"], p["Std_Tubulin"])
    tubulin = tubulin * cytoplasm + 0.8 * p["Mean_Tubulin"] * nucleus
    rim = np.exp(-((1 - q_cell) * np.sqrt(whole / np.pi) / 3.5) ** 2)
    actin = fill(cytoplasm, 1.5 * rim - 0.4 * np.abs(waves(3, 10, 30)), p["Mean_Actin"], p["Std_Actin"])
    actin = actin * cytoplasm + 0.7 * p["Mean_Actin"] * nucleus
    return np.stack([dapi * nucleus, tubulin, actin], 1).astype(np.float32), cell.astype(np.float32)


def render(table, seed=0):
    """The simulator as a perfect generator: true parameters -> (N, 3, 68, 68) float32 in CellProfiler's 0..1, cell centred, no noise."""
    x, _ = draw_cells(table, np.zeros((len(table), 2)), seed, SIZE)
    return x + np.array(BACKGROUND, np.float32)[:, None, None]


def simulate_field(table, x, y, seed):
    """Simulated cells at x (columns) and y (rows), pixels -> a field (3, H, W) uint16, 12-bit values in the high bits, as BBBC021."""
    middle = (WINDOW - 1) / 2
    r0, c0 = np.floor(y - middle).astype(int), np.floor(x - middle).astype(int)
    drawn, covers = draw_cells(table, np.stack([y - r0 - middle, x - c0 - middle], 1), seed)
    canvas = np.zeros((3, FIELD[0] + 2 * WINDOW, FIELD[1] + 2 * WINDOW), np.float32)
    for picture, cover, r, c in zip(drawn, covers, r0 + WINDOW, c0 + WINDOW):
        view = canvas[:, r:r + WINDOW, c:c + WINDOW]
        np.maximum(view[0], picture[0], out=view[0])  # nuclei shine through
        view[1:] = np.where(picture[1:].sum(0) > 0, view[1:] * (1 - cover) + picture[1:], view[1:])
    field = canvas[:, WINDOW:-WINDOW, WINDOW:-WINDOW] + np.array(BACKGROUND, np.float32)[:, None, None]
    random = np.random.default_rng(seed)
    field += NOISE * np.sqrt(1 + 8 * field) * random.standard_normal(field.shape, dtype=np.float32)  # read-out and photons
    return (field.clip(0, 1) * 4095).round().astype(np.uint16) * 16


def cut(field, x, y):
    """Crops (n, C, 68, 68) uint16 of a field's C channels (H, W) around x (columns), y (rows), all inside: the centre is in pixel 34."""
    patches = np.empty((len(x), len(field), SIZE, SIZE), np.uint16)
    for patch, r, c in zip(patches, np.floor(y).astype(int) - SIZE // 2, np.floor(x).astype(int) - SIZE // 2):
        for k, channel in enumerate(field):
            patch[k] = channel[r:r + SIZE, c:c + SIZE]
    return patches


def write_release(folder, cells, table, seed):
    """The simulated fields as BBBC021 and CellProfiler write them: images/, BBBC021_v1_image.csv and _moa.csv, cellprofiler/*.csv.
    As in real exports the numbers of cells and cytoplasms are not those of their nuclei: Parent_ columns tell. Returns how many fields."""
    folder, export = Path(folder), Path(folder) / "cellprofiler"
    export.mkdir(parents=True)
    per_field = cells.groupby("field", sort=False)
    fields = per_field.head(1).reset_index(drop=True)
    image = pd.DataFrame({"TableNumber": 0, "ImageNumber": np.arange(len(fields)) + 1})
    for name, file in zip(CHANNELS, ("w1", "w2", "w4")):
        image[f"Image_FileName_{name}"] = fields["field"] + f"_{file}.tif"
        image[f"Image_PathName_{name}"] = fields["plate"].str.split("_").str[0] + "/" + fields["plate"]
    image = image.assign(Image_Metadata_Plate_DAPI=fields["plate"], Image_Metadata_Well_DAPI=fields["well"], Replicate=fields["replicate"],
                         Image_Metadata_Compound=fields["compound"],
                         Image_Metadata_Concentration=fields["concentration"].map("{:.6f}".format))
    image.to_csv(folder / "BBBC021_v1_image.csv", index=False)
    moa = fields[["compound", "concentration", "moa"]].drop_duplicates()
    moa.to_csv(folder / "BBBC021_v1_moa.csv", index=False, lineterminator="\r")  # as the real one

    for i, (_, own) in enumerate(per_field):
        pixels = simulate_field(table.loc[own.index], own["x"].to_numpy(), own["y"].to_numpy(), [seed, 5, own.index[0]])
        path = folder / "images" / image["Image_PathName_DAPI"][i]
        path.mkdir(parents=True, exist_ok=True)
        for name, channel in zip(CHANNELS, pixels):
            Image.fromarray(channel).save(path / image[f"Image_FileName_{name}"][i], format="TIFF")
    own = image.filter(regex="FileName|PathName|ImageNumber").rename(columns=lambda c: c.removeprefix("Image_"))
    own.to_csv(export / "Image.csv", index=False)
    nucleus, last = per_field.cumcount() + 1, per_field["cell"].transform("size")
    for name, number in (("Nuclei", nucleus), ("Cells", last + 1 - nucleus), ("Cytoplasm", nucleus % last + 1)):
        own = pd.DataFrame({"ImageNumber": per_field.ngroup() + 1, "ObjectNumber": number})
        place = {"Location_Center_X": cells["x"], "Location_Center_Y": cells["y"]}
        own = own.assign(**place if name == "Nuclei" else {"Parent_Nuclei": nucleus})
        measured = table.filter(regex=f"^{name}_").rename(columns=lambda c: c.removeprefix(name + "_"))
        pd.concat([own, measured], axis=1).sort_values(["ImageNumber", "ObjectNumber"]).to_csv(export / f"{name}.csv", index=False)
    return len(fields)


def simulated_unit(unit):
    """The patches of one simulated field; unit = (table, x, y, seed, positions of the cells that are kept)."""
    table, x, y, seed, kept = unit
    return cut(simulate_field(table, x, y, seed), x[kept], y[kept]), {}


# ---------------------------------------------------------------------------------------------------------------------
# Crops as they circulate: DIR/<DAPI stem>/<DAPI stem>_<k>.npy and DIR/metadata.csv

KEY = "Single_Cell_Image_Id"
CROPS_AT_ONCE = 256  # files in a unit of work


def complete_cells(cells, moa=None):
    """Fills the columns of cells.csv from what is there: text, concentrations, site, mechanism; returns (cells, report lines)."""
    report = []
    if "concentration" in cells:
        cells["concentration"] = [concentration(str(v), f"cell {c}") for c, v in zip(cells["cell"], cells["concentration"])]
    if "site" not in cells:
        cells["site"] = cells["field"].str.extract(r"_s(\d+)(?:_|$)", expand=False).fillna("unknown")
    for name in CELL_COLUMNS[:-1]:
        if name not in cells:
            cells[name] = np.nan if name in ("concentration", "x", "y") else "unknown"
        if name in data.TEXT_COLUMNS:
            cells[name] = cells[name].astype(str).replace("", "unknown")
            if name not in ("cell", "moa") and (missing := int((cells[name] == "unknown").sum())):
                report.append(f"{missing} cells have no {name}: set to 'unknown'")
    if moa is not None:
        cells["moa"] = [moa.get(pair, "unknown") for pair in zip(cells["compound"], cells["concentration"])]
    cells.loc[cells["compound"] == "DMSO", ["moa", "concentration"]] = "DMSO", 0.0
    if without := int((cells["moa"] == "unknown").sum()):
        report.append(f"{without} cells have no mechanism: set to 'unknown'")
    return cells[CELL_COLUMNS[:-1]], report


def crops_table(folder, features, keep=None, moa=None):
    """Joins the crops' metadata with the table of measurements, reading only the keys: (cells, feature names, dropped, pieces, report).
    `pieces` (see data.fill_features): where the rows of the table of measurements belong; their values are read later, in chunks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of crops")
    columns = list(read_csv(features, nrows=0).columns)
    if KEY not in columns:
        raise InputError(f"{features}: no key column {KEY!r} (the crop's file name), found {columns[:3]}, ...")
    names, dropped, other = sort_columns(columns, keep)
    keys = read_csv(features, usecols=[KEY], dtype=str)[KEY]
    report = [f"{features}: {len(keys)} rows; {len(names)} features, {len(dropped)} columns set aside; "
              f"metadata columns: {', '.join(other)}"]

    source = folder / "metadata.csv"
    if not source.is_file():
        report.append(f"{folder}: no metadata.csv; plate, well and treatment are taken from {features} where it has them")
        source = features
    table = read_csv(source, dtype=str, usecols=other if source == features else None)
    if KEY not in table:
        raise InputError(f"{source}: no column {KEY!r}, found {list(table.columns)}")
    for path, key in ((features, keys), (source, table[KEY])):
        if (twice := key.duplicated()).any():
            raise InputError(f"{path}: {KEY} {key[twice].iloc[0]!r} stands in more than one row; each cell needs one row")
    cells = data.annotate(table)
    in_table, in_cells = cells["cell"].isin(keys), keys.isin(cells["cell"])
    for absent, text in ((cells["cell"][~in_table], f"cells of {source} have no row in {features}"),
                         (keys[~in_cells], f"rows of {features} have no cell in {source}")):
        if len(absent):
            report.append(f"{len(absent)} {text}, first: {absent.iloc[0]}")
    report.append(f"{in_table.sum()} cells matched")
    if not in_table.any():
        raise InputError(f"no {KEY} of {source} is in {features}: 0 cells matched, e.g. {table[KEY].iloc[0]!r} against {keys.iloc[0]!r}")
    if "field" not in cells:
        cells["field"] = cells["cell"].str.replace(r"_\d+(\.npy)?$", "", regex=True)
    place = pd.Index(cells["cell"]).get_indexer(keys)
    pieces = [({"path": features, "table": None, "names": columns, "skip": 1}, names, place)]
    cells, pieces = data.keep_cells(cells, pieces, in_table.to_numpy())
    cells, more = complete_cells(cells, moa)
    return cells, names, dropped, pieces, report + more


def crops_unit(unit):
    """The patches of a run of crops, channels reordered; unit = (files, order). Bad files are reported as {position: reason}."""
    files, order = unit
    patches, bad = np.zeros((len(files), len(order), SIZE, SIZE), np.uint16), {}
    for i, file in enumerate(files):
        try:
            crop = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            bad[i] = f"{file}: missing or unreadable ({str(error).splitlines()[0][:80]})"
            continue
        if crop.shape != (SIZE, SIZE, len(order)) or crop.dtype != np.uint16:
            bad[i] = f"{file}: {crop.dtype} {crop.shape}, expected uint16 ({SIZE}, {SIZE}, {len(order)})"
            continue
        patches[i] = crop.transpose(2, 0, 1)[order]
    return patches, bad


# ---------------------------------------------------------------------------------------------------------------------
# Whole fields: TIFF files, cells where CellProfiler found them


def index_files(folder):
    """{file name: path} of every TIFF below a folder; one name with two different contents is refused."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".tif", ".tiff") and not p.name.startswith(".")):
        first = found.setdefault(path.name, path)
        if first is not path and not filecmp.cmp(first, path, shallow=False):
            raise InputError(f"{first} and {path} have one name and different pixels; images are found by name: give a folder with one")
    if not found:
        raise InputError(f"{folder}: no .tif or .tiff in it or below; give --images the folder of the fields")
    return found


def read_tiff(path, header_only=False):
    """One grey field -> (H, W) uint16 or uint8, uncompressed, LZW, deflate or PackBits; `header_only`: just its (H, W). InputError.
    Pillow reads it, but for uncompressed strips that lie end to end (BBBC021 has 342 of 3 rows): one np.fromfile is ten times as fast."""
    try:
        with Image.open(path) as image:
            tag, h, w = image.tag_v2 if image.format == "TIFF" else {262: None}, image.height, image.width
            if image.mode not in ("L", "I;16", "I;16B") or tag.get(262, 1) != 1 or image.n_frames > 1:
                raise InputError(f"{path}: {image.format} of mode {image.mode}, expected a TIFF of one page, one grey channel, "
                                 "8 or 16 bits, black 0")
            if header_only:
                return h, w
            dtype = np.dtype("u1" if image.mode == "L" else "<u2" if tag.prefix == b"II" else ">u2")
            start, length = np.array(tag.get(273, ())), np.array(tag.get(279, ()))
            plain = tag.get(259, 1) == tag.get(266, 1) == 1 and tag.get(258) == (8 * dtype.itemsize,)  # compression, bits' order and number
            if plain and (start[1:] == (start + length)[:-1]).all() and length.sum() == w * h * dtype.itemsize:
                pixels = np.fromfile(path, dtype, w * h, offset=int(start[0])).reshape(h, w)
            else:
                pixels = np.asarray(image)
            return pixels.astype(dtype.newbyteorder("="), copy=False)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged, cut short or no TIFF ({error}); copy it again") from None


def fields_table(folder, export, image_csv, channels, keep=None, moa=None, skip_bad=False):
    """The cells of CellProfiler's export whose crops lie inside their fields: (cells, feature names, dropped, pieces, report, files).
    `files` {field: its files in the order of `channels`}; what a field is (plate, compound, ...) tells `image_csv`, else the export."""
    cells, images, names, dropped, pieces, report = data.read_export(export, channels[0], keep, skip_bad)
    for c in channels:
        if f"FileName_{c}" not in images or (images[f"FileName_{c}"] == "").any():
            has = [n.removeprefix("FileName_") for n in images if n.startswith("FileName_")]
            raise InputError(f"{export}: channel {c} has no file name for every field, names are of {', '.join(has) or 'none'}; "
                             "see --channels")
    found, named = index_files(folder), images[[f"FileName_{c}" for c in channels]].to_numpy()
    files = {field: [found.get(name, Path(folder) / name) for name in row] for field, row in zip(images["field"], named)}
    if image_csv:
        table = read_csv(image_csv, dtype=str)
        if "Image_FileName_DAPI" not in table:
            raise InputError(f"{image_csv}: no column Image_FileName_DAPI, found {list(table.columns)}")
        told = data.annotate(table).set_axis(table["Image_FileName_DAPI"])
        file = images[f"FileName_{channels[0]}"]
        if told.index.has_duplicates or not file.isin(told.index).any():
            twice = told.index[told.index.duplicated()]
            wrong = f"{twice[0]} stands in two rows" if len(twice) else f"no file of {export} is in it, e.g. {file.iloc[0]}"
            raise InputError(f"{image_csv}: {wrong}; give the table of these images")
        told = told.reindex(file).fillna("").iloc[cells["image"]].reset_index(drop=True)
        cells = pd.concat([cells[["cell", "field", "image", "x", "y"]], told], axis=1)

    size = np.full((len(images), 2), np.inf)  # height, width
    for i in cells["image"].unique():
        try:
            size[i] = read_tiff(files[images["field"][i]][0], header_only=True)
        except InputError:
            if not skip_bad:  # else said when the patches are read
                raise
    low, (height, width) = SIZE // 2, size[cells["image"]].T
    x, y = np.floor(cells["x"]), np.floor(cells["y"])
    inside = ((x >= low) & (y >= low) & (x + SIZE - low <= width) & (y + SIZE - low <= height)).to_numpy()
    if not inside.all():
        report.append(f"{(~inside).sum()} of {len(cells)} cells lie less than half a crop from the edge of their field: left out")
    cells, pieces = data.keep_cells(cells, pieces, inside)
    cells, more = complete_cells(cells.drop(columns="image"), moa)
    return cells, names, dropped, pieces, report + more, files


def fields_unit(unit):
    """The patches of one field; unit = (files, x, y). A file that is bad makes all cells of the field bad."""
    files, x, y = unit
    patches, shape = np.zeros((len(x), len(files), SIZE, SIZE), np.uint16), None
    try:
        for k, file in enumerate(files):
            channel = read_tiff(file)
            shape = shape or channel.shape
            if channel.shape != shape:
                raise InputError(f"{file}: {channel.shape[1]} x {channel.shape[0]} pixels, {files[0].name} has {shape[1]} x {shape[0]}")
            patches[:, k] = cut(channel[None], x, y)[:, 0]
            if channel.dtype == np.uint8:
                patches[:, k] *= 257  # 255 becomes 65535: CellProfiler calls both 1
    except InputError as error:
        return patches, dict.fromkeys(range(len(x)), str(error))
    return patches, {}


# ---------------------------------------------------------------------------------------------------------------------
# Splits and standardisation


def split_cells(cells, by, seed):
    """A split for each cell, no group on both sides: groups are shuffled by the seed and go to the split furthest below its share.
    `by`: cell (the paper, whose neighbours in a field then stand on both sides), field, well, plate or compound. A group with over 10 %
    of all cells always trains. Returns (N,) names; InputError where a split would be empty."""
    if by == "cell":
        group = np.arange(len(cells))
    else:
        group = pd.factorize(cells["plate"] + " " + cells["well"] if by == "well" else cells[by])[0]
    size, names = np.bincount(group), list(SHARES)
    target, have, side = np.array(list(SHARES.values())), np.zeros(len(names)), np.zeros(len(size), int)
    large = size > 0.1 * len(cells)
    have[0] = size[large].sum()
    for g in np.random.default_rng(seed).permutation(len(size)):
        if not large[g]:
            side[g] = np.argmax(target - have / len(cells))
            have[side[g]] += size[g]
    if (have == 0).any():
        raise InputError(f"--split {by}: {len(size)} groups leave no cell for {names[int(np.argmin(have))]} (a group over 10 % of the "
                         "cells always trains); use a finer --split or more cells")
    return np.array(names)[side[group]]


def release(array):
    """Writes a memory-mapped array out and lets go of the memory that it holds in this process (Linux; elsewhere the system does later)."""
    array.flush()
    if hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)


def blocks(array, rows):
    """(slice of `rows`, the array there), CHUNK rows at a time; after each the memory that a memory-mapped array holds is let go."""
    for i in range(0, len(rows), CHUNK):
        yield slice(i, i + CHUNK), array[rows[i:i + CHUNK]]
        release(array)


def column_moments(raw, rows):
    """Count, mean and standard deviation (ddof 0) of the columns of `raw` over the row numbers `rows`, missing left out; float64."""
    count, total, square = np.zeros((3, raw.shape[1]))
    for _, block in blocks(raw, rows):
        values = np.asarray(block, np.float64, order="F")  # summed column by column
        count += np.isfinite(values).sum(0)
        total += np.where(np.isfinite(values), values, 0).sum(0)
    mean = total / np.maximum(count, 1)
    for _, block in blocks(raw, rows):
        values = np.asarray(block, np.float64, order="F")
        square += (np.where(np.isfinite(values), values - mean, 0) ** 2).sum(0)
    return count, mean, np.sqrt(square / np.maximum(count, 1))


def columns_to_drop(raw, rows, names, moments, drop_duplicates):
    """{name: reason} for columns without spread (`moments` of the training cells), over 5 % missing, or (if asked) equal to another."""
    missing, digests, (count, mean, sd) = np.zeros(len(names)), [hashlib.sha1() for _ in names], moments
    for _, block in blocks(raw, rows):
        missing += (~np.isfinite(block)).sum(0)
        for digest, column in zip(digests, block.T if drop_duplicates else ()):
            digest.update(column.tobytes())
    dropped, seen = {}, {}
    for j, name in enumerate(names):
        if missing[j] > MAX_MISSING * len(rows):
            dropped[name] = f"{missing[j] / len(rows):.1%} missing"
        elif count[j] < 2 or sd[j] <= 1e-7 * abs(mean[j]):  # float32 holds 7 digits
            dropped[name] = "no spread over the training cells"
        elif drop_duplicates and digests[j].digest() in seen:
            dropped[name] = f"identical to {seen[digests[j].digest()]}"
        else:
            seen[digests[j].digest()] = name
    return dropped


def plate_scales(raw, keep, cells, train_scale):
    """--normalise plate-dmso: {plate: {centre, scale, cells}} from each plate's DMSO cells; marks the reference cells in cells['split'].
    A plate that has training DMSO cells is scaled by those; a held-out plate by all its DMSO cells, which then are `reference`, in no
    test. Where a plate's DMSO cells show no spread in a feature, `train_scale` is taken. keep: the cells' row numbers in `raw`."""
    plates, dmso = {}, (cells["compound"].str.upper() == "DMSO").to_numpy()
    for plate in sorted(cells["plate"].unique()):
        here = dmso & (cells["plate"] == plate).to_numpy()
        rows = np.flatnonzero(here & (cells["split"] == "train").to_numpy())
        if not len(rows):
            rows = np.flatnonzero(here)
            cells.loc[rows, "split"] = "reference"
        if len(rows) < 2:
            raise InputError(f"plate {plate}: {len(rows)} DMSO cells, --normalise plate-dmso needs at least 2 on every plate; "
                             "use --normalise train or --exclude the plate")
        _, mean, sd = column_moments(raw, keep[rows])
        plates[plate] = {"centre": mean, "scale": np.where(sd > 0, sd, train_scale), "cells": len(rows)}
    return plates


# ---------------------------------------------------------------------------------------------------------------------
# Writing the folder


def begin_worker():
    """A worker computes in one thread, leaves Ctrl-C to its parent and ends when that has died."""
    def watch(parent=os.getppid()):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    data.keep_freed_memory()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def in_order(work, units, workers):
    """work(unit) of every unit in turn, by `workers` processes that are a few units ahead."""
    if workers == 1:
        yield from map(work, units)
        return
    ahead, pool = [], ProcessPoolExecutor(workers, initializer=begin_worker)
    try:
        for unit in units:
            ahead.append(pool.submit(work, unit))
            if len(ahead) == 4 * workers:
                yield ahead.pop(0).result()
        yield from (job.result() for job in ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def read_patches(target, units, read_unit, state, workers, skip_bad):
    """Fills target (N, C, 68, 68) unit by unit; what is done is kept in the file `state`, so that it can be taken up again.
    units: (row of the first cell, unit); read_unit(unit) -> (patches, {position: reason}); a bad patch is refused by name, or with
    skip_bad left black. Returns {row: reason}."""
    done = json.loads(state.read_text()) if state.exists() else {"units": 0, "bad": {}}
    begin, said, saved, n = time.perf_counter(), 0.0, time.perf_counter(), len(target)
    todo = units[done["units"]:]

    def save():
        release(target)
        data.write(state, json.dumps(done))

    try:
        with closing(in_order(read_unit, [unit for _, unit in todo], workers)) as results:
            for (start, _), (patches, bad) in zip(todo, results):
                if bad and not skip_bad:
                    raise InputError(f"{next(iter(bad.values()))}; mend it, or leave such cells out with --skip-bad")
                done["bad"].update({str(start + i): reason for i, reason in bad.items()})
                at = start + len(patches)
                target[start:at] = patches
                done["units"] += 1
                now = time.perf_counter()
                if now - saved > SAVE_EVERY:
                    save()
                    saved = now
                if now - said > 5 or done["units"] == len(units):
                    rate = (at - todo[0][0]) / max(now - begin, 1e-9)
                    print(f"patches {at}/{n} cells | {rate:.0f} cells/s | {(n - at) / rate:.0f} s left", flush=True)
                    said = now
    finally:
        save()
    return {int(row): reason for row, reason in done["bad"].items()}


def white_levels(patches, rows):
    """Per channel, the 99.9 % quantile of the pixels of the given rows, and the number of cells with an all-black channel."""
    count, black = np.zeros((patches.shape[1], FULL_SCALE + 1), np.int64), 0
    for _, block in blocks(patches, rows):
        black += int((block.max((2, 3)) == 0).any(1).sum())
        for k in range(len(count)):
            count[k] += np.bincount(block[:, k].ravel(), minlength=FULL_SCALE + 1)
    return [max(int(np.searchsorted(row, WHITE * row[-1])), 1) for row in count.cumsum(1)], black


def write_folder(out, cells, names, dropped, pieces, units, read_unit, channels, options, workers=1, skip_bad=False):
    """Writes a prepared folder: patches, features, cells.csv, meta.json; takes up OUT.partial where an earlier call was interrupted.
    `pieces`: the measurements (data.fill_features); `units`: (row of the first cell, what `read_unit` takes), see read_patches;
    `options`: split, normalise, drop_duplicates, seed and whatever else describes the call. Returns the meta dictionary."""
    out = Path(out)
    work = out.with_name(out.name + ".partial")
    plan = hashlib.sha256(pd.util.hash_pandas_object(cells, index=False).to_numpy().tobytes())
    plan.update(json.dumps([options, names, channels], sort_keys=True, default=str).encode())
    plan = plan.hexdigest()
    if (work / "plan").exists() and (work / "plan").read_text() != plan:
        raise InputError(f"{work}: an interrupted preparation with other options or input; repeat those to go on, or delete the folder")
    work.mkdir(parents=True, exist_ok=True)
    (work / "plan").write_text(plan)

    # Everything that is read: patches of all cells, measurements of all cells and columns
    n, path = len(cells), work / "patches.npy"
    going_on = path.exists() and (work / "progress").exists()
    create = lambda name, dtype, *shape: np.lib.format.open_memmap(work / name, "w+", dtype, shape)
    patches = np.load(path, mmap_mode="r+") if going_on else create("patches.npy", np.uint16, n, len(channels), SIZE, SIZE)
    bad = read_patches(patches, units, read_unit, work / "progress", workers, skip_bad)
    raw, every = create("raw.npy", np.float32, n, len(names)), np.arange(n)
    for i in range(0, n, CHUNK):
        raw[i:i + CHUNK] = np.nan
    data.fill_features(raw, names, pieces, lambda: release(raw))

    # Cells that stay (`keep`, their rows): those with a readable patch and at least one measurement
    measured = np.concatenate([np.isfinite(block).any(1) for _, block in blocks(raw, every)])
    keep = np.flatnonzero(measured & ~np.isin(every, list(bad)))
    if not measured.all():
        print(f"{(~measured).sum()} cells without measurements dropped, first: {cells['cell'][~measured].iloc[0]}")
    if bad:
        print(f"{len(bad)} bad patches skipped, first: {next(iter(bad.values()))}")
    if not len(keep):
        raise InputError("no cell has both a patch and measurements")
    cells = cells.iloc[keep].reset_index(drop=True)
    cells["split"] = split_cells(cells, options["split"], options["seed"])
    train = keep[cells["split"] == "train"]

    # Features that stay (`column`), their centre and scale, and the values that are imputed and clipped
    moments = column_moments(raw, train)
    dropped = dropped | columns_to_drop(raw, keep, names, moments, options["drop_duplicates"])
    column = np.array([j for j, name in enumerate(names) if name not in dropped])
    if not len(column):
        raise InputError("every feature was dropped: " + "; ".join(f"{k}: {v}" for k, v in list(dropped.items())[:3]))
    features, (_, centre, scale) = [names[j] for j in column], moments
    plates = plate_scales(raw, keep, cells, scale) if options["normalise"] == "plate-dmso" else {}
    final, imputed, clipped = create("features.npy", np.float32, len(keep), len(column)), 0, 0
    for c, block in blocks(raw, keep):
        mid = np.stack([plates[p]["centre"] for p in cells["plate"][c]]) if plates else centre
        sd = np.stack([plates[p]["scale"] for p in cells["plate"][c]]) if plates else scale
        missing = ~np.isfinite(block)
        block = np.where(missing, mid, block)  # float64
        imputed += missing.sum(0)
        clipped += (np.abs(block - mid) > CLIP * sd).sum(0)
        final[c] = block[:, column]
        release(final)
    white, black = white_levels(patches, train)
    if len(keep) < n:
        kept = create("patches.tmp", np.uint16, len(keep), *patches.shape[1:])
        for c, block in blocks(patches, keep):
            kept[c] = block
            release(kept)
        (work / "progress").unlink()  # if interrupted from here on, patches are read again: patches.npy has other rows now
        os.replace(work / "patches.tmp", path)

    cells[CELL_COLUMNS].to_csv(work / "cells.csv", index=False)
    count = lambda values: {names[j]: int(values[j]) for j in column if values[j]}
    meta = {
        "format": data.FORMAT, "channels": list(channels), "size": SIZE, "features": features,
        "centre": centre[column].tolist(), "scale": scale[column].tolist(),
        "normalise": options["normalise"], "fitted_on": f"{len(train)} training cells",
        "plates": {p: {"centre": s["centre"][column].tolist(), "scale": s["scale"][column].tolist(), "cells": s["cells"]}
                   for p, s in plates.items()},
        "white": white, "white_quantile": WHITE, "dropped": dropped, "imputed": count(imputed), "clipped": count(clipped),
        "counts": {"cells": len(cells), "split": cells["split"].value_counts().to_dict(), "plates": cells["plate"].nunique(),
                   "wells": len(cells.drop_duplicates(["plate", "well"])), "fields": cells["field"].nunique(),
                   "compounds": cells["compound"].nunique(), "treatments": data.treatment_names(cells).nunique(),
                   "mechanisms": len(set(cells["moa"]) - {"DMSO", "unknown"}),
                   "unmeasured_cells": int((~measured).sum()), "bad_patches": len(bad), "cells_with_a_black_channel": black},
        "options": options, "checksums": {name: data.checksum(work / name) for name in data.FILES},
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for name in ("raw.npy", "plan", "progress"):
        (work / name).unlink(missing_ok=True)
    os.replace(work, out)
    return meta


def describe(out):
    """What a prepared folder holds, as text."""
    folder = data.open_folder(out)
    counts, meta = folder.meta["counts"], folder.meta
    trained = set(folder.treatment[folder.cells["split"] == "train"])
    absent = [t for i, t in enumerate(folder.treatments) if i not in trained]
    reasons = pd.Series(list(meta["dropped"].values()), dtype=str).replace(
        {r"^[\d.]+% ": "over 5 % ", "identical to .*": "identical to another"}, regex=True).value_counts()
    by, imputed, clipped = meta["options"]["split"], meta["imputed"].values(), meta["clipped"].values()
    lines = [
        f"{out}: {counts['cells']} cells of {counts['plates']} plates, {counts['wells']} wells, {counts['fields']} fields; "
        f"{counts['compounds']} compounds, {counts['treatments']} treatments, {counts['mechanisms']} mechanisms",
        f"split by {by}: " + ", ".join(f"{s} {k} ({k / counts['cells']:.1%})" for s, k in counts["split"].items()),
        f"treatments absent from training: {', '.join(absent[:8]) + (', ...' if len(absent) > 8 else '') if absent else 'none'}",
        f"{len(folder.features)} features, normalise {meta['normalise']}; dropped {len(meta['dropped'])}"
        + "".join(f"; {k} {r}" for r, k in reasons.items()),
        f"imputed {sum(imputed)} values in {len(imputed)} features; beyond {CLIP:.0f} sd {sum(clipped)} values in {len(clipped)}",
        f"channels {', '.join(folder.channels)}; cells with a black channel {counts['cells_with_a_black_channel']}; "
        f"{folder.patches.nbytes / 1e6:.0f} MB of patches"]
    if by == "cell":
        lines.append("split by cell, as the paper: cells of one field stand on both sides; --split plate is the honest test")
    return "\n  ".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation: nucleus and cell in the middle of a patch, or all of a field; numpy and scipy, whole stacks at once

FLAT4 = ndi.generate_binary_structure(2, 1)[None] & np.array([False, True, False])[:, None, None]   # 4 neighbours, same image
NUCLEUS, CELL = 1, 2                # bits of a mask
MIN_AREA, MAX_SHARE = 150, 0.75     # pixels; share of a patch: what a plausible nucleus covers
MIN_CONTRAST = 1.5                  # nucleus : background in DAPI; blank BBBC021 crops have 1.02-1.06, real nuclei 2.2 and more
CENTRE = 6                          # pixels, how far from the middle of its patch the central nucleus may begin


def otsu(x, bins=128):
    """Otsu's threshold of each image of a stack: x (N, H, W) float -> (N, 1, 1)."""
    n = len(x)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    level = np.minimum((x - low) / np.maximum(high - low, 1e-12) * bins, bins - 1).astype(int)
    level += bins * np.arange(n)[:, None, None]
    count = np.bincount(level.ravel(), minlength=n * bins).reshape(n, bins)
    below, moment = count.cumsum(1), (count * np.arange(bins)).cumsum(1)
    above, mean = below[:, -1:] - below, moment[:, -1:] / below[:, -1:]
    between = (mean * below - moment) ** 2 / np.maximum(below * above, 1)       # variance between the two classes
    return low + (high - low) * ((between.argmax(1) + 1) / bins)[:, None, None]


def foreground(x, sigma, level=1.0):
    """Bright pixels of each image, holes filled: smooth by `sigma` pixels, logarithm, cut at `level` of the way from the
    darkest pixel to Otsu's threshold. x (N, H, W) of any scale -> (smoothed x, (N, H, W) bool)."""
    x = ndi.gaussian_filter(np.maximum(x, 0).astype(np.float32), (0, sigma, sigma))
    # in the logarithm a dim nucleus beside a bright one stays; + 0.05: the faint halo of a generated one does not count
    log = np.log(x / np.maximum(x.max((1, 2), keepdims=True), 1e-12) + 0.05)
    low = np.percentile(log, 0.1, axis=(1, 2), keepdims=True)
    bright = ndi.binary_fill_holes(log > low + level * (otsu(log) - low), FLAT4)
    return x, bright & ~bright.all((1, 2), keepdims=True)


def hills(height):
    """Label every pixel by the summit that steepest ascent reaches: height (N, H, W) -> (N, H, W) int, unique per summit."""
    n, h, w = height.shape
    index = np.arange(height.size).reshape(n, h, w)
    best, to = height.astype(float) - 1e-9 * (index % (h * w)), index           # the tilt breaks ties on a plateau
    around, index = np.pad(best, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf), np.pad(index, ((0, 0), (1, 1), (1, 1)))
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            step = around[:, dy:dy + h, dx:dx + w]
            to = np.where(step > best, index[:, dy:dy + h, dx:dx + w], to)
            best = np.maximum(step, best)
    to = to.ravel()
    while (to[to] != to).any():     # follow the pointers, doubling the stride
        to = to[to]
    return to.reshape(n, h, w) + 1


def find_nuclei(dapi):
    """Nuclei of each image: dapi (N, H, W) -> (smoothed dapi, (N, H, W) int labels, 0 = background).
    Touching nuclei are parted where the smoothed distance to the background falls into different hills."""
    smooth, bright = foreground(dapi, 1)
    depth = ndi.distance_transform_edt(bright, sampling=(1e3, 1, 1))            # 1e3: images of a stack are far apart
    return smooth, hills(ndi.gaussian_filter(depth, (0, 3, 3))) * bright


def find_cells(nuclei, tubulin, actin):
    """Cells around nuclei: every bright pixel of tubulin + actin goes to the nearest nucleus. All (N, H, W) -> int labels."""
    stain = sum(x / np.maximum(x.max((1, 2), keepdims=True), 1e-12) for x in (tubulin, actin))
    _, bright = foreground(stain, 1, level=0.5)                                 # cells fade out: halfway to Otsu
    nearest = ndi.distance_transform_edt(nuclei == 0, sampling=(1e3, 1, 1), return_distances=False, return_indices=True)
    return nuclei[tuple(nearest)] * (bright | (nuclei > 0))


def keep_connected(mask, seed):
    """The part of each mask that touches its seed, holes filled; both (N, H, W) bool."""
    return ndi.binary_fill_holes(ndi.binary_propagation(seed & mask, FLAT4, mask=mask), FLAT4)


def segment(images, chunk=256):
    """Nucleus and cell in the middle of each patch.
    images (N, 3, H, W) uint16 or float of any scale, channels DAPI, tubulin, actin. Returns masks (N, H, W) uint8, bit 1 nucleus, bit 2
    cell (with the nucleus). A patch without a plausible nucleus at its centre (too small, too large, no contrast) is all zero."""
    masks = np.zeros((len(images), *images.shape[2:]), np.uint8)
    for start in range(0, len(images), chunk):
        dapi, tubulin, actin = np.asarray(images[start:start + chunk], np.float32).transpose(1, 0, 2, 3)
        smooth, nuclei = find_nuclei(dapi)
        cells = find_cells(nuclei, tubulin, actin)
        n, h, w = nuclei.shape
        away = np.hypot(np.arange(h)[:, None] - (h - 1) / 2, np.arange(w) - (w - 1) / 2)
        away = np.where(nuclei > 0, away, np.inf).reshape(n, -1)                # the nucleus nearest to the middle
        label = np.where(away.min(1) <= CENTRE, nuclei.reshape(n, -1)[np.arange(n), away.argmin(1)], -1)[:, None, None]
        seed = (away.reshape(n, h, w) == away.min(1)[:, None, None]) & (nuclei == label)
        nucleus = keep_connected(nuclei == label, seed)
        cell = keep_connected(cells == label, nucleus) | nucleus
        area = nucleus.sum((1, 2))
        dark = np.nanmedian(np.where(nuclei > 0, np.nan, smooth), (1, 2))
        bright = (smooth * nucleus).sum((1, 2)) / np.maximum(area, 1)
        ok = (area >= MIN_AREA) & (area <= MAX_SHARE * h * w) & (bright > MIN_CONTRAST * dark)
        masks[start:start + chunk] = (NUCLEUS * nucleus + CELL * cell) * ok[:, None, None]
    return masks


def segment_field(dapi, tubulin, actin):
    """Nuclei and cells of one whole field: three (H, W) images -> two (H, W) int32 label images, a cell has its nucleus' label.
    Nuclei below MIN_AREA pixels or MIN_CONTRAST are dropped; labels run from 1 without gaps."""
    dapi, tubulin, actin = (np.asarray(x, np.float32)[None] for x in (dapi, tubulin, actin))
    smooth, nuclei = find_nuclei(dapi)
    nuclei = np.unique(nuclei, return_inverse=True)[1].reshape(nuclei.shape)
    if not nuclei.any():
        return np.zeros((2, *nuclei.shape[1:]), np.int32)
    label = np.arange(nuclei.max() + 1)
    keep = (np.bincount(nuclei.ravel()) >= MIN_AREA) & (label > 0)
    keep &= ndi.mean(smooth, nuclei, label) > MIN_CONTRAST * np.median(smooth[nuclei == 0])
    nuclei = np.where(keep, keep.cumsum(), 0)[nuclei]
    cells = find_cells(nuclei, tubulin, actin)
    return nuclei[0].astype(np.int32), cells[0].astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring as CellProfiler 4.2.8 does, without it: torch, any device, N objects at once.
# Coordinates are 0-based pixel centres, X = column, Y = row. Formulae: CellProfiler's MeasureObject* (scikit-image, centrosome, mahotas).
# m (N, H, W) bool is one object per patch with an empty margin of MARGIN pixels; x (N, C, H, W) float32 in 0..1.
# Every family returns (names, values (N, len(names)) float64).

MARGIN = 1          # pixels of nothing around a patch
RINGS = 4
HARALICK = ("AngularSecondMoment Contrast Correlation Variance InverseDifferenceMoment SumAverage SumVariance SumEntropy "
            "Entropy DifferenceVariance DifferenceEntropy InfoMeas1 InfoMeas2").split()
ZERNIKE = [(n, k) for n in range(10) for k in range(n % 2, n + 1, 2)]


def sort_last(x):
    """x sorted along its last axis; numpy's sort is several times faster than torch's on a CPU."""
    return x.sort(-1).values if x.is_cuda else torch.from_numpy(np.sort(x.numpy(), -1))


def select(x, keep):
    """x[keep] for a boolean keep; here too numpy is faster on a CPU."""
    return x[keep] if x.is_cuda else torch.from_numpy(x.numpy()[keep.numpy()])


def quantile(ranked, count, share):
    """CellProfiler's quantile: between the sorted values at position count * share and the next. (N, C, K), (N,) -> (N, C)."""
    last = (count - 1).clamp(min=0)
    low = torch.minimum((count * share).floor(), last)
    part = (count * share - low)[:, None]
    at = lambda index: ranked.gather(2, index.long()[:, None, None].expand(-1, ranked.shape[1], 1))[..., 0].double()
    return at(low) * (1 - part) + at(torch.minimum(low + 1, last)) * part


def outline(m):
    """Pixels of m with one of their 4 neighbours outside."""
    return m & ~F.pad(m[:, :-2, 1:-1] & m[:, 2:, 1:-1] & m[:, 1:-1, :-2] & m[:, 1:-1, 2:], (1, 1, 1, 1))


def squared_distance(m):
    """Squared Euclidean distance (pixels) of every pixel of m to the nearest pixel outside: (N, H, W) int16, exact."""
    up = m.permute(1, 2, 0).short().contiguous()                                # (H, W, N): objects last, rows in one piece
    down = up.clone()
    for row in range(1, len(up)):                                               # along the columns, from either side
        up[row] *= up[row - 1] + 1
        down[-1 - row] *= down[-row] + 1
    column = torch.minimum(up, down) ** 2
    best = column.clone()
    for k in range(1, best.shape[1]):                                           # then the nearest of the columns k away
        if k * k >= best.max():
            break
        further = column + k * k
        torch.minimum(best[:, k:], further[:, :-k], out=best[:, k:])
        torch.minimum(best[:, :-k], further[:, k:], out=best[:, :-k])
    return best.permute(2, 0, 1).contiguous()


def sweep(length, step):
    """Carry path lengths down, up, right and left, in place; length and step (H, W, N), step 1 inside and inf outside."""
    lib = torch if length.is_cuda else np                                       # numpy: less overhead a call
    for t, s in ((length, step), (length.transpose(0, 1), step.transpose(0, 1))):
        t, s = (t, s) if length.is_cuda else (t.numpy(), s.numpy())
        new, size = lib.empty_like(t[0, 1:-1]), len(t)
        for row, before in [(i, i - 1) for i in range(1, size)] + [(i, i + 1) for i in range(size - 2, -1, -1)]:
            lib.minimum(t[before, :-2], t[before, 2:], out=new)                 # either diagonal
            lib.add(new, math.sqrt(2) - 1, out=new)
            lib.minimum(new, t[before, 1:-1], out=new)
            lib.add(new, s[row, 1:-1], out=new)
            lib.minimum(new, t[row, 1:-1], out=t[row, 1:-1])


def path_length(m, row, column):
    """Shortest way inside m from pixel (row, column) of each object, by steps of 1 and sqrt(2): (N, H, W), inf = no way."""
    n, h, w = m.shape
    dy = (torch.arange(h, device=m.device)[:, None, None] - row).abs().float()
    dx = (torch.arange(w, device=m.device)[:, None] - column).abs().float()
    free = torch.maximum(dy, dx) + (math.sqrt(2) - 1) * torch.minimum(dy, dx)   # (H, W, N), without obstacles
    length = torch.full_like(free, math.inf).masked_fill_(free == 0, 0)
    step = torch.where(m.permute(1, 2, 0), 1.0, math.inf).contiguous()
    sweep(length, step)
    todo = ((length > free + 1e-3) & (step == 1)).flatten(0, 1).any(0).nonzero()[:, 0]      # a detour may still shorten
    while len(todo):
        part = length[..., todo]
        before = part.clone()
        sweep(part, step[..., todo])
        length[..., todo] = part
        todo = todo[(part < before).flatten(0, 1).any(0)]
    return length.permute(2, 0, 1).contiguous()


def moments(weight, y, x, order):
    """sum of weight * y**p * x**q: weight (N, H, W), y (N, H), x (N, W) -> (N, order + 1, order + 1) [p, q]."""
    power = lambda t: torch.stack([t ** k for k in range(order + 1)], 1)        # (N, order + 1, H or W)
    return power(y) @ weight @ power(x).transpose(1, 2)


def enclosing_circle(m):
    """Smallest circle round the pixel centres of each object (Chrystal 1885): centre (N, 1) complex x + iy, radius (N, 1)."""
    n, h, w = m.shape
    left, right = m.int().argmax(2), w - 1 - m.flip(2).int().argmax(2)          # the first and last pixel of every row
    point = torch.complex(torch.cat([left, right], 1).double(), torch.arange(h, device=m.device).repeat(n, 2).double())
    absent = ~m.any(2).repeat(1, 2)                                             # (N, 2H)
    dot = lambda u, v: u.real * v.real + u.imag * v.imag
    a = point.gather(1, (~absent).int().argmax(1, keepdim=True))                # a, b: one side of the convex hull
    b = point.gather(1, (point - a).angle().masked_fill(absent | (point == a), math.inf).argmin(1, keepdim=True))
    b = torch.where(b.imag < a.imag, a, b)                                      # a lone pixel has no second point
    while True:
        to_a, to_b = a - point, b - point
        cosine = dot(to_a, to_b) / (dot(to_a, to_a) * dot(to_b, to_b)).sqrt()
        cosine, index = cosine.nan_to_num(-1).masked_fill(absent, -1).max(1, keepdim=True)
        c = point.gather(1, index)                                              # sees the side under the smallest angle
        outside = cosine > 0                                                    # under 90 degrees: outside the circle on ab
        blunt_a, blunt_b = outside & (dot(b - a, c - a) < 0), outside & (dot(a - b, c - b) < 0)
        if not (blunt_a | blunt_b).any():
            break
        a, b = torch.where(blunt_a, c, a), torch.where(blunt_b, c, b)           # the side opposite the blunt angle
    u, v = b - a, c - a                                                         # circle through a, b, c, or on the side ab
    offset = torch.where(outside, -0.5j * (dot(u, u) * v - dot(v, v) * u) / (u.conj() * v).imag, u / 2)
    return a + offset, offset.abs()


def zernike_coefficients():
    """Each Zernike polynomial of ZERNIKE as coefficients of y**p * x**q: (30, 10, 10) complex."""
    c = np.zeros((len(ZERNIKE), 10, 10), complex)
    for row, (n, k) in enumerate(ZERNIKE):
        for i in range((n - k) // 2 + 1):       # sum over i of a * (x^2 + y^2)**s * (y + ix)**k
            s = (n - k) // 2 - i
            a = (-1) ** i * math.factorial(n - i) / (math.factorial(i) * math.factorial(s + k) * math.factorial(s))
            for p in range(s + 1):
                for q in range(k + 1):
                    c[row, 2 * (s - p) + k - q, 2 * p + q] += a * math.comb(s, p) * math.comb(k, q) * 1j ** q
    return c


def zernike(m):
    """Magnitude of the 30 Zernike moments of each shape in its smallest enclosing circle: (N, 30).
    All pixels count. CellProfiler loses 1-3 on the circle itself to rounding: equal to 0.011."""
    centre, radius = enclosing_circle(m)
    y, x = (torch.arange(size, device=m.device) for size in m.shape[1:])
    moment = moments(m.double(), (y - centre.imag) / radius, (x - centre.real) / radius, 9).to(torch.complex128)
    polynomial = torch.from_numpy(zernike_coefficients()).to(m.device).flatten(1)
    return (moment.flatten(1) @ polynomial.T).abs() / (math.pi * radius ** 2)


def area_shape(m, edge, distance2):
    """Size, ellipse, radii, moments and Zernike moments of each object."""
    n, h, w = m.shape
    solid = m.double()
    in_row, in_column = solid.amax(2), solid.amax(1)
    top, bottom = in_row.argmax(1), h - in_row.flip(1).argmax(1)                # the maximum is exclusive
    left, right = in_column.argmax(1), w - in_column.flip(1).argmax(1)
    y = torch.arange(h, device=m.device) - top[:, None].double()                # coordinates from the corner of the box
    x = torch.arange(w, device=m.device) - left[:, None].double()
    raw = moments(solid, y, x, 3)
    area, cy, cx = raw[:, 0, 0], raw[:, 1, 0] / raw[:, 0, 0], raw[:, 0, 1] / raw[:, 0, 0]
    central = moments(solid, y - cy[:, None], x - cx[:, None], 3)
    order = torch.arange(4, device=m.device)
    normal = central / area[:, None, None] ** ((order[:, None] + order) / 2 + 1)
    normal[:, [0, 0, 1], [0, 1, 0]] = math.nan                                  # as scikit-image leaves them

    # ellipse with the same second moments
    yy, xx, xy = central[:, 2, 0] / area, central[:, 0, 2] / area, central[:, 1, 1] / area
    spread = torch.hypot((yy - xx) / 2, xy)
    major, minor = (yy + xx) / 2 + spread, ((yy + xx) / 2 - spread).clamp(min=0)
    angle = torch.where(yy == xx, torch.where(xy > 0, 45.0, -45.0), torch.rad2deg(torch.atan2(2 * xy, yy - xx) / 2))

    # perimeter: every outline pixel weighs by its neighbours on the outline, 2 for a side and 10 for a corner (Benkrid, Crookes)
    e = F.pad(edge.byte(), (1, 1, 1, 1))
    beside, above = e[:, 1:-1, :-2] + e[:, 1:-1, 2:], e[:, :-2] + e[:, 2:]
    code = e[:, 1:-1, 1:-1] + 2 * (beside + above[:, :, 1:-1]) + 10 * (above[:, :, :-2] + above[:, :, 2:])
    weight = torch.zeros(50, dtype=torch.float64, device=m.device)
    weight[[5, 7, 15, 17, 25, 27]], weight[[21, 33]], weight[[13, 23]] = 1, math.sqrt(2), (1 + math.sqrt(2)) / 2
    perimeter = weight[code.int()].sum((1, 2))
    roundness = 4 * math.pi * area / perimeter ** 2

    # Euler number = corners - sides + pixels of the closed pixel squares: objects - holes, 8-connected
    down, side = m[:, 1:] | m[:, :-1], m[:, :, 1:] | m[:, :, :-1]
    euler = (down[:, :, 1:] | down[:, :, :-1]).sum((1, 2)) - down.sum((1, 2)) - side.sum((1, 2)) + area

    ranked = sort_last(distance2.float().masked_fill(~m, math.inf).flatten(1))
    middle = ranked.gather(1, torch.stack([(area - 1) // 2, area // 2], 1).long().clamp(min=0)).double().sqrt().mean(1)

    n20, n02, n11, n30, n03, n21, n12 = (normal[:, p, q] for p, q in ((2, 0), (0, 2), (1, 1), (3, 0), (0, 3), (2, 1), (1, 2)))
    a, b, c, d = n30 + n12, n21 + n03, n30 - 3 * n12, 3 * n21 - n03
    hu = (n20 + n02, (n20 - n02) ** 2 + 4 * n11 ** 2, c ** 2 + d ** 2, a ** 2 + b ** 2,
          c * a * (a ** 2 - 3 * b ** 2) + d * b * (3 * a ** 2 - b ** 2),
          (n20 - n02) * (a ** 2 - b ** 2) + 4 * n11 * a * b,
          d * a * (a ** 2 - 3 * b ** 2) - c * b * (3 * a ** 2 - b ** 2))

    box = (bottom - top) * (right - left)
    value = {"Area": area, "BoundingBoxArea": box, "BoundingBoxMaximum_X": right - MARGIN, "BoundingBoxMaximum_Y": bottom - MARGIN,
             "BoundingBoxMinimum_X": left - MARGIN, "BoundingBoxMinimum_Y": top - MARGIN, "Center_X": left + cx - MARGIN,
             "Center_Y": top + cy - MARGIN, "Compactness": 1 / roundness, "Eccentricity": (1 - minor / major).sqrt(),
             "EquivalentDiameter": (4 * area / math.pi).sqrt(), "EulerNumber": euler, "Extent": area / box, "FormFactor": roundness,
             "InertiaTensor_0_0": xx, "InertiaTensor_0_1": -xy, "InertiaTensor_1_0": -xy, "InertiaTensor_1_1": yy,
             "InertiaTensorEigenvalues_0": major, "InertiaTensorEigenvalues_1": minor, "MajorAxisLength": 4 * major.sqrt(),
             "MinorAxisLength": 4 * minor.sqrt(), "MaximumRadius": distance2.amax((1, 2)).double().sqrt(),
             "MeanRadius": distance2.double().sqrt().sum((1, 2)) / area, "MedianRadius": middle, "Orientation": angle,
             "Perimeter": perimeter, **{f"HuMoment_{i}": hu[i] for i in range(7)}}
    value.update({f"SpatialMoment_{p}_{q}": raw[:, p, q] for p in range(3) for q in range(4)})
    value.update({f"CentralMoment_{p}_{q}": central[:, p, q] for p in range(3) for q in range(4)})
    value.update({f"NormalizedMoment_{p}_{q}": normal[:, p, q] for p in range(4) for q in range(4)})
    names = [f"AreaShape_{name}" for name in value] + [f"AreaShape_Zernike_{n}_{k}" for n, k in ZERNIKE]
    return names, torch.cat([torch.stack([v.double() for v in value.values()], 1), zernike(m)], 1)


def intensity(x, m, edge, channels):
    """Intensity of each object and of its outline, in every channel."""
    n, _, h, w = x.shape
    y, xs = torch.arange(h, device=m.device).repeat_interleave(w), torch.arange(w, device=m.device).repeat(h)
    flat, edge = m.flatten(1).double(), edge.flatten(1)
    weight = torch.stack([flat, edge, flat * y, flat * xs], 1).double()         # (N, 4, P)
    area, rim, my, mx = weight.sum(2)[..., None].unbind(1)                      # each (N, 1)
    x = x.flatten(2)                                                            # (N, C, P) float32
    total, total_rim, light_y, light_x = (weight @ x.double().transpose(1, 2)).unbind(1)    # each (N, C)
    mean = total / area
    off = x.double() - mean[..., None]
    _, off_rim, _, _ = (weight @ off.transpose(1, 2)).unbind(1)
    square, square_rim, _, _ = (weight @ (off ** 2).transpose(1, 2)).unbind(1)
    ranked = sort_last(x.masked_fill(~m.flatten(1)[:, None], math.inf))
    median = quantile(ranked, area[:, 0], 0.5)
    value = {"IntegratedIntensity": total, "MeanIntensity": mean, "StdIntensity": (square / area).sqrt(),
             "MinIntensity": ranked[:, :, 0], "MaxIntensity": quantile(ranked, area[:, 0], 1),
             "IntegratedIntensityEdge": total_rim, "MeanIntensityEdge": total_rim / rim,
             "StdIntensityEdge": (square_rim / rim - (off_rim / rim) ** 2).clamp(min=0).sqrt(),
             "MinIntensityEdge": x.masked_fill(~edge[:, None], math.inf).amin(2),
             "MaxIntensityEdge": x.masked_fill(~edge[:, None], -math.inf).amax(2),
             "MassDisplacement": torch.hypot(light_y / total - my / area, light_x / total - mx / area),
             "LowerQuartileIntensity": quantile(ranked, area[:, 0], 0.25), "MedianIntensity": median,
             "UpperQuartileIntensity": quantile(ranked, area[:, 0], 0.75),
             "MADIntensity": quantile(sort_last((ranked - median[..., None].float()).abs()), area[:, 0], 0.5)}
    names = [f"Intensity_{name}_{channel}" for name in value for channel in channels]
    return names, torch.cat([v.double() for v in value.values()], 1)


def texture(x, m, channels, scale):
    """Haralick's 13 features of grey levels co-occurring `scale` pixels apart, in 4 directions and every channel.
    256 grey levels; level 0 counts as outside. 0 where a direction has no pair at all, as in CellProfiler."""
    n, h, w = m.shape
    k = torch.arange(511, dtype=torch.float64, device=m.device)
    entropy = lambda p: -(p * p.clamp(min=1e-300).log2()).sum(1)                # of each row, in bits
    names, values = [], []
    for channel, pixels in zip(channels, x.unbind(1)):
        level = (pixels * 255).round().clamp(0, 255).int() * m
        key = []                                                                # row << 16 | lower level << 8 | higher level
        for direction, (dy, dx) in enumerate(((0, scale), (scale, scale), (scale, 0), (scale, -scale))):
            a = level[:, :h - dy, max(0, -dx):w - max(0, dx)]
            b = level[:, dy:, max(0, dx):w - max(0, -dx)]
            row = (torch.arange(n, dtype=torch.int32, device=m.device) * 4 + direction)[:, None, None]
            low = torch.minimum(a, b)
            key.append(select(row << 16 | low << 8 | torch.maximum(a, b), low > 0))
        key, count = sort_last(torch.cat(key)).unique_consecutive(return_counts=True)
        row, low, high, count = key >> 16, key >> 8 & 255, key & 255, count.double()
        tally = lambda bins, index, weight: torch.bincount(index, weight, 4 * n * bins).double().view(4 * n, bins)
        total = tally(1, row, count)                                            # pairs of each object and direction
        single_p = (tally(256, key >> 8, count) + tally(256, row << 8 | high, count)) / (2 * total)
        sum_p = tally(512, (row << 9) + low + high, count)[:, :511] / total
        difference_p = tally(256, (row << 8) + high - low, count) / total
        ordered = torch.where(low == high, count, count / 2)                    # of (low, high), and as many of (high, low)
        joint = total.log2()[:, 0] - tally(1, row, count * ordered.log2())[:, 0] / total[:, 0]
        single = entropy(single_p)
        mean = single_p @ k[:256]
        variance = single_p @ k[:256] ** 2 - mean ** 2
        contrast, sum_square = difference_p @ k[:256] ** 2, sum_p @ k ** 2
        levels = level.flatten(1).amax(1).repeat_interleave(4) + 1
        feature = torch.stack([
            (tally(1, row, count * ordered) / total ** 2)[:, 0], contrast,
            torch.where(variance == 0, 1, ((sum_square - contrast) / 4 - mean ** 2) / variance), variance,
            difference_p @ (1 / (1 + k[:256] ** 2)), 2 * mean, sum_square - 4 * mean ** 2, entropy(sum_p), joint,
            (difference_p ** 2).sum(1) / levels - 1 / levels ** 2, entropy(difference_p),
            (joint - 2 * single) / torch.where(single == 0, 1, single),
            (1 - torch.exp(-2 * (2 * single - joint))).clamp(min=0).sqrt()], 1).view(n, 4, 13)
        lacking = (total.view(n, 4) == 0).any(1)[:, None]
        values.append(feature.transpose(1, 2).flatten(1).masked_fill(lacking, 0))
        names += [f"Texture_{name}_{channel}_{scale}_{direction:02d}_256" for name in HARALICK for direction in range(4)]
    return names, torch.cat(values, 1)


def ring_and_wedge(m, distance2):
    """Ring * 8 + wedge of every pixel seen from the innermost one, in RINGS rings from there to the edge: (N, H, W), -1 outside.
    The innermost pixel is the first one farthest from the edge. Where several tie, CellProfiler's choice is arbitrary."""
    n, h, w = m.shape
    centre = distance2.flatten(1).argmax(1)
    row, column = centre // w, centre % w
    path = path_length(m, row, column)
    inside = m & path.isfinite()                                                # an island cannot be reached
    item, y, x = inside.nonzero(as_tuple=True)
    dy, dx, path = y - row[item], x - column[item], select(path, inside).double()
    ring = (path / (path + select(distance2, inside).double().sqrt() + 0.001) * RINGS).int()
    wedge = (dy > 0).int() + 2 * (dx > 0) + 4 * (dy.abs() > dx.abs())
    sector = torch.full(m.shape, -1, dtype=torch.int32, device=m.device)
    sector[inside] = (ring * 8 + wedge).int()
    return sector


def radial_distribution(x, sector, channels):
    """Share, relative share and unevenness of intensity in the rings of each object, in every channel."""
    n = len(sector)
    inside = sector >= 0
    item = torch.arange(n, dtype=torch.int32, device=x.device)[:, None, None] * (RINGS * 8)
    cell = select(sector + item, inside)
    tally = lambda weight: torch.bincount(cell, weight, n * RINGS * 8).double().view(n, RINGS, 8)
    pixels = tally(torch.ones(len(cell), dtype=torch.float64, device=x.device))
    share_of_pixels = pixels.sum(2) / pixels.sum((1, 2))[:, None]
    used, names, values = pixels > 0, [], []
    for channel, image in zip(channels, x.unbind(1)):
        light = tally(select(image, inside).double())
        share = light.sum(2) / light.sum((1, 2))[:, None]
        mean = (light / pixels).nan_to_num(0)                                   # of each wedge
        average = mean.sum(2) / used.sum(2)
        spread = (((mean - average[..., None]) ** 2 * used).sum(2) / used.sum(2)).sqrt()
        values += [share, share / (share_of_pixels + np.finfo(float).eps), (spread / average).nan_to_num(0)]
        names += [f"RadialDistribution_{name}_{channel}_{i + 1}of{RINGS}" for name in ("FracAtD", "MeanFrac", "RadialCV")
                  for i in range(RINGS)]
    return names, torch.cat(values, 1)


def correlation(x, m, channels, threshold=0.15):
    """Correlation, overlap, K and Manders coefficients of every two channels, the last three above `threshold` of the maximum."""
    x, m = x.flatten(2), m.flatten(1)[:, None]                                  # (N, C, P)
    above = (x >= threshold * (x * m).amax(2, keepdim=True)) & m                # in float32, as CellProfiler does
    x, above = x.double(), above.double()
    off = (x - (x * m).sum(2, keepdim=True) / m.sum(2, keepdim=True)) * m
    covariance, bright = off @ off.transpose(1, 2), x * above
    product, square = bright @ bright.transpose(1, 2), bright ** 2 @ above.transpose(1, 2)  # (N, C, C)
    manders = bright @ above.transpose(1, 2) / bright.sum(2, keepdim=True)
    value = {}
    for i, a in enumerate(channels):
        for j, b in enumerate(channels):
            if i < j:
                value[f"Correlation_{a}_{b}"] = covariance[:, i, j] / (covariance[:, i, i] * covariance[:, j, j]).sqrt()
                value[f"Overlap_{a}_{b}"] = product[:, i, j] / (square[:, i, j] * square[:, j, i]).sqrt()
            if i != j:
                value[f"K_{a}_{b}"] = product[:, i, j] / square[:, i, j]
                value[f"Manders_{a}_{b}"] = manders[:, i, j]
    return [f"Correlation_{name}" for name in value], torch.stack(list(value.values()), 1)


def measure(images, masks, channels=("DAPI", "Tubulin", "Actin"), scale=3, chunk=64, device="cpu"):
    """Measure nucleus, cell and cytoplasm (cell without nucleus) of each patch under CellProfiler 4.2.8's names.
    images (N, C, H, W), uint16 (divided by 65535, as CellProfiler reads a 16-bit TIFF) or float in 0..1; masks (N, H, W) uint8, bit 1
    nucleus, bit 2 cell, as from `segment`. The first channel is measured in nuclei only. `scale` in pixels is that of Texture; a patch is
    at most 180 wide. Returns names, a list of F, and values (N, F) float64; a missing object is NaN, a black channel gives 0 or NaN.
    `chunk` patches are measured at a time and share nothing."""
    images, masks = np.asarray(images), np.asarray(masks)
    assert images.shape[0] == masks.shape[0] and images.shape[2:] == masks.shape[1:], (images.shape, masks.shape)
    assert len(images) and images.shape[1] == len(channels) and max(masks.shape[1:]) <= 180 and chunk < 2 ** 13, (images.shape, chunk)
    whole = 65535 if images.dtype.kind in "ui" else 1

    def part(start):
        torch.set_num_threads(1)
        x = torch.from_numpy(images[start:start + chunk].astype(np.float32) / np.float32(whole)).to(device)
        mask = torch.from_numpy(masks[start:start + chunk].astype(np.uint8)).to(device)
        x, mask = F.pad(x, (MARGIN,) * 4), F.pad(mask, (MARGIN,) * 4)
        nucleus, cell = mask & NUCLEUS > 0, mask & CELL > 0
        objects = torch.cat([nucleus, cell, cell & ~nucleus])                   # (3n, H, W)
        edge, distance2 = outline(objects), squared_distance(objects)
        rings = ring_and_wedge(objects, distance2)
        shape_names, shape = area_shape(objects, edge, distance2)
        names, values = [], []
        for i, compartment in enumerate(("Nuclei", "Cells", "Cytoplasm")):
            here = slice(i * len(x), (i + 1) * len(x))
            m, stains = objects[here], slice(0 if compartment == "Nuclei" else 1, None)
            families = [(shape_names, shape[here]), intensity(x[:, stains], m, edge[here], channels[stains]),
                        texture(x[:, stains], m, channels[stains], scale),
                        radial_distribution(x[:, stains], rings[here], channels[stains])]
            if compartment == "Cells":
                families.append(correlation(x, m, channels))
            present = m.flatten(1).any(1)[:, None]
            for family, value in families:
                names += [f"{compartment}_{name}" for name in family]
                values.append(torch.where(present, value, math.nan))
        return names, torch.cat(values, 1).cpu().numpy()

    threads = torch.get_num_threads()  # chunks side by side: threads within such small tensors made it three times slower
    try:
        with ThreadPoolExecutor(threads if torch.device(device).type == "cpu" else 1) as pool:
            names, values = zip(*pool.map(part, range(0, len(images), chunk)))
    finally:
        torch.set_num_threads(threads)
    return names[0], np.concatenate(values)


def measure_by_cp_measure(images, masks, channels=CHANNELS, device="cpu"):
    """The same job as `measure`, by the package cp_measure 0.3.0 (optional), which knows more features: names and values (N, F).
    Patches are tiled with a gap into one picture, as the package wants it; `legacy`: CellProfiler's definitions. Runs on the CPU only.
    InputError without the package."""
    try:
        from cp_measure.bulk import get_core_measurements, get_correlation_measurements
    except ImportError:
        raise InputError("--engine cp_measure: the package is not installed; pip install cp_measure==0.3.0, or use --engine ours") from None
    images, masks = np.asarray(images), np.asarray(masks)
    whole, side = 65535 if images.dtype.kind in "ui" else 1, math.ceil(math.sqrt(len(images)))

    def tiled(patches):
        """(N, H, W) -> one picture with 4 pixels of 0 between the patches"""
        padded = np.pad(patches, ((0, side * side - len(patches)), (2, 2), (2, 2)))
        return padded.reshape(side, side, *padded.shape[1:]).swapaxes(1, 2).reshape(side * padded.shape[1], -1)

    pixels = [tiled(images[:, c].astype(np.float32) / np.float32(whole)) for c in range(len(channels))]
    core, pairs, found = get_core_measurements(legacy=True), get_correlation_measurements(), {}
    nucleus, cell = (masks & NUCLEUS) > 0, (masks & CELL) > 0
    for compartment, part in (("Nuclei", nucleus), ("Cells", cell), ("Cytoplasm", cell & ~nucleus)):
        there = part.any((1, 2))
        labels = tiled(part * np.where(there, there.cumsum(), 0)[:, None, None])
        results = {f"AreaShape_{name}": v for kind in ("sizeshape", "zernike", "feret") for name, v in core[kind](labels, None).items()}
        stains = list(zip(channels, pixels))[0 if compartment == "Nuclei" else 1:]
        for channel, x in stains:
            for kind in ("intensity", "texture", "radial_distribution", "radial_zernikes", "granularity"):
                for name, v in core[kind](labels, x).items():
                    family, feature, *rest = (f"Texture_{name}" if kind == "texture" else name).split("_")
                    results["_".join([family, feature, channel, *rest])] = v
        for (a, x), (b, y) in itertools.combinations(stains if compartment == "Cells" else [], 2):
            for kind in ("pearson", "manders_fold", "rwc"):
                for name, v in pairs[kind](x, y, labels).items():
                    feature = name.removeprefix("Correlation_").replace("Pearson", "Correlation")
                    order = f"{b}_{a}" if feature.endswith("_2") else f"{a}_{b}"
                    results[f"Correlation_{re.sub('_[12]$', '', feature)}_{order}"] = v
        for name, v in results.items():
            found[f"{compartment}_{name}"] = np.full(len(masks), np.nan)
            found[f"{compartment}_{name}"][there] = v
    return list(found), np.stack(list(found.values()), 1)


ENGINES = {"ours": measure, "cp_measure": measure_by_cp_measure}


def measurements(x, channels, white=None, engine="ours", **options):
    """CellProfiler's measurements of the middle cell of pictures (N, 3, H, W) in 0..1 -> frame (N rows, F columns); NaN without a nucleus.
    One segmentation and one engine for real and generated cells; places in the crop are left out. `white` (3,): 16-bit levels that 1 stands
    for (image norm percentile), intensities are then CellProfiler's; without it they are relative."""
    if len(channels) != 3:
        raise InputError(f"channels {', '.join(channels)}: segmenting needs three, the nucleus first")
    x = np.asarray(x, np.float32) * (1 if white is None else np.asarray(white, np.float32)[:, None, None] / FULL_SCALE)
    names, values = ENGINES[engine](x, segment(x), channels, **options)
    return pd.DataFrame(np.where(np.isfinite(values), values, np.nan), columns=names)[sort_columns(names)[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Whole fields without CellProfiler: segmented and measured here, written as CellProfiler's tables

WINDOWS = (68, 96, 128, 178)  # pixels, sides of the squares in which objects of a field are measured; a larger cell is left out


def measure_fields(images, export, image_csv, channels, workers, skip_bad, engine="ours"):
    """Segments and measures every field below `images` and writes an export like CellProfiler's, one folder a field, at `export`.
    The files of a field: `image_csv` names them (Image_FileName_<channel>), or they share a name up to _w<number>, as BBBC021's do.
    Fields whose folder is there already are not measured again, so that an interrupted call goes on."""
    found, fields = index_files(images), {}
    if image_csv:
        table, columns = read_csv(image_csv, dtype=str), [f"Image_FileName_{c}" for c in channels]
        if lacking := [c for c in columns if c not in table]:
            raise InputError(f"{image_csv}: no column {lacking[0]}, found {list(table.columns)}; see --channels")
        for row in table[columns].to_numpy():
            if row[0] in found:
                fields[Path(row[0]).stem] = [found.get(name, Path(images) / name) for name in row]
    else:
        for path in found.values():
            if match := re.match(r"(.+)_w(\d)", path.stem):
                fields.setdefault((path.parent, match[1]), []).append((int(match[2]), path))
        fields = {files[0][1].stem: [path for _, path in files] for files in map(sorted, fields.values())}
    for files in fields.values():
        if len(files) != len(channels):
            raise InputError(f"{files[0]}: {len(files)} files share its name up to _w, expected one for each of {', '.join(channels)}")
    if not fields:
        raise InputError(f"{images}: no field; expected files named ..._w1..., _w2..., _w4..., or give --image-csv")
    todo = [(number, name, files) for number, (name, files) in enumerate(fields.items(), 1) if not (Path(export) / name).exists()]
    begin, said, count = time.perf_counter(), time.perf_counter(), 0
    work = partial(measure_field, export=export, channels=channels, engine=engine, skip_bad=skip_bad)
    with closing(in_order(work, todo, workers)) as results:
        for k, cells in enumerate(results, 1):
            count += cells
            if time.perf_counter() - said > 5 or k == len(todo):
                said = time.perf_counter()
                rate, left = count / (said - begin), (said - begin) / k * (len(todo) - k)
                print(f"measured {k}/{len(todo)} fields | {rate:.1f} cells/s | {left:.0f} s left", flush=True)
    return export


def measure_field(unit, export, channels, engine="ours", skip_bad=False):
    """Segments and measures one field, unit = (ImageNumber, name, files), and writes its four tables; returns the number of cells."""
    number, name, files = unit
    try:
        field = [read_tiff(file) for file in files]
        if len({x.shape for x in field}) > 1:
            raise InputError(f"{files[0]}: the files of this field differ in size: {[x.shape for x in field]}")
    except InputError:
        if not skip_bad:
            raise
        return 0
    nuclei, cells = segment_field(*field)
    # Objects are cut out in squares, whose last two layers are the labels; places in a square mean nothing and are not written
    layers = np.stack([*(x * np.uint16(257) if x.dtype == np.uint8 else x for x in field), nuclei, cells])
    layers = np.pad(layers, ((0, 0), *[(WINDOWS[-1],) * 2] * 2))
    boxes, tables = ndi.find_objects(cells), []
    size = np.array([max(s.stop - s.start for s in box) for box in boxes], int)
    for low, side in zip((0, *WINDOWS), WINDOWS):
        label = np.flatnonzero((size > low) & (size <= side)) + 1
        corner = [[(s.start + s.stop - side) // 2 + WINDOWS[-1] for s in boxes[k - 1]] for k in label]
        squares = np.array([layers[:, r:r + side, c:c + side] for r, c in corner])
        if len(label):
            own = squares[:, -2:] == label[:, None, None, None]
            masks = (NUCLEUS * own[:, 0] + CELL * own[:, 1]).astype(np.uint8)
            names, values = ENGINES[engine](squares[:, :-2].astype(np.uint16), masks, channels)
            tables.append(pd.DataFrame(values, label, names))
    table = pd.concat(tables).sort_index() if tables else pd.DataFrame(index=np.zeros(0, int))
    work = Path(export) / f".{name}"
    work.mkdir(parents=True, exist_ok=True)
    image = {"ImageNumber": number, **{f"FileName_{c}": Path(file).name for c, file in zip(channels, files)}}
    pd.DataFrame([image]).to_csv(work / "Image.csv", index=False)
    centre = np.array(ndi.center_of_mass(nuclei > 0, nuclei, table.index)).reshape(-1, 2)
    for o in data.OBJECTS:
        own = table[[c for c in sort_columns(table.columns)[0] if c.startswith(o + "_")]].rename(columns=lambda c: c.removeprefix(o + "_"))
        keys = {"ImageNumber": number, "ObjectNumber": table.index, "Parent_Nuclei": table.index}
        if o == "Nuclei":
            keys |= {"Location_Center_X": centre[:, 1], "Location_Center_Y": centre[:, 0]}
        pd.concat([pd.DataFrame(keys, index=table.index), own], axis=1).to_csv(work / f"{o}.csv", index=False, float_format="%.8g")
    os.replace(work, Path(export) / name)
    return len(table)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def choose_cells(cells, taxol, exclude, limit, seed):
    """Which cells stay (N,) bool, and report lines: the taxol controls, a table of exclusions, a random part."""
    stay, report = np.ones(len(cells), bool), []
    if taxol == "drop":
        control = (cells["compound"] == "taxol") & np.isclose(cells["concentration"], 0.3)
        control &= ~((cells["well"] == "D05") & cells["plate"].isin(["Week1_22123", "Week1_22141", "Week1_22161"]))
        stay &= ~control.to_numpy()
        report.append(f"{control.sum()} cells of taxol 0.3 uM positive-control wells dropped")
    if exclude:
        table = read_csv(exclude, dtype=str)
        if set(table.columns) - set(CELL_COLUMNS[:-1]) or not len(table):
            raise InputError(f"{exclude}: expected a CSV with columns among {CELL_COLUMNS[:-1]} and a row for what to leave out, "
                             f"found {list(table.columns)}")
        out = pd.MultiIndex.from_frame(cells[list(table.columns)].astype(str)).isin(pd.MultiIndex.from_frame(table))
        stay &= ~out
        report.append(f"{out.sum()} cells excluded by {exclude}")
    if limit and stay.sum() > limit:
        left = np.flatnonzero(stay)
        stay = np.isin(np.arange(len(cells)), np.random.default_rng([seed, 4]).choice(left, limit, replace=False))
        report.append(f"{limit} of {len(left)} cells drawn (--limit, seed {seed})")
    if not stay.any():
        raise InputError("no cell is left after --taxol-controls, --exclude and --limit")
    return stay, report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--simulate", type=int, nargs="?", const=4000, metavar="N", help="N simulated cells (default 4000)")
    source.add_argument("--crops", metavar="DIR", help="folder of crops, <stem>/<stem>_<k>.npy, with its metadata.csv")
    source.add_argument("--images", metavar="DIR", help="whole fields: TIFF files, found by name anywhere below DIR")
    source.add_argument("--check", metavar="DIR", help="compare every checksum of a prepared folder, write nothing")
    add("--features", metavar="TABLE", help=f"with --crops: CSV of CellProfiler measurements, key column {KEY}")
    add("--cellprofiler", metavar="EXPORT", help="with --images: CellProfiler's folder of CSV files (or of such folders), or SQLite file "
                                                 "(default: cells are segmented and measured here)")
    add("--engine", choices=list(ENGINES), default="ours", help="with --images alone: who measures (cp_measure: the package; default ours)")
    add("--image-csv", metavar="FILE", help="with --images: BBBC021_v1_image.csv, what a field is (default: CellProfiler's Metadata_)")
    add("--channels", default="DAPI,Tubulin,Actin", help="with --images: names of the FileName_ columns in order (default %(default)s)")
    add("--write-release", metavar="DIR", help="with --simulate: write fields, BBBC021's tables and CellProfiler's, no prepared folder")
    add("--moa", metavar="FILE", help="BBBC021_v1_moa.csv: mechanisms by compound and concentration (default: the metadata's own)")
    add("--stored-order", default="DAPI,Actin,Tubulin", help="with --crops: channels in the files' order (default %(default)s)")
    add("--columns", metavar="REGEX", help="keep only features that match, e.g. '^Nuclei_AreaShape'")
    add("--out", metavar="DIR", help="the prepared folder to write")
    add("--split", choices=["cell", "field", "well", "plate", "compound"], default="cell",
        help="unit that never stands in two splits (default cell, the paper)")
    add("--normalise", choices=["train", "plate-dmso"], default="train",
        help="centre and scale from all training cells, or per plate from its DMSO cells")
    add("--drop-duplicates", action="store_true", help="drop features that are identical to an earlier one")
    add("--taxol-controls", choices=["keep", "drop"], default="keep",
        help="taxol 0.3 uM is also the positive control of every plate (default keep)")
    add("--exclude", metavar="FILE", help="CSV of what to leave out: columns of cells.csv (plate, well, ...), a row for each combination")
    add("--limit", type=int, metavar="N", help="only N cells, drawn by the seed")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read patches (default: the CPUs, 8 at most)")
    add("--seed", type=int, default=0, help="of the split, of --limit and of the simulation (default 0)")
    add("--skip-bad", action="store_true", help="leave out cells whose patch or field is missing or malformed, and count them")
    args = parser.parse_args(argv)
    if args.write_release and (args.simulate is None or args.out):
        parser.error("--write-release DIR goes with --simulate and without --out")
    if not args.check and not args.out and not args.write_release:
        parser.error("--out DIR is needed: the prepared folder to write")
    if args.crops and not args.features:
        parser.error(f"--crops needs --features TABLE: CellProfiler measurements with key column {KEY}")
    for name, least in (("simulate", 100), ("limit", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected {least} or more")
    try:
        re.compile(args.columns or "")
    except re.error as error:
        parser.error(f"--columns {args.columns!r} is no regular expression ({error})")
    return args


def main(argv=None):
    args = parse(argv)
    data.keep_freed_memory()
    if args.check:
        folder = data.open_folder(args.check)
        equal = {name: data.checksum(folder.path / name) == folder.meta["checksums"][name] for name in data.FILES}
        for name, same in equal.items():
            print(f"{args.check}/{name}: {'as written' if same else 'CHANGED since it was prepared'}")
        if not all(equal.values()):
            raise InputError(f"{args.check}: changed; prepare it again")
        return
    if r := args.write_release:
        if Path(r).exists():
            raise InputError(f"{r}: exists already; choose another --write-release, or delete it")
        count = write_release(r, *simulate_table(args.simulate, args.seed), args.seed)
        print(f"{r}: {count} fields; next: python prepare_bbbc021.py --images {r}/images --cellprofiler {r}/cellprofiler "
              f"--image-csv {r}/BBBC021_v1_image.csv --moa {r}/BBBC021_v1_moa.csv --out out/")
        return
    out = Path(args.out)
    options = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "check", "write_release")}
    if out.exists():
        if (out / "meta.json").is_file() and data.open_folder(out).meta["options"] == options:
            print(f"{out} is already prepared with these options; nothing to do")
            return
        raise InputError(f"{out}: exists already; choose another --out, or delete it")

    begin = time.perf_counter()
    channels, moa = list(CHANNELS), read_moa(args.moa) if args.moa else None
    if args.simulate:
        drawn, table = simulate_table(args.simulate, args.seed)
        names, dropped, _ = sort_columns(table.columns, args.columns)
        cells, report = complete_cells(drawn.copy(), moa)
        pieces = [(table, names, np.arange(len(table)))]
    elif args.crops:
        stored = args.stored_order.split(",")
        if sorted(stored) != sorted(channels):
            raise InputError(f"--stored-order {args.stored_order}: expected {', '.join(channels)} in some order, separated by commas")
        cells, names, dropped, pieces, report = crops_table(args.crops, args.features, args.columns, moa)
    else:
        channels = args.channels.split(",")
        if len(set(channels)) != 3 or len(channels) != 3:
            raise InputError(f"--channels {args.channels}: expected three names, separated by commas")
        export = args.cellprofiler or measure_fields(args.images, f"{out}.measured", args.image_csv, channels, args.workers,
                                                     args.skip_bad, args.engine)
        cells, names, dropped, pieces, report, files = fields_table(args.images, export, args.image_csv, channels, args.columns,
                                                                    moa, args.skip_bad)
    if not names:
        matching = f" matches --columns {args.columns}" if args.columns else ""
        raise InputError(f"no feature column{matching}; expected names like Nuclei_AreaShape_Area")
    stay, more = choose_cells(cells, args.taxol_controls, args.exclude, args.limit, args.seed)
    cells, pieces = data.keep_cells(cells, pieces, stay)
    print("\n".join(report + more))

    fields = dict(list(cells.groupby("field", sort=False)))
    if args.simulate:
        read_unit, units, row = simulated_unit, [], np.flatnonzero(stay)
        for field, whole in drawn.groupby("field", sort=False):
            if field in fields:  # all its cells are drawn, also those that are not kept: a picture does not depend on --limit
                kept, first = fields[field].index, whole.index[0]
                place = whole["x"].to_numpy(), whole["y"].to_numpy()
                units.append((kept[0], (table.loc[whole.index], *place, [args.seed, 5, first], row[kept] - first)))
    elif args.crops:
        read_unit, order = crops_unit, [stored.index(c) for c in channels]
        paths = [f"{args.crops}/{field}/{cell.removesuffix('.npy')}.npy" for field, cell in zip(cells["field"], cells["cell"])]
        units = [(a, (paths[a:a + CROPS_AT_ONCE], order)) for a in range(0, len(cells), CROPS_AT_ONCE)]
    else:
        read_unit = fields_unit
        units = [(part.index[0], (files[field], part["x"].to_numpy(), part["y"].to_numpy())) for field, part in fields.items()]
    write_folder(out, cells, names, dropped, pieces, units, read_unit, channels, options, args.workers, args.skip_bad)
    print(describe(out))
    print(f"done in {time.perf_counter() - begin:.1f} s; next: python train.py --data {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"prepare_bbbc021.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
