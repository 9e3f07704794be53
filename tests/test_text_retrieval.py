import sys

import pytest
import torch

from fastssl.config import PretrainConfig
from fastssl.data import ShapesSource, TensorSource
from fastssl.evaluate import evaluate, text_ranks
from fastssl.train import pretrain


def test_closed_form():
    """Two images with two captions each, and one that both have."""
    images, texts = torch.eye(3)[:2], torch.eye(3)[[0, 1, 1, 0, 2]]
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3], [0, 4], [1, 4]])
    of_images, of_texts = text_ranks(images, texts, pairs)
    # Image 0: caption 0 at cosine 1, and so is the wrong caption 3.
    assert of_images.tolist() == [2, 2]
    # Captions 1 and 3 lie on the other image; caption 4 is right for both.
    assert of_texts.tolist() == [1, 2, 1, 2, 1]


def test_features_that_are_all_alike_find_nothing():
    pairs = torch.arange(6)[:, None].expand(-1, 2)
    for ranks in text_ranks(torch.ones(6, 4), torch.ones(6, 4), pairs):
        assert ranks.tolist() == [6] * 6


def test_features_that_are_not_finite_find_nothing():
    pairs = torch.arange(6)[:, None].expand(-1, 2)
    for ranks in text_ranks(torch.full((6, 4), torch.nan), torch.randn(6, 4), pairs):
        assert ranks.tolist() == [6] * 6


def test_blocks_change_nothing(monkeypatch):
    images, texts = torch.randn(30, 8), torch.randn(50, 8)
    pairs = torch.stack((torch.randint(0, 30, (60,)), torch.randint(0, 50, (60,))), 1)
    every = torch.stack((torch.arange(50) % 30, torch.arange(50)), 1)
    pairs = torch.cat((pairs, every))[torch.randperm(110)]
    whole = text_ranks(images, texts, pairs)
    monkeypatch.setattr(sys.modules["fastssl.evaluate.text_retrieval"], "_BLOCK", 130)
    for one, other in zip(whole, text_ranks(images, texts, pairs), strict=True):
        assert torch.equal(one, other)
    right = {tuple(pair) for pair in pairs.tolist()}
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=2)
    for i in range(30):
        order = cosine[i].argsort(descending=True).tolist()
        assert whole[0][i] == 1 + next(n for n, j in enumerate(order) if (i, j) in right)


def test_an_image_without_caption_is_refused():
    with pytest.raises(ValueError, match="every caption an image, got 1 of 3 without"):
        text_ranks(torch.eye(3), torch.eye(3), torch.tensor([[0, 0], [1, 1], [1, 2]]))


class TwoCaptions(ShapesSource):
    def captions(self, index):
        return [f"{text}\n{text} again" for text in super().captions(index)]


def test_of_a_run(tmp_path):
    pytest.importorskip("safetensors")
    settings = {"image_size": 8, "batch_size": 64, "epochs": 1, "device": "cpu", "monitor": False}
    settings |= {"out": tmp_path / "run", "method_args": {"out_dim": 8}, "warmup_epochs": 0.0}
    source = TwoCaptions("shapes", size=128, image_size=8)
    run = pretrain(PretrainConfig(method="convirt", **settings), source).path
    found = evaluate(run, (source, source), ["text-retrieval"], ks=(1, 128))["text-retrieval"]
    distinct = set(ShapesSource.captions(source, torch.arange(128)))
    assert found["protocol"]["captions"] == 2 * len(distinct) < 256
    assert found["protocol"]["pairs"] == 256
    assert found["percent"]["text R@128"] == 100 and 1 <= found["image_median_rank"] < 256
    assert found["recall_sum"] == pytest.approx(sum(found["percent"].values()))
    silent = TensorSource("silent", source.images, source.labels, source.class_names)
    with pytest.raises(ValueError, match="must have captions, got none in 'silent'"):
        evaluate(run, (silent, silent), ["text-retrieval"])
