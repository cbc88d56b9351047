"""The tests: `pytest -q`. Those that need the folder `shared` beside this one (real cells, golden numbers of the released code) skip without it.

LONG=1 adds checks of minutes. Every tolerance has its reason beside it.
"""
import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import data
import evaluate
import interpolate
import model
import prepare_bbbc021 as prepare
import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "fixtures").is_dir(), reason="needs the folder shared/fixtures (golden numbers, real files)")
needs_cells = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the folder shared/data (real BBBC021 cells)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
long = pytest.mark.skipif(not os.environ.get("LONG"), reason="minutes long: set LONG=1")

train.keep_freed_memory()


# ---------------------------------------------------------------------------------------------------------------------
# The authors' model: golden numbers of the released TensorFlow code, in float64


class ReleasedNorm(nn.Module):
    """Spectral norm in the released order: one iteration v = u W', u = v W on the (kh*kw*c_in, c_out) matrix, then sigma = v W u'."""

    def __init__(self, u):
        super().__init__()
        self.register_buffer("u", u.reshape(1, -1))

    def forward(self, weight):
        matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
        with torch.no_grad():
            v = F.normalize(self.u @ matrix.T, dim=1)
            self.u = F.normalize(v @ matrix, dim=1)
        return weight / (v @ matrix @ self.u.T).squeeze()


class ReleasedAdam(torch.optim.Optimizer):
    """Adam with TensorFlow's place for epsilon: lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + 1e-7)."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})
        self.t, self.m, self.v = 0, {}, {}

    @torch.no_grad()
    def step(self):
        self.t += 1
        for p in self.param_groups[0]["params"]:
            m, v = self.m.setdefault(p, torch.zeros_like(p)), self.v.setdefault(p, torch.zeros_like(p))
            m.lerp_(p.grad, 0.1), v.lerp_(p.grad ** 2, 0.001)
            p -= self.param_groups[0]["lr"] * (1 - 0.999 ** self.t) ** 0.5 / (1 - 0.9 ** self.t) * m / (v.sqrt() + 1e-7)


G_LAYERS = [("conv0", "bn0"), ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("conv_out", "bn_out")]
D_LAYERS = [(f"conv{i}", f"bn{i}") for i in range(5)]


def released_pair(value):
    """G and D in float64, filled by value(name, shape) -> array, in the released order of names; D with the released spectral norm."""
    G, D = model.Generator(453).double(), model.Discriminator(spectral_norm=False).double()
    for net, letter, layers in [(G, "G", G_LAYERS), (D, "D", D_LAYERS)]:
        for c, b in layers:
            conv, bn = getattr(net, c), getattr(net, b)
            conv.weight.data = torch.as_tensor(value(f"{letter}.{c}.weight", tuple(conv.weight.shape))).double()
            for field in ("weight", "bias", "running_mean", "running_var"):
                getattr(bn, field).data = torch.as_tensor(value(f"{letter}.{b}.{field}", tuple(bn.weight.shape))).double()
            if letter == "D":
                u = torch.as_tensor(value(f"D.{c}.u", (len(conv.weight),))).double()
                parametrize.register_parametrization(conv, "weight", ReleasedNorm(u))
                conv.parametrizations.weight[0].u = u.reshape(1, -1)  # registering ran one iteration
    return G, D


def state_in_released_order(G, D):
    arrays = []
    for net, layers in [(G, G_LAYERS), (D, D_LAYERS)]:
        for c, b in layers:
            conv, bn = getattr(net, c), getattr(net, b)
            kernel = conv.parametrizations.weight.original if net is D else conv.weight
            arrays += [kernel, bn.weight, bn.bias, bn.running_mean, bn.running_var] + ([conv.parametrizations.weight[0].u] if net is D else [])
    return [a.detach().numpy() for a in arrays]


def hash_uniform(name, n):
    """n numbers in [0, 1) that follow from a name: splitmix64 seeded by its CRC-32."""
    seed = (zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2 ** 24


def rule_value(name, shape):
    u = hash_uniform(name, int(np.prod(shape))).reshape(shape)
    kind = name.split(".")[-1]
    if ".conv" in name and kind == "weight":
        value = (2 * u - 1) * np.sqrt(6 / (shape[1] * shape[2] * shape[3]))
    else:
        value = {"weight": 0.75 + 0.5 * u, "bias": 0.2 * (2 * u - 1), "running_mean": 0.1 * (2 * u - 1), "running_var": 0.5 + u, "u": 2 * u - 1}[kind]
    return value.astype(np.float32).astype(np.float64)


def rule_batch():
    """Features (8, 453) and, in 0..1, originals and reals (8, 3, 68, 68), all by formula."""
    def images(name):
        amplitude = hash_uniform(name + ".amp", 24).reshape(8, 3, 1, 1)
        coarse = hash_uniform(name + ".coarse", 8 * 3 * 17 * 17).reshape(8, 3, 17, 17).repeat(4, 2).repeat(4, 3)
        fine = hash_uniform(name, 8 * 3 * 68 * 68).reshape(8, 3, 68, 68)
        raw = torch.from_numpy(np.floor(65535.0 * (0.1 + 0.9 * amplitude) * (0.1 + 0.45 * coarse + 0.45 * fine)))
        return data.scale_images(raw, "cell-max")
    features = (4 * hash_uniform("features", 8 * 453).reshape(8, 453) - 2).astype(np.float32).astype(np.float64)
    return torch.from_numpy(features), images("originals"), images("reals")


def assert_summary(array, expected, places, tolerance=2e-9):
    """Mean, standard deviation and single elements, relative to |mean| + sd (the fixture's README)."""
    got = [array.mean(), array.std(), *(array[tuple(p)] for p in places)][:len(expected)]
    assert np.abs(np.array(got) - expected).max() <= tolerance * (abs(expected[0]) + expected[1]) + 1e-300, (got, expected)


# fixtures/original/rule_golden.json, in part: weights and inputs by formula, numbers of the released code's float64 twin
RULE = {
    "eval losses": [1308.3384691982, 652.776577719234, 262.148934530802, 151.887221284592, 2105.98875050324, 0.679430098324652],
    "eval generated": [0.0492704481, 0.09636590433, 0.046163707926, 0.028468182934, 0.124766647649, -0.006245702495, 0.071696613157],
    "eval logits": [0.412920047521, 0.066151140508, 0.484071996422, 0.464393915936, 0.337596682912, 0.322424272937, 0.456442897318],
    "step losses": [
        [9256.8450108463, 12422.0242650132, 13092.8842669989, 7028.11574594536, 2570.67917057693, 0.654130437036697],
        [7296.30868507606, 9632.39545647371, 9475.26644168239, 5928.1734186944, 1435.55168776409, 0.573723928675937],
    ],
    "weights": [  # mean, standard deviation, first element of each array
        (-1.6148e-06, 0.02122074387, 0.03755471609), (0.968407967, 0.142378529, 1.21604591), (0.0128800567, 0.1067119682, -0.1343389498),
        (7.612356e-05, 0.04838011748, 0.08829962384), (1.117315654, 0.244037186, 1.417068865),
        (-0.00207071984, 0.05256028958, -0.07885874677), (0.965984034, 0.137104874, 0.819527841),
        (0.0297421138, 0.1145479291, 0.1086543293), (-0.0143124825, 0.130300922, -0.1985518598), (0.931945165, 0.20717067, 1.003741086),
        (0.00068881708, 0.05244132072, 0.05026974027), (1.016537102, 0.133754387, 0.835842943),
        (-0.0108512214, 0.1198787352, -0.0075560805), (0.0078438279, 0.1925316592, -0.3144931063),
        (1.040623501, 0.280389335, 1.493664477), (-0.00101462058, 0.05271645081, 0.00213737224), (0.982950105, 0.149426352, 1.256494481),
        (0.0203467649, 0.1308087569, -0.1682334741), (-0.0135088248, 0.246904569, 0.1036443208), (1.291766126, 0.430320188, 1.442538463),
        (-0.0052551256, 0.247536461, 0.1567727111), (0.941401418, 0.141583225, 1.009321265), (0.0265660553, 0.0931662826, 0.018938282),
        (0.0843224904, 0.0676199788, 0.0874516875), (1.333693835, 0.066370803, 1.360627136), (0.0069213291, 0.1619233226, 0.0631345663),
        (1.000213361, 0.145954811, 0.885173173), (-0.0050471062, 0.1030849443, -0.057490571),
        (0.00509938733, 0.07300685502, -0.04430797138), (0.794697975, 0.218166153, 0.747231988),
        (-0.0223326633, 0.1753603494, 0.2020825591), (-0.00012481969, 0.04985931039, 0.06558061335),
        (1.034887116, 0.152344288, 0.808836918), (-0.0025420929, 0.1123759869, 0.1405385938), (-0.010150718, 0.1006093329, -0.0360029329),
        (0.906724477, 0.227108756, 1.028791278), (0.0139183857, 0.1762279165, 0.3082664618),
        (-0.00022592853, 0.05009850955, -0.0792498059), (1.004059626, 0.125760316, 1.083707526),
        (-0.0014758336, 0.107344722, 0.0751003672), (-0.0245387683, 0.1338008133, -0.1129543229), (0.925096897, 0.237318461, 1.306335822),
        (0.0001618675, 0.1767766212, -0.113210001), (0.00046531571, 0.05000195113, 0.06145972934), (0.997448639, 0.149521066, 1.18221342),
        (0.0136191244, 0.1101348549, 0.0017599789), (0.0437441349, 0.1474716776, -0.1435046472), (0.883532792, 0.24637098, 1.118402539),
        (-0.0087738134, 0.1246917006, -0.150642226), (0.033045672, 0.1751118191, 0.084175876), (0.8472682605, 0.0, 0.8472682605),
        (0.1661552425, 0.0, 0.1661552425), (0.1008617477, 0.0, 0.1008617477), (0.8169589913, 0.0, 0.8169589913), (-1.0, 0.0, -1.0),
    ],
}
IMAGE_PLACES = [(0, 0, 0, 0), (1, 1, 0, 67), (3, 2, 67, 33), (5, 0, 40, 21), (7, 1, 67, 67)]
LOGIT_PLACES = [(0,), (7,), (8,), (13,), (20,)]


def released_step(G, D, opt_g, opt_d, f, x, x_real, step):
    """One train_step -> the released code's order of losses: hidden 0..3, pixel, discriminator."""
    terms = train.train_step(G, D, opt_g, opt_d, f, x, x_real, step)
    return [*terms[5:].tolist(), terms[3].item(), terms[0].item()]


def test_eval_forward_is_the_released_one():
    G, D = released_pair(rule_value)
    f, x, x_real = rule_batch()
    G.eval(), D.eval()
    with torch.no_grad():
        loss_pix, hidden, loss_d, _, _, x_fake = train.losses(G, D, f, x, x_real)
    assert [*hidden.tolist(), loss_pix.item(), loss_d.item()] == pytest.approx(RULE["eval losses"], rel=1e-9)
    assert_summary(x_fake.numpy(), RULE["eval generated"], IMAGE_PLACES)


def test_training_steps_are_the_released_ones():
    """Two steps from step 6000, where the ramp is in motion: moments over 2B, nothing detached, decay before the update, swapped rates."""
    G, D = released_pair(rule_value)
    batch = rule_batch()
    opt_g, opt_d = ReleasedAdam(G.parameters(), 0.01), torch.optim.SGD(D.parameters(), 0.001, momentum=0.9)
    for i in range(2):
        assert released_step(G, D, opt_g, opt_d, *batch, 6000 + i) == pytest.approx(RULE["step losses"][i], rel=1e-9)
    for array, expected in zip(state_in_released_order(G, D), RULE["weights"], strict=True):
        assert_summary(array, expected[:2], [])
        assert abs(array.ravel()[0] - expected[2]) <= 2e-9 * (abs(expected[0]) + expected[1])


def test_the_flags_defaults_are_the_released_settings():
    args = train.parse(["--data", "x"])
    assert (args.lr_g, args.lr_d, args.weight_decay, args.hidden_ramp, args.steps, args.order, args.spectral_norm) == (0.01, 0.001, 1e-4, 2500, 680_000, "shared", "on")


@needs_shared
def test_whole_rule_case():
    """Everything else in rule_golden.json: hidden maps, logits, u, gradients of both objectives, steps from 0."""
    golden = json.loads((SHARED / "fixtures/original/rule_golden.json").read_text())
    f, x, x_real = rule_batch()

    def places(array):
        shape = "24" if array.shape == (24,) else "x".join(map(str, array.shape))
        return golden["elements"].get(shape, [])

    for case in ("eval", "train"):
        G, D = released_pair(rule_value)
        G.train(case == "train"), D.train(case == "train")
        x_fake = G(f)
        logit, h = D(torch.cat([x_real, x_fake, x]), n=16)
        hidden = model.hidden_losses([m[16:] for m in h], [m[8:16] for m in h], x[0].numel())
        loss_pix, loss_d = model.pixel_loss(x, x_fake), train.discriminator_loss(logit[:8].sigmoid(), logit[8:16].sigmoid())
        assert [*hidden.tolist(), loss_pix.item(), loss_d.item()] == pytest.approx(golden[case]["losses"], rel=1e-9)
        for array, name in [(x_fake, "generated"), (logit, "logits"), *((m, f"hidden{k}") for k, m in enumerate(h))]:
            array = array.detach().numpy()
            assert_summary(array, golden[case][name], places(array))
        if case == "eval":
            for i, expected in enumerate(golden["eval"]["u_after"]):
                assert_summary(getattr(D, f"conv{i}").parametrizations.weight[0].u.numpy()[0], expected, places(np.zeros(len(getattr(D, f"bn{i}").weight))))
        else:
            for name, loss, net in [("grad_gen_gs0", loss_pix, G), ("grad_gen_gs20000", loss_pix + hidden.sum(), G), ("grad_disc", loss_d, D)]:
                layers = G_LAYERS if net is G else D_LAYERS
                params = [p for c, b in layers for p in (getattr(net, c).parametrizations.weight.original if net is D else getattr(net, c).weight,
                                                         getattr(net, b).weight, getattr(net, b).bias)]
                for grad, expected in zip(torch.autograd.grad(loss, params, retain_graph=True), golden["train"][name], strict=True):
                    assert_summary(grad.numpy(), expected, places(grad))
    G, D = released_pair(rule_value)
    opt_g, opt_d = ReleasedAdam(G.parameters(), 0.01), torch.optim.SGD(D.parameters(), 0.001, momentum=0.9)
    for i in range(2):
        assert released_step(G, D, opt_g, opt_d, f, x, x_real, i) == pytest.approx(golden["step2_gs0"]["losses"][i], rel=1e-9)
    for array, expected in zip(state_in_released_order(G, D), golden["step2_gs0"]["w"], strict=True):
        array = array[0] if array.ndim == 2 else array  # u is (1, C)
        assert_summary(array, expected, places(array))


def released_file_value(archive, prefix):
    """value(name, shape) for released_pair from a weight archive with TensorFlow's names and layouts."""
    layer = {**{f"G.{c}{i}": f"HL_{5 + i}" for i in range(4) for c in ("conv", "bn")}, "G.conv_out": "HL_recons_3", "G.bn_out": "HL_recons_3",
             **{f"D.{c}{i}": f"HL_disc_{i}" for i in range(5) for c in ("conv", "bn")}}

    def value(name, shape):
        owner, field = name.rsplit(".", 1)
        leaf = "kernel" if ".conv" in name and field == "weight" else {"weight": "scale", "bias": "bias", "running_mean": "movingBatchMean",
                                                                       "running_var": "movingBatchVar", "u": "u"}[field]
        array = archive[f"{prefix}/{layer[owner]}/{leaf}"].astype(np.float64)
        return array.transpose(3, 2, 0, 1).copy() if leaf == "kernel" else array.reshape(shape)
    return value


@needs_shared
@pytest.mark.parametrize("case", ["eval", "train"])
def test_forward_of_the_released_weights(case):
    """The released initial weights on real-sized inputs: images, logits, four hidden maps, losses of the float64 twin."""
    folder = SHARED / "fixtures/original"
    weights, golden = np.load(folder / "cp2image_forward_seed0.npz"), np.load(folder / "cp2image_forward_seed0_f64.npz")
    G, D = released_pair(released_file_value(weights, "w"))
    G.train(case == "train"), D.train(case == "train")
    nchw = lambda a: torch.from_numpy(a.astype(np.float64).transpose(0, 3, 1, 2).copy())
    x, x_real = (data.scale_images(nchw(weights[name]), "cell-max") for name in ("in_images_u16", "in_real_u16"))
    with torch.no_grad():
        x_fake = G(torch.from_numpy(weights["in_cp"].astype(np.float64)))
        logit, h = D(torch.cat([x_real, x_fake, x]), n=16)
    hidden = model.hidden_losses([m[16:] for m in h], [m[8:16] for m in h], x[0].numel())
    stored = 1e-6  # arrays are stored as float32
    assert np.abs(x_fake.numpy() - golden[f"{case}/generated"].transpose(0, 3, 1, 2)).max() < stored * np.abs(golden[f"{case}/generated"]).max()
    assert logit.numpy() == pytest.approx(golden[f"{case}/logits"].ravel(), rel=1e-9, abs=1e-10)
    assert hidden.numpy() == pytest.approx(golden[f"{case}/loss_hidden"], rel=1e-9)
    assert model.pixel_loss(x, x_fake).item() == pytest.approx(float(golden[f"{case}/loss_rgb"]), rel=1e-9)
    for k in range(4):
        for part, start in (("real", 0), ("fake", 8), ("orig", 16)):
            expected = golden[f"{case}/hidden{k}_{part}"].transpose(0, 3, 1, 2)
            assert np.abs(h[k][start:start + len(expected)].numpy() - expected).max() < stored * max(1, np.abs(expected).max())
            assert h[k][start:start + 8].abs().mean((1, 2, 3)).numpy() == pytest.approx(golden[f"{case}/hidden{k}_{part}_absmean_per_image"], rel=1e-8)


@needs_shared
@pytest.mark.parametrize("start, file", [(0, "cp2image_train_seed0_seqf64.npz"), (6000, "cp2image_train_seed0_gs6000_seqf64.npz")])
def test_released_training_run(start, file):
    """Three training steps on the released batches: losses 1e-9 in steps 1 and 2, 1e-5 in step 3, weights after two 1e-6 (training is chaotic)."""
    folder = SHARED / "fixtures/original"
    source, golden = np.load(folder / "cp2image_train_seed0.npz"), np.load(folder / file)
    G, D = released_pair(released_file_value(source, "w0"))
    opt_g, opt_d = ReleasedAdam(G.parameters(), 0.01), torch.optim.SGD(D.parameters(), 0.001, momentum=0.9)
    images = data.scale_images(torch.from_numpy(source["images_u16"].astype(np.float64).transpose(0, 3, 1, 2).copy()), "cell-max")
    for i in range(3):
        f = torch.from_numpy(source["cp"][i].astype(np.float64))
        got = released_step(G, D, opt_g, opt_d, f, images[source["idx_images"][i]], images[source["idx_real"][i]], start + i)
        assert got == pytest.approx(golden["losses"][i][[0, 1, 2, 3, 4, 6]], rel=1e-9 if i < 2 else 1e-5)
        if i == 1:
            value = released_file_value(golden, "w2")
            for net, letter, layers in [(G, "G", G_LAYERS), (D, "D", D_LAYERS)]:
                for c, b in layers:
                    kernel = getattr(net, c).parametrizations.weight.original if net is D else getattr(net, c).weight
                    assert np.abs(kernel.detach().numpy() - value(f"{letter}.{c}.weight", kernel.shape)).max() < 1e-6
                    for field in ("weight", "bias", "running_mean", "running_var"):
                        array = getattr(getattr(net, b), field).detach().numpy()
                        assert array == pytest.approx(value(f"{letter}.{b}.{field}", array.shape), rel=1e-6, abs=1e-6)


def test_torchs_spectral_norm_trains_alike():
    """Batch norm undoes the scale of every kernel, so torch's power iteration, half a step away, gives the same losses (and none at all too)."""
    f, x, x_real = rule_batch()
    found = []
    for norm in ("released", "torch", "none"):
        G, D = released_pair(rule_value)
        if norm != "released":
            plain = model.Discriminator(spectral_norm=norm == "torch").double()
            for c, b in D_LAYERS:
                kernel = getattr(D, c).parametrizations.weight.original
                target = getattr(plain, c)
                (target.parametrizations.weight.original if norm == "torch" else target.weight).data = kernel.data.clone()
                getattr(plain, b).load_state_dict(getattr(D, b).state_dict())
            D = plain
        found.append([t.item() for t in train.losses(G, D, f, x, x_real)[:3] if t.ndim == 0] + train.losses(G, D, f, x, x_real)[1].tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-5)  # eps 1e-8 beside a variance that the norm shrinks: 2e-7 in the released code
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    spectral = [torch.linalg.matrix_norm(getattr(model.Discriminator(), f"conv{i}").weight.flatten(1), 2).item() for i in range(4)]
    assert spectral == pytest.approx([1] * 4, abs=0.1)  # the norm is there: 15 iterations at construction come within a few per cent


# ---------------------------------------------------------------------------------------------------------------------
# Networks: counts, and the fast forms against the plain ones


def test_parameter_counts():
    assert model.count_parameters(model.Generator(453)) == model.PAPER_PARAMETERS["generator"] == 439_558
    assert model.count_parameters(model.Discriminator()) == model.PAPER_PARAMETERS["discriminator"] == 105_186
    assert sum(model.PAPER_PARAMETERS.values()) == 1_325_454  # "1.32 million"
    shapes = [tuple(m.shape[1:]) for m in model.Discriminator()(torch.rand(4, 3, 68, 68))[1]]
    assert shapes == [(32, 32, 32), (32, 14, 14), (32, 5, 5), (64, 1, 1)]


def test_fast_layers_are_the_plain_ones():
    torch.manual_seed(0)
    f, w0 = torch.randn(3, 7, dtype=torch.float64), torch.randn(4, 7, 5, 5, dtype=torch.float64, requires_grad=True)
    h, w1 = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    pairs = [(model.spread_vector(f, w0), F.conv2d(f[:, :, None, None], w0, padding=4), [w0]),
             (model.double_and_convolve(h, w1), F.conv2d(F.interpolate(h, scale_factor=2), w1, padding=4), [h, w1])]
    for fast, plain, inputs in pairs:
        assert (fast - plain).abs().max() < 1e-12
        seed = torch.randn_like(plain)
        for a, b in zip(torch.autograd.grad(fast, inputs, seed), torch.autograd.grad(plain, inputs, seed)):
            assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("n", [4, 6])
def test_batch_norm_is_the_plain_formula(n):
    torch.manual_seed(0)
    bn = model.BatchNorm(3).double()
    bn.weight.data = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    x, seed = torch.randn(6, 3, 5, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, 5, 4, dtype=torch.float64)
    var, mean = torch.var_mean(x[:n], (0, 2, 3), correction=0)
    plain = (x - mean[:, None, None]) / (var + 1e-8).sqrt()[:, None, None] * bn.weight[:, None, None] + bn.bias[:, None, None]
    fast = bn(x, n)
    assert (fast - plain).abs().max() < 1e-12
    for a, b in zip(torch.autograd.grad(fast, [x, bn.weight, bn.bias], seed), torch.autograd.grad(plain, [x, bn.weight, bn.bias], seed)):
        assert (a - b).abs().max() < 1e-11
    assert torch.allclose(bn.running_var, 0.9 + 0.1 * var) and torch.allclose(bn.running_mean, 0.1 * mean)  # biased
    bn.eval()
    assert torch.allclose(bn(x), (x - bn.running_mean[:, None, None]) / (bn.running_var + 1e-8).sqrt()[:, None, None] * bn.weight[:, None, None])


def test_hidden_ramp():
    assert train.hidden_weights(2500, 2500) == [0, 0, 0, 0]
    assert train.hidden_weights(6000, 2500) == pytest.approx([1, 0.4, 0, 0])
    assert train.hidden_weights(20000, 2500) == [1, 1, 1, 1] == train.hidden_weights(0, 0)
