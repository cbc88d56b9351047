"""Train CP2Image (or Sharp, a baseline, the Statistical Cell) on a prepared folder: it learns to draw a cell from its measurements.

    python train.py --data out/ --steps 300
    python train.py --data out/ --model sharp                    # or vaeplus, lsgan, ..., statcell
    torchrun --nproc_per_node=4 -- train.py --data out/          # the `--` keeps --run from torchrun

Reads the folder of prepare_bbbc021.py. Writes RUN/last.pt (all that resuming and drawing need), RUN/best.pt (the generator
with the lowest validation loss, see `validate`; not for Sharp and GANs), RUN/log.csv, RUN/losses.png, RUN/args.json and
RUN/samples/*.png.
Cost: see the README's speed table. The methods come first, one step each: a student changes the loss there.
"""
import argparse
import copy
import csv
import datetime
import io
import json
import os
import shlex
import signal
import statistics
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import model

VALIDATED = 512  # training and as many validation cells that the log's train_pix and val_pix are means over
GANS = ("lsgan", "dcgan", "wgan")
CRITICISED = ("sharp", *GANS)  # a pixel loss does not judge them
AS_THEY_COME = (*CRITICISED, "statcell")  # a batch is of all training cells alike


# ---------------------------------------------------------------------------------------------------------
# CP2Image's step


def hidden_weights(step, ramp):
    """w_k = clip((step - ramp (k+1)) / ramp, 0, 1) for the four hidden maps (4,); step = steps done (released code, ramp 2500)."""
    if ramp == 0:
        return torch.ones(model.HIDDEN_MAPS)
    k = torch.arange(model.HIDDEN_MAPS, dtype=torch.float64)
    return ((step - ramp * (k + 1)) / ramp).clamp(0, 1)


def discriminator_loss(logit_real, logit_fake):
    """Binary cross-entropy of real (target 1) and generated (target 0) images, logits (B,) each, 1e-7 inside the logarithms."""
    says_real = (logit_real.sigmoid() + 1e-7).log().mean()
    says_fake = (1 - logit_fake.sigmoid() + 1e-7).log().mean()
    return -0.5 * (says_real + says_fake)


def look(D, x, x_fake, x_real, amp=None):
    """The discriminator's one pass over [x_real, x_fake, x], images (B, C, H, W); x follows the moments of the first two.
    Nothing is detached: the maps of x depend on the generated images through those moments, and the released gradient has
    that path. Returns logits (B,) of real and generated images and the learned metric's losses (4,)."""
    B = len(x)
    with autocast(x, amp):
        logit, maps = D(torch.cat([x_real, x_fake, x]), moments_of=2 * B)  # (3B,), four maps of 3B
    logit_real, logit_fake, _ = logit.chunk(3)
    maps_fake = [h[B:2 * B] for h in maps]
    maps_x = [h[2 * B:] for h in maps]
    hidden = model.hidden_losses(maps_x, maps_fake, x[0].numel())
    return logit_real, logit_fake, hidden


def cp2image_step(G, D, opt_g, opt_d, f, x, x_real, weights, pixel_weight=1.0, hidden_weight=1.0,
                  weight_decay=1e-4, order="shared", amp=None, scaler=None):
    """One step of the released code; returns its terms for the log. f (B, F) and x (B, C, H, W) in 0..1 are the same
    cells, x_real a second, independent batch; `weights` (4,): hidden_weights.
    order "shared": both gradients come from one forward pass with the parameters before either update; "alternate"
    (the paper's text): the generator's step first, then the discriminator's on fresh images; no running moment moves
    twice a step."""
    with autocast(x, amp):
        x_fake = G(f)                                               # (B, C, H, W)
    logit_real, logit_fake, hidden = look(D, x, x_fake, x_real, amp)
    still_off = weights.device.type == "cpu" and not weights.any()
    if still_off or hidden_weight == 0:
        hidden = hidden.detach()  # no backward pass of the metric

    loss_pix = model.pixel_loss(x, x_fake)
    loss_hidden = (weights.to(hidden) * hidden).sum()               # the learned metric, faded in map by map
    loss_g = pixel_weight * loss_pix + hidden_weight * loss_hidden  # no adversarial term: the released code has none
    loss_d = discriminator_loss(logit_real, logit_fake)

    if order == "shared":
        update([(G, opt_g, loss_g), (D, opt_d, loss_d)], weight_decay, scaler)
    else:
        update([(G, opt_g, loss_g)], weight_decay, scaler)
        track_moments(False, G, D)
        with torch.no_grad(), autocast(x, amp):
            x_fake = G(f)
        logit_real, logit_fake, _ = look(D, x, x_fake, x_real, amp)
        track_moments(True, G, D)
        loss_d = discriminator_loss(logit_real, logit_fake)
        update([(D, opt_d, loss_d)], weight_decay, scaler)

    p_real = logit_real.sigmoid().mean()
    p_fake = logit_fake.sigmoid().mean()
    return terms_of(loss_d=loss_d, p_real=p_real, p_fake=p_fake, loss_pix=loss_pix, loss_hidden=loss_hidden,
                    hidden=hidden)


def update(parts, weight_decay=0.0, scaler=None):
    """For each (net, optimiser, loss) its gradient; then every kernel shrinks by `weight_decay`; then all updates are subtracted.
    Several processes average their gradients. `scaler`: a torch.amp.GradScaler for fp16, which may leave an update out."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for i, (net, opt, loss) in enumerate(parts):
        opt.zero_grad(set_to_none=True)
        others_follow = i + 1 < len(parts)
        scaler.scale(loss).backward(inputs=list(net.parameters()), retain_graph=others_follow)
    for net, _, _ in parts:
        if dist.is_initialized():
            for p in net.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        with torch.no_grad():
            for kernel in model.kernels(net):
                kernel.mul_(1 - weight_decay)
    for _, opt, _ in parts:
        scaler.step(opt)
    scaler.update()


def autocast(x, amp):
    """Mixed precision in `amp` (torch.bfloat16, torch.float16 or None) on the device of x."""
    return torch.autocast(x.device.type, dtype=amp, enabled=amp is not None, cache_enabled=False)


def track_moments(on, *nets):
    """Whether training batches move the running moments of the networks' batch norms."""
    for net in nets:
        for module in net.modules():
            if isinstance(module, model.BatchNorm):
                module.track = on


def terms_of(hidden=(), **terms):
    """What a step tells the log, {name: number}: whatever it is given, and each hidden map's loss."""
    for k, loss in enumerate(hidden):
        terms[f"hidden{k}"] = loss
    return {name: torch.as_tensor(value).detach() for name, value in terms.items()}


# ---------------------------------------------------------------------------------------------------------
# Sharp's step, beyond the paper: a critic for texture, a regressor for obedience, measurements that may be missing

# What people ask for alone: many training cells are told one of these and little else
ASKED = (r"(Nuclei|Cells|Cytoplasm)_AreaShape_(Area|Eccentricity|FormFactor|InertiaTensor_0_1)|"
         r"(Nuclei|Cells)_Intensity_(Mean|Std|Integrated)Intensity_\w+|"
         r"Cells_RadialDistribution_MeanFrac_\w+_4of4")
LIES = 0.4  # share of the cells told little that are asked for what they are not
FAR = 3.0  # sd, how far from their own values
REGRESSOR = 0.3  # of the steps, that many before them train it


def hide(f, family, asked):
    """What the generator is told of cells f (B, F), NaN = nothing, and what a critic may be told of the same cells.
    Three quarters keep what they have, every third of them without some of its families (F,). The others are told 1 to 4
    measurements, three in four times of the places `asked`; some of them are asked for other values than their own:
    of these the critic is told nothing, as no real cell has them."""
    B, width = f.shape
    most = 3 * B // 4
    keep = torch.zeros(B, width, dtype=torch.bool)
    move = torch.zeros(B, width)
    lied = torch.zeros(B, 1, dtype=torch.bool)
    families = int(family.max()) + 1
    for i in range(B):
        chance = torch.rand(2)
        if i < most:
            hidden = chance[0] if i % 3 == 1 else 0.0               # share of the families
            kept = torch.rand(families) >= hidden
            places = kept[family]
        else:
            choice = asked if chance[0] < 0.75 else torch.arange(width)
            order = torch.randperm(len(choice))
            few = torch.randint(1, 5, ())
            places = choice[order[:few]]
        keep[i, places] = True
        if i >= most and chance[1] < LIES:
            lied[i] = True
            move[i, places] = FAR * (2 * torch.rand(len(places)) - 1)
    honest = keep & ~lied
    told = torch.where(keep.to(f.device), f + move.to(f), torch.nan)
    true = torch.where(honest.to(f.device), f, torch.nan)
    return told, true


def bands(x):
    """How much fine detail images (B, C, H, W) have: (B, C, 2) logarithms of the energy in the first levels of a Laplacian pyramid.
    More levels would be met by blotches."""
    levels = []
    for _ in range(2):
        smaller = F.avg_pool2d(x, 2)
        larger = F.interpolate(smaller, x.shape[2:], mode="bilinear")
        energy = (x - larger).square().mean((2, 3))                 # (B, C)
        levels.append((energy + 1e-6).log())
        x = smaller
    return torch.stack(levels, 2)


def squared(error):
    """error ** 2, beyond 2 as steep as there (Huber)."""
    return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=2.0)


def asked_loss(R, x_fake, told):
    """How far what a Regressor reads in images is from what was asked for, told (B, F), NaN = nothing: squared, in sd; beyond
    2 sd it grows in proportion, as one wild reading shall not outvote a batch."""
    values, known = model.given(told)
    trust = known * R.trust                                         # (B, F)
    seen = R(x_fake).float()                                        # (B, F)
    error = trust * squared(seen - values)
    total = trust.sum(1).clamp(min=0.1)
    return (error.sum(1) / total).mean()


def sharp_step(G, D, opt_g, opt_d, f, x, x_real, weights, R, opt_r, look, family, asked,
               pixel_weight=20.0, hidden_weight=10.0, band_weight=0.3, asked_weight=4.0, adversarial_weight=0.5,
               weight_decay=0.0, amp=None, scaler=None):
    """One step of Sharp; returns its terms for the log. f (B, F) and x (B, C, H, W) in 0..1 are the same cells, R is a trained
    Regressor that goes on learning from `look`: what is measured in images (b, C, H, W), (b, F), NaN = nothing; family, asked: see
    hide. The first of `weights` fades the critic in."""
    told, true = hide(f, family, asked)                             # (B, F), (B, F)
    most = 3 * len(x) // 4                                          # only these were told what they look like
    with autocast(x, amp):
        x_fake = G(told)                                            # (B, C, H, W)
        both = torch.cat([x, x_fake.detach()])
        logit, _ = D(both, torch.cat([true, true]))                 # (2B,)
    logit_real, logit_fake = logit.float().chunk(2)
    loss_real = F.relu(1 - logit_real).mean()                       # hinge
    loss_fake = F.relu(1 + logit_fake).mean()
    loss_d = loss_real + loss_fake
    update([(D, opt_d, loss_d)], weight_decay, scaler)

    with autocast(x, amp):
        logit, maps_fake = D(x_fake, true)
        with torch.no_grad():
            _, maps = D(x[:most], true[:most])
        loss_asked = asked_loss(R, x_fake, told)                    # obedience, as the regressor reads it
    loss_adv = -logit.float().mean()                                # texture

    root = model.roots(x[:most])
    root_fake = model.roots(x_fake[:most].float())
    loss_pix = (root - root_fake).square().mean()
    loss_band = (bands(root) - bands(root_fake)).abs().mean()
    loss_hidden = 0                                                 # of the maps' means: what, not where
    for h, h_fake in zip(maps, maps_fake):
        difference = (h - h_fake[:most]).float()
        error = difference.mean((2, 3)).abs()                       # (3 B / 4, channels)
        loss_hidden = loss_hidden + error.mean()

    fade = weights[0].to(x)
    loss_g = pixel_weight * loss_pix + hidden_weight * loss_hidden + band_weight * loss_band
    loss_g = loss_g + asked_weight * loss_asked
    loss_g = loss_g + adversarial_weight * fade * loss_adv
    update([(G, opt_g, loss_g)], weight_decay, scaler)

    some = slice(None, None, 4)                                     # obedience to one that does not look can be feigned
    x_seen = torch.cat([x[some], x_fake[some].detach().float()])
    f_seen = torch.cat([f[some], look(x_fake[some])])
    loss_r = reading_loss(R, x_seen, f_seen)
    update([(R, opt_r, loss_r)])
    return terms_of(loss_d=loss_d, real=logit_real.mean(), fake=logit_fake.mean(), loss_asked=loss_asked,
                    loss_band=loss_band, loss_maps=loss_hidden, loss_mse=loss_pix, loss_r=loss_r)


def reading_loss(R, x, f):
    """How far what R reads in images x (B, C, H, W) is from f (B, F), NaN = unknown, of the same cells, in squared sd."""
    values, known = model.given(f)
    error = known * squared(R(x) - values)
    return error.mean()


def fit_regressor(R, cells, val_rows, steps, seed, batch=64):
    """Trains R to read measurements in pictures; R.trust becomes what it explains of each in the validation cells, 0 to 1."""
    R.train()
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    steps = max(20, steps)
    train_rows = cells.folder.rows("train")
    opt = torch.optim.AdamW(R.parameters(), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps)  # up, then down to nothing
    for step in range(steps):
        torch.manual_seed(seed_of(seed, step, 9))
        random = np.random.default_rng([seed, step, 9])
        rows = random.choice(train_rows, batch)
        f, x = cells.turned(rows, seed, step)
        loss = reading_loss(R, x, f)
        update([(R, opt, loss)])
        rates.step()
        if speaks and step % 100 == 0:
            error = loss.item()
            print(f"regressor step {step:5d}/{steps} | squared error {error:.3f}", flush=True)
    R.eval()  # its norms stay as they are from now on
    f, x = cells.features(val_rows), cells.images(val_rows)
    with torch.no_grad():
        error = (R(x) - f).square().mean(0)                         # (F,)
    r2 = 1 - error / f.var(0).clamp(min=1e-6)
    R.trust.copy_(r2.clamp(0, 1))
    if speaks:
        print(f"regressor: r2 in validation cells, median {R.trust.median().item():.2f}")


# ---------------------------------------------------------------------------------------------------------
# The baselines' steps. Random numbers come from torch's generator, which the loop seeds by (seed, step, process)


def vae_step(G, D, opt_g, opt_d, f, x, x_real, weights, beta=2.0, pixel_weight=1.0, hidden_weight=1.0,
             weight_decay=1e-4, amp=None, scaler=None):
    """One step of the VAE, pixels + beta * KL; with a discriminator D of VAEplus, which adds the learned metric
    (Lafarge et al. 2019). Arguments as cp2image_step's."""
    with autocast(x, amp):
        x_fake, mean, log_var = G(x, normal(x, G.latent))           # (B, C, H, W), (B, latent), (B, latent)
    kl = model.kl_divergence(mean, log_var).sum(1).mean()
    loss_pix = model.pixel_loss(x, x_fake)
    loss_g = pixel_weight * loss_pix + beta * kl
    if D is None:
        update([(G, opt_g, loss_g)], weight_decay, scaler)
        return terms_of(kl=kl, loss_pix=loss_pix)

    logit_real, logit_fake, hidden = look(D, x, x_fake, x_real, amp)
    loss_hidden = (weights.to(hidden) * hidden).sum()
    loss_g = loss_g + hidden_weight * loss_hidden
    loss_d = discriminator_loss(logit_real, logit_fake)
    update([(G, opt_g, loss_g), (D, opt_d, loss_d)], weight_decay, scaler)
    p_real = logit_real.sigmoid().mean()
    p_fake = logit_fake.sigmoid().mean()
    return terms_of(kl=kl, loss_d=loss_d, p_real=p_real, p_fake=p_fake, loss_pix=loss_pix, loss_hidden=loss_hidden,
                    hidden=hidden)


def gan_step(G, D, opt_g, opt_d, f, x, x_real, weights, kind="lsgan",
             weight_decay=0.0, amp=None, scaler=None):
    """One step of CytoGAN's LSGAN, DCGAN or WGAN: D on fakes of a generator in eval mode, then G on fresh noise.
    Labels are times U(0.8, 1), which smooths those of real images only. "WGAN" is WGAN with gradient penalty 10 and one
    critic step."""
    with torch.no_grad(), autocast(x, amp):
        G.eval()
        x_fake = G(normal(x, G.latent)).to(x.dtype)
        G.train()
    with autocast(x, amp):
        logit = D(torch.cat([x_fake, x])).to(x.dtype)
        fake, real = logit.chunk(2)                                 # (B,), (B,)
    if kind == "wgan":
        penalty = gradient_penalty(D, x, x_fake)
        loss_d = fake.mean() - real.mean() + 10 * penalty
    else:
        label = 1 - 0.2 * torch.rand_like(real)
        loss_fake = distance(kind, fake, torch.zeros_like(fake))
        loss_real = distance(kind, real, label)
        loss_d = 0.5 * (loss_fake + loss_real)
    update([(D, opt_d, loss_d)], weight_decay, scaler)

    with autocast(x, amp):
        x_fake = G(normal(x, G.latent))
        logit = D(x_fake).to(x.dtype)
    if kind == "wgan":
        loss_g = -logit.mean()
    else:
        loss_g = distance(kind, logit, torch.ones_like(logit))
    update([(G, opt_g, loss_g)], weight_decay, scaler)
    return terms_of(loss_g=loss_g, loss_d=loss_d, real=real.mean(), fake=fake.mean())


def normal(x, n):
    """Standard normal vectors (B, n) beside images x (B, C, H, W)."""
    return torch.randn(len(x), n, device=x.device, dtype=x.dtype)


def distance(kind, logit, label):
    """From logits (B,) to labels in 0..1: squared error (LSGAN) or binary cross-entropy (DCGAN)."""
    if kind == "lsgan":
        return (logit - label).square().mean()
    return F.binary_cross_entropy_with_logits(logit, label)


def gradient_penalty(D, x, x_fake):
    """Mean squared distance from 1 of D's slope at mixtures of real and generated images (Gulrajani et al. 2017). As the
    code ran, every pixel is mixed in its own share; the text mixes whole images."""
    share = torch.rand_like(x)
    mixed = (share * x + (1 - share) * x_fake).requires_grad_()
    slope, = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    slope = slope / 2  # of images in -1..1, as the code has them
    length = slope.square().sum((1, 2, 3)).sqrt()                   # (B,)
    return (length - 1).square().mean()


# ---------------------------------------------------------------------------------------------------------
# The Statistical Cell's step


def statcell_step(G, D, opt_g, opt_d, label, x, x_real, weights, beta=0.5,
                  weight_decay=0.0, amp=None, scaler=None):
    """One step of Eq 3, of the reference and the target model at once: 2 ((1 - beta) recon + beta KL); images x (B, C, ...) in
    0..1, label (B, labels) one-hot. With beta 0.5 it is minus the ELBO. Source: Donovan-Maiye et al. 2022."""
    with autocast(x, amp):
        recon, kl = G.terms(x, label, normal(x, G.latent))         # (B, 2), (B, 2): reference, target
    loss = 2 * ((1 - beta) * recon + beta * kl)
    loss_g = loss.sum(1).mean()
    update([(G, opt_g, loss_g)], weight_decay, scaler)
    recon, recon_t = recon.mean(0)
    kl, kl_t = kl.mean(0)
    return terms_of(loss_g=loss_g, recon=recon, kl=kl, recon_target=recon_t, kl_target=kl_t)


# ---------------------------------------------------------------------------------------------------------
# What the authors of each model trained with; 80,000 steps are VAEplus' own, for the others a choice of ours
CP2IMAGE = {
    "steps": 680_000,
    "batch": 0,
    "lr_g": 0.01,
    "lr_d": 0.001,
    "lr_decay": 1.0,
    "weight_decay": 1e-4,
    "spectral_norm": "on",
    "image_norm": "cell-max",
    "pixel_weight": 1.0,
    "hidden_weight": 1.0,
    "hidden_ramp": 2500,
    "ema": 0.0,
    "latent": 256,
    "beta": 2.0,
}
SHARP = CP2IMAGE | {
    "steps": 6000,
    "batch": 32,
    "lr_g": 2.5e-4,
    "lr_d": 5e-4,
    "weight_decay": 0.0,
    "image_norm": "percentile",
    "pixel_weight": 20.0,
    "hidden_weight": 10.0,
    "hidden_ramp": 100,
    "ema": 0.99,
}
GAN = CP2IMAGE | {
    "steps": 80_000,
    "batch": 64,
    "lr_g": 2e-4,
    "lr_d": 7e-5,
    "lr_decay": 0.9999,
    "weight_decay": 0.0,
    "spectral_norm": "off",
}
STATCELL = CP2IMAGE | {
    "steps": 42_300,  # 300 epochs of 4,512 cells
    "batch": 32,
    "lr_g": 2e-4,
    "weight_decay": 0.0,
    "latent": 512,
    "beta": 0.5,
}
DEFAULTS = {
    "cp2image": CP2IMAGE,
    "sharp": SHARP,
    "vae": CP2IMAGE | {"steps": 80_000, "spectral_norm": "off"},
    "vaeplus": CP2IMAGE | {"steps": 80_000, "spectral_norm": "off"},
    "lsgan": GAN,
    "dcgan": GAN | {"lr_g": 1e-5, "lr_d": 5e-5},
    "wgan": GAN,
    "statcell": STATCELL,
}


def method(args, guide):
    """The step of a model with its flags, a function of (G, D, opt_g, opt_d, f, x, x_real, weights); a student's own
    model is trained CP2Image's way. guide: what Sharp's step needs besides."""
    metric = {"pixel_weight": args.pixel_weight, "hidden_weight": args.hidden_weight}
    if args.model == "sharp":
        metric["band_weight"] = args.band_weight
        metric["asked_weight"] = args.asked_weight
        metric["adversarial_weight"] = args.adversarial_weight
        return partial(sharp_step, **guide, **metric)
    if args.model in GANS:
        return partial(gan_step, kind=args.model)
    if args.model in ("vae", "vaeplus"):
        return partial(vae_step, beta=args.beta, **metric)
    if args.model == "statcell":
        return partial(statcell_step, beta=args.beta)
    return partial(cp2image_step, order=args.order, **metric)


def optimisers(args, G, D, device):
    """Adam for G and, as it ran, SGD with momentum for D (None: no D); Sharp and the GANs have Adam for both. A CUDA graph
    wants learning rates on the device."""
    if args.model == "sharp":
        adam = partial(torch.optim.Adam, betas=(0.0, 0.99), eps=1e-8)
    elif args.model in GANS:
        adam = partial(torch.optim.Adam, betas=(0.5, 0.999), eps=1e-8, capturable=args.graph)
    else:
        eps = 1e-8 if args.model == "statcell" else 1e-7
        adam = partial(torch.optim.Adam, betas=(0.9, 0.999), eps=eps, capturable=args.graph)
    lr_g = args.lr_g
    lr_d = args.lr_d
    if args.graph:
        lr_g = torch.tensor(lr_g, device=device)
        lr_d = torch.tensor(lr_d, device=device)
    opt_g = adam(G.parameters(), lr=lr_g)
    if D is None:
        return opt_g, None
    if args.model in CRITICISED:
        return opt_g, adam(D.parameters(), lr=lr_d)
    return opt_g, torch.optim.SGD(D.parameters(), lr_d, momentum=0.9, fused=args.graph)


@torch.no_grad()
def follow(G_ema, G, decay):
    """Moves the averaged weights a step towards G's."""
    for average, now in zip(G_ema.state_dict().values(), G.state_dict().values()):
        if average.is_floating_point():
            average.lerp_(now, 1 - decay)
        else:
            average.copy_(now)


@torch.no_grad()
def validate(G, cells, rows, batch=256):
    """The pixel loss of the given cells in eval mode, a mean over them; of a Statistical Cell minus the ELBO of one draw."""
    G.eval()
    total = 0
    for part in np.array_split(rows, -(-len(rows) // batch)):
        x = cells.images(part)
        f = cells.features(part)
        if isinstance(G, model.StatCell):
            recon, kl = G.terms(x, f, normal(x, G.latent))
            loss = (recon + kl).sum(1).mean()
        else:
            x_fake = model.draw(G, f, x, None)
            loss = model.pixel_loss(x, x_fake)
        total += len(part) * loss.item()
    G.train()
    return total / len(rows)


# ---------------------------------------------------------------------------------------------------------
# Batches on the device, and a step as one CUDA graph


class Batches:
    """Cells of a prepared folder by row number (B,), on the device: `features` (B, F) standardised or, `labelled`, labels (B, L)
    one-hot, `images` (B, C, S, S) in 0..1. Where a GPU has room the whole folder is copied there once, patches as the 16-bit
    integers that they are."""

    def __init__(self, folder, image_norm, device, labelled=False):
        self.labelled = labelled
        self.folder = folder
        self.image_norm = image_norm
        self.device = device
        self.raw = folder.raw
        self.patches = folder.patches.view(np.int16)  # on a GPU few operations take uint16
        self.centre = folder.centre
        self.scale = folder.scale
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.raw.nbytes + self.patches.nbytes < 0.7 * free:
                self.raw = torch.tensor(self.raw, device=device)
                self.patches = torch.tensor(self.patches, device=device)
                self.centre = self.centre.to(device)
                self.scale = self.scale.to(device)

    def take(self, array, rows):
        """Rows of an array, from where it is kept."""
        if torch.is_tensor(array):
            return array[torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(array[rows])

    def features(self, rows):
        if self.labelled:
            return self.folder.told(rows).to(self.device)
        raw = self.take(self.raw, rows)
        return model.standardise(raw, self.centre, self.scale).to(self.device)

    @cached_property
    def turned_columns(self):
        return data.turned_columns(self.folder.features)

    def turned(self, rows, seed, step):
        """Features (NaN: unknown in that position) and images of the cells, each flipped or turned by the seed and step."""
        moves = np.random.default_rng([seed, step, 8]).integers(8, size=len(rows))
        place, sign = self.turned_columns
        raw = self.take(self.raw, rows)
        raw = raw.gather(1, place[moves].to(raw.device))
        raw = raw * sign[moves].to(raw)
        f = model.standardise(raw, self.centre, self.scale, missing=np.nan)
        return f.to(self.device), data.turn(self.images(rows), moves)

    def images(self, rows):
        patches = self.take(self.patches, rows).to(self.device)
        intensity = (patches.int() & 0xFFFF).float()  # back to 0..65535
        return data.scale_images(intensity, self.image_norm, self.folder.white)


class Look:
    """What the measuring engine finds in images (B, C, H, W) in 0..1: (B, F), standardised, NaN = nothing. In real training cells
    it is compared with their table once: a constant difference is taken off, and a feature that it sees otherwise or in another
    unit (r2 under 0.8, as brightness where each image has its own scale) is not looked at. It knows images of three channels only."""

    def __init__(self, cells, seed):
        self.cells = cells
        folder = cells.folder
        self.white = folder.white if cells.image_norm == "percentile" else None
        self.offset = torch.zeros(len(folder.features))
        random = np.random.default_rng([seed, 5])
        some = random.permutation(folder.rows("train"))[:512]
        f = cells.features(some).cpu()
        seen = self(cells.images(some)).cpu()
        difference = seen - f
        offset = difference.nanmedian(0).values
        error = (difference - offset).square().nanmean(0)
        r2 = 1 - error / f.var(0)
        self.offset = torch.where(r2 > 0.8, offset, torch.nan)

    def __call__(self, x):
        folder = self.cells.folder
        raw = torch.full((len(x), len(folder.features)), torch.nan)
        if len(folder.channels) == 3:
            table = data.measurements(x.detach().float().cpu(), folder.channels, self.white)
            table = table.reindex(columns=folder.features)
            raw = torch.from_numpy(table.to_numpy(np.float32))
        f = model.standardise(raw, folder.centre, folder.scale, missing=np.nan)
        return (f - self.offset).to(x.device)


class Graphed:
    """A step (of tensors of fixed shapes on a GPU) as one CUDA graph: three calls as they are, then recorded and replayed.
    A replay is one launch for forward, backward and both optimisers. What it returns is overwritten by the next."""

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                terms = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self.inputs = [v.clone() for v in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.terms = self.step(*self.inputs)
        for own, value in zip(self.inputs, inputs):
            own.copy_(value)
        self.graph.replay()
        return self.terms


def seed_of(*numbers):
    """One seed of 64 bits from whole numbers of any size: (seed, step, process)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0])


# ---------------------------------------------------------------------------------------------------------
# What a run leaves behind


class Run:
    """The folder of a run: checkpoints, log, pictures. `about`: what a checkpoint says of itself; `parts` {name: what has a
    state_dict, or None}: networks, optimisers, scaler."""

    def __init__(self, path, about, parts):
        self.path = Path(path)
        self.about = about
        self.parts = parts
        self.last = self.path / "last.pt"
        self.log_path = self.path / "log.csv"
        self.columns = []

    def check(self, resume):
        """Refuses to overwrite a run, or to go on with none."""
        if resume and not self.last.is_file():
            raise data.InputError(f"{self.path}: nothing to resume (no last.pt); start without --resume")
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise data.InputError(f"{self.path}: there is a run already; go on with it by --resume, or choose "
                                  "another --run")

    def begin(self, described, step):
        """Makes the folder, writes args.json, and cuts the log of a resumed run back to `step`, so that no step stands twice."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        data.write(self.path / "args.json", json.dumps(described, indent=1) + "\n")
        if step:
            rows = [row for row in self.read_log() if int(row["step"]) <= step]
            self.write_log(rows)

    def save(self, name, step, best, full=True):
        """A checkpoint: with all that resuming needs, or (full=False) only what drawing does."""
        state = {**self.about, "step": step, "best": best}
        for part_name, part in self.parts.items():
            if full or part_name in ("G", "G_ema", "D"):
                state[part_name] = None if part is None else part.state_dict()
        data.write(self.path / name, partial(torch.save, state))

    def restore(self, device):
        """Puts last.pt into the parts; returns (step, best). InputError where the run was another one. A CUDA graph wants
        the optimisers' numbers on its device, all others on the CPU."""
        state = model.read_checkpoint(self.last, device)
        if "opt_g" not in state:
            raise data.InputError(f"{self.last}: has no optimiser state to resume from; use a run's last.pt")
        differ = []
        for name, value in self.about["settings"].items():
            was = state["settings"].get(name)
            if was != value:
                differ.append(f"--{name.replace('_', '-')} {value} (was {was})")
        if differ:
            raise data.InputError(f"{self.path}: resumed with other settings: {', '.join(differ)}; give the old ones, "
                                  "or start another --run")
        if state["identity"] != self.about["identity"]:
            raise data.InputError(f"{self.path}: was trained on another prepared folder than --data "
                                  "(checksums differ)")
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                model.load_weights(part, state[name], self.last)
            elif part is not None:
                part.load_state_dict(state[name])
        return state["step"], state["best"]

    def read_log(self):
        """The whole rows of log.csv, as dictionaries; what a crash cut short or damaged is left out."""
        if not self.log_path.exists():
            return []
        text = self.log_path.read_bytes().decode("utf-8", "replace")
        whole = text[:text.rfind("\n") + 1]  # a last line without its end may lack digits
        rows = []
        for row in csv.DictReader(io.StringIO(whole.replace("\0", ""))):
            if None not in row and None not in row.values() and row.get("step", "").isdigit():
                rows.append(row)
        return rows

    def write_log(self, rows):
        """log.csv anew, with the columns of all rows."""
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        data.write(self.log_path, file.getvalue())

    def log(self, row):
        """One more row; terms that are new get their column."""
        row = {name: f"{value:.7g}" for name, value in row.items()}
        if set(row) - set(self.columns):
            self.write_log([*self.read_log(), row])
            return
        with open(self.log_path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(row)

    def draw(self, step, *samples):
        """RUN/samples/step<step>.png (arguments of sample_grid) and RUN/losses.png. A picture that fails costs a line, not the run."""
        try:
            grid = sample_grid(*samples)
            data.write(self.path / f"samples/step{step:06d}.png", partial(grid.save, format="PNG"))
            plot = loss_plot(self.read_log())
            data.write(self.path / "losses.png", partial(plot.save, format="PNG"))
        except Exception as error:  # whatever it is
            print(f"note   no pictures of step {step}: {error}")


@torch.no_grad()
def sample_grid(G, cells, rows, per_line=13):
    """Lines of real cells, each with what G draws of them below it (a GAN: free samples): DAPI blue, tubulin green, actin red."""
    x = cells.images(rows)
    random = torch.Generator().manual_seed(0)  # the same at every step
    noise = torch.randn(len(rows), getattr(G, "latent", 1), generator=random)
    training = G.training
    G.eval()
    x_fake = model.draw(G, cells.features(rows), x, noise.to(x.device))
    G.train(training)
    real = data.composite(x)
    fake = data.composite(x_fake)
    lines = []
    for i in range(0, len(rows), per_line):
        lines += [real[i:i + per_line], fake[i:i + per_line]]
    return Image.fromarray(data.tile(lines))


COLOURS = ("steelblue", "darkorange", "firebrick")


def loss_plot(rows, width=900, height=200):
    """The log as curves over the steps, a panel for terms that share their last word (loss_pix, train_pix, val_pix): a PIL
    image. The first row, of untrained networks, would set the scale: it is left out once there are others."""
    log = pd.DataFrame(rows).apply(pd.to_numeric).set_index("step")
    log = log.drop(columns=["cells_per_s", "hidden0", "hidden1", "hidden2", "hidden3"], errors="ignore")
    if len(log) > 3:
        log = log.iloc[1:]
    words = log.columns.str.split("_").str[-1]
    picture = Image.new("RGB", (width, height * words.nunique()), "white")
    pen = ImageDraw.Draw(picture)
    for i, word in enumerate(words.unique()):
        curves = log.loc[:, words == word]
        low, high = curves.min(axis=None), curves.max(axis=None)
        said = f"steps {log.index[0]} to {log.index[-1]}, values {low:.4g} to {high:.4g}"
        pen.text((width // 2, i * height + 10), said, "black")
        for k, (name, curve) in enumerate(curves.items()):
            curve = curve.dropna()
            across = np.interp(curve.index, (log.index[0], log.index[-1]), (40, width - 40))
            down = np.interp(curve, (low, high), (i * height + 170, i * height + 30))
            points = np.stack([across, down], 1)
            pen.line(points.ravel().tolist(), COLOURS[k % 3], 2)
            pen.text((40 + 130 * k, i * height + 10), name, COLOURS[k % 3])
    return picture


def log_line(step, steps, terms, cells_per_s, eta, checks):
    """The line of the log: every term but the single hidden maps; losses of whole splits on the steps that have them."""
    parts = [f"step {step:6d}/{steps}"]
    for name, value in terms.items():
        if name not in ("hidden0", "hidden1", "hidden2", "hidden3"):
            parts.append(f"{name} {value:7.4g}")
    parts.append(f"{cells_per_s:5.0f} cells/s")
    parts.append(f"eta {datetime.timedelta(seconds=int(eta))}")
    for name, value in checks.items():
        parts.append(f"{name} {value:.1f}")
    return " | ".join(parts)


# ---------------------------------------------------------------------------------------------------------
# How fast it is here


def clock(device, call):
    """Milliseconds that a call takes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def race(title, fast, plain, device, n, cells):
    """Times two calls on as many cells n times in turn, so that a busy machine slows both alike; prints one line of medians."""
    times = {fast: [], plain: []}
    for _ in range(n + 3):
        for call, found in times.items():
            found.append(clock(device, call))
    ms = [statistics.median(found[3:]) for found in times.values()]  # the first three warm up
    rate = 1000 * cells / ms[0]
    ratio = ms[1] / ms[0]
    print(f"bench  {title}: fast {ms[0]:.2f} ms ({rate:.0f} cells/s), plain {ms[1]:.2f} ms, {ratio:.2f} times as fast", flush=True)


def bench(args, guide, G, D, f, x, x_real, device, amp):
    """Prints how long a step (all hidden maps act) and drawing take: fast layers as the flags say, against plain ones in fp32."""
    weights = torch.ones(model.HIDDEN_MAPS)
    fast_G = faster(copy.deepcopy(G), f)
    fast_D = faster(copy.deepcopy(D), x)
    steps = []
    for nets, precision in (((fast_G, fast_D), amp), ((G, D), None)):
        opts = optimisers(args, *nets, device)
        step = partial(method(args, guide), *nets, *opts, weight_decay=args.weight_decay, amp=precision)
        if args.graph:
            step = Graphed(step)
            weights = weights.to(device)
        steps.append(partial(step, f, x, x_real, weights))
    race(f"step, amp {args.amp}", *steps, device, args.bench, len(x))
    if device.type == "cuda":
        print(f"bench  at most {torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB on the device")
    if G.takes == "features":
        for n in (1, len(f)):
            draw_fast = partial(picture_of, fast_G.eval(), f[:n].cpu(), device)
            draw_plain = partial(picture_of, G.eval(), f[:n].cpu(), device)
            race(f"drawing {n}", draw_fast, draw_plain, device, 10 * args.bench, n)


@torch.no_grad()
def picture_of(G, f, device):
    return model.to_uint8(G(f.to(device))).cpu()


def faster(net, example):
    """model.faster with the inputs that its check needs; a network without faster layers as it is."""
    if isinstance(net, model.VAE):
        net.decoder = model.faster(net.decoder, torch.randn(2, net.latent))
        return net
    if isinstance(net, model.Generator):
        return model.faster(net, example[:2].cpu())
    if isinstance(net, model.Discriminator):
        return model.faster(net, example[:4].cpu())
    if isinstance(net, (model.SharpGenerator, model.SharpCritic)):
        return net.to(memory_format=torch.channels_last)  # a third less time on a CPU
    return net


# ---------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="prepared folder (prepare_bbbc021.py --out)")
    add("--run", metavar="DIR", help="where the run is written (default runs/<model>-seed<seed>)")
    add("--resume", action="store_true", help="go on from RUN/last.pt, on a CPU bit for bit")
    add("--model", default="cp2image", choices=model.KINDS,
        help="CP2Image (default); sharp: texture, obedience, any measurements; a baseline; statcell: p(structure | cell)")
    add("--steps", type=int,
        help="training steps (default 680000, as released; sharp 6000, baselines 80000, statcell 42300)")
    add("--batch", type=int,
        help="cells a step and process (default 0: one per treatment; sharp, statcell 32, GANs 64)")
    add("--lr-g", type=float,
        help="generator's learning rate, Adam (default 0.01, as it ran; sharp 2.5e-4, GANs, statcell 2e-4)")
    add("--lr-d", type=float,
        help="discriminator's, SGD (default 0.001, as it ran; Adam for sharp 5e-4, GANs 7e-5)")
    add("--lr-decay", type=float, help="both rates times this every 100 steps (default 1; GANs 0.9999)")
    add("--pixel-weight", type=float, help="weight of the pixel loss (default 1; sharp, of its mean: 20)")
    add("--hidden-weight", type=float,
        help="weight of the learned metric (default 1; 0: none; sharp, of its critic's maps: 10)")
    add("--hidden-ramp", type=int,
        help="steps over which each hidden map fades in, one after the other (default 2500; sharp's critic 100)")
    add("--adversarial-weight", type=float, default=0.5, help="sharp: weight of the critic (default 0.5)")
    add("--band-weight", type=float, default=0.3,
        help="sharp: weight of how much fine detail there is (default 0.3)")
    add("--asked-weight", type=float, default=4.0, help="sharp: weight of obedience (default 4)")
    add("--weight-decay", type=float,
        help="share of each kernel taken off a step (default 1e-4; sharp, GANs, statcell 0)")
    add("--latent", type=int,
        help="VAEs: size of the latent space (default 256; of each of statcell's two 512)")
    add("--beta", type=float,
        help="VAE, VAEplus: weight of the KL divergence (default 2); statcell: its share, 0 to 1 (0.5)")
    add("--reference", default="DAPI,Actin", metavar="NAMES",
        help="statcell: channels of nucleus and cell, drawn first (default %(default)s)")
    add("--target", metavar="NAMES",
        help="statcell: channels drawn given those (default: the others)")
    add("--dims", type=int, choices=[2, 3], help="statcell: of the patches, which say it themselves")
    add("--width", type=int, default=32,
        help="statcell: channels of its first maps (default 32, as published)")
    add("--spectral-norm", choices=["on", "off"],
        help="of D's kernels (default on; VAEplus off, GANs have none)")
    add("--order", choices=["shared", "alternate"], default="shared",
        help="one pass for both updates (released, default), or G, then D (text)")
    add("--begin", choices=["released", "grey"], default="released",
        help="CP2Image's first pictures: around 0 (released, default), or grey: no black holes after short runs")
    add("--image-norm", choices=["cell-max", "percentile"],
        help="images by each cell's maximum (paper, default), or by one fixed level (sharp's default)")
    add("--layers", choices=["fast", "plain"], help="one function, two forms (default fast on a CPU)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="mixed precision (default off; fp16: CUDA)")
    add("--graph", action="store_true", help="a step as one CUDA graph, on one GPU; never run on one yet")
    add("--ema", type=float, metavar="DECAY",
        help="also keep averaged weights of G, e.g. 0.999 (sharp 0.99)")
    add("--device", default="auto", help="cuda, cuda:1, cpu, mps (default: cuda where there is one)")
    add("--seed", type=data.seed, default=0, help="of weights, batches and the cells shown (default 0)")
    add("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    add("--sample-every", type=int, default=2500, help="steps between sample pictures (default 2500)")
    add("--val-every", type=int, default=500, help="steps between validations (default 500)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    add("--bench", type=int, default=0, metavar="N", help="time N steps, fast and plain; write nothing")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS.get(args.model, CP2IMAGE).items():  # a student's own model: CP2Image's way
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        low = int(name == "steps" or name == "latent" or name.endswith("every"))
        if isinstance(value, (int, float)) and not low <= value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {low} or more")
    if args.ema >= 1 or args.weight_decay >= 1:
        parser.error("--ema and --weight-decay are shares, expected below 1")
    if args.batch in (1, 2, 3):
        parser.error(f"--batch is {args.batch}: batch norm needs at least 4 cells")
    return args


def start_processes(args):
    """(rank, world, device) of this process. torchrun starts several, each with its own GPU; a WORLD_SIZE or RANK that others
    left in the environment counts for nothing."""
    if not dist.is_torchelastic_launched():
        return 0, 1, data.pick_device(args.device)
    if args.bench or args.graph:
        raise data.InputError("--bench and --graph are for one process")
    backend, device = "gloo", "cpu"
    if args.device != "cpu" and torch.cuda.is_available():
        backend, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size(), data.pick_device(device)


def choose_sampler(args, folder):
    """One training cell of each treatment a batch (CP2Image, VAEs), or cells as they come (all others)."""
    train_rows = folder.rows("train")
    treatment = folder.treatment
    if args.model in AS_THEY_COME:
        treatment = np.zeros_like(treatment)
    sampler = data.TreatmentSampler(train_rows, treatment, args.batch)
    if sampler.batch < 8 and not args.batch:  # a few treatments make a batch that batch norm cannot use
        sampler.batch = min(32, len(train_rows))
    elif sampler.batch < 4:
        raise data.InputError(f"{args.data}: a batch of {sampler.batch}, batch norm needs at least 4 cells")
    return sampler


def stacked(args, folder):
    """The arguments of the Statistical Cell for this folder; None: another model."""
    if args.model != "statcell":
        if folder.patches.ndim > 4:
            raise data.InputError(f"{args.data}: z-stacks; train --model statcell")
        return None
    reference = args.reference.split(",")
    shape = list(folder.patches.shape[2:])
    if args.dims and args.dims != len(shape):
        raise data.InputError(f"--dims {args.dims}: the patches of {args.data} have {len(shape)}; leave it out, or prepare "
                              "others (--simulate --depth)")
    target = [name for name in folder.channels if name not in reference]
    if args.target:
        target = args.target.split(",")
    if not target or sorted(reference + target) != sorted(folder.channels):
        raise data.InputError(f"--reference {args.reference} --target {','.join(target)}: expected each of the "
                              f"channels {','.join(folder.channels)} once, one or more in both")
    return {
        "shape": shape,
        "reference": [folder.channels.index(name) for name in reference],
        "target": [folder.channels.index(name) for name in target],
        "labels": len(folder.labels),
        "width": args.width,
    }


def networks(args, folder, device):
    """The generator and the discriminator (None: it has none), as the flags say, on the device."""
    shape = len(folder.features), len(folder.channels), folder.size
    spectral_norm = args.spectral_norm == "on"
    G, D = model.networks(args.model, *shape, spectral_norm, args.latent, args.seed, stacked(args, folder))
    if args.begin == "grey":
        if not isinstance(G, model.Generator):
            raise data.InputError(f"--begin grey is for cp2image, not for {args.model}")
        G.begin_grey()
    D = None if D is None else D.to(device)
    return G.to(device), D


def guide_sharp(args, folder, G, cells):
    """What Sharp's step takes besides: R, an untrained Regressor, and its optimiser; the engine's look; the family (F,) of each
    feature, by object and kind; the places of those that are asked for alone. Sets G's principal axes."""
    if args.amp == "fp16" or args.graph:
        raise data.InputError("--model sharp: not with --amp fp16 or --graph; use bf16 or off")
    random = np.random.default_rng([args.seed, 6])
    some = random.permutation(folder.rows("train"))[:20_000]
    G.whiten(cells.features(some))
    names = pd.Series(folder.features)
    family, _ = pd.factorize(names.str.extract("([^_]+_[^_]+)")[0])
    asked = np.flatnonzero(names.str.fullmatch(ASKED))
    if not len(asked):
        asked = np.arange(len(names))
    R = model.Regressor(len(names), len(folder.channels), folder.size)
    R = R.to(cells.device, memory_format=torch.channels_last).eval()
    opt_r = torch.optim.AdamW(R.parameters(), 5e-4, (0.9, 0.99))
    return {
        "R": R,
        "opt_r": opt_r,
        "look": Look(cells, args.seed),
        "family": torch.tensor(family),
        "asked": torch.tensor(asked),
    }


def choose_cells(folder, seed):
    """Rows of the validation cells that are shown (26), and of those of each split that losses are worked out for."""
    random = np.random.default_rng([seed, 7])
    shown = random.permutation(folder.rows("val"))[:26]
    checked = {}
    for split in ("train", "val"):
        some = random.permutation(folder.rows(split))[:VALIDATED]
        checked[split] = np.sort(some)
    return np.sort(shown), checked


def announce(args, folder, sampler, G, D, device, world):
    """Says what is trained on what, in lines for a log file."""
    print(f"data   {args.data}: {len(folder)} cells {folder.meta['counts']['split']}, {len(folder.features)} features, "
          f"normalise {folder.normalise}, images {args.image_norm}")
    print(f"model  {args.model}: generator {model.count_parameters(G):,} parameters")
    if D is not None:
        print(f"model  discriminator {model.count_parameters(D):,}")
    print(f"step   batch {sampler.batch} of {len(sampler.count)} treatments, processes {world}, seed {args.seed}, {device}, "
          f"layers {args.layers}, amp {args.amp}, torch {torch.__version__}")
    weights = hidden_weights(args.steps - 1, args.hidden_ramp)  # of the last step
    acting = int((weights > 0).sum())
    if isinstance(D, model.Discriminator) and args.hidden_weight and acting < model.HIDDEN_MAPS:
        print(f"note   --hidden-ramp {args.hidden_ramp}: {acting} of the 4 hidden maps act in these {args.steps} steps "
              "(with 0 they train on pixels only, as with --hidden-weight 0)")


# Flags that a resumed run may change
MAY_DIFFER = "steps run resume data begin device layers bench log_every sample_every val_every save_every".split()


def describe(args, folder, world, command):
    """What a checkpoint says of itself, beside its weights; `settings`: the flags that a resumed run must share."""
    settings = {}
    for name, value in vars(args).items():
        if name not in MAY_DIFFER:
            settings[name] = value
    return {
        "format": model.FORMAT,
        "model": args.model,
        "features": folder.features,
        "channels": folder.channels,
        "size": folder.size,
        "centre": folder.centre,
        "scale": folder.scale,
        "normalise": folder.normalise,
        "image_norm": args.image_norm,
        "white": folder.white if args.image_norm == "percentile" else None,
        "stacked": stacked(args, folder),
        "labels": list(folder.labels),
        "settings": settings | {"processes": world},
        "identity": folder.identity,
        "command": command,
    }


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages on a CPU, read at the first tensor
    rank, world, device = start_processes(args)
    if device.type != "cuda" and (args.amp == "fp16" or args.graph):
        raise data.InputError("--amp fp16 and --graph need CUDA; use bf16 or off here")
    if device.type == "cpu":
        data.keep_freed_memory()
    if args.layers is None:
        args.layers = "fast" if device.type == "cpu" else "plain"
    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    # The data
    folder = data.open_folder(args.data)
    sampler = choose_sampler(args, folder)
    cells = Batches(folder, args.image_norm, device, args.model == "statcell")
    shown, checked = choose_cells(folder, args.seed)

    # The networks and their optimisers
    G, D = networks(args, folder, device)
    guide = guide_sharp(args, folder, G, cells) if args.model == "sharp" else {}
    if args.bench:
        rows = sampler.draw(args.seed, 0, 0)
        f, x = cells.features(rows), cells.images(rows)
        bench(args, guide, G, D, f, x, x.flip(0), device, amp)
        return
    if args.layers == "fast":
        G = faster(G, cells.features(sampler.rows[:4]))
        D = faster(D, cells.images(sampler.rows[:4]))
    G_ema = copy.deepcopy(G) if args.ema else None
    shown_G = G_ema if args.ema else G
    opt_g, opt_d = optimisers(args, G, D, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    numeric = {"weight_decay": args.weight_decay, "amp": amp, "scaler": scaler}
    train_step = partial(method(args, guide), G, D, opt_g, opt_d, **numeric)
    if args.graph:
        train_step = Graphed(train_step)
    if rank == 0:
        announce(args, folder, sampler, G, D, device, world)

    # The run's folder
    command = "python train.py " + shlex.join(argv or sys.argv[1:])
    about = describe(args, folder, world, command)
    R = guide.get("R")
    opt_r = guide.get("opt_r")
    nets = {"G": G, "G_ema": G_ema, "D": D, "R": R}
    parts = nets | {"opt_g": opt_g, "opt_d": opt_d, "opt_r": opt_r, "scaler": scaler}
    run = Run(args.run or f"runs/{args.model}-seed{args.seed}", about, parts)
    run.check(args.resume)
    step, best = 0, float("inf")
    if args.resume:
        step, best = run.restore(device if args.graph else "cpu")
    elif R is not None:
        fit_regressor(R, cells, checked["val"], int(REGRESSOR * args.steps), args.seed)
    if step >= args.steps:
        print(f"done   {run.path} has its {args.steps} steps; give a larger --steps to go on")
        return
    if world > 1:
        dist.barrier()  # all have looked before one writes
    if rank == 0:
        run.begin({**vars(args), "command": command, "torch": torch.__version__, "processes": world}, step)

    # The loop
    caught, restore_signals = catch_signals()
    judged = "elbo_lost" if args.model == "statcell" else "pix"  # by what best.pt is chosen
    stop = False
    since = first_step = step
    started = tick = time.perf_counter()

    def due(every):
        return step == args.steps or step % every == 0

    try:
        while step < args.steps and not stop:
            torch.manual_seed(seed_of(args.seed, step, rank))  # noise, too, is a function of (seed, step, process)
            set_rates(args, step, opt_g, opt_d)
            rows = sampler.draw(args.seed, step, 2 * rank)
            others = sampler.draw(args.seed, step, 2 * rank + 1)
            weights = hidden_weights(step, args.hidden_ramp)
            if args.graph:
                weights = weights.to(device)
            if args.model == "sharp":
                f, x = cells.turned(rows, args.seed, step)
                x_real = None  # it has no second batch
            else:
                f, x, x_real = cells.features(rows), cells.images(rows), cells.images(others)
            terms = train_step(f, x, x_real, weights)
            if args.ema:
                follow(G_ema, G, args.ema)
            step += 1

            stop = agreed(caught, world, device, step)
            do_log = due(args.log_every) or step == 1
            do_val = due(args.val_every)
            do_save = due(args.save_every) or stop
            do_sample = due(args.sample_every)
            if rank or not (do_log or do_val or do_save or do_sample):
                continue
            terms = finite(run, step, terms)
            cells_per_s = (step - since) * sampler.batch * world / (time.perf_counter() - tick)
            checks = {}
            if do_val and args.model not in CRITICISED:
                for split, some in checked.items():
                    checks[f"{split}_{judged}"] = validate(shown_G, cells, some)
                if checks[f"val_{judged}"] < best:
                    best = checks[f"val_{judged}"]
                    run.save("best.pt", step, best, full=False)
            run.log({"step": step, **terms, "cells_per_s": cells_per_s, **checks})
            so_far = time.perf_counter() - started
            eta = (args.steps - step) * so_far / (step - first_step)
            print(log_line(step, args.steps, terms, cells_per_s, eta, checks), flush=True)
            if do_save:
                run.save("last.pt", step, best)
            if do_sample:
                run.draw(step, shown_G, cells, shown)
            since, tick = step, time.perf_counter()  # the rate leaves validation and saving out; the eta does not
    finally:
        restore_signals()
    finish(run, rank, caught, step, (time.perf_counter() - started) / 60)


def catch_signals():
    """Ctrl-C and SIGTERM: finish the step, save, leave. Returns the list of those caught, and what puts the old handlers back."""
    caught = []

    def catch(number, _):
        caught.append(number)

    old = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in old.items():
            signal.signal(number, handler)

    return caught, restore


def agreed(caught, world, device, step):
    """Whether to stop. Several processes agree on it every 10 steps, or one would wait for the others for ever."""
    if world == 1:
        return bool(caught)
    if step % 10:
        return False
    flag = torch.tensor(float(bool(caught)), device=device)
    dist.all_reduce(flag)
    if flag.item() and not caught:
        caught.append(signal.SIGTERM)
    return bool(caught)


def set_rates(args, step, *opts):
    """The learning rates of this step: times --lr-decay every 100 steps. Sharp's fall to 5 % over the last 30 % of its steps,
    and its generator starts four times as fast, after 50 steps of warming up, while there is no critic."""
    decay = args.lr_decay ** (step // 100)
    start = 1.0
    if args.model == "sharp":
        left = 1 - step / args.steps
        decay *= min(1.0, max(0.05, left / 0.3))
        if step < 2 * args.hidden_ramp:
            start = 4 * min(1.0, (step + 1) / 50)
    for opt, lr in zip(opts, (args.lr_g * start, args.lr_d)):
        for group in opt.param_groups if opt else ():
            now = lr * decay
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(now)  # in place: a CUDA graph reads it there
            else:
                group["lr"] = now


def finite(run, step, terms):
    """The terms of a step as plain numbers. InputError where one is none any more: such weights never get well, and never to disk."""
    terms = {name: value.item() for name, value in terms.items()}
    if np.isfinite(list(terms.values())).all():
        return terms
    said = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    kept = "no checkpoint was written yet"
    if run.last.exists():
        kept = f"{run.last} is the last good checkpoint"
    raise data.InputError(f"a loss is not finite at step {step}: {said}; {kept}; try a smaller --lr-g or --amp off")


def finish(run, rank, caught, step, minutes):
    """The last line, and the exit status of a run that was stopped: 130 for Ctrl-C, 143 for SIGTERM."""
    if dist.is_initialized():
        dist.barrier()  # torchrun ends the others as soon as one leaves
        dist.destroy_process_group()
    if caught:
        if rank == 0:
            name = signal.Signals(caught[0]).name
            print(f"stopped by {name} at step {step}: {run.last} is saved; go on with --resume", flush=True)
        sys.exit(128 + caught[0])
    if rank == 0:
        print(f"done   {step} steps in {minutes:.1f} min: {run.path}")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, model.InputError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the loop, while nothing is there to save
        sys.exit(130)
