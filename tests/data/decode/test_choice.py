"""Choice of a run's decoder; these tests need neither DALI nor a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import types
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch

from umt_fast import data
from umt_fast.config import ConfigError, DataConfig, FileDecoder
from umt_fast.config import data as config_data
from umt_fast.data.clips import ClipStream
from umt_fast.data.decode import choice as decoder
from umt_fast.data.decode import nvdec, opener_of, pyav
from umt_fast.data.decode.choice import MissingDali, choose_decoder
from umt_fast.data.manifest import read_manifest
from umt_fast.errors import RunError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H200 = {name: nvdec.Limits(7, (48, 8192), (16, 8192), 262144) for name in ("h264", "hevc", "vp9")}


@pytest.fixture
def machine(monkeypatch):
    """Simulates whether DALI is installed, and NVDEC's limits or why there is none."""

    def pretend(dali: bool, engines: dict[str, nvdec.Limits] | str) -> None:
        monkeypatch.setattr(decoder, "has_dali", lambda: dali)

        def limits(device: torch.device) -> dict[str, nvdec.Limits]:
            if isinstance(engines, str):
                raise nvdec.NoEngine(engines)
            return engines

        monkeypatch.setattr(nvdec, "limits", limits)

    return pretend


def test_auto_chooses_dali_if_it_and_an_engine_exist(machine):
    machine(True, H200)
    choice = choose_decoder("auto", GPU)
    assert (choice.name, choice.engines) == ("dali", H200)
    assert choice.text == "dali on 7 NVDEC (h264, hevc, vp9; the rest pyav)"


@pytest.mark.parametrize(
    ("dali", "engines", "device", "text"),
    [
        (True, "no GPU", CPU, "pyav"),
        (True, "no libnvcuvid", GPU, "pyav (no libnvcuvid)"),
        (False, "no libnvcuvid", GPU, "pyav (no libnvcuvid)"),
        (False, H200, GPU, "pyav (the GPU has 7 NVDEC, but DALI is not installed: pip install 'umt-fast[dali]'"),
    ],
)
def test_auto_chooses_pyav_otherwise_and_says_why(machine, dali, engines, device, text):
    machine(dali, engines)
    choice = choose_decoder("auto", device)
    assert choice.name == "pyav"
    assert choice.text.startswith(text)


def test_dali_on_the_cpu_must_be_requested(machine):
    machine(True, "no GPU")
    choice = choose_decoder("dali", CPU)
    assert (choice.name, choice.engines) == ("dali", None)
    assert choice.text.startswith("dali on the CPU (no GPU)")


def test_pyav_needs_no_other_package(machine):
    machine(True, H200)
    assert choose_decoder("pyav", GPU) == decoder.DecoderChoice("pyav", "pyav")


def test_dali_that_is_missing(machine):
    machine(False, H200)
    with pytest.raises(MissingDali, match=r"pip install 'umt-fast\[dali\]'.*cuda120"):
        choose_decoder("dali", GPU)
    assert issubclass(MissingDali, RunError)


def test_a_decoder_of_files_that_the_flag_names_opens_them(monkeypatch, demo_videos):
    """In the workers' data set and through `open_loader`, which must not pass unknown names to DALI."""
    given = types.ModuleType("umt_fast.data.decode.other")
    given.opened = lambda video, *rest: opened.append(video.name) or pyav.opened(video, *rest)
    opened: list[str] = []
    monkeypatch.setitem(sys.modules, given.__name__, given)
    for module in (config_data, decoder, data):
        monkeypatch.setattr(module, "FileDecoder", Literal["pyav", "other"])
    monkeypatch.setattr(config_data, "Decoder", Literal["auto", "pyav", "other", "dali"])
    stream = ClipStream(read_manifest(str(demo_videos)), DataConfig(decoder="other", workers=0), 2, 32, seed=0)
    with data.open_loader(stream, CPU, start=0, batches=1, batch_size=2) as loader:
        batch = next(loader)
    assert opened == batch.paths


def test_a_decoder_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"data\.decoder = 'nvdec': give auto, pyav, dali"):
        DataConfig(decoder="nvdec")
    with pytest.raises(AssertionError, match="nothing chooses"):
        choose_decoder("nvdec", GPU)
    for name in get_args(FileDecoder):
        assert callable(opener_of(name))


@pytest.mark.parametrize("blocked", ["nvidia", "nvidia.dali"])
def test_dali_is_looked_for_without_being_imported(blocked):
    code = "import sys; from umt_fast.data import loader; from umt_fast.data.decode import choice as decoder\n"
    code += "decoder.has_dali()\n"
    code += (
        "import umt_fast.doctor as d; d.report(); assert not [m for m in sys.modules if m.startswith('nvidia.dali')]\n"
    )
    code += f"sys.modules[{blocked!r}] = None; assert not decoder.has_dali(); assert 'decoder' in d.report()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


# NVDEC.


class _Driver:
    """A fake libnvcuvid of a GPU; `codes` has the number of NVDEC engines for each codec."""

    def __init__(self, codes: dict[int, int], status: int = 0) -> None:
        self.codes = codes
        self.status = status

    def cuvidGetDecoderCaps(self, pointer) -> int:
        caps = pointer._obj
        assert (caps.chroma, caps.bit_depth_minus_8) == (1, 0)
        if caps.codec in self.codes:
            caps.supported, caps.engines = 1, self.codes[caps.codec]
            caps.min_width, caps.max_width, caps.min_height, caps.max_height = 48, 4096, 16, 2048
            caps.max_macroblocks = 32768
        return self.status


@pytest.fixture
def driver(monkeypatch):
    def install(library: _Driver) -> None:
        monkeypatch.setattr(nvdec.ctypes, "CDLL", lambda name: library)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream("cpu"))

    return install


def test_limits_are_those_of_the_driver(driver):
    driver(_Driver({4: 7, 8: 7, 10: 3}))
    found = nvdec.limits(GPU)
    assert found["h264"] == nvdec.Limits(7, (48, 4096), (16, 2048), 32768)
    assert found.keys() == {"h264", "hevc", "vp9"}
    assert nvdec.count_engines(found) == 7


def test_a_driver_that_does_not_count(driver):
    driver(_Driver({4: 0}))
    assert nvdec.count_engines(nvdec.limits(GPU)) == 1


@pytest.mark.parametrize("library", [_Driver({}), _Driver({4: 7}, status=100)])
def test_no_engine(driver, library):
    driver(library)
    with pytest.raises(nvdec.NoEngine, match="no NVDEC"):
        nvdec.limits(GPU)


def test_no_driver(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(nvdec.ctypes, "CDLL", missing)
    with pytest.raises(nvdec.NoEngine, match="NVIDIA_DRIVER_CAPABILITIES"):
        nvdec.limits(GPU)
    with pytest.raises(nvdec.NoEngine, match="no GPU"):
        nvdec.limits(CPU)


def test_the_layout_is_the_drivers():
    """CUVIDDECODECAPS: offsets of its output fields, and its size."""
    caps = nvdec._Capabilities
    assert (caps.supported.offset, caps.engines.offset, caps.max_width.offset) == (24, 25, 28)
    assert (caps.max_macroblocks.offset, caps.min_width.offset, caps.min_height.offset) == (36, 40, 42)
    assert ctypes.sizeof(caps) == 88
