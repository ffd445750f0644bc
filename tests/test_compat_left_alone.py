"""What ``accelerate_vector_quantize`` leaves alone, and that it says why."""

from __future__ import annotations

import logging

import pytest
import torch

from diveq_kernels.compat import accelerate_vector_quantize

package = pytest.importorskip("vector_quantize_pytorch")

LEFT_ALONE = {
    "samples codes": {"stochastic_sample_codes": True},
    "softmax of all distances": {"straight_through": True, "rotation_trick": False},
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 0.1},
    "optimised within": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    },
}


@pytest.mark.parametrize(("why", "options"), LEFT_ALONE.items(), ids=LEFT_ALONE)
def test_what_is_left_alone_says_why(why, options, caplog):
    layer = package.VectorQuantize(dim=8, codebook_size=20, **options)
    with caplog.at_level(logging.WARNING, "diveq_kernels"):
        model = accelerate_vector_quantize(torch.nn.Sequential(layer))
    assert type(model[0]) is package.VectorQuantize
    assert "leaves 0 alone" in caplog.text and why in caplog.text


def test_a_class_of_its_own_is_left_alone(caplog):
    class Own(package.VectorQuantize):
        pass

    with caplog.at_level(logging.WARNING, "diveq_kernels"):
        model = accelerate_vector_quantize(torch.nn.Sequential(Own(dim=8, codebook_size=20)))
        assert caplog.text.count("leaves 0 alone: it is a Own") == 1 and type(model[0]) is Own
        fused = accelerate_vector_quantize(accelerate_vector_quantize(package.VectorQuantize(dim=8, codebook_size=20)))
    assert type(fused) is not package.VectorQuantize and caplog.text.count("alone") == 1


def test_what_has_no_quantizer(caplog):
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got str"):
        accelerate_vector_quantize("model")
    with caplog.at_level(logging.WARNING, "diveq_kernels"):
        accelerate_vector_quantize(torch.nn.Linear(2, 3))
    assert "has found no VectorQuantize in this Linear" in caplog.text


def test_a_codebook_of_a_class_of_its_own_is_left_alone(caplog):
    class Own(package.vector_quantize_pytorch.Codebook):
        pass

    layer = package.VectorQuantize(dim=8, codebook_size=20)
    layer._codebook.__class__ = Own
    with caplog.at_level(logging.WARNING, "diveq_kernels"):
        accelerate_vector_quantize(layer)
    assert "leaves the module alone: its codebook is a Own" in caplog.text
    assert type(layer) is package.VectorQuantize and type(layer._codebook) is Own


@pytest.mark.parametrize("cosine", [False, True])
def test_what_the_search_does_not_take_is_left_alone(cosine, caplog):
    """A cosine search may need a column more: here for a codeword of no length, as those that are never used become."""
    most = 4096 - cosine
    sizes = ((most, 3), (most + 1, 3), (1, (1 << 22) + 1))
    fits, too_wide, too_long = (package.VectorQuantize(*size, use_cosine_sim=cosine) for size in sizes)
    with caplog.at_level(logging.WARNING, "diveq_kernels"):
        for layer in (too_wide, too_long):
            assert type(accelerate_vector_quantize(layer)) is package.VectorQuantize
            assert "its codebook is larger than 4194304 codewords of" in caplog.text
            caplog.clear()
        accelerate_vector_quantize(fits)
    assert not caplog.text and type(fits) is not package.VectorQuantize
    fits._codebook.embed[:, 1] = 0
    z_q, codes, _ = fits.eval()(torch.randn(1, 5, most))
    assert z_q.isfinite().all() and not (codes == 1).all()
