"""Exported programs: with this package's operations, and in ATen's alone, for ONNX and places without the package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from layer_cases import COMPOSITES, alike, make

import diveq_kernels.functional as F
from diveq_kernels import DIVEQ, SFDIVEQ, ProductDIVEQ, ResidualDIVEQ, ops
from diveq_kernels.export import portable

DIM = 6
FREE = torch.export.Dim.DYNAMIC
KINDS = [DIVEQ, SFDIVEQ, *COMPOSITES]  # in eval() the others are these

for_every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


class Calls(torch.nn.Module):
    """A layer's method as a module's forward; codes as a plain tuple, which every reader of programs knows."""

    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *arguments):
        result = getattr(self.layer, self.method)(*arguments)
        return tuple(result) if isinstance(result, tuple) else (result,)


def exported(kind, method, *arguments, **keywords):
    """(module, program of any N) of a layer in eval()."""
    module = Calls(make(kind, 12, DIM, **keywords), method).eval()
    free = ({0: FREE},) * len(arguments)
    return module, torch.export.export(module, arguments, dynamic_shapes=(free,))


def operations(program):
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if "diveq" in str(node.target)}


def agree(found, expected):
    """Indices to the last, points and positions but for a rounding."""
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if want.dtype == torch.int64:
            assert torch.equal(got, want)
        else:
            tolerance = 4 * torch.finfo(want.dtype).eps
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 4, equal_nan=True)


@for_every_kind
@pytest.mark.parametrize("method", ["forward", "encode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_portable_program_quantizes_as_the_layer(kind, method, dtype):
    module, program = exported(kind, method, torch.randn(9, DIM, dtype=dtype), dtype=dtype)
    in_aten = portable(program)
    assert operations(program) and not operations(in_aten)
    z = torch.randn(57, DIM, dtype=dtype)
    agree(in_aten.module()(z), module(z))
    if method == "forward":
        z[3], z[5, 2] = torch.nan, torch.inf
        agree(in_aten.module()(z)[:1], module(z)[:1])  # these rows' index may be any, and is counted


@for_every_kind
def test_a_portable_program_decodes_as_the_layer(kind):
    layer = make(kind, 12, DIM).eval()
    codes = layer.encode(torch.randn(9, DIM))
    flat = tuple(codes) if isinstance(codes, tuple) else (codes,)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *flat):
            return self.layer.decode(type(codes)(*flat) if isinstance(codes, tuple) else flat[0])

    free = tuple({tensor.dim() - 1: FREE} for tensor in flat)
    program = portable(torch.export.export(Decoder(), flat, dynamic_shapes=(free,)))
    assert not operations(program)
    more = layer.encode(torch.randn(30, DIM))
    found = program.module()(*(more if isinstance(more, tuple) else (more,)))
    torch.testing.assert_close(found, layer.decode(more), rtol=0, atol=0)


@for_every_kind
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_rows_left_out(kind, precision):
    mask = torch.rand(9) < 0.5
    module, program = exported(kind, "forward", torch.randn(9, DIM), mask, precision=precision)
    z, mask = torch.randn(40, DIM), torch.rand(40) < 0.5
    agree(portable(program).module()(z, mask), module(z, mask))


def test_stages_left_out():
    class Coder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(ResidualDIVEQ, 12, DIM, num_codebooks=3)

        def forward(self, z, num_active):
            z_q, indices = F.residual_diveq(z, self.layer.codebook, num_active=num_active, noise_std=0.0)
            return z_q, indices.long()

    module = Coder().eval()
    arguments = torch.randn(9, DIM), torch.randint(0, 4, (9,))
    program = torch.export.export(module, arguments, dynamic_shapes=({0: FREE}, {0: FREE}))
    z, num_active = torch.randn(50, DIM), torch.randint(0, 4, (50,))
    agree(portable(program).module()(z, num_active), module(z, num_active))


def test_squared_distances():
    class Search(torch.nn.Module):
        def forward(self, z, codebook, mask):
            return F.nearest(z, codebook, mask=mask)

    arguments = torch.randn(3, 5, DIM), torch.randn(12, DIM), torch.rand(3, 5) < 0.5
    program = portable(torch.export.export(Search(), arguments))
    agree(program.module()(*arguments), F.nearest(arguments[0], arguments[1], mask=arguments[2]))


def test_positions_of_rows_left_out():
    class Projection(torch.nn.Module):
        def forward(self, z, codebook, mask):
            return F.project(z, codebook, mask=mask)

    arguments = torch.randn(3, 5, DIM), torch.randn(12, DIM), torch.rand(3, 5) < 0.5
    program = portable(torch.export.export(Projection(), arguments))
    agree(program.module()(*arguments), F.project(arguments[0], arguments[1], mask=arguments[2]))


@pytest.mark.parametrize("kind", [DIVEQ, ResidualDIVEQ, ProductDIVEQ], ids=lambda kind: kind.__name__)
def test_equal_codewords(kind):
    """Either of them may be chosen, and nothing else."""
    module, program = exported(kind, "forward", torch.randn(9, DIM))
    with torch.no_grad():
        module.layer.codebook[..., 6:, :] = module.layer.codebook[..., :6, :]
        program.state_dict["layer.codebook"].copy_(module.layer.codebook)
    z = torch.randn(50, DIM)
    assert torch.equal(portable(program).module()(z)[0], module(z)[0])


def test_a_codebook_of_any_size_is_refused():
    class Search(torch.nn.Module):
        def forward(self, z, codebook):
            return F.nearest(z, codebook)

    arguments = torch.randn(9, DIM), torch.randn(12, DIM)
    program = torch.export.export(Search(), arguments, dynamic_shapes=({0: FREE}, {0: FREE}))
    with pytest.raises(ValueError, match=r"program must have a codebook of one shape, got one of \(s\w+, 6\)"):
        portable(program)


@for_every_kind
def test_programs_that_train_are_refused(kind):
    layer = make(kind, 12, DIM)
    layer(torch.randn(9, DIM))
    with torch.no_grad():
        program = torch.export.export(layer.train(), (torch.randn(9, DIM),))
    with pytest.raises(ValueError, match=r"program must be of layers in eval\(\), got .*diveq\..*call model\.eval\(\)"):
        portable(program)


@pytest.mark.parametrize("name", ["diveq", "residual_diveq", "product_diveq"])
def test_functions_that_draw_noise_are_refused(name):
    class Noisy(torch.nn.Module):
        def forward(self, z, codebooks):
            return getattr(F, name)(z, codebooks, noise_std=0.1)

    codebooks = {"diveq": torch.randn(12, DIM), "residual_diveq": torch.randn(2, 12, DIM)}
    arguments = torch.randn(9, DIM), codebooks.get(name, torch.randn(2, 12, DIM // 2))
    with pytest.raises(ValueError, match=rf"layers in eval\(\), got diveq\.{name.partition('_')[0]} with a seed: call"):
        portable(torch.export.export(Noisy(), arguments))


@pytest.mark.parametrize("name", ["residual", "product"])
def test_functions_that_draw_dither_are_refused(name):
    """Without noise too."""

    class Dithered(torch.nn.Module):
        def forward(self, z, codebooks):
            return getattr(F, f"{name}_sf_diveq")(z, codebooks, noise_std=0.0)

    arguments = torch.randn(9, DIM), torch.randn(2, 12, DIM if name == "residual" else DIM // 2)
    with pytest.raises(ValueError, match=rf"layers in eval\(\), got diveq\.{name} with a dither: call"):
        portable(torch.export.export(Dithered(), arguments))


def test_what_is_refused_is_found_in_branches_too():
    class Dithered(torch.nn.Module):
        def forward(self, z, codebook):
            def dithered(z, codebook):
                return F.sf_diveq(z, codebook, noise_std=0.0).z_q

            return torch.cond(z.sum() > 0, dithered, lambda z, codebook: z.clone(), (z, codebook))

    program = torch.export.export(Dithered(), (torch.randn(9, DIM), torch.randn(12, DIM)))
    assert not any("diveq" in str(node.target) for node in program.graph.nodes)
    with pytest.raises(ValueError, match=r"got one with diveq\.sf_diveq"):
        portable(program)


def test_every_operation_of_evaluation_has_its_form_in_aten():
    """What portable() leaves or refuses is what draws noise or dither, and the gradients."""
    from diveq_kernels.export import _IN_ATEN

    names = {name for name, value in vars(ops).items() if type(value).__name__ == "Operation"}
    assert {name for name in names if not name.endswith("_backward")} - set(_IN_ATEN) == {"sf_diveq"}


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16",) * 2], ids=str)
@pytest.mark.parametrize("name", ["nearest", "diveq", "project", "residual", "product"])
def test_what_is_written_in_aten_gives_what_the_operation_gives(name, dtypes):
    """Of z and a codebook of two dtypes, with a mask, stages left out, and a row and a codeword that are not finite."""
    from diveq_kernels.export import _IN_ATEN

    z, books = (torch.randn(n, m, DIM).to(getattr(torch, d)) for n, m, d in zip((7, 3), (9, 12), dtypes, strict=True))
    books[:, 4, ::2] = torch.nan
    books = {"residual": books, "product": books[..., : DIM // 3]}.get(name, books[0])
    mask, active = torch.rand(7, 9) < 0.6, torch.randint(0, 4, (7, 9))
    mask[0, :4], active[0, :4] = True, 0
    z[1, 0], mask[1, 0], active[1, 0] = torch.nan, True, 3
    between = {"residual": (None, active, mask, None, 0.0), "product": (None, mask, None, 0.0)}
    between |= {"diveq": (mask, None, 0.0)}
    arguments = z, books, *between.get(name, (mask,)), "exact", "reference"
    found, expected = _IN_ATEN[name](*arguments), getattr(ops, name)(*arguments)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        tolerance = 4 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=4 * tolerance, equal_nan=True)


def test_precision_is_that_of_the_program():
    """Exact ones tell codewords apart that are the same to fp32's products, as fast ones do not."""
    from diveq_kernels.export import _IN_ATEN

    codebook = torch.randn(40, DIM)
    codebook[20:] = codebook[:20] + 1e-5 * torch.randn(20, DIM)
    z = codebook + 1e-6 * torch.randn(40, DIM)
    for name in ("nearest", "project", "diveq", "residual", "product"):
        books = {"residual": codebook[None], "product": codebook[None]}.get(name, codebook)
        between = {"residual": (None, None, None, None, 0.0), "product": (None, None, None, 0.0)}
        between |= {"diveq": (None, None, 0.0)}
        middle = between.get(name, (None,))
        exact, fast = (_IN_ATEN[name](z, books, *middle, how, "reference")[1] for how in ("exact", "fast"))
        assert torch.equal(exact, getattr(ops, name)(z, books, *middle, "exact", "reference")[1]), name
        assert not torch.equal(exact, fast), name


@pytest.mark.parametrize("name", ["residual", "product"])
def test_half_precision_is_that_of_inputs_and_results_alone(name):
    """What stages leave is not rounded, and a row may be farther from its codewords than fp16 can say."""
    from diveq_kernels.export import _IN_ATEN

    z, books = torch.randn(2000, DIM), torch.randn(3, 40, DIM if name == "residual" else DIM // 3)
    z[7] = 40000.0
    between = {"residual": (None, None, None, None, 0.0), "product": (None, None, None, 0.0)}[name]
    arguments = z.half(), books.half(), *between, "exact", "reference"
    for got, want in zip(_IN_ATEN[name](*arguments), getattr(ops, name)(*arguments), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


_ELSEWHERE = """
import sys, torch
sys.modules["diveq_kernels"] = None
for path in sys.argv[1:]:
    program, (z, expected) = torch.export.load(path + ".pt2"), torch.load(path + ".pt")
    for got, want in zip(program.module()(z), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
print(len(sys.argv) - 1)
"""


def test_a_process_without_this_package_runs_it(tmp_path):
    paths = []
    for kind in KINDS:
        module, program = exported(kind, "encode", torch.randn(9, DIM))
        paths.append(str(tmp_path / kind.__name__))
        torch.export.save(portable(program), paths[-1] + ".pt2")
        z = torch.randn(20, DIM)
        torch.save((z, module(z)), paths[-1] + ".pt")
    command = [sys.executable, "-c", _ELSEWHERE, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.split() == [str(len(paths))], result.stderr


def test_ahead_of_time_by_inductor(tmp_path):
    module, program = exported(SFDIVEQ, "encode", torch.randn(9, DIM))
    package = torch._inductor.aoti_compile_and_package(portable(program), package_path=str(tmp_path / "encoder.pt2"))
    z = torch.randn(57, DIM)
    agree(torch._inductor.aoti_load_package(package)(z), module(z))


@for_every_kind
@pytest.mark.filterwarnings("ignore")
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, program = exported(kind, "forward", torch.randn(9, DIM))
    torch.onnx.export(portable(program), (torch.randn(9, DIM),), tmp_path / "layer.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    z = torch.randn(57, DIM)
    z_q, indices, _ = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    expected = module(z)
    assert torch.equal(torch.from_numpy(indices), expected[1])
    assert alike(kind, torch.from_numpy(z_q), expected[0]) or kind in COMPOSITES
    torch.testing.assert_close(torch.from_numpy(z_q), expected[0], rtol=1e-6, atol=1e-6)


def test_what_is_no_program():
    with pytest.raises(TypeError, match=r"program must be a torch.export.ExportedProgram, got Linear"):
        portable(torch.nn.Linear(2, 3))
