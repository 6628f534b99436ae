"""Calibration: a fit that finds the constants that are there, and a device file that prices as it was measured."""

from __future__ import annotations

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun import models
from batchrun.planning.cost import CostModel, Work
from batchrun.specs import COST_UNITS, DeviceSpec, ModelSpec
from scripts import calibrate_device
from scripts.calibrate_device import Effort, Measured, device_toml, errors_of, fit, nnls, shape

MODEL = ModelSpec("llama", 1000, 48, 96, 3, 4, 2, 12, 512, None, "float32")
CONSTANTS = (4e-3, 1e-3, 1.2e-11, 7e-11, 8e-9, 1.5e-11, 2e-10, 1.2e-5, 4e-5, 2e-9)
PEAKS = DeviceSpec(
    "here",
    "cpu",
    memory_bytes=1 << 30,
    kv_share=0.5,
    page_size=16,
    step_tokens=512,
    flops={"float32": 1.5e11, "float16": 2e10},
    bandwidth=2e10,
    hardware='2 cores of a "Z80"',
)

matrices = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=200, deadline=None)
@given(matrices, st.integers(1, 8), st.integers(0, 20))
def test_nnls_is_the_least_of_all_that_are_not_negative(random, units, more):
    """By the conditions of Karush, Kuhn and Tucker: no constant can be moved, where it may be, to a smaller sum."""
    a = random.normal(size=(units + more, units)) * 10.0 ** random.integers(-9, 9, units)
    b = random.normal(size=units + more)
    x = nnls(a, b)
    uphill = a.T @ (a @ x - b) / np.linalg.norm(a, axis=0)
    assert (x >= 0).all()
    assert uphill.min() > -1e-6
    assert np.abs(uphill[x > 0]).max(initial=0) < 1e-6


@settings(max_examples=100, deadline=None)
@given(matrices, st.integers(1, 8))
def test_nnls_finds_the_constants_that_are_there(random, units):
    a = random.uniform(0, 1, (3 * units, units))
    x = random.uniform(1, 2, units) * random.integers(0, 2, units)
    assert nnls(a, a @ x) == pytest.approx(x, abs=1e-8)


def steps(model: ModelSpec, random: np.random.Generator, count: int) -> np.ndarray:
    """The units of random steps of every kind: from one row that decodes to a thousand of a prompt."""
    cost = CostModel(model, PEAKS, "float32")
    found = []
    for _ in range(count):
        rows, reads = int(2 ** random.uniform(0, 10)), int(random.integers(0, 40))
        chunks = int(random.integers(1, rows + 1))
        prefix, own = int(2 ** random.uniform(0, 12)), int(2 ** random.uniform(0, 9))
        found.append(
            cost.units(
                Work(
                    steps=1,
                    rows=rows,
                    sampled=chunks,
                    chunks=chunks,
                    reads=reads,
                    pairs=rows * own + rows * prefix * min(reads, 1),
                    prefix_kv=reads * prefix,
                    suffix_kv=chunks * own,
                    merges=int(rows * random.integers(0, 6)) * min(reads, 1),
                )
            )
        )
    return np.array(found, dtype=float)


def test_a_fit_finds_the_constants_that_are_there():
    """Also one that is zero, and where some of the steps were disturbed: outliers weigh little."""
    random = np.random.default_rng(0)
    # As wide as they are deep, wide, and deep: else a step, a layer and a byte of weights would be one and the same.
    shapes = [replace(MODEL, hidden_size=width, num_layers=layers) for width, layers in ((48, 3), (576, 4), (96, 30))]
    units = np.concatenate([steps(model, random, 300) for model in shapes])
    truth = np.array(CONSTANTS)
    truth[8] = 0
    nothing = np.zeros(truth.size)
    assert fit(units, units @ truth, nothing) == pytest.approx(truth, rel=1e-6, abs=1e-15)
    disturbed = units @ truth * np.where(random.random(900) < 0.1, 3.0, 1.0)
    found = units @ fit(units, disturbed, nothing)
    assert np.abs(found / (units @ truth) - 1).max() < 0.15
    assert np.abs(found / (units @ truth) - 1).mean() < 0.05


def test_a_fit_stays_above_what_the_peaks_allow():
    """Also where two units always come together, so that their times cannot be told apart."""
    units, truth = np.array([[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]]), np.array([0.5, 3.0])
    free, bound = (fit(units, units @ truth, np.array(least)) for least in ((0.0, 0.0), (0.0, 2.9)))
    assert units @ free == pytest.approx(units @ truth)
    assert units @ bound == pytest.approx(units @ truth)
    assert free[1] < 2.9 <= bound[1]


def test_errors_are_shares_of_the_fastest_repeat():
    units = np.eye(len(COST_UNITS))[:2]
    constants = np.zeros(len(COST_UNITS))
    constants[:2] = 1.1, 0.8
    job = Measured("job", units, rows=2, seconds=np.array([[1.0, 1.0], [1.0, 1.0], [1.6, 1.0]]))
    errors = errors_of([job], constants)
    assert errors.steps == pytest.approx((0.1 + 0.2) / 2)
    assert errors.runs == pytest.approx(abs(1.9 / 2 - 1))
    assert errors.steps_noise == pytest.approx((0.6 + 0.6) / 6)  # three pairs of two steps each
    assert errors.runs_noise == pytest.approx((0.3 + 0.3) / 3)


@pytest.fixture
def read_back(tmp_path, monkeypatch):
    """A device file's text as `--device-spec` reads it."""

    def read(name: str, text: str | None = None) -> DeviceSpec:
        folder = tmp_path / "devices"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(models, "configs_dir", lambda: tmp_path)
        return models.load_device_spec(name)

    return read


def test_a_device_file_is_read_back_and_prices_the_same(read_back):
    fitted = {"float32": {**dict(zip(COST_UNITS, CONSTANTS, strict=True)), "read": 0.0, "error": 0.043}}
    device = replace(PEAKS, fitted=fitted)
    text = device_toml(device, ["Measured."])
    back = read_back("here", text)
    assert text.startswith("# Measured.\n")
    assert replace(back, memory_bytes=0) == replace(device, memory_bytes=0)
    for dtype in PEAKS.flops:
        here, there = CostModel(MODEL, device, dtype), CostModel(MODEL, back, dtype)
        assert (here.fitted, here.error) == (there.fitted, there.error) == (dtype == "float32", here.error)
        for field in fields(Work):
            work = Work(steps=1) + Work(**{field.name: 1000})
            assert there.seconds(work) == pytest.approx(here.seconds(work), rel=1e-3)
            assert there.bound(work) == pytest.approx(here.bound(work), rel=1e-3)


def test_a_device_is_measured_and_its_file_is_used(tmp_path, monkeypatch, read_back, capsys):
    """The whole of it, on models and jobs so small that the figures mean nothing."""
    tiny = Effort((shape(32, 64, 2, 2, 1, 64), shape(48, 64, 5, 4, 2, 96)), shape(32, 64, 3, 2, 1, 64), 2, part=0.03)
    monkeypatch.setattr(calibrate_device, "QUICK", tiny)
    (tmp_path / "devices").mkdir()
    monkeypatch.setattr(
        sys, "argv", ["calibrate_device", "--quick", "--name", "here", "--out", str(tmp_path / "devices")]
    )
    calibrate_device.main()
    told = capsys.readouterr().out
    for job in ("micro", "pressure", "tree", "none", "mixed"):
        assert f"\n{job} " in told

    device = read_back("here")
    constants = device.fitted["float32"]
    assert set(device.fitted) == {"float32"}
    assert set(constants) == {*COST_UNITS, "error"}
    assert min(constants.values()) >= 0
    assert device.step_tokens in (128, 256, 512, 1024, 2048)
    assert set(device.flops) == {"float32", "bfloat16", "float16"}
    cost = CostModel(MODEL, device, "float32")
    assert cost.fitted
    assert cost.seconds(Work(steps=1, rows=100, sampled=1, chunks=1, pairs=5050, suffix_kv=100)) > 0
    assert not CostModel(MODEL, device, "float16").fitted
