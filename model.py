"""CP2Image, Sharp and baselines: the networks, their losses, and what it takes to use a trained one. Needs torch alone: copy it out.

    G = model.load("runs/cp2image-seed0/last.pt")
    x = model.generate(G, table)            # table: a pandas frame of CellProfiler measurements, one row a cell

Source: Ji, Cutiongco, Jensen, Yuan, "CP2Image", MIDL 2023 (PMLR 227:274-285), and the authors' TensorFlow code
(revision 705214e); for the three GANs Goldsborough et al., "CytoGAN", 2017, and its Keras code. Where a text and its
code disagree the code is followed, as it ran. Images are in 0..1 wherever they enter or leave a network.
The classes below are the definition. What makes them fast on a CPU stands behind a fence at the end of this file.
"""
import copy
import math
import pickle
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

SIZE = 68  # pixels, side of a crop (original parameters.py)
SLOPE = 0.01  # of every leaky ReLU
EPS = 1e-8  # inside the square root of every batch norm
MOMENTUM = 0.1  # weight of the new batch in the running moments
CLIP = 10.0  # standard deviations: a standardised measurement is clipped to -CLIP..CLIP
HIDDEN_MAPS = 4  # of the discriminator, compared by the learned metric
FORMAT = "cp2image-3"  # of a checkpoint
OLD_FORMAT = "cp2image-2"  # the same weights; plate-dmso was another normalisation there
# Columns of a cell beside its features
ABOUT_A_CELL = "cell field plate well site replicate compound concentration moa x y split".split()
KINDS = ("cp2image", "sharp", "vae", "vaeplus", "lsgan", "dcgan", "wgan", "statcell")


class InputError(ValueError):
    """A mistake in what was given: one line with what was found, what was expected and what to do next."""


# ---------------------------------------------------------------------------------------------------------
# CP2Image: a generator, and a discriminator used as a learned metric


def conv(c_in, c_out, k, padding=0):
    """A convolution without bias, initialised as released: normal, sd = sqrt(2 / (k*k*c_in + c_out))."""
    layer = nn.Conv2d(c_in, c_out, k, padding=padding, bias=False)
    sd = math.sqrt(2 / (k * k * c_in + c_out))
    nn.init.normal_(layer.weight, std=sd)
    return layer


def pixelwise(v):
    """Values (C,) or (B, C), shaped to act on every pixel of maps (B, C, H, W)."""
    return v[..., None, None]


class BatchNorm(nn.Module):
    """Batch norm over (B, C, H, W) as the released code has it. Two things differ from torch's: the running variance is
    the biased one, and with `moments_of=n` mean and variance are those of the first n images, which all are normalised by."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.track = True  # whether a training batch moves the running moments

    def forward(self, x, moments_of=None):
        x = x.to(self.weight.dtype)  # full precision under autocast
        if not self.training:
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, EPS)
        first = x[:moments_of]
        var, mean = torch.var_mean(first, (0, 2, 3), correction=0)  # (C,), (C,)
        self.update_running(mean, var)
        sd = (var + EPS).sqrt()
        x = (x - pixelwise(mean)) / pixelwise(sd)
        return x * pixelwise(self.weight) + pixelwise(self.bias)

    @torch.no_grad()
    def update_running(self, mean, var):
        if self.track:
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var, MOMENTUM)


def leaky(x):
    return F.leaky_relu(x, SLOPE)


def steep(x):
    """The leaky ReLU of the GANs and of Sharp."""
    return F.leaky_relu(x, 0.2)


def nearest(x, size):
    """Images (B, C, h, h) enlarged to (B, C, size, size), each pixel from the nearest one."""
    return F.interpolate(x, (size, size), mode="nearest")


class Generator(nn.Module):
    """CP vectors (B, n_features), standardised -> images (B, n_channels, size, size), trained towards the range 0..1.
    Released code, layers HL_5..HL_8 and HL_recons_3: the output is a batch norm and a leaky ReLU, not a sigmoid."""
    takes = "features"

    def __init__(self, n_features, n_channels=3, size=SIZE):
        super().__init__()
        self.size = size
        self.conv0 = conv(n_features, 32, 5, padding=4)
        self.bn0 = BatchNorm(32)
        self.conv1 = conv(32, 32, 5, padding=4)
        self.bn1 = BatchNorm(32)
        self.conv2 = conv(32, 32, 5, padding=4)
        self.bn2 = BatchNorm(32)
        self.conv3 = conv(32, 32, 5, padding=4)
        self.bn3 = BatchNorm(32)
        self.conv_out = conv(32, n_channels, 1)
        self.bn_out = BatchNorm(n_channels)

    def begin_grey(self):
        """Lets pictures begin at 0.5 +- 0.2, not at 0 +- 1 as released: there the last leaky ReLU lets a hundredth of half the
        gradients through, and short runs keep black holes."""
        nn.init.constant_(self.bn_out.bias, 0.5)
        nn.init.constant_(self.bn_out.weight, 0.2)

    def forward(self, f):                                                # (B, F)
        h = f[:, :, None, None]                                          # (B, F, 1, 1)
        h = leaky(self.bn0(self.conv0(h)))                               # (B, 32, 5, 5)
        h = leaky(self.bn1(self.conv1(nearest(h, 10))))                  # (B, 32, 14, 14)
        h = leaky(self.bn2(self.conv2(nearest(h, 28))))                  # (B, 32, 32, 32)
        h = leaky(self.bn3(self.conv3(nearest(h, self.size - 4))))       # (B, 32, 68, 68), nearest to 64
        return leaky(self.bn_out(self.conv_out(h)))                      # (B, C, 68, 68)


class Discriminator(nn.Module):
    """Images (B, n_channels, 68, 68) in 0..1 -> (logits (B,), four hidden maps): the learned metric of the paper.
    `moments_of=n`: the batch-norm moments are those of the first n images. Every kernel is spectrally normalised by torch's
    parametrisation, one power iteration a pass in training; since batch norm follows each kernel this does not change
    training. Larger images end in a map of logits, whose mean counts."""

    def __init__(self, n_channels=3, spectral_norm=True):
        super().__init__()
        self.conv0 = conv(n_channels, 32, 5)
        self.bn0 = BatchNorm(32)
        self.conv1 = conv(32, 32, 5)
        self.bn1 = BatchNorm(32)
        self.conv2 = conv(32, 32, 5)
        self.bn2 = BatchNorm(32)
        self.conv3 = conv(32, 64, 5)
        self.bn3 = BatchNorm(64)
        self.conv4 = conv(64, 1, 1)
        self.bn4 = BatchNorm(1)
        if spectral_norm:  # last: its own random numbers do not shift the kernels'
            for layer in (self.conv0, self.conv1, self.conv2, self.conv3, self.conv4):
                parametrizations.spectral_norm(layer)

    def forward(self, x, moments_of=None):                               # (B, C, 68, 68)
        h = self.bn0(self.conv0(x), moments_of)                          # (B, 32, 64, 64)
        h0 = leaky(F.max_pool2d(h, 2))                                   # (B, 32, 32, 32)
        h = self.bn1(self.conv1(h0), moments_of)                         # (B, 32, 28, 28)
        h1 = leaky(F.max_pool2d(h, 2))                                   # (B, 32, 14, 14)
        h = self.bn2(self.conv2(h1), moments_of)                         # (B, 32, 10, 10)
        h2 = leaky(F.max_pool2d(h, 2))                                   # (B, 32, 5, 5)
        h3 = leaky(self.bn3(self.conv3(h2), moments_of))                 # (B, 64, 1, 1)
        h = self.bn4(self.conv4(h3), moments_of)                         # (B, 1, 1, 1)
        logit = h.mean((1, 2, 3))                                        # (B,)
        return logit, [h0, h1, h2, h3]


def pixel_loss(x, x_fake):
    """Mean over the batch of half the summed squared error: x and x_fake (B, C, H, W), x in 0..1."""
    error = (x - x_fake).square().sum((1, 2, 3))  # (B,)
    return 0.5 * error.mean()


def hidden_losses(maps, maps_fake, pixels):
    """The learned metric (4,): for each hidden map the mean over the batch of 0.5 * pixels * mean squared difference;
    `pixels` = H * W * C of the image."""
    losses = []
    for h, h_fake in zip(maps, maps_fake):
        error = (h - h_fake).square().mean()
        losses.append(0.5 * pixels * error)
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------------------------
# Sharp, beyond the paper: cells with texture, from as many measurements as are given

COMPONENTS = 100  # principal components of the measurements that are shown beside them
MIXED = 32  # of the noise: values that change the cell as a whole; the others are grain, one a pixel


def given(f):
    """Measurements (B, F), NaN = not given -> the values, 0 where not given, and which are given (1 or 0)."""
    return f.nan_to_num(nan=0.0), f.isfinite().to(f.dtype)


def roots(x):
    """Square roots of images: dim structure weighs as much as bright, and a camera's noise is the same everywhere."""
    return (x.clamp(min=0) + 1e-4).sqrt()


def double(h):
    """Maps enlarged twofold between the pixels' centres (bilinear), which leaves no grid."""
    return F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)


def square(v, channels):
    """Vectors (B, channels * h * h) as maps (B, channels, h, h)."""
    side = math.isqrt(v.shape[1] // channels)
    return v.unflatten(1, (channels, side, side))


class Styled(nn.Module):
    """A 3x3 convolution whose input channels are weighed by a style w (B, width), its output brought back to the size it had
    (modulation and demodulation of StyleGAN2, Karras et al. 2020). Borders repeat: zeros there would be seen as a frame.
    `grain` (B, 1, h, h), standard normal, is added in a strength that each channel learns, from 0 on."""

    def __init__(self, c_in, c_out, width):
        super().__init__()
        self.style = nn.Linear(width, c_in)
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="replicate", bias=False)
        self.strength = nn.Parameter(torch.zeros(c_out))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, h, w, grain=None):                                 # (B, c_in, h, h), (B, width)
        style = 1 + self.style(w)                                        # (B, c_in)
        weight = self.conv.weight                                        # (c_out, c_in, 3, 3)
        power = weight.square().sum((2, 3))                              # (c_out, c_in)
        size = style.square() @ power.T                                  # (B, c_out)
        h = self.conv(h * pixelwise(style))                              # (B, c_out, h, h)
        h = h * pixelwise(size.rsqrt())
        h = h + pixelwise(self.bias)
        if grain is not None:
            h = h + pixelwise(self.strength) * grain
        return steep(h)


class SharpGenerator(nn.Module):
    """Measurements (B, n_features), standardised, NaN = not given, and noise z (B, latent), standard normal -> images
    (B, n_channels, size, size) in 0..1. Without z: fresh noise in training, else one and the same for every cell, so that a
    picture depends on its measurements alone."""
    takes = "features"
    missing = True  # measurements may be missing

    def __init__(self, n_features, n_channels=3, size=SIZE, width=256):
        super().__init__()
        self.size = size
        self.start = math.ceil(size / 8)  # pixels, side of the first map
        coarse = 4 * self.start
        fine = 8 * self.start
        self.parts = [  # of the noise
            MIXED,
            coarse ** 2,
            fine ** 2,
        ]
        self.latent = sum(self.parts)
        components = min(COMPONENTS, n_features)
        self.register_buffer("axes", torch.zeros(n_features, components))  # set by `whiten`
        self.register_buffer("usual", torch.randn(self.latent))
        inputs = 2 * n_features + components + MIXED
        self.read = nn.Linear(inputs, width)
        self.deep = nn.Linear(width, width)
        self.first = nn.Linear(width, 64 * self.start ** 2)
        self.conv0 = Styled(64, 64, width)
        self.conv1 = Styled(64, 64, width)
        self.conv2 = Styled(64, 64, width)
        self.conv3 = Styled(64, 32, width)
        self.conv4 = Styled(32, 24, width)
        self.out1 = nn.Conv2d(64, n_channels, 1)
        self.out3 = nn.Conv2d(32, n_channels, 1)
        self.out4 = nn.Conv2d(24, n_channels, 1)

    def whiten(self, f):
        """Sets the principal axes, those of measurements f (N, n_features); a component has sd 2 among them."""
        f = f.double()
        f = f - f.mean(0)
        _, size, axes = torch.linalg.svd(f, full_matrices=False)
        sd = size / math.sqrt(len(f) - 1)
        axes = 2 * axes.T / sd.clamp(min=1e-6)
        largest = self.axes.shape[1]
        self.axes.copy_(axes[:, :largest])

    def forward(self, f, z=None):                                        # (B, F), (B, latent)
        if z is None:
            z = self.usual.expand(len(f), -1)
            if self.training:
                z = torch.randn_like(z)
        mixed, coarse, fine = z.split(self.parts, 1)
        coarse = square(coarse, 1)                                       # (B, 1, 36, 36)
        fine = square(fine, 1)                                           # (B, 1, 72, 72)
        values, known = given(f)                                         # (B, F), (B, F)
        components = values @ self.axes                                  # (B, components)
        inputs = torch.cat([values, known, components, mixed], 1)
        w = steep(self.read(inputs))                                     # (B, width)
        w = steep(self.deep(w))
        h = square(self.first(w), 64)                                    # (B, 64, 9, 9)
        h = self.conv0(h, w)
        h = self.conv1(double(h), w)                                     # (B, 64, 18, 18)
        x = double(self.out1(h))                                         # (B, C, 36, 36): each size adds its part
        h = self.conv2(double(h), w, coarse)                             # (B, 64, 36, 36)
        h = self.conv3(h, w)                                             # (B, 32, 36, 36)
        x = double(x + self.out3(h))                                     # (B, C, 72, 72)
        h = self.conv4(double(h), w, fine)                               # (B, 24, 72, 72)
        x = (x + self.out4(h)).sigmoid()                                 # (B, C, 72, 72)
        cut = (x.shape[3] - self.size) // 2
        inside = slice(cut, cut + self.size)
        return x[:, :, inside, inside]                                   # (B, C, 68, 68)


class SharpCritic(nn.Module):
    """Images (B, n_channels, size, size) in 0..1 and measurements (B, n_features), NaN = not given -> (logits (B,), hidden maps):
    whether the image is real and of such a cell (projection, Miyato and Koyama 2018). No batch norm: here spectral norm acts."""

    def __init__(self, n_features, n_channels=3, size=SIZE, width=256):
        super().__init__()
        self.conv0 = nn.Conv2d(n_channels, 48, 4, 2, padding=1)
        self.conv1 = nn.Conv2d(48, 96, 4, 2, padding=1)
        self.conv2 = nn.Conv2d(96, 192, 4, 2, padding=1)
        self.conv3 = nn.Conv2d(192, 192, 4, 2, padding=1)
        side = size // 16
        self.dense = nn.Linear(192 * side ** 2, width)  # keeps all places
        self.last = nn.Linear(width, 1)
        self.told = nn.Linear(2 * n_features, width)
        for layer in self.children():
            parametrizations.spectral_norm(layer)

    def forward(self, x, f):                                             # (B, C, 68, 68), (B, F)
        h0 = steep(self.conv0(roots(x)))                                 # (B, 48, 34, 34)
        h1 = steep(self.conv1(h0))                                       # (B, 96, 17, 17)
        h2 = steep(self.conv2(h1))                                       # (B, 192, 8, 8)
        h3 = steep(self.conv3(h2))                                       # (B, 192, 4, 4)
        h = steep(self.dense(h3.flatten(1)))                             # (B, width)
        f = torch.cat(given(f), 1)                                       # (B, 2 F)
        told = self.told(f)                                              # (B, width)
        real = self.last(h).flatten()                                    # (B,)
        fitting = (told * h).sum(1)                                      # (B,)
        return real + fitting, [h0, h1, h2, h3]


class Regressor(nn.Module):
    """Images (B, n_channels, size, size) in 0..1 -> measurements (B, n_features), standardised: trained first, it tells the
    generator what it was asked for. It never judges. `trust` (n_features,): its r2 in cells that it did not see."""

    def __init__(self, n_features, n_channels=3, size=SIZE):
        super().__init__()
        self.layers = nn.Sequential()
        widths = [n_channels, 32, 64, 128, 128]
        for c_in, c_out in zip(widths, widths[1:]):
            layer = nn.Conv2d(c_in, c_out, 3, 2, padding=1)
            norm = nn.BatchNorm2d(c_out)
            self.layers.extend([layer, norm, nn.ReLU()])
        side = math.ceil(size / 16)
        self.dense = nn.Linear(128 * side ** 2, 256)
        self.last = nn.Linear(256, n_features)
        self.register_buffer("trust", torch.ones(n_features))

    def forward(self, x):                                                # (B, C, 68, 68)
        x = roots(x)
        x = x + 0.05 * torch.randn_like(x)  # finer than that it shall not see, or a generator writes there for it
        h = self.layers(x)                                               # (B, 128, 5, 5)
        h = F.relu(self.dense(h.flatten(1)))                             # (B, 256)
        return self.last(h)


# ---------------------------------------------------------------------------------------------------------
# The baselines: VAE and VAEplus (the paper's Table 1), LSGAN, DCGAN and WGAN (CytoGAN)


class VAE(nn.Module):
    """A variational autoencoder of images (B, n_channels, 68, 68) in 0..1.
    Called with images: their reconstruction from the latent means. With `noise` (B, latent), standard normal, as training
    does: (reconstruction of a draw, means (B, latent), log variances). Source: the encoder that the released code builds;
    the decoder is its generator."""
    takes = "images"

    def __init__(self, latent=256, n_channels=3, size=SIZE):
        super().__init__()
        self.latent = latent
        self.conv0 = conv(n_channels, 32, 5)
        self.bn0 = BatchNorm(32)
        self.conv1 = conv(32, 32, 5)
        self.bn1 = BatchNorm(32)
        self.conv2 = conv(32, 32, 5)
        self.bn2 = BatchNorm(32)
        self.conv3 = conv(32, 2 * latent, 5)
        self.bn3 = BatchNorm(2 * latent)
        self.decoder = Generator(latent, n_channels, size)

    def encode(self, x):
        """Images -> means and log variances of the latent, (B, latent) each."""
        h = self.bn0(self.conv0(x))                                      # (B, 32, 64, 64)
        h = leaky(F.max_pool2d(h, 2))                                    # (B, 32, 32, 32)
        h = self.bn1(self.conv1(h))                                      # (B, 32, 28, 28)
        h = leaky(F.max_pool2d(h, 2))                                    # (B, 32, 14, 14)
        h = self.bn2(self.conv2(h))                                      # (B, 32, 10, 10)
        h = leaky(F.max_pool2d(h, 2))                                    # (B, 32, 5, 5)
        h = self.bn3(self.conv3(h))                                      # (B, 2 latent, 1, 1)
        return h.mean((2, 3)).chunk(2, 1)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x, noise=None):
        mean, log_var = self.encode(x)
        if noise is None:
            return self.decode(mean)
        z = mean + noise * (0.5 * log_var).exp()
        x = self.decode(z)
        return x, mean, log_var


def kl_divergence(mean, log_var):
    """Of normal distributions from the standard one, of means and log variances (B, latent), in nats: (B, latent)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


class NoiseGenerator(nn.Module):
    """Noise (B, 100), standard normal -> images (B, n_channels, size, size) in 0..1: the generator of CytoGAN's GANs.
    At a size that is no multiple of 8 the next larger picture is cut in the middle. The output, tanh, is brought to 0..1."""
    takes = "noise"

    def __init__(self, n_channels=3, size=SIZE, latent=100):
        super().__init__()
        self.size = size
        self.latent = latent
        self.start = math.ceil(size / 8)  # pixels, side of the first map
        self.dense = nn.Linear(latent, 256 * self.start ** 2)
        self.bn0 = nn.BatchNorm1d(256 * self.start ** 2, 1e-3)
        self.conv1 = nn.Conv2d(256, 128, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(128, 1e-3)
        self.conv2 = nn.Conv2d(128, 64, 5, padding=2)
        self.bn2 = nn.BatchNorm2d(64, 1e-3)
        self.conv3 = nn.Conv2d(64, 32, 5, padding=2)
        self.bn3 = nn.BatchNorm2d(32, 1e-3)
        self.conv4 = nn.Conv2d(32, n_channels, 5, padding=2)
        glorot(self)

    def decode(self, z):
        return self(z)

    def forward(self, z):
        s = self.start
        h = self.bn0(self.dense(z))                                      # (B, 256 * 9 * 9)
        h = steep(h)
        h = h.unflatten(1, (256, s, s))                                  # (B, 256, 9, 9)
        h = self.conv1(nearest(h, 2 * s))                                # (B, 128, 18, 18)
        h = steep(self.bn1(h))
        h = self.conv2(nearest(h, 4 * s))                                # (B, 64, 36, 36)
        h = steep(self.bn2(h))
        h = self.conv3(nearest(h, 8 * s))                                # (B, 32, 72, 72)
        h = steep(self.bn3(h))
        x = (torch.tanh(self.conv4(h)) + 1) / 2                          # (B, C, 72, 72)
        cut = (8 * s - self.size) // 2
        inside = slice(cut, cut + self.size)
        return x[:, :, inside, inside]                                   # (B, C, 68, 68)


class NoiseDiscriminator(nn.Module):
    """Images (B, n_channels, size, size) in 0..1 -> logits (B,): the discriminator of CytoGAN, without batch norm.
    Noise of sd 0.1 is added to the image, scaled to -1..1, in training and, as the code ran, at test time. `profile` are
    the 100 activations that CytoGAN takes for the cell's representation."""

    def __init__(self, n_channels=3, size=SIZE):
        super().__init__()
        self.conv0 = nn.Conv2d(n_channels, 32, 5, 1, padding=2)
        self.conv1 = nn.Conv2d(32, 64, 5, 2, padding=2)
        self.conv2 = nn.Conv2d(64, 128, 5, 2, padding=2)
        self.conv3 = nn.Conv2d(128, 256, 5, 2, padding=2)
        side = math.ceil(size / 8)
        self.latent = nn.Linear(256 * side ** 2, 100)
        self.last = nn.Linear(100, 1)
        glorot(self)

    def profile(self, x, noise):
        """(B, 100) activations of images in 0..1; `noise`: standard normal, shaped like x."""
        h = 2 * x - 1 + 0.1 * noise
        h = steep(self.conv0(h))                                         # (B, 32, 68, 68)
        h = steep(self.conv1(h))                                         # (B, 64, 34, 34)
        h = steep(self.conv2(h))                                         # (B, 128, 17, 17)
        h = steep(self.conv3(h))                                         # (B, 256, 9, 9)
        return self.latent(h.flatten(1))                                 # (B, 100)

    def forward(self, x):
        noise = torch.randn_like(x)
        profile = self.profile(x, noise)                                 # (B, 100)
        return self.last(profile).flatten()


def glorot(net):
    """Keras' initialisation of dense and convolution layers: uniform by the layer's size, no bias."""
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------
# The Statistical Cell (Donovan-Maiye et al., "A deep generative model of 3D single-cell organization", PLoS Comput Biol
# 2022, and its code): what a cell looks like, p(reference), and one structure in it, p(target | reference, label)

LAYERS = {  # by the number of an image's dimensions
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, F.avg_pool2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, F.avg_pool3d),
}
HALVINGS = 5  # of an image by an encoder


class Block(nn.Module):
    """Maps (B, c_in, ...) -> (B, c_out, ...), half as large or, with up, twice: a residual path beside a short one, and a path
    for each condition, maps of so many channels of any size. Spectral norm on every layer. Source: DownLayerResidual and
    UpLayerResidual, which enlarge to the nearest pixel (the text: linearly)."""

    def __init__(self, c_in, c_out, dims, conditions, up):
        super().__init__()
        Conv, Transposed, Norm, self.shrink = LAYERS[dims]
        Resize = Transposed if up else Conv
        self.up = up
        self.short = Conv(c_in, c_out, 1)
        self.conv0 = Resize(c_in, c_in, 4, 2, padding=1)
        self.bn0 = Norm(c_in)
        self.conv1 = Conv(c_in, c_out, 3, padding=1)
        self.bn1 = Norm(c_out)
        self.conv_told = nn.ModuleList()
        self.bn_told = nn.ModuleList()
        for c in conditions:
            self.conv_told.append(Conv(c, c_out, 1))
            self.bn_told.append(Norm(c_out))
        for layer in (self.short, self.conv0, self.conv1, *self.conv_told):
            parametrizations.spectral_norm(layer)

    def forward(self, h, conditions):                                    # (B, c_in, n, n)
        if self.up:
            short = F.interpolate(self.short(h), scale_factor=2)         # (B, c_out, 2 n, 2 n)
        else:
            short = self.short(self.shrink(h, 2))                        # (B, c_out, n / 2, n / 2)
        h = F.relu(self.bn0(self.conv0(h)))
        h = self.bn1(self.conv1(h))
        h = h + short
        for told, layer, norm in zip(conditions, self.conv_told, self.bn_told):
            told = F.interpolate(told, h.shape[2:])
            told = F.relu(norm(layer(told)))
            h = h + told
        return h


class ConditionalVAE(nn.Module):
    """A beta-VAE of images (B, n_channels, *shape), 2D or 3D, given conditions: images of so many channels. Images are padded
    by zeros to multiples of 32, and what is drawn is cut back."""

    def __init__(self, n_channels, shape, conditions=(), width=32, latent=512):
        super().__init__()
        whole = 2 ** HALVINGS
        self.coarse = []                                                 # sides of the smallest maps
        self.pads = []                                                   # before and behind, the last dimension first
        for side in shape:
            pixels = math.ceil(side / whole)
            missing = whole * pixels - side
            before = missing // 2
            behind = missing - before
            self.coarse.append(pixels)
            self.pads = [before, behind, *self.pads]
        dims = len(shape)
        widths = [width * 2 ** i for i in range(HALVINGS)]               # 32, 64, 128, 256, 512
        inputs = [n_channels, *widths]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for a, b in zip(inputs, widths):
            self.down.append(Block(a, b, dims, conditions, up=False))
            self.up.insert(0, Block(b, a, dims, conditions, up=True))
        flat = widths[-1] * math.prod(self.coarse)
        self.mean = nn.Linear(flat, latent)
        self.log_var = nn.Linear(flat, latent)
        self.dense = nn.Linear(latent, flat)
        self.bn = LAYERS[dims][2](widths[-1])
        for layer in (self.mean, self.log_var, self.dense):
            parametrizations.spectral_norm(layer)

    def encode(self, x, conditions=()):
        """Images in 0..1 -> means and log variances of the latent, (B, latent) each."""
        h = F.pad(x, self.pads)                                          # (B, C, 96, 96) from 68
        for block in self.down:
            h = F.relu(block(h, conditions))                             # (B, 32, 48, 48) ... (B, 512, 3, 3)
        h = h.flatten(1)
        mean = self.mean(h)
        log_var = self.log_var(h)
        return mean, log_var

    def decode(self, z, conditions=()):
        """Latent vectors (B, latent) -> images, 0 or more."""
        h = self.dense(z)
        h = h.unflatten(1, (-1, *self.coarse))                           # (B, 512, 3, 3)
        h = F.relu(self.bn(h))
        for block in self.up[:-1]:
            h = F.relu(block(h, conditions))                             # (B, 256, 6, 6) ... (B, 32, 48, 48)
        x = self.up[-1](h, conditions)                                   # (B, C, 96, 96)
        x = F.softplus(x)
        cut = [-pad for pad in self.pads]
        return F.pad(x, cut)                                             # (B, C, 68, 68)

    def terms(self, x, conditions, noise):
        """What Eq 3 weighs, (B,) each: summed squared error of a draw by the noise (B, latent), standard normal (distortion), and
        KL divergence (rate). The ELBO is minus their sum."""
        mean, log_var = self.encode(x, conditions)
        sd = (0.5 * log_var).exp()
        z = mean + noise * sd
        error = x - self.decode(z, conditions)
        recon = error.square().flatten(1)
        kl = kl_divergence(mean, log_var)
        return recon.sum(1), kl.sum(1)


class StatCell(nn.Module):
    """Two stacked conditional VAEs of images (B, C, *shape) in 0..1, 2D or 3D: the channels `reference` (places: nucleus and cell),
    and the channels `target` given the reference and a label (B, labels), one-hot. Latent vectors are of both, the reference's
    `half` first. 22,279,054 parameters of the reference in 2D (160 x 96), 122,627,829 of both in 3D (160 x 96 x 64, 24 labels)."""
    takes = "images"

    def __init__(self, shape, reference, target, labels, width=32, latent=512):
        super().__init__()
        self.places = [list(reference), list(target)]
        mine = [*reference, *target]
        self.order = [mine.index(place) for place in sorted(mine)]
        self.half = latent
        self.latent = 2 * latent
        self.reference = ConditionalVAE(len(reference), shape, (), width, latent)
        conditions = len(reference), labels
        self.target = ConditionalVAE(len(target), shape, conditions, width, latent)

    def parts(self, x):
        """Images of all channels -> reference and target."""
        reference, target = self.places
        return x[:, reference], x[:, target]

    def whole(self, reference, target):
        """Reference and target -> images of all channels, in the folder's order."""
        x = torch.cat([reference, target], 1)
        return x[:, self.order]

    def told(self, reference, label):
        """The target's conditions: the reference, padded as the target is, and the label as an image of one pixel."""
        reference = F.pad(reference, self.target.pads)
        while label.ndim < reference.ndim:
            label = label[..., None]
        return reference, label

    def encode(self, x, label):
        """Means and log variances of both latents, (B, 2 latent) each."""
        reference, target = self.parts(x)
        of_reference = self.reference.encode(reference)
        of_target = self.target.encode(target, self.told(reference, label))
        return tuple(torch.cat(both, 1) for both in zip(of_reference, of_target))

    def decode(self, z, label, x=None):
        """Whole cells of latent vectors; with real images x the structure is imagined in their reference, which stays."""
        z, z_t = z.split(self.half, 1)
        if x is None:
            reference = self.reference.decode(z)
        else:
            reference, _ = self.parts(x)
        target = self.target.decode(z_t, self.told(reference, label))
        return self.whole(reference, target)

    def forward(self, x, label):                                         # (B, C, ...), (B, labels)
        """A reconstruction from the latent means; the target is given the real reference."""
        mean, _ = self.encode(x, label)
        own = mean[:, :self.half]
        reference = self.reference.decode(own)
        imagined = self.decode(mean, label, x)
        _, target = self.parts(imagined)
        return self.whole(reference, target)

    def terms(self, x, label, noise):
        """ConditionalVAE.terms of the reference and of the target, (B, 2) each; noise (B, 2 latent)."""
        reference, target = self.parts(x)
        noise, noise_t = noise.split(self.half, 1)
        told = self.told(reference, label)
        recon, kl = self.reference.terms(reference, (), noise)
        recon_t, kl_t = self.target.terms(target, told, noise_t)
        recon = torch.stack([recon, recon_t], 1)
        kl = torch.stack([kl, kl_t], 1)
        return recon, kl


# ---------------------------------------------------------------------------------------------------------
# Which networks a model has. A student's own: a class above, its name in KINDS, and a line in build_generator


def build_generator(kind, n_features, n_channels=3, size=SIZE, latent=256, stacked=None):
    """The generator of a model. It `takes` "features" (B, n_features), "images" or "noise" (B, latent), and draws images.
    stacked: the arguments of a StatCell."""
    if kind == "cp2image":
        return Generator(n_features, n_channels, size)
    if kind == "sharp":
        return SharpGenerator(n_features, n_channels, size)
    if kind in ("vae", "vaeplus"):
        return VAE(latent, n_channels, size)
    if kind in ("lsgan", "dcgan", "wgan"):
        return NoiseGenerator(n_channels, size)
    if kind == "statcell":
        return StatCell(**stacked, latent=latent)
    raise InputError(f"model {kind!r}: expected one of {', '.join(KINDS)}")


def build_discriminator(kind, n_features, n_channels=3, size=SIZE, spectral_norm=True):
    """The discriminator of a model: CytoGAN's for its GANs, none for plain VAEs, Sharp's own, for all others CP2Image's learned metric."""
    if kind == "sharp":
        return SharpCritic(n_features, n_channels, size)
    if kind in ("lsgan", "dcgan", "wgan"):
        return NoiseDiscriminator(n_channels, size)
    if kind in ("vae", "statcell"):
        return None
    return Discriminator(n_channels, spectral_norm)


def networks(kind, n_features, n_channels=3, size=SIZE, spectral_norm=True, latent=256, seed=0, stacked=None):
    """Generator and discriminator (None: it has none) of a model, each initialised from a random stream of its own.
    InputError where pictures are too small for four 5x5 convolutions and three halvings, which end at 1 pixel from 68."""
    if size < SIZE and kind not in ("sharp", "lsgan", "dcgan", "wgan", "statcell"):
        raise InputError(f"model {kind}: pictures of {size} x {size} pixels, its layers need {SIZE} or more; "
                         "prepare larger ones, or train lsgan, dcgan or wgan")
    torch.manual_seed(seed)
    G = build_generator(kind, n_features, n_channels, size, latent, stacked)
    torch.manual_seed(seed + 1)
    D = build_discriminator(kind, n_features, n_channels, size, spectral_norm)
    return G, D


def draw(G, f, x, z):
    """What a generator draws of the same cells: from f (B, F) standardised, images x in 0..1 or noise z (B, latent). Of a
    StatCell f are labels."""
    if isinstance(G, SharpGenerator):
        return G(f, z)
    if isinstance(G, StatCell):
        return G(x, f)
    return G({"features": f, "images": x, "noise": z}[G.takes])


def count_parameters(net):
    """The number of trained values in a network."""
    return sum(p.numel() for p in net.parameters())


def kernels(net):
    """The convolution kernels of a network: what weight decay acts on (batch norm is not decayed)."""
    return [p for p in net.parameters() if p.ndim == 4]


# ---------------------------------------------------------------------------------------------------------
# From a checkpoint and a table of measurements to pictures


def standardise(raw, centre, scale, missing=0.0):
    """Measurements in CellProfiler's units (N, F) -> (N, F) float32 in standard deviations, clipped to -10..10, missing
    -> 0, or NaN where the model takes that. `centre`, `scale`: (F,). The inverse, for values that were not clipped, is
    f * scale + centre."""
    f = raw.double() - centre.double()
    f = f / scale.double()
    f = f.nan_to_num(nan=missing, posinf=CLIP, neginf=-CLIP)
    return f.clamp(-CLIP, CLIP).float()


def to_uint8(x):
    """Images in 0..1 -> uint8: clipped, times 255, rounded."""
    levels = x.clamp(0, 1).mul_(255).round_()
    return levels.to(torch.uint8)


def read_checkpoint(path, device="cpu"):
    """The dictionary that train.py saved at `path`; InputError if it is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with: python train.py --data out/") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first, *_ = str(error).strip().split("\n")
        raise InputError(f"{path}: not a readable checkpoint of train.py ({first[:120]}); "
                         "it may be cut short: use an older one") from None
    about = state if isinstance(state, dict) else {}
    if about.get("format") not in (FORMAT, OLD_FORMAT):
        raise InputError(f"{path}: a torch file, but not a checkpoint of this train.py "
                         f"(expected its key 'format' to be {FORMAT}); "
                         "train it again")
    if state["format"] == OLD_FORMAT and state["normalise"] == "plate-dmso":
        raise InputError(f"{path}: was trained with an older --normalise plate-dmso; prepare and train again")
    return state


def build(state):
    """Generator and discriminator as a checkpoint describes them, without its weights; the CPU's random state is left alone."""
    settings = state["settings"]
    n_features = len(state["features"])
    n_channels = len(state["channels"])
    spectral_norm = settings["spectral_norm"] == "on"
    with torch.random.fork_rng(devices=[]):
        size = state.get("size", SIZE)
        return networks(state["model"], n_features, n_channels, size, spectral_norm, settings["latent"],
                        stacked=state.get("stacked"))


def load_weights(net, weights, path):
    """Puts a checkpoint's weights into a network; InputError where the classes above no longer fit them."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).split("\n")
        difference = lines[1].strip()
        raise InputError(f"{path}: its weights do not fit the network as model.py has it now ({difference}); "
                         "train it again, or take the change back") from None


def load(path, device="cpu"):
    """A trained generator in eval mode from the checkpoint of train.py at `path`; the averaged weights, where a run kept some.
    It carries `.takes` ("features": CP2Image, for `generate`; "images"; "noise"), `.model`, `.features` (ordered names),
    `.centre` and `.scale` ((F,) float64 tensors on the CPU), `.channels`, `.size` (pixels), `.normalise`, `.image_norm`,
    `.white` (16-bit level that image value 1 stands for; None with cell-max), `.step`, `.identity` (the data's checksums),
    `.label_names` (what each place of a StatCell's label says), `.device`."""
    state = read_checkpoint(path, device)
    G, _ = build(state)
    averaged = state["G_ema"]
    load_weights(G, state["G"] if averaged is None else averaged, path)
    G = G.to(device).eval()
    if torch.device(device).type == "cpu" and isinstance(G, Generator):
        n_features = len(state["features"])
        two_cells = torch.linspace(-2, 2, 2 * n_features)
        G = faster(G, two_cells.view(2, n_features))
    for name in ("model", "features", "channels", "normalise", "image_norm", "white", "step", "identity"):
        setattr(G, name, state[name])
    G.missing = getattr(G, "missing", False)  # whether measurements may be missing
    G.size = state.get("size", SIZE)
    G.label_names = state.get("labels")
    G.centre = state["centre"].double()
    G.scale = state["scale"].double()
    G.device = torch.device(device)
    return G.requires_grad_(False)


def load_metric(path, device="cpu"):
    """The discriminator of the checkpoint at `path` in eval mode, for CP2Image the learned metric; None: it has none."""
    state = read_checkpoint(path, device)
    _, D = build(state)
    if D is None:
        return None
    load_weights(D, state["D"], path)
    return D.to(device).eval().requires_grad_(False)


def noise(G, cells, seed=0):
    """Standard normal vectors (n, G.latent) for n cells, or for some of them: range(256, 512). A cell's depends on the seed and
    its own number alone."""
    cells = range(cells) if isinstance(cells, int) else cells
    rows = []
    for i in cells:
        random = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2 ** 32)
        rows.append(torch.randn(G.latent, generator=random))
    return torch.stack(rows)


@torch.no_grad()
def sample(G, n, seed=0, batch=256, label=None):
    """n free samples of a model with a latent space (VAEs, GANs), of a StatCell with this label (1, labels): (n, C, S, S) in 0..1
    on the CPU."""
    if G.takes == "features":
        raise InputError("this model draws cells from their measurements, not from noise; use generate")
    parts = []
    for start in range(0, n, batch):
        some = range(start, min(n, start + batch))
        z = noise(G, some, seed).to(G.device)
        told = () if label is None else (label.expand(len(z), -1),)
        x = G.decode(z, *told)
        parts.append(x.clamp(0, 1).cpu())
    return torch.cat(parts)


def table_values(G, table):
    """The model's features of a table of CellProfiler measurements, raw (N, F) float64, NaN = not given.
    InputError: no table, a missing column (named; Sharp needs only one of them), text in a feature column, or a model
    trained in DMSO sd of each plate (--normalise plate-dmso) and a table that is not."""
    if not hasattr(table, "columns"):
        raise InputError("expected a pandas table with CellProfiler's column names, "
                         f"found {type(table).__name__}; "
                         "prepare_bbbc021.read_table reads one")
    columns = set(table.columns)
    absent = [name for name in G.features if name not in columns]
    enough = G.missing and len(absent) < len(G.features)
    if absent and not enough:
        first = ", ".join(absent[:5])
        raise InputError(f"{len(absent)} of the model's {len(G.features)} features are not in the table, "
                         f"first: {first}; "
                         "it needs CellProfiler's names with the object first (Nuclei_AreaShape_Area)")
    about = getattr(table, "attrs", {})
    if G.normalise == "plate-dmso" and about.get("normalise") != "plate-dmso":
        raise InputError("this model was trained with --normalise plate-dmso: "
                         "give data.normalise_plates(table), "
                         "which needs columns plate and compound and each plate's DMSO rows")
    try:
        there = [name for name in G.features if name in columns]
        given_values = table[there].to_numpy(dtype="float64")
    except (TypeError, ValueError) as error:
        raise InputError(f"a feature column holds something that is no number ({error})") from None
    shape = len(table), len(G.features)
    values = torch.full(shape, torch.nan, dtype=torch.float64)
    places = [name in columns for name in G.features]
    values[:, places] = torch.tensor(given_values)
    return values


def standardise_table(G, table):
    """The rows of a table (see table_values) -> (N, F) float32, as G was trained; warns of what was ignored, missing or
    clipped."""
    raw = table_values(G, table)
    unknown = math.nan if G.missing else 0.0
    f = standardise(raw, G.centre, G.scale, unknown)
    known = {*G.features, *ABOUT_A_CELL}
    extra = [str(name) for name in table.columns if name not in known]
    missing = int(raw.isnan().sum())
    clipped = int((f.abs() >= CLIP).sum())
    if extra or missing or clipped:
        first = ", ".join(extra[:3])
        fate = "left open" if G.missing else "set to the mean"
        said = [f"generate: {len(extra)} columns ignored (first: {first})",
                f"{missing} missing values {fate}",
                f"{clipped} values clipped to {CLIP:.0f} standard deviations"]
        warnings.warn("; ".join(said), stacklevel=3)
    return f


@torch.no_grad()
def generate(G, table, as_uint8=True, batch=None):
    """One picture for each row of a table of CellProfiler measurements: (N, C, S, S) on the CPU, uint8, or float32 in 0..1.
    Extra columns are ignored, with a warning that lists them; see table_values for what raises InputError. A cell's picture
    does not depend on which other cells are in the table."""
    if G.takes != "features":
        raise InputError(f"a {G.model} draws from {G.takes}, not from measurements; "
                         "train --model cp2image, or use its decode and sample")
    f = standardise_table(G, table)
    if batch is None:
        batch = 32 if G.device.type == "cpu" else 1024  # 32: fits a CPU's cache
    shape = len(f), len(G.channels), G.size, G.size
    x = torch.empty(shape)
    for i in range(0, len(f), batch):
        part = f[i:i + batch].to(G.device)
        x[i:i + batch] = G(part)
    return to_uint8(x) if as_uint8 else x.clamp(0, 1)


# =========================================================================================================
# The fence. Below, nothing new is computed: the same functions of the same parameters, faster on a CPU. `faster` compares
# both and keeps the plain ones where somebody has changed them. Share of the whole training step that each rewrite saves
# (batch 104, 453 features, 2 cores; the step is so many times slower without it):
# pooling before batch norm and split moments 2.26, channels last 1.68, a doubling as four phases 1.38.


def faster(net, example):
    """The network with faster forwards where it has them and they still are the same function, else as it is, in a line.
    `example`: inputs of the network, 2 cells or 4 images, by which both are compared in float64 (about a second)."""
    swaps = {Generator: FastGenerator, Discriminator: FastDiscriminator, BatchNorm: FastBatchNorm}
    for module in net.modules():
        if isinstance(module, Generator) and module.size != SIZE:
            return net  # the nearest pixels of another size are no doubling
    fast = copy.deepcopy(net)
    for module in fast.modules():
        module.__class__ = swaps.get(type(module), type(module))
    example = example.detach().cpu().double()
    try:
        ours = answers(fast, example)
        torch.testing.assert_close(ours, answers(net, example), rtol=1e-6, atol=1e-9)
    except Exception:  # they differ, or whatever a changed network raises in the fast form
        print(f"note   {type(net).__name__}: the fast layers are no longer the same function as the plain ones, "
              "which run instead")
        return net
    return fast.to(memory_format=torch.channels_last)


def answers(net, example):
    """What a float64 copy of the network gives: outputs in eval mode, outputs and gradients in training (a list of tensors)."""
    found = []
    for training in (False, True):
        own = copy.deepcopy(net).cpu().double()
        own.train(training).requires_grad_(training)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            if isinstance(own, Discriminator):
                logit, maps = own(example, len(example) - 1)
                outputs = [logit, *maps]
            else:
                outputs = [own(example)]
            found += outputs
            if training:
                loss = 0
                for y in outputs:
                    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype)
                    loss = loss + (y.flatten() * weights).sum()
                found += torch.autograd.grad(loss, list(own.parameters()))
                found += own.buffers()
    return found


def flat(x):
    """x (B, C, H, W) -> (B * H, W * C), a view where x is channels last. torch's batch-norm kernels take the columns of
    pixels apart: over all pixels at once they lose three digits on a CPU."""
    pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    return pixels.reshape(-1, x.shape[3] * x.shape[1])


def moments(x):
    """Mean and biased variance (C,) of x (B, C, H, W), in float32 at least."""
    rows = flat(x)
    precision = torch.promote_types(x.dtype, torch.float32)
    unused = torch.zeros(2, rows.shape[1], dtype=precision, device=x.device)
    mean, var = torch.batch_norm_update_stats(rows, *unused, 0.0)
    mean = mean.view(-1, x.shape[1])  # of each column
    var = var.view(-1, x.shape[1])
    between = mean.var(0, correction=0)
    return mean.mean(0), var.mean(0) + between


def norm_backward(grad, x, weight, mean, var, rstd):
    """torch's gradients of x, weight and bias with mean and variance held fixed; weight, mean, var and rstd = 1 / sd (C,)."""
    n = x.shape[3]
    vectors = [v.repeat(n) for v in (weight, mean, var, mean, rstd)]
    grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        flat(grad), flat(x), *vectors, False, EPS, [True, True, True])
    grad = grad.view(len(x), *x.shape[2:], -1)
    grad_weight = grad_weight.view(n, -1).sum(0)
    grad_bias = grad_bias.view(n, -1).sum(0)
    return grad.permute(0, 3, 1, 2), grad_weight, grad_bias


class Normalise(torch.autograd.Function):
    """(v - mean) / sqrt(var + eps) * weight + bias with mean and variance of x (B, C, H, W), for v = x, or in its place its
    largest pixels `pooled` (or None), and for images that `follow` (or None). All gradients reach x through the moments,
    too; one that is not asked for costs nothing. Returns both, mean (C,) and biased variance (C,)."""

    @staticmethod
    def forward(ctx, weight, bias, x, pooled, follow):
        mean, var = moments(x)
        ctx.save_for_backward(weight, mean, var, x, pooled, follow)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        shown = x if pooled is None else pooled
        y = F.batch_norm(shown, mean, var, weight, bias, False, 0.0, EPS)
        y_follow = None
        if follow is not None:
            y_follow = F.batch_norm(follow, mean, var, weight, bias, False, 0.0, EPS)
        return y, y_follow, mean, var

    @staticmethod
    def backward(ctx, grad, grad_follow, *_):
        weight, mean, var, x, pooled, follow = ctx.saved_tensors
        rstd = (var + EPS).rsqrt()
        if len(weight) == 1 and grad_follow is not None:
            if not grad_follow.any():  # logits of images that follow are in no loss: their backward pass ends here
                grad_follow = None
        grad_weight = torch.zeros_like(weight)
        grad_bias = torch.zeros_like(weight)
        if grad is not None:
            shown = x if pooled is None else pooled
            grad, own_weight, own_bias = norm_backward(grad, shown, weight, mean, var, rstd)
            grad_weight = grad_weight + own_weight
            grad_bias = grad_bias + own_bias
        if grad_follow is not None:
            grad_follow, its_weight, its_bias = norm_backward(grad_follow, follow, weight, mean, var, rstd)
            grad_weight = grad_weight + its_weight
            grad_bias = grad_bias + its_bias
        per_channel = x.numel() / len(weight)
        scale = -weight * rstd / per_channel
        # by way of the moments
        slope = scale * grad_weight
        shift = scale * grad_bias
        through = F.batch_norm(x, mean, var, slope, shift, False, 0.0, EPS)
        if pooled is not None:
            return grad_weight, grad_bias, through, grad, grad_follow
        if grad is not None:
            through = grad.add_(through)
        return grad_weight, grad_bias, through, None, grad_follow


class FastBatchNorm(BatchNorm):
    """BatchNorm on torch's fused kernels. `pair` also does the discriminator's max-pooling first, on a quarter of the work:
    the largest pixel before batch norm is the largest after it where the weight is positive, so kernels are turned upright."""

    def forward(self, x, moments_of=None):
        if moments_of is not None or not self.training:
            return super().forward(x, moments_of)
        y, _, mean, var = Normalise.apply(self.weight, self.bias, x, None, None)  # nothing pooled, nothing follows
        self.update_running(mean, var)
        return y

    def sign(self):
        ones = torch.ones_like(self.weight)
        return ones.copysign(self.weight.detach())

    def upright(self, kernel):
        """The kernel (C, C_in, k, k) with the channels negated whose weight here is negative."""
        return kernel * self.sign()[:, None, None, None]

    def pair(self, x, follow, pool):
        """x and images that follow it (or None), both normalised by the moments of x; `pool`: x comes from an upright kernel."""
        sign = self.sign() if pool else 1
        pooled = F.max_pool2d(x, 2) if pool else None
        if pool and follow is not None:
            follow = F.max_pool2d(follow, 2)
        if self.training:
            weight = self.weight * sign
            y, follow, mean, var = Normalise.apply(weight, self.bias, x, pooled, follow)
            self.update_running(mean * sign, var)
            return y, follow
        running = (self.running_mean * sign, self.running_var)
        fixed = (*running, self.weight * sign, self.bias, False, 0.0, EPS)
        y = F.batch_norm(pooled if pool else x, *fixed)
        if follow is not None:
            follow = F.batch_norm(follow, *fixed)
        return y, follow


def phases(weight):
    """The four 3x3 kernels (4 C, C_in, 3, 3) that a 5x5 kernel (C, C_in, 5, 5) becomes after a nearest doubling.
    Neighbouring taps then fall on the same pixel: at even places the five act as three, 0+1, 2+3, 4, at odd ones as 0,
    1+2, 3+4. The sums of 2x2 taps hold both: at odd places those of the even phase."""
    sums = F.avg_pool2d(weight, 2, 1, 1, divisor_override=1)  # (C, C_in, 6, 6)
    taps = sums.unflatten(3, (3, 2))
    taps = taps.unflatten(2, (3, 2))  # (C, C_in, 3, 2 rows, 3, 2 columns)
    taps = taps.flip(3, 5)  # the even phase first
    taps = taps.permute(3, 5, 0, 1, 2, 4)  # (2 rows, 2 columns, C, C_in, 3, 3)
    return taps.flatten(0, 2)


def double_and_convolve(h, weight):
    """F.conv2d(nearest doubling of h, weight, padding=4), weight 5x5: 36 % of its multiplications. The pixels come in
    another order, (B, C, n, 4 n) for (B, C, 2 n, 2 n): batch norm does not see it; `interleave` puts them right."""
    y = F.conv2d(h, phases(weight), padding=2)  # (B, 4 C, n, n)
    y = y.permute(0, 2, 3, 1)  # (B, n, n, 4 C)
    y = y.unflatten(3, (4, -1)).flatten(2, 3)  # (B, n, 4 n, C)
    return y.permute(0, 3, 1, 2)


def interleave(y):
    """The four phases, side by side as (B, C, n, 4 n), where their pixels belong: (B, C, 2 n, 2 n)."""
    c, n = y.shape[1:3]
    y = y.permute(0, 2, 3, 1)  # (B, n, 4 n, C)
    y = y.reshape(len(y), n, n, 2, 2, c)
    y = y.transpose(2, 3)  # (B, n, 2 rows, n, 2 columns, C)
    y = y.reshape(len(y), 2 * n, 2 * n, c)
    return y.permute(0, 3, 1, 2)


class FastGenerator(Generator):
    """Generator.forward with each doubling and its 5x5 convolution as four 3x3 phases, side by side up to the last layer."""

    def forward(self, f):
        h = f[:, :, None, None]                                          # (B, F, 1, 1)
        h = leaky(self.bn0(self.conv0(h)))                               # (B, 32, 5, 5)
        h = double_and_convolve(h, self.conv1.weight)                    # (B, 32, 7, 28)
        h = interleave(leaky(self.bn1(h)))                               # (B, 32, 14, 14)
        h = double_and_convolve(h, self.conv2.weight)                    # (B, 32, 16, 64)
        h = interleave(leaky(self.bn2(h)))                               # (B, 32, 32, 32)
        h = double_and_convolve(h, self.conv3.weight)                    # (B, 32, 34, 136)
        h = leaky(self.bn3(h))
        h = leaky(self.bn_out(self.conv_out(h)))                         # (B, C, 34, 136)
        return interleave(h).to(self.bn_out.weight.dtype)                # (B, C, 68, 68)


class FastDiscriminator(Discriminator):
    """Discriminator.forward with the images that set the moments and those that follow apart, pooled before batch norm."""

    def forward(self, x, moments_of=None):
        x = x.contiguous(memory_format=torch.channels_last)
        first = x
        rest = None
        if moments_of is not None and moments_of < len(x):
            first = x[:moments_of]
            rest = x[moments_of:]
        outputs = []
        for i, pool in enumerate((True, True, True, False, False)):
            norm = getattr(self, f"bn{i}")
            weight = getattr(self, f"conv{i}").weight  # once for both: spectral norm iterates when it is read
            if pool:
                weight = norm.upright(weight)
            first = F.conv2d(first, weight)
            rest = None if rest is None else F.conv2d(rest, weight)
            first, rest = norm.pair(first, rest, pool)
            if i < 4:
                first = leaky(first)
                rest = None if rest is None else leaky(rest)
            whole = first if rest is None else torch.cat([first, rest])
            outputs.append(whole.to(norm.weight.dtype))
        *maps, logit = outputs
        return logit.mean((1, 2, 3)), maps
