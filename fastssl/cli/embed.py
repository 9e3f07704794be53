"""fastssl embed: features of all images in a folder."""

import sys

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "embed",
        "WHAT FOLDER --out FILE [options]",
        "Write the features of every image below a folder, in the order of their names.",
    )
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="a run's folder or a file of weights (each may end in :teacher), or timm:NAME or"
        " torchvision:NAME for what they publish",
    )
    parser.add_argument("folder", metavar="FOLDER", help="images, in subfolders too")
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help=".npz (arrays features, paths) or .safetensors (features; paths in the metadata).",
    )
    parser.add_argument(
        "--backbone", metavar="NAME", help="of a file that does not say which network it is of."
    )
    parser.add_argument("--image-size", metavar="N", type=int, help="Default: the network's own.")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=256, help="images per pass. Default: 256."
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, default=4, help="decoding threads. Default: 4."
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto."
    )
    options = vars(parser.parse(argv))

    from ..evaluate import embed

    out = options["out"]
    embedding = embed(options.pop("what"), options.pop("folder"), options.pop("out"), **options)
    N, D = embedding.features.shape
    print(f"{out}: {N} images, {D} features")
    for name, reason in embedding.corrupt.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    return 0
