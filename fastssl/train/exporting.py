"""A run's backbone in the form that another library reads, read back there and compared."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..extras import nearest, require
from ..models import build_backbone
from ..models.keys import family, names_in
from ..outputs import check_file
from .backbones import load_backbone
from .checkpoint import replacing, replacing_folder

FORMATS = ("safetensors", "timm", "torchvision", "hf", "onnx")
_ENDINGS = {"hf": ("",), "onnx": (".onnx",)}
_FILE_ENDINGS = (".safetensors", ".pth")


def export(
    run: str | Path, format: str, out: str | Path, weights: str = "student"
) -> dict[str, Any]:
    """Write a run's backbone for another library, read it back there and compare the features.

    Args:
        run: folder of a finished run.
        format: `safetensors` keeps the backbone's own names; `timm`, `torchvision` and `hf` (the
            transformers of Hugging Face) take theirs, for a plain ViT or ResNet of timm or
            torchvision; `onnx` is a graph for batches of any size. The built-in backbones are in
            no other library, so for them there are only `safetensors` and `onnx`.
        out: a .safetensors or .pth file; for onnx an .onnx file; for hf a folder, made with what
            `AutoModel.from_pretrained` wants. It must not exist.
        weights: "student", or "teacher" of a method that has one.

    Returns:
        path, format, backbone, weights, tensors (their number), and difference: the largest of the
        features, on random images, over the largest feature; None where the library that would have
        to read the file is not installed.

    Raises:
        FileNotFoundError: not a run, or not finished. FileExistsError: out exists.
        NotADirectoryError, PermissionError: out cannot be written.
        ValueError: an unknown format, a backbone that it cannot hold, or a wrong ending of out.
            What was read back computes something else.
        ImportError: an exporter is missing.

    Notes: out is there when it is whole and what was read back agrees, or not at all; its mode is
        the umask's.
    """
    out, run = Path(out), Path(run)
    if format not in FORMATS:
        known = nearest(format, FORMATS)
        raise ValueError(f"export: format must be a known one, got {format!r}. {known}")
    endings = _ENDINGS.get(format, _FILE_ENDINGS)
    if out.suffix not in endings:
        wanted = (
            f"end in {' or '.join(endings)}" if endings[0] else "be a folder, without an ending,"
        )
        raise ValueError(f"export: out must {wanted} for {format}, got {str(out)!r}.")
    if out.exists():
        raise FileExistsError(f"export: {out} exists. Choose another out, or remove it first.")
    check_file("export", out)
    backbone, info = load_backbone(run, weights)
    state = _renamed(backbone, info["backbone"], format)
    x = torch.randn(3, info["channels"], info["image_size"], info["image_size"])
    out.parent.mkdir(parents=True, exist_ok=True)
    if format == "hf":
        with replacing_folder(out) as folder:
            read_back = _write_hf(backbone, info, state, folder)
            difference = read_back and _difference(backbone, read_back, x, out)
    else:
        with replacing(out) as file:
            if format == "onnx":
                read_back = _write_onnx(backbone, x, file)
            else:
                read_back = _write_file(backbone, info, state, format, out.suffix, file)
            difference = read_back and _difference(backbone, read_back, x, out)
    return {
        "path": str(out),
        "format": format,
        "backbone": info["backbone"],
        "weights": weights,
        "tensors": len(backbone.state_dict()),
        "difference": difference,
    }


def _renamed(backbone: nn.Module, name: str, format: str) -> dict[str, Tensor]:
    """The backbone's weights by the names of the format."""
    state = {key: tensor.contiguous() for key, tensor in backbone.state_dict().items()}
    library = name.rpartition(":")[0]
    if format in ("safetensors", "onnx", library):
        return state
    if not library:
        raise ValueError(
            f"export: {format} has no network like the built-in {name}. Export it as safetensors "
            "or onnx, or train a timm: or torchvision: backbone."
        )
    try:
        names = names_in(format, state)
    except ValueError as error:
        raise ValueError(
            f"export: {name} is no network of {format}: {error} Export it as {library}, "
            "safetensors or onnx."
        ) from error
    return {
        part: piece.contiguous()
        for key, parts in names.items()
        for part, piece in zip(parts, _pieces(state[key], len(parts)), strict=True)
    }


def _pieces(tensor: Tensor, number: int) -> tuple[Tensor, ...]:
    return tensor.chunk(number) if number > 1 else (tensor,)


def _difference(backbone: nn.Module, read_back: Callable, x: Tensor, out: Path) -> float:
    with torch.no_grad():
        expected, got = backbone(x), read_back(x)
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    difference = ((got - expected).abs().max() / largest).item()
    if not difference < 1e-4:  # also NaN
        raise ValueError(
            f"export: the network read back from {out} computes other features than the run's, by "
            f"{difference:.1e} of the largest: they differ in more than names. Export it as "
            "safetensors."
        )
    return difference


def _write_file(backbone, info, state: dict[str, Tensor], format: str, ending: str, file: BinaryIO):
    safetensors = require("safetensors.torch", "train")
    if ending == ".pth":
        torch.save(state, file)
    else:
        kept = ("backbone", "channels", "image_size", "method")
        metadata = {"format": "pt"} | {key: str(info[key]) for key in kept}
        file.write(safetensors.save(state, metadata))
    if not _installed(format):
        return None
    file.flush()
    network = _empty(backbone, info, format)
    if ending == ".pth":
        network.load_state_dict(torch.load(file.name, weights_only=True))
    else:
        network.load_state_dict(safetensors.load_file(file.name))
    return network.eval()


def _empty(backbone: nn.Module, info: dict[str, Any], format: str) -> nn.Module:
    """The same network in the library of the format, at random weights and without a head."""
    name, channels, side = info["backbone"], info["channels"], info["image_size"]
    if format in ("safetensors", name.rpartition(":")[0]):
        return build_backbone(name, channels, side)
    size = _sizes(backbone)
    if format == "timm":
        models = require("timm", "vision").models
        common = {"in_chans": channels, "num_classes": 0}
        if family(backbone.state_dict()) == "vit":
            ratio = size["hidden"] / size["width"]
            return models.VisionTransformer(
                side, size["patch"], embed_dim=size["width"], depth=size["depth"],
                num_heads=size["heads"], mlp_ratio=ratio, **common,
            )  # fmt: skip
        block = getattr(models.resnet, size["block"])
        cardinality = {"cardinality": size["groups"], "base_width": size["group_width"]}
        return models.ResNet(block, size["depths"], **cardinality, **common)
    if channels != 3:
        raise ValueError(
            f"export: torchvision's networks take 3 channels, {name} takes {channels}. Export it "
            "as timm, hf, safetensors or onnx."
        )
    models = require("torchvision.models", "vision")
    if family(backbone.state_dict()) == "vit":
        sizes = (size[key] for key in ("patch", "depth", "heads", "width", "hidden"))
        network = models.VisionTransformer(side, *sizes)
        network.heads = nn.Identity()
        return network
    block = getattr(models.resnet, size["block"])
    widths = {"groups": size["groups"], "width_per_group": size["group_width"]}
    network = models.ResNet(block, size["depths"], **widths)
    network.fc = nn.Identity()
    return network


def _sizes(backbone: nn.Module) -> dict[str, Any]:
    """What a plain ViT or ResNet was built with, as its weights tell."""
    state = backbone.state_dict()
    by_timm = {names[0]: state[key] for key, names in names_in("timm", state).items()}
    if family(state) == "vit":
        heads = (m.num_heads for m in backbone.modules() if hasattr(m, "num_heads"))
        return {
            "width": by_timm["cls_token"].shape[-1],
            "patch": by_timm["patch_embed.proj.weight"].shape[-1],
            "depth": sum(key.endswith(".norm1.weight") for key in by_timm),
            "heads": next(heads),
            "hidden": len(by_timm["blocks.0.mlp.fc1.bias"]),
        }
    bottleneck = "layer1.0.conv3.weight" in by_timm
    stages = [f"layer{number}." for number in (1, 2, 3, 4)]
    last = "0.bn3.weight" if bottleneck else "0.bn2.weight"
    middle = by_timm["layer1.0.conv2.weight"]
    groups = len(middle) // middle.shape[1]
    return {
        "block": "Bottleneck" if bottleneck else "BasicBlock",
        "depths": [
            sum(key.startswith(stage) and key.endswith(".conv1.weight") for key in by_timm)
            for stage in stages
        ],
        "stem": len(by_timm["bn1.weight"]),
        "widths": [len(by_timm[stage + last]) for stage in stages],
        "groups": groups,
        "group_width": len(middle) // groups,
    }


def _write_hf(backbone: nn.Module, info: dict[str, Any], state: dict[str, Tensor], folder: Path):
    """Weights, config.json and preprocessor_config.json."""
    size, side, channels = _sizes(backbone), info["image_size"], info["channels"]
    vit = family(backbone.state_dict()) == "vit"
    if vit:
        config = {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": size["width"],
            "num_hidden_layers": size["depth"],
            "num_attention_heads": size["heads"],
            "intermediate_size": size["hidden"],
            "patch_size": size["patch"],
            "image_size": side,
            "layer_norm_eps": 1e-6,
        }
    else:
        if size["groups"] != 1 or size["block"] == "Bottleneck" and size["group_width"] != 64:
            raise ValueError(
                f"export: Hugging Face's ResNets have no groups and no wider bottlenecks, as "
                f"{info['backbone']} has. Export it as timm, torchvision, safetensors or onnx."
            )
        config = {
            "architectures": ["ResNetModel"],
            "model_type": "resnet",
            "embedding_size": size["stem"],
            "hidden_sizes": size["widths"],
            "depths": size["depths"],
            "layer_type": size["block"].removesuffix("Block").lower(),
        }
    config |= {"num_channels": channels, "dtype": "float32"}
    mean = [0.485, 0.456, 0.406] if channels == 3 else [0.5] * channels  # as `prepare` normalises
    std = [0.229, 0.224, 0.225] if channels == 3 else [0.5] * channels
    images = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    images |= {"size": {"height": side, "width": side}}
    weights = require("safetensors.torch", "train").save(state, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (folder / "model.safetensors").write_bytes(weights)
    if not _installed("hf"):
        return None
    transformers = require("transformers", "export")
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    network = transformers.AutoModel.from_pretrained(
        folder, **({"add_pooling_layer": False} if vit else {})
    )
    if bar:
        transformers.logging.enable_progress_bar()
    network.eval()
    if vit:
        return lambda x: network(x).last_hidden_state[:, 0]
    return lambda x: network(x).pooler_output.flatten(1)


def _write_onnx(backbone: nn.Module, x: Tensor, file: BinaryIO):
    require("onnxscript", "export")
    onnx = require("onnx", "export")
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            backbone, (x,), input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: batch},), dynamo=True, verbose=False,
        )  # fmt: skip
    file.write(program.model_proto.SerializeToString())
    file.flush()
    if not onnx.load(file.name).graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError(
            "export: the number of images is built into the backbone's graph, as by len(x) in its "
            "forward. Write x.shape[0] there, or export it as safetensors."
        )
    if not _installed("onnx"):
        return None
    runtime = require("onnxruntime", "export")
    session = runtime.InferenceSession(file.name, providers=["CPUExecutionProvider"])

    def run(x):
        # Two numbers of images, since one of them is that of the tracing.
        parts = x.split([1, len(x) - 1])
        return torch.cat(
            [torch.from_numpy(session.run(None, {"images": p.numpy()})[0]) for p in parts]
        )

    return run


def _installed(format: str) -> bool:
    """Whether the library that reads this format is there."""
    reader = {"hf": "transformers", "onnx": "onnxruntime", "safetensors": "safetensors"}
    return importlib.util.find_spec(reader.get(format, format)) is not None
