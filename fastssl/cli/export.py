"""fastssl export: the backbone for another library."""

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "export",
        "RUN --format FORMAT --out FILE [--weights teacher]",
        "Write a run's backbone for another library, read it back there and compare\n"
        "the features. The built-in backbones (resnet_small, vit_small) exist nowhere\n"
        "else: for them there are only safetensors and onnx.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--format",
        required=True,
        help="safetensors (the backbone's own names), timm, torchvision, hf (a folder for"
        " AutoModel.from_pretrained) or onnx.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="a .safetensors or .pth file; for onnx .onnx; for hf a new folder.",
    )
    parser.add_argument(
        "--weights", default="student", help="student, or the method's teacher. Default: student."
    )
    options = parser.parse(argv)

    from ..train import export

    done = export(options.run, options.format, options.out, options.weights)
    print(f"{done['path']}: {done['weights']} of {done['backbone']}, {done['tensors']} tensors")
    if done["difference"] is None:
        print(f"not read back: {options.format} cannot be imported here")
    else:
        print(f"read back: features differ by {done['difference']:.1e} of the largest")
    return 0
