"""CP2Image and its baselines: the networks, and what it takes to use a trained one. This file needs nothing but torch: copy it out alone.

    G = model.load("runs/cp2image-seed0/last.pt")
    x = model.generate(G, table)            # table: a pandas frame of CellProfiler measurements, one row a cell

Source: Ji, Cutiongco, Jensen, Yuan, "CP2Image", MIDL 2023 (PMLR 227:274-285), and the authors' TensorFlow code
(revision 705214e); for the three GANs Goldsborough et al., "CytoGAN", 2017, and its Keras code. Where a text and its code
disagree the code is followed, as it ran. Images are in 0..1 wherever they enter or leave a network.
"""
import math
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
FORMAT = "cp2image-2"  # of a checkpoint
KINDS = ("cp2image", "vae", "vaeplus", "lsgan", "dcgan", "wgan")

# At 453 features and 3 channels. The paper's "1.32 million" adds two things that the released graph built and never trained.
PAPER_PARAMETERS = {"generator": 439_558, "discriminator": 105_186, "unused encoder": 780_404, "unused output heads": 306}


class InputError(ValueError):
    """A mistake in what was given: one line with what was found, what was expected and what to do next."""


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def conv(c_in, c_out, k, padding=0):
    """A bias-free convolution with the released initialisation: normal, sd = sqrt(2 / (k*k*c_in + c_out))."""
    layer = nn.Conv2d(c_in, c_out, k, padding=padding, bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (k * k * c_in + c_out)))
    return layer


def channels_last(x):
    """x (B, C, H, W) with the channels of a pixel side by side in memory, which all layers here keep: twice as fast on a CPU."""
    return x.contiguous(memory_format=torch.channels_last)


def columns_of(x):
    """How many columns of pixels torch's batch-norm kernels are to take apart: on a CPU they lose three digits over all pixels at once."""
    return 1 if x.is_cuda else x.shape[3]


def flat(x):
    """x (B, C, H, W) -> (B * H * W / columns, columns * C), a view where x is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, columns_of(x) * x.shape[1])


def moments(x):
    """Mean and biased variance (C,) of x (B, C, H, W), in float32 at least."""
    rows = flat(x)
    if x.is_cuda:
        return torch.batch_norm_update_stats(rows, None, None, 0.0)
    wide = torch.zeros(2, rows.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))  # says in which precision
    mean, var = (v.view(-1, x.shape[1]) for v in torch.batch_norm_update_stats(rows, *wide, 0.0))  # of each column
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def norm_backward(grad, x, vectors, whole=False):
    """torch's gradients of x, weight and bias, mean and variance held fixed unless `whole`; vectors: weight, mean, var, 1 / sd (C,) each."""
    n = columns_of(x)
    weight, mean, var, rstd = torch.stack(vectors).repeat(1, n) if n > 1 else vectors
    grad, *sums = torch.ops.aten.native_batch_norm_backward(flat(grad), flat(x), weight, mean, var, mean, rstd, whole, EPS, [True, True, True])
    return grad.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2), *(v.view(n, -1).sum(0) if n > 1 else v for v in sums)


class Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with mean and variance of x (B, C, H, W): of x itself, or of its largest pixels `pooled`
    in its place; and of images that `follow`, or None.
    The same function as `torch.var_mean(x, (0, 2, 3), correction=0)` and plain arithmetic (a test holds them against each other in
    float64), with torch's fused kernels. The gradients of all reach x through the moments; one that is not asked for costs nothing.
    Returns both, mean (C,) and biased variance (C,)."""

    @staticmethod
    def forward(ctx, weight, bias, x, pooled, follow):
        mean, var = moments(x)
        ctx.save_for_backward(weight, mean, var, x, pooled, follow)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        y, y_follow = (v if v is None else F.batch_norm(v, mean, var, weight, bias, False, 0.0, EPS)
                       for v in (x if pooled is None else pooled, follow))
        return y, y_follow, mean, var

    @staticmethod
    def backward(ctx, grad, grad_follow, *_):
        weight, mean, var, x, pooled, follow = ctx.saved_tensors
        rstd = (var + EPS).rsqrt()
        vectors, sums = (weight, mean, var, rstd), []
        if columns_of(x) == 1 and pooled is None and grad_follow is None:
            grad, *sums = norm_backward(grad, x, vectors, whole=True)
            return *sums, grad, None, None
        if grad is not None:
            grad, *own = norm_backward(grad, x if pooled is None else pooled, vectors)
            sums.append(own)
        if grad_follow is not None:
            grad_follow, *its = norm_backward(grad_follow, follow, vectors)
            sums.append(its)
        grad_weight, grad_bias = map(sum, zip(*sums)) if len(sums) > 1 else sums[0]
        scale = -weight * rstd * len(weight) / x.numel()
        through = F.batch_norm(x, mean, var, scale * grad_weight, scale * grad_bias, False, 0.0, EPS)  # what x adds through its moments
        if pooled is None:
            return grad_weight, grad_bias, through if grad is None else grad.add_(through), None, grad_follow
        return grad_weight, grad_bias, through, grad, grad_follow


class BatchNorm(nn.Module):
    """Batch norm over (B, C, H, W) as the released code has it.
    Two things differ from torch's: the running variance is the biased one, and in training images may `follow`, normalised by the
    moments of x and no part of them (the discriminator's rule): a pair is then returned. With `moments=False` only weight and bias act.
    With `pool`, max-pooling by 2 comes after it; x must then come from an `upright` kernel."""

    def __init__(self, channels, moments=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.moments = moments
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def sign(self):
        return torch.ones_like(self.weight).copysign(self.weight.detach())

    def upright(self, kernel):
        """The kernel (C, C_in, k, k) with the channels negated whose weight here is negative: the largest before batch norm is then the
        largest after it, so that pooling may stand before it, on a quarter of the work."""
        return kernel * self.sign()[:, None, None, None]

    def forward(self, x, follow=None, pool=False):
        sign = self.sign() if pool else 1
        weight, pooled = self.weight * sign, F.max_pool2d(x, 2) if pool else None
        follow = F.max_pool2d(follow, 2) if pool and follow is not None else follow
        if self.moments and self.training:
            y, y_follow, mean, var = Normalise.apply(weight, self.bias, x, pooled, follow)
            with torch.no_grad():
                self.running_mean.lerp_(mean * sign, MOMENTUM)
                self.running_var.lerp_(var, MOMENTUM)
            return y if follow is None else (y, y_follow)

        def fixed(v):
            if self.moments:
                return F.batch_norm(v, self.running_mean * sign, self.running_var, weight, self.bias, False, 0.0, EPS)
            return v * weight[:, None, None] + self.bias[:, None, None]

        y = fixed(x if pooled is None else pooled)
        return y if follow is None else (y, fixed(follow))


def leaky(x, inplace=False):
    return F.leaky_relu(x, SLOPE, inplace)


def spread_vector(f, weight):
    """A zero-padded 5x5 convolution of a 1x1 map, F.conv2d(f[:, :, None, None], weight, padding=4), as one matrix product."""
    return torch.einsum("bi,oihw->bhwo", f, weight.flip(2, 3)).permute(0, 3, 1, 2)  # (B, C, 5, 5)


def phases(weight):
    """The four 3x3 kernels (4 C, C_in, 3, 3) that a 5x5 kernel (C, C_in, 5, 5) becomes after a nearest doubling.
    Neighbouring taps then fall on the same pixel: at even places the five act as three, 0+1, 2+3, 4, at odd ones as 0, 1+2, 3+4."""
    sums = F.avg_pool2d(weight, 2, 1, 1, divisor_override=1)  # of 2x2 taps (C, C_in, 6, 6): at odd places those of the even phase
    return sums.unflatten(3, (3, 2)).unflatten(2, (3, 2)).flip(3, 5).permute(3, 5, 0, 1, 2, 4).flatten(0, 2)  # 2 rows, 2 columns, C


def double_and_convolve(h, weight, padding=4):
    """F.conv2d(F.interpolate(h, scale_factor=2), weight, padding=padding), weight 5x5, an even padding: 36 % of its multiplications.
    The pixels come in another order, (B, C, n, 4 n) for (B, C, 2 n, 2 n): batch norm does not see it; `interleave` puts them right."""
    y = F.conv2d(h, phases(weight), padding=padding // 2).permute(0, 2, 3, 1)  # (B, n, n, 4 C)
    return y.unflatten(3, (4, -1)).flatten(2, 3).permute(0, 3, 1, 2)


def interleave(y):
    """The four phases, side by side as (B, C, n, 4 n) or (B, 4 C, n, n), where their pixels belong: (B, C, 2 n, 2 n)."""
    n = y.shape[2]
    y = y.permute(0, 2, 3, 1).reshape(len(y), n, n, 2, 2, -1).transpose(2, 3)  # (B, n, 2 rows, n, 2 columns, C)
    return y.reshape(len(y), 2 * n, 2 * n, -1).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Generator(nn.Module):
    """CP vectors (B, n_features), standardised -> images (B, n_channels, 68, 68), trained towards the range 0..1.
    Released code, layers HL_5..HL_8 and HL_recons_3: the output is a batch norm and a leaky ReLU, not a sigmoid."""
    takes = "features"

    def __init__(self, n_features, n_channels=3):
        super().__init__()
        self.conv0, self.bn0 = conv(n_features, 32, 5, padding=4), BatchNorm(32)
        self.conv1, self.bn1 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv2, self.bn2 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv3, self.bn3 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv_out, self.bn_out = conv(32, n_channels, 1), BatchNorm(n_channels)

    def forward(self, f):
        h = leaky(self.bn0(spread_vector(f, self.conv0.weight)))  # (B, 32, 5, 5)
        h = interleave(leaky(self.bn1(double_and_convolve(h, self.conv1.weight))))  # nearest to 10, (B, 32, 14, 14)
        h = interleave(leaky(self.bn2(double_and_convolve(h, self.conv2.weight))))  # nearest to 28, (B, 32, 32, 32)
        h = leaky(self.bn3(double_and_convolve(h, self.conv3.weight)))  # nearest to 64, (B, 32, 68, 68)
        return interleave(leaky(self.bn_out(self.conv_out(h))))  # (B, C, 68, 68)


class Discriminator(nn.Module):
    """Images (B, n_channels, 68, 68) in 0..1 -> (logits (B,), four hidden maps): the learned metric of the paper.
    With `follow`, more images that are normalised by the batch-norm moments of x and no part of them, a pair of such results: the step
    passes (real, generated), and the originals follow. A tuple x is one batch in parts, of which only some need a gradient. Every
    kernel is spectrally normalised by torch's parametrisation, whose power iteration runs in training mode only. Since batch norm
    follows each kernel this does not change training; `batch_norm=False` (an ablation) is where it does."""

    def __init__(self, n_channels=3, spectral_norm=True, batch_norm=True):
        super().__init__()
        for i, (c_in, c_out, k) in enumerate([(n_channels, 32, 5), (32, 32, 5), (32, 32, 5), (32, 64, 5), (64, 1, 1)]):
            layer = conv(c_in, c_out, k)
            setattr(self, f"conv{i}", parametrizations.spectral_norm(layer) if spectral_norm else layer)
            setattr(self, f"bn{i}", BatchNorm(c_out, moments=batch_norm))

    def layer(self, i, x, follow):
        bn, device = getattr(self, f"bn{i}"), (x[0] if isinstance(x, tuple) else x).device.type
        with torch.autocast(device, enabled=False):  # spectral norm in full precision
            weight = getattr(self, f"conv{i}").weight  # once for both: it iterates when it is read
            weight = bn.upright(weight) if i < 3 else weight
        y = torch.cat([F.conv2d(part, weight) for part in x]) if isinstance(x, tuple) else F.conv2d(x, weight)
        y = bn(y, None if follow is None else F.conv2d(follow, weight), pool=i < 3)
        return (y, None) if follow is None else y

    def forward(self, x, follow=None):
        if isinstance(x, tuple):  # apart on a CPU, where the gradient of real images would cost; as one on a GPU
            x = channels_last(torch.cat(x)) if x[0].is_cuda else tuple(map(channels_last, x))
        h, h_follow, pair = [], [], (x if isinstance(x, tuple) else channels_last(x), None if follow is None else channels_last(follow))
        for i in range(4):  # (B, 32, 32, 32), (B, 32, 14, 14), (B, 32, 5, 5), (B, 64, 1, 1)
            pair = [None if v is None else leaky(v) for v in self.layer(i, *pair)]
            h, h_follow = [*h, pair[0]], [*h_follow, pair[1]]
        logit, logit_follow = self.layer(4, *pair)
        return (logit.flatten(), h) if follow is None else ((logit.flatten(), h), (logit_follow.flatten(), h_follow))


class VAE(nn.Module):
    """A variational autoencoder of images (B, n_channels, 68, 68) in 0..1: VAE and VAEplus of the paper's Table 1.
    Called with images: their reconstruction from the latent means. With `noise` (B, latent), standard normal, as training does:
    (reconstruction of a draw, means (B, latent), log variances). Source: the encoder that the released code builds; decoder: its generator."""
    takes = "images"

    def __init__(self, latent=256, n_channels=3):
        super().__init__()
        self.latent = latent
        for i, (c_in, c_out) in enumerate([(n_channels, 32), (32, 32), (32, 32), (32, 2 * latent)]):
            setattr(self, f"conv{i}", conv(c_in, c_out, 5))
            setattr(self, f"bn{i}", BatchNorm(c_out))
        self.decoder = Generator(latent, n_channels)

    def encode(self, x):
        """Images -> means and log variances of the latent (B, latent) each; InputError for another size than 68 x 68."""
        if x.shape[2:] != (SIZE, SIZE):
            raise InputError(f"images of {x.shape[2]} x {x.shape[3]} pixels: the VAE's layers are made for {SIZE} x {SIZE}")
        x = channels_last(x)
        for i in range(3):
            layer, bn = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = leaky(bn(F.conv2d(x, bn.upright(layer.weight)), pool=True))  # (B, 32, 32, 32), 14, 5
        return self.bn3(self.conv3(x)).flatten(1).chunk(2, 1)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x, noise=None):
        mean, log_var = self.encode(x)
        if noise is None:
            return self.decode(mean)
        return self.decode(mean + noise * (0.5 * log_var).exp()), mean, log_var


class NoiseGenerator(nn.Module):
    """Noise (B, 100), standard normal -> images (B, n_channels, size, size) in 0..1: the generator of CytoGAN's LSGAN, DCGAN and WGAN.
    At a size that is no multiple of 8 the next larger picture is cut in the middle. The output layer is tanh, brought to 0..1."""
    takes = "noise"

    def __init__(self, n_channels=3, size=SIZE, latent=100):
        super().__init__()
        self.size, self.latent, self.start = size, latent, -(-size // 8)
        self.dense, self.bn0 = nn.Linear(latent, 256 * self.start ** 2), nn.BatchNorm1d(256 * self.start ** 2, 1e-3)
        for i, (c_in, c_out) in enumerate([(256, 128), (128, 64), (64, 32), (32, n_channels)], 1):
            setattr(self, f"conv{i}", nn.Conv2d(c_in, c_out, 5, padding=2))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c, 1e-3) for c in (128, 64, 32))
        glorot(self)

    def decode(self, z):
        return self(z)

    def forward(self, z):
        h = F.leaky_relu(self.bn0(self.dense(z)), 0.2).unflatten(1, (256, self.start, self.start))
        h = channels_last(h)  # (B, 256, 9, 9) for 68 pixels
        for i in (1, 2, 3):
            layer = getattr(self, f"conv{i}")
            h = interleave(double_and_convolve(h, layer.weight, 2)) + layer.bias[:, None, None]  # (B, 128, 18, 18), (B, 64, 36, 36), (B, 32, 72, 72)
            h = F.leaky_relu(getattr(self, f"bn{i}")(h), 0.2)
        x = (torch.tanh(self.conv4(h)) + 1) / 2
        cut = (x.shape[2] - self.size) // 2
        return x[:, :, cut:cut + self.size, cut:cut + self.size]


class NoiseDiscriminator(nn.Module):
    """Images (B, n_channels, size, size) in 0..1 -> logits (B,): the discriminator of CytoGAN, without batch norm.
    Noise of sd 0.1 is added to the image, scaled to -1..1, in training and, as the code ran, at test time. `profile` are the 100
    activations that CytoGAN takes for the cell's representation."""

    def __init__(self, n_channels=3, size=SIZE):
        super().__init__()
        for i, (c_in, c_out, stride) in enumerate([(n_channels, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2)]):
            setattr(self, f"conv{i}", nn.Conv2d(c_in, c_out, 5, stride, padding=2))
        self.latent, self.last = nn.Linear(256 * (-(-size // 8)) ** 2, 100), nn.Linear(100, 1)
        glorot(self)

    def profile(self, x, noise):
        """(B, 100) activations of images in 0..1; `noise`: standard normal like x, or 0."""
        h = channels_last(2 * x - 1 + 0.1 * noise)
        for i in range(4):
            h = F.leaky_relu(getattr(self, f"conv{i}")(h), 0.2)  # (B, 32, 68, 68), (B, 64, 34, 34), (B, 128, 17, 17), (B, 256, 9, 9)
        return self.latent(h.flatten(1))

    def forward(self, x):
        return self.last(self.profile(x, torch.randn_like(x))).flatten()


def glorot(net):
    """Keras' initialisation of dense and convolution layers: uniform by the layer's size, no bias."""
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def networks(kind, n_features, n_channels=3, spectral_norm=True, d_batch_norm=True, latent=256):
    """The generator and the discriminator (None: it has none) of a model. A student's own model is a line here, a class above and its
    name in KINDS: a generator `takes` "features" (B, n_features), "images" or "noise" (B, latent) and returns images in 0..1."""
    if kind == "cp2image":
        return Generator(n_features, n_channels), Discriminator(n_channels, spectral_norm, d_batch_norm)
    if kind in ("vae", "vaeplus"):
        return VAE(latent, n_channels), Discriminator(n_channels, spectral_norm, d_batch_norm) if kind == "vaeplus" else None
    if kind in ("lsgan", "dcgan", "wgan"):
        return NoiseGenerator(n_channels), NoiseDiscriminator(n_channels)
    raise InputError(f"model {kind!r}: expected one of {', '.join(KINDS)}")


class Folded(nn.Module):
    """A trained Generator for drawing only: batch norm and the doublings' kernels worked out once. The same function, 3 times faster."""

    def __init__(self, G):
        super().__init__()
        def fold(layer, bn):  # kernel (C, C_in, k, k) and bias (C,) of convolution and batch norm in one
            scale = bn.weight * (bn.running_var + EPS).rsqrt()
            return layer.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale

        weight, bias = fold(G.conv0, G.bn0)
        tensors = {"weight0": weight.flip(2, 3).permute(1, 2, 3, 0).flatten(1), "bias0": bias.repeat(25)}  # (F, 25 * 32)
        for i in (1, 2, 3):
            weight, bias = fold(getattr(G, f"conv{i}"), getattr(G, f"bn{i}"))
            tensors |= {f"weight{i}": channels_last(phases(weight)), f"bias{i}": bias.repeat(4)}
        weight, bias = fold(G.conv_out, G.bn_out)
        tensors |= {"weight4": channels_last(torch.block_diag(*4 * [weight[:, :, 0, 0]])[:, :, None, None]), "bias4": bias.repeat(4)}
        for name, value in tensors.items():
            self.register_buffer(name, value.detach())

    def forward(self, f):
        h = leaky(torch.addmm(self.bias0, f, self.weight0), True).view(-1, 5, 5, 32).permute(0, 3, 1, 2)
        h = interleave(leaky(F.conv2d(h, self.weight1, self.bias1, padding=2), True))  # (B, 32, 14, 14)
        h = interleave(leaky(F.conv2d(h, self.weight2, self.bias2, padding=2), True))  # (B, 32, 32, 32)
        h = leaky(F.conv2d(h, self.weight3, self.bias3, padding=2), True)  # (B, 4 * 32, 34, 34)
        return interleave(leaky(F.conv2d(h, self.weight4, self.bias4), True))  # (B, C, 68, 68)


def draw(G, f, x, z):
    """What a generator draws of the same cells: by what it takes, from f (B, F) standardised, images x in 0..1 or noise z (B, latent)."""
    return G({"features": f, "images": x, "noise": z}[G.takes])


def count_parameters(net):
    """The number of trained values in a network."""
    return sum(p.numel() for p in net.parameters())


def kernels(net):
    """The convolution kernels of a network: what weight decay acts on (batch norm is not decayed)."""
    return [p for p in net.parameters() if p.ndim == 4]


# ---------------------------------------------------------------------------------------------------------------------
# How far a generated image is from the real one: in pixels, and in the discriminator's hidden maps (the learned metric)


def pixel_loss(x, x_fake):
    """Mean over the batch of half the summed squared error: x and x_fake (B, C, H, W), x in 0..1."""
    return 0.5 * (x - x_fake).square().sum((1, 2, 3)).mean()


def hidden_losses(h, h_fake, pixels):
    """The learned metric: for each hidden map, the mean over the batch of 0.5 * pixels * mean squared difference; `pixels` = H * W * C."""
    return torch.stack([0.5 * pixels * (a - b).square().mean() for a, b in zip(h, h_fake)])


# ---------------------------------------------------------------------------------------------------------------------
# From measurements to pictures


def standardise(raw, centre, scale):
    """Measurements in CellProfiler's units (N, F) -> (N, F) float32 in standard deviations, clipped to -10..10, missing -> 0.
    `centre`, `scale`: (F,) or (N, F). The inverse, for values that were not clipped, is z * scale + centre."""
    z = (raw.double() - centre.double()) / scale.double()
    return z.nan_to_num(nan=0.0, posinf=CLIP, neginf=-CLIP).clamp(-CLIP, CLIP).float()


def to_uint8(x):
    """Images in 0..1 -> uint8: clipped, times 255, rounded."""
    return x.clamp(0, 1).mul_(255).round_().to(torch.uint8)


def read_checkpoint(path, device="cpu"):
    """The dictionary that train.py saved at `path`; InputError if it is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with: python train.py --data out/") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, torch.serialization.pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0][:120]
        raise InputError(f"{path}: not a readable checkpoint of train.py ({first}); it may be cut short: use an older one") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: a torch file, but not a checkpoint of train.py (expected its key 'format' to be {FORMAT}; runs of older "
                         "code are trained anew)")
    return state


def load(path, device="cpu"):
    """A trained generator in eval mode from the checkpoint of train.py at `path`; the averaged weights, where the run kept some.
    It carries `.takes` ("features": CP2Image, for `generate`; "images"; "noise"), `.model`, `.features` (ordered names), `.centre` and
    `.scale` ((F,) float64 tensors), `.channels`, `.normalise`, `.image_norm`, `.white` (16-bit level that image value 1 stands for; None
    with cell-max), `.step`, `.identity` (the training data's checksums). Batch norm is folded into the kernels of the paper's generator."""
    state = read_checkpoint(path, device)
    G, _ = build(state)
    G.load_state_dict(state["G_ema"] if state["G_ema"] is not None else state["G"])
    takes, G = G.takes, G.to(device).eval().requires_grad_(False)
    if isinstance(G, VAE):
        G.decoder = Folded(G.decoder)
    if isinstance(G, Generator):
        G = Folded(G)
    for name in ("model", "features", "channels", "normalise", "image_norm", "white", "step", "identity"):
        setattr(G, name, state[name])
    G.takes, G.centre, G.scale = takes, state["centre"].double().to(device), state["scale"].double().to(device)
    return G.eval()


def build(state):
    """Generator and discriminator as a checkpoint describes them, without its weights."""
    settings = state["settings"]
    return networks(state["model"], len(state["features"]), len(state["channels"]), settings["spectral_norm"] == "on",
                    settings["d_batch_norm"] == "on", settings["latent"])


def load_metric(path, device="cpu"):
    """The discriminator of the checkpoint at `path` in eval mode, for CP2Image the learned metric; None for a model without one."""
    state = read_checkpoint(path, device)
    _, D = build(state)
    if D is None:
        return None
    D.load_state_dict(state["D"])
    return D.to(device).eval().requires_grad_(False)


@torch.no_grad()
def sample(G, n, seed=0, batch=256):
    """n free samples of a model with a latent space (VAE, GANs): (n, C, 68, 68) in 0..1 on the CPU; a prefix does not depend on n."""
    if G.takes == "features":
        raise InputError("this model draws cells from their measurements, not from noise; use generate")
    return torch.cat([G.decode(part.to(G.centre.device)).clamp(0, 1).cpu() for part in noise(G, n, seed).split(batch)])


def noise(G, n, seed=0):
    """n standard normal vectors (n, G.latent) by the seed, row by row: the first few do not depend on n."""
    random = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(G.latent, generator=random) for _ in range(n)])


def table_values(G, table):
    """A table of CellProfiler measurements -> raw (N, F), and the centre and scale ((F,) or (N, F)) that G standardises them by; float64.
    A missing column raises an InputError that names it. With G.normalise "plate-dmso" the table needs columns `plate` and `compound`, and
    each plate its own rows of compound DMSO."""
    columns = list(table.columns)
    absent = [name for name in G.features if name not in set(columns)]
    if absent:
        raise InputError(f"{len(absent)} of the model's {len(G.features)} features are not in the table, first: "
                         f"{', '.join(absent[:5])}; the table needs CellProfiler's names with the object first (Nuclei_AreaShape_Area)")
    try:
        raw = torch.tensor(table[G.features].to_numpy(dtype="float64"), device=G.centre.device)  # (N, F)
    except (TypeError, ValueError) as error:
        raise InputError(f"a feature column of the table holds something that is no number ({error})") from None
    centre, scale = G.centre, G.scale
    if G.normalise == "plate-dmso":
        lacking = [name for name in ("plate", "compound") if name not in set(columns)]
        if lacking:
            raise InputError(f"this model was trained with --normalise plate-dmso: the table needs a column {' and '.join(lacking)}")
        plates, compounds = [str(p) for p in table["plate"].to_numpy()], [str(c) for c in table["compound"].to_numpy()]
        centre, scale = torch.empty_like(raw), torch.empty_like(raw)
        for plate in dict.fromkeys(plates):
            dmso = torch.tensor([p == plate and c.upper() == "DMSO" for p, c in zip(plates, compounds)], device=raw.device)
            if dmso.sum() < 2:
                raise InputError(f"plate {plate}: {int(dmso.sum())} rows of compound DMSO, 2 are needed to set its scale (plate-dmso)")
            mean, sd = plate_moments(raw[dmso])
            rows = torch.tensor([p == plate for p in plates], device=raw.device)
            centre[rows], scale[rows] = mean, torch.where(sd > 0, sd, G.scale)  # no spread on this plate: the training cells' spread
    return raw, centre, scale


def standardise_table(G, table):
    """The rows of a table (see table_values) -> (N, F) float32 on G's device, as G was trained; warns of what was ignored or clipped."""
    raw, centre, scale = table_values(G, table)
    z, columns = standardise(raw, centre, scale), list(table.columns)
    named = set(G.features) | {"plate", "compound"}
    extra, missing, clipped = [c for c in columns if c not in named], int(raw.isnan().sum()), int((z.abs() >= CLIP).sum())
    said = [f"{len(extra)} columns ignored ({', '.join(map(str, extra[:3]))}{', ...' if len(extra) > 3 else ''})"] if extra else []
    said += [f"{missing} missing values set to the mean"] if missing else []
    said += [f"{clipped} values clipped to {CLIP:.0f} standard deviations"] if clipped else []
    if said:
        warnings.warn(f"generate: {'; '.join(said)}", stacklevel=3)
    return z


def plate_moments(raw):
    """Mean and standard deviation (ddof 0) of the columns of `raw` (n, F), missing values left out: (F,), (F,) float64."""
    there = ~raw.isnan()
    n = there.sum(0).clamp(min=1)
    mean = raw.nan_to_num(0).sum(0) / n
    return mean, (((raw - mean).nan_to_num(0) ** 2).sum(0) / n).sqrt()


@torch.no_grad()
def generate(G, table, as_uint8=True, batch=None):
    """One picture for each row of a table of CellProfiler measurements: (N, C, 68, 68) on the CPU, uint8, or float32 in 0..1.
    An export of CellProfiler (CSV folder, SQLite, one CSV) becomes such a table by data.read_table.
    Extra columns are ignored, with a warning that lists them; see standardise_table for what raises InputError. A cell's picture
    does not depend on which other cells are in the table (but for plate-dmso, where the plate's DMSO rows set the scale)."""
    if G.takes != "features":
        raise InputError(f"a {G.model} draws from {G.takes}, not from measurements; train --model cp2image, or use its decode and sample")
    z = standardise_table(G, table)
    batch = batch or (32 if z.device.type == "cpu" else 1024)  # fits a CPU's cache
    x = torch.cat([G(z[i:i + batch]).cpu() for i in range(0, len(z), batch)]) if len(z) else torch.empty(0, len(G.channels), SIZE, SIZE)
    return to_uint8(x) if as_uint8 else x.clamp(0, 1)
