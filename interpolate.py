"""Move a measurement and look at the cell: a strip of pictures of one cell along one CellProfiler feature, everything else fixed.

    python interpolate.py sweep --data out/ --run runs/cp2image-seed0 --feature Nuclei_AreaShape_Area
    python interpolate.py sweep --table export/ --run runs/cp2image-seed0/last.pt --feature Nuclei_AreaShape_Area     # anyone's cells

Reads a prepared folder, or any table of CellProfiler measurements (data.read_table), and a run. Writes OUT/sweep_<feature>.png (the
strip, each value in CellProfiler's units below its picture) and OUT/sweep_<feature>.json (the values).
"""
import argparse
import difflib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

import data
import model


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def feature_index(name, features):
    """The place of a feature by its name; InputError with the nearest names, or why it was left out of the folder."""
    if name in features:
        return features.index(name)
    near = difflib.get_close_matches(name, features, 5, 0.3) or features[:5]
    raise data.InputError(f"--feature {name}: not among the model's {len(features)} features; nearest: {', '.join(near)}")


def typical_cell(folder, rows):
    """The row number of the cell whose standardised CP vector is closest (Euclid) to the mean of the cells `rows`; in chunks."""
    mean = sum(model.standardise(*folder.measurements(c)).sum(0) for c in np.array_split(rows, -(-len(rows) // 4096))) / len(rows)
    far = [(model.standardise(*folder.measurements(c)) - mean).norm(dim=1) for c in np.array_split(rows, -(-len(rows) // 4096))]
    return int(rows[int(torch.cat(far).argmin())])


def sweep(G, folder, cell, feature, values):
    """Pictures (n, C, 68, 68) in 0..1 of one cell with one feature set to each of `values` (CellProfiler's units), all else fixed."""
    raw, centre, scale = folder.measurements(np.full(len(values), cell))
    raw = raw.double()
    raw[:, feature] = torch.as_tensor(values, dtype=torch.float64)
    with torch.no_grad():
        return G(model.standardise(raw, centre, scale).to(next(G.parameters()).device)).clamp(0, 1).cpu()


def sweep_table(G, table, cell, name, values):
    """As `sweep`, for row `cell` of a table of measurements (data.read_table); with plate-dmso the table's DMSO rows set the scale."""
    edited = table.iloc[[cell] * len(values)].assign(**{name: values})
    if G.normalise == "plate-dmso":
        reference = table[(table["compound"].str.upper() == "DMSO") & (table["plate"] == table["plate"].iloc[cell])]
        edited = pd.concat([edited.assign(compound="edited"), reference])
    return model.generate(G, edited, as_uint8=False)[:len(values)]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def strip(x, labels, title, zoom=2):
    """Pictures (n, C, H, W) in 0..1 as one row of composites, and below it one row a channel in grey; a label under each: a PIL image."""
    grey = [(x[:, k, :, :, None].clamp(0, 1) * 255).round().byte().expand(-1, -1, -1, 3).numpy() for k in range(x.shape[1])]
    body = data.tile([data.composite(x), *grey], zoom)
    top, bottom = 14, 14
    picture = Image.new("RGB", (body.shape[1], body.shape[0] + top + bottom))
    picture.paste(Image.fromarray(body), (0, top))
    draw = ImageDraw.Draw(picture)
    draw.text((3, 1), title, fill="white")
    for i, label in enumerate(labels):
        draw.text((3 + i * (x.shape[3] * zoom + 2), top + body.shape[0] + 1), label, fill="white")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("sweep", help="one feature from low to high, everything else fixed")
    add = one.add_argument
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR", help="the prepared folder of the run (prepare_bbbc021.py --out)")
    source.add_argument("--table", metavar="FILE", help="other cells: CellProfiler's CSV folder or SQLite file, or a CSV with its prefixed names")
    add("--run", required=True, metavar="RUN", help="a run's folder (its last.pt is used) or a checkpoint file, RUN/best.pt")
    add("--feature", required=True, metavar="NAME", help="CellProfiler name, e.g. Nuclei_AreaShape_Area")
    add("--cell", metavar="KEY", help="the cell to edit, by its name (default: the one closest to the mean of the split or table)")
    add("--split", default="test", choices=["train", "val", "test"], help="where the default cell is looked for (default test)")
    add("--steps", type=int, default=7, help="pictures in the strip (default 7)")
    add("--low", type=float, help="first value, CellProfiler's units (default: 1st percentile of the training cells or of the table)")
    add("--high", type=float, help="last value, CellProfiler's units (default: 99th percentile of the training cells or of the table)")
    add("--out", metavar="DIR", help="where the results go (default RUN/interpolate)")
    add("--device", default="cpu", help="cuda or cpu (default cpu)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}, expected 2 or more")
    return args


def main(argv=None):
    args = parse(argv)
    folder, run = data.open_folder(args.data) if args.data else None, Path(args.run)
    checkpoint, run = (run / "last.pt", run) if run.is_dir() else (run, run.parent)
    G = model.load(checkpoint, args.device)
    if folder and (G.features != folder.features or G.identity != folder.identity()):
        raise data.InputError(f"{checkpoint}: was trained on another prepared folder than {args.data} (other features or checksums); give the --data of that run")
    dropped = folder and folder.meta["dropped"].get(args.feature)
    if dropped:
        raise data.InputError(f"--feature {args.feature}: was left out when {args.data} was prepared ({dropped})")
    j = feature_index(args.feature, G.features)
    if folder:
        info, column, reference = folder.cells, np.array(folder.raw[:, j]).astype(np.float64), folder.rows("train")
    else:
        info = data.read_table(args.table, G.channels[0])
        table = info[[c for c in info if c in {*G.features, "plate", "compound"}]]
        z = model.standardise_table(G, table)  # refuses a table that lacks features
        column, reference = table[args.feature].to_numpy(np.float64), np.arange(len(info))
    if args.cell:
        found = np.flatnonzero(info["cell"] == args.cell)
        if not len(found):
            raise data.InputError(f"--cell {args.cell}: not in {args.data or args.table}, whose first is {info['cell'].iloc[0]}")
        cell = int(found[0])
    else:
        cell = typical_cell(folder, folder.rows(args.split)) if folder else int((z - z.mean(0)).norm(dim=1).argmin())

    whose = "training cells" if folder else "table's cells"
    known, own, info = np.sort(column[reference][np.isfinite(column[reference])]), float(column[cell]), info.iloc[cell]
    if not len(known):
        raise data.InputError(f"{args.table}: no cell has a value of {args.feature}")
    values = np.linspace(np.quantile(known, 0.01) if args.low is None else args.low, np.quantile(known, 0.99) if args.high is None else args.high, args.steps)
    percentile = 100 * np.searchsorted(known, values) / len(known)
    x = sweep(G, folder, cell, j, values) if folder else sweep_table(G, table, cell, args.feature, values)

    out = Path(args.out or run / "interpolate")
    out.mkdir(parents=True, exist_ok=True)
    title = f"{args.feature} of {info['cell']} ({info.get('compound', 'unknown')}), own value {own:.4g}"
    path = out / f"sweep_{args.feature}.png"
    strip(x, [f"{v:.4g} (pct {p:.0f})" for v, p in zip(values, percentile)], title).save(path.with_suffix(".tmp"), format="PNG")
    os.replace(path.with_suffix(".tmp"), path)
    report = {"feature": args.feature, "cell": info["cell"], "own value": own, "values": values.tolist(), f"percentile of {whose}": percentile.tolist(),
              "checkpoint": str(checkpoint), "step": G.step}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{title}: {values[0]:.4g} to {values[-1]:.4g} in {args.steps} steps; {path}")
    outside = [f"{v:.4g}" for v in values if not known[0] <= v <= known[-1]]
    if outside:
        print(f"warning: {', '.join(outside)} lie outside the {whose}' range {known[0]:.4g}..{known[-1]:.4g}: these pictures are extrapolations")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"interpolate.py: {error}")
