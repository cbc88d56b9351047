"""The CP2Image networks, and what it takes to use a trained one. This file needs nothing but torch: copy it out alone.

    G = model.load("runs/cp2image-seed0/last.pt")
    x = model.generate(G, table)            # table: a pandas frame of CellProfiler measurements, one row a cell

Source: Ji, Cutiongco, Jensen, Yuan, "CP2Image", MIDL 2023 (PMLR 227:274-285), and the authors' TensorFlow code
(revision 705214e). Where the two disagree the released code is followed, as it ran.
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


class Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with mean and variance of the first n images of x (B, C, H, W), all of it normalised.

    The same function as `torch.var_mean(x[:n], (0, 2, 3), correction=0)` and plain arithmetic (a test holds them against each other in
    float64), with torch's fused kernels: 5 times faster on a CPU. The gradient through the moments reaches the first n images only.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, n):
        y, mean, rstd = torch.native_batch_norm(x[:n], weight, bias, None, None, True, 0.0, EPS)
        var = rstd ** -2 - EPS  # biased
        ctx.save_for_backward(x, weight, mean, var)
        ctx.n = n
        ctx.mark_non_differentiable(mean, var)
        return (y if n == len(x) else F.batch_norm(x, mean, var, weight, bias, False, 0.0, EPS)), mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(), x, weight, mean, var, None, None, False, EPS, [True, True, True])  # mean and var held fixed
        count, rstd = ctx.n * x.shape[2] * x.shape[3], (var + EPS).rsqrt()
        slope = -weight * rstd ** 2 * grad_weight / count  # what a pixel adds through the variance ...
        shift = -weight * rstd * grad_bias / count - slope * mean  # ... and through the mean
        grad_x[:ctx.n].addcmul_(x[:ctx.n], slope[:, None, None].to(x.dtype)).add_(shift[:, None, None].to(x.dtype))
        return grad_x, grad_weight, grad_bias, None


class BatchNorm(nn.Module):
    """Batch norm over (B, C, H, W) as the released code has it.

    Two things differ from torch's: the running variance is the biased one, and the moments may come from the first `n` images of
    the batch only, while all of it is normalised (the discriminator's rule). With `moments=False` only weight and bias act.
    """

    def __init__(self, channels, moments=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.moments = moments
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x, n=None):
        if not self.moments:
            return x * self.weight[:, None, None] + self.bias[:, None, None]
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, EPS)
        y, mean, var = Normalise.apply(x, self.weight, self.bias, len(x) if n is None else n)
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var, MOMENTUM)
        return y


def leaky(x):
    return F.leaky_relu(x, SLOPE)


def spread_vector(f, weight):
    """A zero-padded 5x5 convolution of a 1x1 map, F.conv2d(f[:, :, None, None], weight, padding=4), as one matrix product."""
    return torch.einsum("bi,oihw->bohw", f, weight.flip(2, 3))  # (B, C, 5, 5)


def double_and_convolve(h, weight):
    """F.conv2d(F.interpolate(h, scale_factor=2), weight, padding=4), weight 5x5, with 36 % of its multiplications.

    After a nearest doubling, neighbouring taps fall on the same pixel: at even and odd places the five taps act as three, with sums
    of the kernel's entries. So the four kinds of output pixel are four 3x3 convolutions of the small map, interleaved.
    """
    taps = h.new_tensor([[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],  # even places: taps 0+1, 2+3, 4
                         [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]])  # odd places: taps 0, 1+2, 3+4
    small = torch.einsum("oihw,aph,bqw->oabipq", weight, taps, taps).flatten(0, 2)  # (4 C, C_in, 3, 3)
    return F.pixel_shuffle(F.conv2d(h, small, padding=2), 2)  # (B, C, n, n) -> (B, C, 2n + 4, 2n + 4)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Generator(nn.Module):
    """CP vectors (B, n_features), standardised -> images (B, n_channels, 68, 68), trained towards the range 0..1.

    Released code, layers HL_5..HL_8 and HL_recons_3: the output is a batch norm and a leaky ReLU, not a sigmoid.
    """

    def __init__(self, n_features, n_channels=3):
        super().__init__()
        self.conv0, self.bn0 = conv(n_features, 32, 5, padding=4), BatchNorm(32)
        self.conv1, self.bn1 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv2, self.bn2 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv3, self.bn3 = conv(32, 32, 5, padding=4), BatchNorm(32)
        self.conv_out, self.bn_out = conv(32, n_channels, 1), BatchNorm(n_channels)

    def forward(self, f):
        h = leaky(self.bn0(spread_vector(f, self.conv0.weight)))  # (B, 32, 5, 5)
        h = leaky(self.bn1(double_and_convolve(h, self.conv1.weight)))  # nearest to 10, (B, 32, 14, 14)
        h = leaky(self.bn2(double_and_convolve(h, self.conv2.weight)))  # nearest to 28, (B, 32, 32, 32)
        h = leaky(self.bn3(double_and_convolve(h, self.conv3.weight)))  # nearest to 64, (B, 32, 68, 68)
        return leaky(self.bn_out(self.conv_out(h)))  # (B, C, 68, 68)


class Discriminator(nn.Module):
    """Images (B, n_channels, 68, 68) in 0..1 -> (logits (B,), four hidden maps): the learned metric of the paper.

    `n`: the batch-norm moments come from the first n images; the step passes [real, generated, originals] and n = two thirds.
    Every kernel is spectrally normalised by torch's parametrisation, whose power iteration runs in training mode only. Since batch
    norm follows each kernel this does not change training; `batch_norm=False` (an ablation) is where it does.
    """

    def __init__(self, n_channels=3, spectral_norm=True, batch_norm=True):
        super().__init__()
        for i, (c_in, c_out, k) in enumerate([(n_channels, 32, 5), (32, 32, 5), (32, 32, 5), (32, 64, 5), (64, 1, 1)]):
            layer = conv(c_in, c_out, k)
            setattr(self, f"conv{i}", parametrizations.spectral_norm(layer) if spectral_norm else layer)
            setattr(self, f"bn{i}", BatchNorm(c_out, moments=batch_norm))

    def forward(self, x, n=None):
        h0 = leaky(F.max_pool2d(self.bn0(self.conv0(x), n), 2))  # (B, 32, 32, 32): pooling stands before the activation
        h1 = leaky(F.max_pool2d(self.bn1(self.conv1(h0), n), 2))  # (B, 32, 14, 14)
        h2 = leaky(F.max_pool2d(self.bn2(self.conv2(h1), n), 2))  # (B, 32, 5, 5)
        h3 = leaky(self.bn3(self.conv3(h2), n))  # (B, 64, 1, 1)
        return self.bn4(self.conv4(h3), n).flatten(), [h0, h1, h2, h3]


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
    return torch.stack([0.5 * pixels * (a - b).square().mean((1, 2, 3)).mean() for a, b in zip(h, h_fake)])


# ---------------------------------------------------------------------------------------------------------------------
# From measurements to pictures


def standardise(raw, centre, scale):
    """Measurements in CellProfiler's units (N, F) -> (N, F) float32 in standard deviations, clipped to -10..10, missing -> 0.

    `centre`, `scale`: (F,) or (N, F). The inverse, for values that were not clipped, is z * scale + centre.
    """
    z = (raw.double() - centre.double()) / scale.double()
    return z.nan_to_num(nan=0.0, posinf=CLIP, neginf=-CLIP).clamp(-CLIP, CLIP).float()


def to_uint8(x):
    """Images in 0..1 -> uint8: clipped, times 255, rounded."""
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def read_checkpoint(path, device="cpu"):
    """The dictionary that train.py saved at `path`; InputError if it is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with: python train.py --data out/") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, torch.serialization.pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0][:120]
        raise InputError(f"{path}: not a readable checkpoint of train.py ({first}); it may be cut short: use an older one") from None
    if not isinstance(state, dict) or state.get("format") != "cp2image-1":
        raise InputError(f"{path}: a torch file, but not a checkpoint of train.py (expected its key 'format' to be cp2image-1)")
    return state


def load(path, device="cpu"):
    """A trained generator in eval mode from the checkpoint of train.py at `path`; the averaged weights, where the run kept some.

    It carries `.features` (ordered names), `.centre` and `.scale` ((F,) float64 tensors), `.channels`, `.normalise`, `.image_norm`,
    `.white` (16-bit level that image value 1 stands for; None with cell-max), `.step`, `.identity` (the training data's checksums).
    """
    state = read_checkpoint(path, device)
    G = Generator(len(state["features"]), len(state["channels"]))
    G.load_state_dict(state["G_ema"] if state["G_ema"] is not None else state["G"])
    for name in ("features", "channels", "normalise", "image_norm", "white", "step", "identity"):
        setattr(G, name, state[name])
    G.centre, G.scale = state["centre"].double().to(device), state["scale"].double().to(device)
    return G.to(device).eval().requires_grad_(False)


def load_metric(path, device="cpu"):
    """The discriminator of the checkpoint at `path` in eval mode: the learned metric that its generator was trained by."""
    state = read_checkpoint(path, device)
    D = Discriminator(len(state["channels"]), state["settings"]["spectral_norm"] == "on", state["settings"]["d_batch_norm"] == "on")
    D.load_state_dict(state["D"])
    return D.to(device).eval().requires_grad_(False)


def table_values(G, table):
    """A table of CellProfiler measurements -> raw (N, F), and the centre and scale ((F,) or (N, F)) that G standardises them by; float64.

    A missing column raises an InputError that names it. With G.normalise "plate-dmso" the table needs columns `plate` and `compound`, and
    each plate its own rows of compound DMSO.
    """
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
            raise InputError(f"this model was trained with --normalise plate-dmso: the table needs a column {' and a column '.join(lacking)}")
        plates, compounds = [str(p) for p in table["plate"].to_numpy()], [str(c) for c in table["compound"].to_numpy()]
        centre, scale = torch.empty_like(raw), torch.empty_like(raw)
        for plate in dict.fromkeys(plates):
            dmso = torch.tensor([p == plate and c.upper() == "DMSO" for p, c in zip(plates, compounds)], device=raw.device)
            if dmso.sum() < 2:
                raise InputError(f"plate {plate}: {int(dmso.sum())} rows of compound DMSO, at least 2 are needed to set its scale (plate-dmso)")
            mean, sd = plate_moments(raw[dmso])
            rows = torch.tensor([p == plate for p in plates], device=raw.device)
            centre[rows], scale[rows] = mean, torch.where(sd > 0, sd, G.scale)  # no spread on this plate: the training cells' spread
    return raw, centre, scale


def standardise_table(G, table):
    """The rows of a table (see table_values) -> (N, F) float32 on G's device, as G was trained; what was ignored, missing or clipped is warned of."""
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
def generate(G, table, as_uint8=True, batch=256):
    """One picture for each row of a table of CellProfiler measurements: (N, C, 68, 68) on the CPU, uint8, or float32 in 0..1.

    An export of CellProfiler (CSV folder, SQLite, one CSV) becomes such a table by data.read_table.

    Extra columns are ignored, with a warning that lists them; see standardise_table for what raises InputError. A cell's picture
    does not depend on which other cells are in the table (but for plate-dmso, where the plate's DMSO rows set the scale).
    """
    z = standardise_table(G, table)
    x = torch.cat([G(z[i:i + batch]).cpu() for i in range(0, len(z), batch)]) if len(z) else torch.empty(0, len(G.channels), SIZE, SIZE)
    return to_uint8(x) if as_uint8 else x.clamp(0, 1)
