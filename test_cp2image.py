"""The tests: `pytest -q`. Those that need the folder `shared` beside this one (real cells, golden numbers of the released code) skip without it.

LONG=1 adds checks of minutes. Every tolerance has its reason beside it.
"""
import contextlib
import copy
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
import warnings
import weakref
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import data
import evaluate
import interpolate
import model
import prepare_bbbc021 as prepare
import train
from prepare_bbbc021 import hills, measure, segment, segment_field

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "fixtures").is_dir(), reason="needs the folder shared/fixtures (golden numbers, real files)")
needs_cells = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the folder shared/data (real BBBC021 cells)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
long = pytest.mark.skipif(not os.environ.get("LONG"), reason="minutes long: set LONG=1")

data.keep_freed_memory()
train.VALIDATED = 24  # cells, not 512: seconds instead of minutes


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
    """One cp2image_step -> the released code's order of losses: hidden 0..3, pixel, discriminator."""
    terms = train.cp2image_step(G, D, opt_g, opt_d, f, x, x_real, step)
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
        (logit, h), (logit_x, h_x) = D(torch.cat([x_real, x_fake]), x)
        hidden = model.hidden_losses(h_x, [m[8:] for m in h], x[0].numel())
        loss_pix, loss_d = model.pixel_loss(x, x_fake), train.discriminator_loss(logit[:8].sigmoid(), logit[8:].sigmoid())
        logit, h = torch.cat([logit, logit_x]), [torch.cat(pair) for pair in zip(h, h_x)]
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
        (logit, h), (logit_x, h_x) = D(torch.cat([x_real, x_fake]), x)
    logit, h = torch.cat([logit, logit_x]), [torch.cat(pair) for pair in zip(h, h_x)]
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
# Distances, profiles and the rest of evaluate.py's library


sys.path[:0] = [str(SHARED / "fixtures/fid"), str(SHARED / "fixtures/metrics")]


def normal(n, d, seed=0, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def refuses(text, function, *args, **kw):
    with pytest.raises(data.InputError, match=text) as error:
        function(*args, **kw)
    assert "\n" not in str(error.value)


# Inception

@pytest.fixture(scope="module")
def rule_net():
    """The network with fixture weights, and golden images (8, 3, 68, 68), features (8, 2048)."""
    from fid_fixture_rule import rule_tensor
    net = evaluate.Inception().eval()
    net.load_state_dict({k: torch.tensor(rule_tensor(k, tuple(v.shape))) for k, v in net.state_dict().items()})
    z = np.load(SHARED / "fixtures/fid/inception_golden.npz")
    return net, z["images"].transpose(0, 3, 1, 2), z["feat_2048_f64"]


def test_inception_size():
    net = evaluate.Inception()
    assert sum(p.numel() for p in net.parameters()) == 23_850_960 and len(net.state_dict()) == 566


@needs_shared
def test_inception_keys_and_shapes():
    lines = [line.split("\t")[:2] for line in (SHARED / "fixtures/fid/fid_inception_keys.txt").read_text().splitlines()[1:]]
    assert [[k, str(tuple(v.shape))] for k, v in evaluate.Inception().state_dict().items()] == lines


@needs_shared
def test_inception_golden(rule_net):
    net, images, expected = rule_net
    features = evaluate.inception_features(net, images, batch=8)
    assert features.shape == (8, 2048) and features.dtype == np.float32
    assert abs(features - expected).max() < 1e-3  # float32 noise 1.4e-5, smallest plausible mistake 0.09
    assert abs(evaluate.inception_features(net, images, batch=3) - features).max() < 1e-4  # the batch is no part of the result


@needs_shared
@long
@pytest.mark.parametrize("name", ["count_include_pad=True", "7c branch_pool avg", "7b branch_pool max", "align_corners=True", "(BGR)",
                                  "eps 1e-5", "no x*2-1"])
def test_inception_mutations_are_caught(rule_net, name, monkeypatch):
    """Each mistake moves the features by the amount measured with pytorch-fid, far above the tolerance."""
    net, images, expected = rule_net
    (size,) = [m["max_abs"] for m in json.loads((SHARED / "fixtures/fid/inception_mutations.json").read_text()) if name in m["name"]]
    average, interpolate = net.Mixed_7b.pool, evaluate.F.interpolate
    if "pad" in name:
        monkeypatch.setattr(average, "count_include_pad", True)
    elif "7c" in name:
        monkeypatch.setattr(net.Mixed_7c, "pool", average)
    elif "7b" in name:
        monkeypatch.setattr(net.Mixed_7b, "pool", net.Mixed_7c.pool)
    elif "align" in name:
        monkeypatch.setattr(evaluate.F, "interpolate", lambda x, size, mode, align_corners: interpolate(x, size, mode=mode, align_corners=True))
    elif "2-1" in name:
        monkeypatch.setattr(evaluate.F, "interpolate", lambda x, *a, **kw: (interpolate(x, *a, **kw) + 1) / 2)
    elif "BGR" in name:
        images = images[:, [2, 1, 0]]
    else:
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                monkeypatch.setattr(m, "eps", 1e-5)
    assert abs(evaluate.inception_features(net, images) - expected).max() == pytest.approx(size, rel=1e-3)


def test_load_inception_takes_only_the_right_file(tmp_path, monkeypatch):
    right, wrong = tmp_path / "right.pth", tmp_path / "wrong.pth"
    net = evaluate.Inception()
    torch.save(net.state_dict(), right)
    blob = right.read_bytes()
    refuses(f"{len(blob)} bytes.*{hashlib.sha256(blob).hexdigest()}.*95628359 bytes.*6726825d", evaluate.load_inception, right)
    monkeypatch.setattr(evaluate, "INCEPTION_BYTES", len(blob))
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", hashlib.sha256(blob).hexdigest())
    loaded = evaluate.load_inception(right)
    assert not loaded.training and torch.equal(loaded.fc.weight, net.fc.weight)
    for bad in (blob[:-1], blob[:1000] + bytes([blob[1000] ^ 1]) + blob[1001:], b""):  # truncated, altered, empty
        wrong.write_bytes(bad)
        refuses(f"{len(bad)} bytes", evaluate.load_inception, wrong)
    refuses("no such file", evaluate.load_inception, tmp_path / "none.pth")


# Fréchet distance

def from_moments(mean1, covariance1, mean2, covariance2):
    (w1, v1), (w2, v2) = np.linalg.eigh(covariance1), np.linalg.eigh(covariance2)
    return evaluate.frechet_of_roots(mean1, (v1 * np.sqrt(np.maximum(w1, 0))).T, mean2, (v2 * np.sqrt(np.maximum(w2, 0))).T)


def test_frechet_closed_forms():
    eye = np.eye(3)
    assert from_moments(np.zeros(3), eye, np.full(3, 2.0), eye) == pytest.approx(12)  # shift: |2|^2 x 3
    assert from_moments(np.zeros(3), eye, np.zeros(3), 9 * eye) == pytest.approx(12)  # spread: (3 - 1)^2 x 3
    assert evaluate.frechet_distance([[0.0], [2.0]], [[1.0], [5.0]]) == pytest.approx(4 + 2)  # d = 1: means 1, 3; sds sqrt 2, sqrt 8


@pytest.mark.parametrize("n, d", [(200, 1), (200, 8), (9, 40), (2, 5)])
def test_frechet_of_a_set_with_itself_is_zero_and_with_a_shifted_one_is_not(n, d):
    x = normal(n, d)
    assert evaluate.frechet_distance(x, x[::-1]) < 1e-9
    assert evaluate.frechet_distance(x, x + 1) == pytest.approx(d)
    assert evaluate.frechet_distance(x, np.random.default_rng(1).permuted(x * 3, axis=0)) > 0.1


def test_frechet_paths_agree():
    """Factor of few rows (N <= d), eigenvalues (N > d), and given moments are one function."""
    x, y = normal(5000, 12), normal(9, 12, 1, 0.5)
    expected = from_moments(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, abs=1e-6)
    assert evaluate.frechet_distance(x.astype(np.float32), y) == pytest.approx(expected, abs=1e-5)


def test_moments_do_not_depend_on_batch_or_order():
    x = normal(1000, 6, shift=1e4)  # far from zero, where naive sums of squares lose digits
    reference = evaluate.add_moments(None, x)
    for batch, order in ((1, x), (7, x[::-1]), (999, x)):
        moments = None
        for i in range(0, 1000, batch):
            moments = evaluate.add_moments(moments, order[i:i + batch])
        assert moments[0] == 1000
        for a, b in zip(moments[1:], reference[1:]):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reference[2] / 999, np.cov(x.T), rtol=1e-9, atol=1e-9)


def test_bad_sets_are_refused():
    x, hole, pole = normal(10, 4), normal(10, 4), normal(10, 4)
    hole[3, 1], pole[3, 1] = np.nan, np.inf
    for metric in (evaluate.frechet_distance, evaluate.mmd2, evaluate.kid, evaluate.precision_recall_density_coverage):
        refuses("1 of 40 values are NaN or infinite", metric, x, hole)
        refuses("1 of 40 values are NaN or infinite", metric, pole, x)
        refuses("4 and 3 columns", metric, x, x[:, :3])
        refuses("at least", metric, x, x[:1])
        refuses("expected", metric, x[0], x)
    refuses("at least 6 rows", evaluate.precision_recall_density_coverage, x, x[:5])


@needs_shared
def test_frechet_golden():
    cases = json.loads((SHARED / "fixtures/metrics/metrics_golden.json").read_text())["frechet_small"]
    z = np.load(SHARED / "fixtures/metrics/metrics_golden.npz")
    for name, case in cases.items():
        moments = [z[f"fd/{name}/{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")]
        assert abs(from_moments(*moments) - case["expected"]) < case["abs_tol"], name
        if f"fd/{name}/x" in z:
            assert abs(evaluate.frechet_distance(z[f"fd/{name}/x"], z[f"fd/{name}/y"]) - case["expected"]) < case["abs_tol"], name


@needs_shared
def test_frechet_golden_big():
    import fd_cases
    for name, case in json.loads((SHARED / "fixtures/metrics/metrics_golden.json").read_text())["frechet_big_by_rule"].items():
        d, n1, n2 = map(int, re.findall(r"\d+", name))
        if n1 <= 1000 or os.environ.get("LONG"):
            x, y = fd_cases.feats("B1", n1, d), fd_cases.feats("B2", n2, d, shift=0.05, scale=1.1)
            assert evaluate.frechet_distance(x, y) == pytest.approx(case["expected"], rel=case["rel_tol"]), name


@needs_shared
def test_fid_infinity_golden():
    import fd_cases
    g = json.loads((SHARED / "fixtures/metrics/metrics_golden.json").read_text())["fid_infinity"]
    a, b, sizes, distances = evaluate.fid_infinity(fd_cases.feats("ir", 4000, 24), fd_cases.feats("ig", 2000, 24, shift=0.1))
    assert sizes.tolist() == g["ns"]
    np.testing.assert_allclose(distances, g["fd"], rtol=1e-9)
    np.testing.assert_allclose([a, b], [g["intercept"], g["slope"]], rtol=1e-9)


def test_fid_infinity_takes_the_bias_of_the_fakes_away():
    real, fake = normal(20_000, 20, 1), normal(1000, 20, 2)
    a, _, _, distances = evaluate.fid_infinity(real, fake)
    assert abs(a) < 0.06 < distances[-1] < distances[0] / 10  # one distribution: the truth is 0
    assert evaluate.fid_infinity(real, fake + 0.5)[0] == pytest.approx(5, rel=0.1)  # 20 x 0.5^2 is not taken away


# KID, precision, recall, density, coverage

@needs_shared
def test_kid_golden():
    g, z = json.loads((SHARED / "fixtures/metrics/metrics_golden.json").read_text())["kid"], np.load(SHARED / "fixtures/metrics/metrics_golden.npz")
    x, y = z["kid/x"], z["kid/y"]
    np.testing.assert_allclose(evaluate.kid(x, y, subset=30, subsets=10, seed=2020), [g["mean"], g["std_ddof0"]], rtol=1e-9)
    np.testing.assert_allclose([evaluate.mmd2(x[i], y[j]) for i, j in zip(z["kid/idx_x"], z["kid/idx_y"])], z["kid/mmd2"], rtol=1e-9)
    assert evaluate.mmd2(x[:50], y) == pytest.approx(g["full_first50_unbiased"], rel=1e-9)


def test_kid_of_one_distribution_is_near_zero_and_of_noise_is_large():
    real = normal(400, 10)
    mean, sd = evaluate.kid(real, normal(400, 10, 1))
    assert abs(mean) < 0.05 and sd < 0.1
    assert evaluate.kid(real, normal(400, 10, 1, scale=2))[0] > 0.5
    assert abs(np.mean([evaluate.mmd2(normal(8, 10, s), normal(8, 10, 1000 + s)) for s in range(300)])) < 0.1  # unbiased at n = 8; biased: +1
    assert evaluate.kid(real, real + 1) == evaluate.kid(real, real + 1) != evaluate.kid(real, real + 1, seed=1)


def test_kid_refuses_a_subset_larger_than_the_set():
    refuses("KID subset 31: expected 2 to 30", evaluate.kid, normal(30, 3), normal(40, 3), subset=31)
    refuses("KID subset 1:", evaluate.kid, normal(30, 3), normal(40, 3), subset=1)


@needs_shared
@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage_golden(k):
    z = np.load(SHARED / "fixtures/metrics/metrics_golden.npz")
    g = json.loads((SHARED / "fixtures/metrics/metrics_golden.json").read_text())
    found = evaluate.precision_recall_density_coverage(z["prdc/real"], z["prdc/gen"], k, k)
    assert found == pytest.approx(g[f"prdc_k{k}_dgm_eval"], abs=1e-12)
    if k == 3:
        assert found["recall"] == pytest.approx(g["precision_recall_k3_torch_fidelity"]["recall"], abs=1e-6)  # float32 there


def test_precision_and_recall_by_hand():
    real, fake = np.arange(6.0)[:, None], np.array([[0.5], [2.5], [2.6], [6.0], [6.5], [51.0]])
    found = evaluate.precision_recall_density_coverage(real, fake, k=1, k_density=1)
    # real balls reach 1, edge included: fakes in 2, 2, 2, 1, 0, 0 of them, all but 4 hold one; fake balls reach 2, .1, .1, .5, .5, 44.5
    assert found == pytest.approx({"precision": 4 / 6, "recall": 3 / 6, "density": 7 / 6, "coverage": 5 / 6})


def test_squared_distances():
    a, b = normal(5, 3, shift=100), normal(5000, 3, 1, shift=100)  # three blocks of b
    np.testing.assert_allclose(evaluate.squared_distances(a.astype(np.float32), b), ((a[:, None] - b) ** 2).sum(2), atol=1e-3)
    own = evaluate.squared_distances(b[:700], b)
    assert own.min() == 0 and own.diagonal().max() < 1e-9


def test_mode_collapse_and_noise_are_caught():
    real = np.concatenate([normal(700, 6, 0), normal(700, 6, 1, shift=8)])  # more than one block of rows
    good = np.concatenate([normal(700, 6, 2), normal(700, 6, 3, shift=8)])
    one_mode, one_cell = normal(1400, 6, 4), real[:1] + normal(1400, 6, 5, scale=1e-3)
    best, half, point, noise = (evaluate.precision_recall_density_coverage(real, f) for f in (good, one_mode, one_cell, normal(1400, 6, 6, 4, 20)))
    assert min(best.values()) > 0.85
    assert half["precision"] > 0.85 and half["recall"] < 0.55 and half["coverage"] < 0.55
    assert point["precision"] == 1 and point["recall"] < 0.01 and point["coverage"] < 0.02
    assert noise["precision"] < 0.05 and noise["density"] < 0.05 and noise["coverage"] < 0.05
    assert evaluate.precision_recall_density_coverage(real, real) == pytest.approx(dict(precision=1, recall=1, density=1, coverage=1), abs=0.3)
    order = np.random.default_rng(0).permutation(1400)
    assert evaluate.precision_recall_density_coverage(real[order], good[order[::-1]]) == best


# FD-CP

def test_robust_z():
    train = pd.DataFrame(normal(1000, 5, shift=5, scale=2), columns=["a", "flat", "holes", "const", "b"])
    train["flat"] = np.where(np.arange(1000) < 600, 3, 4)  # most cells equal: MAD 0
    train.loc[:59, "holes"] = np.nan
    train["const"] = 0.1
    train.loc[:49, "b"] = np.nan  # 5 % exactly stays
    space = evaluate.fit_cp_space(train, 2)
    assert space["dropped"] == {"flat": "MAD 0", "holes": "6.0% missing", "const": "MAD 0"}
    assert space["centre"] == pytest.approx(5, abs=0.3) and space["spread"] == pytest.approx(2, rel=0.1)  # 1.4826 MAD = sd of a normal
    frame = lambda *rows: pd.DataFrame(rows, columns=list(train), dtype=float)
    z = evaluate.robust_z(frame([1e9, 3, 3, 0, np.nan], [space["centre"][0] - space["spread"][0], 0, np.nan, 0, -1e9]), space)
    np.testing.assert_allclose(z, [[10, 0], [-1, -10]])
    refuses("1 of 2 cells have no measurement", evaluate.robust_z, frame([np.nan] * 5, [1] * 5), space)
    refuses("b: 1 of 1 values are infinite", evaluate.robust_z, frame([0, 0, 0, 0, np.inf]), space)
    refuses("5 measurements, first .'b', 'const'.*expected 5, first .'a', 'flat'", evaluate.robust_z, train[["b", "const", "flat", "a", "holes"]], space)
    refuses("none of the 1 measurements varies", evaluate.fit_cp_space, pd.DataFrame(np.ones((30, 1)), columns=["x"]), 1)
    refuses("19 training cells could be measured", evaluate.fit_cp_space, train[:19], 1)


def test_components_are_the_long_axes():
    x = normal(500, 1) * np.array([[3.0, 4.0, 0.0]]) + 0.1 * normal(500, 3, 1) + 7
    space = evaluate.fit_cp_space(pd.DataFrame(x, columns=list("abc")), 2)
    np.testing.assert_allclose(abs(space["axes"][0]), [0.7, 0.7, 0], atol=0.05)  # robust z gives both long features the same length
    assert space["axes"].shape == (2, 3) and evaluate.fit_cp_space(pd.DataFrame(x, columns=list("abc")), 30)["axes"].shape == (3, 3)


def test_distances_rank_good_blurred_shifted_and_collapsed_generators():
    mix = normal(40, 40, 9) / 6
    train, reference, floor, good = (
        pd.DataFrame(normal(n, 40, s) @ mix, columns=[f"f{i}" for i in range(40)]) for n, s in ((2000, 0), (300, 1), (300, 2), (300, 3)))
    space = evaluate.fit_cp_space(train, 15)
    sets = {"real": floor, "good": good, "blurred": floor * 0.5, "shifted": floor + 2,
            "collapsed": floor * 0 + floor.iloc[0] + 0.01 * good, "few": good[:19]}

    def found(seed):
        features = lambda who, half: (evaluate.robust_z(sets[who] if half else reference, space) - space["mean"]) @ space["axes"].T
        return evaluate.distance_records(features, sets, "FD", "-CP15", "measurements", None, seed)
    records, absent = found(0)
    table = pd.DataFrame(records, columns=evaluate.RECORD).pivot(index="quantity", columns="who", values="value")
    above = table.loc["FD minus floor-CP15"]
    assert above["real"] == 0 and abs(above["good"]) < 0.5 < 1 < above["blurred"] < above["shifted"] and above["collapsed"] > 1
    assert abs(table.loc["KID-CP15", "good"]) < 3 * table.loc["KID sd-CP15", "good"] < table.loc["KID-CP15", "shifted"]
    assert table.loc["recall-CP15", "collapsed"] < 0.05 < 0.6 < table.loc["recall-CP15", "good"]
    assert list(absent) == ["FD-CP15 of few"] and "at least 20 rows" in absent["FD-CP15 of few"]
    assert records == found(0)[0] != found(1)[0]


# Mechanism of action

def compound_table(seed=0, coded="moa"):
    """Wells of 24 compounds (2 concentrations, 2 plates of different weeks) with 4 mechanisms; profiles follow the mechanism or the compound."""
    rng, rows, x = np.random.default_rng(seed), [], []
    centres = {"moa": rng.normal(0, 3, (4, 30)), "compound": rng.normal(0, 3, (24, 30))}[coded]
    for plate, scale in (("Week1_1", 1.0), ("Week2_1", 5.0)):  # a plate effect that only DMSO can remove
        for i in range(8):
            rows.append((plate, f"D{i}", "DMSO", 0.0, "DMSO"))
            x.append(scale * (10 + rng.normal(0, 1, 30)))
        for i in range(48):
            compound = i % 24
            rows.append((plate, f"B{i}", f"c{compound}", float(i // 24), f"m{compound % 4}"))
            x.append(scale * (10 + centres[compound % len(centres)] + rng.normal(0, 1, 30)))
    features = [f"Cells_{i}" for i in range(30)]
    return pd.concat([pd.DataFrame(rows, columns=evaluate.WELL_COLUMNS), pd.DataFrame(x, columns=features)], axis=1), features


def test_nsc_by_hand():
    profiles = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.5, 1], [1, 1]])
    compounds, moas = ["a", "a", "b", "c", "d", "e"], ["x", "x", "x", "y", "y", "z"]
    found = evaluate.nsc(profiles, compounds, moas)
    assert found["treatments"]["nearest"].tolist() == [2, 2, 1, 4, 5, 4]  # never the other concentration of `a`
    assert (found["correct"], found["n"], found["accuracy"]) == (4, 5, 0.8)  # z has no other compound: unscorable
    assert found["treatments"]["scorable"].tolist() == [True] * 5 + [False]
    assert found["accuracy_per_compound"] == 3 / 4
    assert found["confusion"].loc["y"].to_dict() == {"x": 0, "y": 1, "z": 1}
    batches = [("1",), ("1",), ("1", "2"), ("1",), ("2",), ("2",)]
    found = evaluate.nsc(profiles, compounds, moas, batches)
    assert found["treatments"]["scorable"].tolist() == [False, False, False, True, True, False]  # b shares batch 1 with a
    refuses("none of 6 treatments", evaluate.nsc, profiles, compounds, moas, [("1",)] * 6)
    refuses("1 of 6 profiles are all zero.*: c", evaluate.nsc, profiles * [[1], [1], [1], [0], [1], [1]], compounds, moas)


def test_nsc_sees_mechanisms_and_not_chance():
    wells, features = compound_table()
    found = evaluate.score_profiles(wells, features)
    assert found["NSC"]["accuracy"] == 1 and found["NSC"]["n"] == 48 and found["NSC"]["p"] < 0.01
    assert "none of 48" in found["NSCB"]["absent"]  # every treatment is in both weeks
    shuffled = wells.copy()
    drugs = wells["compound"] != "DMSO"
    labels = dict(zip(wells["compound"][drugs].unique(), np.random.default_rng(1).permutation([f"m{i % 4}" for i in range(24)])))
    shuffled.loc[drugs, "moa"] = wells["compound"][drugs].map(labels)
    found = evaluate.score_profiles(shuffled, features)["NSC"]
    assert found["accuracy"] < 0.5 and found["p"] > 0.05 and abs(found["null_mean"] - 0.22) < 0.05  # 5 of 23 others share the label


def test_features_that_code_the_compound_fool_only_a_score_that_admits_it():
    wells, features = compound_table(coded="compound")
    t = evaluate.treatment_profiles(wells.assign(**dict(zip(features, evaluate.normalise_plates(
        wells[features], wells["plate"], wells["compound"] == "DMSO").T))), features)
    admitted = evaluate.nsc(t[features], np.arange(len(t)), t["moa"])["accuracy"]  # every treatment its own compound: the classic mistake
    assert admitted > 0.95 and evaluate.nsc(t[features], t["compound"], t["moa"])["accuracy"] < 0.5


def test_batches_decide_nscb():
    wells, features = compound_table()
    week = np.where(wells["compound"].str[1:].isin([str(i) for i in range(12)]), "Week1_1", "Week2_1")  # half of the compounds each
    wells = wells[(wells["plate"] == week) | (wells["compound"] == "DMSO")]
    found = evaluate.score_profiles(wells, features)
    assert found["NSCB"]["accuracy"] == 1 and found["NSCB"]["n"] == 48
    t = found["NSCB"]["treatments"]
    assert (t["compound"].str[1:].astype(int).lt(12) != t["compound"].to_numpy()[t["nearest"]].astype("U9").astype(object)).all()


def test_normalise_plates():
    wells, features = compound_table()
    x, plates, dmso = wells[features].to_numpy().copy(), wells["plate"].to_numpy(), (wells["compound"] == "DMSO").to_numpy()
    x[plates == "Week1_1", 3] = 0.1  # no spread on one plate
    for how, low, high in (("z", lambda v: v.mean(0), lambda v: v.mean(0) + v.std(0)), ("percentile", lambda v: np.percentile(v, 1, axis=0),
                           lambda v: np.percentile(v, 99, axis=0)), ("mad", lambda v: np.median(v, 0), None)):
        z = evaluate.normalise_plates(x, plates, dmso, how)
        assert (z[plates == "Week1_1", 3] == 0).all() and np.isfinite(z).all()
        v = z[(plates == "Week2_1") & dmso]
        np.testing.assert_allclose(low(v), 0, atol=1e-9)
        if high:
            np.testing.assert_allclose(high(v), 1, atol=1e-9)
    assert abs(z).max() == 10  # mad clips
    np.testing.assert_allclose(1.4826 * np.median(abs(v), 0), 1)
    assert (evaluate.normalise_plates(x, plates, dmso, "none") == x).all()
    refuses("plate Week2_1: 1 DMSO wells", evaluate.normalise_plates, x, plates, dmso & (np.arange(len(x)) < 57), "z")
    x[5, 5] = np.nan
    refuses("1 of .* NaN", evaluate.normalise_plates, x, plates, dmso, "z")


def test_well_and_treatment_profiles():
    cells = pd.DataFrame({"plate": "Week1_1", "well": ["A", "A", "A", "B"], "compound": ["k", "k", "k", "DMSO"], "concentration": [1, 1, 1, 0],
                          "moa": ["m", "m", "m", "DMSO"], "f": [1.0, 2.0, 9.0, 5.0]})
    assert evaluate.well_profiles(cells, cells[["f"]])[["well", "n_cells", "f"]].values.tolist() == [["A", 3, 4.0], ["B", 1, 5.0]]
    found = evaluate.well_profiles(cells[1:], cells[["f"]])  # a cell left out, its row is still in the table
    assert found[["well", "n_cells", "f"]].values.tolist() == [["A", 2, 5.5], ["B", 1, 5.0]]
    twice = evaluate.well_profiles(cells.assign(concentration=[1, 1, 2, 0]), cells[["f"]])
    refuses("plate Week1_1 well A", evaluate.score_profiles, twice, ["f"])
    wells = cells.assign(plate=["Week1_1", "Week1_2", "Week2_1", "Week1_1"])
    (t,) = evaluate.treatment_profiles(wells, ["f"], "median").to_dict("records")
    assert t == {"compound": "k", "concentration": 1.0, "moa": "m", "batches": ("Week1", "Week2"), "n_wells": 3, "f": 2.0}
    refuses("no well has a known mechanism", evaluate.treatment_profiles, wells.assign(moa="unknown"), ["f"])


@needs_shared
def test_moa_golden():
    g = json.loads((SHARED / "fixtures/metrics/moa_golden.json").read_text())
    wells = pd.DataFrame(g["wells"])
    features = [f"f{i}" for i in range(6)]
    wells[features] = wells["x"].tolist()
    wells[features] = evaluate.normalise_plates(wells[features], wells["plate"], wells["compound"] == "DMSO")
    t = evaluate.treatment_profiles(wells, features)
    assert t["compound"].tolist() == [v["compound"] for v in g["treatments"]]
    np.testing.assert_allclose(t[features], g["profiles"], rtol=1e-9)
    for name, batches in (("NSC", None), ("NSCB", t["batches"])):
        found, expected = evaluate.nsc(t[features], t["compound"], t["moa"], batches), g[name]
        assert (found["correct"], found["n"], found["accuracy"]) == tuple(expected[k] for k in ("correct", "total", "accuracy"))
        for row, neighbour in zip(found["treatments"].itertuples(), expected["neighbours"]):
            assert row.scorable == (neighbour is not None)
            if neighbour:
                (compound, concentration), moa, hit, cosine = neighbour
                assert (t["compound"][row.nearest], t["concentration"][row.nearest]) == (compound, concentration)
                assert (row.predicted, row.correct, row.distance) == (moa, hit, pytest.approx(1 - cosine, abs=1e-9))


@pytest.fixture(scope="module")
def ljosa():
    """Real well profiles (632) of Ljosa et al. 2013 with compound, concentration, moa, and their 459 features."""
    meta = SHARED / "fixtures/bbbc021_meta"
    table, features = evaluate.read_profiles(meta / "ljosa_jbiomolscreen_2013_per_well_mean.csv.gz", meta / "BBBC021_v1_image.csv", meta / "BBBC021_v1_moa.csv")
    assert len(table) == 632 and len(features) == 459
    return table, features


@needs_shared
@pytest.mark.parametrize("normalise, average, right, right_b", [
    ("z", "mean", 85, 67), ("percentile", "mean", 83, 64), ("z", "median", 80, 63), ("mad", "mean", 92, 62), ("none", "mean", 57, 36)])
def test_real_profiles(ljosa, normalise, average, right, right_b):
    found = evaluate.score_profiles(*ljosa, normalise, average)
    assert [(found[k]["correct"], found[k]["n"]) for k in ("NSC", "NSCB")] == [(right, 103), (right_b, 92)]
    if (normalise, average) == ("z", "mean"):
        assert len(found["NSC"]["per_compound"]) == 38 and found["NSC"]["confusion"].to_numpy().sum() == 103
        assert found["NSC"]["confusion"].shape[0] == 12
        unscorable = found["NSCB"]["treatments"].query("~scorable")["moa"].value_counts().to_dict()
        assert unscorable == {"Cholesterol-lowering": 6, "Kinase inhibitors": 5}
        assert found["NSC"]["null_mean"] == pytest.approx(0.069, abs=0.01) and found["NSC"]["null_sd"] == pytest.approx(0.054, abs=0.01)
        assert found["NSC"]["interval"] == pytest.approx([0.73, 0.90], abs=0.03)


# Bootstrap

def test_bootstrap():
    values = normal(400, 1)
    mean = lambda w: w @ values / len(values)
    (low,), (high,) = evaluate.bootstrap(mean, 400, 0, draws=4000)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)  # a 90 % one is 16 % narrower
    assert evaluate.bootstrap(mean, 400, 0).tolist() == evaluate.bootstrap(mean, 400, 0).tolist() != evaluate.bootstrap(mean, 400, 1).tolist()
    assert np.isnan(evaluate.bootstrap(lambda w: w[:, :1], 1, 0)).all()


def test_correlations():
    a = normal(60, 4)
    b = a + normal(60, 4, 1)
    a[:5, 1], b[3:9, 1], b[:, 2], a[2:, 3] = np.nan, np.inf, 0.1, np.nan  # holes on both sides; no spread; two pairs
    ones, random = np.ones((1, 60)), np.random.default_rng(0).integers(0, 3, (7, 60))
    r = evaluate.correlations(a, b, ones)[0]
    assert r[:2] == pytest.approx([np.corrcoef(a[:, 0], b[:, 0])[0, 1], np.corrcoef(a[9:, 1], b[9:, 1])[0, 1]]) and np.isnan(r[2:]).all()
    for weights, found in zip(random, evaluate.correlations(a + 1e6, b - 1e6, random)):
        drawn = np.repeat(np.arange(60), weights)
        assert found[0] == pytest.approx(np.corrcoef(a[drawn, 0], b[drawn, 0])[0, 1], rel=1e-6)
    shuffled = np.random.default_rng(1).permutation(60)
    assert abs(evaluate.correlations(a, b[shuffled], ones)[0, 0]) < 0.3 < r[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command evaluate.py


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder of 200 simulated cells, untrained runs of two seeds on it, and a run of another folder."""
    top = tmp_path_factory.mktemp("judged")
    evaluate.TRAIN_SAMPLE = 60  # cells measured for scale and components: seconds instead of minutes
    prepare.main(["--simulate", "200", "--out", str(top / "data"), "--workers", "1"])
    folder = data.open_folder(top / "data")
    for seed, name in ((0, "cp2image-seed0"), (1, "cp2image-seed1"), (0, "foreign"), (0, "percentile-seed0")):
        torch.manual_seed(seed)
        G, D = model.Generator(len(folder.features)), model.Discriminator()
        (top / name).mkdir()
        identity = folder.identity if name != "foreign" else dict.fromkeys(folder.identity, "0")
        state = {"format": model.FORMAT, "model": "cp2image", "step": 7, "features": folder.features, "channels": folder.channels, "centre": folder.centre,
                 "scale": folder.scale, "normalise": "train", "image_norm": "percentile" if "percentile" in name else "cell-max", "white": folder.white, "G": G.state_dict(), "G_ema": None, "D": D.state_dict(),
                 "settings": {**vars(train.parse(["--data", "x"])), "seed": seed}, "identity": identity}
        torch.save(state, top / name / "last.pt")
    return top


def evaluate_run(top, *more, run="cp2image-seed0", out="eval"):
    evaluate.main(["--data", str(top / "data"), "--run", str(top / run), "--split", "train", "--n", "40", "--device", "cpu", "--out", str(top / out), *more])
    return json.loads((top / out / "metrics.json").read_text())


def test_evaluate_writes_the_same_bytes_twice_and_every_number_with_its_conditions(judged, capsys):
    found = evaluate_run(judged)
    said = capsys.readouterr().out
    assert said.count("--inception FILE was not given") == 1 and "does NOT beat retrieval" in said
    first = {p.name: p.read_bytes() for p in (judged / "eval").iterdir()}
    evaluate_run(judged, out="again")
    assert first == {p.name: p.read_bytes() for p in (judged / "again").iterdir()} and {"grid.png", "grid.json", "metrics.csv"} <= set(first)
    real, ours, nearest = (found["results"][who] for who in ("real", "generated", "nearest training cell"))
    assert set(found["results"]) == {"real", "generated", "nearest training cell", "random training cell", "mean training image", "input CP vectors"}
    assert real["r Nuclei_AreaShape_Area"]["value"] == pytest.approx(1) and real["pixel loss"]["value"] == 0 and nearest["pixel loss"]["value"] == 0  # train split
    low, high = found["results"]["random training cell"]["pixel loss"]["interval"]
    assert low < found["results"]["random training cell"]["pixel loss"]["value"] < high
    assert abs(found["results"]["random training cell"]["r Nuclei_AreaShape_Area"]["value"]) < 0.4  # shuffled pairs
    assert found["results"]["mean training image"]["r Nuclei_AreaShape_Area"]["value"] is None  # one picture for all: undefined, not 0
    assert ours["nucleus found"]["n"] == 80 and real["FD-CP2"]["n"] > 30 and ("FD-CP2" in ours or "FD-CP2 of generated" in found["absent"])
    assert "FID, KID" in found["absent"] and "NSC" in real and not any("FID" in q for who in found["results"].values() for q in who)
    about = found["about"]
    assert (about["split"], about["seed"], about["cells"], about["cells a side"], about["step"]) == ("train", 0, 80, 40, 7)
    grid = json.loads(first["grid.json"])
    assert grid["rows"] == ["original", "cp2image"] and len(set(grid["cells"])) == 13
    rows = pd.read_csv(judged / "eval/metrics.csv")
    assert list(rows.columns) == [*evaluate.RECORD, "split", "seed"] and len(rows) == sum(map(len, found["results"].values()))


def test_order_and_batches_change_nothing(judged, monkeypatch):
    folder, device = data.open_folder(judged / "data"), torch.device("cpu")
    G, D = model.load(judged / "cp2image-seed0/last.pt"), model.load_metric(judged / "cp2image-seed0/last.pt")
    # an untrained generator's faint pictures have no nucleus: retrieval, chance and the floor are compared too
    order = np.random.default_rng(0).permutation(len(folder))
    other = data.Folder(folder.path, folder.meta, folder.patches[order], folder.raw[order], folder.cells.iloc[order].reset_index(drop=True))
    tables = []
    for f, size in ((folder, 256), (other, 256), (folder, 17)):
        cut = lambda stop, _=0, start=0, size=size: [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
        monkeypatch.setattr(evaluate, "batches", cut)
        tables.append(evaluate.judge(G, D, f, evaluate.choose_cells(f, "train", 20, 3), 3, device)[0])
    for table in tables[1:]:
        assert table[["who", "quantity", "n"]].equals(tables[0][["who", "quantity", "n"]])
        np.testing.assert_allclose(table["value"], tables[0]["value"], rtol=1e-6, atol=1e-6)


def test_two_tables_of_measurements_are_held_at_once(judged, monkeypatch):
    """The real cells' and one other's: each is 170 MB at 48,800 cells."""
    folder, checkpoint, held, alive = data.open_folder(judged / "data"), judged / "cp2image-seed0/last.pt", [], []
    look, distances = evaluate.look, evaluate.distance_records

    def count():
        gc.collect()
        alive.append(sum(table() is not None for table in held))

    def watched(*args):
        count()
        losses, seen = look(*args)
        assert set(seen.dtypes) == {np.dtype(np.float32)}
        held.append(weakref.ref(seen.to_numpy().base))  # the numbers, whoever holds them
        return losses, seen

    monkeypatch.setattr(evaluate, "look", watched)
    monkeypatch.setattr(evaluate, "distance_records", lambda *args: count() or distances(*args))
    *_, (table, real, fake) = evaluate.judge(model.load(checkpoint), model.load_metric(checkpoint), folder, folder.rows("train")[:40], 0, torch.device("cpu"))
    count()
    assert alive == [0, 1, 1, 1, 1, 0, 0] and list(real) == list(fake) == list(table.index[:6])


def test_working_on_a_table_of_measurements_takes_little_more_than_the_table():
    """Peak of each step in tables of float32, measured at most 2.1; on all columns at once correlations take 12."""
    names = pd.Index([f"Nuclei_Texture_Contrast_{i}" for i in range(640)])
    real, fake = (pd.DataFrame(np.random.default_rng(s).random((5000, 640), np.float32), columns=names) for s in (0, 1))
    cells = pd.DataFrame({c: np.arange(5000) % 50 for c in evaluate.WELL_COLUMNS})
    space = evaluate.fit_cp_space(real[:200], 10)
    steps = {"correlations": lambda: evaluate.correlations(real.to_numpy(), fake.to_numpy(), np.ones((1, 5000))),
             "features": lambda: evaluate.feature_table(real, fake, real, np.arange(5000) % 50, [], "cell-max"),
             "wells": lambda: evaluate.well_profiles(cells, real), "projection": lambda: evaluate.in_cp_space(real, space)}
    peak = {}
    tracemalloc.start()
    for name, step in steps.items():
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        step()
        peak[name] = (tracemalloc.get_traced_memory()[1] - before) / real.to_numpy().nbytes
    tracemalloc.stop()
    assert max(peak.values()) < 3, peak


def test_wells_of_plates_without_two_dmso_wells_are_left_out_of_nsc(judged, monkeypatch, capsys):
    known = lambda x, masks, channels, device: (["Nuclei_AreaShape_Area", "Nuclei_Intensity_Mean", "Cells_AreaShape_Area"],
                                       np.column_stack([x.sum((1, 2, 3)), x.std((1, 2, 3)), x[:, 1].std((1, 2))]))
    monkeypatch.setitem(prepare.ENGINES, "ours", known)  # a nucleus in every picture: the untrained generator is scored too
    found, said = evaluate_run(judged, out="few"), capsys.readouterr().out
    folder = data.open_folder(judged / "data")
    wells = folder.cells.iloc[evaluate.choose_cells(folder, "train", 40, 0)].drop_duplicates(["plate", "well"])
    dmso = (wells["compound"] == "DMSO").groupby(wells["plate"]).sum()
    few = sorted(dmso.index[dmso < 2])
    expected = {"wells": int(wells["plate"].isin(few).sum()), "plates": few}
    left = found["about"]["left out of NSC"]
    assert few and (dmso >= 2).any() and left == dict.fromkeys(["input CP vectors", *found["results"]], expected) | left
    assert all(left[who] == expected for who in ("input CP vectors", "real", "generated"))
    line, = [line for line in said.splitlines() if line.startswith("left out of NSC, on plates with fewer than two DMSO wells: ")]
    assert f"real {expected['wells']} wells ({', '.join(few)})" in line
    for who in ("input CP vectors", "real", "generated"):
        assert found["results"][who]["NSC"]["n"] > 0
    for plate in set(folder.cells["plate"]):  # one DMSO well on every plate: absent, with the reason
        dmso = folder.cells[(folder.cells["plate"] == plate) & (folder.cells["compound"] == "DMSO")]
        folder.cells.loc[dmso.index, "well"] = dmso["well"].min()
    checkpoint = judged / "cp2image-seed0/last.pt"
    rows = evaluate.choose_cells(folder, "train", 40, 0)
    _, absent, _, notes, _ = evaluate.judge(model.load(checkpoint), model.load_metric(checkpoint), folder, rows, 0, torch.device("cpu"))
    assert notes["left out of NSC"] == {} and "1 DMSO wells, 2 are needed" in absent["NSC of real"]


def test_runs_side_by_side(judged, capsys):
    common = ["--data", str(judged / "data"), "--split", "val", "--out", str(judged / "cmp"), "--device", "cpu", "--grid", "4"]
    evaluate.main([*common, "--runs", str(judged / "cp2image-seed0"), str(judged / "cp2image-seed1/last.pt")])
    table = pd.read_csv(judged / "cmp/comparison.csv").set_index(["who", "quantity"])
    values = [json.loads((judged / f"cmp/cp2image-seed{s}/metrics.json").read_text())["results"]["generated"]["pixel loss"]["value"] for s in (0, 1)]
    row = table.loc[("cp2image", "pixel loss")]
    assert (row["mean"], row["sd"], row["runs"]) == (pytest.approx(np.mean(values), rel=1e-5), pytest.approx(np.std(values, ddof=1), rel=1e-4), 2)
    text = (judged / "cmp/comparison.md").read_text()
    assert "FID 68.42 ± 1.9" in text and "not comparable" in text and text.count("cp2image | 2") == 1 and "CytoGAN: nothing" in text and "nearest training cell | 1" in text
    assert json.loads((judged / "cmp/grid.json").read_text())["rows"] == ["original", "cp2image"]
    for other in ("cp2image-seed0", "percentile-seed0"):
        refuses("one --image-norm, and different seeds", evaluate.main, [*common, "--runs", str(judged / "cp2image-seed0"), str(judged / other)])


def test_baselines_are_judged(judged):
    """A VAE reconstructs the cells and samples freely, a GAN only samples; both are represented; Table 1 of both papers has each in its row."""
    runs = [judged / "cp2image-seed0"]
    for kind in ("vae", "lsgan"):
        runs.append(judged / f"{kind}-seed0")
        train.main(["--data", str(judged / "data"), "--model", kind, "--run", str(runs[-1]), "--steps", "2", "--batch", "6", "--device", "cpu"])
    evaluate.main(["--data", str(judged / "data"), "--runs", *map(str, runs), "--split", "train", "--n", "30", "--out", str(judged / "three"), "--device", "cpu",
                   "--grid", "3"])
    vae, gan = (json.loads((judged / f"three/{kind}-seed0/metrics.json").read_text()) for kind in ("vae", "lsgan"))
    assert vae["results"]["generated"]["pixel loss"]["value"] > 0 and "pixel loss" not in vae["results"]["free samples"]
    assert set(gan["results"]["generated"]) == {"nucleus found"} and "free samples are of no particular cell" in gan["absent"]["pairs of generated"]
    bare = evaluate.BARE
    assert all(0 <= found["results"][bare]["NSC"]["value"] <= 1 for found in (vae, gan))  # two steps: any number
    table = pd.read_csv(judged / "three/comparison.csv").set_index(["who", "quantity"])["paper, not comparable"]
    assert table[f"lsgan {bare}", "NSC"] == "0.43" and table[f"vae {bare}", "NSC"] == "0.49"
    assert ("vae free samples", "nucleus found") in table and ("lsgan", "pixel loss") not in table
    text = (judged / "three/comparison.md").read_text()
    first, second = text.split("Table 1 of CytoGAN")
    assert "| vae | 1 |" in first and "FID 351.96 ± 5.3" in first and "| input CP vectors | 1 |" in second and "NSC 0.43" in second and re.search(r"\| 0\.?\d* \(n \d+\) \|", second)
    assert json.loads((judged / "three/grid.json").read_text())["rows"] == ["original", "cp2image", "vae", "lsgan, free samples"]
    folder, path = data.open_folder(judged / "data"), judged / "lsgan-seed0/last.pt"
    G, D, rows = model.load(path), model.load_metric(path), folder.rows("train")[:300]
    noisy, clean = (evaluate.represented(G, D, folder, rows, torch.device("cpu"), on).to_numpy() for on in (True, False))
    again = evaluate.represented(G, D, folder, rows[::-1], torch.device("cpu")).to_numpy()[::-1]
    assert noisy.shape == (len(rows), 100) and np.abs(noisy - again).max() < 1e-5 * np.abs(noisy).max() < np.abs(noisy - clean).max()  # noise by cell, not by place


@needs_shared
def test_fid_of_the_command(judged, monkeypatch, rule_net):
    """With the fixture's weights: 20 cells a side. Real cells are nearer to real ones than pictures of an untrained generator, in every channel."""
    monkeypatch.setattr(evaluate, "load_inception", lambda path, device: rule_net[0])
    fake_features = lambda net, x: x.reshape(len(x), -1)[:, ::97].astype(np.float32) / 255  # the network itself is tested above
    monkeypatch.setattr(evaluate, "inception_features", fake_features)
    found = evaluate_run(judged, "--inception", "w", "--n", "20", out="fid")
    real, ours = found["results"]["real"], found["results"]["generated"]
    for name in ("FID", "FID DAPI", "FID Tubulin", "FID Actin"):
        assert real[name]["value"] < ours[name]["value"] and real[name]["extractor"] == "inception" and ours[name]["n"] == 20
    assert ours["FID minus floor"]["value"] == pytest.approx(ours["FID"]["value"] - real["FID"]["value"], rel=1e-4)
    assert evaluate.batches(10, 4, 5) == [slice(5, 9), slice(9, 10)]  # the second half, in pieces
    assert "FID, KID" not in found["absent"] and found["about"]["inception"] == evaluate.INCEPTION_SHA256


def test_profiles_from_a_file(judged):
    wells, features = compound_table()
    wells.to_csv(judged / "wells.csv", index=False)
    evaluate.main(["--profiles", str(judged / "wells.csv"), "--out", str(judged / "profiles")])
    found = json.loads((judged / "profiles/metrics.json").read_text())
    assert found["results"]["profiles"]["NSC"]["value"] == 1 and "none of 48" in found["absent"]["NSCB of profiles"]
    treatments = pd.read_csv(judged / "profiles/moa.csv")
    assert len(treatments) == 48 and treatments["correct"].all() and set(treatments["concentration"]) == {0, 1}
    hole = wells.copy()
    hole.loc[3, features[2]] = np.nan
    for table, text in ((hole, "1 of 3360 values are NaN"), (wells.drop(columns="moa"), "lacks moa; --image-csv"), (wells[[*evaluate.WELL_COLUMNS]], "no column is"),
                        (pd.concat([wells, wells[:2]]), "2 rows repeat a well")):
        table.to_csv(judged / "bad.csv", index=False)
        refuses(text, evaluate.main, ["--profiles", str(judged / "bad.csv")])


def test_evaluate_refuses(judged, capsys, tmp_path):
    refuses("foreign/last.pt: was trained on another prepared folder", evaluate_run, judged, run="foreign")
    refuses("--subset 41: larger than the 40 cells", evaluate_run, judged, "--subset", "41")
    refuses("--device nonsense: not on this machine", evaluate_run, judged, "--device", "nonsense")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    refuses("weights.pth: 7 bytes with SHA-256 9a129038", evaluate_run, judged, "--inception", str(tmp_path / "weights.pth"))
    folder = data.open_folder(judged / "data")
    folder.cells["split"] = "train"
    refuses("no cell is in split 'test'", evaluate.choose_cells, folder, "test", 9, 0)
    for bad in (["--run", "x"], ["--data", "x"], ["--data", "x", "--runs", "y"], ["--data", "x", "--run", "y", "--subset", "1"]):
        with pytest.raises(SystemExit):
            evaluate.parse(bad)


def test_plots_are_optional(judged, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate.draw_plots(judged / "bare.png", pd.DataFrame(columns=evaluate.RECORD), [])
    assert capsys.readouterr().out.count("no plots: matplotlib is not installed") == 1 and not (judged / "bare.png").exists()


@long
def test_memory_stays_below_two_gigabytes_at_48800_cells():
    """The largest steps of FID, KID and precision/recall for 24,400 cells a side, in a process of its own (minutes)."""
    code = ("import resource, numpy as np, evaluate as e; r = np.random.default_rng(0); x, y = (r.random((24400, 2048), dtype=np.float32) for _ in 'ab');"
            "e.check_sets(x, y); e.frechet_distance(x, y); e.kid(x, y, subsets=2); e.neighbour_radii(x[:1024], [3, 5]); e.squared_distances(y[:512], x);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True)
    assert float(found.stdout) < 2


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
    both = []
    for context in (contextlib.nullcontext, train.plain_layers):
        with context():
            both.append([model.spread_vector(f, w0), *(model.interleave(model.double_and_convolve(h, w1, padding)) for padding in (4, 2))])
    assert both[0][1].shape == (2, 4, 14, 14) and both[0][2].shape == (2, 4, 10, 10)
    pairs = [(*pair, inputs) for *pair, inputs in zip(*both, [[w0], [h, w1], [h, w1]])]
    for fast, plain, inputs in pairs:
        assert (fast - plain).abs().max() < 1e-12
        seed = torch.randn_like(plain)
        for a, b in zip(torch.autograd.grad(fast, inputs, seed), torch.autograd.grad(plain, inputs, seed)):
            assert (a - b).abs().max() < 1e-11


@on_devices
@pytest.mark.parametrize("pool", [False, True])
def test_batch_norm_is_the_plain_formula(pool, device):
    """Moments of x alone, `follow` normalised by them, pooled after it: values, all gradients of both outputs, and of each alone."""
    torch.manual_seed(0)
    bn = model.BatchNorm(3).double().to(device)
    bn.weight.data = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device=device)  # a negative one turns the largest into the smallest
    x, follow, kernel = (torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True) for shape in ((4, 2, 6, 4), (2, 2, 6, 4), (3, 2, 1, 1)))
    var, mean = torch.var_mean(F.conv2d(x, kernel), (0, 2, 3), correction=0)

    def run():
        weight = bn.upright(kernel) if pool else kernel
        return bn(F.conv2d(x, weight), F.conv2d(follow, weight), pool=pool)

    fast = run()
    assert torch.allclose(bn.running_var, 0.9 + 0.1 * var) and torch.allclose(bn.running_mean, 0.1 * mean)  # biased
    with train.plain_layers():
        plain = run()
    assert model.BatchNorm.forward.__module__ == "model"  # what plain_layers replaced is back
    for a, b in zip(fast, plain):
        assert a.shape[2] == (3 if pool else 6) and (a - b).abs().max() < 1e-12
    seeds = [torch.randn_like(a) for a in fast]
    for which in ([0, 1], [0], [1]):
        inputs = [x, kernel, bn.weight, bn.bias] + [follow] * (1 in which)
        pair = [torch.autograd.grad([out[k] for k in which], inputs, [seeds[k] for k in which], retain_graph=True) for out in (fast, plain)]
        for a, b in zip(*pair):
            assert (a - b).abs().max() < 1e-11
    bn.eval()
    (y, y_follow), (plain, plain_follow) = run(), F.conv2d(torch.cat([x, follow]), kernel).tensor_split([4])
    expected = [(v - bn.running_mean[:, None, None]) / (bn.running_var + 1e-8).sqrt()[:, None, None] * bn.weight[:, None, None] for v in (plain, plain_follow)]
    for a, b in zip((y, y_follow), expected):
        assert torch.allclose(a, F.max_pool2d(b, 2) if pool else b)


def test_moments_keep_their_digits():
    """The mean and variance of a large map in float32: torch's kernel over all pixels at once loses three digits, by columns none."""
    x = model.channels_last(10 + torch.randn(64, 4, 64, 64, generator=torch.Generator().manual_seed(0)))
    bn = model.BatchNorm(4)
    bn(x)
    exact = x.double().var((0, 2, 3), correction=0)
    assert (bn.running_var.double() - 0.9 - 0.1 * exact).abs().max() < 5e-7  # 1 part in 2e5 of the batch's share is 5e-7


def test_bf16_is_the_same_step_roughly():
    """bf16 keeps 8 bits: at these random weights the losses move by 0.2 %, the gradients of pixel loss, learned metric and D by 4, 30 and
    16 % of their norm (2.5 % for the metric on a trained run). Twice that is the tolerance; a wrong path moves them by more than all."""
    f, x, x_real = (v.float() for v in rule_batch())
    found = []
    for amp in (None, torch.bfloat16):
        G, D = (net.float() for net in released_pair(rule_value))
        loss_pix, hidden, loss_d, *_ = train.losses(G, D, f, x, x_real, amp)
        grads = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss, net in ((loss_pix, G), (hidden.sum(), G), (loss_d, D))]
        found.append([torch.stack([loss_pix, hidden.sum(), loss_d]), *(torch.cat([g.flatten() for g in parts]) for parts in grads)])
    for exact, rough, tolerance in zip(*found, (0.004, 0.1, 0.6, 0.32)):
        assert 0 < (rough - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("device", ["cpu", "cpu, as a GPU normalises", pytest.param("cuda", marks=needs_cuda)])
def test_the_fast_step_is_the_plain_one(device, monkeypatch):
    """Gradients of a whole step in float64, as it runs by default and with the plain layers: the same function."""
    if "as a GPU" in device:
        monkeypatch.setattr(model, "columns_of", lambda x: 1)
        device = "cpu"
    f, x, x_real = (v.to(device) for v in rule_batch())
    found = []
    for context in (contextlib.nullcontext, train.plain_layers):
        G, D = (net.to(device) for net in released_pair(rule_value))
        with context():
            loss_pix, hidden, loss_d, *_ = train.losses(G, D, f, x, x_real)
            found.append([*torch.autograd.grad(loss_pix + hidden.sum(), list(G.parameters()), retain_graph=True),
                          *torch.autograd.grad(loss_d, list(D.parameters()))])
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 1e-11 * max(1, b.abs().max())


def test_compiled_gradients_are_the_eager_ones(monkeypatch):
    """What --compile trains with: traced (without inductor, which needs a compiler), its gradients are those of the eager step."""
    monkeypatch.setattr("torch._functorch.config.donated_buffer", False)
    torch.manual_seed(0)
    f, x, x_real, found = torch.randn(4, 5), torch.rand(4, 3, 68, 68), torch.rand(4, 3, 68, 68), []
    nets = model.networks("cp2image", 5)
    for compiled in (False, True):
        G, D = copy.deepcopy(nets)
        if compiled:
            G.compile(backend="aot_eager"), D.compile(backend="aot_eager")
        loss_pix, hidden, loss_d, *_ = train.losses(G, D, f, x, x_real)
        found.append([*torch.autograd.grad(loss_pix + hidden.sum(), list(G.parameters()), retain_graph=True),
                      *torch.autograd.grad(loss_d, list(D.parameters()))])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


def test_folded_generator_is_the_plain_one():
    torch.manual_seed(0)
    G = model.Generator(7, 2).double()
    for bn in (m for m in G.modules() if isinstance(m, model.BatchNorm)):
        for value in (bn.weight, bn.bias, bn.running_mean):
            value.data.normal_()
        bn.running_var.uniform_(0.5, 2)
    f = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        assert (G.eval()(f) - model.Folded(G)(f)).abs().max() < 1e-11


def test_hidden_ramp():
    assert train.hidden_weights(2500, 2500).tolist() == [0, 0, 0, 0]
    assert train.hidden_weights(6000, 2500).tolist() == train.hidden_weights(torch.tensor(6000), 2500).tolist() == pytest.approx([1, 0.4, 0, 0])
    assert train.hidden_weights(20000, 2500).tolist() == [1, 1, 1, 1] == train.hidden_weights(0, 0).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: the simulator, crops, splits, standardisation, interruption


@pytest.fixture(scope="session")
def folder_path(tmp_path_factory):
    """A prepared folder of 400 simulated cells, split by plate."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.main(["--simulate", "400", "--out", str(out), "--split", "plate", "--workers", "1"])
    return out


def one_cell(**changes):
    """A row of the renderer's parameters for an average cell; keys are the ends of their names."""
    row = {name: float(centre) for name, (centre, _) in prepare.PARAMETERS.items()}
    for end, value in changes.items():
        (name,) = [n for n in row if n.endswith(end)]
        row[name] = value
    return pd.DataFrame([row])


def test_simulated_folder_holds_what_it_says(folder_path):
    folder = data.open_folder(folder_path)
    counts = folder.meta["counts"]
    assert len(folder) == counts["cells"] == 400 and folder.patches.shape == (400, 3, 68, 68) and folder.patches.dtype == np.uint16
    assert folder.channels == ["DAPI", "Tubulin", "Actin"] and (folder.patches[:50] % 16 == 0).all()  # 12 bits in the high bits, as BBBC021
    assert counts["mechanisms"] == 12 and counts["treatments"] == 27 and counts["plates"] == 12
    assert {"Nuclei_AreaShape_Area", "Nuclei_AreaShape_Orientation", "Nuclei_Intensity_MeanIntensity_DAPI", "Cytoplasm_AreaShape_Area",
            "Nuclei_Noise_0"} <= set(folder.features)
    assert np.isfinite(folder.raw).all()
    prepare.main(["--check", str(folder_path)])


def test_renderer_draws_its_parameters():
    """Area, direction (CellProfiler: down-right is +45) and intensities of the drawn nucleus are those asked for; noise columns change nothing."""
    background = np.array(prepare.BACKGROUND)[:, None, None]
    for area in (500, 900, 1400):
        x = prepare.render(one_cell(Nuclei_AreaShape_Area=area, MeanIntensity_DAPI=0.2))[0] - background
        mask = x[0] > 0.1 * 0.9  # half of the nucleus' brightness
        assert mask.sum() == pytest.approx(area, rel=0.06)
        assert x[0][x[0] > 0.18 * 0.8].mean() == pytest.approx(0.2, rel=0.05)
        middle = np.array(np.nonzero(mask)).mean(1)
        assert middle == pytest.approx([33.5, 33.5], abs=1)
    for angle in (-60, 0, 45, 80):
        x = prepare.render(one_cell(Nuclei_AreaShape_Eccentricity=0.9, Nuclei_AreaShape_Orientation=angle))[0] - background
        row, col = np.nonzero(x[0] > 0.06)
        (rr, rc), (_, cc) = np.cov(row, col)
        assert np.degrees(np.arctan2(2 * rc, rr - cc)) / 2 == pytest.approx(angle, abs=4)
    bright = [prepare.render(one_cell(MeanIntensity_Tubulin=v))[0][1].mean() for v in (0.05, 0.1, 0.2)]
    assert bright[0] < bright[1] < bright[2]


def test_simulated_treatments_change_what_they_should():
    cells, table = prepare.simulate_table(2000, 0)
    area = table["Nuclei_AreaShape_Area"].groupby(cells["moa"]).median()
    assert area["Aurora kinase inhibitors"] / area["DMSO"] == pytest.approx(1.6, abs=0.15)
    doses = table["Cytoplasm_AreaShape_Area"][cells["compound"] == "latrunculin B"].groupby(cells["concentration"]).median()
    assert doses[3] < doses[1] < table["Cytoplasm_AreaShape_Area"][cells["moa"] == "DMSO"].median()
    assert cells.groupby("compound")["plate"].apply(lambda p: p.str.split("_").str[0].nunique()).drop("DMSO").max() == 1  # a compound lives in one week
    assert cells.groupby("moa")["compound"].nunique().drop("DMSO").min() == 2  # NSC needs another compound of the mechanism


@pytest.mark.parametrize("by", ["cell", "field", "well", "plate", "compound"])
def test_no_group_in_two_splits(by):
    cells, _ = prepare.complete_cells(prepare.simulate_table(3000, 0)[0])
    cells["split"] = prepare.split_cells(cells, by, 0)
    key = {"cell": cells["cell"], "well": cells["plate"] + cells["well"]}.get(by)
    assert cells.groupby(cells[by] if key is None else key)["split"].nunique().max() == 1
    share = cells["split"].value_counts(normalize=True)
    assert share["train"] == pytest.approx(0.8, abs=0.06) and share["val"] == pytest.approx(0.1, abs=0.05)
    if by == "compound":
        assert set(cells["split"][cells["compound"] == "DMSO"]) == {"train"}  # over 10 % of all cells
    assert (prepare.split_cells(cells, by, 0) == cells["split"]).all() and (prepare.split_cells(cells, by, 1) != cells["split"]).any()


def test_a_split_that_would_be_empty_is_refused():
    cells, _ = prepare.complete_cells(prepare.simulate_table(500, 0)[0])
    with pytest.raises(data.InputError, match="--split plate: 3 groups leave no cell for val"):
        prepare.split_cells(cells[cells["plate"].str.startswith("Week1")].reset_index(drop=True), "plate", 0)


@pytest.fixture(scope="session")
def crops_path(folder_path, tmp_path_factory):
    """The same 400 cells as crops that circulate: stored DAPI, Actin, Tubulin, with metadata.csv and a table of measurements, shuffled."""
    out, folder = tmp_path_factory.mktemp("crops"), data.open_folder(folder_path)
    cells = folder.cells
    for i, (field, cell) in enumerate(zip(cells["field"], cells["cell"])):
        (out / field).mkdir(exist_ok=True)
        np.save(out / field / f"{cell}.npy", folder.patches[i][[0, 2, 1]].transpose(1, 2, 0))
    names = {"cell": "Single_Cell_Image_Id", "field": "Multi_Cell_Image_Name", "plate": "Image_Metadata_Plate_DAPI", "well": "Image_Metadata_Well_DAPI",
             "replicate": "Replicate", "compound": "Image_Metadata_Compound", "concentration": "Image_Metadata_Concentration", "moa": "moa"}
    metadata = cells.rename(columns=names)[list(names.values())]
    metadata["Single_Cell_Image_Id"] += ".npy"
    metadata.sample(frac=1, random_state=0).to_csv(out / "metadata.csv", index=False)
    table = pd.DataFrame(np.array(folder.raw), columns=folder.features)
    table.insert(0, "Single_Cell_Image_Id", cells["cell"] + ".npy")
    table["segmentation_ok"], table["Nuclei_Location_Center_X"], table["Nuclei_AreaShape_CentralMoment_0_1"] = 1, 34.5, 1e-14
    table["Cells_AreaShape_Flat"], table["Cells_AreaShape_Copy"] = 7.0, table["Cells_AreaShape_Area"]
    table["Nuclei_Texture_Holes"] = np.where(np.arange(400) % 10 == 0, np.nan, np.arange(400.0))  # 10 % missing
    table.loc[5, "Nuclei_AreaShape_Area"] = np.nan
    table.loc[7, table.columns[1:]] = np.nan
    table.sample(frac=1, random_state=1).to_csv(out / "features.csv", index=False)
    return out


def crops(crops_path, out, *more):
    prepare.main(["--crops", str(crops_path), "--features", str(crops_path / "features.csv"), "--out", str(out), "--split", "plate", "--workers", "1", *more])
    return data.open_folder(out)


def test_crops_join_by_name(folder_path, crops_path, tmp_path, capsys):
    folder, original = crops(crops_path, tmp_path / "c"), data.open_folder(folder_path)
    said = capsys.readouterr().out
    assert "400 cells matched" in said and "1 cells without measurements dropped" in said and "metadata columns: Single_Cell_Image_Id, segmentation_ok" in said
    assert len(folder) == 399  # row 7 has no measurement
    place = original.cells.reset_index().set_index("cell")["index"]
    rows = place[folder.cells["cell"].str.removesuffix(".npy")].to_numpy()
    assert 7 not in rows and (folder.patches[:] == original.patches[rows]).all()  # channels back in the order DAPI, Tubulin, Actin
    column = [folder.features.index(f) for f in original.features]
    same = np.isclose(folder.raw[:, column], original.raw[rows], rtol=1e-5)  # the CSV has 7 digits or so
    assert (~same).sum() == 1  # the imputed one
    assert folder.meta["imputed"] == {"Nuclei_AreaShape_Area": 1}
    j = folder.features.index("Nuclei_AreaShape_Area")
    assert folder.raw[np.flatnonzero(rows == 5)[0], j] == pytest.approx(folder.meta["centre"][j], rel=1e-6)
    dropped = folder.meta["dropped"]
    assert dropped["Nuclei_Location_Center_X"].startswith("a place") and dropped["Nuclei_AreaShape_CentralMoment_0_1"] == "zero by definition"
    assert dropped["Cells_AreaShape_Flat"].startswith("no spread") and "missing" in dropped["Nuclei_Texture_Holes"]
    assert "Cells_AreaShape_Copy" in folder.features  # identical columns stay by default
    assert (folder.cells["split"] != "").all() and set(folder.cells["moa"]) == set(original.cells["moa"])


def test_options_of_preparation(crops_path, tmp_path, capsys):
    folder = crops(crops_path, tmp_path / "a", "--drop-duplicates", "--columns", "^Cells_AreaShape", "--limit", "200", "--seed", "3")
    assert len(folder) == 200 and all(f.startswith("Cells_AreaShape") for f in folder.features)
    assert folder.meta["dropped"]["Cells_AreaShape_Copy"] == "identical to Cells_AreaShape_Area" and folder.meta["dropped"]["Nuclei_AreaShape_Area"] == "not kept by --columns"
    (tmp_path / "out.csv").write_text("plate,well\n" + "".join(f"{p},{w}\n" for p, w in set(zip(folder.cells["plate"], folder.cells["well"])) if p.startswith("Week1")))
    other = crops(crops_path, tmp_path / "b", "--exclude", str(tmp_path / "out.csv"), "--taxol-controls", "drop", "--stored-order", "Actin,DAPI,Tubulin")
    assert "cells excluded by" in capsys.readouterr().out and not ((other.cells["compound"] == "taxol") & (other.cells["concentration"] == 0.3)).any()
    first = folder.cells["cell"][~folder.cells["plate"].str.startswith("Week1")].iloc[0]
    a, b = (f.patches[int(np.flatnonzero(f.cells["cell"] == first)[0])] for f in (folder, other))
    assert (b == a[[2, 1, 0]]).all()  # the files hold DAPI, Actin, Tubulin: called Actin, DAPI, Tubulin, the outer two change places


def test_taxol_controls_are_told_from_the_treatment():
    cells = pd.DataFrame({"plate": ["Week1_22123", "Week1_22123", "Week10_40111", "Week1_22123"], "well": ["D05", "B11", "D05", "D06"],
                          "compound": ["taxol"] * 4, "concentration": [0.3, 0.3, 0.3, 1.0]})
    stay, report = prepare.choose_cells(cells, "drop", None, None, 0)
    assert stay.tolist() == [True, False, False, True] and "2 cells of taxol" in report[0]
    assert prepare.choose_cells(cells, "keep", None, None, 0)[0].all()


def test_training_standardisation(folder_path):
    folder = data.open_folder(folder_path)
    z = model.standardise(*folder.measurements(folder.rows("train"))).double()
    assert z.mean(0).abs().max() < 1e-4 and (z.std(0, correction=0) - 1).abs().max() < 1e-3  # fitted on all training cells
    raw, centre, scale = folder.measurements(folder.rows("test"))
    z = model.standardise(raw, centre, scale)
    assert torch.allclose((z.double() * scale + centre)[z.abs() < 10], raw.double()[z.abs() < 10], rtol=1e-5)  # invertible
    assert model.standardise(torch.tensor([[1e9, float("nan")]]), centre[:2], scale[:2]).tolist() == [[10.0, 0.0]]


def test_plate_dmso_standardisation(crops_path, tmp_path):
    folder = crops(crops_path, tmp_path / "p", "--normalise", "plate-dmso")
    cells = folder.cells
    dmso = (cells["compound"] == "DMSO").to_numpy()
    train_plate = cells["plate"][cells["split"] == "train"].iloc[0]
    for plate in sorted(set(cells["plate"])):
        here = (cells["plate"] == plate).to_numpy()
        z = model.standardise(*folder.measurements(np.flatnonzero(here & dmso))).double()
        usual = z.abs().amax(0) < 10  # no clipped value
        assert z.mean(0)[usual].abs().max() < 1e-3  # every plate is centred on its own DMSO cells
        held_out = not (here & (cells["split"] == "train").to_numpy()).any()
        assert set(cells["split"][here & dmso]) == ({"reference"} if held_out else {"train"})
    G = model.Generator(len(folder.features))
    G.features, G.normalise, G.centre, G.scale = folder.features, "plate-dmso", folder.centre, folder.scale
    rows = np.flatnonzero(cells["plate"] == train_plate)
    table = pd.DataFrame(np.array(folder.raw[rows]), columns=folder.features)
    with pytest.raises(model.InputError, match="needs a column plate and compound"):
        model.standardise_table(G, table)
    table["plate"], table["compound"] = train_plate, cells["compound"].to_numpy()[rows]
    same = model.standardise_table(G, table)
    assert torch.allclose(same, model.standardise(*folder.measurements(rows)), atol=1e-4)  # two ways to one number
    table["compound"] = "taxol"
    with pytest.raises(model.InputError, match=f"plate {train_plate}: 0 rows of compound DMSO"):
        model.standardise_table(G, table)
    (tmp_path / "no_dmso.csv").write_text("plate,compound\n" + train_plate + ",DMSO\n")
    with pytest.raises(data.InputError, match=f"plate {train_plate}: 0 DMSO cells"):
        crops(crops_path, tmp_path / "q", "--normalise", "plate-dmso", "--exclude", str(tmp_path / "no_dmso.csv"))


def test_an_interrupted_preparation_goes_on(crops_path, tmp_path, monkeypatch):
    """Stopped in the middle and started again: the same bytes as in one go; and another call does not mix with what is left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(prepare, "CROPS_AT_ONCE", 32)
    crops(crops_path, whole)
    unit, seen = prepare.crops_unit, []

    def dies(files):
        seen.append(1)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return unit(files)
    monkeypatch.setattr(prepare, "crops_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        crops(crops_path, parts)
    assert not parts.exists() and (tmp_path / "parts.partial").is_dir()
    with pytest.raises(data.InputError, match="an interrupted preparation with other options"):
        crops(crops_path, parts, "--drop-duplicates")
    seen[:] = [1] * 100
    crops(crops_path, parts)
    assert len(seen) - 100 == 13 - 6  # 400 cells in units of 32, six of them were done
    for name in ("patches.npy", "features.npy", "cells.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert json.loads((whole / "meta.json").read_text())["checksums"] == json.loads((parts / "meta.json").read_text())["checksums"]
    assert not (tmp_path / "parts.partial").exists()


def test_workers_and_limit_do_not_change_a_cell(folder_path, tmp_path):
    prepare.main(["--simulate", "400", "--out", str(tmp_path / "w"), "--split", "plate", "--workers", "2", "--limit", "150"])
    few, all_ = data.open_folder(tmp_path / "w"), data.open_folder(folder_path)
    assert len(few) == 150
    rows = all_.cells.reset_index().set_index("cell")["index"][few.cells["cell"]].to_numpy()
    assert (few.patches[:] == all_.patches[rows]).all()


def test_bad_crops(crops_path, tmp_path, capsys):
    spoiled = tmp_path / "crops"
    shutil.copytree(crops_path, spoiled)
    files = sorted(spoiled.rglob("*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    np.save(files[1], np.zeros((10, 10, 3), np.uint16))
    files[2].unlink()
    with pytest.raises(data.InputError, match="npy: (missing or unreadable|uint16 \\(10, 10, 3\\), expected uint16 \\(68, 68, 3\\)).*--skip-bad"):
        crops(spoiled, tmp_path / "x")
    shutil.rmtree(tmp_path / "x.partial")
    folder = crops(spoiled, tmp_path / "x", "--skip-bad")
    assert len(folder) == 396 and folder.meta["counts"]["bad_patches"] == 3 and "3 bad patches skipped" in capsys.readouterr().out
    names = {p.stem for p in files[:3]}
    assert not names & set(folder.cells["cell"].str.removesuffix(".npy"))
    original = crops(crops_path, tmp_path / "y")
    rows = original.cells.reset_index().set_index("cell")["index"][folder.cells["cell"]].to_numpy()
    assert (folder.patches[:] == original.patches[rows]).all()


def spoil(crops_path, tmp_path, change):
    """A table of measurements with one change -> arguments of a call."""
    table = pd.read_csv(crops_path / "features.csv", dtype=str, keep_default_na=False)
    change(table).to_csv(tmp_path / "t.csv", index=False)
    return ["--crops", str(crops_path), "--features", str(tmp_path / "t.csv"), "--out", str(tmp_path / "o"), "--workers", "1"]


def text_in(table):
    table.loc[3, "Cells_AreaShape_Area"] = "large"
    return table


REFUSED_TABLES = {
    "text where a number should be": (text_in, r"t.csv, row 5, column Cells_AreaShape_Area: 'large' is not a number"),
    "no key": (lambda t: t.rename(columns={"Single_Cell_Image_Id": "id"}), "no key column 'Single_Cell_Image_Id'"),
    "doubled key": (lambda t: pd.concat([t, t[:1]]), "stands in more than one row"),
    "no feature": (lambda t: t[["Single_Cell_Image_Id", "segmentation_ok"]], "no feature column"),
    "other cells": (lambda t: t.assign(Single_Cell_Image_Id="x" + t["Single_Cell_Image_Id"]), "0 cells matched"),
}


@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_refused_tables(case, crops_path, tmp_path):
    change, message = REFUSED_TABLES[case]
    with pytest.raises(data.InputError, match=message):
        prepare.main(spoil(crops_path, tmp_path, change))
    assert not (tmp_path / "o").exists()


def test_refused_calls_of_prepare(crops_path, folder_path, tmp_path, capsys):
    crop_args = ["--crops", str(crops_path), "--features", str(crops_path / "features.csv")]
    for argv, message in [
        (["--simulate"], "--out DIR is needed"), (["--crops", "x", "--out", "y"], "needs --features"), (["--simulate", "5", "--out", "y"], "expected 100 or more"),
        ([*crop_args, "--out", "y", "--columns", "("], "no regular expression"), ([*crop_args, "--out", "y", "--limit", "0"], "expected 1 or more"),
    ]:
        with pytest.raises(SystemExit):
            prepare.main(argv)
        assert message in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("plat\nx\n")
    (tmp_path / "moa.csv").write_text("compound,concentration\ntaxol,0.3\n")
    for argv, message in [
        (["--crops", str(tmp_path / "none"), "--features", "f.csv", "--out", str(tmp_path / "n")], "no such folder of crops"),
        ([*crop_args, "--out", str(tmp_path / "n"), "--stored-order", "DAPI,Actin"], "expected DAPI, Tubulin, Actin in some order"),
        ([*crop_args, "--out", str(tmp_path / "n"), "--exclude", str(tmp_path / "empty.csv")], "expected a CSV with columns among"),
        ([*crop_args, "--out", str(tmp_path / "n"), "--exclude", str(tmp_path / "nothing.csv")], "nothing.csv: not readable as CSV"),
        ([*crop_args, "--out", str(tmp_path / "n"), "--moa", str(tmp_path / "moa.csv")], "no column 'moa'"),
        (["--simulate", "--out", str(folder_path)], "exists already; choose another --out"),
        (["--check", str(tmp_path)], "not a prepared folder"),
    ]:
        with pytest.raises(data.InputError, match=message):
            prepare.main(argv)
    prepare.main(["--simulate", "400", "--out", str(folder_path), "--split", "plate"])
    assert "already prepared" in capsys.readouterr().out


def test_changed_folders_are_noticed(folder_path, tmp_path, capsys):
    copy_ = tmp_path / "copy"
    shutil.copytree(folder_path, copy_)
    prepare.main(["--check", str(copy_)])
    with open(copy_ / "features.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(data.InputError, match="changed; prepare it again"):
        prepare.main(["--check", str(copy_)])
    assert "features.npy: CHANGED" in capsys.readouterr().out

    def spoiled(name, change, message):
        saved = (copy_ / name).read_bytes()
        change(copy_ / name)
        with pytest.raises(data.InputError, match=message):
            data.open_folder(copy_)
        (copy_ / name).write_bytes(saved)
    spoiled("patches.npy", lambda p: p.write_bytes(p.read_bytes()[:-100]), "patches.npy: missing or cut short")
    spoiled("patches.npy", lambda p: p.unlink(), "patches.npy: missing or cut short")
    spoiled("patches.npy", lambda p: np.save(p, np.zeros((2, 3, 68, 68), np.uint8)), r"uint8 \(2, 3, 68, 68\), meta.json says uint16 \(400")
    spoiled("cells.csv", lambda p: p.write_text("a,b\n1,2\n"), "cells.csv: 1 rows with columns")
    spoiled("meta.json", lambda p: p.write_text("{"), "not readable as JSON")
    spoiled("meta.json", lambda p: p.write_text('{"format": "x"}'), "expected 'cp2image-folder-1'")


# ---------------------------------------------------------------------------------------------------------------------
# Batches and images


def test_a_batch_is_one_cell_per_treatment(folder_path):
    folder = data.open_folder(folder_path)
    rows = folder.rows("train")
    sampler = data.TreatmentSampler(rows, folder.treatment)
    drawn = sampler.draw(0, 5, 0)
    assert len(drawn) == 27 and sorted(folder.treatment[drawn]) == list(range(27)) and set(drawn) <= set(rows)
    assert (drawn == sampler.draw(0, 5, 0)).all()
    for other in (sampler.draw(1, 5, 0), sampler.draw(0, 6, 0), sampler.draw(0, 5, 1)):
        assert (drawn != other).any()
    large, small = data.TreatmentSampler(rows, folder.treatment, 60).draw(0, 0, 0), data.TreatmentSampler(rows, folder.treatment, 10).draw(0, 0, 0)
    assert np.bincount(folder.treatment[large], minlength=27).min() >= 2 and len(set(folder.treatment[small])) == 10
    seen = np.concatenate([sampler.draw(0, s, 0) for s in range(1500)])
    assert set(seen) == set(rows)  # every training cell comes up


def test_images_in_0_to_1():
    x = torch.tensor([0.0, 100, 50, 65535]).reshape(1, 1, 2, 2)
    black = torch.zeros(1, 1, 2, 2)
    both = data.scale_images(torch.cat([x, black], 1), "cell-max")
    assert both[0, 0].flatten().tolist() == pytest.approx([0, 100 / 65535, 50 / 65535, 1]) and (both[0, 1] == 0).all()  # black gives zeros, not NaN
    assert data.scale_images(x, "percentile", [100]).flatten().tolist() == [0, 1, 0.5, 1]
    with pytest.raises(data.InputError, match="expected cell-max or percentile"):
        data.scale_images(x, "max")
    colour = data.composite(torch.tensor([1.0, 0.5, 0.0]).reshape(1, 3, 1, 1))
    assert colour.flatten().tolist() == [0, 128, 255]  # DAPI blue, tubulin green, actin red


def test_white_level_is_the_quantile(folder_path):
    folder = data.open_folder(folder_path)
    pixels = np.array(folder.patches[folder.rows("train")])
    for c in range(3):
        assert (pixels[:, c] <= folder.white[c]).mean() >= 0.999 > (pixels[:, c] < folder.white[c]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Training: it learns, repeats itself, resumes bit for bit, and stops cleanly


def fresh(seed=0, features=28):
    torch.manual_seed(seed)
    G, D = model.Generator(features), model.Discriminator()
    return G, D, torch.optim.Adam(G.parameters(), lr=0.01, eps=1e-7), torch.optim.SGD(D.parameters(), lr=0.001, momentum=0.9)


def test_overfits_one_batch(folder_path):
    folder = data.open_folder(folder_path)
    G, D, opt_g, opt_d = fresh()
    f, x = train.load_batch(folder, folder.rows("train")[:8], "cell-max", "cpu")
    terms = [train.cp2image_step(G, D, opt_g, opt_d, f, x, x, step, ramp=2500) for step in range(40)]
    first, last = terms[0][3], torch.stack(terms[-5:])[:, 3].mean()
    assert last < 0.15 * first, (first, last)
    shuffled = model.pixel_loss(x.roll(1, 0), train.losses(G, D, f, x, x)[5])
    assert shuffled > 1.5 * last  # each image is that of its own features


@pytest.mark.parametrize("order", ["shared", "alternate"])
def test_what_each_optimiser_moves(order, folder_path):
    """With a rate of 0 a network only shrinks by its decay; batch norm is not decayed; the alternate order uses the updated generator."""
    folder = data.open_folder(folder_path)
    f, x = train.load_batch(folder, folder.rows("train")[:6], "cell-max", "cpu")
    for still in ("G", "D"):
        G, D, opt_g, opt_d = fresh()
        net, optimiser = (G, opt_g) if still == "G" else (D, opt_d)
        optimiser.param_groups[0]["lr"] = 0.0
        before = {k: v.clone() for k, v in net.named_parameters()}
        other = copy.deepcopy((D if still == "G" else G).state_dict())
        train.cp2image_step(G, D, opt_g, opt_d, f, x, x.flip(0), 0, order=order)
        for k, v in net.named_parameters():
            assert torch.equal(v, before[k] * (1 - 1e-4) if v.ndim == 4 else before[k])
        assert any(not torch.equal(v, other[k]) for k, v in (D if still == "G" else G).named_parameters())


def test_the_orders_differ_in_the_discriminator_only(folder_path):
    folder = data.open_folder(folder_path)
    f, x = train.load_batch(folder, folder.rows("train")[:6], "cell-max", "cpu")
    states = []
    for order in ("shared", "alternate"):
        G, D, opt_g, opt_d = fresh()
        train.cp2image_step(G, D, opt_g, opt_d, f, x, x.flip(0), 0, order=order)
        states.append((G.conv1.weight.detach(), D.conv0.parametrizations.weight.original.detach()))
    assert torch.allclose(states[0][0], states[1][0]) and not torch.allclose(states[0][1], states[1][1], atol=1e-7)


def run_train(folder_path, run, *more, steps=4):
    argv = ["--data", str(folder_path), "--run", str(run), "--steps", str(steps), "--batch", "6", "--hidden-ramp", "1", "--val-every", "2",
            "--save-every", "2", "--log-every", "1", "--sample-every", "100", "--device", "cpu", *more]
    train.main(argv)
    return model.read_checkpoint(run / "last.pt")


@pytest.fixture(scope="session")
def run_path(folder_path, tmp_path_factory):
    """A run of four steps on the simulated folder, with averaged weights."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_train(folder_path, run, "--ema", "0.5")
    return run


def equal_states(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a if k != "command")
    return a == b


def test_one_seed_repeats_two_differ_and_resume_is_exact(folder_path, run_path, tmp_path, capsys):
    reference = model.read_checkpoint(run_path / "last.pt")
    assert equal_states(reference, run_train(folder_path, tmp_path / "again", "--ema", "0.5"))
    assert not equal_states(reference["G"], run_train(folder_path, tmp_path / "other", "--ema", "0.5", "--seed", "1")["G"])
    part = run_train(folder_path, tmp_path / "part", "--ema", "0.5", steps=2)
    assert part["step"] == 2 and not equal_states(part["G"], reference["G"])
    with open(tmp_path / "part" / "log.csv", "a") as file:
        file.write("3,9,9,9,9,9,9,9,9,9,9,,,,\n")  # a step that was logged but not saved before a crash
    assert equal_states(reference, run_train(folder_path, tmp_path / "part", "--ema", "0.5", "--resume"))
    log, whole = (pd.read_csv(p / "log.csv").drop(columns="cells_per_s") for p in (tmp_path / "part", run_path))
    pd.testing.assert_frame_equal(log, whole)  # each step once
    capsys.readouterr()
    run_train(folder_path, tmp_path / "part", "--ema", "0.5", "--resume")
    assert "has its 4 steps" in capsys.readouterr().out


def test_what_a_run_leaves(folder_path, run_path):
    assert {p.name for p in run_path.iterdir()} == {"last.pt", "best.pt", "log.csv", "args.json", "samples"}  # and nothing temporary
    assert [p.name for p in (run_path / "samples").iterdir()] == ["step000004.png"]
    log = pd.read_csv(run_path / "log.csv")
    assert list(log.columns) == ["step", *train.TERMS["cp2image"], "cells_per_s", *train.VALIDATION] and log["step"].tolist() == [1, 2, 3, 4] and log["val_pix"].notna().tolist() == [False, True, False, True]
    assert json.loads((run_path / "args.json").read_text())["seed"] == 0
    state, best = model.read_checkpoint(run_path / "last.pt"), model.read_checkpoint(run_path / "best.pt")
    assert best["best"] == pytest.approx(log["val_pix"].min(), rel=1e-5) and "opt_g" not in best
    assert not equal_states(state["G"], state["G_ema"])
    G, averaged = model.load(run_path / "last.pt"), model.Generator(28)
    averaged.load_state_dict(state["G_ema"])
    assert equal_states(dict(G.state_dict()), dict(model.Folded(averaged).state_dict())) and not G.training
    pixels, hidden = train.evaluate_losses(G, model.load_metric(run_path / "last.pt"), data.open_folder(folder_path), np.arange(10), "cell-max", "cpu")
    assert 0 < pixels < float("inf") and 0 < hidden < float("inf")


@pytest.mark.parametrize("flags", [["--order", "alternate"], ["--spectral-norm", "off"], ["--d-batch-norm", "off"], ["--image-norm", "percentile"],
                                   ["--hidden-weight", "0"], ["--amp", "bf16"]], ids=" ".join)
def test_ablations_run(flags, folder_path, run_path, tmp_path):
    state = run_train(folder_path, tmp_path / "run", *flags, steps=2)
    log = pd.read_csv(tmp_path / "run" / "log.csv")
    assert np.isfinite(log[["loss_d", "loss_pix", "loss_hidden", "val_pix"]].iloc[-1]).all()
    assert not equal_states(state["G"], model.read_checkpoint(run_path / "last.pt")["G"])
    assert (state["white"] is not None) == ("percentile" in flags)


BASELINES = ("vae", "vaeplus", "lsgan", "dcgan", "wgan")


def test_parameters_and_sizes_of_the_baselines():
    """SPEC's counts; GANs at other sizes and channels; the VAE refuses what its layers cannot take."""
    for latent, encoder in ((256, 464_416), (453, 780_404)):
        vae = model.VAE(latent)
        assert model.count_parameters(vae) - model.count_parameters(vae.decoder) == encoder
    assert model.count_parameters(model.VAE().decoder) == 281_958
    assert model.count_parameters(model.NoiseGenerator(3, 96)) == 4_875_267 and model.count_parameters(model.NoiseDiscriminator(3, 96)) == 4_764_681
    for channels, size in ((3, 96), (1, 64), (5, 68), (2, 33)):
        x = model.NoiseGenerator(channels, size)(torch.randn(2, 100))
        assert x.shape == (2, channels, size, size) and 0 <= x.min() and x.max() <= 1
        assert model.NoiseDiscriminator(channels, size)(x).shape == (2,)
    assert model.VAE(8, 2)(torch.rand(2, 2, 68, 68)).shape == (2, 2, 68, 68)
    with pytest.raises(model.InputError, match="96 x 96 pixels: the VAE's layers are made for 68 x 68"):
        model.VAE()(torch.rand(1, 3, 96, 96))
    with pytest.raises(model.InputError, match="model 'gan': expected one of cp2image, vae"):
        model.networks("gan", 7)


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_repeat_and_resume(kind, folder_path, tmp_path):
    """Their noise is a function of (seed, step): a resumed run is the whole one, bit for bit; the checkpoint loads and draws."""
    flags = ["--model", kind, "--ema", "0.5", "--val-every", "1"]
    whole = run_train(folder_path, tmp_path / "whole", *flags, steps=3)
    run_train(folder_path, tmp_path / "part", *flags, steps=2)
    assert equal_states(whole, run_train(folder_path, tmp_path / "part", *flags, "--resume", steps=3))
    log = pd.read_csv(tmp_path / "whole" / "log.csv")
    assert np.isfinite(log[train.TERMS[kind]].to_numpy()).all()
    assert log["val_pix"].notna().all() == (tmp_path / "whole/best.pt").is_file() == kind.startswith("vae")
    G = model.load(tmp_path / "whole/last.pt")
    x = model.sample(G, 5, 1)
    assert x.shape == (5, 3, 68, 68) and torch.allclose(x[:3], model.sample(G, 3, 1), atol=1e-4) and not torch.allclose(x, model.sample(G, 5, 2))
    with pytest.raises(model.InputError, match=f"a {kind} draws from {G.takes}, not from measurements"):
        model.generate(G, pd.DataFrame())
    assert (model.load_metric(tmp_path / "whole/last.pt") is None) == (kind == "vae")


def test_a_students_own_model(folder_path, tmp_path, monkeypatch):
    """README, "change one thing": a class of eight lines, a line in networks and a name; it trains, resumes, loads and draws."""
    readme = (HERE / "README.md").read_text()
    lines = readme.split("class Mine(nn.Module):")[1].split("```")[0]
    names = {"nn": nn, "torch": torch}
    exec("class Mine(nn.Module):" + lines, names)
    assert len([v for v in lines.splitlines() if v.strip()]) <= 8
    known = model.networks
    monkeypatch.setattr(model, "KINDS", (*model.KINDS, "mine"))
    monkeypatch.setattr(model, "networks", lambda kind, f, c=3, *more: (names["Mine"](f, c), model.Discriminator(c)) if kind == "mine" else known(kind, f, c, *more))
    state = run_train(folder_path, tmp_path / "run", "--model", "mine", steps=2)
    run_train(folder_path, tmp_path / "run", "--model", "mine", "--resume", steps=3)
    G, folder = model.load(tmp_path / "run/last.pt"), data.open_folder(folder_path)
    assert state["model"] == G.model == "mine"
    assert model.generate(G, pd.DataFrame(np.array(folder.raw[:2]), columns=folder.features)).shape == (2, 3, 68, 68)


def test_adversarial_losses():
    """The three pairs of losses by hand, on a discriminator that is known: D(x) = mean of x, whose slope has a length that follows."""
    class Mean(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return self.scale * x.mean((1, 2, 3))

    class Constant(nn.Module):
        latent = 4

        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.25))

        def forward(self, z):
            return self.level.expand(len(z), 3, 8, 8)

    x, numbers = torch.full((4, 3, 8, 8), 0.75), 3 * 8 * 8
    for kind in ("lsgan", "dcgan", "wgan"):
        G, D = Constant(), Mean(2.0)
        opts = [torch.optim.SGD(net.parameters(), lr=0.0) for net in (G, D)]
        loss_g, loss_d, real, fake = train.gan_step(G, D, *opts, None, x, x, 0, kind=kind, label_low=1.0).tolist()
        assert (real, fake) == pytest.approx((1.5, 0.5))
        sigmoid = lambda v: 1 / (1 + np.exp(-v))
        slope = 2.0 / numbers ** 0.5 / 2  # of images in -1..1
        expected = {"lsgan": (0.25, 0.5 * (0.25 + 0.25)), "wgan": (-0.5, 0.5 - 1.5 + 10 * (slope - 1) ** 2),
                    "dcgan": (-np.log(sigmoid(0.5)), -0.5 * (np.log(1 - sigmoid(0.5)) + np.log(sigmoid(1.5))))}[kind]
        assert (loss_g, loss_d) == pytest.approx(expected, rel=1e-5)
        up = G.level.grad.item()
        assert up < 0  # the generator moves towards what the discriminator calls real
    torch.manual_seed(0)
    smooth = [train.gan_step(Constant(), Mean(2.0), *opts, None, x, x, 0, kind="lsgan")[1].item() for _ in range(20)]
    assert max(smooth) > min(smooth) > 0.25  # labels of real images only, drawn anew


def test_vae_loss_by_hand(folder_path):
    """KL of N(mean, var) from N(0, 1) against torch's own, and beta weighs it."""
    folder = data.open_folder(folder_path)
    f, x = train.load_batch(folder, folder.rows("train")[:4], "cell-max", "cpu")
    torch.manual_seed(0)
    G, _ = model.networks("vae", 28)
    gradients = []
    for beta in (0.0, 2.0):
        net = copy.deepcopy(G)
        torch.manual_seed(1)  # the same draw of the latent
        kl, pix = train.vae_step(net, None, torch.optim.SGD(net.parameters(), lr=0.0), None, f, x, x, 0, beta=beta)
        gradients.append(net.conv3.weight.grad)
    _, mean, log_var = G(x, torch.zeros(4, 256))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_var).exp()), normal(0, 1)).sum(1).mean()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5) and pix > 0
    of_kl, = torch.autograd.grad(expected, [G.conv3.weight])
    assert torch.allclose(gradients[1] - gradients[0], 2 * of_kl, atol=1e-4 * gradients[1].abs().max())


@pytest.mark.parametrize("kind", ["vae", "vaeplus", "lsgan", pytest.param("dcgan", marks=long), pytest.param("wgan", marks=long)])
def test_baselines_learn(kind, folder_path, tmp_path):
    """A short run: the loss falls and free samples come closer to real cells (FD-CP5) than at the start and than noise, which has no cells."""
    folder = data.open_folder(folder_path)
    rows = folder.rows("train")
    known, real = (prepare.measurements(data.scale_images(folder.images(part), "cell-max"), folder.channels).dropna(how="all")
                   for part in (rows[:100], rows[100:200]))
    space = evaluate.fit_cp_space(known, 5)

    def far(x):
        seen = prepare.measurements(x, folder.channels).dropna(how="all")
        place = lambda frame: (evaluate.robust_z(frame, space) - space["mean"]) @ space["axes"].T
        return evaluate.frechet_distance(place(real), place(seen)) if len(seen) > 0.5 * len(x) else np.inf

    flags, steps = (["--lr-g", "0.001", "--lr-d", "0.001" if kind == "wgan" else "0.0003"], 60) if kind.endswith("gan") else ([], 30)
    run_train(folder_path, tmp_path / "start", "--model", kind, *flags, steps=1)
    run_train(folder_path, tmp_path / "run", "--model", kind, *flags, "--batch", "8", "--val-every", "100", steps=steps)
    log = pd.read_csv(tmp_path / "run/log.csv")
    loss = log["loss_d"] if kind.endswith("gan") else log["loss_pix"] + 2 * log["kl"]
    assert loss.iloc[-5:].mean() < 0.8 * loss.iloc[0]
    start, end = (far(model.sample(model.load(tmp_path / name / "last.pt"), 60)) for name in ("start", "run"))
    assert end < start and end < far(torch.rand(20, 3, 68, 68)) and np.isfinite(end), (start, end)


def test_two_processes_are_one_average(folder_path, tmp_path):
    """torchrun with gloo: one log, one checkpoint, and weights that are those of the two batches' mean gradient, each with its own moments."""
    def torchrun(run, *more):
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(HERE / "train.py"), "--data", str(folder_path),
                "--run", str(run), "--steps", "2", "--batch", "6", "--hidden-ramp", "1", "--log-every", "1", "--device", "cpu", *more]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and done.stdout.count("step      2/2") == 1, done.stdout + done.stderr
        return model.read_checkpoint(run / "last.pt")

    state, folder = torchrun(tmp_path / "run"), data.open_folder(folder_path)
    sampler = data.TreatmentSampler(folder.rows("train"), folder.treatment, 6)
    torch.manual_seed(0)
    G, D = model.networks("cp2image", 28)
    opts = torch.optim.Adam(G.parameters(), lr=0.01, eps=1e-7), torch.optim.SGD(D.parameters(), lr=0.001, momentum=0.9)
    start = copy.deepcopy((G, D))
    for step in range(2):
        grads = []
        for rank in range(2):
            g, d = copy.deepcopy(G), copy.deepcopy(D)
            f, x = train.load_batch(folder, sampler.draw(0, step, 2 * rank), "cell-max", "cpu")
            _, x_real = train.load_batch(folder, sampler.draw(0, step, 2 * rank + 1), "cell-max", "cpu")
            loss_pix, hidden, loss_d, *_ = train.losses(g, d, f, x, x_real)
            loss_g = loss_pix + (train.hidden_weights(step, 1).float() * hidden).sum()
            grads.append([*torch.autograd.grad(loss_g, list(g.parameters()), retain_graph=True), *torch.autograd.grad(loss_d, list(d.parameters()))])
            if rank == 0:
                moved = g, d
        for p, *pair in zip([*G.parameters(), *D.parameters()], *grads):
            p.grad = sum(pair) / 2
        for net, first in zip((G, D), moved):  # buffers are rank 0's, as torch's DistributedDataParallel has it
            for mine, its in zip(net.buffers(), first.buffers()):
                mine.copy_(its)
        for net, opt in zip((G, D), opts):
            train.decay(net, 1e-4)
            opt.step()
    for net, first, name in zip((G, D), start, "GD"):
        before = first.state_dict()
        for k, v in net.state_dict().items():  # Adam's first steps are signs of gradients: where one is near 0 rounding can turn it
            assert (v - state[name][k]).norm() < 0.1 * (v - before[k]).norm() + 1e-5, (name, k)


def test_a_loss_that_is_not_finite_stops_the_run(folder_path, tmp_path):
    run_train(folder_path, tmp_path / "run", steps=2)
    good = (tmp_path / "run" / "last.pt").read_bytes()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["G"]["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "run" / "last.pt")
    spoiled = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(data.InputError, match=r"not finite since step 3 \(at step 3: loss_d .*, loss_pix nan.*last.pt is the last good checkpoint"):
        run_train(folder_path, tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "last.pt").read_bytes() == spoiled != good  # not overwritten


def test_refused_calls_of_train(folder_path, run_path, tmp_path, capsys):
    base = ["--data", str(folder_path), "--device", "cpu"]
    for argv, message in [(["--steps", "0"], "--steps is 0, expected 1 or more"), (["--lr-g", "-1"], "--lr-g is -1.0, expected 0 or more"),
                          (["--batch", "2"], "batch norm needs at least 4"), (["--ema", "1.5"], "expected below 1")]:
        with pytest.raises(SystemExit):
            train.main([*base, *argv])
        assert message in capsys.readouterr().err
    for argv, message in [
        (["--data", str(tmp_path)], "not a prepared folder"), ([*base, "--run", str(run_path)], "there is a run already"),
        ([*base, "--run", str(tmp_path / "none"), "--resume"], "nothing to resume"), ([*base, "--device", "cuda:99"], "--device cuda:99: not on this machine"),
        ([*base, "--run", str(run_path), "--resume"], r"resumed with other settings: --batch 0 \(was 6\)"),
        ([*base, "--amp", "fp16", "--device", "cpu"], "fp16 needs CUDA"),
    ]:
        with pytest.raises(data.InputError, match=message):
            train.main(argv)
    shutil.copytree(run_path, tmp_path / "run")
    shutil.copytree(folder_path, tmp_path / "folder")
    meta = json.loads((tmp_path / "folder" / "meta.json").read_text())
    meta["checksums"]["cells.csv"] = "0"
    (tmp_path / "folder" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(data.InputError, match="trained on another prepared folder"):
        run_train(tmp_path / "folder", tmp_path / "run", "--ema", "0.5", "--resume")
    (tmp_path / "run" / "last.pt").write_bytes((run_path / "last.pt").read_bytes()[:5000])
    with pytest.raises(model.InputError, match="not a readable checkpoint"):
        run_train(folder_path, tmp_path / "run", "--ema", "0.5", "--resume")
    with pytest.raises(data.InputError, match="no optimiser state"):
        shutil.copy(run_path / "best.pt", tmp_path / "run" / "last.pt")
        run_train(folder_path, tmp_path / "run", "--ema", "0.5", "--resume")


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_save_and_leave(name, code, folder_path, tmp_path):
    run = tmp_path / "run"
    argv = [sys.executable, str(HERE / "train.py"), "--data", str(folder_path), "--run", str(run), "--steps", "100000", "--batch", "4", "--log-every", "1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      2"):
            break
    process.send_signal(getattr(signal, name))
    rest = process.stdout.read()
    assert process.wait(60) == code and f"stopped by {name} at step" in rest
    state, log = model.read_checkpoint(run / "last.pt"), pd.read_csv(run / "log.csv")
    assert state["step"] >= log["step"].max() >= 2 and not list(run.glob("*.tmp"))


def test_mistakes_end_in_one_line(tmp_path):
    """No traceback, a non-zero exit, and nothing left behind, from each script."""
    for script, argv in [("train.py", ["--data", "nowhere"]), ("evaluate.py", ["--data", "nowhere", "--run", "none"]),
                         ("interpolate.py", ["sweep", "--data", "nowhere", "--run", "none", "--feature", "x"]), ("prepare_bbbc021.py", ["--check", "nowhere"])]:
        done = subprocess.run([sys.executable, str(HERE / script), *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f"{script}: nowhere"), done.stderr
    assert not list(tmp_path.iterdir())


def test_bench_prints_and_writes_nothing(folder_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(folder_path), "--bench", "2", "--batch", "6", "--device", "cpu"])
    said = capsys.readouterr().out
    for name in ("these flags", "plain eager layers in fp32"):
        assert re.search(name + r": [\d.]+ ms a step \(median of 2\), \d+ cells/s, [\d.]+ times the first", said)
    assert "peak memory" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", ["cell-max", "percentile"])
def test_data_on_the_device_is_the_data_read(norm, folder_path):
    """Resident (here on a CPU) and the reader ahead give what load_batch gives, in any order of rows; 16-bit values over 32767 included."""
    folder, device = data.open_folder(folder_path), torch.device("cpu")
    rows = np.random.default_rng(0).permutation(len(folder))[:50]
    f, x = train.load_batch(folder, rows, norm, device)
    assert torch.equal(x, data.scale_images(folder.images(rows), norm, folder.white))
    resident = train.Resident(folder, norm, device)(torch.from_numpy(rows))
    assert torch.equal(resident[0], f) and torch.equal(resident[1], x)
    high = np.array([[[[0, 1], [40000, 65535]]]], np.uint16)
    assert train.scaled(torch.from_numpy(high.view(np.int16)), "percentile", [65535.0]).flatten().tolist() == pytest.approx([0, 1 / 65535, 40000 / 65535, 1])
    read = []
    ahead = train.Ahead(lambda step: (read.append(step), train.load_batch(folder, rows[step:step + 4], norm, device))[1], threads=2)
    for step in range(5):
        assert torch.equal(ahead(step)[1], x[step:step + 4])
    ahead.pool.shutdown()
    assert sorted(read) == list(range(12))  # each once, eight steps ahead


@needs_cuda
@pytest.mark.parametrize("kind", model.KINDS)
def test_on_cuda_every_model_trains(kind, folder_path, tmp_path):
    """fp32 and bf16 as a graph with the data on the device; the checkpoint draws on a CPU what it draws there (TF32 off)."""
    for amp in ("off", "bf16"):
        run_train(folder_path, tmp_path / amp, "--model", kind, "--device", "cuda", "--amp", amp, steps=8)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    there, here = (model.load(tmp_path / "off/last.pt", device) for device in ("cuda", "cpu"))
    z = torch.randn(4, getattr(here, "latent", 28))
    with torch.no_grad():
        one, other = ((G if G.takes == "features" else G.decode)(z.to(G.centre.device)).cpu() for G in (there, here))
    assert (one - other).abs().max() < 1e-4
    run_train(folder_path, tmp_path / "off", "--model", kind, "--device", "cpu", "--resume", steps=9)
    run_train(folder_path, tmp_path / "off", "--model", kind, "--device", "cuda", "--resume", steps=10)


@needs_cuda
def test_on_cuda_graph_and_resident_data_change_nothing(folder_path, tmp_path):
    """Eager with data read ahead against a graph with data on the device: losses, and what the graph's own updates did to the weights."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    states = {}
    for name, flags in {"graph": [], "eager": ["--graph", "off", "--resident", "off"]}.items():
        for steps in (3, 9):  # each call of train.py records its graph at its fourth step
            more = ["--device", "cuda", "--lr-g", "1e-4", *flags, *(["--resume"] if steps == 9 else [])]
            states[name, steps] = run_train(folder_path, tmp_path / name, *more, steps=steps)
    logs = [pd.read_csv(tmp_path / name / "log.csv").drop(columns="cells_per_s") for name in ("graph", "eager")]
    assert np.allclose(*logs, rtol=0.02, equal_nan=True)
    for net, key in (("G", "conv1.weight"), ("D", "conv1.parametrizations.weight.original")):
        moved = [states[name, 9][net][key] - states[name, 3][net][key] for name in ("graph", "eager")]
        assert (moved[0] - moved[1]).norm() < 0.2 * moved[1].norm() > 0
    assert states["graph", 9]["opt_g"]["state"][0]["step"].item() == 9


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to pictures


def test_generate(folder_path, run_path):
    folder, G = data.open_folder(folder_path), model.load(run_path / "last.pt")
    assert (G.features, G.channels, G.step, G.normalise) == (folder.features, folder.channels, 4, "train")
    table = pd.DataFrame(np.array(folder.raw[:9]), columns=folder.features)
    x = model.generate(G, table)
    assert x.shape == (9, 3, 68, 68) and x.dtype == torch.uint8 and x.float().std() > 1
    real = model.generate(G, table, as_uint8=False)
    assert real.dtype == torch.float32 and 0 <= real.min() and real.max() <= 1 and torch.equal(model.to_uint8(real), x)
    assert torch.allclose(real, G(model.standardise(*folder.measurements(np.arange(9)))).clamp(0, 1), atol=1e-6)
    alone = torch.cat([model.generate(G, table[i:i + 1], as_uint8=False) for i in range(9)])
    assert torch.allclose(alone, real, atol=2e-5)  # float32 sums in another order; batch norm uses its running moments
    assert not torch.allclose(alone[:8], real[1:], atol=2e-3)  # and the cells do differ
    shuffled = table[table.columns[::-1]]
    assert torch.equal(model.generate(G, shuffled), x)  # by name, not by position
    with pytest.warns(UserWarning, match=r"2 columns ignored \(Extra, Nuclei_More\); 1 missing values set to the mean; 1 values clipped"):
        extra = table.assign(Extra=1, Nuclei_More="text")
        extra.loc[0, folder.features[0]], extra.loc[1, folder.features[1]] = np.nan, 1e9
        model.generate(G, extra)
    with pytest.raises(ValueError, match="1 of the model's 28 features are not in the table, first: Nuclei_AreaShape_Area"):
        model.generate(G, table.drop(columns="Nuclei_AreaShape_Area"))
    with pytest.raises(ValueError, match="no number"):
        model.generate(G, table.assign(Nuclei_AreaShape_Area="big"))
    assert model.generate(G, table[:0]).shape == (0, 3, 68, 68)


def test_checkpoints_that_are_none(folder_path, run_path, tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((run_path / "last.pt").read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("hello")
    for name, message in [("other.pt", "not a checkpoint of train.py"), ("cut.pt", "not a readable checkpoint"), ("text.pt", "not a readable checkpoint"),
                          ("none.pt", "no such checkpoint; train one with")]:
        with pytest.raises(model.InputError, match=message):
            model.load(tmp_path / name)


ALLOWED = {"model.py": [], "data.py": [], "train.py": ["model", "data"], "prepare_bbbc021.py": ["data"], "evaluate.py": ["model", "data", "prepare_bbbc021"],
           "interpolate.py": ["model", "data", "prepare_bbbc021"]}
PACKAGES = {"model.py": {"torch"}, "data.py": {"numpy", "pandas", "torch"}}


@pytest.mark.parametrize("file", ALLOWED)
def test_each_file_lifts_out_alone(file, tmp_path):
    """Copied with its allowed imports into an empty folder, it imports, and importing prints and does nothing."""
    for name in [file, *(f"{m}.py" for m in ALLOWED[file])] + (["data.py"] if "prepare_bbbc021" in ALLOWED[file] else []):
        shutil.copy(HERE / name, tmp_path)
    code = (f"import torch; before = torch.initial_seed(), torch.backends.cudnn.allow_tf32, torch.get_num_threads(); import {file[:-3]}; "
            "assert before == (torch.initial_seed(), torch.backends.cudnn.allow_tf32, torch.get_num_threads())")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", (HERE / file).read_text(), re.M)) - set(sys.stdlib_module_names)
    ours = {"data", "model", "train", "evaluate", "interpolate", "prepare_bbbc021"}
    assert imported & ours <= set(ALLOWED[file])
    assert imported - ours <= PACKAGES.get(file, {"torch", "numpy", "pandas", "PIL", "scipy", "matplotlib", "cp_measure"})


@needs_cuda
def test_cuda_and_cpu_agree(folder_path, run_path, tmp_path):
    """A checkpoint of one loads on the other; pictures agree within 1e-4 with TF32 off; every precision trains."""
    folder = data.open_folder(folder_path)
    table = pd.DataFrame(np.array(folder.raw[:20]), columns=folder.features)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pictures = [model.generate(model.load(run_path / "last.pt", d), table, as_uint8=False) for d in ("cpu", "cuda")]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4
    for amp in ("off", "bf16", "fp16"):
        run = tmp_path / amp
        run_train(folder_path, run, "--device", "cuda", "--amp", amp, steps=20)
        assert np.isfinite(pd.read_csv(run / "log.csv")["loss_pix"]).all()
        assert torch.isfinite(model.generate(model.load(run / "last.pt"), table, as_uint8=False)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and sweeps


def drawn_pair(n=120, seed=0):
    """Measurements of rendered cells and, for two renderings of other cells' fibres and noise, of the same cells: frames (n rows)."""
    _, table = prepare.simulate_table(max(n, 100), seed)
    pictures = [prepare.render(table[:n], s) for s in (1, 2)]
    return table[:n], [prepare.measurements(x / x.max((2, 3), keepdims=True), data.CHANNELS) for x in pictures]


def test_features_that_survive():
    """The renderer as a perfect generator: shape of the nucleus comes back, fibres do not; shuffled cells correlate in nothing."""
    table, (real, fake) = drawn_pair()
    treatment = np.arange(len(table)) % 5
    found = evaluate.feature_table(real, fake, table, treatment, data.CHANNELS, "cell-max")
    assert list(found["r"].dropna()) == sorted(found["r"].dropna(), reverse=True) and len(found) == len(real.columns) > 800
    area = found.loc["Nuclei_AreaShape_Area"]
    assert area["r"] > 0.95 and area["spearman"] > 0.9 and area["r within treatments"] > 0.95 and area["r of generated with input"] > 0.95 and area["n"] == 120
    assert found.loc["Nuclei_Texture_Entropy_DAPI_3_00_256", "channel"] == "DAPI" and found.loc["Cells_Correlation_K_Actin_DAPI", "channel"] == "Actin+DAPI"
    assert found["relative"]["Nuclei_Intensity_MeanIntensity_DAPI"] and not found["relative"]["Nuclei_Intensity_MassDisplacement_DAPI"]
    assert not evaluate.feature_table(real, fake, table, treatment, data.CHANNELS, "percentile")["relative"].any()
    assert np.isnan(found.loc["Nuclei_Texture_Entropy_DAPI_3_00_256", "r of real with input"])  # no such input
    shuffled = evaluate.feature_table(real, fake.sample(frac=1, random_state=0).reset_index(drop=True), table, treatment, data.CHANNELS, "cell-max")
    assert shuffled["r"].abs().median() < 0.12 < 0.3 < found["r"].median()  # 1.3 standard errors at n = 120
    between = pd.DataFrame({"a": treatment + 0.0}), pd.DataFrame({"a": treatment + np.random.default_rng(0).normal(0, 0.01, 120)})
    only = evaluate.feature_table(*between, between[0], treatment, ["a"], "cell-max").iloc[0]
    assert only["r"] > 0.99 and not only["r within treatments"] > 0.3  # a difference between treatments alone does not count within one


def test_claims_are_judged():
    parts = [(c, f) for c in ("Nuclei", "Cells", "Cytoplasm") for f in ("AreaShape", "Intensity", "Texture", "RadialDistribution")]
    rank = {("Nuclei", "AreaShape"): 0.9, ("Nuclei", "Intensity"): 0.8, ("Cells", "AreaShape"): 0.2}
    r = [rank.get(p, 0.05 if p[1] == "RadialDistribution" else 0.4) for p in parts]
    table = pd.DataFrame(parts, columns=["compartment", "family"]).assign(r=r)
    assert [seen for _, seen, _ in evaluate.claims(table)] == [False, True, True, True]
    assert [seen for _, seen, _ in evaluate.claims(table.assign(r=1 - table["r"]))] == [True, False, False, False]


@needs_cells
def test_real_cells_are_prepared(tmp_path, capsys):
    """A hundred real crops with their real CellProfiler table."""
    subprocess.run([sys.executable, str(SHARED / "data/unpack_crops.py"), str(tmp_path / "crops"), "--limit", "300"], check=True, capture_output=True)
    prepare.main(["--crops", str(tmp_path / "crops"), "--features", str(SHARED / "data/features.csv.gz"), "--out", str(tmp_path / "real"), "--split", "field"])
    said = capsys.readouterr().out
    folder = data.open_folder(tmp_path / "real")
    assert "300 cells matched" in said and "35 cells without measurements dropped" in said and len(folder) == 265
    assert len(folder.features) > 800 and set(folder.cells["moa"]) - {"DMSO", "unknown"} and (folder.patches[:] % 16 == 0).all()
    table = pd.read_csv(SHARED / "data/features.csv.gz").set_index("Single_Cell_Image_Id").loc[folder.cells["cell"]]
    assert np.allclose(table[folder.features], folder.raw, rtol=1e-6, equal_nan=True) or folder.meta["imputed"]
    first = np.load(next((tmp_path / "crops").rglob(folder.cells["cell"][0])))
    assert (folder.patches[0] == first.transpose(2, 0, 1)[[0, 2, 1]]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Edits: what they ask for, how far they leave the data, what the picture achieves


def edit_call(command, folder_path, run_path, out, *more):
    interpolate.main([command, "--data", str(folder_path), "--run", str(run_path), "--out", str(out), "--device", "cpu", *more])
    return {path.suffix[1:]: path for path in Path(out).glob(f"{command}*")}


@needs_shared
def test_golden_figures(monkeypatch):
    """Fig 5a's order and cosines, the representative cell and Fig 5b's line, as the golden file has them; 1e-9: float64 on both sides."""
    for part in ("fid", "metrics"):
        monkeypatch.syspath_prepend(SHARED / "fixtures" / part)
    from figure_inputs import inputs
    x, golden = inputs(), json.loads((SHARED / "fixtures/metrics/figure_golden.json").read_text())
    a, b = x["interpolation"]
    order, path = interpolate.replaced(a, b)
    assert order[:10].tolist() == golden["interpolation"]["first_ten_dims"] and order[-3:].tolist() == golden["interpolation"]["last_three_dims"]
    assert len(path) - 1 == golden["interpolation"]["n_steps"]
    assert interpolate.cosine(path, b) == pytest.approx(golden["interpolation"]["cosine"], abs=1e-9)
    assert interpolate.representative(x["representative_cell"]) == pytest.approx(tuple(golden["representative_cell"].values()), abs=1e-9)
    mean, axes = interpolate.principal_axes(np.concatenate(x["pca_line"]))
    points = interpolate.line(x["pca_line"][0].mean(0), x["pca_line"][2].mean(0), 5)
    assert (points - mean) @ axes.T == pytest.approx(np.array(golden["pca_line"]["points"]), abs=1e-9)
    (size, order, values), walk = interpolate.rank_latents(x["latent_walk"]), golden["latent_walk"]
    assert size == pytest.approx(walk["mad"], abs=1e-9) and order[0] == walk["dim"] and values[order[0]] == pytest.approx(walk["values"], abs=1e-9)
    r = evaluate.correlations(*x["feature_correlation"], np.ones((1, 100)))[0]  # constant columns are undefined, not 0
    assert r == pytest.approx([np.nan if v is None else v for v in golden["feature_correlation"]], abs=1e-9, nan_ok=True)


def test_edits_hold_or_follow():
    """Held: one column changes. Conditional: the others follow the covariance, a cell's own value changes nothing; directions wrap."""
    random = np.random.default_rng(0)
    a = random.normal(size=5000)
    z = np.stack([a, 0.8 * a + 0.6 * random.normal(size=5000), random.normal(size=5000)], 1)
    covariance, shrinkage = interpolate.ledoit_wolf(z)
    assert shrinkage < 0.01 and interpolate.ledoit_wolf(random.normal(size=(10, 40)))[1] > 0.5  # much data, no shrinking; little, much
    raw, scale, angle = np.array([[10.0, 20.0, 30.0]]), np.array([2.0, 5.0, 1.0]), np.zeros(3, bool)
    assert interpolate.edited(raw, [0], np.array([[12.0]]), scale, angle).tolist() == [[12, 20, 30]]
    follow = interpolate.edited(raw, [0], np.array([[12.0]]), scale, angle, covariance)
    assert follow[0] == pytest.approx([12, 20 + 0.8 * 5, 30], abs=0.2)  # 0.04 sd: three standard errors at n = 5000
    assert interpolate.edited(raw, [0], raw[:, :1], scale, angle, covariance) == pytest.approx(raw)
    both = interpolate.edited(raw, [0, 2], np.array([[12.0, 31.0]]), scale, angle, covariance)
    assert both[0, [0, 2]].tolist() == [12, 31] and both[0, 1] == pytest.approx(24, abs=0.3)
    assert interpolate.edited(raw, [2], np.array([[100.0]]), scale, angle | [False, False, True])[0, 2] == -80


def test_ledoit_wolf_is_the_published_estimator():
    """Against the sums of Ledoit and Wolf 2004 written out cell by cell."""
    z = np.random.default_rng(1).normal(size=(30, 6)) * [1, 2, 3, 1, 1, 1]
    x = z - z.mean(0)
    s = x.T @ x / 30
    m = np.trace(s) / 6
    d2 = ((s - m * np.eye(6)) ** 2).sum()
    b2 = min(sum(((np.outer(r, r) - s) ** 2).sum() for r in x) / 30 ** 2, d2)
    covariance, shrinkage = interpolate.ledoit_wolf(z)
    assert shrinkage == pytest.approx(b2 / d2) and covariance == pytest.approx(b2 / d2 * m * np.eye(6) + (1 - b2 / d2) * s)


def test_distance_from_the_data():
    """New cells of the same kind fall on even percentiles, far ones on 100; without leaving each cell out they would not."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(30, 30)) ** 3
    reference = interpolate.fit_reference(random.normal(size=(60, 30)) @ mix)
    percentile, nearest = interpolate.how_far(reference, random.normal(size=(400, 30)) @ mix)
    assert np.median(percentile) == pytest.approx(50, abs=15)  # four seeds: 46-57; in-sample distances give 84-97
    assert np.median(nearest) == pytest.approx(1, abs=0.15)
    percentile, nearest = interpolate.how_far(reference, 8 * random.normal(size=(20, 30)) @ mix)
    assert (percentile == 100).all() and nearest.min() > 2
    percentile, nearest = interpolate.how_far(reference, reference["mean"][None])
    assert percentile[0] == 0
    with pytest.raises(data.InputError, match="5 training cells: too few"):
        interpolate.fit_reference(np.zeros((5, 3)))


def test_silhouettes_by_hand():
    z = np.array([[0.0], [1], [10], [12]])
    assert interpolate.silhouettes(z, np.array(list("aabb"))) == pytest.approx([1 - 1 / 11, 1 - 1 / 10, 1 - 2 / 9.5, 1 - 2 / 11.5])
    mixed = interpolate.silhouettes(np.random.default_rng(0).normal(size=(200, 5)), np.arange(200) % 2)
    assert abs(mixed.mean()) < 0.05  # one cloud is no two groups


def renderer(table, seed=0):
    """The simulator as a generator of the edited columns: draw(raw (n, F)) -> pictures in CellProfiler's 0..1."""
    def draw(raw):
        return torch.from_numpy(prepare.render(pd.DataFrame(raw, columns=table.columns), seed))
    return draw


def test_controllability_of_the_renderer():
    """The renderer obeys: slope 1 +- 0.1 for each of its parameters (an sd: over 0.5), 0 +- 0.05 of everything for a noise column; a deaf one has slope 0.

    Intensities are measured in the true masks: the renderer's mean is that of pixels more than half covered, and `segment` also takes in the
    soft rim, where the same change is 15-25 % smaller.
    """
    row = one_cell(Nuclei_AreaShape_Eccentricity=0.75, Cells_AreaShape_Eccentricity=0.7, Cytoplasm_AreaShape_Area=1200)  # all of it in the patch
    table = pd.concat([row.assign(Nuclei_AreaShape_Area=a, Nuclei_AreaShape_Orientation=t, Cells_AreaShape_Orientation=t) for a, t in ((750, 20), (850, -30), (950, 70))])
    table["Nuclei_Noise_0"] = 0.0
    features = list(table.columns)
    raw, scale, draw = table.to_numpy(), np.tile([90, 0.05, 15, 0.015, 0.004, 150, 0.05, 15, 0.012, 0.004, 0.01, 0.003, 1], (3, 1)), renderer(table)
    flat = renderer(table)(table.assign(**{name: 0.0 for name in features if "_Std" in name}).to_numpy()).numpy()
    level = [0.5 * table[name].iloc[0] + prepare.BACKGROUND[k] for k, name in enumerate(("Nuclei_Intensity_MeanIntensity_DAPI", "Cytoplasm_Intensity_MeanIntensity_Tubulin"))]
    true = ((flat[:, 0] > level[0]) + 2 * (flat[:, 1] > level[1])).astype(np.uint8)  # bits of nucleus and cell

    def in_true_masks(x):
        names, values = measure(x.numpy(), true | 2 * (true & 1))
        return np.stack([values[:, names.index(n)] if n in names else np.full(len(x), np.nan) for n in features], 1)

    own = lambda x: prepare.measurements(x.clamp(0, 1), data.CHANNELS).reindex(columns=features).to_numpy()
    run = lambda names, look, draw=draw, **more: list(interpolate.controllability(
        raw, scale, features, [features.index(n) for n in names], draw, look, lambda r: np.zeros(len(r)), offsets=(-2, -1, 0, 1, 2), **more))
    for kind, look in (("_AreaShape_", own), ("_Intensity_", in_true_masks)):
        for r in run([n for n in features if kind in n], look):
            least = 0.5 if "_Std" in r["feature"] else 0.9  # a texture's variance adds to that of the soft rim
            assert least < r["slope"] < 1.1 and r["low"] <= r["slope"] <= r["high"] and r["spearman"] > 0.9, r
    (noise,) = run(["Nuclei_Noise_0"], own)
    assert noise["status"] == "not measured" and np.isnan(noise["slope"]) and abs(noise["its slope"]) < 0.05 and noise["off target"] < 0.05
    (deaf,) = run(features[:1], own, lambda edited: draw(raw))
    assert deaf["slope"] == pytest.approx(0, abs=0.05) and deaf["spearman"] == 0
    (marked,) = run(features[3:4], own, relative=np.array(["Intensity" in n for n in features]))
    assert marked["status"] == "relative" and np.isnan(marked["slope"])


def test_brightness_marks_what_cell_max_cannot_express():
    table = pd.concat([one_cell(Nuclei_AreaShape_Area=a, MeanIntensity_DAPI=v) for a, v in ((600, 0.1), (800, 0.15), (1000, 0.2), (1200, 0.12))])
    features = ["Nuclei_AreaShape_Area", "Nuclei_Intensity_MeanIntensity_DAPI", "Nuclei_RadialDistribution_FracAtD_DAPI_1of4", "Nuclei_Noise_0"]
    look = lambda x: prepare.measurements(x.clamp(0, 1), data.CHANNELS).reindex(columns=features).to_numpy()
    assert interpolate.depends_on_brightness(torch.from_numpy(prepare.render(table)), look).tolist() == [False, True, False, False]
    assert np.isnan(look(torch.zeros(1, 3, 68, 68))).all()  # no cell, no measurement


def test_coupling_of_the_renderer():
    """Each channel of the renderer depends on its own groups and on shape; noise moves nothing."""
    _, table = prepare.simulate_table(60, 0)
    groups = interpolate.feature_groups(list(table.columns), data.CHANNELS)
    assert {"Nuclei_AreaShape", "Nuclei_Intensity_DAPI", "Cytoplasm_Intensity_Actin", "Nuclei_Noise"} <= set(groups)
    assert interpolate.feature_groups(["Cells_Correlation_K_Actin_DAPI"], data.CHANNELS) == {"Cells_Correlation": [0]}  # about two channels
    paint = lambda raw: renderer(table)(raw) / 0.3
    x = paint(table.to_numpy()) + 0.01
    rise = {(r["group"], r["channel"]): r for r in interpolate.coupling(table.to_numpy(), x, groups, paint, repeats=1)}
    assert rise["Nuclei_Intensity_DAPI", 0]["rise"] > 1 and rise["Nuclei_Intensity_DAPI", 1]["rise"] == rise["Nuclei_Intensity_DAPI", 2]["rise"] == 0
    assert rise["Cytoplasm_Intensity_Actin", 2]["low"] > 1 and rise["Cytoplasm_Intensity_Actin", 0]["rise"] == 0
    assert all(rise["Nuclei_Noise", k]["rise"] == 0 for k in range(3)) and all(rise["Nuclei_AreaShape", k]["rise"] > 0 for k in range(3))


def test_sweep(folder_path, run_path, tmp_path, capsys):
    """Values, own value, real cell, page and GIF of two rows; equal calls write equal bytes."""
    arguments = ["--feature", "Nuclei_AreaShape_Area", "Nuclei_*Intensity*", "--steps", "3", "--gif"]
    for out in ("a", "b"):
        files = edit_call("sweep", folder_path, run_path, tmp_path / out, *arguments, "--html", str(tmp_path / f"{out}.html"))
    assert set(files) == {"png", "gif", "json", "csv"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    report, folder, G = json.loads(files["json"].read_text()), data.open_folder(folder_path), model.load(run_path / "last.pt")
    records, about = report["records"], report["about"]
    assert about["split"] == "test" and about["extractor"] and about["seed"] == 0 and 0 < about["Ledoit-Wolf shrinkage"] < 1 and len(records) == 8
    column = np.array(folder.raw[folder.rows("train"), 0], np.float64)
    assert [r["requested"] for r in records[1:4]] == pytest.approx(np.linspace(*np.quantile(column, [0.01, 0.99]), 3), rel=1e-5)
    assert [r["level"] for r in records[5:]] == [-3, 0, 3] and records[4]["outside percentile"] == records[6]["outside percentile"]  # 0 sd: its own
    cell = int(np.flatnonzero(folder.cells["cell"] == about["cell"])[0])
    z = model.standardise(*folder.measurements(folder.rows("test")))
    assert torch.equal(z[(z - z.mean(0)).norm(dim=1).argmin()], model.standardise(*folder.measurements([cell]))[0])  # the typical cell
    assert records[0]["requested"] == pytest.approx(float(folder.raw[cell, 0]), rel=1e-5)
    page = (tmp_path / "a.html").read_text()
    values = json.loads(re.search(r"const P = (.*?), side = P.side", page, re.S).group(1))
    assert [len(levels) for _, levels, _ in values["sliders"]] == [3, 3] and len(values["captions"]) == 9 and "http" not in page
    assert values["captions"][3][0] == f"Nuclei_AreaShape_Area {records[2]['asked'][6:]}; Nuclei_*Intensity* -3 sd"
    (tmp_path / "sprite.png").write_bytes(interpolate.base64.b64decode(values["sprite"].split(",")[1]))
    sprite = np.asarray(interpolate.Image.open(tmp_path / "sprite.png"))
    edit = folder.raw[[cell]].astype(np.float64)
    edit[0, 0] = records[2]["requested"]
    drawn = data.composite(G(model.standardise(torch.tensor(edit), folder.centre, folder.scale)))[0].astype(int)
    assert np.abs(sprite[68:136, 68:136] - drawn).max() <= 1  # combination 4 of 3 x 3: this area, the rest its own


def test_far_edits_are_said_and_clipping_too(folder_path, run_path, tmp_path, capsys):
    edit_call("sweep", folder_path, run_path, tmp_path, "--feature", "Nuclei_AreaShape_Area", "--high", "9000", "--steps", "2")
    said = capsys.readouterr().out
    assert "of 3 pictures lie outside the data" in said and "percentile 100" in said and "go beyond 10 sd, where the generator's input is clipped" in said
    edit_call("sweep", folder_path, run_path, tmp_path, "--feature", "Nuclei_AreaShape_Area", "--unit", "sd", "--low", "0", "--high", "0.01", "--steps", "2")
    assert "warning" not in capsys.readouterr().out


def test_the_other_figures(folder_path, run_path, tmp_path):
    base = (folder_path, run_path, tmp_path)
    report = lambda files: json.loads(files["json"].read_text())
    records = report(edit_call("moa", *base, "--split", "all", "--target", "Aurora kinase inhibitors", "latrunculin B", "--block", "7"))["records"]
    assert len(records) == 10 and records[4]["cosine"] == records[9]["cosine"] == 1 and records[0]["cosine"] < 0.9
    edit_call("moa", *base, "--split", "all", "--path", "linear", "--target", "taxol 0.3")
    records = report(edit_call("dose", *base, "--split", "all", "--html", str(tmp_path / "dose.html")))["records"]
    assert [r["row"][:10] for r in records].count("silhouette") == 8 and {r["asked"] for r in records} >= {"all", "DMSO", "latrunculin B 1", "latrunculin B 3"}
    cells = data.open_folder(folder_path).cells["cell"]
    records = report(edit_call("walk", *base, "--cells", cells[0], cells[399], "--steps", "3", "--gif"))["records"]
    assert [r["t"] for r in records] == [0, 0.5, 1]
    records = report(edit_call("algebra", *base, "--split", "train", "--repeats", "2"))["records"]
    high, low, other, result = (r["requested"] for r in records[:4])
    assert result == pytest.approx(high - low + other, rel=1e-4) and high > other > low and records[-1]["row"] == "realised / requested move"
    records = report(edit_call("controllability", *base, "--n", "2", "--feature", "Nuclei_AreaShape_Area", "Nuclei_Noise_0", "*MeanIntensity_DAPI", "--edit", "conditional"))["records"]
    assert [r["status"] for r in records] == ["measured", "not measured", "relative"] and records[0]["ceiling r"] > 0.7 and records[0]["n"] == 2
    records = report(edit_call("coupling", *base, "--n", "12", "--repeats", "1"))["records"]
    assert {r["channel"] for r in records} == set(data.CHANNELS) and all(r["low"] <= r["high"] for r in records)


@pytest.mark.parametrize("kind", ["vae", "lsgan"])
def test_latent_spaces(kind, folder_path, tmp_path, monkeypatch, capsys):
    """walk, algebra and latents of a baseline after two steps: the vectors are encodings or the noise of model.sample; the rest is refused."""
    run, latent, out = tmp_path / kind, {"vae": 256, "lsgan": 100}[kind], tmp_path / "out"
    run_train(folder_path, run, "--model", kind, steps=2)
    monkeypatch.setattr(interpolate, "NOISE", 60)
    monkeypatch.setattr(interpolate, "FRESH", 200)
    base, report = (folder_path, run, out), lambda files: json.loads(files["json"].read_text())
    if kind == "lsgan":  # noise as yet: no nucleus in any picture
        refuses("too few cells, 0 of 60 have a value of Nuclei_AreaShape_Area", edit_call, "algebra", *base)
    monkeypatch.setattr(prepare, "segment", lambda x: np.tile((ellipse() + 2 * ellipse(a=20, b=20)).astype(np.uint8), (len(x), 1, 1)))
    folder, G = data.open_folder(folder_path), model.load(run / "last.pt")
    lab, rows = interpolate.open_lab(G, folder, "test", 0, "cpu"), folder.rows("test")
    if kind == "lsgan":
        assert (lab["paint"](lab["z"]([0, 17])) - model.sample(G, 60)[[0, 17]]).abs().max() < 1e-5 and lab["images"] is None and len(lab["rows"]) == 60
        assert np.isfinite(lab["raw"]([3])).any() and len(lab["reference"]["z"]) == 200 and not np.isin(lab["z"]([3]), lab["reference"]["z"]).any()
        assert not np.array_equal(lab["z"]([3]), interpolate.open_lab(G, folder, "test", 1, "cpu")["z"]([3]))  # another seed, other noise
    else:
        means = G.encode(data.scale_images(folder.images(rows), G.image_norm))[0].numpy()
        assert np.allclose(lab["z"](rows), means, atol=1e-4) and np.array_equal(lab["raw"](rows), folder.raw[rows]) and len(lab["rows"]) == len(rows)
        every = folder.rows("train")  # 338 cells: two batches, in their order
        assert np.allclose(lab["z"](every)[[0, 300]], lab["z"](every[[0, 300]]), atol=1e-4) and len(lab["reference"]["z"]) == len(every)
    ends = ["noise3", "noise17"] if kind == "lsgan" else list(folder.cells["cell"][[0, 399]])
    walked = report(edit_call("walk", *base, "--cells", *ends, "--steps", "3", "--gif", "--html", str(tmp_path / "walk.html")))
    assert [r["t"] for r in walked["records"]] == [0, 0.5, 1] and walked["about"]["split"] == {"vae": "test", "lsgan": "noise"}[kind]
    assert walked["about"]["model"] == kind and walked["about"].get("noise vectors") == {"vae": None, "lsgan": 200}[kind]
    a, b = lab["z"]([3, 17] if kind == "lsgan" else [0, 399])
    percentile, nearest = interpolate.how_far(lab["reference"], np.stack([a, (a + b) / 2, b]))
    assert [r["outside percentile"] for r in walked["records"]] == pytest.approx(percentile, rel=1e-5)  # JSON has six digits
    assert [r["nearest"] for r in walked["records"]] == pytest.approx(nearest, rel=1e-4)
    said = Image.open(next(out.glob("walk*.png"))).size
    assert said[0] == 138 * (3 + 2 * (kind == "vae")) + 2  # real cells at the two ends, where there are such
    walked = report(edit_call("latents", *base, "--top", "2"))["records"]
    size, order, values = interpolate.rank_latents(lab["z"](lab["rows"]))
    assert [r["dimension"] for r in walked] == [order[0]] * 9 + [order[1]] * 9 and size.argmax() == order[0] and len(size) == latent
    assert [r["value"] for r in walked[9:]] == pytest.approx(values[order[1]], rel=1e-4) and walked[4]["value"] == 0 and len(values[0]) == 9
    moved = report(edit_call("algebra", *base, "--feature", "Nuclei_Intensity_MeanIntensity_DAPI", "--split", "train", "--repeats", "2"))
    high, low, other, result = (r["requested"] for r in moved["records"][:4])
    assert result == pytest.approx(high - low + other, rel=1e-4) and high > other > low and moved["about"]["ranked"] == {"vae": 338, "lsgan": 60}[kind]
    for r in [*walked, *moved["records"]]:
        assert all(np.isfinite(v) for v in r.values() if not isinstance(v, str)), r  # null: None, which isfinite would refuse
    before = sorted(out.iterdir())
    refuses("--cells x: not among the .* whose first is", edit_call, "walk", *base, "--cells", "x", "y")
    for call in ("sweep --fig4c", "moa", "dose", "controllability --n 2", "coupling --n 2", "walk --cells a b --table nowhere.csv"):
        command, *more = call.split()
        refuses(f"{kind} takes {G.takes}, and {'--table' if '--table' in more else command} needs .* walk, algebra, latents", edit_call, command, *base, *more)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("kind", ["images", "noise"])
def test_algebra_is_verified_by_measuring(kind, folder_path, monkeypatch):
    """A stand-in whose first latent dimension is the nucleus' area realises the move asked for; with the vectors of other cells it does not.

    1 +- 0.1: as the controllability test measures the renderer's area. 0 +- 0.25: terms of three cells drawn at random move by sd sqrt(2/3) of
    the 3.5 sd between the tenths, 0.23 of the move; of 20 draws the standard error is 0.05, which is 5 of them.
    """
    monkeypatch.setattr(interpolate, "NOISE", 200)
    folder, row = data.open_folder(folder_path), one_cell(Nuclei_AreaShape_Eccentricity=0.75, Cells_AreaShape_Eccentricity=0.7, Cytoplasm_AreaShape_Area=1200)
    place = folder.features.index("Nuclei_AreaShape_Area")

    class StandIn:
        takes, latent, features, channels, image_norm, white = kind, 8, folder.features, folder.channels, "percentile", torch.full((3,), 65535.0)

        def encode(self, x):  # the table's own area in the first dimension, found by the picture
            found = [int((self.known == v).flatten(1).all(1).nonzero()[0, 0]) for v in x]
            z = torch.randn(len(x), 8, generator=torch.Generator().manual_seed(1))
            z[:, 0] = torch.tensor((np.array(folder.raw[found, place]) - 850) / 50)
            return z, None

        def decode(self, z):
            cells = pd.concat([row] * len(z)).assign(Nuclei_AreaShape_Area=850 + 50 * z[:, 0].numpy())
            return torch.from_numpy(prepare.render(cells, 0))

    G = StandIn()
    G.known = data.scale_images(folder.images(np.arange(len(folder))), "percentile", G.white)
    lab = interpolate.open_lab(G, folder, "train", 0, "cpu")
    moved = interpolate.algebra(lab, "Nuclei_AreaShape_Area", 3, 20)["records"][-1]
    assert moved["n"] == 20 and moved["value"] == pytest.approx(1, abs=0.1) and moved["low"] > 0.9
    z, other = lab["z"], np.random.default_rng(0).permutation(lab["rows"])
    lab["z"] = lambda rows: z(other[np.searchsorted(lab["rows"], rows)])
    moved = interpolate.algebra(lab, "Nuclei_AreaShape_Area", 3, 20)["records"][-1]
    assert moved["n"] == 20 and abs(moved["value"]) < 0.25


def test_refused_edits(folder_path, run_path, tmp_path, capsys):
    folder = data.open_folder(folder_path)
    with pytest.raises(data.InputError, match="was left out when the cells were prepared \\(no spread"):
        interpolate.find_features("Cells_AreaShape_EulerNumber", folder.features, {"Cells_AreaShape_EulerNumber": "no spread"})
    for call, message in [("sweep --feature Nuclei_AreaShape_Aera", "nearest: Nuclei_AreaShape_Area"), ("sweep --fig4c --cell x", "--cell x: not among"),
                          ("sweep --feature Nuclei_AreaShape_* --unit raw", "share no unit"), ("walk --cells x y", "--cells x: not among"),
                          ("sweep --feature Nuclei_AreaShape_Area Nuclei_AreaShape_*", "named twice"),
                          ("sweep --feature Nuclei_AreaShape_Area --unit percentile --high 101", "between 0 and 100"),
                          ("moa --target Anti", "--target Anti: 0 of these .* there are: .*DMSO"), ("moa --start x", "--start x: 0 of"),
                          ("dose --compound aspirin", "--compound aspirin: 0 of"), ("algebra --terms 30", "--terms 30: too few cells"),
                          ("algebra --feature Nuclei_*", "expected one"), ("controllability --n 5000", "--n 5000: too few cells"), ("coupling --n 5000", "too few cells"),
                          ("latents", "cp2image takes measurements and has no latent space")]:
        command, *more = call.split()
        with pytest.raises(data.InputError, match=message):
            edit_call(command, folder_path, run_path, tmp_path, *more)
    for call in ("sweep", "sweep --fig4c --steps 1", "coupling --n 1", "moa --block 0", "latents --top 0"):
        with pytest.raises(SystemExit):
            edit_call(call.split()[0], folder_path, run_path, tmp_path, *call.split()[1:])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@long
def test_the_page_in_a_browser(folder_path, run_path, tmp_path):
    """The script runs without a network and shows the caption of the sliders' place."""
    edit_call("sweep", folder_path, run_path, tmp_path, "--feature", "Nuclei_AreaShape_Area", "--steps", "3", "--html", str(tmp_path / "page.html"))
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
                           "--dump-dom", f"file://{tmp_path / 'page.html'}#2"], capture_output=True, text=True, timeout=120)
    last = json.loads((tmp_path / "sweep_Nuclei_AreaShape_Area.json").read_text())["records"][-1]["asked"]
    assert f'<pre id="caption">Nuclei_AreaShape_Area {last[6:]}\n' in done.stdout and "Actin" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The measuring engine: rule-made shapes everywhere, CellProfiler's own output where the folder shared is

Y, X = np.mgrid[:68, :68]


def ellipse(cy=34, cx=34, a=12, b=8, degrees=0):
    """Ellipse with half axes a and b; its long axis turned by `degrees` from vertical towards down-right."""
    t = np.deg2rad(degrees)
    along, across = (Y - cy) * np.cos(t) + (X - cx) * np.sin(t), (X - cx) * np.cos(t) - (Y - cy) * np.sin(t)
    return (along / a) ** 2 + (across / b) ** 2 <= 1


def measured(nucleus, cell=None, images=None):
    """Measure one patch -> {name: value}; without images all channels are 1 inside the cell."""
    cell = nucleus | ellipse(a=30, b=28) if cell is None else cell
    images = np.ones((3, 68, 68), np.float32) * cell if images is None else images
    names, values = measure(images[None], (nucleus + 2 * cell)[None].astype(np.uint8))
    assert len(names) == len(set(names)) == values.shape[1]
    return dict(zip(names, values[0]))


def overlap(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


# ---------------------------------------------------------------- shape

def test_disc_has_its_area_centre_radius_and_no_eccentricity():
    v = measured(ellipse(cy=30, cx=37, a=15.2, b=15.2))
    assert v["Nuclei_AreaShape_Area"] == v["Nuclei_AreaShape_SpatialMoment_0_0"] == ellipse(a=15.2, b=15.2).sum()
    assert (v["Nuclei_AreaShape_Center_X"], v["Nuclei_AreaShape_Center_Y"]) == pytest.approx((37, 30))
    assert (v["Nuclei_AreaShape_BoundingBoxMinimum_X"], v["Nuclei_AreaShape_BoundingBoxMaximum_X"]) == (22, 53)
    assert v["Nuclei_AreaShape_MajorAxisLength"] == pytest.approx(30.4, rel=0.01)
    assert v["Nuclei_AreaShape_Eccentricity"] < 1e-6
    assert v["Nuclei_AreaShape_MaximumRadius"] == pytest.approx(15.2, abs=0.9)
    assert v["Nuclei_AreaShape_FormFactor"] == pytest.approx(1, abs=0.1)
    assert v["Nuclei_AreaShape_Zernike_0_0"] == pytest.approx(1, abs=0.05)      # a disc fills its enclosing circle
    assert v["Nuclei_AreaShape_Zernike_4_4"] < 0.02


@pytest.mark.parametrize("degrees", [-60, -30, 0, 20, 45, 80])
def test_orientation_is_from_the_vertical_axis_and_down_right_is_positive(degrees):
    v = measured(ellipse(a=20, b=9, degrees=degrees))
    assert v["Nuclei_AreaShape_Orientation"] == pytest.approx(degrees, abs=1)
    assert v["Nuclei_AreaShape_MajorAxisLength"] == pytest.approx(40, rel=0.02)
    assert v["Nuclei_AreaShape_MinorAxisLength"] == pytest.approx(18, rel=0.02)


def test_rectangle_by_hand():
    box = (Y >= 20) & (Y < 30) & (X >= 10) & (X < 16)                           # 10 high, 6 wide
    v = measured(box)
    assert v["Nuclei_AreaShape_Area"] == 60 and v["Nuclei_AreaShape_Extent"] == 1 and v["Nuclei_AreaShape_EulerNumber"] == 1
    assert v["Nuclei_AreaShape_Perimeter"] == 2 * (9 + 5)                       # between the centres of the outline's pixels
    assert v["Nuclei_AreaShape_CentralMoment_2_0"] == pytest.approx(60 * (10 ** 2 - 1) / 12)
    assert v["Nuclei_AreaShape_SpatialMoment_0_1"] == 60 * 2.5                  # column, from the corner of the box
    assert v["Nuclei_AreaShape_MedianRadius"] == 2 and v["Nuclei_AreaShape_MaximumRadius"] == 3      # 28 x 1, 20 x 2, 12 x 3
    assert v["Nuclei_AreaShape_MeanRadius"] == pytest.approx((28 * 1 + 20 * 2 + 12 * 3) / 60)
    radius2 = 4.5 ** 2 + 2.5 ** 2                                               # the enclosing circle goes through the corners
    assert v["Nuclei_AreaShape_Zernike_0_0"] == pytest.approx(60 / (np.pi * radius2))
    assert np.isnan(v["Nuclei_AreaShape_NormalizedMoment_0_1"])


def test_hu_moments_do_not_turn_and_holes_count():
    a, b = (measured(ellipse(a=20, b=9, degrees=d)) for d in (10, 70))
    assert a["Nuclei_AreaShape_HuMoment_1"] == pytest.approx(b["Nuclei_AreaShape_HuMoment_1"], rel=0.05)
    assert measured(ellipse())["Cytoplasm_AreaShape_EulerNumber"] == 0          # one object, one hole


def test_enclosing_circle_holds_every_pixel_and_is_no_larger_than_needed():
    """Zernike_0_0 = area / (pi r^2) of shapes whose circle is known: a lone pixel excepted, and a right-angled triangle."""
    triangle = (Y >= 10) & (X >= 10) & (Y - 10 <= 30) & (X - 10 <= (30 - (Y - 10)) * 4 / 3)
    r = np.hypot(30, 40) / 2                                                    # half the longest side
    assert measured(triangle)["Nuclei_AreaShape_Zernike_0_0"] == pytest.approx(triangle.sum() / (np.pi * r ** 2))
    line = (Y == 30) & (X >= 20) & (X < 41)
    assert measured(line)["Nuclei_AreaShape_Zernike_0_0"] == pytest.approx(21 / (np.pi * 10 ** 2))
    assert not np.isfinite(measured((Y == 30) & (X == 30))["Nuclei_AreaShape_Zernike_0_0"])


# ---------------------------------------------------------------- intensity, texture, rings, correlation

def test_intensity_sums_and_quantiles_by_hand():
    box = (Y >= 20) & (Y < 24) & (X >= 30) & (X < 34)
    image = np.zeros((3, 68, 68), np.float32)
    image[0, 20:24, 30:34] = np.arange(16).reshape(4, 4) / 32
    v = {k[len("Nuclei_Intensity_"):]: 32 * x for k, x in measured(box, images=image).items() if "Intensity" in k and "DAPI" in k}
    assert v["IntegratedIntensity_DAPI"] == 120 and v["MeanIntensity_DAPI"] == 7.5 and v["MaxIntensity_DAPI"] == 15
    assert v["StdIntensity_DAPI"] == pytest.approx(np.arange(16).std())
    assert v["LowerQuartileIntensity_DAPI"] == 4 and v["MedianIntensity_DAPI"] == 8       # at n * q, not (n - 1) * q
    assert v["MADIntensity_DAPI"] == 4
    assert v["IntegratedIntensityEdge_DAPI"] == 120 - (5 + 6 + 9 + 10) and v["MinIntensityEdge_DAPI"] == 0
    dy = (np.arange(16) * np.repeat(np.arange(4), 4)).sum() / 120 - 1.5
    dx = (np.arange(16) * np.tile(np.arange(4), 4)).sum() / 120 - 1.5
    assert v["MassDisplacement_DAPI"] / 32 == pytest.approx(np.hypot(dy, dx))


def test_integers_are_read_as_16_bit():
    nucleus = ellipse()
    image = np.full((3, 68, 68), 13107, np.uint16)                              # 65535 / 5
    v = measured(nucleus, images=image)
    assert v["Nuclei_Intensity_MeanIntensity_DAPI"] == pytest.approx(0.2, rel=1e-7)
    assert v["Nuclei_Texture_SumAverage_DAPI_3_00_256"] == 2 * 51


def test_texture_of_a_checkerboard():
    """Squares of 1 pixel, 3 apart: opposite along rows and columns, equal along diagonals."""
    image = np.broadcast_to(np.where((Y + X) % 2, 100, 50) / 255, (3, 68, 68)).astype(np.float32)
    v = measured(ellipse(a=20, b=20), images=image)
    get = lambda name, direction: v[f"Nuclei_Texture_{name}_DAPI_3_{direction:02d}_256"]
    assert get("Contrast", 0) == pytest.approx(2500) and get("Contrast", 2) == pytest.approx(2500)
    assert get("Contrast", 1) == get("Contrast", 3) == pytest.approx(0)
    assert get("Correlation", 0) == pytest.approx(-1) and get("Correlation", 1) == pytest.approx(1)
    assert get("Entropy", 0) == pytest.approx(1) and get("AngularSecondMoment", 0) == pytest.approx(0.5)
    assert get("InverseDifferenceMoment", 0) == pytest.approx(1 / 2501)
    assert get("SumAverage", 0) == pytest.approx(150) and get("SumEntropy", 0) == pytest.approx(0, abs=1e-9)
    assert get("DifferenceVariance", 0) == pytest.approx(1 / 101 - 1 / 101 ** 2)
    assert get("InfoMeas1", 0) == pytest.approx(-1, abs=1e-3)


def test_texture_of_noise_is_not_that_of_a_flat_object():
    noise = np.random.default_rng(0).random((3, 68, 68), np.float32) * 0.9 + 0.1
    flat, rough = measured(ellipse()), measured(ellipse(), images=noise)
    assert flat["Nuclei_Texture_Entropy_DAPI_3_00_256"] == pytest.approx(0, abs=1e-12)
    assert flat["Nuclei_Texture_Correlation_DAPI_3_00_256"] == 1
    assert rough["Nuclei_Texture_Entropy_DAPI_3_00_256"] > 7 and abs(rough["Nuclei_Texture_Correlation_DAPI_3_00_256"]) < 0.2


def test_object_thinner_than_the_texture_scale_gives_zero():
    v = measured((Y == 30) & (X >= 20) & (X < 41))
    assert all(v[k] == 0 for k in v if k.startswith("Nuclei_Texture"))


def test_rings_of_an_even_disc_and_of_a_bright_middle():
    disc = ellipse(a=20, b=20)
    even = measured(disc)
    rings = [even[f"Nuclei_RadialDistribution_FracAtD_DAPI_{i}of4"] for i in (1, 2, 3, 4)]
    assert sum(rings) == pytest.approx(1) and rings == sorted(rings)
    assert even["Nuclei_RadialDistribution_MeanFrac_DAPI_2of4"] == pytest.approx(1)
    assert even["Nuclei_RadialDistribution_RadialCV_DAPI_2of4"] == pytest.approx(0, abs=1e-6)
    image = np.ones((3, 68, 68), np.float32)
    image[:, ellipse(a=4, b=4)] = 10
    bright = measured(disc, images=image / 10)
    assert bright["Nuclei_RadialDistribution_MeanFrac_DAPI_1of4"] > 2 > 1 > bright["Nuclei_RadialDistribution_MeanFrac_DAPI_4of4"]
    half = np.where(X > 34, 1, 0.1)[None] * np.ones((3, 1, 1))
    assert measured(disc, images=half.astype(np.float32))["Nuclei_RadialDistribution_RadialCV_DAPI_4of4"] > 0.5


def test_rings_follow_a_bent_object_round_its_corner():
    """In a U the far tip is the last in the path from the wide end, though near it as the crow flies."""
    u = ((Y >= 8) & (Y < 60) & (X >= 8) & (X < 28)) | ((Y >= 50) & (Y < 60) & (X >= 8) & (X < 60)) \
        | ((Y >= 8) & (Y < 60) & (X >= 50) & (X < 60))
    image = np.zeros((3, 68, 68), np.float32)
    image[:, 8:16, 50:60] = 1                                                   # only the far tip is bright
    v = measured(u, cell=u, images=image)
    assert v["Nuclei_RadialDistribution_FracAtD_DAPI_4of4"] == pytest.approx(1)


def test_correlation_of_equal_opposite_and_unrelated_channels():
    a = np.random.default_rng(1).random((68, 68), np.float32)
    cell = ellipse(a=30, b=30)
    v = measured(ellipse(), cell, np.stack([a, a / 2, 1 - a]))
    assert v["Cells_Correlation_Correlation_DAPI_Tubulin"] == pytest.approx(1)
    assert v["Cells_Correlation_Overlap_DAPI_Tubulin"] == pytest.approx(1)
    assert v["Cells_Correlation_Correlation_DAPI_Actin"] == pytest.approx(-1)
    assert v["Cells_Correlation_K_DAPI_Tubulin"] == pytest.approx(0.5) and v["Cells_Correlation_K_Tubulin_DAPI"] == pytest.approx(2)
    assert v["Cells_Correlation_Manders_DAPI_Tubulin"] == pytest.approx(1) and v["Cells_Correlation_Manders_DAPI_Actin"] < 0.95
    noise = np.random.default_rng(2).random((68, 68), np.float32)
    assert abs(measured(ellipse(), cell, np.stack([a, noise, a]))["Cells_Correlation_Correlation_DAPI_Tubulin"]) < 0.1


# ---------------------------------------------------------------- what is missing, and batches

def test_black_channels_and_missing_objects_are_defined_and_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        black = measured(ellipse(), images=np.zeros((3, 68, 68), np.float32))
        same = measured(ellipse(), cell=ellipse())                              # no cytoplasm
        names, none = measure(np.ones((2, 3, 68, 68), np.float32), np.zeros((2, 68, 68), np.uint8))
    assert black["Nuclei_Intensity_IntegratedIntensity_DAPI"] == 0 and black["Nuclei_Texture_Contrast_DAPI_3_00_256"] == 0
    assert np.isnan(black["Nuclei_Intensity_MassDisplacement_DAPI"])
    assert np.isnan(black["Nuclei_RadialDistribution_FracAtD_DAPI_1of4"])
    assert black["Nuclei_RadialDistribution_RadialCV_DAPI_1of4"] == 0
    assert all(np.isnan(x) == k.startswith("Cytoplasm") for k, x in same.items() if k.endswith("AreaShape_Area"))
    assert np.isnan(none).all() and len(names) == len(black) == 883


def test_a_full_patch_and_scattered_pixels_do_not_hang():
    full = np.ones((68, 68), bool)
    assert measured(full, cell=full)["Nuclei_AreaShape_MaximumRadius"] == 34
    scattered = (Y % 7 == 3) & (X % 5 == 2)
    v = measured(scattered, cell=scattered)
    assert v["Nuclei_AreaShape_EulerNumber"] == scattered.sum()


def random_cells(n, seed=0):
    rng = np.random.default_rng(seed)
    nucleus = np.stack([ellipse(*rng.uniform(30, 38, 2), *rng.uniform(8, 16, 2), rng.uniform(-90, 90)) for _ in range(n)])
    cell = nucleus | np.stack([ellipse(*rng.uniform(28, 40, 2), *rng.uniform(20, 36, 2), rng.uniform(-90, 90)) for _ in range(n)])
    images = np.stack([0.05 + 0.6 * nucleus, 0.05 + 0.4 * cell, 0.05 + 0.3 * cell], 1)
    return (images * rng.uniform(0.7, 1.3, images.shape)).astype(np.float32), (nucleus + 2 * cell).astype(np.uint8)


def test_a_cell_is_measured_and_segmented_the_same_in_any_company():
    images, masks = random_cells(9)
    together, found = measure(images, masks, chunk=4)[1], segment(images, chunk=4)
    for i in (0, 5, 8):
        alone = measure(images[i:i + 1], masks[i:i + 1])[1][0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-9, atol=1e-12)
        assert (segment(images[i:i + 1])[0] == found[i]).all()


# ---------------------------------------------------------------- segmentation

def test_segment_finds_made_cells_and_keeps_to_the_middle_one():
    images, masks = random_cells(20, seed=1)
    images[:, 0] += 0.9 * ellipse(cy=4, cx=60, a=9, b=7)                        # a brighter neighbour
    found = segment(images)
    assert np.median([overlap((f & 1) > 0, (m & 1) > 0) for f, m in zip(found, masks)]) > 0.85
    assert np.median([overlap((f & 2) > 0, (m & 2) > 0) for f, m in zip(found, masks)]) > 0.85
    assert ((found & 2) > 0)[(found & 1) > 0].all() and not (found & 1)[:, :8, 54:].any()
    assert (segment((images * 20000).astype(np.uint16)) == found).mean() > 0.99  # the scale does not matter


def test_segment_invents_nothing():
    rng = np.random.default_rng(0)
    noise = 500 + 20 * rng.standard_normal((8, 3, 68, 68))
    corner = 0.1 + np.stack([ellipse(cy=8, cx=8, a=9, b=9)] * 3).astype(float)
    speck = 0.1 + np.stack([ellipse(a=4, b=4)] * 3).astype(float)
    for images in (noise, corner[None], speck[None], np.zeros((2, 3, 68, 68)), np.ones((1, 3, 68, 68), np.uint16)):
        assert not segment(images).any()


def test_hills_part_two_summits_and_a_plateau_stays_one():
    height = np.maximum(10 - np.hypot(Y - 34, X - 20), 10 - np.hypot(Y - 34, X - 45))[None]
    label = hills(height)[0]
    assert label[34, 20] == label[34, 25] != label[34, 40] == label[34, 45]
    assert len(np.unique(hills(np.ones((1, 6, 6))))) == 1


def test_segment_field_parts_touching_nuclei_drops_specks_and_numbers_the_rest():
    y, x = np.mgrid[:200, :300]
    centres = [(50, 60), (50, 86), (120, 200), (150, 60)]                       # the first two touch
    disc = lambda r: np.max([np.hypot(y - a, x - b) <= r for a, b in centres], 0)
    dapi, stain = 0.05 + disc(14), 0.05 + disc(24)
    dapi[18:24, 8:14] = 1                                                       # a speck above them is no nucleus
    nuclei, cells = segment_field(dapi, stain, stain)
    assert sorted(np.unique(nuclei)) == [0, 1, 2, 3, 4] == sorted(np.unique(cells))
    assert len({nuclei[c] for c in centres}) == 4 and (cells[nuclei > 0] == nuclei[nuclei > 0]).all()
    assert not np.stack(segment_field(np.ones((50, 60)), np.ones((50, 60)), np.ones((50, 60)))).any()


# ---------------------------------------------------------------- the real CellProfiler

@pytest.fixture(scope="module")
def golden():
    with np.load(SHARED / "fixtures/measure/golden_measure.npz", allow_pickle=True) as f:
        g = {k: f[k] for k in f}
    assert list(g["channels"]) == ["DAPI", "Actin", "Tubulin"]
    g["patches"] = g["images"][..., [0, 2, 1]].transpose(0, 3, 1, 2)
    g["masks"] = (g["nucleus"] + 2 * g["cell"]).astype(np.uint8)
    return g


@needs_shared
@pytest.mark.parametrize("compartment", ["Nuclei", "Cells"])
def test_golden_measurements_of_cellprofiler(golden, compartment):
    names, values = measure(golden["patches"], golden["masks"])
    ours, tied = dict(zip(names, values.T)), golden[f"{compartment}_tied_centre"]
    absent, compared = set(), 0
    for name, true in zip(golden[f"{compartment}_names"], golden[f"{compartment}_values"].T):
        if f"{compartment}_{name}" not in ours:
            absent.add(str(name))
            continue
        if name in ("AreaShape_CentralMoment_0_1", "AreaShape_CentralMoment_1_0"):      # rounding noise round 0
            continue
        value, tolerance = ours[f"{compartment}_{name}"], dict(rtol=1e-6)
        if "RadialDistribution" in name:        # CellProfiler adds these up in float32
            value, true, tolerance = value[~tied], true[~tied], dict(rtol=2e-5)
        elif "Zernike" in name:
            tolerance = dict(rtol=0, atol=0.011)
        elif "MassDisplacement" in name:
            tolerance = dict(rtol=5e-4)
        elif name == "AreaShape_Orientation":
            round_ = ours[f"{compartment}_AreaShape_Eccentricity"] < 1e-3
            value, true = value[~round_], true[~round_]
        np.testing.assert_allclose(value, true, **tolerance, err_msg=str(name))
        compared += len(true)
    left_out = {"AreaShape_ConvexArea", "AreaShape_Solidity", "AreaShape_MaxFeretDiameter", "AreaShape_MinFeretDiameter"}
    assert {n for n in absent if "_5_0" not in n} == left_out and compared > 4000


@needs_shared
def test_features_of_the_real_cells_have_the_same_names_and_values():
    pd = pytest.importorskip("pandas")
    table = pd.read_csv(SHARED / "data/features.csv.gz")
    with np.load(SHARED / "data/bbbc021_crops.npz") as f, np.load(SHARED / "data/masks.npz") as g:
        index = np.flatnonzero(table.segmentation_ok)[::25]
        images, masks = f["images"][index][..., [0, 2, 1]].transpose(0, 3, 1, 2) * 16, g["masks"][index]
    names, values = measure(images, masks)
    assert set(names) <= set(table) and all(n.split("_")[1] == "Location" or n.endswith(("ConvexArea", "Solidity", "FeretDiameter"))
                                            for n in set(table.columns[2:]) - set(names))
    for name, value in zip(names, values.T):
        true = table[name].to_numpy()[index]                                    # six significant digits
        if "CentralMoment_0_1" in name or "CentralMoment_1_0" in name:
            continue
        if "Zernike" in name:
            close = np.abs(value - true) < 0.011
        else:
            close = np.isclose(value, true, rtol=2e-5, atol=1e-9, equal_nan=True)
        if "Orientation" in name:
            close = close[table[name.replace("Orientation", "Eccentricity")].to_numpy()[index] > 1e-3]
        assert close.mean() >= (0.7 if "Radial" in name else 0.99), (name, close.mean())       # tied centres move the rings


@needs_shared
def test_overlap_with_the_real_masks(golden):
    found = segment(golden["patches"])
    nucleus = [overlap((f & 1) > 0, m) for f, m in zip(found, golden["nucleus"])]
    cell = [overlap((f & 2) > 0, m) for f, m in zip(found, golden["cell"])]
    wrong = [overlap((f & 1) > 0, m) for f, m in zip(found, np.roll(golden["nucleus"], 1, 0))]
    print(f"median IoU on 24 real cells: nucleus {np.median(nucleus):.3f}, cell {np.median(cell):.3f}")
    assert np.median(nucleus) > 0.9 and np.median(cell) > 0.9 > 0.85 > np.median(wrong)


@needs_shared
def test_overlap_with_the_true_masks_of_the_simulated_field():
    image = pytest.importorskip("PIL.Image")
    read = lambda name: np.array(image.open(SHARED / "fixtures/cellprofiler_sim/images" / name))
    nuclei, cells = segment_field(*(read(f"Week1_150607_C05_s1_w{c}SIM0002.tif") for c in (1, 2, 4)))
    for found, name, least in ((nuclei, "nuclei", 0.9), (cells, "cells", 0.85)):
        true = read(f"truth_{name}_C05_s1.tif")
        score = []
        for label in np.unique(true)[1:]:
            count = np.bincount(found[true == label], minlength=1)
            count[0] = 0
            score.append(overlap(true == label, found == count.argmax()) if count.any() else 0)
        print(f"median IoU on {len(score)} simulated {name}: {np.median(score):.3f}")
        assert np.median(score) > least


@long
def test_cp_measure_agrees():
    """The optional engine and ours on rendered cells: sizes, intensities and textures of all three compartments to 1e-5 (theirs sums in float32)."""
    pytest.importorskip("cp_measure.bulk")
    _, table = prepare.simulate_table(100, 0)
    images = (prepare.render(table[:20]) * 65535).astype(np.uint16)
    masks = segment(images)
    masks[3] = 0  # a cell that was not found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (pd.DataFrame(v, columns=n) for n, v in (prepare.measure_by_cp_measure(images, masks), measure(images, masks)))
    assert theirs.iloc[3].isna().all() and len(set(theirs) - set(ours)) > 100  # it knows more: granularity, convex hull, ...
    both = [c for c in ours if c in theirs and re.search("_Texture_|_Intensity_(?!MassD|MAD)|Area$|AxisLength|Eccentricity|Perimeter$", c)]
    assert len(both) > 400
    difference = (theirs[both] - ours[both]).abs() / (ours[both].abs() + ours[both].abs().median() * 1e-3 + 1e-9)
    worst = difference.max()
    assert (worst < 1e-5).mean() > 0.97, worst.sort_values().tail(20)


@needs_shared
@long
def test_speed_beside_cp_measure():
    """One thread, the same 100 real cells: cp_measure on nuclei (3 channels) and cells (2), ours on these and cytoplasm (2) too."""
    core = pytest.importorskip("cp_measure.bulk").get_core_measurements()
    with np.load(SHARED / "data/bbbc021_crops.npz") as f, np.load(SHARED / "data/masks.npz") as g:
        index = np.flatnonzero(g["masks"].any((1, 2)))[::59][:100]
        images, masks = f["images"][index][..., [0, 2, 1]].transpose(0, 3, 1, 2) * 16, g["masks"][index]

    def tile(patches):      # (100, 68, 68) -> one image with a gap of 4 pixels
        return np.pad(patches, ((0, 0), (2, 2), (2, 2))).reshape(10, 10, 72, 72).swapaxes(1, 2).reshape(720, 720)

    pixels = [tile((images[:, c] / np.float32(65535)).astype(np.float32)) for c in range(3)]
    labels = [tile(((masks & bit) > 0) * np.arange(1, 101)[:, None, None]) for bit in (1, 2)]

    def theirs():
        for label, channels in zip(labels, ((0, 1, 2), (1, 2))):
            for name in ("sizeshape", "zernike"):
                core[name](label, None)
            for name in ("intensity", "texture", "radial_distribution"):
                for c in channels:
                    core[name](label, pixels[c])

    def rate(job):
        job()
        start = time.process_time()
        job()
        return 100 / (time.process_time() - start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = rate(theirs)
    own = rate(lambda: measure(images, masks))
    print(f"patches/s on one thread (CPU time): cp_measure {other:.0f}, ours {own:.0f}, {own / other:.1f}x")
    assert own > 5 * other


# ---------------------------------------------------------------------------------------------------------------------
# Whole fields and CellProfiler's exports


def write_export(folder, without_cell=(), without_cytoplasm=()):
    """2 fields x 5 nuclei by rule, as ExportToSpreadsheet writes them; cells are numbered backwards, so that number and parent disagree.

    Area tells whose it is: 100 field + nucleus + (0, 10, 20) in Nuclei, Cells, Cytoplasm. Returns {file: frame}.
    """
    nuclei, cells, cytoplasm = [], [], []
    for field in (1, 2):
        whole = [k for k in (5, 4, 3, 2, 1) if k not in without_cell]
        for k in (1, 2, 3, 4, 5):
            base = {"ImageNumber": field, "Location_Center_X": 9 * k + 3.5, "Location_Center_Y": 10.25, "AreaShape_BoundingBoxMinimum_X": 9 * k,
                    "AreaShape_BoundingBoxMaximum_X": 9 * k + 8, "AreaShape_BoundingBoxMinimum_Y": 5, "AreaShape_BoundingBoxMaximum_Y": 15}
            nuclei.append({**base, "ObjectNumber": k, "AreaShape_Area": 100 * field + k, "Intensity_MeanIntensity_DAPI": 0.5})
            if k in whole:
                gone = k in without_cytoplasm
                cells.append({**base, "ObjectNumber": whole.index(k) + 1, "Parent_Nuclei": k, "AreaShape_Area": 100 * field + k + 10})
                cytoplasm.append({**cells[-1], "AreaShape_Area": 100 * field + k + 20, "Intensity_MeanIntensity_DAPI": 0 if gone else k / 8,
                                  "Parent_Nuclei": 0 if gone else k, "gone": gone})
    tables = {name: pd.DataFrame(rows).sort_values(["ImageNumber", "ObjectNumber"], ignore_index=True)
              for name, rows in (("Nuclei", nuclei), ("Cells", cells), ("Cytoplasm", cytoplasm))}
    table = tables["Cytoplasm"]
    shape = [c for c in table if c.startswith("AreaShape")]
    for _, rows in table.groupby("ImageNumber"):  # CellProfiler 4.2: AreaShape of those that exist fills the first rows
        there = rows[~rows["gone"]][shape].to_numpy(float)
        table.loc[rows.index, shape] = np.vstack([there, np.full((len(rows) - len(there), len(shape)), np.nan)])
    table.loc[table["gone"], ["Location_Center_X", "Location_Center_Y"]] = np.nan
    tables["Cytoplasm"] = table.drop(columns="gone")
    tables["Image"] = pd.DataFrame({"ImageNumber": [1, 2], **{f"FileName_{c}": [f"B02_s1_{c}.tif", f"B02_s2_{c}.tif"] for c in data.CHANNELS},
                                    "Metadata_Plate": "P1", "Metadata_Well": "B02", "Metadata_Compound": "NA", "Metadata_Concentration": [0.5, 3]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return tables


def merged_objects(tables):
    """The object tables side by side, paired by number, as CellProfiler does it for one table: columns (object, name)."""
    parts = {o: tables[o].assign(Number_Object_Number=tables[o]["ObjectNumber"]).set_index(["ImageNumber", "ObjectNumber"]) for o in data.OBJECTS}
    return pd.concat(parts, axis=1).sort_index()


def write_database(path, tables, single):
    """The tables as ExportToDatabase writes them."""
    with sqlite3.connect(path) as connection:
        tables["Image"].add_prefix("Image_").rename(columns={"Image_ImageNumber": "ImageNumber"}).to_sql("MyExpt_Per_Image", connection, index=False)
        if single:
            one = merged_objects(tables)
            one.set_axis(["_".join(c) for c in one.columns], axis=1).reset_index().to_sql("MyExpt_Per_Object", connection, index=False)
        else:
            for o in data.OBJECTS:
                own = tables[o].add_prefix(f"{o}_").rename(columns={f"{o}_ImageNumber": "ImageNumber", f"{o}_ObjectNumber": f"{o}_Number_Object_Number"})
                own.to_sql(f"MyExpt_Per_{o}", connection, index=False)
    return path


def read_whole(path, **options):
    """An export -> (cells with their measurements, images, report)."""
    cells, images, names, _, pieces, report = data.read_export(path, **options)
    values = np.full((len(cells), len(names)), np.nan, np.float32)
    data.fill_features(values, names, pieces)
    return pd.concat([cells, pd.DataFrame(values, columns=names)], axis=1), images, report


def assert_own_values(cells, kept=(1, 2, 3, 4, 5), without_cytoplasm=()):
    """Every cell has the measurements of its own nucleus, cell and cytoplasm."""
    number = cells["cell"].str.rsplit("_", n=1).str[1].astype(int)
    assert list(number) == [*kept, *kept]
    own = np.repeat([100, 200], len(kept)) + number
    assert (cells["Nuclei_AreaShape_Area"] == own).all() and (cells["Cells_AreaShape_Area"] == own + 10).all()
    there = ~number.isin(without_cytoplasm)
    assert (cells["Cytoplasm_AreaShape_Area"][there] == own[there] + 20).all() and cells["Cytoplasm_AreaShape_Area"][~there].isna().all()
    assert (cells["Cytoplasm_Intensity_MeanIntensity_DAPI"][there] == number[there] / 8).all()
    assert cells["Cytoplasm_Intensity_MeanIntensity_DAPI"][~there].isna().all()  # CellProfiler writes 0 there
    assert (cells["x"] == 9 * number + 3.5).all() and (cells["y"] == 10.25).all()


@pytest.mark.parametrize("gone", [{}, {"without_cell": (2,), "without_cytoplasm": (4,)}])
@pytest.mark.parametrize("form", ["csv", "tables", "single", "two-row header"])
def test_objects_are_paired_by_parents(tmp_path, monkeypatch, gone, form):
    monkeypatch.setattr(data, "CHUNK", 3)  # no chunk ends where a field does
    tables, path = write_export(tmp_path / "csv", **gone), tmp_path / "csv"
    if form in ("tables", "single"):
        path = write_database(tmp_path / "a.db", tables, form == "single")
    if form == "two-row header":
        one = merged_objects(tables).reset_index()
        for o in data.OBJECTS:
            (path / f"{o}.csv").unlink()
        head = [["Image", "Cells", *[c[0] for c in one.columns[2:]]], ["ImageNumber", "ObjectNumber", *[c[1] for c in one.columns[2:]]]]
        (path / "object.csv").write_text("\n".join(",".join(h) for h in head) + "\n" + one.to_csv(index=False, header=False))
    cells, images, report = read_whole(path)
    assert_own_values(cells, [k for k in (1, 2, 3, 4, 5) if k not in gone.get("without_cell", ())], gone.get("without_cytoplasm", ()))
    assert list(images["FileName_Tubulin"]) == ["B02_s1_Tubulin.tif", "B02_s2_Tubulin.tif"] and set(cells["compound"]) == {"NA"}
    assert cells["cell"].iloc[0] == "B02_s1_DAPI_1" and set(cells["plate"]) == {"P1"}
    said = "\n".join(report)
    assert ("paired again by Parent_Nuclei" in said) == (form in ("single", "two-row header"))
    for line in ("2 nuclei have no cell", "2 cells have no Cytoplasm", "5 columns of Cytoplasm stand beside the rows of absent objects"):
        assert (line in said) == bool(gone)


def test_only_misplaced_columns_move(tmp_path):
    table = write_export(tmp_path, without_cytoplasm=(4,))["Cytoplasm"]
    table.assign(Texture_A=table["Parent_Nuclei"].where(table["Parent_Nuclei"].between(2, 5))).to_csv(tmp_path / "Cytoplasm.csv", index=False)
    cells = read_whole(tmp_path)[0]
    assert_own_values(cells, without_cytoplasm=(4,))
    assert cells["Cytoplasm_Texture_A"].tolist() == pytest.approx([np.nan, 2, 3, np.nan, 5] * 2, nan_ok=True)


@pytest.mark.parametrize("ends", [b"\r\n", b"\r"])
def test_export_names_and_line_ends(tmp_path, ends):
    write_export(tmp_path)
    for path in list(tmp_path.glob("*.csv")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"B02_s1_DAPI", b"plate/B02_s1_DAPI").replace(b"\n", ends))
    (tmp_path / "Nuclei.csv").rename(tmp_path / "MyExpt_nuclei.CSV")
    (tmp_path / "Image.csv").rename(tmp_path / "image.csv")
    cells, images, _ = read_whole(tmp_path)
    assert_own_values(cells)
    assert list(images["FileName_DAPI"]) == ["B02_s1_DAPI.tif", "B02_s2_DAPI.tif"]


def test_folders_of_exports(tmp_path):
    for site in ("a", "b"):
        table = write_export(tmp_path / site)["Image"]
        table.replace("B02", site, regex=True).to_csv(tmp_path / site / "Image.csv", index=False)
    cells, images, _ = read_whole(tmp_path)
    assert_own_values(cells[:10]), assert_own_values(cells[10:])
    assert list(images["field"]) == ["a_s1_DAPI", "a_s2_DAPI", "b_s1_DAPI", "b_s2_DAPI"] and cells["field"].iloc[10] == "b_s1_DAPI"
    (tmp_path / "b/Nuclei.csv").write_bytes(b"")
    with pytest.raises(data.InputError, match="b/Nuclei.csv: is empty"):
        read_whole(tmp_path)
    cells, images, report = read_whole(tmp_path, skip_bad=True)
    assert_own_values(cells)
    assert len(images) == 2 and report[0].startswith("skipped ") and "b/Nuclei.csv: is empty" in report[0]
    write_export(tmp_path / "b")
    with pytest.raises(data.InputError, match="'B02_s1_DAPI' stands in two rows"):
        write_export(tmp_path / "a"), read_whole(tmp_path)
    table.replace("B02", "b", regex=True).to_csv(tmp_path / "b/Image.csv", index=False)
    tables = write_export(tmp_path / "a")
    tables["Cells"].assign(Texture_Extra=1.0).to_csv(tmp_path / "a/Cells.csv", index=False)
    with pytest.raises(data.InputError, match="b: has other features than the exports before it, e.g. Cells_Texture_Extra"):
        read_whole(tmp_path)
    write_export(tmp_path / "a")
    for o in data.OBJECTS:  # fields without cells: headers without rows
        (tmp_path / f"b/{o}.csv").write_text((tmp_path / f"b/{o}.csv").read_text().split("\n")[0] + "\n")
    cells, images, report = read_whole(tmp_path)
    assert_own_values(cells)
    assert len(images) == 4 and "2 of 4 fields have no cells" in report[0]


REFUSED = [  # a file, what is done to its table -> the line
    ("Nuclei.csv", lambda t: None, "has no Nuclei.csv, it has Cells.csv"),
    ("Image.csv", lambda t: None, "has no Image.csv"),
    ("Image.csv", lambda t: t[:1], "objects of image 2 .Nuclei. have no row in the Image table"),
    ("Image.csv", lambda t: t.assign(ImageNumber=1), "image 1 stands twice"),
    ("Image.csv", lambda t: t.drop(columns="ImageNumber"), "no column ImageNumber"),
    ("Nuclei.csv", lambda t: t[:0], "no cell in it"),
    ("Nuclei.csv", lambda t: t.drop(columns="ImageNumber"), "no column ImageNumber"),
    ("Nuclei.csv", lambda t: t.drop(columns="ObjectNumber"), "Nuclei has no column ObjectNumber"),
    ("Nuclei.csv", lambda t: t.drop(columns="Location_Center_X"), "neither Location_Center_X, _Y nor AreaShape_Center_X"),
    ("Nuclei.csv", lambda t: pd.concat([t, t]), "Nuclei has object 1 of one image twice"),
    ("Nuclei.csv", lambda t: pd.concat([t, t[["AreaShape_Area"]]], axis=1), "column Nuclei_AreaShape_Area stands twice"),
    ("Nuclei.csv", lambda t: t.assign(Texture_A=["1"] * 3 + ["high"] + ["1"] * 6), "Nuclei.csv, row 5, column Nuclei_Texture_A: 'high' is not a number"),
    ("Nuclei.csv", lambda t: t.assign(AreaShape_BoundingBoxMinimum_X=[40] + [0] * 9), "1 of 10 Nuclei lie outside their own bounding box"),
    ("Cells.csv", lambda t: t.drop(columns="Parent_Nuclei"), "Cells has no Parent_Nuclei, and numbers do not pair objects"),
    ("Cells.csv", lambda t: t.assign(Parent_Nuclei=1), "image 1 has two Cells with parent nucleus 1"),
]


@pytest.mark.parametrize("name, change, line", REFUSED, ids=[line for *_, line in REFUSED])
def test_exports_refused_by_name(tmp_path, name, change, line):
    table = change(write_export(tmp_path)[name[:-4]])
    (tmp_path / name).unlink() if table is None else table.to_csv(tmp_path / name, index=False)
    with pytest.raises(data.InputError, match=line) as error:
        read_whole(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_exports(tmp_path):
    tables = write_export(tmp_path / "csv")
    path = tmp_path / "csv/Cells.csv"
    path.write_text(path.read_text().rsplit(",", 1)[0] + "\n")
    with pytest.raises(data.InputError, match="Cells.csv: row 11 has 9 fields, the header 10"):
        read_whole(tmp_path / "csv")
    path.write_text(path.read_text().rstrip("\n") + ",1,2\n")
    with pytest.raises(data.InputError, match="Cells.csv: row 11 has 11 fields, the header 10"):
        read_whole(tmp_path / "csv")
    (tmp_path / "empty").mkdir()
    for missing in ("csv/Cells.csv", "nothing", "empty"):
        with pytest.raises(data.InputError, match="expected the folder of CellProfiler's CSV files or its SQLite file"):
            read_whole(tmp_path / missing)
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(data.InputError, match="not a readable SQLite file"):
        read_whole(tmp_path / "text.db")
    with closing(sqlite3.connect(tmp_path / "bare.db")) as connection:
        connection.execute("create table Per_Image (ImageNumber)")
    with pytest.raises(data.InputError, match="no Per_Image with Per_Nuclei or Per_Object"):
        read_whole(tmp_path / "bare.db")
    path = write_database(tmp_path / "two.db", tables, False)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table Old_Per_Nuclei (ImageNumber)")
    with pytest.raises(data.InputError, match="MyExpt_Per_Nuclei and Old_Per_Nuclei are two exports"):
        read_whole(path)
    tables["Nuclei"]["Texture_A"] = ["1"] * 3 + ["high"] + ["1"] * 6
    with pytest.raises(data.InputError, match="table MyExpt_Per_Nuclei, row 4, column Nuclei_Texture_A: 'high'"):
        read_whole(write_database(tmp_path / "a.db", tables, False))


def test_other_values(tmp_path):
    """Missing and infinite values, a constant column, nuclei alone, text columns beside the measurements."""
    nuclei = write_export(tmp_path)["Nuclei"].assign(Texture_A=[np.nan] + [1.0] * 9, Texture_Same=3, Texture_Inf=[np.inf] + [1.0] * 9, Metadata_Well="NA")
    pd.concat([nuclei, nuclei[["Metadata_Well"]]], axis=1).to_csv(tmp_path / "Nuclei.csv", index=False)  # image metadata repeat in real exports
    (tmp_path / "Cells.csv").unlink(), (tmp_path / "Cytoplasm.csv").unlink()
    cells, _, report = read_whole(tmp_path)
    assert report == [f"{tmp_path}: no table of {o}, so no {o}_ features" for o in ("Cells", "Cytoplasm")]
    assert cells["Nuclei_Texture_A"].isna().sum() == 1 and (cells["Nuclei_Texture_Same"] == 3).all() and "Nuclei_Metadata_Well" not in cells


def test_flat_table(tmp_path):
    write_export(tmp_path / "csv")
    whole = data.read_table(tmp_path / "csv")
    assert {"cell", "plate", "compound", "Cells_AreaShape_Area"} <= set(whole)
    whole.assign(Nuclei_Location_Center_X=1).to_csv(tmp_path / "flat.csv", index=False)
    flat = data.read_table(tmp_path / "flat.csv")
    names = [c for c in whole if data.FEATURE.fullmatch(c)]
    assert flat["cell"].tolist() == whole["cell"].tolist() and np.array_equal(flat[names], whole[names]) and "Nuclei_Location_Center_X" not in flat
    (tmp_path / "flat.csv").write_text("Nuclei_AreaShape_Area\n3\nlarge\n")
    with pytest.raises(data.InputError, match="flat.csv, row 3, column Nuclei_AreaShape_Area: 'large' is not a number"):
        data.read_table(tmp_path / "flat.csv")


@needs_shared
def test_real_exports():
    """What CellProfiler 4.2.8 wrote for the simulated fields: CSV, two SQLite forms, and an export whose numbers pair nothing."""
    folder = SHARED / "fixtures/cellprofiler_sim"
    whole, images, report = read_whole(folder / "csv")
    names = [c for c in whole if data.FEATURE.fullmatch(c)]
    assert len(whole) == 356 and len(images) == 4 and len(names) == 868 and report == []
    assert list(images["Metadata_Well"]) == ["B02", "B02", "C05", "D07"] and set(whole["plate"]) == {"Week1_22123"}
    for name in ("per_object_tables.db", "single_table.db"):
        other = read_whole(folder / "sqlite" / name)[0]
        assert other["cell"].tolist() == whole["cell"].tolist() and other["site"].tolist() == whole["site"].tolist()
        np.testing.assert_allclose(other[names], whole[names], rtol=1e-6, atol=1e-30)  # one unit of float32
    cells, _, report = read_whole(folder / "csv_renumbered")
    assert len(cells) == 351 and "40 nuclei have no cell" in report[0] and "174 columns of Cytoplasm" in report[1] and "232 cells have no Cytoplasm" in report[2]
    key = ["field", "x", "y"]
    both = whole.round({"x": 6, "y": 6}).merge(cells.round({"x": 6, "y": 6}), on=key)  # the same nuclei, found by their place
    assert len(both) > 300
    shared = [c for c in names if c in cells and c.startswith(("Nuclei_AreaShape_", "Nuclei_Intensity_"))]
    np.testing.assert_allclose(both[[f"{c}_x" for c in shared]], both[[f"{c}_y" for c in shared]], rtol=1e-6)
    # a cytoplasm is part of its cell, and mean times area is the sum: this ties moved columns to unmoved ones
    there = cells["Cytoplasm_AreaShape_Area"].notna()
    assert there.sum() == 119 and (cells["Cytoplasm_AreaShape_Area"] <= cells["Cells_AreaShape_Area"])[there].all()
    for c in data.CHANNELS:
        assert (cells[f"Cytoplasm_Intensity_MaxIntensity_{c}"] <= cells[f"Cells_Intensity_MaxIntensity_{c}"])[there].all()
        np.testing.assert_allclose((cells["Cytoplasm_AreaShape_Area"] * cells[f"Cytoplasm_Intensity_MeanIntensity_{c}"])[there],
                                   cells[f"Cytoplasm_Intensity_IntegratedIntensity_{c}"][there], rtol=1e-5)


@needs_shared
def test_real_edges():
    """cytominer's layouts: folders of folders, headers without rows, an empty file, a row too short, objects without image, NaN."""
    edge = SHARED / "fixtures/tables_edge"
    cells, images, report = read_whole(edge / "cytominer_data_a")
    assert len(cells) == 40 and len(images) == 8 and report == []
    for folder, line in (("E17-4", "Nuclei.csv: is empty"), ("J21-2", "Cells.csv: row 2 has 564 fields, the header 586"), ("N23-5", "objects of image 3011")):
        with pytest.raises(data.InputError, match=line):
            read_whole(edge / "cytominer_data_b" / folder)
    cells, images, report = read_whole(edge / "cytominer_data_b", skip_bad=True)
    assert len(cells) == 40 and len(images) == 4 and sum(line.startswith("skipped") for line in report) == 3
    assert cells["Cells_AreaShape_Area"].notna().all() and cells.isna().to_numpy().sum() == 1  # the one nan of B01-2/Cells.csv


# BBBC021's own tables


@needs_shared
@pytest.mark.parametrize("name", ["BBBC021_v1_moa.csv", "BBBC021_v1_moa_quoted.csv"])
def test_real_metadata(name):
    """Bare CR, quoted 3.000000, commas, slashes, UNKNOWN: all join as they should."""
    folder = SHARED / "fixtures/bbbc021_meta"
    moa, table = prepare.read_moa(folder / name), data.read_csv(folder / "BBBC021_v1_image.csv", dtype=str)
    told = data.annotate(table).assign(field=table["Image_FileName_DAPI"].str.removesuffix(".tif"))
    fields, _ = prepare.complete_cells(told.assign(cell=told["field"]), moa)
    wells = lambda t: len(t.drop_duplicates(["plate", "well"]))
    treated = fields[~fields["moa"].isin(["unknown", "DMSO"])]
    assert (len(moa), len(fields), fields["plate"].nunique(), wells(fields), fields["compound"].nunique()) == (104, 13200, 55, 3300, 113)
    assert (treated["compound"].nunique(), len(treated.drop_duplicates(["compound", "concentration"])), treated["moa"].nunique()) == (38, 103, 12)
    dmso = fields[fields["moa"] == "DMSO"]
    assert wells(dmso) == 330 and (dmso["concentration"] == 0).all() and (fields["moa"] != "unknown").sum() == 3848
    assert (fields["compound"] == "UNKNOWN").sum() == 64 and (fields["plate"] == "Week4_27481").sum() == 240
    assert {"ICI-182,780", "mevinolin/lovastatin", "cyclohexamide"} <= set(fields["compound"])
    assert sorted(fields["site"].unique()) == ["1", "2", "3", "4"] and (fields.groupby(["plate", "well"])["site"].nunique() == 4).all()
    stay, report = prepare.choose_cells(fields, "drop", None, None, 0)
    assert (~stay).sum() == 1320 and "1320" in report[0]
    taxol = fields[stay & (fields["compound"] == "taxol") & (fields["concentration"] == 0.3)]
    assert wells(taxol) == 3 and set(taxol["well"]) == {"D05"}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_metadata_traps(tmp_path, ends):
    """Line ends, a compound with a comma, concentrations as text, names that pandas reads as missing, file names without a plate."""
    head = "TableNumber,ImageNumber,Image_FileName_DAPI,Image_PathName_DAPI,Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Replicate,Image_Metadata_Compound,Image_Metadata_Concentration"
    rows = ['4,1,G10_s1_w1A.tif,Week4/x,Week4_27481,G10,1,"ICI-182,780",0.300000', "4,2,Week1_D05_s2_w1B.tif,x,Week1_22123,D05,1,taxol,0.300000",
            "5,1,C_s3_w1C.tif,x,Week1_22123,B11,1,taxol,.3", "5,2,D_s4_w1D.tif,x,NA,B02,1,DMSO,0", "5,3,E_w1E.tif,x,Week2_24121,B03,2,UNKNOWN,3e0"]
    (tmp_path / "image.csv").write_bytes(ends.join([head, *rows]).encode())
    (tmp_path / "moa.csv").write_bytes(ends.join(["compound,concentration,moa", '"ICI-182,780",3e-1,X', '"taxol","0.300000",Y']).encode())
    told = data.annotate(data.read_csv(tmp_path / "image.csv", dtype=str)).assign(field=["G10_s1_w1A", "Week1_D05_s2_w1B", "C_s3_w1C", "D_s4_w1D", "E_w1E"])
    cells, report = prepare.complete_cells(told.assign(cell=told["field"]), prepare.read_moa(tmp_path / "moa.csv"))
    assert list(cells["compound"]) == ["ICI-182,780", "taxol", "taxol", "DMSO", "UNKNOWN"] and list(cells["concentration"]) == [0.3, 0.3, 0.3, 0, 3]
    assert list(cells["plate"]) == ["Week4_27481", "Week1_22123", "Week1_22123", "NA", "Week2_24121"]
    assert list(cells["site"]) == ["1", "2", "3", "4", "unknown"] and list(cells["moa"]) == ["X", "Y", "Y", "DMSO", "unknown"]
    assert list(prepare.choose_cells(cells, "drop", None, None, 0)[0]) == [True, True, False, True, True]
    assert report == ["1 cells have no site: set to 'unknown'", "1 cells have no mechanism: set to 'unknown'"]
    for text, line in (("a,1,X\na,1.000,Y\n", "treatment .'a', 1.0. stands in two rows"), ("a,high,X\n", "row 2: concentration 'high' is not a number")):
        (tmp_path / "moa.csv").write_text("compound,concentration,moa\n" + text)
        with pytest.raises(data.InputError, match=line):
            prepare.read_moa(tmp_path / "moa.csv")


@needs_shared
def test_real_feature_names():
    columns = pd.read_csv(SHARED / "fixtures/bbbc021_meta/ljosa_jbiomolscreen_2013_per_well_mean.csv.gz", nrows=1).columns
    features, dropped, _ = data.sort_columns(columns)
    assert len(features) + sum(r == "zero by definition" for r in dropped.values()) == 459 and "Image_Metadata_Plate" not in features


# Pixels


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_kinds(tmp_path, dtype, compression):
    field = (np.arange(70 * 90).reshape(70, 90) * 37 % np.iinfo(dtype).max).astype(dtype)
    path = tmp_path / "a.tif"
    for strip in (3, 70):
        Image.fromarray(field).save(path, compression=compression, tiffinfo={278: strip})
        read = prepare.read_tiff(path)
        assert read.dtype == dtype and read.dtype.isnative and np.array_equal(read, field) and prepare.read_tiff(path, True) == (70, 90)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(data.InputError, match="a.tif: damaged, cut short or no TIFF") as error:
        prepare.read_tiff(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order, swap, black", [("<", False, 1), (">", False, 1), ("<", True, 1), ("<", False, 0)])
def test_tiff_bytes(tmp_path, order, swap, black):
    """Big-endian, strips out of order, white as 0: written by hand."""
    field = np.arange(24, dtype=np.uint16).reshape(6, 4) * 1000
    pixels = b"".join(h.astype(order + "u2").tobytes() for h in ((field[3:], field[:3]) if swap else (field[:3], field[3:])))
    tags = [(256, 3, 1, 4), (257, 3, 1, 6), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, black), (273, 4, 2, 0), (277, 3, 1, 1), (278, 3, 1, 3), (279, 4, 2, 0)]
    end = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    pack = lambda kind, *v: np.array(v, order + kind).tobytes()
    ifd = pack("u2", len(tags)) + b"".join(pack("u2", t, k) + pack("u4", n) + (pack("u4", end + 8 * (t == 279)) if n == 2 else pack("u2", v, 0))
                                           for t, k, n, v in tags) + pack("u4", 0)
    path = tmp_path / "a.tif"
    path.write_bytes((b"II*\0" if order == "<" else b"MM\0*") + pack("u4", 8 + len(pixels)) + pixels + ifd
                     + pack("u4", *((32, 8) if swap else (8, 32))) + pack("u4", 24, 24))
    if black:
        assert np.array_equal(prepare.read_tiff(path), field) and prepare.read_tiff(path).dtype.isnative
    else:
        with pytest.raises(data.InputError, match="black 0"):
            prepare.read_tiff(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_tiff_refused(tmp_path):
    grey = Image.fromarray(np.zeros((8, 8), np.uint16))
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.tif"), Image.new("F", (8, 8)).save(tmp_path / "float.tif"), grey.save(tmp_path / "png.tif", "PNG")
    grey.save(tmp_path / "two.tif", save_all=True, append_images=[grey])
    for name in ("rgb.tif", "float.tif", "png.tif", "two.tif"):
        with pytest.raises(data.InputError, match=f"{name}: .* expected a TIFF of one page, one grey channel"):
            prepare.read_tiff(tmp_path / name)
    for name, content in (("text.tif", b"hello"), ("none.tif", b""), ("head.tif", b"II*\0\x08\0\0\0")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.InputError, match=f"{name}: damaged, cut short or no TIFF"):
            prepare.read_tiff(tmp_path / name)
    with pytest.raises(data.InputError, match="no such file"):
        prepare.read_tiff(tmp_path / "absent.tif")


def test_images_are_found_by_name(tmp_path):
    for folder, name, value in (("Week4/Week4_27481", "a.tif", 1), ("x", "b.TIF", 2), ("y", "a.tif", 1), ("y", "._a.tif", 9), ("y", "notes.txt", 3)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(bytes([value]))
    assert prepare.index_files(tmp_path) == {"a.tif": tmp_path / "Week4/Week4_27481/a.tif", "b.TIF": tmp_path / "x/b.TIF"}
    (tmp_path / "y/a.tif").write_bytes(b"\x05")
    with pytest.raises(data.InputError, match="have one name and different pixels"):
        prepare.index_files(tmp_path)
    with pytest.raises(data.InputError, match="no .tif"):
        prepare.index_files(tmp_path / "none")


@needs_shared
def test_real_crop():
    """The circulating crop of a real BBBC021 field, bit for bit; stored DAPI, actin, tubulin."""
    folder = SHARED / "fixtures/bbbc021_field"
    field = [prepare.read_tiff(next(folder.glob(f"*_{w}*.tif"))) for w in ("w1", "w4", "w2")]
    patches = prepare.cut(field, np.array([1139 + 34.45]), np.array([565 + 34.45]))
    assert field[0].dtype == np.uint16 and np.array_equal(patches[0], np.load(next(folder.glob("*.npy"))).transpose(2, 0, 1))
    assert np.array_equal(np.asarray(Image.open(next(folder.glob("*_w1*.tif")))), field[0])  # Pillow's own, slower decoder


# From files to the prepared folder


@pytest.fixture
def small(monkeypatch):
    """A simulation of six wells in place of 108."""
    plates = prepare.simulated_plates
    monkeypatch.setattr(prepare, "simulated_plates", lambda seed: plates(seed).iloc[:6])


def fields_command(release, out, *options):
    return ["--images", f"{release}/images", "--cellprofiler", f"{release}/cellprofiler", "--image-csv", f"{release}/BBBC021_v1_image.csv",
            "--moa", f"{release}/BBBC021_v1_moa.csv", "--out", str(out), "--workers", "1", *options]


def test_release_gives_the_simulated_cells(tmp_path, small, capsys):
    """Fields and tables written as BBBC021 and CellProfiler do, read back: every cell has its own patch and measurements."""
    prepare.main(["--simulate", "100", "--write-release", str(tmp_path / "release")])
    prepare.main(["--simulate", "100", "--out", str(tmp_path / "direct"), "--workers", "1"])
    prepare.main(fields_command(tmp_path / "release", tmp_path / "read", "--workers", "2"))
    direct, read = data.open_folder(tmp_path / "direct"), data.open_folder(tmp_path / "read")
    assert b"\r" in (tmp_path / "release/BBBC021_v1_moa.csv").read_bytes() and set(read.features) == set(direct.features)
    assert np.array_equal(direct.patches, read.patches) and len(read) == 100
    assert np.array_equal(direct.raw, read.raw[:, [read.features.index(f) for f in direct.features]])
    told = [c for c in data.CELL_COLUMNS if c not in ("cell", "field")]
    assert direct.cells[told].astype(str).equals(read.cells[told].astype(str))
    tables = [pd.read_csv(tmp_path / f"release/cellprofiler/{o}.csv") for o in data.OBJECTS]
    assert any((t["ObjectNumber"] != t["Parent_Nuclei"]).mean() > 0.8 for t in tables[1:])  # numbers pair nothing
    with pytest.raises(data.InputError, match="exists already"):
        prepare.main(["--simulate", "100", "--write-release", str(tmp_path / "release")])


def test_options_work_for_fields(tmp_path, small):
    release = tmp_path / "release"
    prepare.main(["--simulate", "100", "--write-release", str(release)])
    cells, _ = prepare.simulate_table(100, 0)
    (tmp_path / "exclude.csv").write_text(f"plate,well\n{cells['plate'][0]},{cells['well'][0]}\n")
    image = release / "BBBC021_v1_image.csv"
    image.write_text(image.read_text().replace(cells["compound"].iloc[-1] + ",", "taxol,", 1))
    prepare.main(fields_command(release, tmp_path / "a", "--exclude", str(tmp_path / "exclude.csv"), "--limit", "40"))
    whole = data.open_folder(tmp_path / "a")
    assert len(whole) == 40 and not ((whole.cells["plate"] == cells["plate"][0]) & (whole.cells["well"] == cells["well"][0])).any()

    # the same cells have the same patches, whatever else is kept
    prepare.main(fields_command(release, tmp_path / "b"))
    every = data.open_folder(tmp_path / "b")
    place = every.cells.set_index("cell").index.get_indexer(whole.cells["cell"])
    assert np.array_equal(every.patches[place], whole.patches) and np.array_equal(every.raw[place], whole.raw)

    prepare.main(["--simulate", "100", "--limit", "40", "--out", str(tmp_path / "d"), "--workers", "1"])
    drawn = data.open_folder(tmp_path / "d")
    place = every.cells[["x", "y"]].round(6).apply(tuple, axis=1)
    place = pd.Index(place).get_indexer(drawn.cells[["x", "y"]].round(6).apply(tuple, axis=1))
    assert len(drawn) == 40 and np.array_equal(every.patches[place], drawn.patches)

    # without --image-csv and --moa, what nobody told is unknown
    prepare.main(["--images", str(release / "images"), "--cellprofiler", str(release / "cellprofiler"), "--out", str(tmp_path / "c"), "--workers", "1",
                  "--channels", "Actin,DAPI,Tubulin"])
    bare = data.open_folder(tmp_path / "c")
    assert bare.channels == ["Actin", "DAPI", "Tubulin"] and np.array_equal(bare.patches, every.patches[:, [2, 0, 1]])
    assert set(bare.cells["compound"]) == {"unknown"} and bare.cells["concentration"].isna().all()


def test_bad_fields(tmp_path, small, capsys):
    """A missing, cut or wrongly sized file is refused by name; with --skip-bad its cells are left out. Crops beyond the edge are dropped."""
    release = tmp_path / "release"
    prepare.main(["--simulate", "100", "--write-release", str(release)])
    files = {c: sorted((release / "images").rglob(f"*_{w}.tif")) for c, w in zip(data.CHANNELS, ("w1", "w2", "w4"))}
    nuclei = pd.read_csv(release / "cellprofiler/Nuclei.csv")
    nuclei.loc[0, "Location_Center_X"], nuclei.loc[1, "Location_Center_Y"] = 33.99, prepare.FIELD[0] - 33.0
    nuclei.loc[2, ["Location_Center_X", "Location_Center_Y"]] = 34.0
    nuclei.to_csv(release / "cellprofiler/Nuclei.csv", index=False)
    prepare.main(fields_command(release, tmp_path / "a"))
    whole = data.open_folder(tmp_path / "a")
    assert len(whole) == 98 and "2 of 100 cells lie less than half a crop" in capsys.readouterr().out
    corner = np.asarray(Image.open(files["DAPI"][0]))[:68, :68]
    assert np.array_equal(whole.patches[0, 0], corner) and whole.cells["x"][0] == 34

    files["Actin"][0].write_bytes(files["Actin"][0].read_bytes()[:1000])
    files["DAPI"][1].unlink()
    Image.fromarray(np.zeros((100, 100), np.uint16)).save(files["Tubulin"][2])
    for text, mend in ((files["DAPI"][1].name, lambda: files["DAPI"][1].write_bytes(files["DAPI"][2].read_bytes())), (files["Actin"][0].name, None)):
        with pytest.raises(data.InputError, match=text):
            prepare.main(fields_command(release, tmp_path / "b"))
        shutil.rmtree(tmp_path / "b.partial", ignore_errors=True)
        mend and mend()
    files["DAPI"][1].unlink()
    prepare.main(fields_command(release, tmp_path / "c", "--skip-bad"))
    left = data.open_folder(tmp_path / "c")
    gone = {files[c][i].name[:-7] for i, c in enumerate(("Actin", "DAPI", "Tubulin"))}
    assert set(whole.cells["field"].str[:-3]) - set(left.cells["field"].str[:-3]) == gone
    assert left.meta["counts"]["bad_patches"] == len(whole) - len(left) and np.array_equal(left.patches[-5:], whole.patches[-5:])
    out = capsys.readouterr().out
    assert "bad patches skipped" in out


def test_eight_bits_reach_the_same_scale(tmp_path):
    field = np.random.default_rng(0).integers(0, 256, (70, 80)).astype(np.uint8)
    paths = [tmp_path / f"{k}.tif" for k in range(3)]
    for path in paths[:2]:
        Image.fromarray(field).save(path)
    Image.fromarray(field.astype(np.uint16) * 3).save(paths[2])
    patches, bad = prepare.fields_unit((paths, np.array([35.9]), np.array([34.9])))  # the pixel that the centre lies in, not the nearest
    assert not bad and np.array_equal(patches[0, 0], field[:68, 1:69].astype(np.uint16) * 257) and np.array_equal(patches[0, 2], field[:68, 1:69] * np.uint16(3))


@needs_shared
def test_real_fields(tmp_path):
    """CellProfiler's nuclei lie in the middle of their patches: in the true masks, and in the picture of a real field."""
    folder = SHARED / "fixtures/cellprofiler_sim"
    prepare.main(["--images", str(folder / "images"), "--cellprofiler", str(folder / "csv"), "--out", str(tmp_path / "sim"), "--workers", "1"])
    sim = data.open_folder(tmp_path / "sim")
    assert len(sim) == 328 and len(sim.features) == 867 and sorted(set(sim.cells["well"])) == ["B02", "C05", "D07"]
    for (well, site), cells in sim.cells.groupby(["well", "site"]):
        truth = np.asarray(Image.open(folder / f"images/truth_nuclei_{well}_s{site}.tif"))
        assert (truth[cells["y"].round().astype(int), cells["x"].round().astype(int)] > 0).all()
    human = SHARED / "fixtures/examplehuman"
    prepare.main(["--images", str(human), "--cellprofiler", str(human / "ExampleHuman.sqlite"), "--out", str(tmp_path / "human"), "--workers", "1",
                  "--channels", "DNA,PH3,cellbody"])
    real = data.open_folder(tmp_path / "human")
    assert len(real) == 230 and real.channels == ["DNA", "PH3", "cellbody"]
    for folder in (sim, real):
        x = folder.patches[:, 0].astype(float).mean(0)
        assert x[29:39, 29:39].mean() > 1.5 * x[:10, :10].mean()
    with pytest.raises(data.InputError, match="channel DAPI has no file name for every field, names are of DNA, OrigOverlay, PH3, cellbody"):
        prepare.main(["--images", str(human), "--cellprofiler", str(human), "--out", str(tmp_path / "no")])


def dies_at_line(work, functions, at):
    """Runs work() in a child that exits without notice at the `at`-th line run in the named functions of prepare_bbbc021.py: did it?"""
    child = os.fork()
    if not child:
        lines = [0]

        def trace(frame, event, _):
            if frame.f_code.co_name in functions and frame.f_code.co_filename == prepare.__file__:
                lines[0] += event == "line"
                if lines[0] == at:
                    os._exit(9)
                return trace
        sys.settrace(trace)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def a_unit(unit):
    return np.full((2, 3, 68, 68), unit, np.uint16), {0: "bad"} if unit == 2 else {}


@pytest.mark.filterwarnings("ignore:.*fork")
def test_patches_survive_death_at_any_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    units = [(2 * u, u + 1) for u in range(3)]
    target = np.lib.format.open_memmap(tmp_path / "patches.npy", "w+", np.uint16, (6, 3, 68, 68))
    work = lambda: prepare.read_patches(target, units, a_unit, tmp_path / "progress", 1, True)
    for at in range(1, 1000):
        target[:] = 0
        (tmp_path / "progress").unlink(missing_ok=True)
        died = dies_at_line(work, {"read_patches", "save"}, at)
        assert work() == {2: "bad"} and (target[:, 0, 0, 0] == [1, 1, 2, 2, 3, 3]).all(), at
        if not died:
            break
    assert 57 < at < 999


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("source", ["simulate", "crops", "fields"])
def test_killed_at_any_moment(tmp_path, small, monkeypatch, source):
    """A preparation that dies at some line of its work, without notice, and is started again ends with the same bytes."""
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    command = ["--simulate", "100", "--workers", "1"]
    if source == "fields":
        prepare.main(["--simulate", "100", "--write-release", str(tmp_path / "release")])
        next((tmp_path / "release/images").rglob("*_w1.tif")).unlink()  # cells that are left out shorten the arrays
        command = fields_command(tmp_path / "release", "", "--skip-bad")
        del command[command.index("--out"):command.index("--out") + 2]
    if source == "crops":
        cells, table = prepare.simulate_table(100, 0)
        names = cells["field"] + "_" + cells.groupby("field").cumcount().astype(str)
        for field, name in zip(cells["field"], names):
            (tmp_path / "crops" / field).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "crops" / field / f"{name}.npy", np.full((68, 68, 3), hash_uniform(name, 1)[0] * 1000, np.uint16))
        table.assign(Single_Cell_Image_Id=names).to_csv(tmp_path / "features.csv", index=False)
        command = ["--crops", str(tmp_path / "crops"), "--features", str(tmp_path / "features.csv"), "--workers", "1"]
    into = lambda out: lambda: prepare.main([*command, "--out", str(out)])
    into(tmp_path / "whole")()
    expected = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert set(expected) == {*data.FILES, "meta.json"}
    moments = range(1, 100, 2 if os.environ.get("LONG") else 24)
    survived = 0
    for at in moments:
        out = tmp_path / f"killed{at}"
        survived += not dies_at_line(into(out), {"write_folder"}, at)
        into(out)()
        assert {f.name: f.read_bytes() for f in out.iterdir()} == expected, f"killed at line {at}"
        shutil.rmtree(out)
    assert survived <= len(moments) // 2


def test_cells_of_anyone_in_pictures_out(tmp_path, small, capsys):
    """A checkpoint and an export: model.generate and interpolate.py sweep --table give what the prepared folder gives."""
    release, run = tmp_path / "release", tmp_path / "run"
    prepare.main(["--simulate", "100", "--write-release", str(release)])
    prepare.main(fields_command(release, tmp_path / "data"))
    train.main(["--data", str(tmp_path / "data"), "--run", str(run), "--steps", "1", "--batch", "4"])
    folder, G = data.open_folder(tmp_path / "data"), model.load(run / "last.pt")
    with pytest.warns(UserWarning, match="columns ignored"):
        x = model.generate(G, data.read_table(release / "cellprofiler"), as_uint8=False)
    with torch.no_grad():
        own = G(model.standardise(*folder.measurements(np.arange(len(folder))))).clamp(0, 1)
    assert x.shape == (100, 3, 68, 68) and (x - own).abs().max() < 1e-5

    key, feature = folder.cells["cell"][7], "Nuclei_AreaShape_Area"
    sweep = ["sweep", "--run", str(run), "--feature", feature, "--cell", key, "--low", "500", "--high", "1500", "--steps", "3"]
    given, table = ["--table", str(release / "cellprofiler")], data.read_table(release / "cellprofiler")
    found = {}
    for name, more in (("a", ["--data", str(tmp_path / "data")]), ("b", ["--data", str(tmp_path / "data"), *given]), ("c", given)):
        interpolate.main([*sweep, *more, "--out", str(tmp_path / name)])
        found[name] = pd.read_csv(tmp_path / name / f"sweep_{feature}.csv")
    same = [c for c in found["a"] if c.startswith(("measured", "outside", "requested"))]
    assert len(same) > 2 and np.allclose(found["a"][same], found["b"][same], rtol=1e-3, atol=0.5, equal_nan=True)  # the CSV has 7 digits or so
    assert not np.allclose(found["a"]["nearest"], found["c"]["nearest"], rtol=1e-3)  # another reference: the table's own cells
    assert (found["b"]["split"] == "table").all() and Image.open(tmp_path / "c" / f"sweep_{feature}.png").size[0] > 3 * 136
    interpolate.main(["walk", "--run", str(run), *given, "--cells", *table["cell"][:2], "--steps", "2", "--out", str(tmp_path / "d")])
    table.drop(columns=feature).to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(model.InputError, match=f"1 of the model's 28 features are not in the table, first: {feature}"):
        interpolate.main([*sweep, "--table", str(tmp_path / "less.csv")])
    with pytest.raises(data.InputError, match="--cell nobody: not among"):
        interpolate.main([*sweep[:6], "nobody", "--table", str(release / "cellprofiler")])


def test_fields_are_measured_without_cellprofiler(tmp_path, small, capsys):
    """TIFFs alone: the cells that were drawn are found, cut and measured; an interrupted call does not measure a field twice."""
    release, out = tmp_path / "release", tmp_path / "out"
    prepare.main(["--simulate", "100", "--write-release", str(release)])
    command = ["--images", f"{release}/images", "--image-csv", f"{release}/BBBC021_v1_image.csv", "--moa", f"{release}/BBBC021_v1_moa.csv",
               "--out", str(out), "--workers", "1"]
    prepare.main(command)
    assert "measured 6/6 fields" in capsys.readouterr().out
    folder, (drawn, table) = data.open_folder(out), prepare.simulate_table(100, 0)
    found = folder.cells.assign(area=folder.raw[:, folder.features.index("Nuclei_AreaShape_Area")], field=folder.cells["field"].str.replace("_w1", ""))
    pairs = [(table["Nuclei_AreaShape_Area"][i], near["area"].iloc[d.argmin()]) for i, (field, x, y) in enumerate(zip(drawn["field"], drawn["x"], drawn["y"]))
             if len(near := found[found["field"] == field]) and (d := np.hypot(near["x"] - x, near["y"] - y).to_numpy()).min() < 4]
    assert len(pairs) > 85 and np.corrcoef(np.transpose(pairs))[0, 1] > 0.9, len(pairs)
    for file in (release / "images").rglob("*.tif"):  # BBBC021's own names go on after _w1, some with digits: the wave is still 1, 2, 4
        file.rename(file.with_name(file.stem + {"1": "A0", "2": "2570437EF", "4": "13E"}[file.stem[-1]] + ".tif"))
    prepare.main(["--images", f"{release}/images", "--out", str(tmp_path / "named"), "--workers", "1"])
    assert np.array_equal(data.open_folder(tmp_path / "named").patches, folder.patches)  # no channel took another's place
    for file in (release / "images").rglob("*.tif"):
        file.rename(file.with_name(re.sub("(_w[124]).*", r"\1.tif", file.name)))
    assert len(folder) <= 105 and len(folder.features) > 800 and set(folder.cells["compound"]) <= set(drawn["compound"])

    shutil.rmtree(out)
    gone = next(Path(f"{out}.measured").iterdir())
    shutil.rmtree(gone)
    prepare.main(command)
    assert "measured 1/1 fields" in capsys.readouterr().out and gone.is_dir()
    assert np.array_equal(data.open_folder(out).raw, folder.raw)

    files = sorted((release / "images").rglob("*.tif"))
    plain = ["--images", f"{release}/images", "--out", str(tmp_path / "plain"), "--workers", "1"]
    Image.fromarray(np.zeros((50, 50), np.uint16)).save(files[1])
    refuses("the files of this field differ in size", prepare.main, plain)
    prepare.main([*plain, "--skip-bad"])  # by their names up to _w
    assert data.open_folder(tmp_path / "plain").meta["counts"]["fields"] == 5
    files[1].unlink()
    refuses("2 files share its name up to _w", prepare.main, [*plain[:2], "--out", str(tmp_path / "p2"), "--workers", "1"])
    for file in files:
        if file.exists():
            file.rename(file.with_name("x" + str(files.index(file)) + ".tif"))
    refuses("no field; expected files named", prepare.main, [*plain[:2], "--out", str(tmp_path / "p3"), "--workers", "1"])
    refuses("no column Image_FileName_DNA", prepare.main, [*command[:4], "--out", str(tmp_path / "p4"), "--channels", "DNA,B,C"])


def test_the_rest_of_the_refusals(crops_path, folder_path, run_path, tmp_path, small, capsys):
    """Every line that nothing else reaches: each names the file, what was expected, what to do."""
    release, out = tmp_path / "release", ["--out", str(tmp_path / "o"), "--workers", "1"]
    prepare.main(["--simulate", "100", "--write-release", str(release)])
    fields = fields_command(release, tmp_path / "o")
    (tmp_path / "image.csv").write_text("a\n1\n")
    refuses("no feature column matches --columns nothing", prepare.main, [*fields, "--columns", "nothing"])
    refuses("no column Image_FileName_DAPI", prepare.main, [*fields, "--image-csv", str(tmp_path / "image.csv")])
    image = pd.read_csv(release / "BBBC021_v1_image.csv", dtype=str)
    pd.concat([image, image]).to_csv(tmp_path / "image.csv", index=False)
    refuses("stands in two rows; give the table", prepare.main, [*fields, "--image-csv", str(tmp_path / "image.csv")])
    refuses("expected three names", prepare.main, [*fields, "--channels", "DAPI,Actin"])
    shutil.copytree(crops_path, tmp_path / "crops")
    metadata, table = pd.read_csv(crops_path / "metadata.csv", dtype=str), pd.read_csv(crops_path / "features.csv")
    call = ["--crops", str(tmp_path / "crops"), "--features", str(tmp_path / "crops/features.csv"), *out]
    for changed, text in ((metadata.rename(columns={prepare.KEY: "id"}), "metadata.csv: no column"), (pd.concat([metadata, metadata[:1]]), "more than one row")):
        changed.to_csv(tmp_path / "crops/metadata.csv", index=False)
        refuses(text, prepare.main, call)
    metadata.to_csv(tmp_path / "crops/metadata.csv", index=False)
    (tmp_path / "all.csv").write_text("replicate\n1\n2\n3\n")
    refuses("no cell is left after", prepare.main, [*call, "--exclude", str(tmp_path / "all.csv")])
    table.assign(**{c: np.nan for c in table.columns[1:]}).to_csv(tmp_path / "crops/features.csv", index=False)
    refuses("no cell has both a patch and measurements", prepare.main, call)
    shutil.rmtree(tmp_path / "o.partial")
    table.assign(**{c: 1.0 for c in table.columns[1:]}).to_csv(tmp_path / "crops/features.csv", index=False)
    refuses("every feature was dropped", prepare.main, call)
    shutil.rmtree(tmp_path / "crops")

    if importlib.util.find_spec("cp_measure") is None:
        refuses("cp_measure: the package is not installed", prepare.measure_by_cp_measure, np.zeros((1, 3, 9, 9)), np.zeros((1, 9, 9)))
    refuses("segmenting needs three", prepare.measurements, np.zeros((1, 2, 68, 68)), ["A", "B"])
    wells = compound_table()[0]
    wells.drop(columns=["compound", "concentration", "moa"]).to_csv(tmp_path / "wells.csv", index=False)
    profiles = ["--profiles", str(tmp_path / "wells.csv"), "--image-csv", str(tmp_path / "image.csv")]
    refuses(r"does not list \d+ of the", evaluate.main, profiles)
    image[["Image_FileName_DAPI"]].to_csv(tmp_path / "image.csv", index=False)
    refuses("lacks plate, well", evaluate.main, profiles)
    cells = data.open_folder(folder_path)
    pd.DataFrame(np.array(cells.raw[:5]), columns=cells.features).assign(cell=list("abcde")).to_csv(tmp_path / "few.csv", index=False)
    sweep = ["sweep", "--run", str(run_path), "--feature", "Nuclei_AreaShape_Area"]
    refuses("5 cells, 20 are needed", interpolate.main, [*sweep, "--table", str(tmp_path / "few.csv")])
    shutil.copytree(folder_path, tmp_path / "other")
    meta = json.loads((tmp_path / "other/meta.json").read_text())
    meta["checksums"]["cells.csv"] = "0"
    (tmp_path / "other/meta.json").write_text(json.dumps(meta))
    refuses("was trained on another prepared folder", interpolate.main, [*sweep, "--data", str(tmp_path / "other")])
    for argv, main, text in ((sweep, interpolate.main, "sweep needs --data DIR, or --table FILE"),
                             (["--simulate", "100", "--write-release", "r", "--out", "o"], prepare.main, "--write-release DIR goes with")):
        with pytest.raises(SystemExit):
            main(argv)
        assert text in capsys.readouterr().err
