"""patch and unpatch, against the installed open_clip and lightly."""

import importlib
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.nn.functional import normalize

import fastssl
from fastssl import losses, patch, unpatch
from fastssl.patching import LIBRARIES

LOSSES = [(library, name) for library in ("open_clip", "lightly") for name in LIBRARIES[library][2]]


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


def home_of(library):
    return pytest.importorskip(LIBRARIES[library][1])


def names_of(library):
    """All globals of the library's loaded modules."""
    return {
        (module.__name__, name): value
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__name__.split(".")[0] == library
        for name, value in vars(module).items()
    }


@pytest.mark.parametrize(("library", "name"), LOSSES)
def test_every_name_of_a_loss_is_ours_until_unpatched(library, name):
    original = getattr(home_of(library), name)
    before = names_of(library)
    of_loss = [f"{module}.{key}" for (module, key), value in before.items() if value is original]
    swapped = patch(library)
    assert set(of_loss) <= set(swapped)
    assert f"{LIBRARIES[library][1]}.{name}" in swapped
    after = names_of(library)
    assert original not in [value for value in after.values() if isinstance(value, type)]
    assert getattr(home_of(library), name) is getattr(losses, name)
    assert sorted(unpatch(library)) == sorted(swapped)
    restored = names_of(library)
    assert before.keys() == restored.keys()
    assert all(restored[key] is value for key, value in before.items())


def create_loss_args(**changes):
    args = {
        "distill": False, "model": "ViT-B-32", "siglip": False, "loss_dist_impl": None,
        "coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0, "local_loss": False,
        "gather_with_grad": True, "rank": 0, "world_size": 1, "horovod": False,
    }  # fmt: skip
    return types.SimpleNamespace(**{**args, **changes})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "ClipLoss"),
        ({"local_loss": True}, "ClipLoss"),
        ({"siglip": True}, "SigLipLoss"),
        ({"siglip": True, "loss_dist_impl": "gather"}, "SigLipLoss"),
    ],
)
def test_open_clip_makes_ours(changes, name):
    open_clip = pytest.importorskip("open_clip")
    args = create_loss_args(**changes)
    image, text = normalize(torch.randn(2, 9, 16), dim=-1).unbind()
    theirs = open_clip.create_loss(args)(image, text, 10.0, -10.0, output_dict=True)
    patch("open_clip")
    loss = open_clip.create_loss(args)
    assert type(loss) is getattr(losses, name)
    torch.testing.assert_close(loss(image, text, 10.0, -10.0, output_dict=True), theirs)


@pytest.mark.parametrize("changes", [{"model": "coca_ViT-B-32"}, {"distill": True}])
def test_open_clips_subclasses_keep_working(changes):
    open_clip = pytest.importorskip("open_clip")
    image, text, image2, text2 = normalize(torch.randn(4, 9, 16), dim=-1).unbind()
    logits, labels = torch.randn(9, 5, 7), torch.randint(1, 7, (9, 5))
    inputs = (image, text, logits, labels, 10.0)
    if "distill" in changes:
        inputs = (image, text, 10.0, image2, text2, 20.0)
    theirs = open_clip.create_loss(create_loss_args(**changes))(*inputs)
    patch("open_clip")
    loss = open_clip.create_loss(create_loss_args(**changes))
    assert type(loss).__module__ == "open_clip.loss"
    torch.testing.assert_close(loss(*inputs), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", LIBRARIES["lightly"][2])
def test_lightly_makes_ours(name):
    lightly_loss = home_of("lightly")
    views = torch.randn(2, 9, 16).unbind()
    options, inputs, named, rtol = {}, views, {}, 1e-4
    if name == "SwaVLoss":
        inputs = (views, [])
    if name in ("DINOLoss", "IBOTPatchLoss"):
        options = {"output_dim": 16}
    if name == "DINOLoss":
        inputs = (views, views, 0.05)  # teachers, students, temperature
    if name == "IBOTPatchLoss":
        mask = (torch.rand(4, 6).argsort(1) < 2).view(4, 2, 3)  # two patches of each image
        inputs = (torch.randn(8, 16), torch.randn(8, 16), mask)
    if name == "KoLeoLoss":
        inputs = views[:1]
    if name == "LeJEPALoss":  # of random directions, other ones here and there
        inputs, rtol = (), 0.05
        named = {"local_proj": torch.stack(views), "global_proj": torch.stack(views)}
    with warnings.catch_warnings():  # lightly's DCLWLoss copies a tensor by torch.tensor
        warnings.filterwarnings("ignore", "To copy construct")
        theirs = getattr(lightly_loss, name)(**options)(*inputs, **named)
    patch("lightly")
    loss = getattr(lightly_loss, name)(**options)
    assert type(loss) is getattr(losses, name)
    torch.testing.assert_close(loss(*inputs, **named), theirs.squeeze(), rtol=rtol, atol=1e-5)


def test_lightlys_subclass_keeps_working():
    lightly_loss = home_of("lightly")
    views = torch.randn(2, 9, 16).unbind()
    theirs = lightly_loss.DirectCLRLoss(loss_dim=8)(*views)
    patch("lightly")
    torch.testing.assert_close(
        lightly_loss.DirectCLRLoss(loss_dim=8)(*views), theirs, rtol=0, atol=0
    )


def test_names_imported_before_are_named_in_one_warning(monkeypatch):
    home = home_of("open_clip")
    script, helpers = types.ModuleType("train_script"), types.ModuleType("their.helpers")
    script.ClipLoss, helpers.Loss = home.ClipLoss, home.ClipLoss
    for module in (script, helpers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.warns(UserWarning) as caught:
        patch("open_clip")
    (warning,) = caught
    assert "train_script.ClipLoss, their.helpers.Loss still refer to open_clip's own" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert script.ClipLoss is not losses.ClipLoss


def test_twice_is_as_once():
    home = home_of("open_clip")
    original = home.ClipLoss
    assert patch("open_clip") and patch("open_clip") == []
    unpatch()
    assert home.ClipLoss is original
    assert unpatch() == []


def test_unpatch_reaches_what_the_library_imported_while_patched(monkeypatch):
    home = home_of("lightly")
    original = home.NTXentLoss
    patch("lightly")
    late = types.ModuleType("lightly.late")
    late.NTXentLoss = home.NTXentLoss
    monkeypatch.setitem(sys.modules, "lightly.late", late)
    assert "lightly.late.NTXentLoss" in unpatch("lightly")
    assert late.NTXentLoss is original


def test_unpatch_by_name_leaves_the_other():
    for library in LIBRARIES:
        home_of(library)
        patch(library)
    unpatch("lightly")
    assert home_of("open_clip").ClipLoss is losses.ClipLoss
    assert home_of("lightly").NTXentLoss is not losses.NTXentLoss


def test_a_release_without_one_of_the_losses(monkeypatch):
    home = home_of("open_clip")
    monkeypatch.delattr(home, "SigLipLoss")
    assert "open_clip.loss.ClipLoss" in patch("open_clip")
    assert not hasattr(home, "SigLipLoss")


@pytest.mark.parametrize("function", [patch, unpatch])
def test_unknown_library(function):
    message = (
        rf"{function.__name__}: library must be a known one, got 'open-clip'. "
        r"Did you mean 'open_clip'\? Known: bitsandbytes, lightly, open_clip."
    )
    with pytest.raises(ValueError, match=message):
        function("open-clip")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "not_there", ("not-there", "not_there.loss", ()))
    with pytest.raises(ImportError, match="not_there is not installed. .* pip install not-there"):
        patch("not_there")


def test_first_lines_of_a_script():
    """As a script has it: patch before the library is imported, then `from` imports."""
    pytest.importorskip("open_clip")
    code = (
        "import fastssl; fastssl.patch('open_clip')\n"
        "from open_clip import ClipLoss\n"
        "assert ClipLoss is fastssl.losses.ClipLoss"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_patch_stays_a_function():
    importlib.reload(fastssl)
    importlib.import_module("fastssl.patching")
    assert callable(fastssl.patch) and callable(fastssl.unpatch)
