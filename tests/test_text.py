"""Tokenizers and text towers: ours, and the same numbers as open_clip's and transformers'."""

import json

import pytest
import torch

from fastssl.data import load
from fastssl.models import build_text_tower
from fastssl.models.text import TextSmall, WordTokenizer, pooled

CAPTIONS = ["a red ring", "A small, blue star at the top left.", "disc"]


def test_words_are_numbers_between_marks():
    tokenize = WordTokenizer(vocab=1000, length=6)
    ids, lengths = tokenize([*CAPTIONS, ""])
    assert ids.shape == (4, 6) and lengths.tolist() == [5, 6, 3, 2]
    assert (ids[:, 0] == 998).all() and ids.argmax(1).tolist() == (lengths - 1).tolist()
    assert ids[0, 5] == 0 and ids[3].tolist() == [998, 999, 0, 0, 0, 0]
    assert ids[0, 1] == ids[1, 1]  # a, A
    again, _ = tokenize([CAPTIONS[1]])
    assert torch.equal(again[0], ids[1])  # whatever else is in the batch


def test_the_words_of_shapes_have_numbers_of_their_own():
    source = load("shapes", "test")
    texts = [*source.captions(torch.arange(1024)), *source.templates]
    found = {word for text in texts for word in text.replace("{}", "").split()}
    ids, _ = WordTokenizer()(sorted(found))
    assert len(found) > 25 and len(ids[:, 1].unique()) == len(found)


def test_pooling():
    states = torch.tensor([[[1.0, -1.0], [3.0, -5.0], [9.0, 9.0]], [[2.0, 0.0]] * 3])
    lengths = torch.tensor([2, 3])
    want = {"cls": [1, -1], "eot": [3, -5], "mean": [2, -3], "max": [3, -1]}
    for how, first in want.items():
        got = pooled(states, lengths, how)
        assert got.tolist() == [first, [2, 0]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["eot", "cls", "mean", "max"])
def test_a_feature_depends_on_its_caption_alone(causal, pool):
    tower = build_text_tower("text_small", causal=causal, pool=pool)
    together, alone = tower(CAPTIONS), torch.cat([tower([text]) for text in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_causal_states_do_not_see_what_follows():
    for causal in (True, False):
        torch.manual_seed(0)
        network, lengths = TextSmall(causal=causal), torch.tensor([4])
        one, other = network(torch.tensor([[[7, 8, 9, 3], [7, 8, 9, 4]]])[0], lengths.expand(2))
        assert torch.equal(one[:3], other[:3]) == causal and not torch.equal(one[3], other[3])


def test_frozen_below():
    tower = build_text_tower("text_small", freeze_below=1)
    held = {name for name, p in tower.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in held} == {"words", "pos_embed", "blocks"}
    assert {name.split(".")[2] for name in held if ".blocks." in name} == {"0"}
    with pytest.raises(ValueError, match="between 0 and the 2 blocks of text_small, got 3"):
        build_text_tower("text_small", freeze_below=3)


def test_unknown_tower():
    with pytest.raises(ValueError, match="got|unknown text tower 'text_smal'. Did you mean"):
        build_text_tower("text_smal")


def test_open_clips_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    tower = build_text_tower("open_clip:tiny-for-tests", freeze_below=1)
    torch.manual_seed(0)
    whole = open_clip.create_model("tiny-for-tests", force_custom_text=True)
    want = whole.encode_text(open_clip.get_tokenizer("tiny-for-tests")(CAPTIONS))
    torch.testing.assert_close(tower(CAPTIONS) @ whole.text.text_projection, want)
    assert tower.feature_dim == 32
    tower(CAPTIONS).sum().backward()
    trained = {n: p.grad for n, p in tower.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert not any("resblocks.0" in n or "embedding" in n for n in trained)
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-B-33'. Did you mean"):
        build_text_tower("open_clip:ViT-B-33")


def test_transformers_tower(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red ring small blue star at the top left disc".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12,
    )  # fmt: skip
    bert = transformers.BertModel(config)
    for part in (tokenizer, bert):
        part.save_pretrained(tmp_path)
    tower = build_text_tower(f"transformers:{tmp_path}", pool="cls", freeze_below=1).eval()
    given = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    want = bert.eval()(**given).last_hidden_state[:, 0]
    torch.testing.assert_close(tower(CAPTIONS), want, atol=1e-5, rtol=1e-5)
    trained = [name for name, p in tower.named_parameters() if p.requires_grad]
    assert trained and all("encoder.layer.1" in name for name in trained)
