"""The example: its data split, a tiny run of every method, exact resumption, and the codec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_tools import check_resumption, module, script

TINY = "--steps 6 --batch 2 --crop 32 --width 8 --dim 4 --num-codewords 16 --log-every 1 --eval-every 3".split()
pytestmark = pytest.mark.xdist_group("example")


def vqvae(name: str) -> ModuleType:
    return module(f"vqvae.{name}")


@pytest.fixture(scope="module")
def small_split() -> Iterator[None]:
    """Two photographs to train on and one, cut to a size that is no multiple of the stride, to evaluate on."""
    data = vqvae("data")
    whole = data.load

    def load(split):
        photos = whole(split[:2] if split == data.TRAIN else split[:1])
        return photos if split == data.TRAIN else {name: photo[:, :90, :101] for name, photo in photos.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        yield


@pytest.fixture(scope="module")
def demo(small_split: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of every method has written."""
    out = tmp_path_factory.mktemp("demo")
    script("train_vqvae").main([*TINY, "--device", "cpu", "--seeds", "0", "--out", str(out)])
    return out


# ---- data ------------------------------------------------------------------------------------------------------------


def test_split_is_disjoint() -> None:
    data = vqvae("data")
    train, held_out = data.load(data.TRAIN), data.load(data.HELD_OUT)
    assert len(train) == len(data.TRAIN) and len(held_out) == len(data.HELD_OUT)
    motif = {name.rsplit("_", 1)[0] if name.startswith("motorcycle") else name for name in train}
    assert not motif & {name.rsplit("_", 1)[0] if name.startswith("motorcycle") else name for name in held_out}
    pictures = [photo.numpy().tobytes() for photo in [*train.values(), *held_out.values()]]
    assert len(set(pictures)) == len(pictures)


def test_crops_come_from_the_photographs() -> None:
    data = vqvae("data")
    photos = [torch.full((3, 40, 50), 1, dtype=torch.uint8), torch.full((3, 60, 40), 2, dtype=torch.uint8)]
    crops = data.random_crops(photos, 64, 40, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 3, 40, 40)
    assert set(crops.flatten(1).float().mean(1).tolist()) == {1.0, 2.0}
    with pytest.raises(ValueError, match="at most 40"):
        data.random_crops(photos, 1, 41, torch.Generator())


def test_bytes_and_floats_are_inverse() -> None:
    data = vqvae("data")
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_bytes(data.to_float(every)), every)


# ---- measures --------------------------------------------------------------------------------------------------------


def test_perplexity() -> None:
    perplexity = module("common.measures").perplexity
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)


def test_psnr() -> None:
    zeros = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert vqvae("evaluate").psnr(zeros, zeros + 255) == pytest.approx(0)
    assert vqvae("evaluate").psnr(zeros, zeros + 1) == pytest.approx(48.1308, abs=1e-3)


# ---- training --------------------------------------------------------------------------------------------------------


def test_every_method_end_to_end(demo: Path) -> None:
    methods = vqvae("config").METHODS
    report = json.loads((demo / "results.json").read_text())
    assert {run["method"] for run in report["runs"]} == set(methods)
    assert len(report["table"]) == len(methods) + 2  # SF-DiVeQ has three ways of coding
    for run in report["runs"]:
        assert 5 < run["psnr"] < 60 and 0 < run["used"] <= 1 and 1 <= run["perplexity"] <= 300
        assert run["quantization_mse"] > 0
    equal_rate = [run["bits_per_pixel"] for run in report["runs"] if "curve" not in run["coding"]]
    assert equal_rate == [4 / 16] * len(methods)
    assert "SF-DiVeQ, codewords only" in (demo / "table.md").read_text()
    names = {"reconstructions", "details", "learning_curves", "codeword_use", "sf_curve"}
    assert {path.stem for path in (demo / "figures").glob("*.png")} == names
    assert {path.name for path in demo.glob("*.pt")} == {f"{method}-seed0.pt" for method in methods}
    assert not list(demo.glob("*.partial"))


def test_same_start_and_crops_for_every_method() -> None:
    config, train = vqvae("config"), vqvae("train")
    runs = [train.Run(config.Config(method, width=8, dim=4, num_codewords=16)) for method in config.METHODS]
    for run in runs[1:]:
        assert torch.equal(run.draws.get_state(), runs[0].draws.get_state())
        for mine, first in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(mine, first)


# SF-DiVeQ lets latents through in steps 1 to 3, and gathers them in step 3; DiVeQ replaces codewords every 2 steps.
@pytest.mark.parametrize(
    ("method", "stop"), [("diveq", 2), ("diveq", 3), ("sf_diveq", 1), ("sf_diveq", 3), ("sf_diveq", 5), ("rotation", 2)]
)
def test_resumed_run_is_identical(method: str, stop: int, small_split: None, tmp_path: Path) -> None:
    config, data, train = vqvae("config"), vqvae("data"), vqvae("train")
    settings = config.Config(
        method, steps=40, batch=2, crop=32, width=8, dim=4, num_codewords=16, log_every=1, eval_every=1
    )
    photos, held_out = list(data.load(data.TRAIN).values()), list(data.load(data.HELD_OUT).values())
    check_resumption(lambda: train.Run(settings), photos, held_out, stop, tmp_path)


def test_resume_refuses_other_settings(demo: Path) -> None:
    main = script("train_vqvae").main
    with pytest.raises(SystemExit, match=r"diveq-seed0.pt cannot be resumed.*dim=4 \(asked for: 5\)"):
        main([*TINY, "--dim", "5", "--methods", "diveq", "--device", "cpu", "--resume", "--out", str(demo)])


def test_bad_settings_are_named(tmp_path: Path) -> None:
    main = script("train_vqvae").main
    for wrong, message in ((["--steps", "0"], "steps"), (["--lr", "0"], "lr"), (["--crop", "5000"], "crop")):
        with pytest.raises(SystemExit, match=message):
            main([*TINY, *wrong, "--device", "cpu", "--out", str(tmp_path)])


# ---- codec -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diveq", "sf_diveq", "ema"])
def test_codec_round_trip(method: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, evaluate, train = vqvae("data"), vqvae("evaluate"), vqvae("train")
    main = script("codec").main
    image, code, output = tmp_path / "in.png", tmp_path / "code", tmp_path / "out.png"
    model = demo / f"{method}-seed0.pt"
    original = data.read_image(data.photograph_path("skimage", "chelsea.png"))[:, :77, :50]
    data.write_image(image, original)
    main(["encode", str(image), str(code), "--model", str(model)])
    main(["decode", str(code), str(output), "--original", str(image)])

    run = train.Run.load(model)
    expected = evaluate.reconstruct(run.model.eval(), run.quantizer.eval(), original, 4)
    decoded = data.read_image(output)
    # Reading a codeword back may round differently than the quantizer did: one grey level at most.
    assert (decoded.int() - expected.int()).abs().max() <= 1
    printed = capsys.readouterr().out
    bits = 8 if method == "sf_diveq" else 4  # 15 * 16 + 1 points of the curve, 16 codewords
    assert f"{bits * 20 * 13 / (77 * 50):.4f} bits per pixel" in printed
    assert printed.count(f"PSNR {evaluate.psnr(original, decoded):.2f} dB") == 2


def test_codec_errors(demo: Path, tmp_path: Path) -> None:
    main, data = script("codec").main, vqvae("data")
    image, code, model = tmp_path / "in.png", tmp_path / "code.npz", str(demo / "diveq-seed0.pt")
    data.write_image(image, torch.zeros(3, 16, 16, dtype=torch.uint8))
    main(["encode", str(image), str(code), "--model", model])
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(code.read_bytes()[:200])

    def fails(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(list(arguments))

    fails("not a readable image", "encode", str(text), str(code), "--model", model)
    fails("not a readable image", "encode", str(tmp_path / "absent.png"), str(code), "--model", model)
    fails("no checkpoint", "encode", str(image), str(code), "--model", str(tmp_path / "absent.pt"))
    fails("not a checkpoint", "encode", str(image), str(code), "--model", str(text))
    fails("not a file that codec.py wrote", "decode", str(cut), str(tmp_path / "o.png"))
    fails("another model", "decode", str(code), str(tmp_path / "o.png"), "--model", str(demo / "ema-seed0.pt"))
    fails("cannot write", "decode", str(code), str(tmp_path / "o.nothing"))
    fails("no file", "decode", str(tmp_path / "absent.npz"), str(tmp_path / "o.png"))
