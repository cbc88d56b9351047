"""Train CP2Image on a prepared folder: the generator learns to draw a cell from its CellProfiler measurements.

    python train.py --data out/ --steps 300 --hidden-ramp 50

Reads the folder of prepare_bbbc021.py. Writes RUN/last.pt (all that resuming and drawing need), RUN/best.pt (the generator with
the lowest validation pixel loss), RUN/log.csv, RUN/args.json and RUN/samples/*.png. Cost: see the README's speed table.
"""
import argparse
import copy
import csv
import ctypes
import json
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import data
import model

LOG_COLUMNS = ["step", "loss_d", "p_real", "p_fake", "loss_pix", "loss_hidden", "hidden0", "hidden1", "hidden2", "hidden3",
               "cells_per_s", "train_pix", "val_pix", "train_hidden", "val_hidden"]
VALIDATED = 512  # training and as many validation cells that the log's train_pix and val_pix are means over
RESUMABLE = {"steps", "run", "resume", "data", "device", "log_every", "sample_every", "val_every", "save_every", "bench"}


# ---------------------------------------------------------------------------------------------------------------------
# The method: one paragraph per loss term (the pixel and hidden terms stand in model.py). A student changes the loss in train_step.


def hidden_weights(step, ramp):
    """w_k = clip((step - ramp (k+1)) / ramp, 0, 1) for the four hidden maps; step = steps already done (released code, ramp 2500)."""
    return [min(max((step - ramp * (k + 1)) / ramp, 0.0), 1.0) if ramp else 1.0 for k in range(model.HIDDEN_MAPS)]


def discriminator_loss(p_real, p_fake):
    """Binary cross-entropy over the probabilities (B,) of real (target 1) and generated (target 0) images, 1e-7 inside the logarithms."""
    return -0.5 * ((p_real + 1e-7).log().mean() + (1 - p_fake + 1e-7).log().mean())


def losses(G, D, f, x, x_real, amp=None):
    """One forward pass of the method -> (loss_pix, hidden (4,), loss_d, p_real, p_fake, x_fake).

    f (B, F) and x (B, C, H, W) are the same cells; x_real is a second, independent batch. The discriminator sees
    [x_real, G(f), x] in one pass, its batch-norm moments from the first two. Nothing is detached: the maps of the originals depend
    on the generated images through those moments, and the released gradient has that path.
    """
    b = len(f)
    with torch.autocast(f.device.type, dtype=amp, enabled=amp is not None, cache_enabled=False):
        x_fake = G(f)
        logit, h = D(torch.cat([x_real, x_fake.to(x_real.dtype), x]), n=2 * b)
    p = logit.to(x.dtype).sigmoid()
    p_real, p_fake = p[:b], p[b:2 * b]
    hidden = model.hidden_losses([m[2 * b:].to(x.dtype) for m in h], [m[b:2 * b].to(x.dtype) for m in h], x[0].numel())
    return model.pixel_loss(x, x_fake), hidden, discriminator_loss(p_real, p_fake), p_real, p_fake, x_fake


def train_step(G, D, opt_g, opt_d, f, x, x_real, step, ramp=2500, pixel_weight=1.0, hidden_weight=1.0, weight_decay=1e-4,
               order="shared", amp=None, scaler=None):
    """One step of the released code, or with order="alternate" of the paper's text; returns the (9,) detached terms of the log.

    shared: both gradients come from one forward pass with the parameters before either update; then every kernel shrinks by
    weight_decay, then both updates are subtracted. alternate: the generator's step first, then the discriminator's on fresh images.
    `step`: steps already done. `scaler`: a torch.amp.GradScaler for fp16.
    """
    scaler = scaler or torch.amp.GradScaler(f.device.type, enabled=False)
    g_params, d_params = list(G.parameters()), list(D.parameters())
    opt_g.zero_grad(set_to_none=True)
    opt_d.zero_grad(set_to_none=True)

    loss_pix, hidden, loss_d, p_real, p_fake, _ = losses(G, D, f, x, x_real, amp)
    weights = torch.tensor(hidden_weights(step, ramp), dtype=hidden.dtype, device=hidden.device)
    loss_hidden = (weights * hidden).sum()
    loss_g = pixel_weight * loss_pix + hidden_weight * loss_hidden  # no adversarial term

    if order == "shared":
        scaler.scale(loss_g).backward(inputs=g_params, retain_graph=True)
        scaler.scale(loss_d).backward(inputs=d_params)
        decay(G, weight_decay)
        decay(D, weight_decay)
        scaler.step(opt_g)
        scaler.step(opt_d)
    else:
        scaler.scale(loss_g).backward(inputs=g_params)
        decay(G, weight_decay)
        scaler.step(opt_g)
        _, _, loss_d, p_real, p_fake, _ = losses(G, D, f, x, x_real, amp)
        scaler.scale(loss_d).backward(inputs=d_params)
        decay(D, weight_decay)
        scaler.step(opt_d)
    scaler.update()
    return torch.stack([loss_d, p_real.mean(), p_fake.mean(), loss_pix, loss_hidden, *hidden]).detach()


@torch.no_grad()
def decay(net, weight_decay):
    """Every convolution kernel times (1 - weight_decay), before the update is subtracted."""
    for kernel in model.kernels(net):
        kernel.mul_(1 - weight_decay)


@torch.no_grad()
def evaluate_losses(G, D, folder, rows, image_norm, device, batch=256):
    """Pixel loss and summed hidden loss in eval mode, a mean over the given cells: what the log calls train_pix, val_pix, ..."""
    training = G.training, D.training
    G.eval(), D.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(0, len(rows), batch):
        f, x = load_batch(folder, rows[i:i + batch], image_norm, device)
        x_fake = G(f)
        (_, h), (_, h_fake) = D(x), D(x_fake)
        pair = torch.stack([model.pixel_loss(x, x_fake), model.hidden_losses(h, h_fake, x[0].numel()).sum()])
        total += pair.cpu().double() * len(f)
    G.train(training[0]), D.train(training[1])
    return (total / len(rows)).tolist()


def load_batch(folder, rows, image_norm, device):
    """Standardised features (B, F) and images (B, C, H, W) in 0..1 of the given rows, on the device."""
    f = model.standardise(*folder.measurements(rows))
    x = data.scale_images(folder.images(rows).to(device, non_blocking=True), image_norm, folder.white)
    return f.to(device, non_blocking=True), x


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def save_atomically(state, path):
    """torch.save to a temporary name beside `path`, flushed to the disk, then renamed: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@torch.no_grad()
def save_samples(path, G, folder, rows, image_norm, device, per_line=13):
    """A PNG of the given cells: each line of real cells has the generated ones below it (DAPI blue, tubulin green, actin red)."""
    f, x = load_batch(folder, rows, image_norm, device)
    training, _ = G.training, G.eval()
    real, fake = data.composite(x), data.composite(G(f))
    G.train(training)
    lines = [part for i in range(0, len(rows), per_line) for part in (real[i:i + per_line], fake[i:i + per_line])]
    temporary = path.with_suffix(".tmp")
    Image.fromarray(data.tile(lines)).save(temporary, format="PNG")
    os.replace(temporary, path)


def log_line(step, steps, row, eta):
    """The fixed-width line of the log; validation losses are added on the steps that have them."""
    line = (f"step {step:6d}/{steps} | D {row['loss_d']:.3f} (real {row['p_real']:.2f} fake {row['p_fake']:.2f}) | pix {row['loss_pix']:7.1f} "
            f"| hidden {row['loss_hidden']:9.1f} | {row['cells_per_s']:5.0f} cells/s | eta {int(eta) // 3600}:{int(eta) % 3600 // 60:02d}:{int(eta) % 60:02d}")
    if row["val_pix"] != "":
        line += f" | eval pix: train {row['train_pix']:.1f} val {row['val_pix']:.1f}"
    return line


def keep_rows(path, step):
    """Cuts a log back to the rows up to `step`, so that a resumed run writes each step once."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
    add("--run", metavar="DIR", help="where the run is written (default runs/<model>-seed<seed>); an existing one is refused without --resume")
    add("--resume", action="store_true", help="go on from RUN/last.pt, bit for bit as if never interrupted (CPU)")
    add("--model", default="cp2image", choices=["cp2image"], help="which model (default cp2image)")
    add("--steps", type=int, default=680_000, help="training steps (default 680000, the released configuration)")
    add("--batch", type=int, default=0, help="cells a step (default 0: one per treatment, as the paper; 104 on BBBC021)")
    add("--lr-g", type=float, default=0.01, help="generator's learning rate, Adam (default 0.01, as the released code ran)")
    add("--lr-d", type=float, default=0.001, help="discriminator's learning rate, SGD with momentum 0.9 (default 0.001, as it ran)")
    add("--pixel-weight", type=float, default=1.0, help="weight of the pixel loss (default 1)")
    add("--hidden-weight", type=float, default=1.0, help="weight of the learned metric (default 1; 0 is pixels only)")
    add("--hidden-ramp", type=int, default=2500, help="steps over which each hidden map fades in, one after the other (default 2500)")
    add("--weight-decay", type=float, default=1e-4, help="share of each kernel taken off a step (default 1e-4)")
    add("--spectral-norm", choices=["on", "off"], default="on", help="of the discriminator's kernels (default on)")
    add("--d-batch-norm", choices=["on", "off"], default="on", help="in the discriminator; off shows what spectral norm does (default on)")
    add("--order", choices=["shared", "alternate"], default="shared", help="one forward pass for both updates (released), or G then D (text)")
    add("--image-norm", choices=["cell-max", "percentile"], default="cell-max", help="images by each cell's own maximum (paper) or one fixed level")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision (default off; fp16 needs CUDA)")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="keep an average of the generator's weights too, e.g. 0.999 (default 0: none)")
    add("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the weights, the batches and the cells that are shown and validated (default 0)")
    add("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    add("--sample-every", type=int, default=2500, help="steps between sample pictures (default 2500; always at the end)")
    add("--val-every", type=int, default=500, help="steps between validations (default 500; always at the end)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000; always at the end)")
    add("--bench", type=int, default=0, metavar="N", help="time N steps after 3 for warming up, print ms a step, write nothing")
    args = parser.parse_args(argv)
    for name in ("steps", "log_every", "sample_every", "val_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    for name in ("batch", "lr_g", "lr_d", "pixel_weight", "hidden_weight", "hidden_ramp", "weight_decay", "ema", "bench", "seed"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more")
    if args.ema >= 1 or args.weight_decay >= 1:
        parser.error("--ema and --weight-decay are shares, expected below 1")
    if args.batch in (1, 2, 3):
        parser.error(f"--batch is {args.batch}: batch norm needs at least 4 cells")
    return args


def pick_device(name):
    """The torch device for a --device flag; InputError if this machine does not have it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise data.InputError(f"--device {name}: not on this machine; expected auto, cpu, cuda or cuda:0..{max(torch.cuda.device_count() - 1, 0)}") from None
    return device


def keep_freed_memory():
    """Tells glibc to keep freed memory for the next tensor: giving it back and faulting it in again made a CPU step 2 to 7 times slower."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1), mallopt(-4, 0)  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no separate mappings
    except (AttributeError, OSError):
        pass  # another C library: nothing to set


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if args.amp == "fp16" and device.type != "cuda":
        raise data.InputError("--amp fp16 needs CUDA; use bf16 or off here")

    # The data
    folder = data.open_folder(args.data)
    train_rows, val_rows = folder.rows("train"), folder.rows("val")
    sampler = data.TreatmentSampler(train_rows, folder.treatment, args.batch)
    if sampler.batch < 8 and not args.batch:  # a laboratory's few treatments would make a batch that batch norm cannot use
        sampler.batch = min(32, len(train_rows))
    elif sampler.batch < 4:
        raise data.InputError(f"{args.data}: a batch of {sampler.batch}, batch norm needs at least 4 cells")
    pick = torch.Generator().manual_seed(args.seed)
    shown = val_rows[torch.randperm(len(val_rows), generator=pick)[:26].sort().values.numpy()]
    checked = [rows[torch.randperm(len(rows), generator=pick)[:VALIDATED].sort().values.numpy()] for rows in (train_rows, val_rows)]

    # The networks and their optimisers
    torch.manual_seed(args.seed)
    G = model.Generator(len(folder.features), len(folder.channels)).to(device)
    D = model.Discriminator(len(folder.channels), args.spectral_norm == "on", args.d_batch_norm == "on").to(device)
    G_ema = copy.deepcopy(G) if args.ema else None
    opt_g = torch.optim.Adam(G.parameters(), lr=args.lr_g, betas=(0.9, 0.999), eps=1e-7)
    opt_d = torch.optim.SGD(D.parameters(), lr=args.lr_d, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    print(f"data   {args.data}: {len(folder)} cells, {len(train_rows)} train, {len(val_rows)} val, {len(folder.features)} features, "
          f"{len(sampler.count)} treatments in training, normalise {folder.normalise}, images {args.image_norm}")
    print(f"model  {args.model}: generator {model.count_parameters(G):,} + discriminator {model.count_parameters(D):,} parameters trained "
          f"(the paper counts {sum(model.PAPER_PARAMETERS.values()):,} at 453 features, of which "
          f"{model.PAPER_PARAMETERS['unused encoder'] + model.PAPER_PARAMETERS['unused output heads']:,} are never trained)")
    print(f"step   batch {sampler.batch} | G Adam {args.lr_g:g} | D SGD {args.lr_d:g} | order {args.order} | hidden weight {args.hidden_weight:g} "
          f"ramp {args.hidden_ramp} | seed {args.seed} | {device} ({torch.get_num_threads()} CPU threads) | amp {args.amp} | torch {torch.__version__}", flush=True)

    def batch_of(step):
        f, x = load_batch(folder, sampler.draw(args.seed, step, 0), args.image_norm, device)
        _, x_real = load_batch(folder, sampler.draw(args.seed, step, 1), args.image_norm, device)
        return f, x, x_real

    def one_step(step):
        terms = train_step(G, D, opt_g, opt_d, *batch_of(step), step, args.hidden_ramp, args.pixel_weight, args.hidden_weight,
                           args.weight_decay, args.order, amp, scaler)
        if G_ema is not None:
            with torch.no_grad():
                for average, now in zip(G_ema.state_dict().values(), G.state_dict().values()):
                    average.lerp_(now, 1 - args.ema)
        return terms

    if args.bench:
        times = []
        for step in range(args.bench + 3):
            start = time.perf_counter()
            one_step(step).tolist()  # waits for the device
            times.append(time.perf_counter() - start)
        ms = 1000 * statistics.median(times[3:])
        print(f"bench  {args.bench} steps: median {ms:.1f} ms a step, {1000 * sampler.batch / ms:.0f} cells/s")
        return

    # The run's folder
    run = Path(args.run or f"runs/{args.model}-seed{args.seed}")
    last, log_path = run / "last.pt", run / "log.csv"
    if args.resume and not last.is_file():
        raise data.InputError(f"{run}: nothing to resume (no last.pt); start without --resume")
    if not args.resume and run.exists() and any(run.iterdir()):
        raise data.InputError(f"{run}: there is a run already; go on with it by --resume, or choose another --run")
    settings = {k: v for k, v in vars(args).items() if k not in RESUMABLE}
    step, best = 0, float("inf")
    if args.resume:
        state = model.read_checkpoint(last, device)
        if "opt_g" not in state:
            raise data.InputError(f"{last}: has no optimiser state to resume from; use a run's last.pt")
        differ = [f"--{k.replace('_', '-')} {v} (was {state['settings'].get(k)})" for k, v in settings.items() if state["settings"].get(k) != v]
        if differ:
            raise data.InputError(f"{run}: resumed with other settings: {', '.join(differ)}; give the old ones, or start another --run")
        if state["identity"] != folder.identity():
            raise data.InputError(f"{run}: was trained on another prepared folder than {args.data} (checksums differ)")
        G.load_state_dict(state["G"]), D.load_state_dict(state["D"])
        opt_g.load_state_dict(state["opt_g"]), opt_d.load_state_dict(state["opt_d"]), scaler.load_state_dict(state["scaler"])
        if G_ema is not None:
            G_ema.load_state_dict(state["G_ema"])
        step, best = state["step"], state["best"]
        keep_rows(log_path, step)
        print(f"resume {last} at step {step}", flush=True)
        if step >= args.steps:
            print(f"done   {run} has its {args.steps} steps; give a larger --steps to go on")
            return
    (run / "samples").mkdir(parents=True, exist_ok=True)
    command = "python train.py " + shlex.join(sys.argv[1:] if argv is None else list(argv))
    (run / "args.json").write_text(json.dumps({**vars(args), "run": str(run), "command": command, "torch": torch.__version__}, indent=1) + "\n")

    def state_of(full):
        """What a checkpoint holds; `full`: with all that resuming needs."""
        state = {"format": "cp2image-1", "model": args.model, "step": step, "best": best, "features": folder.features,
                 "channels": folder.channels, "centre": folder.centre, "scale": folder.scale, "normalise": folder.normalise,
                 "image_norm": args.image_norm, "white": folder.white if args.image_norm == "percentile" else None, "G": G.state_dict(),
                 "G_ema": None if G_ema is None else G_ema.state_dict(), "D": D.state_dict(), "settings": settings,
                 "identity": folder.identity(), "command": command}
        return {**state, "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict(), "scaler": scaler.state_dict()} if full else state

    # Ctrl-C and SIGTERM: finish the step, save, leave
    caught = []
    old_handlers = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    log = open(log_path, "a", newline="")
    writer = csv.DictWriter(log, LOG_COLUMNS)
    if log.tell() == 0:
        writer.writeheader()
    best_G = G_ema if G_ema is not None else G
    first_bad = torch.full((), -1, device=device)  # the first step with a non-finite term, kept on the device: no waiting for it every step
    since, saved, clock, started, first_step = step, step, time.perf_counter(), time.perf_counter(), step
    try:
        while step < args.steps and not caught:
            terms = one_step(step)
            step += 1
            first_bad = torch.where((first_bad < 0) & ~terms.isfinite().all(), step, first_bad)
            do_log, do_val, do_save, do_sample = (step == args.steps or step % every == 0 for every in
                                                  (args.log_every, args.val_every, args.save_every, args.sample_every))
            if not (do_log or do_val or do_save or do_sample or step == 1):
                continue

            if first_bad >= 0:
                names = ", ".join(f"{n} {v:g}" for n, v in zip(LOG_COLUMNS[1:], terms.tolist()))
                kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was written yet"
                raise data.InputError(f"a loss is not finite since step {int(first_bad)} (at step {step}: {names}); {kept}; try a smaller --lr-g or --amp off")

            seconds = time.perf_counter() - clock
            row = dict.fromkeys(LOG_COLUMNS, "")
            row.update(zip(LOG_COLUMNS, [step, *terms.tolist()]), cells_per_s=(step - since) * sampler.batch / seconds)
            if do_val:
                for name, rows in zip(("train", "val"), checked):
                    row[f"{name}_pix"], row[f"{name}_hidden"] = evaluate_losses(best_G, D, folder, rows, args.image_norm, device)
                if row["val_pix"] < best:
                    best = row["val_pix"]
                    save_atomically(state_of(full=False), run / "best.pt")
            eta = (args.steps - step) * (time.perf_counter() - started) / (step - first_step)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            print(log_line(step, args.steps, row, eta), flush=True)
            if do_sample:
                save_samples(run / "samples" / f"step{step:06d}.png", best_G, folder, shown, args.image_norm, device)
            if do_save:
                log.flush()
                save_atomically(state_of(full=True), last)
                saved = step
            since, clock = step, time.perf_counter()  # the rate leaves validation and saving out; the eta does not
    finally:
        log.close()
        for s, handler in old_handlers.items():
            signal.signal(s, handler)
    if caught:
        if saved != step and first_bad < 0:
            save_atomically(state_of(full=True), last)
        print(f"stopped by {signal.Signals(caught[0]).name} at step {step}: {last} is saved; go on with --resume", flush=True)
        sys.exit(128 + caught[0])
    minutes = (time.perf_counter() - started) / 60
    print(f"done   {step} steps in {minutes:.1f} min: {last}, best validation pixel loss {best:.1f} in {run / 'best.pt'}, "
          f"pictures in {run / 'samples'}")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
