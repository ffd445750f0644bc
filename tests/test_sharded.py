"""`ShardedNearest` in several gloo processes: the results, gradients and training of the whole codebook."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, spawn, start
from torch.nn.parallel import DistributedDataParallel

import diveq_kernels.functional as F
from diveq_kernels import ShardedNearest, parameter_groups
from diveq_kernels.distributed import keep_shards

pytestmark = needs_gloo

WORLDS = (2, 4)
for_every_world = pytest.mark.parametrize(
    "world", [pytest.param(world, marks=pytest.mark.xdist_group(f"sharded {world}")) for world in WORLDS]
)

# name -> shape of a rank's rows, K, dtypes of z and codebook, backend
CASES = {
    "plain": ((7, 5), 37, torch.float32, torch.float32, None),
    "reference": ((7, 5), 37, torch.float32, torch.float32, "reference"),
    "fewer codewords than ranks": ((9,), 3, torch.float32, torch.float32, None),
    "one codeword": ((9,), 1, torch.float32, torch.float16, None),
    "one row": ((), 8, torch.float32, torch.float32, None),
    "bf16": ((20,), 37, torch.bfloat16, torch.float32, None),
    "fp16": ((20,), 37, torch.float16, torch.float16, None),
    "fp64": ((20,), 37, torch.float64, torch.float64, None),
    "empty": ((0, 4), 37, torch.float32, torch.float32, None),
    "masked": ((20,), 37, torch.float32, torch.float32, None),
    "all masked": ((20,), 37, torch.float32, torch.float32, None),
    "not finite": ((20,), 37, torch.float32, torch.float32, None),
    "ties": ((30,), 37, torch.float32, torch.float32, "reference"),
    "equal codewords": ((30,), 37, torch.float32, torch.float32, None),
    "near ties": ((30,), 37, torch.float32, torch.float32, None),
    "near ties, fp64": ((30,), 37, torch.float64, torch.float64, None),
    "near ties, fp64 codebook": ((30,), 37, torch.float32, torch.float64, None),
    "strided": ((6, 5), 37, torch.float32, torch.float32, None),
}


def data(name, ranks):
    """(rows of `ranks` ranks [ranks, ..., D], gradients of z_q and of sqdist, mask or None, codebook, backend)."""
    shape, K, z_dtype, c_dtype, backend = CASES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    z, g = torch.randn(2, ranks, *shape, 6, generator=generator, dtype=torch.float64)
    h = torch.randn(ranks, *shape, generator=generator)
    codebook = torch.randn(K, 6, generator=generator, dtype=torch.float64)
    mask = None
    if "masked" in name:
        mask = torch.rand(ranks, *shape, generator=generator) < (0.7 if name == "masked" else 0)
    if name == "not finite":
        z[:, 3, 2], z[:, 5, 1], z[:, 6] = torch.nan, torch.inf, -torch.inf
        codebook[2, 3], codebook[28:] = torch.inf, -torch.nan  # the last rank of four has no finite codeword
    if name == "ties":
        z, codebook = z.round(), codebook.round()
    if name == "equal codewords":
        codebook[20:] = codebook[:17]
        codebook[18] = codebook[3]
    if name.startswith("near ties"):
        z *= 1e-12
        codebook[:, 0] = 1
        # From far to near, with differences that fp32 does not show: the last is the nearest.
        small = 1e-15 if "fp64" in name else 1e-9
        codebook[:, 1] = (torch.arange(K - 1, -1, -1) * small).sqrt()
        codebook[:, 2:] = 0
    z = z.to(z_dtype)
    if name == "strided":
        z = torch.stack((z, z), dim=-1).movedim(1, 2).contiguous().movedim(2, 1)[..., 0]
    return (
        z,
        g.to(z_dtype),
        h.to(torch.float64 if torch.float64 in (z_dtype, c_dtype) else torch.float32),
        mask,
        codebook.to(c_dtype),
        backend,
    )


def results(search, step, codebook, z, g, h):
    """Outputs and gradients of search(z) and step(z)."""
    found = {}
    for function, names, grad in ((search, ("indices", "sqdist"), h), (step, ("z_q", "codes"), g)):
        leaf = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = dict(zip(names, function(leaf), strict=True))
        codebook.grad = None
        outputs["sqdist" if "sqdist" in outputs else "z_q"].backward(grad)
        prefix = names[0]
        found |= {name: value.detach() for name, value in outputs.items()}
        found |= {f"{prefix} grad_z": leaf.grad, f"{prefix} grad_codebook": codebook.grad}
    return found


def run_cases(rank, world, folder):
    start(rank, world, folder)
    found = {}
    for name in CASES:
        for rows in ("same", "own"):
            z, g, h, mask, codebook, backend = data(name, world if rows == "own" else 1)
            part = rank if rows == "own" else 0
            kept = None if mask is None else mask[part]
            layer = ShardedNearest(len(codebook), 6, noise_std=0.01, rows=rows, backend=backend, dtype=codebook.dtype)
            layer.load_codebook(codebook)
            got = results(
                lambda x, layer=layer, kept=kept: layer(x, kept),
                lambda x, layer=layer, kept=kept: layer.quantize(x, kept, seed=5),
                layer.codebook,
                z[part],
                g[part],
                h[part],
            )
            got["decoded"], got["whole"] = layer.decode(got["indices"]), layer.gather_codebook()
            found[name, rows] = got
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """What the ranks of a world found; every world runs once."""
    known = {}

    def of(world):
        if world not in known:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            assert spawn(run_cases, world, folder) == [0] * world
            known[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
        return known[world]

    return of


@for_every_world
@pytest.mark.parametrize("rows", ["same", "own"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_codebook(world, rows, name, of_ranks):
    ranks = [found[name, rows] for found in of_ranks(world)]
    parts = world if rows == "own" else 1
    z, g, h, mask, codebook, backend = data(name, parts)
    codebook = torch.nn.Parameter(codebook)
    whole = results(
        lambda x: F.nearest(x, codebook, mask=mask, backend=backend),
        lambda x: F.diveq(x, codebook, mask=mask, noise_std=0.01, seed=5, backend=backend),
        codebook,
        z,
        g,
        h,
    )
    for rank, found in enumerate(ranks):
        part = rank if rows == "own" else 0
        for field in ("indices", "codes", "z_q", "z_q grad_z", "indices grad_z", "sqdist"):
            ours, theirs = found[field], whole[field][part]
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (rank, field)
            if field == "sqdist":
                finite = theirs.isfinite()
                assert torch.equal(ours.isfinite(), finite), rank
                torch.testing.assert_close(ours[finite], theirs[finite])
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=f"rank {rank}, {field}")
        chosen = found["indices"].clamp_min(0)
        decoded = torch.where((found["indices"] >= 0)[..., None], codebook.detach()[chosen], 0)
        torch.testing.assert_close(found["decoded"], decoded, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found["whole"], codebook.detach(), rtol=0, atol=0, equal_nan=True)
    for field in ("indices grad_codebook", "z_q grad_codebook"):
        assert [len(found[field]) for found in ranks] == [len(p) for p in codebook.tensor_split(world)], field
        gathered = torch.cat([found[field] for found in ranks])
        torch.testing.assert_close(
            gathered, whole[field] / parts, rtol=1e-5 if codebook.dtype != torch.float16 else 1e-2, atol=1e-6
        )


# ---- training --------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """An encoder, a quantizer and a decoder; the whole codebook without ``rows``."""

    def __init__(self, rows):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        whole = torch.randn(21, 6)
        self.rows = rows
        if rows:
            self.quantizer = ShardedNearest(21, 6, noise_std=0.01, rows=rows)
            self.quantizer.load_codebook(whole)
        else:
            self.codebook = torch.nn.Parameter(whole)

    def forward(self, x, seed):
        z = self.encoder(x)
        if self.rows:
            z_q, indices = self.quantizer.quantize(z, seed=seed)
        else:
            z_q, indices = F.diveq(z, self.codebook, noise_std=0.01, seed=seed)
        return self.decoder(z_q), indices


def train(model, parts=1, part=0):
    """Descend; the codes of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    history = []
    for step in range(8):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step)).chunk(parts)[part]
        seed = torch.full((), step)
        output, indices = model(x, seed)
        optimizer.zero_grad()
        (output - x).square().mean().backward()
        optimizer.step()
        history.append(indices)
    return torch.stack(history)


def run_training(rank, world, folder):
    start(rank, world, folder)
    found = {}
    for rows, wrap in (("same", lambda m: m), ("own", DistributedDataParallel)):
        for compiled in (False, True) if world == 2 else (False,):
            model = Model(rows)
            assert keep_shards(model) == {model.quantizer.codebook}
            wrapped = wrap(model)
            if compiled:
                wrapped = torch.compile(wrapped, backend="aot_eager", fullgraph=rows == "same")
            codes = train(wrapped, *((world, rank) if rows == "own" else ()))
            found[rows, compiled] = codes, model.quantizer.gather_codebook(), model.decoder.weight.detach()
    torch.save(found, f"{folder}/{rank}.pt")


@for_every_world
def test_training_equals_that_of_the_whole_codebook(world, tmp_path):
    assert spawn(run_training, world, tmp_path) == [0] * world
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    model = Model(None)
    codes = train(model)
    assert len(codes.unique()) > 10 and not torch.equal(codes[0], codes[-1])
    for rank, found in enumerate(ranks):
        for (rows, compiled), (theirs, codebook, weight) in found.items():
            expected = codes.chunk(world, dim=1)[rank] if rows == "own" else codes
            assert torch.equal(theirs, expected), (rank, rows, compiled)
            torch.testing.assert_close(codebook, model.codebook.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weight, model.decoder.weight.detach(), rtol=1e-4, atol=1e-5)


# ---- one process, groups, errors -------------------------------------------------------------------------------------


def run_others(rank, world, folder):
    start(rank, world, folder)
    # Fresh codebooks: not copies of each other, the same drawn by every rank, whatever the number of ranks.
    torch.manual_seed(4)
    layer = ShardedNearest(10, 3)
    whole = layer.gather_codebook()
    assert len(whole.unique(dim=0)) == 10 and whole.min() >= 0 and whole.max() <= 0.1
    torch.manual_seed(4)
    alone = torch.cat([torch.rand(len(part), 3) for part in whole.tensor_split(world)]) * (1 / 10)
    assert torch.equal(whole, alone)
    # Each rank loads what it saved; the other's part has the same shape.
    saved = torch.nn.Sequential(layer)
    torch.save(saved.state_dict(), f"{folder}/part{rank}.pt")
    dist.barrier()
    mine, other = (torch.load(f"{folder}/part{r}.pt") for r in (rank, 1 - rank))
    wrong = "0.codebook must come as codebook_{}_{}_of_10, got 0.codebook_{}_{}_of_10: each"
    wrong = wrong.format(5 * rank, 5 * rank + 5, 5 - 5 * rank, 10 - 5 * rank)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=wrong):
            saved.load_state_dict(other, strict=strict)
    saved.load_state_dict(mine)
    assert torch.equal(layer.gather_codebook(), whole)
    # Rank 0's part of nine codewords is of the same size.
    nine = {f"0.{name}": value for name, value in ShardedNearest(9, 3).state_dict().items()}
    with pytest.raises(RuntimeError, match="_of_10, got 0.codebook_._._of_9: each"):
        saved.load_state_dict(nine, strict=False)
    # Without a seed: the noise of rank 0 for all, another in each call; none in evaluation.
    torch.manual_seed(rank)
    z = torch.ones(5, 3)
    first, second = layer.quantize(z).z_q, layer.quantize(z).z_q
    assert not torch.equal(first, second)
    gathered = [torch.empty_like(first) for _ in range(world)]
    dist.all_gather(gathered, first.detach())
    assert all(torch.equal(other, first) for other in gathered)
    evaluated = layer.eval().quantize(z)
    assert torch.equal(evaluated.z_q, whole[evaluated.indices])
    # What ranks do not do alike is an error on every rank.
    for arguments, message in (
        ((torch.randn(3 + rank, 3),), "different numbers of rows"),
        ((z.double() if rank else z,), "different dtypes of z"),
        ((z.half() if rank else z.bfloat16(),), "different dtypes of z"),
        ((z, torch.ones(5, dtype=torch.bool) if rank else None), "different masks"),
        ((z + rank,), "rows='same' wants the same rows"),
        ((torch.arange(15.0).view(5, 3).roll(rank, 0),), "rows='same' wants the same rows"),
        ((z + rank * (torch.arange(5) == 0)[:, None],), "rows='same' wants the same rows"),
        ((z, torch.arange(5) > rank), "rows='same' wants the same rows"),
    ):
        for function in (layer, layer.quantize):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
    for codes, message in (
        (torch.zeros(2 + rank, dtype=torch.int64), "different numbers of them"),
        (torch.tensor([0, rank]), "rows='same' wants the same on every rank"),
        (torch.tensor([10, 5]), "indices must be from -1 to 9, got values from 5 to 10"),
        (torch.tensor([9, -2]), "indices must be from -1 to 9, got values from -2 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.decode(codes)
    own = ShardedNearest(10, 3, rows="own")
    with pytest.raises(ValueError, match="different numbers of them"):
        own.decode(torch.zeros(2 + rank, dtype=torch.int64))
    with pytest.raises(ValueError, match="indices must be from -1 to 9, got values from 0 to 10"):
        own.decode(torch.tensor([9 + rank, 0]))
    assert own.decode(torch.full((2,), rank, dtype=torch.int32 if rank else torch.int64)).shape == (2, 3)
    ShardedNearest(10, 3, rows="own")(z + rank)
    with pytest.raises(ValueError, match="different numbers of rows"):
        ShardedNearest(10, 3, rows="own")(torch.randn(3 + rank, 3))
    # A group of its own, and none.
    groups = [dist.new_group([r]) for r in range(world)]
    single = ShardedNearest(10, 3, group=groups[rank])
    assert single.codebook.shape == (10, 3) and single.quantize(z + rank).z_q.shape == z.shape
    with pytest.raises(ValueError, match="group must contain this process"):
        ShardedNearest(10, 3, group=groups[1 - rank])
    pair = dist.new_group([1, 0])
    layer = ShardedNearest(9, 3, group=pair)
    assert len(layer.codebook) == 5 - dist.get_rank(pair) and layer(z).indices.shape == (5,)
    assert torch.equal(copy.deepcopy(layer).eval().quantize(z).z_q, layer.eval().quantize(z).z_q)
    # DistributedDataParallel without keep_shards has made the parts alike.
    forgotten = DistributedDataParallel(torch.nn.Sequential(ShardedNearest(10, 3, rows="own")))
    with pytest.raises(RuntimeError, match="keep_shards"):
        forgotten(z)
    # But those of other groups' ranks may share a part.
    parallel = DistributedDataParallel(torch.nn.Sequential(ShardedNearest(10, 3, group=groups[rank])))
    assert parallel(z).indices.shape == (5,)


def test_what_else_two_ranks_do(tmp_path):
    assert spawn(run_others, 2, tmp_path) == [0, 0]


def test_without_a_process_group():
    layer = ShardedNearest(37, 6, noise_std=0.01)
    z = torch.randn(4, 5, 6)
    assert torch.equal(layer(z).indices, F.nearest(z, layer.codebook).indices)
    assert torch.equal(layer.quantize(z, seed=3).z_q, F.diveq(z, layer.codebook, noise_std=0.01, seed=3).z_q)
    own = ShardedNearest(37, 6, noise_std=0.01, rows="own")
    own.load_state_dict(layer.state_dict())
    assert torch.equal(own.quantize(z, seed=3).z_q, layer.quantize(z, seed=3).z_q)
    assert torch.equal(own.decode(own(z).indices), layer.gather_codebook()[layer(z).indices])
    assert torch.equal(layer.decode(torch.tensor([-1, 2], dtype=torch.int32))[0], torch.zeros(6))
    with torch.no_grad():
        assert not layer.quantize(z).z_q.requires_grad


def test_decoding_compiles_whole():
    """A graph has no values to check."""
    layer, indices = ShardedNearest(8, 3), torch.randint(-1, 8, (20,))
    decoded = torch.compile(layer.decode, backend="eager", fullgraph=True)(indices)
    torch._dynamo.reset()
    assert torch.equal(decoded, layer.decode(indices))


def test_the_part_is_a_parameter_like_others():
    """It is assigned as ``codebook``, parametrized, and no other tensor is taken for a part."""
    layer = torch.nn.Sequential(ShardedNearest(8, 3))
    layer[0].codebook = torch.nn.Parameter(torch.ones(8, 3))
    buffers = ["codebook_usage", "codebook_0_8_of_8_usage"]
    for name in buffers:
        layer[0].register_buffer(name, torch.zeros(8))
    assert list(layer.state_dict()) == ["0.codebook_0_8_of_8", *(f"0.{name}" for name in buffers)]
    assert layer[0].codebook.sum() == 24
    layer.load_state_dict(layer.state_dict())
    torch.nn.utils.parametrizations.weight_norm(layer[0], "codebook_0_8_of_8")
    others, codebooks = parameter_groups(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)), codebook_lr=0.1)
    assert len(others["params"]) == 2 and {p.shape for p in codebooks["params"]} == {(8, 1), (8, 3)}


@pytest.mark.parametrize("rows", ["same", "own"])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")], ids=str)
def test_opcheck(rows, step, dtypes):
    from diveq_kernels.sharded_search import sharded

    of_z, of_codebook = (getattr(torch, name) for name in dtypes)
    z, codebook = torch.randn(5, 6, dtype=of_z), torch.randn(8, 6, dtype=of_codebook)
    z.requires_grad_(), codebook.requires_grad_()
    seed, mask = torch.full((), 3), torch.rand(5) < 0.7
    torch.library.opcheck(sharded, (z, codebook, mask, seed, 0.1, step, 0, 8, rows == "own", "", "exact", ""))


def test_bad_arguments():
    with pytest.raises(ValueError, match="rows must be 'same' or 'own', got 'mine'"):
        ShardedNearest(4, 3, rows="mine")
    with pytest.raises(ValueError, match="num_embeddings must be at most 4194304 on 1 ranks, got 4194305"):
        ShardedNearest(2**22 + 1, 3)
    with pytest.raises(ValueError, match="group must be None before"):
        ShardedNearest(4, 3, group=object())
    with pytest.raises(ValueError, match="noise_std must be a finite number >= 0"):
        ShardedNearest(4, 3, noise_std=-1.0)
    for keywords, message in (
        ({"num_embeddings": 0}, "num_embeddings must be an int >= 1, got 0"),
        ({"embedding_dim": 0}, "embedding_dim must be an int >= 1, got 0"),
        ({"embedding_dim": 4097}, "embedding_dim must be an int <= 4096, got 4097"),
        ({"precision": "half"}, "precision must be 'exact' or 'fast', got 'half'"),
        ({"backend": "abacus"}, "backend must be one of .*, got 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedNearest(**{"num_embeddings": 4, "embedding_dim": 3} | keywords)
    with pytest.raises(TypeError, match=r"codebook \(argument dtype\) must be float16, .* got torch.int64"):
        ShardedNearest(4, 3, dtype=torch.int64)
    layer = ShardedNearest(4, 3)
    with pytest.raises(ValueError, match=r"z must have shape .* D = 3, got \(2, 4\)"):
        layer(torch.randn(2, 4))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        layer.quantize(torch.randn(2, 3), torch.ones(2))
    with pytest.raises(TypeError, match="indices must be a dense torch.Tensor, got one of layout"):
        layer.decode(torch.arange(3).to_sparse())
    with pytest.raises(TypeError, match="indices must be an int32 or int64 tensor, got torch.float32"):
        layer.decode(torch.zeros(2))
    with pytest.raises(ValueError, match="indices must be on the codebook's device, cpu, got meta"):
        layer.decode(torch.zeros(2, dtype=torch.int64, device="meta"))
    for function in (layer, layer.quantize):
        with pytest.raises(ValueError, match="the codebook must be on the device of z, meta, got cpu"):
            function(torch.zeros(2, 3, device="meta"))
    with pytest.raises(TypeError, match="codebook must be a torch.Tensor, got list"):
        layer.load_codebook([[0.0] * 3] * 4)
    other = ShardedNearest(4, 3)
    other.precision = "half"
    with pytest.raises(ValueError, match="precision must be 'exact' or 'fast', got 'half'"):
        other(torch.zeros(2, 3))
    for wrong in ((4, 1), (1, 3), (4,)):
        other.codebook = torch.nn.Parameter(torch.zeros(wrong))
        for function in (other, other.quantize):
            with pytest.raises(ValueError, match="codebook must have shape .* this rank's part"):
                function(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"codebook must have shape \[K, D\] = \(4, 3\), got \(3, 3\)"):
        layer.load_codebook(torch.zeros(3, 3))
    z = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer.quantize(z).z_q.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
