"""The optimizers in other libraries' places: bitsandbytes, timm, Hugging Face's Trainer."""

import copy
import inspect
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import fastssl
from fastssl import models, optim
from fastssl.optim import bnb as names
from fastssl.optim import rules

# The arguments of bitsandbytes' classes as positions.
ARGUMENTS = {
    "Adam": (1e-2, (0.8, 0.9), 1e-6, 0.1),
    "AdamW": (1e-2, (0.8, 0.9), 1e-6, 0.1),
    "SGD": (0.1, 0.9, 0.0, 0.1),
    "Lion": (1e-3, (0.8, 0.9), 0.1),
    "RMSprop": (1e-2, 0.9, 1e-6),
    "Adagrad": (1e-2, 0, 0, 0, 1e-6),
    "LARS": (0.1, 0.9, 0, 0.1),
    "LAMB": (1e-2, True, (0.8, 0.9), 1e-6, 0.1),
}
OURS = [
    name
    for name in names.NAMES
    if hasattr(rules, names.FAMILIES[name.removesuffix("8bit").removesuffix("32bit")])
]


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def patched(bnb):
    """bitsandbytes' own classes by name, while bnb.optim has ours."""
    originals = {name: getattr(bnb.optim, name) for name in names.NAMES}
    fastssl.patch("bitsandbytes")
    yield originals
    fastssl.unpatch("bitsandbytes")


@pytest.fixture
def manager(bnb, monkeypatch):
    manager = bnb.optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "pid2config", {})
    monkeypatch.setattr(manager, "module_weight_config_triple", [])
    return manager


def run(cls, *arguments, steps=6, **options):
    """A (80, 64) parameter after some steps with random gradients."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(80, 64, generator=generator))
    optimizer = cls([p], *arguments, **options)
    for _ in range(steps):
        p.grad = torch.randn(80, 64, generator=generator)
        optimizer.step()
    return p.detach()


def one():
    p = Parameter(torch.ones(80, 64))
    p.grad = torch.ones(80, 64)
    return p


def state_types(optimizer):
    return [state["state1"].dtype for state in optimizer.state.values()]


# ---------------------------------------------------------------------------- bitsandbytes' names


def test_names_are_ours_until_unpatched(bnb):
    before = dict(vars(bnb.optim))
    swapped = fastssl.patch("bitsandbytes")
    assert {f"bitsandbytes.optim.{name}" for name in OURS} <= set(swapped)
    changed = {name for name, value in vars(bnb.optim).items() if value is not before[name]}
    assert changed == set(OURS)  # the Paged classes stay
    assert fastssl.patch("bitsandbytes") == []
    assert set(fastssl.unpatch("bitsandbytes")) == set(swapped)
    assert vars(bnb.optim) == before


@pytest.mark.parametrize("name", OURS)
def test_arguments_bits_and_defaults_are_bitsandbytes(bnb, patched, name):
    ours, theirs = getattr(bnb.optim, name), patched[name]
    *arguments, options = inspect.signature(ours).parameters.values()
    assert arguments == list(inspect.signature(theirs).parameters.values())
    p = one()
    few = {"lr": 0.1, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    mine, own = ours([p], **few), theirs([Parameter(p.detach().clone())], **few)
    for key in {"lr", "eps", "weight_decay"} & mine.defaults.keys() & own.defaults.keys():
        assert mine.defaults[key] == own.defaults[key]
    mine.step()
    small = {x.dtype for x in mine.state[p].values()} & {torch.uint8}
    assert bool(small) == name.endswith("8bit")
    if "optim_bits" in inspect.signature(theirs).parameters and not name.endswith("bit"):
        assert ours([p], **few, optim_bits=8).param_groups[0]["optim_bits"] == 8
    copied = copy.deepcopy(mine)
    assert type(copied) is ours and copied.param_groups[0]["lr"] == mine.param_groups[0]["lr"]


@pytest.mark.parametrize("family", ["Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("bits", ["32bit", "8bit"])
def test_a_script_goes_the_same_way(bnb, patched, family, bits):
    """LARS and LAMB differ on purpose."""
    name, arguments = family + bits, ARGUMENTS[family]
    theirs = run(patched[name], *arguments)
    ours = run(getattr(bnb.optim, name), *arguments)
    way = (theirs - run(patched[name], *arguments, steps=0)).norm()
    assert (ours - theirs).norm() < (1e-4 if bits == "32bit" else 0.02) * way


@pytest.mark.parametrize("name", [name for name in OURS if name.startswith(("LARS", "LAMB"))])
def test_trust_ratios_are_those_of_ours(bnb, patched, name):
    cls, family = getattr(bnb.optim, name), name[:4]
    bits = 8 if name.endswith("8bit") else 32
    if family == "LARS":
        same = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eta": 0.02, "clip": True}
    else:
        same = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = getattr(optim, family)
    assert torch.equal(run(cls, *ARGUMENTS[family]), run(ours, **same, optim_bits=bits))
    if family == "LARS":  # so that the ratio is limited to 1
        expected = run(ours, **same | {"eta": 5.0}, optim_bits=bits)
        assert torch.equal(run(cls, *ARGUMENTS[family], max_unorm=5.0), expected)
        assert not torch.equal(run(ours, **same | {"eta": 5.0, "clip": False}), expected)


def test_args_replaces_the_settings(bnb, patched):
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=64, max_unorm=0.0, skip_zeros=False)
    p = Parameter(torch.ones(128))
    p.grad = torch.ones(128)
    optimizer = bnb.optim.AdamW([p], optim_bits=32, args=args)
    optimizer.step()
    assert state_types(optimizer) == [torch.uint8]
    args.optim_bits = 32
    assert bnb.optim.SGD8bit([p], 0.1, 0.9, args=args).param_groups[0]["optim_bits"] == 32


def test_words_of_other_releases_and_of_ours(bnb, patched):
    p = one()
    bnb.optim.AdamW8bit([p], betas="(0.9, 0.95)", percentile_clipping=100, block_wise=True).step()
    optimizer = bnb.optim.Adam8bit([p], max_grad_norm=1.0)
    assert optimizer.settings["max_grad_norm"] == 1.0

    class AdamW8bit:  # the arguments before 0.50
        def __init__(
            self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False,
            optim_bits=32, args=None, min_8bit_size=4096, percentile_clipping=100, block_wise=True,
            is_paged=False,
        ): ...  # fmt: skip

    old = names.drop_in(AdamW8bit)
    old([p], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 32, None, 4096, 100, True, False).step()
    with pytest.raises(ValueError, match="AdamW8bit: percentile_clipping=5 is not supported"):
        old([p], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 32, None, 4096, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamW", {"is_paged": True}, "AdamW: is_paged=True is not supported. Leave it out"),
        ("Adam", {"amsgrad": True}, "Adam: amsgrad=True is not supported. Use torch.optim"),
        ("AdamW", {"optim_bits": 4}, "AdamW: needs optim_bits 8 or 32, got 4"),
        ("Lion", {"args": types.SimpleNamespace(skip_zeros=True)}, "Lion: skip_zeros=True is not"),
        ("Lion8bit", {"args": types.SimpleNamespace(max_unorm=1.0)}, "Use max_grad_norm"),
        ("LARS", {"lr": 1, "max_unorm": 0.0}, "LARS: max_unorm=0.0 is not supported. Use SGD"),
        ("LARS8bit", {"lr": 1, "nesterov": True}, "LARS8bit: nesterov=True is not supported"),
        ("LARS", {"lr": 1, "dampening": 0.1}, "LARS: dampening=0.1 is not supported"),
        ("LAMB8bit", {"max_unorm": 2.0}, "LAMB8bit: max_unorm=2.0 is not supported. Leave it at 1"),
        ("LAMB", {"bias_correction": False}, "LAMB: bias_correction=False is not supported"),
        ("LAMB", {"adam_w_mode": False}, "LAMB: adam_w_mode=False is not supported"),
    ],
)
def test_refused_with_the_reason(bnb, patched, name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(bnb.optim, name)([one()], **options)


# ------------------------------------------------------------------------- single parameters' bits


@pytest.mark.parametrize("cls", ["ours", "patched"])
def test_overrides_of_bitsandbytes_manager(bnb, patched, manager, cls):
    model = nn.ModuleList([nn.Embedding(100, 64), nn.Linear(80, 64, bias=False)])
    model.append(nn.Linear(80, 64, bias=False))
    manager.register_parameters(model.parameters())
    optimizer = (optim if cls == "ours" else bnb.optim).AdamW8bit(model.parameters(), lr=1e-3)
    manager.override_config(model[1].weight, "optim_bits", 32)
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert state_types(optimizer) == [torch.float32, torch.float32, torch.uint8]
    again = optim.AdamW8bit(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert state_types(again) == state_types(optimizer)
    assert optim.memory_report(model, again).states == sum(
        x.nbytes for s in again.state.values() for key, x in s.items() if key[-1] in "12"
    )


def test_smallest_size_of_one_parameter(manager):
    p = one()
    manager.override_config([p], key_value_dict={"min_8bit_size": 10_000})
    optimizer = optim.AdamW8bit([p])
    optimizer.step()
    assert state_types(optimizer) == [torch.float32]


@pytest.mark.parametrize(("key", "value"), [("lr", 0.1), ("optim_bits", 16)])
def test_other_overrides_are_refused(manager, key, value):
    p = one()
    manager.override_config(p, key, value)
    message = rf"GlobalOptimManager: .* got {key}={value} for a parameter of shape \(80, 64\)"
    with pytest.raises(ValueError, match=message):
        optim.AdamW8bit([p]).step()


def test_bitsandbytes_is_not_imported(monkeypatch):
    for module in [module for module in sys.modules if module.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, module)
    optim.AdamW8bit([one()]).step()
    assert not [module for module in sys.modules if module.startswith("bitsandbytes")]


def test_bits_of_a_group():
    p, q = one(), one()
    optimizer = optim.AdamW8bit([{"params": [p], "bits": 32}, {"params": [q]}])
    optimizer.step()
    assert state_types(optimizer) == [torch.float32, torch.uint8]
    with pytest.raises(ValueError, match="AdamW8bit: needs optim_bits 8 or 32, got 16"):
        optim.AdamW8bit([{"params": [p], "bits": 16}])


# ---------------------------------------------------------------------------------- StableEmbedding


def test_stable_embedding_is_bitsandbytes(bnb, manager):
    theirs = bnb.nn.StableEmbedding(100, 64, 3)
    ours = optim.StableEmbedding(100, 64, 3)
    signatures = [
        list(inspect.signature(x).parameters) for x in (optim.StableEmbedding, type(theirs))
    ]
    assert signatures[0] == signatures[1]
    assert not ours.weight[3].any()
    assert ours.weight.abs().max() <= (6 / 164) ** 0.5 < 1.02 * ours.weight.abs().max()
    nn.init.normal_(theirs.norm.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    indices = torch.randint(100, (4, 7))
    torch.testing.assert_close(ours(indices), theirs(indices))


def test_stable_embedding_keeps_fp32_states_in_copies_and_in_16_bits():
    model = nn.Sequential(optim.StableEmbedding(100, 64), nn.Linear(64, 80, bias=False))
    for network in (copy.deepcopy(model), model.bfloat16()):
        optimizer = optim.AdamW8bit(network.parameters())
        y = network(torch.randint(100, (4, 7)))
        y.square().sum().backward()
        optimizer.step()
        assert y.dtype == network[1].weight.dtype
        assert optimizer.state[network[0].weight]["state1"].dtype == torch.float32
        assert optimizer.state[network[1].weight]["state1"].dtype == torch.uint8


# --------------------------------------------------------------------------------- parameter groups


def layers_of(model, **options):
    """(layer, weight_decay) of each parameter, of groups with decay 1/2 and rate 1 at the end."""
    groups = optim.param_groups_layer_decay(model, 1.0, 0.1, 0.5)
    owner = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(owner)
    return {
        name: (owner[id(p)]["lr"], owner[id(p)]["weight_decay"])
        for name, p in model.named_parameters()
        if id(p) in owner
    }


def check_vit(found, inputs, block, depth, last):
    first = 0.5 ** (depth + 1)
    assert {found[name] for name in inputs} == {(first, 0.0)}
    for k in (0, 1, depth - 1):
        of_block = {value for name, value in found.items() if block.format(k) in name}
        assert of_block == {(0.5 ** (depth - k), 0.1), (0.5 ** (depth - k), 0.0)}
    assert {found[name] for name in last} == {
        (1.0, 0.1 if "head" in name else 0.0) for name in last
    }


def test_layers_of_our_vit_and_resnet():
    vit = models.ViTSmall()
    vit.norm.bias.requires_grad_(False)
    found = layers_of(nn.Sequential(vit, nn.Linear(96, 10)))
    check_vit(found, ["0.cls", "0.patch_embed.bias"], "0.blocks.{}.", 4, ["0.norm.weight"])
    assert "0.norm.bias" not in found
    assert found["0.patch_embed.weight"] == (0.5**5, 0.1) and found["1.weight"] == (1.0, 0.1)
    resnet = models.ResNetSmall()
    found = layers_of(resnet)
    stages = len(resnet.stages)
    assert found["conv.weight"] == (0.5 ** (stages + 1), 0.1)
    for stage in range(stages):
        assert found[f"stages.{stage}.conv1.weight"] == (0.5 ** (stages - stage), 0.1)
        assert found[f"stages.{stage}.bn1.weight"] == (0.5 ** (stages - stage), 0.0)


def test_layers_of_torchvision():
    library = pytest.importorskip("torchvision").models
    found = layers_of(library.VisionTransformer(32, 16, 4, 2, 32, 64))
    inputs = ["class_token", "encoder.pos_embedding", "conv_proj.bias"]
    check_vit(found, inputs, "encoder_layer_{}.", 4, ["encoder.ln.bias", "heads.head.weight"])
    found = layers_of(library.get_model("resnet18"))
    first = {value for name, value in found.items() if name.startswith(("conv1", "bn1"))}
    assert first == {(0.5**5, 0.1), (0.5**5, 0.0)}
    assert found["layer1.1.conv2.weight"] == (0.5**4, 0.1)
    assert found["layer4.0.downsample.1.weight"] == (0.5, 0.0)
    assert found["fc.weight"] == (1.0, 0.1)


TIMM = ["vit_tiny_patch16_224", "resnet18", "convnext_atto"]
TIMM += ["swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"]  # by their no_weight_decay()


@pytest.mark.parametrize("name", TIMM)
def test_layers_are_timms(name):
    timm = pytest.importorskip("timm.optim")
    model = pytest.importorskip("timm").create_model(name, num_classes=10)
    skip = getattr(model, "no_weight_decay", set)()
    theirs = timm.param_groups_layer_decay(model, 0.05, skip, layer_decay=0.7)
    ours = optim.param_groups_layer_decay(model, 2.0, 0.05, 0.7)

    def by_parameter(groups, rate):
        return {id(p): (rate(g), g["weight_decay"]) for g in groups for p in g["params"]}

    expected = by_parameter(theirs, lambda g: 2.0 * g["lr_scale"])
    assert by_parameter(ours, lambda g: g["lr"]) == expected


def test_tokens_and_positions_do_not_decay():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", reg_tokens=2)
    decay, rest = optim.param_groups(model, 0.1)
    held = {id(p) for p in rest["params"]}
    for p in (model.cls_token, model.reg_token, model.pos_embed, model.norm.weight):
        assert id(p) in held
    assert id(model.patch_embed.proj.weight) in {id(p) for p in decay["params"]}


def test_positions_in_modules_and_names_given_by_a_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    inner = model[1]
    inner.pos_embed, inner.words = nn.Embedding(5, 4), nn.Embedding(5, 4)
    inner.table, inner.mlp = nn.Parameter(torch.ones(3, 2)), nn.Linear(2, 2)
    inner.block = nn.Module()
    inner.block.pos_embed = nn.Conv2d(4, 4, 3, groups=4)  # a layer, not a table
    inner.no_weight_decay = lambda: {"table", "mlp.*"}
    decay, rest = optim.param_groups(model, 0.1)
    expected = {"0.weight", "1.words.weight", "1.block.pos_embed.weight"}
    held = {id(p) for p in decay["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in held} == expected


def test_layer_decay_says_what_it_needs():
    with pytest.raises(ValueError, match=r"needs layer_decay in \(0, 1\], got 0"):
        optim.param_groups_layer_decay(models.ViTSmall(), 1.0, 0.1, 0)
    with pytest.raises(ValueError, match="Linear must have blocks named .*, got weight, bias"):
        optim.param_groups_layer_decay(nn.Linear(2, 2), 1.0, 0.1, 0.5)


# ---------------------------------------------------------------------------- timm and transformers


def test_timms_factory(caplog):
    factory = pytest.importorskip("timm.optim")
    registered = optim.register_timm()
    assert optim.register_timm() == registered
    assert "overwriting" not in caplog.text  # neither timm's names nor ours
    model = nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80))
    for name in registered:
        optimizer = factory.create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.05)
        assert type(optimizer).__name__.lower() == name.removeprefix("fastssl_").removesuffix(
            "32bit"
        )
        assert optimizer.defaults["optim_bits"] == (8 if name.endswith("8bit") else 32)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    sgd = factory.create_optimizer_v2(model, opt="sgd8bit", lr=0.1, momentum=0.8)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]


def test_a_timm_without_registry(monkeypatch):
    factory = pytest.importorskip("timm.optim._optim_factory")
    monkeypatch.delattr(factory, "default_registry")
    with pytest.raises(ImportError, match=r"register_timm: timm must .*1.0.12 or later"):
        optim.register_timm()


class Words(nn.Module):
    """Predicts a word from a word: Trainer's signature."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(100, 64), nn.Linear(64, 100)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def trained(path, resume=None, options=None, **kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    words = torch.randint(100, (16, 2, 8))
    args = transformers.TrainingArguments(
        str(path), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **(options or {}),
    )  # fmt: skip
    data = [{"input_ids": x, "labels": y} for x, y in words]
    trainer = transformers.Trainer(Words(), args, train_dataset=data, **kind)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_hugging_face_trainer(tmp_path):
    kind = {"optimizer_cls_and_kwargs": (optim.AdamW8bit, {"lr": 1e-2})}
    trainer = trained(tmp_path, **kind)
    assert isinstance(trainer.optimizer.optimizer, optim.AdamW8bit)
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), **kind)
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_hugging_face_trainers_names_for_bitsandbytes(patched, manager, tmp_path):
    optimizer = trained(tmp_path, options={"optim": "adamw_bnb_8bit"}).optimizer.optimizer
    assert isinstance(optimizer, optim.AdamW8bit)
    embedding, weight, bias = state_types(optimizer)
    assert embedding == torch.float32  # by the manager, as Trainer tells it
    assert weight == torch.uint8


def test_the_lines_of_the_readme_run(bnb):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    blocks = [block for block in blocks if "bitsandbytes" in block]
    assert len(blocks) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that other tests hold
        for block in blocks:
            exec(block, {"model": nn.Linear(64, 80)})
    assert issubclass(bnb.optim.AdamW8bit, optim.AdamW8bit)
    fastssl.unpatch("bitsandbytes")
