"""Image generation: its data, the prior, measures, a tiny run of every tokenizer, and resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_tools import check_resumption, module, script

TINY = (
    "--steps 4 --batch 4 --tokenizer-steps 4 --tokenizer-batch 4 --num-codewords 16 --dim 4 --width 8 --layers 1 "
    "--prior-width 8 --heads 2 --samples 30 --log-every 1 --eval-every 2"
).split()
pytestmark = pytest.mark.xdist_group("example")


def generation(name: str) -> ModuleType:
    return module(f"generation.{name}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of every tokenizer has written."""
    out = tmp_path_factory.mktemp("generation")
    script("train_image_generator").main([*TINY, "--device", "cpu", "--out", str(out)])
    return out


def small_prior(vocabulary: int = 7, length: int = 5, classes: int = 3):
    torch.manual_seed(0)
    prior = generation("prior").Prior(vocabulary, length, classes, width=16, layers=2, heads=4, dropout=0.5)
    with torch.no_grad():
        for embedding in (prior.token.weight, prior.label.weight, prior.position):
            embedding.mul_(50)  # or the logits hardly depend on anything before training
    return prior.eval()


# ---- data ------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    images = generation("data").load("digits", 64)
    assert len(images.train) + len(images.held_out) == 1797 and 0.15 < len(images.held_out) / 1797 < 0.25
    assert images.train.shape[1:] == (1, 8, 8) and int(images.train.max()) == 255 and images.classes == 10
    assert set(images.held_out_labels.tolist()) == set(range(10)) and not images.flip
    means = images.train.double().flatten(1).mean(1)
    assert means[images.train_labels == 1].std() > 0
    again = generation("data").load("digits", 64)
    assert torch.equal(images.held_out, again.held_out)


def test_folder_of_images(tmp_path: Path) -> None:
    data, write = generation("data"), module("vqvae.data").write_image
    for number in range(20):
        picture = torch.full((3, 40, 30), number, dtype=torch.uint8)
        picture[:, :2] = 255  # cut off: the square is the middle
        write(tmp_path / f"{number}.png", picture)
    images = data.load(str(tmp_path), 16)
    assert images.train.shape[1:] == (3, 16, 16) and images.classes == 1 and images.flip
    every = torch.cat([images.train, images.held_out])
    assert sorted(every[:, 0, 0, 0].tolist()) == list(range(20)) and bool((every == every[:, :1, :1, :1]).all())
    with pytest.raises(ValueError, match="--data must be 'digits' or a folder of image files; absent has 0"):
        data.load("absent", 16)


# ---- prior -----------------------------------------------------------------------------------------------------------


def test_prior_sees_only_the_tokens_before() -> None:
    prior = small_prior()
    tokens, labels = torch.randint(7, (2, 5)), torch.tensor([0, 2])
    logits = prior(tokens, labels)
    assert logits.shape == (2, 5, 7)
    for place in range(5):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        moved = (prior(changed, labels) - logits).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [later > place for later in range(5)]
    assert bool(((prior(tokens, labels.flip(0)) - logits).abs().amax(2) > 1e-6).all())  # every token sees the class


def test_nats_are_those_of_the_chain_rule() -> None:
    prior = small_prior()
    tokens, labels = torch.randint(7, (2, 5)), torch.tensor([1, 1])
    total = 0.0
    for place in range(5):
        p = prior(tokens[:, :place], labels)[:, -1].log_softmax(-1)
        total -= p.gather(1, tokens[:, place : place + 1]).sum().item()
    assert float(prior.nats(tokens, labels)) == pytest.approx(total / 10, rel=1e-5)


def test_nats_of_a_set_weigh_every_image_alike() -> None:
    prior = small_prior()
    tokens, labels = torch.randint(7, (300, 5)), torch.randint(3, (300,))
    nats = generation("train").nats_per_token(prior.train(), (tokens, labels), torch.device("cpu"))
    assert nats == pytest.approx(float(prior.eval().nats(tokens, labels)), rel=1e-5)


def test_samples_follow_the_model() -> None:
    prior = small_prior(vocabulary=3, length=2, classes=1)
    labels = torch.zeros(20000, dtype=torch.int64)
    drawn = prior.sample(labels, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, prior.sample(labels, torch.Generator().manual_seed(1)))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    p = torch.stack([(-2 * prior.nats(pair[None], labels[:1])).exp() for pair in pairs])
    assert float(p.sum()) == pytest.approx(1, abs=1e-5) and float(p.max() / p.min()) > 2
    counts = (drawn @ torch.tensor([3, 1])).bincount(minlength=9)
    deviation = (counts - 20000 * p).abs() / (20000 * p * (1 - p)).sqrt()
    assert float(deviation.max()) < 5


# ---- measures --------------------------------------------------------------------------------------------------------


def test_frechet_distance() -> None:
    evaluate = generation("evaluate")
    images = torch.randint(40, 200, (500, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert evaluate.frechet_distance(images, images) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(images, images + 51) == pytest.approx(64 * 0.2**2, rel=1e-4)
    # Half the contrast around 0: covariances A and A/4, so trace (A)/4 and the means' part.
    halved = ((images.int() // 2) * 2).to(torch.uint8)
    x = evaluate.features(halved)
    expected = (x.mean(0) / 2).square().sum() + x.T.cov().trace() / 4
    assert evaluate.frechet_distance(halved, halved // 2) == pytest.approx(float(expected), rel=1e-4)


def test_classifier_knows_digits() -> None:
    images, evaluate = generation("data").load("digits", 8), generation("evaluate")
    classifier = evaluate.Classifier(images)
    assert classifier.agreement(images.held_out, images.held_out_labels) > 0.97
    assert classifier.agreement(images.held_out, (images.held_out_labels + 1) % 10) < 0.03


@pytest.mark.parametrize("method", ["diveq", "sf_diveq", "rotation"])
def test_tokens_are_the_tokenizers_symbols(method: str, demo: Path) -> None:
    tokenizer = module("vqvae.train").Run.load(demo / f"{method}-seed0.tokenizer.pt")
    train, images = generation("train"), generation("data").load("digits", 8).held_out[:5]
    tokens = train.tokenize(tokenizer, images)
    prior = train.Run.load(demo / f"{method}-seed0.pt").model
    assert tokens.shape == (5, 16) and int(tokens.max()) < prior.token.num_embeddings == (13 if "sf" in method else 16)
    reconstruct, t_bits = module("vqvae.evaluate").reconstruct, generation("config").T_BITS
    expected = torch.stack([reconstruct(tokenizer.model, tokenizer.quantizer, image, t_bits) for image in images])
    assert (train.detokenize(tokenizer, tokens).int() - expected.int()).abs().max() <= 1


# ---- training --------------------------------------------------------------------------------------------------------


def test_every_tokenizer_end_to_end(demo: Path) -> None:
    report = json.loads((demo / "results.json").read_text())
    methods = generation("config").Config.METHODS
    assert [run["method"] for run in report["runs"]] == list(methods) and len(report["table"]) == len(methods)
    for run in report["runs"]:
        assert 0 < run["nats_per_token"] < 2 * math.log(16)
        assert run["nats_per_dim"] == pytest.approx(run["nats_per_token"] / 4)
        assert run["bits_per_image"] == pytest.approx(run["nats_per_token"] * 16 / math.log(2))
        assert 0 <= run["agreement"] <= 1 and run["frechet"] > report["real"]["frechet"] > 0
    assert {path.stem for path in (demo / "figures").glob("*.png")} == {"samples", "learning_curves"}
    assert "Real images" in (demo / "table.md").read_text()


def test_folder_without_classes_end_to_end(tmp_path: Path) -> None:
    write = module("vqvae.data").write_image
    (tmp_path / "images").mkdir()
    for number in range(24):
        write(tmp_path / "images" / f"{number}.png", torch.randint(256, (3, 16, 16), dtype=torch.uint8))
    settings = ["--methods", "sf_diveq", "--size", "16", "--data", f"{tmp_path}/images", "--out", f"{tmp_path}/out"]
    script("train_image_generator").main([*TINY, *settings, "--device", "cpu"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "class" not in table and "nats/dim" in table
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["images"]["shape"] == [3, 16, 16] and report["settings"]["flip"] is True
    assert report["runs"][0]["nats_per_dim"] == pytest.approx(report["runs"][0]["nats_per_token"] * 16 / (3 * 256))


def test_resumed_prior_is_identical(tmp_path: Path) -> None:
    config = generation("config").Config(
        *("diveq", 0, 40), batch=2, num_codewords=16, layers=1, prior_width=8, heads=2, log_every=1, eval_every=1
    )
    tokens = torch.randint(16, (30, 16)), torch.randint(10, (30,))
    check_resumption(lambda: generation("train").Run(config), tokens, tokens, 2, tmp_path)


def test_checkpoints_say_what_they_hold(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of kind 'image'; 'prior' is needed"):
        generation("train").Run.load(demo / "diveq-seed0.tokenizer.pt")
    with pytest.raises(SystemExit, match="model of kind 'prior', which codes no files"):
        script("codec").main(["encode", "a.png", "a.npz", "--model", str(demo / "diveq-seed0.pt")])


def test_bad_settings_are_named(tmp_path: Path) -> None:
    main = script("train_image_generator").main
    for wrong, message in ((["--heads", "3"], "prior_width must be a multiple"), (["--dropout", "1"], "dropout")):
        with pytest.raises(SystemExit, match=message):
            main([*TINY, *wrong, "--out", str(tmp_path)])
