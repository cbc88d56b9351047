"""Judge a trained generator on cells it has not seen, beside simple baselines and the floor: real cells against other real cells.

    python evaluate.py --data out/ --run runs/cp2image-seed0 [--inception WEIGHTS]
    python evaluate.py --data out/ --runs runs/cp2image-seed* --out compared/ --grid 12
    python evaluate.py --profiles WELLS.csv --image-csv BBBC021_v1_image.csv --moa BBBC021_v1_moa.csv

Reads a prepared folder and runs (last.pt of each; or name a file, RUN/best.pt), or a table of well profiles. Writes OUT/metrics.json,
metrics.csv and grid.png, with matplotlib metrics.png, for several runs comparison.md and comparison.csv. Equal calls write equal bytes.
FID needs the weights of its Inception network; without them the distances are between measurements of the pictures (FD-CP, KID-CP).
"""
import argparse
import json
import mmap
import os
import re
import sys
import urllib.request
import zlib
from collections import OrderedDict
from functools import partial
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
from prepare_bbbc021 import ENGINES, measurements

# The FID weights: Google's Inception graph of 2015-12-05 as ported by pytorch-fid
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_BYTES = 95_628_359
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

BLOCK = 64  # columns of a table of measurements that are worked on at once: bounds the memory
TRAIN_SAMPLE = 2000  # training cells, drawn by the seed, that give the mean image and the scale and components of FD-CP
WELL_COLUMNS = ["plate", "well", "compound", "concentration", "moa"]
RECORD = ["who", "quantity", "value", "low", "high", "n", "extractor"]
BARE = "representation, not normalised"  # as CytoGAN scores them; "representation" is scaled by each plate's DMSO wells
PUBLISHED = {  # on BBBC021; N, reference set and tool are not stated there (MIDL 2023, Table 1 and 4.2; NSC: CytoGAN's Table 1, VAEplus' paper)
    "cp2image": {"FID": "68.42 ± 1.9", "share r > 0.5": "over 0.30"}, "vae": {"FID": "351.96 ± 5.3"},
    "vaeplus": {"FID": "27.98 ± 3.8"}, "lsgan": {"FID": "24.79 ± 2.0"}, f"vae {BARE}": {"NSC": "0.49"}, f"vaeplus {BARE}": {"NSC": "0.90"},
    f"lsgan {BARE}": {"NSC": "0.43"}, f"dcgan {BARE}": {"NSC": "0.45"}, f"wgan {BARE}": {"NSC": "0.63"},
    "input CP vectors": {"NSC": "0.90 (deep transfer learning: 0.91, 0.96)"}}
TABLES = {"Table 1 of CP2Image": r"pixel loss|nucleus found|share r > 0.5|(FID|KID|FD-CP\d+|KID-CP\d+|precision|recall)(-CP\d+)?",
          "Table 1 of CytoGAN": "NSCB?"}


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3, as FID defines it


def unit(c_in, c_out, kernel, stride=1, padding="same"):
    """Convolution without bias, batch norm, ReLU."""
    layers = {"conv": nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), "bn": nn.BatchNorm2d(c_out, eps=1e-3), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers))


class Mixed(nn.Module):
    """Parallel branches, concatenated; the last is `pool`, then (if `c_pool` is given) a 1x1 convolution to c_pool channels.
    A branch lists its convolutions as (c_out, kernel, stride, padding); two in one bracket are a fork, both ends kept."""

    def __init__(self, c_in, pool, c_pool=None, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, steps in branches.items():
            chain, c = [], c_in
            for i, step in enumerate(steps, 1):
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                fork = {name + "a": step[0], name + "b": step[1]} if isinstance(step[0], tuple) else {name: step}
                for end, arguments in fork.items():
                    self.add_module(end, unit(c, *arguments))
                chain.append(list(fork))
                c = step[0]
            self.chains.append(chain)
        self.branch_pool = unit(c_in, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs + [self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception-v3 for FID: images (B, 3, H, W) in 0..1 -> features (B, 2048), the average of Mixed_7c over space.
    Unlike torchvision's, its average pools leave the padding out and Mixed_7c pools by maximum (pytorch-fid inception.py)."""

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = unit(3, 32, 3, 2, 0), unit(32, 32, 3, 1, 0), unit(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = unit(64, 80, 1), unit(80, 192, 3, 1, 0)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        for letter, c_in, c_pool in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):  # 35 x 35 pixels
            self.add_module(f"Mixed_5{letter}", Mixed(c_in, average, c_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                                                      branch3x3dbl=[(64, 1), (96, 3), (96, 3)]))
        self.Mixed_6a = Mixed(288, nn.MaxPool2d(3, 2), branch3x3=[(384, 3, 2, 0)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)])
        for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):  # 17 x 17
            self.add_module(f"Mixed_6{letter}", Mixed(768, average, 192, branch1x1=[(192, 1)],
                                                      branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                                                      branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]))
        self.Mixed_7a = Mixed(768, nn.MaxPool2d(3, 2), branch3x3=[(192, 1), (320, 3, 2, 0)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)])
        fork = ((384, (1, 3)), (384, (3, 1)))
        for letter, c_in, pool in (("b", 1280, average), ("c", 2048, nn.MaxPool2d(3, 1, 1))):  # 8 x 8
            self.add_module(f"Mixed_7{letter}", Mixed(c_in, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                                                      branch3x3dbl=[(448, 1), (384, 3), fork]))
        self.fc = nn.Linear(2048, 1008)  # never called, but in the file

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1  # (B, 3, 299, 299) in -1..1
        for layer in list(self.children())[:-1]:  # all but fc
            x = layer(x)
        return x.mean((2, 3))  # (B, 2048, 8, 8) -> (B, 2048)


def load_inception(path, device="cpu"):
    """The FID network with the weights in file `path`, or the word download; InputError for a file of another size or SHA-256."""
    if str(path) == "download":
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rsplit("/", 1)[1])  # where pytorch-fid itself keeps it
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(INCEPTION_URL, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; the FID weights are at {INCEPTION_URL}")
    size, sha256 = os.path.getsize(path), data.checksum(path)
    if (size, sha256) != (INCEPTION_BYTES, INCEPTION_SHA256):
        raise InputError(f"{path}: {size} bytes with SHA-256 {sha256}; expected the FID weights, {INCEPTION_BYTES} bytes with SHA-256 "
                         f"{INCEPTION_SHA256}, from {INCEPTION_URL}")
    net = Inception()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(device).eval()


@torch.no_grad()
def inception_features(net, images, batch=64):
    """Features (N, 2048) float32 of images (N, 3, H, W) uint8, TF32 off. For channel c alone, as grey: images[:, [c, c, c]]."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == 3 and not net.training, (images.shape, images.dtype)
    x = torch.tensor(images, device=next(net.parameters()).device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([net(x[i].float() / 255) for i in batches(len(x), batch)]).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# How far apart two sets of vectors lie: Fréchet distance, KID, precision and recall


def check_sets(*sets, least=1):
    """The sets as arrays (N, d); InputError for another shape, under `least` rows, unequal widths, NaN or infinite values."""
    sets = [np.asarray(x) for x in sets]
    for x in sets:
        if x.ndim != 2 or len(x) < least or not x.shape[1]:
            raise InputError(f"expected (N, d) with at least {least} rows and one column, found {x.shape}")
        if x.shape[1] != sets[0].shape[1]:
            raise InputError(f"the sets have {sets[0].shape[1]} and {x.shape[1]} columns; expected the same features in both")
        if bad := x.size - np.isfinite(x).sum():
            raise InputError(f"{bad} of {x.size} values are NaN or infinite")
    return sets


def add_moments(moments, x):
    """Running (n, mean (d,), scatter (d, d)) float64 after one more batch x (B, d), from None; covariance = scatter / (n - 1).
    Batches merge about their own means (Chan et al. 1979), so that their size and order only change the last digits."""
    x, = check_sets(x)
    n_x, mean_x = len(x), x.mean(0, dtype=np.float64)
    scatter_x = (x - mean_x).T @ (x - mean_x)
    if moments is None:
        return n_x, mean_x, scatter_x
    n, mean, scatter = moments
    shift, total = mean_x - mean, n + n_x
    return total, mean + shift * n_x / total, scatter + scatter_x + np.outer(shift, shift) * (n * n_x / total)


def mean_and_root(x):
    """Mean (d,) of x (N, d) and R (min(N, d), d) with R'R = its covariance (ddof 1), which is never formed for N <= d."""
    n, d = x.shape
    if n <= d:
        mean = x.mean(0, dtype=np.float64)
        return mean, (x - mean) / np.sqrt(n - 1)
    moments = None
    for i in range(0, n, 4096):
        moments = add_moments(moments, x[i:i + 4096])
    w, v = np.linalg.eigh(moments[2] / (n - 1))
    return moments[1], np.sqrt(np.maximum(w, 0))[:, None] * v.T


def frechet_of_roots(mean1, root1, mean2, root2):
    """|mean1 - mean2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) for S = R'R: the last trace is the nuclear norm of R1 R2'."""
    nuclear = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    d2 = ((mean1 - mean2) ** 2).sum() + (root1 ** 2).sum() + (root2 ** 2).sum() - 2 * nuclear
    return float(max(d2, 0))  # rounding leaves about -1e-14 for equal sets


def frechet_distance(x, y):
    """Squared Fréchet distance of Gaussians fitted to x (N, d) and y (M, d): on Inception features, FID (Heusel et al. 2017).
    It grows as 1/N: compare at one N, beside a floor of real against real."""
    x, y = check_sets(x, y, least=2)
    return frechet_of_roots(*mean_and_root(x), *mean_and_root(y))


def fid_infinity(real, fake, points=15):
    """Fréchet distance at infinitely many fakes: (a, b, sizes n, distances) of the line FD = a + b / n (Chong & Forsyth 2020).
    n runs from a tenth of the fakes to all, each time the first n rows: in random order. The bias of `real` stays."""
    real, sizes = mean_and_root(real), np.linspace(len(fake) // 10, len(fake), points).astype(int)
    distances = np.array([frechet_of_roots(*real, *mean_and_root(fake[:n])) for n in sizes])
    b, a = np.polyfit(1 / sizes, distances, 1)
    return float(a), float(b), sizes, distances


def mmd2(x, y):
    """Unbiased squared maximum mean discrepancy of x (N, d) and y (M, d), kernel (x.y / d + 1)^3 (Binkowski et al. 2018)."""
    x, y = (v.astype(np.float64) for v in check_sets(x, y, least=2))
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


def kid(x, y, subset=None, subsets=100, seed=0):
    """Kernel Inception distance of x (N, d) and y (M, d): mean and sd (ddof 0) of mmd2 over random subsets without replacement.
    `subset` rows come from each set: min(1000, half the smaller set) unless given; a larger one than the set is an InputError."""
    x, y = check_sets(x, y, least=4)
    least = min(len(x), len(y))
    subset = min(1000, least // 2) if subset is None else subset
    if not 2 <= subset <= least:
        raise InputError(f"KID subset {subset}: expected 2 to {least}, the rows of the smaller set")
    rng = np.random.RandomState(seed)  # x before y, as torch-fidelity draws, to match its values
    values = [mmd2(*(v[rng.choice(len(v), subset, replace=False)] for v in (x, y))) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def squared_distances(a, b):
    """Squared Euclidean distances (A, B) float64 of the rows of a (A, d) and b (B, d), block by block of b to save memory."""
    a, d2 = a.astype(np.float64), np.empty((len(a), len(b)))
    for j in batches(len(b), 2048):
        c = b[j].astype(np.float64)
        d2[:, j] = (a * a).sum(1)[:, None] + (c * c).sum(1) - 2 * a @ c.T
    return np.maximum(d2, 0, out=d2)


def neighbour_radii(x, ks):
    """Squared distance (len(ks), N) from each row of x (N, d) to its k-th nearest other row, for each k; a tie counts as inside."""
    blocks = (np.partition(squared_distances(x[i], x), ks, axis=1)[:, ks].T for i in batches(len(x), 512))  # the row itself comes 0-th
    return np.concatenate(list(blocks), axis=1) * (1 + 1e-9)


def precision_recall_density_coverage(real, fake, k=3, k_density=5):
    """Are the fakes (M, d) like real cells (N, d), and do they reach all? {"precision", "recall", "density", "coverage"}.
    A cell's ball reaches to its k-th nearest other cell of the same set. Precision: share of fakes in a real ball; recall: share of real
    cells in a fake ball (Kynkäänniemi et al. 2019). Density: real balls around a fake, mean over k_density (can exceed 1); coverage: share
    of real balls, of k_density, that hold a fake (Naeem et al. 2020)."""
    real, fake = check_sets(real, fake, least=max(k, k_density) + 1)
    radius, radius_density = neighbour_radii(real, [k, k_density])  # (N,) each
    radius_fake, = neighbour_radii(fake, [k])  # (M,)
    precise = inside = 0
    recalled, covered = np.zeros((2, len(real)), bool)
    for i in batches(len(fake), 512):
        d2 = squared_distances(fake[i], real)  # (B, N)
        precise += (d2 <= radius).any(1).sum()
        inside += (d2 <= radius_density).sum()
        recalled |= (d2 <= radius_fake[i, None]).any(0)
        covered |= (d2 <= radius_density).any(0)
    return {"precision": float(precise / len(fake)), "recall": float(recalled.mean()),
            "density": float(inside / (k_density * len(fake))), "coverage": float(covered.mean())}


# ---------------------------------------------------------------------------------------------------------------------
# FD-CP: the space of measurements


def robust_z(frame, space):
    """Measurements (N rows) -> robust z-scores (N, F kept) = (v - median) / (1.4826 MAD), clipped to +-10; missing = 0, the median.
    InputError for other columns than those of `space`, an infinite value, or cells without any measurement: count them and leave them out."""
    if list(frame) != space["names"]:
        raise InputError(f"{len(frame.columns)} measurements, first {list(frame)[:3]}; expected {len(space['names'])}, "
                         f"first {space['names'][:3]}")
    values = frame.to_numpy(np.float64)
    if empty := np.isnan(values).all(1).sum() if len(values) else 0:
        raise InputError(f"{empty} of {len(values)} cells have no measurement: count them and leave them out")
    if (bad := np.isinf(values).sum(0)).any():
        raise InputError(f"{frame.columns[bad.argmax()]}: {bad.max()} of {len(values)} values are infinite")
    z = np.clip((values[:, space["keep"]] - space["centre"]) / space["spread"], -10, 10)
    return np.where(np.isnan(z), 0, z)


def in_cp_space(frame, space):
    """Components (N, d) of measurements (N rows) in the space of fit_cp_space, some rows at a time to save memory."""
    return np.concatenate([(robust_z(frame[i], space) - space["mean"]) @ space["axes"].T for i in batches(max(len(frame), 1))])


def fit_cp_space(train, d):
    """Robust z-scores of real training cells (frame, N rows) and their first d principal components, of fewer features all: FD-CP's space.
    Columns over 5 % missing or without spread (MAD 0) are dropped, with the reason. InputError under 20 cells, or if none is left."""
    if len(train) < 20:
        raise InputError(f"{len(train)} training cells could be measured, 20 are needed")
    values, names = train.to_numpy(np.float64), list(train)
    missing = np.isnan(values).mean(0)
    values = np.where(missing > 0.05, 0, values)
    centre = np.nanmedian(values, axis=0)
    spread = 1.4826 * np.nanmedian(np.abs(values - centre), axis=0)
    keep = spread > 1e-9 * np.abs(centre)  # the rounding of a constant is no spread
    if not keep.any():
        raise InputError(f"none of the {len(names)} measurements varies among the {len(train)} training cells")
    dropped = {names[j]: f"{missing[j]:.1%} missing" if missing[j] > 0.05 else "MAD 0" for j in np.flatnonzero(~keep)}
    space = {"names": names, "keep": keep, "centre": centre[keep], "spread": spread[keep], "dropped": dropped}
    _, mean, scatter = add_moments(None, robust_z(train, space))
    return space | {"mean": mean, "axes": np.linalg.eigh(scatter)[1].T[::-1][:d]}  # (F,), (d, F)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of pictures, and 95 % intervals


def correlations(a, b, weights):
    """Pearson's r (R, F) of the columns of a and b (n, F) over the rows where both are finite; row i counts weights[:, i] times (R, n).
    NaN below 3 pairs or without spread. Works on BLOCK columns at a time, in float64."""
    r = np.empty((len(weights), a.shape[1]))
    for j in batches(a.shape[1], BLOCK):
        x, y = a[:, j].astype(np.float64), b[:, j].astype(np.float64)
        both = (np.isfinite(x) & np.isfinite(y)).astype(np.float64)
        pairs = weights @ both
        x, y = (np.where(both, v, 0) for v in (x, y))
        x, y = (v - both * v.sum(0) / np.maximum(both.sum(0), 1) for v in (x, y))  # centred: rounding stays small
        with np.errstate(divide="ignore", invalid="ignore"):
            cross, xx, yy = (weights @ (v * w) - (weights @ v) * (weights @ w) / pairs for v, w in ((x, y), (x, x), (y, y)))
            r[:, j] = np.where((pairs >= 3) & (np.minimum(xx, yy) > 1e-18), cross / np.sqrt(xx * yy), np.nan)
    return r


def bootstrap(statistic, n, seed, draws=1000):
    """95 % percentile interval (2, K) of `statistic`, a function of how often each of n rows is drawn, (R, n) -> (R, K).
    NaN where the statistic is undefined in a draw, or n < 2."""
    random = np.random.default_rng(seed)
    values = np.concatenate([statistic(random.multinomial(n, np.full(n, 1 / n), 100).astype(float)) for _ in range(draws // 100)])
    return np.percentile(values, [2.5, 97.5], axis=0) if n > 1 else np.full((2, values.shape[1]), np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Mechanism of action


def well_profiles(cells, frame):
    """One row a well (WELL_COLUMNS, n_cells, features): the mean of its cells' rows of `frame` (by index), missing ones left out."""
    wells = cells.groupby(WELL_COLUMNS, dropna=False)
    means = [frame.iloc[:, j].astype(np.float64).groupby(wells.ngroup()).mean() for j in batches(frame.shape[1], BLOCK)]
    return pd.concat([wells.size().rename("n_cells").reset_index(), *means], axis=1)


def normalise_plates(x, plates, is_dmso, how="z"):
    """Well profiles x (W, F), each plate scaled by its own DMSO wells; a feature without spread in them becomes 0 there.
    z: mean 0, sd 1 (ddof 0). percentile: 1st to 0, 99th to 1 (Ljosa et al. 2013). mad: median 0, 1.4826 MAD 1, clipped to +-10.
    none: as it is. InputError names a plate with fewer than two DMSO wells."""
    x, plates, is_dmso = check_sets(x)[0].astype(np.float64), np.asarray(plates), np.asarray(is_dmso)
    for plate in np.unique(plates) if how != "none" else []:
        here = plates == plate
        dmso = x[here & is_dmso]  # (wells, F)
        if len(dmso) < 2:
            raise InputError(f"plate {plate}: {len(dmso)} DMSO wells, 2 are needed to normalise it by {how}")
        low, median, high = np.percentile(dmso, [1, 50, 99], axis=0)
        centre, spread = {"z": (dmso.mean(0), dmso.std(0)), "percentile": (low, high - low),
                          "mad": (median, 1.4826 * np.median(np.abs(dmso - median), 0))}[how]
        flat = spread <= 1e-9 * np.abs(centre)
        x[here] = np.where(flat, 0, (x[here] - centre) / np.where(flat, 1, spread))
    return np.clip(x, -10, 10) if how == "mad" else x


def treatment_profiles(wells, features, average="mean"):
    """One row a treatment (compound, concentration, moa, batches, n_wells, features), without DMSO and unknown mechanisms.
    `batches`: the tuple of batches it was run in; the batch of plate `Week1_22123` is `Week1`."""
    wells = wells[~wells["moa"].fillna("").isin(["", "unknown", "DMSO"])]
    if not len(wells):
        raise InputError("no well has a known mechanism of action")
    batch = wells["plate"].astype(str).str.split("_").str[0]
    groups = wells.assign(concentration=wells["concentration"].astype(float), batch=batch).groupby(["compound", "concentration", "moa"])
    about = groups["batch"].agg(batches=lambda b: tuple(sorted(set(b))), n_wells="size")
    return about.join(groups[list(features)].agg(average)).reset_index()


def nsc(profiles, compounds, moas, batches=None, seed=0, draws=1000):
    """Mechanism of action from the nearest profile (cosine) of another compound (NSC) and, given `batches`, batch (NSCB).
    profiles (T, F), compounds and moas (T,), batches a tuple a treatment. A treatment is scorable if an admissible profile shares its
    mechanism; others leave the denominator; InputError if none is, or for a profile of zeros. Returns accuracy, correct,
    n, interval (95 %, whole compounds resampled), accuracy_per_compound (each weighs the same), null_mean, null_sd, p (mechanisms shuffled
    among the compounds), and tables treatments, per_compound, confusion (true x predicted)."""
    x, compounds, moas = check_sets(profiles, least=2)[0].astype(np.float64), np.asarray(compounds), np.asarray(moas)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise InputError(f"{(length == 0).sum()} of {len(x)} profiles are all zero: {compounds[length.argmin()]}, ...; no cosine")
    admissible = compounds[:, None] != compounds  # (T, T)
    if batches is not None:
        admissible &= np.array([[set(a).isdisjoint(b) for b in batches] for a in batches])
    distance = np.where(admissible, 1 - (x / length) @ (x / length).T, np.inf)
    nearest = distance.argmin(1)

    def score(moas):
        return moas[nearest] == moas, (admissible & (moas[:, None] == moas)).any(1)  # correct, scorable

    correct, scorable = score(moas)
    if not scorable.any():
        raise InputError(f"none of {len(x)} treatments has an admissible neighbour of its own mechanism")
    table = pd.DataFrame({"compound": compounds, "moa": moas, "nearest": nearest, "distance": distance.min(1), "predicted": moas[nearest],
                          "correct": correct, "scorable": scorable})
    scored = table[scorable]
    per_compound = scored.groupby(["compound", "moa"])["correct"].agg(correct="sum", n="size", accuracy="mean").reset_index()
    counts, accuracy = per_compound[["correct", "n"]].to_numpy(), correct[scorable].mean()
    interval = bootstrap(lambda w: (w @ counts)[:, :1] / (w @ counts)[:, 1:], len(counts), seed)[:, 0].tolist()
    _, first, which = np.unique(compounds, return_index=True, return_inverse=True)
    random = np.random.default_rng(seed)
    shuffled = (score(random.permutation(moas[first])[which]) for _ in range(draws))
    null = np.array([right[there].mean() for right, there in shuffled if there.any()])
    return {"accuracy": float(accuracy), "correct": int(correct[scorable].sum()), "n": len(scored), "treatments": table,
            "per_compound": per_compound, "interval": interval, "accuracy_per_compound": float(per_compound["accuracy"].mean()),
            "confusion": pd.crosstab(scored["moa"], scored["predicted"]),
            "null_mean": float(null.mean()), "null_sd": float(null.std()), "p": float((1 + (null >= accuracy).sum()) / (1 + len(null)))}


def score_profiles(wells, features, normalise="z", average="mean", seed=0):
    """{"NSC", "NSCB": what nsc returns, or {"absent": reason}} of well profiles (WELL_COLUMNS and `features`), plates normalised first."""
    features, result = list(features), {}
    if len(twice := wells[wells.duplicated(["plate", "well"])]):
        raise InputError(f"plate {twice['plate'].iloc[0]} well {twice['well'].iloc[0]}: more than one treatment")
    x = normalise_plates(wells[features], wells["plate"], wells["compound"] == "DMSO", normalise)
    t = treatment_profiles(pd.concat([wells[WELL_COLUMNS], pd.DataFrame(x, wells.index, features)], axis=1), features, average)
    for name, weeks in (("NSC", None), ("NSCB", t["batches"])):
        try:
            result[name] = nsc(t[features], t["compound"], t["moa"], weeks, seed)
            result[name]["treatments"].insert(1, "concentration", t["concentration"])
        except InputError as error:
            result[name] = {"absent": str(error)}
    return result


def read_profiles(path, image_csv=None, moa=None):
    """A CSV of well profiles, what --image-csv says of its wells and --moa of its treatments -> table (WELL_COLUMNS, features), names."""
    table = data.read_csv(path)
    features, _, others = data.sort_columns(table.columns)
    about = data.annotate(table).filter(WELL_COLUMNS)
    if not features:  # not CellProfiler's: all that is a number and tells nothing of the well
        others = [c for c in others if c != "n_cells" and data.annotate(table[[c]]).empty]
        features = [c for c in others if pd.to_numeric(table[c], errors="coerce").notna().any()]
    if image_csv and {"plate", "well"} <= set(about):
        image = data.annotate(data.read_csv(image_csv))
        if absent := [c for c in WELL_COLUMNS[:4] if c not in image]:
            raise InputError(f"{image_csv}: lacks {', '.join(absent)}; expected the columns of BBBC021_v1_image.csv")
        about = about[["plate", "well"]].merge(image[WELL_COLUMNS[:4]].drop_duplicates(), "left", ["plate", "well"])
        if unknown := about["compound"].isna().sum():
            raise InputError(f"{image_csv}: does not list {unknown} of the {len(about)} wells of {path}")
    if moa and {"compound", "concentration"} <= set(about):
        known = data.read_moa(moa) | {("DMSO", 0.0): "DMSO"}
        about = about.assign(moa=[known.get((c, float(v)), "unknown") for c, v in zip(about["compound"], about["concentration"])])
    if absent := [c for c in WELL_COLUMNS if c not in about]:
        raise InputError(f"{path}: lacks {', '.join(absent)}; --image-csv names the compound of each well, --moa the mechanisms")
    if not features or (twice := about.duplicated(["plate", "well"]).sum()):
        raise InputError(f"{path}: {f'{twice} rows repeat a well' if features else 'no column is a measurement'}; expected one row a well")
    return pd.concat([about, table[features].apply(pd.to_numeric, errors="coerce")], axis=1), features


# ---------------------------------------------------------------------------------------------------------------------
# Which features survive generation (paper, section 4.2.2): real and generated cells measured in the same way


def feature_table(real, fake, given, treatment, channels, image_norm):
    """One row a feature, the best first: how real and generated cells (frames, n rows) and the input vectors `given` correlate.
    r and spearman over all cells, r within treatments (their means taken off; treatments of one cell left out), r of generated and of real
    cells with the input where names match. `relative`: intensities in units of the cell's own maximum, where image_norm is cell-max."""
    groups = [np.flatnonzero(treatment == t) for t in np.unique(treatment)]

    def within(frame):
        x = frame.to_numpy(copy=True)
        for i in groups:
            n = np.isfinite(x[i]).sum(0)
            x[i] = np.where(n > 1, x[i] - np.nansum(x[i], 0) / np.maximum(n, 1), np.nan)
        return x

    def r(a, b):
        return correlations(np.asarray(a, np.float64), np.asarray(b, np.float64), np.ones((1, len(a))))[0]

    def rows(names):  # a block of columns: the ranks and means of all of them would be gigabytes
        a, b, f = real[names].astype(np.float64), fake[names].astype(np.float64), given.reindex(columns=names)
        both, parts = a.notna() & b.notna(), names.str.split("_")
        a, b = a.where(both), b.where(both)
        return pd.DataFrame({"compartment": parts.str[0], "family": parts.str[1],
                             "channel": ["+".join(p for p in name if p in channels) or "-" for name in parts],
                             "r": r(a, b), "spearman": r(a.rank(), b.rank()), "r within treatments": r(within(a), within(b)),
                             "r of generated with input": r(f, b), "r of real with input": r(f, a), "n": both.sum()}, index=names)

    table = pd.concat([rows(real.columns[j]) for j in batches(real.shape[1], BLOCK)])
    table["relative"] = (image_norm == "cell-max") & (table["family"] == "Intensity") & ~real.columns.str.contains("MassDisplacement")
    return table.sort_values("r", ascending=False, kind="stable").rename_axis("feature")


def claims(table):
    """What the paper says of its Fig 4a, each with whether it is seen here and the numbers: a list of (claim, seen, numbers)."""
    share = (table["r"] > 0.5).mean()
    group = table.groupby(["compartment", "family"])["r"].median().sort_values(ascending=False)
    family = table.groupby("family")["r"].median().sort_values()
    rank = {name: group.index.get_loc(name) + 1 for name in (("Nuclei", "AreaShape"), ("Nuclei", "Intensity"))}
    nuclei, cells = group["Nuclei", "AreaShape"], group["Cells", "AreaShape"]
    return [("over 30 % of the features have r > 0.5", share > 0.3, f"{share:.1%} of {len(table)}"),
            ("shape and intensity of the nucleus survive best", max(rank.values()) <= 3,
             f"median r: shape {nuclei:.2f}, number {rank['Nuclei', 'AreaShape']}, intensity {group['Nuclei', 'Intensity']:.2f}, "
             f"number {rank['Nuclei', 'Intensity']} of {len(group)} groups"),
            ("the distribution of intensity survives worst", family.index[0] == "RadialDistribution",
             "median r: " + ", ".join(f"{k} {v:.2f}" for k, v in family.items())),
            ("the shape of whole cells survives poorly", cells < 0.5 and cells < nuclei, f"median r {cells:.2f}, of nuclei {nuclei:.2f}")]


def print_features(table):
    """The medians by compartment, family and channel, the 20 best and worst features, and what is seen of the paper's claims."""
    print(table.pivot_table(index=["compartment", "family"], columns="channel", values="r", aggfunc="median").to_string(float_format="%.2f", na_rep="-"))
    known = table.dropna(subset="r")
    for (a, p), (b, q) in zip(known["r"].iloc[:20].items(), known["r"].iloc[:-21:-1].items()):
        print(f"  {p:5.2f} {a:55s} {q:5.2f} {b}")
    few = table[~table["relative"]]
    print(f"median r {known['r'].median():.2f}, Spearman {known['spearman'].median():.2f}, within treatments {known['r within treatments'].median():.2f}, "
          f"generated with input {known['r of generated with input'].median():.2f}, real with input {known['r of real with input'].median():.2f}; "
          f"undefined {len(table) - len(known)} of {len(table)}; r > 0.5 without relative intensities {(few['r'] > 0.5).mean():.1%} of {len(few)}")
    for claim, seen, numbers in claims(table):
        print(f"paper: {claim}: {'seen' if seen else 'NOT seen'} ({numbers})")


# ---------------------------------------------------------------------------------------------------------------------
# Who is judged: the generator, beside real cells, retrieval, chance and the mean


def batches(stop, size=256, start=0):
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def by_name(folder, rows):
    """Row numbers sorted by the cells' names: what is drawn from them does not depend on the order of the folder."""
    return rows[np.argsort(folder.cells["cell"].to_numpy()[rows], kind="stable")]


def features_of(folder, rows):
    return model.standardise(*folder.measurements(rows))


def images_of(folder, rows, G):
    x = folder.images(rows)
    if hasattr(folder.patches.base, "madvise"):  # lets the file's pages go, which else count as this process's memory once read
        folder.patches.base.madvise(mmap.MADV_DONTNEED)
    return data.scale_images(x, G.image_norm, G.white)


@torch.no_grad()
def generated(G, folder, rows, device, z=None):
    """What G draws of the given cells, by what it takes: their measurements, their pictures, or noise z (N, latent), then free samples.
    (N, C, 68, 68) in 0..1, on the CPU."""
    given = {"features": lambda: features_of(folder, rows), "images": lambda: images_of(folder, rows, G), "noise": lambda: z}[G.takes]()
    return G(given.to(device)).clamp(0, 1).cpu()


@torch.no_grad()
def represented(G, D, folder, rows, device, test_noise=True):
    """What a baseline knows of the given cells (frame): a VAE's latent means, the activations of a GAN's discriminator before its last
    layer, with the noise on the pictures (its own for each cell) that CytoGAN's code leaves on at test time."""
    found = []
    for i in batches(len(rows)):
        x = images_of(folder, rows[i], G).to(device)
        if G.takes == "images":
            found.append(G.encode(x)[0].cpu())
            continue
        names = folder.cells["cell"].iloc[rows[i]]
        noise = [torch.randn(x[0].shape, generator=torch.Generator().manual_seed(zlib.crc32(n.encode()))) for n in names]
        found.append(D.profile(x, torch.stack(noise).to(device) * test_noise).cpu())
    return pd.DataFrame(torch.cat(found).numpy()).add_prefix("z")


def nearest_training_cell(folder, rows, train):
    """For each cell the training cell whose standardised CP vector is nearest (Euclid): the retrieval baseline. Row numbers (N,)."""
    f = torch.cat([features_of(folder, rows[i]) for i in batches(len(rows))])
    best, nearest = torch.full((len(f),), torch.inf), torch.zeros(len(f), dtype=torch.long)
    for j in batches(len(train), 4096):  # a block of training cells at a time: all of them would be gigabytes
        block = features_of(folder, train[j])
        for i in batches(len(f), 1024):
            distance, k = torch.cdist(f[i], block).min(1)
            nearest[i] = torch.where(distance < best[i], k + j.start, nearest[i])
            best[i] = torch.minimum(distance, best[i])
    return train[nearest.numpy()]


def contestants(G, folder, rows, some, seed, device):
    """Who draws the cells `rows`: {name: function of a slice of them -> pictures (B, C, 68, 68) in 0..1}. "real" is first."""
    train = by_name(folder, folder.rows("train"))
    nearest = nearest_training_cell(folder, rows, train)
    random = np.random.default_rng([seed, 1]).choice(train, len(rows))
    mean = sum(images_of(folder, some[i], G).sum(0) for i in batches(len(some))) / len(some)
    z = None if G.takes == "features" else model.noise(G, len(rows), seed)
    free = {"free samples": lambda i: G.decode(z[i].to(device)).clamp(0, 1).cpu()} if G.takes == "images" else {}
    return {
        "real": lambda i: images_of(folder, rows[i], G),
        "generated": lambda i: generated(G, folder, rows[i], device, None if z is None else z[i]),
        **free,
        "nearest training cell": lambda i: images_of(folder, nearest[i], G),
        "random training cell": lambda i: images_of(folder, random[i], G),
        "mean training image": lambda i: mean.expand(len(rows[i]), -1, -1, -1),
    }


@torch.no_grad()
def look(real, other, D, n, channels, device, engine="ours"):
    """A contestant's pictures of n cells, by batches: pixel and hidden loss from the real ones (n, 2; NaN where D is no learned metric),
    and measurements (frame, float32)."""
    losses, seen = np.empty((n, 2), np.float32), None  # filled, not gathered: small pieces between large ones keep the large from going
    for i in batches(n):
        x, y, hidden = real(i), other(i), torch.full((i.stop - i.start,), torch.nan)
        if isinstance(D, model.Discriminator):
            h, h_other = ([m[:, None] for m in D(v.to(device))[1]] for v in (x, y))
            hidden = torch.vmap(lambda a, b: model.hidden_losses(a, b, x[0].numel()).sum())(h, h_other)  # cell by cell
        losses[i] = torch.stack([torch.vmap(model.pixel_loss)(x[:, None], y[:, None]), hidden.cpu()], 1).numpy()
        values = measurements(y, channels, engine=engine, device=device)
        seen = np.empty((n, values.shape[1]), np.float32) if seen is None else seen
        seen[i] = values
    return losses, pd.DataFrame(seen, columns=values.columns)


# ---------------------------------------------------------------------------------------------------------------------
# The tables: lists of RECORDs, and {what is absent: why}


def found_record(who, seen, seed):
    """In how many of a contestant's pictures (seen: frame, a row each) a nucleus was found: all that free samples share with the cells."""
    found, n = seen.notna().any(axis=1).to_numpy(), len(seen)
    return who, "nucleus found", found.mean(), *bootstrap(lambda w: w @ found[:, None] / n, n, seed)[:, 0], n, "measurements"


def paired_records(who, losses, real, other, seed):
    """How near a contestant's picture comes to the real one of the same cell: losses, and Pearson's r of every measurement."""
    names = ["pixel loss", "hidden loss", "nucleus found", "share r > 0.5", *(f"r {name}" for name in real)]
    extractor, n = ["pixels", "discriminator", *["measurements"] * (len(names) - 2)], len(real)
    real, other = real.to_numpy(), other.to_numpy()
    found = np.isfinite(other).any(1)

    def statistic(weights):
        r = correlations(real, other, weights)
        return np.column_stack([weights @ losses / n, weights @ found / n, (r > 0.5).mean(1), r])  # undefined r stay in the share

    value, interval = statistic(np.ones((1, n)))[0], bootstrap(statistic, n, seed)
    counts = [n, n, n, n, *(np.isfinite(real) & np.isfinite(other)).sum(0)]
    return list(zip([who] * len(names), names, value, *interval, counts, extractor))


def distance_records(features, draw, frechet, suffix, extractor, subset, seed):
    """Distances from the reference to each contestant: features(who, half) -> (n, d), of half 0 (the real ones: reference) or 1 (judged).
    Those of "real" are the floor. No bootstrap: cells drawn twice would raise a Fréchet distance; its spread is that between seeds."""
    records, absent, reference, floor = [], {}, features("real", 0), np.nan
    for who in draw:
        try:
            real, fake = check_sets(reference, features(who, 1), least=20)
            mean, sd = kid(real, fake, subset, seed=seed)
        except InputError as error:
            absent[f"{frechet}{suffix} of {who}"] = str(error)
            continue
        distance = frechet_distance(real, fake)
        floor = distance if who == "real" else floor
        values = {frechet: distance, f"{frechet} minus floor": distance - floor, f"{frechet} infinity": fid_infinity(real, fake)[0],
                  "KID": mean, "KID sd": sd} | precision_recall_density_coverage(real, fake)
        records += [(who, name + suffix, v, np.nan, np.nan, len(fake), extractor) for name, v in values.items()]
    return records, absent


def moa_records(who, scores):
    """Rows of the tables from what score_profiles found: RECORDs, what is absent, and a list of frames, one row a treatment."""
    records, absent, treatments = [], {}, []
    for name, s in scores.items():
        if "absent" in s:
            absent[f"{name} of {who}"] = s["absent"]
            continue
        treatments.append(s["treatments"].assign(who=who, score=name))
        null = s["null_mean"], s["null_mean"] - s["null_sd"], s["null_mean"] + s["null_sd"]
        for what, values, n in ((name, (s["accuracy"], *s["interval"]), s["n"]), (f"{name} of permuted labels", null, s["n"]),
                                (f"{name} per compound", (s["accuracy_per_compound"], np.nan, np.nan), len(s["per_compound"])),
                                (f"{name} p", (s["p"], np.nan, np.nan), s["n"])):
            records.append((who, what, *values, n, "profiles"))
    return records, absent, treatments


def judge(G, D, folder, rows, seed, device, net=None, subset=None, engine="ours", test_noise=True):
    """Everything about one generator on the cells `rows` (see choose_cells).
    Returns the table of RECORDs, {what is absent: why}, treatments, notes, and (feature_table, its six best columns, real and generated),
    which a GAN does not have: its free samples are not of these cells.
    Beside the measurements of the real cells those of one contestant are held at a time: 170 MB each for 48,800 cells."""
    some = np.random.default_rng([seed, 2]).permutation(by_name(folder, folder.rows("train")))[:TRAIN_SAMPLE]
    draw, half = contestants(G, folder, rows, some, seed, device), len(rows) // 2
    if half >= 20:
        known = [measurements(images_of(folder, some[i], G), folder.channels, engine=engine, device=device) for i in batches(len(some))]
        known = pd.concat(known).dropna(how="all")
        space = fit_cp_space(known, min(30, half // 20))

    cells, given = folder.cells[WELL_COLUMNS].iloc[rows].reset_index(drop=True), pd.DataFrame(folder.raw[rows], columns=folder.features)
    wells, paired, points, absent = {"input CP vectors": well_profiles(cells, given).drop(columns="n_cells")}, [], {}, {}
    if G.takes != "features":
        wells["representation"] = well_profiles(cells, represented(G, D, folder, rows, device, test_noise)).drop(columns="n_cells")
        wells[BARE] = wells["representation"]
    real = survived = None
    for who in draw:
        losses, seen = look(draw["real"], draw[who], D, len(rows), folder.channels, device, engine)
        real = seen if real is None else real
        found = seen.notna().any(axis=1)
        is_free = who == "free samples" or who == "generated" and G.takes == "noise"
        paired += [found_record(who, seen, seed)] if is_free else paired_records(who, losses, real, seen, seed)
        usual = seen.columns[seen.notna().sum() / found.sum() >= 0.95]  # some measurements are never defined
        wells[who] = well_profiles(cells[found], seen)[[*WELL_COLUMNS, *usual]]
        if is_free:
            absent[f"pairs of {who}"] = "free samples are of no particular cell"
        elif who == "generated":
            features = feature_table(real, seen, given, folder.treatment[rows], folder.channels, G.image_norm)
            survived = features, real[features.index[:6]], seen[features.index[:6]]
        points[who] = [in_cp_space(seen[i][found[i]], space) for i in (slice(half), slice(half, 2 * half)) if half >= 20]
        del seen  # before the next is measured
    del real, given

    results, treatments, left_out, notes = [(paired, absent)], [], {}, {}
    if half < 20:
        results.append(([], {"FID, FD-CP and their relatives": f"{half} cells on each side, 20 are needed"}))
    else:
        def in_inception(who, side, pick):
            pictures = (model.to_uint8(draw[who](i)).numpy()[:, pick] for i in batches((side + 1) * half, start=side * half))
            return np.concatenate([inception_features(net, x) for x in pictures])

        results.append(distance_records(lambda who, side: points[who][side], points, "FD", f"-CP{len(space['axes'])}", "measurements",
                                        subset, seed))
        views = {f" {c}": [k, k, k] for k, c in enumerate(folder.channels)} | ({"": [0, 1, 2]} if len(folder.channels) == 3 else {})
        for suffix, pick in views.items() if net else []:
            results.append(distance_records(partial(in_inception, pick=pick), draw, "FID", suffix, "inception", subset, seed))
        notes = {"cells a side": half, "reference cells measured": len(points["real"][0]),
                 "training cells measured": f"{len(known)} of {len(some)}", "measurements": list(known), "dropped": space["dropped"]}
    for who, table in wells.items():
        table, how = table.dropna(), "none" if who == BARE else "z"
        scaled = (table["compound"] == "DMSO").groupby(table["plate"]).transform("sum") >= 2
        if how == "z" and scaled.any() and not scaled.all():  # with none, the reason of score_profiles
            left_out[who] = {"wells": int((~scaled).sum()), "plates": sorted(set(table["plate"][~scaled]))}
            table = table[scaled]
        try:
            scores = score_profiles(table, table.columns.drop(WELL_COLUMNS), how, seed=seed)
        except InputError as error:
            scores = dict.fromkeys(("NSC", "NSCB"), {"absent": str(error)})
        *result, more = moa_records(who, scores)
        results.append(result)
        treatments += more
    notes["left out of NSC"] = left_out
    records, absent = sum((list(r) for r, _ in results), []), {k: v for _, why in results for k, v in why.items()}
    return pd.DataFrame(records, columns=RECORD), absent, treatments, notes, survived


def compare_runs(labels, tables, kinds):
    """A row for each model (or baseline) and quantity: mean and sd (ddof 1) over its runs, all values, the paper's; and as Markdown.
    kinds: {label: the model's name in PUBLISHED}. The baselines are those of the first run."""
    own = ("generated", "free samples", "representation", BARE)
    name = lambda label: lambda who: label if who == "generated" else f"{label} {who}"
    parts = [t[t["who"].isin(own)].assign(who=lambda f: f["who"].map(name(label))) for label, t in zip(labels, tables)]
    long = pd.concat([*parts, tables[0][~tables[0]["who"].isin(own)]]).groupby(["who", "quantity"], sort=False).agg(
        mean=("value", "mean"), sd=("value", "std"), runs=("value", "count"), n=("n", "min"),
        values=("value", lambda v: " ".join(f"{x:.6g}" for x in v))).reset_index()
    kind_of = {name(label)(what): name(kind)(what) for label, kind in kinds.items() for what in own}
    published = {who: PUBLISHED.get(kind_of.get(who, who), {}) for who in long["who"]}
    long["paper, not comparable"] = [published[who].get(quantity, "") for who, quantity in zip(long["who"], long["quantity"])]
    text = [f"{m:.4g}" + (f" ± {s:.2g}" if np.isfinite(s) else "") + (f" (n {n})" if q.startswith("NSC") else "") if np.isfinite(m) else "-"
            for m, s, n, q in zip(long["mean"], long["sd"], long["n"], long["quantity"])]
    lines = []
    for title, pattern in TABLES.items():
        some = long.assign(text=text)[long["quantity"].str.fullmatch(pattern)]
        if not len(some):
            lines.append(f"{title}: nothing of it was measured\n\n")
            continue
        wide = some.pivot(index="who", columns="quantity", values="text")
        wide = wide.reindex(index=some["who"].unique(), columns=some["quantity"].unique()).fillna("-")
        wide.insert(0, "runs", long.groupby("who")["runs"].max())
        wide["paper, not comparable"] = ["; ".join(f"{k} {v}" for k, v in published[who].items() if re.fullmatch(pattern, k)) for who in wide.index]
        table = [["model", *wide.columns], ["---"] * (wide.shape[1] + 1), *wide.reset_index().to_numpy()]
        lines += [f"{title}, from these runs:\n\n", *(f"| {' | '.join(map(str, line))} |\n" for line in table), "\n"]
    return long, "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def open_run(folder, run, device):
    """A generator, the discriminator it was trained by, its settings, its checkpoint and the run's name without -seed<n>.
    `run`: a run's folder or a checkpoint file. InputError if it was not trained on the folder."""
    checkpoint = Path(run, "last.pt") if Path(run).is_dir() else Path(run)
    G = model.load(checkpoint, device)
    if G.features != folder.features or G.identity != folder.identity:
        raise InputError(f"{checkpoint}: was trained on another prepared folder than {folder.path} (other features or checksums); "
                         "give the --data of that run")
    return G, model.load_metric(checkpoint, device), model.read_checkpoint(checkpoint)["settings"], checkpoint, \
        re.sub(r"-seed\d+$", "", checkpoint.resolve().parent.name)


def choose_cells(folder, split, n, seed):
    """Row numbers of a split in an order given by the seed and the cells' names, at most 2 n: first the reference half, then the judged."""
    return np.random.default_rng(seed).permutation(by_name(folder, folder.rows(split)))[:2 * n]


def write_results(out, about, table, absent, treatments, survived=None):
    """metrics.json, metrics.csv, metrics.png, features.csv (feature_table), and moa.csv (one row a treatment) where mechanisms were scored."""
    out.mkdir(parents=True, exist_ok=True)
    nested = {who: {} for who in table["who"]}
    for who, quantity, *values, n, extractor in table.itertuples(index=False):
        value, *interval = (float(f"{v:.6g}") if np.isfinite(v) else None for v in values)
        nested[who][quantity] = {"value": value, "interval": interval, "n": int(n), "extractor": extractor}
    if survived:
        data.write(out / "features.csv", survived[0].to_csv(float_format="%.6g"))
        about["claims of the paper"] = [{"claim": c, "seen": bool(seen), "numbers": numbers} for c, seen, numbers in claims(survived[0])]
    data.write(out / "metrics.json", json.dumps({"about": about, "absent": absent, "results": nested}, indent=1) + "\n")
    data.write(out / "metrics.csv", table.assign(split=about["split"], seed=about["seed"]).to_csv(index=False, float_format="%.6g"))
    if treatments:
        data.write(out / "moa.csv", pd.concat(treatments).to_csv(index=False, float_format="%.6g"))
    draw_plots(out / "metrics.png", table, treatments, survived)


def draw_plots(path, table, treatments, survived=None):
    """Fig 4a (sorted r of every measurement), the confusion matrix of one NSC, of the generated cells where there is one, and Fig 4b (real
    against generated cells in the six features that survive best), as a PNG; undefined r are left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plots: matplotlib is not installed; the numbers are complete")
    figure = Figure((14, 9 if survived else 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1)) if survived else (figure, None)
    pearson = table[table["quantity"].str.startswith("r ") & (table["who"] != "real")].dropna(subset="value")
    panels = iter(np.ravel(upper.subplots(1, (len(pearson) > 0) + bool(treatments))))
    if len(pearson):
        left = next(panels)
        for who, rows in pearson.groupby("who", sort=False):
            left.plot(np.sort(rows["value"])[::-1], label=who)
        left.axhline(0.5, color="grey", lw=0.5)
        left.set(xlabel="feature, sorted", ylabel="Pearson's r with the real cell", ylim=(-0.5, 1))
        left.legend()
    for t in sorted(treatments, key=lambda t: (t["who"].iloc[0] != "generated", t["score"].iloc[0]))[:1]:
        right, confusion = next(panels), pd.crosstab(t["moa"][t["scorable"]], t["predicted"][t["scorable"]])
        right.set(xlabel="predicted", ylabel="mechanism", title=f"NSC of {t['who'].iloc[0]}: treatments")
        figure.colorbar(right.imshow(confusion, cmap="Blues"))
        right.set_xticks(range(confusion.shape[1]), confusion.columns, rotation=90)
        right.set_yticks(range(len(confusion)), confusion.index)
    if survived:
        features, real, fake = survived
        for panel, name in zip(lower.subplots(1, 6), features.index[:6]):
            panel.plot(real[name], fake[name], ".", ms=2)
            panel.axline((real[name].median(),) * 2, slope=1, color="grey", lw=0.5)
            panel.set_title(f"{name}\nr {features['r'][name]:.2f}, n {features['n'][name]}", fontsize=6)
            panel.set_xlabel("real", fontsize=6), panel.set_ylabel("generated", fontsize=6), panel.tick_params(labelsize=5)
    figure.savefig(path, dpi=80)


def print_report(table, absent):
    """The table of values, what is absent and why, and whether the generator beats retrieval."""
    wide = table.pivot(index="quantity", columns="who", values="value").reindex(table["quantity"].unique())[list(table["who"].unique())]
    pearson = wide.index.str.startswith("r ")
    shown = wide if pearson.sum() <= 20 else wide[~pearson]
    print(shown.to_string(float_format=lambda v: f"{v:.4f}" if abs(v) < 10 else f"{v:.1f}", na_rep="-"))
    for reason in dict.fromkeys(absent.values()):
        print(f"absent: {', '.join(k for k, v in absent.items() if v == reason)}: {reason}")
    if "pixel loss" not in wide.index or pd.isna(wide["generated"]["pixel loss"]):
        return print("the generator draws free samples: no cell to hold each against; see the distances")
    ahead = wide["generated"] - wide["nearest training cell"]
    ahead["pixel loss"] *= -1
    lost = [q for q in ["pixel loss", *wide.index[pearson]] if not ahead[q] > 0]
    print(f"the generator does NOT beat retrieval on {len(lost)} of {pearson.sum() + 1}: {', '.join(lost[:10])}" if lost else
          "the generator beats retrieval everywhere")


def score_table(args):
    """--profiles: NSC and NSCB of any table of well profiles."""
    table, features = read_profiles(args.profiles, args.image_csv, args.moa)
    scores = score_profiles(table, features, args.normalise, args.average, args.seed)
    records, absent, treatments = moa_records("profiles", scores)
    print(f"{args.profiles}: {len(table)} wells, {table['plate'].nunique()} plates, {len(features)} features; plates scaled by their DMSO "
          f"wells: {args.normalise}; treatments by {args.average}; cosine, 1 nearest neighbour")
    for name, s in scores.items():
        if "absent" not in s:
            print(s["confusion"].to_string() + "\n" if name == "NSC" else "", end="")
            print(f"{name} {s['correct']}/{s['n']} = {s['accuracy']:.1%} (95 % {s['interval'][0]:.1%} to {s['interval'][1]:.1%}), "
                  f"per compound {s['accuracy_per_compound']:.1%}; permuted labels {s['null_mean']:.1%} ± {s['null_sd']:.1%}, "
                  f"p {s['p']:.3f}")
    print("".join(f"absent: {what}: {why}\n" for what, why in absent.items()), end="")
    if args.out:
        about = {"profiles": args.profiles, "wells": len(table), "features": len(features), "normalise": args.normalise,
                 "average": args.average, "split": "all", "seed": args.seed}
        write_results(Path(args.out), about, pd.DataFrame(records, columns=RECORD), absent, treatments)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", help="a run's folder (its last.pt is used) or a checkpoint file, RUN/best.pt")
    what.add_argument("--runs", metavar="RUN", nargs="+", help="runs named <model>-seed<n>: mean ± sd over seeds, models side by side")
    what.add_argument("--profiles", metavar="TABLE", help="score a CSV of well profiles instead; needs no run")
    add("--split", default="test", choices=["train", "val", "test"], help="which cells are judged (default test)")
    add("--out", metavar="DIR", help="where the results go (default RUN/eval; needed with --runs)")
    add("--device", default="auto", help="cuda or cpu (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the reference half, the shown cells, the subsets and the intervals (default 0)")
    add("--n", type=int, default=10_000, metavar="CELLS", help="cells a side, reference and judged (default 10000, or half of the split)")
    add("--inception", metavar="FILE", help="pytorch-fid's weights, or the word download: FID and KID too (default: FD-CP and KID-CP only)")
    add("--subset", type=int, metavar="CELLS", help="cells in each of KID's 100 subsets (default 1000, or half of the cells)")
    add("--engine", choices=list(ENGINES), default="ours", help="who measures the pictures: ours, or the package cp_measure (default ours)")
    add("--test-noise", choices=["on", "off"], default="on", help="GANs: noise on the pictures that are represented, as CytoGAN's code (default on)")
    add("--grid", type=int, default=13, metavar="N", help="cells in grid.png, originals above one row a model (default 13)")
    add("--image-csv", metavar="FILE", help="with --profiles: BBBC021_v1_image.csv, which compound each well has")
    add("--moa", metavar="FILE", help="with --profiles: BBBC021_v1_moa.csv, the mechanism of each treatment")
    add("--normalise", choices=["z", "percentile", "mad", "none"], default="z", help="with --profiles: plates, by DMSO wells (default z)")
    add("--average", choices=["mean", "median"], default="mean", help="with --profiles: wells to treatments (default mean)")
    args = parser.parse_args(argv)
    if not args.profiles and not args.data or args.runs and not args.out:
        parser.error("--run and --runs need --data DIR, --runs also --out DIR")
    for name, least in (("n", 1), ("subset", 2), ("grid", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected {least} or more")
    return args


def main(argv=None):
    args = parse(argv)
    if args.profiles:
        return score_table(args)
    device, folder = data.pick_device(args.device), data.open_folder(args.data)
    opened = [open_run(folder, run, device) for run in args.runs or [args.run]]
    if len({(name, settings["seed"]) for _, _, settings, _, name in opened}) < len(opened) or len({G.image_norm for G, *_ in opened}) > 1:
        raise InputError("--runs: expected one --image-norm, and different seeds for each model (folder name without -seed<n>)")
    rows = choose_cells(folder, args.split, args.n, args.seed)
    if args.subset and args.subset > len(rows) // 2:
        raise InputError(f"--subset {args.subset}: larger than the {len(rows) // 2} cells on each side")
    net = load_inception(args.inception, device) if args.inception else None
    no_fid = {} if net else {"FID, KID": "--inception FILE was not given; the distances are between measurements of the pictures (CP)"}
    out = Path(args.out or opened[0][3].parent / "eval")

    tables, kinds, pictures = [], {}, {"original": images_of(folder, rows[:args.grid], opened[0][0])}
    for G, D, settings, checkpoint, name in opened:
        table, absent, treatments, notes, survived = judge(G, D, folder, rows, args.seed, device, net, args.subset, args.engine,
                                                           args.test_noise == "on")
        about = {"data": str(args.data), "checkpoint": str(checkpoint), "step": G.step, "settings": settings, "split": args.split,
                 "seed": args.seed, "cells": len(rows), "channels": folder.channels, "inception": INCEPTION_SHA256 if net else None, "engine": args.engine,
                 "interval": "95 %, 1000 bootstrap draws of cells; NSC: of compounds; permuted labels: ± sd",
                 "floor": "the distances of real: real cells of the judged half from those of the reference half", **notes}
        print(f"{checkpoint} at step {G.step}, {len(rows)} {args.split} cells of {args.data}, {len(rows) // 2} on each side of a distance; "
              "r = Pearson against the real cell")
        if left := notes["left out of NSC"]:
            print("left out of NSC, on plates with fewer than two DMSO wells: "
                  + "; ".join(f"{who} {v['wells']} wells ({', '.join(v['plates'])})" for who, v in left.items()))
        write_results(out / f"{name}-seed{settings['seed']}" if args.runs else out, about, table, no_fid | absent, treatments, survived)
        if survived:
            print_features(survived[0])
        print_report(table, no_fid | absent)
        tables.append(table)
        kinds[name] = settings["model"]
        z = None if G.takes == "features" else model.noise(G, len(rows[:args.grid]), args.seed)
        pictures.setdefault(name if G.takes != "noise" else f"{name}, free samples", generated(G, folder, rows[:args.grid], device, z))

    Image.fromarray(data.tile([data.composite(x) for x in pictures.values()])).save(out / "grid.png")
    shown = folder.cells["cell"].iloc[rows[:args.grid]].tolist()
    data.write(out / "grid.json", json.dumps({"rows": list(pictures), "cells": shown}, indent=1) + "\n")
    if args.runs:
        long, text = compare_runs([name for *_, name in opened], tables, kinds)
        data.write(out / "comparison.csv", long.to_csv(index=False, float_format="%.6g"))
        title = f"{len(rows)} {args.split} cells of {args.data}, seed {args.seed}; ± sd (ddof 1) over runs"
        data.write(out / "comparison.md", f"{title}\n\n{text}")
        print(text, end="")
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, model.InputError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
