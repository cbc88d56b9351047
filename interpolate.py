"""Edit the measurements of a cell and look at the cell. Every picture is measured again, and every edit says how far it leaves the data.

    python interpolate.py sweep --data out/ --run runs/cp2image-seed0 --feature Nuclei_AreaShape_Area --html cell.html
    python interpolate.py {sweep --fig4c, moa, dose, walk, algebra, controllability, coupling} --data out/ --run RUN
    python interpolate.py {walk, algebra, latents} --data out/ --run runs/lsgan-seed0       # or a VAE: in its latent space
    python interpolate.py {walk, latents, imagine} --data stacks/ --run runs/statcell-seed0

Reads a prepared folder and a run. Writes OUT/<figure>.json, .csv and .png (equal calls, equal bytes) and, with --html FILE, one page with
a slider for each edited measurement, which any browser opens offline. Cost: 50 pictures/s with 860 features on one CPU core.
"""
import argparse
import base64
import difflib
import fnmatch
import functools
import html
import inspect
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial.distance import cdist

import data
import model
from data import InputError

FIG4C = ["Nuclei_AreaShape_Area", "Nuclei_AreaShape_Orientation",
         "Nuclei_Intensity_MeanIntensity_DAPI", "Cytoplasm_AreaShape_Area"]  # rows of the paper's figure
AREA = FIG4C[0]  # what walks and latents report of their pictures
BLOCK = 50  # dimensions replaced at once in Fig 5a (paper)
# --edit: what happens to the measurements that an edit does not name (Cells.edit), in words
OTHERS = {"hold": "held", "conditional": "moved to their conditional mean", "free": "left open"}
OFFSETS = np.arange(-3.0, 4.0)  # sd, the moves of controllability, 0 among them
REFERENCE = 20_000  # training cells at most that stand for the data: bounds the memory
NOISE, FRESH = 500, 2_000  # noise vectors that serve as a GAN's cells, and more that stand for its data
GROUP = 200  # cells at most of a concentration in Fig 5b: DMSO would be most of the principal axes
STOPS = 25  # of a slider
DRAWS = 20  # of cells, in algebra
TERMS = 3  # cells averaged in each of its terms
# high, low, other -> these three, and high - low + other
SUM = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 1]])
IMAGINED = 4  # draws of a structure
ALIKE = 0.05  # sd: a measurement that halving the brightness moves by more depends on it


# ------------------------------------------------------------------------------------------------------------
# Edits of measurements: raw (n, F) in CellProfiler's units, or f (n, F) in standard deviations


def wrap(degrees):
    """Directions, which are the same after half a turn, in -90..90 degrees."""
    return (degrees + 90) % 180 - 90


def replaced(a, b, block=BLOCK):
    """Fig 5a: from a (F,) to b (F,), `block` dimensions a step, the largest |b - a| first, ties to the lower.
    Returns the order (F,) and the path (n, F)."""
    order = np.argsort(-np.abs(b - a), kind="stable")
    rank = np.argsort(order)  # (F,) when each dimension's turn comes
    done = np.arange(0, len(a) + block, block)  # (n,) dimensions replaced so far
    return order, np.where(rank < done[:, None], b, a)


def line(a, b, t):
    """Points (n, F) at t (n,), 0 to 1, on the line from a to b (F,): CP vectors, encodings or noise vectors."""
    return np.outer(1 - t, a) + np.outer(t, b)


def rank_latents(z):
    """Of latent vectors z (n, F): mean |z| (F,), the dimensions by it (F,), ties to the lower, and the values (F, 9) of a
    walk along each, from -2 to 2 of its sd (ddof 0) about 0. Source: Donovan-Maiye et al. 2022."""
    size = np.abs(z).mean(0)
    order = np.argsort(-size, kind="stable")
    return size, order, np.outer(z.std(0), np.linspace(-2, 2, 9))


def cosine(a, b):
    """Cosine (n,) between the rows of a (n, F) and b (F,), over the places where b and all of a are finite."""
    use = np.isfinite(a).all(0) & np.isfinite(b)
    a, b = a[:, use], b[use]
    return a @ b / (np.linalg.norm(a, axis=1) * np.linalg.norm(b))


def representative(f):
    """The row of f (n, F) nearest to its mean (Euclid), and its distance."""
    distance = np.linalg.norm(f - f.mean(0), axis=1)
    return distance.argmin(), distance.min()


def principal_axes(f):
    """Mean (F,) and first two principal axes (2, F) of f (n, F); each axis' largest loading is positive."""
    mean = f.mean(0)
    axes = np.linalg.svd(f - mean, full_matrices=False)[2][:2]
    for axis in axes:
        axis *= np.sign(axis[np.abs(axis).argmax()])
    return mean, axes


def silhouettes(f, group):
    """Each row's silhouette (b - a) / max(a, b), Euclid; f (n, F), group (n,) names: two or more, of 2 rows or more each."""
    member = pd.get_dummies(group).to_numpy(float)  # (n, groups)
    count = member.sum(0)
    total = cdist(f, f) @ member
    a = (total * member).sum(1) / (member @ count - 1)  # mean distance to the others of its group
    b = np.where(member, np.inf, total / count).min(1)  # to the nearest other group
    return (b - a) / np.maximum(a, b)


def mean_interval(values, seed, name="value"):
    """Mean of the finite values under `name`, its 95 % bootstrap interval, n."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"n": 0}
    draws = np.random.default_rng(seed).choice(values, (1000, len(values)))
    low, high = np.percentile(draws.mean(1), [2.5, 97.5])
    return {name: values.mean(), "low": low, "high": high, "n": len(values)}


# ------------------------------------------------------------------------------------------------------------
# How far from the data


def ledoit_wolf(f):
    """Covariance (F, F) of f (n, F), shrunk towards its mean variance times the identity, and the weight of that (2004)."""
    f = f - f.mean(0)
    n, width = f.shape
    s = f.T @ f / n
    target = np.trace(s) / width * np.eye(width)
    distance = ((s - target) ** 2).sum()
    noise = (((f ** 2).sum(1) ** 2).mean() - (s ** 2).sum()) / n
    shrinkage = min(1.0, noise / max(distance, 1e-300))  # of a single feature the distance is 0
    return (1 - shrinkage) * s + shrinkage * target, shrinkage


class Reference:
    """The training cells f (n, F) that edits are held against, with their shrunk `covariance`; InputError under 20 cells.
    Their own Mahalanobis distances are those of each cell as if it were left out (Sherman-Morrison): a cell that shaped the
    covariance would otherwise look nearer than any new one."""

    def __init__(self, f):
        if len(f) < 20:
            raise InputError(f"{len(f)} training cells: too few to say how far edits go, 20 are needed")
        self.mean = f.mean(0)
        self.covariance, self.shrinkage = ledoit_wolf(f)
        self.inverse = np.linalg.inv(self.covariance)
        inside = self.mahalanobis(f)
        leverage = (1 - self.shrinkage) / len(f) * inside
        self.ranked = np.sort(inside / (1 - leverage))
        self.known = f
        some = f[::len(f) // 1000 + 1]
        to_others = np.partition(cdist(some, f), 1)[:, 1]  # the nearest is the cell itself
        self.usual = np.median(to_others) or to_others.mean()  # a single feature may have ties

    def mahalanobis(self, f):
        """Squared Mahalanobis distance (n,) of f (n, F) from the mean."""
        moved = f - self.mean
        return (moved @ self.inverse * moved).sum(1)

    def of_given(self, f):
        """What f (n, F) is held against, and f, both without the features that an edit left open (NaN)."""
        given = np.isfinite(f).all(0)
        if given.all():
            return self, f
        return Reference(self.known[:, given]), f[:, given]

    def how_far(self, f):
        """The percentile (n,) of the Mahalanobis distance of each vector f (n, F) among the training cells'."""
        return 100 * np.searchsorted(self.ranked, self.mahalanobis(f)) / len(self.ranked)

    def nearest(self, f):
        """The distance (n,) of each vector to its nearest training cell, in units of what is usual between them (median)."""
        return cdist(f, self.known).min(1) / self.usual


def outside(percentile):
    """The percentile of a vector's distance among that of the known cells, in words."""
    if percentile > 99:
        return "far outside the data"
    if percentile > 95:
        return "at the data's edge"
    return "inside the data"


# ------------------------------------------------------------------------------------------------------------
# Measured again


def obedience(asked, got, features, scale, j, follow=0, seed=0):
    """How the pictures obey an edit of feature j. asked, got (K, n, F): raw vectors of n cells moved by OFFSETS (K,) sd, and what was
    measured again, NaN where nothing; scale (F,) one sd of each, NaN where that is another unit -> a record (dict).
    slope: realised per requested sd, least squares in each cell, mean over the n cells that have one, with a 95 % bootstrap interval;
    error: median |got - asked| in sd; offset: median of got - asked, which a slope does not show; off target: mean |slope| of the other
    features beyond `follow` (F,), what the edit asked of them. Where feature j was not measured all but the last are absent."""
    angle = is_angle(features)
    got = np.where(angle, np.unwrap(got, period=180, axis=0), got)
    seen = np.ma.masked_invalid(got)
    x = OFFSETS[:, None, None] + 0 * seen  # masked as seen is
    x = x - x.mean(0)  # each cell about its own mean
    slopes = (x * seen).sum(0) / (x * x).sum(0) / scale  # (n, F)
    astray = np.abs(slopes.mean(0) - follow).filled(np.nan)
    astray[j] = np.nan
    record = {"feature": features[j], "status": "measured", "off target": np.nanmean(astray)}
    record |= mean_interval(slopes[:, j].filled(np.nan), seed, "slope")
    if not record["n"]:
        return record | {"status": "not measured"}
    miss = got[:, :, j] - asked[:, :, j]
    if angle[j]:
        miss = wrap(miss)
    moved = got[:, :, j] - got[OFFSETS == 0, :, j]
    pairs = pd.DataFrame(dict(asked=OFFSETS.repeat(got.shape[1]), moved=moved.ravel()))
    return record | dict(
        error=np.nanmedian(np.abs(miss)) / scale[j],
        offset=np.nanmedian(miss) / scale[j],
        spearman=pairs.corr("spearman").loc["asked", "moved"],
    )


def is_angle(features):
    """Which features (F,) are directions, in degrees that wrap at 180."""
    return np.char.endswith(features, "_Orientation")


def feature_groups(features, channels):
    """Features by object, family and the one channel they are about: {'Nuclei_Texture_DAPI': places}."""
    groups = {}
    for j, name in enumerate(features):
        words = name.split("_")
        about = [c for c in channels if c in words]
        group = words[:2]
        if len(about) == 1:
            group += about
        groups.setdefault("_".join(group), []).append(j)
    return groups


# ------------------------------------------------------------------------------------------------------------
# The cells that edits start from, the generator that draws them, and the engine that measures its pictures


class Cells:
    """The cells of a prepared folder. `rows`: those of the split; `train`: those that stand for the data; `table`: a frame with a row
    for each cell of the folder. raw (n, F) are measurements in CellProfiler's units (trained with plate-dmso: in DMSO sd of the plate),
    f (n, F) what G takes: the same in sd, clipped; of a VAE or GAN its latent vectors. Pictures (n, C, S, S) are in 0..1, on the CPU."""
    extractor = "data.segment and measure"  # what `look` calls

    def __init__(self, G, folder, split="test", seed=0):
        self.G = G
        self.folder = folder
        self.split = split
        self.seed = seed
        self.features = G.features
        self.centre = G.centre.numpy()
        self.scale = G.scale.numpy()
        self.pinned = []  # places that a free edit gives, too
        self.area = np.flatnonzero(np.isin(G.features, AREA))  # its place, if it is a feature
        if folder:
            self.table = folder.cells
            self.train = self.pick(folder.rows("train"), REFERENCE)
            if split == "all":
                self.rows = np.flatnonzero(self.table["split"] != "reference")
            else:
                self.rows = folder.rows(split)

    def pick(self, rows, most):
        """Some of the rows, `most` at most, by the seed."""
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[:most])

    def places(self, pattern):
        """The places (g,) of a feature, or of a group by a pattern like 'Nuclei_Texture_*'; InputError with the nearest names."""
        places = [j for j, name in enumerate(self.features) if fnmatch.fnmatchcase(name, pattern)]
        if not places:
            near = difflib.get_close_matches(pattern, self.features, 5, 0.3)
            raise InputError(f"--feature {pattern}: not a feature of this model (meta.json of the prepared folder says what was "
                             f"left out); nearest: {near}")
        return places

    def raw(self, rows):
        return self.folder.raw[rows].astype(float)

    def f(self, rows):
        return self.standardise(self.raw(rows))

    def standardise(self, raw):
        """raw (n, F) -> f (n, F) float64: model.standardise on arrays."""
        missing = np.nan if self.G.missing else 0.0
        f = model.standardise(torch.tensor(raw), self.G.centre, self.G.scale, missing)
        return f.double().numpy()

    def pictures(self, rows):
        """The real cells, scaled as for the generator."""
        return data.scale_images(self.folder.images(rows), self.G.image_norm, self.G.white)

    @functools.cached_property
    def reference(self):
        return Reference(self.f(self.train))

    def edit(self, raw, places, values, way):
        """raw (n, F) with the features `places` (g,) set to `values` (n, g); directions wrap into -90..90 degrees. `way`, a word of
        OTHERS: what the other features do; another way is a branch here. hold: nothing. conditional: they move as their conditional
        mean does when the edited ones move, f_o + C_oe C_ee^-1 (f_e' - f_e) with the covariance C of the training cells; an edit to
        the cell's own values changes nothing. free: they are not given (NaN), but for `pinned` ones: the model decides."""
        out = raw.copy()
        if way == "free":
            if not self.G.missing:
                raise InputError(f"--edit free: a {self.G.model} needs every measurement; train --model sharp")
            out[:] = np.nan
            out[:, self.pinned] = raw[:, self.pinned]
        if way == "conditional":
            covariance = self.reference.covariance  # (F, F) in sd
            weights = np.linalg.solve(covariance[np.ix_(places, places)], covariance[places])  # (g, F)
            moved = (values - raw[:, places]) / self.scale[places]  # (n, g) in sd
            out += moved @ weights * self.scale
        out[:, places] = values
        turned = is_angle(self.features) & (abs(out) > 90)
        return np.where(turned, wrap(out), out)

    def paint(self, f, z=None):
        """Pictures (n, C, S, S) of f (n, F); z (n, G.latent): what chance adds, where the generator has that."""
        draw = getattr(self.G, "decode", self.G)
        inputs = [torch.tensor(f).float()]
        if z is not None:
            inputs.append(z)
        batches = zip(*(v.to(self.G.device).split(256) for v in inputs))
        parts = [draw(*batch).cpu() for batch in batches]
        return torch.cat(parts).clamp(0, 1)

    def look(self, x):
        """What CellProfiler would measure in pictures (n, F); NaN: no nucleus found, or not a measurement of pictures."""
        table = data.measurements(x, self.G.channels, self.G.white, self.G.device)
        return table.reindex(columns=self.features).to_numpy(float)

    @functools.cached_property
    def relative(self):
        """Which features (F,) bool such pictures cannot express in the unit of raw: with cell-max what moves when pictures are drawn
        at half their brightness; with plate-dmso everything, as a drawn cell has no plate whose DMSO would be its unit."""
        dmso = self.G.normalise == "plate-dmso"
        if dmso or self.G.image_norm != "cell-max":
            return np.full(len(self.features), dmso)
        x = self.paint(self.f(self.train[:32]))
        full = np.ma.masked_invalid(self.look(x))
        moved = np.ma.masked_invalid(self.look(x / 2) - full)
        share = (np.abs(moved) > ALIKE * full.std(0)).mean(0)  # of the cells
        return share.filled(0) > 0.5

    @functools.cached_property
    def unit(self):
        """One sd (F,) of what is measured in pictures; NaN: in another unit."""
        return np.where(self.relative, np.nan, self.scale)

    def readings(self, values, watch):
        """Features `watch` of what was measured in a picture (F,), in words; (rel.): in another unit than raw."""
        words = []
        for j in watch:
            unit = " (rel.)" if self.relative[j] else ""
            text = f"measured {values[j]:.4g}{unit}"
            words.append(text.replace("measured nan", "not measured"))
        return words

    def find(self, name):
        """The row of the cell of that name; without a name the middle one of `rows`."""
        if not name:
            return self.middle(self.rows)
        names = self.table["cell"].astype(str).tolist()
        if name not in names:
            raise InputError(f"cell {name}: not among the {len(names)} cells, whose first is {names[0]}")
        return names.index(name)

    def latent_name(self, d):
        return f"dimension {d}"

    def middle(self, rows):
        """The one of the rows that is closest to their mean."""
        return rows[representative(self.f(rows))[0]]

    def group(self, name):
        """The rows of a mechanism, compound or treatment; InputError with the list if it has under 3 cells."""
        table = self.table.iloc[self.rows]
        table = table[["moa", "compound"]].assign(treatment=data.treatment_names(table))
        found = self.rows[(table == name).any(axis=1)]
        if len(found) < 3:
            known = sorted({*table["moa"], *table["compound"]})
            raise InputError(f"{name}: {len(found)} cells, 3 are needed; --split all has most; there are {known}")
        return found


class TableCells(Cells):
    """The cells of a table (a row each, CellProfiler's names), without pictures. What stands for the data are the training cells of
    the folder or, without one, the table's own. A missing measurement is the training mean."""
    pictures = None

    def __init__(self, G, table, folder=None, seed=0):
        super().__init__(G, folder, "train", seed)
        if G.normalise == "plate-dmso":
            table = data.normalise_plates(table)
        values = model.table_values(G, table).numpy()  # (N, F)
        self.values = np.where(np.isfinite(values), values, self.centre)
        self.table = table
        self.rows = np.arange(len(table))
        self.split = "table"
        if folder:
            self.values = np.concatenate([self.values, folder.raw[self.train]])
            self.train = np.arange(len(table), len(self.values))
        else:
            self.train = self.rows

    def raw(self, rows):
        return self.values[rows]


class EncodedCells(Cells):
    """The cells of a prepared folder in the latent space of a VAE: f are the encoder's means. Distances are from draws of the cells'
    latents: where a dimension holds nothing the means alone do not vary."""

    def told(self, rows):
        """What the VAE is given beside the pictures of these rows."""
        return ()

    def encode(self, rows):
        """Means and log variances (2, n, latent) of the rows."""
        parts = []
        for part in torch.tensor(rows).split(256):
            x = self.pictures(part.numpy()).to(self.G.device)
            encoded = self.G.encode(x, *self.told(part.numpy()))
            parts.append(torch.stack(encoded).cpu())
        return torch.cat(parts, 1)

    def f(self, rows):
        return self.encode(rows)[0].double().numpy()

    @functools.cached_property
    def reference(self):
        mean, log_var = self.encode(self.train)
        noise = model.noise(self.G, len(mean), self.seed)
        drawn = mean + noise * (0.5 * log_var).exp()
        return Reference(drawn.double().numpy())


class StackedCells(EncodedCells):
    """The cells of a prepared folder in the latent spaces of a Statistical Cell, the reference's first. raw (n, F) are seven features
    of each channel, measured in pictures; what is drawn has one structure (or treatment), the commonest unless said."""
    extractor = "data.solid_features"

    def __init__(self, G, folder, split="test", seed=0, structure=None):
        super().__init__(G, folder, split, seed)
        self.features = [f"{channel}_{what}" for channel in G.channels for what in data.SEVEN]
        self.area = [0]  # the first channel's size
        self.relative = np.zeros(len(self.features), bool)
        usual = np.bincount(folder.label[self.rows]).argmax()
        self.structure = structure or folder.labels[usual]

    def told(self, rows):
        return (self.folder.told(rows).to(self.G.device),)

    def raw(self, rows):
        return self.look(self.pictures(rows))

    def look(self, x):
        return data.solid_features(x, self.G.channels).to_numpy(float)

    def latent_name(self, d):
        which = "target" if d >= self.G.half else "reference"
        return f"{which} {d % self.G.half}"

    def imagine(self, z, structure, real=None):
        """Pictures of latent vectors z (n, G.latent) with that structure; in the reference of a real cell (1, C, ...), if given."""
        names = list(self.folder.labels)
        if structure not in names:
            raise InputError(f"{structure}: not a structure (or treatment) of this folder; there are {names}")
        told = torch.zeros(len(z), len(names))
        told[:, names.index(structure)] = 1
        if real is not None:
            real = real.expand(len(z), *real.shape[1:]).to(self.G.device)
        return self.G.decode(z.to(self.G.device), told.to(self.G.device), real).cpu().clamp(0, 1)

    def paint(self, f, z=None):
        parts = torch.tensor(f).float().split(256)
        return torch.cat([self.imagine(part, self.structure) for part in parts])


class NoiseCells(Cells):
    """Cells that a GAN draws from noise: NOISE vectors noise0, noise1, ... in the order of model.sample(G, NOISE, seed); FRESH more
    stand for the data. raw is what their pictures measure."""
    pictures = None

    def __init__(self, G, folder, split="test", seed=0):
        super().__init__(G, folder, "train", seed)
        self.noise = model.noise(G, NOISE + FRESH, seed).double().numpy()
        self.rows = np.arange(NOISE)
        self.train = np.arange(NOISE, NOISE + FRESH)
        self.relative = np.zeros(len(self.features), bool)  # raw was measured in pictures
        self.split = "noise"
        self.table = pd.DataFrame({"cell": [f"noise{i}" for i in self.rows]})

    def f(self, rows):
        return self.noise[rows]

    def raw(self, rows):
        return self.look(self.paint(self.noise[rows]))


# ------------------------------------------------------------------------------------------------------------
# What a command leaves behind


class Result:
    """Rows of pictures with words under them, and records, a line each of the JSON and the CSV. about: what the JSON says besides."""

    def __init__(self, name, title, **about):
        self.name = name
        self.title = title
        self.about = {"n": 1} | about
        self.rows = []
        self.records = []
        self.outside = 0  # pictures that are extrapolations
        self.chart = None  # a function of matplotlib's axes

    def draw(self, cells, name, f, heads, watch=(), ends=(), **columns):
        """Draws f (n, F), measures again, adds a row of pictures and n records; returns what was measured (n, F).
        heads: n texts; watch: features whose measured values are written; ends: rows of the real cells before and after them, drawn
        where there are pictures; columns: values (n,) for the records."""
        x = cells.paint(f)
        seen = cells.look(x)
        known, f = cells.reference.of_given(f)
        far = known.how_far(f)
        self.outside += (far > 99).sum()
        columns["outside percentile"] = far
        columns["nearest"] = known.nearest(f)
        table = pd.DataFrame(dict(row=name, asked=heads, **columns))
        for j in watch:
            table[f"measured {cells.features[j]}"] = seen[:, j]
        self.records += table.to_dict("records")
        words = [[head, *cells.readings(values, watch), outside(percentile)]
                 for head, values, percentile in zip(heads, seen, far)]
        if cells.pictures and len(ends):
            real = cells.pictures(ends)
            said = [["real cell", *cells.readings(values, watch)] for values in cells.look(real)]
            x = torch.cat([real[:1], x, real[1:]])
            words = said[:1] + words + said[1:]
        self.rows.append((name, x, words))
        return seen

    def write(self, out, about):
        """JSON and CSV first, then the pictures; returns their path without ending."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / re.sub(r"[^\w+-]+", "_", self.name)[:120]
        table = pd.DataFrame({"n": about["n"]} | record for record in self.records)
        table = table.assign(split=about["split"], seed=about["seed"], extractor=about["extractor"])
        data.write(path.with_suffix(".csv"), table.to_csv(index=False, lineterminator="\n"))
        content = dict(about=about, records=json.loads(table.to_json(orient="records")))  # 10 decimals
        data.write(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
        if self.rows:
            data.write(path.with_suffix(".png"), strip(self.rows, self.title).save)
        if self.chart:
            draw_chart(path.with_name(path.name + "_chart.png"), self.chart)
        return path


def strip(rows, title):
    """Rows of (name, pictures (n, C, ..., H, W) in 0..1, a list of lines for each), composites above their lines -> a PIL image."""
    n, high, wide, _ = data.composite(rows[0][1]).shape  # as all rows
    zoom = -(-136 // wide)  # a picture is wide enough for its words
    column = wide * zoom + 2
    body_height = high * zoom + 2
    height = body_height + 80  # of a row: 20 for the name, 60 for the words
    width = max(n * column, 7 * len(title))
    picture = Image.new("RGB", (width, 20 + height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(11)
    draw.text((4, 3), title, "black")
    for top, (name, x, words) in zip(range(20, picture.height, height), rows):
        draw.text((4, top + 3), name, "black")
        body = data.tile([data.composite(x)], zoom)
        picture.paste(Image.fromarray(body), (0, top + 20))
        for i, lines in enumerate(words):
            text = "\n".join(lines)
            colour = "firebrick" if "far outside" in text else "black"
            draw.text((4 + i * column, top + body_height + 22), text, colour)
    return picture


def draw_chart(path, draw):
    """The picture that draw(axes) makes, as a PNG. It is optional: whatever stops matplotlib costs one line."""
    try:
        from matplotlib.figure import Figure
        figure = Figure((10, 9), dpi=90, layout="constrained")
        draw(figure.subplots())
        data.write(path, figure.savefig)
    except Exception as error:
        print(f"{path.name} not drawn by matplotlib ({error!r:.90}); the numbers are complete")


def bars(axes, records, names, key):
    """The 60 largest values of `key` among the records as bars with intervals."""
    table = pd.DataFrame(records).dropna(subset=key).sort_values(key)[-60:]
    name = table[names].agg(", ".join, axis=1)
    axes.barh(name, table[key])
    axes.hlines(name, table["low"], table["high"], "black")
    axes.set_xlabel(key)


# ------------------------------------------------------------------------------------------------------------
# The figures, CP2Image's first: each takes the cells and its own flags, and returns a Result


def sweep(cells, feature, low=None, high=None, steps=7, edit="hold", cell=None):
    """Fig 4c for any features or groups: a row each from low to high, the others held or moved to their conditional mean. A feature
    moves in CellProfiler's unit, from the 1st to the 99th percentile of the training cells; those of a group together, in sd from the
    cell's own values, from -3 to 3."""
    row = cells.find(cell)
    own = cells.raw([row])  # (1, F)
    known = cells.raw(cells.train)
    name = cells.table["cell"].iloc[row]
    what = "fig4c" if feature == FIG4C else "_".join(feature)
    result = Result(f"sweep_{edit}_{what}", f"Cell {name}, one measurement changed, all others {OTHERS[edit]}",
                    cell=name, edit=edit)
    for pattern in feature:
        places = cells.places(pattern)
        title = cells.features[places[0]]
        if len(places) == 1:
            unit, ends = "raw", np.quantile(known[:, places], [0.01, 0.99])
            origin, step = 0, 1  # the levels are the values
        else:
            unit, ends = "sd", (-3, 3)
            origin, step = own[:, places], cells.scale[places]
            title = f"{pattern} (own and measured: {title})"
        first = ends[0] if low is None else low
        last = ends[1] if high is None else high
        levels = np.linspace(first, last, steps)
        values = np.concatenate([own[:, places], origin + levels[:, None] * step])  # (1 + steps, g)
        f = cells.standardise(cells.edit(own.repeat(len(values), 0), places, values, edit))
        heads = [f"own {values[0, 0]:.4g}"] + [f"asked {level:.4g} {unit}" for level in levels]
        result.draw(cells, title, f, heads, places[:1], [row], requested=values[:, 0])
    return result


def moa(cells, target=None, block=BLOCK):
    """Fig 5a: from the DMSO cell closest to the mean to that of each target; under each picture the cosine of its CP vector to the
    target's, and the same of what is measured in the picture and in the real target cell."""
    if not target:
        counts = cells.table["moa"].iloc[cells.rows].value_counts()
        target = counts.drop([data.SOLVENT, "unknown"], errors="ignore").index[:3]
    result = Result("moa", "From DMSO to a mechanism: cosine to the target, as asked and as seen in pictures",
                    block=block)
    first = cells.middle(cells.group(data.SOLVENT))
    for name in target:
        last = cells.middle(cells.group(name))
        a, b = cells.f([first, last])
        f = replaced(a, b, block)[1]
        seen = cells.look(torch.cat([cells.paint(f), cells.pictures([last])]))
        seen = (seen - cells.centre) / cells.unit
        asked, measured = cosine(f, b), cosine(seen[:-1], seen[-1])
        heads = [f"asked {v:.3f}, seen {w:.2f}" for v, w in zip(asked, measured)]
        result.draw(cells, f"{name}, cell {cells.table['cell'].iloc[last]}", f, heads, (), [first, last],
                    cosine=asked, cosine_seen=measured)
    return result


def dose(cells, compound="latrunculin B"):
    """Fig 5b, c: principal axes and silhouettes of the CP vectors of DMSO and of a compound's concentrations; real
    cells of each; cells generated on the line from the mean of DMSO to that of the highest concentration, in the full space."""
    doses = sorted(set(cells.table["concentration"].iloc[cells.group(compound)]))
    names = [data.SOLVENT] + [f"{compound} {dose:g}" for dose in doses]
    rows = [cells.pick(cells.group(name), GROUP) for name in names]
    f = [cells.f(r) for r in rows]
    every = np.concatenate(f)
    label = np.repeat(names, [len(r) for r in rows])
    t = np.linspace(0, 1, 5)
    points = line(f[0].mean(0), f[-1].mean(0), t)
    mean, axes = principal_axes(every)
    plane = (every - mean) @ axes.T  # (n, 2)
    track = (points - mean) @ axes.T

    result = Result(f"dose_{compound}", f"From DMSO to {names[-1]} uM", n=len(every))
    middle = [cells.middle(r) for r in rows]
    heads = [f"at {v:.2f}" for v in t]
    result.draw(cells, f"from mean to mean; real cells: {', '.join(names)}", points, heads, (), middle,
                pc1=track[:, 0], pc2=track[:, 1])
    result.records += [
        dict(row="silhouette in all measurements", value=silhouettes(every, label).mean()),
        dict(row="silhouette in the plane", value=silhouettes(plane, label).mean()),
    ]

    def draw(axes):
        for name in names:
            axes.plot(*plane[label == name].T, ".", label=name)
        axes.plot(*track.T, "r.-")
        axes.set(xlabel="PC 1", ylabel="PC 2")
        axes.legend()

    result.chart = draw
    return result


def walk(cells, ends):
    """The straight line between the CP vectors or encodings of two cells, or between two noise vectors."""
    rows = [cells.find(name) for name in ends]
    t = np.linspace(0, 1, 9)
    result = Result("walk_" + "_".join(ends), " to ".join(ends), cells=ends)
    heads = [f"at {v:.2f}" for v in t]
    watched = "".join(np.take(cells.features, cells.area))
    result.draw(cells, f"measured: {watched}", line(*cells.f(rows), t), heads, cells.area, rows, t=t)
    return result


def algebra(cells, feature=AREA):
    """CytoGAN's arithmetic on CP vectors, encodings or noise vectors: mean of three cells with a high value - mean of three with a low
    one + mean of three others, measured again. High and low: the top and bottom tenth of the cells that have a value; others: the middle
    fifth. What is asked for: the same sum of the cells' values."""
    j, *more = cells.places(feature)
    if more or cells.relative[j]:
        raise InputError(f"--feature {feature}: expected one feature, that pictures express in its own unit")
    values = cells.raw(cells.rows)[:, j]
    ranked = np.argsort(values, kind="stable")
    ranked = ranked[:np.isfinite(values).sum()]  # NaN, no nucleus found, was sorted last
    tenth = len(ranked) // 10
    if tenth < TERMS:
        raise InputError(f"{feature}: too few cells, {len(ranked)} have a value, {10 * TERMS} are needed")
    result = Result(f"algebra_{feature}", f"high - low + other: {feature}",
                    n=DRAWS, ranked=len(ranked))
    parts = ranked[-tenth:], ranked[:tenth], ranked[4 * tenth:6 * tenth]
    random = np.random.default_rng(cells.seed)
    moves = []
    for k in range(DRAWS):
        picks = [random.choice(part, TERMS, False) for part in parts]
        f = SUM @ [cells.f(cells.rows[pick]).mean(0) for pick in picks]  # (4, F)
        asked = SUM @ values[picks].mean(1)  # (4,)
        heads = [f"{term} {v:.4g}" for term, v in zip(("high", "low", "other", "result"), asked)]
        got = result.draw(cells, f"draw {k + 1}", f, heads, [j], requested=asked)[:, j]
        moves.append((got[3] - got[2]) / (asked[0] - asked[1]))
    moved = mean_interval(np.array(moves), cells.seed)
    result.records.append(dict(row="realised / requested move", asked=feature) | moved)
    result.rows = result.rows[:5]
    return result


def controllability(cells, feature=("*",), n=16, edit="hold"):
    """For each feature, or those of `feature`: moved by -3..3 sd in n cells, drawn, and measured again. Ceiling: correlation of real cells
    measured again with the table."""
    places = {}
    for pattern in feature:
        places |= dict.fromkeys(cells.places(pattern))
    some = cells.pick(cells.rows, 200)
    real = pd.DataFrame(cells.look(cells.pictures(some)))  # (200, F)
    ceiling = real.corrwith(pd.DataFrame(cells.raw(some)))  # (F,)
    raw = cells.raw(cells.pick(cells.rows, n))  # (n, F)
    n = len(raw)
    z = None
    if edit == "free":  # each cell has its own chance, the same along its edit
        z = model.noise(cells.G, n, cells.seed).repeat(len(OFFSETS), 1)
    follow = 0
    result = Result(f"controllability_{edit}", f"controllability, others {OTHERS[edit]}", n=n, edit=edit)
    begun = time.time()
    for done, j in enumerate(places, 1):
        moved = [cells.edit(raw, [j], raw[:, [j]] + k * cells.scale[j], edit) for k in OFFSETS]
        asked = np.array(moved)  # (7, n, F)
        f = cells.standardise(np.concatenate(asked))  # (7 n, F)
        got = cells.look(cells.paint(f, z)).reshape(asked.shape)
        known, f = cells.reference.of_given(f)
        far = known.how_far(f).reshape(-1, n)  # (7, n)
        if edit == "conditional":
            follow = cells.reference.covariance[j] / cells.reference.covariance[j, j]
        record = obedience(asked, got, cells.features, cells.unit, j, follow, cells.seed)
        if cells.relative[j]:
            record["status"] = "relative"  # the pictures express it in another unit
        record |= {
            "outside percentile at 1 sd": np.median(far[[2, 4]]),  # -1 and 1 sd
            "at the ends": np.median(far[[0, -1]]),
            "ceiling r": ceiling[j],
        }
        result.records.append(record)
        print(f"feature {done}/{len(places)} | {time.time() - begun:.0f} s", flush=True)
    result.chart = functools.partial(bars, records=result.records, names=["feature"], key="slope")
    return result


def coupling(cells, n=500):
    """How much the pixel loss of each channel rises when one group of measurements is permuted between n cells: loss permuted / loss - 1,
    and its 95 % bootstrap interval over cells."""
    rows = cells.pick(cells.rows, n)
    n = len(rows)
    f, x = cells.f(rows), cells.pictures(rows)
    random = np.random.default_rng(cells.seed)
    weights = random.multinomial(n, np.full(n, 1 / n), 500)  # (500, n)

    def loss(f):
        return (x - cells.paint(f)).square().mean((2, 3)).double().numpy()  # (n, C)

    base = loss(f)
    result = Result("coupling", "coupling", n=n)
    for name, places in feature_groups(cells.features, cells.G.channels).items():
        mixed = f.copy()
        mixed[:, places] = f[random.permutation(n)][:, places]
        worse = loss(mixed)
        low, high = np.percentile(weights @ worse / (weights @ base) - 1, [2.5, 97.5], axis=0)
        table = pd.DataFrame(dict(
            group=name,
            features=len(places),
            channel=cells.G.channels,
            rise=worse.sum(0) / base.sum(0) - 1,
            low=low,
            high=high,
        ))
        result.records += table.to_dict("records")
    result.chart = functools.partial(bars, records=result.records, names=["group", "channel"], key="rise")
    return result


def latents(cells):
    """The five latent dimensions of largest mean |mu| over the cells, each walked from -2 to 2 sd with the others at 0, measured again:
    the feature that it goes with best. A GAN's noise is alike in every dimension: there the ranking is chance."""
    f = cells.f(cells.rows)
    known = pd.DataFrame(cells.raw(cells.rows))
    size, order, values = rank_latents(f)
    result = Result("latents", "Latent dimensions by mean |mu|, from -2 to 2 sd, the others at 0",
                    n=len(cells.rows))
    for d in order[:5]:
        r = known.corrwith(pd.Series(f[:, d])).fillna(0)
        best = r.abs().argmax()
        z = np.outer(values[d], np.eye(len(size))[d])  # (9, F)
        heads = [f"at {v:.3g}" for v in values[d]]
        name = f"{cells.latent_name(d)}; {cells.features[best]} r {r[best]:.2f}"
        result.draw(cells, name, z, heads, [best],
                    value=values[d], dimension=d, mean_size=size[d], r=r[best])
    return result


def imagine(cells, cell=None, structures=None):
    """A row for each structure: a real cell, the structure imagined in it by draws of the target's latent, and whole cells, both latents
    drawn. Source: Donovan-Maiye et al. 2022."""
    row = cells.find(cell)
    name = cells.table["cell"].iloc[row]
    result = Result(f"imagine_{name}", f"Structures imagined in cell {name} (left), and in cells sampled", cell=name)
    real = cells.pictures([row])
    z = model.noise(cells.G, 2 * IMAGINED, cells.seed)
    words = [["real cell"]] + [["in this cell"]] * IMAGINED + [["cell sampled"]] * IMAGINED
    for structure in structures or cells.folder.labels[:12]:
        inside = cells.imagine(z[:IMAGINED], structure, real)
        sampled = cells.imagine(z[IMAGINED:], structure)
        x = torch.cat([real, inside, sampled])
        result.rows.append((structure, x, words))
        table = pd.DataFrame(cells.look(x), columns=cells.features)
        table.insert(0, "row", structure)
        table.insert(1, "asked", [lines[0] for lines in words])
        result.records += table.to_dict("records")
    return result


# ------------------------------------------------------------------------------------------------------------
# A page with sliders

PAGE_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%(title)s</title>
<style>
body { font: 17px/1.4 sans-serif; max-width: 1000px; margin: 20px auto; padding: 0 12px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 17px; margin: 0; width: 100%% }
.row { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0 }
figure { margin: 0 } figcaption { font-size: 14px }
canvas { width: 236px; image-rendering: pixelated; display: block }
label { display: block; margin: 12px 0 } input { width: 100%%; margin: 4px 0 }
.far { color: #b00020 } small { color: #444 }
</style>
<h1>%(title)s</h1>
<p>Move a slider (mouse, or tab and arrow keys): the network draws this cell with that measurement changed
and all others %(others)s.</p>
<div id="sliders"></div>
<button id="own">back to the cell's own measurements</button>
<p id="place" aria-live="polite"></p>
<div id="pictures"></div>
<small>"Measured" is what a measuring program finds in the picture, in the drawn and in the real one alike.
Compare it with what the slider asks for. (rel.): in another unit, not comparable. Inside or outside the data: how far
all asked measurements together lie from those of the known cells (edge: farther than 95 %% of them, far outside:
than 99 %%); a drawing far outside is a guess.
%(source)s</small>
<script>
const P = %(content)s, side = P.side, sprite = new Image(), inputs = [], said = [];
const rows = P.rows.map(([name, words]) => {  // words: of the real cell if any, of its own measurements, of the stops
  const real = words[0][0] === "real cell" ? 1 : 0;
  const number = lines => parseFloat(lines[0].split(" ")[1]);  // of "own 959.2", "asked 523.2", "asked -3 sd"
  const stops = words.slice(real + 1), own = stops[0][0].endsWith(" sd") ? 0 : number(words[real]);
  const distances = stops.map(lines => Math.abs(number(lines) - own));
  return {name, words, real, start: distances.indexOf(Math.min(...distances))};  // the stop nearest to its own
});
const parts = ["all channels", ...P.channels.map((name, k) => `${name} (${["blue", "green", "red"][k]})`)];
function add(parent, kind, text = "") {
  const e = document.createElement(kind);
  e.textContent = text;
  parent.append(e);
  return e;
}
function strip() {  // a heading, the composite and each channel in grey
  const box = add(document.getElementById("pictures"), "div"), title = add(box, "h2");
  box.className = "row";
  const canvases = parts.map(name => {
    const figure = add(box, "figure"), canvas = add(figure, "canvas");
    add(figure, "figcaption", name);
    canvas.width = canvas.height = side;
    return canvas.getContext("2d", {willReadFrequently: true});
  });
  return (text, row, column) => {
    title.textContent = text;
    canvases[0].drawImage(sprite, -side * column, -side * row);
    const whole = canvases[0].getImageData(0, 0, side, side).data;
    canvases.slice(1).forEach((canvas, k) => {
      const grey = canvas.createImageData(side, side);
      for (let i = 0; i < whole.length; i += 4) {
        grey.data.fill(whole[i + 2 - k], i, i + 3);
        grey.data[i + 3] = 255;
      }
      canvas.putImageData(grey, 0, 0);
    });
  };
}
const drawn = strip(), real = rows[0].real ? strip() : null;
function show(row, column) {  // column of the sprite: the real cell if any, own measurements, then the stops
  const words = rows[row].words[column], place = document.getElementById("place");
  rows.forEach((other, r) => {
    if (r !== row) inputs[r].value = other.start;
    said[r].textContent = other.words[r === row ? column : other.real][0];
    inputs[r].setAttribute("aria-valuetext", said[r].textContent);
  });
  drawn(`drawn, ${rows[row].name}: ` + words.slice(0, -1).join(", "), row, column);
  if (real) real(rows[row].words[0].join(", "), row, 0);
  place.textContent = "The asked measurements lie " + words.at(-1);
  place.className = place.textContent.includes("far outside") ? "far" : "";
}
rows.forEach((row, r) => {
  const label = add(document.getElementById("sliders"), "label", row.name + ": "), first = row.real + 1;
  said.push(add(label, "b"));
  const input = add(label, "input");
  Object.assign(input, {type: "range", min: 0, max: row.words.length - first - 1, value: row.start});
  input.oninput = () => show(r, first + Number(input.value));
  inputs.push(input);
});
function own() {
  inputs.forEach((input, r) => { input.value = rows[r].start; });
  show(0, rows[0].real);
}
document.getElementById("own").onclick = own;
sprite.onload = () => {
  const [row, stop] = location.hash.slice(1).split(",");  // page.html#0,24: first slider, last stop
  if (!stop) return own();
  inputs[row].value = stop;
  inputs[row].oninput();
};
sprite.src = "data:image/png;base64," + P.sprite;
</script>
</html>
"""


def page(result, channels, others, source):
    """HTML with a slider for each row of a sweep's result: moving one puts the others back to the cell's own values. It shows the drawn
    picture beside the real cell, where there is one."""
    sprite = io.BytesIO()
    tiles = data.tile([data.composite(x) for _, x, _ in result.rows], 1, 0)
    Image.fromarray(tiles).save(sprite, "PNG")
    content = dict(
        side=result.rows[0][1].shape[3],
        channels=channels,
        rows=[[name, words] for name, _, words in result.rows],
        sprite=base64.b64encode(sprite.getvalue()).decode(),
    )
    return PAGE_HTML % dict(
        title=html.escape(result.title),
        others=others,
        source=source,
        content=json.dumps(content).replace("</", "<\\/"),
    )


# ------------------------------------------------------------------------------------------------------------
# The command

MEASURED = ["sweep", "moa", "dose", "walk", "algebra", "controllability", "coupling"]  # of measurements
LATENT = ["walk", "algebra", "latents"]  # by a VAE or GAN
STACKED = ["walk", "latents", "imagine"]  # by a Statistical Cell


def number_from_1(text):
    """An argparse type; argparse puts its name into the refusal."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(figure, what):
        """A parser with the flags that all figures share; returns how a flag is added to it."""
        one = commands.add_parser(figure.__name__, help=what)
        one.set_defaults(figure=figure, table=None, html=None)
        add = one.add_argument
        add("--data", help="prepared folder (prepare_bbbc021.py --out)")
        add("--run", required=True,
            help="a run's folder (its last.pt) or a checkpoint, RUN/best.pt")
        add("--split", default="test", choices=["train", "val", "test", "all"],
            help="cells that are looked at (default test)")
        add("--out",
            help="where the results go (default RUN/interpolate)")
        add("--seed", type=data.seed, default=0,
            help="of every draw of cells and every bootstrap (default 0)")
        add("--device", default="auto",
            help="as torch names it (default: cuda where there is one, else cpu)")
        return add

    add = command(sweep, "features or groups of one cell from low to high (Fig 4c)")
    add("--table",
        help="edit a cell of CellProfiler's export (CSV folder, SQLite, one CSV) instead; distances are from "
        "the training cells of --data or, without it, from the table's own")
    add("--feature", nargs="+", default=FIG4C,
        help="CellProfiler names (default: those of --fig4c), or groups moved together, 'Nuclei_Texture_*'")
    add("--fig4c", action="store_const", const=FIG4C, dest="feature",
        help="the paper's four features")
    add("--low", type=float,
        help="first value, in a feature's unit (default: 1st percentile of training cells) or a group's sd (-3)")
    add("--high", type=float,
        help="last value (default: 99th percentile, or 3 sd)")
    add("--steps", type=number_from_1, default=7,
        help="pictures in a row (default 7)")
    add("--edit", default="hold", choices=OTHERS,
        help="the other measurements: held, moved to their conditional mean, or (sharp) left open")
    add("--pin", nargs="+", default=[],
        help="with --edit free: names or patterns that are given, too, at the cell's own values")
    add("--cell",
        help="the cell, by its name (default: the one closest to the mean of the split)")
    add("--html",
        help="also one page with a slider for each feature, for any browser, offline")

    add = command(moa, "from DMSO to a mechanism, 50 measurements a step (Fig 5a)")
    add("--target", nargs="+",
        help="mechanisms, compounds or treatments, 'taxol 0.3' (default: the three commonest mechanisms)")
    add("--block", type=number_from_1, default=BLOCK,
        help="measurements replaced a step (default 50)")

    add = command(dose, "DMSO and the concentrations of a compound (Fig 5b, c)")
    add("--compound", default="latrunculin B",
        help="as in cells.csv (default latrunculin B)")

    add = command(walk, "a straight line between two cells, or two noise vectors of a GAN")
    add("--cells", dest="ends", nargs=2, required=True,
        help="two names in cells.csv; of a GAN noise0, noise1, ...")

    add = command(algebra, "high - low + other, measured again (CytoGAN)")
    add("--feature", default=AREA,
        help="what is high and low (default Nuclei_AreaShape_Area)")

    add = command(controllability, "for each feature: asked -3..3 sd against measured again")
    add("--feature", nargs="+", default=["*"],
        help="names or patterns (default: every feature; 7 n pictures each)")
    add("--n", type=number_from_1, default=16,
        help="cells, or all where there are fewer (default 16)")
    add("--edit", default="hold", choices=OTHERS,
        help="the other measurements: held, moved to their conditional mean, or (sharp) left open")
    add("--pin", nargs="+", default=[],
        help="with --edit free: names or patterns that are given, too, at the cell's own values")

    add = command(coupling, "which groups of measurements each channel depends on")
    add("--n", type=number_from_1, default=500,
        help="cells, or all where there are fewer (default 500)")

    add = command(latents, "the latent dimensions of a VAE or GAN, from -2 to 2 sd")
    add("--structure",
        help="of a Statistical Cell: the structure (or treatment) that is drawn (default: the commonest)")

    add = command(imagine, "structures in one real cell, and whole cells sampled (Statistical Cell)")
    add("--cell",
        help="the cell, by its name (default: the one closest to the mean of the split)")
    add("--structures", nargs="+",
        help="which structures or treatments (default: the first twelve)")

    args = parser.parse_args(argv)
    if getattr(args, "pin", []) and args.edit != "free":
        parser.error("--pin is for --edit free")
    if not args.data and not args.table:
        parser.error("expected --data DIR, or of a sweep --table FILE")
    return args


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    folder = data.open_folder(args.data) if args.data else None
    checkpoint = Path(args.run)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "last.pt"
    G = model.load(checkpoint, data.pick_device(args.device))
    if folder and G.identity != folder.identity:
        raise InputError(f"{checkpoint}: was trained on another prepared folder than {folder.path}; "
                         "give the --data of that run")
    figures = MEASURED if G.takes == "features" else LATENT
    if G.model == "statcell":
        figures = STACKED
    if args.command not in figures:
        raise InputError(f"{checkpoint}: {G.model} takes {G.takes}, which {args.command} cannot edit; "
                         f"it can do {figures}")
    if args.table:
        from prepare_bbbc021 import read_table
        cells = TableCells(G, read_table(args.table, G.channels[0]), folder, args.seed)
    elif G.model == "statcell":
        cells = StackedCells(G, folder, args.split, args.seed, getattr(args, "structure", None))
    else:
        kind = {"features": Cells, "images": EncodedCells, "noise": NoiseCells}[G.takes]
        cells = kind(G, folder, args.split, args.seed)

    for pattern in getattr(args, "pin", []):
        cells.pinned += cells.places(pattern)
    own = list(inspect.signature(args.figure).parameters)[1:]  # of its flags; all take the cells first
    options = {name: vars(args)[name] for name in own}
    result = args.figure(cells, **options)
    about = dict(
        command=args.command,
        data=args.data,
        table=args.table,
        checkpoint=str(checkpoint),
        model=G.model,
        step=G.step,
        split=cells.split,
        seed=args.seed,
        extractor=cells.extractor,
    ) | {
        "known cells": len(cells.reference.ranked),
        "Ledoit-Wolf shrinkage": cells.reference.shrinkage,
    }
    path = result.write(Path(args.out or checkpoint.parent / "interpolate"), about | result.about)
    if args.html:
        shown = sweep(cells, **options | {"steps": STOPS})
        content = page(shown, G.channels, OTHERS[args.edit], f"Model: {G.model}, step {G.step}.")
        data.write(Path(args.html), content)
    if result.outside:
        print(f"warning: {result.outside} pictures lie outside the data, farther than 99 % of the cells: "
              "these are extrapolations")
    print(f"{result.title}\nwritten: {path}.png, .json, .csv")


if __name__ == "__main__":
    try:
        main()
    except (InputError, model.InputError, OSError) as error:
        sys.exit(f"interpolate.py: {error}")
