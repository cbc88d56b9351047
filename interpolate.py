"""Edit the measurements of a cell and look at the cell; every picture is measured again, and every edit says how far it leaves the data.

    python interpolate.py sweep --data out/ --run runs/cp2image-seed0 --feature Nuclei_AreaShape_Area --html cell.html
    python interpolate.py {sweep --fig4c, moa, dose, walk, algebra, controllability, coupling} --data out/ --run runs/cp2image-seed0
    python interpolate.py {walk, algebra, latents} --data out/ --run runs/lsgan-seed0       # or a VAE: in its latent space

Reads a prepared folder and a run. Writes OUT/<figure>.png, .json and .csv (equal calls, equal bytes), with --gif OUT/<figure>.gif, with
--html FILE one page with a slider per edited feature that any browser opens offline. Cost: 50 pictures/s with 860 features on one CPU core.
"""
import argparse
import base64
import difflib
import fnmatch
import functools
import html
import io
import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

import data
import model
from data import InputError
from prepare_bbbc021 import measurements

FIG4C = ["Nuclei_AreaShape_Area", "Nuclei_AreaShape_Orientation", "Nuclei_Intensity_MeanIntensity_DAPI", "Cytoplasm_AreaShape_Area"]
BLOCK = 50  # dimensions replaced at once in Fig 5a (paper)
REFERENCE = 20_000  # training cells at most that stand for the data: bounds the memory
NOISE, FRESH = 500, 2_000  # noise vectors that serve as a GAN's cells, and more that stand for its data
GROUP = 200  # cells at most of a concentration in Fig 5b: DMSO would be most of the principal axes
PAGE = 1300  # pictures at most in a page
ALIKE = 0.05  # sd: a measurement that halving the brightness moves by more depends on it
EXTRACTOR = "prepare_bbbc021.segment and measure"


# ---------------------------------------------------------------------------------------------------------------------
# Edits of measurements: raw values (n, F) in CellProfiler's units, or z (n, F) in standard deviations


def find_features(pattern, features, dropped):
    """The places (g,) of a feature, or of a group by a pattern like 'Nuclei_Texture_*'; InputError: dropped, or the nearest names."""
    if places := [j for j, name in enumerate(features) if fnmatch.fnmatchcase(name, pattern)]:
        return places
    if pattern in dropped:
        raise InputError(f"--feature {pattern}: was left out when the cells were prepared ({dropped[pattern]})")
    near = difflib.get_close_matches(pattern, features, 5, 0.3) or features[:5]
    raise InputError(f"--feature {pattern}: not among the model's {len(features)} features; nearest: {', '.join(near)}")


def is_angle(names):
    """Which features (F,) are directions, in degrees that wrap at 180."""
    return np.array([name.endswith("_Orientation") for name in names])


def edit_values(known, own, scale, unit, low, high, steps):
    """What a sweep asks for: levels (steps,) in `unit`, and raw values (steps, g) of g features moved together.
    raw: CellProfiler's units (one feature); percentile: of the cells `known` (N, g); sd: from the cell's `own` (g,) value, in `scale` (g,)."""
    ends = {"sd": (-3, 3), "percentile": (1, 99), "raw": np.quantile(known[:, 0], [0.01, 0.99])}[unit]
    levels = np.linspace(ends[0] if low is None else low, ends[1] if high is None else high, steps)
    if unit == "sd":
        return levels, own + levels[:, None] * scale
    if unit == "percentile" and (levels.min() < 0 or levels.max() > 100):
        raise InputError(f"--low {low} --high {high}: percentiles lie between 0 and 100")
    if unit == "raw" and known.shape[1] > 1:
        raise InputError(f"--unit raw: {known.shape[1]} features share no unit; move a group in sd or percentile")
    return levels, np.quantile(known, levels / 100, axis=0) if unit == "percentile" else levels[:, None]


def edited(raw, places, values, scale, angle, covariance=None):
    """Raw vectors (n, F) with the features `places` (g,) set to `values` (n, g); directions wrap into -90..90 degrees.
    Without `covariance` everything else is held. With it (F, F), of z, the others move as their conditional mean does when the edited
    ones move: z_o + C_oe C_ee^-1 (z_e' - z_e); an edit to the cell's own values changes nothing. `scale` (F,) or (n, F), `angle` (F,) bool."""
    out, scale = np.array(raw, np.float64), np.broadcast_to(scale, raw.shape)
    if covariance is not None:
        weights = np.linalg.solve(covariance[np.ix_(places, places)], covariance[places])  # (g, F)
        out += ((values - out[:, places]) / scale[:, places]) @ weights * scale
    out[:, places] = values
    return np.where(angle & (abs(out) > 90), (out + 90) % 180 - 90, out)


def replaced(a, b, block=BLOCK):
    """Fig 5a: from a (F,) to b (F,), `block` dimensions a step, the largest |b - a| first, ties to the lower: order (F,), path (n, F)."""
    order, path = np.argsort(-np.abs(b - a), kind="stable"), [a]
    for start in range(0, len(a), block):
        path.append(path[-1].copy())
        path[-1][order[start:start + block]] = b[order[start:start + block]]
    return order, np.stack(path)


def line(a, b, steps):
    """Points (steps, F) on the line from a to b (F,), ends included: CP vectors, encodings or noise vectors."""
    t = np.linspace(0, 1, steps)[:, None]
    return a * (1 - t) + b * t


def rank_latents(z, steps=9, reach=2):
    """Of latent vectors z (n, F): mean |z| (F,), the dimensions by it (F,), ties to the lower, and the values (F, steps) of a walk along
    each, from -reach to reach of its sd (ddof 0) about 0. Source: Donovan-Maiye et al. 2022."""
    size = np.abs(z).mean(0)
    return size, np.argsort(-size, kind="stable"), z.std(0)[:, None] * np.linspace(-reach, reach, steps)


def cosine(a, b):
    """Cosine (n,) between the rows of a (n, F) and b (F,), over the places where b and all of a are finite."""
    use = np.isfinite(a).all(0) & np.isfinite(b)
    return a[:, use] @ b[use] / np.maximum(np.linalg.norm(a[:, use], axis=1) * np.linalg.norm(b[use]), 1e-12)


def representative(z):
    """The row of z (n, F) nearest to its mean (Euclid), and its distance."""
    distance = np.linalg.norm(z - z.mean(0), axis=1)
    return int(distance.argmin()), float(distance.min())


def principal_axes(z, k=2):
    """Mean (F,) and first k principal axes (k, F) of z (n, F); each axis' largest loading is positive."""
    axes = np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:k]
    return z.mean(0), axes * np.sign(axes[np.arange(k), np.abs(axes).argmax(1)])[:, None]


def silhouettes(z, group):
    """Each row's silhouette (b - a) / max(a, b), Euclid; z (n, F), group (n,) names of two groups or more with 2 rows or more each."""
    names, group = np.unique(group, return_inverse=True)
    distance, count, own = torch.cdist(*[torch.tensor(z)] * 2).numpy(), np.bincount(group)[group], np.arange(len(z))
    mean = np.stack([distance[:, group == g].mean(1) for g in range(len(names))], 1)  # (n, groups)
    a = mean[own, group] * count / (count - 1)  # without itself
    mean[own, group] = np.inf
    b = mean.min(1)
    return (b - a) / np.maximum(np.maximum(a, b), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# How far from the data


def ledoit_wolf(z):
    """Covariance (F, F) of z (n, F), shrunk towards its mean variance times the identity, and the weight of that (Ledoit and Wolf 2004)."""
    z = z - z.mean(0)
    n, f = z.shape
    s = z.T @ z / n
    mean = np.trace(s) / f
    distance = ((s - mean * np.eye(f)) ** 2).sum()
    noise = min((((z ** 2).sum(1) ** 2).sum() / n - (s ** 2).sum()) / n, distance)
    shrinkage = noise / distance if distance > 0 else 1.0
    return (1 - shrinkage) * s + shrinkage * mean * np.eye(f), float(shrinkage)


def fit_reference(z):
    """What edits are held against: training cells z (n, F). Their Mahalanobis distances are those of each cell as if it were left out.
    Without that (Sherman-Morrison) a cell that shaped the covariance would look nearer than any new one. InputError under 20 cells."""
    if len(z) < 20:
        raise InputError(f"{len(z)} training cells: too few to say how far an edit leaves the data, 20 are needed")
    z = np.asarray(z, np.float64)
    covariance, shrinkage = ledoit_wolf(z)
    root = np.linalg.inv(np.linalg.cholesky(covariance + 1e-9 * np.eye(z.shape[1])))
    distance = (((z - z.mean(0)) @ root.T) ** 2).sum(1)
    some = z[:: -(-len(z) // 1000)]
    nearest = torch.cdist(torch.tensor(some), torch.tensor(z)).topk(2, largest=False).values[:, 1].numpy()  # the nearest is itself
    return {"z": z, "mean": z.mean(0), "covariance": covariance, "shrinkage": shrinkage, "root": root,
            "distances": np.sort(distance / np.maximum(1 - (1 - shrinkage) / len(z) * distance, 1e-9)), "nearest": np.median(nearest)}


def how_far(reference, z):
    """Of each vector z (n, F): the percentile of its Mahalanobis distance among the training cells', and the distance to its nearest
    training cell in units of what is usual between training cells (median): (n,), (n,)."""
    distance = (((z - reference["mean"]) @ reference["root"].T) ** 2).sum(1)
    nearest = torch.cdist(torch.tensor(z), torch.tensor(reference["z"])).amin(1).numpy()
    return 100 * np.searchsorted(reference["distances"], distance) / len(reference["z"]), nearest / max(reference["nearest"], 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Measured again


def depends_on_brightness(x, look):
    """Which measurements (F,) bool move when x (n, C, H, W) is drawn at half its brightness: what cell-max cannot express."""
    full, half = look(x), look(x / 2)
    seen = np.isfinite(full) & np.isfinite(half)
    sd = np.where(seen, full, 0).std(0) + 1e-12
    return (np.where(seen, np.abs(half - full), 0) > ALIKE * sd).sum(0) > 0.5 * np.maximum(seen.sum(0), 1)


def controllability(raw, scale, features, places, draw, look, far, offsets=range(-3, 4), covariance=None, relative=None, seed=0):
    """Moves each feature of `places` by `offsets` sd in n cells, draws, measures again; yields a record (dict) for each.
    raw, scale (n, F); draw(raw (n, F)) -> pictures of the n cells; look(pictures) -> (n, F); far(raw) -> percentile (n,) outside the data.
    slope, with a 95 % bootstrap interval over cells: realised per requested sd; off target: mean |slope| of all other features beyond
    what the edit asked of them; `relative` (F,) bool: measurements that the pictures cannot express and that are left out."""
    n, angle, offsets, base = len(raw), is_angle(features), np.array(offsets, float), look(draw(raw))
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 500)  # (500, n)
    for j in places:
        asked = [edited(raw, [j], raw[:, [j]] + k * scale[:, [j]], scale, angle, covariance) for k in offsets]
        got = np.stack([base if k == 0 else look(draw(e)) for k, e in zip(offsets, asked)])  # (K, n, F)
        lost = int(np.isnan(got).all(2).sum())
        got[:, :, angle] = np.unwrap(got[:, :, angle], period=180, axis=0)
        there = np.isfinite(got)
        x = there * offsets[:, None, None]
        x = x - there * (x.sum(0) / np.maximum(there.sum(0), 1))  # each cell about its own mean
        sxy, sxx = (x * np.where(there, got / scale, 0)).sum(0), (x * x).sum(0)  # (n, F): their sums' ratio is the least-squares slope
        slope = np.where(sxx.sum(0) > 0, sxy.sum(0) / np.maximum(sxx.sum(0), 1e-12), np.nan)
        slope[slice(0) if relative is None else relative] = np.nan
        astray = np.abs(slope - (0 if covariance is None else covariance[j] / covariance[j, j]))
        astray[j] = np.nan
        worst = int(np.nan_to_num(astray, nan=-1).argmax())
        percentile = np.stack([far(e) for e in asked])  # (K, n)
        status = "measured" if np.isfinite(slope[j]) else "relative" if sxx[:, j].any() else "not measured"
        record = {"feature": features[j], "status": status, "slope": slope[j], "low": np.nan, "high": np.nan, "spearman": np.nan, "n": n,
                  "off target": np.nanmean(astray), "most off target": features[worst], "its slope": slope[worst], "not segmented": lost,
                  "outside percentile at 1 sd": np.median(percentile[np.abs(offsets) == 1]), "at the ends": np.median(percentile[[0, -1]])}
        if status == "measured":
            y, x = (got[:, :, j] - got[offsets == 0, :, j]).ravel(), np.repeat(offsets, n)
            record["low"], record["high"] = np.percentile(draws @ sxy[:, j] / np.maximum(draws @ sxx[:, j], 1e-12), [2.5, 97.5])
            record["spearman"] = stats.spearmanr(x, y, nan_policy="omit").statistic if np.nanstd(y) > 0 else 0.0
        yield record


def feature_groups(features, channels):
    """Features by object, family and the one channel they are about: {'Nuclei_Texture_DAPI': places}."""
    groups = {}
    for j, name in enumerate(features):
        colour = [c for c in channels if re.search(rf"_{re.escape(c)}(_|$)", name)]
        groups.setdefault("_".join(name.split("_")[:2] + (colour if len(colour) == 1 else [])), []).append(j)
    return groups


def coupling(z, x, groups, paint, seed=0, repeats=3):
    """How much the pixel loss of each channel rises when one group of features is permuted between cells: a record per group and channel.
    z (n, F), x (n, C, H, W) real cells in 0..1, paint(z) -> pictures. rise = loss permuted / loss - 1, interval: bootstrap over cells."""
    random, n = np.random.default_rng(seed), len(z)
    weights = random.multinomial(n, np.full(n, 1 / n), 500)
    loss = lambda f: np.asarray((x - paint(f)).square().mean((2, 3)), np.float64)  # (n, C)
    base, records = loss(z), []
    for name, places in groups.items():
        mixed = [z.copy() for _ in range(repeats)]
        for f in mixed:
            f[:, places] = z[random.permutation(n)][:, places]
        worse = sum(map(loss, mixed)) / repeats
        rise = worse.sum(0) / np.maximum(base.sum(0), 1e-12) - 1
        low, high = np.percentile(weights @ worse / np.maximum(weights @ base, 1e-12) - 1, [2.5, 97.5], axis=0)
        records += [{"group": name, "features": len(places), "channel": k, "rise": v[0], "low": v[1], "high": v[2]}
                    for k, v in enumerate(zip(rise, low, high))]
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def strip(rows, title, zoom=2):
    """Rows of (name, pictures (n, C, H, W) in 0..1, a list of lines for each), composites above their lines -> a PIL image; one row alone
    also shows each channel in grey."""
    side, parts, small, large = data.SIZE * zoom + 2, [], ImageFont.load_default(11), ImageFont.load_default(12)
    for name, x, labels in rows:
        grey = [model.to_uint8(c)[..., None].expand(-1, -1, -1, 3).numpy() for c in x.unbind(1)] if len(rows) == 1 else []
        parts.append((name, data.tile([data.composite(x), *grey], zoom), labels, 13 * max(map(len, labels))))
    wide = max([int(large.getlength(name)) + 10 for name in (title, *(r[0] for r in rows))] + [p[1].shape[1] for p in parts])
    picture = Image.new("RGB", (wide, 22 + sum(30 + p[1].shape[0] + p[3] for p in parts)), "white")
    draw, top = ImageDraw.Draw(picture), 22
    draw.text((4, 3), title, fill="black", font=large)
    for name, body, labels, text in parts:
        draw.text((4, top + 3), name, fill="black", font=large)
        picture.paste(Image.fromarray(body), (0, top + 20))
        for i, lines in enumerate(labels):
            for k, said in enumerate(lines):
                colour = "firebrick" if said[:1] == "!" else "black"  # far from the data
                draw.text((4 + i * side, top + 22 + body.shape[0] + 13 * k), said, fill=colour, font=small)
        top += 30 + body.shape[0] + text
    return picture


def chart(path, size, draw):
    """The picture that draw(axes) makes, as a PNG of `size` (inches); where matplotlib is missing a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{path.name} not drawn: matplotlib is not installed; the numbers are complete")
    figure = Figure(size, layout="constrained")
    draw(figure.subplots())
    figure.savefig(path, dpi=90, metadata={"Software": None})


def rank_chart(axes, records, features):
    """Features by slope, with intervals; where there are many, the first and last 30."""
    ranked = sorted((r for r in records if r["status"] == "measured"), key=lambda r: -r["slope"])
    shown = pd.DataFrame((ranked if len(ranked) <= 60 else ranked[:30] + ranked[-30:])[::-1], columns=list(records[0]))
    axes.barh(shown["feature"], shown["slope"], color="lightsteelblue")
    axes.hlines(shown["feature"], shown["low"], shown["high"], color="black", lw=0.8)
    axes.plot(shown["ceiling r"], shown["feature"], "|", color="darkorange", ms=8, mew=2, label="ceiling: r of real cells measured again")
    axes.axvline(1, color="grey", lw=0.8)
    axes.set(xlabel="realised per requested sd: 1 = obeyed, 0 = ignored (95 % interval over cells)", ylim=(-1, len(shown)),
             title=f"{len(shown)} of the {len(ranked)} features that these pictures can express (asked: {len(records)} of {features})")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(loc="lower right", fontsize=7)


def table_chart(axes, records, channels):
    """Groups (rows) by channels (columns): how much the pixel loss rises, in percent."""
    rise = np.array([r["rise"] for r in records]).reshape(-1, len(channels)) * 100
    axes.imshow(rise, cmap="Blues", aspect="auto", vmin=0)
    for (i, k), v in np.ndenumerate(rise):
        axes.text(k, i, f"{v:.0f} %", ha="center", va="center", fontsize=8, color="white" if v > rise.max() * 0.6 else "black")
    axes.set_xticks(range(len(channels)), channels)
    axes.set_yticks(range(len(rise)), [f"{r['group']} ({r['features']})" for r in records[::len(channels)]], fontsize=8)
    axes.set_xlabel("rise of the pixel loss when the group is permuted", fontsize=8)


PAGE_HTML = """<!doctype html><meta charset="utf-8"><title>%(title)s</title><style>
body{font:16px sans-serif;max-width:980px;margin:24px auto}
canvas{image-rendering:pixelated;display:block;margin:0 8px 4px 0}figure{display:inline-block;margin:0}
label{display:block;margin:8px 0}input{width:420px;vertical-align:middle}pre{font:15px monospace;white-space:pre-wrap}</style>
<h3>%(title)s</h3><div id="sliders"></div><div id="pictures"></div><pre id="caption"></pre><p>%(about)s</p><script>
const P = %(values)s, side = P.side, sprite = new Image(), start = location.hash.slice(1).split(",");  // page.html#3,0 starts there
function add(parent, kind, text = "") { const e = document.createElement(kind); e.textContent = text; parent.append(e); return e; }
const canvases = ["Composite", ...P.channels].map((name, k) => {
  const figure = add(document.getElementById("pictures"), "figure"), c = add(figure, "canvas");
  add(figure, "figcaption", name); c.width = c.height = side; c.style.width = (k ? 196 : 340) + "px"; return c.getContext("2d"); });
const inputs = P.sliders.map(([name, levels, first], i) => {
  const label = add(document.getElementById("sliders"), "label"), input = add(label, "input");
  Object.assign(input, {type: "range", min: 0, max: levels.length - 1, value: start[i] || first, oninput: show});
  return [input, add(label, "b"), levels, name]; });
function show() {
  let at = 0;
  for (const [input, text, levels, name] of inputs) {
    at = at * levels.length + Number(input.value); text.textContent = ` ${name}: ${levels[input.value]}`; }
  canvases[0].drawImage(sprite, -side * (at %% P.columns), -side * Math.floor(at / P.columns));
  const whole = canvases[0].getImageData(0, 0, side, side).data;  // DAPI blue, tubulin green, actin red
  canvases.slice(1).forEach((c, k) => { const grey = c.createImageData(side, side);
    for (let i = 0; i < whole.length; i += 4) { grey.data.fill(whole[i + 2 - k], i, i + 3); grey.data[i + 3] = 255; }
    c.putImageData(grey, 0, 0); });
  document.getElementById("caption").textContent = P.captions[at].join("\\n"); }
sprite.onload = show; sprite.src = P.sprite;</script>
"""


def write_page(path, title, about, sliders, x, captions, channels):
    """A self-contained page: sliders of (name, levels, start), and for each combination a picture (x: (m, C, H, W) in 0..1) and lines."""
    columns, file = int(np.ceil(np.sqrt(len(x)))), io.BytesIO()
    Image.fromarray(data.tile([data.composite(part) for part in x.split(columns)], 1, 0)).save(file, format="PNG")
    values = {"side": x.shape[3], "columns": columns, "channels": channels, "sliders": sliders, "captions": captions,
              "sprite": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    text = PAGE_HTML % {"title": html.escape(title), "about": html.escape(about), "values": json.dumps(values).replace("</", "<\\/")}
    data.write(path, text)


# ---------------------------------------------------------------------------------------------------------------------
# The figures: each takes `lab`, the cells, the generator and the measuring as plain functions (open_lab), and returns what main writes


def open_lab(G, folder, split, seed, device, table=None):
    """What every figure needs, from a prepared folder, or for the cells of a table (data.read_table), then without real pictures.
    raw(rows) (n, F); scaling(rows) centre, scale (n, F); z(rows) (n, F) standardised; paint(z), images(rows) -> pictures in 0..1;
    look(pictures) -> (n, F) measured again; known(places): values of the cells that stand for the data, those of training or, without a
    folder, the table's; reference: of REFERENCE of them at most. Of a VAE or GAN the z are latent vectors (open_latents)."""
    lab = {"features": G.features, "channels": G.channels, "dropped": folder.meta["dropped"] if folder else {}, "seed": seed, "images": None}
    wide = lambda values, rows: np.array(np.broadcast_to(values, (len(rows), len(G.features))))
    draw = G if G.takes == "features" else G.decode
    lab["paint"] = lambda z: torch.cat([draw(part.to(device)).clamp(0, 1).cpu() for part in torch.tensor(z).float().split(256)])
    lab["look"] = lambda x: measurements(x.clamp(0, 1), G.channels, G.white, device=device).reindex(columns=G.features).to_numpy(np.float64)
    lab["z"] = lambda rows: standardised(lab["raw"](rows), *lab["scaling"](rows))
    if folder:
        train = pick_some(folder.rows("train"), None, REFERENCE, seed)
        lab["cells"], lab["rows"] = folder.cells, np.flatnonzero(folder.cells["split"] != "reference") if split == "all" else folder.rows(split)
        lab["raw"] = lambda rows: np.array(folder.raw[rows], np.float64)
        lab["scaling"] = lambda rows: [wide(v, rows) for v in folder.measurements(rows)[1:]]
        lab["known"] = lambda places: np.array(folder.raw[:, places], np.float64)[folder.rows("train")]
        lab["images"] = lambda rows: data.scale_images(folder.images(rows), G.image_norm, G.white)
        some = lab["images"](train[:: -(-len(train) // 32)])
        known = lab["z"](train) if G.takes == "features" else open_latents(lab, G, train, device)
    if table is not None:
        raw, centre, scale = (v.cpu().numpy() for v in model.table_values(G, table))
        centre, scale = wide(centre, table), wide(scale, table)
        raw = np.where(np.isfinite(raw), raw, centre)
        cells = table.reindex(columns=["cell", "compound", "concentration", "moa", "plate"]).reset_index(drop=True)
        cells[["compound", "moa"]] = cells[["compound", "moa"]].astype(object).fillna("unknown")
        lab["cells"], lab["rows"], lab["images"] = cells, np.arange(len(table)), None
        lab["raw"], lab["scaling"] = lambda rows: raw[rows].copy(), lambda rows: [centre[rows], scale[rows]]
        if not folder:
            if len(table) < 20:
                raise InputError(f"--table: {len(table)} cells, 20 are needed to say how far an edit leaves them; give --data of the run as well")
            lab["known"], known = lambda places: raw[:, places], standardised(raw, centre, scale)
            some = lab["paint"](known[:32])
    lab["reference"], lab["measurable"] = fit_reference(known), np.isfinite(lab["look"](some)).any(0)
    lab["relative"] = depends_on_brightness(some, lab["look"]) & (G.image_norm == "cell-max")
    return lab


def open_latents(lab, G, train, device):
    """Moves a lab into the latent space of a VAE or GAN; returns the latent vectors (n, latent) that stand for the data.
    VAE: z(rows) are the encoder's means of the folder's cells, those of training the reference. GAN: the cells are NOISE noise vectors,
    noise0, noise1, ..., in the order of model.sample(G, NOISE, seed); raw(rows) is what their pictures measure, the reference FRESH more."""
    if G.takes == "images":
        means = lambda rows: G.encode(lab["images"](rows).to(device))[0].double().cpu().numpy()
        lab["z"] = lambda rows: np.concatenate([means(part) for part in np.split(rows, range(256, len(rows), 256))])
        return lab["z"](train)
    noise = model.noise(G, NOISE + FRESH, lab["seed"]).double().numpy()
    drawn = functools.cache(lambda: lab["look"](lab["paint"](noise[:NOISE])))  # measured once, where a figure asks for it
    lab["cells"], lab["rows"], lab["images"] = pd.DataFrame({"cell": [f"noise{i}" for i in range(NOISE)]}), np.arange(NOISE), None
    lab["z"], lab["raw"] = lambda rows: noise[rows], lambda rows: drawn()[rows]
    return noise[NOISE:]


def standardised(raw, centre, scale):
    """model.standardise on arrays: raw (n, F) -> float64 (n, F), what the generator sees."""
    return model.standardise(*(torch.as_tensor(np.asarray(v, np.float64)) for v in (raw, centre, scale))).double().numpy()


def pick_some(rows, n, most, seed):
    """n of the rows (None: all, `most` at most), by the seed; InputError if there are fewer."""
    if n and n > len(rows):
        raise InputError(f"--n {n}: too few cells, there are {len(rows)}")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n or most])


def pick_class(lab, name, flag):
    """The lab's rows of a mechanism, compound or treatment; InputError with the list if there is no such, or under 3 cells of it."""
    rows, cells = lab["rows"], lab["cells"].iloc[lab["rows"]]
    kinds = [cells["moa"].to_numpy(), cells["compound"].to_numpy(), data.treatment_names(cells).to_numpy()]
    found = next((rows[k == name] for k in kinds if (k == name).any()), ())
    if len(found) < 3:
        known = [f"{k} ({n})" for kind in kinds[:2] for k, n in zip(*np.unique(kind.astype(str), return_counts=True))]
        raise InputError(f"{flag} {name}: {len(found)} of these {len(rows)} cells, 3 are needed (--split all has most); "
                         f"there are: {', '.join(known)}")
    return found


def pick_cell(lab, key, flag="--cell"):
    """The row of a cell by its name, or without one that of the lab's rows closest to their mean."""
    if not key:
        return lab["rows"][representative(lab["z"](lab["rows"]))[0]]
    found = np.flatnonzero(lab["cells"]["cell"] == key)
    if not len(found):
        raise InputError(f"{flag} {key}: not among the {len(lab['cells'])} cells, whose first is {lab['cells']['cell'].iloc[0]}")
    return found[0]


def mean_interval(values, seed):
    """Mean of the finite values, its 95 % bootstrap interval, n."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    low, high = np.percentile(np.random.default_rng(seed).choice(values, (1000, len(values))).mean(1), [2.5, 97.5])
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def reading(lab, watch, values):
    """Values (F,) measured again of the features `watch`, as lines; (rel.) where the pictures cannot express one in its own unit."""
    said = lambda j: "not measurable" if not lab["measurable"][j] else "no nucleus found" if np.isnan(values[j]) else f"{values[j]:.4g}"
    return [f"again {lab['features'][j] + ' ' if len(watch) > 1 else ''}{said(j)}{' (rel.)' if lab['relative'][j] else ''}" for j in watch]


def empty(stem, title, **about):
    """A figure without rows; about: what main adds to the JSON. drawn: the rows without real cells, for GIF and page."""
    return {"stem": stem, "title": title, "about": {"n": 1} | about, "rows": [], "drawn": [], "records": []}


def add_row(lab, figure, name, z, heads, watch=(), real=(None, None), **more):
    """Draws z (n, F), measures again, adds a row of pictures and n records to a figure; returns the measured values (n, F).
    heads: n texts; watch: features whose measured values are written; real: rows of the real cells at the two ends; more: columns (n,)."""
    x = lab["paint"](z)
    got, (percentile, nearest) = lab["look"](x), how_far(lab["reference"], z)
    labels = [[h, *reading(lab, watch, v), "! " * bool(p > 99) + f"outside pct {p:.3g}"] for h, v, p in zip(heads, got, percentile)]
    more |= {f"measured {lab['features'][j]}": got[:, j] for j in watch} | {"outside percentile": percentile, "nearest": nearest}
    figure["records"] += [{"row": name, "picture": i, "asked": h} | {k: v[i] for k, v in more.items()} for i, h in enumerate(heads)]
    figure["drawn"].append((name, x, labels))
    for row, before in zip(real, (True, False)):
        if row is not None and lab["images"]:
            end = lab["images"](np.array([row]))
            text = [["real cell", *reading(lab, watch, lab["look"](end)[0])]]
            x, labels = (torch.cat([end, x]), text + labels) if before else (torch.cat([x, end]), labels + text)
    figure["rows"].append((name, x, labels))
    return got


def sweep(lab, feature, unit, low, high, steps, edit, cell, page):
    """Fig 4c for any features or groups: a row each from low to high, the others held, or moving to their conditional mean (edit)."""
    row, names, held = pick_cell(lab, cell), lab["features"], lab["reference"]["covariance"] if edit == "conditional" else None
    raw, (centre, scale), info = lab["raw"]([row]), lab["scaling"]([row]), lab["cells"].iloc[row]
    groups = [find_features(f, names, lab["dropped"]) for f in feature]
    if len(set(sum(groups, []))) < len(sum(groups, [])):
        raise InputError(f"--feature {' '.join(feature)}: a feature is named twice")
    others = "held" if held is None else "at their conditional mean"
    figure, asked = empty("sweep_" + ("fig4c" if feature == FIG4C else "_".join(feature)) + "_conditional" * (edit == "conditional"),
                          f"{info['cell']} ({info['compound']}), other measurements {others}.   again: measured in the picture.   "
                          "outside: percentile of distance from the training cells", cell=info["cell"], edit=edit), []

    def vectors(places, values):  # (n, F) as the generator sees them
        wanted = edited(np.repeat(raw, len(values), 0), places, values, scale, is_angle(names), held)
        far = np.abs(wanted - centre) > model.CLIP * scale * (1 + 1e-9)
        if far.any():
            print(f"warning: {far.any(1).sum()} of {len(far)} requested vectors go beyond {model.CLIP:.0f} sd, where the generator's "
                  f"input is clipped: {', '.join(names[j] for j in np.flatnonzero(far.any(0))[:3])}")
        return standardised(wanted, centre, scale)

    for name, group in zip(feature, groups):
        one, own = len(group) == 1, raw[:, group]
        kind = unit or ("raw" if one else "sd")
        levels, values = edit_values(lab["known"](group), own[0], scale[0, group], kind, low, high, steps)
        texts = [f"{v[0]:.4g}" if one else f"{k:+.3g} sd" if kind == "sd" else f"pct {k:.3g}" for v, k in zip(values, levels)]
        heads = [f"own {own[0, 0]:.4g}" if one else "own values", *("asked " + t for t in texts)]
        z = vectors(group, np.concatenate([own, values]))
        add_row(lab, figure, name + f" ({len(group)} features)" * (not one), z, heads, group[:one], (row, None), unit=[kind] * (steps + 1),
                level=[np.nan, *levels], requested=[*own[0], *values[:, 0]] if one else np.full(steps + 1, np.nan))
        asked.append((values, texts))
    if page:  # every combination of the sliders
        count = max(k for k in range(1, steps + 1) if k == 1 or k ** len(groups) <= PAGE)
        shown = np.linspace(0, steps - 1, count).round().astype(int)
        grid = np.array(list(itertools.product(shown, repeat=len(groups))))  # (m, sliders)
        heads = ["; ".join(f"{f} {t[i]}" for f, (_, t), i in zip(feature, asked, g)) for g in grid]
        z = vectors(sum(groups, []), np.concatenate([v[i] for (v, _), i in zip(asked, grid.T)], 1))
        add_row(lab, every := empty("", ""), "", z, heads, [g[0] for g in groups if len(g) == 1])
        figure["page"] = [(f, [t[i] for i in shown], count // 2) for f, (_, t) in zip(feature, asked)], *every["drawn"][0][1:]
    return figure


def moa(lab, target, start, path, block):
    """Fig 5a: from the representative cell of `start` to that of each target; under each picture the cosine of its CP vector to the
    target's, and the same of what is measured in the picture and in the real target cell."""
    common = lab["cells"]["moa"].iloc[lab["rows"]].value_counts().drop([start, "DMSO", "unknown", ""], errors="ignore").index
    figure = empty(f"moa_{path}", f"From {start} to a mechanism, {path}.  cos: to the target's CP vector.  again: as measured", block=block)
    pick = lambda name, flag: (rows := pick_class(lab, name, flag))[representative(lab["z"](rows))[0]]
    for name in target or common[:3]:
        ends = [pick(start, "--start"), pick(name, "--target")]
        a, b = lab["z"](ends)
        z = replaced(a, b, block)[1]
        z = z if path == "blocks" else line(a, b, len(z))
        centre, scale = lab["scaling"](ends[1:])
        seen = lab["look"](torch.cat([lab["paint"](z), lab["images"](ends[1:])]))
        seen = (seen - centre) / np.where(lab["relative"], np.nan, scale)
        near, again = cosine(z, b), cosine(seen[:-1], seen[-1])
        add_row(lab, figure, f"{name}: {' to '.join(lab['cells']['cell'].iloc[ends])}", z,
                [f"cos {n:.3f}, again {m:.2f}" for n, m in zip(near, again)], (), ends, cosine=near, **{"cosine measured again": again})
    return figure


def dose(lab, compound, start, steps):
    """Fig 5b, c: principal axes and silhouettes of the CP vectors of `start` and of a compound's concentrations of 3 cells or more; real
    cells of each; cells generated on the line from the mean of `start` to that of the highest concentration, in the full space."""
    cells, seed = lab["cells"].iloc[lab["rows"]], lab["seed"]
    pick_class(lab, compound, "--compound")
    counts = cells["concentration"][cells["compound"] == compound].value_counts()
    names = [start, *(f"{compound} {c:g}" for c in sorted(counts.index[counts > 2]))]
    groups = {name: pick_some(pick_class(lab, name, "--compound"), None, GROUP, seed) for name in names}
    if len(groups) < 2:
        raise InputError(f"--compound {compound}: no concentration of it has 3 of these {len(cells)} cells (--split all has most)")
    z = {name: lab["z"](rows) for name, rows in groups.items()}
    every, label, means = np.concatenate([*z.values()]), np.repeat(names, [len(v) for v in z.values()]), [v.mean(0) for v in z.values()]
    (mean, axes), way, points = principal_axes(every), means[-1] - means[0], line(means[0], means[-1], steps)
    plane, figure = (every - mean) @ axes.T, empty(f"dose_{compound}", f"From {start} to {names[-1]} uM", n=len(every))
    real = lab["images"]([groups[name][representative(v)[0]] for name, v in z.items()])
    said = [[name, f"mean on the line at {(m - means[0]) @ way / (way @ way):.2f}"] for name, m in zip(names, means)]
    figure["rows"].append(("real cells, each the nearest to its mean", real, said))
    add_row(lab, figure, "generated on the line between the means", points, [f"at {t:.2f}" for t in np.linspace(0, 1, steps)],
            **{f"PC {k + 1}": (points - mean) @ axes[k] for k in range(2)})
    for space, s in (("all measurements", silhouettes(every, label)), ("the plane", silhouettes(plane, label))):
        for name in ["all", *names]:
            of = s if name == "all" else s[label == name]
            figure["records"].append({"row": f"silhouette in {space}", "asked": name} | mean_interval(of, seed))

    def draw(ax):
        for name in names:
            ax.plot(*plane[label == name].T, ".", label=f"{name} (n {len(z[name])})")
        ax.plot(*((points - mean) @ axes.T).T, "r.-", label="line between the means")
        ax.set(xlabel="PC 1", ylabel="PC 2", title=f"silhouette in this plane {s.mean():.2f}")
        ax.legend()

    return figure | {"chart": ((7, 6), draw)}


def walk(lab, cells, steps):
    """The straight line between the CP vectors or encodings of two cells, or between two noise vectors."""
    ends, t = [pick_cell(lab, key, "--cells") for key in cells], np.linspace(0, 1, steps)
    figure = empty("walk_" + "_".join(key[-24:] for key in cells), " to ".join(cells), cells=cells)
    add_row(lab, figure, f"{FIG4C[0]}, measured again", line(*lab["z"](ends), steps), [f"at {v:.2f}" for v in t],
            [j for j, f in enumerate(lab["features"]) if f == FIG4C[0]], ends, t=t)
    return figure


def algebra(lab, feature, terms, repeats):
    """CytoGAN's arithmetic on CP vectors, encodings or noise vectors: mean of `terms` cells with a high value - mean of as many with a low
    one + mean of others, measured again. High and low: the top and bottom tenth of the lab's cells that have a value; others: the middle
    fifth. What is asked for: the same sum of the cells' values."""
    (j, *more), rows, random = find_features(feature, lab["features"], lab["dropped"]), lab["rows"], np.random.default_rng(lab["seed"])
    if more:
        raise InputError(f"--feature {feature}: {1 + len(more)} features, expected one")
    values = lab["raw"](rows)[:, j]
    ranked = rows[np.argsort(values, kind="stable")][:np.isfinite(values).sum()]  # NaN, no nucleus found, is sorted last
    if terms > (tenth := len(ranked) // 10):
        raise InputError(f"--terms {terms}: too few cells, {len(ranked)} of {len(rows)} have a value of {feature}, their top tenth {tenth}")
    figure, moves = empty(f"algebra_{feature}", f"high - low + other: {feature}", n=repeats, terms=terms, ranked=len(ranked)), []
    for k in range(repeats):
        picked = [random.choice(part, terms, False) for part in (ranked[-tenth:], ranked[:tenth], ranked[4 * tenth:6 * tenth])]
        high, low, other = (lab["z"](part).mean(0) for part in picked)
        asked = [lab["raw"](part)[:, j].mean() for part in picked]
        asked.append(asked[0] - asked[1] + asked[2])
        heads = [f"{t} {v:.4g}" for t, v in zip(("high", "low", "other", "result"), asked)]
        got = add_row(lab, figure, f"draw {k + 1}", np.stack([high, low, other, high - low + other]), heads, [j], requested=asked)[:, j]
        moves.append((got[3] - got[2]) / (asked[0] - asked[1]) if asked[0] > asked[1] else np.nan)
    figure["records"].append({"row": "realised / requested move", "asked": feature} | mean_interval(np.array(moves), lab["seed"]))
    return figure | {"rows": figure["rows"][:5]}


def latents(lab, top):
    """The latent dimensions of largest mean |mu| over the cells, each walked from -2 to 2 sd with the others at 0, measured again. A GAN's
    noise is alike in every dimension: there the ranking is chance."""
    size, order, values = rank_latents(lab["z"](lab["rows"]))
    figure = empty("latents", "Latent dimensions by mean |mu|, from -2 to 2 sd, the others at 0", n=len(lab["rows"]), top=top)
    for d in order[:top]:
        z = np.zeros((values.shape[1], len(size)))
        z[:, d] = values[d]
        add_row(lab, figure, f"dimension {d}, mean |mu| {size[d]:.3g}; {FIG4C[0]}, measured again", z, [f"at {v:.3g}" for v in z[:, d]],
                [j for j, f in enumerate(lab["features"]) if f == FIG4C[0]], value=z[:, d],
                dimension=[int(d)] * len(z), **{"mean |mu|": [size[d]] * len(z)})
    return figure


def steer(lab, feature, n, edit):
    """controllability of the generator for every feature or those of `feature`; noise ceiling: r of real cells measured again."""
    names, seed, look, begun, records = lab["features"], lab["seed"], lab["look"], time.time(), []
    places = list(dict.fromkeys(j for f in feature or ["*"] for j in find_features(f, names, lab["dropped"])))
    rows, some = pick_some(lab["rows"], n, n, seed), pick_some(lab["rows"], None, 200, seed)
    (centre, scale), seen, table = lab["scaling"](rows), look(lab["images"](some)), lab["raw"](some)
    z, held = lambda raw: standardised(raw, centre, scale), lab["reference"]["covariance"] if edit == "conditional" else None
    for record in controllability(lab["raw"](rows), scale, names, places, lambda raw: lab["paint"](z(raw)), look,
                                  lambda raw: how_far(lab["reference"], z(raw))[0], covariance=held, relative=lab["relative"], seed=seed):
        pair = pd.DataFrame({"seen": seen[:, j := places[len(records)]], "table": table[:, j]}).dropna()
        records.append(record | {"ceiling r": pair.corr().iloc[0, 1] if record["status"] == "measured" else np.nan, "ceiling n": len(pair)})
        if len(records) % 20 == 0 or len(records) == len(places):
            print(f"feature {len(records):4d}/{len(places)} | {6 * n * len(records) / (time.time() - begun):.0f} pictures/s", flush=True)
    figure = empty("controllability" + "_conditional" * (edit == "conditional"), f"controllability, others {edit}", n=n, edit=edit)
    return figure | {"records": records, "chart": ((11, 2 + 0.16 * min(60, len(records))), lambda ax: rank_chart(ax, records, len(names)))}


def couple(lab, n, repeats):
    """coupling of the generator, on n cells."""
    rows, channels = pick_some(lab["rows"], n, 500, lab["seed"]), lab["channels"]
    records = coupling(lab["z"](rows), lab["images"](rows), feature_groups(lab["features"], channels), lab["paint"], lab["seed"], repeats)
    records = [r | {"channel": channels[r["channel"]]} for r in records]
    figure = empty("coupling", "coupling", n=len(rows), repeats=repeats)
    return figure | {"records": records, "chart": ((7, 7), lambda ax: table_chart(ax, records, channels))}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_figure(out, figure, about, gif, page):
    """PNG (strip, chart), JSON and CSV of a figure, on request GIF and page; returns their path without suffix."""
    out.mkdir(parents=True, exist_ok=True)
    path, rows = out / re.sub(r"[^\w+-]+", "_", figure["stem"])[:120], figure["rows"]
    if rows:
        data.write(path.with_suffix(".png"), lambda p: strip(rows, figure["title"]).save(p, format="PNG"))
    if "chart" in figure:
        chart(out / (path.name + "_chart" * bool(rows) + ".png"), *figure["chart"])
    plain = lambda v: v if not isinstance(v, float) else float(f"{v:.6g}") if np.isfinite(v) else None
    records = [{"n": about["n"]} | {k: plain(v) for k, v in r.items()} for r in figure["records"]]
    table = pd.DataFrame(records).assign(split=about["split"], seed=about["seed"], extractor=EXTRACTOR)
    data.write(path.with_suffix(".json"), json.dumps({"about": about, "records": records}, indent=1) + "\n")
    data.write(path.with_suffix(".csv"), table.to_csv(index=False))
    names, x, said = zip(*figure["drawn"]) if figure["drawn"] else ((), (), ())
    if gif:
        there = list(range(max(map(len, x))))  # and back
        frames = [strip([(n, p[i:][:1], t[i:][:1]) for n, p, t in figure["drawn"] if i < len(p)], "", 4) for i in there + there[-2:0:-1]]
        data.write(path.with_suffix(".gif"), lambda p: frames[0].save(p, "GIF", save_all=True, append_images=frames[1:], duration=300, loop=0))
    if page:
        shown = figure.get("page") or ([("row", names, 0), ("picture", list(range(1, len(x[0]) + 1)), 0)], torch.cat(x), sum(said, []))
        source = f"{about['checkpoint']}, step {about['step']}; cells: {about['split']}; data: {about['data']}"
        write_page(Path(page), figure["title"], source, *shown, about["channels"])
    return path


def flag(default, help, **more):
    return {"default": default, "type": type(default), "help": f"{help} (default {default})"} | more


NAMES, REAL = {"nargs": "+", "metavar": "NAME"}, {"type": float}
EDIT = flag("hold", "the other measurements: held, or moved to their conditional mean", choices=["hold", "conditional"])
START = flag("DMSO", "where it begins: mechanism, compound or treatment", metavar="NAME")
FLAGS = {  # of each command, after its function and what it does
    "sweep": (sweep, "features or groups of one cell from low to high (Fig 4c)", {
        "feature": NAMES | {"help": "CellProfiler names, or groups moved together, 'Nuclei_Texture_*': a row and a slider each"},
        "unit": {"choices": ["raw", "percentile", "sd"], "help": "of low and high: CellProfiler's (default), percentiles of training "
                 "cells, or sd from the cell's own value (default for groups)"},
        "low": REAL | {"help": "first value (default: 1st percentile of the training cells, or -3 sd)"},
        "high": REAL | {"help": "last value (default: 99th percentile of the training cells, or 3 sd)"},
        "steps": flag(7, "pictures in a row"), "edit": EDIT,
        "cell": {"metavar": "KEY", "help": "the cell, by its name in cells.csv (default: the one closest to the mean of the split)"}}),
    "moa": (moa, "from DMSO to a mechanism, 50 measurements a step (Fig 5a)", {
        "target": NAMES | {"help": "mechanisms, compounds or treatments, 'taxol 0.3' (default: the three commonest mechanisms)"},
        "start": START,
        "path": flag("blocks", "the most different measurements first (the paper), or a straight line", choices=["blocks", "linear"]),
        "block": flag(BLOCK, "measurements replaced a step")}),
    "dose": (dose, "DMSO and the concentrations of a compound (Fig 5b, c)", {
        "compound": flag("latrunculin B", "as in cells.csv"), "start": START, "steps": flag(5, "pictures on the line")}),
    "walk": (walk, "a straight line between two cells, or two noise vectors of a GAN", {
        "cells": {"nargs": 2, "required": True, "metavar": "KEY", "help": f"two names in cells.csv; of a GAN noise0 to noise{NOISE - 1}"},
        "steps": flag(9, "pictures")}),
    "algebra": (algebra, "high - low + other, measured again (CytoGAN)", {
        "feature": flag(FIG4C[0], "what is high and low"), "terms": flag(3, "cells averaged in each term"),
        "repeats": flag(20, "draws of cells")}),
    "latents": (latents, "the latent dimensions of a VAE or GAN, from -2 to 2 sd", {"top": flag(5, "dimensions, a row each")}),
    "controllability": (steer, "for each feature: asked -3..3 sd against measured again", {
        "feature": NAMES | {"help": "names or patterns (default: every feature; 6 n pictures each)"},
        "n": flag(16, "cells"), "edit": EDIT}),
    "coupling": (couple, "which groups of measurements each channel depends on", {
        "n": {"type": int, "help": "cells (default 500, or all where there are fewer)"}, "repeats": flag(3, "permutations of each group")})}

ON_TABLES = ("sweep", "walk", "algebra")  # the commands that can do without real pictures
LATENT = ("walk", "algebra", "latents")  # those for the latent space of a VAE or GAN


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, what, flags) in FLAGS.items():
        add = (command := commands.add_parser(name, help=what, description=function.__doc__)).add_argument
        add("--data", required=name not in ON_TABLES, metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
        if name in ON_TABLES:
            add("--table", metavar="FILE", help="edit cells of this table: CellProfiler's CSV folder or SQLite file, or a CSV with its prefixed "
                "names; distances are from the training cells of --data or, without it, from the table's own")
        add("--run", required=True, metavar="RUN", help="a run's folder (its last.pt is used) or a checkpoint file, RUN/best.pt")
        for key, options in flags.items():
            add(f"--{key}", **options)
        add("--split", default="test", choices=["train", "val", "test", "all"], help="the cells that are looked at (default test)")
        add("--out", metavar="DIR", help="where the results go (default RUN/interpolate)")
        add("--seed", type=int, default=0, help="of every draw of cells and every bootstrap (default 0)")
        add("--device", default="auto", help="cuda or cpu (default: cuda where there is one)")
        if name not in ("controllability", "coupling"):
            add("--gif", action="store_true", help="also a moving picture")
            add("--html", dest="page", metavar="FILE", help="also one self-contained page with sliders")
        if name == "sweep":
            add("--fig4c", action="store_const", const=FIG4C, dest="feature", help="the paper's four rows")
        command.set_defaults(function=function, wants=[*flags, "page"] if name == "sweep" else list(flags))
    args = parser.parse_args(argv)
    if not args.data and not args.table:
        parser.error(f"{args.command} needs --data DIR, or --table FILE")
    if args.command == "sweep" and not args.feature:
        parser.error("sweep needs --feature NAME, or --fig4c")
    for name, least in (("steps", 2), ("n", 2), ("block", 1), ("terms", 1), ("repeats", 1), ("top", 1)):
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected {least} or more")
    return args


@torch.no_grad()
def main(argv=None):
    args = vars(parse(argv))
    device = data.pick_device(args["device"])
    folder, run = data.open_folder(args["data"]) if args["data"] else None, Path(args["run"])
    G = model.load(checkpoint := run / "last.pt" if run.is_dir() else run, device)
    if folder and (G.features != folder.features or G.identity != folder.identity):
        raise InputError(f"{checkpoint}: was trained on another prepared folder than {folder.path} (other features or checksums); "
                         "give the --data of that run")
    if G.takes == "features" and args["command"] == "latents":
        raise InputError(f"{checkpoint}: {G.model} takes measurements and has no latent space; give the run of a VAE or GAN, or move "
                         "measurements by sweep, walk or algebra")
    if G.takes != "features" and (args["command"] not in LATENT or args.get("table")):
        asked = "--table" if args.get("table") else args["command"]
        raise InputError(f"{checkpoint}: {G.model} takes {G.takes}, and {asked} needs a model that takes measurements (cp2image); "
                         f"{', '.join(LATENT)} with --data serve a {G.model}")
    table = data.read_table(args["table"], G.channels[0]) if args.get("table") else None
    lab = open_lab(G, folder, args["split"], args["seed"], device, table)
    figure = args["function"](lab, **{name: args[name] for name in args["wants"]})
    reference, known = lab["reference"], "noise vectors" if G.takes == "noise" else "training cells"
    about = {"command": args["command"], "data": args.get("table") or args["data"], "checkpoint": str(checkpoint), "step": G.step,
             "split": args["split"] if table is None else "table", "seed": args["seed"], "images": G.image_norm, "channels": G.channels,
             "extractor": EXTRACTOR, "model": G.model, "reference": args["data"] or args["table"],
             known: len(reference["z"]), "Ledoit-Wolf shrinkage": round(reference["shrinkage"], 6)} | figure["about"]
    about |= {"split": "noise", "reference": "noise"} if G.takes == "noise" else {}
    path = write_figure(Path(args["out"] or checkpoint.parent / "interpolate"), figure, about, args.get("gif"), args.get("page"))
    far = [r["outside percentile"] for r in figure["records"] if "outside percentile" in r]
    if any(p > 99 for p in far):
        print(f"warning: {sum(p > 99 for p in far)} of {len(far)} pictures lie outside the data, farther than 99 % of the {known} "
              f"(Mahalanobis), the farthest at percentile {max(far):.4g}: these are extrapolations")
    print(f"{figure['title']}\nwritten: {path}.png, .json, .csv")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"interpolate.py: {error}")
