"""GradCache: the gradients of the whole batch, by chunks."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from oracle import assert_no_worse
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from fastssl import LOCAL, GradCache
from fastssl.ops import info_nce

N, D = 10, 6
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def tower(*layers, dtype=torch.float64):
    return nn.Sequential(nn.Linear(D, 16), *layers, nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def views(dtype=torch.float64):
    return torch.randn(2, N, D, dtype=dtype).unbind()


def contrast(z0, z1, **options):
    return info_nce(z0, z1, symmetric=True, normalize=True, **({"temperature": 0.2} | options))


def grads_of(loss, module, **options):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, **options)


def by_hand(encoder, x, chunk):
    """Every chunk with a graph, one after the other: what GradCache does without its savings."""
    return torch.cat([encoder(part) for part in x.split(chunk)])


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.unused = tower(), tower(), nn.Linear(2, 2).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def encode_image(self, image):
        return self.image(image)

    def encode_text(self, text):
        return self.text(text["tokens"] * text["mask"][:, None])

    def forward(self, image, *, text, power=1):
        features = self.encode_image(image) ** power, self.encode_text(text)
        frozen = features[0].detach() + 1
        return {"features": (*features, frozen), "log_scale": self.logit_scale, "note": "clip"}


def clip_batch():
    image, tokens = views()
    return image, {"tokens": tokens, "mask": torch.randint(0, 2, (N,)).double()}


def clip_loss(out):
    image, text, frozen = out["features"]
    return contrast(image + frozen, text, temperature=None, logit_scale=out["log_scale"].exp())


@pytest.mark.parametrize("chunk", [1, 3, 5, 9, 10, 99])
def test_one_tower_equals_the_whole_batch(chunk):
    encoder, (a, b) = tower(), views()
    cache = GradCache(encoder, chunk)
    loss, whole = contrast(cache(a), cache(b)), contrast(encoder(a), encoder(b))
    torch.testing.assert_close(loss, whole, **EXACT)
    torch.testing.assert_close(grads_of(loss, encoder), grads_of(whole, encoder), **EXACT)


@pytest.mark.parametrize("chunk", [1, 4])
def test_two_towers_nested_arguments_and_a_learnable_scale(chunk):
    clip, (image, text) = Clip(), clip_batch()
    out = GradCache(clip, chunk)(image, text=text, power=3)
    whole = clip(image, text=text, power=3)
    assert out["note"] == "clip" and out["log_scale"].shape == ()
    got, want = grads_of(clip_loss(out), clip), grads_of(clip_loss(whole), clip)
    torch.testing.assert_close(got, want, **EXACT)


def test_methods_of_one_module_and_functions():
    clip, (image, text) = Clip(), clip_batch()
    z0, z1 = GradCache(clip.encode_image, 3)(image), GradCache(clip.encode_text, 4)(text)
    want = grads_of(contrast(clip.encode_image(image), clip.encode_text(text)), clip)
    torch.testing.assert_close(grads_of(contrast(z0, z1), clip), want, **EXACT)
    function = GradCache(lambda x: normalize(clip.image(x)), 3, module=clip)
    z = function(image)
    want = grads_of(contrast(normalize(clip.image(image)), text["tokens"][:, :5]), clip)
    torch.testing.assert_close(grads_of(contrast(z, text["tokens"][:, :5]), clip), want, **EXACT)


def test_arguments_that_learn():
    encoder, (a, b) = tower(), views()
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    a.requires_grad_()
    cache = GradCache(lambda x, slope: encoder(x * slope), 3, module=encoder)
    got = torch.autograd.grad(contrast(cache(a, slope), b[:, :5]), (a, slope))
    want = torch.autograd.grad(contrast(encoder(a * slope), b[:, :5]), (a, slope))
    torch.testing.assert_close(got, want, **EXACT)


def test_one_tensor_as_the_gradient_of_two_parameters():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(5).double()) for _ in range(2))

        def forward(self, x):
            return x[:, :5] * (self.a + self.b).exp()

    encoder, (a, b) = Sum(), views()
    cache = GradCache(encoder, 3)
    got, want = (grads_of(contrast(f(a), f(b)), encoder) for f in (cache, encoder))
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("chunk", [3, 5])
def test_random_layers_draw_the_same_numbers_again(chunk):
    encoder, (a, b) = tower(nn.Dropout(0.5)), views()
    cache = GradCache(encoder, chunk)
    torch.manual_seed(5)
    loss = contrast(cache(a), cache(b))
    after_forward = torch.get_rng_state()
    got = grads_of(loss, encoder)
    assert torch.equal(torch.get_rng_state(), after_forward)
    torch.manual_seed(5)
    want = contrast(by_hand(encoder, a, chunk), by_hand(encoder, b, chunk))
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(got, grads_of(want, encoder), **EXACT)


def test_autocast_is_replayed():
    encoder, (a, b) = tower(dtype=torch.float32), views(torch.float32)
    truth = copy.deepcopy(encoder).double()
    truth = grads_of(contrast(truth(a.double()), truth(b.double())), truth)
    cache = GradCache(encoder, 3)
    # Without autocast's cache of weights the chunks' gradients are summed in float32, as ours are.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        z = cache(a)
        loss, whole = contrast(z, cache(b)), contrast(encoder(a), encoder(b))
        by_chunks = contrast(by_hand(encoder, a, 3), by_hand(encoder, b, 3))
    assert z.dtype == torch.bfloat16
    got, want = grads_of(loss, encoder), grads_of(whole, encoder)
    torch.testing.assert_close(got, grads_of(by_chunks, encoder))
    for i, ref64 in enumerate(truth):
        # Rounded in bfloat16 on the way to a float32 gradient.
        assert_no_worse(got[i], ref64, want[i].bfloat16(), factor=3)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_buffers_change_as_in_one_pass(norm):
    """BatchNorm's running statistics; spectral norm's vectors, on which the weights depend."""
    encoder, (a, b) = tower(nn.BatchNorm1d(16)), views()
    if norm == "spectral":
        encoder = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(D, 5).double()))
    reference = copy.deepcopy(encoder)
    cache = GradCache(encoder, 4)
    loss = contrast(cache(a), cache(b))
    want = contrast(by_hand(reference, a, 4), by_hand(reference, b, 4))
    got = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(encoder.parameters()))
    torch.testing.assert_close(
        got, torch.autograd.grad(want, list(reference.parameters())), **EXACT
    )
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    assert list(encoder.buffers())
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(encoder.get_buffer(name), buffer, rtol=0, atol=0)


def peak_bytes(encode, x, encoder):
    """The most that autograd held for its backward at one time, weights aside."""
    live = peak = 0
    weights = {p.data_ptr() for p in encoder.parameters()}

    def pack(x):
        nonlocal live, peak
        kept = x.detach()
        if x.data_ptr() not in weights:
            live += x.nbytes
            peak = max(peak, live)
            weakref.finalize(kept, drop, x.nbytes)
        return kept

    def drop(nbytes):
        nonlocal live
        live -= nbytes

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        encode(x).square().sum().backward()
    assert live == 0
    return peak


def test_holds_the_activations_of_one_chunk():
    encoder, x = tower(nn.Tanh(), nn.Linear(16, 16), nn.Tanh()), torch.randn(64, D).double()
    whole, chunk = peak_bytes(encoder, x, encoder), peak_bytes(encoder, x[:4], encoder)
    assert whole == 16 * chunk
    features = 64 * 5 * 8  # saved by the loss
    assert peak_bytes(GradCache(encoder, 4), x, encoder) <= x.nbytes + features + chunk < whole / 2


def test_is_one_ordinary_backward_to_hooks_and_scaler():
    encoder, (a, b) = tower(dtype=torch.float32), views(torch.float32)
    calls = []
    for p in encoder.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    cache, scaler = GradCache(encoder, 3), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    want = grads_of(contrast(encoder(a), encoder(b)), encoder)
    scaler.scale(contrast(cache(a), cache(b))).backward()
    assert len(calls) == len(want)
    scaler.unscale_(optimizer)
    got = tuple(p.grad for p in encoder.parameters())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_encodes_twice_only_where_something_learns():
    encoder, x = tower(), torch.randn(N, D).double()
    rows = []
    encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    cache = GradCache(encoder, 4)
    for without_grad in (torch.no_grad, torch.inference_mode):
        with without_grad():
            z = cache(x)
            GradCache(tower(), 4)(x.clone())  # its weights are inference tensors in the second
        assert rows == [4, 4, 2] and not z.requires_grad
        torch.testing.assert_close(z, encoder(x), **EXACT)
        rows.clear()
    cache(x).sum().backward()
    assert rows == [4, 4, 2] * 2
    rows.clear()
    cache(x[:4]).sum().backward()
    assert rows == [4]
    assert not GradCache(tower().requires_grad_(False), 4)(x).requires_grad


def test_a_compiled_encoder():
    encoder, (a, b) = tower(nn.BatchNorm1d(16)), views()
    compiled = torch.compile(copy.deepcopy(encoder), backend="aot_eager")
    results = []
    for module in (encoder, compiled):
        cache = GradCache(module, 5)
        results.append((grads_of(contrast(cache(a), cache(b)), module), list(module.buffers())))
    torch.testing.assert_close(*results, **EXACT)


def test_the_cache_is_a_module_with_the_encoder_in_it():
    encoder = tower(nn.Dropout(0.5))
    cache = GradCache(encoder, 3).eval()
    assert not encoder.training and cache.encoder is encoder
    assert [p.data_ptr() for p in cache.parameters()] == [
        p.data_ptr() for p in encoder.parameters()
    ]
    assert "chunk=3" in repr(cache)


def test_weights_that_changed_are_refused():
    encoder, (a, b) = tower(), views()
    loss = contrast(GradCache(encoder, 3)(a), b[:, :5])
    with torch.no_grad():
        encoder[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="weights must not change.*before optimizer.step"):
        loss.backward()


def test_a_parameter_that_is_not_the_modules_is_refused():
    encoder, foreign = tower(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    cache = GradCache(lambda x: encoder(x) * foreign, 3, module=encoder)
    with pytest.raises(RuntimeError, match=r"a tensor \(5,\) in the encoder requires a gradient"):
        cache(views()[0]).sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradCache(nn.Linear(2, 2), 0), ValueError, "chunk must be at least 1 row, got 0"),
        (lambda: GradCache(torch.tanh, 2), TypeError, "or a method of one, got .*tanh.*module="),
        (
            lambda: GradCache(nn.Identity(), 2)(torch.ones(3, 2), torch.ones(4)),
            ValueError,
            r"one number of rows, got \[\(3, 2\), \(4,\)\].",
        ),
        (lambda: GradCache(nn.Identity(), 2)("text"), ValueError, r"one number of rows, got \[\]."),
        (
            lambda: GradCache(nn.Flatten(0), 2)(torch.ones(3, 2)),
            ValueError,
            r"must return one row for each of its arguments', got \(4,\) for a chunk of 2.",
        ),
    ],
)
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _on_rank(rank, world, rendezvous):
    """DDP around the cache: the gradients of one process, reduced once a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        batches, encoder = [views() for _ in range(world)], tower()
        whole = (
            torch.cat([x[: 7 + r] for r, x in enumerate(xs)]) for xs in zip(*batches, strict=True)
        )
        want = grads_of(contrast(*map(encoder, whole), group=LOCAL), encoder)
        with pytest.raises(ValueError, match=r"Wrap the cache: DDP\(GradCache\(encoder, chunk\)\)"):
            GradCache(DistributedDataParallel(tower()), 3)
        ddp = DistributedDataParallel(GradCache(encoder, 3))
        reductions = []

        def reduce(state, bucket):
            reductions.append(bucket.index())
            return dist.all_reduce(bucket.buffer() / world, async_op=True).get_future().then(
                lambda future: future.value()[0]
            )  # fmt: skip

        ddp.register_comm_hook(None, reduce)
        pair = torch.cat([x[: 7 + rank] for x in batches[rank]])
        contrast(*ddp(pair).chunk(2)).backward()
        assert reductions == [0]
        got = tuple(p.grad for p in encoder.parameters())
        torch.testing.assert_close(got, want, **EXACT)
    finally:
        dist.destroy_process_group()


def test_ddp_around_the_cache(tmp_path):
    """Two processes of uneven batches, which make different numbers of chunks."""
    torch.multiprocessing.spawn(_on_rank, (2, f"file://{tmp_path}/rendezvous"), nprocs=2)
