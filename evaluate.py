"""Judge a trained generator on cells it has not seen, beside simple baselines and the floor: real cells against other real cells.

    python evaluate.py --data out/ --run runs/cp2image-seed0 [--inception WEIGHTS]
    python evaluate.py --data out/ --runs runs/cp2image-seed* --out compared/ --grid 12
    python evaluate.py --profiles WELLS.csv --image-csv BBBC021_v1_image.csv --moa BBBC021_v1_moa.csv

Reads a prepared folder and runs (last.pt of each; or name a file, RUN/best.pt), or a table of well profiles. Writes metrics.json and
metrics.csv (every number with its n, interval and extractor), features.csv, moa.csv, grid.png and, with matplotlib, metrics.png; for
several runs comparison.md and comparison.csv. Equal calls write equal bytes. Measuring takes most of the time: about 170 cells a second
and core, six times over. FID needs the weights of its Inception network; without them the distances are between measurements of the
pictures (FD-CP, KID-CP).
"""
import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
import zlib
from collections import OrderedDict
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import model
from data import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 as FID defines it, and distances between sets of vectors.
# To copy this section out, down to the next line of dashes, take torch, numpy, the first imports above, and InputError = ValueError

# Google's Inception graph of 2015-12-05, as ported by pytorch-fid
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def unit(c_in, c_out, kernel, stride=1, padding="same"):
    """Convolution without bias, batch norm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3),
        relu=nn.ReLU(),
    ))


class Mixed(nn.Module):
    """Branches side by side, concatenated. A branch is a chain of units, each "name c_out height width [stride padding]"; two
    branches that name the same first unit share it. The last branch is `pool` and, with `c_pool`, a 1x1 unit to so many channels."""

    def __init__(self, c_in, pool, c_pool, *branches):
        super().__init__()
        self.pool = pool
        self.branches = [re.findall(r"branch\w+", branch) for branch in branches]     # names of their units
        for branch in branches:
            c = c_in
            for layer in branch.split(", "):
                name, *numbers = layer.split()
                c_out, height, width, *more = map(int, numbers)
                self.add_module(name, unit(c, c_out, (height, width), *more))
                c = c_out
        self.branch_pool = unit(c_in, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            h = x
            for name in branch:
                h = self.get_submodule(name)(h)
            outputs.append(h)
        outputs.append(self.branch_pool(self.pool(x)))
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """Inception-v3 for FID: images (B, 3, H, W) in 0..1 -> features (B, 2048), the average of Mixed_7c over space.
    Unlike torchvision's, its average pools leave the padding out and Mixed_7c pools by maximum (pytorch-fid inception.py)."""

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        halve = nn.MaxPool2d(3, 2)
        self.Conv2d_1a_3x3 = unit(3, 32, 3, 2, 0)                               # (B, 32, 149, 149)
        self.Conv2d_2a_3x3 = unit(32, 32, 3, 1, 0)                              # (B, 32, 147, 147)
        self.Conv2d_2b_3x3 = unit(32, 64, 3)                                    # (B, 64, 147, 147)
        self.maxpool1 = nn.MaxPool2d(3, 2)                                      # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = unit(64, 80, 1)                                    # (B, 80, 73, 73)
        self.Conv2d_4a_3x3 = unit(80, 192, 3, 1, 0)                             # (B, 192, 71, 71)
        self.maxpool2 = nn.MaxPool2d(3, 2)                                      # (B, 192, 35, 35)

        one = "branch1x1 64 1 1"
        five = "branch5x5_1 48 1 1, branch5x5_2 64 5 5"
        double = "branch3x3dbl_1 64 1 1, branch3x3dbl_2 96 3 3, branch3x3dbl_3 96 3 3"
        self.Mixed_5b = Mixed(192, average, 32, one, five, double)              # (B, 256, 35, 35)
        self.Mixed_5c = Mixed(256, average, 64, one, five, double)              # (B, 288, 35, 35)
        self.Mixed_5d = Mixed(288, average, 64, one, five, double)              # (B, 288, 35, 35)
        three = "branch3x3 384 3 3 2 0"
        self.Mixed_6a = Mixed(288, halve, None, three, double + " 2 0")         # (B, 768, 17, 17)

        one = "branch1x1 192 1 1"
        for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):      # (B, 768, 17, 17) each
            seven = f"branch7x7_1 {c} 1 1, branch7x7_2 {c} 1 7, branch7x7_3 192 7 1"
            double = (f"branch7x7dbl_1 {c} 1 1, branch7x7dbl_2 {c} 7 1, branch7x7dbl_3 {c} 1 7, "
                      f"branch7x7dbl_4 {c} 7 1, branch7x7dbl_5 192 1 7")
            self.add_module(f"Mixed_6{letter}", Mixed(768, average, 192, one, seven, double))
        three = "branch3x3_1 192 1 1, branch3x3_2 320 3 3 2 0"
        seven = ("branch7x7x3_1 192 1 1, branch7x7x3_2 192 1 7, branch7x7x3_3 192 7 1, "
                 "branch7x7x3_4 192 3 3 2 0")
        self.Mixed_7a = Mixed(768, halve, None, three, seven)                   # (B, 1280, 8, 8)

        forks = (
            "branch1x1 320 1 1",
            "branch3x3_1 384 1 1, branch3x3_2a 384 1 3",
            "branch3x3_1 384 1 1, branch3x3_2b 384 3 1",
            "branch3x3dbl_1 448 1 1, branch3x3dbl_2 384 3 3, branch3x3dbl_3a 384 1 3",
            "branch3x3dbl_1 448 1 1, branch3x3dbl_2 384 3 3, branch3x3dbl_3b 384 3 1",
        )
        self.Mixed_7b = Mixed(1280, average, 192, *forks)                       # (B, 2048, 8, 8)
        self.Mixed_7c = Mixed(2048, nn.MaxPool2d(3, 1, 1), 192, *forks)         # (B, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)                                     # never called, but in the file

    def forward(self, x):
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)  # (B, 3, 299, 299)
        x = 2 * x - 1                                                           # in -1..1
        for layer in list(self.children())[:-1]:                                # all but fc
            x = layer(x)
        return x.mean((2, 3))                                                   # (B, 2048, 8, 8) -> (B, 2048)


def load_inception(path, device="cpu"):
    """The FID network with the weights in file `path`; InputError for a file of another SHA-256."""
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if sha256 != INCEPTION_SHA256:
        raise InputError(f"{path}: its SHA-256 is {sha256}, expected that of the FID weights, "
                         f"{INCEPTION_SHA256}; they are at {INCEPTION_URL}")
    net = Inception()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(device).eval()


@torch.no_grad()
def inception_features(net, images):
    """Features (N, 2048) float32 of images (N, 3, H, W) uint8, TF32 off. For channel c alone, as grey: images[:, [c, c, c]]."""
    assert images.dtype == np.uint8, images.dtype
    device = next(net.parameters()).device
    features = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in torch.tensor(images).split(64):
            x = part.to(device) / 255                                           # uint8 becomes float32
            features.append(net(x).cpu())
    return torch.cat(features).numpy()


def check_sets(*sets, least=1):
    """The sets as arrays (N, d) float64; InputError for another shape, under `least` rows, unequal widths, NaN or infinity."""
    sets = [np.asarray(x, np.float64) for x in sets]
    shapes = [x.shape for x in sets]
    d = shapes[0][-1]
    for x in sets:
        if x.shape[1:] != (d,) or not d or len(x) < least:
            raise InputError(f"expected (N, d) with one d and at least {least} rows, found {shapes}")
        bad = np.argwhere(~np.isfinite(x))
        if len(bad):
            raise InputError(f"{len(bad)} of {x.size} values are NaN or infinite, first at [row column] {bad[0]}")
    return sets


def mean_and_root(x):
    """Mean (d,) of x (N, d), and R (min(N, d), d) with R'R = its covariance (ddof 1), which is never formed."""
    mean = x.mean(0)
    root = torch.linalg.qr(torch.tensor(x - mean), mode="r").R
    return mean, root.numpy() / np.sqrt(len(x) - 1)


def frechet_of_roots(mean1, root1, mean2, root2):
    """|mean1 - mean2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) for S = R'R: the last trace is the nuclear norm of R1 R2'."""
    shift = ((mean1 - mean2) ** 2).sum()
    traces = (root1 ** 2).sum() + (root2 ** 2).sum()
    nuclear = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    return max(shift + traces - 2 * nuclear, 0.0)                               # rounding leaves -1e-14 for equal sets


def frechet_distance(x, y):
    """Squared Fréchet distance of Gaussians fitted to x (N, d) and y (M, d): on Inception features, FID (Heusel et al. 2017).
    It grows as 1/N: compare at one N, beside a floor of real against real."""
    x, y = check_sets(x, y, least=2)
    return frechet_of_roots(*mean_and_root(x), *mean_and_root(y))


def mmd2(x, y):
    """Unbiased squared maximum mean discrepancy of x (N, d) and y (M, d), kernel (x.y / d + 1)^3 (Binkowski et al. 2018)."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):                                                              # without each row with itself
        k = kernel(a, a)
        n = len(a)
        return (k.sum() - np.trace(k)) / (n * (n - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def kid(x, y, subset=None, subsets=100, seed=0):
    """Kernel Inception distance of x (N, d) and y (M, d): mean and sd (ddof 0) of mmd2 over random subsets without replacement.
    `subset` rows come from each set: min(1000, half the smaller set) unless given."""
    x, y = check_sets(x, y, least=4)
    subset = subset or min(1000, len(x) // 2, len(y) // 2)
    random = np.random.RandomState(seed % 2 ** 32)
    values = []
    for _ in range(subsets):
        i = random.choice(len(x), subset, replace=False)                        # x before y, as torch-fidelity draws
        j = random.choice(len(y), subset, replace=False)
        values.append(mmd2(x[i], y[j]))
    return np.mean(values), np.std(values)


def neighbour_radius(x, k):
    """Distance (N,) from each row of x (N, d) to its k-th nearest other row; a tie counts as inside."""
    radius = [torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(512)]     # the row itself comes first
    return torch.cat(radius) * (1 + 1e-9)


def share_inside(x, centres, radius):
    """Share of the rows of x (N, d) in one ball at least, about centres (M, d) of `radius` (M,)."""
    inside = [(torch.cdist(rows, centres) <= radius).any(1) for rows in x.split(512)]
    return int(torch.cat(inside).sum()) / len(x)


def precision_recall(real, fake, k=3):
    """Are the fakes (M, d) like real cells (N, d), and do they reach all? {"precision", "recall"} (Kynkäänniemi et al. 2019).
    A cell's ball reaches to its k-th nearest other cell of the same set. Precision: share of fakes in a real ball; recall:
    share of real cells in a fake ball."""
    real, fake = map(torch.tensor, check_sets(real, fake, least=k + 1))
    return dict(
        precision=share_inside(fake, real, neighbour_radius(real, k)),
        recall=share_inside(real, fake, neighbour_radius(fake, k)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# FD-CP: a Fréchet distance between measurements of the pictures, which needs no weights


class CPSpace:
    """The space of FD-CP: robust z-scores by the measurements of real training cells (frame, N rows), and their first d
    principal components, of fewer features all. Columns over 5 % missing or without spread are left out.
    InputError under 20 cells."""

    def __init__(self, train, d):
        if len(train) < 20:
            raise InputError(f"{len(train)} training cells could be measured, 20 are needed")
        values = train.loc[:, train.isna().mean() <= 0.05]
        centre = values.median()
        spread = 1.4826 * (values - centre).abs().median()                      # the sd of a normal distribution
        keep = spread > 1e-9 * centre.abs()                                     # a constant's rounding is no spread
        self.centre = centre[keep]
        self.spread = spread[keep]
        z = self.z_scores(train)
        self.mean = z.mean(0)
        z = z - self.mean
        _, axes = np.linalg.eigh(z.T @ z)                                       # the longest last
        self.axes = axes.T[::-1][:d]                                            # (d, F kept)

    def z_scores(self, frame):
        """Measurements (N rows) -> (v - median) / (1.4826 MAD), clipped to +-10, (N, F kept); missing = 0, the median."""
        z = (frame[self.centre.index] - self.centre) / self.spread
        return z.clip(-10, 10).fillna(0).to_numpy()

    def __call__(self, frame):
        """Measurements (N rows) -> components (N, d) of the cells that have any."""
        return (self.z_scores(frame.dropna(how="all")) - self.mean) @ self.axes.T


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of pictures, and 95 % intervals


@np.errstate(divide="ignore", invalid="ignore")
def correlations(a, b, weights):
    """Pearson's r (R, F) of the columns of a and b (n, F) over the rows where both are finite; row i counts weights[:, i]
    times (R, n). NaN below 3 pairs or without spread."""
    both = np.isfinite(a) & np.isfinite(b)
    n = both.sum(0)
    pairs = weights @ both                                                      # (R, F)

    def centred(x):                                                             # so that rounding stays small
        x = np.where(both, x, 0).astype(np.float64)
        return x - both * (x.sum(0) / n)

    def scatter(x, y):
        return weights @ (x * y) - (weights @ x) * (weights @ y) / pairs        # (R, F)

    a, b = centred(a), centred(b)
    aa = scatter(a, a)
    bb = scatter(b, b)
    r = scatter(a, b) / np.sqrt(aa * bb)
    known = (pairs >= 3) & (aa > 1e-18) & (bb > 1e-18)
    return np.where(known, r, np.nan)


def bootstrap(statistic, n, seed):
    """`statistic`, a function of how often each of n rows is drawn, (R, n) -> (R, K), and its 95 % percentile interval: value,
    low, high (3, K). The interval is NaN where the statistic is undefined in a draw."""
    random = np.random.default_rng(seed)
    weights = random.multinomial(n, np.full(n, 1 / n), 1000).astype(np.float64)        # (R, n)
    value = statistic(np.ones((1, n)))
    interval = np.percentile(statistic(weights), [2.5, 97.5], axis=0)
    return np.vstack([value, interval])


# ---------------------------------------------------------------------------------------------------------------------
# Mechanism of action

WELL_COLUMNS = ["plate", "well", "compound", "concentration", "moa"]


def well_profiles(cells, frame):
    """One row a well (WELL_COLUMNS, features): the mean of its cells. `frame`: measurements of some of `cells` (WELL_COLUMNS)."""
    told = cells.join(frame.astype(np.float64), how="right")
    return told.groupby(WELL_COLUMNS, dropna=False).mean().reset_index()


def refuse(wells, what):
    """InputError with `what` is wrong with these wells, if there are any."""
    if len(wells):
        plate, well = wells[["plate", "well"]].iloc[0]
        raise InputError(f"{len(wells)} {what}; first plate {plate} well {well}")


def treatment_profiles(wells, normalise="z", average="mean"):
    """Well profiles (WELL_COLUMNS, then features), each plate scaled by its DMSO wells (data.scale_by_dmso) -> one row a
    treatment (compound, concentration, moa, batches, features), without DMSO and unknown mechanisms; names of the features.
    `batches`: an array of the batches it was run in; the batch of plate `Week1_22123` is `Week1`.
    InputError if a well stands in two rows, for a missing value, or if no mechanism is known."""
    refuse(wells[wells.duplicated(["plate", "well"])],
           "rows repeat a well, where one row and one treatment a well are expected")
    features = list(wells.columns.drop(WELL_COLUMNS))
    x, = check_sets(wells[features])
    is_dmso = wells["compound"] == data.SOLVENT
    x = data.scale_by_dmso(x, wells["plate"], is_dmso, normalise)
    scaled = pd.DataFrame(x, wells.index, features)
    unknown = wells["moa"].isin(["", "unknown", data.SOLVENT])
    if unknown.all():
        raise InputError("no well has a known mechanism of action")
    batch = wells["plate"].str.partition("_")[0]
    known = wells[WELL_COLUMNS].assign(batch=batch).join(scaled)[~unknown]
    groups = known.groupby(["compound", "concentration", "moa"], dropna=False)
    treatments = groups[features].agg(average)
    treatments.insert(0, "batches", groups["batch"].unique())
    return treatments.reset_index(), features


def nsc(profiles, compounds, moas, batches=None, seed=0):
    """Mechanism of action from the nearest profile (cosine) of another compound (NSC) and, given `batches`, batch (NSCB).
    profiles (T, F), compounds and moas (T,), batches a list a treatment. A treatment is scorable if an admissible profile
    shares its mechanism; others leave the denominator; InputError if none is, or for a profile of zeros. Returns accuracy,
    n, interval (95 %, whole compounds resampled), null_mean and null_sd (mechanisms shuffled among the compounds), and
    the table treatments."""
    x, = check_sets(profiles, least=2)
    compounds = np.asarray(compounds)
    moas = np.asarray(moas)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise InputError(f"the profile of {compounds[length.argmin()]} is all zero: it has no cosine")
    x = x / length
    admissible = compounds[:, None] != compounds                                # (T, T)
    if batches is not None:
        for i, own in enumerate(batches):
            admissible[i] &= [set(own).isdisjoint(other) for other in batches]
    distance = np.where(admissible, 1 - x @ x.T, np.inf)
    nearest = distance.argmin(1)

    def score(moas):
        correct = moas[nearest] == moas
        scorable = (admissible & (moas[:, None] == moas)).any(1)
        return correct, scorable

    correct, scorable = score(moas)
    if not scorable.any():
        raise InputError(f"none of {len(x)} treatments has an admissible neighbour of its own mechanism")
    table = pd.DataFrame(dict(
        compound=compounds,
        moa=moas,
        nearest=nearest,
        distance=distance.min(1),
        predicted=moas[nearest],
        correct=correct,
        scorable=scorable,
    ))
    per_compound = table[scorable].groupby(["compound", "moa"])["correct"]
    right, size = per_compound.agg(["sum", "size"]).to_numpy().T

    def resampled(weights):
        return (weights @ right / (weights @ size))[:, None]

    accuracy, low, high = bootstrap(resampled, len(size), seed)[:, 0]
    _, first, which = np.unique(compounds, return_index=True, return_inverse=True)
    random = np.random.default_rng(seed)
    null = []
    for _ in range(1000):
        lucky, there = score(random.permutation(moas[first])[which])
        if there.any():
            null.append(lucky[there].mean())
    return dict(
        accuracy=accuracy,
        n=scorable.sum(),
        interval=(low, high),
        null_mean=np.mean(null),
        null_sd=np.std(null),
        treatments=table,
    )


def require(frame, columns, where):
    absent = [c for c in columns if c not in frame]
    if absent:
        raise InputError(f"{where}: no column tells {' or '.join(absent)}; --image-csv gives the compound of each "
                         "plate and well, --moa the mechanism of each compound and concentration")


def read_profiles(path, image_csv, moa):
    """A CSV of well profiles; what --image-csv says of its wells and --moa of its treatments
    -> table (WELL_COLUMNS, features), and lines about what was taken and matched."""
    table = data.read_csv(path)
    features, report = data.feature_columns(table)
    cells = data.annotate(table)
    key = ["plate", "well"]
    require(cells, key, path)
    if image_csv:
        image = data.annotate(data.read_csv(image_csv))
        told = [*key, "compound", "concentration"]
        require(image, told, image_csv)
        cells = cells[key].merge(image[told].drop_duplicates(), "left", key)
        unlisted = cells[cells["compound"].isna()]
        refuse(unlisted, f"of the {len(cells)} wells of {path} are not listed in {image_csv}")
    mechanisms = None
    if moa:
        mechanisms = data.read_moa(moa)
        cells["moa"] = "unknown"
    require(cells, ["compound", "moa"], path)
    cells, matched = data.complete_treatments(cells, mechanisms, "wells")
    values = data.numbers(table[features], path)
    return cells[WELL_COLUMNS].join(values), report + matched


# ---------------------------------------------------------------------------------------------------------------------
# Which features survive generation (paper, section 4.2.2): real and generated cells measured in the same way


def pearson(a, b):
    """Pearson's r (F,) of the columns of two frames."""
    once = np.ones((1, len(a)))
    return correlations(a.to_numpy(), b.to_numpy(), once)[0]


def within(frame, treatment):
    """Measurements (n rows) less the mean of their treatment (n,); NaN where a treatment has one cell."""
    groups = frame.astype(np.float64).groupby(treatment)
    off = frame - groups.transform("mean")
    return off.where(groups.transform("count") > 1)


def feature_table(real, fake, given, treatment, image_norm):
    """One row a feature, the best first: how real and generated cells (frames, n rows) and the input vectors `given` correlate.
    r and spearman over all cells, r within treatments (their means taken off; treatments of one cell left out), r of generated
    and of real cells with the input where names match. `relative`: intensities in units of the cell's own maximum (cell-max)."""
    both = real.notna() & fake.notna()
    a = real.where(both)
    b = fake.where(both)
    given = given.reindex(columns=real.columns)
    parts = real.columns.str.split("_")
    is_intensity = real.columns.str.match(r"[^_]+_Intensity_(?!MassDisplacement)")      # that is a place
    table = pd.DataFrame({
        "compartment": parts.str[0],
        "family": parts.str[1],
        "r": pearson(a, b),
        "spearman": pearson(a.rank(), b.rank()),
        "r within treatments": pearson(within(a, treatment), within(b, treatment)),
        "r of generated with input": pearson(given, b),
        "r of real with input": pearson(given, a),
        "n": both.sum(),
        "relative": is_intensity & (image_norm == "cell-max"),
    }, real.columns)
    return table.sort_values("r", ascending=False, kind="stable").rename_axis("feature")


def claims(table):
    """What the paper says of its Fig 4a, each with whether it is seen in a feature_table, {claim: seen}, and the median r by
    which it is judged, {family or compartment and family: median r}, the best first."""
    family = table.groupby("family")["r"].median()
    name = table["compartment"] + " " + table["family"]
    group = table.groupby(name)["r"].median()
    best = set(group.nlargest(3).index)
    seen = {
        "over 30 % of the features have r > 0.5": (table["r"] > 0.5).mean() > 0.3,
        "shape and intensity of the nucleus survive best": {"Nuclei AreaShape", "Nuclei Intensity"} <= best,
        "the distribution of intensity survives worst": family["RadialDistribution"] <= family.min(),
        "the shape of whole cells survives poorly": group["Cells AreaShape"] < min(0.5, group["Nuclei AreaShape"]),
    }
    return seen, pd.concat([family, group]).sort_values(ascending=False)


# ---------------------------------------------------------------------------------------------------------------------
# Who is judged: the generator, beside real cells, retrieval, chance and the mean


def batches(stop, start=0):
    """Slices of at most 256 from start to stop."""
    return [slice(i, min(i + 256, stop)) for i in range(start, stop, 256)]


def by_name(folder, rows):
    """Row numbers sorted by the cells' names: what is drawn from them does not depend on the order of the folder."""
    return rows[folder.cells["cell"].iloc[rows].argsort()]


def choose_cells(folder, split, n, seed):
    """Row numbers of a split in an order given by the seed and the cells' names, at most 2 n: first the reference half, then
    the judged."""
    rows = by_name(folder, folder.rows(split))
    return np.random.default_rng(seed).permutation(rows)[:2 * n]


def features_of(folder, rows):
    return model.standardise(folder.measurements(rows), folder.centre, folder.scale)    # (B, F) in sd


def images_of(folder, rows, G):
    return data.scale_images(folder.images(rows), G.image_norm, G.white)                # (B, C, S, S) in 0..1


def drawn(G, folder, rows, places, seed, device):
    """What G draws of the given cells, from their measurements, their pictures or the noise of their places among all cells drawn:
    (B, C, S, S) in 0..1, on the CPU."""
    z = model.noise(G, places, seed)
    f = features_of(folder, rows)
    if isinstance(G, model.StatCell):
        f = folder.told(rows)
    f = f.to(device)
    x = images_of(folder, rows, G).to(device)
    x_fake = model.draw(G, f, x, z.to(device))
    return x_fake.clamp(0, 1).cpu()


def represented(G, D, folder, rows, device):
    """What a baseline knows of the given cells (frame): a VAE's latent means, the activations of a GAN's discriminator before
    its last layer, with the noise on the pictures (its own for each cell) that CytoGAN's code leaves on at test time."""
    found = []
    for i in batches(len(rows)):
        x = images_of(folder, rows[i], G)
        if G.takes == "images":
            profile, _ = G.encode(x.to(device))
        else:
            noise = torch.empty_like(x)
            for own, name in zip(noise, folder.cells["cell"].iloc[rows[i]]):
                random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                own.normal_(generator=random)
            profile = D.profile(x.to(device), noise.to(device))
        found.append(profile.cpu())
    return pd.DataFrame(torch.cat(found).numpy())


def nearest_training_cell(folder, rows, train):
    """For each cell the training cell whose standardised CP vector is nearest (Euclid): retrieval. Row numbers (N,)."""
    known = features_of(folder, train)
    wanted = features_of(folder, rows)
    nearest = [torch.cdist(f, known).argmin(1) for f in wanted.split(256)]
    return train[torch.cat(nearest).numpy()]


def contestants(G, folder, rows, seed, device):
    """Who draws the cells `rows`: names, "real" first, a function (name, slice of rows) -> pictures (B, C, S, S) in 0..1, and
    pictures of training cells, for the mean image and the scale and components of FD-CP."""
    train = by_name(folder, folder.rows("train"))
    cells = {
        "real": rows,
        "nearest training cell": nearest_training_cell(folder, rows, train),
        "random training cell": np.random.default_rng([seed, 1]).choice(train, len(rows)),
    }
    some = np.random.default_rng([seed, 2]).permutation(train)
    sample = images_of(folder, some[:2000], G)
    mean = sample.mean(0)
    places = range(len(rows))

    def draw(who, i):
        if who == "generated":
            return drawn(G, folder, rows[i], places[i], seed, device)
        if who == "free samples":
            z = model.noise(G, places[i], seed)
            x = G.decode(z.to(device))
            return x.clamp(0, 1).cpu()
        if who == "mean training image":
            return mean.expand(len(rows[i]), -1, -1, -1)
        return images_of(folder, cells[who][i], G)

    names = ["real", "generated", "nearest training cell", "random training cell", "mean training image"]
    if G.takes == "images":
        names.insert(2, "free samples")
    return names, draw, sample


def pair_losses(draw, who, D, n, device):
    """Pixel and hidden loss (n, 2) of a contestant's pictures from the real ones, cell by cell; hidden NaN where D is no
    learned metric."""
    losses = np.full((n, 2), np.nan)
    for i in batches(n):
        x = draw("real", i)
        y = draw(who, i)
        one_by_one = torch.vmap(model.pixel_loss)
        losses[i, 0] = one_by_one(x[:, None], y[:, None])
        if isinstance(D, model.Discriminator):
            _, maps = D(x.to(device))
            _, maps_y = D(y.to(device))
            each = torch.vmap(model.hidden_losses, (0, 0, None))
            hidden = each(maps, maps_y, x[0].numel())                           # (B, 4)
            losses[i, 1] = hidden.sum(1).cpu()
    return losses


def measure_pictures(draw, who, n, channels, device):
    """Measurements (frame, n rows) of a contestant's pictures; a row of NaN where no nucleus was found."""
    print(f"measuring {n} pictures: {who}", file=sys.stderr)
    parts = [data.measurements(draw(who, i), channels, device=device) for i in batches(n)]
    return pd.concat(parts, ignore_index=True)


def features_by_inception(net, draw, who, start, stop, pick):
    """Features (stop - start, 2048) of a contestant's pictures as uint8, of three of their channels."""
    parts = [draw(who, i) for i in batches(stop, start)]
    x = model.to_uint8(torch.cat(parts))
    return inception_features(net, x[:, pick].numpy())


# ---------------------------------------------------------------------------------------------------------------------
# What is found of one generator

BARE = "representation, not normalised"  # as CytoGAN scores them


class Report:
    """Rows of metrics.csv, {what is absent: why}, tables of treatments, and `survived`: the feature_table and
    its six best columns of real and generated cells, which a GAN does not have (its free samples are not of these cells). Of a
    Statistical Cell: `features` of each cell, `correlations` of the latents, {treatment: (shift, 5 rows along it)}, `arrows`."""

    def __init__(self, seed):
        self.seed = seed
        self.records = []
        self.absent = {}
        self.treatments = []
        self.survived = None
        self.features = self.correlations = None
        self.arrows = {}

    def add(self, who, quantity, n, extractor, value, low=np.nan, high=np.nan):
        self.records.append((who, quantity, value, low, high, n, extractor))

    def table(self):
        columns = ["who", "quantity", "value", "low", "high", "n", "extractor"]
        return pd.DataFrame(self.records, columns=columns)

    def add_mean(self, who, quantity, values, extractor):
        """The mean of values (n,), one a cell."""
        n = len(values)

        def mean(weights):
            return weights @ values[:, None] / n

        value, low, high = bootstrap(mean, n, self.seed)[:, 0]
        self.add(who, quantity, n, extractor, value, low, high)

    def add_correlations(self, who, real, seen):
        """Pearson's r with the real cell (frames, n rows) of every measurement, and the share over 0.5, undefined r among it."""
        n = len(real)
        pairs = (real.notna() & seen.notna()).sum()

        def share_and_r(weights):
            r = correlations(real.to_numpy(), seen.to_numpy(), weights)
            return np.column_stack([(r > 0.5).mean(1), r])

        names = ["share r > 0.5", *("r " + real.columns)]
        found = bootstrap(share_and_r, n, self.seed)
        for name, count, values in zip(names, [n, *pairs], found.T):
            self.add(who, name, count, "measurements", *values)

    def add_survived(self, table):
        """The medians of a feature_table, and its share over 0.5 without what is relative to the cell's own maximum."""
        n = table["n"].max()
        for name, r in table.loc[:, "r":"r of real with input"].median().items():
            self.add("generated", f"median {name}", n, "measurements", r)
        absolute = table["r"][~table["relative"]]
        self.add("generated", "share r > 0.5, none relative", n, "measurements", (absolute > 0.5).mean())

    def add_distances(self, reference, others, frechet, suffix, extractor):
        """From the reference (N, d) to each contestant {who: (n, d)}; that to "real" is the floor. No bootstrap: cells drawn
        twice would raise a Fréchet distance; its spread is that between seeds."""
        for who, x in others.items():
            try:
                check_sets(reference, x, least=20)
            except InputError as error:
                self.absent[f"{frechet}{suffix} of {who}"] = str(error)
                continue
            found = {frechet: frechet_distance(reference, x)}
            found["KID"], found["KID sd"] = kid(reference, x, seed=self.seed)
            found |= precision_recall(reference, x)
            for name, value in found.items():
                self.add(who, name + suffix, len(x), extractor, value)

    def add_scores(self, who, wells, normalise, average="mean"):
        """NSC and NSCB of well profiles, see treatment_profiles."""
        t, features = treatment_profiles(wells, normalise, average)
        for name, apart in (("NSC", None), ("NSCB", t["batches"])):
            try:
                s = nsc(t[features], t["compound"], t["moa"], apart, self.seed)
            except InputError as error:
                self.absent[f"{name} of {who}"] = str(error)
                continue
            null = s["null_mean"]
            sd = s["null_sd"]
            self.add(who, name, s["n"], "profiles", s["accuracy"], *s["interval"])
            self.add(who, f"{name} of permuted labels", s["n"], "profiles", null, null - sd, null + sd)
            table = s["treatments"].assign(who=who, score=name)
            table.insert(1, "concentration", t["concentration"])
            self.treatments.append(table)

    def add_wells(self, who, wells, normalise="z"):
        """NSC and NSCB of well_profiles. Wells on plates with under two DMSO wells cannot be scaled: left out, and named."""
        wells = wells.dropna()
        is_dmso = wells["compound"] == data.SOLVENT
        count = is_dmso.groupby(wells["plate"]).transform("sum")
        few = wells[count < 2]
        if normalise != "none" and 0 < len(few) < len(wells):
            plates = ", ".join(few["plate"].unique())
            reason = "left out of NSC, which needs two DMSO wells a plate"
            self.absent[f"{len(few)} wells of {who} (plates {plates})"] = reason
            wells = wells.drop(few.index)
        try:
            self.add_scores(who, wells, normalise)
        except InputError as error:
            self.absent[f"NSC, NSCB of {who}"] = str(error)


def judge(G, D, folder, rows, seed, device, net=None):
    """Everything about one generator on the cells `rows` (see choose_cells): a Report. `net`: load_inception, for FID."""
    report = Report(seed)
    names, draw, sample = contestants(G, folder, rows, seed, device)
    half = len(rows) // 2                               # the reference; the other half is judged against it
    cells = folder.cells[WELL_COLUMNS].iloc[rows].reset_index(drop=True)
    given = pd.DataFrame(folder.raw[rows], columns=folder.features)
    try:
        sample = data.measurements(sample, folder.channels, device=device)
        components = min(30, half // 20)
        space = CPSpace(sample.dropna(how="all"), max(1, components))
    except InputError as error:
        space = None
        report.absent["all that is measured in pictures"] = str(error)

    judged = {}
    for who in names:
        is_free = who == "free samples" or (who == "generated" and G.takes == "noise")
        if is_free:
            report.absent[f"pairs of {who}"] = "free samples are of no particular cell"
        else:
            losses = pair_losses(draw, who, D, len(rows), device)
            report.add_mean(who, "pixel loss", losses[:, 0], "pixels")
            report.add_mean(who, "hidden loss", losses[:, 1], "discriminator")
        if not space:
            continue
        seen = measure_pictures(draw, who, len(rows), folder.channels, device)
        seen = seen.astype(np.float32)
        found = seen.notna().any(axis=1).to_numpy(float)
        report.add_mean(who, "nucleus found", found, "measurements")
        if who == "real":
            real = seen
            reference = space(seen[:half])
        if not is_free:
            report.add_correlations(who, real, seen)
            if who == "generated":
                table = feature_table(real, seen, given, folder.treatment[rows], G.image_norm)
                report.add_survived(table)
                best = table.index[:6]
                report.survived = table, real[best], seen[best]
        judged[who] = space(seen[half:2 * half])
        seen = seen.dropna(how="all")
        share = seen.notna().mean()
        usual = seen.loc[:, share >= 0.95]                      # some measurements are never defined
        report.add_wells(who, well_profiles(cells, usual))
    report.add_wells("input CP vectors", well_profiles(cells, given))
    if G.takes != "features":
        latent = represented(G, D, folder, rows, device)
        report.add_wells(BARE, well_profiles(cells, latent), "none")
    if space:
        d = len(space.axes)
        report.add_distances(reference, judged, "FD", f"-CP{d}", "measurements")

    if net:
        views = {}
        for c, name in enumerate(folder.channels):
            views[f" {name}"] = [c, c, c]                                           # as grey
        if len(folder.channels) == 3:
            views[""] = [0, 1, 2]
        for suffix, pick in views.items():
            reference = features_by_inception(net, draw, "real", 0, half, pick)
            judged = {}
            for who in names:
                judged[who] = features_by_inception(net, draw, who, half, 2 * half, pick)
            report.add_distances(reference, judged, "FID", suffix, "inception")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The Statistical Cell (Donovan-Maiye et al. 2022): what its two models know of cells, and how they use it

DRAWS = 10              # of the latents for an ELBO, and of other cells for a coupling (paper)
INFORMATIVE = 0.6       # nats of KL divergence, from which on a latent dimension counts as active (paper)
MODELS = ("reference", "target")
FEW = 8                 # cells, under which no mean of a group is looked at
COUPLED = 0.2           # sum of both couplings, under which a target follows neither nucleus nor cell


def labelled(G, folder, rows, device):
    """Of the cells `rows` in batches: a slice, their pictures (B, C, ...) in 0..1 and labels (B, L) on the device."""
    for i in batches(len(rows)):
        x = images_of(folder, rows[i], G)
        label = folder.told(rows[i])
        yield i, x.to(device), label.to(device)


@torch.no_grad()
def elbo_terms(G, folder, rows, seed, device, swapped=None):
    """Squared error and KL divergence (2, n, 2) of the reference and the target of the cells `rows`, means over DRAWS draws. In each
    draw the channel `swapped` (its place) comes from another cell; then 0 for the reference, whose ELBO nobody asks for."""
    n = len(rows)
    places = range(n)
    total = np.zeros((2, n, 2))
    for k in range(DRAWS):
        order = np.random.default_rng([seed, 3, k]).permutation(n)
        other = np.empty(n, int)
        other[order] = np.roll(order, 1)                                        # never the cell itself
        for i, x, label in labelled(G, folder, rows, device):
            if swapped is not None:
                others = images_of(folder, rows[other[i]], G)
                x[:, swapped] = others[:, swapped].to(device)
            noise = model.noise(G, places[i], seed * DRAWS + k).to(device)
            if swapped is None:
                terms = G.terms(x, label, noise)                                # (B, 2), (B, 2)
                total[:, i] += torch.stack(terms).cpu().numpy()
            else:
                reference, target = G.parts(x)
                told = G.told(reference, label)
                terms = G.target.terms(target, told, noise[:, G.half:])
                total[:, i, 1] += torch.stack(terms).cpu().numpy()
    return total / DRAWS


@torch.no_grad()
def latents_of(G, folder, rows, device):
    """Means and log variances (2, n, 2 latent) of the latents of the cells `rows`."""
    parts = []
    for _, x, label in labelled(G, folder, rows, device):
        encoded = torch.stack(G.encode(x, label))                               # (2, B, 2 latent)
        parts.append(encoded.cpu().double())
    return torch.cat(parts, 1)


@torch.no_grad()
def features_seen(who, G, folder, rows, seed, device):
    """The seven features of each channel (frame, n rows) in the cells `rows`: "real", "reconstructed", or "sampled" with their labels."""
    parts = []
    places = range(len(rows))
    for i, x, label in labelled(G, folder, rows, device):
        if who == "reconstructed":
            x = G(x, label)
        if who == "sampled":
            z = model.noise(G, places[i], seed)
            x = G.decode(z.to(device), label)
        x = x.clamp(0, 1).cpu()
        parts.append(data.solid_features(x, folder.channels))
    return pd.concat(parts, ignore_index=True)


def couplings(own, swapped):
    """Eq 4 and 5 of minus the ELBO of targets, own (R,), and of the same with a reference channel of other cells, swapped (channels, R):
    1 - ELBO / ELBO of the swapped, to each channel; and whether the target follows the first or the last channel, nucleus or
    cell, more, from -1 to 1, NaN where neither: (channels + 1, R)."""
    found = 1 - own / swapped
    both = found[-1] + found[0]
    lean = (found[-1] - found[0]) / both
    lean = np.where(both > COUPLED, lean, np.nan)
    return np.vstack([found, lean])


def add_coupling(report, G, folder, rows, loss, device):
    """The couplings of the target of each label, and of all; loss (n,): minus the ELBO of the target."""
    losses = [loss]
    quantities = []
    for place in G.places[0]:
        recon, kl = elbo_terms(G, folder, rows, report.seed, device, place)
        other = recon + kl
        losses.append(other[:, 1])
        quantities.append(f"coupling to {folder.channels[place]}")
    quantities.append("nucleus -1, cell 1")
    losses = np.column_stack(losses)                                            # (n, 1 + channels)
    names = np.array(folder.labels)[folder.label[rows]]
    for who in ["all", *np.unique(names)]:
        some = losses if who == "all" else losses[names == who]
        n = len(some)
        if n < FEW:
            report.absent[f"coupling of {who}"] = f"{n} cells, {FEW} are needed"
            continue

        def statistic(weights):
            own, *swapped = (weights @ some).T                                  # (R,) each
            return couplings(own, np.array(swapped)).T

        found = bootstrap(statistic, n, report.seed)
        for quantity, values in zip(quantities, found.T):
            report.add(who, quantity, n, "ELBO", *values)


def add_shifts(report, folder, rows, z):
    """How far each treatment moves the mean of the latents {model: (n, latent)} from DMSO's, of each structure where there are several;
    its interval is that under permuted treatments. Five real cells along the target's arrow go to report.arrows."""
    cells = folder.cells.iloc[rows]
    treatment = data.treatment_names(cells).to_numpy()
    solvent = (cells["compound"] == data.SOLVENT).to_numpy()
    kind = np.full(len(rows), "")
    if "structure" in cells:
        kind = cells["structure"].to_numpy()
    random = np.random.default_rng(report.seed)
    names = np.unique(treatment[~solvent])
    for one, name in product(np.unique(kind), names):
        mine = solvent | (treatment == name)
        here = np.flatnonzero(mine & (kind == one))
        moved = ~solvent[here]
        treated = moved.sum()
        untreated = len(here) - treated
        if min(treated, untreated) < FEW:
            continue
        groups = [moved]
        groups += [random.permutation(moved) for _ in range(200)]
        weights = np.where(groups, 1 / treated, -1 / untreated)                 # mean of the treated - mean of the others
        who = f"{one} {name}".strip()
        for which, every in z.items():
            arrows = weights @ every[here]                                      # (201, latent)
            length, *chance = np.linalg.norm(arrows, axis=1)
            usual = np.percentile(chance, [2.5, 97.5])
            report.add(who, f"shift of {which}", len(here), "latents", length, *usual)
        own = every[here]                                                       # the target's
        start = own[~moved].mean(0)
        along = (own - start) @ arrows[0]
        along = along / length ** 2                                             # 0 at DMSO's mean, 1 at the treatment's
        stops = np.linspace(0, 1, 5)
        distance = np.abs(along - stops[:, None])                               # (5, n)
        five = here[distance.argmin(1)]
        report.arrows[who] = length / np.mean(chance), rows[five]


def judge_statcell(G, folder, rows, seed, device):
    """Everything about one Statistical Cell on the cells `rows`: a Report."""
    report = Report(seed)
    recon, kl = elbo_terms(G, folder, rows, seed, device)
    loss = recon + kl
    for k, who in enumerate(MODELS):
        elbo = -loss[:, k]
        report.add_mean(who, "ELBO", elbo, "ELBO")
        report.add_mean(who, "rate", kl[:, k], "ELBO")
        report.add_mean(who, "distortion", recon[:, k], "ELBO")

    # The latents: how many hold something, whether they go together, where treatments move them
    train = by_name(folder, folder.rows("train"))
    train = np.random.default_rng([seed, 2]).permutation(train)
    train = train[:2000]
    mean, log_var = latents_of(G, folder, train, device)
    nats = model.kl_divergence(mean, log_var).mean(0)
    active = np.flatnonzero(nats > INFORMATIVE)
    mean = mean.numpy()
    z = latents_of(G, folder, rows, device)[0].numpy()
    own = active[active < G.half]
    n = len(train)
    report.add("reference", "active latents", n, "latents", len(own))
    report.add("target", "active latents", n, "latents", len(active) - len(own))
    shown = pd.DataFrame(z[:, active], columns=active)
    report.correlations = shown.corr()
    halves = np.split(z, 2, axis=1)
    add_shifts(report, folder, rows, dict(zip(MODELS, halves)))

    # Seven features of each channel; distances and R2 are of the reference's
    seen = {}
    for who in ("real", "reconstructed", "sampled"):
        seen[who] = features_seen(who, G, folder, rows, seed, device)
    report.features = pd.concat(seen, names=["who", "cell"])
    report.add_correlations("reconstructed", seen["real"], seen["reconstructed"])
    known = features_seen("real", G, folder, train, seed, device)
    names = tuple(np.take(folder.channels, G.places[0]))
    known = known.loc[:, known.columns.str.startswith(names)]
    space = CPSpace(known, 5)
    half = len(rows) // 2
    reference = space(seen["real"][:half])
    judged = {who: space(frame[half:]) for who, frame in seen.items()}
    report.add_distances(reference, judged, "FD", "-5", "features")

    # How much of their five components is a linear function of the reference's latents, fitted to training cells
    known = space.z_scores(known) @ space.axes.T
    real = space.z_scores(seen["real"]) @ space.axes.T
    known = known - known.mean(0)
    inputs = mean[:, own]
    inputs = inputs - inputs.mean(0)
    weights, *_ = np.linalg.lstsq(inputs, known, rcond=None)
    expected = z[:, own] @ weights
    missed = real - expected
    explained = 1 - missed.var(0) / real.var(0)
    for k, r2 in enumerate(explained, 1):
        report.add("reference", f"R2 of feature component {k}", len(real), "latents", r2)
    add_coupling(report, G, folder, rows, loss[:, 1], device)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written

SHOWN = (r"ELBO|rate|distortion|coupling to .*|nucleus -1, cell 1|active latents|R2 .*|"
         r"(pixel|hidden) loss|nucleus found|share r > 0.5|median r( within treatments)?|NSCB?|"
         r"(FID|FD|KID|precision|recall)( [A-Z]\w+)?(-(CP)?\d+)?")
SHORT = {
    "free samples": "free",
    "nearest training cell": "nearest",
    "random training cell": "random",
    "mean training image": "mean",
    "input CP vectors": "input",
    BARE: "latent",
}
INTERVAL = "95 %, 1000 bootstrap draws of cells; NSC: of compounds; permuted labels: ± sd"
OWN = ("generated", "free samples", BARE, "reconstructed", "sampled", *MODELS)  # a model's; the other contestants are baselines
TABLES = {  # quantities, and what was published on BBBC021 (N, reference set and tool of FID are not stated)
    "Table 1 of CP2Image": r"pixel loss|share r > 0.5|FID|FD-CP\d+",
    "Table 1 of CytoGAN": "NSCB?",
    "Fig 3 of the Statistical Cell": r"ELBO|rate|distortion|share r > 0.5|FD-\d+",
}
PUBLISHED = """published, not comparable: FID of CP2Image 68.42 ± 1.9 (over 0.30 of its features with r > 0.5),
VAE 351.96 ± 5.3, VAEplus 27.98 ± 3.8, LSGAN 24.79 ± 2.0; NSC, not normalised, of VAE 0.49, VAEplus
0.90, LSGAN 0.43, DCGAN 0.45, WGAN 0.63, CP vectors 0.90, deep transfer learning 0.91 and 0.96
"""


def say(text):
    """Prints a sentence in lines of at most 100 columns."""
    print(textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def rounded(value):
    """Six digits for JSON, which has no NaN."""
    if np.isnan(value):
        return None
    return float(f"{value:.6g}")


def write_csv(path, frame, **options):
    data.write(path, frame.to_csv(float_format="%.6g", lineterminator="\n", **options))


def write_json(path, content):
    text = json.dumps(content, indent=1, default=np.generic.item)
    data.write(path, text + "\n")


def write_results(out, report, about):
    """metrics.json, metrics.csv, features.csv (feature_table) and moa.csv (one row a treatment), what there is of them."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for who, quantity, value, low, high, n, extractor in report.records:
        results.setdefault(who, {})[quantity] = dict(
            value=rounded(value),
            interval=[rounded(low), rounded(high)],
            n=n,
            extractor=extractor,
        )
    if report.survived:
        table = report.survived[0]
        write_csv(out / "features.csv", table)
        about["claims of the paper"], medians = claims(table)
        medians = medians.map(rounded)
        about["median r"] = medians.to_dict()
    write_json(out / "metrics.json", dict(about=about, absent=report.absent, results=results))
    table = report.table().assign(split=about["split"], seed=about["seed"])
    write_csv(out / "metrics.csv", table, index=False)
    if report.treatments:
        write_csv(out / "moa.csv", pd.concat(report.treatments), index=False)
    if report.features is not None:  # of a Statistical Cell
        write_csv(out / "features.csv", report.features)
        write_csv(out / "latents.csv", report.correlations)


def verdict(wide):
    """One plain sentence about a generator; `wide`: values, a row a quantity and a column a contestant."""
    if "reference" in wide:
        return "describes cells (reference) and one structure in them (target): see ELBO, coupling and R2"
    if np.isnan(wide["generated"]["pixel loss"]):
        return "draws free samples, of no particular cell: see the distances and NSC"
    paired = wide.filter(regex="^(pixel loss$|r )", axis=0)
    ahead = paired["generated"] - paired["nearest training cell"]
    ahead["pixel loss"] *= -1
    won = (ahead > 0).sum()
    return f"beats the nearest training cell on {won} of {len(ahead)} paired scores, and does NOT on the rest"


def side_by_side(table, values):
    """A row a quantity and a column a contestant, both as they first come in `table`."""
    wide = table.pivot(index="quantity", columns="who", values=values)
    quantities = table["quantity"].unique()
    wide = wide.loc[quantities, table["who"].unique()]
    return wide.rename_axis(index=None, columns=None)


def print_report(name, report):
    """A sentence, then the table of values, and what is absent and why; the rest is in the files."""
    wide = side_by_side(report.table(), "value")
    say(f"{name} {verdict(wide)}.")
    shown = wide[wide.index.str.fullmatch(SHOWN)].rename(columns=SHORT)
    shown = shown.dropna(axis=1, how="all").iloc[:, :14]                        # not every label of many
    print("\n" + shown.to_string(float_format="{:.4g}".format, na_rep="-") + "\n")
    print_absent(report.absent)


def print_absent(absent):
    for what, reason in absent.items():
        say(f"absent: {what}: {reason}")


def optional(what, draw, *arguments):
    """Calls draw(*arguments). Whatever goes wrong there costs a line, not the numbers, which are written already."""
    try:
        draw(*arguments)
    except Exception as error:
        say(f"no {what} ({error!r}); the numbers are complete")


def draw_plots(path, report):
    """Fig 4a (sorted r of every measurement; undefined r are left out), and below it Fig 4b (real against generated cells in
    the six features that survive best)."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's may not exist here, and files need none
    from matplotlib.figure import Figure
    figure = Figure((14, 9), dpi=80, layout="constrained")
    panels = figure.subplot_mosaic("aaaaaa;aaaaaa;012345")
    sorted_r = panels["a"]
    table = report.table().dropna(subset="value")
    pearson = table[table["quantity"].str.startswith("r ")]
    for who, rows in pearson.groupby("who", sort=False):
        values = np.sort(rows["value"])
        sorted_r.plot(values[::-1], label=who)
    sorted_r.set(xlabel="feature, sorted", ylabel="Pearson's r with the real cell", ylim=(-0.5, 1))
    sorted_r.legend()
    features, real, fake = report.survived
    for key, name in zip("012345", real):
        panels[key].plot(real[name], fake[name], ".", ms=2)
        panels[key].set(xlabel="real", ylabel="generated")
        r = features["r"][name]
        panels[key].set_title(f"{name}\nr {r:.2f}", fontsize=6)
    data.write(path, figure.savefig)


def draw_features(path, features):
    """Fig 3: how each feature (columns; rows: who, cell) spreads over real, reconstructed and sampled cells, as violins."""
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure
    figure = Figure((16, 8), dpi=70, layout="constrained")
    panels = figure.subplots(3, 7).ravel()
    for panel, name in zip(panels, features):
        table = features[name].unstack("who", sort=False)
        values = [table[who].dropna() for who in table]
        panel.violinplot(values, showmedians=True)
        panel.set_xticks([1, 2, 3], table.columns, fontsize=6)
        panel.set_title(name, fontsize=8)
    data.write(path, figure.savefig)


def write_grid(path, pictures, cells):
    """Rows of pictures {name: (n, C, ..., H, W) in 0..1} as a PNG; which cells they are goes into a JSON file of the same name."""
    picture = data.tile([data.composite(x) for x in pictures.values()])
    data.write(path, Image.fromarray(picture).save)
    said = dict(rows=list(pictures), cells=cells)
    write_json(path.with_suffix(".json"), said)


def draw_arrows(path, folder, arrows, G):
    """Five real cells from DMSO's mean to the treatment's, a row for each of the ten treatments that move the target's latents most,
    beside chance; a JSON file of the same name says which."""
    pictures = {}
    cells = {}
    for who in sorted(arrows, key=arrows.get, reverse=True)[:10]:
        _, rows = arrows[who]
        pictures[who] = images_of(folder, rows, G)
        cells[who] = list(folder.cells["cell"].iloc[rows])
    write_grid(path, pictures, cells)


def draw_grid(out, folder, rows, runs, seed, device):
    """Fig 3: the same cells for every model, the originals above; grid.json names rows and cells."""
    pictures = {"original": images_of(folder, rows, runs[0])}
    for G in runs:
        name = f"{G.name}, free samples" if G.takes == "noise" else G.name
        if name not in pictures:
            pictures[name] = drawn(G, folder, rows, range(len(rows)), seed, device)
    names = folder.cells["cell"].iloc[rows]
    write_grid(out / "grid.png", pictures, list(names))


def compare_runs(runs, reports):
    """A row for each model (or baseline, of the first run) and quantity: mean and sd (ddof 1) over its runs, and all values.
    Returns that frame, and both papers' Table 1 as text."""
    parts = []
    for G, report in zip(runs, reports):
        table = report.table()
        is_own = table["who"].isin(OWN)
        if parts:
            table = table[is_own]
        label = G.name + " " + table["who"]
        label = label.str.removesuffix(" generated")
        who = table["who"].mask(is_own, label)
        parts.append(table.assign(who=who))
    groups = pd.concat(parts).groupby(["who", "quantity"], sort=False)
    long = groups.agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        runs=("value", "count"),
        values=("value", list),
        n=("n", "min"),
    ).reset_index()
    spread = long["sd"].map(" ± {:.2g}".format).replace(" ± nan", "")
    middle = long["mean"].map("{:.4g}".format)
    shown = long.assign(text=middle + spread)
    lines = []
    for title, pattern in TABLES.items():
        some = shown[shown["quantity"].str.fullmatch(pattern)]
        some = some.dropna(subset="mean")
        if not len(some):
            continue
        wide = side_by_side(some, "text").T
        body = wide.to_string(na_rep="-")
        lines.append(f"{title}, from these runs (± sd, ddof 1):\n\n{body}\n")
    return long, "\n".join([*lines, PUBLISHED])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def open_run(folder, path, device):
    """The generator of a run's folder or a checkpoint file (model.load), which knows its .checkpoint, .settings, .latent and .name
    (the run's folder, without -seed<n>), too; InputError if it was not trained on the prepared folder."""
    checkpoint = Path(path)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "last.pt"
    G = model.load(checkpoint, device)
    if G.identity != folder.identity:
        raise InputError(f"{checkpoint}: was trained on another prepared folder than {folder.path}; "
                         "give the --data of that run")
    G.checkpoint = checkpoint
    G.latent = getattr(G, "latent", 0)                  # CP2Image takes no noise
    G.settings = model.read_checkpoint(checkpoint)["settings"]
    G.name = re.sub(r"-seed\d+$", "", checkpoint.resolve().parent.name)
    return G


def score_table(path, image_csv, moa, normalise, seed, out):
    """--profiles: NSC and NSCB of any table of well profiles, printed, and written to folder `out` if there is one."""
    table, lines = read_profiles(path, image_csv, moa)
    report = Report(seed)
    report.add_scores("profiles", table, normalise)
    for _, quantity, value, low, high, n, _ in report.records:
        print(f"{quantity} {value * n:.4g}/{n} = {value:.1%}, from {low:.1%} to {high:.1%}")
    features = table.shape[1] - len(WELL_COLUMNS)
    lines.append(f"{len(table)} wells, {features} features, plates scaled by their DMSO wells: {normalise}; "
                 f"{INTERVAL}")
    for line in lines:
        say(line)
    print_absent(report.absent)
    if out:
        about = dict(profiles=path, normalise=normalise, split="all", seed=seed)
        write_results(Path(out), report, about)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="prepared folder (prepare_bbbc021.py --out)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run's folder (its last.pt is used) or a checkpoint file, RUN/best.pt")
    what.add_argument("--runs", nargs="+",
                      help="runs named <model>-seed<n>: mean ± sd over seeds, models side by side")
    what.add_argument("--profiles", help="score a CSV of well profiles instead; needs no run")
    add("--split", default="test", choices=["train", "val", "test"],
        help="which cells are judged (default test)")
    add("--out", help="where the results go (default RUN/eval; needed with --runs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")
    add("--seed", type=data.seed, default=0,
        help="of the reference half, the shown cells, the subsets and the intervals (default 0)")
    add("--n", type=int, default=10_000,
        help="cells a side, reference and judged (default 10000, or half of the split)")
    add("--inception", help=f"FID and KID too, by the weights in this file: {INCEPTION_URL}")
    add("--grid", type=int, default=13,
        help="cells in grid.png, originals above one row a model (default 13)")
    add("--image-csv", help="with --profiles: BBBC021_v1_image.csv, which compound each well has")
    add("--moa", help="with --profiles: BBBC021_v1_moa.csv, the mechanism of each treatment")
    add("--normalise", choices=["z", "percentile", "mad", "none"], default="z",
        help="with --profiles: plates, by DMSO wells (default z)")
    args = parser.parse_args(argv)
    if not args.profiles and not args.data or args.runs and not args.out:
        parser.error("--run and --runs need --data DIR, --runs also --out DIR")
    if args.n < 1:
        parser.error(f"--n {args.n}: expected 1 or more")
    return args


def main(argv=None):
    args = parse(argv)
    if args.profiles:
        score_table(args.profiles, args.image_csv, args.moa, args.normalise, args.seed, args.out)
        return
    device = data.pick_device(args.device)
    data.keep_freed_memory()
    folder = data.open_folder(args.data)
    runs = [open_run(folder, path, device) for path in args.runs or [args.run]]
    different = {(G.name, G.settings["seed"]) for G in runs}
    norms = {G.image_norm for G in runs}
    if len(different) < len(runs) or len(norms) > 1:
        raise InputError("--runs: expected one --image-norm, and different seeds for each model (folder name "
                         "without -seed<n>)")
    rows = choose_cells(folder, args.split, args.n, args.seed)
    net = load_inception(args.inception, device) if args.inception else None
    out = Path(args.out or runs[0].checkpoint.parent / "eval")
    cells = f"{len(rows)} {args.split} cells of {args.data}, half of them on each side of a distance"

    # each run's numbers are written as they are had
    reports = {}
    for G in runs:
        D = model.load_metric(G.checkpoint, device)
        if isinstance(G, model.StatCell):
            report = judge_statcell(G, folder, rows, args.seed, device)
        else:
            report = judge(G, D, folder, rows, args.seed, device, net)
        if not net:
            report.absent["FID, KID"] = "--inception FILE was not given; distances are between measurements (CP)"
        about = dict(
            data=args.data,
            checkpoint=str(G.checkpoint),
            step=G.step,
            settings=G.settings,
            split=args.split,
            seed=args.seed,
            cells=len(rows),
            channels=folder.channels,
            interval=INTERVAL,
            floor="the distances of real: real cells of the judged half from those of the reference half",
        )
        target = out
        if args.runs:
            target = out / f"{G.name}-seed{G.settings['seed']}"
        write_results(target, report, about)
        reports[target] = report
        print_report(f"{G.checkpoint} at step {G.step}, judged on {cells},", report)
    if args.runs:
        long, text = compare_runs(runs, reports.values())
        write_csv(out / "comparison.csv", long, index=False)
        data.write(out / "comparison.md", f"{cells}\n\n{text}")
        print(f"\n{text}")

    # pictures last: they may fail and cost nothing
    optional("grid.png", draw_grid, out, folder, rows[:args.grid], runs, args.seed, device)
    for target, report in reports.items():
        if report.survived:
            optional("metrics.png", draw_plots, target / "metrics.png", report)
        if report.features is not None:
            optional("metrics.png", draw_features, target / "metrics.png", report.features)
        if report.arrows:
            optional("shift.png", draw_arrows, target / "shift.png", folder, report.arrows, runs[0])
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, model.InputError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
