"""Checkpoints are read from wherever Lightning reads them, and a damaged one is refused with the reason."""

from __future__ import annotations

import http.server
import random
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch

import lfq_lightning as lfq
from lfq_lightning.reading import read_checkpoint
from tests.runs import Net, fit, images, loader, qat, trainer

pytestmark = pytest.mark.quick

X = images().tensors[0][:4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a folder of its own."""
    folder = tmp_path_factory.mktemp("saved")
    _, made, _ = fit(folder / "run", Net(width=1))
    made.save_checkpoint(folder / "x.ckpt", weights_only=True)
    return folder / "x.ckpt"


def test_a_checkpoint_is_read_through_fsspec(saved: Path) -> None:
    with fsspec.open("memory://run/x.ckpt", "wb") as file:
        file.write(saved.read_bytes())
    found, expected = (lfq.load_from_checkpoint(Net, path).eval() for path in ("memory://run/x.ckpt", saved))
    assert torch.equal(found(X), expected(X))
    with pytest.raises(FileNotFoundError):
        lfq.load_from_checkpoint(Net, "memory://run/absent.ckpt")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_checkpoint_is_read_from_a_url(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(saved.parent)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        found = lfq.load_from_checkpoint(Net, f"http://127.0.0.1:{served.server_port}/x.ckpt").eval()
    finally:
        served.shutdown()
        served.server_close()
    assert torch.equal(found(X), lfq.load_from_checkpoint(Net, saved).eval()(X))


def test_it_comes_in_the_mode_in_which_lightning_leaves_it(saved: Path, tmp_path: Path) -> None:
    class Partly(Net):
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.norm.eval()

    model = lfq.load_from_checkpoint(Partly, saved)
    modes = {name: module.training for name, module in model.named_modules() if "quantizer" not in name}
    assert modes == {name: module.training for name, module in Partly(1).named_modules()}
    loaded = lfq.load_from_checkpoint(Net, saved)
    before = loaded.norm.running_mean.clone()
    trainer(tmp_path, [qat()], max_epochs=1).fit(loaded, loader())
    assert not torch.equal(loaded.norm.running_mean, before)


def test_what_the_module_lacks_is_left_out_where_loading_is_not_strict(saved: Path) -> None:
    class Shorter(Net):
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.second = torch.nn.AvgPool2d(2)

    with pytest.raises(ValueError, match=r"must fit Shorter.*second\.weight"):
        lfq.load_from_checkpoint(Shorter, saved)
    with pytest.warns(UserWarning, match=r"not in the model state dict.*second\.weight"):
        model = lfq.load_from_checkpoint(Shorter, saved, strict=False)
    names = [f"{layer}.{role}_quantizer" for layer in ("first", "head") for role in ("weight", "input")]
    assert list(lfq.quantizers(model)) == names
    assert {quantizer.phase for quantizer in lfq.quantizers(model).values()} == {"learn"}


def test_a_damaged_checkpoint_is_refused_as_such_wherever_it_is_damaged(saved: Path, tmp_path: Path) -> None:
    whole, chosen, path = saved.read_bytes(), random.Random(3), tmp_path / "x.ckpt"
    directory = whole.rfind(b"PK\x01\x02")  # the last entry of the archive's list
    places = [*range(directory, len(whole), 5), *(chosen.randrange(len(whole)) for _ in range(30))]
    refused = 0
    for number, at in enumerate(places):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged if number % 3 else damaged[:at])
        try:
            read_checkpoint(path)
        except ValueError as error:
            refused += 1
            assert "must be" in str(error)
    assert refused > len(places) // 3


def test_a_resume_from_a_damaged_checkpoint_says_that_it_is_damaged(saved: Path, tmp_path: Path) -> None:
    damaged = bytearray(saved.read_bytes())
    damaged[damaged.find(b"data.pkl") + 40] ^= 255  # within the pickle: still an archive
    (tmp_path / "x.ckpt").write_bytes(damaged)
    with pytest.raises(Exception) as raised:  # torch's own, of many types
        trainer(tmp_path, [qat()]).fit(Net(1), loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert "A checkpoint must be a whole file" in "\n".join(raised.value.__notes__)
