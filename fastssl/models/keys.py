"""Parameter names of vision transformers and ResNets in timm, torchvision and Hugging Face."""

from collections.abc import Iterable

LIBRARIES = ("timm", "torchvision", "hf")

# The beginning of a name in timm, torchvision, and in the files of Hugging Face's transformers; #
# is a number. What Hugging Face keeps apart is one tensor elsewhere: query over key over value.
_LAYER = "encoder.layers.encoder_layer_#."
_VIT = (
    ("cls_token", "class_token", "embeddings.cls_token"),
    ("pos_embed", "encoder.pos_embedding", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "conv_proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.#.norm1.", _LAYER + "ln_1.", "encoder.layer.#.layernorm_before."),
    (
        "blocks.#.attn.qkv.",
        _LAYER + "self_attention.in_proj_",
        "encoder.layer.#.attention.attention.(query|key|value).",
    ),
    (
        "blocks.#.attn.proj.",
        _LAYER + "self_attention.out_proj.",
        "encoder.layer.#.attention.output.dense.",
    ),
    ("blocks.#.norm2.", _LAYER + "ln_2.", "encoder.layer.#.layernorm_after."),
    ("blocks.#.mlp.fc1.", _LAYER + "mlp.0.", "encoder.layer.#.intermediate.dense."),
    ("blocks.#.mlp.fc2.", _LAYER + "mlp.3.", "encoder.layer.#.output.dense."),
    ("norm.", "encoder.ln.", "layernorm."),
)


def _resnet():
    yield "conv1.", "embedder.embedder.convolution."
    yield "bn1.", "embedder.embedder.normalization."
    for stage in range(4):
        ours, theirs = f"layer{stage + 1}.#.", f"encoder.stages.{stage}.layers.#."
        for conv in range(3):
            yield f"{ours}conv{conv + 1}.", f"{theirs}layer.{conv}.convolution."
            yield f"{ours}bn{conv + 1}.", f"{theirs}layer.{conv}.normalization."
        yield f"{ours}downsample.0.", f"{theirs}shortcut.convolution."
        yield f"{ours}downsample.1.", f"{theirs}shortcut.normalization."


_FAMILIES = {"vit": _VIT, "resnet": tuple((ours, ours, theirs) for ours, theirs in _resnet())}


def family(names: Iterable[str]) -> str | None:
    """`vit` or `resnet` if that is what these parameter names of timm or torchvision are; else
    None, as for variants with parts of their own (layer scale, squeeze and excitation)."""
    names = list(names)
    for known, rows in _FAMILIES.items():
        for own in (0, 1):
            if names and all(_row(name, rows, own) for name in names):
                return known
    return None


def names_in(library: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What parameters are called in another library.

    Args:
        library: "timm", "torchvision" or "hf".
        names: parameter names of a ViT or ResNet as timm or torchvision has it.

    Returns:
        For each name its name there; three where a tensor is the rows of three.

    Raises:
        ValueError: a name that belongs to no plain ViT or ResNet.
    """
    names, column = list(names), LIBRARIES.index(library)
    known = family(names)
    if known is None:
        raise ValueError(
            "only a plain ViT (class token, learned positions, one LayerNorm at the end) or ResNet "
            f"has names there, got {_strange(names)!r}."
        )
    rows = _FAMILIES[known]
    own = next(c for c in (0, 1) if all(_row(name, rows, c) for name in names))
    return {name: _renamed(name, rows, own, column) for name in names}


def _row(name: str, rows, column: int):
    """The row a name belongs to, the number in it and what follows; None if there is none."""
    for row in rows:
        start, numbered, rest = row[column].partition("#")
        if not name.startswith(start):
            continue
        end = name[len(start) :]
        number = ""
        if numbered:
            number = end[: len(end) - len(end.lstrip("0123456789"))]
            end = end[len(number) :]
            if not number or not end.startswith(rest):
                continue
            end = end[len(rest) :]
        if "." not in end:
            return row, number, end
    return None


def _renamed(name: str, rows, own: int, column: int) -> tuple[str, ...]:
    row, number, end = _row(name, rows, own)
    start, opened, choice = row[column].replace("#", number).partition("(")
    if not opened:
        return (start + end,)
    parts, _, rest = choice.partition(")")
    return tuple(start + part + rest + end for part in parts.split("|"))


def _strange(names: list[str]) -> str:
    """The first name that keeps a network out of the family it comes nearest to."""
    strangers = [
        [name for name in names if not _row(name, rows, own)]
        for rows in _FAMILIES.values()
        for own in (0, 1)
    ]
    return min(strangers, key=len)[0]
