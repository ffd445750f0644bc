"""``diveq_kernels.compat.diveq`` and ``patch_diveq``: the other package's users change one line."""

from __future__ import annotations

import pickle
import runpy
import sys
import types

import pytest
import torch

import diveq_kernels.compat.diveq as ours
from diveq_kernels.compat import Patch, patch_diveq

diveq = pytest.importorskip("diveq")

# A VQ-VAE as that package's readme builds, trains and uses it.
SCRIPT = """
import torch
import torch.nn as nn
import diveq
from diveq import {name}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 8, 4, 4)
        self.decoder = nn.ConvTranspose2d(8, 1, 4, 4)
        self.vector_quantizer = {name}({arguments})

    def forward(self, x, inference=False):
        z = self.encoder(x).permute(0, 2, 3, 1)
        quantize = self.vector_quantizer.inference if inference else self.vector_quantizer
        z_q, indices, perplexity = quantize(z.reshape(-1, 8))
        return self.decoder(z_q.view(z.shape).permute(0, 3, 1, 2)), indices, perplexity

torch.manual_seed(0)
model, losses, perplexities = Model(), [], []
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
images = torch.rand(8, 1, 16, 16)
for step in range(40):
    recon, indices, perplexity = model(images)
    loss = nn.functional.mse_loss(recon, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    shown = perplexity if {single} else sum(perplexity) / len(perplexity)
    perplexities.append(float(shown))
    line = f"step {{step}}: loss {{loss.item():.4f}} perplexity {{shown:.2f}}"
with torch.no_grad():
    recon, indices, perplexity = model(images, inference=True)
codes = indices if {single} else indices[1]
assert codes.shape == (128,) and codes.dtype == torch.int64
assert {single} or len(indices) == len(perplexity) == 2
state = model.state_dict()
"""


def arguments_of(name):
    arguments = "num_embeddings=16, embedding_dim=8, allow_warning=False"
    if name.startswith(("Residual", "Product")):
        arguments += ", num_codebooks=2"
    if not name.endswith("Detach"):
        arguments += ", noise_var=1e-3"
    if "SF" in name:
        return arguments + ", skip_iters=10, avg_iters=5" + (", replacement_iters=5" if name[0] in "RP" else "")
    return arguments + ", replacement_iters=10, verbose=False"


@pytest.mark.parametrize("name", ours.__all__)
def test_a_script_runs_unchanged(name, tmp_path):
    script = tmp_path / "train.py"
    single = not name.startswith(("Residual", "Product"))
    script.write_text(SCRIPT.format(name=name, arguments=arguments_of(name), single=single))
    before = runpy.run_path(str(script))
    with patch_diveq():
        after = runpy.run_path(str(script))
    assert type(before["model"].vector_quantizer).__module__.startswith("diveq.")
    assert type(after["model"].vector_quantizer) is getattr(ours, name)
    assert after["losses"][-1] < 0.9 * after["losses"][0]
    if name.endswith("DIVEQ") and "SF" not in name:
        # The same model from the same seed, up to the noise and the draws of replacements.
        assert after["losses"][0] == pytest.approx(before["losses"][0], rel=1e-2)
        assert after["perplexities"][0] == pytest.approx(before["perplexities"][0], rel=1e-3)
    after["model"].load_state_dict(before["state"])
    before["model"].load_state_dict(after["state"])


def test_all_eight_classes_are_there():
    assert set(ours.__all__) == {name for name in dir(diveq) if name.endswith(("DIVEQ", "DIVEQDetach"))}


def test_undoing():
    originals = {name: getattr(diveq, name) for name in ours.__all__}
    submodule = sys.modules["diveq.diveq"]
    patch = patch_diveq()
    assert diveq.DIVEQ is submodule.DIVEQ is ours.DIVEQ
    again = patch_diveq()
    again.undo()  # replaced nothing, restores nothing
    assert diveq.DIVEQ is ours.DIVEQ
    patch.undo()
    patch.undo()
    assert {name: getattr(diveq, name) for name in ours.__all__} == originals
    assert submodule.DIVEQ is originals["DIVEQ"]
    first, second = patch_diveq(), patch_diveq()
    first.undo()
    second.undo()  # in any order
    assert {name: getattr(diveq, name) for name in ours.__all__} == originals
    with pytest.raises(RuntimeError, match="inside"), patch_diveq():
        raise RuntimeError("inside")
    assert diveq.DIVEQ is originals["DIVEQ"]


def test_what_was_replaced_twice_is_undone_to_what_it_was():
    owner = types.SimpleNamespace(name=1)
    with Patch() as patch:
        patch.replace(owner, "name", 2)
        patch.replace(owner, "name", 3)
        assert owner.name == 3
    assert owner.name == 1


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diveq", None)
    with pytest.raises(ModuleNotFoundError, match="diveq"):
        patch_diveq()


def test_noise_var_is_a_standard_deviation_here_too():
    layer = ours.DIVEQ(1, 4096, noise_var=0.05, allow_warning=False)
    with torch.no_grad():
        layer.codebook.zero_()
        z = torch.zeros(1, 4096).index_fill(1, torch.tensor([0]), 1.0)
        u = layer(z)[0] - z  # the direction of noise and d = -z: its part across d is sigma * sqrt(D - 1) long
    assert (u[0, 1:].norm() / -u[0, 0]).item() == pytest.approx(0.05 * 4095**0.5, rel=0.4)
    assert layer.noise_var == layer.noise_std == 0.05
    layer.noise_var = 0.0  # as scripts do that let the noise end
    assert layer.noise_std == 0.0 and torch.equal(layer(z)[0], layer.codebook)


def test_layers_pickle_while_patched():
    with patch_diveq():
        copy = pickle.loads(pickle.dumps(diveq.ResidualSFDIVEQ(4, 2, 2, allow_warning=False)))
    assert type(copy) is ours.ResidualSFDIVEQ


def test_a_pickle_of_the_package_s_own_class_is_refused():
    """Its attributes are not ours; the state_dict is what goes across."""
    pickled = pickle.dumps(diveq.DIVEQ(8, 4))
    with patch_diveq(), pytest.raises(TypeError, match="pickled DIVEQ must be one of diveq_kernels.* state_dict"):
        pickle.loads(pickled)
