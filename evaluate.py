"""Judge a trained generator on cells it has not seen: losses, and what can be measured in the pictures, beside simple baselines.

    python evaluate.py --data out/ --run runs/cp2image-seed0

Reads a prepared folder and a run (its last.pt; or name a file, RUN/best.pt). Writes OUT/metrics.json, OUT/metrics.csv and
OUT/grid.png (real cells, below them the generated ones). Equal calls write equal bytes.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import ndimage

import data
import model


# ---------------------------------------------------------------------------------------------------------------------
# What can be measured in a picture


def otsu(values):
    """The threshold that best parts values in 0..1 into two classes (Otsu 1979), over 256 bins; NaN where all are equal."""
    count, edges = np.histogram(values, 256, (0, 1))
    centre = (edges[:-1] + edges[1:]) / 2
    below, total = count.cumsum(), (count * centre).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below))
    return centre[np.nanargmax(between)] if np.isfinite(between).any() else np.nan


def central_nucleus(dapi):
    """A mask (H, W) of the nucleus in the middle of a DAPI picture (H, W) in 0..1: the thresholded, filled object nearest to the centre.

    None where there is no object of at least 50 pixels within 12 pixels of the centre, or it fills over half of the picture.
    """
    smooth = ndimage.gaussian_filter(dapi, 1)
    labels, n = ndimage.label(ndimage.binary_opening(smooth > otsu(smooth), iterations=2))
    if not n:
        return None
    middle = (np.array(dapi.shape) - 1) / 2
    distance = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    row, col = distance[1][:, int(middle[0]), int(middle[1])]
    mask = ndimage.binary_fill_holes(labels == labels[row, col])
    far = distance[0][int(middle[0]), int(middle[1])]
    return mask if far <= 12 and 50 <= mask.sum() <= mask.size / 2 else None


def quantities(x, channels):
    """A few plain measurements of pictures (N, C, H, W) in 0..1 -> frame (N rows); the nucleus' columns are NaN where none is found.

    Mean and sd of each channel over the picture; area (pixels), mean DAPI, and the direction of the nucleus as two numbers in -1..1:
    upright (tall +1, wide -1) and slanted (down-right +1, up-right -1), both 0 for a round one.
    """
    x = np.asarray(x, np.float64)
    out = pd.DataFrame({f"mean {c}": x[:, k].mean((1, 2)) for k, c in enumerate(channels)} | {f"sd {c}": x[:, k].std((1, 2)) for k, c in enumerate(channels)})
    nucleus = np.full((len(x), 4), np.nan)
    for i, dapi in enumerate(x[:, 0]):
        mask = central_nucleus(dapi)
        if mask is not None:
            row, col = np.nonzero(mask)
            (rr, rc), (_, cc) = np.cov(row, col)
            nucleus[i] = mask.sum(), dapi[mask].mean(), (rr - cc) / (rr + cc), 2 * rc / (rr + cc)
    out[["nucleus area", f"nucleus mean {channels[0]}", "nucleus upright", "nucleus slanted"]] = nucleus
    return out


def correlation(a, b):
    """Pearson's r of two arrays over the pairs where both are finite, and their number; r is NaN below 3 pairs or without spread."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = np.asarray(a)[both], np.asarray(b)[both]
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan"), len(a)
    return float(np.corrcoef(a, b)[0, 1]), len(a)


# ---------------------------------------------------------------------------------------------------------------------
# What the generator is compared with


def features_of(folder, rows):
    return model.standardise(*folder.measurements(rows))


def images_of(folder, rows, G):
    return data.scale_images(folder.images(rows), G.image_norm, G.white)


@torch.no_grad()
def generated(G, folder, rows, device):
    """G's pictures of the given cells from their measurements: (N, C, 68, 68) in 0..1, on the CPU."""
    return G(features_of(folder, rows).to(device)).clamp(0, 1).cpu()


def nearest_training_cell(folder, rows, train):
    """For each cell the training cell whose standardised CP vector is nearest (Euclid): the retrieval baseline. Row numbers (N,)."""
    reference = features_of(folder, train)
    return train[torch.cat([torch.cdist(features_of(folder, rows[i]), reference).argmin(1) for i in batches(len(rows))]).numpy()]


def batches(n, size=256):
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def contestants(G, folder, rows, seed, device):
    """Who draws the cells `rows`: {name: function of a slice of them -> pictures (B, C, 68, 68) in 0..1}. "real" is first."""
    train = folder.rows("train")
    nearest = nearest_training_cell(folder, rows, train)
    random = np.random.default_rng([seed, 1]).choice(train, len(rows))
    some = train[np.sort(np.random.default_rng(seed).permutation(len(train))[:2000])]
    mean = sum(images_of(folder, some[i], G).sum(0) for i in batches(len(some))) / len(some)
    return {
        "real": lambda i: images_of(folder, rows[i], G),
        "generated": lambda i: generated(G, folder, rows[i], device),
        "nearest training cell": lambda i: images_of(folder, nearest[i], G),
        "random training cell": lambda i: images_of(folder, random[i], G),
        "mean training image": lambda i: mean.expand(len(rows[i]), -1, -1, -1),
    }


@torch.no_grad()
def compare(draw, D, n, channels, device):
    """Losses and correlations of each contestant's pictures of n cells against the real ones, a batch at a time -> frame, a column each."""
    losses, seen = {name: 0.0 for name in draw}, {name: [] for name in draw}
    for i in batches(n):
        x = draw["real"](i)
        h = D(x.to(device))[1]
        for name in draw:
            other = draw[name](i)
            seen[name].append(quantities(other, channels))
            hidden = model.hidden_losses(h, D(other.to(device))[1], x[0].numel())
            losses[name] += np.array([float(model.pixel_loss(x, other)), float(hidden.sum())]) * len(x)
    seen = {name: pd.concat(parts, ignore_index=True) for name, parts in seen.items()}
    columns = {}
    for name in draw:
        pix, hidden = losses[name] / n
        columns[name] = {"pixel loss": pix, "hidden loss": hidden, "nucleus found": seen[name]["nucleus area"].notna().mean()}
        columns[name] |= {f"r {q}": correlation(seen["real"][q], seen[name][q])[0] for q in seen[name]}
    return pd.DataFrame(columns)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def find_checkpoint(run):
    """The checkpoint file of --run, a run's folder or a file, and the run's folder."""
    run = Path(run)
    return (run / "last.pt", run) if run.is_dir() else (run, run.parent)


def open_both(data_dir, run, device):
    """A prepared folder and a generator trained on it; InputError if they do not belong together. Returns folder, G, checkpoint, run folder."""
    folder = data.open_folder(data_dir)
    checkpoint, run = find_checkpoint(run)
    G = model.load(checkpoint, device)
    if G.features != folder.features or G.identity != folder.identity():
        raise data.InputError(f"{checkpoint}: was trained on another prepared folder than {data_dir} (other features or checksums); give the --data of that run")
    return folder, G, checkpoint, run


def pick_device(name):
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def write_atomically(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
    add("--run", required=True, metavar="RUN", help="a run's folder (its last.pt is used) or a checkpoint file, RUN/best.pt")
    add("--split", default="test", choices=["train", "val", "test"], help="which cells are judged (default test)")
    add("--out", metavar="DIR", help="where the results go (default RUN/eval)")
    add("--device", default="auto", help="cuda or cpu (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the shown cells and of the random baseline (default 0)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    folder, G, checkpoint, run = open_both(args.data, args.run, device)
    D = model.load_metric(checkpoint, device)
    rows = folder.rows(args.split)
    out = Path(args.out or run / "eval")
    out.mkdir(parents=True, exist_ok=True)

    table = compare(contestants(G, folder, rows, args.seed, device), D, len(rows), folder.channels, device)
    about = {"data": str(args.data), "checkpoint": str(checkpoint), "step": G.step, "split": args.split, "n": len(rows), "seed": args.seed,
             "channels": folder.channels, "images": G.image_norm}
    results = {name: {k: v if np.isfinite(v) else None for k, v in column.items()} for name, column in table.to_dict().items()}
    write_atomically(out / "metrics.json", json.dumps({"about": about, "results": results}, indent=1) + "\n")
    write_atomically(out / "metrics.csv", table.to_csv(index_label="quantity", float_format="%.6g"))

    shown = np.sort(np.random.default_rng(args.seed).permutation(len(rows))[:26])
    real, fake = data.composite(images_of(folder, rows[shown], G)), data.composite(generated(G, folder, rows[shown], device))
    Image.fromarray(data.tile([part for i in range(0, len(shown), 13) for part in (real[i:i + 13], fake[i:i + 13])])).save(out / "grid.png")

    print(f"{checkpoint} at step {G.step}, {len(rows)} {args.split} cells of {args.data}; r = Pearson against the real cells, nan = undefined")
    print(table.to_string(float_format=lambda v: f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"))
    paired = ["pixel loss"] if table.loc["pixel loss", "generated"] >= table.loc["pixel loss", "nearest training cell"] else []
    paired += [k for k in table.index if k.startswith("r ") and not table.loc[k, "generated"] > table.loc[k, "nearest training cell"]]
    print("the generator beats retrieval everywhere" if not paired else f"the generator does NOT beat retrieval on: {', '.join(paired)}")
    print(f"written to {out}: metrics.json, metrics.csv, grid.png")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
