"""Train CP2Image on a prepared folder: the generator learns to draw a cell from its CellProfiler measurements. Or a baseline of it.

    python train.py --data out/ --steps 300
    python train.py --data out/ --model vaeplus
    torchrun --nproc_per_node=4 -- train.py --data out/          # the `--` keeps --run from torchrun

Reads the folder of prepare_bbbc021.py. Writes RUN/last.pt (all that resuming and drawing need), RUN/best.pt (the generator with
the lowest validation pixel loss; not for GANs), RUN/log.csv, RUN/args.json and RUN/samples/*.png. Cost: see the README's speed table.
"""
import argparse
import contextlib
import copy
import csv
import itertools
import json
import os
import resource
import shlex
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data
import model

LOSS_TERMS = ["loss_pix", "loss_hidden", "hidden0", "hidden1", "hidden2", "hidden3"]
TERMS = {"cp2image": ["loss_d", "p_real", "p_fake", *LOSS_TERMS], "vae": ["kl", "loss_pix"],  # what a step of each model reports
         "vaeplus": ["kl", "loss_d", "p_real", "p_fake", *LOSS_TERMS],
         **dict.fromkeys(("lsgan", "dcgan", "wgan"), ["loss_g", "loss_d", "real", "fake"])}
VALIDATION = ["train_pix", "val_pix", "train_hidden", "val_hidden"]
VALIDATED = 512  # training and as many validation cells that the log's train_pix and val_pix are means over
DEFAULTS = {  # what the authors of each model trained with; 80,000 steps are VAEplus' own, for the others a choice of ours
    "cp2image": {"steps": 680_000, "batch": 0, "lr_g": 0.01, "lr_d": 0.001, "lr_decay": 1.0, "weight_decay": 1e-4, "spectral_norm": "on"},
    "vae": {"steps": 80_000, "batch": 0, "lr_g": 0.01, "lr_d": 0.0, "lr_decay": 1.0, "weight_decay": 1e-4, "spectral_norm": "off"},
    "vaeplus": {"steps": 80_000, "batch": 0, "lr_g": 0.01, "lr_d": 0.001, "lr_decay": 1.0, "weight_decay": 1e-4, "spectral_norm": "off"},
    "lsgan": {"steps": 80_000, "batch": 64, "lr_g": 2e-4, "lr_d": 7e-5, "lr_decay": 0.9999, "weight_decay": 0.0, "spectral_norm": "off"},
    "dcgan": {"steps": 80_000, "batch": 64, "lr_g": 1e-5, "lr_d": 5e-5, "lr_decay": 0.9999, "weight_decay": 0.0, "spectral_norm": "off"},
    "wgan": {"steps": 80_000, "batch": 64, "lr_g": 2e-4, "lr_d": 7e-5, "lr_decay": 0.9999, "weight_decay": 0.0, "spectral_norm": "off"}}
RESUMABLE = {"steps", "run", "resume", "data", "device", "graph", "resident", "compile", "log_every", "sample_every", "val_every", "save_every",
             "bench"}


# ---------------------------------------------------------------------------------------------------------------------
# The methods: for each model the loss terms and one step (the pixel and hidden terms stand in model.py). A student changes the loss here.


def hidden_weights(step, ramp):
    """w_k = clip((step - ramp (k+1)) / ramp, 0, 1) for the four hidden maps (4,); step = steps already done (released code, ramp 2500).
    `step` may be a tensor on a GPU, which a CUDA graph reads anew each time."""
    step = torch.as_tensor(step, dtype=torch.float64)
    k = torch.arange(model.HIDDEN_MAPS, device=step.device)
    return ((step - ramp * (k + 1)) / ramp).clamp(0, 1) if ramp else torch.ones_like(k, dtype=step.dtype)


def fade_in(hidden, step, ramp):
    """The learned metric: the losses of the hidden maps (4,), each times its weight at this step. While all are 0 no backward pass is made."""
    weights = hidden_weights(step, ramp)
    return (weights.to(hidden) * (hidden if weights.is_cuda or weights.any() else hidden.detach())).sum()


def discriminator_loss(p_real, p_fake):
    """Binary cross-entropy over the probabilities (B,) of real (target 1) and generated (target 0) images, 1e-7 inside the logarithms."""
    return -0.5 * ((p_real + 1e-7).log().mean() + (1 - p_fake + 1e-7).log().mean())


def autocast(x, amp):
    return torch.autocast(x.device.type, dtype=amp, enabled=amp is not None, cache_enabled=False)


def compare(D, x, x_fake, x_real, amp=None):
    """What the discriminator says of images (B, C, H, W): (hidden (4,), loss_d, p_real, p_fake).
    It sees [x_real, x_fake] in one pass, which sets the batch-norm moments, and the originals x follow by the same moments. Nothing is
    detached: the maps of the originals depend on the generated images through those moments, and the released gradient has that path."""
    b = len(x)
    with autocast(x, amp):
        (logit, h), (_, h_x) = D((x_real, x_fake.to(x_real.dtype)), x)
    p_real, p_fake = logit.to(x.dtype).sigmoid().split(b)
    hidden = model.hidden_losses([m.to(x.dtype) for m in h_x], [m[b:].to(x.dtype) for m in h], x[0].numel())
    return hidden, discriminator_loss(p_real, p_fake), p_real, p_fake


def losses(G, D, f, x, x_real, amp=None):
    """One forward pass of CP2Image -> (loss_pix, hidden (4,), loss_d, p_real, p_fake, x_fake).
    f (B, F) and x (B, C, H, W) are the same cells; x_real is a second, independent batch."""
    with autocast(x, amp):
        x_fake = G(f)
    return model.pixel_loss(x, x_fake), *compare(D, x, x_fake, x_real, amp), x_fake


def cp2image_step(G, D, opt_g, opt_d, f, x, x_real, step, ramp=2500, pixel_weight=1.0, hidden_weight=1.0, weight_decay=1e-4,
                  order="shared", amp=None, scaler=None):
    """One step of the released code, or with order="alternate" of the paper's text; returns the detached TERMS of the log.
    shared: both gradients come from one forward pass with the parameters before either update; then every kernel shrinks by
    weight_decay, then both updates are subtracted. alternate: the generator's step first, then the discriminator's on fresh images.
    `step`: steps already done. `scaler`: a torch.amp.GradScaler for fp16."""
    loss_pix, hidden, loss_d, p_real, p_fake, _ = losses(G, D, f, x, x_real, amp)
    loss_hidden = fade_in(hidden, step, ramp)
    loss_g = pixel_weight * loss_pix + hidden_weight * loss_hidden  # no adversarial term

    if order == "shared":
        update([(G, opt_g, loss_g), (D, opt_d, loss_d)], weight_decay, scaler)
    else:
        update([(G, opt_g, loss_g)], weight_decay, scaler)
        _, _, loss_d, p_real, p_fake, _ = losses(G, D, f, x, x_real, amp)
        update([(D, opt_d, loss_d)], weight_decay, scaler)
    return torch.stack([loss_d, p_real.mean(), p_fake.mean(), loss_pix, loss_hidden, *hidden]).detach()


def vae_step(G, D, opt_g, opt_d, f, x, x_real, step, beta=2.0, ramp=2500, pixel_weight=1.0, hidden_weight=1.0, weight_decay=1e-4,
             amp=None, scaler=None):
    """One step of the VAE, pixels + beta * KL; with a discriminator D of VAEplus, which adds the learned metric (Lafarge et al. 2019)."""
    with autocast(x, amp):
        x_fake, mean, log_var = G(x, torch.randn(len(x), bare(G).latent, device=x.device, dtype=x.dtype))
    mean, log_var = mean.to(x.dtype), log_var.to(x.dtype)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
    loss_pix = model.pixel_loss(x, x_fake)
    loss_g = pixel_weight * loss_pix + beta * kl
    if D is None:
        update([(G, opt_g, loss_g)], weight_decay, scaler)
        return torch.stack([kl, loss_pix]).detach()
    hidden, loss_d, p_real, p_fake = compare(D, x, x_fake, x_real, amp)
    loss_hidden = fade_in(hidden, step, ramp)
    update([(G, opt_g, loss_g + hidden_weight * loss_hidden), (D, opt_d, loss_d)], weight_decay, scaler)
    return torch.stack([kl, loss_d, p_real.mean(), p_fake.mean(), loss_pix, loss_hidden, *hidden]).detach()


def gan_step(G, D, opt_g, opt_d, f, x, x_real, step, kind="lsgan", label_low=0.8, mix="pixel", weight_decay=0.0, amp=None, scaler=None):
    """One step of CytoGAN's LSGAN, DCGAN or WGAN: D on fakes of a generator in eval mode, then the generator on fresh noise.
    Labels are times U(label_low, 1), which smooths those of real images only. "WGAN" is WGAN with gradient penalty 10 and one critic
    step; as the code ran, every pixel is mixed in its own share (mix "pixel"), in the text every image ("image")."""
    noise = lambda: torch.randn(len(x), bare(G).latent, device=x.device, dtype=x.dtype)
    with torch.no_grad(), autocast(x, amp):
        G.eval()
        x_fake = G(noise()).to(x.dtype)
        G.train()
    with autocast(x, amp):
        fake, real = D(torch.cat([x_fake, x])).to(x.dtype).split(len(x))
    if kind == "wgan":
        share = torch.rand(x.shape if mix == "pixel" else (len(x), 1, 1, 1), device=x.device, dtype=x.dtype)
        mixed = (share * x + (1 - share) * x_fake).requires_grad_()
        slope = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)[0] / 2  # of images in -1..1, as the code has them
        loss_d = fake.mean() - real.mean() + 10 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    else:
        label = 1 - torch.rand_like(real) * (1 - label_low)
        loss_d = 0.5 * (distance(kind, fake, torch.zeros_like(fake)) + distance(kind, real, label))
    update([(D, opt_d, loss_d)], weight_decay, scaler)

    with autocast(x, amp):
        logit = D(G(noise())).to(x.dtype)
    loss_g = -logit.mean() if kind == "wgan" else distance(kind, logit, torch.ones_like(logit))
    update([(G, opt_g, loss_g)], weight_decay, scaler)
    return torch.stack([loss_g, loss_d, real.mean(), fake.mean()]).detach()


def distance(kind, logit, label):
    """From logits (B,) to labels in 0..1: squared error (LSGAN) or binary cross-entropy (DCGAN)."""
    return (logit - label).square().mean() if kind == "lsgan" else F.binary_cross_entropy_with_logits(logit, label)


def update(parts, weight_decay, scaler=None):
    """For each (net, optimiser, loss): its gradient; then all kernels shrink; then all updates are subtracted."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for i, (net, opt, loss) in enumerate(parts):
        opt.zero_grad(set_to_none=True)
        scaler.scale(loss).backward(inputs=list(net.parameters()), retain_graph=i + 1 < len(parts))
    for net, _, _ in parts:
        decay(net, weight_decay)
    for _, opt, _ in parts:
        scaler.step(opt)
    scaler.update()


@torch.no_grad()
def decay(net, weight_decay):
    """Every convolution kernel times (1 - weight_decay), before the update is subtracted."""
    if weight_decay and model.kernels(net):
        torch._foreach_mul_(model.kernels(net), 1 - weight_decay)  # one launch for all on a GPU


def bare(net):
    """The network inside DistributedDataParallel."""
    return getattr(net, "module", net)


@torch.no_grad()
def evaluate_losses(G, D, folder, rows, image_norm, device, batch=256):
    """Pixel loss and summed hidden loss (NaN without a learned metric) in eval mode, a mean over the given cells: train_pix, ..."""
    nets = [net.eval() for net in (G, D) if net is not None]
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(0, len(rows), batch):
        f, x = load_batch(folder, rows[i:i + batch], image_norm, device)
        x_fake, hidden = model.draw(G, f, x, None), torch.full((), float("nan"))
        if D is not None:
            (_, h), (_, h_fake) = D(x), D(x_fake)
            hidden = model.hidden_losses(h, h_fake, x[0].numel()).sum()
        total += torch.stack([model.pixel_loss(x, x_fake).cpu(), hidden.cpu()]).double() * len(f)
    for net in nets:
        net.train()
    return (total / len(rows)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Batches on the device, and a step as one CUDA graph


def load_batch(folder, rows, image_norm, device):
    """Standardised features (B, F) and images (B, C, H, W) in 0..1 of the given rows, on the device; patches travel as 16-bit integers."""
    pin = torch.Tensor.pin_memory if torch.device(device).type == "cuda" else (lambda v: v)
    f = pin(model.standardise(*folder.measurements(rows))).to(device, non_blocking=True)
    patches = pin(as_int16(folder, rows)).to(device, non_blocking=True)
    return f, scaled(patches, image_norm, folder.white)


def as_int16(folder, rows):
    """Raw patches (B, C, H, W), their 16 bits as int16: on a GPU few operations take uint16."""
    return torch.from_numpy(folder.patches[rows].view(np.int16))


def scaled(patches, image_norm, white):
    """Patches of as_int16, on any device -> float32 in 0..1."""
    return data.scale_images((patches.int() & 0xFFFF).float(), image_norm, white)


class Resident:
    """A folder copied to the device once: patches as 16-bit integers, standardised features; called with row numbers (B,) there."""

    def __init__(self, folder, image_norm, device):
        self.image_norm, self.white = image_norm, torch.tensor(folder.white, device=device)
        self.patches = torch.empty(folder.patches.shape, dtype=torch.int16, device=device)
        self.f = torch.empty(folder.raw.shape, device=device)
        for start in range(0, len(folder), 4096):
            rows = np.arange(start, min(start + 4096, len(folder)))
            self.patches[start:start + 4096] = as_int16(folder, rows).to(device)
            self.f[start:start + 4096] = model.standardise(*folder.measurements(rows)).to(device)

    def __call__(self, rows):
        return self.f[rows], scaled(self.patches[rows], self.image_norm, self.white)


class Ahead:
    """load(step) worked out in threads some steps before it is asked for: reading the memory map overlaps the device's work."""

    def __init__(self, load, threads=4):
        self.load, self.pool, self.coming = load, ThreadPoolExecutor(threads), {}

    def __call__(self, step):
        for s in range(step, step + 8):
            if s not in self.coming:
                self.coming[s] = self.pool.submit(self.load, s)
        return self.coming.pop(step).result()


class Graphed:
    """A step (a function of tensors of fixed shapes on a GPU) as one CUDA graph: three calls as they are, then recorded and replayed.
    A replay is one launch for forward, backward and both optimisers, instead of hundreds. What the step returns is overwritten by the next."""

    def __init__(self, step):
        self.step, self.calls, self.graph, self.stream = step, 0, None, torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                terms = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self.inputs, self.graph = [v.clone() for v in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may read ahead meanwhile
                self.terms = self.step(*self.inputs)
        for own, value in zip(self.inputs, inputs):
            own.copy_(value)
        self.graph.replay()
        return self.terms


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


@torch.no_grad()
def save_samples(path, G, folder, rows, image_norm, device, per_line=13):
    """A PNG of the given cells, each line of real cells with what G draws of them below it (a GAN: free samples); DAPI blue, tubulin
    green, actin red."""
    f, x = load_batch(folder, rows, image_norm, device)
    training, _ = G.training, G.eval()
    noise = torch.randn(len(rows), getattr(G, "latent", 0), generator=torch.Generator().manual_seed(0)).to(device)  # the same at every step
    real, fake = data.composite(x), data.composite(model.draw(G, f, x, noise))
    G.train(training)
    lines = [part for i in range(0, len(rows), per_line) for part in (real[i:i + per_line], fake[i:i + per_line])]
    data.write(path, lambda p: Image.fromarray(data.tile(lines)).save(p, format="PNG"))


def log_line(step, steps, row, eta):
    """The fixed-width line of the log, of the terms that the model has; validation losses are added on the steps that have them."""
    line = f"step {step:6d}/{steps}"
    if "p_real" in row:
        line += f" | D {row['loss_d']:.3f} (real {row['p_real']:.2f} fake {row['p_fake']:.2f})"
    elif "loss_g" in row:
        line += f" | G {row['loss_g']:7.3f} | D {row['loss_d']:7.3f} (real {row['real']:6.2f} fake {row['fake']:6.2f})"
    for name, title, form in (("loss_pix", "pix", "7.1f"), ("loss_hidden", "hidden", "9.1f"), ("kl", "KL", "7.1f")):
        line += f" | {title} {row[name]:{form}}" if name in row else ""
    line += f" | {row['cells_per_s']:5.0f} cells/s | eta {int(eta) // 3600}:{int(eta) % 3600 // 60:02d}:{int(eta) % 60:02d}"
    if row["val_pix"] != "":
        line += f" | eval pix: train {row['train_pix']:.1f} val {row['val_pix']:.1f}"
    return line


def keep_rows(path, step):
    """Cuts a log back to the rows up to `step`, so that a resumed run writes each step once."""
    header, *rows = path.read_bytes().splitlines(keepends=True)
    kept = [row for row in rows if int(row.split(b",")[0]) <= step]
    data.write(path, lambda p: p.write_bytes(b"".join([header, *kept])))


def load_optimiser(opt, state, device):
    """An optimiser's state, but for what belongs to this machine: the kind of its learning rate and where Adam counts its steps."""
    own = [{k: group[k] for k in ("lr", "capturable", "fused") if k in group} for group in opt.param_groups]
    opt.load_state_dict(state)
    for group, values in zip(opt.param_groups, own):
        group.update(values)
    for entry in opt.state.values():
        if "step" in entry:
            entry["step"] = entry["step"].to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
    add("--run", metavar="DIR", help="where the run is written (default runs/<model>-seed<seed>); an existing one only with --resume")
    add("--resume", action="store_true", help="go on from RUN/last.pt, bit for bit as if never interrupted (CPU)")
    add("--model", default="cp2image", choices=model.KINDS,
        help="CP2Image (default), or a baseline of its Table 1 (VAE, VAEplus) or CytoGAN's; each brings its authors' settings")
    add("--steps", type=int, help="training steps (default 680000, the released configuration; baselines 80000)")
    add("--batch", type=int, help="cells a step and process (default 0: one per treatment, as the paper, 104 on BBBC021; GANs 64)")
    add("--lr-g", type=float, help="generator's learning rate, Adam (default 0.01, as the released code ran; LSGAN, WGAN 2e-4, DCGAN 1e-5)")
    add("--lr-d", type=float, help="discriminator's, SGD with momentum 0.9 (default 0.001, as it ran), of GANs Adam (7e-5, DCGAN 5e-5)")
    add("--lr-decay", type=float, help="both learning rates times this every 100 steps (default 1; GANs 0.9999)")
    add("--pixel-weight", type=float, default=1.0, help="weight of the pixel loss (default 1)")
    add("--hidden-weight", type=float, default=1.0, help="weight of the learned metric (default 1; 0 is pixels only)")
    add("--hidden-ramp", type=int, default=2500, help="steps over which each hidden map fades in, one after the other (default 2500)")
    add("--weight-decay", type=float, help="share of each kernel taken off a step (default 1e-4; GANs 0)")
    add("--latent", type=int, default=256, help="VAE, VAEplus: size of the latent space (default 256)")
    add("--beta", type=float, default=2.0, help="VAE, VAEplus: weight of the KL divergence (default 2)")
    add("--label-low", type=float, default=0.8, help="LSGAN, DCGAN: real labels are drawn from this to 1 (default 0.8; 1 is no smoothing)")
    add("--mix", choices=["pixel", "image"], default="pixel", help="WGAN's gradient penalty: mixed by pixel (code) or by image (text)")
    add("--spectral-norm", choices=["on", "off"], help="of the discriminator's kernels (default on; VAEplus off, GANs have none)")
    add("--d-batch-norm", choices=["on", "off"], default="on", help="in the discriminator; off shows what spectral norm does (default on)")
    add("--order", choices=["shared", "alternate"], default="shared", help="one pass for both updates (released), or G then D (text)")
    add("--image-norm", choices=["cell-max", "percentile"], default="cell-max", help="by each cell's maximum (paper) or one fixed level")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision (default off; fp16 needs CUDA)")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="keep averaged weights of G too, e.g. 0.999 (default 0: none)")
    add("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    add("--resident", choices=["auto", "on", "off"], default="auto", help="the whole folder on the GPU (default auto: where it fits)")
    add("--graph", choices=["auto", "on", "off"], default="auto", help="a step as one CUDA graph (default auto: on a single GPU, not fp16)")
    add("--compile", action="store_true", help="torch.compile both networks (WGAN: the generator)")
    add("--seed", type=int, default=0, help="of the weights, the batches and the cells that are shown and validated (default 0)")
    add("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    add("--sample-every", type=int, default=2500, help="steps between sample pictures (default 2500; always at the end)")
    add("--val-every", type=int, default=500, help="steps between validations (default 500; always at the end)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000; always at the end)")
    add("--bench", type=int, default=0, metavar="N", help="time N steps after 5 for warming up, beside plain eager layers; write nothing")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS.get(args.model, DEFAULTS["cp2image"]).items():  # a student's own model: CP2Image's way
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "log_every", "sample_every", "val_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    for name in ("batch", "lr_g", "lr_d", "lr_decay", "pixel_weight", "hidden_weight", "hidden_ramp", "weight_decay", "beta", "ema", "bench", "seed"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more")
    if args.ema >= 1 or args.weight_decay >= 1 or not 0 <= args.label_low <= 1 or args.latent < 1:
        parser.error("--ema and --weight-decay are shares, expected below 1, --label-low from 0 to 1, --latent 1 or more")
    if args.batch in (1, 2, 3):
        parser.error(f"--batch is {args.batch}: batch norm needs at least 4 cells")
    return args


def plain_layers():
    """The layers as the released code has them, in place of model.py's rewrites, for --bench and the tests: a context manager."""
    def batch_norm(bn, x, follow=None, pool=False, n=None):
        if follow is not None:
            return batch_norm(bn, torch.cat([x, follow]), None, pool, len(x)).tensor_split([len(x)])
        weight, bias = bn.weight[:, None, None], bn.bias[:, None, None]
        if not bn.moments:
            y = x * weight + bias
        elif bn.training:
            var, mean = torch.var_mean(x[:n], (0, 2, 3), correction=0)
            y = (x - mean[:, None, None]) / (var[:, None, None] + model.EPS).sqrt() * weight + bias
            with torch.no_grad():
                bn.running_mean.lerp_(mean, model.MOMENTUM), bn.running_var.lerp_(var, model.MOMENTUM)
        else:
            y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, model.EPS)
        return F.max_pool2d(y, 2) if pool else y

    def forward(D, x, follow=None):  # one pass over all images, the moments from x
        n, h = sum(map(len, x)) if isinstance(x, tuple) else len(x), []
        x = torch.cat([*(x if isinstance(x, tuple) else (x,)), *(() if follow is None else (follow,))])
        for i in range(5):
            y = batch_norm(getattr(D, f"bn{i}"), F.conv2d(x, getattr(D, f"conv{i}").weight), pool=i < 3, n=n)
            x = y if i == 4 else model.leaky(y)
            h.append(x)
        logit, *h = h.pop().flatten(), *h
        return (logit, h) if follow is None else ((logit[:n], [m[:n] for m in h]), (logit[n:], [m[n:] for m in h]))

    replaced = {(model, "spread_vector"): lambda f, weight: F.conv2d(f[:, :, None, None], weight, padding=4),
                (model, "double_and_convolve"): lambda h, weight, pad=4: F.conv2d(F.interpolate(h, scale_factor=2), weight, padding=pad),
                (model, "interleave"): lambda y: y, (model, "channels_last"): lambda x: x, (model.BatchNorm, "upright"): lambda bn, kernel: kernel,
                (model.BatchNorm, "forward"): batch_norm, (model.Discriminator, "forward"): forward}
    stack = contextlib.ExitStack()
    for (owner, name), function in replaced.items():
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)
    return stack


def clock(device, call, *arguments):
    """Milliseconds that a call takes on the device, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    result = call(*arguments)
    wait()
    return 1000 * (time.perf_counter() - start), result


def bench(n, batch_of, steppers, opts, cells, device, first=0):
    """Prints ms a step, cells/s, peak memory and the share of batch, updates and the rest, for each of `steppers` {name: (context, step)}.
    n steps of each in turn, from step `first`, so that a busy machine slows all alike. It waits for the device after every part, so
    training, where reading overlaps, is no slower. The share of updates is that of eager ones, so it is left out for a graph."""
    times, peaks, batches = {name: [] for name in steppers}, dict.fromkeys(steppers, 0), itertools.count()
    for i in range(n + 5):
        for name, (context, step) in steppers.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with context():
                loading, batch = clock(device, batch_of, next(batches))
                stepping, _ = clock(device, step, first + i, batch)
                used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
                updating, _ = clock(device, lambda: [opt.step() for opt in opts])  # once more, alone
            times[name].append((loading + stepping, loading, updating))
            peaks[name] = max(peaks[name], used)
    base = None
    for name, rows in times.items():
        total, loading, updating = (statistics.median(column) for column in zip(*rows[5:]))
        base = base or total
        parts = f"batch {loading / total:.0%}"
        if "graph" not in name:
            parts += f", updates {updating / total:.0%}, forward and backward {1 - (loading + updating) / total:.0%}"
        memory = f"; at most {peaks[name] / 2 ** 30:.2f} GiB on the device" if peaks[name] else ""
        print(f"bench  {name}: {total:.2f} ms a step (median of {n}), {1000 * cells / total:.0f} cells/s, {total / base:.2f} times the "
              f"first; {parts}{memory}")
    print(f"bench  peak memory of the process, all together {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")


@torch.no_grad()
def bench_drawing(n, G, n_features, device):
    """Prints how long G takes from standardised measurements to uint8 pictures in the host's memory, one cell and in batches."""
    nets = (model.Folded(G), contextlib.nullcontext), (copy.deepcopy(G).eval(), plain_layers)
    for cells in (1, 32 if device.type == "cpu" else 1024):
        f, times = torch.randn(cells, n_features), ([], [])
        for _ in range(n + 1):
            for (net, context), found in zip(nets, times):
                with context():  # ten in a row: as in use, with its own kernels in the cache
                    found += [clock(device, lambda: model.to_uint8(net(f.to(device))).cpu())[0] for _ in range(10)]
        own, other = (statistics.median(found[10:]) for found in times)
        print(f"bench  drawing {cells}: {own:.2f} ms, {1000 * cells / own:.0f} pictures/s; plain layers {other:.2f} ms, {other / own:.2f} times")


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch for large pages on a CPU, read at the first tensor
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    local = args.device if world == 1 or args.device == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}"
    device = data.pick_device(local)
    if device.type == "cpu":
        data.keep_freed_memory()
    else:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else (lambda *_, **__: None)
    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if args.amp == "fp16" and device.type != "cuda":
        raise data.InputError("--amp fp16 needs CUDA; use bf16 or off here")
    graph = device.type == "cuda" and world == 1 and args.amp != "fp16" and args.graph != "off"
    if args.graph == "on" and not graph:
        raise data.InputError("--graph on needs one CUDA device and no fp16; leave it at auto")

    # The data
    folder = data.open_folder(args.data)
    train_rows, val_rows = folder.rows("train"), folder.rows("val")
    is_gan = args.model in ("lsgan", "dcgan", "wgan")  # draws cells as they come, the others one of each treatment
    sampler = data.TreatmentSampler(train_rows, np.zeros_like(folder.treatment) if is_gan else folder.treatment, args.batch)
    if sampler.batch < 8 and not args.batch:  # a laboratory's few treatments would make a batch that batch norm cannot use
        sampler.batch = min(32, len(train_rows))
    elif sampler.batch < 4:
        raise data.InputError(f"{args.data}: a batch of {sampler.batch}, batch norm needs at least 4 cells")
    pick = torch.Generator().manual_seed(args.seed)
    shown = val_rows[torch.randperm(len(val_rows), generator=pick)[:26].sort().values.numpy()]
    checked = [rows[torch.randperm(len(rows), generator=pick)[:VALIDATED].sort().values.numpy()] for rows in (train_rows, val_rows)]

    # The networks and their optimisers
    torch.manual_seed(args.seed)
    G, D = model.networks(args.model, len(folder.features), len(folder.channels), args.spectral_norm == "on", args.d_batch_norm == "on",
                          args.latent)
    G, D = G.to(device), None if D is None else D.to(device)
    G_ema = copy.deepcopy(G) if args.ema else None
    rate = lambda lr: torch.tensor(lr, device=device) if graph else lr  # a graph reads it anew each time
    fused = device.type == "cuda"  # one kernel for all parameters; SGD's leaves its momentum unset where fp16 overflows at first
    adam = partial(torch.optim.Adam, betas=(0.5 if is_gan else 0.9, 0.999), eps=1e-8 if is_gan else 1e-7, capturable=graph, fused=fused)
    opt_g, opt_d = adam(G.parameters(), lr=rate(args.lr_g)), None
    if D is not None:
        opt_d = adam(D.parameters(), lr=rate(args.lr_d)) if is_gan else torch.optim.SGD(D.parameters(), rate(args.lr_d), 0.9, fused=fused and graph)
    opts = [(opt, lr) for opt, lr in ((opt_g, args.lr_g), (opt_d, args.lr_d)) if opt]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if args.compile:
        torch._functorch.config.donated_buffer = False  # two gradients come from one forward pass
        G.compile(), D is None or args.model == "wgan" or D.compile()  # the gradient penalty needs a second derivative
    wrapped = [net if world == 1 or net is None else torch.nn.parallel.DistributedDataParallel(net) for net in (G, D)]

    # Where batches come from
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    resident = args.resident == "on" or args.resident == "auto" and folder.patches.nbytes + 4 * folder.raw.size < 0.7 * free
    if resident and device.type != "cuda":
        raise data.InputError("--resident on needs a CUDA device; leave it at auto")
    draw = lambda step: np.concatenate([sampler.draw(args.seed, step, 2 * rank + stream) for stream in (0, 1)])
    if resident:
        gather = Resident(folder, args.image_norm, device)
        read = lambda step: (torch.from_numpy(draw(step)).pin_memory().to(device, non_blocking=True),)
    else:
        gather, read = (lambda f, x: (f, x)), lambda step: load_batch(folder, draw(step), args.image_norm, device)
        read = Ahead(read) if device.type == "cuda" else read

    say(f"data   {args.data}: {len(folder)} cells, {len(train_rows)} train, {len(val_rows)} val, {len(folder.features)} features, "
        f"{len(sampler.count)} treatments in training, normalise {folder.normalise}, images {args.image_norm}")
    said = f" + discriminator {model.count_parameters(D):,}" if D else ""
    if args.model == "cp2image":
        idle = model.PAPER_PARAMETERS["unused encoder"] + model.PAPER_PARAMETERS["unused output heads"]
        said += (f" parameters trained (the paper counts {sum(model.PAPER_PARAMETERS.values()):,} at 453 features, of which {idle:,} are never "
                 "trained)")
    say(f"model  {args.model}: generator {model.count_parameters(G):,}{said}")
    order = f"order {args.order} | hidden weight {args.hidden_weight:g} ramp {args.hidden_ramp} | " if isinstance(D, model.Discriminator) else ""
    say(f"step   batch {sampler.batch}{f' on each of {world} processes' if world > 1 else ''} | lr G {args.lr_g:g} D {args.lr_d:g} | {order}"
        f"seed {args.seed} | {device} ({torch.get_num_threads()} CPU threads) | amp {args.amp} | data "
        f"{'on the device' if resident else 'read as needed'} | {'CUDA graph' if graph else 'eager'} | torch {torch.__version__}", flush=True)

    shared = {"weight_decay": args.weight_decay, "scaler": scaler}
    metric = {"ramp": args.hidden_ramp, "pixel_weight": args.pixel_weight, "hidden_weight": args.hidden_weight}
    method = {"cp2image": partial(cp2image_step, order=args.order, **metric), "vae": partial(vae_step, beta=args.beta, **metric)}
    method["vaeplus"] = method["vae"]
    method |= {kind: partial(gan_step, kind=kind, label_low=args.label_low, mix=args.mix) for kind in ("lsgan", "dcgan", "wgan")}

    def body(done, *batch, amp=amp):
        f, x = gather(*batch)
        b = len(f) // 2
        terms = method.get(args.model, method["cp2image"])(*wrapped, opt_g, opt_d, f[:b], x[:b], x[b:], done, amp=amp, **shared)
        if G_ema is not None:
            with torch.no_grad():
                for average, now in zip(G_ema.state_dict().values(), G.state_dict().values()):
                    average.lerp_(now, 1 - args.ema) if average.is_floating_point() else average.copy_(now)
        return terms

    fast, count = Graphed(body) if graph else body, torch.zeros((), dtype=torch.int64, device=device)

    def one_step(step, batch=None, body=fast):
        if G.takes != "features":
            torch.manual_seed((args.seed * 100_003 + step) * 1024 + rank)  # noise, too, is a function of (seed, step, rank)
        for opt, lr in opts:
            for group in opt.param_groups:
                lr_now = lr * args.lr_decay ** (step // 100)
                group["lr"] = group["lr"].fill_(lr_now) if graph else lr_now
        return body(count.fill_(step) if graph else step, *(batch or read(step)))

    if args.bench:
        if world > 1:
            raise data.InputError("--bench times one process; of several, the log has the cells/s of all")
        compiled = ", compiled" if args.compile else ""
        ways = {f"these flags{', as a graph' if graph else ''}{compiled}": (contextlib.nullcontext, one_step)}
        if graph:
            ways[f"the same, eager{compiled}"] = (contextlib.nullcontext, partial(one_step, body=body))
        if not args.compile:
            ways["plain eager layers in fp32"] = (plain_layers, partial(one_step, body=partial(body, amp=None)))
        bench(args.bench, read, ways, [opt for opt, _ in opts], sampler.batch, device, (model.HIDDEN_MAPS + 1) * args.hidden_ramp)  # all maps act
        if args.model == "cp2image":
            bench_drawing(args.bench, G, len(folder.features), device)
        return

    # The run's folder
    run = Path(args.run or f"runs/{args.model}-seed{args.seed}")
    last, log_path = run / "last.pt", run / "log.csv"
    if args.resume and not last.is_file():
        raise data.InputError(f"{run}: nothing to resume (no last.pt); start without --resume")
    if not args.resume and run.exists() and any(run.iterdir()):
        raise data.InputError(f"{run}: there is a run already; go on with it by --resume, or choose another --run")
    if world > 1:
        dist.barrier()  # all have looked before one writes
    settings = {k: v for k, v in vars(args).items() if k not in RESUMABLE} | {"processes": world}
    columns = ["step", *TERMS.get(args.model, TERMS["cp2image"]), "cells_per_s", *VALIDATION]
    step, best = 0, float("inf")
    if args.resume:
        state = model.read_checkpoint(last, device)
        if "opt_g" not in state:
            raise data.InputError(f"{last}: has no optimiser state to resume from; use a run's last.pt")
        old = state["settings"]
        differ = [f"--{k.replace('_', '-')} {v} (was {old.get(k)})" for k, v in settings.items() if old.get(k) != v]
        if differ:
            raise data.InputError(f"{run}: resumed with other settings: {', '.join(differ)}; give the old ones, or start another --run")
        if state["identity"] != folder.identity:
            raise data.InputError(f"{run}: was trained on another prepared folder than {args.data} (checksums differ)")
        for net, saved in ((G, "G"), (D, "D"), (G_ema, "G_ema")):
            if net is not None:
                net.load_state_dict(state[saved])
        for opt, saved in ((opt_g, "opt_g"), (opt_d, "opt_d")):
            if opt is not None:
                load_optimiser(opt, state[saved], device)
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        say(f"resume {last} at step {step}", flush=True)
        if step >= args.steps:
            say(f"done   {run} has its {args.steps} steps; give a larger --steps to go on")
            return
    command = "python train.py " + shlex.join(sys.argv[1:] if argv is None else list(argv))
    if rank == 0:
        (run / "samples").mkdir(parents=True, exist_ok=True)
        described = {**vars(args), "run": str(run), "command": command, "torch": torch.__version__, "processes": world}
        (run / "args.json").write_text(json.dumps(described, indent=1) + "\n")
        if args.resume:
            keep_rows(log_path, step)

    def state_of(full):
        """What a checkpoint holds; `full`: with all that resuming needs."""
        state = {"format": model.FORMAT, "model": args.model, "step": step, "best": best, "features": folder.features,
                 "channels": folder.channels, "centre": folder.centre, "scale": folder.scale, "normalise": folder.normalise,
                 "image_norm": args.image_norm, "white": folder.white if args.image_norm == "percentile" else None, "G": G.state_dict(),
                 "G_ema": None if G_ema is None else G_ema.state_dict(), "D": None if D is None else D.state_dict(), "settings": settings,
                 "identity": folder.identity, "command": command}
        optimisers = {"opt_g": opt_g.state_dict(), "opt_d": opt_d and opt_d.state_dict(), "scaler": scaler.state_dict()}
        return {**state, **optimisers} if full else state

    # Ctrl-C and SIGTERM: finish the step, save, leave
    caught = []
    old_handlers = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop():  # several processes agree on it every 10 steps, or one would wait for the others for ever
        if world == 1:
            return bool(caught)
        if step % 10:
            return False
        flag = torch.tensor(float(bool(caught)), device=device)
        dist.all_reduce(flag)
        if flag.item() > 0 and not caught:
            caught.append(signal.SIGTERM)
        return flag.item() > 0

    log = open(log_path if rank == 0 else os.devnull, "a", newline="")
    writer = csv.DictWriter(log, columns)
    if log.tell() == 0:
        writer.writeheader()
    best_G = G_ema if G_ema is not None else G
    first_bad = torch.full((), -1, device=device)  # the first step with a non-finite term, kept on the device: no waiting for it every step
    since, saved, clock, started, first_step = step, step, time.perf_counter(), time.perf_counter(), step
    try:
        while step < args.steps and not stop():
            terms = one_step(step)
            step += 1
            first_bad = torch.where((first_bad < 0) & ~terms.isfinite().all(), step, first_bad)
            do_log, do_val, do_save, do_sample = (step == args.steps or step % every == 0 for every in
                                                  (args.log_every, args.val_every, args.save_every, args.sample_every))
            if rank or not (do_log or do_val or do_save or do_sample or step == 1):
                continue

            if first_bad >= 0:
                names = ", ".join(f"{n} {v:g}" for n, v in zip(columns[1:], terms.tolist()))
                kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was written yet"
                raise data.InputError(f"a loss is not finite since step {int(first_bad)} (at step {step}: {names}); {kept}; "
                                      "try a smaller --lr-g or --amp off")

            seconds = time.perf_counter() - clock
            row = dict.fromkeys(columns, "")
            row.update(zip(columns, [step, *terms.tolist()]), cells_per_s=(step - since) * sampler.batch * world / seconds)
            if do_val and not is_gan:  # nothing that a free sample could be held against
                for name, rows in zip(("train", "val"), checked):
                    row[f"{name}_pix"], row[f"{name}_hidden"] = evaluate_losses(best_G, D, folder, rows, args.image_norm, device)
                if row["val_pix"] < best:
                    best = row["val_pix"]
                    data.write(run / "best.pt", partial(torch.save, state_of(full=False)))
            eta = (args.steps - step) * (time.perf_counter() - started) / (step - first_step)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            say(log_line(step, args.steps, row, eta), flush=True)
            if do_sample:
                save_samples(run / "samples" / f"step{step:06d}.png", best_G, folder, shown, args.image_norm, device)
            if do_save:
                log.flush()
                data.write(last, partial(torch.save, state_of(full=True)))
                saved = step
            since, clock = step, time.perf_counter()  # the rate leaves validation and saving out; the eta does not
        if caught and rank == 0 and saved != step and first_bad < 0:
            data.write(last, partial(torch.save, state_of(full=True)))
            saved = step
        if world > 1:
            dist.barrier()  # torchrun ends the others as soon as one leaves
    finally:
        log.close()
        for s, handler in old_handlers.items():
            signal.signal(s, handler)
    if caught:
        kept = f"{last} is saved; go on with --resume" if saved == step and last.exists() else "nothing new was saved"
        say(f"stopped by {signal.Signals(caught[0]).name} at step {step}: {kept}", flush=True)
        sys.exit(128 + caught[0])
    minutes = (time.perf_counter() - started) / 60
    kept = "" if is_gan else f", best validation pixel loss {best:.1f} in {run / 'best.pt'}"
    say(f"done   {step} steps in {minutes:.1f} min: {last}{kept}, pictures in {run / 'samples'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
