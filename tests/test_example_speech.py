"""The speech codec: its data, measures, quantizers, a tiny run of every method, resumption, and wav files coded."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_tools import check_resumption, module, script
from torch import Tensor

RATE = 8000
TINY = (
    "--steps 4 --batch 2 --clip 1024 --width 8 --dim 4 --num-codewords 16 --stages 3 --log-every 1 --eval-every 2"
).split()
pytestmark = pytest.mark.xdist_group("example")


def speech(name: str) -> ModuleType:
    return module(f"speech.{name}")


def voice(seconds: float, seed: int) -> Tensor:
    """A signal built like speech: pulses and noise by turns, through two resonances that move, with pauses."""
    generator = torch.Generator().manual_seed(seed)
    count = int(seconds * RATE)
    t = torch.arange(count) / RATE
    pitch = 110 + 60 * torch.rand(1, generator=generator) + 20 * torch.sin(2 * math.pi * 1.5 * t)
    phase = (pitch / RATE).cumsum(0)
    pulses = (phase.floor().diff(prepend=torch.zeros(1)) > 0).float()
    turn = (t * 4).long()
    source = torch.where(turn % 4 == 3, 0.05 * torch.randn(count, generator=generator), pulses) * (turn % 5 != 4)
    length = torch.arange(200) / RATE
    total = torch.zeros(count)
    for low, high in ((300, 800), (900, 2500)):
        frequency = low + (high - low) * torch.rand(1, generator=generator)
        response = (-length * 300).exp() * torch.sin(2 * math.pi * frequency * length)
        total += torch.nn.functional.conv1d(source[None, None], response.flip(0)[None, None], padding=199)[0, 0, :count]
    return (total / total.abs().max() * 20000).to(torch.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of which some are held out, and such as must be left out."""
    data, is_held_out = speech("data"), module("common.settings").is_held_out
    root = tmp_path_factory.mktemp("sounds")
    names = [f"p{number}-word" for number in range(200)]
    out = [name for name in names if is_held_out(name)][:2]
    names = [name for name in names if not is_held_out(name)][:4] + out
    (root / "more").mkdir()
    for seed, name in enumerate(names):
        data.write_wav(root / "more" / f"{name}.wav", voice(0.8, seed), RATE)
        data.write_wav(root / f"{name}-again.wav", voice(0.5, 100 + seed), RATE)
    data.write_wav(root / "p-copy.wav", voice(0.8, 0), RATE)
    data.write_wav(root / "p-silent.wav", torch.full((4000,), 20, dtype=torch.int16), RATE)
    data.write_wav(root / "p-none.wav", torch.zeros(0, dtype=torch.int16), RATE)
    data.write_wav(root / "beep.wav", voice(0.5, 50), RATE)
    return root


@pytest.fixture(scope="module")
def demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of every method has written."""
    out = tmp_path_factory.mktemp("speech")
    script("train_speech_codec").main([*TINY, "--device", "cpu", "--data", str(folder), "--out", str(out)])
    return out


def quantizer(method: str, **settings: int):
    """A quantizer with codebooks as large as the latents it gets here, in evaluation mode."""
    config = speech("config").Config(method, dim=4, num_codewords=16, stages=3, **settings)
    torch.manual_seed(0)
    made = speech("quantizers").build(config)
    if method == "ema":
        made(torch.randn(2, 4, 50), 3)  # k-means
    else:
        with torch.no_grad():
            made.layer.codebook.normal_().mul_(torch.tensor([1.0, 0.5, 0.25])[:, None, None])
    return made.eval()


# ---- data ------------------------------------------------------------------------------------------------------------


def test_corpus(folder: Path) -> None:
    corpus = speech("data").load(folder)
    assert corpus.rate == RATE
    assert len(corpus.train) == 8 and len(corpus.held_out) == 4  # no copy, silence, empty file or beep
    sides = [{name.split("/")[-1].removesuffix("-again") for name in side} for side in (corpus.train, corpus.held_out)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [4, 2]


def test_wav_files_are_read_as_written(tmp_path: Path) -> None:
    data = speech("data")
    samples = torch.arange(-(2**15), 2**15, 7).to(torch.int16)
    data.write_wav(tmp_path / "a.wav", samples, 16000)
    read, rate = data.read_wav(tmp_path / "a.wav")
    assert rate == 16000 and torch.equal(read, samples)
    assert torch.equal(data.to_int16(data.to_float(samples)), samples)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes(torch.tensor([[100, 300], [-2, -4]], dtype=torch.int16).numpy().tobytes())
    assert data.read_wav(tmp_path / "stereo.wav")[0].tolist() == [200, -3]


def test_bad_data_is_named(folder: Path, tmp_path: Path) -> None:
    data, main = speech("data"), script("train_speech_codec").main

    def fails(message: str, where: Path) -> None:
        with pytest.raises(SystemExit, match=message):
            main([*TINY, "--data", str(where), "--out", str(tmp_path / "out")])

    fails("no wav files in", tmp_path / "absent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FOLDER", tmp_path / "absent")
        fails(f"apt install {data.PACKAGE}", tmp_path / "absent")
    data.write_wav(tmp_path / "one.wav", voice(0.3, 1), RATE)
    fails("divide into 1 and 0|divide into 0 and 1", tmp_path)
    data.write_wav(tmp_path / "two.wav", voice(0.3, 2), 16000)
    fails("one rate; got .*one.wav 8000.*two.wav 16000", tmp_path)
    (tmp_path / "three.wav").write_text("no sound")
    fails("three.wav is not a readable wav file", tmp_path)
    with wave.open(str(tmp_path / "three.wav"), "wb") as file:
        file.setparams((1, 1, RATE, 0, "NONE", ""))
        file.writeframes(bytes(100))
    fails("samples of 8 bits", tmp_path)


def test_clips_come_from_the_samples() -> None:
    samples = torch.arange(1000, dtype=torch.int16)
    clips = speech("data").random_clips(samples, 200, 990, torch.Generator().manual_seed(0))
    assert clips.shape == (200, 1, 990) and bool((clips.diff() == 1).all())
    assert set(clips[:, 0, 0].tolist()) == set(range(11))  # the last place too
    with pytest.raises(ValueError, match="at most 1000"):
        speech("data").random_clips(samples, 1, 1001, torch.Generator())


# ---- measures --------------------------------------------------------------------------------------------------------


def test_si_sdr() -> None:
    si_sdr = speech("spectra").si_sdr
    t = torch.arange(8000) / RATE
    one, other = torch.sin(2 * math.pi * 440 * t), torch.cos(2 * math.pi * 440 * t)  # orthogonal, of one power
    assert si_sdr(one + 0.1 * other, one) == pytest.approx(20, abs=1e-3)
    assert si_sdr(-0.3 * (one + 0.1 * other), one) == pytest.approx(20, abs=1e-3)
    assert si_sdr(one, one) == pytest.approx(80) and si_sdr(0 * one, one) == -40


def test_spectra() -> None:
    spectra = speech("spectra")
    t = torch.arange(4096) / RATE
    sine = torch.sin(2 * math.pi * 1000 * t)  # the middle of bin 32 of a window of 256
    magnitudes = spectra.magnitudes(sine[None], 256)[0, :, 5:-5]
    assert torch.allclose(magnitudes[32], torch.ones(()), atol=1e-3) and float(magnitudes[60:].max()) < 1e-3
    for window, bands in (*spectra._RESOLUTIONS, (256, 32)):
        filters = spectra.mel_filters(window, bands, RATE)
        assert torch.allclose(filters.sum(1), torch.ones(bands)), "a band without a bin"
        assert bool((filters.argmax(1).diff() >= 0).all())
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert spectra.mel_distance(noise, noise, RATE) == 0 == spectra.log_spectral_distance(noise, noise)
    assert spectra.mel_distance(noise, 0.1 * noise, RATE) == pytest.approx(20, abs=1.5)  # less the floor's part
    assert spectra.log_spectral_distance(noise, 0.1 * noise) == pytest.approx(20, abs=1.5)


# ---- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_codes_of_fewer_stages_are_the_first(stages: int) -> None:
    z = torch.randn(2, 4, 20)
    ours = quantizer("diveq")
    expected, indices, _ = ours.layer.inference(z, num_active=stages)
    codes = ours.encode(z, 0)
    assert torch.equal(codes[:stages], indices[:stages])
    assert torch.allclose(ours.decode(codes[:stages], 0), expected, atol=1e-6)
    theirs = quantizer("ema")
    codes = theirs.encode(z, 0)
    expected = theirs.layer.get_output_from_indices(codes[:stages].movedim(0, -1)).movedim(-1, 1)
    assert torch.allclose(theirs.decode(codes[:stages], 0), expected, atol=1e-6)


@pytest.mark.parametrize("t_bits", [0, 3])
def test_curve_coding_takes_the_nearest_point_of_each_stage(t_bits: int) -> None:
    ours = quantizer("sf_diveq")
    z = torch.randn(2, 4, 20)
    codes = ours.encode(z, t_bits)
    assert int(codes.max()) < ours.num_symbols(t_bits) == 15 * 2**t_bits + 1
    rest = z.movedim(1, -1).double()
    for stage in range(3):
        book = ours.layer.codebook[stage].double()
        t = torch.arange(2**t_bits + 1, dtype=torch.float64)[:, None] / 2**t_bits
        points = (book[:-1, None] * (1 - t) + book[1:, None] * t).flatten(0, 1)  # ends twice, which changes no distance
        chosen = ours.points(stage, t_bits)[codes[stage]].double()
        nearest = (rest[..., None, :] - points).square().sum(-1).min(-1).values
        assert torch.allclose((rest - chosen).square().sum(-1), nearest, atol=1e-5)
        rest = rest - chosen
    assert torch.allclose(ours.decode(codes, t_bits), z - rest.movedim(-1, 1).float(), atol=1e-5)


@pytest.mark.parametrize("method", ["diveq", "sf_diveq", "ema"])
def test_number_of_stages_in_training(method: str) -> None:
    made = quantizer(method).train()
    z = torch.randn(2, 4, 50, requires_grad=True)
    for stages in (1, 2, 3):
        z_q, codes, loss = made(z, stages)
        assert z_q.shape == z.shape and codes.shape == (3, 2, 50) and (loss is None) == (method != "ema")
        assert (codes >= 0).flatten(1).all(1).tolist() == [stage < stages for stage in range(3)]
        assert bool((codes[stages:] == -1).all())
        assert torch.autograd.grad(z_q.sum(), z)[0].abs().sum() > 0


# ---- training --------------------------------------------------------------------------------------------------------


def test_every_method_end_to_end(demo: Path) -> None:
    report = json.loads((demo / "results.json").read_text())
    methods = speech("config").Config.METHODS
    assert {run["method"] for run in report["runs"]} == set(methods)
    assert len(report["table"]) == (len(methods) + 1) * 3  # SF-DiVeQ has two ways of coding
    for run in report["runs"]:
        bits = math.log2(15 * 16 + 1) if "4-bit" in run["coding"] else 4
        assert run["kbit_s"] == pytest.approx(run["stages"] * bits * 250 / 1000)
        assert -40 <= run["si_sdr"] < 30 and 0 < run["mel_distance"] < 60 and 1 <= run["perplexity"] <= 241
    names = {"quality", "learning_curves", "codeword_use", "spectrograms"}
    assert {path.stem for path in (demo / "figures").glob("*.png")} == names
    assert {path.name for path in demo.glob("*.pt")} == {f"{method}-seed0.pt" for method in methods}
    assert len(list((demo / "wav").iterdir())) == 3 * 5  # the original and four ways of coding it
    for path in (demo / "wav").glob("*-original.wav"):
        prefix = path.name.removesuffix("original.wav")
        lengths = {len(speech("data").read_wav(other)[0]) for other in (demo / "wav").glob(f"{prefix}*.wav")}
        assert len(lengths) == 1 and lengths.pop() > 1000


def test_same_start_and_draws_for_every_method(folder: Path) -> None:
    config, train, data = speech("config").Config, speech("train"), speech("data")
    samples = torch.cat(list(data.load(folder).train.values()))
    small = dict(width=8, dim=4, num_codewords=16, stages=3, batch=2, clip=512)
    runs = [train.Run(config(method, **small)) for method in config.METHODS]
    for run in runs[1:]:
        for mine, first in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(mine, first)
    for run in runs:
        run.train_mode()
        run.advance(samples)
    assert all(torch.equal(run.draws.get_state(), runs[0].draws.get_state()) for run in runs)
    drawn = [[runs[0]._draw_stages() for _ in range(400)]]
    assert set(drawn[0]) == {1, 2, 3} and 230 < drawn[0].count(3) < 300  # half of them, and a third of the rest


# SF-DiVeQ builds its curves in step 3 of 40, and begins with them in step 4.
@pytest.mark.parametrize(("method", "stop"), [("diveq", 2), ("sf_diveq", 2), ("sf_diveq", 5), ("ema", 2)])
def test_resumed_run_is_identical(method: str, stop: int, folder: Path, tmp_path: Path) -> None:
    config = speech("config").Config(
        *(method, 0, 40), batch=2, clip=512, width=8, dim=4, num_codewords=16, stages=2, log_every=1, eval_every=1
    )
    corpus = speech("data").load(folder)
    samples, held_out = torch.cat(list(corpus.train.values())), list(corpus.held_out.values())[:1]
    check_resumption(lambda: speech("train").Run(config), samples, held_out, stop, tmp_path)


def test_bad_settings_are_named(folder: Path, tmp_path: Path) -> None:
    main = script("train_speech_codec").main
    for wrong, message in ((["--stages", "0"], "stages"), (["--clip", "1000"], "clip must be a multiple of 32")):
        with pytest.raises(SystemExit, match=message):
            main([*TINY, *wrong, "--data", str(folder), "--out", str(tmp_path)])


# ---- codec -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "stages"), [("diveq", None), ("diveq", 2), ("sf_diveq", 1), ("ema", 3)])
def test_codec_round_trip(method: str, stages: int | None, demo: Path, tmp_path: Path, capsys) -> None:
    data, evaluate = speech("data"), speech("evaluate")
    main = script("codec").main
    source, code, output = tmp_path / "in.wav", tmp_path / "code", tmp_path / "out.wav"
    samples, model = voice(0.7, 9)[:5555], demo / f"{method}-seed0.pt"
    data.write_wav(source, samples, RATE)
    main(["encode", str(source), str(code), "--model", str(model), *(["--stages", str(stages)] if stages else [])])
    main(["decode", str(code), str(output), "--original", str(source)])

    run = speech("train").Run.load(model)
    run.train_mode(False)
    t_bits, stages = (4 if method == "sf_diveq" else 0), stages or 3
    codes = evaluate.encode(run.model, run.quantizer, samples, t_bits)[:stages]
    expected = evaluate.decode(run.model, run.quantizer, codes, t_bits, len(samples))
    decoded, rate = data.read_wav(output)
    assert rate == RATE and torch.equal(decoded, expected)
    printed = capsys.readouterr().out
    bits = (8 if method == "sf_diveq" else 4) * stages * 174  # 174 latents
    assert f"{bits / (1000 * 5555 / RATE):.3f} kbit/s" in printed
    quality = speech("spectra").si_sdr(data.to_float(decoded), data.to_float(samples))
    assert printed.count(f"SI-SDR {quality:.2f} dB") == 2


def test_codec_errors(demo: Path, tmp_path: Path) -> None:
    main, data = script("codec").main, speech("data")
    source, code, model = tmp_path / "in.wav", tmp_path / "code.npz", str(demo / "diveq-seed0.pt")
    data.write_wav(source, voice(0.5, 3), RATE)
    main(["encode", str(source), str(code), "--model", model])
    data.write_wav(tmp_path / "other.wav", voice(0.5, 3), 16000)
    data.write_wav(tmp_path / "long.wav", voice(0.6, 3), RATE)
    data.write_wav(tmp_path / "empty.wav", torch.zeros(0, dtype=torch.int16), RATE)
    damaged = tmp_path / "damaged.npz"
    content = bytearray(code.read_bytes())
    content[-200] ^= 255
    damaged.write_bytes(content)
    out = str(tmp_path / "o.wav")

    def fails(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(list(arguments))

    fails("16000 samples per second; this model codes 8000", "encode", f"{tmp_path}/other.wav", out, "--model", model)
    fails("is empty", "encode", f"{tmp_path}/empty.wav", out, "--model", model)
    fails("from 1 to 3 with this model; got 4", "encode", str(source), out, "--model", model, "--stages", "4")
    fails("another length", "decode", str(code), out, "--original", f"{tmp_path}/long.wav")
    fails("another model", "decode", str(code), out, "--model", str(demo / "ema-seed0.pt"))
    fails("not a file that codec.py wrote", "decode", str(damaged), out)
