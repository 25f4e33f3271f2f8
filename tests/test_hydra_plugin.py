"""An installed package serves any Hydra app: tried with a wheel and an editable installation, in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

APP = """
import sys

import hydra
from hydra.utils import instantiate
from omegaconf import OmegaConf


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    assert "torch" not in sys.modules, "composing a configuration imports torch"
    print(OmegaConf.to_yaml(cfg))
    if cfg.make:
        print("learn:", instantiate(cfg.lfq.quant).learn, instantiate(cfg.callbacks.qat).learn)
        print(instantiate(cfg.lfq.quant), instantiate(cfg.callbacks.qat), *instantiate(cfg.lfq.technique).values())


main()
"""
CONFIG = """
defaults:
  - lfq/quant: w4a4
  - lfq/quant@callbacks.qat: w8a8
  - lfq/schedule: freeze
  - lfq/target: openvino
  - lfq/recipe: scales_alone
  - lfq/technique: [batch_norm_reestimated]
  - _self_
make: true
"""
# Without the environment's own .pth files, which may know another copy of the package.
START = """
import runpy, site, sys
installed, app, *sys.argv[1:] = sys.argv[1:]
sys.path[1:1] = [installed]  # before an installation of the same name
sys.path += {libraries}
site.addsitedir(installed)
sys.argv[0] = app
runpy.run_path(app, run_name="__main__")
"""


def installed(tmp_path: Path, how: str) -> Path:
    """Build the package from a copy of its files, without the C++ kernels, and unpack it."""
    source, target = tmp_path / "source", tmp_path / "installed"
    for name in ("lfq_lightning", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_{how}({str(tmp_path)!r})"
    environment = os.environ | {"CC": "false", "CXX": "false"}
    command = [sys.executable, "-c", build]
    done = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(site: Path, app: Path, *overrides: str) -> str:
    libraries = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", START.format(libraries=libraries), str(site), str(app), *overrides]
    done = subprocess.run(
        command, cwd=app.parent, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_an_app_outside_the_repository_finds_the_groups(how: str, tmp_path: Path) -> None:
    site = installed(tmp_path, how)
    app = tmp_path / "elsewhere/app.py"
    (app.parent / "conf").mkdir(parents=True)
    app.write_text(APP)
    (app.parent / "conf/config.yaml").write_text(CONFIG)

    place = site if how == "wheel" else tmp_path / "source"
    assert f"file://{place}/lfq_lightning/conf" in run(site, app, "--info", "searchpath")
    out = run(site, app, "lfq/quant=w3a3", f"make={how == 'wheel'}")
    assert "weight: 3" in out and "weight: 8" in out
    if how == "wheel":
        assert "weight=3, activation=3, rules=(), schedule=PhaseSchedule(observe=0, estimate=1, learn=2" in out
        assert "weight=8, activation=8, rules=(), schedule=None" in out
        assert "learn: scales all" in out
        assert "BatchNormStatistics" in out
