import copy
from functools import partial

import pytest
import steps
import torch
from torch import nn

from fastssl.augment import ColorJitter, RandomResizedCrop
from fastssl.config import PretrainConfig
from fastssl.data import load
from fastssl.methods import MAE
from fastssl.methods.masking import masked_mse, patchify, random_mask, standardised
from fastssl.models import ResNetSmall, build_backbone
from fastssl.train import pretrain

SMALL = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 3}


@pytest.mark.parametrize(
    ("L", "ratio", "kept"), [(196, 0.75, 49), (196, 0.9, 19), (10, 0.9, 1), (64, 0.5, 32)]
)
def test_so_many_patches_are_kept(L, ratio, kept):
    keep, mask = random_mask(torch.arange(50), L, ratio, seed=0, step=0)
    assert keep.shape == (50, kept) and (mask.sum(1) == L - kept).all()
    assert not mask.gather(1, keep).any()
    rate = (~mask).float().mean(0) * L / kept  # every patch as often
    assert (rate.mean() - 1).abs() < 1e-5 and rate.std() < 3 * (L / kept / 50) ** 0.5


def test_a_mask_belongs_to_seed_sample_step_and_view():
    index = torch.tensor([7, 3, 7, 2**40])
    keep, mask = random_mask(index, 64, 0.75, seed=0, step=5)
    assert torch.equal(keep[0], keep[2]) and not torch.equal(mask[0], mask[1])
    assert torch.equal(keep[1:2], random_mask(index[1:2], 64, 0.75, seed=0, step=5)[0])
    for other in ({"seed": 1}, {"step": 6}, {"view": 1}):
        assert not torch.equal(
            mask, random_mask(index, 64, 0.75, **{"seed": 0, "step": 5} | other)[1]
        )
    for ratio in (0.0, 0.99, 1.0):
        with pytest.raises(ValueError, match=f"keep some of L=64 patches and hide some.*{ratio}"):
            random_mask(index, 64, ratio, seed=0, step=0)


def test_patches_by_hand():
    x = torch.arange(2 * 2 * 4 * 6).view(2, 2, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 8)
    right_of_the_middle = x[1, :, 2:, 2:4]  # the fifth: second row, second column
    assert torch.equal(patches[1, 4], right_of_the_middle.permute(1, 2, 0).flatten())
    x = x.float().to(memory_format=torch.channels_last)
    assert torch.equal(patchify(x, 2), patches.float())


def test_a_prediction_of_zero_costs_47_of_48():
    target = standardised(torch.randn(3, 4, 48))
    mask = torch.tensor([True, False, True, False]).expand(3, -1)
    loss = masked_mse(torch.zeros(3, 4, 48), target, mask)
    torch.testing.assert_close(loss, torch.full((3,), 47 / 48), atol=1e-5, rtol=0)
    seen = target.clone()
    seen[~mask] += 100.0  # what is not hidden costs nothing
    torch.testing.assert_close(masked_mse(torch.zeros(3, 4, 48), seen, mask), loss)


def test_flat_patches_stay_finite():
    assert standardised(torch.full((1, 2, 12), 3.0)).abs().max() == 0


@pytest.mark.parametrize("norm_pix", [True, False])
def test_step_is_the_papers(norm_pix):
    """Every block on all tokens of one image at a time, as the paper draws it."""
    method = steps.built("mae", norm_pix=norm_pix, **SMALL)
    other, batch = copy.deepcopy(method), steps.batch(step=3)
    f, d, losses = other.backbone, other.decoder, []
    keep, _ = random_mask(batch.index, 16, 0.75, seed=0, step=3)
    for x, kept in zip(batch.views[0], keep.tolist(), strict=True):
        cut = [x[:, r : r + 2, c : c + 2] for r in range(0, 8, 2) for c in range(0, 8, 2)]
        embedded = [nn.functional.conv2d(p[None], f.patch_embed.weight, f.patch_embed.bias)
                    for p in cut]  # fmt: skip
        tokens = torch.stack([f.cls, *(embedded[i].flatten() + f.positions[i] for i in kept)])
        cls, *seen = d.embed(f.norm(f.blocks(tokens[None])))[0]
        grid = [d.mask_token] * 16
        for i, token in zip(kept, seen, strict=True):
            grid[i] = token
        placed = torch.stack([cls, *(grid[i] + d.positions[i] for i in range(16))])
        pred = d.predict(d.norm(d.blocks(placed[None])))[0, 1:]
        for i in set(range(16)) - set(kept):
            t = cut[i].permute(1, 2, 0).flatten()
            if norm_pix:
                t = (t - t.mean()) / (t.var() + 1e-6).sqrt()
            losses.append((pred[i] - t).square().mean())
    want = steps.with_gradients(other, torch.stack(losses).mean())
    got = steps.with_gradients(method, method.loss(batch)[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}


@pytest.mark.filterwarnings("ignore:MAEDecoderTIMM:FutureWarning")
def test_step_is_lightlys():
    """The released order of operations, with a transformer of timm."""
    pytest.importorskip("timm")
    utils = pytest.importorskip("lightly.models.utils")
    modules = pytest.importorskip("lightly.models.modules")
    torch.manual_seed(0)
    method = MAE(build_backbone("timm:test_vit", 3, 64), **SMALL)
    vit = copy.deepcopy(method.backbone)
    encoder = modules.MaskedVisionTransformerTIMM(copy.deepcopy(vit))
    encoder.vit.load_state_dict(vit.state_dict())
    decoder = modules.MAEDecoderTIMM(
        in_chans=3, num_patches=16, patch_size=16, embed_dim=vit.embed_dim, decoder_embed_dim=24,
        decoder_depth=2, decoder_num_heads=3, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    mine, state = method.decoder.state_dict(), decoder.state_dict()
    renamed = {
        "decoder_embed": "embed", "decoder_pred": "predict", "decoder_norm": "norm",
        "decoder_blocks": "blocks", ".attn.": ".", ".mlp.": ".",
    }  # fmt: skip
    for name in state:
        own = name
        for theirs, ours in renamed.items():
            own = own.replace(theirs, ours)
        if own == "mask_token":
            state[name] = mine[own].view(1, 1, -1)
        elif name != "decoder_pos_embed":
            state[name] = mine[own]
    positions = torch.cat((torch.zeros(1, 24), method.decoder.positions))
    decoder.load_state_dict(state | {"decoder_pos_embed": positions[None]})

    x, index = torch.randn(4, 3, 64, 64), torch.arange(4)
    batch = steps.Batch([x], index, torch.full_like(index, -1), 2, 10)
    keep, mask = random_mask(index, 16, 0.75, seed=0, step=2)
    idx_keep = torch.cat((torch.zeros(4, 1, dtype=torch.int64), keep + 1), dim=1)
    idx_mask = mask.nonzero()[:, 1].view(4, -1) + 1
    encoded = decoder.embed(encoder.encode(images=x, idx_keep=idx_keep))
    masked = utils.repeat_token(decoder.mask_token, (4, 17))
    decoded = decoder.decode(utils.set_at_index(masked, idx_keep, encoded.type_as(masked)))
    pred = decoder.predict(utils.get_at_index(decoded, idx_mask))
    target = utils.normalize_mean_var(
        utils.get_at_index(utils.patchify(x, 16), idx_mask - 1), dim=-1
    )
    want = nn.functional.mse_loss(pred, target)
    want.backward()
    got = steps.with_gradients(method, method.loss(batch)[0])
    torch.testing.assert_close(got["loss"], want.detach(), atol=1e-5, rtol=1e-5)
    theirs = dict(encoder.vit.named_parameters())
    for name, _ in method.backbone.named_parameters():
        if name != "pos_embed":  # which is fixed there
            gradient = got[f"backbone.{name}"]
            torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=name)
    for name, p in decoder.named_parameters():
        if name != "decoder_pos_embed":
            own = name
            for old, new in renamed.items():
                own = own.replace(old, new)
            gradient = got[f"decoder.{own}"].view_as(p)
            torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("mae", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "mae", **SMALL)


def test_views_are_crops_and_mirror_images():
    source = load("shapes")
    (view,) = MAE(build_backbone("vit_small", 3, 32), min_crop=0.5).views(32, source)
    assert view.get(RandomResizedCrop).scale == (0.5, 1.0) and not view.get(ColorJitter)


def test_a_network_without_patches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vision transformer, got ResNetSmall. Use vit_small or"):
        MAE(ResNetSmall(3, 32))
    pytest.importorskip("yaml")
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="vision transformer, got ResNetSmall"):
        pretrain(
            PretrainConfig(
                method="mae", data="digits", backbone="resnet_small", out=str(out), device="cpu"
            )
        )
    assert not out.exists()
